"""How a loss transformation drives training: as a loss vector's ``value_and_grad``, or in a chain.

:func:`value_and_grad` weighs the losses before one backward pass. :func:`aggregate_by` weighs task
gradients that were computed anyway.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, jacobian
from bilb import slopes as slope_functions


class ValueAndGradState(NamedTuple):
    """State of :func:`value_and_grad`."""

    balancer: optax.OptState
    slopes: jax.Array | None  # (K,) of the step just taken, None where the method reads none
    losses_after: jax.Array | None  # (K,) after the step just taken, None likewise


def value_and_grad(
    task_losses: Callable[..., Any],
    balancer: optax.GradientTransformation,
    has_aux: bool = False,
    features: Callable[[Any], base.PyTree] | None = None,
    slopes: Callable[..., jax.Array] = slope_functions.forward,
    shared: base.PyTree = True,
) -> ValueAndGrad:
    """``jax.value_and_grad`` for a stacked loss vector, weighed by a loss transformation.

    Runs the passes that the method needs and no more: one forward and one backward pass, whatever K
    is, for a method that reads losses; one forward pass more for slopes or ``losses_after``; K
    backward passes for the norms of the task gradients. It finds out by tracing the balancer.

    Args:
        task_losses: ``task_losses(params, *args) -> losses (K,)``, or ``(losses, aux)``.
        balancer: a loss transformation or a chain of them.
        has_aux: whether ``task_losses`` returns auxiliary data, such as new batch statistics.
        features: ``aux -> features``, the input of a router that reads features; needs
            ``has_aux``. The same backward pass covers losses and features. Features that should
            not be differentiated can be passed as ``features=`` at the call instead.
        slopes: how slopes are taken: ``bilb.slopes.forward`` (exact) or
            ``bilb.slopes.finite_difference(...)``. A model with dropout must get its key in
            ``*args``, so that both passes see the same one.
        shared: bools in a pytree prefix of ``params``, True for the parameters that tasks share.
            Slopes are taken along, and gradient norms over, the shared ones only.

    Returns:
        A callable with ``state = value_and_grad.init(params, *args)`` and
        ``losses, grads, state = value_and_grad(params, state, *args, **extra)``, or
        ``(losses, aux), grads, state`` with ``has_aux``. Extra keywords such as ``mask=`` go to the
        balancer, but for ``slope_args=``, a tuple in the place of ``*args`` that takes the slopes
        on an independent batch (unbiased, at the cost of that batch's own forward pass). For
        methods that read ``losses_after`` call
        ``state = value_and_grad.after(params, state, *args)`` after the optimiser's step; for all
        others that returns the state as it is.

    Raises:
        ValueError: for ``features`` without ``has_aux``, or losses that are not a vector (K,).

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum((x - 1) ** 2), 10 * jnp.sum((x + 1) ** 2)])
        >>> balancer = optax.chain(bilb.log_losses(), bilb.bilb4mtl())
        >>> value_and_grad = bilb.value_and_grad(task_losses, balancer)
        >>> params = jnp.zeros(3)
        >>> state = value_and_grad.init(params)
        >>> losses, grads, state = jax.jit(value_and_grad)(params, state)
        >>> print(losses, grads.shape)
        [ 3. 30.] (3,)
    """
    if features is not None and not has_aux:
        raise ValueError("features= reads the auxiliary output: give has_aux=True as well.")
    balancer = optax.with_extra_args_support(balancer)
    return ValueAndGrad(task_losses, balancer, has_aux, features, slopes, shared)


@dataclasses.dataclass(frozen=True, eq=False)
class ValueAndGrad:
    """What :func:`value_and_grad` returns."""

    task_losses: Callable[..., Any]
    balancer: optax.GradientTransformationExtraArgs
    has_aux: bool
    features: Callable[[Any], base.PyTree] | None
    slopes: Callable[..., jax.Array]
    shared: base.PyTree

    def init(self, params: base.PyTree, *args: Any, **extra: Any) -> ValueAndGradState:
        """Returns the first state, from the shapes of the losses alone."""
        (losses, features), _ = jax.eval_shape(self._outputs, params, *args)
        balancer = self.balancer.init(losses)
        zeros = lambda: jnp.zeros(losses.shape, losses.dtype)
        stand_in = {
            "slopes": zeros,
            "losses_after": zeros,
            "slope_fn": lambda: jnp.zeros_like,
            "gradient_norms": zeros,
        }

        def trace(given):
            weigh = lambda losses, features: self._objective(losses, features, balancer, given)
            return jax.eval_shape(weigh, losses, features)

        try:
            _, given = _supplied(trace, extra, stand_in)
        except NameError:
            # Outside its mapped axis `pmean_losses` cannot be traced; it goes with no slopes.
            given = {}
        return ValueAndGradState(balancer, given.get("slopes"), given.get("losses_after"))

    def __call__(
        self,
        params: base.PyTree,
        state: ValueAndGradState,
        *args: Any,
        slope_args: tuple[Any, ...] | None = None,
        **extra: Any,
    ) -> tuple[Any, base.PyTree, ValueAndGradState]:
        """Returns losses (and aux), the gradient of the objective, and the next state."""
        (losses, features), aux, pullback, pushforward = jacobian.linearize_with_features(
            lambda p: self._outputs(p, *args), params
        )
        no_features = jax.tree.map(jnp.zeros_like, features)
        gradient_of = lambda weights: pullback((weights, no_features))

        def slopes_along(direction):
            at = None
            if slope_args is None:
                at = slope_functions.Linearization(losses, lambda d: pushforward(d)[0])
            batch = args if slope_args is None else slope_args
            return self.slopes(self._losses, params, self._shared(direction), *batch, at=at)

        def gradient_norms():
            norm = lambda one_hot: optax.tree.norm(self._shared(gradient_of(one_hot)))
            return jax.lax.map(norm, jnp.eye(losses.shape[0], dtype=losses.dtype))

        given = dict(extra)
        if state.slopes is not None:
            given["slopes"] = state.slopes
        if state.losses_after is not None:
            given["losses_after"] = state.losses_after

        def weigh(given):
            objective = lambda *values: self._objective(*values, state.balancer, given)
            return jax.grad(objective, argnums=(0, 1), has_aux=True)(losses, features)

        supply = {
            "slope_fn": lambda: lambda weights: slopes_along(gradient_of(weights)),
            "gradient_norms": gradient_norms,
        }
        (weights, next_state), _ = _supplied(weigh, given, supply)
        grads = pullback(weights)
        values = (losses, aux) if self.has_aux else losses
        slopes = None if state.slopes is None else slopes_along(grads)
        return values, grads, ValueAndGradState(next_state, slopes, state.losses_after)

    def after(self, params: base.PyTree, state: ValueAndGradState, *args: Any) -> ValueAndGradState:
        """Takes the losses of the same batch after the optimiser's step, where they are read."""
        if state.losses_after is None:
            return state
        return state._replace(losses_after=self._losses(params, *args))

    def _outputs(self, params, *args):
        returned = self.task_losses(params, *args)
        losses, aux = returned if self.has_aux else (returned, None)
        return (losses, None if self.features is None else self.features(aux)), aux

    def _losses(self, params, *args):
        return self._outputs(params, *args)[0][0]

    def _shared(self, direction):
        keep = lambda is_shared, tree: tree if is_shared else optax.tree.zeros_like(tree)
        return jax.tree.map(keep, self.shared, direction)

    def _objective(self, losses, features, balancer_state, given):
        if self.features is not None:
            given = {**given, "features": features}
        balanced, next_state = self.balancer.update(losses, balancer_state, **given)
        return balanced.sum(), next_state


def _supplied(function, given, supply):
    """Calls ``function(given)``, supplying what the balancer says is missing."""
    while True:
        try:
            return function(given), given
        except base.MissingArgument as missing:
            if missing.argument not in supply or missing.argument in given:
                raise
            given = {**given, missing.argument: supply[missing.argument]()}


class AggregateByState(NamedTuple):
    """State of :func:`aggregate_by`."""

    balancer: optax.OptState


def aggregate_by(
    balancer: optax.GradientTransformation, num_tasks: int
) -> optax.GradientTransformationExtraArgs:
    """Makes a loss transformation the first link of an optimiser that gets stacked task gradients.

    ``optax.chain(bilb.aggregate_by(bilb.bilb4mtl(), num_tasks=3), optax.adam(1e-3))`` reads
    gradients whose leaves are (K, *shape) and the extra argument ``losses=`` (K,), and passes on
    their sum under the balancer's effective weights. The parameters are those of the one-backward
    route (:func:`value_and_grad`), to rounding, unless a router reads features, through which no
    gradient flows here. Use it where the task gradients exist anyway: computing them takes K
    backward passes, :func:`value_and_grad` one. Wrappers that look at updates, such as
    ``optax.clip_by_global_norm`` or ``optax.MultiSteps``, go after it.

    Args:
        balancer: a loss transformation or a chain of them.
        num_tasks: K; static.

    Returns:
        An aggregator: ``update(task_gradients, state, params, losses=losses, **extra)``.

    Raises:
        ValueError: if ``num_tasks`` < 1, if ``losses`` are not (K,), or a leaf's leading axis is
            not the number of tasks.
        MissingArgument: if ``losses=`` is missing.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum((x - 1) ** 2), jnp.sum((x + 1) ** 2)])
        >>> optimizer = optax.chain(bilb.aggregate_by(bilb.bilb4mtl(), 2), optax.sgd(0.1))
        >>> x = jnp.array([0.5, 0.5])
        >>> state = optimizer.init(x)
        >>> task_gradients = jax.jacrev(task_losses)(x)
        >>> updates, state = optimizer.update(task_gradients, state, x, losses=task_losses(x))
        >>> print(updates.shape)
        (2,)
    """
    base.check_number("num_tasks", num_tasks, minimum=1)
    balancer = optax.with_extra_args_support(balancer)

    def init_fn(params):
        del params
        return AggregateByState(
            balancer.init(jax.ShapeDtypeStruct((num_tasks,), jnp.result_type(float)))
        )

    def update_fn(task_gradients, state, params=None, *, losses=None, **extra):
        if losses is None:
            raise base.MissingArgument(
                "losses", "aggregate_by", "call update(task_gradients, state, params, losses=...)."
            )

        def objective(losses):
            balanced, next_state = balancer.update(losses, state.balancer, **extra)
            return balanced.sum(), next_state

        base.check_task_gradients(task_gradients, params, num_tasks)
        weights, next_state = jax.grad(objective, has_aux=True)(jnp.asarray(losses))
        return base.combine(weights, task_gradients), AggregateByState(next_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
