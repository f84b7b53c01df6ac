"""Nash-MTL, arXiv 2202.01017: the bargaining solution, ``w_k g_kᵀ d = 1`` for all tasks."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.gradient_balancing import solvers
from bilb.gradient_balancing.algebra import preference_of
from bilb.gradient_balancing.weighting import gram_weighting


def nash_mtl(
    max_norm: base.Scalar | None = None,
    every: int = 1,
    *,
    preference: Any = 1.0,
    decay: base.Scalar = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Nash's bargaining solution: independent of the losses' scales.

    ``G w = p / w`` elementwise, ``w > 0``, with the Gram matrix ``G = J Jᵀ`` (the paper's ``GᵀG``):
    the direction ``d = Jᵀ w`` maximises ``Σ_k p_k log g_kᵀ d`` on a ball. The paper has p = 1, one
    voice for each task. Where m losses are pieces of one, give each of them 1 / m: a task that is
    there m times is then what it is alone.

    ``update`` needs the extra argument ``gram`` (K, K), or ``gram_fn`` with ``every > 1``, which
    :func:`bilb.value_and_grad` and :func:`bilb.aggregate_by` supply. ``w_k`` is
    ``√p_k / ‖g_k‖`` for orthogonal gradients, and ``‖Jᵀ w‖² = Σ_k p_k``.

    ``G w = 1 / w`` is solved to rounding by damped Newton steps. The official code solves it by 20
    steps of a concave-convex procedure to about 1e-6 where it works, keeps its last weights where
    it does not, and clips the norm of the direction at ``max_norm = 1``.

    At a Pareto stationary point there is no solution: the weights of the tasks in conflict grow
    without bound while their gradients cancel. They stop at about ``1e3 / ‖g_k‖`` in float32, so
    with mini-batches, whose Gram matrices can be nearly stationary by chance, use ``decay``. A task
    whose gradient is exactly zero has nothing to bargain for: its weight is 0.

    Args:
        max_norm: > 0; where given, the weights are scaled down so that ``‖Jᵀ w‖`` is at most this,
            as in TorchJD.
        every: number of steps that the weights stay the same, ``update_weights_every`` of the
            official code; the Gram matrix is only taken at those steps. Static.
        preference: p >= 0, one number or one per task; 0 leaves a task out.
        decay: of a running mean of the Gram matrix in place of each step's own, in [0, 1).

    Returns:
        A loss transformation; ``update(losses, state, *, gram)``, or ``gram_fn`` with
        ``every > 1``. Its state is a :class:`bilb.GramState`.

    Raises:
        ValueError: for a concrete hyperparameter outside its range, a ``preference`` of another
            shape, or a ``gram`` that is not (K, K).
        MissingArgument: for a call without ``gram``.

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.nash_mtl()
        >>> losses = jnp.array([1.0, 1.0])
        >>> gram = jnp.array([[4.0, -1.0], [-1.0, 1.0]])
        >>> balanced, state = balancer.update(losses, balancer.init(losses), gram=gram)
        >>> print(np.asarray(state.weights).round(3))
        [0.707 1.414]

    References:
        Navon et al., *Multi-task learning as a bargaining game*, arXiv 2202.01017. Preferences:
        Kalai, *Nonsymmetric Nash solutions and replications of 2-person bargaining*, 1977.
    """
    checks.number("max_norm", max_norm, minimum=0, exclusive=True, schedule=True, optional=True)
    checks.number("every", every, minimum=1, whole=True, static=True)
    checks.number("preference", preference, minimum=0, per_task=True)

    def weigh(gram, memory, step):
        shares = preference_of(preference, gram.present, gram.matrix.dtype)
        # FairGrad's equation, G w = (p / w)^(1/α), at α = 1.
        weights = solvers.fair_weights(gram.matrix, 1.0, shares)
        if max_norm is not None:
            squared_norm = jnp.sum(jnp.where(weights > 0, shares, 0.0))  # of Jᵀ w
            norm = jnp.sqrt(jnp.where(squared_norm > 0, squared_norm, 1.0))
            weights = weights * jnp.minimum(1.0, base.at_step(max_norm, step) / norm)
        return weights / gram.scale, memory

    return gram_weighting("nash_mtl", weigh, decay=decay, every=every)
