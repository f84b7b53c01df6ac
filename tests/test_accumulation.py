"""Gradient accumulation: K losses from several microbatches, the balancer updated once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilb

NUM_TASKS, MICROBATCHES = 3, 8


def task_losses(params, x, y):
    hidden = jnp.tanh(x @ params["trunk"])
    return jnp.mean((jnp.tanh(hidden @ params["middle"]) @ params["heads"] - y) ** 2, axis=0)


def accumulated(params, microbatches):
    """As the README shows it."""
    one = jax.checkpoint(lambda microbatch: task_losses(params, *microbatch))
    return jax.lax.map(one, microbatches).mean(0)


def problem(batch=512, width=128):
    keys = iter(jax.random.split(jax.random.key(0), 5))
    normal = lambda *shape: 0.3 * jax.random.normal(next(keys), shape)
    params = {
        "trunk": normal(8, width), "middle": normal(width, width), "heads": normal(width, NUM_TASKS)
    }  # fmt: skip
    data = normal(batch, 8), normal(batch, NUM_TASKS)
    split = lambda a: a.reshape(MICROBATCHES, -1, *a.shape[1:])
    return params, data, jax.tree.map(split, data)


@pytest.mark.parametrize(
    "balancer",
    [
        pytest.param(
            optax.chain(bilb.log_scale_by_initial_loss(), bilb.bilb4mtl(0.05)),
            marks=pytest.mark.slow,
        ),
        pytest.param(bilb.marigold(), marks=pytest.mark.slow),
        bilb.famo(),
    ],
    ids=["bilb4mtl", "marigold", "famo"],
)
def test_equals_the_whole_batch_and_updates_the_balancer_once(balancer):
    params, data, microbatches = problem()
    whole = bilb.value_and_grad(task_losses, balancer)
    parts = bilb.value_and_grad(accumulated, balancer)
    optimizer = optax.adam(1e-2)

    def train(value_and_grad, *args):
        def step(carry, _):
            params, opt_state, state = carry
            losses, grads, state = value_and_grad(params, state, *args)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (params, opt_state, value_and_grad.after(params, state, *args)), losses

        carry = (params, optimizer.init(params), value_and_grad.init(params, *args))
        return jax.jit(lambda carry: jax.lax.scan(step, carry, length=20))(carry)

    (expected, _, expected_state), losses = train(whole, *data)
    (ours, _, state), our_losses = train(parts, microbatches)
    np.testing.assert_allclose(our_losses, losses, rtol=1e-4)
    for a, b in zip(jax.tree.leaves((ours, state)), jax.tree.leaves((expected, expected_state))):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
    steps = optax.tree.get_all_with_path(state, "step")
    assert {int(step) for _, step in steps} == {20}


@pytest.mark.slow
def test_needs_the_memory_of_one_microbatch():
    params, data, microbatches = problem(batch=4096)
    balancer = bilb.bilb4mtl()

    def temporary_bytes(task_losses, *args):
        value_and_grad = bilb.value_and_grad(task_losses, balancer)
        state = value_and_grad.init(params, *args)
        compiled = jax.jit(value_and_grad).lower(params, state, *args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, parts = temporary_bytes(task_losses, *data), temporary_bytes(accumulated, microbatches)
    assert parts < 0.3 * whole
