"""IGBv2 beside its official defaults: in units of the base losses, near IGBv1, by the mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_igb import K, random_losses, scan, small

import bilb

BASE = functools.partial(small, units="base")
SCALES = jnp.array([1e-3, 1.0, 40.0, 8e4])


def run(balancer, losses):
    state, (_, weights) = jax.jit(lambda losses: scan(balancer, losses))(losses)
    return state, weights


def test_in_units_of_the_base_losses_no_scale_is_seen():
    losses = random_losses(22)  # fewer than the buffer keeps
    state, weights = run(BASE(), losses)
    of_scaled, scaled_weights = run(BASE(), SCALES * losses)
    np.testing.assert_allclose(scaled_weights, weights, rtol=1e-4)
    for leaf, other in zip(jax.tree.leaves(state.agent), jax.tree.leaves(of_scaled.agent)):
        np.testing.assert_allclose(leaf, other, rtol=1e-2, atol=1e-4)
    rows = state.buffer.transitions
    base = losses[1:3].mean(0)
    np.testing.assert_allclose(rows.next_states[:9], losses[3:12] / base, rtol=1e-5)
    np.testing.assert_allclose(rows.states[:9], losses[2:11] / base, rtol=1e-5)


def test_a_residual_stays_within_its_bound_of_igb_v1():
    losses = random_losses(24)
    _, expected = run(bilb.igb_v1(1, 2), losses)
    _, weights = run(BASE(residual=0.0), losses)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    _, weights = run(BASE(residual=0.3), losses)
    ratio = jnp.log(weights / expected)
    assert 0.1 < jnp.abs(ratio).max() <= 0.6
    np.testing.assert_allclose(weights.sum(1), K, rtol=1e-5)


def test_the_mean_is_the_same_whatever_is_drawn():
    losses = random_losses(17)
    balancer = BASE(action="mean")
    state, _ = run(balancer, losses)
    update = jax.jit(balancer.update)
    # Update 17, from 0, is after the warm-up, and the agent does not train there.
    first, second = (update(losses[3], state._replace(key=jax.random.key(i)))[1] for i in (1, 2))
    assert first.step == 18
    np.testing.assert_array_equal(first.weights, second.weights)
    sampled = jax.jit(BASE().update)
    first, second = (sampled(losses[3], state._replace(key=jax.random.key(i)))[1] for i in (1, 2))
    assert jnp.abs(first.weights - second.weights).max() > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": "log"}, 'units must be "losses" or "base"; got \'log\''),
        ({"action": "mode"}, 'action must be "sample" or "mean"; got \'mode\''),
        ({"residual": 0.5}, 'give units="base" as well'),
        ({"residual": -0.5, "units": "base"}, "residual must be >= 0; got -0.5"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
