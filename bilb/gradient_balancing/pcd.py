"""PCD, arXiv 2606.29521: follows one task, and makes sure that the others progress as well."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks, names
from bilb.gradient_balancing.algebra import cosines, divide
from bilb.gradient_balancing.interior_point import non_negative_quadratic
from bilb.gradient_balancing.weighting import gram_weighting


class PCDMemory(NamedTuple):
    """What :func:`pcd` remembers."""

    squared_norms: jax.Array  # (K,) running mean of ‖g_k‖², not yet corrected for its start at zero
    total: jax.Array  # (K,) the sum of the weights of what is in it, 1 in the end


def pcd(
    tau: Any = 0.02,
    *,
    beta: base.Scalar = 0.999,
    eps: base.Scalar = 1e-8,
    primary: int | str = 0,
    decay: base.Scalar = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Priority-constrained descent: a primary task, and a share of progress for all others.

    With gradients over their usual norms, ``g̃_k = g_k / √(v̂_k + ε)``, v̂ the bias-corrected
    running mean of ``‖g_k‖²``, and the primary task 0,

    ``d̃ = argmin_d ½ ‖d - g̃_0‖²  subject to  g̃_jᵀ d ≥ τ ‖g̃_j‖²  for all other tasks j``;

    the direction is d̃ with the length of ``g_0``.

    ``update`` needs the extra argument ``gram`` (K, K), which :func:`bilb.value_and_grad` and
    :func:`bilb.aggregate_by` supply. τ is a share of the first-order progress that a step along a
    task's own gradient would give it, whatever the scale of its loss. Weights are not negative.

    If the primary task is absent or its gradient is zero, or the direction is zero up to rounding,
    all weights are 0. If the others cannot all have their share, as two opposite ones cannot, none
    is given any and the direction is the primary task's gradient. One whose gradient is zero is
    left out.

    Args:
        tau: τ in [0, 1], one number or one per task (that of the primary task does not matter).
        beta: β in [0, 1), decay of the running mean of squared norms.
        eps: ε >= 0, added to it, in units of squared gradients. All three defaults are TorchJD's.
        primary: index or name of the primary task; static.
        decay: of a running mean of the Gram matrix in place of each step's own, in [0, 1).

    Returns:
        A loss transformation; ``update(losses, state, *, gram)``. Its state has the fields
        ``step``, ``weights`` (K,), ``memory`` with ``squared_norms`` (K,) and ``total`` (K,), and
        ``mean``.

    Raises:
        ValueError: for concrete numbers outside the stated ranges, a ``tau`` of another shape, a
            ``primary`` that is no task, or a ``gram`` that is not (K, K).
        MissingArgument: for a call without ``gram``.

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.pcd(tau=0.5)
        >>> losses = jnp.array([1.0, 1.0])
        >>> gram = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> balanced, state = balancer.update(losses, balancer.init(losses), gram=gram)
        >>> print(np.asarray(balanced).round(3))
        [0.894 0.447]

    References:
        *Not all objectives are born equal: priority-constrained descent for hierarchical
        multi-objective optimization*, arXiv 2606.29521.
    """
    checks.number("tau", tau, minimum=0, maximum=1, per_task=True)
    checks.number("beta", beta, minimum=0, maximum=1, schedule=True)
    if isinstance(beta, int | float) and beta == 1:
        raise ValueError("beta must be < 1, or nothing is ever learnt; got 1.")
    checks.number("eps", eps, minimum=0, schedule=True)
    if not isinstance(primary, str):
        checks.number("primary", primary, minimum=0, whole=True, static=True)

    def init(num_tasks, dtype):
        names.index("primary", primary, num_tasks)
        checks.per_task("tau", tau, num_tasks)
        return PCDMemory(jnp.zeros(num_tasks, dtype), jnp.zeros(num_tasks, dtype))

    def weigh(gram, memory, step):
        num_tasks, dtype = gram.present.shape[0], gram.matrix.dtype
        first = names.index("primary", primary, num_tasks)
        norms, directions = cosines(gram.matrix)
        old = base.at_step(beta, step)
        squared = old * memory.squared_norms + (1 - old) * (gram.scale * norms) ** 2
        total = old * memory.total + (1 - old)
        usual = jnp.sqrt(squared / total + base.at_step(eps, step))
        lengths = jnp.where(usual > 0, gram.scale * norms / jnp.where(usual > 0, usual, 1.0), 0.0)

        others = (norms > 0) & (jnp.arange(num_tasks) != first)
        share = checks.per_task("tau", tau, num_tasks).astype(dtype) * lengths
        lack = jnp.where(others, share - lengths[first] * directions[first], 0.0)
        along = add_progress(directions, lack, others).at[first].set(lengths[first])

        square = along @ jnp.matmul(directions, along, precision="highest")
        defined = (norms[first] > 0) & (square > 10 * jnp.finfo(dtype).eps * along.sum() ** 2)
        length = norms[first] / jnp.sqrt(jnp.where(defined, square, 1.0))
        weights = jnp.where(defined, length * divide(along, norms), 0.0)
        return weights, PCDMemory(squared, total)

    return gram_weighting("pcd", weigh, decay=decay, memory=init)


def add_progress(directions: jax.Array, lack: jax.Array, others: jax.Array) -> jax.Array:
    """Returns the coefficients μ >= 0 of the shortest ``x = Uᵀ μ`` with ``U x >= lack``.

    The problem of least distance: with ``u = argmin_{u >= 0} ‖Uᵀu‖² + (lackᵀu - 1)²``, which has a
    solution in any case, ``μ = u / (1 - lackᵀu)``, and where that divides by zero there is no x.

    Args:
        directions: (K, K), cosines ``U Uᵀ`` of unit rows.
        lack: (K,).
        others: (K,) bool, the rows of U.

    Returns:
        (K,), zero where no x exists.

    References:
        Lawson and Hanson, *Solving least squares problems*, chapter 23, section 4.
    """
    size = jnp.max(jnp.abs(lack))
    size = jnp.where(size > 0, size, 1.0)
    target = lack / size
    u = non_negative_quadratic(directions + jnp.outer(target, target), target, others)
    rest = 1 - target @ u
    noise = 100 * lack.shape[0] * jnp.finfo(lack.dtype).eps * (1 + jnp.abs(target) @ u)
    exists = rest > noise
    return jnp.where(exists, size * u / jnp.where(exists, rest, 1.0), 0.0)
