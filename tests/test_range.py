"""Losses over the whole range of float32: the same method in float64 is the reference."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import assert_finite, mostly_slow

import bilb

pytestmark = pytest.mark.x64

LARGEST = float(np.finfo(np.float32).max)
SIZES = [3.3e38, 1.1e38, 1.7e30, 2.9e20, 3.1e19, 7.0, 0.3, 1.3e-8, 2.3e-20, 1.9e-38]
# No loss equals all others: there the derivative of a distance from the diagonal is not defined.
POSITIVE = np.array(
    [row for row in itertools.product(SIZES, repeat=3) if len({*row}) > 1], np.float32
)
SIGNED = np.concatenate([POSITIVE, POSITIVE * [1, -1, 1], POSITIVE * [0, -1, 1]])
SIGNED = SIGNED.astype(np.float32)
# So close that their differences, but not their multiples, are in the range.
CLOSE = np.float32(3.3e38) - np.float32(1e36) * np.arange(6, dtype=np.float32)
PREFERENCE = np.array([0.2, 2.7, 1.9])


def pbi(**options):
    return bilb.pbi(2.0, **options), SIGNED, lambda losses: 0.0


def cosmos(**options):
    # The cosine's derivative is the difference of two numbers of about this size.
    size = lambda losses: 2.0 / np.maximum(np.abs(losses).max(1, keepdims=True), 1e-8)
    return bilb.cosmos(2.0, **options), SIGNED, size


def stch(mu, **options):
    return bilb.stch(mu, **options), SIGNED, lambda losses: 0.0


SCALARISATIONS = {
    "pbi": pbi,
    "pbi-preference": functools.partial(pbi, preference=PREFERENCE, reference=0.1),
    "pbi-large preference": functools.partial(pbi, preference=1e38 * PREFERENCE),
    "cosmos": cosmos,
    "cosmos-preference": functools.partial(cosmos, preference=PREFERENCE),
    "stch": functools.partial(stch, 0.5),
    "stch-sharp": functools.partial(stch, 0.1, preference=PREFERENCE),
    "geometric_mean": lambda: (bilb.geometric_mean(), POSITIVE, lambda losses: 0.0),
}


def in_both_precisions(function, losses):
    """Returns what the function of one loss vector gives for the rows of float32 losses."""
    function = jax.jit(jax.vmap(function))
    return function(losses), function(losses.astype(np.float64))


@pytest.mark.parametrize("name", SCALARISATIONS)
def test_values_and_weights_of_any_finite_losses(name):
    balancer, losses, size = SCALARISATIONS[name]()

    def call(losses):
        def objective(losses):
            balanced, state = balancer.update(losses, balancer.init(losses))
            return balanced.sum(), (balanced, state.weights)

        effective, (balanced, weights) = jax.grad(objective, has_aux=True)(losses)
        return balanced, weights, effective

    single, double = in_both_precisions(call, losses)
    assert_finite(single)
    balanced, weights, effective = single
    np.testing.assert_array_equal(effective, weights)
    expected = np.clip(double[1], -LARGEST, LARGEST)
    scale = np.abs(expected).max(1, keepdims=True) + size(losses.astype(float))
    assert (np.abs(weights - expected) <= 2e-5 * scale).all()
    # Sums in float64, as that of finite entries need not be a number of float32.
    value, expected = (np.asarray(b, float).sum(1) for b in (balanced, double[0]))
    expected = np.clip(expected, -LARGEST, LARGEST)
    error = np.abs(value - expected)
    assert (error <= 2e-5 * (np.abs(balanced).astype(float).sum(1) + np.abs(expected))).all()


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["adjacent", "pairwise", "spread", "variance"], fast=["adjacent", "spread", "variance"]
    ),
)
def test_discrepancies_and_their_derivatives(name):
    function = jax.value_and_grad(getattr(bilb.discrepancies, name))
    single, double = in_both_precisions(function, SIGNED)
    with np.errstate(over="ignore"):
        expected = [np.asarray(x).astype(np.float32) for x in double]
    (close, slope), wanted = function(CLOSE), function(CLOSE.astype(float))
    np.testing.assert_allclose(close, wanted[0].astype(jnp.float32), rtol=1e-4)
    np.testing.assert_allclose(slope, wanted[1], rtol=1e-4)
    # Squares below the smallest number are zero.
    np.testing.assert_allclose(single[0], expected[0], rtol=1e-5, atol=1e-37)
    scale = np.abs(expected[1]).max(1, keepdims=True)
    assert (np.abs(single[1] - expected[1]) <= 1e-5 * scale + 1e-37).all()


LINKS = {
    "log_scale_by_initial_loss": bilb.log_scale_by_initial_loss(),
    "log_scale_by_initial_loss-floor": bilb.log_scale_by_initial_loss(floor=1e-30),
    "scale_by_initial_ratio": bilb.scale_by_initial_ratio(),
}


@pytest.mark.parametrize("name", mostly_slow(LINKS, fast=["scale_by_initial_ratio"]))
def test_losses_relative_to_initial_ones_of_any_size(name):
    link = LINKS[name]

    def call(rows):
        _, state = link.update(rows[0], link.init(rows[0]))
        return jax.jacrev(lambda losses: link.update(losses, state)[0], has_aux=False)(
            rows[1]
        ).diagonal(), link.update(rows[1], state)[0]

    initial = POSITIVE[:: len(SIZES) - 1]
    rows = np.stack([initial, np.roll(initial, 7, axis=0)], axis=1)
    for single, double in zip(*in_both_precisions(call, rows)):
        with np.errstate(over="ignore"):
            expected = np.asarray(double).astype(np.float32)
        normal = np.abs(double) > 1e-36
        assert np.isfinite(expected[normal]).any()
        np.testing.assert_allclose(single[normal], expected[normal], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(single[~normal], 0.0, atol=2e-36)


ROUTERS = {
    "sigmoid": bilb.routers.sigmoid(),
    "softmax": bilb.routers.softmax(),
    "clipped": bilb.routers.softmax(clip=(0.1, 0.9)),
}
LEARNERS = {
    f"bilb4mtl-{router}-{name}-{divisor}": bilb.bilb4mtl(
        router=ROUTERS[router], discrepancy=getattr(bilb.discrepancies, name), divisor=divisor
    )
    for router, name, divisor in [
        ("sigmoid", "variance", None),
        ("softmax", "variance", None),
        ("softmax", "adjacent", "sum"),
        ("softmax", "pairwise", "stop_gradient_sum"),
        ("clipped", "spread", "sum"),
    ]
} | {
    "uncertainty_weighting": bilb.uncertainty_weighting(),
    "imtl_l": bilb.imtl_l(),
    "dwa": bilb.dwa(window=2),
    "dwa-sliding": bilb.dwa(window=3, sliding=True),
    "stch_nadir": bilb.stch_nadir(0.1, nadir_start=0, nadir_steps=2),
    "igb_v1": bilb.igb_v1(0, 2),
    "igb_v2": bilb.igb_v2(
        0, 1, warmup_steps=3, update_after=3, update_every=7, num_updates=2, buffer_size=8,
        batch_size=4, hidden=(4,),
    ),
}  # fmt: skip


SLOW = ("bilb4mtl-sigmoid-variance-None", "bilb4mtl-softmax-adjacent-sum", "igb_v2")


@pytest.mark.parametrize("name", mostly_slow(LEARNERS, fast={*LEARNERS} - {*SLOW}))
def test_what_is_learnt_from_losses_of_any_size_stays_finite(name):
    balancer = LEARNERS[name]
    rows = SIGNED if name.startswith("bilb4mtl") else POSITIVE
    rows = jax.random.permutation(jax.random.key(0), jnp.asarray(rows))[:600]

    def step(state, losses):
        def objective(losses):
            balanced, new = balancer.update(losses, state)
            return balanced.sum(), (balanced, new)

        effective, (balanced, new) = jax.grad(objective, has_aux=True)(losses)
        weights = optax.tree.get(new, "weights")
        return new, (effective, weights, jnp.isnan(balanced).any())

    run = jax.jit(lambda state: jax.lax.scan(step, state, rows))
    state, (effective, weights, nans) = run(balancer.init(rows[0]))
    assert_finite((state, effective, weights))
    assert not nans.any()
    # It has learnt something, and goes on.
    assert len(np.unique(weights[-20:], axis=0)) > 1
