"""The presets for physics-informed networks: their steps in numpy, and a trivial solution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_pinn_losses import softmax
from test_pinn_methods import EXACT, RATE, START, STEPS, by_hand, train

import bilb


def root_gradients(losses, gradients):
    return gradients / (2 * np.sqrt(losses))[:, None]


@pytest.mark.x64
def test_nash_pinn_solves_the_balance_of_the_mean_gram_matrix():
    decay = 0.6
    x, weights = train(bilb.presets.nash_pinn(decay))
    mean = total = 0.0
    at = START
    for step, of_losses in enumerate(np.asarray(weights)):
        losses, gradients, _ = by_hand(at, 0.1 * step)
        rows = root_gradients(losses, gradients)
        mean, total = decay * mean + (1 - decay) * rows @ rows.T, decay * total + 1 - decay
        w = of_losses * 2 * np.sqrt(losses)
        np.testing.assert_allclose(mean / total @ w * w, np.ones(3), rtol=1e-7)
        at = at - RATE * w @ rows
    np.testing.assert_allclose(x, at, **EXACT)


@pytest.mark.x64
def test_marigold_pinn_is_a_step_towards_equal_products_of_weight_and_slope():
    """Adam on the logits, the slopes those of the step just taken."""
    logits, moments, slopes, largest, expected = np.zeros(3), np.zeros((2, 3)), None, 0.0, []
    x = START
    for step in range(STEPS):
        losses, gradients, _ = by_hand(x, 0.1 * step)
        rows = root_gradients(losses, gradients)
        if slopes is not None:
            q = 3 * softmax(logits) * slopes
            largest = max(largest, np.abs(q).max())
            g = (q - q.mean()) / (abs(q.mean()) + 1e-2 * largest)
            moments = np.stack([0.9 * moments[0] + 0.1 * g, 0.999 * moments[1] + 0.001 * g**2])
            m, v = moments[0] / (1 - 0.9**step), moments[1] / (1 - 0.999**step)
            logits = logits - 0.025 * m / (np.sqrt(v) + 1e-8)
            logits = logits - logits.mean()
        direction = softmax(logits) @ rows
        slopes = rows @ direction
        expected.append(softmax(logits) / (2 * np.sqrt(losses)))
        x = x - RATE * direction
    actual_x, weights = train(bilb.presets.marigold_pinn())
    np.testing.assert_allclose(weights, expected, rtol=1e-7)
    np.testing.assert_allclose(actual_x, x, rtol=1e-7)


POINTS = np.linspace(0.05, 0.95, 16)


def oscillator(params):
    """``u = a sin(b t)`` for ``u'' + π² u = 0`` and u(½) = 1: solved by (1, π), trivially a = 0."""
    a, b = params
    residual = a * (np.pi**2 - b**2) * jnp.sin(b * POINTS)
    return jnp.stack([jnp.mean(residual**2), (a * jnp.sin(b / 2) - 1) ** 2])


@functools.cache
def solve(name):
    balancer, options = {
        "sum": (bilb.linear_scalarization(), {}),
        "log": (bilb.log_losses(), {}),
        "log-nash": (bilb.chain(bilb.log_losses(), bilb.marigold("nash")), {}),
        "root": (bilb.power_losses(), {}),
        "marigold_pinn": (bilb.presets.marigold_pinn(), {}),
        "nash_pinn": (bilb.presets.nash_pinn(), {}),
        "nash_pinn-sketch": (bilb.presets.nash_pinn(), {"gram": bilb.grams.sketch()}),
        "lr_annealing": (bilb.lr_annealing(), {}),
        "ntk_weights": (bilb.ntk_weights(0.0, 1, decay=0.99), {}),
    }[name]
    value_and_grad = bilb.value_and_grad(oscillator, balancer, **options)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 3000))

    def step(carry, _):
        params, state, opt_state = carry
        _, gradient, state = value_and_grad(params, state)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), state, opt_state), None

    def run(params):
        carry = params, value_and_grad.init(params), optimizer.init(params)
        return jax.lax.scan(step, carry, length=3000)[0][0]

    return jax.jit(run)(jnp.array([0.3, 1.0], jnp.float32))


OTHERS = ["nash_pinn", "lr_annealing", "ntk_weights"]


@pytest.mark.parametrize("name", ["sum", "log", "log-nash", "root"])
def test_these_are_caught_by_the_trivial_solution(name):
    assert jnp.abs(solve(name)[0]) < 0.05


@pytest.mark.parametrize(
    "name",
    [
        "marigold_pinn",
        "nash_pinn-sketch",
        *[pytest.param(n, marks=pytest.mark.slow) for n in OTHERS],
    ],
)
def test_these_find_the_solution(name):
    np.testing.assert_allclose(solve(name), [1.0, np.pi], rtol=1e-5)
