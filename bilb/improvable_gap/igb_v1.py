"""IGBv1, improvable gap balancing, arXiv 2307.15429: weigh a task by how much it can improve."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.improvable_gap import base_losses as windows


class IGBv1State(NamedTuple):
    """State of :func:`igb_v1`."""

    step: jax.Array  # () int32
    base_losses: jax.Array  # (K,), the mean so far; 0 where there is none yet
    base_counts: jax.Array  # (K,) int32, the losses in that mean
    weights: jax.Array  # (K,)


def igb_v1(
    base_start: int | jax.Array,
    base_steps: int | jax.Array,
    floor: float | jax.Array = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Weighs the log losses by a softmax of the losses relative to their base losses.

    With the base losses l^b, the mean losses of one early epoch, and w constant in the derivative:

    * ``w = K softmax(l / l^b)``
    * ``objective = Σ_k w_k log l_k``

    The weights are 1 until the base losses are known, then they sum to K, and a task whose loss
    has fallen less since the base epoch weighs more. Counting updates from 0, the base loss of a
    task is its mean loss over updates ``base_start ... base_start + base_steps - 1``, and update
    ``base_start + base_steps`` is the first to use it. The official code takes epoch 1, the second:
    ``igb_v1(base_start=steps_per_epoch, base_steps=steps_per_epoch)``.

    Only updates where a task is present and its loss finite enter its base loss; a task with none
    in the window takes its first such loss after it. With a mask the softmax is over the present
    tasks and their weights sum to their number. A non-finite loss stays in its own entry: the other
    tasks are weighed as if it were absent.

    Losses should be positive. A loss at or below the floor gives ``log(floor)`` and no gradient, as
    in :func:`bilb.log_losses`, and a base loss below the floor, zero included, counts as the floor.

    Where a loss can reach zero while others do not, such as the residual of a differential equation
    at the trivial solution, the log losses reward that without bound and training collapses onto
    it. Use :func:`bilb.presets.marigold_pinn` or :func:`bilb.presets.nash_pinn` there.

    Args:
        base_start: first update of the window, at least 0.
        base_steps: updates in the window, at least 1.
        floor: positive, in the units of the losses.

    Returns:
        A loss transformation whose state has the fields ``step``, ``base_losses`` (K,),
        ``base_counts`` (K,) and ``weights`` (K,). No argument is static in
        ``optax.inject_hyperparams``.

    Raises:
        ValueError: for concrete numbers with ``base_start`` < 0, ``base_steps`` < 1 or
            ``floor`` <= 0.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.igb_v1(base_start=0, base_steps=2)
        >>> state = balancer.init(jnp.ones(2))
        >>> for losses in ([4.0, 1.0], [2.0, 1.0], [1.5, 1.0]):
        ...     balanced, state = balancer.update(jnp.array(losses), state)
        ...     print(state.base_losses, *(f"{w:.3f}" for w in state.weights))
        [4. 1.] 1.000 1.000
        [3. 1.] 1.000 1.000
        [3. 1.] 0.755 1.245

    References:
        Dai et al., *Improvable Gap Balancing for Multi-Task Learning*, UAI 2023,
        arXiv 2307.15429, IGBv1.
    """
    windows.check(base_start, base_steps)
    checks.number("floor", floor, minimum=0, exclusive=True)

    def init(num_tasks, dtype):
        return IGBv1State(
            base.new_step(), *windows.init(num_tasks, dtype), jnp.ones(num_tasks, dtype)
        )

    def update(losses, state, *, mask, statistics_of=None, **_):
        observed = jax.lax.stop_gradient(losses if statistics_of is None else statistics_of)
        usable = base.usable(observed, mask)
        means, known = windows.observe(
            windows.BaseLosses(state.base_losses, state.base_counts),
            observed, usable, state.step, base_start, base_steps,
        )  # fmt: skip
        gap = windows.relative(observed, means.mean, floor)
        weights = jnp.sum(usable) * jax.nn.softmax(gap, where=usable)
        weights = jnp.where(known & usable, weights, state.weights)
        balanced = weights * jnp.log(base.at_least(losses, floor))
        return balanced, IGBv1State(optax.safe_increment(state.step), *means, weights)

    return base.loss_transformation(init, update)
