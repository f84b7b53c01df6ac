"""MARIGOLD: gradient balancing as a bilevel problem, without the task gradients.

``min_x Σ_k λ*_k(x) l_k(x)`` with ``λ*(x) = argmin_{λ ∈ Δ} h(λ; x)``, where h depends on the task
gradients through their Gram matrix G only. For MGDA, ``h = ½ ‖Jᵀ λ‖²`` and ``∂h/∂λ = G λ``: with
the step's own direction ``d = Jᵀ λ`` this is ``s = J d``, the slopes of the losses along d. They
cost one more forward pass, by forward mode or by a zeroth-order difference. The single loop takes
one step on x and one on λ.

This is a reconstruction from the abstract of arXiv 2603.07389, which was all that was at hand.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.bilevel import lower_levels
from bilb.gradient_balancing.algebra import equal_weights, far, onto_simplex

_LOWER = {
    "mgda": lower_levels.mgda,
    "sdmgrad": lower_levels.sdmgrad,
    "cagrad": lower_levels.cagrad,
    "nash": lower_levels.nash,
    "fairgrad": lower_levels.fairgrad,
    "dualproj": lower_levels.dualproj,
}


class MarigoldState(NamedTuple):
    """State of :func:`marigold`."""

    step: jax.Array  # () int32
    point: jax.Array  # (K,) logits, or λ itself where it is projected
    weights: jax.Array  # (K,) the weights v(λ) just used
    present: jax.Array  # (K,) bool, the tasks that were present in the previous call
    memory: jax.Array  # () the lower level's running scalar
    opt_state: optax.OptState


def marigold(
    lower: str | lower_levels.LowerLevel = "mgda",
    *,
    scheme: Literal["softmax", "projection", "exponentiated"] = "softmax",
    inner_steps: int = 1,
    optimizer: optax.GradientTransformation | None = None,
    regularization: base.Scalar = 0.0,
    max_logit: base.Scalar = 6.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient balancing from slopes: MGDA-like balance for one forward pass a step.

    A reconstruction from the paper's abstract. Each call first learns from the step just taken,

    .. math:: \lambda \leftarrow \lambda - \text{optimizer}(\nabla_\lambda h), \qquad
        \nabla_\lambda h = G v(\lambda) = s

    and then weighs the new losses: ``balanced = v(λ) · losses``. ``slopes`` are the directional
    derivatives of the losses along the gradient of the previous call's objective, at that call's
    parameters; give zeros at the first call, when nothing is learnt. :func:`bilb.value_and_grad`
    supplies them. When the scales of the losses differ, balance their logarithms:
    ``bilb.chain(bilb.log_losses(), bilb.marigold())``. For losses that can reach zero alone, such
    as residuals of equations, take the "nash" lower level on their roots,
    :func:`bilb.presets.marigold_pinn`; for statistical losses the plain sum of the logarithms was
    better than any lower level in what was measured here.

    The single loop ends on the Pareto set at a point between equal weights and MGDA's, closer to
    MGDA's the faster the weights move relative to the model; ``inner_steps`` of 20 to 50 gives
    MGDA. The weights are not negative and sum to one, with a mask over the present tasks, but for
    "cagrad" (their sum is ``(1 + c ‖g_0‖ / ‖Jᵀ λ‖) / (1 + c²)``) and "dualproj".

    A slope that is not finite teaches nothing of its task, and slopes beyond 2e16 (float32) count
    as that; where ``slope_fn`` returns one that is not finite, nothing is learnt. A task learns
    from each step in which it was present, also where the next call's mask leaves it out.

    Args:
        lower: the lower-level problem: "mgda", "sdmgrad", "cagrad", "nash", "fairgrad",
            "dualproj", or one of ``bilb.lower_levels`` with its options. Caveats: "cagrad" ends at
            equal weights for c < 1 and needs more passes; "nash" and "fairgrad" are in ratio form,
            with the schemes on logits only; "dualproj" needs ``scheme="projection"``.
        scheme: "softmax" (default): logits z with ``λ = softmax(z)``, the only scheme that reached
            the front from every start of the toy problem; free of the losses' scale with Adam.
            "projection": λ projected onto the simplex; with ``optax.sgd(β)`` the textbook step,
            stable for ``β Σ‖g_k‖² < 2`` less the model's share, or with
            :func:`bilb.adagrad_norm`, free of scale. "exponentiated": ``λ ∝ λ exp(-β s)``.
        inner_steps: M >= 1, steps on λ per call; static. More than one takes them at the current
            parameters and needs ``slope_fn: weights -> slopes`` instead of ``slopes``.
        optimizer: Optax optimiser of λ or its logits; Adam at 0.025, FAMO's rate, if None.
        regularization: ρ >= 0, adds ρ λ to the gradient. A constant ρ makes the iterates slide
            along the front to the point of equal weights; keep 0 or let it decay.
        max_logit: the logits are centred and clipped to this magnitude.

    Returns:
        A loss transformation; ``update(losses, state, *, slopes)``, or ``slope_fn``. Its state has
        the fields ``step``, ``point``, ``weights``, ``present``, ``memory`` and ``opt_state``. With
        ``optax.inject_hyperparams``, ``inner_steps`` is static: ``static_args=("inner_steps",)``.

    Raises:
        ValueError: for an unknown ``lower`` or ``scheme``, a pair that does not go together,
            ``inner_steps`` < 1, negative ``regularization``, or slopes that are not (K,).
        MissingArgument: for a call without ``slopes`` or ``slope_fn``.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum((x - 1) ** 2), 9 * jnp.sum((x + 1) ** 2)])
        >>> value_and_grad = bilb.value_and_grad(task_losses, bilb.marigold())
        >>> x, state = jnp.zeros(2), value_and_grad.init(jnp.zeros(2))
        >>> step = jax.jit(value_and_grad)
        >>> for _ in range(100):
        ...     losses, grads, state = step(x, state)
        ...     x -= 0.02 * grads
        >>> weights = optax.tree.get(state, "weights")
        >>> print(bool(weights[0] > 0.6), bool(jnp.abs(grads).max() < 0.05))
        True True

    References:
        *MARIGOLD*, arXiv 2603.07389 (from the abstract).
    """
    lower = _lower_level(lower, scheme)
    checks.number("inner_steps", inner_steps, minimum=1, whole=True, static=True)
    checks.number("regularization", regularization, minimum=0, schedule=True)
    checks.number("max_logit", max_logit, minimum=0, exclusive=True, schedule=True)
    lagged = lower.lagged and inner_steps == 1
    optimizer = checks.optimizer("optimizer", optimizer, optax.adam(0.025))
    feasible, move = _points(scheme, lower, max_logit)

    def init(num_tasks, dtype):
        uniform = jnp.full(num_tasks, 1 / num_tasks, dtype)
        point = uniform if scheme == "projection" else jnp.zeros(num_tasks, dtype)
        return MarigoldState(
            step=base.new_step(),
            point=jnp.copy(point),
            weights=jnp.copy(uniform),
            present=jnp.ones(num_tasks, bool),
            memory=jnp.zeros((), dtype),
            opt_state=optimizer.init(point),
        )

    shapes = base.shapes_of(init)

    def learn(state, product, present):
        """One step on λ for the tasks that are present; ``product(w)`` is ``G w``."""
        rho = base.at_step(regularization, state.step)
        lam = feasible(state.point, present)
        gradient, memory = lower.gradient(lam, product, state.memory, present)
        gradient = jnp.where(present, gradient + rho * lam, 0.0)
        if scheme == "softmax" and not lower.logarithmic:
            gradient = lam * (gradient - lam @ gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.point)
        point = move(state, lam, updates, present)
        new = state._replace(point=point, opt_state=opt_state, memory=memory)
        taught = present & jnp.isfinite(gradient).all()
        return base.learn_where(taught, new, state, lambda k: shapes(k, point.dtype))

    def update(losses, state, *, mask, slopes=None, taught=None, slope_fn: Any = None, **_):
        present = base.present(losses, mask)
        product: Any = None
        if lagged:
            learnt = learn(state, lambda _: base.bounded_gradient(slopes), taught)
        else:
            product = lambda weights: base.bounded_gradient(slope_fn(weights))
            inner = lambda carry, _: (learn(carry, product, present), None)
            learnt, _ = jax.lax.scan(inner, state, length=inner_steps)
        lam = feasible(learnt.point, present)
        weights = jax.lax.stop_gradient(lower.weights(lam, product, present))
        weights = jnp.where(present, weights, 0.0)
        return weights * losses, learnt._replace(
            step=optax.safe_increment(state.step),
            weights=jnp.where(present, weights, state.weights),
            present=present,
        )

    reads = ("slopes",) if lagged else ("slope_fn",)
    return base.loss_transformation(init, update, reads=reads, keeps_absent=False)


def _lower_level(lower, scheme):
    """Returns the lower-level problem of this name, or as it is given, if the scheme suits it."""
    if isinstance(lower, str):
        if lower not in _LOWER:
            raise ValueError(f"lower must be one of {sorted(_LOWER)}; got {lower!r}.")
        name, lower = lower, _LOWER[lower]()
    elif isinstance(lower, lower_levels.LowerLevel):
        name = "this lower level"
    else:
        raise TypeError(
            "lower must be a name or one of bilb.lower_levels, such as bilb.lower_levels.mgda(); "
            f"got {lower!r}.{checks.uncalled(lower)}"
        )
    if scheme not in ("softmax", "projection", "exponentiated"):
        raise ValueError(
            f'scheme must be "softmax", "projection" or "exponentiated"; got {scheme!r}.'
        )
    if not lower.on_simplex and scheme != "projection":
        raise ValueError(f'{name} needs scheme="projection"; got {scheme!r}.')
    if lower.logarithmic and scheme == "projection":
        raise ValueError(f'{name} needs scheme="softmax" or "exponentiated"; got {scheme!r}.')
    return lower


def _points(scheme, lower, max_logit):
    """Returns how λ is kept: ``feasible(point, present) -> λ`` and a step on the point."""

    def feasible(point, present):
        """λ of the present tasks, scaled to them; 0 for the others."""
        if scheme != "projection":
            return jnp.where(present, jax.nn.softmax(point, where=present), 0.0)
        if not lower.on_simplex:
            return project(point, present)
        lam = jnp.where(present, point, 0.0)
        total = lam.sum()
        scaled = lam / jnp.where(total > 0, total, 1.0)
        return jnp.where(total > 0, scaled, equal_weights(present, lam.dtype))

    def project(point, present):
        if lower.on_simplex:
            return onto_simplex(point, present, lower.project)
        point = jnp.where(present, point, far(point.dtype))
        return jnp.where(present, lower.project(point), 0.0)

    def move(state, lam, updates, present):
        """The point after a step, on the feasible set."""
        if scheme == "projection":
            return project(lam + updates, present)
        point = jnp.where(present, state.point + updates, state.point)
        bound = base.at_step(max_logit, state.step)
        return jnp.clip(point - point.mean(), -bound, bound)

    return feasible, move


class AdagradNormState(NamedTuple):
    """State of :func:`adagrad_norm`."""

    sum_of_squares: jax.Array  # () the squared norms of all updates so far, added up


def adagrad_norm(learning_rate: base.Scalar = 1.0) -> optax.GradientTransformation:
    """AdaGrad with one step size for the whole vector: ``-β u / sqrt(Σ ‖u‖²)``.

    Free of the scale of u, and unlike Adam it keeps its direction, as the projection scheme of
    :func:`marigold` wants.

    Args:
        learning_rate: β, a number or a traced scalar.

    Returns:
        An Optax gradient transformation.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> optimizer = bilb.adagrad_norm()
        >>> updates, _ = optimizer.update(jnp.array([3.0, 4.0]), optimizer.init(jnp.zeros(2)))
        >>> print(updates)
        [-0.6 -0.8]

    References:
        Ward, Wu and Bottou, *AdaGrad stepsizes*, 2019.
    """

    def init_fn(params):
        dtype = optax.tree.dtype(params, "highest")
        return AdagradNormState(jnp.zeros((), jnp.promote_types(dtype, jnp.float32)))

    def update_fn(updates, state, params=None):
        del params
        total = state.sum_of_squares + optax.tree.norm(updates, squared=True)
        scale = -learning_rate / jnp.sqrt(jnp.where(total > 0, total, 1.0))
        return optax.tree.scale(scale, updates), AdagradNormState(total)

    return optax.GradientTransformation(init_fn, update_fn)
