"""Auto-Lambda, arXiv 2202.03091: task weights that lower the validation loss of primary tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.training_steps.step import move, training_losses, training_step, virtual_step


class AutoLambdaState(NamedTuple):
    """State of :func:`auto_lambda`."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) λ, with which the model took its last step
    opt_state: optax.OptState  # of the model's optimiser
    weights_opt_state: optax.OptState


def auto_lambda(
    task_losses: Callable[[base.PyTree, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    inner_learning_rate: base.Scalar,
    primary: jax.Array | float = 1.0,
    initial: float | jax.Array = 0.1,
    weights_optimizer: optax.GradientTransformation | None = None,
) -> base.TrainingStep:
    """Makes a training step that learns the weights of the training losses on validation data.

    With training losses l and validation losses v, one virtual step of gradient descent:

    * ``θ' = θ - α Σ_k λ_k ∇l_k(θ)``
    * ``λ ← λ - β ∂/∂λ Σ_{k primary} v_k(θ')``, where ``∂/∂λ_k = -α ⟨∇l_k(θ), Σ_j ∇v_j(θ')⟩``
    * ``θ ← optimiser(Σ_k λ_k ∇l_k(θ))``

    The official code approximates the hypergradient by finite differences. The virtual step is
    linear in λ, so it is exact at the price of one product of the training losses' Jacobian with a
    vector: two forward, three backward and one forward-mode pass per step, whatever K is, and no
    second derivatives.

    Not a loss transformation: it needs the losses of two batches at two points. The virtual step is
    plain gradient descent; the official one also applies the momentum and weight decay of the
    model's SGD. λ is kept non-negative, where the official code leaves it free. A non-finite loss
    makes λ non-finite.

    Args:
        task_losses: ``task_losses(params, batch) -> losses``, (K,) or a dict, list or tuple of
            scalars, for batches of both kinds.
        optimizer: Optax optimiser of the model.
        inner_learning_rate: α > 0 of the virtual step; a number, a traced scalar or a schedule of
            the state's ``step``. The official code uses the model's current learning rate.
        primary: weights of the validation losses, one number or (K,); 1 for all tasks by default,
            0 for tasks that are auxiliary.
        initial: initial λ >= 0, one number or (K,); default 0.1, as in the official code.
        weights_optimizer: Optax optimiser of λ; Adam at 1e-4, as in the official code, if None.

    Returns:
        A :class:`bilb.TrainingStep`: ``state = init(params, batch)`` and ``params, state, losses =
        update(params, state, batch, validation_batch)``, the training losses (K,) being those
        before the step. The official code draws the validation batch from the training set.

    Raises:
        ValueError: for a concrete ``inner_learning_rate`` <= 0, a concrete negative ``initial``,
            shapes that are neither () nor (K,), or losses that are not (K,).

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, optax, bilb
        >>> task_losses = lambda x, batch: jnp.sum((x - batch) ** 2, axis=1)
        >>> training = bilb.auto_lambda(task_losses, optax.sgd(0.1), inner_learning_rate=0.1)
        >>> batch, validation = jnp.array([[1.0], [-1.0]]), jnp.array([[0.5], [0.5]])
        >>> x = jnp.zeros(1)
        >>> state = training.init(x, batch)
        >>> x, state, losses = jax.jit(training.update)(x, state, batch, validation)
        >>> print(np.asarray(state.weights).round(4))
        [0.1001 0.0999]

    References:
        Liu et al., *Auto-Lambda: Disentangling Dynamic Task Relationships*, arXiv 2202.03091.
    """
    checks.number(
        "inner_learning_rate", inner_learning_rate, minimum=0, exclusive=True, schedule=True
    )
    optimizer = checks.optimizer("optimizer", optimizer, optimizer)
    weights_optimizer = checks.optimizer("weights_optimizer", weights_optimizer, optax.adam(1e-4))
    checks.number("primary", primary, per_task=True)
    checks.number("initial", initial, minimum=0, per_task=True)

    def init(params, num_tasks, dtype):
        checks.per_task("primary", primary, num_tasks)
        weights = jnp.array(checks.per_task("initial", initial, num_tasks), dtype, copy=True)
        return AutoLambdaState(
            step=base.new_step(),
            weights=weights,
            opt_state=optimizer.init(params),
            weights_opt_state=weights_optimizer.init(weights),
        )

    def update(params, state, batch, validation_batch):
        rate = base.at_step(inner_learning_rate, state.step)
        ahead = virtual_step(task_losses, params, state.weights, rate, batch, validation_batch)
        hypergradient = ahead.hypergradient(
            checks.per_task("primary", primary, state.weights.shape[0])
        )
        weights, weights_opt_state = move(
            weights_optimizer, hypergradient, state.weights, state.weights_opt_state
        )
        weights = jnp.maximum(weights, 0.0)
        new_state = state._replace(weights=weights, weights_opt_state=weights_opt_state)
        return ahead.pullback(weights), new_state, ahead.losses

    return training_step(training_losses(task_losses), optimizer, init, update)
