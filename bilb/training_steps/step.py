"""What the training steps share: the last move of the model, inner loops, and a virtual step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from bilb import base, checks, jacobian, names


def training_step(
    task_losses: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    init: Callable[[base.PyTree, int, np.dtype], base.PyTree],
    update: Callable[..., tuple[base.PyTree, base.PyTree, jax.Array]],
) -> base.TrainingStep:
    """Makes a method that says which gradient the model follows a whole training step.

    Args:
        task_losses: ``task_losses(params, *args) -> losses``, (K,) or a flat pytree of scalars,
            with the arguments of the step.
        optimizer: Optax optimiser of the model.
        init: ``(params, num_tasks, dtype) -> state``, a NamedTuple with the fields ``step`` and
            ``opt_state``; ``dtype`` is that of the losses, float32 at least.
        update: ``(params, state, *args) -> (gradient, state, losses (K,))``; the shared step moves
            ``step`` and ``opt_state``, and returns the losses as ``task_losses`` does.
    """

    def init_fn(params, *args):
        losses = jax.eval_shape(task_losses, params, *args)
        num_tasks, dtype = checks.losses(jax.eval_shape(names.stack, losses))
        with names.known(losses):
            return init(params, num_tasks, base.at_least_float32(dtype))

    def update_fn(params, state, *args):
        like = jax.eval_shape(task_losses, params, *args)
        with names.known(like):
            gradient, new, losses = update(params, state, *args)
        params, opt_state = move(optimizer, gradient, params, state.opt_state)
        step = optax.safe_increment(state.step)
        return params, new._replace(step=step, opt_state=opt_state), names.unstack(losses, like)

    return base.TrainingStep(init_fn, update_fn)


def move(
    optimizer: optax.GradientTransformation,
    gradient: base.PyTree,
    params: base.PyTree,
    opt_state: optax.OptState,
) -> tuple[base.PyTree, optax.OptState]:
    """Returns the parameters and the optimiser's state after one of its steps."""
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def descend(
    optimizer: optax.GradientTransformation,
    gradient: Callable[[base.PyTree], base.PyTree],
    params: base.PyTree,
    opt_state: optax.OptState,
    steps: int,
) -> tuple[base.PyTree, optax.OptState]:
    """Returns the parameters and the optimiser's state after ``steps`` of its steps."""
    body = lambda _, carry: move(optimizer, gradient(carry[0]), *carry)
    return jax.lax.fori_loop(0, steps, body, (params, opt_state))


class VirtualStep(NamedTuple):
    """One step of gradient descent on the weighted training losses, seen from validation data.

    With training losses l, validation losses v, weights w and ``θ' = θ - α Σ_k w_k ∇l_k(θ)``, θ' is
    linear in w, so that no second derivatives are needed:
    ``∂v_j(θ')/∂w_k = -α ⟨∇v_j(θ'), ∇l_k(θ)⟩``.

    Attributes:
        losses: (K,) l(θ).
        pullback: ``w (K,) -> Σ_k w_k ∇l_k(θ)``.
        hypergradient: ``u (K,) -> ∂/∂w Σ_j u_j v_j(θ')`` (K,).
    """

    losses: jax.Array
    pullback: Callable[[jax.Array], base.PyTree]
    hypergradient: Callable[[jax.Array], jax.Array]


def virtual_step(
    task_losses: Callable[[base.PyTree, Any], jax.Array],
    params: base.PyTree,
    weights: jax.Array,
    learning_rate: jax.Array | float,
    batch: Any,
    validation_batch: Any,
) -> VirtualStep:
    """Takes a :class:`VirtualStep`: two forward passes and one backward pass."""
    losses, pullback, pushforward = jacobian.linearized(task_losses, params, batch)
    descent = optax.sgd(learning_rate)
    ahead, _ = move(descent, pullback(weights), params, descent.init(params))
    validation_pullback = jacobian.linearized(task_losses, ahead, validation_batch).pullback

    def hypergradient(of_losses):
        products = pushforward(validation_pullback(of_losses))
        return -learning_rate * products.astype(weights.dtype)

    return VirtualStep(losses, pullback, hypergradient)


def training_losses(
    task_losses: Callable[[base.PyTree, Any], jax.Array],
) -> Callable[..., jax.Array]:
    """Returns the losses of a step whose arguments are a batch and a validation batch."""
    return lambda params, batch, validation_batch=None: task_losses(params, batch)
