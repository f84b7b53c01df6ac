"""What ``lr_annealing`` and ``ntk_weights`` share: weights inverse to a size per task."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks, names
from bilb.gradient_balancing import running_mean


class InverseWeightsState(NamedTuple):
    """State of :func:`lr_annealing` and :func:`ntk_weights`."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) the weights just used, a running mean; 1 at first
    mean: running_mean.RunningMean  # (K,) of what is measured


def inverse_weighting(
    name: str,
    each: tuple[str, Callable[[jax.Array], jax.Array]],
    at_times: tuple[str, Callable[[jax.Array], jax.Array]],
    size: Callable[[jax.Array], jax.Array] = lambda mean: mean,
    *,
    momentum: base.Scalar,
    every: int,
    decay: base.Scalar,
    eps: float | jax.Array,
    reference: int | str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes ``w_k = s / (s_k + eps s)`` a loss transformation, s the mean size or a reference's.

    Args:
        name: of the method, for error messages.
        each: the argument that is read at every step, and ``value -> `` what is averaged (K,), not
            negative.
        at_times: the function ``() -> value`` that is read with ``every > 1``, and the same.
        size: ``mean -> s_k``, elementwise.
        momentum: of the running mean of the weights, in [0, 1].
        every: how many steps the weights stay the same; static.
        decay: of the running mean of what is measured, in [0, 1).
        eps: > 0.
        reference: the task whose size is s and whose weight is 1; the mean of all if None; static.

    Returns:
        A loss transformation whose state is an :class:`InverseWeightsState`.
    """
    checks.number("momentum", momentum, minimum=0, maximum=1, schedule=True)
    checks.number("every", every, minimum=1, whole=True, static=True)
    checks.number("eps", eps, minimum=0, exclusive=True)
    running_mean.averages(decay)

    def init(num_tasks, dtype):
        if reference is not None:
            names.index("reference", reference, num_tasks)
        mean = running_mean.start((num_tasks,), dtype)
        return InverseWeightsState(base.new_step(), jnp.ones(num_tasks, dtype), mean)

    shapes = base.shapes_of(init)

    def learn(state, measured, present):
        mean = running_mean.move(state.mean, measured, base.at_step(decay, state.step))
        sizes = size(running_mean.value(mean))
        if reference is None:
            number = jnp.maximum(jnp.sum(present), 1)
            level = jnp.sum(jnp.where(present, sizes / number, 0.0))
        else:
            task = names.index("reference", reference, present.shape[0])
            level = jnp.where(present[task], sizes[task], 0.0)
        divisor = sizes + eps * level
        # Where there is nothing to compare with, the weights stay as they were.
        known = (level > 0) & (divisor > 0)
        weights = jnp.where(known, level / jnp.where(known, divisor, 1.0), state.weights)
        if reference is not None:
            weights = weights.at[task].set(1.0)
        old = base.at_step(momentum, state.step)
        return state._replace(weights=old * state.weights + (1 - old) * weights, mean=mean)

    def balance(losses, state):
        return state.weights * losses, state._replace(step=optax.safe_increment(state.step))

    def update(losses, state, *, mask, **given):
        argument, measure = each
        present = base.present(losses, mask)
        return balance(losses, learn(state, measure(given[argument]), present))

    def update_at_times(losses, state, *, mask, **given):
        argument, measure = at_times

        def renew():
            measured = measure(jnp.asarray(given[argument](), losses.dtype))
            checks.shape(measured, losses.shape, f"{argument} must return an entry per task.")
            present = base.usable(measured, mask)
            measured = jnp.where(present, jax.lax.stop_gradient(measured), 0.0)
            new = learn(state, measured, present)
            return base.keep_absent(present, new, state, lambda k: shapes(k, losses.dtype))

        return balance(losses, jax.lax.cond(state.step % every == 0, renew, lambda: state))

    if every == 1:
        return base.loss_transformation(init, update, reads=(each[0],), name=name)
    return base.loss_transformation(init, update_at_times, reads=(at_times[0],), name=name)
