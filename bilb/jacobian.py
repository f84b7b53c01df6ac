"""Derivatives of a stacked loss vector, from one linearisation of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilb import base


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
        task_losses: ``task_losses(params, *args) -> losses (K,)``, or ``(losses, aux)``.
        params: pytree of floating point arrays.
        *args: passed on, not differentiated.
        has_aux: whether ``task_losses`` returns auxiliary data, such as new batch statistics.

    Returns:
        ``(losses, pullback, pushforward)``, or ``((losses, aux), pullback, pushforward)``:
        ``pullback(w (K,))`` is ``Jᵀ w``, shaped like ``params``; ``pushforward(direction)`` is
        ``J direction`` (K,), the slopes of all losses along a direction shaped like ``params``.

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
    (losses, _), aux, pull, push = linearize_with_features(
        lambda p: _separate(task_losses(p, *args), has_aux), params
    )
    pullback = lambda weights: pull((weights, None))
    pushforward = lambda direction: push(direction)[0]
    return ((losses, aux) if has_aux else losses), pullback, pushforward


def linearize_with_features(
    outputs: Callable[[base.PyTree], tuple[tuple[jax.Array, base.PyTree], Any]],
    params: base.PyTree,
) -> tuple[tuple[jax.Array, base.PyTree], Any, Callable, Callable]:
    """As :func:`linearize`, for ``params -> ((losses, features), aux)``.

    Returns:
        ``((losses, features), aux, pullback, pushforward)``, the maps from and to cotangents and
        tangents of ``(losses, features)``.
    """
    values, vjp, aux = jax.vjp(outputs, params, has_aux=True)
    base.check_losses(values[0])

    def pullback(cotangents):
        cast = jax.tree.map(lambda c, v: c.astype(v.dtype), cotangents, values)
        return vjp(cast)[0]

    def pushforward(direction):
        cast = jax.tree.map(lambda d, p: jnp.asarray(d, jnp.result_type(p)), direction, params)
        return jax.linear_transpose(lambda c: vjp(c)[0], values)(cast)[0]

    return values, aux, pullback, pushforward


def _separate(returned, has_aux):
    losses, aux = returned if has_aux else (returned, None)
    return (losses, None), aux
