"""COSMOS, arXiv 2103.12718: a weighted sum that rewards losses parallel to the preference.

``objective = rᵀl - λ cos(r, l)`` with the preference r
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base

_SMALLEST_NORM = 1e-8


class COSMOSState(NamedTuple):
    """State of :func:`cosmos`."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) the effective weights just used, of either sign; 1 at first


def cosmos(
    penalty: base.Scalar, *, preference: jax.Array | float | None = None
) -> optax.GradientTransformationExtraArgs:
    """Minimises a weighted sum of the losses minus the cosine between losses and preference.

    In the paper one model serves all trade-offs: each step draws a preference from a Dirichlet
    distribution, hands it to the model as an input and to the loss. Give such a preference to
    ``update(losses, state, preference=r)``, which takes precedence over the constructor's.

    The effective weights are ``r - λ ∂cos/∂l``; they sum to no fixed number, and where λ is large
    against the losses that of a task whose share is below its preference is negative. Any finite
    loss is legitimate. A loss vector shorter than 1e-8 has its length taken as 1e-8 in the cosine.
    A non-finite loss makes all entries non-finite: wrap in :func:`bilb.skip_nonfinite`.

    Args:
        penalty: λ >= 0, in the units of the losses; a number, a traced scalar or a schedule of the
            state's ``step``. No default: the paper tunes it per data set.
        preference: r >= 0, one number or (K,). None means 1 / K for every task (with a mask: one
            over the number of present tasks).

    Returns:
        A loss transformation whose state has the fields ``step`` and ``weights`` (K,).

    Raises:
        ValueError: for a concrete negative ``penalty`` or preference, or a preference that is
            neither a number nor (K,).

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.cosmos(penalty=5.0, preference=jnp.array([3.0, 4.0]))
        >>> losses = jnp.array([3.0, 4.0])
        >>> balanced, state = balancer.update(losses, balancer.init(losses))
        >>> print(balanced.sum(), state.weights)
        20.0 [3. 4.]

    References:
        Ruchte and Grabocka, *Scalable Pareto Front Approximation for Deep Multi-Objective
        Learning*, arXiv 2103.12718.
    """
    base.check_number("penalty", penalty, minimum=0)
    base.check_number("preference", preference, minimum=0)
    default = preference

    def init(num_tasks, dtype):
        base.check_per_task("preference", 1.0 if default is None else default, num_tasks)
        return COSMOSState(base.new_step(), jnp.ones(num_tasks, dtype))

    def update(losses, state, *, mask, preference=None, **_):
        lamb = base.at_step(penalty, state.step)
        if preference is None:
            equal = 1.0 / base.num_present(losses, mask)
            preference = equal if default is None else default
        r = base.check_per_task("preference", preference, losses.shape[0])
        r = jnp.where(base.present(losses, mask), r, 0.0).astype(losses.dtype)

        def objective(losses):
            product = jnp.sum(r * losses)
            return product - lamb * product / (_norm(r) * _norm(losses))

        def _norm(vector):
            squares = jnp.sum(vector**2, where=mask)
            smallest = _SMALLEST_NORM**2
            return jnp.sqrt(jnp.where(squares > smallest, squares, smallest))

        value, weights = jax.value_and_grad(objective)(jax.lax.stop_gradient(losses))
        balanced, weights = base.split_over_tasks(value, weights, losses, mask)
        return balanced, COSMOSState(optax.safe_increment(state.step), weights)

    return base.loss_transformation(init, update)
