"""The states of loss transformations: injected hyperparameters, donation, checkpoints."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from contract import (
    assert_close,
    assert_equal,
    assert_finite,
    compiled,
    example_losses,
    numbers,
    warm,
)
from method_parts import NUM_FEATURES, Network, features
from methods import METHODS

import bilb

K = 5


def run(method, transformation, losses):
    """Updates over the rows of losses in one program; returns the last balanced losses, state."""

    def step(state, row):
        balanced, state = method.update(transformation, row, state)
        return state, balanced

    program = jax.jit(lambda *args: jax.lax.scan(step, *args))
    state, balanced = program(transformation.init(losses[0]), losses)
    return balanced[-1], state


def injected(method):
    factory = optax.inject_hyperparams(method.factory, static_args=method.static_args)
    return factory(**method.numeric, **method.fixed(K))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [m for m in METHODS if m.numeric and not m.kin], ids=str, scope="module"
)
def test_injected_hyperparameters_equal_the_direct_call(method):
    losses = example_losses(2, K)
    balanced, state = run(method, injected(method), losses)
    transformation, update = compiled(method, K)
    expected_state = transformation.init(losses[0])
    for row in losses:
        expected, expected_state, _ = update(row, expected_state)
    assert set(method.numeric) <= set(state.hyperparams)
    assert_close((balanced, state.inner_state), (expected, expected_state), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m.numeric], ids=str, scope="module")
def test_hyperparameters_are_injected_by_the_simple_call_in_value_and_grad(method):
    value_and_grad = bilb.value_and_grad(lambda x: x**2, injected(method))
    of_call = {k: v for k, v in method.extra(jnp.ones(K)).items() if k == "features"}
    state = value_and_grad.init(jnp.ones(K), **of_call)
    step = lambda state: value_and_grad(jnp.ones(K), state, **of_call)
    losses, gradient, new_state = jax.eval_shape(step, state)
    assert losses.shape == gradient.shape == (K,)
    assert new_state == jax.eval_shape(lambda: state)
    assert set(method.numeric) <= set(state.balancer.hyperparams)


def test_injected_penalty_can_be_a_schedule_and_can_be_set():
    schedule = optax.linear_schedule(0.2, 0.0, 2)
    losses = example_losses(3, K)
    factory = optax.inject_hyperparams(
        bilb.bilb4mtl, static_args=("discrepancy",), hyperparam_dtype=jnp.float32
    )
    scheduled = factory(penalty=schedule)
    settable = factory(penalty=1.0)
    state, settable_state = scheduled.init(losses[0]), settable.init(losses[0])
    by_step = bilb.bilb4mtl(schedule)
    step_state = by_step.init(losses[0])
    for row, penalty in zip(losses, (0.2, 0.1, 0.0)):
        settable_state.hyperparams["penalty"] = jnp.float32(penalty)
        balanced, state = scheduled.update(row, state)
        by_setting, settable_state = settable.update(row, settable_state)
        expected, step_state = by_step.update(row, step_state)
        np.testing.assert_allclose(balanced, expected, rtol=1e-6)
        np.testing.assert_allclose(by_setting, expected, rtol=1e-6)
    np.testing.assert_allclose(balanced, step_state.weights * losses[-1], rtol=1e-6)


def pointers(*trees):
    """Returns the addresses of all arrays, keys by their data."""
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(numbers(trees))]


@pytest.mark.parametrize("method", METHODS, ids=str, scope="module")
def test_no_two_fields_of_a_state_share_a_buffer(method):
    transformation, update = compiled(method, K)
    losses = example_losses(K)
    first = transformation.init(losses)
    _, jitted, _ = update(losses, first)
    _, eager = method.update(transformation, losses, first)
    for state in (first, jitted, eager):
        addresses = pointers(losses, state)
        assert len(set(addresses)) == len(addresses)


def router_of(make):
    return lambda array: bilb.bilb4mtl(router=make(array))


@pytest.mark.parametrize(
    ("make", "users"),
    [
        (bilb.linear_scalarization, jnp.full(K, 0.5, jnp.float32)),
        (lambda scales: bilb.skip_nonfinite(bilb.divide_by(scales)), jnp.full(K, 0.5, jnp.float32)),
        (router_of(bilb.routers.sigmoid), jnp.full(K, 0.5, jnp.float32)),
        (router_of(bilb.routers.softmax), jnp.full(K, 0.5, jnp.float32)),
        (router_of(lambda key: bilb.routers.relu_sigmoid(key=key)), jax.random.key(3)),
        (
            router_of(lambda key: bilb.routers.linear_softmax(NUM_FEATURES, None, key)),
            jax.random.key(3),
        ),
        (
            router_of(
                lambda key: bilb.routers.from_module(Network(K), jnp.zeros((1, NUM_FEATURES)), key)
            ),
            jax.random.PRNGKey(3),
        ),
    ],
    ids=["linear", "divide_by", "sigmoid", "softmax", "relu_sigmoid", "linear_softmax", "module"],
)
def test_states_can_be_donated_and_the_users_arrays_survive(make, users):
    balancer = make(users)
    losses = example_losses(K)
    more = features(losses)
    update = jax.jit(lambda *args: balancer.update(*args, **more), donate_argnums=1)
    expected = jax.tree.map(jnp.copy, balancer.init(losses))
    state = balancer.init(losses)
    assert not {*pointers(users)} & {*pointers(state)}
    for _ in range(3):
        given = state
        balanced, state = update(losses, given)
        wanted, expected = balancer.update(losses, expected, **more)
        np.testing.assert_allclose(balanced, wanted, rtol=1e-5)
        router = jax.tree.leaves(optax.tree.get(given, "router"))
        assert all(leaf.is_deleted() for leaf in router)
    assert not users.is_deleted()
    # The transformation still holds what the user gave, not a donated buffer.
    assert_finite(balancer.init(losses))


@pytest.mark.slow
def test_states_survive_an_orbax_checkpoint(tmp_path):
    states = {method.name: warm(method, K, steps=2)[0] for method in METHODS}
    states["keys"] = {"typed": jax.random.key(1), "raw": jax.random.PRNGKey(1)}
    template = jax.eval_shape(lambda: states)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "states", template)
    for name, state in states.items():
        assert_equal(restored[name], state)


@pytest.mark.parametrize("method", METHODS, ids=str, scope="module")
def test_states_survive_flax_serialization(method):
    state = warm(method, K, steps=2)[0]
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)):
        pytest.skip("flax.serialization does not take typed keys")
    transformation, _ = compiled(method, K)
    fresh = transformation.init(jnp.ones(K))
    restored = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
    assert_equal(restored, state)
