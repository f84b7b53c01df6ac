"""Penalty-based boundary intersection (PBI), doi 10.1109/TEVC.2007.892759."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.loss_balancing import joint

_SMOOTHING = 1e-6  # its square is under the root, as in TorchJD
_SMALLEST = 1e-18  # of the smoothing relative to the losses; its square is a normal number


class PBIState(NamedTuple):
    """State of :func:`pbi`."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) the effective weights just used, of either sign; 1 at first


def pbi(
    penalty: base.Scalar = 5.0,
    *,
    preference: jax.Array | float | optax.Schedule | None = None,
    reference: jax.Array | float | optax.Schedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Descends along a ray through loss space and penalises the distance from it.

    ``objective = d1 + θ d2``, with the losses seen from a reference point z, ``u = l - z``: their
    length ``d1 = λᵀu / ‖λ‖`` along the preference λ, and their distance ``d2 = ‖u - d1 λ / ‖λ‖‖``
    from the ray along λ

    The solution lies where the ray from the reference point along the preference meets the Pareto
    front: the losses end up in the ratio of the preferences. The effective weight of a task far
    below the ray is negative, its loss may rise; with a penalty of 0 no weight is.

    Any finite loss is legitimate; an objective beyond the dtype's largest number counts as that
    number, and the weights are right all the same. The distance is smoothed by 1e-12 under the
    root. A non-finite loss makes all entries non-finite: wrap in :func:`bilb.skip_nonfinite`.

    Args:
        penalty: θ >= 0; a number, a traced scalar or a schedule of the state's ``step``. Default 5,
            as in the paper's experiments.
        preference: λ >= 0, one number or (K,), or a schedule of either; only its direction
            matters. None means equal losses. ``update(losses, state, preference=λ)`` takes
            precedence.
        reference: z, the ideal point, in the units of the losses, one number or (K,), or a
            schedule of either; default 0.

    Returns:
        A loss transformation whose state has the fields ``step`` and ``weights`` (K,).

    Raises:
        ValueError: for a concrete negative ``penalty`` or preference, a penalty that is not one
            number, or another shape that is neither () nor (K,).

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.pbi(penalty=0.5, preference=jnp.array([1.0, 0.0]))
        >>> losses = jnp.array([2.0, 1.0])
        >>> balanced, state = balancer.update(losses, balancer.init(losses))
        >>> print(balanced.sum(), state.weights)
        2.5 [1.  0.5]

    References:
        Zhang and Li, *MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition*,
        IEEE Transactions on Evolutionary Computation 11(6), 2007.
    """
    checks.number("penalty", penalty, minimum=0, schedule=True)

    def formula(u, preference, step, mask):
        del mask
        theta = base.at_step(penalty, step)
        ray = joint.direction(preference)
        # In units of the largest distance no square leaves the dtype's range.
        size = jnp.maximum(jnp.max(jnp.abs(u)), _SMOOTHING)
        smoothing = jnp.maximum(_SMOOTHING / size, _SMALLEST)

        def objective(u):
            d1 = jnp.sum(ray * u)
            d2 = jnp.sqrt(jnp.sum((u - d1 * ray) ** 2) + smoothing**2)
            return d1 + theta * d2

        value, weights = jax.value_and_grad(objective)(joint.in_units_of(size, u))
        return size * value, weights

    return joint.scalarization("pbi", PBIState, formula, preference, reference)
