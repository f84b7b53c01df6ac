"""IGBv2 beside its official defaults: in units of the base losses, near IGBv1, by the mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_igb import K, igb_v2, random_losses, scan, small

import bilb

BASE = functools.partial(small, units="base")
SCALES = jnp.array([1e-3, 1.0, 40.0, 8e4])


def run(balancer, losses):
    state, (_, weights) = jax.jit(lambda losses: scan(balancer, losses))(losses)
    return state, weights


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_residual_stays_within_its_bound_of_igb_v1():
    losses = random_losses(24)
    _, expected = run(bilb.igb_v1(1, 2), losses)
    _, weights = run(BASE(residual=0.0), losses)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    _, weights = run(BASE(residual=0.3), losses)
    ratio = jnp.log(weights / expected)
    assert 0.1 < jnp.abs(ratio).max() <= 0.6
    np.testing.assert_allclose(weights.sum(1), K, rtol=1e-5)


@pytest.mark.slow
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


@pytest.mark.slow
def test_on_three_regressions_of_unlike_scales_the_preset_is_as_good_as_igb_v1():
    """Geometric means of the test errors, 8 seeds; the losses are as 1 : 5,600 : 490,000."""
    epoch, steps, scales = 20, 1200, jnp.array([0.4, 30.0, 280.0])
    keys = [jax.random.fold_in(jax.random.key(7), i) for i in range(6)]
    first = jax.random.normal(keys[2], (8, 16)) / 8**0.5
    second = jax.random.normal(keys[3], (16, 3)) / 4
    truth = lambda x: jnp.tanh(x @ first) @ second
    x, x_test = jax.random.normal(keys[1], (640, 8)), jax.random.normal(keys[5], (500, 8))
    y = scales * (truth(x) + 0.05 * jax.random.normal(keys[4], (640, 3)))

    def task_losses(params, x, y):
        outputs = scales * (jnp.tanh(x @ params["trunk"]) @ params["heads"])
        return jnp.mean((outputs - y) ** 2, axis=0)

    def train(make, seed):
        keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(3)]
        params = {
            "trunk": jax.random.normal(keys[0], (8, 6)) / 8**0.5,
            "heads": jax.random.normal(keys[1], (6, 3)) / 6**0.5,
        }
        value_and_grad = bilb.value_and_grad(task_losses, make(seed))
        optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps, 0.01))

        def step(carry, rows):
            params, opt_state, state = carry
            _, grads, state = value_and_grad(params, state, x[rows], y[rows])
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state, state), None

        rows = jax.random.randint(keys[2], (steps, 32), 0, 640)
        start = params, optimizer.init(params), value_and_grad.init(params, x, y)
        params = jax.lax.scan(step, start, rows)[0][0]
        return jnp.log(task_losses(params, x_test, scales * truth(x_test)) / scales**2).mean()

    errors_of = lambda make: jax.jit(jax.vmap(lambda seed: train(make, seed)))(jnp.arange(8))
    igb_v1 = errors_of(lambda seed: bilb.igb_v1(epoch, epoch))
    preset = errors_of(lambda seed: bilb.presets.igb_v2_near_igb_v1(epoch, key=seed))
    assert jnp.mean(preset - igb_v1) < 0.02
    agent = {"num_updates": 10, "buffer_size": 1000, "batch_size": 64, "hidden": (64, 64)}
    agent |= {"warmup_steps": 5 * epoch, "update_after": 3 * epoch}
    official = errors_of(lambda seed: igb_v2(epoch, epoch, key=seed, **agent))
    assert jnp.mean(official - igb_v1) > 0.05
