"""Penalty-based boundary intersection (PBI), doi 10.1109/TEVC.2007.892759.

``objective = d1 + θ d2``, with the losses seen from a reference point z, ``u = l - z``: their
length ``d1 = λᵀu / ‖λ‖`` along the preference λ, and their distance ``d2 = ‖u - d1 λ / ‖λ‖‖`` from
the ray along λ
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base

_SMOOTHING = 1e-12  # under the root, as in TorchJD


class PBIState(NamedTuple):
    """State of :func:`pbi`."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) the effective weights just used, of either sign; 1 at first


def pbi(
    penalty: base.Scalar = 5.0,
    *,
    preference: jax.Array | float | None = None,
    reference: jax.Array | float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Descends along a ray through loss space and penalises the distance from it.

    The solution lies where the ray from the reference point along the preference meets the Pareto
    front: the losses end up in the ratio of the preferences. The effective weight of a task far
    below the ray is negative, its loss may rise; with a penalty of 0 no weight is.

    Any finite loss is legitimate. The distance is smoothed by 1e-12 under the root. A non-finite
    loss makes all entries non-finite: wrap in :func:`bilb.skip_nonfinite`.

    Args:
        penalty: θ >= 0; a number, a traced scalar or a schedule of the state's ``step``. Default 5,
            as in the paper's experiments.
        preference: λ >= 0, one number or (K,); only its direction matters. None means equal losses.
        reference: z, the ideal point, in the units of the losses, one number or (K,); default 0.

    Returns:
        A loss transformation whose state has the fields ``step`` and ``weights`` (K,).

    Raises:
        ValueError: for a concrete negative ``penalty`` or preference, or a shape that is neither ()
            nor (K,).

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
    base.check_number("penalty", penalty, minimum=0)
    base.check_number("preference", preference, minimum=0)
    base.check_number("reference", reference)
    preference = 1.0 if preference is None else preference

    def init(num_tasks, dtype):
        base.check_per_task("preference", preference, num_tasks)
        base.check_per_task("reference", reference, num_tasks)
        return PBIState(base.new_step(), jnp.ones(num_tasks, dtype))

    def update(losses, state, *, mask, **_):
        theta = base.at_step(penalty, state.step)
        present = base.present(losses, mask)
        lamb = jnp.where(present, preference, 0.0).astype(losses.dtype)
        length = jnp.linalg.norm(lamb)
        ray = lamb / jnp.where(length == 0, 1.0, length)

        def objective(losses):
            u = jnp.where(present, losses - reference, 0.0)
            d1 = jnp.sum(ray * u)
            d2 = jnp.sqrt(jnp.sum((u - d1 * ray) ** 2) + _SMOOTHING)
            return d1 + theta * d2

        value, weights = jax.value_and_grad(objective)(jax.lax.stop_gradient(losses))
        balanced, weights = base.split_over_tasks(value, weights, losses, mask)
        return balanced, PBIState(optax.safe_increment(state.step), weights)

    return base.loss_transformation(init, update)
