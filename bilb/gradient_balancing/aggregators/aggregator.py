"""What every aggregator shares: from stacked task gradients to one gradient.

An aggregator is the first link of an optimiser's chain: ``update(task_gradients, state, params)``
takes leaves with a leading task axis, (K, *shape), and returns a gradient shaped like the
parameters. A method states its formula as ``aggregate(rows, state, *, present, losses) ->
(gradient, state)``; :func:`aggregator` adds what all of them need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilb import arguments, base, checks, jacobian, names
from bilb import grams as gram_engines


def aggregator(
    name: str,
    init: Callable[[int | None, base.PyTree], base.PyTree],
    aggregate: Callable[..., tuple[base.PyTree, base.PyTree]],
    *,
    num_tasks: int | None = None,
    shared: base.PyTree = True,
    reads_losses: bool = False,
    derivative: Callable[[jax.Array], jax.Array] | None = None,
    head_weights: Callable[[base.PyTree], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes a method's formula the first link of an optimiser's chain.

    A task takes part in a step if the mask says that it is present and if all entries of its
    gradient, and its loss where the method reads losses, are finite. The others contribute
    nothing, and their entries of the state stay as they were.

    Args:
        name: of the method, for error messages.
        init: ``(num_tasks, params) -> state``, ``params`` without the task-specific leaves.
        aggregate: ``(rows, state, *, present, losses) -> (gradient, state)`` on the rows of the
            shared leaves, (K, *shape), in float32 at least and 0 for absent tasks. ``present`` is
            (K,) bool; ``losses`` (K,), 1 for absent tasks, or None where they are not read.
        num_tasks: K, where the state depends on it; otherwise K is read off the gradients.
        shared: bools in a pytree prefix of the parameters, True for those that tasks share.
        reads_losses: whether the method cannot work without ``losses=``.
        derivative: ``losses (K,) -> `` the derivative of a transformation of the losses, by which
            all gradients are multiplied first; a task for which it is not finite is left out.
        head_weights: ``state after the step -> `` the weights (K,) under which the gradients of
            the other parameters are summed; 1 for all if None.
    """
    checks.number("num_tasks", num_tasks, minimum=1, whole=True, static=True, optional=True)

    def init_fn(params):
        return init(num_tasks, _where(shared, params))

    def update_fn(task_gradients, state, params=None, *, losses=None, mask=None, **extra):
        del extra
        with names.known(losses):
            return named_update_fn(task_gradients, state, params, losses, mask)

    def named_update_fn(task_gradients, state, params, losses, mask):
        present = _present(task_gradients, params, mask, num_tasks)
        losses = _losses(losses, present.shape, name) if reads_losses else None
        scales = jnp.ones(present.shape)
        if losses is not None:
            present &= jnp.isfinite(losses)
            losses = jnp.where(present, losses, 1)
            if derivative is not None:
                scales = derivative(losses)
                present &= jnp.isfinite(scales)

        def row(gradients):
            wide = gradients.astype(base.at_least_float32(gradients.dtype))
            scaled = wide if derivative is None else wide * per_task(scales, wide)
            return jnp.where(per_task(present, wide), scaled, 0).astype(wide.dtype)

        rows = jax.tree.map(row, _where(shared, task_gradients))
        gradient, new = aggregate(rows, state, present=present, losses=losses)
        new = base.keep_absent(present, new, state, lambda k: specification(k, rows))
        new = jax.tree.map(base.like, new, state)
        weights = scales if head_weights is None else scales * head_weights(new)
        weights = jnp.where(present, weights, 0)

        def leaves(is_shared, gradients, whole):
            if not is_shared:
                return jacobian.combine(weights, gradients)
            return jax.tree.map(lambda g, w: w.astype(g.dtype), gradients, whole)

        return jax.tree.map(leaves, shared, task_gradients, gradient), new

    def specification(count, rows):
        one = jax.tree.map(lambda r: jax.ShapeDtypeStruct(r.shape[1:], r.dtype), rows)
        return jax.eval_shape(lambda params: init(count, params), one)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _present(task_gradients, params, mask, num_tasks):
    """Returns (K,) bool: the tasks of the mask whose gradients are finite."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(task_gradients)]
    count = num_tasks or next((shape[0] for shape in shapes if shape), 1)
    jacobian.check_task_gradients(task_gradients, params, count)
    present = jnp.ones(count, bool) if mask is None else checks.mask(mask, count)
    for leaf in jax.tree.leaves(task_gradients):
        present &= jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))
    return present


def _losses(losses, shape, name):
    """Returns the losses, float32 at least; raises MissingArgument where there are none."""
    if losses is None:
        raise arguments.missing("losses", name)
    losses = jnp.asarray(names.stack(losses))
    checks.losses(losses)
    checks.shape(losses, shape, "losses must have an entry per task.")
    return losses.astype(base.at_least_float32(losses.dtype))


def zeros(num_tasks: int, params: base.PyTree) -> base.PyTree:
    """Returns zeros (K, *shape) in float32 at least, sharded like the parameters."""

    def leaf(p):
        zero = jnp.zeros_like(p, base.at_least_float32(jnp.result_type(p)))
        return jnp.broadcast_to(zero, (num_tasks, *zero.shape))

    return jax.tree.map(leaf, params)


def dtype_of(params: base.PyTree) -> Any:
    """Returns the dtype of what is kept per task: the widest of the leaves, float32 at least."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(params))


def per_task(values: jax.Array, leaf: jax.Array) -> jax.Array:
    """Returns values (K,) in a shape that broadcasts against a leaf (K, *shape)."""
    return values.reshape(-1, *(1,) * (leaf.ndim - 1))


def unit_rows(rows: base.PyTree) -> tuple[base.PyTree, jax.Array]:
    """Divides each row by its largest entry, so that squares neither overflow nor vanish.

    Returns:
        ``(rows, sizes (K,))``; the size of a row of zeros is 1.
    """
    largest = lambda leaf: jnp.max(jnp.abs(leaf), axis=tuple(range(1, leaf.ndim)))
    sizes = jax.tree.reduce(jnp.maximum, jax.tree.map(largest, rows))
    sizes = jnp.where(sizes > 0, sizes, 1)
    return jax.tree.map(lambda leaf: leaf / per_task(sizes, leaf).astype(leaf.dtype), rows), sizes


def norms(rows: base.PyTree) -> jax.Array:
    """Returns the norms (K,) of the rows, whatever their size."""
    units, sizes = unit_rows(rows)
    return sizes * jax.vmap(gram_engines.norm)(units)


def _where(shared, tree):
    """Returns the tree without its task-specific parts."""
    return jax.tree.map(lambda is_shared, p: p if is_shared else optax.MaskedNode(), shared, tree)
