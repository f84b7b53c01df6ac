"""Multi-objective meta learning (MOML), NeurIPS 2021: every validation loss is an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks, grams
from bilb.gradient_balancing import solvers
from bilb.training_steps.step import move, training_losses, training_step, virtual_step


class MOMLState(NamedTuple):
    """State of :func:`moml`."""

    step: jax.Array  # () int32
    logits: jax.Array  # (K,) α
    weights: jax.Array  # (K,) softmax(α), with which the model took its last step
    multipliers: jax.Array  # (K,) MGDA's weights λ of the last step; 1 / K at first
    opt_state: optax.OptState  # of the model's optimiser
    logits_opt_state: optax.OptState


def moml(
    task_losses: Callable[[base.PyTree, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    inner_learning_rate: base.Scalar,
    logits_optimizer: optax.GradientTransformation | None = None,
) -> base.TrainingStep:
    """Makes a training step that learns weights for which no validation loss suffers.

    With training losses l, validation losses v and weights ``w = softmax(α)``:

    * lower level, one step: ``θ' = θ - η Σ_k w_k ∇l_k(θ)``
    * upper level: ``min_α (v_1(θ'), ..., v_K(θ'))``, along MGDA's common descent direction
      ``Σ_j λ_j ∂v_j/∂α`` of the K hypergradients, ``λ = argmin_{λ ∈ Δ} ‖Σ_j λ_j ∂v_j/∂α‖``
    * ``θ ← optimiser(Σ_k w_k ∇l_k(θ))``

    The lower level is one step, as in the experiments of the paper. It is linear in the weights, so
    the hypergradients ``∂v_j/∂α = -η ⟨∇v_j(θ'), ∇l_k(θ)⟩ ∂w_k/∂α`` are exact without second
    derivatives: two forward passes, K + 2 backward and K forward-mode passes per step, one after
    another, in the memory of one gradient.

    Not a loss transformation: it needs the losses of two batches at two points. The weights are
    positive and sum to 1. A common descent direction shorter than about 1e-3 (float32) or 5e-8
    (float64) times the longest hypergradient is rounding error and counts as zero: α then is Pareto
    stationary. A non-finite loss teaches the logits nothing; ``optax.apply_if_finite`` keeps it
    away from the model.

    Args:
        task_losses: ``task_losses(params, batch) -> losses``, (K,) or a dict, list or tuple of
            scalars, for batches of both kinds.
        optimizer: Optax optimiser of the model.
        inner_learning_rate: η > 0 of the lower level's step; a number, a traced scalar or a
            schedule of the state's ``step``. The official code uses the model's learning rate,
            LibMTL 0.1.
        logits_optimizer: Optax optimiser of α; Adam at 1e-3, as in the official code, if None.

    Returns:
        A :class:`bilb.TrainingStep`: ``state = init(params, batch)`` and ``params, state, losses =
        update(params, state, batch, validation_batch)``, the training losses (K,) being those
        before the step.

    Raises:
        ValueError: for a concrete ``inner_learning_rate`` <= 0, or losses that are not (K,).

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, optax, bilb
        >>> task_losses = lambda x, batch: jnp.sum((x - batch) ** 2, axis=1)
        >>> training = bilb.moml(task_losses, optax.sgd(0.1), inner_learning_rate=0.1)
        >>> batch, validation = jnp.array([[1.0], [-1.0]]), jnp.array([[0.5], [0.7]])
        >>> x = jnp.zeros(1)
        >>> state = training.init(x, batch)
        >>> x, state, losses = jax.jit(training.update)(x, state, batch, validation)
        >>> print(np.asarray(state.weights).round(4), state.multipliers)
        [0.5005 0.4995] [1. 0.]

    References:
        Ye et al., *Multi-Objective Meta Learning*, NeurIPS 2021, Algorithm 1, arXiv 2102.07121.
    """
    checks.number(
        "inner_learning_rate", inner_learning_rate, minimum=0, exclusive=True, schedule=True
    )
    optimizer = checks.optimizer("optimizer", optimizer, optimizer)
    logits_optimizer = checks.optimizer("logits_optimizer", logits_optimizer, optax.adam(1e-3))

    def init(params, num_tasks, dtype):
        logits = jnp.zeros(num_tasks, dtype)
        return MOMLState(
            step=base.new_step(),
            logits=logits,
            weights=jnp.full(num_tasks, 1 / num_tasks, dtype),
            multipliers=jnp.full(num_tasks, 1 / num_tasks, dtype),
            opt_state=optimizer.init(params),
            logits_opt_state=logits_optimizer.init(logits),
        )

    def update(params, state, batch, validation_batch):
        rate = base.at_step(inner_learning_rate, state.step)
        weights, softmax_pullback = jax.vjp(jax.nn.softmax, state.logits)
        ahead = virtual_step(task_losses, params, weights, rate, batch, validation_batch)
        of_task = lambda one_hot: softmax_pullback(ahead.hypergradient(one_hot))[0]
        hypergradients = jax.lax.map(of_task, jnp.eye(*weights.shape, dtype=weights.dtype))
        gram = grams.of_rows(hypergradients)
        multipliers = solvers.min_norm_weights(gram)
        direction = multipliers @ hypergradients
        # Adam would blow the rounding error of a vanishing direction up to full steps.
        noise = 10 * jnp.finfo(gram.dtype).eps * jnp.max(jnp.diagonal(gram))
        direction = jnp.where(direction @ direction > noise, direction, 0.0)

        logits, logits_opt_state = move(
            logits_optimizer, direction, state.logits, state.logits_opt_state
        )
        weights = jax.nn.softmax(logits)
        new_state = state._replace(
            logits=logits,
            weights=weights,
            multipliers=multipliers,
            logits_opt_state=logits_opt_state,
        )
        return ahead.pullback(weights), new_state, ahead.losses

    return training_step(training_losses(task_losses), optimizer, init, update)
