"""Base losses: the mean loss of every task over one window of updates, which measures its gap.

Updates count from 0. The window is updates ``start ... start + steps - 1``; update
``start + steps`` is the first that knows the base losses. A task counts where it is present and its
loss is finite. One that never was in the window takes its first such loss after it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilb import checks


class BaseLosses(NamedTuple):
    """Running means over the window.

    Attributes:
        mean: (K,), 0 where there is none yet.
        count: (K,) int32, the losses in the mean.
    """

    mean: jax.Array
    count: jax.Array


def check(start: Any, steps: Any) -> None:
    """Raises ValueError for a window that begins before update 0 or has no update."""
    checks.number("base_start", start, minimum=0, whole=True)
    checks.number("base_steps", steps, minimum=1, whole=True)


def init(num_tasks: int, dtype: Any) -> BaseLosses:
    """Returns means of nothing."""
    return BaseLosses(jnp.zeros(num_tasks, dtype), jnp.zeros(num_tasks, jnp.int32))


def observe(
    state: BaseLosses, losses: jax.Array, usable: jax.Array, step: jax.Array, start: Any, steps: Any
) -> tuple[BaseLosses, jax.Array]:
    """Returns the means with the losses of update ``step`` and whether they are known now.

    Args:
        state: the means so far.
        losses: (K,).
        usable: (K,) bool, the tasks that are present with a finite loss.
        step: () int32, the number of this update.
        start: first update of the window.
        steps: updates in the window.
    """
    known = step >= start + steps
    take = usable & (step >= start) & (~known | (state.count == 0))
    count = state.count + take
    shift = (jax.lax.stop_gradient(losses) - state.mean) / jnp.maximum(count, 1)
    return BaseLosses(state.mean + jnp.where(take, shift, 0), count), known


def relative(losses: jax.Array, base_losses: jax.Array, floor: Any) -> jax.Array:
    """Returns ``l / max(l^b, floor)`` (K,), within the range of the dtype.

    A quotient beyond the largest number counts as that number: a softmax of infinities is NaN.
    """
    largest = jnp.finfo(losses.dtype).max
    return jnp.clip(losses / jnp.maximum(base_losses, floor), -largest, largest)
