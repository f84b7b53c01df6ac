"""Small convex solvers on the Gram matrix that the gradient-balancing methods share.

All of them take ``gram = J Jᵀ`` (K, K), run inside `jit` and `vmap` without host callbacks and
stop after a fixed number of steps at the latest.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilb.gradient_balancing.interior_point import minimise, non_negative_quadratic

# From here on the K problems of `lift_all` are solved together by an iterative method.
_ROWS_ONE_BY_ONE = 100
_NEWTON_STEPS = 60
_BISECTIONS = 30


def min_norm_weights(gram: jax.Array, where: jax.Array | None = None) -> jax.Array:
    r"""Weights of the point of smallest norm in the convex hull of the rows of ``J``.

    Minimises :math:`\|J^\top w\|^2 = w^\top G w` over the simplex, the subproblem of MGDA, by an
    interior-point method with an exact finish. Up to scaling, ``w`` solves the non-negative
    least-squares problem

    .. math:: \min_{x \ge 0}\ x^\top G x + s\,(1 - \mathbf 1^\top x)^2, \qquad w = x / \sum_i x_i

    for any :math:`s > 0`. It stays well posed when zero lies in the hull. Here ``s`` is the
    smallest squared row norm and all rows are scaled to comparable length first, so norms may
    differ by orders of magnitude.

    ``wᵀGw`` is optimal to about ten machine epsilons times the largest diagonal entry of ``gram``
    (measured up to K = 1000). So a norm ``‖Jᵀw‖`` below the square root of that, about 5e-8 in
    float64 and 1e-3 in float32 times the largest row, may be rounding noise: a Gram matrix holds
    no more than that.

    Args:
        gram: (K, K) symmetric positive semi-definite Gram matrix ``J Jᵀ`` of the task gradients.
        where: (K,) bool, the rows that may carry weight; default: all. The entries of the other
            rows and columns are not used, so they may be NaN.

    Returns:
        (K,) weights: non-negative, of sum 1, exactly zero outside the support, in the dtype of
        ``gram`` or float32, whichever is wider. If ``J`` is rank deficient the weights need not be
        unique, while ``Jᵀw`` is; they are then inside the set of solutions, so that equal rows
        have equal weights. Rows of norm zero are the optimum and share the weight equally. A
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
    weights = non_negative_quadratic(hessian, target, free) * target
    weights = jnp.where(jnp.any(zero_rows), zero_rows.astype(dtype), weights)
    total = jnp.sum(weights)
    weights = weights / jnp.where(total == 0, 1.0, total)
    return jnp.where(jnp.all(jnp.isfinite(gram)), weights, jnp.nan)


def dual_cone_hessian(
    gram: jax.Array, size: jax.Array, ridge: jax.Array, smallest: jax.Array
) -> jax.Array:
    """Returns ``G / trace(G)``, or 0 where ``size² trace(G) < smallest``, with a ridge."""
    trace = jnp.trace(gram)
    counts = (trace > 0) & (size * jnp.sqrt(trace) >= jnp.sqrt(smallest))
    normalised = jnp.where(counts, gram / jnp.where(trace > 0, trace, 1.0), 0.0)
    return normalised + ridge * jnp.eye(gram.shape[0], dtype=gram.dtype)


def lift(hessian: jax.Array, lower: jax.Array, where: jax.Array) -> jax.Array:
    """Minimises ``vᵀ H v`` over ``v >= lower``, the problem of projections onto the dual cone.

    Args:
        hessian: (K, K) symmetric positive semi-definite.
        lower: (K,).
        where: (K,) bool, the entries that may exceed ``lower``.

    Returns:
        (K,). Where H is singular ``v`` need not be unique, while ``H v`` is.
    """
    return lower + non_negative_quadratic(hessian, -_product(hessian, lower), where)


def lift_all(hessian: jax.Array, lower: jax.Array, where: jax.Array) -> jax.Array:
    """Solves :func:`lift` for each row of ``lower`` (K, K).

    Up to K = 100 row by row, to rounding; beyond that all rows at once by the alternating
    direction method of multipliers, one matrix product a step, to 10 roundings of the largest
    slope. It stops after 1000 steps: with a singular H, .3 % of the gradient may then be missing
    (128 rows of rank 128, their lengths over two orders of magnitude, no ridge).
    """
    num_tasks = hessian.shape[0]
    if num_tasks <= _ROWS_ONE_BY_ONE:
        return jax.vmap(lambda row: lift(hessian, row, where))(lower)

    diagonal = jnp.diagonal(hessian)
    positive = where & (diagonal > 0)
    scale = jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, diagonal, 1.0)), 1.0)
    eye = jnp.eye(num_tasks, dtype=hessian.dtype)
    hessian = jnp.where(positive[:, None] & positive, hessian * scale[:, None] * scale, eye)
    bound = jnp.where(positive, lower / scale, 0.0)
    eigenvalues, vectors = jnp.linalg.eigh(hessian)
    largest = eigenvalues[-1]
    eps = jnp.finfo(hessian.dtype).eps
    # The geometric mean of the eigenvalues' range makes the slowest of them fastest.
    penalty = jnp.sqrt(largest * jnp.maximum(eigenvalues[0], 1e-6 * largest))
    inverse = _product(vectors / (eigenvalues + penalty), vectors.T) * penalty
    tolerance = 10 * eps * largest * jnp.max(jnp.abs(bound))

    def advance(carry):
        point, dual, step, _ = carry
        smooth = _product(point - dual, inverse)
        relaxed = 1.6 * smooth - 0.6 * point
        new = jnp.maximum(bound, relaxed + dual)
        gap = jnp.maximum(jnp.max(jnp.abs(new - smooth)), jnp.max(jnp.abs(new - point)))
        return new, dual + relaxed - new, step + 1, penalty * gap

    going = lambda carry: (carry[-1] > tolerance) & (carry[2] < 1000)
    first = (bound, jnp.zeros_like(bound), jnp.array(0), jnp.array(jnp.inf, hessian.dtype))
    point = jax.lax.while_loop(going, advance, first)[0]
    return jnp.where(positive, point * scale, lower)


def conflict_averse_weights(
    gram: jax.Array, mean: jax.Array, c: jax.Array, where: jax.Array
) -> jax.Array:
    r"""Weights of the best worst-case direction in a ball round a weighted mean gradient.

    With :math:`g_0 = J^\top m` solves :math:`\max_d \min_i g_i^\top d` subject to
    :math:`\|d - g_0\| \le c \|g_0\|` through its dual

    .. math:: \min_{w \in \Delta}\ w^\top G m + \rho\,\|J^\top w\|, \qquad \rho = c\,\|g_0\|,
        \qquad d = g_0 + \rho\,J^\top w / \|J^\top w\|.

    Args:
        gram: (K, K), largest entry 1.
        mean: m (K,).
        c: c >= 0.
        where: (K,) bool, the tasks that may carry weight in w.

    Returns:
        (K,) weights v of ``d = Jᵀ v``. Where the dual has its minimum at ``Jᵀ w = 0``, up to the
        rounding of the Gram matrix, no direction of the ball improves all tasks, the best d is not
        unique, and v is m.
    """
    eps = jnp.finfo(gram.dtype).eps
    of_mean = _product(gram, mean)
    squared_radius = c**2 * jnp.maximum(mean @ of_mean, 0.0)
    radius = jnp.sqrt(squared_radius)

    # A row of norm zero counts as the shortest of the others in what rounding may amount to.
    norms = jnp.sqrt(jnp.diagonal(gram))
    shortest = jnp.min(jnp.where(norms > 0, norms, jnp.inf))
    norms = jnp.maximum(norms, jnp.where(jnp.isfinite(shortest), shortest, 0.0))

    def norm(w, slopes):
        # Smooth far below the rounding of the Gram matrix.
        return jnp.sqrt(jnp.maximum(w @ slopes, 0.0) + (eps * (w @ norms)) ** 2)

    def derivatives(w):
        slopes = _product(gram, w)
        length = norm(w, slopes)
        ratio = radius / jnp.where(length > 0, length, 1.0)
        unit = slopes / jnp.where(length > 0, length, 1.0)
        return of_mean + ratio * slopes, ratio * gram - jnp.outer(unit, unit) * ratio

    number = jnp.maximum(jnp.sum(where), 1)
    start = jnp.where(where, 1 / number, 0.0).astype(gram.dtype)
    gradient, _ = derivatives(start)
    size = jnp.max(jnp.abs(gradient))
    size = jnp.where(size > 0, size, 1.0)
    slacks = gradient - jnp.min(jnp.where(where, gradient, jnp.inf)) + size
    w, _ = minimise(
        derivatives, start, slacks, where, tolerance=1e-3 * eps * size / number, keep_sum=True
    )
    slopes = _product(gram, w)
    length = norm(w, slopes)
    value = w @ of_mean + radius * length

    shortest_point = min_norm_weights(gram, where)
    noise = jnp.sqrt(10 * eps) * (shortest_point @ norms)
    stationary = norm(shortest_point, _product(gram, shortest_point)) <= noise
    kink = stationary & (value >= -radius * noise)
    return mean + jnp.where(kink, 0.0, radius / jnp.where(length > 0, length, 1.0)) * w


def fair_weights(gram: jax.Array, alpha: jax.Array | float, preference: jax.Array) -> jax.Array:
    r"""Solves :math:`G w = (p / w)^{1/\alpha}`, the condition of α-fairness; α = 1 is Nash's.

    It is the optimum of a strictly convex function,
    :math:`\tfrac12 w^\top G w - \sum_i \int^{w_i} (p_i / t)^{1/\alpha} dt`, found by Newton's
    method with an exact line search. Rows are scaled to unit length first. A ridge of K roundings
    on them keeps the weights finite where no solution exists, at a Pareto stationary point: there
    they grow to about the root of its inverse.

    Args:
        gram: (K, K) symmetric positive semi-definite.
        alpha: α > 0.
        preference: p >= 0, (K,).

    Returns:
        (K,) weights, positive; 0 for rows of norm 0, and where p is 0.
    """
    num_tasks, dtype = gram.shape[0], gram.dtype
    eps = jnp.finfo(dtype).eps
    squared_norms = jnp.diagonal(gram)
    positive = (preference > 0) & (squared_norms > 0)
    squared_norms = jnp.where(positive, squared_norms, 1.0)
    scale = jax.lax.rsqrt(squared_norms)
    eye = jnp.eye(num_tasks, dtype=dtype)
    cosines = jnp.where(positive[:, None] & positive, gram * scale[:, None] * scale, eye)
    cosines = cosines + num_tasks * eps * eye
    power = 1.0 / alpha
    # With w = scale z the problem is `cosines z = factor z^(-1/α)`, by z = start if orthogonal.
    factor = squared_norms ** ((power - 1) / 2) * jnp.where(positive, preference, 1.0) ** power
    start = factor ** (1 / (1 + power))
    marginal = lambda z: factor * z**-power

    def newton(z, slopes):
        gradient = slopes - marginal(z)
        hessian = cosines + jnp.diag(power * marginal(z) / z)
        unit = jax.lax.rsqrt(jnp.diagonal(hessian))
        factored = jax.scipy.linalg.cho_factor(hessian * unit[:, None] * unit)
        return -unit * jax.scipy.linalg.cho_solve(factored, unit * gradient), gradient

    def length_along(z, slopes, change, bound):
        """Returns the minimiser of the convex function along the step, in [0, bound]."""
        curvature, slope = change @ _product(cosines, change), change @ slopes
        derivative = lambda t: slope + t * curvature - change @ marginal(z + t * change)

        def halve(_, interval):
            low, high = interval
            middle = (low + high) / 2
            below = derivative(middle) < 0
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        interval = (jnp.zeros_like(bound), bound)
        return jax.lax.fori_loop(0, _BISECTIONS, halve, interval)[0]

    def advance(carry):
        z, step, _ = carry
        slopes = _product(cosines, z)
        change, gradient = newton(z, slopes)
        relative = jnp.max(jnp.abs(change) / z)
        boundary = jnp.min(jnp.where(change < 0, -z / change, jnp.inf))
        exact = length_along(z, slopes, change, jnp.minimum(0.99 * boundary, 16.0))
        # Where Newton's method converges quadratically the search could only add rounding.
        new = z + jnp.where(relative < 0.1, 1.0, exact) * change
        usable = jnp.all(jnp.isfinite(new) & (new > 0))
        noise = 4 * eps * (_product(jnp.abs(cosines), z) + marginal(z))
        done = ~usable | jnp.all(jnp.abs(gradient) <= noise) | (relative < eps)
        return jnp.where(usable, new, z), step + 1, done

    z = start
    first = jnp.sum(z * marginal(z)) / jnp.maximum(z @ _product(cosines, z), eps * (z @ z))
    z = z * jnp.clip(first ** (1 / (1 + power)), 1e-3, 1e3)
    going = lambda carry: ~carry[2] & (carry[1] < _NEWTON_STEPS)
    z = jax.lax.while_loop(going, advance, (z, jnp.array(0), jnp.array(False)))[0]
    return jnp.where(positive, scale * z, 0.0)


def _product(matrix, other):
    return jnp.matmul(matrix, other, precision="highest")
