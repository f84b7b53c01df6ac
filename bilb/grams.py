"""Gram matrices of the task gradients, ``G = J Jᵀ`` (K, K), and the ways to take them.

:func:`exact`, :func:`stacked` and :func:`sketch` return what :func:`bilb.value_and_grad` takes as
``gram=``; ``bilb.grams.exact()(task_losses, params, *args)`` is the same by hand. All are symmetric
and in float32 at least.

The entries are squares: in float32 a task whose gradient is longer than 1.8e19 counts as one that
is not finite, hence as absent, and one shorter than 1e-19 or so as having gradient zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks, jacobian


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
    checks.number("chunk_size", chunk_size, minimum=1, whole=True, static=True, optional=True)
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
    checks.number("chunk_size", chunk_size, minimum=1, whole=True, static=True, optional=True)
    return Stacked(chunk_size)


def sketch(
    probes: int = 1,
    key: int | jax.Array = 0,
    *,
    warmup_steps: int = 20,
    warmup_probes: int | None = None,
) -> Sketch:
    """An estimate of the Gram matrix for one forward pass per probe, whatever K is.

    For a random direction v with independent entries of mean 0 and variance 1,
    ``E[(J v)(J v)ᵀ] = J Jᵀ``. The mean of these outer products over ``probes`` directions of
    entries ±1 is unbiased, positive semi-definite, and of rank ``probes`` at most: one step's
    estimate is useless alone. Give the method that reads it ``decay=``: then it works on a running
    mean, whose entries have a standard deviation of about
    ``sqrt((1 - decay) / (1 + decay) / probes) * sqrt(G_ii G_jj + G_ij²)`` while the Gram matrix
    itself changes little.

    The first ``warmup_steps`` steps take ``warmup_probes`` directions each. Until the running mean
    has the rank of the Gram matrix the weights of conflicting tasks are off by orders of magnitude,
    and a few such steps at the start, which Adam remembers, can decide a run: on four
    physics-informed networks (``benchmarks/pinn.py``) Nash weights from one probe a step end at 12
    times the error of those from the exact matrix without this warm-up, and level with them with
    it, for 0.15 forward passes more on average over 2,000 steps.

    The directions depend on ``key`` and on the step only, so that all devices draw the same.

    Args:
        probes: how many directions per step, at least 1; static.
        key: seed or JAX key.
        warmup_steps: how many steps are the first ones; 0 for none; static.
        warmup_probes: how many directions these take, if more than ``probes``; 16, or 2 K if that
            is more, if None; static.

    Returns:
        ``gram(task_losses, params, *args, step=0) -> (K, K)``.

    Raises:
        ValueError: for ``probes`` or ``warmup_probes`` below 1, or ``warmup_steps`` below 0.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum(x**2), x[0]])
        >>> gram = bilb.grams.sketch(probes=1000)(task_losses, jnp.array([1.0, 2.0]))
        >>> print(bool(jnp.abs(gram - jnp.array([[20, 2], [2, 1]])).max() < 2))
        True

    References:
        Hutchinson, *A stochastic estimator of the trace of the influence matrix*, 1989.
    """
    of_number = {"whole": True, "static": True}
    checks.number("probes", probes, minimum=1, **of_number)
    checks.number("warmup_steps", warmup_steps, minimum=0, **of_number)
    checks.number("warmup_probes", warmup_probes, minimum=1, optional=True, **of_number)
    first = None if warmup_probes is None else int(warmup_probes)
    return Sketch(int(probes), base.as_key(key), int(warmup_steps), first)


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
            at = jacobian.linearized(task_losses, params, *args)
        return self.of(at, params, step)

    def of(
        self,
        at: jacobian.Linearization,
        params: base.PyTree,
        step: Any,
        other: jacobian.Linearization | None = None,
    ) -> jax.Array:
        """Returns ``J Jᵀ`` (K, K) of a linearisation, or ``J' Jᵀ`` with the ``other`` one's J'."""
        raise NotImplementedError

    def norms(self, at: jacobian.Linearization, params: base.PyTree, step: Any) -> jax.Array:
        """Returns the norms (K,) of the task gradients of a linearisation."""
        return jnp.sqrt(jnp.maximum(jnp.diagonal(self.of(at, params, step)), 0.0))


@dataclasses.dataclass(frozen=True)
class Exact(Engine):
    """What :func:`exact` returns."""

    chunk_size: int | None

    def of(self, at, params, step, other=None):
        """As :meth:`Engine.of`, for K backward and K forward passes."""
        return of_linearization(at, self.chunk_size, other)

    def norms(self, at, params, step):
        """Returns the norms (K,) of the task gradients, for K backward passes."""
        return norms_of_linearization(at, self.chunk_size)


@dataclasses.dataclass(frozen=True, eq=False)
class Sketch(Engine):
    """What :func:`sketch` returns."""

    probes: int
    key: jax.Array
    warmup_steps: int
    warmup_probes: int | None

    def of(self, at, params, step, other=None):
        """As :meth:`Engine.of`, estimated from forward passes along random directions."""
        key = jax.random.fold_in(self.key, step)

        def add(i, total):
            sample = jax.random.rademacher
            direction = optax.tree.random_like(jax.random.fold_in(key, i), params, sampler=sample)
            right = at.pushforward(direction)
            left = right if other is None else other.pushforward(direction)
            return total + jnp.outer(left, right)

        num_tasks, dtype = at.losses.shape[0], base.at_least_float32(at.losses.dtype)
        probes = self.probes_of(step, num_tasks)
        return jax.lax.fori_loop(0, probes, add, jnp.zeros((num_tasks,) * 2, dtype)) / probes

    def probes_of(self, step: Any, num_tasks: int) -> Any:
        """Returns how many directions a step takes; a Python number where all take the same."""
        first = max(self.probes, self.warmup_probes or max(16, 2 * num_tasks))
        if self.warmup_steps == 0 or first == self.probes:
            return self.probes
        return jnp.where(step < self.warmup_steps, first, self.probes)


@dataclasses.dataclass(frozen=True)
class Stacked(Engine):
    """What :func:`stacked` returns."""

    chunk_size: int | None

    def rows(self, pullback: Any, losses: jax.Array) -> base.PyTree:
        """Returns the task gradients, leaves (K, *shape)."""
        return jacobian.rows(pullback, losses, self.chunk_size or losses.shape[0])

    def of(self, at, params, step, other=None):
        """As :meth:`Engine.of`, for K backward passes, or 2 K with ``other``."""
        del params, step
        rows = self.rows(at.pullback, at.losses)
        return of_rows(rows, None if other is None else self.rows(other.pullback, other.losses))


def of_linearization(
    at: jacobian.Linearization,
    chunk_size: int | None = None,
    other: jacobian.Linearization | None = None,
) -> jax.Array:
    """Returns ``J Jᵀ`` (K, K) column by column, ``chunk_size`` of them at once.

    With the linearisation of ``other`` losses, of Jacobian J', it is ``J' Jᵀ``.
    """
    pushforward = at.pushforward if other is None else other.pushforward
    columns = _map_tasks(lambda e: pushforward(at.pullback(e)), at.losses, chunk_size)
    return 0.5 * (columns + columns.T) if other is None else columns.T


def norms_of_linearization(at: jacobian.Linearization, chunk_size: int | None = None) -> jax.Array:
    """Returns the norms (K,) of the task gradients, ``chunk_size`` of them at once."""
    return _map_tasks(lambda one_hot: norm(at.pullback(one_hot)), at.losses, chunk_size)


def of_rows(task_gradients: base.PyTree, others: base.PyTree | None = None) -> jax.Array:
    """Returns the Gram matrix (K, K) of stacked task gradients, leaves (K, *shape).

    With the gradients of ``others``, rows of J', it is ``J' Jᵀ``.
    """

    def leaf(rows, left):
        wide = base.at_least_float32(rows.dtype)
        rows, left = rows.astype(wide), left.astype(wide)
        axes = tuple(range(1, rows.ndim))
        # Explicitly sharded leaves need to be told that the product of rows is whole everywhere.
        mesh = jax.typeof(rows).sharding.mesh
        explicit = jax.sharding.AxisType.Explicit in mesh.axis_types
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()) if explicit else None
        contract = ((axes, axes), ((), ()))
        return jax.lax.dot_general(left, rows, contract, precision="highest", out_sharding=whole)

    others = task_gradients if others is None else others
    return sum(jax.tree.leaves(jax.tree.map(leaf, task_gradients, others)))


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
