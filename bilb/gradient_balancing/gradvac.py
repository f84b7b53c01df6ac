"""Gradient vaccine, arXiv 2010.05874: turns each task gradient until it agrees as much as usual."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.gradient_balancing.algebra import random_orders
from bilb.gradient_balancing.weighting import Gram, gram_weighting


class GradVacMemory(NamedTuple):
    """What :func:`gradvac` remembers."""

    key: jax.Array  # JAX key of the orders to come
    cosines: jax.Array  # (K, K) φ̂, the running means of the cosines; 0 at first


def gradvac(
    beta: base.Scalar = 0.5,
    *,
    eps: base.Scalar = 0.0,
    key: int | jax.Array = 0,
    decay: base.Scalar = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Gradient vaccine: PCGrad with the usual cosine of a pair in the place of zero.

    For every task i, ``g = g_i``; then for the other tasks j in random order, with φ the cosine of
    g and g_j and φ̂_ij its running mean, where ``φ < φ̂_ij``

    ``g ← g + ‖g‖ (φ̂ √(1 - φ²) - φ √(1 - φ̂²)) / (‖g_j‖ √(1 - φ̂²)) g_j``,

    and ``φ̂_ij ← (1 - β) φ̂_ij + β φ``. The direction is the sum of what became of all tasks.

    ``update`` needs the extra argument ``gram`` (K, K), which :func:`bilb.value_and_grad` and
    :func:`bilb.aggregate_by` supply: norms and cosines of the changed gradients follow from their
    coefficients. The weights are at least 1; chain ``bilb.linear_scalarization(1 / K)`` behind for
    the mean instead of the sum. The cosines are those of all shared parameters together; the
    paper also takes them by layer.

    A pair of which one gradient is zero, or what is left of it is rounding noise, has no cosine:
    nothing is added and nothing learnt. A usual cosine close to 1 asks for steps without bound:
    its sine counts as the root of the machine epsilon at least.

    Args:
        beta: β, how fast the usual cosines follow, in [0, 1]; .5 in LibMTL and TorchJD, .01 in the
            paper's experiments.
        eps: added to the denominators, in units of the gradients, for comparison with LibMTL and
            TorchJD, which have 1e-8 there; small gradients then count for less.
        key: seed or JAX key of the orders.
        decay: of a running mean of the Gram matrix in place of each step's own, in [0, 1).

    Returns:
        A loss transformation; ``update(losses, state, *, gram)``. Its state has the fields
        ``step``, ``weights`` (K,), ``memory`` with ``key`` and ``cosines`` (K, K), and ``mean``.

    Raises:
        ValueError: for a concrete ``beta`` outside [0, 1], a negative ``eps``, a ``decay`` outside
            [0, 1), or a ``gram`` that is not (K, K).
        MissingArgument: for a call without ``gram``.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.gradvac()
        >>> losses = jnp.array([1.0, 1.0])
        >>> gram = jnp.array([[4.0, -1.0], [-1.0, 1.0]])
        >>> balanced, state = balancer.update(losses, balancer.init(losses), gram=gram)
        >>> print(balanced, state.memory.cosines[0])
        [1.25 2.  ] [ 0.   -0.25]

    References:
        Wang et al., *Gradient vaccine: investigating and improving multi-task optimization in
        massively multilingual models*, arXiv 2010.05874.
    """
    checks.key(key)
    checks.number("beta", beta, minimum=0, maximum=1, schedule=True)
    checks.number("eps", eps, minimum=0, schedule=True)

    def init(num_tasks, dtype):
        return GradVacMemory(base.as_key(key), jnp.zeros((num_tasks, num_tasks), dtype))

    def weigh(gram, memory, step):
        key, subkey = jax.random.split(memory.key)
        orders = random_orders(subkey, gram.matrix.shape[0])
        numbers = base.at_step(beta, step), base.at_step(eps, step)
        weights, usual = vaccinate(gram, memory.cosines, orders, *numbers)
        return weights, GradVacMemory(key, usual)

    return gram_weighting("gradvac", weigh, decay=decay, memory=init)


def vaccinate(
    gram: Gram, usual: jax.Array, orders: jax.Array, beta: jax.Array, eps: jax.Array | float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Returns weights and cosines after each task i met the tasks ``orders[i]`` (K, M), in order.

    Args:
        gram: the Gram matrix.
        usual: φ̂ (K, K).
        orders: (K, M) int.
        beta: β.
        eps: added to the denominators, in units of the gradients.
    """
    matrix, eps = gram.matrix, eps / gram.scale
    num_tasks = matrix.shape[0]
    tasks, norms = jnp.arange(num_tasks), jnp.sqrt(jnp.maximum(jnp.diagonal(matrix), 0.0))
    epsilon = float(jnp.finfo(matrix.dtype).eps)
    sine = lambda cosine: jnp.sqrt(jnp.maximum(1 - cosine**2, 0.0))

    def meet(carry, others):
        coefficients, products, usual = carry  # rows: of g, of g · g_j, of φ̂
        norm_other, target = norms[others], usual[tasks, others]
        square = jnp.sum(products * coefficients, axis=1)
        left = jnp.max(jnp.abs(products) / jnp.where(norms > 0, norms, jnp.inf), axis=1)
        noise = 4 * num_tasks * epsilon * (jnp.abs(coefficients) @ norms)
        usable = (square > 0) & (left > noise) & (norm_other > 0)
        norm = jnp.sqrt(jnp.where(usable, square, 1.0))
        norm_other = jnp.where(usable, norm_other, 1.0)
        cosine = products[tasks, others] / (norm * norm_other + eps / gram.scale)
        cosine = jnp.clip(cosine, -1.0, 1.0)
        of_target = jnp.maximum(sine(target), epsilon**0.5)
        step = norm * (target * sine(cosine) - cosine * of_target) / (norm_other * of_target + eps)
        step = jnp.where(usable & (cosine < target), step, 0.0)
        seen = jnp.where(usable, (1 - beta) * target + beta * cosine, target)
        return (
            coefficients.at[tasks, others].add(step),
            products + step[:, None] * matrix[others],
            usual.at[tasks, others].set(seen),
        ), None

    start = jnp.eye(num_tasks, dtype=matrix.dtype), matrix, usual.astype(matrix.dtype)
    (coefficients, _, usual), _ = jax.lax.scan(meet, start, orders.T)
    return coefficients.sum(axis=0), usual
