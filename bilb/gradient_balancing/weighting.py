"""What every method of this folder shares: from a Gram matrix to balanced losses.

A method states its formula as ``weigh(gram, memory, step) -> (weights (K,), memory)`` on a
:class:`Gram` that a solver can take as it is; :func:`gram_weighting` makes that a loss
transformation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import arguments, base, names
from bilb.gradient_balancing import running_mean


class Gram(NamedTuple):
    """A Gram matrix of task gradients in a form fit for solvers: ``J Jᵀ = scale² · matrix``."""

    matrix: jax.Array  # (K, K) symmetric, largest entry 1 (0 if all gradients are zero)
    scale: jax.Array  # () the norm of the longest row of J, 1 if all are zero
    present: jax.Array  # (K,) bool; the rows and columns of the other tasks are zero


class GramState(NamedTuple):
    """State of every method that reads the Gram matrix."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) the weights just used; 1 / K at first
    memory: base.PyTree  # what the method remembers, () if nothing
    mean: running_mean.RunningMean | None  # (K, K), of `decay`; None without


def prepare(gram: jax.Array, present: jax.Array) -> Gram:
    """Takes absent tasks out of a Gram matrix and divides it by its largest entry.

    That of ``J Jᵀ`` is on the diagonal. The product of two Jacobians, of two batches, need not be
    symmetric; it is scaled likewise.

    Args:
        gram: (K, K) in float32 at least; entries of absent tasks do not matter, NaN included.
        present: (K,) bool.
    """
    gram = jnp.where(present[:, None] & present, gram, 0.0)
    largest = jnp.max(jnp.abs(gram))
    largest = jnp.where(largest > 0, largest, 1.0)
    return Gram(gram / largest, jnp.sqrt(largest), present)


def gram_weighting(
    name: str,
    weigh: Callable[[Gram, base.PyTree, jax.Array], tuple[jax.Array, base.PyTree]],
    *,
    decay: base.Scalar = 0.0,
    memory: Callable[[int, Any], base.PyTree] = lambda num_tasks, dtype: (),
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Makes a formula on the Gram matrix a loss transformation: ``balanced = sg(w(G)) · losses``.

    Args:
        name: of the method, for error messages.
        weigh: ``(gram, memory, step) -> (weights (K,), memory)``; the weights of absent tasks and
            their entries of the memory do not matter.
        decay: of the running mean of the Gram matrix, in [0, 1); 0 takes each step's own.
        memory: ``(num_tasks, dtype) -> `` what the method remembers at first.
        every: how many steps the weights stay the same; static. With more than one the method
            reads ``gram_fn``, so that the Gram matrix is taken at those steps only.

    Returns:
        A loss transformation whose state is a :class:`GramState`.
    """
    averages = running_mean.averages(decay)

    def init(num_tasks, dtype):
        return GramState(
            step=base.new_step(),
            weights=jnp.full(num_tasks, 1 / num_tasks, dtype),
            memory=memory(num_tasks, dtype),
            mean=running_mean.start((num_tasks, num_tasks), dtype) if averages else None,
        )

    shapes = base.shapes_of(init)
    # So that calls outside jit compile the loops once, for tasks of these names.
    compiled = jax.jit(
        lambda gram, memory, step, tasks: weigh(gram, memory, step), static_argnums=3
    )

    def learn(state, gram, present):
        mean = state.mean
        if averages:
            mean = running_mean.move(mean, gram, base.at_step(decay, state.step))
            gram = running_mean.value(mean)
        of_step = prepare(gram, present), state.memory, state.step
        weights, remembered = compiled(*of_step, names.current())
        weights = jnp.where(present, jax.lax.stop_gradient(weights), 0.0)
        return state._replace(weights=weights, memory=remembered, mean=mean)

    def update(losses, state, *, mask, gram, **_):
        new = learn(state, gram, base.present(losses, mask))
        return new.weights * losses, new._replace(step=optax.safe_increment(state.step))

    def update_at_times(losses, state, *, mask, gram_fn, **_):
        def renew():
            gram = jax.lax.stop_gradient(jnp.asarray(gram_fn(), losses.dtype))
            present = base.present(losses, mask) & arguments.finite_rows(gram, 2)
            gram = jnp.where(present[:, None] & present, gram, 0.0)
            new = learn(state, gram, present)
            return base.keep_absent(present, new, state, lambda k: shapes(k, losses.dtype))

        new = jax.lax.cond(state.step % every == 0, renew, lambda: state)
        return new.weights * losses, new._replace(step=optax.safe_increment(state.step))

    if every == 1:
        return base.loss_transformation(init, update, reads=("gram",), name=name)
    return base.loss_transformation(init, update_at_times, reads=("gram_fn",), name=name)
