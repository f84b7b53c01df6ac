"""What the two methods share that project onto the dual cone of the task gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from bilb import base, checks
from bilb.gradient_balancing import solvers
from bilb.gradient_balancing.algebra import preference_of
from bilb.gradient_balancing.weighting import gram_weighting


def dual_cone_weighting(
    name: str,
    formula: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    reg_eps: base.Scalar,
    norm_eps: base.Scalar,
    preference: Any,
    decay: base.Scalar,
) -> optax.GradientTransformationExtraArgs:
    """Makes a solution of ``min_{v >= m} vᵀ H v``, H the Gram matrix with a ridge, a method.

    Args:
        name: of the method, for error messages.
        formula: ``(H, m, present) -> w`` (K,), with the preference m, 0 for absent tasks.
        reg_eps: the ridge on ``G / trace(G)``.
        norm_eps: the trace of G below which it counts as 0.
        preference: m; one over the number of present tasks if None.
        decay: of a running mean of the Gram matrix.
    """
    checks.number("reg_eps", reg_eps, minimum=0, schedule=True)
    checks.number("norm_eps", norm_eps, minimum=0, schedule=True)
    checks.number("preference", preference, minimum=0, per_task=True, optional=True)

    def weigh(gram, memory, step):
        ridge, smallest = base.at_step(reg_eps, step), base.at_step(norm_eps, step)
        hessian = solvers.dual_cone_hessian(gram.matrix, gram.size, ridge, smallest)
        mean = preference_of(preference, gram.present, hessian.dtype)
        return formula(hessian, mean, gram.present), memory

    return gram_weighting(name, weigh, decay=decay)
