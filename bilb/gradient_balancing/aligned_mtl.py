"""Aligned-MTL, CVPR 2023: makes the principal components of the task gradients equally long."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.gradient_balancing.algebra import components, cosines, preference_of, spectrum
from bilb.gradient_balancing.weighting import gram_weighting


def aligned_mtl(
    scale: Literal["min", "median", "rmse"] = "min",
    *,
    preference: Any = None,
    decay: base.Scalar = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Independent component alignment: the task gradients as an orthogonal system of one length.

    With the eigenvalues and eigenvectors ``G = V Λ Vᵀ``, ``w = √σ V Λ^{-1/2} Vᵀ p``; the preference
    p is ``1/K`` by default and σ the smallest eigenvalue.

    ``update`` needs the extra argument ``gram`` (K, K), which :func:`bilb.value_and_grad` and
    :func:`bilb.aggregate_by` supply. Weights may be negative. LibMTL sums over tasks where this
    takes the mean; give ``preference=1.0`` for that.

    Where the task gradients are linearly dependent (their cosines have an eigenvalue below K
    machine epsilons of the largest), their components are fewer than tasks, and so are they for
    gradients below that fraction of the longest. If all are zero the weights are the preference.

    Args:
        scale: σ, of the eigenvalues that are not zero: their "min" (the paper), their "median" (the
            lower one of two), or their mean, "rmse".
        preference: p, one number or one per task; one over the number of present tasks if None.
        decay: of a running mean of the Gram matrix in place of each step's own, in [0, 1).

    Returns:
        A loss transformation; ``update(losses, state, *, gram)``. Its state has the fields
        ``step``, ``weights`` (K,), ``memory`` and ``mean``.

    Raises:
        ValueError: for an unknown ``scale``, a ``preference`` of another shape, a concrete
            ``decay`` outside [0, 1), or a ``gram`` that is not (K, K).
        MissingArgument: for a call without ``gram``.

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.aligned_mtl()
        >>> losses = jnp.array([1.0, 1.0])
        >>> gram = jnp.array([[4.0, 0.0], [0.0, 1.0]])
        >>> balanced, state = balancer.update(losses, balancer.init(losses), gram=gram)
        >>> print(np.asarray(balanced).round(3))
        [0.25 0.5 ]

    References:
        Senushkin et al., *Independent component alignment for multi-task learning*, CVPR 2023.
    """
    if scale not in ("min", "median", "rmse"):
        raise ValueError(f'scale must be "min", "median" or "rmse"; got {scale!r}.')
    checks.number("preference", preference, per_task=True, optional=True)

    def weigh(gram, memory, step):
        del step
        norms, directions = cosines(gram.matrix)
        singular, vectors, kept = components(norms, spectrum(directions))
        rank = kept.sum()
        root_sigma = {
            "min": singular[rank - 1],
            "median": singular[rank // 2],
            "rmse": jnp.sqrt(jnp.sum(singular**2, where=kept) / jnp.maximum(rank, 1)),
        }[scale]
        shrink = jnp.where(kept, root_sigma / singular, 0.0)
        target = preference_of(preference, gram.present, norms.dtype)
        weights = vectors @ (shrink * (vectors.T @ target))
        return jnp.where(rank > 0, weights, target), memory

    return gram_weighting("aligned_mtl", weigh, decay=decay)
