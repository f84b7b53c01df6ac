"""Geometric loss strategy (GLS), arXiv 1904.08492: the geometric mean of the losses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks


class GeometricMeanState(NamedTuple):
    """State of :func:`geometric_mean`."""

    weights: jax.Array  # (K,) the effective weights just used, objective / (K l_k); 1 at first


def geometric_mean(floor: float | jax.Array = 1e-8) -> optax.GradientTransformationExtraArgs:
    """Minimises the geometric mean of the losses, which does not depend on their units.

    ``objective = (Π_k l_k)^(1/K)``

    Its gradient is that of the mean of the logarithms times the objective itself, so steps shrink
    with the losses. Task k's entry is ``w_k l_k`` with the weight ``w_k = objective / (K l_k)``
    held constant; the entries are equal and sum to the objective.

    The weights are not negative, of no fixed sum. With a mask the mean is over the present tasks.
    A loss at or below the floor, zero and negative ones included, counts as the floor and has
    weight zero. A non-finite loss makes all entries non-finite: wrap in
    :func:`bilb.skip_nonfinite`.

    Args:
        floor: positive, in the units of the losses; default 1e-8, as in :func:`bilb.log_losses`.

    Returns:
        A loss transformation whose state has the field ``weights`` (K,).

    Raises:
        ValueError: if ``floor`` is a concrete number that is not positive.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.geometric_mean()
        >>> losses = jnp.array([8.0, 0.5])
        >>> balanced, state = balancer.update(losses, balancer.init(losses))
        >>> print(balanced.sum().round(4), state.weights.round(4))
        2.0 [0.125 2.   ]

    References:
        Chennupati et al., *MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy
        for Multi-Task Learning*, arXiv 1904.08492.
    """
    checks.number("floor", floor, minimum=0, exclusive=True)

    def init(num_tasks, dtype):
        return GeometricMeanState(jnp.ones(num_tasks, dtype))

    def update(losses, state, *, mask, **_):
        del state
        num_tasks = base.num_present(losses, mask)
        floored = base.at_least(losses, floor)
        objective = jnp.exp(jnp.sum(jnp.log(floored), where=mask) / num_tasks)
        # The quotient may be beyond the largest number where losses are 38 decades apart.
        quotient = jnp.minimum(objective / floored, jnp.finfo(losses.dtype).max)
        weights = jnp.where(losses > floor, quotient / num_tasks, 0.0)
        balanced, weights = base.split_over_tasks(objective, weights, losses, mask)
        return balanced, GeometricMeanState(weights)

    return base.loss_transformation(init, update)
