"""Names of tasks: losses in a dict, list or tuple, and what is given to a method by task name.

A balancer sees a vector (K,) whatever ``task_losses`` returns. The drivers stack the losses in the
order of ``jax.tree.leaves``, in which the keys of a dict are sorted, and while they call the
balancer they let it know the names, so that ``{"segmentation": 2.0, "depth": 1.0}`` may stand
wherever a method takes a value per task: ``bilb.linear_scalarization(weights)``, a router's
``initial``, ``mask=`` at the call. A name that is missing or unknown is an error.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

_KNOWN: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar(
    "names", default=None
)


def stack(losses: Any) -> jax.Array:
    """Returns scalar losses in a flat pytree as one vector (K,), and a vector as it is.

    Args:
        losses: (K,), or a dict, list, tuple or other pytree without nesting of scalars.

    Returns:
        (K,), in the order of ``jax.tree.leaves``: a dict's keys are sorted.

    Raises:
        ValueError: for nested pytrees, no losses at all, None, or a loss that is not one number.
        TypeError: for losses that are not floating point.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> print(bilb.names.stack({"segmentation": jnp.float32(0.3), "depth": jnp.float32(0.7)}))
        [0.7 0.3]
    """
    entries = _entries(losses)
    if entries is None:
        return losses
    hint = ""
    if isinstance(losses, tuple) and len(losses) == 2:
        hint = " If task_losses returns (losses, aux), give has_aux=True."
    if not entries:
        raise ValueError(f"there must be a loss per task; task_losses returned {losses!r}.")
    for path, loss in entries:
        where = f"losses{jax.tree_util.keystr(path)}"
        if len(path) > 1:
            raise ValueError(
                f"losses come in one dict, list or tuple without others inside; got {where}.{hint}"
            )
        if loss is None:
            raise ValueError(f"{where} is None: return a number, and pass mask= for absent tasks.")
        if jnp.ndim(loss) != 0:
            raise ValueError(
                f"{where} must be one number; got shape {jnp.shape(loss)}: take its mean or sum."
                f"{hint}"
            )
        if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise TypeError(f"{where} must be floating point; got {jnp.result_type(loss)}.{hint}")
    return jnp.stack([jnp.asarray(loss) for _, loss in entries])


def unstack(values: jax.Array, losses: Any) -> Any:
    """Returns values (K,) of the tasks in the structure of their losses.

    Args:
        values: (K,), such as the ``weights`` in a method's state.
        losses: what ``task_losses`` returned, or anything of its structure.

    Returns:
        The values of the tasks, named as the losses are; ``values`` themselves where the losses are
        a vector.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> losses = {"segmentation": jnp.float32(0.3), "depth": jnp.float32(0.7)}
        >>> weights = bilb.names.unstack(jnp.array([0.25, 0.75]), losses)
        >>> print({name: float(weight) for name, weight in weights.items()})
        {'depth': 0.25, 'segmentation': 0.75}
    """
    if _entries(losses) is None:
        return values
    return jax.tree.unflatten(jax.tree.structure(losses), list(values))


def names_of(losses: Any) -> tuple[str, ...] | None:
    """Returns the names of the tasks in the order of the stacked losses, None if they have none."""
    entries = _entries(losses)
    if losses is None or not entries or isinstance(entries[0][0][0], jax.tree_util.SequenceKey):
        return None
    return tuple(jax.tree_util.keystr(path, simple=True) for path, _ in entries)


@contextlib.contextmanager
def known(losses: Any) -> Generator[None, None, None]:
    """Lets methods that are called inside know the names of the tasks of these losses.

    The names of a vector, which has none, leave those that are known already.
    """
    names = names_of(losses)
    token = _KNOWN.set(current() if names is None else names)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def current() -> tuple[str, ...] | None:
    """Returns the names that are known here."""
    return _KNOWN.get()


def in_order(argument: str, value: Any) -> Any:
    """Returns what is given by task name as a list in the order of the losses, the rest as it is.

    Args:
        argument: its name, for the message.
        value: a mapping from names to values, or anything else.

    Raises:
        ValueError: where names are not known, missing or unknown.
    """
    if not isinstance(value, Mapping):
        return value
    value = {str(name): each for name, each in value.items()}
    tasks = _tasks(argument, f"{{{', '.join(map(repr, value))}}}")
    missing = [name for name in tasks if name not in value]
    unknown = [name for name in value if name not in tasks]
    if missing or unknown:
        raise ValueError(
            f"{argument} must have one entry for each of the tasks {list(tasks)}; missing: "
            f"{missing}, unknown: {unknown}."
        )
    return [value[name] for name in tasks]


def index(argument: str, task: int | str, num_tasks: int) -> int:
    """Returns the position of a task that is given by its position or name.

    Raises:
        ValueError: for no such task.
    """
    tasks: Any = range(num_tasks)
    if isinstance(task, str):
        tasks = _tasks(argument, repr(task))
    if task not in tasks:
        listed = f"0 to {num_tasks - 1}" if isinstance(tasks, range) else list(tasks)
        raise ValueError(
            f"{argument} must be one of {num_tasks} tasks; got {task!r}, not {listed}."
        )
    return tasks.index(task)


def _tasks(argument, given):
    tasks = current()
    if tasks is None:
        raise ValueError(
            f"{argument} is given by task name, {given}, but these losses are a vector without "
            "names: let task_losses return a dict and call bilb.value_and_grad, or give values in "
            "the order of the losses."
        )
    return tasks


def _entries(losses):
    """Returns (path, loss) of a pytree of losses, None for what is no container."""
    if jax.tree_util.all_leaves([losses]):
        return None
    return jax.tree_util.tree_leaves_with_path(losses, is_leaf=lambda loss: loss is None)
