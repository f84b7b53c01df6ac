"""Random loss weighting (RLW), arXiv 2111.10603: new random weights at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks


class RLWState(NamedTuple):
    """State of :func:`rlw`."""

    key: jax.Array  # JAX key of the draws to come
    weights: jax.Array  # (K,) the weights just used; equal at first


def rlw(
    *,
    sum_to: Literal["one", "tasks"] = "one",
    sample: Callable[..., jax.Array] | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Weighs the losses with the softmax of fresh random numbers at every step.

    ``objective = Σ_k w_k l_k`` with ``w = softmax(z)``, ``z ~ N(0, I)``

    Beside plain summation it is the baseline that a method which learns weights has to beat. Chain
    :func:`bilb.log_losses` in front for its logarithmic form. The weights are positive; with a
    mask, those of the present tasks have the stated sum. A non-finite loss stays in its own entry.

    Args:
        sum_to: "one" for weights of sum 1 (the paper, LibMTL and most others) or "tasks" for
            weights of sum K (the IGB code), which keep the scale of a plain sum of the losses.
        sample: ``(key, shape, dtype) -> z``, the distribution of the logits; ``jax.random.normal``
            if None, ``jax.random.uniform`` is another one from the paper.
        key: seed or JAX key.

    Returns:
        A loss transformation whose state has the fields ``key`` and ``weights`` (K,). ``sum_to``
        and ``sample`` are static in ``optax.inject_hyperparams``.

    Raises:
        ValueError: for an unknown ``sum_to``, or a ``sample`` that does not return (K,).

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.rlw(key=1)
        >>> losses = jnp.array([2.0, 30.0, 0.5])
        >>> balanced, state = balancer.update(losses, balancer.init(losses))
        >>> print(balanced.shape, f"{state.weights.sum():.4f}")
        (3,) 1.0000

    References:
        Lin et al., *Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
        Learning*, arXiv 2111.10603.
    """
    sample = jax.random.normal if sample is None else sample
    checks.function("sample", sample)
    checks.key(key)
    if sum_to not in ("one", "tasks"):
        raise ValueError(f'sum_to must be "one" or "tasks"; got {sum_to!r}.')

    def init(num_tasks, dtype):
        equal = 1.0 if sum_to == "tasks" else 1.0 / num_tasks
        return RLWState(base.as_key(key), jnp.full(num_tasks, equal, dtype))

    def update(losses, state, *, mask, **_):
        key, subkey = jax.random.split(state.key)
        logits = sample(subkey, losses.shape, losses.dtype)
        checks.shape(logits, losses.shape, "sample must return a logit per task.")
        total = base.num_present(losses, mask) if sum_to == "tasks" else 1
        weights = total * jax.nn.softmax(logits, where=mask)
        return weights * losses, RLWState(key, weights)

    return base.loss_transformation(init, update)
