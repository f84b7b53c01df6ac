"""What each aggregator computes, against its definition and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import assert_close, assert_equal, mostly_slow
from test_aggregators import ALL, LOSSES, PARAMS, K, example_gradients

import bilb
from bilb.gradient_balancing import solvers
from bilb.gradient_balancing.aggregators import graddrop


def test_graddrop_follows_one_sign_with_the_probability_of_its_share():
    rows = jnp.stack([jnp.full(10_000, 3.0), jnp.full(10_000, -1.0), jnp.full(10_000, 0.5)])
    aggregator = bilb.graddrop(key=5)
    gradient, state = jax.jit(aggregator.update)(rows, aggregator.init(rows[0]))
    up = gradient > 0
    np.testing.assert_allclose(gradient, jnp.where(up, 3.5, -1.0))
    assert abs(up.mean() - 3.5 / 4.5) < 0.015
    other, _ = jax.jit(aggregator.update)(rows, state)
    assert 0.2 < jnp.mean(up == (other > 0)) < 0.75
    assert_close(jax.jit(aggregator.update)(jnp.abs(rows), state)[0], jnp.abs(rows).sum(0))


def test_graddrop_draws_once_per_leaf_and_step():
    rows = {"a": jnp.ones((2, 500)) * jnp.array([[1.0], [-1.0]])}
    rows["b"] = rows["a"]
    aggregator = bilb.graddrop(key=5)
    gradient, _ = jax.jit(aggregator.update)(rows, aggregator.init(rows["a"][0]))
    assert 0.4 < jnp.mean(gradient["a"] == gradient["b"]) < 0.6
    seeds = jax.vmap(lambda seed: bilb.graddrop(seed).init(None).key)(jnp.arange(2))
    one = bilb.graddrop(jax.random.key(5)).init(None).key
    assert_equal(one, bilb.graddrop(5).init(None).key)
    assert seeds[0] != seeds[1]


def test_graddrop_leaks_what_it_drops():
    rows = jnp.array([[1.0, 1.0], [-2.0, -2.0]])
    kept = graddrop.keep_one_sign(rows, jnp.array([0.1, 0.9]), jnp.array([0.5, 0.25]))
    np.testing.assert_allclose(kept, [1 - 0.25 * 2, 0.5 - 2])
    aggregator = bilb.graddrop(leak=1.0)
    gradient, _ = jax.jit(aggregator.update)(rows, aggregator.init(rows[0]))
    np.testing.assert_allclose(gradient, rows.sum(0))


def test_trimmed_mean_without_trimming_is_the_mean():
    rows = example_gradients()
    mean = jax.tree.map(lambda g: g[1:].mean(0), rows)
    aggregator = bilb.trimmed_mean(0)
    gradient, _ = jax.jit(aggregator.update)(
        rows, aggregator.init(PARAMS), mask=ALL.at[0].set(False)
    )
    assert_close(gradient, mean)


@pytest.mark.parametrize("present", mostly_slow([1, 2, 3, 4], fast=[2, 3]))
def test_trimmed_mean_of_too_few_present_tasks_is_their_median(present):
    rows = jax.random.normal(jax.random.key(0), (5, 7))
    aggregator = bilb.trimmed_mean(2)
    gradient, _ = jax.jit(aggregator.update)(rows, optax.EmptyState(), mask=jnp.arange(5) < present)
    np.testing.assert_allclose(gradient, jnp.median(rows[:present], axis=0), rtol=1e-6)


def test_db_mtl_gives_all_tasks_the_largest_norm():
    rows = jnp.eye(3) * jnp.array([[2.0], [30.0], [0.001]])
    losses = jnp.array([1.0, 10.0, 0.01])
    aggregator = bilb.db_mtl(3, decay=0.0)
    gradient, state = jax.jit(aggregator.update)(rows, aggregator.init(rows[0]), losses=losses)
    np.testing.assert_allclose(gradient, [3.0, 3.0, 3.0], rtol=1e-5)
    np.testing.assert_allclose(state.weights, [1.5, 1.0, 30.0], rtol=1e-5)
    gradient, _ = jax.jit(aggregator.update)(rows, state, losses=losses.at[1].set(-1.0))
    np.testing.assert_allclose(gradient, [2.0, 0.0, 2.0], rtol=1e-5)


def test_db_mtl_of_logarithms_is_the_same_without_losses():
    state = bilb.db_mtl(K).init(PARAMS)
    rows = example_gradients()
    logs = jax.tree.map(lambda g: jax.vmap(jnp.divide)(g, LOSSES), rows)
    expected = jax.jit(bilb.db_mtl(K).update)(rows, state, losses=LOSSES)
    assert_close(
        jax.jit(bilb.db_mtl(K, log=False).update)(logs, state), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_moco_of_the_paper_ends_at_the_min_norm_weights_of_the_mean_gradients():
    mean = jnp.array([[1.0, 0.0, 0.2], [0.0, 2.0, 0.2], [0.3, 0.5, 0.0]])
    aggregator = bilb.moco(
        3, gamma=1.0, gamma_sigma=0.5, scheme="projection", normalize=False, beta=1.0
    )

    def step(state, key):
        rows = mean + 0.3 * jax.random.normal(key, mean.shape)
        gradient, state = aggregator.update(rows, state)
        return state, gradient

    keys = jax.random.split(jax.random.key(0), 1000)
    state, _ = jax.jit(lambda: jax.lax.scan(step, aggregator.init(mean[0]), keys))()
    weights = solvers.min_norm_weights(mean @ mean.T)
    np.testing.assert_allclose(state.tracked_gradients, mean, atol=0.1)
    np.testing.assert_allclose(state.weights, weights, atol=0.05)
    assert jnp.ptp(weights) > 0.2


def test_moco_scales_gradients_to_the_length_of_their_loss():
    rows, losses = jnp.eye(2) * jnp.array([[5.0], [0.1]]), jnp.array([3.0, 1.0])
    aggregator = bilb.moco(2, beta=1.0, gamma=0.0)
    gradient, state = jax.jit(aggregator.update)(rows, aggregator.init(rows[0]), losses=losses)
    np.testing.assert_allclose(state.tracked_gradients, jnp.diag(losses), rtol=1e-5)
    np.testing.assert_allclose(gradient, losses / 2, rtol=1e-5)


def test_excess_mtl_two_steps_by_hand():
    first, second = np.array([[1.0, 2.0], [4.0, 0.5]]), np.array([[0.5, 0.5], [4.0, 1.0]])
    aggregator = bilb.excess_mtl(2, step_size=0.7)
    state = aggregator.init(jnp.zeros(2))
    gradient, state = jax.jit(aggregator.update)(jnp.asarray(first), state)
    np.testing.assert_allclose(gradient, first.mean(0), rtol=1e-6)
    gradient, state = jax.jit(aggregator.update)(jnp.asarray(second), state)
    excess = (second**2 / np.sqrt(first**2 + second**2)).sum(1)
    weights = np.exp(0.7 * excess / first.sum(1))
    weights /= weights.sum()
    np.testing.assert_allclose(state.weights, weights, rtol=1e-5)
    np.testing.assert_allclose(gradient, weights @ second, rtol=1e-5)


def test_excess_mtl_warms_up_each_task_in_its_own_first_steps():
    aggregator = bilb.excess_mtl(3, step_size=1.0, warmup_steps=2)
    state = aggregator.init(jnp.zeros(1))
    rows = lambda *values: jnp.array(values)[:, None]
    two = jnp.array([True, True, False])
    for _ in range(2):
        gradient, state = jax.jit(aggregator.update)(rows(1.0, 1.0, 9.0), state, mask=two)
        np.testing.assert_allclose(gradient, [1.0])
    np.testing.assert_allclose(state.weights, [0.5, 0.5, 1 / 3], rtol=1e-6)
    assert state.initial_excess[2] == 0
    # The late task neither moves nor lets the others take its part.
    _, state = jax.jit(aggregator.update)(rows(2.0, 0.1, 9.0), state)
    np.testing.assert_allclose(state.weights[2], 1 / 3, rtol=1e-6)
    assert state.weights[0] > state.weights[1]
    np.testing.assert_allclose(state.initial_excess[2], 9.0, rtol=1e-6)
    np.testing.assert_allclose(state.weights.sum(), 1.0, rtol=1e-6)


def test_excess_mtl_keeps_moving_after_a_task_has_lost_all_its_weight():
    aggregator = bilb.excess_mtl(2, step_size=500.0)
    state = aggregator.init(jnp.zeros(1))
    for values in ([1.0, 1.0], [1.0, 0.0]):
        _, state = jax.jit(aggregator.update)(jnp.array(values)[:, None], state)
    assert state.weights[1] == 0
    for _ in range(3):
        _, state = jax.jit(aggregator.update)(jnp.array([[0.0], [1.0]]), state)
    assert state.weights[1] > 0.99
