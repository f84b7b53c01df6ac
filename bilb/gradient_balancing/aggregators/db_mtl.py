"""DB-MTL: running means of the log losses' gradients, all scaled to the norm of the largest."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks, jacobian
from bilb.gradient_balancing.aggregators import aggregator


class DBMTLState(NamedTuple):
    """State of :func:`db_mtl`."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) max_j ‖m_j‖ / (‖m_k‖ + ε) of the step; 1 at first
    mean_gradients: base.PyTree  # m, leaves (K, *shape); 0 at first


def db_mtl(
    num_tasks: int,
    *,
    decay: base.Scalar = 0.9,
    sigma: base.Scalar = 0.0,
    eps: float = 1e-8,
    log: bool = True,
    shared: base.PyTree = True,
) -> optax.GradientTransformationExtraArgs:
    """Dual-balancing: equal gradient norms of the log losses, averaged over time.

    ``m_k ← d_t m_k + (1 - d_t) ∇ log(l_k + ε)``, ``d_t = d / t^σ``;
    ``Σ_k max_j ‖m_j‖ · m_k / (‖m_k‖ + ε)``

    Takes the gradients of the losses themselves and divides them by ``losses=``, the chain rule of
    the logarithm. The running means start at zero and are not corrected for it, as in LibMTL: the
    first direction is 1 - ``decay`` times the later ones' length. The state holds K gradients in
    float32 at least; ``optax.tree.map_params`` takes them for parameters, so shard them with one
    more axis in front.

    A task that is masked, or whose gradient or loss is not finite, is left out, and so is one whose
    loss has no logarithm, l + ε <= 0; its running mean stays as it was.

    Args:
        num_tasks: K; static.
        decay: of the running means, in [0, 1]; LibMTL's default, the paper chooses it per data set.
        sigma: ``decay`` is divided by t^σ, t = 1, 2, ... the number of the step.
        eps: ε > 0.
        log: False for gradients of losses that are logarithms already; then ``losses=`` is not
            needed; static.
        shared: bools in a pytree prefix of the parameters, True for those that tasks share; the
            gradients of the others' log losses are summed as they are.

    Returns:
        An aggregator: ``update(task_gradients, state, params, *, losses, mask=None)``, the first
        link of an optimiser's chain. Its state has the fields ``step``, ``weights`` (K,) and
        ``mean_gradients``. ``num_tasks``, ``log`` and ``shared`` are static in
        ``optax.inject_hyperparams``.

    Raises:
        ValueError: for ``num_tasks`` < 1, concrete hyperparameters out of range, losses that are
            not (K,), or a leaf whose leading axis is not the number of tasks.
        MissingArgument: for a call without ``losses=``.

    Example:
        >>> import jax.numpy as jnp, optax, bilb
        >>> optimizer = optax.chain(bilb.db_mtl(2, decay=0.5), optax.sgd(1.0))
        >>> x, losses = jnp.zeros(2), jnp.array([1.0, 100.0])
        >>> task_gradients = jnp.array([[1.0, 0.0], [0.0, 300.0]])
        >>> updates, state = optimizer.update(task_gradients, optimizer.init(x), x, losses=losses)
        >>> print(updates)
        [-1.5 -1.5]

    References:
        Lin et al., *Dual-Balancing for Multi-Task Learning*, arXiv 2308.12029.
    """
    checks.number("decay", decay, minimum=0, maximum=1, schedule=True)
    checks.number("sigma", sigma, minimum=0, schedule=True)
    checks.number("eps", eps, minimum=0, exclusive=True)

    def init(num_tasks, params):
        return DBMTLState(
            step=base.new_step(),
            weights=jnp.ones(num_tasks, aggregator.dtype_of(params)),
            mean_gradients=aggregator.zeros(num_tasks, params),
        )

    def aggregate(rows, state, *, present, losses):
        del losses
        step = optax.safe_increment(state.step)
        d = base.at_step(decay, state.step) / step ** base.at_step(sigma, state.step)
        mean = jax.tree.map(lambda m, g: g + d * (m - g), state.mean_gradients, rows)
        norms = jnp.where(present, aggregator.norms(mean), 0)
        largest = jnp.max(norms)
        units = jacobian.combine(jnp.where(present, 1 / (norms + eps), 0), mean)
        gradient = jax.tree.map(lambda u: largest.astype(u.dtype) * u, units)
        return gradient, DBMTLState(step, largest / (norms + eps), mean)

    def derivative(losses):
        # Where the loss has no logarithm, the task is left out.
        return 1 / jnp.where(losses + eps > 0, losses + eps, jnp.nan)

    return aggregator.aggregator(
        "db_mtl",
        init,
        aggregate,
        num_tasks=num_tasks,
        shared=shared,
        reads_losses=log,
        derivative=derivative if log else None,
    )
