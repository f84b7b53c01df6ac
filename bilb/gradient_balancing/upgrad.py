"""UPGrad: the mean of every task's gradient, each projected onto the dual cone."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from bilb import base
from bilb.gradient_balancing import solvers
from bilb.gradient_balancing.dual_cone import dual_cone_weighting


def upgrad(
    reg_eps: base.Scalar = 1e-4,
    norm_eps: base.Scalar = 1e-4,
    *,
    preference: Any = None,
    decay: base.Scalar = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Unconflicting projection of gradients: linear in the scale of each task, never in conflict.

    ``w = Σ_i m_i v_i`` with ``v_i = argmin_{v >= e_i} vᵀ G v`` and m the mean or a preference:
    ``Jᵀ v_i`` is the projection of ``g_i`` onto ``{d : J d >= 0}``, so none makes any task worse.

    ``update`` needs the extra argument ``gram`` (K, K), which :func:`bilb.value_and_grad` and
    :func:`bilb.aggregate_by` supply. The weights are not negative and at least ``preference``.
    K quadratic programmes of K variables are solved per step: to rounding up to K = 100, to about
    1e-4 in float32 beyond.

    As in TorchJD, G is divided by its trace, and ``reg_eps`` is added to its diagonal: a task whose
    gradient is much smaller than the others' is then not projected exactly. With ``reg_eps=0`` all
    projections are exact; at a Pareto stationary point the weights are then not unique, and can be
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
        >>> balancer = bilb.upgrad()
        >>> losses = jnp.array([1.0, 1.0])
        >>> gram = jnp.array([[4.0, -1.0], [-1.0, 1.0]])
        >>> balanced, state = balancer.update(losses, balancer.init(losses), gram=gram)
        >>> print(np.asarray(state.weights).round(3))
        [0.625 1.   ]

    References:
        Quinton and Rey, *Jacobian descent for multi-objective optimization*, arXiv 2406.16232.
    """

    def formula(hessian, mean, present):
        return jnp.sum(solvers.lift_all(hessian, jnp.diag(mean), present), axis=0)

    return dual_cone_weighting("upgrad", formula, reg_eps, norm_eps, preference, decay)
