"""MARIGOLD with absent tasks, with slopes that are not finite, and in half precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import mostly_slow
from test_marigold import conflicting, follow

import bilb


def test_weights_learn_only_from_tasks_present_both_times():
    balancer = bilb.marigold()
    losses, mask = jnp.ones(3), jnp.array([True, False, True])
    state = balancer.init(losses)
    _, state = balancer.update(losses, state, slopes=jnp.zeros(3), mask=mask)
    np.testing.assert_allclose(state.weights, [0.5, 1 / 3, 0.5], rtol=1e-6)
    slopes = jnp.array([2.0, jnp.nan, 1.0])
    balanced, learnt = balancer.update(losses, state, slopes=slopes)
    moments = optax.tree.get(learnt.opt_state, "mu")
    assert moments[1] == 0 != moments[0]
    assert learnt.point[1] == 0
    assert learnt.weights[2] > learnt.weights[0]
    np.testing.assert_allclose(balanced.sum(), 1.0, rtol=1e-6)


def test_slopes_that_are_not_finite_teach_nothing():
    balancer = bilb.marigold()
    losses = jnp.ones(2)
    _, state = balancer.update(losses, balancer.init(losses), slopes=jnp.zeros(2))
    _, after = balancer.update(losses, state, slopes=jnp.array([1.0, jnp.inf]))
    np.testing.assert_array_equal(after.point, state.point)
    assert np.isfinite(jax.tree.leaves(after.opt_state)[1]).all()
    balancer = bilb.marigold("cagrad")
    slope_fn = lambda weights: jnp.array([1.0, jnp.nan])
    _, state = balancer.update(losses, balancer.init(losses), slope_fn=slope_fn)
    np.testing.assert_array_equal(state.point, 0.0)
    np.testing.assert_allclose(state.weights, 0.5 / (1 + 0.4**2), rtol=1e-6)


@pytest.mark.x64
@pytest.mark.parametrize("num_tasks", mostly_slow([2, 4, 20], fast=[4]))
@pytest.mark.parametrize(("lower", "expected"), [("nash", 0.75), ("fairgrad", 0.8122526)])
def test_fair_lower_levels_average_over_present_tasks(lower, expected, num_tasks):
    """For G = diag(1, 9) the weights are (1, 1/3) or (1, 9^(-2/3)), whatever is absent."""
    mask = jnp.arange(num_tasks) >= num_tasks - 2
    gram = jnp.diag(jnp.full(num_tasks, 1e4).at[-2:].set(jnp.array([1.0, 9.0])))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.025, 2000))
    weights = follow(bilb.marigold(lower, optimizer=optimizer), gram, mask, 2000)[-1]
    np.testing.assert_allclose(weights[-2:], [expected, 1 - expected], atol=1e-4)


@pytest.mark.x64
def test_preferences_are_shares_of_present_tasks():
    """For G = diag(1, 9) the balance λ² G = p ends at (2, 1/3) for p = (4, 1)."""
    mask = jnp.array([False, True, True])
    gram, lower = jnp.diag(jnp.array([1e4, 1.0, 9.0])), bilb.lower_levels.nash([50.0, 4.0, 1.0])
    optimizer = optax.adam(optax.cosine_decay_schedule(0.025, 2000))
    weights = follow(bilb.marigold(lower, optimizer=optimizer), gram, mask, 2000)[-1]
    np.testing.assert_allclose(weights, [0.0, 6 / 7, 1 / 7], atol=1e-4)


LOWER = {
    **{name: (name, {}) for name in ("mgda", "sdmgrad", "cagrad", "nash", "fairgrad")},
    "mgda-projection": ("mgda", {"scheme": "projection", "optimizer": optax.sgd(0.05)}),
    "sdmgrad-exponentiated": ("sdmgrad", {"scheme": "exponentiated", "optimizer": optax.sgd(0.05)}),
    "dualproj": ("dualproj", {"scheme": "projection", "optimizer": optax.sgd(0.05)}),
    "cagrad-inner_steps": ("cagrad", {"inner_steps": 3}),
}


@pytest.mark.x64
@pytest.mark.parametrize("name", mostly_slow(LOWER, fast=["dualproj"]))
def test_present_tasks_are_balanced_as_if_the_others_did_not_exist(name):
    lower, options = LOWER[name]
    present = np.array([1, 2, 4])
    mask = jnp.zeros(5, bool).at[present].set(True)
    here = conflicting(-2.0)
    gram = jnp.full((5, 5), 50.0).at[np.ix_(present, present)].set(here)
    extra = "slope_fn" if lower == "cagrad" else "slopes"
    run = functools.partial(follow, bilb.marigold(lower, **options), steps=300, extra=extra)
    alone = run(here, jnp.ones(3, bool))
    masked = run(gram, mask)
    np.testing.assert_allclose(masked[:, present], alone, rtol=1e-9)
    assert jnp.ptp(alone[-1]) > 0.05
    if lower == "cagrad":  # CAGrad's own weights: (mean + c ‖g_0‖ / ‖Jᵀ λ‖ λ) / (1 + c²)
        assert (alone > 1 / 3 / (1 + 0.4**2)).all()
    elif lower == "dualproj":
        assert (alone >= 1 / 3).all()
    else:
        np.testing.assert_allclose(masked.sum(1), 1.0, rtol=1e-12)


def test_learns_from_steps_that_the_next_mask_leaves_out():
    """Tasks 0 and 1 are present at even steps only, task 2 at odd ones."""
    balancer, losses = bilb.marigold(), jnp.ones(3)
    state = balancer.init(losses)
    update = jax.jit(balancer.update)
    for step in range(20):
        mask = jnp.array([True, True, False]) ^ (step % 2 == 1)
        slopes = jnp.array([2.0, 1.0, 0.0]) if step % 2 else jnp.array([0.0, 0.0, 1.0])
        _, state = update(losses, state, mask=mask, slopes=slopes * (step > 0))
    assert state.weights[0] < 0.45 < 0.55 < state.weights[1]
    np.testing.assert_allclose(state.weights[:2].sum(), 1.0, rtol=1e-6)


def test_the_momentum_of_an_absent_task_moves_nobody():
    momentum = optax.sgd(0.1, momentum=0.9)
    balancer = bilb.marigold(scheme="exponentiated", optimizer=momentum)
    losses, mask = jnp.ones(3), jnp.array([False, True, True])
    _, state = balancer.update(losses, balancer.init(losses), slopes=jnp.zeros(3))
    slopes = jnp.array([4.0, 0.0, 1.0])
    _, state = balancer.update(losses, state, slopes=slopes, mask=mask)
    _, after = balancer.update(losses, state, slopes=jnp.zeros(3), mask=mask)
    moved = state.point - 0.09 * jnp.where(mask, slopes, 0.0)
    np.testing.assert_allclose(after.point[1:], (moved - moved.mean())[1:], rtol=1e-5)
    assert after.point[0] == state.point[0]


@pytest.mark.parametrize("scheme", ["softmax", "exponentiated"])
def test_one_enormous_slope_does_not_freeze_the_weights(scheme):
    """Adam forgets its square after ln(1e33) / 1e-3 steps."""
    balancer, losses = bilb.marigold(scheme=scheme), jnp.ones(2)

    def run(state, slopes, steps):
        step = lambda state, _: (balancer.update(losses, state, slopes=slopes)[1], None)
        return jax.lax.scan(step, state, length=steps)[0]

    @jax.jit
    def weights():
        state = run(balancer.init(losses), jnp.array([1e20, 0.0]), 2)
        state = run(state, jnp.array([0.0, 1.0]), 100_000)
        return state.weights, state.opt_state

    weights, opt_state = weights()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(opt_state))
    assert weights[0] > 0.9


half_dtypes = pytest.mark.parametrize(
    "dtype", mostly_slow([jnp.float16, jnp.bfloat16], fast=[jnp.float16])
)


def half_precision(dtype):
    """Two losses of 1.8e3 and 90 at a point where half precision cannot hold their slopes."""
    task_losses = lambda x: jnp.stack([20 * jnp.sum((x - 3) ** 2), jnp.sum((x + 3) ** 2)])
    return task_losses, jnp.zeros(10, dtype)


@half_dtypes
def test_large_losses_in_half_precision_teach(dtype):
    task_losses, x = half_precision(dtype)
    value_and_grad = bilb.value_and_grad(task_losses, bilb.marigold())
    state = value_and_grad.init(x)
    update = jax.jit(value_and_grad)
    losses, grads, state = update(x, state)
    assert losses.dtype == grads.dtype == dtype
    assert losses[0] == 1800 if dtype == jnp.float16 else losses[0] > 1790
    assert state.slopes.dtype == jnp.float32
    jacobian = jax.jacobian(task_losses)(x.astype(jnp.float32))
    np.testing.assert_allclose(state.slopes, jacobian @ jacobian.mean(0), rtol=0.02)
    _, _, state = update(x, state)
    assert state.balancer.weights[0] < 0.5 < state.balancer.weights[1]


@half_dtypes
def test_finite_differences_in_half_precision_are_a_type_error(dtype):
    task_losses, x = half_precision(dtype)
    slopes = bilb.slopes.finite_difference()
    value_and_grad = bilb.value_and_grad(task_losses, bilb.marigold(), slopes=slopes)
    with pytest.raises(TypeError, match=r"round to zero: use bilb\.slopes\.forward"):
        value_and_grad(x, value_and_grad.init(x))
