"""ExcessMTL: weights grow with the estimated excess risk, what a task has left to gain."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks, jacobian
from bilb.gradient_balancing.aggregators import aggregator


class ExcessMTLState(NamedTuple):
    """State of :func:`excess_mtl`."""

    step: jax.Array  # () int32
    count: jax.Array  # (K,) int32, the steps that each task took part in
    log_weights: jax.Array  # (K,) -log K at first
    weights: jax.Array  # (K,) the weights just used; 1 / K at first
    initial_excess: jax.Array  # (K,) e⁰, 0 at first
    root_of_squares: base.PyTree  # √S, leaves (K, *shape); 0 at first


def excess_mtl(
    num_tasks: int,
    *,
    step_size: base.Scalar = 0.01,
    warmup_steps: int | jax.Array = 1,
    shared: base.PyTree = True,
    heads: Literal["weighted", "sum"] = "weighted",
) -> optax.GradientTransformationExtraArgs:
    """Robust multi-task learning with excess risks: more weight for tasks far from their optimum.

    ``S_k ← S_k + g_k²``, ``e_k = Σ_p g_kp² / √(S_kp + 1e-7)``, ``w_k ∝ w_k exp(η e_k / e⁰_k)``; the
    direction is ``Σ_k w_k g_k``

    The excess risk is a second-order estimate with the diagonal of AdaGrad, in units of its mean
    e⁰ over the first ``warmup_steps`` steps, during which the weights stay equal. One such step is
    what LibMTL does, several epochs what the paper recommends. The official code takes e⁰ from the
    first step and moves the weights there by the excess risk itself, without units:
    ``warmup_steps=0``. The weights sum to one; LibMTL multiplies them by K.

    The state holds K gradients in float32 at least; ``optax.tree.map_params`` takes them for
    parameters, so shard them with one more axis in front.

    A task that is masked, or whose gradient is not finite, is left out; all that is its in the
    state stays as it was. The others share its part of the sum for the step.

    Args:
        num_tasks: K; static.
        step_size: η > 0 of the exponentiated gradient; LibMTL's default, TorchJD's is 1.
        warmup_steps: of each task, at least 0.
        shared: bools in a pytree prefix of the parameters, True for those that tasks share: the
            excess risks are taken over them only.
        heads: what the other parameters follow: the weighted gradients, as in the official code,
            or their plain sum; static.

    Returns:
        An aggregator: ``update(task_gradients, state, params, *, mask=None)``, the first link of
        an optimiser's chain. Its state has the fields ``step``, ``count`` (K,), ``log_weights``
        (K,), ``weights`` (K,), ``initial_excess`` (K,) and ``root_of_squares``. ``num_tasks``,
        ``shared`` and ``heads`` are static in ``optax.inject_hyperparams``.

    Raises:
        ValueError: for ``num_tasks`` < 1, concrete hyperparameters out of range, an unknown
            ``heads``, or a leaf whose leading axis is not the number of tasks.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balance = bilb.excess_mtl(2, step_size=1.0)
        >>> x = jnp.zeros(2)
        >>> state = balance.init(x)
        >>> for scale in (1.0, 0.1):  # the first task gets better, the second does not
        ...     task_gradients = jnp.array([[scale, 0.0], [0.0, 1.0]])
        ...     gradient, state = balance.update(task_gradients, state, x)
        >>> print(f"{state.weights[1]:.3f}")
        0.668

    References:
        He et al., *Robust Multi-Task Learning with Excess Risks*, arXiv 2402.02009.
    """
    checks.number("step_size", step_size, minimum=0, exclusive=True, schedule=True)
    checks.number("warmup_steps", warmup_steps, minimum=0, whole=True)
    jacobian.check_heads(heads)

    def init(num_tasks, params):
        dtype = aggregator.dtype_of(params)
        return ExcessMTLState(
            step=base.new_step(),
            count=jnp.zeros(num_tasks, jnp.int32),
            log_weights=jnp.full(num_tasks, -jnp.log(num_tasks), dtype),
            weights=jnp.full(num_tasks, 1 / num_tasks, dtype),
            initial_excess=jnp.zeros(num_tasks, dtype),
            root_of_squares=aggregator.zeros(num_tasks, params),
        )

    def aggregate(rows, state, *, present, losses):
        del losses
        # Roots in place of squares stay within the range of the dtype.
        roots = jax.tree.map(jnp.hypot, state.root_of_squares, rows)
        excess = base.bounded_gradient(_excess_risks(rows, roots))
        count, initial = state.count, state.initial_excess
        mean = initial + (excess - initial) / (count + 1)
        in_units = jnp.where(count == 0, excess, excess / (initial + 1e-7))
        initial = jnp.where(count < jnp.maximum(warmup_steps, 1), mean, initial)
        learns = present & (count >= warmup_steps)
        rates = base.bounded_gradient(base.at_step(step_size, state.step) * in_units)
        log_weights = jnp.where(learns, state.log_weights + rates, state.log_weights)
        # The tasks that learn keep the sum that they had.
        total = lambda log_weights: jax.nn.logsumexp(log_weights, where=learns)
        gain = jnp.where(learns, total(log_weights) - total(state.log_weights), 0)
        log_weights = log_weights - gain
        weights = jnp.where(present, jax.nn.softmax(log_weights, where=present), 0)
        step = optax.safe_increment(state.step)
        new = ExcessMTLState(step, count + 1, log_weights, weights, initial, roots)
        return jacobian.combine(weights, rows), new

    return aggregator.aggregator(
        "excess_mtl",
        init,
        aggregate,
        num_tasks=num_tasks,
        shared=shared,
        head_weights=None if heads == "sum" else lambda state: state.weights,
    )


def _excess_risks(rows, roots):
    def leaf(g, root):
        g = jnp.abs(g)
        return jnp.sum(g * (g / jnp.hypot(root, 1e-7**0.5)), axis=tuple(range(1, g.ndim)))

    return sum(jax.tree.leaves(jax.tree.map(leaf, rows, roots)))
