"""Dynamic weight average (DWA), arXiv 1803.10704: more weight to losses that fall slowly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.loss_balancing import joint


class DWAState(NamedTuple):
    """State of :func:`dwa` with windows that follow one another."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) the weights just used; equal at first
    window_index: jax.Array  # (K,) int32, the window of the running mean
    count: jax.Array  # (K,) int32, losses in the running mean
    running_mean: jax.Array  # (K,) of the current window
    last_mean: jax.Array  # (K,) of the last complete window, 0 if none yet
    earlier_mean: jax.Array  # (K,) of the complete window before it, 0 if none yet


class SlidingDWAState(NamedTuple):
    """State of :func:`dwa` with sliding windows."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) the weights just used; equal at first
    recent_losses: jax.Array  # (2 * window, K), oldest first, 1 at first


def dwa(
    temperature: base.Scalar = 2.0,
    *,
    window: int | jax.Array,
    sliding: bool = False,
    sum_to: Literal["tasks", "one"] = "tasks",
    transform: Callable[[jax.Array], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Weighs the losses by how slowly they fell from one window of updates to the next.

    ``objective = Σ_k w_k l_k`` with ``w = K softmax(r / T)``, where ``r_k`` is task k's mean loss
    over the last window of updates divided by that over the window before.

    Two kinds of window are in use. They follow one another (default): with ``window`` the number of
    updates per epoch this is the paper's method, as in LibMTL and TorchJD, and the weights are 1
    during the first two windows. Or they slide along with every update (``sliding=True``): the
    code of Nash-MTL, FAMO and IGB with ``window=25``, which counts losses before the first as 1
    and starts to weigh after ``window + 1`` updates.

    The weights are not negative. They sum to K, or to 1 with ``sum_to="one"`` (with a mask: to
    the number of present tasks, or 1). A task's windows hold its losses at the updates where it
    was present and finite. The ratio of a task is 1 until it has two windows, and where the mean
    of the earlier one is zero. Losses must be positive for the ratio to measure progress. A
    non-finite loss stays in its own entry and enters no mean.

    Args:
        temperature: T > 0, larger for more equal weights; a number, a traced scalar or a schedule
            of the state's ``step``. Default 2, as in all official code.
        window: number of updates in a window, at least 1; static if the windows slide.
        sliding: whether the windows slide; static.
        sum_to: "tasks" for weights of sum K (the paper) or "one" for weights of sum 1 (Nash-MTL and
            FAMO code); static.
        transform: elementwise function of the losses, which is weighed in their place while the
            ratios stay those of the losses; None leaves them. ``jnp.log`` is IGB's logarithmic DWA.

    Returns:
        A loss transformation whose state has the fields ``step``, ``weights`` (K,) and the means,
        or the recent losses, of the windows. ``transform``, ``sliding`` and ``sum_to`` are
        static in ``optax.inject_hyperparams``, and so is ``window`` if the windows slide.

    Raises:
        ValueError: for a concrete ``temperature`` <= 0 or ``window`` < 1, arrays in their place, an
            unknown ``sum_to``, or a ``transform`` that does not return (K,).

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.dwa(window=1)
        >>> state = balancer.init(jnp.ones(2))
        >>> for losses in ([4.0, 1.0], [2.0, 1.0], [1.0, 1.0]):
        ...     balanced, state = balancer.update(jnp.array(losses), state)
        ...     print(np.asarray(state.weights).round(3))
        [1. 1.]
        [1. 1.]
        [0.876 1.124]

    References:
        Liu et al., *End-to-End Multi-Task Learning with Attention*, arXiv 1803.10704.
    """
    checks.number("temperature", temperature, minimum=0, exclusive=True, schedule=True)
    checks.flag("sliding", sliding)
    checks.number("window", window, minimum=1, whole=True, static=sliding)
    if transform is not None:
        checks.function("transform", transform)
    if sum_to not in ("one", "tasks"):
        raise ValueError(f'sum_to must be "one" or "tasks"; got {sum_to!r}.')

    observe = _observe_sliding if sliding else _observe

    def init(num_tasks, dtype):
        weights = jnp.full(num_tasks, 1.0 if sum_to == "tasks" else 1.0 / num_tasks, dtype)
        return (_start_sliding if sliding else _start)(weights, window)

    def update(losses, state, *, mask, **_):
        later, earlier, known, state = observe(state, losses, base.usable(losses, mask), window)
        ratio = jnp.where(known & (earlier != 0), later / jnp.where(earlier == 0, 1, earlier), 1.0)
        total = base.num_present(losses, mask) if sum_to == "tasks" else 1
        smoothing = base.at_step(temperature, state.step)
        weights = total * joint.smooth_maximum(ratio, smoothing, mask)[1]
        step = optax.safe_increment(state.step)
        return weights * weighed(losses), state._replace(step=step, weights=weights)

    def weighed(losses):
        if transform is None:
            return losses
        values = transform(losses)
        checks.shape(values, losses.shape, "transform must return an entry per task.")
        return values

    return base.loss_transformation(init, update)


def _start(weights, window):
    """Returns the first state of windows that follow one another."""
    del window
    zeros = lambda dtype=weights.dtype: jnp.zeros(weights.shape, dtype)
    return DWAState(
        step=base.new_step(),
        weights=weights,
        window_index=zeros(jnp.int32),
        count=zeros(jnp.int32),
        running_mean=zeros(),
        last_mean=zeros(),
        earlier_mean=zeros(),
    )


def _observe(state, losses, usable, window):
    """Returns the means of the last window and of that before, whether there are, and the state."""
    values = jax.lax.stop_gradient(losses)
    index = state.step // window
    # The first loss of a new window closes the task's last one.
    closes = usable & (state.window_index < index) & (state.count > 0)
    last = jnp.where(closes, state.running_mean, state.last_mean)
    earlier = jnp.where(closes, state.last_mean, state.earlier_mean)
    count = jnp.where(closes, 0, state.count) + usable
    mean = jnp.where(closes, 0, state.running_mean)
    return (
        last,
        earlier,
        True,
        state._replace(
            window_index=jnp.where(usable, index, state.window_index),
            count=count,
            running_mean=mean + jnp.where(usable, (values - mean) / jnp.maximum(count, 1), 0),
            last_mean=last,
            earlier_mean=earlier,
        ),
    )


def _start_sliding(weights, window):
    """Returns the first state of sliding windows."""
    recent_losses = jnp.ones((2 * window, *weights.shape), weights.dtype)
    return SlidingDWAState(base.new_step(), weights, recent_losses)


def _observe_sliding(state, losses, usable, window):
    """As :func:`_observe`, where the windows slide."""
    values = jax.lax.stop_gradient(losses)
    shifted = jnp.concatenate([state.recent_losses[1:], values[None]])
    recent = jnp.where(usable, shifted, state.recent_losses)
    # Divided first, as a sum of large losses may not be finite.
    earlier, later = (recent / window).reshape(2, window, -1).sum(axis=1)
    return later, earlier, state.step > window, state._replace(recent_losses=recent)
