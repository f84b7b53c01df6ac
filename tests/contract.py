"""What the tests over all loss transformations share: an entry of the table, and comparisons."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilb import arguments


def mostly_slow(values, fast):
    """Returns values for parametrisation; the tests of all but the ``fast`` ones are slow."""
    marks = lambda value: () if value in fast else pytest.mark.slow
    return [pytest.param(value, marks=marks(value)) for value in values]


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A loss transformation under the contract.

    Attributes:
        name: the test id.
        factory: returns the transformation; takes ``numeric`` and ``arguments`` as keywords.
        numeric: hyperparameters to inject, to trace and to vmap over.
        arguments: the other keywords, or a function of the number of tasks that returns them. One
            named ``key`` is a seed and is vmapped over as well.
        static_args: the documented static arguments of ``optax.inject_hyperparams``.
        extra: ``losses -> arrays`` that ``update`` cannot work without, by name.
        keywords: ``arrays -> extra arguments``; the arrays themselves unless a method wants a
            function of them.
        values: ``(losses, new_state) -> (K,)``, what the links in front make of the losses.
        phi: ``(values, weights) -> scalar``, the documented objective with the state's weights
            (None where it has none) held constant; None where it has no such form. Absent tasks
            are left out of both arguments.
        warmup: the number of updates before ``phi`` holds.
        equivariant: permuting losses, what speaks of them, and per-task state permutes what comes
            out.
        sparse: weights may be exactly zero.
        learns: per-task fields of the state that move over generic losses.
        shared: fields of the state that tasks share although they have an axis of length K.
        kin: the entry whose code it shares but for the formula; the table's tests of it are slow,
            and those that a method's own code has little to do with leave it out.
        slow: its programs take long to compile; the table's tests of it are slow.
    """

    name: str
    factory: Callable[..., optax.GradientTransformation]
    numeric: dict[str, Any] = dataclasses.field(default_factory=dict)
    arguments: dict[str, Any] | Callable[[int], dict[str, Any]] = dataclasses.field(
        default_factory=dict
    )
    static_args: tuple[str, ...] = ()
    extra: Callable[[jax.Array], dict[str, Any]] = lambda losses: {}
    keywords: Callable[[dict[str, Any]], dict[str, Any]] = lambda arrays: arrays
    values: Callable[[jax.Array, Any], jax.Array] = lambda losses, state: losses
    phi: Callable[[jax.Array, Any], jax.Array] | None = lambda values, weights: values.sum()
    warmup: int = 0
    equivariant: bool = True
    sparse: bool = False
    learns: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    kin: str | None = None
    slow: bool = False

    def __str__(self):
        return self.name

    def fixed(self, num_tasks):
        """Returns the keywords that are not numeric hyperparameters."""
        return self.arguments(num_tasks) if callable(self.arguments) else self.arguments

    def make(self, num_tasks, **changes):
        """Returns the transformation for K tasks."""
        keywords = {**self.numeric, **self.fixed(num_tasks), **changes}
        return optax.with_extra_args_support(self.factory(**keywords))

    def update(self, transformation, losses, state, **more):
        """Calls update with the extra arguments that the method needs."""
        given = self.keywords(self.extra(losses))
        return transformation.update(losses, state, **{**given, **more})

    def step(self, transformation):
        """Returns update with the extra arguments that the method needs filled in."""
        return lambda losses, state: self.update(transformation, losses, state)

    def about_losses(self, num_tasks):
        """Returns the names of the arrays that speak of the losses."""
        return [name for name in self.extra(jnp.ones(num_tasks)) if name in arguments.ABOUT_LOSSES]

    def objective(self, losses, state, present=slice(None)):
        """Returns the documented objective, written independently of the library."""
        weights = optax.tree.get(state, "weights")
        values = self.values(losses, state)[present]
        return self.phi(values, None if weights is None else weights[present])

    def take(self, state, tasks, num_tasks):
        """Returns the state of the tasks with these indices, in their order."""
        return jax.tree.map(
            lambda axes, leaf: take(leaf, tasks, axes), task_axes(self, num_tasks), state
        )


class Axes(tuple):
    """The axes of a leaf that belong to the tasks; a leaf itself in a tree of them."""


@functools.cache
def task_axes(method, num_tasks):
    """Returns for every leaf of the state the axes that grow with K."""
    shapes = lambda k: jax.eval_shape(lambda: method.make(k).init(jnp.ones(k)))

    def axes(path, leaf, wider):
        if any(f".{field}" in jax.tree_util.keystr(path) for field in method.shared):
            return Axes()
        return Axes(a for a, (n, m) in enumerate(zip(leaf.shape, wider.shape)) if n != m)

    return jax.tree_util.tree_map_with_path(axes, shapes(num_tasks), shapes(num_tasks + 1))


def take(array, tasks, axes):
    """Returns the entries of these tasks, in their order, along all axes that belong to tasks."""
    for axis in axes:
        array = jnp.take(array, tasks, axis)
    return array


def permuted(extra, order):
    """Returns what speaks of the losses, for the tasks in another order."""
    axes = lambda name: (
        range(arguments.ABOUT_LOSSES[name].axes) if name in arguments.ABOUT_LOSSES else ()
    )
    return {name: take(value, order, axes(name)) for name, value in extra.items()}


def spoiled(extra, tasks, value):
    """Returns what speaks of the losses with another value for some tasks' entries."""
    extra = dict(extra)
    for name in extra:
        if name in arguments.ABOUT_LOSSES:
            extra[name] = extra[name].at[tasks].set(value)
            if arguments.ABOUT_LOSSES[name].axes == 2:
                extra[name] = extra[name].at[:, tasks].set(value)
    return extra


@functools.cache
def compiled(method, num_tasks):
    """Returns the transformation and its jitted update, one program for most tests.

    It is ``(losses, state, mask=all, extra=usual) -> balanced, state, gradient``, the last being
    that of the balanced sum by the losses.
    """
    transformation = method.make(num_tasks)
    everything = np.ones(num_tasks, bool)

    @jax.jit
    def program(losses, state, mask, extra):
        def objective(losses):
            balanced, new_state = transformation.update(
                losses, state, mask=mask, **method.keywords(extra)
            )
            return balanced.sum(), (balanced, new_state)

        gradient, (balanced, new_state) = jax.grad(objective, has_aux=True)(losses)
        return balanced, new_state, gradient

    def update(losses, state, mask=everything, extra=None):
        extra = method.extra(losses) if extra is None else extra
        return program(losses, state, mask, extra)

    update.cache_size = program._cache_size
    return transformation, update


def train(transformation, update, losses):
    """Updates over the rows of losses; returns the last balanced losses and state."""
    state = transformation.init(losses[0])
    for row in losses:
        balanced, state, *_ = update(row, state)
    return balanced, state


def warm(method, num_tasks, steps=4):
    """Returns a state after a few steps, and the next losses."""
    losses = example_losses(steps + 1, num_tasks)
    return train(*compiled(method, num_tasks), losses[:-1])[1], losses[-1]


def numbers(tree):
    """Returns the tree with the data of its JAX keys in their place."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


def assert_finite(tree):
    """Checks that all numbers of a tree are finite; JAX keys have none."""
    chex.assert_tree_all_finite(numbers(tree))


def assert_close(actual, desired, rtol=1e-5, atol=1e-6):
    """Checks that two trees agree, JAX keys included."""
    chex.assert_trees_all_close(numbers(actual), numbers(desired), rtol=rtol, atol=atol)


def assert_equal(actual, desired):
    """Checks that two trees are the same, structures and JAX keys included."""
    chex.assert_trees_all_equal_structs(actual, desired)
    chex.assert_trees_all_equal(numbers(actual), numbers(desired))


def example_losses(*shape, seed=0):
    """Returns positive losses without ties whose sizes differ by task."""
    scale = 2.0 ** (jnp.arange(shape[-1]) % 7 - 3)
    return scale * jnp.exp(jax.random.normal(jax.random.key(seed), shape))
