"""MoCo: weights by a step on the min-norm problem of tracked, not of momentary, gradients."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks, jacobian
from bilb import grams as gram_engines
from bilb.gradient_balancing.aggregators import aggregator


class MoCoState(NamedTuple):
    """State of :func:`moco`."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) λ of the step; 1 / K at first
    tracked_gradients: base.PyTree  # y, leaves (K, *shape); 0 at first


def moco(
    num_tasks: int,
    *,
    beta: base.Scalar = 0.5,
    beta_sigma: base.Scalar = 0.5,
    gamma: base.Scalar = 0.1,
    gamma_sigma: base.Scalar = 0.5,
    rho: base.Scalar = 0.0,
    scheme: Literal["softmax", "projection"] = "softmax",
    normalize: bool = True,
    shared: base.PyTree = True,
) -> optax.GradientTransformationExtraArgs:
    """Multi-objective gradient with correction: MGDA's weights and direction without their bias.

    ``y_k ← y_k - β_t (y_k - ĝ_k)``, ``ĝ_k = l_k g_k / ‖g_k‖``, ``β_t = β / t^σ``;
    ``λ ← softmax(λ - γ_t (y yᵀ + ρ I) λ)``, ``γ_t = γ / t^σ``; the direction is ``yᵀ λ``

    The min-norm weights of mini-batch gradients are biased. MoCo follows running means of the
    gradients instead, and its weights do one step per step of the model.

    The defaults are those of LibMTL's code, written after that of the authors: gradients of the
    length of their loss, and the softmax of what is a point of the simplex already, so that the
    weights stay near 1 / K. The paper tracks the gradients as they are and projects onto the
    simplex: ``normalize=False, scheme="projection"``. The state holds K gradients in float32 at
    least; ``optax.tree.map_params`` takes them for parameters, so shard them with one more axis in
    front.

    A task that is masked, or whose gradient or loss is not finite, is left out; its tracked
    gradient and its weight stay as they were, and the weights of the others sum to one.

    Args:
        num_tasks: K; static.
        beta: β in [0, 1], how far the tracked gradients move.
        beta_sigma: β is divided by t^σ, t = 1, 2, ... the number of the step.
        gamma: γ >= 0, step size of the weights.
        gamma_sigma: γ is divided by t^σ.
        rho: ρ >= 0, pull towards equal weights.
        scheme: how the weights stay on the simplex: "softmax" or "projection"; static.
        normalize: whether to scale the gradients to the length of their loss; static. Without,
            ``losses=`` is not needed.
        shared: bools in a pytree prefix of the parameters, True for those that tasks share; the
            gradients of the others are summed as they are.

    Returns:
        An aggregator: ``update(task_gradients, state, params, *, losses, mask=None)``, the first
        link of an optimiser's chain. Its state has the fields ``step``, ``weights`` (K,) and
        ``tracked_gradients``. ``num_tasks``, ``scheme``, ``normalize`` and ``shared`` are static
        in ``optax.inject_hyperparams``.

    Raises:
        ValueError: for ``num_tasks`` < 1, concrete hyperparameters out of range, an unknown
            ``scheme``, losses that are not (K,), or a leaf whose leading axis is not the number of
            tasks.
        MissingArgument: for a call without ``losses=``.

    Example:
        >>> import jax.numpy as jnp, optax, bilb
        >>> balance = bilb.moco(2, beta=1.0, gamma=0.5, scheme="projection", normalize=False)
        >>> x = jnp.zeros(2)
        >>> task_gradients = jnp.array([[1.0, 0.0], [0.0, 0.5]])
        >>> gradient, state = balance.update(task_gradients, balance.init(x), x)
        >>> print(state.weights, gradient)
        [0.40625 0.59375] [0.40625  0.296875]

    References:
        Fernando et al., *Mitigating Gradient Bias in Multi-objective Learning: A Provably
        Convergent Approach*, arXiv 2210.12624.
    """
    checks.number("beta", beta, minimum=0, maximum=1, schedule=True)
    checks.number("beta_sigma", beta_sigma, minimum=0, schedule=True)
    checks.number("gamma", gamma, minimum=0, schedule=True)
    checks.number("gamma_sigma", gamma_sigma, minimum=0, schedule=True)
    checks.number("rho", rho, minimum=0, schedule=True)
    if scheme not in ("softmax", "projection"):
        raise ValueError(f'scheme must be "softmax" or "projection"; got {scheme!r}.')

    def init(num_tasks, params):
        return MoCoState(
            step=base.new_step(),
            weights=jnp.full(num_tasks, 1 / num_tasks, aggregator.dtype_of(params)),
            tracked_gradients=aggregator.zeros(num_tasks, params),
        )

    def on_simplex(point, present):
        if scheme == "softmax":
            return jax.nn.softmax(point, where=present)
        far = -(jnp.finfo(point.dtype).max ** 0.5)
        return optax.projections.projection_simplex(jnp.where(present, point, far))

    def aggregate(rows, state, *, present, losses):
        step = optax.safe_increment(state.step)
        at_step = lambda value: base.at_step(value, state.step)
        beta_t = at_step(beta) / step ** at_step(beta_sigma)
        gamma_t = at_step(gamma) / step ** at_step(gamma_sigma)
        if normalize:
            scales = losses / (aggregator.norms(rows) + 1e-8)
            rows = jax.tree.map(lambda g: g * aggregator.per_task(scales, g), rows)
        y = jax.tree.map(lambda y, g: y - beta_t * (y - g), state.tracked_gradients, rows)
        lam = jnp.where(present, state.weights, 0)
        slopes = base.bounded_gradient(_gram_times(y, lam) + at_step(rho) * lam)
        lam = jnp.where(present, on_simplex(lam - gamma_t * slopes, present), 0)
        return jacobian.combine(lam, y), MoCoState(step, lam, y)

    return aggregator.aggregator(
        "moco", init, aggregate, num_tasks=num_tasks, shared=shared, reads_losses=normalize
    )


def _gram_times(rows, weights):
    """Returns ``J Jᵀ w`` from rows whose squares may leave the range of the dtype."""
    units, sizes = aggregator.unit_rows(rows)
    return sizes * (gram_engines.of_rows(units) @ (sizes * weights))
