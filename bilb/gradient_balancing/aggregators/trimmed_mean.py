"""Trimmed mean: at every coordinate, the mean of the task gradients without the extreme ones.

``mean(sort_k(g_k)[n : K - n])`` for each coordinate, with n entries trimmed at either end
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from bilb import base
from bilb.gradient_balancing.aggregators import aggregator


def trimmed_mean(trim: int, *, shared: base.PyTree = True) -> optax.GradientTransformationExtraArgs:
    """Averages the task gradients without the ``trim`` largest and smallest at each coordinate.

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
    base.check_number("trim", trim, minimum=0)

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
        count = present.sum()
        cut = jnp.minimum(trim, jnp.maximum(count - 1, 0) // 2)
        rank = jnp.arange(present.shape[0])
        inside = (rank >= cut) & (rank < count - cut)

        def mean(leaf):
            # Absent tasks are sorted behind all others.
            absent_last = jnp.where(aggregator.per_task(present, leaf), leaf, jnp.inf)
            kept = jnp.where(aggregator.per_task(inside, leaf), jnp.sort(absent_last, axis=0), 0)
            return jnp.sum(kept / jnp.maximum(count - 2 * cut, 1).astype(leaf.dtype), axis=0)

        return jax.tree.map(mean, rows), state

    return aggregator.aggregator("trimmed_mean", init, aggregate, shared=shared)
