"""Losses in a dict, list or tuple: every driver is what it is for the stacked vector, by name."""

import functools
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import mostly_slow

import bilb

TASKS = ("depth", "normals", "segmentation")
TARGETS = jnp.array([[1.0, 2.0], [-1.0, 0.5], [3.0, -2.0]])
SCALES = jnp.array([1.0, 30.0, 0.2])
PARAMS = {"x": jnp.array([0.3, -0.4])}
slow = pytest.mark.slow
assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


def vector(params, shift=0.0):
    return SCALES * jnp.sum((params["x"] + shift - TARGETS) ** 2, axis=1)


class Losses(typing.NamedTuple):
    depth: jax.Array
    normals: jax.Array
    segmentation: jax.Array


def by_name(losses):
    return {name: losses[i] for i, name in reversed([*enumerate(TASKS)])}


FORMS = {"dict": by_name, "list": list, "tuple": tuple, "namedtuple": lambda v: Losses(*v)}


def named(params, *args):
    return by_name(vector(params, *args))


def run(task_losses, balancer, steps=3, driver=bilb.value_and_grad, **options):
    """Returns what the last of some steps, with an optimiser between them, gave."""
    value_and_grad = driver(task_losses, balancer, **options)

    @jax.jit
    def step(params, state):
        losses, grads, state = value_and_grad(params, state)
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
        return params, value_and_grad.after(params, state), losses

    params, state = PARAMS, value_and_grad.init(PARAMS)
    for _ in range(steps):
        params, state, losses = step(params, state)
    return params, state, losses


BALANCERS = {
    "losses": lambda: bilb.chain(bilb.log_losses(), bilb.bilb4mtl(optimizer=optax.adam(0.1))),
    "slopes": bilb.marigold,
    "losses_after": bilb.famo,
    "gram": bilb.mgda,
}


NAMED = [*((name, "dict") for name in BALANCERS), *(("losses", form) for form in [*FORMS][1:])]
ALWAYS = [("losses", "dict"), ("slopes", "dict"), ("losses", "namedtuple")]


@pytest.mark.parametrize(
    ("name", "form"),
    [pytest.param(*case, marks=[slow] * (case not in ALWAYS)) for case in NAMED],
)
def test_value_and_grad_takes_losses_in_any_form(name, form):
    of = FORMS[form]
    params, state, losses = run(lambda p: of(vector(p)), BALANCERS[name]())
    expected, of_vector, expected_losses = run(vector, BALANCERS[name]())
    assert_close(params, expected)
    assert type(losses) is type(state.effective_weights) is type(of([0, 0, 0]))
    assert_close(losses, of(expected_losses))
    assert_close(state.effective_weights, of(of_vector.effective_weights))
    assert_close(state.balancer, of_vector.balancer)
    assert len({*np.asarray(of_vector.effective_weights).tolist()}) == 3


@pytest.mark.slow
def test_aux_features_and_half_precision_are_as_with_a_vector():
    router = bilb.routers.linear_softmax(2, clip=None)

    def with_aux(form, params):
        losses = vector(params).astype(jnp.bfloat16)
        return form(losses), {"features": params["x"][None], "note": params["x"].sum()}

    options = {"has_aux": True, "features": lambda aux: aux["features"]}
    balancer = bilb.bilb4mtl(router=router)
    params, _, (losses, aux) = run(functools.partial(with_aux, by_name), balancer, **options)
    expected, _, (of_vector, expected_aux) = run(
        functools.partial(with_aux, lambda v: v), balancer, **options
    )
    assert_close(params, expected)
    assert_close((losses, aux), (by_name(of_vector), expected_aux))
    assert losses["depth"].dtype == jnp.bfloat16


def test_scans_and_maps_keep_the_names():
    value_and_grad = bilb.value_and_grad(named, bilb.igb_v1(0, 1))

    def train(shift):
        def step(carry, _):
            params, state = carry
            losses, grads, state = value_and_grad(params, state, shift)
            params = jax.tree.map(lambda p, g: p - 1e-2 * g, params, grads)
            return (params, state), (losses, state.effective_weights)

        first = PARAMS, value_and_grad.init(PARAMS, shift)
        return jax.lax.scan(step, first, length=3)[1]

    losses, weights = jax.jit(jax.vmap(train))(jnp.array([0.0, 0.5]))
    assert {name: leaf.shape for name, leaf in losses.items()} == dict.fromkeys(TASKS, (2, 3))
    assert weights.keys() == losses.keys()
    assert_close(losses["normals"][1, 0], vector(PARAMS, 0.5)[1])


VALUES = {"segmentation": 0.5, "depth": 2.0, "normals": 1.5}
IN_ORDER = jnp.array([2.0, 1.5, 0.5])
HYPERPARAMETERS = {
    "linear_scalarization": bilb.linear_scalarization,
    "schedule": lambda each: bilb.linear_scalarization(lambda step: each),
    "divide_by": bilb.divide_by,
    "stch": lambda each: bilb.stch(preference=each),
    "router": lambda each: bilb.bilb4mtl(router=bilb.routers.sigmoid(each)),
    "uncertainty_weighting": bilb.uncertainty_weighting,
    "upgrad": lambda each: bilb.upgrad(preference=each),
    "cr_mogm": lambda each: bilb.cr_mogm(bilb.mgda(), initial_weights=each),
    "chain": lambda each: bilb.chain(bilb.log_losses(), bilb.skip_nonfinite(bilb.divide_by(each))),
}
GRAM = ("upgrad", "cr_mogm")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow) if name in GRAM else name for name in HYPERPARAMETERS]
)
def test_hyperparameters_per_task_may_be_given_by_name(name):
    make = HYPERPARAMETERS[name]
    _, state, _ = run(named, make(VALUES), steps=1)
    _, expected, _ = run(vector, make(IN_ORDER), steps=1)
    assert_close(state.effective_weights, by_name(expected.effective_weights))
    value_and_grad = bilb.value_and_grad(named, make({"depth": 1.0, "normals": 1.0, "seg": 1.0}))
    with pytest.raises(ValueError, match=r"missing: \['segmentation'\], unknown: \['seg'\]"):
        value_and_grad(PARAMS, value_and_grad.init(PARAMS))
    without_names = bilb.value_and_grad(vector, make(VALUES))
    with pytest.raises(ValueError, match=r"vector without names.*return a dict"):
        without_names(PARAMS, without_names.init(PARAMS))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        pytest.param(lambda task: bilb.pcd(primary=task), "primary", marks=slow),
        (lambda task: bilb.lr_annealing(every=1, reference=task), "reference"),
    ],
)
def test_one_task_may_be_told_by_name(make, argument):
    _, state, _ = run(named, make("normals"), steps=2)
    _, expected, _ = run(vector, make(1), steps=2)
    assert_close(state.effective_weights, by_name(expected.effective_weights))
    with pytest.raises(
        ValueError, match=rf"{argument} must be one of 3 tasks; got 'colour', not \["
    ):
        run(named, make("colour"))


def test_a_hyperparameter_by_name_is_checked_when_it_is_given():
    with pytest.raises(ValueError, match=r"weights\['depth'\] must be >= 0; got -1"):
        bilb.linear_scalarization({"depth": -1.0, "normals": 1.0})
    with pytest.raises(TypeError, match=r"scales\['depth'\].*far"):
        bilb.divide_by({"depth": "far"})


@pytest.mark.slow
def test_one_balancer_serves_losses_of_other_names():
    """What was compiled for one set of names is not used for another."""
    balancer = bilb.upgrad(preference={"a": 1.0, "b": 9.0})
    pair = lambda params: SCALES[:2] * jnp.sum((params["x"] - TARGETS[:2]) ** 2, axis=1)

    class BA(typing.NamedTuple):
        b: jax.Array
        a: jax.Array

    weights = []
    for task_losses in (
        lambda p: dict(zip("ab", pair(p))),
        lambda p: BA(*pair(p)),
        lambda p: dict(zip("bc", pair(p))),
    ):
        value_and_grad = bilb.value_and_grad(task_losses, balancer)
        if len(weights) == 2:
            with pytest.raises(ValueError, match=r"missing: \['c'\], unknown: \['a'\]"):
                value_and_grad(PARAMS, value_and_grad.init(PARAMS))
            break
        _, _, state = value_and_grad(PARAMS, value_and_grad.init(PARAMS))
        weights.append(state.effective_weights)
    by_array = bilb.value_and_grad(pair, bilb.upgrad(preference=jnp.array([9.0, 1.0])))
    _, _, expected = by_array(PARAMS, by_array.init(PARAMS))
    assert_close(jnp.stack(weights[1]), expected.effective_weights)
    assert abs(weights[0]["a"] - weights[1].b) > 1e-3


def test_masks_by_name():
    absent = {"segmentation": True, "depth": False, "normals": True}
    for balancer in (bilb.skip_nonfinite(bilb.log_losses()), bilb.igb_v1(0, 1)):
        value_and_grad = bilb.value_and_grad(named, balancer)
        state = value_and_grad.init(PARAMS)
        _, grads, state = jax.jit(value_and_grad)(PARAMS, state, mask=absent)
        of_vector = bilb.value_and_grad(vector, balancer)
        mask = jnp.array([False, True, True])
        _, expected, _ = jax.jit(of_vector)(PARAMS, of_vector.init(PARAMS), mask=mask)
        assert_close(grads, expected)
        assert state.effective_weights["depth"] == 0
    with pytest.raises(ValueError, match=r"mask.*missing: \['depth', 'normals'\]"):
        value_and_grad(PARAMS, state, mask={"segmentation": True})
    with pytest.raises(ValueError, match=r"mask is given by task name.*vector without names"):
        of_vector(PARAMS, of_vector.init(PARAMS), mask=absent)


def test_a_shared_representation_keeps_the_names():
    trunk = lambda params: jnp.tanh(params["x"])
    heads = lambda form: lambda params, z: form(vector({"x": z}) + 0.1 * params["x"].sum())
    options = {
        "driver": lambda heads, *rest: bilb.representation_value_and_grad(trunk, heads, *rest)
    }
    make = lambda each: bilb.chain(bilb.linear_scalarization(each), bilb.marigold())
    params, state, losses = run(heads(by_name), make(VALUES), **options)
    expected, of_vector, expected_losses = run(heads(lambda v: v), make(IN_ORDER), **options)
    assert_close((params, losses), (expected, by_name(expected_losses)))
    assert_close(state.effective_weights, by_name(of_vector.effective_weights))


@pytest.mark.parametrize(
    "num_tasks",
    [pytest.param(3, marks=slow), ("segmentation", "depth", "normals")],
    ids=["K", "names"],
)
def test_aggregate_by_takes_named_losses(num_tasks):
    balancer = bilb.chain(bilb.log_losses(), bilb.divide_by(VALUES if num_tasks != 3 else IN_ORDER))
    aggregator = bilb.aggregate_by(balancer, num_tasks)
    losses, gradients = bilb.task_gradients(named, PARAMS)
    update = jax.jit(aggregator.update)
    mask = by_name([True, True, False])
    result, state = update(gradients, aggregator.init(PARAMS), PARAMS, losses=losses, mask=mask)
    expected = 1 / (vector(PARAMS) * IN_ORDER) * jnp.array([1.0, 1.0, 0.0])
    assert_close(result["x"], expected @ jax.jacrev(vector)(PARAMS)["x"])
    expected = by_name(expected) if num_tasks != 3 else expected
    assert_close(state.effective_weights, expected)
    if num_tasks != 3:
        with pytest.raises(
            ValueError, match=r"made for \('depth', .*got losses of \('a', 'b', 'c'"
        ):
            aggregator.update(gradients, state, PARAMS, losses=dict(zip("abc", jnp.ones(3))))


def test_aggregators_take_named_losses_masks_and_hyperparameters():
    losses, gradients = bilb.task_gradients(named, PARAMS)
    of_vector = vector(PARAMS)
    mask = jnp.array([True, False, True])
    leak, leaks = {"depth": 0.1, "normals": 0.9, "segmentation": 0.5}, jnp.array([0.1, 0.9, 0.5])
    for by_names, by_array in (
        (bilb.graddrop(leak=leak), bilb.graddrop(leak=leaks)),
        (bilb.db_mtl(3), bilb.db_mtl(3)),
    ):
        state = by_array.init(PARAMS)

        @jax.jit
        def both(gradients, by_names=by_names, by_array=by_array, state=state):
            given = {"losses": losses, "mask": by_name(mask)}
            result, _ = by_names.update(gradients, state, PARAMS, **given)
            expected, _ = by_array.update(gradients, state, PARAMS, losses=of_vector, mask=mask)
            return result, expected

        assert_close(*both(gradients))


def test_derivatives_by_hand_take_named_losses():
    losses, gradients = bilb.task_gradients(named, PARAMS)
    assert_close((losses, gradients), (named(PARAMS), jax.jacrev(vector)(PARAMS)))
    with_aux = lambda params: (named(params), params["x"].sum())
    (losses, aux), _ = bilb.task_gradients(with_aux, PARAMS, has_aux=True)
    assert_close((losses, aux), with_aux(PARAMS))
    losses, pullback, pushforward = bilb.linearize(named, PARAMS)
    weights = jnp.array([1.0, 0.0, 2.0])
    assert_close(losses, named(PARAMS))
    assert_close(pullback(weights)["x"], weights @ gradients["x"])
    assert_close(pushforward(PARAMS), gradients["x"] @ PARAMS["x"])
    gram = gradients["x"] @ gradients["x"].T
    assert_close(bilb.grams.exact()(named, PARAMS), gram)
    assert_close(bilb.slopes.forward(named, PARAMS, PARAMS), gradients["x"] @ PARAMS["x"])
    by_difference = bilb.slopes.finite_difference(1e-3)(named, PARAMS, PARAMS)
    np.testing.assert_allclose(by_difference, gradients["x"] @ PARAMS["x"], rtol=0.02)
    curvatures = bilb.curvatures.probe()(named, PARAMS)
    assert_close(curvatures, bilb.curvatures.probe()(vector, PARAMS))


def training_steps(task_losses, each):
    rates = {"inner_learning_rate": 0.01}
    return {
        "double_loop": bilb.bilb4mtl_double_loop(
            task_losses,
            optax.sgd(1e-3),
            inner_optimizer=optax.sgd(1e-3),
            router=bilb.routers.sigmoid(each),
        ),
        "auto_lambda": bilb.auto_lambda(
            task_losses, optax.sgd(1e-3), primary=each, initial=each, **rates
        ),
        "moml": bilb.moml(task_losses, optax.sgd(1e-3), **rates),
        "forum": bilb.forum(task_losses, optax.sgd(1e-3), **rates),
    }


@pytest.mark.parametrize(
    "name",
    mostly_slow(["double_loop", "auto_lambda", "moml", "forum"], fast=["auto_lambda"]),
)
def test_training_steps_take_and_return_named_losses(name):
    batches = (0.1,) if name == "double_loop" else (0.1, 0.2)
    results = []
    for task_losses, each in ((named, VALUES), (vector, IN_ORDER)):
        training = training_steps(task_losses, each)[name]
        state = training.init(PARAMS, 0.1)
        results.append(jax.jit(training.update)(PARAMS, state, *batches))
    (params, state, losses), (expected, of_vector, expected_losses) = results
    assert_close((params, state), (expected, of_vector))
    assert_close(losses, by_name(expected_losses))


def test_values_in_the_order_of_the_losses_come_back_by_name():
    losses = named(PARAMS)
    np.testing.assert_array_equal(bilb.names.stack(losses), vector(PARAMS))
    assert bilb.names.unstack(jnp.arange(3.0), losses) == dict(zip(TASKS, range(3)))
    assert bilb.names.unstack(jnp.arange(3.0), vector(PARAMS)).shape == (3,)
    assert bilb.names.names_of(losses) == TASKS
    assert bilb.names.names_of([1.0, 2.0]) is bilb.names.names_of(jnp.ones(2)) is None


ONE = jnp.float32(1.0)
BAD = {
    "nested": ({"a": ONE, "b": {"c": ONE}}, ValueError, r"got losses\['b'\]\['c'\]"),
    "vector inside": (
        {"a": jnp.ones(8)},
        ValueError,
        r"losses\['a'\].*shape \(8,\): take its mean",
    ),
    "none": ({"a": ONE, "b": None}, ValueError, r"losses\['b'\] is None.*mask="),
    "empty": ({}, ValueError, r"a loss per task; task_losses returned \{\}"),
    "integer": ([ONE, jnp.int32(1)], TypeError, r"losses\[1\] must be floating point; got int32"),
}


@pytest.mark.parametrize("case", BAD)
def test_losses_that_are_no_flat_tree_of_numbers(case):
    losses, error, message = BAD[case]
    value_and_grad = bilb.value_and_grad(lambda params: losses, bilb.bilb4mtl())
    with pytest.raises(error, match=message):
        value_and_grad.init(PARAMS)
    with pytest.raises(error, match=message):
        bilb.task_gradients(lambda params: losses, PARAMS)
