"""CAGrad: the direction near the mean gradient that improves the worst task the most."""

from __future__ import annotations

import optax

from bilb import base, checks
from bilb.gradient_balancing import solvers
from bilb.gradient_balancing.algebra import equal_weights
from bilb.gradient_balancing.weighting import gram_weighting


def cagrad(
    c: base.Scalar = 0.4, rescale: int = 1, *, decay: base.Scalar = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Conflict-averse gradient descent: between the mean gradient (c = 0) and MGDA (c large).

    ``max_d min_i g_iᵀ d`` subject to ``‖d - g_0‖ <= c ‖g_0‖`` with the mean gradient ``g_0 = Jᵀ
    1/K``. Its dual is ``w = argmin_{w ∈ Δ} g_wᵀ g_0 + c ‖g_0‖ ‖g_w‖``, ``g_w = Jᵀ w``, and the
    direction is ``d = g_0 + c ‖g_0‖ / ‖g_w‖ · g_w``.

    ``update`` needs the extra argument ``gram`` (K, K), which :func:`bilb.value_and_grad` and
    :func:`bilb.aggregate_by` supply. With c < 1 it ends at a stationary point of the mean loss.
    With c >= 1 the direction is in conflict with no task.

    The problem is solved to rounding. The official code smooths the norms by 1e-8, stops at a
    relative accuracy of about 1e-3, multiplies the direction by K and clips its norm at 1; its c is
    .4 in the repositories of FAMO and Nash-MTL, .5 in its own. Where no direction of the ball
    improves all tasks, at a Pareto stationary point or with a present task whose gradient is zero,
    the best direction is not unique and the mean gradient is followed, divided by the factor of
    ``rescale``; leave a task without gradient out by ``mask`` if the others shall be balanced.

    Args:
        c: >= 0, the radius of the ball relative to the norm of the mean gradient.
        rescale: what divides the weights: 1 by ``1 + c²``, the default of the official code, 2 by
            ``1 + c``, 0 by nothing (TorchJD). Static.
        decay: of a running mean of the Gram matrix in place of each step's own, in [0, 1).

    Returns:
        A loss transformation; ``update(losses, state, *, gram)``. Its state is a
        :class:`bilb.GramState`; the weights ``(1/K + c ‖g_0‖ / ‖g_w‖ · w) / (1 + c²)`` are those of
        the direction.

    Raises:
        ValueError: for a concrete hyperparameter outside its range, or a ``gram`` that is not
            (K, K).
        MissingArgument: for a call without ``gram``.

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.cagrad(c=0.5, rescale=0)
        >>> losses = jnp.array([1.0, 1.0])
        >>> gram = jnp.array([[4.0, -1.0], [-1.0, 1.0]])
        >>> balanced, state = balancer.update(losses, balancer.init(losses), gram=gram)
        >>> print(np.asarray(state.weights).round(3))
        [0.5   0.933]

    References:
        Liu et al., *Conflict-averse gradient descent for multi-task learning*, arXiv 2110.14048.
    """
    checks.number("c", c, minimum=0, schedule=True)
    if rescale not in (0, 1, 2):
        raise ValueError(f"rescale must be 0, 1 or 2; got {rescale!r}.")

    def weigh(gram, memory, step):
        radius = base.at_step(c, step)
        mean = equal_weights(gram.present, gram.matrix.dtype)
        weights = solvers.conflict_averse_weights(gram.matrix, mean, radius, gram.present)
        divisor = (1.0, 1.0 + radius**2, 1.0 + radius)[rescale]
        return weights / divisor, memory

    return gram_weighting("cagrad", weigh, decay=decay)
