"""Operations on K tasks that several methods of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import checks


class Spectrum(NamedTuple):
    """The eigenvalues and eigenvectors of a symmetric matrix that are not rounding noise."""

    values: jax.Array  # (K,), 1 where not kept
    vectors: jax.Array  # (K, K), in columns
    kept: jax.Array  # (K,) bool


def spectrum(gram: jax.Array) -> Spectrum:
    """Returns the spectrum in ascending order, without what is below ``K ε`` of the largest."""
    values, vectors = jnp.linalg.eigh(gram)
    kept = values > jnp.maximum(values[-1] * gram.shape[0] * jnp.finfo(gram.dtype).eps, 0.0)
    return Spectrum(jnp.where(kept, values, 1.0), vectors, kept)


def components(norms: jax.Array, directions: Spectrum) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the principal components of J, from its norms and the spectrum of its cosines.

    ``G = A Aᵀ`` with ``A = N V Λ^{1/2}``, and the singular values of A have twice the digits that
    the eigenvalues of G have left where norms differ by orders of magnitude.

    Returns:
        ``(singular (K,), vectors (K, K) in columns, kept (K,) bool)`` in descending order; singular
        values are 1 where not kept.
    """
    values, vectors, independent = directions
    root = norms[:, None] * vectors * jnp.where(independent, jnp.sqrt(values), 0.0)
    left, singular, _ = jnp.linalg.svd(root)
    num_tasks = norms.shape[0]
    noise = singular[0] * num_tasks * jnp.finfo(norms.dtype).eps
    kept = (jnp.arange(num_tasks) < independent.sum()) & (singular > noise)
    return jnp.where(kept, singular, 1.0), left, kept


def cosines(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the norms (K,) of the rows of J and their cosines (K, K), 0 for rows that are zero.

    The cosines say the same as the Gram matrix about directions, whatever the scales of the tasks.
    Both may have any axes in front.
    """
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
    positive = squares > 0
    # The inner `where` keeps the derivative of the root finite where a row is zero.
    divisors = jnp.sqrt(jnp.where(positive, squares, 1.0))
    cosines = gram / divisors[..., :, None] / divisors[..., None, :]
    cosines = jnp.where(positive[..., :, None] & positive[..., None, :], cosines, 0.0)
    return jnp.where(positive, divisors, 0.0), cosines


def divide(values: jax.Array, norms: jax.Array) -> jax.Array:
    """Returns values (K,) for unit rows as values for the rows themselves, 0 for zero rows."""
    return jnp.where(norms > 0, values / jnp.where(norms > 0, norms, 1.0), 0.0)


def onto_simplex(
    point: jax.Array,
    present: jax.Array,
    project: Callable[[jax.Array], jax.Array] = optax.projections.projection_simplex,
) -> jax.Array:
    """Returns the closest point of the simplex of the present tasks, 0 for the others."""
    top = jnp.max(point, where=present, initial=-jnp.inf)
    # Relative to the largest entry, so that no size of the others costs the sum its digits.
    shifted = jnp.where(present, point - jnp.where(present.any(), top, 0.0), far(point.dtype))
    return jnp.where(present, project(shifted), 0.0)


def far(dtype: Any) -> float:
    """Returns the large negative number that stands for an absent task in a projection."""
    return -(float(jnp.finfo(dtype).max) ** 0.5)


def equal_weights(present: jax.Array, dtype: Any) -> jax.Array:
    """Returns equal weights of sum 1 for the present tasks, 0 for the others."""
    return present.astype(dtype) / jnp.maximum(present.sum(), 1)


def uniform(num_tasks: int, dtype: Any) -> jax.Array:
    """Returns equal weights of sum 1, the memory at first of methods that keep weights."""
    return jnp.full(num_tasks, 1 / num_tasks, dtype)


def preference_of(preference: Any, present: jax.Array, dtype: Any) -> jax.Array:
    """Returns a preference (K,), one number or one per task, 0 for absent tasks.

    Without one, weights are equal and their sum is 1.
    """
    if preference is None:
        return equal_weights(present, dtype)
    preference = checks.per_task("preference", preference, present.shape[0])
    return jnp.where(present, preference.astype(dtype), 0.0)


def random_orders(key: jax.Array, num_tasks: int) -> jax.Array:
    """Returns for every task the other tasks in random order, (K, K - 1)."""
    tasks = jnp.arange(num_tasks)
    others = (tasks[:, None] + tasks[1:]) % num_tasks
    return jax.random.permutation(key, others, axis=1, independent=True)
