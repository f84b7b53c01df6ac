"""Smooth Tchebycheff scalarisation (STCH), arXiv 2402.19078: a smooth maximum of the losses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.loss_balancing import joint


class STCHState(NamedTuple):
    """State of :func:`stch`."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) the effective weights just used; 1 at first


class STCHNadirState(NamedTuple):
    """State of :func:`stch_nadir`."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) the effective weights just used; 1 at first
    nadir: jax.Array  # (K,) mean loss so far of the nadir period, 0 if none yet
    count: jax.Array  # (K,) int32, losses in that mean


def stch(
    mu: base.Scalar = 1.0,
    *,
    preference: jax.Array | float | optax.Schedule | None = None,
    reference: jax.Array | float | optax.Schedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Minimises a smooth maximum of the preference-weighted distances to a reference point.

    ``objective = μ log Σ_k exp(λ_k (l_k - z_k) / μ)``, with the preference λ and the reference
    point z

    Unlike a weighted sum it reaches every point of the Pareto front, convex or not. Task k's
    effective weight is ``λ_k softmax(λ (l - z) / μ)_k``: not negative, and of sum 1 / K for the
    default preference. Small μ is close to the maximum, large μ to the sum of the losses.

    Any finite loss is legitimate. A non-finite one makes all entries non-finite: wrap in
    :func:`bilb.skip_nonfinite`.

    Args:
        mu: smoothing μ > 0 in the units of λ l; a number, a traced scalar or a schedule of the
            state's ``step``. Default 1, as in LibMTL.
        preference: λ >= 0, one number or (K,), or a schedule of either. None means 1 / K for every
            task (with a mask: one over the number of present tasks), as in TorchJD.
            ``update(losses, state, preference=λ)`` takes precedence.
        reference: z, the ideal point, in the units of the losses, one number or (K,), or a
            schedule of either; default 0.

    Returns:
        A loss transformation whose state has the fields ``step`` and ``weights`` (K,).

    Raises:
        ValueError: for a concrete ``mu`` <= 0, a concrete negative preference, a ``mu`` that is
            not one number, or another shape that is neither () nor (K,).

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.stch(mu=0.01)
        >>> losses = jnp.array([3.0, 1.0])
        >>> balanced, state = balancer.update(losses, balancer.init(losses))
        >>> print(balanced.sum(), state.weights.round(3))
        1.5 [0.5 0. ]

    References:
        Lin et al., *Smooth Tchebycheff Scalarization for Multi-Objective Optimization*,
        arXiv 2402.19078.
    """
    checks.number("mu", mu, minimum=0, exclusive=True, schedule=True)

    def formula(u, preference, step, mask):
        smoothing = base.at_step(mu, step)
        # Divided by the largest preference, no product leaves the dtype's range.
        top = jnp.maximum(jnp.max(preference), 1.0)
        value, softmax = joint.smooth_maximum(preference / top * u, smoothing / top, mask)
        return top * value, preference * softmax

    return joint.scalarization("stch", STCHState, formula, preference, reference)


def stch_nadir(
    mu: base.Scalar = 1.0,
    *,
    nadir_start: int | jax.Array,
    nadir_steps: int | jax.Array,
    floor: float | jax.Array = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Smooth Tchebycheff scalarisation of the log ratios of the losses to their nadir point.

    ``objective = K μ log Σ_k exp(log(l_k / n_k) / μ)``, n the nadir point, the mean losses of an
    early epoch

    The form of the official multi-task code and of LibMTL. During the first ``nadir_start``
    updates the objective is the sum of the logarithms. During the next ``nadir_steps`` it still is,
    and the mean loss of each task is taken as its nadir ``n_k``. The official code, which
    counts epochs, is ``nadir_start=4 * steps_per_epoch, nadir_steps=steps_per_epoch``. It also
    leaves the largest log ratio, held constant, out of the value; ours is the value of the formula,
    and the gradient is the same.

    The effective weights are not negative and ``Σ_k w_k l_k = K``. A task that was absent or
    non-finite takes its ``nadir_steps`` losses later and keeps its own logarithm in the objective
    until then, while K counts the tasks in the smooth maximum. A loss at or below the floor, zero
    and negative ones included, counts as the floor and has weight zero. A non-finite loss enters no
    nadir but makes entries of other tasks non-finite: wrap in :func:`bilb.skip_nonfinite`.

    Args:
        mu: smoothing μ > 0; a number, a traced scalar or a schedule of the state's ``step``.
            Default 1, as in LibMTL; there, all tasks get the weight ``K / Σ_j (l_j / n_j) / n_k``.
        nadir_start: updates before the nadir period, not negative.
        nadir_steps: updates of the nadir period, at least 1.
        floor: positive, in the units of the losses; default as in :func:`bilb.log_losses`.

    Returns:
        A loss transformation whose state has the fields ``step``, ``weights`` (K,), ``nadir`` (K,)
        and ``count`` (K,).

    Raises:
        ValueError: for a concrete ``mu`` or ``floor`` <= 0, ``nadir_start`` < 0 or ``nadir_steps``
            < 1.

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.stch_nadir(nadir_start=0, nadir_steps=1)
        >>> state = balancer.init(jnp.ones(2))
        >>> for losses in ([4.0, 1.0], [12.0, 1.0]):
        ...     balanced, state = balancer.update(jnp.array(losses), state)
        ...     print(np.asarray(state.weights).round(3), state.nadir)
        [0.25 1.  ] [4. 1.]
        [0.125 0.5  ] [4. 1.]

    References:
        Lin et al., *Smooth Tchebycheff Scalarization for Multi-Objective Optimization*,
        arXiv 2402.19078, multi-task experiments of the official code.
    """
    checks.number("mu", mu, minimum=0, exclusive=True, schedule=True)
    checks.number("nadir_start", nadir_start, minimum=0, whole=True)
    checks.number("nadir_steps", nadir_steps, minimum=1, whole=True)
    checks.number("floor", floor, minimum=0, exclusive=True)

    def init(num_tasks, dtype):
        return STCHNadirState(
            step=base.new_step(),
            weights=jnp.ones(num_tasks, dtype),
            nadir=jnp.zeros(num_tasks, dtype),
            count=jnp.zeros(num_tasks, jnp.int32),
        )

    def update(losses, state, *, mask, **_):
        smoothing = base.at_step(mu, state.step)
        present = base.present(losses, mask)
        ready = state.count >= nadir_steps
        joined = present & ready
        num_joined = jnp.sum(joined)
        floored = jax.lax.stop_gradient(base.at_least(losses, floor))
        logarithms = jnp.log(floored)

        ratios = logarithms - jnp.log(jnp.where(ready, state.nadir, 1.0))
        maximum, softmax = joint.smooth_maximum(ratios, smoothing, joined)
        value = num_joined * maximum + jnp.sum(logarithms, where=present & ~ready)
        weights = jnp.where(ready, num_joined * softmax, 1.0) / floored
        weights = jnp.where(losses > floor, weights, 0.0)
        balanced, weights = base.split_over_tasks(value, weights, losses, mask)

        take = base.usable(losses, mask) & ~ready & (state.step >= nadir_start)
        count = state.count + take
        change = jnp.where(take, (floored - state.nadir) / jnp.maximum(count, 1), 0)
        return balanced, STCHNadirState(
            step=optax.safe_increment(state.step),
            weights=weights,
            nadir=state.nadir + change,
            count=count,
        )

    return base.loss_transformation(init, update)
