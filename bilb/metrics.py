"""Measures of a multi-task result and of the conflict between tasks.

Two families. :func:`delta_m` and :func:`mean_rank` compare trained models by their test metrics.
:func:`pareto_stationarity`, :func:`cosine_matrix`, :func:`conflict_rate` and
:func:`loss_discrepancy` look at one point of the training and are cheap enough to log. All are
pure functions that work inside ``jit`` and ``vmap``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilb.gradient_balancing import algebra, solvers

Array = jax.Array


def delta_m(
    values: Any, base: Any, *, higher_is_better: Any = False, task: Any | None = None
) -> Array:
    r"""Average relative change of a method against a single-task reference, in percent.

    .. math:: \Delta m = \frac{100}{M} \sum_{k=1}^{M} s_k \frac{M_k - B_k}{B_k}

    with :math:`s_k = -1` where higher is better and 1 elsewhere: **lower is better**, and a
    negative value beats the reference (LibMTL reports the opposite sign). Papers of the field take
    this flat mean over all metrics, so that a task with five metrics counts five times. LibMTL
    averages within each task first and then over tasks; ``task`` gives that. The two differ as
    soon as tasks have different numbers of metrics, so say which one a table shows.

    The formula presumes metrics of one sign, as errors and accuracies are.

    Args:
        values: (..., M) metrics of the method, in their own units.
        base: (M,) or (..., M) metrics of the reference, usually one model per task. It has no
            default on purpose: a method's own first epoch is no reference.
        higher_is_better: bool or (M,) bool, True for metrics such as accuracy.
        task: (M,) ints, the task to which each metric belongs, in any numbering. Default: the flat
            mean.

    Returns:
        (...) percentages.

    Raises:
        ValueError: Shapes do not match, or ``base`` has a zero, which has no relative change. A
            zero that is known only at run time gives inf or NaN instead.

    Example:
        >>> from bilb import metrics
        >>> # An accuracy in percent, which rises by a quarter, and an error, which halves.
        >>> print(metrics.delta_m([50.0, 0.5], [40.0, 1.0], higher_is_better=[True, False]))
        -37.5

    References:
        Maninis et al., arXiv 1904.08918.

        Lin and Zhang, LibMTL, arXiv 2203.14338.
    """
    _check_nonzero("base", base)
    values, base = _at_least_float32(values, base)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"values must have shape (..., M) with M >= 1; got {values.shape}.")
    num_metrics = values.shape[-1]
    if base.shape not in ((num_metrics,), values.shape):
        raise ValueError(
            f"base must have shape ({num_metrics},) or that of values, {values.shape}; got "
            f"{base.shape}."
        )
    change = _sign(higher_is_better, num_metrics) * (values - base) / base
    if task is None:
        return 100 * jnp.mean(change, axis=-1)
    task = jnp.asarray(task)
    if task.shape != (num_metrics,) or not jnp.issubdtype(task.dtype, jnp.integer):
        raise ValueError(
            f"task must be ints of shape ({num_metrics},); got {task.dtype} of shape {task.shape}."
        )
    share = 1 / jnp.sum(task[:, None] == task[None, :], axis=0)
    return 100 * jnp.sum(change * (share / jnp.sum(share)).astype(change.dtype), axis=-1)


def mean_rank(values: Any, *, higher_is_better: Any = False) -> Array:
    """Mean rank of each method over the metrics; rank 1 is best, **lower is better**.

    Methods that tie on a metric share the average of the ranks that they take up, so the ranks of
    a metric always sum to ``n (n + 1) / 2``. A NaN, a metric that a method has no value for, ranks
    behind every number; several NaNs tie.

    Args:
        values: (..., methods, M) metrics of all methods that are compared. The rank of a method
            depends on that set.
        higher_is_better: bool or (M,) bool, True for metrics such as accuracy.

    Returns:
        (..., methods) ranks between 1 and the number of methods.

    Raises:
        ValueError: ``values`` has fewer than two axes or no entries, or ``higher_is_better`` does
            not match M.

    Example:
        >>> from bilb import metrics
        >>> # Three methods, two errors; the first two methods tie on the second one.
        >>> print(metrics.mean_rank([[1.0, 5.0], [2.0, 5.0], [3.0, 9.0]]))
        [1.25 1.75 3.  ]

    References:
        Navon et al., arXiv 2202.01017.
    """
    (values,) = _at_least_float32(values)
    if values.ndim < 2 or values.shape[-1] == 0 or values.shape[-2] == 0:
        raise ValueError(
            f"values must have shape (..., methods, M), not empty; got {values.shape}."
        )
    values = _sign(higher_is_better, values.shape[-1]) * values
    mine, other = values[..., :, None, :], values[..., None, :, :]
    mine_missing, other_missing = jnp.isnan(mine), jnp.isnan(other)
    better = jnp.sum((other < mine) | (mine_missing & ~other_missing), axis=-2)
    equal = jnp.sum((other == mine) | (mine_missing & other_missing), axis=-2)
    return jnp.mean(better + (equal + 1) / 2, axis=-1)


def pareto_stationarity(gram: Any) -> Array:
    r"""Distance from Pareto stationarity, ``min_w ‖Jᵀw‖`` over the simplex.

    It is zero exactly where no direction decreases all losses to first order, and otherwise the
    rate at which the steepest common descent direction decreases the worst of them. It has the
    unit of a gradient norm; divide by the largest row norm, ``sqrt(max(diag(gram)))``, to compare
    points.

    Squaring costs half of the digits. The result is exact to about 5e-8 in float64 and 1e-3 in
    float32 times the largest row norm where it is close to zero; where it is comparable to that
    norm, to a few rounding errors.

    Args:
        gram: (..., K, K) Gram matrix ``J Jᵀ`` of the task gradients.

    Returns:
        (...) non-negative norms. Differentiable with respect to ``gram`` where not zero.

    Raises:
        ValueError: ``gram`` is not (..., K, K) with K >= 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilb import metrics
        >>> jacobian = jnp.array([[3.0, 0.0], [0.0, 4.0]])
        >>> print(metrics.pareto_stationarity(jacobian @ jacobian.T).round(3))
        2.4

    References:
        Désidéri, 2012, doi 10.1016/j.crma.2012.03.014.
    """
    gram = _check_gram(gram)
    weights = jnp.vectorize(solvers.min_norm_weights, signature="(k,k)->(k)")(gram)
    # The scale keeps squares of tiny or huge rows within the range of the dtype.
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    scale = jax.lax.stop_gradient(jnp.max(diagonal, axis=-1))
    scale = jnp.where(scale > 0, scale, 1.0)
    unit = gram / scale[..., None, None]
    squared = jnp.einsum("...i,...ij,...j->...", weights, unit, weights, precision="highest")
    stationary = squared <= 0
    norm = jnp.sqrt(jnp.where(stationary, 1.0, squared)) * jnp.sqrt(scale)
    return jnp.where(stationary, 0.0, norm)


def cosine_matrix(gram: Any) -> Array:
    """Cosines of the angles between the task gradients.

    Args:
        gram: (..., K, K) Gram matrix ``J Jᵀ`` of the task gradients.

    Returns:
        (..., K, K) cosines in [-1, 1]; a task with zero gradient has cosine 0 with every task,
        itself included.

    Raises:
        ValueError: ``gram`` is not (..., K, K) with K >= 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilb import metrics
        >>> jacobian = jnp.array([[1.0, 0.0], [-2.0, 0.0]])
        >>> print(metrics.cosine_matrix(jacobian @ jacobian.T))
        [[ 1. -1.]
         [-1.  1.]]

    References:
        Yu et al., arXiv 2001.06782, definition 1.
    """
    _, cosines = algebra.cosines(_check_gram(gram))
    return jnp.clip(cosines, -1.0, 1.0)


def conflict_rate(gram: Any) -> Array:
    """Share of the pairs of tasks whose gradients conflict, that is, have a negative inner product.

    Args:
        gram: (..., K, K) Gram matrix ``J Jᵀ`` of the task gradients.

    Returns:
        (...) shares in [0, 1] of the ``K (K - 1) / 2`` pairs; 0 for K = 1.

    Raises:
        ValueError: ``gram`` is not (..., K, K) with K >= 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilb import metrics
        >>> jacobian = jnp.array([[1.0, 0.0], [-1.0, 1.0], [0.0, 1.0]])
        >>> print(metrics.conflict_rate(jacobian @ jacobian.T).round(3))
        0.333

    References:
        Yu et al., arXiv 2001.06782, definition 1.
    """
    gram = _check_gram(gram)
    first, second = np.triu_indices(gram.shape[-1], k=1)
    conflicts = (gram[..., first, second] < 0).astype(gram.dtype)
    return jnp.sum(conflicts, axis=-1) / max(first.size, 1)


def loss_discrepancy(losses: Any, weights: Any | None = None) -> Array:
    r"""Discrepancy of the weighted losses, summed over neighbouring tasks.

    .. math:: \sum_{i=1}^{K-1} |w_i \ell_i - w_{i+1} \ell_{i+1}|

    It is the quantity that BiLB4MTL's lower level drives to zero, here to be logged for any
    method. It depends on the order of the tasks.

    Args:
        losses: (..., K) losses, in their own units.
        weights: (..., K) task weights, broadcast against ``losses``. Default: all one.

    Returns:
        (...) discrepancies in the unit of the losses; 0 for K = 1.

    Raises:
        ValueError: ``losses`` has no task axis, or the shapes do not broadcast to that of losses.

    Example:
        >>> from bilb import metrics
        >>> print(metrics.loss_discrepancy([1.0, 3.0, 2.0], weights=[1.0, 0.5, 1.0]))
        1.0

    References:
        Xiao et al., arXiv 2502.08585.
    """
    (losses,) = _at_least_float32(losses)
    if losses.ndim == 0 or losses.shape[-1] == 0:
        raise ValueError(f"losses must have shape (..., K) with K >= 1; got {losses.shape}.")
    if weights is not None:
        (weights,) = _at_least_float32(weights)
        if weights.shape[-1:] != losses.shape[-1:] or weights.ndim > losses.ndim:
            raise ValueError(
                f"weights must have shape (K,) or that of losses, {losses.shape}; got "
                f"{weights.shape}."
            )
        losses = weights * losses
    return jnp.sum(jnp.abs(jnp.diff(losses, axis=-1)), axis=-1)


def _at_least_float32(*arrays: Any) -> tuple[Array, ...]:
    arrays = tuple(jnp.asarray(array) for array in arrays)
    return tuple(a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays)


def _check_gram(gram: Any) -> Array:
    (gram,) = _at_least_float32(gram)
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2] or gram.shape[-1] == 0:
        raise ValueError(f"gram must have shape (..., K, K) with K >= 1; got {gram.shape}.")
    return gram


def _sign(higher_is_better: Any, num_metrics: int) -> Array:
    higher_is_better = jnp.asarray(higher_is_better)
    if higher_is_better.dtype != jnp.bool_ or higher_is_better.shape not in ((), (num_metrics,)):
        raise ValueError(
            f"higher_is_better must be a bool or bools of shape ({num_metrics},); got "
            f"{higher_is_better.dtype} of shape {higher_is_better.shape}."
        )
    return jnp.where(higher_is_better, -1.0, 1.0)


def _check_nonzero(name: str, value: Any) -> None:
    if isinstance(value, jax.core.Tracer):
        return
    zeros = np.argwhere(np.asarray(value, dtype=np.float64) == 0)
    if zeros.size:
        index = tuple(int(i) for i in zeros[0])
        where = index[0] if len(index) == 1 else index
        raise ValueError(f"{name} must not be zero; entry {where} is.")
