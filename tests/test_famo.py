"""FAMO against recorded runs of the official implementations, and its rules for bad losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from conftest import oracle, oracle_names, relative_deviation
from contract import mostly_slow

import bilb

# Recorded name: options.
RECORDED = {
    "famo_py.g0.01": {"gamma": 0.01},
    "famo_repo.g1e-5": {"gamma": 1e-5},
    "famo_repo.g0.001": {"gamma": 1e-3},
    "famo_py.g0.5_minloss": {"gamma": 0.5},
    "famo_py.g0.01_lr0.1": {
        "optimizer": optax.chain(optax.add_decayed_weights(0.01), optax.adam(0.1))
    },
    "torchjd.FAMO_wd1e-3": {},
    "libmtl.FAMO_g1e-3": {"gamma": 1e-3},
}


@pytest.mark.x64
@pytest.mark.parametrize("file", oracle_names("f3_static_K*"))
@pytest.mark.parametrize(
    "name", mostly_slow(RECORDED, fast=["famo_py.g0.01", "famo_py.g0.5_minloss"])
)
def test_replays_recorded_losses(file, name):
    recorded = oracle(file)
    options = dict(RECORDED[name])
    if f"{name}/min_losses" in recorded:
        options["min_losses"] = jnp.array(recorded[f"{name}/min_losses"])
    balancer = bilb.famo(**options)
    losses, after = (jnp.array(recorded[key]) for key in ("losses", "losses_after"))

    def objective(losses, state, losses_after):
        balanced, state = balancer.update(losses, state, losses_after=losses_after)
        return balanced.sum(), state

    def step(state, inputs):
        now, before = inputs
        gradient = jax.value_and_grad(objective, has_aux=True)
        (value, state), effective = gradient(now, state, before)
        return state, (value, effective, state.weights, state.logits, state.opt_state)

    # One more call learns from the last recorded step.
    inputs = (jnp.append(losses, losses[:1], 0), jnp.append(jnp.zeros_like(after[:1]), after, 0))
    _, (value, effective, weights, logits, opt_state) = jax.lax.scan(
        step, balancer.init(losses[0]), inputs
    )
    ours = {
        "loss": value[:-1],
        "g_losses": effective[:-1],
        "weights": weights[:-1],
        "w": logits[1:],
        "adam_m": optax.tree.get(opt_state, "mu")[1:],
        "adam_v": optax.tree.get(opt_state, "nu")[1:],
    }
    found = [key for key in ours if f"{name}/{key}" in recorded]
    assert {"g_losses", "w"} <= set(found)
    for key in found:
        assert relative_deviation(ours[key], recorded[f"{name}/{key}"]) < 1e-9, key


def run_toy(starts, steps, every):
    """Trajectories (steps / every, starts, 2) of FAMO without decay, thinned."""
    balancer = bilb.famo(gamma=0.0, min_losses=jnp.array([-2.1, -21.0]))
    value_and_grad = bilb.value_and_grad(toy.task_losses, balancer)
    optimizer = optax.adam(1e-3)

    def step(carry, _):
        x, state, opt_state = carry
        _, grads, state = value_and_grad(x, state)
        updates, opt_state = optimizer.update(grads, opt_state, x)
        x = optax.apply_updates(x, updates)
        return (x, value_and_grad.after(x, state), opt_state), None

    def block(carry, _):
        return jax.lax.scan(step, carry, length=every)[0], carry[0]

    def run(x):
        carry = (x, value_and_grad.init(x), optimizer.init(x))
        (x, _, _), path = jax.lax.scan(block, carry, length=steps // every)
        return x, path

    return jax.jit(jax.vmap(run, out_axes=(0, 1)))(starts)


@pytest.mark.x64
@pytest.mark.slow
def test_follows_the_recorded_toy_trajectories():
    recorded = oracle("f5_toy")
    starts = jnp.array(recorded["inits"])
    path = recorded["famo_traj"]
    every = int(recorded["every"])
    both = jnp.concatenate([starts, starts + 1e-15 * jnp.maximum(jnp.abs(starts), 1.0)])
    end, ours = run_toy(both, int(recorded["famo_n_steps"]), every)
    shown = min(5_000 // every + 1, len(path))
    assert relative_deviation(ours[:shown, :5], path[:shown]) < 1e-9
    moved = jnp.abs(end[5:] - end[:5]).max(axis=1)
    steady = np.asarray(moved < 1e-3)
    assert steady.any()
    np.testing.assert_allclose(end[:5][steady], recorded["famo_final"][steady], atol=1e-3)


def test_first_call_learns_nothing():
    balancer = bilb.famo()
    losses = jnp.array([1.0, 2.0, 3.0])
    state = balancer.init(losses)
    _, after = balancer.update(losses, state, losses_after=jnp.zeros(3))
    np.testing.assert_array_equal(after.logits, state.logits)
    for old, new in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(after.opt_state)):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("at", [1.0, 0.5])
def test_a_loss_at_or_below_its_bound_is_left_out(at):
    """It has no gradient, and the others move on as they would without it."""
    balancer, alone = bilb.famo(min_losses=1.0), bilb.famo(min_losses=1.0)

    def objective(losses, balancer, state, losses_after):
        balanced, state = balancer.update(losses, state, losses_after=losses_after)
        return balanced.sum(), state

    step = jax.jit(jax.value_and_grad(objective, has_aux=True), static_argnums=1)
    losses, others = jnp.array([2.0, at, 4.0]), jnp.array([2.0, 4.0])
    state, without = balancer.init(losses), alone.init(others)
    for _ in range(3):
        (value, state), gradient = step(losses, balancer, state, losses / 2 + 1)
        (expected, without), desired = step(others, alone, without, others / 2 + 1)
        assert gradient[1] == 0
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, state)))
        ratio = gradient[0] / gradient[2]
        if state.step == 1:
            np.testing.assert_allclose(gradient[::2], desired, rtol=1e-5)
            np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient[::2].sum() / desired.sum(), 1.0, rtol=0.05)
    assert 1 < ratio < 10


def test_a_task_that_was_absent_then_teaches_nothing_now():
    balancer = bilb.famo()
    losses = jnp.array([1.0, 2.0, 3.0])
    mask = jnp.array([True, False, True])
    state = balancer.init(losses)
    _, state = balancer.update(losses, state, losses_after=jnp.zeros(3), mask=mask)
    after = jnp.array([0.5, jnp.nan, 2.9])
    _, learnt = balancer.update(losses, state, losses_after=after)
    assert learnt.logits[1] == state.logits[1]
    assert learnt.logits[0] < 0 < learnt.logits[2]


def test_learns_from_steps_that_the_next_mask_leaves_out():
    """Tasks 0 and 1 are present at even steps only, task 2 at odd ones."""
    balancer, losses = bilb.famo(), jnp.ones(3)
    state = balancer.init(losses)
    update = jax.jit(balancer.update)
    for step in range(20):
        mask = jnp.array([True, True, False]) ^ (step % 2 == 1)
        _, state = update(losses, state, mask=mask, losses_after=jnp.array([0.5, 0.9, 0.7]))
    assert state.logits[0] < -0.1 < 0.1 < state.logits[1]
    assert state.logits[2] == 0


def test_gamma_may_be_a_schedule_of_the_steps_learnt():
    losses, after = jnp.array([1.0, 2.0]), jnp.array([0.5, 1.9])

    def logits(gamma, steps):
        balancer = bilb.famo(gamma=gamma)
        state = balancer.init(losses)
        update = jax.jit(balancer.update)
        for _ in range(steps):
            _, state = update(losses, state, losses_after=after)
        return state.logits

    late = lambda count: jnp.where(count < 2, 0.0, 0.5)
    np.testing.assert_array_equal(logits(late, 3), logits(0.0, 3))
    assert jnp.abs(logits(late, 4) - logits(0.0, 4)).max() > 1e-4


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gamma": -1.0}, "gamma must be >= 0; got -1"),
        ({"gamma": 0.01, "optimizer": optax.adam(0.1)}, r"gamma=0\.01 beside another"),
        ({"min_losses": jnp.nan}, "min_losses"),
        ({"min_losses": jnp.ones(3)}, "min_losses must be one number or have an entry per task"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        bilb.famo(**options).init(jnp.ones(2))


def test_bounds_take_no_schedule():
    with pytest.raises(TypeError, match="min_losses takes no schedule"):
        bilb.famo(min_losses=lambda step: 0.0)


def test_says_how_to_supply_losses_after():
    balancer = bilb.famo()
    with pytest.raises(bilb.MissingArgument, match="losses_after"):
        balancer.update(jnp.ones(2), balancer.init(jnp.ones(2)))
