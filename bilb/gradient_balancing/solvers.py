"""Small convex solvers on the Gram matrix that the gradient-balancing methods share.

All of them take ``gram = J Jᵀ`` (K, K), run inside `jit` and `vmap` without host callbacks and
stop after a fixed number of steps at the latest.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

_STEPS_PER_TASK = 10


class _ActiveSet(NamedTuple):
    solution: jax.Array  # (K,), the minimiser over the last accepted support
    support: jax.Array  # (K,) bool, rows that may carry weight
    rejected: jax.Array  # (K,) bool, rows that rounding kept from entering since the last gain
    entering: jax.Array  # (), the row that entered last
    entered: jax.Array  # (), whether it entered in the step before
    step: jax.Array
    done: jax.Array


def min_norm_weights(gram: jax.Array, where: jax.Array | None = None) -> jax.Array:
    r"""Weights of the point of smallest norm in the convex hull of the rows of ``J``.

    Minimises :math:`\|J^\top w\|^2 = w^\top G w` over the simplex, the subproblem of MGDA, with an
    active-set method. Up to scaling, ``w`` solves the non-negative least-squares problem

    .. math:: \min_{x \ge 0}\ x^\top G x + s\,(1 - \mathbf 1^\top x)^2, \qquad w = x / \sum_i x_i

    for any :math:`s > 0`. It stays well posed when zero lies in the hull, and Lawson and Hanson's
    method solves it in finitely many steps. Here ``s`` is the smallest squared row norm and all
    rows are scaled to comparable length first, so norms may differ by orders of magnitude.

    ``wᵀGw`` is optimal to about ten machine epsilons times the largest diagonal entry of ``gram``
    (measured up to K = 100). So a norm ``‖Jᵀw‖`` below the square root of that, about 5e-8 in
    float64 and 1e-3 in float32 times the largest row, may be rounding noise: a Gram matrix holds
    no more than that.

    Args:
        gram: (K, K) symmetric positive semi-definite Gram matrix ``J Jᵀ`` of the task gradients.
        where: (K,) bool, the rows that may carry weight; default: all. The entries of the other
            rows and columns are not used, so they may be NaN.

    Returns:
        (K,) weights: non-negative, of sum 1, exactly zero outside the support, in the dtype of
        ``gram`` or float32, whichever is wider. If ``J`` is rank deficient the weights need not be
        unique, while ``Jᵀw`` is. Rows of norm zero are the optimum and share the weight equally. A
        non-finite entry makes all weights NaN. If ``where`` is all false, the weights are zero.
        The weights count as constants, their derivative is zero; that of ``wᵀGw`` is then exact.

    Raises:
        ValueError: ``gram`` is not square with K >= 1, or ``where`` has another shape than (K,).

    Example:
        >>> import jax.numpy as jnp
        >>> from bilb.gradient_balancing import solvers
        >>> jacobian = jnp.array([[2.0, 0.0], [0.0, 1.0]])
        >>> print(solvers.min_norm_weights(jacobian @ jacobian.T).round(3))
        [0.2 0.8]

    References:
        Désidéri, Multiple-gradient descent algorithm, 2012, doi 10.1016/j.crma.2012.03.014.

        Wolfe, Finding the nearest point in a polytope, 1976, doi 10.1007/BF01580381.

        Lawson and Hanson, Solving Least Squares Problems, chapter 23, doi 10.1137/1.9781611971217.
    """
    gram = jnp.asarray(gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"gram must have shape (K, K) with K >= 1, got {gram.shape}.")
    num_tasks = gram.shape[0]
    where = jnp.ones(num_tasks, bool) if where is None else jnp.asarray(where, bool)
    if where.shape != (num_tasks,):
        raise ValueError(f"where must have shape ({num_tasks},), got {where.shape}.")

    dtype = jnp.promote_types(gram.dtype, jnp.float32)
    gram = jax.lax.stop_gradient(gram).astype(dtype)
    gram = jnp.where(where[:, None] & where[None, :], gram, 0.0)
    largest = jnp.max(jnp.diagonal(gram))
    gram = gram / jnp.where(largest == 0, 1.0, largest)

    squared_norms = jnp.diagonal(gram)
    zero_rows = where & (squared_norms <= 0)
    positive = where & ~zero_rows
    offset = jnp.min(jnp.where(positive, squared_norms, jnp.inf))
    offset = jnp.where(jnp.any(positive), offset, 1.0)
    scale = jnp.where(positive, jnp.sqrt(squared_norms + offset), 1.0)
    target = jnp.where(positive, jnp.sqrt(offset) / scale, 0.0)
    hessian = gram / scale[:, None] / scale[None, :] + jnp.outer(target, target)

    # With a zero row there is nothing to search for.
    free = positive & ~jnp.any(zero_rows)
    weights = _non_negative_quadratic(hessian, target, free) * target
    weights = jnp.where(jnp.any(zero_rows), zero_rows.astype(dtype), weights)
    total = jnp.sum(weights)
    weights = weights / jnp.where(total == 0, 1.0, total)
    return jnp.where(jnp.all(jnp.isfinite(gram)), weights, jnp.nan)


@jax.jit  # so that calls outside jit compile the loop once
def _non_negative_quadratic(hessian: jax.Array, target: jax.Array, free: jax.Array) -> jax.Array:
    """Minimises x'Hx/2 - target'x over x >= 0 by Lawson and Hanson's active-set method.

    ``hessian`` (K, K) has a unit diagonal and ``target`` (K,) is positive on ``free`` (K,) bool;
    entries outside ``free`` stay zero.
    """
    num_tasks = target.shape[0]
    rounding = 4 * jnp.finfo(hessian.dtype).eps
    rows = jnp.arange(num_tasks)

    def minimise_over(support):
        inside = support[:, None] & support[None, :]
        factor = cho_factor(jnp.where(inside, hessian, jnp.eye(num_tasks, dtype=hessian.dtype)))
        return cho_solve(factor, jnp.where(support, target, 0.0))

    def enter(solution, support, rejected, step):
        slope = target - jnp.matmul(hessian, solution, precision="highest")
        noise = rounding * (
            target + jnp.matmul(jnp.abs(hessian), jnp.abs(solution), precision="highest")
        )
        candidates = free & ~support & ~rejected & (slope > noise)
        entering = jnp.argmax(jnp.where(candidates, slope, -jnp.inf))
        found = jnp.any(candidates)
        support = support | (found & (rows == entering))
        return _ActiveSet(solution, support, rejected, entering, found, step, ~found)

    def advance(state):
        minimiser = minimise_over(state.support)
        infeasible = state.support & ~(minimiser > 0)
        is_entering = rows == state.entering
        # Only a row that depends on the support up to rounding fails to gain from entering.
        singular = ~jnp.all(jnp.isfinite(minimiser))
        fails = singular | (state.entered & jnp.any(infeasible & is_entering))
        step = state.step + 1

        def reject():
            support = state.support & ~is_entering
            after = enter(state.solution, support, state.rejected | is_entering, step)
            return after._replace(done=after.done | ~state.entered)

        def accept():
            return enter(minimiser, state.support, jnp.zeros_like(state.rejected), step)

        def move_to_boundary():
            length = state.solution / (state.solution - minimiser)
            length = jnp.where(infeasible, length, jnp.inf)
            shortest = jnp.min(length)
            support = state.support & ~(length <= shortest)
            solution = state.solution + shortest * (minimiser - state.solution)
            return state._replace(
                solution=jnp.where(support, jnp.maximum(solution, 0.0), 0.0),
                support=support,
                entered=jnp.array(False),
                step=step,
            )

        case = jnp.where(fails, 0, jnp.where(jnp.any(infeasible), 2, 1))
        return jax.lax.switch(case, (reject, accept, move_to_boundary))

    nothing = jnp.zeros(num_tasks, bool)
    first = enter(jnp.zeros_like(target), nothing, nothing, jnp.array(0))
    last = jax.lax.while_loop(
        lambda state: ~state.done & (state.step < _STEPS_PER_TASK * num_tasks), advance, first
    )
    return last.solution
