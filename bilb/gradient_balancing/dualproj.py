"""DualProj: the mean gradient is projected onto the dual cone of the task gradients."""

from __future__ import annotations

from typing import Any

import optax

from bilb import base
from bilb.gradient_balancing import solvers
from bilb.gradient_balancing.dual_cone import dual_cone_weighting


def dualproj(
    reg_eps: base.Scalar = 1e-4,
    norm_eps: base.Scalar = 1e-4,
    *,
    preference: Any = None,
    decay: base.Scalar = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Projection of the mean gradient onto the dual cone, as in gradient episodic memory.

    ``w = argmin_{v >= m} vᵀ G v`` with m the mean or a preference: ``Jᵀ w`` is the projection of
    ``Jᵀ m`` onto ``{d : J d >= 0}``, the direction nearest to it that makes no task worse.

    ``update`` needs the extra argument ``gram`` (K, K), which :func:`bilb.value_and_grad` and
    :func:`bilb.aggregate_by` supply. The weights are at least ``preference``: equal to it as long
    as the mean gradient is in conflict with no task.

    As in TorchJD, G is divided by its trace, and ``reg_eps`` is added to its diagonal: a task whose
    gradient is much smaller than the others' is then not projected exactly. ``reg_eps=0`` is the
    exact projection; at a Pareto stationary point the weights are then not unique, and can be
    large for tasks whose gradients are small.

    Args:
        reg_eps: >= 0, the ridge on ``G / trace(G)``.
        norm_eps: >= 0; where the trace of G, the sum of squared gradient norms, is below it, G
            counts as 0 and the weights are ``preference``. 0 never does that.
        preference: m >= 0, one number or one per task; one over the number of present tasks if
            None.
        decay: of a running mean of the Gram matrix in place of each step's own, in [0, 1).

    Returns:
        A loss transformation; ``update(losses, state, *, gram)``. Its state is a
        :class:`bilb.GramState`.

    Raises:
        ValueError: for a concrete hyperparameter outside its range, a ``preference`` of another
            shape, or a ``gram`` that is not (K, K).
        MissingArgument: for a call without ``gram``.

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.dualproj(reg_eps=0.0)
        >>> losses = jnp.array([1.0, 1.0])
        >>> gram = jnp.array([[4.0, -1.5], [-1.5, 1.0]])
        >>> balanced, state = balancer.update(losses, balancer.init(losses), gram=gram)
        >>> print(np.asarray(state.weights).round(2))
        [0.5  0.75]

    References:
        Lopez-Paz and Ranzato, *Gradient episodic memory for continual learning*, arXiv 1706.08840;
        the ridge and the norm: TorchJD 0.18.
    """
    return dual_cone_weighting("dualproj", solvers.lift, reg_eps, norm_eps, preference, decay)
