"""Linear scalarisation (LS), also called equal weighting: the weighted sum with fixed weights."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks


class LinearScalarizationState(NamedTuple):
    """State of :func:`linear_scalarization`."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) the weights just used


def linear_scalarization(
    weights: jax.Array | float | optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Weighs the losses with constants; the plain sum by default.

    ``objective = Σ_k w_k l_k``

    A non-finite loss stays in its own entry.

    Args:
        weights: (K,) or one number for all tasks, not negative, or a schedule of either; None means
            1 for every task.

    Returns:
        A loss transformation whose state has the fields ``step`` and ``weights`` (K,).

    Raises:
        ValueError: for a concrete negative weight or a shape that is neither () nor (K,).

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.linear_scalarization(jnp.array([1.0, 0.1]))
        >>> losses = jnp.array([2.0, 30.0])
        >>> balanced, state = balancer.update(losses, balancer.init(losses))
        >>> print(balanced, state.weights)
        [2. 3.] [1.  0.1]
    """
    weights = 1.0 if weights is None else weights
    checks.number("weights", weights, minimum=0, per_task=True, schedule=True, optional=True)

    def init(num_tasks, dtype):
        step = base.new_step()
        values = checks.per_task("weights", weights, num_tasks, step)
        return LinearScalarizationState(step, jnp.array(values, dtype, copy=True))

    def update(losses, state, **_):
        values = checks.per_task("weights", weights, losses.shape[0], state.step)
        return values * losses, LinearScalarizationState(
            optax.safe_increment(state.step), values.astype(losses.dtype)
        )

    return base.loss_transformation(init, update)
