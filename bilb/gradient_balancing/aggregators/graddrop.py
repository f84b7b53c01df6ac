"""GradDrop: at every coordinate, follow either the tasks that push up or those that push down."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.gradient_balancing.aggregators import aggregator


class GradDropState(NamedTuple):
    """State of :func:`graddrop`."""

    key: jax.Array  # JAX key of the draws to come


def graddrop(
    key: int | jax.Array = 0,
    *,
    leak: float | jax.Array = 0.0,
    shared: base.PyTree = True,
) -> optax.GradientTransformationExtraArgs:
    """Gradient sign dropout: drops, coordinate by coordinate, the gradients of one sign.

    ``P = ½ (1 + Σ_k g_k / Σ_k |g_k|)``, ``U ~ Uniform(0, 1)``, both of the shape of one gradient;
    ``Σ_k (λ_k + (1 - λ_k) M_k) g_k`` with ``M_k = 1[P > U] 1[g_k > 0] + 1[P < U] 1[g_k < 0]``

    The sign is drawn with the probability of its share of the gradients' absolute values, so a
    coordinate on which all tasks agree is summed as it is, and the expected direction at a
    conflict is that of the sum. The scale is that of the sum of the task gradients. The paper drops
    gradients at a layer of activations, where they carry a batch axis; as the other codes do, this
    drops those of the parameters. The official code of FAMO and others adds 1e-8 to the divisor.

    A task that is masked, or whose gradient is not finite, is left out. All leaves are in memory K
    times.

    Args:
        key: seed or JAX key.
        leak: λ in [0, 1], one number or (K,): the part of a task's gradient that is never dropped.
        shared: bools in a pytree prefix of the parameters, True for those that tasks share; the
            gradients of the others are summed.

    Returns:
        An aggregator: ``update(task_gradients, state, params, *, mask=None)``, the first link of
        an optimiser's chain. Its state has the field ``key``. ``shared`` is static in
        ``optax.inject_hyperparams``.

    Raises:
        ValueError: for a concrete ``leak`` outside [0, 1] or of another shape, or a leaf whose
            leading axis is not the number of tasks.

    Example:
        >>> import jax.numpy as jnp, optax, bilb
        >>> optimizer = optax.chain(bilb.graddrop(key=1), optax.sgd(1.0))
        >>> x = jnp.zeros(2)
        >>> task_gradients = jnp.array([[1.0, 2.0], [3.0, -2.0]])
        >>> updates, state = optimizer.update(task_gradients, optimizer.init(x), x)
        >>> print(updates[0], abs(updates[1]))
        -4.0 2.0

    References:
        Chen et al., *Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign
        Dropout*, arXiv 2010.06808.
    """
    checks.key(key)
    checks.number("leak", leak, minimum=0, maximum=1, per_task=True, schedule=False)

    def init(num_tasks, params):
        del num_tasks, params
        return GradDropState(base.as_key(key))

    def aggregate(rows, state, *, present, losses):
        del losses
        key, subkey = jax.random.split(state.key)
        leaks = checks.per_task("leak", leak, present.shape[0])
        leaves, structure = jax.tree.flatten(rows)
        keys = jax.random.split(subkey, max(len(leaves), 1))
        kept = [
            keep_one_sign(leaf, jax.random.uniform(key, leaf.shape[1:], leaf.dtype), leaks)
            for leaf, key in zip(leaves, keys)
        ]
        return structure.unflatten(kept), GradDropState(key)

    return aggregator.aggregator("graddrop", init, aggregate, shared=shared)


def keep_one_sign(rows: jax.Array, uniform: jax.Array, leaks: jax.Array) -> jax.Array:
    """Returns the sum over tasks of the gradients of the sign that is drawn.

    Args:
        rows: (K, *shape).
        uniform: U in [0, 1), of that shape.
        leaks: λ (K,).
    """
    total = jnp.sum(jnp.abs(rows), axis=0)
    purity = 0.5 * (1 + jnp.sum(rows / jnp.where(total > 0, total, 1), axis=0))
    chosen = ((purity > uniform) & (rows > 0)) | ((purity < uniform) & (rows < 0))
    leaks = aggregator.per_task(leaks, rows).astype(rows.dtype)
    return jnp.sum(jnp.where(chosen, rows, leaks * rows), axis=0)
