"""A balancer as its drivers and :func:`bilb.chain` see it: that it is one, and what it asks for."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.interpreters import partial_eval

from bilb import arguments, base, checks


def supply_missing(
    function: Callable[[dict[str, Any]], Any],
    given: dict[str, Any],
    supply: Mapping[str, Callable[[], Any]],
) -> tuple[Any, dict[str, Any]]:
    """Calls ``function(given)``, adding what it says is missing; returns what it had in the end."""
    while True:
        try:
            return function(given), given
        except arguments.MissingArgument as error:
            if error.argument not in supply or error.argument in given:
                raise
            given = {**given, error.argument: supply[error.argument]()}


def asked(
    balancer: optax.GradientTransformationExtraArgs,
    state: base.PyTree,
    losses: Any,
    *,
    features: base.PyTree = None,
    **extra: Any,
) -> set[str]:
    """Returns which arguments about losses of this shape a balancer asks for, by tracing it.

    ``losses`` and ``features`` may be shapes.
    """
    zeros = lambda: jnp.zeros(losses.shape, base.at_least_float32(losses.dtype))
    gram = lambda: jnp.zeros(2 * losses.shape, zeros().dtype)
    supply = {
        "slopes": zeros,
        "losses_after": zeros,
        "gradient_norms": zeros,
        "curvatures": zeros,
        "curvature_fn": lambda: zeros,
        "slope_fn": lambda: jnp.zeros_like,
        "gram": gram,
        "gram_fn": lambda: gram,
    }
    names = set()
    noting = {name: lambda name=name: names.add(name) or supply[name]() for name in supply}

    def trace(given):
        def update(losses, state, features):
            more = {} if features is None else {"features": features}
            return balancer.update(losses, state, **given, **more)

        shape = jax.ShapeDtypeStruct(losses.shape, losses.dtype)
        return jax.eval_shape(update, shape, state, features)

    # What is not known here, features or a mapped axis, ends the search; nothing is carried there.
    with contextlib.suppress(arguments.MissingArgument, arguments.UnboundAxis):
        supply_missing(trace, extra, noting)
    return names


def as_link(balancer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns a balancer that takes any extra arguments and asks for those it requires.

    A hand-written ``update(losses, state, params=None, *, slopes, **extra)`` raises
    :class:`bilb.MissingArgument` for its keyword-only arguments without default, as a method made
    by :func:`bilb.loss_transformation` does.
    """
    if not isinstance(balancer, optax.GradientTransformation):
        raise TypeError(
            "a balancer is an optax.GradientTransformation of the losses, such as "
            f"bilb.bilb4mtl(); got {balancer!r}.{checks.uncalled(balancer)}"
        )
    balancer = optax.with_extra_args_support(balancer)
    required = [
        p.name
        for p in inspect.signature(balancer.update).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty
    ]
    if not required:
        return balancer

    def update_fn(losses, state, params=None, **extra):
        arguments.note(required)
        for name in required:
            if extra.get(name) is None:
                raise arguments.missing(name, base.name_of(balancer.update))
        return balancer.update(losses, state, params, **extra)

    return optax.GradientTransformationExtraArgs(balancer.init, update_fn)


def refuse_optimizer(state: base.PyTree) -> None:
    """Raises TypeError for the state of an optimiser, such as Adam, where a balancer's belongs."""
    if type(state) is tuple:
        for part in state:
            refuse_optimizer(part)
    elif {"mu", "nu", "trace"} & {*getattr(state, "_fields", ())}:
        raise TypeError(
            f"a balancer transforms losses, but this is an optimiser, of {type(state).__name__}: "
            "give a method such as bilb.bilb4mtl(), and the gradients that value_and_grad returns "
            "to the optimiser."
        )


def depends_on_its_argument(function: Callable[[Any], Any], argument: Any) -> bool:
    """Whether what a function returns is computed from the values of its argument."""
    jaxpr = jax.make_jaxpr(function)(argument).jaxpr
    return any(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1])
