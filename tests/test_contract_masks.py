"""Absent tasks and non-finite losses: they contribute nothing and teach nothing."""

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
    spoiled,
    task_axes,
    warm,
)
from methods import METHODS, every_method, few_methods

import bilb

K = 5
PRESENT = jnp.array([True, False, True, False, True])
INDICES = jnp.flatnonzero(PRESENT)
ABSENT = jnp.flatnonzero(~PRESENT)


def fields(method, state):
    """Returns ``(path, entries of present tasks, other entries)`` of every per-task leaf.

    An entry is a present task's if it is so along all axes that belong to the tasks. Notes on the
    call itself, of which tasks were present and of what links were in, are left out.
    """
    axes_of_leaves = jax.tree.leaves(task_axes(method, K))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    entries = []
    for axes, (path, leaf) in zip(axes_of_leaves, leaves):
        name = jax.tree_util.keystr(path)
        if not axes or ".present" in name or ".kept" in name:
            continue
        leaf = np.asarray(leaf)
        present = np.ones(leaf.shape, bool)
        for axis in axes:
            present &= np.expand_dims(PRESENT, [a for a in range(leaf.ndim) if a != axis])
        entries.append((name, leaf[present], leaf[~present]))
    return entries


@every_method
def test_absent_tasks_contribute_nothing_and_learn_nothing(method):
    _, update = compiled(method, K)
    first = state = warm(method, K)[0]
    for row in example_losses(20, K, seed=1):
        balanced, state, gradient = update(row.at[ABSENT].set(jnp.nan), state, PRESENT)
        assert_finite((balanced, state, gradient))
        assert not balanced[ABSENT].any()
        assert not gradient[ABSENT].any()
        assert gradient[INDICES].any() if method.sparse else gradient[INDICES].all()
    for (path, _, before), (_, _, after) in zip(fields(method, first), fields(method, state)):
        np.testing.assert_array_equal(after, before, err_msg=path)
    if method.phi:
        np.testing.assert_allclose(
            balanced.sum(), method.objective(row, state, INDICES), rtol=1e-5, atol=1e-5
        )


@every_method
def test_present_tasks_learn(method):
    transformation, update = compiled(method, K)
    state = transformation.init(jnp.ones(K))
    before = fields(method, state)
    for row in example_losses(5, K, seed=1):
        _, state, _ = update(row, state, PRESENT)
    some = np.any if method.sparse else np.all
    moved = [
        path
        for (path, old, _), (_, new, _) in zip(before, fields(method, state))
        if some(old != new)
    ]
    learned = [name for name in method.learns if name not in method.shared]
    assert all(any(f".{name}" in path for path in moved) for name in learned)


@every_method
def test_the_loss_of_an_absent_task_does_not_matter(method):
    _, update = compiled(method, K)
    state = warm(method, K)[0]
    losses = example_losses(K, seed=1)
    # Slopes tell of the previous call, in which all tasks were present.
    extra = method.extra(losses)
    results = [
        update(losses.at[ABSENT].set(value), state, PRESENT, extra)
        for value in (1.0, -1e6, jnp.inf, jnp.nan)
    ]
    for other in results[1:]:
        assert_equal(other, results[0])


@pytest.mark.parametrize("method", [m for m in METHODS if m.about_losses(K)], ids=str)
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_said_of_an_absent_task_does_not_matter(method, value):
    _, update = compiled(method, K)
    state, losses = warm(method, K)
    # What tells of the previous call is about the tasks that were present then.
    _, state, _ = update(losses, state, PRESENT)
    extra = method.extra(losses)
    other = spoiled(extra, ABSENT, value)
    assert_equal(update(losses, state, PRESENT, other), update(losses, state, PRESENT, extra))


@every_method
def test_no_task_at_all_stays_finite_and_comes_back(method):
    transformation, update = compiled(method, K)
    losses = jnp.full(K, jnp.nan, jnp.float32)
    for state in (transformation.init(losses), warm(method, K)[0]):
        balanced, next_state, gradient = update(losses, state, jnp.zeros(K, bool))
        assert not balanced.any()
        assert not gradient.any()
        result = update(example_losses(K), next_state)
        assert_finite((next_state, result))


@few_methods
def test_skip_nonfinite_treats_a_nonfinite_loss_as_absent(method):
    transformation, update = compiled(method, K)
    state = warm(method, K)[0]
    losses = example_losses(K, seed=1).at[ABSENT].set(jnp.array([jnp.nan, -jnp.inf]))
    guarded = bilb.skip_nonfinite(transformation)
    chex.assert_trees_all_equal_structs(guarded.init(losses), state)

    def objective(losses):
        balanced, new_state = method.update(guarded, losses, state)
        return balanced.sum(), (balanced, new_state)

    gradient, (balanced, new_state) = jax.grad(objective, has_aux=True)(losses)
    expected = update(losses, state, PRESENT)
    assert_finite(expected)
    assert_close((balanced, new_state, gradient), expected)


@pytest.mark.parametrize(
    "method", [m for m in METHODS if "bilb.normalize" in str(m.factory.__module__)], ids=str
)
def test_a_nonfinite_loss_passes_through_a_link_to_its_own_entry_only(method):
    transformation, update = compiled(method, K)
    losses = example_losses(K)
    for bad in (jnp.nan, jnp.inf):
        first, state, _ = update(losses.at[ABSENT].set(bad), transformation.init(losses))
        assert not jnp.isfinite(first[ABSENT]).any()
        second, state, _ = update(losses, state)
        assert_finite((first[INDICES], second, state))
        # The statistics of the others are those they would have had anyway.
        _, usual, _ = update(losses, transformation.init(losses))
        for (path, actual, _), (_, desired, _) in zip(fields(method, state), fields(method, usual)):
            np.testing.assert_array_equal(actual, desired, err_msg=path)


def test_a_router_at_the_limit_of_its_bounds_keeps_tasks_apart_from_features():
    # As many features as tasks, and bounds that no fifth task could satisfy.
    balancer = bilb.bilb4mtl(router=bilb.routers.linear_softmax(4))
    losses, mask = example_losses(4), jnp.array([True, True, True, False])
    state = jax.jit(balancer.init)(losses)
    features = jnp.ones((2, 4))
    _, new_state = jax.jit(balancer.update)(losses, state, mask=mask, features=features)
    moved = new_state.router["kernel"] != state.router["kernel"]
    np.testing.assert_array_equal(moved, np.broadcast_to(mask, (4, 4)))
