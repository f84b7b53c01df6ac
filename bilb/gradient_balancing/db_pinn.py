"""DB-PINN, arXiv 2505.11117: norms say how much the conditions weigh, and losses which of them.

With ``n_k = ‖∇l_k‖``, r the residual, and ``μ_k`` the mean of the losses l_k so far, at the m-th of
renewals every so many steps:

* between residual and conditions: ``G = Σ_{k≠r} n_r / n_k``
* among the conditions: ``ŵ_k = G I_k / Σ_{j≠r} I_j``, with the difficulty ``I_k = l_k / μ_k``
* the weights are the mean of all ŵ so far, ``w_k ← w_k + (ŵ_k - w_k) / m``, and ``w_r = 1``
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks, names


class DBPINNState(NamedTuple):
    """State of :func:`db_pinn`."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) the weights just used; 1 at first
    mean_losses: jax.Array  # (K,) mean of the losses at the renewals; 0 at first
    count: jax.Array  # (K,) int32, renewals in those means


def db_pinn(
    every: int = 100,
    *,
    reference: int | str = 0,
    eps: float | jax.Array = 1e-5,
) -> optax.GradientTransformationExtraArgs:
    """Weighs the conditions of a physics-informed network against its residual, and each other.

    ``update`` needs the extra argument ``gradient_norms`` (K,) with ``every=1``, and ``gram_fn``
    with more, so that nothing is paid for at the other steps. :func:`bilb.value_and_grad` and
    :func:`bilb.aggregate_by` supply both.

    The paper compares statistics of the gradients' entries: the largest of the residual's with the
    mean magnitude of another's, weighted as it is; their standard deviations; or those over the
    kurtosis. Here it is norms, which is the second of them but for the mean of the entries.
    It has no ε: a condition whose gradient vanishes makes G at most 1 / ``eps`` here.

    The weights are not negative and of no fixed sum; that of the residual is 1. All renewals count
    alike, so that the weights move ever more slowly. A loss below zero counts as 0; one whose mean
    is 0 has difficulty 1. A task whose norm or loss is not finite is left out of a renewal and
    keeps its weight. A renewal where the residual is left out or has norm zero changes nothing.
    Norms beyond 2e16 (float32) count as that.

    Args:
        every: number of steps that the weights stay the same, from the first update on, whose norms
            already count. The official code has 10 to 100. Static.
        reference: index or name of the residual's loss; static.
        eps: ε > 0 in ``n_r / (n_k + ε n_r)``; default as in :func:`bilb.lr_annealing`.

    Returns:
        A loss transformation; ``update(losses, state, *, gradient_norms)``, or ``gram_fn`` with
        ``every > 1``. Its state has the fields ``weights``, ``mean_losses`` and ``count``, (K,)
        each. ``every`` and ``reference`` are static in ``optax.inject_hyperparams``.

    Raises:
        ValueError: for a concrete hyperparameter outside its range, a ``reference`` that is no
            task, or norms that are not (K,).
        MissingArgument: for a call without ``gradient_norms``, or ``gram_fn``.

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.db_pinn(every=1)
        >>> state = balancer.init(jnp.ones(3))
        >>> for losses in ([9.0, 2.0, 2.0], [9.0, 6.0, 2.0]):
        ...     norms = jnp.array([8.0, 4.0, 2.0])
        ...     _, state = balancer.update(jnp.array(losses), state, gradient_norms=norms)
        ...     print(np.asarray(state.weights).round(2))
        [1. 3. 3.]
        [1.  3.3 2.7]

    References:
        Zhou et al., *Dual-Balancing for Physics-Informed Neural Networks*, arXiv 2505.11117.
    """
    checks.number("every", every, minimum=1, whole=True, static=True)
    checks.number("eps", eps, minimum=0, exclusive=True)

    def init(num_tasks, dtype):
        names.index("reference", reference, num_tasks)
        return DBPINNState(
            step=base.new_step(),
            weights=jnp.ones(num_tasks, dtype),
            mean_losses=jnp.zeros(num_tasks, dtype),
            count=jnp.zeros(num_tasks, jnp.int32),
        )

    def renewed(losses, norms, state, present):
        present &= jnp.isfinite(losses) & jnp.isfinite(norms)
        losses = jnp.where(present, jnp.maximum(losses, 0.0), 0.0)
        norms = jnp.where(present, base.bounded_gradient(norms), 0.0)
        residual = names.index("reference", reference, losses.shape[0])
        level = norms[residual]
        present &= level > 0  # else there is nothing to compare with
        conditions = present & (jnp.arange(losses.shape[0]) != residual)
        count = state.count + present
        mean = lambda new, old: jnp.where(present, old + (new - old) / jnp.maximum(count, 1), old)

        divisor = norms + eps * level
        ratios = level / jnp.where(divisor > 0, divisor, 1.0)
        aggregated = jnp.sum(jnp.where(conditions, ratios, 0.0))
        means = mean(losses, state.mean_losses)
        difficulty = jnp.where(means > 0, losses / jnp.where(means > 0, means, 1.0), 1.0)
        total = jnp.sum(jnp.where(conditions, difficulty, 0.0))
        share = difficulty / jnp.where(total > 0, total, 1.0)
        weights = jnp.where(conditions, mean(aggregated * share, state.weights), state.weights)
        return state._replace(weights=weights, mean_losses=means, count=count)

    def balance(losses, state):
        return state.weights * losses, state._replace(step=optax.safe_increment(state.step))

    def update(losses, state, *, mask, gradient_norms):
        constant = jax.lax.stop_gradient(losses)
        state = renewed(constant, gradient_norms, state, base.present(losses, mask))
        return balance(losses, state)

    def update_at_times(losses, state, *, mask, gram_fn):
        def renew():
            gram = jax.lax.stop_gradient(jnp.asarray(gram_fn(), losses.dtype))
            checks.shape(gram, 2 * losses.shape, "gram_fn must return a matrix (K, K).")
            norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0.0))
            constant = jax.lax.stop_gradient(losses)
            return renewed(constant, norms, state, base.present(losses, mask))

        return balance(losses, jax.lax.cond(state.step % every == 0, renew, lambda: state))

    return base.loss_transformation(init, update if every == 1 else update_at_times)
