"""COSMOS, arXiv 2103.13392: a weighted sum that rewards losses parallel to the preference."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.loss_balancing import joint

_SMALLEST_NORM = 1e-8


class COSMOSState(NamedTuple):
    """State of :func:`cosmos`."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) the effective weights just used, of either sign; 1 at first


def cosmos(
    penalty: base.Scalar, *, preference: jax.Array | float | optax.Schedule | None = None
) -> optax.GradientTransformationExtraArgs:
    """Minimises a weighted sum of the losses minus the cosine between losses and preference.

    ``objective = rᵀl - λ cos(r, l)`` with the preference r

    In the paper one model serves all trade-offs: each step draws a preference from a Dirichlet
    distribution, hands it to the model as an input and to the loss. Give such a preference to
    ``update(losses, state, preference=r)``, which takes precedence over the constructor's.

    The effective weights are ``r - λ ∂cos/∂l``; they sum to no fixed number, and where λ is large
    against the losses that of a task whose share is below its preference is negative. Any finite
    loss is legitimate; an objective beyond the dtype's largest number counts as that number, and
    the weights are right all the same. A loss vector shorter than 1e-8 has its length taken as 1e-8
    in the cosine. A non-finite loss makes all entries non-finite: wrap in
    :func:`bilb.skip_nonfinite`.

    Args:
        penalty: λ >= 0, in the units of the losses; a number, a traced scalar or a schedule of the
            state's ``step``. No default: the paper tunes it per data set.
        preference: r >= 0, one number or (K,), or a schedule of either. None means 1 / K for every
            task (with a mask: one over the number of present tasks).

    Returns:
        A loss transformation whose state has the fields ``step`` and ``weights`` (K,).

    Raises:
        ValueError: for a concrete negative ``penalty`` or preference, a penalty that is not one
            number, or a preference that is neither a number nor (K,).

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.cosmos(penalty=5.0, preference=jnp.array([3.0, 4.0]))
        >>> losses = jnp.array([3.0, 4.0])
        >>> balanced, state = balancer.update(losses, balancer.init(losses))
        >>> print(balanced.sum(), state.weights)
        20.0 [3. 4.]

    References:
        Ruchte and Grabocka, *Scalable Pareto Front Approximation for Deep Multi-Objective
        Learning*, arXiv 2103.13392.
    """
    checks.number("penalty", penalty, minimum=0, schedule=True)

    def formula(losses, preference, step, mask):
        del mask
        lamb = base.at_step(penalty, step)
        ray = joint.direction(preference)
        # In units of the largest loss no square leaves the dtype's range; cos knows no units.
        size = jnp.maximum(jnp.max(jnp.abs(losses)), _SMALLEST_NORM)

        def cosine(losses):
            squares = jnp.sum(losses**2)
            smallest = (_SMALLEST_NORM / size) ** 2
            return jnp.sum(ray * losses) / jnp.sqrt(
                jnp.where(squares > smallest, squares, smallest)
            )

        scaled = joint.in_units_of(size, losses)
        cos, slope = jax.value_and_grad(cosine)(scaled)
        value = size * jnp.sum(preference * scaled) - lamb * cos
        return value, preference - lamb * (slope / size)

    return joint.scalarization("cosmos", COSMOSState, formula, preference)
