"""The vocabulary of the library: the contracts and the checks that every method shares.

A *loss transformation* is an :class:`optax.GradientTransformationExtraArgs` whose updates are the
stacked task losses: ``balanced, state = update(losses, state)``, shape ``(K,)`` in and out. The sum
of the balanced losses is the objective of the method, so ``jax.grad`` of that sum with respect to
the losses gives the effective task weights.

A method states its formula as two functions, ``init(num_tasks, dtype) -> state`` and
``update(losses, state, *, mask, **extra) -> (balanced, state)``; :func:`loss_transformation` adds
what the contract asks of all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = jax.Array
PyTree = Any
#: A Python number, a traced scalar, or an Optax schedule of the method's step counter.
Scalar = float | Array | optax.Schedule


class MissingArgument(TypeError):
    """A method was called without an extra argument that it cannot work without.

    Attributes:
        argument: the name of the missing keyword.
    """

    def __init__(self, argument: str, method: str, supply: str):
        """Names the method and says how to supply the argument."""
        super().__init__(f"{method} needs the extra argument `{argument}`: {supply}")
        self.argument = argument


class TrainingStep(NamedTuple):
    """A method that evaluates the model itself, so that it is a whole training step.

    Attributes:
        init: ``state = init(params, *args)``.
        update: ``params, state, losses = update(params, state, *args)``, with the losses (K,)
            before the step.
    """

    init: Callable[..., PyTree]
    update: Callable[..., tuple[PyTree, PyTree, Array]]


def loss_transformation(
    init: Callable[[int, Any], PyTree],
    update: Callable[..., tuple[Array, PyTree]],
    *,
    rejects: tuple[str, ...] = (),
    keeps_absent: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Makes a method's two functions a loss transformation that keeps the whole contract.

    Args:
        init: ``(num_tasks, dtype) -> state``; ``dtype`` is the losses' dtype, float32 at least.
        update: ``(losses, state, *, mask, **extra) -> (balanced, state)`` on losses of that dtype.
            ``mask`` is None or (K,) bool; the loss of an absent task arrives as 1.
        rejects: extra arguments that this link must not be given (it changes the losses to which
            they belong).
        keeps_absent: whether to restore the state entries of absent tasks after ``update``. A
            method that has per-task shapes in what tasks share (a network, a buffer) gives False
            and calls :func:`keep_absent` on the rest itself.

    Returns:
        A transformation that checks shapes and dtypes, preserves the dtype of the losses and of
        every state leaf, ignores unknown extra arguments, and with a mask returns 0 for absent
        tasks and leaves their entries of the state as they were.
    """

    @functools.cache
    def specification(num_tasks: int, dtype: np.dtype) -> PyTree:
        return jax.eval_shape(lambda: init(num_tasks, dtype))

    def init_fn(losses):
        num_tasks, dtype = check_losses(losses)
        return init(num_tasks, _at_least_float32(dtype))

    def update_fn(losses, state, params=None, *, mask=None, **extra):
        del params
        num_tasks, loss_dtype = check_losses(losses)
        for name in rejects:
            if extra.get(name) is not None:
                raise TypeError(
                    f"`{name}` speaks of the losses as the model returns them, but this link of "
                    "the chain changes the losses. Take the link out and pass the method that "
                    f"reads `{name}` an elementwise `transform=` instead, or change the losses "
                    "inside `task_losses`."
                )
        dtype = _at_least_float32(loss_dtype)
        _check_state(state, specification(num_tasks, dtype), num_tasks)
        losses = jnp.asarray(losses, dtype)
        if mask is not None:
            mask = _check_mask(mask, num_tasks)
            # The inner `where` keeps an absent task's NaN out of the method's derivatives too.
            losses = jnp.where(mask, losses, 1.0)
        balanced, new_state = update(losses, state, mask=mask, **extra)
        if mask is not None:
            balanced = jnp.where(mask, balanced, 0.0)
            if keeps_absent:
                new_state = keep_absent(
                    mask, new_state, state, functools.partial(specification, dtype=dtype)
                )
        return balanced.astype(loss_dtype), jax.tree.map(_like, new_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def keep_absent(
    mask: Array, new: PyTree, old: PyTree, specification: Callable[[int], PyTree]
) -> PyTree:
    """Returns ``new`` with the entries of absent tasks as they were in ``old``.

    An axis belongs to the tasks if it changes with K. A state that cannot be initialised for
    another K (it holds constants per task) tells nothing that way; there, an axis of length K
    counts.

    Args:
        mask: (K,) bool, the tasks that are present.
        new: any pytree of arrays.
        old: the same pytree, before.
        specification: ``num_tasks -> `` the pytree's shapes.
    """
    num_tasks = mask.shape[0]

    def keep(leaf, other, new, old):
        axes = [a for a, (n, m) in enumerate(zip(leaf.shape, other.shape)) if n != m]
        if not axes:
            return new
        shape = [1] * old.ndim
        shape[axes[0]] = num_tasks
        return jnp.where(mask.reshape(shape), new, old)

    leaves = specification(num_tasks)
    grown = lambda leaf: tuple(n + (n == num_tasks) for n in leaf.shape)
    other = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(grown(leaf), leaf.dtype), leaves)
    # Bounds such as a router's clip may allow one task fewer but not one more.
    for count in (num_tasks + 1, num_tasks - 1):
        try:
            other = specification(count)
            break
        except (ValueError, TypeError, ZeroDivisionError):
            continue
    return jax.tree.map(keep, leaves, other, new, old)


def check_losses(losses: Any) -> tuple[int, np.dtype]:
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


def check_number(
    name: str,
    value: Any,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    exclusive: bool = False,
) -> None:
    """Raises ValueError for a concrete hyperparameter outside its range; lets tracers pass."""
    if value is None or callable(value) or isinstance(value, jax.core.Tracer):
        return
    value = np.asarray(value)
    if value.dtype.kind not in "fiu" and not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be a number, a traced array or a schedule; got {value!r}.")
    value = value.astype(np.float64)
    below = minimum is not None and (value <= minimum if exclusive else value < minimum).any()
    above = maximum is not None and (value >= maximum if exclusive else value > maximum).any()
    if below or above or np.isnan(value).any():
        relation = ("> ", "< ") if exclusive else (">= ", "<= ")
        bounds = [r + str(b) for r, b in zip(relation, (minimum, maximum)) if b is not None]
        raise ValueError(f"{name} must be {' and '.join(bounds) or 'a number'}; got {value}.")


def check_per_task(name: str, value: Any, num_tasks: int) -> Array:
    """Returns a hyperparameter given per task, or one number for all, as (K,) values."""
    value = jnp.asarray(value)
    if value.shape not in ((), (num_tasks,)):
        raise ValueError(
            f"{name} must be one number or have an entry per task, shape ({num_tasks},); got "
            f"shape {value.shape}."
        )
    return jnp.broadcast_to(value, (num_tasks,))


def check_per_step(name: str, value: Any, losses: Array, method: str) -> Array:
    """Returns what a method learns from about the step just taken, (K,) in the losses' dtype."""
    if value is None:
        raise MissingArgument(
            name,
            method,
            f"shape {losses.shape}, about the step that the previous call produced, zeros at the "
            "first call; bilb.value_and_grad supplies it.",
        )
    if jnp.shape(value) != losses.shape:
        raise ValueError(f"{name} must have shape {losses.shape}; got {jnp.shape(value)}.")
    return jax.lax.stop_gradient(jnp.asarray(value, losses.dtype))


def present(losses: Array, mask: Array | None) -> Array:
    """Returns the mask as (K,) bool."""
    return jnp.ones(losses.shape, bool) if mask is None else mask


def num_present(losses: Array, mask: Array | None) -> int | Array:
    """Returns the number of present tasks, at least 1."""
    return losses.shape[0] if mask is None else jnp.maximum(jnp.sum(mask), 1)


def split_over_tasks(
    value: Array, weights: Array, losses: Array, mask: Array | None
) -> tuple[Array, Array]:
    """Splits the value f(l) of a scalar objective into an entry per task.

    Entry k is ``l_k · sg(∂f/∂l_k)``, so that it carries task k's gradient, plus a constant under
    ``stop_gradient`` that makes the sum over the present tasks equal f.

    Args:
        value: f(l), scalar.
        weights: ∂f/∂l, (K,); entries of absent tasks do not matter.
        losses: l, (K,).
        mask: None or (K,) bool.

    Returns:
        ``(balanced (K,), weights (K,))``, the weights a constant.
    """
    value, weights = jax.lax.stop_gradient((value, weights))
    by_task = weights * losses
    remainder = jax.lax.stop_gradient(value - jnp.sum(by_task, where=mask))
    return by_task + remainder / num_present(losses, mask), weights


def bounded_gradient(gradient: PyTree) -> PyTree:
    """Clips far beyond any useful size, so that the squares in Adam's moments cannot overflow.

    The bound is a thousandth of the root of the dtype's largest number: 2e16 in float32.
    """

    def leaf(g):
        bound = 1e-3 * float(jnp.finfo(g.dtype).max) ** 0.5
        return jnp.clip(g, -bound, bound)

    return jax.tree.map(leaf, gradient)


def at_step(value: Scalar, step: Array) -> Any:
    """Evaluates a schedule at ``step``; returns numbers and arrays as they are."""
    return value(step) if callable(value) else value


def usable(losses: Array, mask: Array | None) -> Array:
    """Returns (K,) bool: the tasks that are present and whose loss is finite."""
    finite = jnp.isfinite(losses)
    return finite if mask is None else finite & mask


def at_least(losses: Array, floor: Any) -> Array:
    """Returns ``max(losses, floor)``; NaN stays NaN.

    Unlike ``jnp.maximum`` it passes the whole gradient above the floor and none at it.
    """
    return jnp.where(losses > floor, losses, jnp.where(jnp.isnan(losses), losses, floor))


def as_key(key: int | Array) -> Array:
    """Returns a new typed JAX key from a seed, a raw key or a typed key."""
    if isinstance(key, int) or (jnp.ndim(key) == 0 and jnp.issubdtype(key.dtype, jnp.integer)):
        return jax.random.key(key)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            jnp.copy(jax.random.key_data(key)), impl=jax.random.key_impl(key)
        )
    return jax.random.wrap_key_data(jnp.copy(key))


def new_step() -> Array:
    """Returns the step counter of a fresh state, a scalar int32 zero."""
    return jnp.zeros((), jnp.int32)


def _at_least_float32(dtype: np.dtype) -> np.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _check_mask(mask: Any, num_tasks: int) -> Array:
    mask = jnp.asarray(mask)
    if mask.shape != (num_tasks,) or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask must be bool with an entry per task, shape ({num_tasks},), True where the task "
            f"is present; got dtype {mask.dtype} and shape {mask.shape}."
        )
    return mask


def _check_state(state: PyTree, expected: PyTree, num_tasks: int) -> None:
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


def _like(new: Any, old: Any) -> Array:
    """Casts to the dtype that ``init`` chose, so that scans and second calls do not retrace."""
    new = jnp.asarray(new)
    return new if jnp.issubdtype(new.dtype, jax.dtypes.prng_key) else new.astype(old.dtype)


def check_task_gradients(task_gradients: PyTree, params: PyTree | None, num_tasks: int) -> None:
    """Checks that every leaf is a parameter's gradient with a leading task axis."""
    shapes = jax.tree.map(jnp.shape, task_gradients)
    if params is not None:
        expected = jax.tree.map(lambda p: (num_tasks, *jnp.shape(p)), params)
        wrong = shapes != expected
    else:
        expected = f"({num_tasks}, ...)"
        wrong = any(jnp.shape(g)[:1] != (num_tasks,) for g in jax.tree.leaves(task_gradients))
    if wrong:
        raise ValueError(
            "task gradients are shaped like params with one more axis in front: the leading axis "
            f"must be the number of tasks, {num_tasks}. Expected {expected}, got {shapes}."
        )


def combine(weights: Array, task_gradients: PyTree) -> PyTree:
    """Returns ``Jᵀ w``: sums leaves (K, *shape) over tasks with (K,) weights, dtypes kept.

    A row with weight zero is left out, whatever it holds (0 times NaN would be NaN).
    """

    def leaf(gradients):
        w = weights.reshape((-1,) + (1,) * (gradients.ndim - 1))
        rows = jnp.where(w == 0, 0, gradients)
        return jnp.sum(w * rows, axis=0).astype(gradients.dtype)

    return jax.tree.map(leaf, task_gradients)
