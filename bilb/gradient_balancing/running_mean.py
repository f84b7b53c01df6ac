"""The running mean of a Gram matrix, or of its diagonal, that the methods of this folder keep."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks


class RunningMean(NamedTuple):
    """A running mean that started at zero, and what it takes to correct for that."""

    sum: jax.Array  # of what was measured, each with its weight; (K, K), or (K,) for a diagonal
    total: jax.Array  # of those weights, 1 in the end


def start(shape: tuple[int, ...], dtype: Any) -> RunningMean:
    """Returns the mean of nothing."""
    return RunningMean(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def move(mean: RunningMean, measured: jax.Array, decay: base.Scalar) -> RunningMean:
    """Returns the mean after one more measurement.

    What speaks of absent tasks moves as well; `base.keep_absent` puts it back.
    """
    return optax.incremental_update(RunningMean(measured, jnp.ones_like(measured)), mean, 1 - decay)


def value(mean: RunningMean) -> jax.Array:
    """Returns what the mean amounts to; 0 where nothing was measured yet."""
    return mean.sum / jnp.where(mean.total > 0, mean.total, 1.0)


def averages(decay: base.Scalar) -> bool:
    """Returns whether anything is to be averaged: 0 takes each step's own.

    Raises:
        ValueError: for a decay outside [0, 1).
    """
    checks.number("decay", decay, minimum=0, maximum=1, schedule=True)
    if isinstance(decay, int | float) and decay == 1:
        raise ValueError("decay must be < 1, or nothing is ever learnt; got 1.")
    return not (isinstance(decay, int | float) and decay == 0)
