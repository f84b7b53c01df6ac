"""Loss discrepancies: how far the (weighted) task losses are apart, ``u (K,) -> scalar``.

Each takes ``where`` (K,) bool or None, the tasks that count; with none or one of them it is 0. The
absolute value has derivative 0 at 0, because every normalisation by initial losses starts with all
gaps exactly zero. A value beyond the dtype's largest number is infinite; its derivative is right
all the same. Use ``functools.partial`` to fix options. Any callable of the same shape serves
as the discrepancy of :func:`bilb.bilb4mtl`; it needs ``where`` only if masks are used.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def adjacent(u: jax.Array, *, where: jax.Array | None = None, mean: bool = False) -> jax.Array:
    """Sum of the gaps between neighbours: ``Σ_k |u_k - u_{k+1}|``; depends on the task order.

    Args:
        u: (K,) losses, weighted or not.
        where: (K,) bool; gaps join neighbours among the tasks that are present.
        mean: divide by the number of gaps. A penalty λ on the sum equals λ (K - 1) on the mean.

    Returns:
        A scalar in the units of ``u``.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> u = jnp.array([1.0, 4.0, 2.0])
        >>> print(bilb.discrepancies.adjacent(u))
        5.0
        >>> print(bilb.discrepancies.adjacent(u, where=jnp.array([True, False, True])))
        1.0

    References:
        Xiao et al., arXiv 2502.08585, upper level of the bilevel problem.
    """
    _check(u)
    if where is None:
        gaps, pairs = jnp.diff(u), u.shape[0] - 1
        total = jnp.sum(_abs(gaps))
    else:
        u = u[jnp.argsort(~where, stable=True)]
        pairs = jnp.sum(where) - 1
        total = jnp.sum(_abs(jnp.diff(u)), where=jnp.arange(u.shape[0] - 1) < pairs)
    return total / jnp.maximum(pairs, 1) if mean else total


def pairwise(u: jax.Array, *, where: jax.Array | None = None, mean: bool = False) -> jax.Array:
    """Sum over all pairs: ``Σ_{i<j} |u_i - u_j|``, whatever the order of the tasks.

    Sorting makes it O(K log K): the derivative by u_i is (tasks below it - tasks above it), ties
    included, and the gap between ranks i and i + 1 enters the value i (K - i) times.

    Args:
        u: (K,) losses, weighted or not.
        where: (K,) bool, the tasks that count.
        mean: divide by the number of pairs, K (K - 1) / 2.

    Returns:
        A scalar in the units of ``u``.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> print(bilb.discrepancies.pairwise(jnp.array([1.0, 4.0, 2.0])))
        6.0
    """
    _check(u)
    present = jnp.ones(u.shape, bool) if where is None else where
    count = jnp.sum(present)
    constant = jax.lax.stop_gradient(u)
    ranked = jnp.sort(jnp.where(present, constant, jnp.inf))
    below = jnp.searchsorted(ranked, constant, side="left")
    above = count - jnp.searchsorted(ranked, constant, side="right")
    i = jnp.arange(1, u.shape[0])
    # A sum of gaps, as the derivative times u would be inf - inf for large losses.
    total = jnp.sum(jnp.diff(ranked) * (i * (count - i)).astype(u.dtype), where=i < count)
    total += jnp.sum((below - above) * (u - constant), where=present)
    return total / jnp.maximum(count * (count - 1) / 2, 1).astype(u.dtype) if mean else total


def spread(u: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Largest minus smallest: ``max u - min u``; ties share the derivative.

    Args:
        u: (K,) losses, weighted or not.
        where: (K,) bool, the tasks that count.

    Returns:
        A scalar in the units of ``u``.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> print(bilb.discrepancies.spread(jnp.array([1.0, 4.0, 2.0])))
        3.0
    """
    _check(u)
    return _spread(u, jnp.ones(u.shape, bool) if where is None else where)


@jax.custom_jvp
def _spread(u, where):
    top, bottom = _extremes(u, where)
    return jnp.where(where.any(), jnp.max(top) - jnp.min(bottom), 0.0)


@_spread.defjvp
def _spread_jvp(primals, tangents):
    # That of `max` asks which entries equal the largest: none does, which is 0 / 0, where the
    # compiler rounds a value that it computes twice in two ways. One entry always counts here.
    u, where = primals
    top, bottom = _extremes(u, where)
    i = jnp.arange(u.shape[0])
    high = where & (top >= jnp.max(top)) | (i == jnp.argmax(top))
    low = where & (bottom <= jnp.min(bottom)) | (i == jnp.argmin(bottom))
    mean = lambda chosen: jnp.sum(tangents[0], where=chosen) / jnp.sum(chosen).astype(u.dtype)
    shown = jnp.where(jnp.isnan(jnp.max(top)), jnp.nan, 1.0)  # else a NaN, both ends, would cancel
    return _spread(*primals), shown * (mean(high) - mean(low))


def _extremes(u, where):
    return jnp.where(where, u, -jnp.inf), jnp.where(where, u, jnp.inf)


def variance(u: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Population variance: ``mean (u - mean u)²``.

    Args:
        u: (K,) losses, weighted or not.
        where: (K,) bool, the tasks that count.

    Returns:
        A scalar in the squared units of ``u``.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> print(bilb.discrepancies.variance(jnp.array([1.0, 4.0, 1.0])))
        2.0
    """
    _check(u)
    return _variance(u, jnp.ones(u.shape, bool) if where is None else where)


@jax.custom_jvp
def _variance(u, where):
    terms = _centred(u, where)
    count = jnp.maximum(jnp.sum(where), 1).astype(u.dtype)
    return jnp.sum(terms**2, where=where) * count


@_variance.defjvp
def _variance_jvp(primals, tangents):
    # The square may be infinite where its derivative, 2 (u - mean u) / K, is not.
    terms = _centred(*primals)
    return _variance(*primals), 2 * jnp.sum(terms * tangents[0], where=primals[1])


def _centred(u, where):
    """Returns ``(u - mean u) / K``, each divided first, so that large losses stay finite."""
    count = jnp.maximum(jnp.sum(where), 1).astype(u.dtype)
    shares = u / count
    return shares - jnp.sum(shares, where=where) / count


def _check(u):
    if jnp.ndim(u) != 1:
        raise ValueError(
            f"a discrepancy takes losses (K,); got shape {jnp.shape(u)}. Where "
            "optax.inject_hyperparams takes it for a schedule, give it "
            'static_args=("discrepancy",).'
        )


def _abs(x):
    # jnp.abs has derivative 1 at 0.
    return x * jnp.sign(jax.lax.stop_gradient(x))
