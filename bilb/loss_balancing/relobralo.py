"""ReLoBRaLo, relative loss balancing with random lookback, arXiv 2110.09813."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.loss_balancing import joint


class ReLoBRaLoState(NamedTuple):
    """State of :func:`relobralo`."""

    key: jax.Array  # JAX key of the coins to come
    weights: jax.Array  # (K,) λ just used; 1 at first
    last_losses: jax.Array  # (K,) of the last update where the task was present and finite
    initial_losses: jax.Array  # (K,) of the first such update
    seen: jax.Array  # (K,) bool, whether there was one


def relobralo(
    alpha: float | jax.Array = 0.999,
    temperature: float | jax.Array = 0.1,
    rho: float | jax.Array = 0.99,
    *,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Weighs the losses by their progress since the last step and, now and then, since the first.

    ``objective = Σ_k λ_k l_k`` with ``b(t, s) = K softmax(l(t) / (T l(s)))`` and

    ``λ(t) = α (ρ λ(t-1) + (1 - ρ) b(t, 0)) + (1 - α) b(t, t-1)``, ρ a fresh coin, 0 or 1, at every
    step

    A running mean with memory ``alpha`` of weights by the progress of one step; at a random share
    ``1 - rho`` of the steps the memory is replaced by weights by the progress since the start.

    The weights are not negative and sum to K; where masks are in use, the sum over the present
    tasks is near their number only, as each keeps the weight that it had. A ratio is 1 where the
    earlier loss is zero or there is none. A non-finite loss stays in its own entry and is not
    remembered. Losses must be positive for ratios to measure progress.

    Args:
        alpha: α in [0, 1], the memory of the weights. Default 0.999, as in ports of the official
            code; jinns has 0.9.
        temperature: T > 0, larger for more equal weights. Default 0.1, likewise.
        rho: the probability of ρ = 1, in [0, 1]. Default 0.99, likewise; jinns has 0.9.
        key: seed or JAX key.

    Returns:
        A loss transformation whose state has the fields ``key``, ``weights`` (K,), ``last_losses``
        (K,), ``initial_losses`` (K,) and ``seen`` (K,). No argument is static in
        ``optax.inject_hyperparams`` but a ``key`` that is a seed.

    Raises:
        ValueError: for concrete numbers out of these ranges, or arrays in their place.

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.relobralo(alpha=0.9, temperature=1.0)
        >>> state = balancer.init(jnp.ones(2))
        >>> for losses in ([4.0, 1.0], [2.0, 1.0]):
        ...     balanced, state = balancer.update(jnp.array(losses), state)
        ...     print(np.asarray(state.weights).round(3))
        [1. 1.]
        [0.976 1.024]

    References:
        Bischof and Kraus, *Multi-Objective Loss Balancing for Physics-Informed Deep Learning*,
        arXiv 2110.09813.
    """
    checks.key(key)
    checks.number("alpha", alpha, minimum=0, maximum=1)
    checks.number("temperature", temperature, minimum=0, exclusive=True)
    checks.number("rho", rho, minimum=0, maximum=1)

    def init(num_tasks, dtype):
        return ReLoBRaLoState(
            key=base.as_key(key),
            weights=jnp.ones(num_tasks, dtype),
            last_losses=jnp.zeros(num_tasks, dtype),
            initial_losses=jnp.zeros(num_tasks, dtype),
            seen=jnp.zeros(num_tasks, bool),
        )

    def update(losses, state, *, mask, statistics_of=None, **_):
        observed = jax.lax.stop_gradient(losses if statistics_of is None else statistics_of)
        usable = base.usable(observed, mask)

        def balance(earlier):
            known = state.seen & usable & (earlier != 0)
            ratio = jnp.where(known, observed / jnp.where(known, earlier, 1.0), 1.0)
            softmax = joint.smooth_maximum(ratio, temperature, mask)[1]
            return base.num_present(losses, mask) * softmax

        key, subkey = jax.random.split(state.key)
        keeps = jax.random.bernoulli(subkey, rho)
        memory = jnp.where(keeps, state.weights, balance(state.initial_losses))
        weights = alpha * memory + (1 - alpha) * balance(state.last_losses)
        return weights * losses, ReLoBRaLoState(
            key=key,
            weights=weights,
            last_losses=jnp.where(usable, observed, state.last_losses),
            initial_losses=jnp.where(usable & ~state.seen, observed, state.initial_losses),
            seen=state.seen | usable,
        )

    return base.loss_transformation(init, update)
