"""Krum, NeurIPS 2017: follows the task gradients that have the closest neighbours."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.gradient_balancing.weighting import gram_weighting


def krum(
    num_byzantine: int = 0,
    num_selected: int = 1,
    *,
    squared: bool = True,
    decay: base.Scalar = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Multi-Krum: the mean of the task gradients that lie in the densest spot, robust to outliers.

    The score of task i is ``Σ_j ‖g_i - g_j‖²`` over its ``K - f - 2`` nearest neighbours j, where f
    gradients may be corrupt; the gradients with the lowest scores are averaged.

    ``update`` needs the extra argument ``gram`` (K, K), which :func:`bilb.value_and_grad` and
    :func:`bilb.aggregate_by` supply. Made for gradients of one loss from several workers, of which
    some may be corrupt. The weights are 1 over the number of selected tasks for those, 0 for the
    others; the earlier of two equal tasks comes first.

    The paper's guarantee needs ``K >= 2 num_byzantine + 3`` tasks. With fewer, the score is the
    distance to the nearest neighbour; fewer present tasks than ``num_selected`` are all selected.

    Args:
        num_byzantine: f, how many gradients may be corrupt, >= 0.
        num_selected: how many gradients are averaged, >= 1; 1 is Krum, more is Multi-Krum.
        squared: whether scores sum squared distances (the paper) or distances (TorchJD); static.
        decay: of a running mean of the Gram matrix in place of each step's own, in [0, 1).

    Returns:
        A loss transformation; ``update(losses, state, *, gram)``. Its state has the fields
        ``step``, ``weights`` (K,), ``memory`` and ``mean``.

    Raises:
        ValueError: for a concrete ``num_byzantine`` < 0, ``num_selected`` < 1 or ``decay`` outside
            [0, 1), or a ``gram`` that is not (K, K).
        MissingArgument: for a call without ``gram``.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.krum()
        >>> losses = jnp.ones(3)
        >>> task_gradients = jnp.array([[1.0], [1.5], [9.0]])
        >>> gram = task_gradients @ task_gradients.T
        >>> balanced, state = balancer.update(losses, balancer.init(losses), gram=gram)
        >>> print(balanced)
        [1. 0. 0.]

    References:
        Blanchard et al., *Machine learning with adversaries: Byzantine tolerant gradient descent*,
        NeurIPS 2017.
    """
    checks.number("num_byzantine", num_byzantine, minimum=0, whole=True)
    checks.number("num_selected", num_selected, minimum=1, whole=True)

    def weigh(gram, memory, step):
        del step
        present = gram.present
        tasks = jnp.arange(present.shape[0])
        count = present.sum()
        neighbours = jnp.maximum(count - num_byzantine - 2, 1)
        selected = jnp.clip(num_selected, 1, jnp.maximum(count, 1))
        squares = jnp.diagonal(gram.matrix)
        distances = jnp.maximum(squares[:, None] + squares - 2 * gram.matrix, 0.0)
        distances = distances if squared else jnp.sqrt(distances)
        others = present & (tasks[:, None] != tasks)
        nearest = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
        scores = jnp.sum(nearest, axis=1, where=(tasks < neighbours) & jnp.isfinite(nearest))
        ranks = jnp.argsort(jnp.argsort(jnp.where(present, scores, jnp.inf)))
        return (ranks < selected) / selected.astype(squares.dtype), memory

    return gram_weighting("krum", weigh, decay=decay)
