"""Bad input raises when a transformation is built, initialised or traced, and names the value."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from contract import example_losses
from method_parts import NUM_FEATURES, Network, features
from methods import METHODS

import bilb
from bilb.arguments import ABOUT_LOSSES
from bilb.chain import Chain

K = 5
THREE = jnp.ones(3)
every_method = pytest.mark.parametrize("method", METHODS, ids=str)


@every_method
@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (jnp.ones(()), ValueError, r"got shape \(\)"),
        (jnp.ones((2, K)), ValueError, r"got shape \(2, 5\)"),
        (jnp.ones(0), ValueError, r"got shape \(0,\)"),
        (jnp.ones(K, jnp.int32), TypeError, "got dtype int32"),
    ],
    ids=["scalar", "matrix", "empty", "integer"],
)
def test_losses_that_are_no_vector_of_floats(method, losses, error, message):
    transformation = method.make(K)
    with pytest.raises(error, match=message):
        transformation.init(losses)
    state = transformation.init(jnp.ones(K))
    with pytest.raises(error, match=message):
        jax.eval_shape(method.step(transformation), losses, state)


@pytest.mark.parametrize("method", [m for m in METHODS if m.learns], ids=str)
def test_losses_of_another_number_than_the_state(method):
    transformation = method.make(K)
    state = jax.eval_shape(lambda: transformation.init(jnp.ones(K)))
    other = jax.ShapeDtypeStruct((K - 1,), jnp.float32)
    with pytest.raises(ValueError, match=r"K = 4 tasks.*(shape \(5,\)|shape \(\d+, 5\))"):
        jax.eval_shape(method.step(transformation), other, state)


@every_method
def test_a_state_of_another_transformation(method):
    transformation = method.make(K)
    foreign = optax.ScaleByAdamState(*jnp.zeros((3, K)))
    with pytest.raises(ValueError, match=r"state|ScaleByAdamState|tuple"):
        jax.eval_shape(method.step(transformation), example_losses(K), foreign)


@every_method
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (jnp.ones(K), r"got dtype float32 and shape \(5,\)"),
        (jnp.ones(K, jnp.int32), r"got dtype int32 and shape \(5,\)"),
        (jnp.ones(K - 1, bool), r"got dtype bool and shape \(4,\)"),
        (jnp.ones((), bool), r"got dtype bool and shape \(\)"),
    ],
    ids=["float", "integer", "short", "scalar"],
)
def test_masks_that_are_no_vector_of_bools(method, mask, message):
    transformation = method.make(K)
    update = functools.partial(method.update, transformation)
    losses = jnp.ones(K)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: update(losses, transformation.init(losses), mask=mask))


@pytest.mark.parametrize("method", [m for m in METHODS if m.extra(THREE)], ids=str)
def test_a_missing_argument_is_named_with_its_remedy(method):
    transformation = method.make(K)
    losses = jnp.ones(K)
    (name,) = method.keywords(method.extra(losses))
    with pytest.raises(bilb.MissingArgument, match=rf"`{name}`: \w+") as caught:
        jax.eval_shape(lambda: transformation.update(losses, transformation.init(losses)))
    assert caught.value.argument == name
    assert isinstance(caught.value, TypeError)


softmax_clip = lambda *clip: bilb.bilb4mtl(router=bilb.routers.softmax(clip=clip))
linear_softmax = bilb.routers.linear_softmax
with_features = lambda shape: (
    lambda: update_of(
        bilb.bilb4mtl(router=linear_softmax(NUM_FEATURES)), THREE, features=jnp.ones(shape)
    )
)


def update_of(transformation, losses=THREE, **extra):
    return transformation.update(losses, transformation.init(losses), **extra)


def init_of(transformation, losses=THREE):
    return transformation.init(losses)


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, features):
        return nn.softmax(nn.BatchNorm(use_running_average=True)(features).mean(0))


no_where = lambda u: jnp.max(u)
module_router = bilb.routers.from_module(Network(4), jnp.zeros((1, NUM_FEATURES)))
normalized_router = bilb.routers.from_module(Normalized(), jnp.zeros((1, 3)))
short_router = bilb.Router(lambda k, dtype: jnp.ones(k, dtype), lambda w, _: w[:2])
FEATURES = features(jnp.ones(3))

CASES = {
    "weights -1": (lambda: bilb.linear_scalarization(-1.0), ValueError, r"weights.*-1"),
    "weights [1 -2]": (
        lambda: bilb.linear_scalarization(jnp.array([1.0, -2.0])),
        ValueError,
        r"weights.*-2",
    ),
    "weights nan": (lambda: bilb.linear_scalarization(jnp.nan), ValueError, r"weights.*nan"),
    "weights inf": (
        lambda: bilb.linear_scalarization({"a": 1.0, "b": jnp.inf}),
        ValueError,
        r"weights\['b'\] must be finite; got inf",
    ),
    "scales inf": (lambda: bilb.divide_by(jnp.inf), ValueError, "scales must be finite.*inf"),
    "preference inf": (
        lambda: bilb.nash_mtl(preference=jnp.array([1.0, jnp.inf])),
        ValueError,
        "preference must be finite.*inf",
    ),
    "weights (2,)": (
        lambda: init_of(bilb.linear_scalarization(jnp.ones(2))),
        ValueError,
        r"shape \(2,\).*expected \(3\).*weights",
    ),
    "weights text": (lambda: bilb.linear_scalarization("equal"), TypeError, "weights.*equal"),
    "scales 0": (lambda: bilb.divide_by(0.0), ValueError, r"scales.*> 0.*0\.0"),
    "scales -3": (lambda: bilb.divide_by(jnp.array([1.0, -3.0])), ValueError, r"scales.*-3"),
    "scales (2,)": (lambda: init_of(bilb.divide_by(jnp.ones(2))), ValueError, r"\(2,\)"),
    "floor 0": (lambda: bilb.log_losses(0.0), ValueError, r"floor.*0\.0"),
    "floor -1": (lambda: bilb.log_scale_by_initial_loss(None, -1.0), ValueError, r"floor.*-1"),
    "every 0": (lambda: bilb.log_scale_by_initial_loss(0), ValueError, r"every.*got 0"),
    "penalty -1": (lambda: bilb.bilb4mtl(-1.0), ValueError, r"penalty.*-1"),
    "penalty array": (lambda: bilb.bilb4mtl(jnp.float32(-0.5)), ValueError, r"penalty.*-0\.5"),
    "preset penalty": (lambda: bilb.presets.bilb4mtl_celeba(-1.0), ValueError, r"penalty.*-1"),
    "preset every": (lambda: bilb.presets.bilb4mtl_qm9(every=0), ValueError, "every.*got 0"),
    "divisor": (lambda: bilb.bilb4mtl(divisor="mean"), ValueError, "divisor.*'mean'"),
    "router module": (lambda: bilb.bilb4mtl(router=Network(3)), TypeError, "from_module"),
    "router function": (lambda: bilb.bilb4mtl(router=no_where), TypeError, "bilb.Router.*lambda"),
    "router width": (
        lambda: update_of(bilb.bilb4mtl(router=short_router)),
        ValueError,
        r"shape \(2,\).*expected \(3\).*router",
    ),
    "router initial": (
        lambda: init_of(bilb.bilb4mtl(router=bilb.routers.sigmoid(jnp.ones(2)))),
        ValueError,
        r"shape \(2,\).*expected \(3\).*initial",
    ),
    "exponent 0": (lambda: bilb.power_losses(0.0), ValueError, r"exponent.*> 0.*got 0\.0"),
    "exponent below 1": (lambda: bilb.self_adaptive(0.5), ValueError, r"exponent.*>= 1.*0\.5"),
    "softadapt rate": (lambda: bilb.softadapt(rate="mean"), ValueError, "rate.*'mean'"),
    "alpha 2": (lambda: bilb.relobralo(2.0), ValueError, r"alpha.*<= 1.*2\.0"),
    "rho -1": (lambda: bilb.relobralo(rho=-1.0), ValueError, r"rho.*>= 0.*-1"),
    "momentum 2": (lambda: bilb.lr_annealing(2.0), ValueError, r"momentum.*<= 1.*2\.0"),
    "every of norms": (lambda: bilb.lr_annealing(every=0), ValueError, "every.*got 0"),
    "every of conditions": (lambda: bilb.db_pinn(every=0), ValueError, "every.*got 0"),
    "every of 1.5": (lambda: bilb.db_pinn(every=1.5), ValueError, "every.*whole number; got 1.5"),
    "reference 3 of conditions": (
        lambda: init_of(bilb.db_pinn(reference=3)),
        ValueError,
        "reference must be one of 3 tasks; got 3, not 0 to 2",
    ),
    "reference by name": (
        lambda: init_of(bilb.db_pinn(reference="residual")),
        ValueError,
        "reference is given by task name, 'residual'",
    ),
    "decay 1 of norms": (lambda: bilb.gradnorm(decay=1.0), ValueError, "decay must be < 1"),
    "decay -1 of norms": (lambda: bilb.gradnorm(decay=-1.0), ValueError, r"decay.*>= 0.*-1"),
    "decay text": (lambda: bilb.gradnorm(decay="fast"), TypeError, "decay.*fast"),
    "eps -1": (lambda: bilb.db_pinn(eps=-1.0), ValueError, r"eps.*> 0.*got -1\.0"),
    "eps 0": (lambda: bilb.ntk_weights(eps=0.0), ValueError, r"eps.*> 0.*got 0\.0"),
    "decay 1": (lambda: bilb.ntk_weights(decay=1.0), ValueError, "decay"),
    "reference 3": (
        lambda: init_of(bilb.lr_annealing(reference=3)),
        ValueError,
        "reference must be one of 3 tasks; got 3, not 0 to 2",
    ),
    "probes 0": (lambda: bilb.curvatures.probe(0), ValueError, "probes.*got 0"),
    "clip high": (lambda: init_of(softmax_clip(0.2, 0.3)), ValueError, r"\(0\.2, 0\.3\).*3"),
    "clip low": (lambda: init_of(softmax_clip(0.4, 0.8)), ValueError, r"\(0\.4, 0\.8\).*3"),
    "clip default": (
        lambda: init_of(bilb.bilb4mtl(router=linear_softmax(2)), jnp.ones(5)),
        ValueError,
        r"\(0\.2, 0\.8\).*5",
    ),
    "clip preset": (
        lambda: init_of(bilb.presets.bilb4mtl_nyuv2(num_features=2), jnp.ones(5)),
        ValueError,
        r"\(0\.2, 0\.8\).*5",
    ),
    "num_features": (lambda: linear_softmax(0), ValueError, "num_features.*0"),
    "features width": (with_features((8, 3)), ValueError, r"4 features.*\(8, 3\)"),
    "features scalar": (with_features(()), ValueError, r"4 features.*\(\)"),
    "module object": (
        lambda: bilb.routers.from_module(no_where, jnp.zeros((1, 2))),
        TypeError,
        "function",
    ),
    "module state": (
        lambda: init_of(bilb.bilb4mtl(router=normalized_router)),
        ValueError,
        "batch_stats",
    ),
    "module width": (
        lambda: update_of(bilb.bilb4mtl(router=module_router), **FEATURES),
        ValueError,
        r"shape \(4,\).*expected \(3\).*router",
    ),
    "module features": (
        lambda: update_of(bilb.bilb4mtl(router=module_router), jnp.ones(4)),
        bilb.MissingArgument,
        "`features`",
    ),
    "mask without where": (
        lambda: update_of(bilb.bilb4mtl(discrepancy=no_where), mask=jnp.ones(3, bool)),
        TypeError,
        "`where`",
    ),
    "skip without where": (
        lambda: update_of(bilb.skip_nonfinite(bilb.bilb4mtl(discrepancy=no_where))),
        TypeError,
        "`where`",
    ),
    "discrepancy per task": (
        lambda: update_of(bilb.bilb4mtl(discrepancy=lambda u: u)),
        ValueError,
        r"shape \(3,\).*discrepancy must return one number",
    ),
    "sample width": (
        lambda: update_of(bilb.rlw(sample=lambda key, shape, dtype: jnp.ones(2, dtype))),
        ValueError,
        r"shape \(2,\).*expected \(3\).*sample",
    ),
    "transform width": (
        lambda: update_of(bilb.dwa(window=1, transform=jnp.sum)),
        ValueError,
        r"shape \(\).*expected \(3\).*transform",
    ),
    "preference of the call": (
        lambda: update_of(bilb.pbi(), preference=jnp.array([1.0, -2.0, 1.0])),
        ValueError,
        "preference.*-2",
    ),
    "preference of a lower level": (
        lambda: bilb.lower_levels.nash([1.0, 0.0, 1.0]),
        ValueError,
        "preference must be > 0; got .*0",
    ),
    "preferences of a lower level": (
        lambda: update_of(bilb.presets.marigold_pinn(preference=jnp.ones(2)), slopes=jnp.ones(3)),
        ValueError,
        r"shape \(2,\).*preference must be one number or have an entry per task",
    ),
    "widths": (
        lambda: IGB_V2(hidden=(8, 0)),
        ValueError,
        "hidden must be >= 1; got 0",
    ),
    "aggregate K": (lambda: bilb.aggregate_by(bilb.bilb4mtl(), 0), ValueError, "num_tasks.*0"),
    "features without aux": (
        lambda: bilb.value_and_grad(jnp.sin, bilb.bilb4mtl(), features=jnp.cos),
        ValueError,
        "has_aux=True",
    ),
}


SLOW = ("module width", "module features")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, case in CASES.items()
    ],
)
def test_arguments_out_of_range(call, error, message):
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        call()


IGB_V2 = functools.partial(
    bilb.igb_v2, base_start=0, base_steps=1, warmup_steps=1, update_after=1, buffer_size=4,
    batch_size=2, hidden=(2,),
)  # fmt: skip


@pytest.mark.parametrize("argument", sorted(ABOUT_LOSSES))
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_a_link_does_not_read_is_refused_not_passed_by(method, argument):
    """Links fail closed: what speaks of the losses means something else behind each of them."""
    given = method.keywords(method.extra(THREE))
    if argument in given or "guarded" in method.name or isinstance(method.make(3), Chain):
        return
    transformation = method.make(3)
    update = lambda: update_of(transformation, **given, **{argument: THREE})
    with pytest.raises(TypeError, match=rf"`{argument}`.*bilb\.chain"):
        jax.eval_shape(update)


@pytest.mark.parametrize("link", [bilb.log_losses(), bilb.igb_v1(0, 1), bilb.divide_by(2.0)])
def test_a_reader_behind_a_link_of_an_optax_chain_is_refused(link):
    with pytest.raises(TypeError, match=r"`gram`.*bilb\.chain"):
        update_of(optax.chain(link, bilb.mgda()), gram=jnp.eye(3))
