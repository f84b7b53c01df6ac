"""What the methods of this folder share: a softmax for values of any size, learnt exponents."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bilb import base


def log_sum_exp_and_softmax(
    values: jax.Array, where: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns ``log Σ_k exp(v_k)`` and its derivative, for values of any size.

    ``jax.nn.logsumexp`` of a product is infinite for large values under ``jit``: where the product
    is fused with the subtraction of the largest one as a multiply-add, the difference is a rounding
    error of about epsilon times the value instead of zero.

    Args:
        values: (K,), finite.
        where: None or (K,) bool, the values that count; without any, all do.

    Returns:
        ``(scalar, (K,))``, the latter zero where ``where`` is False.
    """
    where = jnp.ones(values.shape, bool) if where is None else where | ~jnp.any(where)
    largest = jnp.max(values, where=where, initial=-jnp.inf)
    exponents = jnp.where(values >= largest, 0.0, jnp.minimum(values - largest, 0.0))
    terms = jnp.where(where, jnp.exp(exponents), 0.0)
    total = jnp.sum(terms)
    return largest + jnp.log(total), terms / total


def learn_exponents(
    optimizer: optax.GradientTransformation,
    objective: Callable[[jax.Array], jax.Array],
    exponents: jax.Array,
    opt_state: optax.OptState,
) -> tuple[jax.Array, optax.OptState]:
    """Takes one step on exponents s of weights such as ``exp(-s)``, within the dtype's range.

    The exponents are kept in ``|s| <= log(largest number) / 2`` (44 in float32, 354 in float64), so
    that a loss that stays zero, which has no finite minimiser, does not overflow.
    """
    bound = 0.5 * math.log(float(jnp.finfo(exponents.dtype).max))
    gradient = base.bounded_gradient(jax.grad(objective)(exponents))
    updates, opt_state = optimizer.update(gradient, opt_state, exponents)
    return jnp.clip(optax.apply_updates(exponents, updates), -bound, bound), opt_state
