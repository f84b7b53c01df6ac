"""Extra arguments that speak of the losses: their names, how methods ask for and read them."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Generator, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class MissingArgument(TypeError):
    """A method was called without an extra argument that it cannot work without.

    The drivers catch it and supply what they can (:func:`bilb.value_and_grad`), and so does
    :func:`bilb.chain`; a method of your own may raise it, too.

    Attributes:
        argument: the name of the missing keyword.
    """

    def __init__(self, argument: str, method: str, supply: str):
        """Names the method and says how to supply the argument."""
        super().__init__(f"{method} needs the extra argument `{argument}`: {supply}")
        self.argument = argument
        self._arguments = argument, method, supply

    def __reduce__(self):
        """Lets it cross processes."""
        return type(self), self._arguments


class UnboundAxis(NameError):
    """A link needs a mapped axis, such as that of ``jax.shard_map``, and is outside of it."""


class Argument(NamedTuple):
    """An extra argument that speaks of the losses, so that links must not pass it on as it is."""

    axes: int  # how many axes belong to the tasks; 0 for a function
    lagged: bool  # whether it tells of the step that the previous call produced
    supply: str  # how to supply it
    exact: bool = True  # whether it has no axes but those


_OF_LAST_STEP = (
    "shape (K,), about the step that the previous call produced, zeros at the first call; "
    "bilb.value_and_grad supplies it."
)
_DRIVERS = "bilb.value_and_grad and bilb.aggregate_by supply it."
#: What speaks of the losses, by name. Methods of users that read something else add its name.
ABOUT_LOSSES = {
    "slopes": Argument(1, True, _OF_LAST_STEP),
    "losses_after": Argument(1, True, f"{_OF_LAST_STEP[:-1]} after its method `after`."),
    "gradient_norms": Argument(
        1, False, f"the norms (K,) of the task gradients on the shared parameters; {_DRIVERS}"
    ),
    "gram": Argument(2, False, f"the Gram matrix J Jᵀ (K, K) of the task gradients; {_DRIVERS}"),
    "gram_fn": Argument(
        0, False, f"a function () -> the Gram matrix J Jᵀ (K, K) of the task gradients; {_DRIVERS}"
    ),
    "curvatures": Argument(
        1, False, "how fast each loss is learnt (K,); bilb.value_and_grad supplies it."
    ),
    "curvature_fn": Argument(
        0, False, "a function () -> curvatures (K,); bilb.value_and_grad supplies it."
    ),
    "slope_fn": Argument(
        0,
        False,
        "a function weights (K,) -> slopes (K,) of the losses along Jᵀ weights at the current "
        f"parameters; {_DRIVERS}",
    ),
}


_NOTED: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar("noted", default=None)


@contextlib.contextmanager
def noting() -> Generator[set[str], None, None]:
    """Collects the names of the extra arguments that the links which are called inside read."""
    names: set[str] = set()
    token = _NOTED.set(names)
    try:
        yield names
    finally:
        _NOTED.reset(token)


def note(names: Iterable[str]) -> None:
    """Tells a driver that asks for it which extra arguments a link reads."""
    noted = _NOTED.get()
    if noted is not None:
        noted.update(names)


def missing(argument: str, method: str) -> MissingArgument:
    """Returns the error by which a method asks for an extra argument."""
    about = ABOUT_LOSSES.get(argument)
    supply = about.supply if about else f"pass it to update as `{argument}=`."
    return MissingArgument(argument, method, supply)


def refuse(extra: dict[str, Any], method: str, reads: tuple[str, ...] = ()) -> None:
    """Raises TypeError for what speaks of the losses and is not among ``reads``."""
    for name, value in extra.items():
        if value is not None and name in ABOUT_LOSSES and name not in reads:
            raise TypeError(
                f"`{name}` speaks of the losses as the model returns them, but {method}, a link "
                "in the same chain, changes the losses and does not read it. Join the links with "
                f"bilb.chain instead of optax.chain: it translates `{name}` for the link behind."
            )


def read(
    names: list[str], extra: dict[str, Any], mask: jax.Array | None, num_tasks: int, dtype: np.dtype
) -> tuple[jax.Array | None, dict[str, Any]]:
    """Returns the tasks that are present with finite entries, and the arguments without others.

    The former are None where neither a mask nor an array says anything.
    """
    arrays = [name for name in names if ABOUT_LOSSES[name].axes]
    values = {name: jax.lax.stop_gradient(jnp.asarray(extra[name], dtype)) for name in arrays}
    for name, value in values.items():
        about = ABOUT_LOSSES[name]
        expected = (num_tasks,) * about.axes
        if (value.shape if about.exact else value.shape[: about.axes]) != expected:
            raise ValueError(f"{name} must have shape {expected}; got {value.shape}.")
        finite = finite_rows(value, about.axes)
        mask = finite if mask is None else mask & finite
    given = {name: _without_absent(value, mask, name) for name, value in values.items()}
    if "slope_fn" in names:
        given["slope_fn"] = _of_present(extra["slope_fn"], mask, num_tasks, dtype)
    return mask, given


def finite_rows(value: jax.Array, axes: int) -> jax.Array:
    """Returns (K,) bool: the tasks whose entries are finite.

    One task that is not finite spoils its own row and column of a Gram matrix; the other rows
    count with what is left.
    """
    if axes == 2:
        usable = jnp.isfinite(jnp.diagonal(value))
        return usable & ~jnp.any(~jnp.isfinite(value) & usable, axis=1)
    return jnp.isfinite(value).reshape(value.shape[0], -1).all(1)


def _without_absent(value, mask, name):
    if ABOUT_LOSSES[name].axes == 2:
        return jnp.where(mask[:, None] & mask, value, 0.0)
    rows = mask.reshape(-1, *(1,) * (value.ndim - 1))
    # A loss of 1 stands for an absent one, as in `losses`.
    return jnp.where(rows, value, 1.0 if name == "losses_after" else 0.0)


def _of_present(slope_fn, mask, num_tasks, dtype):
    """Returns a ``slope_fn`` that neither asks for nor tells of absent tasks."""
    keep = lambda values: values if mask is None else jnp.where(mask, values, 0.0)

    def of_present(weights):
        slopes = jnp.asarray(slope_fn(keep(weights)), dtype)
        if slopes.shape != (num_tasks,):
            raise ValueError(f"slope_fn must return shape ({num_tasks},); got {slopes.shape}.")
        return keep(jax.lax.stop_gradient(slopes))

    return of_present
