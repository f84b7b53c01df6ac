"""The driver that weighs the losses before one backward pass, as ``jax.value_and_grad`` does."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import arguments, asking, base, checks, jacobian, names
from bilb import curvatures as curvature_functions
from bilb import grams as gram_engines
from bilb import slopes as slope_functions


class ValueAndGradState(NamedTuple):
    """State of :func:`value_and_grad`."""

    step: jax.Array  # () int32
    effective_weights: base.PyTree  # ∂Φ/∂l of the call, like the losses; 0 at first
    balancer: optax.OptState
    slopes: jax.Array | None  # (K,) of the step just taken, None where the method reads none
    losses_after: jax.Array | None  # (K,) after the step just taken, None likewise


def value_and_grad(
    task_losses: Callable[..., Any],
    balancer: optax.GradientTransformation,
    has_aux: bool = False,
    features: Callable[[Any], base.PyTree] | None = None,
    slopes: Callable[..., jax.Array] | None = None,
    shared: base.PyTree = True,
    gram: gram_engines.Engine | None = None,
    axis_name: Any = None,
    heads: Literal["weighted", "sum"] = "weighted",
    curvatures: curvature_functions.Curvatures | None = None,
) -> ValueAndGrad:
    """``jax.value_and_grad`` for a stacked loss vector, weighed by a loss transformation.

    Runs the passes that the method needs and no more: one forward and one backward pass, whatever K
    is, for a method that reads losses; one forward pass more for slopes or ``losses_after``; for
    the Gram matrix or the norms of the task gradients what ``gram`` says, K backward passes at
    least; for curvatures what ``curvatures`` says. It finds out by tracing the balancer.

    A loss of an absent task may be anything, but its derivative enters the backward pass with
    weight 0, and 0 · NaN is NaN: where labels are missing, replace them *before* the model's loss
    sees them, ``jnp.where(missing, 0.0, labels)``, as well as in the loss itself. Nothing can
    repair such a gradient afterwards.

    Args:
        task_losses: ``task_losses(params, *args) -> losses``, a vector (K,) or a dict, list or
            tuple of scalars, or ``(losses, aux)``. They come back as they are. Where they have
            names, so have the state's ``effective_weights``, and ``mask=`` and what methods take
            per task may be given by name (``bilb.names``).
        balancer: a loss transformation or a chain of them.
        has_aux: whether ``task_losses`` returns auxiliary data, such as new batch statistics.
        features: ``aux -> features``, the input of a router that reads features; needs
            ``has_aux``. The same backward pass covers losses and features. Features that should
            not be differentiated can be passed as ``features=`` at the call instead.
        slopes: how slopes are taken: ``bilb.slopes.forward`` (exact, if None) or
            ``bilb.slopes.finite_difference(...)``. A model with dropout must get its key in
            ``*args``, so that both passes see the same one.
        shared: bools in a pytree prefix of ``params``, True for the parameters that tasks share.
            Slopes are taken along, and Gram matrices and norms over, the shared ones only.
        gram: how Gram matrices and gradient norms are taken, from ``bilb.grams``; ``exact()`` if
            None.
        axis_name: a mapped axis, or a tuple of them, over which gradients are averaged before
            anything is learnt from them. Needed under ``jax.pmap`` and
            ``jax.shard_map(check_vma=False)``, with the mean over devices inside ``task_losses``:
            there the gradient of each device is its own, and slopes along it would be slopes of
            another step than the one taken. Not needed under ``jit`` or with ``check_vma=True``.
        heads: what the parameters that are not ``shared`` follow: the gradient of the objective
            ("weighted"), or that of the plain sum of the present tasks' losses ("sum"), as in the
            official code of some gradient-balancing methods.
        curvatures: how curvatures are taken, from ``bilb.curvatures``; ``probe()`` if None.

    Returns:
        A callable with ``state = value_and_grad.init(params, *args)`` and
        ``losses, grads, state = value_and_grad(params, state, *args, **extra)``, or
        ``(losses, aux), grads, state`` with ``has_aux``. Extra keywords such as ``mask=`` go to the
        balancer, but for ``slope_args=``, a tuple in the place of ``*args`` that takes the slopes
        on an independent batch (unbiased, at the cost of that batch's own forward pass), and
        ``gram_args=``, such a tuple that makes the Gram matrix the product J' Jᵀ of the Jacobian J'
        on that batch with the step's own, as :func:`bilb.sdmgrad` and :func:`bilb.modo` want; a
        list of two tuples takes both sides on batches of their own. For methods that read
        ``losses_after`` call ``state = value_and_grad.after(params, state, *args)`` after the
        optimiser's step; for all others that returns the state as it is.

    Raises:
        ValueError: for ``features`` without ``has_aux``, an unknown ``heads``, or losses that are
            not a vector (K,).

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum((x - 1) ** 2), 10 * jnp.sum((x + 1) ** 2)])
        >>> balancer = bilb.chain(bilb.log_losses(), bilb.bilb4mtl())
        >>> value_and_grad = bilb.value_and_grad(task_losses, balancer)
        >>> params = jnp.zeros(3)
        >>> state = value_and_grad.init(params)
        >>> losses, grads, state = jax.jit(value_and_grad)(params, state)
        >>> print(losses, grads.shape, state.effective_weights.shape)
        [ 3. 30.] (3,) (2,)
    """
    if features is not None and not has_aux:
        raise ValueError("features= reads the auxiliary output: give has_aux=True as well.")
    jacobian.check_heads(heads)
    slopes = slope_functions.forward if slopes is None else slopes
    gram = gram_engines.exact() if gram is None else gram
    curvatures = curvature_functions.probe() if curvatures is None else curvatures
    for name, value, made_by in (
        ("slopes", slopes, (slope_functions.finite_difference,)),
        ("gram", gram, (gram_engines.exact, gram_engines.stacked, gram_engines.sketch)),
        ("curvatures", curvatures, (curvature_functions.probe, curvature_functions.tangent_kernel)),
    ):
        if value in made_by:
            raise TypeError(f"{name}= takes what this function returns.{checks.uncalled(value)}")
    if not callable(task_losses):
        raise TypeError(
            f"task_losses must be a function (params, *args) -> losses; got {task_losses!r}. Call "
            "bilb.value_and_grad(task_losses, balancer)."
        )
    balancer = asking.as_link(balancer)
    return ValueAndGrad(
        task_losses, balancer, has_aux, features, slopes, shared, gram, axis_name, heads, curvatures
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ValueAndGrad:
    """What :func:`value_and_grad` returns."""

    task_losses: Callable[..., Any]
    balancer: optax.GradientTransformationExtraArgs
    has_aux: bool
    features: Callable[[Any], base.PyTree] | None
    slopes: Callable[..., jax.Array]
    shared: base.PyTree
    gram: gram_engines.Engine
    axis_name: Any
    heads: str
    curvatures: curvature_functions.Curvatures

    def init(self, params: base.PyTree, *args: Any, **extra: Any) -> ValueAndGradState:
        """Returns the first state, from the shapes of the losses alone."""
        (losses, features), (named, _) = self._shapes(params, *args)
        num_tasks, dtype = checks.losses(losses)
        zeros = lambda: jnp.zeros(num_tasks, base.at_least_float32(dtype))
        if self.features is not None:
            extra["features"] = features
        with names.known(named):
            balancer = self.balancer.init(zeros())
            asking.refuse_optimizer(balancer)
            asked = asking.asked(self.balancer, balancer, losses, **extra)
        return ValueAndGradState(
            step=base.new_step(),
            effective_weights=names.unstack(zeros(), named),
            balancer=balancer,
            slopes=zeros() if "slopes" in asked else None,
            losses_after=zeros() if "losses_after" in asked else None,
        )

    def __call__(
        self,
        params: base.PyTree,
        state: ValueAndGradState,
        *args: Any,
        slope_args: tuple[Any, ...] | None = None,
        gram_args: tuple[Any, ...] | list[tuple[Any, ...]] | None = None,
        **extra: Any,
    ) -> tuple[Any, base.PyTree, ValueAndGradState]:
        """Returns losses (and aux), the gradient of the objective, and the next state."""
        check_state(params, state)
        _check_after(state)
        (losses, features), (named, aux), pullback, pushforward = jacobian.linearize_with_features(
            lambda p: self._outputs(p, *args), params
        )
        # Weights are made in float32 at least, whatever the model computes in.
        constants = losses.astype(base.at_least_float32(losses.dtype))
        no_features = jax.tree.map(jnp.zeros_like, features)
        gradient_of = lambda weights: self._mean(pullback((weights, no_features)))
        here = self._on_shared(losses, gradient_of, lambda direction: pushforward(direction)[0])
        of_rows = isinstance(self.gram, gram_engines.Stacked)
        engine: Any = self.gram
        take_rows = lambda: engine.rows(gradient_of, losses)
        rows = functools.cache(take_rows)

        def slopes_along(direction):
            batch, at = (args, here) if slope_args is None else (slope_args, None)
            direction = jacobian.shared_part(direction, self.shared)
            return self.slopes(self._losses, params, direction, *batch, at=at)

        def take_gram(rows=take_rows):
            if gram_args is not None:
                batches = gram_args if isinstance(gram_args, list) else [gram_args]
                other, *first = [self._linearize(params, *batch) for batch in batches]
                return self.gram.of(first[0] if first else here, params, state.step, other)
            if of_rows:
                return gram_engines.of_rows(jacobian.shared_part(rows(), self.shared))
            return self.gram.of(here, params, state.step)

        gram = functools.cache(lambda: take_gram(rows))

        def norms():
            if of_rows:
                return jnp.sqrt(jnp.diagonal(gram()))
            return self.gram.norms(here, params, state.step)

        def curvatures():
            options = {"shared": self.shared, "step": state.step}
            return self._mean(self.curvatures(self._losses, params, *args, **options))

        supply = {
            "slope_fn": lambda: lambda weights: slopes_along(gradient_of(weights)),
            "gram": gram,
            # Not what is kept above: a method calls this inside control flow of its own.
            "gram_fn": lambda: take_gram,
            "gradient_norms": norms,
            "curvatures": curvatures,
            "curvature_fn": lambda: curvatures,
        }
        with names.known(named):
            weights, of_features, balancer, given = self._weigh(
                constants, features, state, extra, supply
            )
        if of_rows and self.features is None and {"gram", "gradient_norms"} & {*given}:
            combined = lambda weights: jacobian.combine(weights, rows())
        else:
            combined = lambda weights: self._mean(pullback((weights, of_features)))
        grads = jacobian.with_heads(combined, weights, self.shared, self.heads, given.get("mask"))
        like = lambda old, new: new.astype(old.dtype)
        last_weights = names.stack(state.effective_weights)
        next_state = ValueAndGradState(
            step=optax.safe_increment(state.step),
            effective_weights=names.unstack(
                like(last_weights, _of_all_devices(weights, last_weights)), named
            ),
            balancer=balancer,
            slopes=None if state.slopes is None else like(state.slopes, slopes_along(grads)),
            # Not a number until the method `after` is called.
            losses_after=None if state.losses_after is None else jnp.nan * state.losses_after,
        )
        return ((named, aux) if self.has_aux else named), grads, next_state

    def after(self, params: base.PyTree, state: ValueAndGradState, *args: Any) -> ValueAndGradState:
        """Takes the losses of the same batch after the optimiser's step, where they are read."""
        check_state(params, state)
        if state.losses_after is None:
            return state
        losses = self._losses(params, *args).astype(state.losses_after.dtype)
        return state._replace(losses_after=jnp.where(jnp.isnan(losses), jnp.inf, losses))

    def _weigh(self, losses, features, state, extra, supply):
        """Returns ∂Φ/∂l, ∂Φ/∂features, the balancer's next state, and what it was given."""

        def weigh(given):
            def objective(losses, features):
                more = {} if self.features is None else {"features": features}
                balanced, balancer = self.balancer.update(losses, state.balancer, **given, **more)
                return balanced.sum(), balancer

            return jax.grad(objective, argnums=(0, 1), has_aux=True)(losses, features)

        given = dict(extra)
        if state.slopes is not None:
            given["slopes"] = state.slopes
        if state.losses_after is not None:
            given["losses_after"] = state.losses_after
        if given.get("mask") is not None:
            given["mask"] = checks.mask(given["mask"], losses.shape[0])
        with arguments.noting() as read:
            ((weights, of_features), balancer), given = asking.supply_missing(weigh, given, supply)
            read |= _keywords(self.balancer.update)
            unread = [name for name in extra if extra[name] is not None and name not in read]
            if unread:
                _refuse_unread(unread, read, lambda extra: weigh({**given, **extra}), extra)
        return weights, of_features, balancer, given

    def _outputs(self, params, *args):
        returned = self.task_losses(params, *args)
        losses, named, aux = jacobian.outputs_of(returned, self.has_aux)
        return (losses, None if self.features is None else self.features(aux)), (named, aux)

    def _shapes(self, params, *args):
        outputs = lambda params: self._outputs(params, *args)
        axes = () if self.axis_name is None else self.axis_name
        # The mean over devices inside task_losses needs the axis; its size changes no shape.
        for name in (axes,) if isinstance(axes, str) else axes:
            outputs = jax.vmap(outputs, None, out_axes=None, axis_name=name, axis_size=1)
        return jax.eval_shape(outputs, params)

    def _losses(self, params, *args):
        return self._outputs(params, *args)[0][0]

    def _linearize(self, params, *args):
        losses, pullback, pushforward = jacobian.linearized(self._losses, params, *args)
        return self._on_shared(losses, lambda weights: self._mean(pullback(weights)), pushforward)

    def _on_shared(self, losses, pullback, pushforward):
        return jacobian.Linearization(
            losses,
            pullback=lambda weights: jacobian.shared_part(pullback(weights), self.shared),
            pushforward=lambda direction: pushforward(jacobian.shared_part(direction, self.shared)),
        )

    def _mean(self, gradient):
        return gradient if self.axis_name is None else jax.lax.pmean(gradient, self.axis_name)


def _of_all_devices(weights, last_weights):
    """Sums the parts of the devices, where ``jax.shard_map`` knows what differs between them.

    Behind :func:`bilb.pmean_losses` a device's own losses are a part of what is balanced.
    """
    varying = lambda array: jax.typeof(array).mat.varying
    axes = varying(weights) - varying(last_weights)
    return jax.lax.psum(weights, tuple(axes)) if axes else weights


def check_state(params: Any, state: Any) -> None:
    """Raises TypeError for another state than that of ``value_and_grad.init``."""
    if isinstance(params, ValueAndGradState):
        raise TypeError(
            "params and state are in the wrong order: call value_and_grad(params, state, *args)."
        )
    if not isinstance(state, ValueAndGradState):
        raise TypeError(
            "state must be what value_and_grad.init(params, *args) returns, a ValueAndGradState, "
            f"whose field `balancer` is the balancer's own; got a {type(state).__name__}."
        )


def _check_after(state):
    """Raises ValueError where ``after`` was left out since the last call, outside ``jit``."""
    last = state.losses_after
    if last is None or isinstance(last, jax.core.Tracer):
        return
    if bool(jnp.isnan(last).all()):
        raise ValueError(
            "this method learns from the losses after each step, and nothing told it of them: call "
            "state = value_and_grad.after(params, state, *args) after the optimiser's step."
        )


def _keywords(function):
    """Returns the names of a function's keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def _refuse_unread(unread, read, weigh, extra):
    """Raises TypeError for keywords that no link names and on which nothing depends."""
    for name in unread:
        try:
            used = asking.depends_on_its_argument(lambda value: weigh({name: value}), extra[name])  # noqa: B023
        except jax.errors.ConcretizationTypeError:
            used = True
        except TypeError:  # no array
            used = False
        if not used:
            similar = difflib.get_close_matches(name, read, 1)
            meant = f" Did you mean `{similar[0]}=`?" if similar else ""
            raise TypeError(
                f"value_and_grad got `{name}=`, which no link of the balancer reads; they read "
                f"{sorted(read)}.{meant} Arguments of task_losses are given by position."
            )
