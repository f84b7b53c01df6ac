"""Derivatives of a stacked loss vector, from one linearisation of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks, names


class Linearization(NamedTuple):
    """The losses at some parameters, and both directions of their Jacobian J (K, P).

    Attributes:
        losses: (K,).
        pullback: ``w (K,) -> Jᵀ w``, shaped like the parameters.
        pushforward: ``direction -> J direction`` (K,), of a direction shaped like the parameters.
    """

    losses: jax.Array
    pullback: Callable[[jax.Array], base.PyTree]
    pushforward: Callable[[base.PyTree], jax.Array]


def linearize(
    task_losses: Callable[..., Any],
    params: base.PyTree,
    *args: Any,
    has_aux: bool = False,
) -> tuple[Any, Callable[[jax.Array], base.PyTree], Callable[[base.PyTree], jax.Array]]:
    """Linearises the model once: losses, and both directions of their Jacobian J (K, P).

    One forward pass keeps the residuals that both maps share. Each call of a map costs about one
    backward or one forward pass. The forward direction is the transpose of the backward one, so
    models with a ``jax.custom_vjp`` work if its backward rule is linear in JAX operations.

    Args:
        task_losses: ``task_losses(params, *args) -> losses``, (K,) or a dict, list or tuple of
            scalars, or ``(losses, aux)``.
        params: pytree of floating point arrays.
        *args: passed on, not differentiated.
        has_aux: whether ``task_losses`` returns auxiliary data, such as new batch statistics.

    Returns:
        ``(losses, pullback, pushforward)``, or ``((losses, aux), pullback, pushforward)``, the
        losses as ``task_losses`` returns them and the maps for vectors in their order:
        ``pullback(w (K,))`` is ``Jᵀ w``, shaped like ``params``; ``pushforward(direction)`` is
        ``J direction`` (K,), the slopes of all losses along a direction shaped like ``params``.
        Slopes of losses in half precision are float32.

    Raises:
        ValueError: if the losses are not one vector (K,).
        TypeError: if they are not floating point.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum(x**2), x[0]])
        >>> losses, pullback, pushforward = bilb.linearize(task_losses, jnp.array([1.0, 2.0]))
        >>> direction = pullback(jnp.array([0.5, 0.5]))
        >>> print(losses, direction, pushforward(direction))
        [5. 1.] [1.5 2. ] [11.   1.5]
    """
    at, losses, aux = _linearized(task_losses, params, args, has_aux)
    return ((losses, aux) if has_aux else losses), at.pullback, at.pushforward


def linearized(task_losses: Callable[..., Any], params: base.PyTree, *args: Any) -> Linearization:
    """Linearises the model as :func:`linearize` does; its losses are a vector in any case."""
    return _linearized(task_losses, params, args, False)[0]


def _linearized(task_losses, params, args, has_aux):
    def outputs(params):
        vector, losses, aux = outputs_of(task_losses(params, *args), has_aux)
        return (vector, None), (losses, aux)

    (vector, _), (losses, aux), pull, push = linearize_with_features(outputs, params)
    pullback = lambda weights: pull((weights, None))
    pushforward = lambda direction: push(direction)[0]
    return Linearization(vector, pullback, pushforward), losses, aux


def outputs_of(returned: Any, has_aux: bool) -> tuple[jax.Array, Any, Any]:
    """Returns the stacked losses (K,), the losses as they are and aux of what task_losses returned.

    Raises:
        TypeError: if there is no aux where ``has_aux`` says so.
        ValueError: for what is neither a vector nor a flat pytree of scalars.
    """
    if not has_aux:
        return names.stack(returned), returned, None
    if not isinstance(returned, tuple) or len(returned) != 2:
        shape = f" of shape {jnp.shape(returned)}" if hasattr(returned, "shape") else ""
        kind = "an array" if shape else f"a {type(returned).__name__}"
        raise TypeError(
            f"with has_aux=True task_losses must return (losses, aux); got {kind}{shape}. Leave "
            "has_aux out, or return (losses, None)."
        )
    losses, aux = returned
    if jax.tree_util.all_leaves([losses]) and jnp.ndim(losses) == 0:
        raise ValueError(
            "with has_aux=True task_losses must return (losses, aux), all losses in the first; the "
            "first of two is one number. Leave has_aux out if both are losses."
        )
    return names.stack(losses), losses, aux


def linearize_with_features(
    outputs: Callable[[base.PyTree], tuple[tuple[jax.Array, base.PyTree], Any]],
    params: base.PyTree,
) -> tuple[tuple[jax.Array, base.PyTree], Any, Callable, Callable]:
    """As :func:`linearize`, for ``params -> ((losses, features), aux)``.

    Returns:
        ``((losses, features), aux, pullback, pushforward)``, the maps from and to cotangents and
        tangents of ``(losses, features)``.
    """
    checks.parameters(params)
    values, vjp, aux = jax.vjp(outputs, params, has_aux=True)
    checks.losses(values[0])
    half = values[0].dtype.itemsize < 4

    def pullback(cotangents):
        cast = lambda cotangents: jax.tree.map(lambda c, v: c.astype(v.dtype), cotangents, values)
        apply = lambda cotangents: vjp(cast(cotangents))[0]
        return _of_unit_size(apply, cotangents) if half else apply(cotangents)

    def pushforward(direction):
        cast = lambda d, p: jnp.asarray(d, jnp.result_type(p))
        transposed = jax.linear_transpose(lambda c: vjp(c)[0], values)
        apply = lambda direction: transposed(jax.tree.map(cast, direction, params))[0]
        if not half:
            return apply(direction)
        wide = lambda direction: jax.tree.map(lambda s: s.astype(jnp.float32), apply(direction))
        return _of_unit_size(wide, direction)

    return values, aux, pullback, pushforward


def task_gradients(
    task_losses: Callable[..., Any],
    params: base.PyTree,
    *args: Any,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> tuple[Any, base.PyTree]:
    """Returns the losses and the gradient of each of them, stacked.

    Args:
        task_losses: ``task_losses(params, *args) -> losses``, (K,) or a dict, list or tuple of
            scalars, or ``(losses, aux)``.
        params: pytree of floating point arrays.
        *args: passed on: the batch.
        has_aux: whether ``task_losses`` returns auxiliary data, such as new batch statistics.
        chunk_size: how many backward passes run at once; all if None. The memory that they need
            beside the result grows with it; static.

    Returns:
        ``(losses, task_gradients)`` or ``((losses, aux), task_gradients)``, the losses as
        ``task_losses`` returns them, the gradients shaped like ``params`` with one more axis of
        length K in front of every leaf, in the order of ``jax.tree.leaves(losses)``.

    Raises:
        ValueError: if the losses are not one vector (K,), or for a ``chunk_size`` below 1.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum(x**2), x[0]])
        >>> losses, gradients = bilb.task_gradients(task_losses, jnp.array([1.0, 2.0]))
        >>> print(losses, gradients)
        [5. 1.] [[2. 4.]
         [1. 0.]]
    """
    checks.number("chunk_size", chunk_size, minimum=1, whole=True, static=True, optional=True)
    at, losses, aux = _linearized(task_losses, params, args, has_aux)
    gradients = rows(at.pullback, at.losses, chunk_size or at.losses.shape[0])
    return ((losses, aux) if has_aux else losses), gradients


def rows(
    pullback: Callable[[jax.Array], base.PyTree], losses: jax.Array, chunk_size: int
) -> base.PyTree:
    """Returns the rows of the Jacobian, leaves (K, *shape), ``chunk_size`` of them at once."""
    one_hots = jnp.eye(losses.shape[0], dtype=base.at_least_float32(losses.dtype))
    if chunk_size >= losses.shape[0]:
        return jax.vmap(pullback)(one_hots)
    return jax.lax.map(pullback, one_hots, batch_size=chunk_size)


def _of_unit_size(linear, argument):
    """Evaluates a linear map at a multiple of the argument that half precision can hold."""
    wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), argument)
    size = optax.tree.norm(wide)
    size = jnp.where(size > 0, size, 1.0)
    result = linear(jax.tree.map(lambda a: a / size, wide))
    return jax.tree.map(lambda r: (r * size).astype(r.dtype), result)


def check_task_gradients(
    task_gradients: base.PyTree, params: base.PyTree | None, num_tasks: int
) -> None:
    """Checks that every leaf is a parameter's gradient with a leading task axis."""
    shapes = jax.tree.map(jnp.shape, task_gradients)
    if params is not None:
        expected = jax.tree.map(lambda p: (num_tasks, *jnp.shape(p)), params)
        # Flattened, as pytrees need not have an equality of their own.
        flat = lambda tree, like: (jax.tree.structure(like), jax.tree.leaves(tree))
        wrong = flat(shapes, task_gradients) != flat(expected, params)
    else:
        expected = f"({num_tasks}, ...)"
        wrong = any(jnp.shape(g)[:1] != (num_tasks,) for g in jax.tree.leaves(task_gradients))
    if wrong:
        raise ValueError(
            "task gradients are shaped like params with one more axis in front: the leading axis "
            f"must be the number of tasks, {num_tasks}. Expected {expected}, got {shapes}."
        )


def check_heads(heads: str) -> None:
    """Raises ValueError unless ``heads`` names what task-specific parameters follow."""
    if heads not in ("weighted", "sum"):
        raise ValueError(f'heads must be "weighted" or "sum"; got {heads!r}.')


def shared_part(tree: base.PyTree, shared: base.PyTree) -> base.PyTree:
    """Returns a tree shaped like the parameters, or its rows, with zeros where not shared."""
    keep = lambda is_shared, part: part if is_shared else optax.tree.zeros_like(part)
    return jax.tree.map(keep, shared, tree)


def with_heads(
    combined: Callable[[jax.Array], base.PyTree],
    weights: jax.Array,
    shared: base.PyTree,
    heads: str,
    mask: jax.Array | None,
) -> base.PyTree:
    """Returns the gradient under the weights, of plain sums where parameters are not shared."""
    grads = combined(weights)
    if heads == "weighted":
        return grads
    ones = jnp.ones_like(weights)
    plain = combined(ones if mask is None else jnp.where(mask, ones, 0))
    return jax.tree.map(lambda is_shared, w, p: w if is_shared else p, shared, grads, plain)


def combine(weights: jax.Array, task_gradients: base.PyTree) -> base.PyTree:
    """Returns ``Jᵀ w``: sums leaves (K, *shape) over tasks with (K,) weights, dtypes kept.

    A row with weight zero is left out, whatever it holds (0 times NaN would be NaN).
    """
    return jax.tree.map(lambda gradients: _combine_leaf(weights, gradients), task_gradients)


@jax.jit  # so that calls outside jit compile the condition once
def _combine_leaf(weights, gradients):
    def product(gradients):
        rows = gradients.astype(jnp.result_type(weights, gradients))
        return jnp.tensordot(weights.astype(rows.dtype), rows, axes=1, precision="highest")

    w = weights.reshape((-1,) + (1,) * (gradients.ndim - 1))
    whole = product(gradients)
    # Where all is finite, as it should be, the rows are read once.
    spoiled = jnp.any(weights == 0) & ~jnp.isfinite(whole).all()
    left_out = lambda: product(jnp.where(w == 0, 0, gradients))
    return jax.lax.cond(spoiled, left_out, lambda: whole).astype(gradients.dtype)
