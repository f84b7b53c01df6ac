"""IMTL-G, ICLR 2021: the direction that has equal projections on all task gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from bilb import base
from bilb.gradient_balancing.algebra import components, cosines, divide, spectrum
from bilb.gradient_balancing.weighting import gram_weighting


def imtl_g(*, decay: base.Scalar = 0.0) -> optax.GradientTransformationExtraArgs:
    """Impartial multi-task learning, gradient part: equal projections on all task gradients.

    With ``d_k = ‖g_k‖``, ``w ∝ G⁻¹ d``, of sum 1: then ``u_kᵀ Jᵀw`` is the same for all unit
    gradients ``u_k = g_k / d_k``. In terms of the cosines C of the gradients, ``w_k ∝ (C⁻¹ 1)_k /
    d_k``.

    ``update`` needs the extra argument ``gram`` (K, K), which :func:`bilb.value_and_grad` and
    :func:`bilb.aggregate_by` supply. The weights sum to 1; they may be negative. Its loss part is
    :func:`bilb.imtl_l`; for both together, ``bilb.chain(bilb.imtl_l(), bilb.imtl_g())``.

    Nothing keeps the sum of ``G⁻¹ d`` positive beyond two tasks. Where it is negative the common
    projection is negative as well, and the step ascends for all tasks, in the official code, too:
    :func:`bilb.config` finds the same direction with the right sign.

    Where task gradients are linearly dependent (their cosines have an eigenvalue below K machine
    epsilons of the largest), the pseudo-inverse of G takes the place of the inverse, as in TorchJD,
    and projections are equal in the sense of least squares only. A task whose gradient is zero has
    weight 0, and if the weights have no sum to divide by, all are 0.

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
        >>> balancer = bilb.imtl_g()
        >>> losses = jnp.array([1.0, 1.0])
        >>> gram = jnp.array([[9.0, 0.0], [0.0, 1.0]])
        >>> balanced, state = balancer.update(losses, balancer.init(losses), gram=gram)
        >>> print(np.asarray(balanced).round(3))
        [0.25 0.75]

    References:
        Liu et al., *Towards impartial multi-task learning*, ICLR 2021; for dependent gradients,
        Quinton and Rey, *Jacobian descent for multi-objective optimization*, arXiv 2406.16232.
    """

    def weigh(gram, memory, step):
        del step
        norms, directions = cosines(gram.matrix)
        of_directions = spectrum(directions)
        full_rank = of_directions.kept.sum() == (norms > 0).sum()

        def inverse():
            values, vectors, kept = of_directions
            along = jnp.where(kept, vectors.T @ (norms > 0).astype(norms.dtype) / values, 0.0)
            return divide(vectors @ along, norms)

        def pseudo_inverse():
            singular, vectors, kept = components(norms, of_directions)
            return vectors @ jnp.where(kept, vectors.T @ norms / singular**2, 0.0)

        weights = jax.lax.cond(full_rank, inverse, pseudo_inverse)
        weights = weights / jnp.maximum(jnp.max(jnp.abs(weights)), jnp.finfo(norms.dtype).tiny)
        total = weights.sum()
        noise = norms.shape[0] * jnp.finfo(norms.dtype).eps
        defined = jnp.abs(total) > noise * jnp.abs(weights).sum()
        return jnp.where(defined, weights / jnp.where(defined, total, 1.0), 0.0), memory

    return gram_weighting("imtl_g", weigh, decay=decay)
