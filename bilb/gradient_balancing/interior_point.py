"""Convex problems over non-negative weights: an interior-point method and its exact finish.

The interior-point method takes ten to twenty steps, each one factorisation of a (K, K) matrix,
whatever the rank of the Gram matrix; where solutions are not unique it ends in the middle of them,
so that equal tasks get equal weights. An active-set method then removes what rounding left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

_MAX_STEPS = 50
# Solves on one support before its residual counts as rounding.
_REFINEMENTS = 3


class _Point(NamedTuple):
    weights: jax.Array  # (K,), positive
    slacks: jax.Array  # (K,), positive: the multipliers of weights >= 0
    level: jax.Array  # (), the multiplier of the sum
    step: jax.Array
    done: jax.Array | bool


def minimise(
    derivatives: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    start: jax.Array,
    slacks: jax.Array,
    free: jax.Array,
    *,
    tolerance: jax.Array,
    keep_sum: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Minimises a convex function over ``x >= 0`` by a primal-dual predictor-corrector method.

    Args:
        derivatives: ``x -> (gradient (K,), hessian (K, K))``.
        start: (K,), positive.
        slacks: (K,), positive; a guess of the gradient at the solution, less the level.
        free: (K,) bool; the other entries of ``x`` do not move and the function does not count
            them.
        tolerance: of the mean of ``x * slacks``, by which the value may exceed the minimum.
        keep_sum: whether the sum of ``x`` stays that of ``start``.

    Returns:
        ``(x, slacks)``, positive on ``free``. What belongs to the support has the larger ``x``.

    References:
        Mehrotra, On the implementation of a primal-dual interior point method, 1992.
    """
    num_tasks, dtype = start.shape[0], start.dtype
    number = jnp.maximum(jnp.sum(free), 1)
    eye = jnp.eye(num_tasks, dtype=dtype)
    ridge = max(num_tasks, 100) * jnp.finfo(dtype).eps
    total = jnp.sum(start, where=free)
    only = lambda values: jnp.where(free, values, 0.0)
    mean = lambda values: jnp.sum(only(values)) / number
    start, slacks = jnp.where(free, start, 1.0), jnp.where(free, slacks, 1.0)

    def advance(point):
        x, s = point.weights, point.slacks
        gradient, hessian = derivatives(only(x))
        residual = only(s + point.level - gradient)
        ratio = only(s / x)
        matrix = jnp.where(free[:, None] & free, hessian, 0.0) + jnp.diag(jnp.where(free, ratio, 1))
        # Both a unit diagonal and the ridge keep the factor finite; Newton's residual stays exact.
        scale = jax.lax.rsqrt(jnp.diagonal(matrix))
        factor = cho_factor(matrix * scale[:, None] * scale + ridge * eye)
        inverse = lambda vector: scale * cho_solve(factor, scale * vector)
        along = inverse(only(jnp.ones_like(x))) if keep_sum else jnp.zeros_like(x)

        def newton(target):
            """Returns the step towards x * s = target plus the products that x * s leaves out."""
            dx = inverse(only(residual + target / x))
            dlevel = jnp.zeros((), dtype)
            if keep_sum:
                dlevel = (total - jnp.sum(only(x)) - jnp.sum(only(dx))) / jnp.sum(only(along))
            dx = only(dx + dlevel * along)
            return dx, only(target / x - ratio * dx), dlevel

        def longest(dx, ds):
            to_zero = lambda v, dv: jnp.min(jnp.where(free & (dv < 0), -v / dv, jnp.inf))
            return jnp.minimum(to_zero(x, dx), to_zero(s, ds))

        dx, ds, _ = newton(-x * s)
        length = jnp.minimum(1.0, longest(dx, ds))
        products = mean(x * s)
        centring = (mean((x + length * dx) * (s + length * ds)) / products) ** 3
        dx, ds, dlevel = newton(centring * products - x * s - dx * ds)
        length = jnp.minimum(1.0, 0.995 * longest(dx, ds))
        new = _Point(
            x + length * dx, s + length * ds, point.level + length * dlevel, point.step + 1, False
        )
        positive = jnp.all((new.weights > 0) & (new.slacks > 0))
        finite = jnp.all(jnp.isfinite(new.weights) & jnp.isfinite(new.slacks))
        usable = positive & finite
        new = new._replace(done=mean(new.weights * new.slacks) <= tolerance)
        point = point._replace(step=new.step, done=jnp.array(True))
        return jax.tree.map(lambda n, o: jnp.where(usable, n, o), new, point)

    level = jnp.zeros((), dtype)
    if keep_sum:
        level = jnp.min(jnp.where(free, derivatives(only(start))[0] - slacks, jnp.inf))
        level = jnp.where(jnp.isfinite(level), level, 0.0)
    first = _Point(start, slacks, level, jnp.array(0), jnp.array(False))
    going = lambda point: ~point.done & (point.step < _MAX_STEPS)
    last = jax.lax.while_loop(going, advance, first)
    return only(last.weights), only(last.slacks)


@jax.jit  # so that calls outside jit compile the loops once
def non_negative_quadratic(hessian: jax.Array, target: jax.Array, free: jax.Array) -> jax.Array:
    """Minimises ``xᵀ H x / 2 - targetᵀ x`` over ``x >= 0``.

    Args:
        hessian: (K, K) symmetric positive semi-definite.
        target: (K,), such that there is a minimum.
        free: (K,) bool, the entries that may be positive.

    Returns:
        (K,), zero outside the support. Entries with a zero on the diagonal of H are zero.
    """
    diagonal = jnp.diagonal(hessian)
    free = free & (diagonal > 0)
    scale = jnp.where(free, jax.lax.rsqrt(jnp.where(free, diagonal, 1.0)), 0.0)
    hessian = hessian * scale[:, None] * scale
    target = target * scale

    size = jnp.max(jnp.abs(target))
    size = jnp.where(size > 0, size, 1.0)
    start = jnp.full_like(target, size)
    tolerance = 1e-3 * jnp.finfo(target.dtype).eps * size**2
    derivatives = lambda x: (_product(hessian, x) - target, hessian)
    x, slacks = minimise(derivatives, start, start, free, tolerance=tolerance)
    support = free & (x > slacks)
    return scale * _finish(hessian, target, free, jnp.where(support, x, 0.0))


def _product(matrix, vector):
    return jnp.matmul(matrix, vector, precision="highest")


class _ActiveSet(NamedTuple):
    solution: jax.Array  # (K,), positive on the support, zero elsewhere
    support: jax.Array  # (K,) bool
    rejected: jax.Array  # (K,) bool, entries that rounding kept from entering since the last gain
    tries: jax.Array  # (), solves on this support
    step: jax.Array
    done: jax.Array


def _finish(hessian, target, free, start):
    """Ends at the minimiser by Lawson and Hanson's active-set method, begun close to it.

    ``hessian`` has a unit diagonal. Every solve is a correction of the present point with a ridge
    of rounding size, so that a support whose rows depend on each other is as good as any.

    Reference: Lawson and Hanson, Solving Least Squares Problems, chapter 23.
    """
    num_tasks = target.shape[0]
    eps = jnp.finfo(hessian.dtype).eps
    eye = jnp.eye(num_tasks, dtype=hessian.dtype)

    def advance(state):
        x = state.solution
        slope = target - _product(hessian, x)
        noise = 4 * eps * (jnp.abs(target) + _product(jnp.abs(hessian), jnp.abs(x)))
        unsettled = jnp.any(state.support & (jnp.abs(slope) > noise)) & (state.tries < _REFINEMENTS)
        candidates = free & ~state.support & ~state.rejected & (slope > noise) & ~unsettled
        best = jnp.argmax(jnp.where(candidates, slope, -jnp.inf))
        entering = candidates & (jnp.arange(num_tasks) == best)
        support = state.support | entering

        inside = support[:, None] & support
        matrix = jnp.where(inside, hessian, eye) + 100 * eps * eye
        change = cho_solve(cho_factor(matrix), jnp.where(support, slope, 0.0))
        blocked = support & ~(x + change > 0)
        # Where both are zero, as where all is too small for the dtype, nothing can be divided.
        falls = blocked & (change < 0)
        length = jnp.where(falls, -x / jnp.where(falls, change, -1.0), jnp.inf)
        length = jnp.where(blocked & ~falls, 0.0, length)
        shortest = jnp.min(length)
        support = support & ~(blocked & (length <= shortest))
        moved = jnp.maximum(x + jnp.minimum(shortest, 1.0) * change, 0.0)
        whole = ~jnp.any(blocked)
        moved = _ActiveSet(
            solution=jnp.where(support, moved, 0.0),
            support=support,
            rejected=state.rejected & ~(whole & jnp.any(entering)),
            tries=jnp.where(whole, jnp.where(unsettled, state.tries, 0) + 1, 0),
            step=state.step + 1,
            done=jnp.array(False),
        )
        # Only an entry that depends on the support up to rounding fails to gain from entering.
        rejects = jnp.any(blocked & entering) | ~jnp.all(jnp.isfinite(change))
        stays = state._replace(
            rejected=state.rejected | entering,
            tries=jnp.array(_REFINEMENTS),
            step=state.step + 1,
            done=~jnp.any(entering),
        )
        ends = rejects | ~(unsettled | jnp.any(entering))
        return jax.tree.map(lambda a, b: jnp.where(ends, a, b), stays, moved)

    nothing = jnp.zeros(num_tasks, bool)
    first = _ActiveSet(start, start > 0, nothing, jnp.array(0), jnp.array(0), jnp.array(False))
    going = lambda state: ~state.done & (state.step < 10 * num_tasks)
    return jax.lax.while_loop(going, advance, first).solution
