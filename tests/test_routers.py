"""Routers: the weights they give, what they learn from, and the way to the trunk."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import example_losses, mostly_slow
from method_parts import DISCREPANCIES, NUM_FEATURES, Network, bilevel_objective

import bilb
from bilb import routers

K = 3
FEATURES = jnp.sin(jnp.arange(2.0 * 5 * NUM_FEATURES)).reshape(2, 5, NUM_FEATURES)


def weights_of(router, num_tasks=K, features=None):
    return router.apply(router.init(num_tasks, jnp.float32), features)


def test_weights_follow_the_formulas():
    logits = np.array([-1.0, 0.5, 2.0], np.float32)
    sigmoid = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(weights_of(routers.sigmoid(logits)), sigmoid, rtol=1e-6)
    softmax = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(weights_of(routers.softmax(logits)), softmax, rtol=1e-6)
    relu = 1 / (1 + np.exp(-np.maximum(logits, 0)))
    np.testing.assert_allclose(routers.relu_sigmoid().apply(logits, None), relu, rtol=1e-6)


def test_initial_weights_are_those_of_the_paper():
    np.testing.assert_allclose(weights_of(routers.sigmoid()), 1 / (1 + np.exp(-1)), rtol=1e-6)
    np.testing.assert_allclose(weights_of(routers.softmax()), 1 / K, rtol=1e-6)
    parameters = routers.relu_sigmoid().init(1000, jnp.float32)
    assert 0.2 <= parameters.min() < 0.21
    assert 0.99 < parameters.max() <= 1.0
    layer = routers.linear_softmax(25).init(K, jnp.float32)
    assert {name: leaf.shape for name, leaf in layer.items()} == {"kernel": (25, K), "bias": (K,)}
    assert 0.18 < jnp.abs(layer["kernel"]).max() <= 0.2
    assert 0.04 < jnp.abs(layer["bias"]).max() <= 0.2


@pytest.mark.parametrize(
    "make",
    [
        lambda key: routers.relu_sigmoid(key=key),
        lambda key: routers.linear_softmax(NUM_FEATURES, None, key),
        pytest.param(
            lambda key: routers.from_module(Network(K), jnp.zeros((1, NUM_FEATURES)), key),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["relu_sigmoid", "linear_softmax", "from_module"],
)
def test_a_seed_a_raw_key_and_a_typed_key_draw_the_same(make):
    draws = [
        jax.tree.leaves(make(key).init(K, jnp.float32))
        for key in (5, jax.random.PRNGKey(5), jax.random.key(5), 6)
    ]
    for draw in draws[1:3]:
        assert all((a == b).all() for a, b in zip(draw, draws[0]))
    assert not all((a == b).all() for a, b in zip(draws[3], draws[0]))


def test_linear_softmax_reads_the_mean_feature():
    router = routers.linear_softmax(NUM_FEATURES, clip=None)
    layer = router.init(K, jnp.float32)
    mean = FEATURES.reshape(-1, NUM_FEATURES).mean(0)
    logits = layer["bias"] + sum(mean[f] * layer["kernel"][f] for f in range(NUM_FEATURES))
    for features in (FEATURES, mean, FEATURES.reshape(-1, NUM_FEATURES)):
        np.testing.assert_allclose(
            router.apply(layer, features), jnp.exp(logits) / jnp.exp(logits).sum(), rtol=1e-5
        )


@pytest.mark.x64
@pytest.mark.parametrize(
    ("logits", "passes"),
    [
        pytest.param([1.0, 0.5, 0.0], [True, True, True], marks=pytest.mark.slow),
        ([2.0, 0.5, -1.0], [False, True, False]),
        pytest.param([0.2, 0.1, -3.0], [True, True, False], marks=pytest.mark.slow),
    ],
    ids=["inside", "both", "low"],
)
def test_clipped_weights_stop_the_gradient_outside_the_bounds_only(logits, passes):
    logits, low, high = jnp.array(logits), 0.15, 0.6
    weights = jax.nn.softmax(logits)
    derivative = np.diag(weights) - np.outer(weights, weights)
    apply = lambda logits: routers.softmax(clip=(low, high)).apply(logits, None)
    np.testing.assert_allclose(apply(logits), np.clip(weights, low, high), rtol=1e-12)
    rows = np.where(np.array(passes)[:, None], derivative, 0.0)
    np.testing.assert_allclose(jax.jacrev(apply)(logits), rows, rtol=1e-9, atol=1e-12)


@pytest.mark.x64
def test_a_weight_exactly_at_a_bound_passes_its_whole_gradient():
    logits = jnp.array([1.0, 0.5, 0.0])
    weights = jax.nn.softmax(logits)
    router = routers.softmax(clip=(float(weights[2]), float(weights[0])))
    derivative = np.diag(weights) - np.outer(weights, weights)
    jacobian = jax.jacrev(lambda logits: router.apply(logits, None))(logits)
    np.testing.assert_allclose(jacobian, derivative, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("first", "moves"), [(1.0, True), (3.0, False)])
def test_a_clipped_softmax_with_all_weights_outside_its_bounds_never_moves(first, moves):
    """The documented trap; inside the bounds all logits move."""
    router = routers.softmax(initial=jnp.array([first, -first]), clip=(0.1, 0.9))
    balancer = bilb.bilb4mtl(0.1, router)
    rows = example_losses(50, 2)
    state, _ = jax.lax.scan(
        lambda state, row: balancer.update(row, state)[::-1], balancer.init(rows[0]), rows
    )
    assert (state.router != jnp.array([first, -first])).all() == moves
    assert (state.router != jnp.array([first, -first])).any() == moves


def test_bounds_that_no_single_task_can_satisfy_are_taken_with_one_task():
    router = routers.softmax(clip=(0.2, 0.8))
    np.testing.assert_allclose(router.apply(router.init(1, jnp.float32), None), 0.8)


def test_relu_sigmoid_stops_learning_at_one_half():
    router = routers.relu_sigmoid()
    logits = jnp.array([-1.0, 0.0, 1.0])
    weights, pullback = jax.vjp(lambda w: router.apply(w, None), logits)
    np.testing.assert_allclose(weights, [0.5, 0.5, 0.7310586], rtol=1e-6)
    (slope,) = pullback(jnp.ones(3))
    np.testing.assert_allclose(slope, [0.0, 0.0, 0.1966119], rtol=1e-5)


class OneLayer(nn.Module):
    @nn.compact
    def __call__(self, features):
        layer = nn.Dense(K, kernel_init=nn.initializers.lecun_normal())
        return nn.softmax(layer(features.reshape(-1, NUM_FEATURES).mean(0)))


def test_from_module_equals_the_router_written_by_hand():
    module = routers.from_module(OneLayer(), jax.ShapeDtypeStruct((1, NUM_FEATURES), jnp.float32))
    variables = module.init(K, jnp.float32)
    by_hand = routers.linear_softmax(NUM_FEATURES, clip=None)
    expected = by_hand.apply(variables["params"]["Dense_0"], FEATURES)
    np.testing.assert_allclose(module.apply(variables, FEATURES), expected, rtol=1e-6)


@pytest.mark.x64
def test_from_module_keeps_parameters_in_the_dtype_of_the_state():
    router = routers.from_module(Network(K), jnp.zeros((1, NUM_FEATURES), jnp.float32))
    for dtype in (jnp.float32, jnp.float64):
        leaves = jax.tree.leaves(jax.eval_shape(lambda dtype=dtype: router.init(K, dtype)))
        assert all(leaf.dtype == dtype for leaf in leaves)


def test_from_module_takes_any_pytree_of_features():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, features):
            return nn.softmax(nn.Dense(K)(features["shared"]) + features["bias"])

    features = {"shared": jnp.ones(2), "bias": jnp.arange(float(K))}
    balancer = bilb.bilb4mtl(router=routers.from_module(Two(), features))
    losses = example_losses(K)
    state = balancer.init(losses)
    _, state = jax.jit(balancer.update)(losses, state, features=features)
    np.testing.assert_allclose(state.weights.sum(), 1, rtol=1e-6)


OBJECTIVES = [
    pytest.param("adjacent", True, None, marks=pytest.mark.slow),
    pytest.param("pairwise", True, "sum", marks=pytest.mark.slow),
    ("variance", True, "stop_gradient_sum"),
    ("spread", False, "sum"),
]


@pytest.mark.x64
@pytest.mark.parametrize(("discrepancy", "weighted", "divisor"), OBJECTIVES)
def test_the_router_steps_along_the_gradient_of_the_objective(discrepancy, weighted, divisor):
    rate, penalty = 0.1, 0.3
    exponential = bilb.Router(
        init=lambda num_tasks, dtype: {"w": jnp.linspace(-1, 1, num_tasks, dtype=dtype)},
        apply=lambda parameters, _: jnp.exp(parameters["w"]),
    )
    balancer = bilb.bilb4mtl(
        penalty,
        exponential,
        DISCREPANCIES[discrepancy][0],
        weighted=weighted,
        divisor=divisor,
        optimizer=optax.sgd(rate),
    )
    losses = example_losses(K)
    state = balancer.init(losses)
    _, new_state = jax.jit(balancer.update)(losses, state)
    objective = bilevel_objective(discrepancy, weighted, None, penalty)

    def phi(w):
        weights = jnp.exp(w)
        s = {
            None: 1.0,
            "sum": weights.sum(),
            "stop_gradient_sum": jax.lax.stop_gradient(weights.sum()),
        }[divisor]
        u = weights * losses
        return u.sum() / s + objective(losses, weights) - u.sum()

    expected = state.router["w"] - rate * jax.grad(phi)(state.router["w"])
    np.testing.assert_allclose(new_state.router["w"], expected, rtol=1e-10)
    np.testing.assert_allclose(new_state.weights, jnp.exp(state.router["w"]), rtol=1e-10)


def task_losses(params, inputs):
    features = jnp.tanh(inputs @ params["trunk"])
    outputs = features @ params["heads"]
    return jnp.mean((outputs - jnp.arange(float(K))) ** 2, 0), features


def model():
    inputs = jnp.cos(jnp.arange(21.0)).reshape(7, 3)
    params = {
        "trunk": jnp.sin(jnp.arange(3.0 * NUM_FEATURES)).reshape(3, -1),
        "heads": jnp.cos(jnp.arange(1.0 * NUM_FEATURES * K)).reshape(-1, K),
    }
    return params, inputs


def feature_balancer(divisor=None):
    router = routers.linear_softmax(NUM_FEATURES, clip=None)
    return bilb.bilb4mtl(0.2, router, divisor=divisor)


@pytest.mark.x64
@pytest.mark.parametrize("divisor", mostly_slow([None, "sum", "stop_gradient_sum"], fast=["sum"]))
def test_the_trunk_gets_the_gradient_through_its_features(divisor):
    params, inputs = model()
    value_and_grad = bilb.value_and_grad(
        task_losses, feature_balancer(divisor), has_aux=True, features=lambda features: features
    )
    state = value_and_grad.init(params, inputs)
    layer = state.balancer.router

    def composed(params):
        losses, features = task_losses(params, inputs)
        weights = jax.nn.softmax(features.mean(0) @ layer["kernel"] + layer["bias"])
        u = weights * losses
        s = 1.0 if divisor is None else weights.sum()
        s = jax.lax.stop_gradient(s) if divisor == "stop_gradient_sum" else s
        return u.sum() / s + 0.2 * jnp.abs(u[1:] - u[:-1]).sum()

    step = lambda params, state: (value_and_grad(params, state, inputs), jax.grad(composed)(params))
    ((losses, _), gradient, _), expected = jax.jit(step)(params, state)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(losses, task_losses(params, inputs)[0], rtol=1e-12)


def test_features_given_at_the_call_are_not_differentiated():
    params, inputs = model()
    _, features = task_losses(params, inputs)
    through = bilb.value_and_grad(
        task_losses, feature_balancer(), has_aux=True, features=lambda features: features
    )
    constant = bilb.value_and_grad(task_losses, feature_balancer(), has_aux=True)
    state = through.init(params, inputs)
    chex.assert_trees_all_equal_shapes(constant.init(params, inputs, features=features), state)

    @jax.jit
    def both(params, state):
        _, gradient, new_state = through(params, state, inputs)
        return gradient, new_state, *constant(params, state, inputs, features=features)[1:]

    gradient, new_state, cut, same_state = both(params, state)
    chex.assert_trees_all_close(same_state, new_state, rtol=1e-5)
    np.testing.assert_allclose(cut["heads"], gradient["heads"], rtol=1e-5)
    assert jnp.abs(cut["trunk"] - gradient["trunk"]).max() > 1e-3
