"""PCGrad, arXiv 2001.06782: projects each task gradient off those that it conflicts with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.gradient_balancing.algebra import random_orders
from bilb.gradient_balancing.weighting import gram_weighting


def pcgrad(
    *, key: int | jax.Array = 0, decay: base.Scalar = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Gradient surgery: removes from each task gradient what conflicts with another one.

    For every task i, ``g = g_i``; then for the other tasks j in random order, where ``g · g_j <
    0``, ``g ← g - (g · g_j) / ‖g_j‖² g_j``. The direction is the sum of what is left of all tasks.

    ``update`` needs the extra argument ``gram`` (K, K), which :func:`bilb.value_and_grad` and
    :func:`bilb.aggregate_by` supply. All projections take place in the coefficients of the task
    gradients. The weights are at least 1: the sum over tasks, as in the paper; chain
    ``bilb.linear_scalarization(1 / K)`` behind for the mean.

    The order of the other tasks is drawn anew at every call and for every task. The official code
    and its descendants also visit the task itself. Tasks whose gradient is zero conflict with
    nobody, and two opposite gradients cancel each other: the step is zero there.

    Args:
        key: seed or JAX key of the orders.
        decay: of a running mean of the Gram matrix in place of each step's own, in [0, 1).

    Returns:
        A loss transformation; ``update(losses, state, *, gram)``. Its state has the fields
        ``step``, ``weights`` (K,), ``memory``, the key of the orders to come, and ``mean``.

    Raises:
        ValueError: for a concrete ``decay`` outside [0, 1), or a ``gram`` that is not (K, K).
        MissingArgument: for a call without ``gram``.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.pcgrad()
        >>> losses = jnp.array([1.0, 1.0])
        >>> gram = jnp.array([[4.0, -1.0], [-1.0, 1.0]])
        >>> balanced, state = balancer.update(losses, balancer.init(losses), gram=gram)
        >>> print(balanced)
        [1.25 2.  ]

    References:
        Yu et al., *Gradient surgery for multi-task learning*, arXiv 2001.06782.
    """
    checks.key(key)

    def weigh(gram, memory, step):
        del step
        key, subkey = jax.random.split(memory)
        return surgery(gram.matrix, random_orders(subkey, gram.matrix.shape[0])), key

    return gram_weighting(
        "pcgrad", weigh, decay=decay, memory=lambda num_tasks, dtype: base.as_key(key)
    )


def surgery(gram: jax.Array, orders: jax.Array) -> jax.Array:
    """Returns the weights (K,) after each task i met the tasks ``orders[i]`` (K, M), in order."""
    tasks, squares = jnp.arange(gram.shape[0]), jnp.diagonal(gram)

    def meet(coefficients, others):
        products = jnp.sum(gram[others] * coefficients, axis=1)
        conflict = (products < 0) & (squares[others] > 0)
        share = jnp.where(conflict, products / jnp.where(conflict, squares[others], 1.0), 0.0)
        return coefficients.at[tasks, others].add(-share), None

    coefficients, _ = jax.lax.scan(meet, jnp.eye(gram.shape[0], dtype=gram.dtype), orders.T)
    return coefficients.sum(axis=0)
