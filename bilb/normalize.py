"""Losses to losses: normalisations and guards, links to put in front of a method.

``bilb.chain(bilb.log_losses(), bilb.bilb4mtl())`` means "bilb4mtl of the logarithms". Every link
preserves shape and dtype, computes in float32 at least, and returns 0 for masked tasks.

A non-finite loss passes through the links of this file to its own entry only, and never enters a
statistic; wrap the method in :func:`skip_nonfinite` to treat it as absent.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import arguments, asking, base, checks
from bilb.chain import Collective


class InitialLossState(NamedTuple):
    """State of :func:`scale_by_initial_loss` and :func:`scale_by_initial_ratio`."""

    initial_losses: jax.Array  # (K,), 0 where none was taken yet


class LogScaleByInitialLossState(NamedTuple):
    """State of :func:`log_scale_by_initial_loss`."""

    step: jax.Array  # () int32
    taken: jax.Array  # (K,) int32, the step at which the entry below was taken, -1 if none yet
    initial_losses: jax.Array  # (K,), 1 where none was taken yet


def divide_by(scales: jax.Array | float) -> optax.GradientTransformationExtraArgs:
    """Divides the losses by known scales: ``l / scales``.

    Args:
        scales: one positive number, or (K,) of them, in the units of the losses.

    Returns:
        A stateless loss transformation.

    Raises:
        ValueError: if a concrete scale is not positive, or the shape is neither () nor (K,).

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> link = bilb.divide_by(jnp.array([10.0, 0.5]))
        >>> losses = jnp.array([5.0, 1.0])
        >>> balanced, _ = link.update(losses, link.init(losses))
        >>> print(balanced)
        [0.5 2. ]
    """
    checks.number("scales", scales, minimum=0, exclusive=True, per_task=True)

    def init(num_tasks, dtype):
        del dtype
        checks.per_task("scales", scales, num_tasks)
        return optax.EmptyState()

    def update(losses, state, **_):
        return losses / checks.per_task("scales", scales, losses.shape[0]), state

    return base.loss_transformation(init, update)


def scale_by_initial_loss() -> optax.GradientTransformationExtraArgs:
    """Divides each loss by the magnitude of its initial value: ``l / |l0|``.

    The initial loss l0 of a task is its loss at the first update where the task is present and the
    loss is finite and not zero; until then the loss passes unscaled. The magnitude keeps the sign
    of losses that may be negative, such as log-likelihoods.

    Returns:
        A loss transformation whose state has the field ``initial_losses`` (K,), 0 where none was
        taken yet.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> link = bilb.scale_by_initial_loss()
        >>> state = link.init(jnp.array([4.0, 0.5]))
        >>> _, state = link.update(jnp.array([4.0, 0.5]), state)
        >>> balanced, state = link.update(jnp.array([2.0, 0.5]), state)
        >>> print(balanced, state.initial_losses)
        [0.5 1. ] [4.  0.5]

    References:
        Xiao et al., *Scalable Bilevel Loss Balancing for Multi-Task Learning*,
        arXiv 2502.08585, "initial loss normalisation".
    """

    def update(losses, state, *, mask, statistics_of=None, **_):
        initial = _take_initial(losses, state.initial_losses, mask, statistics_of)
        scale = jnp.where(initial == 0, 1.0, jnp.abs(initial))
        return losses / scale, InitialLossState(initial)

    return base.loss_transformation(_init_initial, update)


def scale_by_initial_ratio() -> optax.GradientTransformationExtraArgs:
    """Divides by the ratio of initial losses: ``l / r`` with ``r = |l0| / min |l0|``.

    The "rescaled" normalisation of the NYU-v2 experiment of the BiLB4MTL paper. Initial losses are
    taken as in :func:`scale_by_initial_loss`; the minimum is over the tasks that have one.

    Returns:
        A loss transformation whose state has the field ``initial_losses`` (K,), 0 where none was
        taken yet.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> link = bilb.scale_by_initial_ratio()
        >>> losses = jnp.array([4.0, 0.5])
        >>> balanced, _ = link.update(losses, link.init(losses))
        >>> print(balanced)
        [0.5 0.5]

    References:
        Xiao et al., arXiv 2502.08585, NYU-v2 experiment of the official code.
    """

    def update(losses, state, *, mask, statistics_of=None, **_):
        initial = _take_initial(losses, state.initial_losses, mask, statistics_of)
        magnitude = jnp.abs(initial)
        smallest = jnp.min(magnitude, where=initial != 0, initial=jnp.inf)
        known = initial != 0
        scale, smallest = jnp.where(known, magnitude, 1.0), jnp.where(known, smallest, 1.0)
        factor = smallest / scale
        # Where the factor is below the smallest number, the quotient that it scales is not.
        tiny = jnp.finfo(losses.dtype).tiny
        scaled = jnp.where(factor > tiny, losses * factor, losses / scale * smallest)
        return scaled, InitialLossState(initial)

    return base.loss_transformation(_init_initial, update)


def log_losses(floor: float | jax.Array = 1e-8) -> optax.GradientTransformationExtraArgs:
    """Takes the logarithm of the losses: ``log(max(l, floor))``.

    The sum of the result is the scale-invariant baseline (SI): each task's gradient is divided by
    its loss. A loss at or below the floor, zero and negative ones included, gives ``log(floor)``
    and no gradient: without a floor one vanishing loss would get an unbounded weight. Computed in
    float32 at least.

    Where a loss can reach zero while others do not, such as the residual of a differential equation
    at the trivial solution, the log rewards that without bound and training collapses onto it. Use
    :func:`bilb.presets.marigold_pinn` or :func:`bilb.presets.nash_pinn` there, which balance roots
    of the losses.

    Args:
        floor: positive, in the units of the losses (default 1e-8, as FAMO's and LibMTL's epsilon).

    Returns:
        A stateless loss transformation.

    Raises:
        ValueError: if ``floor`` is a concrete number that is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, bilb
        >>> link = bilb.log_losses()
        >>> objective = lambda losses: link.update(losses, link.init(losses))[0].sum()
        >>> print(jax.grad(objective)(jnp.array([4.0, 0.5])))
        [0.25 2.  ]
    """
    checks.number("floor", floor, minimum=0, exclusive=True)

    def init(num_tasks, dtype):
        del num_tasks, dtype
        return optax.EmptyState()

    def update(losses, state, **_):
        return jnp.log(base.at_least(losses, floor)), state

    return base.loss_transformation(init, update)


def power_losses(
    exponent: float | jax.Array = 0.5, floor: float | jax.Array = 1e-30
) -> optax.GradientTransformationExtraArgs:
    """Takes a power of the losses: ``max(l, floor) ** exponent``, by default the root.

    Between the losses themselves (exponent 1) and, up to scale and shift, their logarithms
    (exponent to 0). For a mean of squared residuals, ``l = ‖r‖² / N`` with Jacobian J, the gradient
    of the root is ``Jᵀ r / (‖r‖ √N)``, of a length that J sets, however small the loss: that of the
    loss itself vanishes as √l, and that of its logarithm grows as 1 / √l. So a gradient-balancing
    method behind this link sees task gradients of a steady size. The root alone does not balance:
    chain a method behind it, or take :func:`bilb.presets.marigold_pinn`.

    A loss at or below the floor, zero and negative ones included, gives ``floor ** exponent`` and
    no gradient, and counts as absent for methods behind that read derivatives
    (:func:`bilb.chain`). The default is far below what rounding leaves of a squared residual, so
    that in practice only a loss of exactly zero is there. The gradient of a root does not vanish
    where a task is solved: let the learning rate decay. Computed in float32 at least.

    Args:
        exponent: p > 0.
        floor: positive, in the units of the losses.

    Returns:
        A stateless loss transformation.

    Raises:
        ValueError: if ``exponent`` or ``floor`` is a concrete number that is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, bilb
        >>> link = bilb.power_losses()
        >>> objective = lambda losses: link.update(losses, link.init(losses))[0].sum()
        >>> print(jax.grad(objective)(jnp.array([4.0, 0.25, 0.0])))
        [0.25 1.   0.  ]
    """
    checks.number("exponent", exponent, minimum=0, exclusive=True)
    checks.number("floor", floor, minimum=0, exclusive=True)

    def init(num_tasks, dtype):
        del num_tasks, dtype
        return optax.EmptyState()

    def update(losses, state, **_):
        return base.at_least(losses, floor) ** exponent, state

    return base.loss_transformation(init, update)


def log_scale_by_initial_loss(
    every: int | jax.Array | None = None, floor: float | jax.Array = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Takes the logarithm relative to the initial losses: ``log(max(l, floor) / l0)``.

    The initial loss l0 = max(l, floor) of a task is taken at the first update where the task is
    present and its loss finite, and anew at the first such update of each period of ``every``
    updates, counted from the first update. The official code renews it every epoch. Losses at or
    below the floor behave as in :func:`log_losses`. A task without l0 so far uses l0 = 1.

    Args:
        every: updates per period, at least 1 (steps per epoch, usually); None never renews.
        floor: positive, in the units of the losses.

    Returns:
        A loss transformation whose state has the fields ``step``, ``taken`` and
        ``initial_losses`` (K,).

    Raises:
        ValueError: if ``every`` < 1 or ``floor`` <= 0, when they are concrete numbers.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> link = bilb.log_scale_by_initial_loss(every=2)
        >>> state = link.init(jnp.ones(2))
        >>> for losses in ([4.0, 1.0], [2.0, 1.0], [2.0, 0.5]):
        ...     balanced, state = link.update(jnp.array(losses), state)
        ...     print(balanced, state.initial_losses)
        [0. 0.] [4. 1.]
        [-0.6931472  0.       ] [4. 1.]
        [0. 0.] [2.  0.5]

    References:
        Xiao et al., arXiv 2502.08585, QM9 experiment of the official code.
    """
    checks.number("every", every, minimum=1, whole=True, optional=True)
    checks.number("floor", floor, minimum=0, exclusive=True)

    def init(num_tasks, dtype):
        return LogScaleByInitialLossState(
            base.new_step(), jnp.full(num_tasks, -1, jnp.int32), jnp.ones(num_tasks, dtype)
        )

    def update(losses, state, *, mask, statistics_of=None, **_):
        floored = base.at_least(losses, floor)
        taken_from = floored if statistics_of is None else base.at_least(statistics_of, floor)
        stale = state.taken < 0
        if every is not None:
            stale |= state.taken // every < state.step // every
        take = stale & base.usable(taken_from, mask)
        initial = jnp.where(take, jax.lax.stop_gradient(taken_from), state.initial_losses)
        taken = jnp.where(take, state.step, state.taken)
        step = optax.safe_increment(state.step)
        # The quotient of a large and a small number may be beyond the dtype's range.
        return jnp.log(floored) - jnp.log(initial), LogScaleByInitialLossState(step, taken, initial)

    return base.loss_transformation(init, update)


def pmean_losses(axis_name: str | tuple[str, ...]) -> optax.GradientTransformationExtraArgs:
    """Averages the losses over the devices of a mapped axis, so that all weigh tasks alike.

    Needed where each device computes the losses of its own shard by hand, in ``jax.shard_map`` or
    ``jax.pmap``: without it every device would get its own weights. Under ``jit`` with sharded
    arrays the losses are global already and this link is not used. Costs one all-reduce of K
    numbers. A task is averaged over the devices on which it is present and, inside
    :func:`skip_nonfinite`, its loss is finite; the links behind it in a :func:`bilb.chain` take a
    task that is present on any device for present, so that all devices keep the same state. (Under
    ``optax.chain`` the mask must be the same on all devices.)

    Methods that read slopes or gradients need the mean inside ``task_losses`` instead, so that the
    model's derivatives are averaged as well, and :func:`bilb.value_and_grad` must be told of the
    axis where ``jax.shard_map`` does not average gradients itself (``check_vma=False``), or
    ``jax.pmap`` is used: ``axis_name=``.

    Args:
        axis_name: name of the mapped axis, or a tuple of names.

    Returns:
        A stateless loss transformation.

    Example:
        >>> import jax, jax.numpy as jnp, bilb
        >>> link = bilb.pmean_losses("data")
        >>> update = lambda losses: link.update(losses, link.init(losses))[0]
        >>> print(jax.vmap(update, axis_name="data")(jnp.array([[1.0, 4.0], [3.0, 0.0]])))
        [[2. 2.]
         [2. 2.]]
    """

    def init_fn(losses):
        checks.losses(losses)
        return optax.EmptyState()

    def update_fn(losses, /, state, params=None, *, mask=None, **extra):
        del params
        num_tasks, dtype = checks.losses(losses)
        arguments.note(("mask",))
        arguments.refuse(extra, "pmean_losses")
        losses = jnp.asarray(losses, base.at_least_float32(dtype))
        present = base.present(losses, None if mask is None else checks.mask(mask, num_tasks))
        try:
            total, count = jax.lax.psum((jnp.where(present, losses, 0.0), present * 1), axis_name)
        except NameError as error:
            raise arguments.UnboundAxis(
                f"pmean_losses({axis_name!r}) averages over a mapped axis: call it inside "
                f"jax.shard_map or jax.pmap with that axis ({error})."
            ) from error
        return (total / jnp.maximum(count, 1)).astype(dtype), state

    link = Collective(init_fn, update_fn)
    link.axis_name = axis_name
    return link


def skip_nonfinite(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Treats a non-finite loss as an absent task, for every link inside.

    The balanced loss of such a task is 0 and its entries of the state stay as they were; the other
    tasks are weighed and learn as usual, so balanced losses and state stay finite. This cannot make
    the model's own NaN gradient finite (0 times NaN is NaN): guard the optimiser with
    ``optax.apply_if_finite`` where that may happen.

    Args:
        inner: a loss transformation or a chain of them.

    Returns:
        A loss transformation with the state of ``inner``.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.skip_nonfinite(bilb.linear_scalarization())
        >>> losses = jnp.array([1.0, jnp.nan, 3.0])
        >>> balanced, _ = balancer.update(losses, balancer.init(losses))
        >>> print(balanced)
        [1. 0. 3.]
    """
    inner = asking.as_link(inner)

    def init_fn(losses):
        num_tasks, dtype = checks.losses(losses)
        return inner.init(jnp.zeros(num_tasks, dtype))

    def update_fn(losses, /, state, params=None, *, mask=None, **extra):
        num_tasks, _ = checks.losses(losses)
        arguments.note(("mask",))
        losses = jnp.asarray(losses)
        mask = None if mask is None else checks.mask(mask, num_tasks)
        present = base.usable(losses, mask)
        finite = jnp.where(present, losses, 1.0).astype(losses.dtype)
        balanced, state = inner.update(finite, state, params, mask=present, **extra)
        if any(isinstance(link, Collective) for link in getattr(inner, "links", ())):
            # What is absent here may be present on another device.
            return balanced, state
        return jnp.where(present, balanced, 0.0).astype(balanced.dtype), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _init_initial(num_tasks, dtype):
    return InitialLossState(jnp.zeros(num_tasks, dtype))


def _take_initial(losses, initial, mask, statistics_of):
    """Takes the losses where none were taken yet, or those whose statistics are asked for."""
    losses = losses if statistics_of is None else statistics_of
    take = (initial == 0) & base.usable(losses, mask)
    return jnp.where(take, jax.lax.stop_gradient(losses), initial)
