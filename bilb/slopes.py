"""Slopes: the directional derivatives of all K losses along one direction, ``s = J d`` (K,).

With ``d = Jᵀ w`` they are ``G w``, a product with the Gram matrix ``G = J Jᵀ`` for the price of one
forward pass, whatever K is. Both functions here have one signature, can be called by hand, and are
what :func:`bilb.value_and_grad` takes as ``slopes=``.

Slopes on the batch that gave d are biased towards noisy tasks: they minimise the norm of the
mini-batch gradient. On an independent batch they are unbiased (``slope_args=`` at the call of
:func:`bilb.value_and_grad`, or other ``*args`` here). Never subtract the losses of two batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks, jacobian, names


def forward(
    task_losses: Callable[..., jax.Array],
    params: base.PyTree,
    direction: base.PyTree,
    *args: Any,
    at: jacobian.Linearization | None = None,
) -> jax.Array:
    """Exact slopes, by the transpose of one linearisation.

    Costs one forward pass beyond the linearisation; works with ``jax.custom_vjp`` models.

    Args:
        task_losses: ``task_losses(params, *args) -> losses (K,)``.
        params: pytree of floating point arrays.
        direction: the direction, shaped like ``params``.
        *args: passed on: the batch.
        at: the linearisation at ``params`` and ``args`` if it exists already.

    Returns:
        (K,) slopes, in units of loss per unit of ``direction``.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum(x**2), x[0]])
        >>> print(bilb.slopes.forward(task_losses, jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])))
        [2. 1.]
    """
    if at is None:
        at = jacobian.linearized(task_losses, params, *args)
    return at.pushforward(direction)


def finite_difference(
    displacement: float | jax.Array | Callable[[base.PyTree], jax.Array] | None = None,
) -> Callable[..., jax.Array]:
    """Zeroth-order slopes: the change of the losses over a small step along the direction.

    ``s = (l(x + μ d) - l(x)) / μ`` with ``μ = h / ‖d‖``, zero where d is zero. One more forward
    pass and no derivative; the error is about ``h ‖d‖ / 2`` times the curvature along d, plus
    rounding of the losses divided by h.

    Args:
        displacement: h > 0, the length of the step in parameter space; a number, or
            ``params -> h``; None means ``3e-4 (1 + ‖x‖)``, good for float32.

    Returns:
        A function with the signature of :func:`forward`.

    Raises:
        ValueError: for a concrete displacement that is not positive.
        TypeError: for losses in half precision, whose change over a small step rounds to zero.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> slopes = bilb.slopes.finite_difference(displacement=1e-2)
        >>> task_losses = lambda x: jnp.stack([x[0] ** 2, x[0]])
        >>> print(slopes(task_losses, jnp.array([1.0]), jnp.array([1.0])).round(2))
        [2.01 1.  ]
    """
    if not callable(displacement):
        checks.number("displacement", displacement, minimum=0, exclusive=True, optional=True)

    def slopes(task_losses, params, direction, *args, at=None):
        losses = names.stack(task_losses(params, *args)) if at is None else at.losses
        if losses.dtype.itemsize < 4:
            raise TypeError(
                f"finite differences of {losses.dtype} losses round to zero: use "
                "bilb.slopes.forward, or return the losses in float32."
            )
        h: Any = displacement(params) if callable(displacement) else displacement
        if h is None:
            h = 3e-4 * (1.0 + optax.tree.norm(params))
        norm = optax.tree.norm(direction)
        mu = h / jnp.where(norm > 0, norm, 1.0)
        moved = jax.tree.map(lambda x, d: (x + mu * d).astype(x.dtype), params, direction)
        change = names.stack(task_losses(moved, *args)) - losses
        return (change / mu).astype(losses.dtype)

    return slopes
