"""FairGrad: α-fair shares of the improvement."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.gradient_balancing import solvers
from bilb.gradient_balancing.algebra import preference_of
from bilb.gradient_balancing.weighting import gram_weighting


def fairgrad(
    alpha: base.Scalar = 2.0, *, preference: Any = 1.0, decay: base.Scalar = 0.0
) -> optax.GradientTransformationExtraArgs:
    """α-fair gradient balancing: the mean gradient for α → 0, max-min fairness for α → ∞.

    ``G w = (p / w)^(1/α)`` elementwise, ``w > 0``: the direction ``Jᵀ w`` maximises
    ``Σ_i p_i (g_iᵀ d)^(1-α) / (1-α)`` on a ball; the paper has p = 1. α = 1 is proportional
    fairness, Nash-MTL.

    ``update`` needs the extra argument ``gram`` (K, K), which :func:`bilb.value_and_grad` and
    :func:`bilb.aggregate_by` supply. ``w_k`` is about ``(p_k / ‖g_k‖^(2α))^(1 / (1 + α))``.

    The equation is solved to rounding by damped Newton steps. The official code solves it by
    SciPy's least squares to 1e-8, absolute, with α = 1 as its default; it multiplies the direction
    by K and clips its norm at 1. The default here is the paper's for supervised learning.

    At a Pareto stationary point there is no solution: the weights of the tasks in conflict grow
    without bound while their gradients cancel. They stop at about ``1e7^(α / (1 + α))`` times the
    size above in float32, so with mini-batches, whose Gram matrices can be nearly stationary by
    chance, use ``decay``. A task whose gradient is exactly zero can gain nothing: its weight is 0.

    Args:
        alpha: α > 0; larger is fairer to tasks that improve less.
        preference: p >= 0, one number or one per task; 0 leaves a task out.
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
        >>> balancer = bilb.fairgrad(alpha=2.0)
        >>> losses = jnp.array([1.0, 1.0])
        >>> gram = jnp.array([[4.0, 0.0], [0.0, 1.0]])
        >>> balanced, state = balancer.update(losses, balancer.init(losses), gram=gram)
        >>> print(np.asarray(state.weights).round(3))
        [0.397 1.   ]

    References:
        Ban and Ji, *Fair resource allocation in multi-task learning*, arXiv 2402.15638.
    """
    checks.number("alpha", alpha, minimum=0, exclusive=True, schedule=True)
    checks.number("preference", preference, minimum=0, per_task=True)

    def weigh(gram, memory, step):
        order = base.at_step(alpha, step)
        shares = preference_of(preference, gram.present, gram.matrix.dtype)
        weights = solvers.fair_weights(gram.matrix, order, shares)
        # w is homogeneous in G, so that the solver can work on the scaled one.
        weights = weights * gram.scale ** (-2 * order / (1 + order))
        return jnp.minimum(weights, jnp.finfo(weights.dtype).max), memory

    return gram_weighting("fairgrad", weigh, decay=decay)
