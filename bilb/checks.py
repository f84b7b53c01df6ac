"""Checks of what callers give: each raises an error that names the value and the fix."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


def losses(losses: Any) -> tuple[int, np.dtype]:
    """Returns K and the dtype of a stacked loss vector, or says what is wrong with it."""
    if not hasattr(losses, "dtype"):
        losses = jnp.asarray(losses)
    if losses.ndim != 1 or losses.shape[0] == 0:
        raise ValueError(
            "losses must be one vector with an entry per task, shape (K,) with K >= 1; got shape "
            f"{losses.shape}. Stack the task losses with jnp.stack([...])."
        )
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(f"losses must be floating point; got dtype {losses.dtype}.")
    return losses.shape[0], jax.dtypes.canonicalize_dtype(losses.dtype)


def number(
    name: str,
    value: Any,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    exclusive: bool = False,
    per_task: bool = False,
    schedule: bool = False,
) -> None:
    """Raises for a hyperparameter that is not what its method takes, or is outside its range.

    Args:
        name: of the hyperparameter, for the message.
        value: a number or an array; the range is checked where it is concrete, and tracers pass.
            None passes.
        minimum: the smallest value, none if None.
        maximum: the largest value, none if None.
        exclusive: whether the bounds are outside the range.
        per_task: whether it may be an array with an entry per task, whose length
            :func:`per_task` checks; otherwise it is one number.
        schedule: whether it may be a schedule of the method's step counter.

    Raises:
        TypeError: for what is no number, and for a schedule that the method cannot evaluate.
        ValueError: for a value outside the range, or an array in the place of one number.
    """
    if value is None or (callable(value) and schedule):
        return
    if callable(value):
        raise TypeError(
            f"{name} takes no schedule; got {value!r}. Give a number or an array, or wrap the "
            f"method: optax.inject_hyperparams(method)({name}=schedule)."
        )
    if not isinstance(value, jax.core.Tracer):
        value = np.asarray(value)
        if value.dtype.kind not in "fiu" and not jnp.issubdtype(value.dtype, jnp.floating):
            kinds = "a number, a traced array or a schedule" if schedule else "a number"
            raise TypeError(f"{name} must be {kinds}; got {value!r}.")
    if not per_task:
        shape(value, (), f"{name} must be one number.")
    if isinstance(value, jax.core.Tracer):
        return
    value = value.astype(np.float64)
    below = minimum is not None and (value <= minimum if exclusive else value < minimum).any()
    above = maximum is not None and (value >= maximum if exclusive else value > maximum).any()
    if below or above or np.isnan(value).any():
        relation = ("> ", "< ") if exclusive else (">= ", "<= ")
        bounds = [r + str(b) for r, b in zip(relation, (minimum, maximum)) if b is not None]
        raise ValueError(f"{name} must be {' and '.join(bounds) or 'a number'}; got {value}.")


def per_task(name: str, value: Any, num_tasks: int, step: jax.Array | None = None) -> jax.Array:
    """Returns a hyperparameter given per task, or one number for all, as (K,) values.

    Args:
        name: of the hyperparameter, for the message.
        value: one number, (K,), or a schedule that returns either.
        num_tasks: K.
        step: where to evaluate a schedule.
    """
    value = jnp.asarray(value(step) if callable(value) else value)
    if value.ndim:
        message = f"{name} must be one number or have an entry per task."
        shape(value, (num_tasks,), message)
    return jnp.broadcast_to(value, (num_tasks,))


def shape(value: Any, shape: tuple[int, ...], message: str) -> None:
    """Raises ValueError with both shapes and the message for a value of another shape."""
    chex.assert_shape(
        value,
        shape,
        custom_message=message,
        include_default_message=False,
        exception_type=ValueError,
    )


def mask(mask: Any, num_tasks: int) -> jax.Array:
    """Returns a mask as (K,) bool, or says what is wrong with it."""
    mask = jnp.asarray(mask)
    if mask.shape != (num_tasks,) or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask must be bool with an entry per task, shape ({num_tasks},), True where the task "
            f"is present; got dtype {mask.dtype} and shape {mask.shape}."
        )
    return mask


def state(state: Any, expected: Any, num_tasks: int) -> None:
    """Raises ValueError for a state of another structure, or of another number of tasks."""
    if jax.tree.structure(state) != jax.tree.structure(expected):
        raise ValueError(
            "the state does not belong to this transformation: expected the structure "
            f"{jax.tree.structure(expected)}, got {jax.tree.structure(state)}."
        )
    wanted = jax.tree_util.tree_leaves_with_path(expected)
    for (path, leaf), got in zip(wanted, jax.tree.leaves(state)):
        if jnp.shape(got) != leaf.shape:
            raise ValueError(
                f"losses have K = {num_tasks} tasks, but the state was initialised for another "
                f"number: {jax.tree_util.keystr(path)} has shape {jnp.shape(got)}, not "
                f"{leaf.shape}. Call init with losses of this shape."
            )
