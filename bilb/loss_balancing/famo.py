"""FAMO, arXiv 2306.03792: decrease all log losses at the same rate, from losses alone."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks

_EPSILON = 1e-8


class FAMOState(NamedTuple):
    """State of :func:`famo`."""

    step: jax.Array  # () int32
    logits: jax.Array  # (K,)
    weights: jax.Array  # (K,) z just used
    losses: jax.Array  # (K,) the previous losses
    present: jax.Array  # (K,) bool, the tasks that were present in the previous call
    opt_state: optax.OptState


def famo(
    *,
    min_losses: float | jax.Array = 0.0,
    gamma: base.Scalar | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Fast adaptive multitask optimisation: one extra forward pass a step, no task gradients.

    With ``D = l - l_min + ε`` and ``z = softmax(ξ)``, the model follows ``Σ_k z_k log D_k / c``
    with ``c = Σ_k z_k / D_k`` held constant, the reciprocal of the paper's; after the model's step
    the logits take an optimiser's step down ``(diag z - z zᵀ) (log D_before - log D_after) + γ ξ``,
    the change of the losses on the same batch. The logarithm is in the method: give it the losses
    themselves.

    ``losses_after`` are the losses of the previous call's batch at the parameters after that step;
    give zeros at the first call, when nothing is learnt. :func:`bilb.value_and_grad` keeps them:
    ``state = value_and_grad.after(params, state, *args)`` after the optimiser's step.

    A loss at or below its bound counts as the bound: D is then 1e-8, the task has no gradient and
    its balanced loss is 0, and it is left out of c, so that the other tasks go on as without it
    (their z sum to less than 1, which the division by c cancels).
    Losses or ``losses_after`` that are not finite teach nothing of their task. A task learns from
    each step in which it was present, also where the next call's mask leaves it out.

    Where a loss can reach its bound while others do not, such as the residual of a differential
    equation at the trivial solution, the log losses reward that without bound and training
    collapses onto it. Use :func:`bilb.presets.marigold_pinn` or :func:`bilb.presets.nash_pinn`
    there.

    Args:
        min_losses: lower bounds of the losses, one number or (K,).
        gamma: γ >= 0, decay of the logits, added to their gradient; a number, a traced scalar or a
            schedule of the number of steps that taught the logits. 1e-3 if None, as in the paper,
            LibMTL and TorchJD; the official repository has 1e-2 (``famo.py`` and its command line)
            and 1e-5 (its class of methods).
        optimizer: Optax optimiser of the logits, its decay included, so not together with
            ``gamma``; ``optax.chain(optax.add_decayed_weights(gamma), optax.adam(0.025))``,
            Adam at 0.025, if None.

    Returns:
        A loss transformation; ``update(losses, state, *, losses_after)``. Its state has the fields
        ``step``, ``logits``, ``weights``, ``losses``, ``present`` and ``opt_state``.

    Raises:
        ValueError: for a concrete negative ``gamma``, for ``gamma`` beside ``optimizer``, or
            ``min_losses`` that are neither () nor (K,).
        MissingArgument: for a call without ``losses_after``.

    Example:
        >>> import jax, jax.numpy as jnp, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum((x - 1) ** 2), 9 * jnp.sum((x + 1) ** 2)])
        >>> value_and_grad = bilb.value_and_grad(task_losses, bilb.famo())
        >>> x, state = jnp.zeros(2), value_and_grad.init(jnp.zeros(2))
        >>> step = jax.jit(value_and_grad)
        >>> for _ in range(10):
        ...     losses, grads, state = step(x, state)
        ...     x -= 0.01 * grads
        ...     state = value_and_grad.after(x, state)
        >>> print(state.balancer.weights.shape)
        (2,)

    References:
        Liu et al., *FAMO: Fast Adaptive Multitask Optimization*, arXiv 2306.03792, Algorithm 1.
    """
    checks.number("gamma", gamma, minimum=0, schedule=True, optional=True)
    checks.number("min_losses", min_losses, per_task=True)
    if optimizer is None:
        gamma = 1e-3 if gamma is None else gamma
        optimizer = optax.chain(optax.add_decayed_weights(gamma), optax.adam(0.025))
    elif gamma is not None:
        raise ValueError(
            f"gamma is the decay of the default optimizer; got gamma={gamma} beside another one. "
            "Put optax.add_decayed_weights(gamma) in front of it instead."
        )
    optimizer = checks.optimizer("optimizer", optimizer, optimizer)

    def init(num_tasks, dtype):
        checks.per_task("min_losses", min_losses, num_tasks)
        logits = jnp.zeros(num_tasks, dtype)
        return FAMOState(
            step=base.new_step(),
            logits=logits,
            weights=jnp.full(num_tasks, 1 / num_tasks, dtype),
            losses=jnp.ones(num_tasks, dtype),
            present=jnp.ones(num_tasks, bool),
            opt_state=optimizer.init(logits),
        )

    shapes = base.shapes_of(init)

    def above_bound(losses):
        bounds = checks.per_task("min_losses", min_losses, losses.shape[0])
        return base.at_least(losses - bounds, 0.0) + _EPSILON

    def learn(state, losses_after, taught):
        # (diag z - z zᵀ) change, over the tasks whose change is known.
        z = jax.nn.softmax(state.logits, where=taught)
        change = jnp.log(above_bound(state.losses)) - jnp.log(above_bound(losses_after))
        change = jnp.where(taught, change, 0.0)
        gradient = jnp.where(taught, z * (change - z @ change), 0.0)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.logits)
        new = state._replace(logits=state.logits + updates, opt_state=opt_state)
        return base.learn_where(taught, new, state, lambda num_tasks: shapes(num_tasks, z.dtype))

    def update(losses, state, *, mask, losses_after, taught, **_):
        present = base.present(losses, mask)
        # First the end of the previous step: what its change of the losses teaches the logits.
        learnt = learn(state, losses_after, taught & jnp.isfinite(state.losses))
        z = jnp.where(present, jax.nn.softmax(learnt.logits, where=present), 0.0)
        d = above_bound(losses)
        # NaN stays in: only a loss known to lie at its bound is left out.
        at_bound = d <= _EPSILON
        c = jax.lax.stop_gradient(jnp.sum(jnp.where(at_bound, 0.0, z / d)))
        balanced = jnp.where(at_bound, 0.0, z * jnp.log(d) / jnp.where(c > 0, c, 1.0))
        constants = jax.lax.stop_gradient(losses)
        return balanced, FAMOState(
            step=optax.safe_increment(state.step),
            logits=learnt.logits,
            weights=jnp.where(present, z, state.weights),
            losses=jnp.where(present, constants, state.losses),
            present=present,
            opt_state=learnt.opt_state,
        )

    return base.loss_transformation(init, update, keeps_absent=False)
