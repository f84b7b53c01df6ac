"""Absent tasks and non-finite losses: they contribute nothing and teach nothing."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import (
    assert_close,
    assert_equal,
    assert_finite,
    compiled,
    example_losses,
    jit,
    task_axes,
)
from methods import METHODS

import bilb

K = 5
PRESENT = jnp.array([True, False, True, False, True])
INDICES = jnp.flatnonzero(PRESENT)
ABSENT = jnp.flatnonzero(~PRESENT)
every_method = pytest.mark.parametrize("method", METHODS, ids=str, scope="module")


@functools.cache
def masked(method):
    """Returns the transformation and ``(losses, state, mask) -> balanced, state, gradient``."""
    transformation = method.make(K)

    @jit
    def function(losses, state, mask):
        def objective(losses):
            balanced, new_state = method.update(transformation, losses, state, mask=mask)
            return balanced.sum(), (balanced, new_state)

        gradient, (balanced, new_state) = jax.grad(objective, has_aux=True)(losses)
        return balanced, new_state, gradient

    return transformation, function


def warm(method):
    """Returns the state after two steps of all tasks."""
    transformation, function = masked(method)
    losses = example_losses(2, K)
    state = transformation.init(losses[0])
    for row in losses:
        _, state, _ = function(row, state, jnp.ones(K, bool))
    return state


def fields(method, state, tasks):
    """Returns ``(path, entries of these tasks)`` of every per-task leaf of the state.

    All but a note of which tasks were present.
    """
    axes = jax.tree.leaves(task_axes(method, K))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [
        (jax.tree_util.keystr(path), np.take(np.asarray(leaf), tasks, axis))
        for axis, (path, leaf) in zip(axes, leaves)
        if axis >= 0 and ".present" not in jax.tree_util.keystr(path)
    ]


@every_method
def test_absent_tasks_contribute_nothing_and_learn_nothing(method):
    _, function = masked(method)
    first = state = warm(method)
    for row in example_losses(20, K, seed=1):
        balanced, state, gradient = function(row.at[ABSENT].set(jnp.nan), state, PRESENT)
        assert_finite((balanced, state, gradient))
        assert not balanced[ABSENT].any()
        assert not gradient[ABSENT].any()
        assert gradient[INDICES].all()
    for (path, before), (_, after) in zip(
        fields(method, first, ABSENT), fields(method, state, ABSENT)
    ):
        np.testing.assert_array_equal(after, before, err_msg=path)
    if method.phi:
        np.testing.assert_allclose(
            balanced.sum(), method.objective(row, state, INDICES), rtol=1e-5, atol=1e-5
        )


@every_method
def test_present_tasks_learn(method):
    transformation, function = masked(method)
    state = transformation.init(jnp.ones(K))
    before = fields(method, state, INDICES)
    for row in example_losses(5, K, seed=1):
        _, state, _ = function(row, state, PRESENT)
    moved = [
        path
        for (path, old), (_, new) in zip(before, fields(method, state, INDICES))
        if (old != new).all()
    ]
    learned = [name for name in method.learns if name not in method.shared]
    assert all(any(f".{name}" in path for path in moved) for name in learned)


@every_method
def test_the_loss_of_an_absent_task_does_not_matter(method):
    _, function = masked(method)
    state = warm(method)
    losses = example_losses(K, seed=1)
    results = [
        function(losses.at[ABSENT].set(value), state, PRESENT)
        for value in (1.0, -1e6, jnp.inf, jnp.nan)
    ]
    for other in results[1:]:
        assert_equal(other, results[0])


@every_method
def test_a_mask_of_all_tasks_is_no_mask(method):
    _, function = masked(method)
    state, losses = warm(method), example_losses(K, seed=1)
    balanced, new_state, _ = function(losses, state, jnp.ones(K, bool))
    expected = compiled(method, K)[1](losses, state)
    assert_close((balanced, new_state), expected)


@every_method
def test_no_task_at_all_stays_finite_and_comes_back(method):
    transformation, function = masked(method)
    nothing, everything = jnp.zeros(K, bool), jnp.ones(K, bool)
    losses = jnp.full(K, jnp.nan, jnp.float32)
    for state in (transformation.init(losses), warm(method)):
        balanced, next_state, gradient = function(losses, state, nothing)
        assert not balanced.any()
        assert not gradient.any()
        result = function(example_losses(K), next_state, everything)
        assert_finite((next_state, result))


@every_method
def test_skip_nonfinite_treats_a_nonfinite_loss_as_absent(method):
    transformation, function = masked(method)
    state = warm(method)
    losses = example_losses(K, seed=1).at[ABSENT].set(jnp.array([jnp.nan, -jnp.inf]))
    guarded = bilb.skip_nonfinite(transformation)
    chex.assert_trees_all_equal_structs(guarded.init(losses), state)

    def objective(losses):
        balanced, new_state = method.update(guarded, losses, state)
        return balanced.sum(), (balanced, new_state)

    gradient, (balanced, new_state) = jax.grad(objective, has_aux=True)(losses)
    expected = function(losses, state, PRESENT)
    assert_finite(expected)
    assert_close((balanced, new_state, gradient), expected)


@pytest.mark.parametrize(
    "method", [m for m in METHODS if "bilb.normalize" in str(m.factory.__module__)], ids=str
)
def test_a_nonfinite_loss_passes_through_a_link_to_its_own_entry_only(method):
    transformation, update = compiled(method, K)
    losses = example_losses(K)
    for bad in (jnp.nan, jnp.inf):
        first, state = update(losses.at[ABSENT].set(bad), transformation.init(losses))
        assert not jnp.isfinite(first[ABSENT]).any()
        second, state = update(losses, state)
        assert_finite((first[INDICES], second, state))
        # The statistics of the others are those they would have had anyway.
        _, usual = update(losses, transformation.init(losses))
        for (path, actual), (_, desired) in zip(
            fields(method, state, INDICES), fields(method, usual, INDICES)
        ):
            np.testing.assert_array_equal(actual, desired, err_msg=path)


def test_a_router_at_the_limit_of_its_bounds_keeps_tasks_apart_from_features():
    # As many features as tasks, and bounds that no fifth task could satisfy.
    balancer = bilb.bilb4mtl(router=bilb.routers.linear_softmax(4))
    losses, mask = example_losses(4), jnp.array([True, True, True, False])
    state = jit(balancer.init)(losses)
    features = jnp.ones((2, 4))
    _, new_state = jit(balancer.update)(losses, state, mask=mask, features=features)
    moved = new_state.router["kernel"] != state.router["kernel"]
    np.testing.assert_array_equal(moved, np.broadcast_to(mask, (4, 4)))
