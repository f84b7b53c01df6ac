"""MoDo, arXiv 2305.20057: MGDA's weights by one step at a time, from two independent batches."""

from __future__ import annotations

import optax

from bilb import base, checks
from bilb.gradient_balancing.algebra import onto_simplex, uniform
from bilb.gradient_balancing.weighting import gram_weighting


def modo(
    gamma: base.Scalar = 1e-3, rho: base.Scalar = 0.1, *, decay: base.Scalar = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Multi-objective gradient with double sampling: a projected step on the weights at each call.

    ``λ ← Π_Δ(λ - γ (A λ + ρ λ))`` with ``A = J₁ J₂ᵀ``, an unbiased estimate of ``J Jᵀ``.

    ``update`` needs the extra argument ``gram`` (K, K). With one batch it is the Gram matrix of
    that batch, biased towards noisy tasks. As in the paper, give an independent batch to the
    driver: ``value_and_grad(params, state, batch, gram_args=(batch_2,))`` makes ``gram[i, j]`` the
    product of task i's gradient on ``batch_2`` with task j's on ``batch``. The gradient that is
    returned is that of ``batch``; a batch of its own for each of the three factors is
    ``gram_args=[(batch_1,), (batch_2,)]``, as in LibMTL. :func:`bilb.aggregate_by` knows one batch.

    The step size γ is in units of one over squared gradients: choose it by their scale, or balance
    logarithms, ``bilb.chain(bilb.log_losses(), bilb.modo())``.

    Args:
        gamma: γ > 0, step size of the weights; 1e-3 as in LibMTL, .1 in TorchJD.
        rho: ρ >= 0, pull towards equal weights; .1 as in both.
        decay: of a running mean of A in place of each step's own, in [0, 1).

    Returns:
        A loss transformation; ``update(losses, state, *, gram)``. Its state has the fields
        ``step``, ``weights`` (K,), which are not negative and sum to 1, ``memory``, which are the
        weights of all tasks, 1/K at first, and ``mean``.

    Raises:
        ValueError: for a concrete ``gamma`` <= 0, ``rho`` < 0 or ``decay`` outside [0, 1), or a
            ``gram`` that is not (K, K).
        MissingArgument: for a call without ``gram``.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.modo(gamma=0.125, rho=0.0)
        >>> losses = jnp.array([1.0, 1.0])
        >>> gram = jnp.array([[4.0, 0.0], [0.0, 2.0]])
        >>> balanced, state = balancer.update(losses, balancer.init(losses), gram=gram)
        >>> print(balanced)
        [0.4375 0.5625]

    References:
        Chen et al., *Three-way trade-off in multi-objective learning: optimization, generalization
        and conflict-avoidance*, arXiv 2305.20057.
    """
    checks.number("gamma", gamma, minimum=0, exclusive=True, schedule=True)
    checks.number("rho", rho, minimum=0, schedule=True)

    def weigh(gram, memory, step):
        lam = onto_simplex(memory, gram.present)
        gradient = gram.scale**2 * (gram.matrix @ lam) + base.at_step(rho, step) * lam
        gradient = base.bounded_gradient(gradient)
        lam = onto_simplex(lam - base.at_step(gamma, step) * gradient, gram.present)
        return lam, lam

    return gram_weighting("modo", weigh, decay=decay, memory=uniform)
