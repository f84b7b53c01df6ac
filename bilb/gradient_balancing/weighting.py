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

from bilb import base


class Gram(NamedTuple):
    """A Gram matrix of task gradients in a form fit for solvers: ``J Jᵀ = size² · matrix``."""

    matrix: jax.Array  # (K, K) symmetric, largest diagonal entry 1 (0 if all gradients are zero)
    size: jax.Array  # () the norm of the longest row of J, 1 if all are zero
    present: jax.Array  # (K,) bool; the rows and columns of the other tasks are zero


class GramState(NamedTuple):
    """State of every method that reads the Gram matrix."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) the weights just used; 1 / K at first
    memory: base.PyTree  # what the method remembers, () if nothing
    mean: MeanGramState | None  # of `decay`, None without


class MeanGramState(NamedTuple):
    """The running mean of the Gram matrix."""

    gram: jax.Array  # (K, K), not yet corrected for its start at zero
    total: jax.Array  # (K, K) the sum of the weights of what is in it, 1 in the end


def prepare(gram: jax.Array, present: jax.Array) -> Gram:
    """Takes absent tasks out of a Gram matrix and divides it by its largest diagonal entry.

    Args:
        gram: (K, K) in float32 at least; entries of absent tasks do not matter, NaN included.
        present: (K,) bool.
    """
    gram = jnp.where(present[:, None] & present, gram, 0.0)
    largest = jnp.max(jnp.diagonal(gram))
    largest = jnp.where(largest > 0, largest, 1.0)
    return Gram(gram / largest, jnp.sqrt(largest), present)


def gram_weighting(
    name: str,
    weigh: Callable[[Gram, base.PyTree, jax.Array], tuple[jax.Array, base.PyTree]],
    *,
    decay: base.Scalar = 0.0,
    memory: Callable[[int, Any], base.PyTree] = lambda num_tasks, dtype: (),
) -> optax.GradientTransformationExtraArgs:
    """Makes a formula on the Gram matrix a loss transformation: ``balanced = sg(w(G)) · losses``.

    Args:
        name: of the method, for error messages.
        weigh: ``(gram, memory, step) -> (weights (K,), memory)``; the weights of absent tasks and
            their entries of the memory do not matter.
        decay: of the running mean of the Gram matrix, in [0, 1); 0 takes each step's own.
        memory: ``(num_tasks, dtype) -> `` what the method remembers at first.

    Returns:
        A loss transformation whose state is a :class:`GramState`.
    """
    base.check_number("decay", decay, minimum=0, maximum=1)
    averages = not (isinstance(decay, int | float) and decay == 0)

    def init(num_tasks, dtype):
        zeros = lambda: jnp.zeros((num_tasks, num_tasks), dtype)
        return GramState(
            step=base.new_step(),
            weights=jnp.full(num_tasks, 1 / num_tasks, dtype),
            memory=memory(num_tasks, dtype),
            mean=MeanGramState(zeros(), zeros()) if averages else None,
        )

    def update(losses, state, *, mask, gram=None, **_):
        if gram is None:
            raise base.MissingArgument("gram", name, "the Gram matrix J Jᵀ (K, K).")
        gram = jax.lax.stop_gradient(jnp.asarray(gram, losses.dtype))
        present = base.present(losses, mask) & jnp.isfinite(jnp.diagonal(gram))
        mean = state.mean
        if averages:
            rate = base.at_step(decay, state.step)
            keep = lambda new, old: jnp.where(present[:, None] & present, new, old)
            mean = MeanGramState(
                keep(rate * mean.gram + (1 - rate) * gram, mean.gram),
                keep(rate * mean.total + (1 - rate), mean.total),
            )
            gram = mean.gram / jnp.where(mean.total > 0, mean.total, 1.0)
        weights, remembered = weigh(prepare(gram, present), state.memory, state.step)
        weights = jnp.where(present, jax.lax.stop_gradient(weights), 0.0)
        return weights * losses, GramState(
            optax.safe_increment(state.step), weights, remembered, mean
        )

    return base.loss_transformation(init, update)
