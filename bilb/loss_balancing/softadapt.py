"""SoftAdapt, arXiv 1912.12355: more weight to losses that fall slowly from update to update."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.loss_balancing import joint

_EPSILON = 1e-6  # of jinns


class SoftAdaptState(NamedTuple):
    """State of :func:`softadapt`."""

    weights: jax.Array  # (K,) the weights just used; 1 / K at first
    last_losses: jax.Array  # (K,) of the last update where the task was present and finite
    seen: jax.Array  # (K,) bool, whether there is one


def softadapt(
    beta: float | jax.Array = 0.1,
    *,
    rate: Literal["difference", "normalized", "ratio"] = "difference",
    loss_weighted: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Weighs the losses by the softmax of their changes since the previous update.

    ``objective = Σ_k w_k l_k`` with ``w = softmax(β s)``, where ``s_k`` is task k's rate of change
    since the previous update.

    The rate of change s of a task is

    * "difference": ``l(t) - l(t - 1)``, the paper's
    * "normalized": the same over ``Σ_j |s_j|``, the paper's variant for losses of unlike scales
    * "ratio": ``l(t) / (l(t - 1) + 1e-6)``, as in jinns, which has β = 1

    and with ``loss_weighted`` the weights are ``l_k exp(β s_k) / Σ_j l_j exp(β s_j)``. Differences
    are of the losses' own units: unlike scales give all weight to one task. On mini-batches one
    difference is mostly noise; :func:`bilb.dwa` takes means over windows instead.

    The weights are not negative and sum to 1, with a mask over the present tasks. A task without a
    previous loss counts as one that did not change. A non-finite loss stays in its own entry and is
    not remembered. With ``loss_weighted`` a loss below zero counts as 0; if all do, the weights are
    those without.

    Args:
        beta: β; larger favours the slowest tasks more, and below zero it favours the fastest.
            Default 0.1, as in the official code.
        rate: of change; static.
        loss_weighted: whether the losses' sizes count as well; static.

    Returns:
        A loss transformation whose state has the fields ``weights`` (K,), ``last_losses`` (K,) and
        ``seen`` (K,). ``rate`` and ``loss_weighted`` are static in ``optax.inject_hyperparams``.

    Raises:
        ValueError: for an unknown ``rate``, or a ``beta`` that is not one number.

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.softadapt(beta=1.0)
        >>> state = balancer.init(jnp.ones(2))
        >>> for losses in ([4.0, 1.0], [2.0, 1.0]):
        ...     balanced, state = balancer.update(jnp.array(losses), state)
        ...     print(np.asarray(state.weights).round(3))
        [0.5 0.5]
        [0.119 0.881]

    References:
        Heydari et al., *SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with
        Multi-Part Loss Functions*, arXiv 1912.12355, section 3.1.
    """
    checks.number("beta", beta)
    if rate not in ("difference", "normalized", "ratio"):
        raise ValueError(f'rate must be "difference", "normalized" or "ratio"; got {rate!r}.')

    def init(num_tasks, dtype):
        return SoftAdaptState(
            weights=jnp.full(num_tasks, 1 / num_tasks, dtype),
            last_losses=jnp.zeros(num_tasks, dtype),
            seen=jnp.zeros(num_tasks, bool),
        )

    def rates_of(losses, last, known):
        if rate == "ratio":
            earlier = last + _EPSILON
            known &= earlier != 0
            return jnp.where(known, losses / jnp.where(known, earlier, 1.0), 1.0)
        change = jnp.where(known, losses - last, 0.0)
        if rate == "difference":
            return change
        largest = jnp.max(jnp.abs(change))
        change = joint.in_units_of(jnp.where(largest > 0, largest, 1.0), change)
        return change / jnp.maximum(jnp.sum(jnp.abs(change)), 1.0)

    def update(losses, state, *, mask, statistics_of=None, **_):
        observed = jax.lax.stop_gradient(losses if statistics_of is None else statistics_of)
        usable = base.usable(observed, mask)
        rates = rates_of(observed, state.last_losses, state.seen & usable)
        _, weights = joint.smooth_maximum(beta * rates, 1.0, mask)
        if loss_weighted:
            size = jnp.where(usable, jnp.maximum(observed, 0.0), 0.0)
            largest = jnp.max(size)
            sized = weights * joint.in_units_of(jnp.where(largest > 0, largest, 1.0), size)
            total = jnp.sum(sized)
            weights = jnp.where(total > 0, sized / jnp.where(total > 0, total, 1.0), weights)
        return weights * losses, SoftAdaptState(
            weights=weights,
            last_losses=jnp.where(usable, observed, state.last_losses),
            seen=state.seen | usable,
        )

    return base.loss_transformation(init, update)
