"""MGDA: the point of smallest norm in the convex hull of the task gradients."""

from __future__ import annotations

import optax

from bilb import base
from bilb.gradient_balancing import solvers
from bilb.gradient_balancing.weighting import gram_weighting


def mgda(*, decay: base.Scalar = 0.0) -> optax.GradientTransformationExtraArgs:
    """Multiple-gradient descent: follows the min-norm point of the task gradients' convex hull.

    ``w = argmin_{w ∈ Δ} ‖Jᵀ w‖² = argmin_{w ∈ Δ} wᵀ G w``; no direction improves all tasks more
    evenly, and where it is zero no direction improves all of them at all (Pareto stationarity).

    ``update`` needs the extra argument ``gram`` (K, K), which :func:`bilb.value_and_grad` and
    :func:`bilb.aggregate_by` supply. The weights are not negative and sum to one; the official code
    of Nash-MTL, FAMO and others multiplies them by K. The min-norm point favours tasks with small
    gradients: where the scales of the losses differ, balance their logarithms,
    ``bilb.chain(bilb.log_losses(), bilb.mgda())``.

    A task whose gradient is exactly zero is Pareto stationary by itself: it gets all the weight,
    and training stops until its gradient moves. Where that is not wanted, leave it out by ``mask``.

    Args:
        decay: of a running mean of the Gram matrix in place of each step's own, in [0, 1).

    Returns:
        A loss transformation; ``update(losses, state, *, gram)``. Its state has the fields
        ``step``, ``weights`` (K,), ``memory`` and ``mean``.

    Raises:
        ValueError: for a concrete ``decay`` outside [0, 1), or a ``gram`` that is not (K, K).
        MissingArgument: for a call without ``gram``.

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.mgda()
        >>> losses = jnp.array([1.0, 1.0])
        >>> gram = jnp.array([[4.0, 0.0], [0.0, 1.0]])
        >>> balanced, state = balancer.update(losses, balancer.init(losses), gram=gram)
        >>> print(np.asarray(balanced).round(3))
        [0.2 0.8]

    References:
        Désidéri, *Multiple-gradient descent algorithm*, 2012; Sener and Koltun, *Multi-task
        learning as multi-objective optimization*, arXiv 1810.04650.
    """

    def weigh(gram, memory, step):
        del step
        return solvers.min_norm_weights(gram.matrix, gram.present), memory

    return gram_weighting("mgda", weigh, decay=decay)
