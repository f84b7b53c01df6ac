"""Weights that networks for equations take from the losses alone, against formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import example_losses
from test_pinn_methods import EXACT, A

import bilb

ROWS = np.asarray(example_losses(6, 3, seed=4), np.float64)


def run(balancer, rows=ROWS):
    """Returns the weights (steps, K) over rows of losses."""
    rows = jnp.asarray(rows)
    step = lambda state, row: (lambda b, s: (s, b / row))(*balancer.update(row, state))
    return jax.jit(lambda rows: jax.lax.scan(step, balancer.init(rows[0]), rows)[1])(rows)


def softmax(values):
    exponents = np.exp(values - values.max())
    return exponents / exponents.sum()


@pytest.mark.x64
@pytest.mark.parametrize("loss_weighted", [False, True])
@pytest.mark.parametrize("rate", ["difference", "normalized", "ratio"])
def test_softadapt(rate, loss_weighted):
    beta = 0.7
    expected = []
    for t, losses in enumerate(ROWS):
        last = ROWS[t - 1] if t else losses
        change = losses - last
        if rate == "normalized":
            change = change / np.abs(change).sum() if t else change
        if rate == "ratio":
            change = losses / (last + 1e-6) if t else np.ones(3)
        weights = softmax(beta * change)
        if loss_weighted:
            weights = weights * losses / (weights * losses).sum()
        expected.append(weights)
    balancer = bilb.softadapt(beta, rate=rate, loss_weighted=loss_weighted)
    np.testing.assert_allclose(run(balancer), expected, **EXACT)


def test_softadapt_of_changes_below_one():
    """Normalised rates add up to 1 whatever their size."""
    balancer = bilb.softadapt(1.0, rate="normalized")
    update = jax.jit(balancer.update)
    _, state = update(jnp.zeros(3), balancer.init(jnp.zeros(3)))
    for size in (1e-30, 1e-3, 1e30):
        change = jnp.array([1.0, -2.0, 0.0], jnp.float32) * size
        _, new = update(change, state)
        np.testing.assert_allclose(new.weights, softmax(np.array([1, -2, 0]) / 3), rtol=1e-5)


@pytest.mark.x64
def test_relobralo():
    alpha, temperature, rho, key = 0.9, 0.4, 0.6, jax.random.key(3)
    lamb, expected, coins = np.ones(3), [], []
    for t, losses in enumerate(ROWS):
        key, subkey = jax.random.split(key)
        coins.append(float(jax.random.bernoulli(subkey, rho)))
        balance = lambda s, losses=losses: 3 * softmax(losses / (temperature * s))
        last = ROWS[max(t - 1, 0)]
        lookback = coins[-1] * lamb + (1 - coins[-1]) * balance(ROWS[0])
        lamb = alpha * lookback + (1 - alpha) * balance(last)
        expected.append(lamb)
    assert {*coins[1:]} == {0.0, 1.0}
    balancer = bilb.relobralo(alpha, temperature, rho, key=3)
    np.testing.assert_allclose(run(balancer), expected, **EXACT)


@pytest.mark.x64
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_self_adaptive(exponent):
    lamb, expected = np.full(3, 0.5), []
    for losses in ROWS:
        expected.append(lamb**exponent)
        lamb = lamb + 0.1 * exponent * lamb ** (exponent - 1) * losses
    balancer = bilb.self_adaptive(exponent, initial=0.5, optimizer=optax.sgd(0.1))
    np.testing.assert_allclose(run(balancer), expected, **EXACT)


def test_a_loss_that_is_not_finite_teaches_self_adaptive_weights_nothing():
    balancer = bilb.self_adaptive()
    update = jax.jit(balancer.update)
    losses = jnp.array([1.0, 2.0])
    _, state = update(losses, balancer.init(losses))
    balanced, new = update(losses.at[1].set(jnp.inf), state)
    assert balanced[1] == jnp.inf
    assert new.scales[0] > state.scales[0]
    of_second = lambda state: [leaf[1] for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert of_second(new.scales) == of_second(state.scales)
    assert of_second(new.opt_state) == of_second(state.opt_state)


@pytest.mark.x64
@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0, 2.0])
def test_powers_of_losses(exponent):
    link = bilb.power_losses(exponent)
    losses = ROWS[0]
    objective = lambda losses: link.update(losses, link.init(losses))[0].sum()
    value, gradient = jax.value_and_grad(objective)(jnp.asarray(losses))
    np.testing.assert_allclose(value, (losses**exponent).sum(), **EXACT)
    np.testing.assert_allclose(gradient, exponent * losses ** (exponent - 1), **EXACT)


def test_powers_of_losses_that_have_none():
    link = bilb.power_losses()
    losses = jnp.array([0.0, -1.0, 1e-31, 4.0, jnp.nan, jnp.inf])
    balanced, pullback = jax.vjp(lambda losses: link.update(losses, link.init(losses))[0], losses)
    np.testing.assert_allclose(balanced, [1e-15, 1e-15, 1e-15, 2.0, np.nan, np.inf])
    (gradient,) = pullback(jnp.ones(6))
    np.testing.assert_allclose(gradient[:4], [0.0, 0.0, 0.0, 0.25])


@pytest.mark.x64
def test_gradients_of_root_losses_keep_their_size():
    """‖∇√l‖² is rᵀ J Jᵀ r / (N ‖r‖²), for residuals of any size."""
    loss = lambda x, r: jnp.mean((A @ x + r) ** 2)[None]
    value_and_grad = bilb.value_and_grad(loss, bilb.power_losses())
    take = jax.jit(lambda x, r: value_and_grad(x, value_and_grad.init(x, r), r)[1])
    for size in (1.0, 1e-3, 1e-6):
        r = size * np.array([1.0, -2.0, 0.5, 3.0, 1.0])
        gradient = take(jnp.zeros(4), r)
        quotient = r @ A @ A.T @ r / (len(r) * r @ r)
        np.testing.assert_allclose(gradient @ gradient, quotient, **EXACT)
