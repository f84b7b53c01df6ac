"""The first, double-loop algorithm of BiLB4MTL, arXiv 2502.08585, Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks, names
from bilb.bilevel import discrepancies, routers
from bilb.bilevel.bilb4mtl import balanced_losses
from bilb.training_steps.step import descend, move, training_step


class DoubleLoopState(NamedTuple):
    """State of :func:`bilb4mtl_double_loop`."""

    step: jax.Array  # () int32
    router: base.PyTree  # the router's parameters W
    weights: jax.Array  # (K,) the weights σ(W) just used; 1 at first
    inner_params: base.PyTree  # z, shaped like the model's parameters
    opt_state: optax.OptState  # of the model's optimiser
    inner_opt_state: optax.OptState
    router_opt_state: optax.OptState


def bilb4mtl_double_loop(
    task_losses: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    inner_optimizer: optax.GradientTransformation,
    inner_steps: int = 10,
    penalty: base.Scalar = 0.01,
    router: routers.Router | None = None,
    discrepancy: Callable[..., jax.Array] | None = None,
    weighted: bool = True,
    divisor: Literal["sum", "stop_gradient_sum"] | None = None,
    router_optimizer: optax.GradientTransformation | None = None,
) -> base.TrainingStep:
    """Makes a training step of the double-loop algorithm: model, router and inner copy together.

    The penalty form of the bilevel problem, ``min_{W,x} λ f(W, x) + g(W, x) - min_z g(W, z)`` (λ
    the inverse of the paper's), with ``z ≈ argmin_z g(W, z)`` tracked by N inner steps:

    * ``z ← z - α ∇_z g(W, z)``, N times
    * ``x ← x - ∂/∂x [λ f(W, x) + g(W, x)]``
    * ``W ← W - ∂/∂W [λ f(W, x) + g(W, x) - g(W, z)]``

    The single-loop :func:`bilb.bilb4mtl` drops the term in z.

    Its router follows the gradient of the penalty problem itself, which keeps the weights from
    shrinking merely to make the scalarised loss small. Want it to study the bilevel problem or to
    check how much the single loop drops; to train a large model, use :func:`bilb.bilb4mtl`, which
    needs one backward pass a step instead of N + 1, one forward pass instead of N + 2 and no second
    copy of the parameters.

    Not a loss transformation: it evaluates the model itself. Normalise inside ``task_losses``.
    Routers that read features are not supported.

    Args:
        task_losses: ``task_losses(params, *args) -> losses``, (K,) or a dict, list or tuple of
            scalars.
        optimizer: Optax optimiser of the model.
        inner_optimizer: Optax optimiser of the inner copy z, such as ``optax.sgd(1e-2)``.
        inner_steps: N >= 0, inner steps on z per training step, on the same batch; static.
        penalty: λ >= 0, weight of the discrepancy, as in :func:`bilb.bilb4mtl`.
        router: the weights σ(W); ``bilb.routers.sigmoid()`` if None.
        discrepancy: as in :func:`bilb.bilb4mtl`; ``bilb.discrepancies.adjacent`` if None.
        weighted: as in :func:`bilb.bilb4mtl`.
        divisor: as in :func:`bilb.bilb4mtl`; g stands for g / s.
        router_optimizer: Optax optimiser of the router; Adam at 1e-3 if None.

    Returns:
        A :class:`bilb.TrainingStep`: ``state = init(params, *args)``, where z starts at the
        parameters, and ``params, state, losses = update(params, state, *args)``, the losses (K,)
        being those before the step. z is kept from one step to the next.

    Raises:
        ValueError: for a negative ``inner_steps`` or penalty, a penalty that is not one number, or
            losses that are not (K,).

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum((x - 1) ** 2), 10 * jnp.sum((x + 1) ** 2)])
        >>> training = bilb.bilb4mtl_double_loop(
        ...     task_losses, optax.sgd(1e-2), inner_optimizer=optax.sgd(1e-2), inner_steps=20
        ... )
        >>> x = jnp.zeros(2)
        >>> state = training.init(x)
        >>> x, state, losses = jax.jit(training.update)(x, state)
        >>> print(losses)
        [ 2. 20.]

    References:
        Xiao et al., arXiv 2502.08585, Algorithm 1; the first-order penalty is that of Kwon et al.,
        2023.
    """
    checks.number("inner_steps", inner_steps, minimum=0, whole=True, static=True)
    checks.number("penalty", penalty, minimum=0, schedule=True)
    optimizer = checks.optimizer("optimizer", optimizer, optimizer)
    inner_optimizer = checks.optimizer("inner_optimizer", inner_optimizer, inner_optimizer)
    router_optimizer = checks.optimizer("router_optimizer", router_optimizer, optax.adam(1e-3))
    router = routers.sigmoid() if router is None else router
    discrepancy = discrepancies.adjacent if discrepancy is None else discrepancy
    balance = balanced_losses(router, discrepancy, weighted=weighted, divisor=divisor)

    def init(params, num_tasks, dtype):
        parameters = router.init(num_tasks, dtype)
        return DoubleLoopState(
            step=base.new_step(),
            router=parameters,
            weights=jnp.ones(num_tasks, dtype),
            # A copy, so that parameters and state can both be donated.
            inner_params=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
            inner_opt_state=inner_optimizer.init(params),
            router_opt_state=router_optimizer.init(parameters),
        )

    def update(params, state, *args):
        current = base.at_step(penalty, state.step)

        def scalarised(parameters, z):
            losses = names.stack(task_losses(z, *args))
            return balance(parameters, losses, None, None, 0.0)[0].sum()

        by_z = lambda z: jax.grad(scalarised, argnums=1)(state.router, z)
        z, inner_opt_state = descend(
            inner_optimizer, by_z, state.inner_params, state.inner_opt_state, inner_steps
        )

        def objective(params, parameters):
            losses = names.stack(task_losses(params, *args))
            balanced, weights = balance(parameters, losses, None, None, current)
            value = balanced.sum() - scalarised(parameters, jax.lax.stop_gradient(z))
            return value, (losses, weights)

        (gradient, by_router), (losses, weights) = jax.grad(
            objective, argnums=(0, 1), has_aux=True
        )(params, state.router)
        parameters, router_opt_state = move(
            router_optimizer, by_router, state.router, state.router_opt_state
        )
        new_state = state._replace(
            router=parameters,
            weights=weights,
            inner_params=z,
            inner_opt_state=inner_opt_state,
            router_opt_state=router_opt_state,
        )
        return gradient, new_state, losses

    return training_step(task_losses, optimizer, init, update)
