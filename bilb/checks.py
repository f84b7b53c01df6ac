"""Checks of what callers give: each raises an error that names the value and the fix."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilb import names


def parameters(params: Any) -> None:
    """Raises TypeError for parameters that have no derivative."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} is {dtype}, but parameters are floating "
                "point. Keep counters and keys out of params and pass them on in *args; in NNX: "
                "graph, params, rest = nnx.split(model, nnx.Param, ...)."
            )


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
    whole: bool = False,
    static: bool = False,
    optional: bool = False,
    finite: bool = False,
) -> None:
    """Raises for a hyperparameter that is not what its method takes, or is outside its range.

    Args:
        name: of the hyperparameter, for the message.
        value: a number or an array; the range is checked where it is concrete, and tracers pass.
        minimum: the smallest value, none if None.
        maximum: the largest value, none if None.
        exclusive: whether the bounds are outside the range.
        per_task: whether it may be an array with an entry per task, whose length
            :func:`per_task` checks; otherwise it is one number. Its entries are finite.
        schedule: whether it may be a schedule of the method's step counter.
        whole: whether it is a whole number.
        static: whether it must be a Python number, known when the method is built.
        optional: whether it may be None.
        finite: whether it is not infinite.

    Raises:
        TypeError: for what is no number, and for a schedule that the method cannot evaluate.
        ValueError: for a value outside the range, or an array in the place of one number.
    """
    if (value is None and optional) or (callable(value) and schedule):
        return
    if per_task and isinstance(value, Mapping):
        bounds = {"exclusive": exclusive, "schedule": schedule, "finite": True}
        for task, each in value.items():
            number(f"{name}[{task!r}]", each, minimum, maximum, **bounds)
        return
    if static and isinstance(value, jax.Array):
        raise TypeError(f"{name} is static, a Python number; got {value!r}.{_static(name)}")
    if callable(value):
        raise TypeError(
            f"{name} takes no schedule; got {value!r}. Give a number or an array, or wrap the "
            f"method: optax.inject_hyperparams(method)({name}=schedule)."
        )
    given, half = value, (jnp.bfloat16, jnp.float16)
    if isinstance(value, jax.Array) and value.ndim == 0 and value.dtype in half:
        raise TypeError(
            f"{name} arrives in {value.dtype}, which rounds it. optax.inject_hyperparams does so "
            "for losses in half precision: give it hyperparam_dtype=jnp.float32."
        )
    if not isinstance(value, jax.core.Tracer):
        value = np.asarray(value)
        if value.dtype.kind not in "fiu" and not jnp.issubdtype(value.dtype, jnp.floating):
            kinds = "a number, a traced array or a schedule" if schedule else "a number"
            raise TypeError(f"{name} must be {kinds}; got {given!r}.")
    if not per_task:
        shape(value, (), f"{name} must be one number.")
    if isinstance(value, jax.core.Tracer):
        return
    value = value.astype(np.float64)
    if whole and (value % 1 != 0).any():
        raise ValueError(f"{name} must be a whole number; got {given!r}.")
    if (finite or per_task) and np.isinf(value).any():
        raise ValueError(f"{name} must be finite; got {given!r}.")
    below = minimum is not None and (value <= minimum if exclusive else value < minimum).any()
    above = maximum is not None and (value >= maximum if exclusive else value > maximum).any()
    if below or above or np.isnan(value).any():
        relation = ("> ", "< ") if exclusive else (">= ", "<= ")
        bounds = [r + str(b) for r, b in zip(relation, (minimum, maximum)) if b is not None]
        raise ValueError(f"{name} must be {' and '.join(bounds) or 'a number'}; got {value}.")


def flag(name: str, value: Any) -> None:
    """Raises TypeError for what is not True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False; got {value!r}.{_static(name)}")


def function(name: str, value: Any) -> None:
    """Raises TypeError for what cannot be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function; got {value!r}.{_static(name)}")


def key(value: Any) -> None:
    """Raises TypeError for what is neither an int seed nor a JAX key."""
    dtype = getattr(value, "dtype", None)
    seed = isinstance(value, int) if dtype is None else jnp.issubdtype(dtype, jnp.integer)
    if not seed and (dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key)):
        raise TypeError(f"key must be an int or a JAX key; got {value!r}.{_static('key')}")


def optimizer(
    name: str, value: optax.GradientTransformation | None, default: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Returns an Optax optimiser, the default for None, or says that it is none."""
    value = default if value is None else value
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an Optax optimiser, such as optax.adam(1e-3); got "
            f"{value!r}.{uncalled(value)}"
        )
    return optax.with_extra_args_support(value)


def uncalled(value: Any) -> str:
    """Returns the advice to call a function that was given in the place of what it returns."""
    return f" Call it: {value.__name__}(...)." if inspect.isfunction(value) else ""


def _static(name):
    return f" With optax.inject_hyperparams it is static: static_args=({name!r}, ...)."


def per_task(name: str, value: Any, num_tasks: int, step: jax.Array | None = None) -> jax.Array:
    """Returns a hyperparameter given per task, or one number for all, as (K,) values.

    Args:
        name: of the hyperparameter, for the message.
        value: one number, (K,), numbers by task name, or a schedule that returns one of these.
        num_tasks: K.
        step: where to evaluate a schedule.
    """
    at_step = lambda value: value(step) if callable(value) else value
    value = names.in_order(name, at_step(value))
    value = jnp.stack([*map(at_step, value)]) if isinstance(value, list) else jnp.asarray(value)
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
    """Returns a mask, which may be given by task name, as (K,) bool, or says what is wrong."""
    mask = jnp.asarray(names.in_order("mask", mask))
    if mask.shape != (num_tasks,) or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask must be bool with an entry per task, shape ({num_tasks},), True where the task "
            f"is present; got dtype {mask.dtype} and shape {mask.shape}."
        )
    return mask


def state(state: Any, expected: Any, num_tasks: int, method: str) -> None:
    """Raises ValueError for a state of another structure, or of another number of tasks."""
    if jax.tree.structure(state) != jax.tree.structure(expected):
        path, got, wanted = _difference(state, expected)
        where = f"state{path}" if path else "the state"
        raise ValueError(
            f"the state does not belong to this {method}: {where} is {_kind(got)}, not "
            f"{_kind(wanted)}. Call init of the transformation whose update this is, built with "
            "the same options."
        )
    wanted = jax.tree_util.tree_leaves_with_path(expected)
    for (path, leaf), got in zip(wanted, jax.tree.leaves(state)):
        if jnp.shape(got) != leaf.shape:
            raise ValueError(
                f"losses have K = {num_tasks} tasks, but the state was initialised for another "
                f"number: {jax.tree_util.keystr(path)} has shape {jnp.shape(got)}, not "
                f"{leaf.shape}. Call init with losses of this shape."
            )


def _difference(got, wanted, path=""):
    """Returns where two trees part, as (path, what is there, what should be)."""
    if type(got) is not type(wanted) or jax.tree_util.all_leaves([wanted]):
        return path, got, wanted
    if hasattr(wanted, "_fields"):
        pairs = {f".{name}": (getattr(got, name), getattr(wanted, name)) for name in wanted._fields}
    elif isinstance(wanted, tuple | list) and len(got) == len(wanted):
        pairs = {f"[{i}]": pair for i, pair in enumerate(zip(got, wanted))}
    elif isinstance(wanted, dict) and got.keys() == wanted.keys():
        pairs = {f"[{name!r}]": (got[name], wanted[name]) for name in wanted}
    else:
        return path, got, wanted
    for name, pair in pairs.items():
        if jax.tree.structure(pair[0]) != jax.tree.structure(pair[1]):
            return _difference(*pair, path + name)
    return path, got, wanted


def _kind(tree):
    """Returns what to call a part of a state: its class, and what a plain container holds."""
    if tree is None:
        return "None"
    if type(tree) is dict:
        return f"a dict of {sorted(tree, key=str)}"
    if type(tree) in (tuple, list):
        return f"a {type(tree).__name__} of {[type(part).__name__ for part in tree]}"
    article = "an" if type(tree).__name__[0] in "AEIOU" else "a"
    return f"{article} {type(tree).__name__}"
