"""Gram matrices of the task gradients, ``G = J Jᵀ`` (K, K), and the ways to take them.

:func:`exact`, :func:`stacked` and :func:`sketch` return what :func:`bilb.value_and_grad` takes as
``gram=``; ``bilb.grams.exact()(task_losses, params, *args)`` is the same by hand. All are symmetric
and in float32 at least.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilb import base, jacobian


def exact(chunk_size: int | None = None) -> Exact:
    """The Gram matrix column by column, ``G e_k = J (Jᵀ e_k)``, from one linearisation.

    K backward and K forward passes, and no more memory than one task gradient.

    Args:
        chunk_size: how many columns are computed at once, for speed in exchange for the memory of
            as many task gradients; one if None; static.

    Returns:
        ``gram(task_losses, params, *args) -> (K, K)``.

    Raises:
        ValueError: for a ``chunk_size`` below 1.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum(x**2), x[0]])
        >>> print(bilb.grams.exact()(task_losses, jnp.array([1.0, 2.0])))
        [[20.  2.]
         [ 2.  1.]]
    """
    base.check_number("chunk_size", chunk_size, minimum=1)
    return Exact(chunk_size)


def stacked(chunk_size: int | None = None) -> Stacked:
    """The Gram matrix from all task gradients at once, which the step then combines.

    K backward passes in all, one less than with :func:`exact` and no forward passes, in the memory
    of K task gradients.

    Args:
        chunk_size: how many task gradients are computed at once; all if None; static.

    Returns:
        ``gram(task_losses, params, *args) -> (K, K)``.

    Raises:
        ValueError: for a ``chunk_size`` below 1.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum(x**2), x[0]])
        >>> print(bilb.grams.stacked()(task_losses, jnp.array([1.0, 2.0])))
        [[20.  2.]
         [ 2.  1.]]
    """
    base.check_number("chunk_size", chunk_size, minimum=1)
    return Stacked(chunk_size)


@dataclasses.dataclass(frozen=True)
class Engine:
    """A way to take Gram matrices."""

    def __call__(
        self,
        task_losses: Any,
        params: base.PyTree,
        *args: Any,
        at: jacobian.Linearization | None = None,
        step: int | jax.Array = 0,
    ) -> jax.Array:
        """Returns the Gram matrix (K, K).

        Args:
            task_losses: ``task_losses(params, *args) -> losses (K,)``.
            params: pytree of floating point arrays.
            *args: passed on: the batch.
            at: the linearisation at ``params`` and ``args`` if it exists already.
            step: the number of the call, which random estimates draw by.
        """
        if at is None:
            at = jacobian.Linearization(*jacobian.linearize(task_losses, params, *args))
        return self.of(at, params, step)

    def of(self, at: jacobian.Linearization, params: base.PyTree, step: Any) -> jax.Array:
        """Returns the Gram matrix (K, K) of a linearisation."""
        raise NotImplementedError

    def norms(self, at: jacobian.Linearization, params: base.PyTree, step: Any) -> jax.Array:
        """Returns the norms (K,) of the task gradients of a linearisation."""
        return jnp.sqrt(jnp.maximum(jnp.diagonal(self.of(at, params, step)), 0.0))


@dataclasses.dataclass(frozen=True)
class Exact(Engine):
    """What :func:`exact` returns."""

    chunk_size: int | None

    def of(self, at, params, step):
        """Returns the Gram matrix (K, K) of a linearisation."""
        return of_linearization(at, self.chunk_size)

    def norms(self, at, params, step):
        """Returns the norms (K,) of the task gradients, for K backward passes."""
        return norms_of_linearization(at, self.chunk_size)


@dataclasses.dataclass(frozen=True)
class Stacked(Engine):
    """What :func:`stacked` returns."""

    chunk_size: int | None

    def rows(self, pullback: Any, losses: jax.Array) -> base.PyTree:
        """Returns the task gradients, leaves (K, *shape)."""
        return jacobian.rows(pullback, losses, self.chunk_size or losses.shape[0])

    def of(self, at, params, step):
        """Returns the Gram matrix (K, K) of a linearisation."""
        return of_rows(self.rows(at.pullback, at.losses))


def of_linearization(at: jacobian.Linearization, chunk_size: int | None = None) -> jax.Array:
    """Returns the Gram matrix (K, K) column by column, ``chunk_size`` of them at once."""

    def column(one_hot):
        return at.pushforward(at.pullback(one_hot))

    gram = _map_tasks(column, at.losses, chunk_size)
    return 0.5 * (gram + gram.T)


def norms_of_linearization(at: jacobian.Linearization, chunk_size: int | None = None) -> jax.Array:
    """Returns the norms (K,) of the task gradients, ``chunk_size`` of them at once."""
    return _map_tasks(lambda one_hot: norm(at.pullback(one_hot)), at.losses, chunk_size)


def of_rows(task_gradients: base.PyTree) -> jax.Array:
    """Returns the Gram matrix (K, K) of stacked task gradients, leaves (K, *shape)."""

    def leaf(rows):
        rows = rows.astype(base.at_least_float32(rows.dtype))
        axes = tuple(range(1, rows.ndim))
        # Explicitly sharded leaves need to be told that the product of rows is whole everywhere.
        mesh = jax.typeof(rows).sharding.mesh
        explicit = jax.sharding.AxisType.Explicit in mesh.axis_types
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()) if explicit else None
        return jax.lax.dot_general(
            rows,
            rows,
            ((axes, axes), ((), ())),
            precision="highest",
            out_sharding=whole,
        )

    return sum(leaf(rows) for rows in jax.tree.leaves(task_gradients))


def products(task_gradients: base.PyTree, direction: base.PyTree) -> jax.Array:
    """Returns the inner products (K,) of stacked task gradients with one direction."""

    def leaf(rows, direction):
        wide = base.at_least_float32(rows.dtype)
        return jax.vmap(lambda row: jnp.sum(row.astype(wide) * direction))(rows)

    return sum(jax.tree.leaves(jax.tree.map(leaf, task_gradients, direction)))


def norm(gradient: base.PyTree) -> jax.Array:
    """Returns the norm of a gradient, summed in float32 at least."""
    wide = jax.tree.map(lambda g: g.astype(base.at_least_float32(g.dtype)), gradient)
    return optax.tree.norm(wide)


def _map_tasks(function, losses, chunk_size):
    one_hots = jnp.eye(losses.shape[0], dtype=base.at_least_float32(losses.dtype))
    return jax.lax.map(function, one_hots, batch_size=chunk_size)
