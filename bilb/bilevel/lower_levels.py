"""Lower-level problems of MARIGOLD: which balance of the task gradients the weights solve for.

Each is ``min_λ h(λ; G)`` with a gradient that needs products ``G w`` only, never G itself. The
direction of the step is ``d = Jᵀ v(λ)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import checks
from bilb.gradient_balancing.algebra import equal_weights, far, preference_of

Product = Callable[[jax.Array], jax.Array]


class LowerLevel(NamedTuple):
    """A lower-level problem.

    Its functions get ``present`` (K,) bool: λ is 0 for the other tasks, and what they return for
    them does not matter; means and numbers of tasks are over the present ones.

    Attributes:
        weights: ``(λ, product, present) -> v`` (K,), the weights of the direction ``Jᵀ v``.
        gradient: ``(λ, product, memory, present) -> (∂h/∂λ, memory)``; ``product(w)`` is ``G w``,
            and ``memory`` a running scalar, 0 at first.
        project: onto the feasible set of λ; absent tasks arrive as large negative numbers, and what
            it returns for them does not matter.
        on_simplex: whether λ sums to 1; False needs ``scheme="projection"``.
        logarithmic: whether the gradient is one for log λ.
        lagged: whether one product at v(λ) per step is enough, so that the slopes of the step
            just taken serve; otherwise ``slope_fn`` is needed.
    """

    weights: Callable[[jax.Array, Product, jax.Array], jax.Array]
    gradient: Callable[[jax.Array, Product, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    project: Callable[[jax.Array], jax.Array] = optax.projections.projection_simplex
    on_simplex: bool = True
    logarithmic: bool = False
    lagged: bool = True


def mgda() -> LowerLevel:
    """The min-norm point: ``h = ½ ‖Jᵀ λ‖²``, gradient ``G λ``, direction ``Jᵀ λ``.

    References:
        Désidéri, *Multiple-gradient descent algorithm*, 2012; Sener and Koltun, 2018.
    """
    return LowerLevel(
        weights=lambda lam, product, present: lam,
        gradient=lambda lam, product, memory, present: (product(lam), memory),
    )


def sdmgrad(eta: float | jax.Array = 0.3) -> LowerLevel:
    """Direction-oriented MGDA: ``h = ½ ‖Jᵀ(λ + η/K)‖²``; the same as MGDA on a truncated simplex.

    Args:
        eta: η >= 0, pull towards the mean gradient.

    References:
        Xiao et al., *Direction-oriented multi-objective learning* (SDMGrad), 2023.
    """
    checks.number("eta", eta, minimum=0)

    def weights(lam, product, present):
        return jnp.where(present, lam + eta * equal_weights(present, lam.dtype), 0.0) / (1.0 + eta)

    def gradient(lam, product, memory, present):
        return product(weights(lam, product, present)), memory

    return LowerLevel(weights, gradient)


def cagrad(c: float | jax.Array = 0.4) -> LowerLevel:
    """CAGrad's dual: ``h = λᵀ G 1/K + c ‖g_0‖ ‖Jᵀ λ‖`` with the mean gradient g_0.

    Needs ``slope_fn``: two products per gradient and two for the direction. With c < 1 it ends at
    the point of equal weights.

    Args:
        c: c >= 0, radius of the ball round the mean gradient, relative to its norm.

    References:
        Liu et al., *Conflict-averse gradient descent*, 2021.
    """
    checks.number("c", c, minimum=0)

    def products(lam, product, present):
        mean = equal_weights(present, lam.dtype)
        of_mean, of_lam = product(mean), product(lam)
        norm = lambda square: jnp.sqrt(jnp.maximum(square, 0.0))
        norm_mean, norm_lam = norm(mean @ of_mean), norm(lam @ of_lam)
        ratio = c * norm_mean / jnp.where(norm_lam > 0, norm_lam, 1.0)
        usable = (norm_lam > 0) & jnp.isfinite(ratio)
        return mean, of_mean, of_lam, jnp.where(usable, ratio, 0.0)

    def weights(lam, product, present):
        mean, _, _, ratio = products(lam, product, present)
        return (mean + ratio * lam) / (1.0 + c**2)

    def gradient(lam, product, memory, present):
        _, of_mean, of_lam, ratio = products(lam, product, present)
        return of_mean + ratio * of_lam, memory

    return LowerLevel(weights, gradient, lagged=False)


def fairgrad(alpha: float | jax.Array = 2.0, preference: Any = 1.0) -> LowerLevel:
    """FairGrad's balance ``(λ / p)^{1/α} · G λ = const``, as a ratio; α = 1 is Nash-MTL's.

    The ratio ``(q - mean q) / (|mean q| + 0.01 max |q| so far)`` with ``q = (λ / p)^{1/α} · G λ``
    is the gradient for log λ; the preference p sums to 1 here, and the mean is weighted with it.
    The absolute form has no solution at a Pareto stationary point; the floor keeps this one from
    chattering there. Use it with the default scheme.

    Args:
        alpha: α > 0.
        preference: p > 0, one number or one per task; only the ratios matter. Where m losses are
            pieces of one, give each of them 1 / m.

    References:
        Ban and Ji, *Fair resource allocation in multi-task learning*, 2024.
    """
    checks.number("alpha", alpha, minimum=0, exclusive=True)
    checks.number("preference", preference, minimum=0, exclusive=True, per_task=True)

    def gradient(lam, product, memory, present):
        shares = preference_of(preference, present, lam.dtype)
        shares = shares / jnp.where(present.any(), shares.sum(), 1.0)
        # Where λ is 0 the task is absent; the inner `where` keeps its power finite.
        ratio = jnp.where(present, lam, 1.0) / jnp.where(present, shares, 1.0)
        q = jnp.where(present, ratio ** (1.0 / alpha) * product(lam), 0.0)
        mean = shares @ q
        memory = jnp.maximum(memory, jnp.max(jnp.abs(q)))
        scale = jnp.abs(mean) + 1e-2 * memory
        return (q - mean) / jnp.where(scale > 0, scale, 1.0), memory

    return LowerLevel(lambda lam, product, present: lam, gradient, logarithmic=True)


def nash(preference: Any = 1.0) -> LowerLevel:
    """Nash-MTL's balance ``λ / p · G λ = const``: :func:`fairgrad` with α = 1.

    Args:
        preference: p > 0, one number or one per task.

    References:
        Navon et al., *Multi-task learning as a bargaining game*, 2022.
    """
    return fairgrad(1.0, preference)


def dualproj(cap: float | jax.Array = 100.0) -> LowerLevel:
    """Projection of the mean gradient onto the dual cone: ``½ λᵀ G λ``, ``1/K <= λ <= cap``.

    The weights do not sum to one. Without the cap they can grow without bound in the single loop.
    Only with ``scheme="projection"``.

    Args:
        cap: largest weight.

    References:
        Lopez-Paz and Ranzato, *Gradient episodic memory*, 2017; Quinton and Rey, 2024.
    """
    checks.number("cap", cap, minimum=0, exclusive=True)

    def project(lam):
        present = lam > far(lam.dtype) / 2
        return jnp.clip(lam, 1.0 / jnp.maximum(present.sum(), 1), cap)

    return mgda()._replace(project=project, on_simplex=False)
