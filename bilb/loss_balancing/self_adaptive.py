"""Self-adaptive weights, arXiv 2009.04544, one a task: the weights ascend the weighted loss."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks


class SelfAdaptiveState(NamedTuple):
    """State of :func:`self_adaptive`."""

    scales: jax.Array  # (K,) λ
    weights: jax.Array  # (K,) the weights λ^q just used
    opt_state: optax.OptState  # of λ


def self_adaptive(
    exponent: float | jax.Array = 2.0,
    *,
    initial: float | jax.Array = 1.0,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Learns weights by gradient ascent, so that a task weighs more the longer its loss is large.

    ``min_x max_{λ >= 0} Σ_k λ_k^q l_k(x)``, by descent of the model and ascent of λ at the same
    time

    The paper has a weight for every training point; this is the form with one for every loss, as
    for its initial and boundary conditions. Since losses are positive, weights only ever grow, and
    with Adam all of them at about the same speed: it is the differences in the losses' history that
    balance. An ``optax.sgd`` in its place lets λ grow in proportion to ``λ^(q - 1) l``.

    The weights are not negative, of no fixed sum. A non-finite loss stays in its own entry and
    teaches nothing. Gradients of λ beyond 2e16 (float32) count as that.

    Args:
        exponent: q >= 1 of the paper's mask function m(λ) = λ^q. Default 2; 1 makes λ itself the
            weight.
        initial: initial λ >= 0, one number or (K,); with q > 1 a λ of 0 stays 0.
        optimizer: Optax optimiser of λ, which is given the negative gradient; Adam at 5e-3 if
            None, the paper's rate depends on the problem.

    Returns:
        A loss transformation whose state has the fields ``scales`` (K,), ``weights`` (K,) and
        ``opt_state``.

    Raises:
        ValueError: for a concrete ``exponent`` < 1, or an ``initial`` that is negative, or neither
            a number nor (K,).

    Example:
        >>> import jax.numpy as jnp, numpy as np, optax, bilb
        >>> balancer = bilb.self_adaptive(optimizer=optax.sgd(0.1))
        >>> state = balancer.init(jnp.ones(2))
        >>> for _ in range(2):
        ...     balanced, state = balancer.update(jnp.array([2.0, 0.5]), state)
        ...     print(np.asarray(state.weights).round(3), np.asarray(state.scales).round(3))
        [1. 1.] [1.4 1.1]
        [1.96 1.21] [1.96 1.21]

    References:
        McClenny and Braga-Neto, *Self-Adaptive Physics-Informed Neural Networks*,
        arXiv 2009.04544.
    """
    checks.number("exponent", exponent, minimum=1)
    checks.number("initial", initial, minimum=0, per_task=True)
    optimizer = checks.optimizer("optimizer", optimizer, optax.adam(5e-3))

    def init(num_tasks, dtype):
        initial_scales = checks.per_task("initial", initial, num_tasks)
        scales = jnp.array(initial_scales, dtype, copy=True)
        return SelfAdaptiveState(scales, scales**exponent, optimizer.init(scales))

    def update(losses, state, *, mask, **_):
        scales, weights = state.scales, state.scales**exponent
        usable = base.usable(losses, mask)
        ascent = exponent * scales ** (exponent - 1) * jax.lax.stop_gradient(losses)
        ascent = base.bounded_gradient(jnp.where(usable, ascent, 0.0))
        updates, opt_state = optimizer.update(-ascent, state.opt_state, scales)
        new = SelfAdaptiveState(jnp.maximum(scales + updates, 0.0), weights, opt_state)
        shapes = lambda k: jax.eval_shape(lambda: init(k, losses.dtype))
        return weights * losses, base.learn_where(usable, new, state, shapes)

    return base.loss_transformation(init, update)
