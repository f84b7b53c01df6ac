"""SDMGrad, arXiv 2305.18409: MGDA drawn towards the mean gradient, from independent batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.gradient_balancing import solvers
from bilb.gradient_balancing.algebra import equal_weights, onto_simplex, uniform
from bilb.gradient_balancing.weighting import gram_weighting


def sdmgrad(
    lamb: base.Scalar = 0.3,
    *,
    steps: int | None = 20,
    learning_rate: base.Scalar = 10.0,
    momentum: base.Scalar = 0.5,
    eps: base.Scalar = 0.0,
    decay: base.Scalar = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic direction-oriented MGDA: the min-norm point, drawn towards the mean gradient.

    ``w = argmin_{w ∈ Δ} ½ ‖Jᵀ(w + λ/K)‖²`` by projected gradient steps with ``A = J₁ J₂ᵀ`` in the
    place of ``J Jᵀ``; the direction is ``Jᵀ(w + λ/K) / (1 + λ)``.

    ``update`` needs the extra argument ``gram`` (K, K). With one batch it is the Gram matrix of
    that batch. As in the paper, give independent batches to the driver:
    ``value_and_grad(params, state, batch, gram_args=[(batch_1,), (batch_2,)])`` makes
    ``gram[i, j]`` the product of task i's gradient on ``batch_1`` with task j's on ``batch_2``,
    unbiased, and returns the gradient of ``batch``. With ``gram_args=(batch_1,)``, j's is taken on
    ``batch``. :func:`bilb.aggregate_by` knows one batch.

    As in the official code, A is divided by the squared mean of the roots of its diagonal, negative
    entries being 0, and the inner problem's solution is kept for the next call. With the official
    step size of 10 the inner steps jump between corners of the simplex; .5 and 50 steps find the
    solution, and so does ``steps=None``. If no entry of the diagonal is positive the weights stay.

    Args:
        lamb: λ >= 0, pull towards the mean gradient; .3 in the official experiments. 0 is MGDA.
        steps: how many inner steps, static; None for the exact solution, which needs the Gram
            matrix of one batch (a product of two is no quadratic form with a minimum).
        learning_rate: of the inner steps.
        momentum: of the inner steps, in [0, 1).
        eps: added to what A is divided by, in units of squared gradients; 1e-8 in LibMTL and
            TorchJD.
        decay: of a running mean of A in place of each step's own, in [0, 1).

    Returns:
        A loss transformation; ``update(losses, state, *, gram)``. Its state has the fields
        ``step``, ``weights`` (K,), which are at least λ/K/(1 + λ) and sum to 1, ``memory`` (K,),
        which is w, 1/K at first, and ``mean``.

    Raises:
        ValueError: for a concrete ``lamb`` < 0, ``steps`` < 1, ``learning_rate`` <= 0, ``momentum``
            outside [0, 1], ``eps`` < 0 or ``decay`` outside [0, 1), or a ``gram`` that is not
            (K, K).
        MissingArgument: for a call without ``gram``.

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.sdmgrad(0.25, steps=None)
        >>> losses = jnp.array([1.0, 1.0])
        >>> gram = jnp.array([[4.0, 0.0], [0.0, 1.0]])
        >>> balanced, state = balancer.update(losses, balancer.init(losses), gram=gram)
        >>> print(np.asarray(balanced).round(3), np.asarray(state.memory).round(3))
        [0.2 0.8] [0.125 0.875]

    References:
        Xiao, Ban and Ji, *Direction-oriented multi-objective learning: simple and provable
        stochastic algorithms*, arXiv 2305.18409.
    """
    checks.number("lamb", lamb, minimum=0, schedule=True)
    checks.number("steps", steps, minimum=1, whole=True, static=True, optional=True)
    checks.number("learning_rate", learning_rate, minimum=0, exclusive=True, schedule=True)
    checks.number("momentum", momentum, minimum=0, maximum=1, schedule=True)
    checks.number("eps", eps, minimum=0, schedule=True)

    def weigh(gram, memory, step):
        at_step = lambda value: base.at_step(value, step)
        present, pull = gram.present, at_step(lamb)
        mean = equal_weights(present, memory.dtype)
        if steps is None:
            # On the simplex Jᵀ(w + λ/K) is a convex combination of the rows g_k + λ mean g.
            shift = jnp.where(present[:, None], pull * mean, 0.0)
            rows = jnp.eye(memory.shape[0], dtype=memory.dtype) + shift
            shifted = jnp.matmul(rows @ gram.matrix, rows.T, precision="highest")
            w = solvers.min_norm_weights(shifted, present)
        else:
            scale = jnp.sum(jnp.sqrt(jnp.maximum(jnp.diagonal(gram.matrix), 0.0)) * mean)
            divisor = scale**2 + at_step(eps) / gram.scale**2
            product = gram.matrix / jnp.where(divisor > 0, divisor, 1.0)
            start = onto_simplex(memory, present)
            w = descend(
                product, start, pull * mean, present, steps, at_step(learning_rate),
                at_step(momentum),
            )  # fmt: skip
            w = jnp.where(scale > 0, w, start)
        return (w + pull * mean) / (1 + pull), w

    return gram_weighting("sdmgrad", weigh, decay=decay, memory=uniform)


def descend(
    product: jax.Array,
    w: jax.Array,
    pull: jax.Array,
    present: jax.Array,
    steps: int,
    learning_rate: jax.Array,
    momentum: jax.Array,
) -> jax.Array:
    """Returns w (K,) after steps ``w ← Π_Δ(w - lr v)``, ``v ← momentum v + product (w + pull)``."""

    def step(carry, _):
        w, velocity = carry
        gradient = base.bounded_gradient(product @ (w + pull))
        velocity = momentum * velocity + gradient
        return (onto_simplex(w - learning_rate * velocity, present), velocity), None

    (w, _), _ = jax.lax.scan(step, (w, jnp.zeros_like(w)), length=steps)
    return w
