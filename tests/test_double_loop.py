"""The double-loop algorithm on quadratics whose lower-level solution is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilb

A = jnp.array([[1.0, 2.0, 0.5], [1.5, 0.5, 1.0]])
C = jnp.array([[1.0, -1.0, 2.0], [-2.0, 0.5, 0.0]])
PENALTY = 0.3


def task_losses(x):
    return jnp.sum(A * (x - C) ** 2, axis=1)


def lower_level_solution(weights):
    return (weights[:, None] * A * C).sum(0) / (weights[:, None] * A).sum(0)


def make(inner_steps, task_losses=task_losses, penalty=PENALTY, **kwargs):
    return bilb.bilb4mtl_double_loop(
        task_losses,
        optax.sgd(0.01),
        inner_optimizer=optax.sgd(0.2),
        inner_steps=inner_steps,
        penalty=penalty,
        router_optimizer=optax.sgd(0.1),
        **kwargs,
    )


def test_inner_loop_reaches_the_lower_level_solution():
    training = make(200)
    x = jnp.array([0.3, 0.7, -0.2])
    state = training.init(x)
    _, state, _ = jax.jit(training.update)(x, state)
    expected = lower_level_solution(jax.nn.sigmoid(jnp.ones(2)))
    np.testing.assert_allclose(state.inner_params, expected, atol=1e-6)


def test_steps_follow_the_gradient_of_the_penalty_problem():
    training = make(200)
    x = jnp.array([0.3, 0.7, -0.2])
    state = training.init(x)
    logits = state.router

    def f(logits, x):
        u = jax.nn.sigmoid(logits) * task_losses(x)
        return jnp.abs(u[0] - u[1])

    def g(logits, x):
        return jnp.sum(jax.nn.sigmoid(logits) * task_losses(x))

    new_x, new_state, losses = training.update(x, state)
    z = lower_level_solution(jax.nn.sigmoid(logits))
    penalised = lambda logits, x: PENALTY * f(logits, x) + g(logits, x) - g(logits, z)
    by_router, by_x = jax.grad(penalised, argnums=(0, 1))(logits, x)
    np.testing.assert_allclose(new_x, x - 0.01 * by_x, rtol=1e-5)
    np.testing.assert_allclose(new_state.router, logits - 0.1 * by_router, rtol=1e-4)
    np.testing.assert_allclose(losses, task_losses(x), rtol=1e-6)
    np.testing.assert_allclose(new_state.weights, jax.nn.sigmoid(logits), rtol=1e-6)


@pytest.mark.slow
def test_value_function_gradient_vanishes_where_the_model_solves_the_lower_level():
    """With x = z the two g terms cancel: only the discrepancy moves the router."""
    training = make(0, weighted=False)
    x = lower_level_solution(jax.nn.sigmoid(jnp.ones(2)))
    state = training.init(x)
    _, new_state, _ = training.update(x, state)
    np.testing.assert_allclose(new_state.router, state.router, atol=1e-6)


def test_training_scans_and_narrows_the_discrepancy():
    training = make(20)

    @jax.jit
    def run(x):
        step = lambda carry, _: (training.update(*carry)[:2], None)
        return jax.lax.scan(step, (x, training.init(x)), length=1000)[0]

    x, state = run(jnp.zeros(3))
    gap = lambda x, w: jnp.abs(jnp.subtract(*(w * task_losses(x))))
    start = jax.nn.sigmoid(jnp.ones(2))
    assert gap(x, state.weights) < 0.2 * gap(lower_level_solution(start), start)


def test_state_is_stable_and_can_be_donated():
    training = make(3)
    x = jnp.zeros(3)
    state = training.init(x)
    shapes = jax.eval_shape(training.update, x, state)[1]
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, shapes, state)
    assert all(jax.tree.leaves(same))
    update = jax.jit(training.update, donate_argnums=(0, 1))
    x, state, _ = update(x, state)
    x, state, _ = update(x, state)
    assert update._cache_size() == 1


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"inner_steps": -1}, "inner_steps must be >= 0; got -1"),
        ({"divisor": "mean"}, "mean"),
        ({"penalty": -1.0}, "penalty must be >= 0; got -1"),
        ({"penalty": jnp.ones(2)}, r"\(2,\).*penalty must be one number"),
    ],
)
def test_bad_options(bad, match):
    with pytest.raises(ValueError, match=match):
        make(**{"inner_steps": 2, **bad})


@pytest.mark.slow
def test_one_backward_pass_for_the_model_and_one_per_inner_step():
    """And one forward pass more, of the losses at z."""
    params = {"hidden": jnp.ones((3, 64, 64)), "heads": jnp.ones((64, 2))}

    def network_losses(params, inputs):
        for kernel in params["hidden"]:
            inputs = jnp.tanh(inputs @ kernel)
        return jnp.mean((inputs @ params["heads"]) ** 2, axis=0)

    inputs = jnp.ones((64, 64))
    flops = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
    forward = flops(network_losses, params, inputs)
    both = flops(jax.grad(lambda *args: network_losses(*args).sum()), params, inputs)
    for inner_steps in (0, 1):  # a loop counts once, whatever its length
        training = make(inner_steps, task_losses=network_losses)
        step = flops(training.update, params, training.init(params, inputs), inputs)
        assert step / forward == pytest.approx((inner_steps + 1) * both / forward + 1, abs=0.1)
