"""FORUM, arXiv 2401.09257: a first-order method for bilevel problems with many objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks, grams, jacobian, names
from bilb.gradient_balancing import solvers
from bilb.training_steps.step import descend, move, training_losses, training_step


class FORUMState(NamedTuple):
    """State of :func:`forum`."""

    step: jax.Array  # () int32
    logits: jax.Array  # (K,) α
    weights: jax.Array  # (K,) the weights softmax(α) just used; 1 / K at first
    multipliers: jax.Array  # (K,) the averaged λ, of sum 1; 1 / K at first
    opt_state: optax.OptState  # of the model's optimiser
    logits_opt_state: optax.OptState


def forum(
    task_losses: Callable[[base.PyTree, Any], jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    inner_learning_rate: base.Scalar,
    inner_steps: int = 5,
    rho: base.Scalar = 0.1,
    averaging: base.Scalar | None = None,
    normalize: bool = True,
    logits_optimizer: optax.GradientTransformation | None = None,
) -> base.TrainingStep:
    """Makes a training step on validation losses with the training problem as a constraint.

    With training losses l, validation losses v and weights ``w = softmax(α)``, the problem is
    ``min_{α,θ} (v_1(θ), ..., v_K(θ))`` subject to ``q(α, θ) <= 0``, where

    * ``q(α, θ) = f(α, θ) - f(α, θ_T)``, ``f(α, θ) = Σ_k w_k l_k(θ)``, and ``θ_T`` is T steps of
      gradient descent on f from θ, held constant

    Each step descends along the d that lowers all validation losses most while it lowers q,
    ``min_d max_j ⟨∇v_j, d⟩ + ½‖d‖²`` subject to ``⟨∇q, d⟩ <= -ρ‖∇q‖²``:

    * ``-d = Σ_j λ_j ∇v_j + ν(λ) ∇q`` with ``ν(λ) = max(Σ_j λ_j (ρ - ⟨∇q, ∇v_j⟩ / ‖∇q‖²), 0)``
    * ``λ* = argmin_{λ ∈ Δ} ½ ‖Σ_j λ_j ∇v_j + ν(λ) ∇q‖² - ρ ‖∇q‖² ν(λ)``, and λ follows λ* slowly

    Model and weights move together; no derivative of the lower level's solution is needed. A step
    costs T + 2 backward passes for q and the update, K backward and K + 1 forward-mode passes for
    the validation gradients' inner products, one after another, in the memory of a few gradients.

    Not a loss transformation: it evaluates the model itself. The weights are positive and sum to 1.
    A non-finite loss makes the logits non-finite.

    Args:
        task_losses: ``task_losses(params, batch) -> losses``, (K,) or a dict, list or tuple of
            scalars, for batches of both kinds.
        optimizer: Optax optimiser of the model, which receives the θ part of -d.
        inner_learning_rate: step size > 0 of the T inner steps; a number, a traced scalar or a
            schedule of the state's ``step``. The official code uses 0.1 for NYU-v2 and Office, 0.01
            for QM9.
        inner_steps: T >= 1, default 5 as in the official code; static.
        rho: ρ >= 0, the relative decrease of q; a number, a traced scalar or a schedule. Default
            0.1, as in the official code.
        averaging: β in ``λ ← λ + β (λ* - λ)``, in [0, 1]; a number, a traced scalar or a schedule.
            ``(step + 1)^(-3/4)`` if None; the official code counts epochs instead of steps.
            λ starts at 1 / K, so that it sums to 1 whatever β is. The official code starts at zero,
            which is the same for its β of 1 at first.
        normalize: whether the ∇v_j are divided by their norms, as in the official code; static.
        logits_optimizer: Optax optimiser of α; Adam at 1e-3, as in the official code, if None.

    Returns:
        A :class:`bilb.TrainingStep`: ``state = init(params, batch)`` and ``params, state, losses =
        update(params, state, batch, validation_batch)``, the training losses (K,) being those
        before the step.

    Raises:
        ValueError: for a concrete ``inner_learning_rate`` <= 0, ``inner_steps`` < 1 or ``rho`` < 0,
            or losses that are not (K,).

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilb
        >>> task_losses = lambda x, batch: jnp.sum((x - batch) ** 2, axis=1)
        >>> training = bilb.forum(task_losses, optax.sgd(0.1), inner_learning_rate=0.1)
        >>> batch, validation = jnp.array([[1.0], [-1.0]]), jnp.array([[0.5], [0.7]])
        >>> x = jnp.zeros(1)
        >>> state = training.init(x, batch)
        >>> x, state, losses = jax.jit(training.update)(x, state, batch, validation)
        >>> print(x, state.weights)
        [0.1] [0.5 0.5]

    References:
        Ye et al., *A First-Order Multi-Gradient Algorithm for Multi-Objective Bi-Level
        Optimization*, arXiv 2401.09257, Algorithm 1.
    """
    checks.number(
        "inner_learning_rate", inner_learning_rate, minimum=0, exclusive=True, schedule=True
    )
    optimizer = checks.optimizer("optimizer", optimizer, optimizer)
    logits_optimizer = checks.optimizer("logits_optimizer", logits_optimizer, optax.adam(1e-3))
    checks.number("inner_steps", inner_steps, minimum=1, whole=True, static=True)
    checks.number("rho", rho, minimum=0, schedule=True)
    averaging = (lambda step: (step + 1.0) ** -0.75) if averaging is None else averaging
    checks.flag("normalize", normalize)
    checks.number("averaging", averaging, minimum=0, maximum=1, schedule=True)

    def init(params, num_tasks, dtype):
        logits = jnp.zeros(num_tasks, dtype)
        return FORUMState(
            step=base.new_step(),
            logits=logits,
            weights=jnp.full(num_tasks, 1 / num_tasks, dtype),
            multipliers=jnp.full(num_tasks, 1 / num_tasks, dtype),
            opt_state=optimizer.init(params),
            logits_opt_state=logits_optimizer.init(logits),
        )

    def constraint(params, state, batch):
        """Returns weights, losses and ∇q in α and θ, as a unit vector and its length."""
        dtype = state.logits.dtype
        weights, softmax_pullback = jax.vjp(jax.nn.softmax, state.logits)
        f_gradient = lambda p: jacobian.linearized(task_losses, p, batch).pullback(weights)
        losses, pullback, _ = jacobian.linearized(task_losses, params, batch)
        descent = optax.sgd(base.at_step(inner_learning_rate, state.step))
        inner_params, _ = descend(descent, f_gradient, params, descent.init(params), inner_steps)
        inner_losses = names.stack(task_losses(inner_params, batch))
        gradient = softmax_pullback((losses - inner_losses).astype(dtype))[0], pullback(weights)
        norm = optax.tree.norm(gradient).astype(dtype)
        safe_norm = jnp.where(norm == 0, 1.0, norm)
        unit = jax.tree.map(lambda g: (g / safe_norm).astype(g.dtype), gradient)
        return weights, losses, unit, norm

    def update(params, state, batch, validation_batch):
        dtype = state.logits.dtype
        weights, losses, (q_logits, q_params), q_norm = constraint(params, state, batch)

        validation = jacobian.linearized(task_losses, params, validation_batch)
        gram = grams.of_linearization(validation)
        slopes = validation.pushforward(q_params).astype(dtype)
        lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0.0))
        scale = 1.0 / (lengths + _SMALLEST_NORM) if normalize else jnp.ones_like(lengths)
        gram, slopes = scale[:, None] * gram * scale, scale * slopes

        decrease = base.at_step(rho, state.step) * q_norm
        best = barrier_weights(gram, slopes, decrease)
        share = base.at_step(averaging, state.step)
        multipliers = state.multipliers + share * (best - state.multipliers)
        nu = jnp.maximum(decrease - multipliers @ slopes, 0.0)  # for the unit vector of ∇q

        gradient = jax.tree.map(
            lambda v, q: v + (nu * q).astype(v.dtype),
            validation.pullback(multipliers * scale),
            q_params,
        )
        logits, logits_opt_state = move(
            logits_optimizer, nu * q_logits, state.logits, state.logits_opt_state
        )
        new_state = state._replace(
            logits=logits,
            weights=weights,
            multipliers=multipliers,
            logits_opt_state=logits_opt_state,
        )
        return gradient, new_state, losses

    return training_step(training_losses(task_losses), optimizer, init, update)


_SMALLEST_NORM = 1e-8  # added to the norms, as in the official code


def barrier_weights(gram: jax.Array, slopes: jax.Array, decrease: jax.Array) -> jax.Array:
    """Solves ``argmin_{λ ∈ Δ} min_{ν >= 0} ½ ‖Σ_j λ_j g_j + ν e‖² - ν c`` for a unit vector e.

    For a given ν the minimiser is the min-norm point of the shifted gradients ``g_j + ν e``, and
    for a given λ it is ``ν = max(c - Σ_j λ_j ⟨e, g_j⟩, 0)``. The ν at which both hold is found by
    bisection, as ``ν + Σ_j λ_j(ν) ⟨e, g_j⟩`` does not decrease with ν.

    Args:
        gram: (K, K) inner products of the gradients g_j.
        slopes: (K,) ``⟨e, g_j⟩``.
        decrease: c >= 0, scalar.

    Returns:
        (K,) weights λ, not negative and of sum 1.
    """

    def weights_at(nu):
        return solvers.min_norm_weights(gram + nu * (slopes[:, None] + slopes) + nu**2)

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * (low + high)
        above = middle + weights_at(middle) @ slopes > decrease
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    largest = jnp.maximum(decrease - jnp.min(slopes), 0.0)
    bounds = jnp.zeros_like(largest), largest
    return weights_at(jax.lax.fori_loop(0, jnp.finfo(gram.dtype).nmant, halve, bounds)[1])
