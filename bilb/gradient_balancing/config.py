"""ConFIG, arXiv 2408.11104: the direction that has the same cosine with all task gradients."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.gradient_balancing.algebra import cosines, divide, preference_of, spectrum
from bilb.gradient_balancing.weighting import gram_weighting


def config(
    *, preference: Any = None, decay: base.Scalar = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Conflict-free inverse gradients: equal cosines with all tasks, as long as they agree.

    With unit gradients ``u_k = g_k / ‖g_k‖``, rows of U: ``d = (Σ_k g_kᵀ e) e`` along the unit
    vector ``e = U⁺ 1 / ‖U⁺ 1‖``. In terms of their cosines ``C = U Uᵀ``, ``U⁺ = Uᵀ C⁺``.

    ``update`` needs the extra argument ``gram`` (K, K), which :func:`bilb.value_and_grad` and
    :func:`bilb.aggregate_by` supply. The length of the step is the sum of the projections of all
    task gradients on its direction. Weights may be negative.

    Where task gradients are linearly dependent (their cosines have an eigenvalue below K machine
    epsilons of the largest), cosines are equal in the sense of least squares only. A task whose
    gradient is zero has weight 0. If no direction has a projection on the gradients' mean, as for
    two opposite gradients, all weights are 0: the point is Pareto stationary.

    Args:
        preference: to which the cosines are proportional, one number or one per task; 1 if None.
        decay: of a running mean of the Gram matrix in place of each step's own, in [0, 1).

    Returns:
        A loss transformation; ``update(losses, state, *, gram)``. Its state has the fields
        ``step``, ``weights`` (K,), ``memory`` and ``mean``.

    Raises:
        ValueError: for a ``preference`` of another shape, a concrete ``decay`` outside [0, 1), or
            a ``gram`` that is not (K, K).
        MissingArgument: for a call without ``gram``.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.config()
        >>> losses = jnp.array([1.0, 1.0])
        >>> gram = jnp.array([[4.0, 0.0], [0.0, 1.0]])
        >>> balanced, state = balancer.update(losses, balancer.init(losses), gram=gram)
        >>> print(balanced)
        [0.75 1.5 ]

    References:
        Liu, Chu and Thuerey, *ConFIG: towards conflict-free training of physics informed neural
        networks*, arXiv 2408.11104.
    """
    checks.number("preference", preference, per_task=True, optional=True)

    def weigh(gram, memory, step):
        del step
        norms, directions = cosines(gram.matrix)
        values, vectors, kept = spectrum(directions)
        target = preference_of(preference, norms > 0, norms.dtype)
        along = jnp.where(kept, vectors.T @ target, 0.0)
        direction = vectors @ (along / values)  # e ∝ Uᵀ direction
        square = jnp.sum(along**2 / values)
        noise = 10 * norms.shape[0] * float(jnp.finfo(norms.dtype).eps)
        defined = jnp.sum(along**2) > noise**2 * jnp.sum(target**2)
        length = norms @ (vectors @ along) / jnp.where(defined, square, 1.0)
        return jnp.where(defined, length * divide(direction, norms), 0.0), memory

    return gram_weighting("config", weigh, decay=decay)
