"""Trimmed mean: at every coordinate, the mean of the task gradients without the extreme ones."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.gradient_balancing.aggregators import aggregator

# Up to so many extremes are kept in order row by row, many times faster than a sort.
_FEW = 8
_UNROLL = 64


def trimmed_mean(trim: int, *, shared: base.PyTree = True) -> optax.GradientTransformationExtraArgs:
    """Averages the task gradients without the ``trim`` largest and smallest at each coordinate.

    ``mean(sort_k(g_k)[n : K - n])`` for each coordinate, with n entries trimmed at either end

    Robust against up to ``trim`` tasks whose gradients are arbitrary. The scale is that of the mean
    of the task gradients, 1 / K of their sum; with ``trim=0`` it is their mean.

    A task that is masked, or whose gradient is not finite, is left out before the others are
    ranked. Where fewer than 2 trim + 1 tasks are left, as many are trimmed as leave one or two:
    the median.

    Args:
        trim: how many are left out at either end, at least 0; static.
        shared: bools in a pytree prefix of the parameters, True for those that tasks share; the
            gradients of the others are summed.

    Returns:
        An aggregator: ``update(task_gradients, state, params, *, mask=None)``, the first link of
        an optimiser's chain. It has no state.

    Raises:
        ValueError: for ``trim`` < 0, fewer than 2 trim + 1 tasks, or a leaf whose leading axis is
            not the number of tasks.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> aggregator = bilb.trimmed_mean(1)
        >>> x = jnp.zeros(2)
        >>> task_gradients = jnp.array([[1.0, 2.0], [3.0, -1e6], [2.0, 4.0], [1e6, 0.0]])
        >>> print(aggregator.update(task_gradients, aggregator.init(x), x)[0])
        [2.5 1. ]

    References:
        Yin et al., *Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates*,
        arXiv 1803.01498.
    """
    checks.number("trim", trim, minimum=0, whole=True, static=True)

    def init(num_tasks, params):
        del num_tasks, params
        return optax.EmptyState()

    def aggregate(rows, state, *, present, losses):
        del losses
        if present.shape[0] <= 2 * trim:
            raise ValueError(
                f"trim={trim} leaves nothing of {present.shape[0]} tasks: it needs at least "
                f"{2 * trim + 1}."
            )
        return jax.tree.map(lambda leaf: mean_of(leaf, present, trim), rows), state

    return aggregator.aggregator("trimmed_mean", init, aggregate, shared=shared)


@functools.partial(jax.jit, static_argnames="trim")  # outside jit, loops compile once
def mean_of(leaf: jax.Array, present: jax.Array, trim: int) -> jax.Array:
    """Returns the trimmed mean over tasks at each coordinate of a leaf (K, *shape)."""
    count = present.sum()
    cut = jnp.minimum(trim, jnp.maximum(count - 1, 0) // 2)
    kept = jnp.maximum(count - 2 * cut, 1)
    low, high = bounds(leaf, present, trim, cut)

    def add(carry, task):
        total, below, above = carry
        row, is_present = task
        # Each is divided before they are added up, so that no sum is larger than its parts.
        inside = is_present & (row > low) & (row < high)
        total = total + jnp.where(inside, row / kept.astype(leaf.dtype), 0)
        below = below + jnp.where(is_present & (row <= low), one, 0)
        above = above + jnp.where(is_present & (row >= high), one, 0)
        return (total, below, above), None

    one, none = jnp.ones((), leaf.dtype), jnp.zeros_like(leaf[0])
    first = (none, none, none)
    (total, below, above), _ = jax.lax.scan(add, first, (leaf, present), unroll=_UNROLL)
    # Of those as large as a bound, some are trimmed and some kept.
    share = lambda number: (number - cut.astype(leaf.dtype)) / kept.astype(leaf.dtype)
    ties = jnp.where(cut > 0, share(below) * low + share(above) * high, 0)
    return jnp.where(low == high, low, total + ties)


def bounds(
    leaf: jax.Array, present: jax.Array, trim: int, cut: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the ``cut``-th smallest and largest entry over tasks at each coordinate.

    Args:
        leaf: (K, *shape).
        present: (K,) bool; the entries of other tasks do not count.
        trim: at least ``cut``; static.
        cut: (), 0 for -inf and inf.
    """
    if trim == 0:
        return jnp.full_like(leaf[0], -jnp.inf), jnp.full_like(leaf[0], jnp.inf)
    last = lambda row, is_present: jnp.where(is_present, row, jnp.inf)
    if trim > _FEW:
        per_task = aggregator.per_task(present, leaf)
        smallest = jnp.sort(last(leaf, per_task), axis=0)[:trim]
        largest = jnp.sort(last(-leaf, per_task), axis=0)[:trim]
    else:

        def insert(carry, task):
            row, is_present = task
            smallest, largest = carry
            return (
                put(smallest, last(row, is_present)),
                put(largest, last(-row, is_present)),
            ), None

        first = [jnp.full_like(leaf[0], jnp.inf)] * trim
        unroll = max(_UNROLL // trim, 1)
        scan = jax.lax.scan(insert, (first, first), (leaf, present), unroll=unroll)
        smallest, largest = map(jnp.stack, scan[0])
    at_cut = lambda entries: jnp.where(cut > 0, entries[jnp.maximum(cut - 1, 0)], -jnp.inf)
    return at_cut(smallest), -at_cut(largest)


def put(ordered: list[jax.Array], row: jax.Array) -> list[jax.Array]:
    """Puts a row in order among the smallest so far, dropping the largest of all."""
    new = []
    for entries in ordered:
        new.append(jnp.minimum(entries, row))
        row = jnp.maximum(entries, row)
    return new
