"""CR-MOGM, NeurIPS 2022: any method with its weights smoothed over time."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import arguments, asking, base, checks


class CRMOGMState(NamedTuple):
    """State of :func:`cr_mogm`."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) λ, the weights just used
    started: jax.Array  # (K,) bool, whether λ holds anything yet
    inner: optax.OptState


def cr_mogm(
    inner: optax.GradientTransformation, alpha: base.Scalar = 0.9, *, initial_weights: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Follows the running mean of another method's weights.

    ``λ_t = α λ_{t-1} + (1 - α) w_t``, from the first weights on.

    What is smoothed are the effective weights ``∂ Σ balanced / ∂ losses`` of ``inner``, whatever it
    reads: ``bilb.cr_mogm(bilb.mgda())`` asks for ``gram``. Mini-batch noise in the weights biases
    the step; smoothing takes it out where α rises to 1 as the learning rate falls. Not to be
    confused with ``decay=``, the running mean of the Gram matrix itself.

    The smoothed weights are constants: what ``inner`` learns inside its ``update`` it learns as
    usual, but a router gets no gradient by its features. A task's entry moves only when it is
    present, what is told of it finite, and its weight finite. The state of ``inner`` may have a
    field ``weights``, too: ``state.weights`` are the smoothed ones.

    Args:
        inner: a loss transformation or a chain of them.
        alpha: α in [0, 1], how much of the old weights stays; .9 as in TorchJD. 0 is ``inner``
            itself, 1 keeps the first weights.
        initial_weights: λ_0, one number or one per task; the first weights of ``inner`` if None.

    Returns:
        A loss transformation that reads what ``inner`` reads. Its state has the fields ``step``,
        ``weights`` (K,), ``started`` (K,) and ``inner``.

    Raises:
        ValueError: for a concrete ``alpha`` outside [0, 1], or ``initial_weights`` of another
            shape.

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.cr_mogm(bilb.mgda(), alpha=0.5)
        >>> losses = jnp.array([1.0, 1.0])
        >>> state = balancer.init(losses)
        >>> _, state = balancer.update(losses, state, gram=jnp.diag(jnp.array([3.0, 1.0])))
        >>> balanced, state = balancer.update(losses, state, gram=jnp.eye(2))
        >>> print(np.asarray(balanced).round(3))
        [0.375 0.625]

    References:
        Zhou et al., *On the convergence of stochastic multi-objective gradient manipulation and
        beyond*, NeurIPS 2022.
    """
    checks.number("alpha", alpha, minimum=0, maximum=1, schedule=True)
    inner = asking.as_link(inner)

    def init_fn(losses):
        num_tasks, dtype = checks.losses(losses)
        dtype = base.at_least_float32(dtype)
        first = 1 / num_tasks if initial_weights is None else initial_weights
        first = checks.per_task("initial_weights", first, num_tasks)
        return CRMOGMState(
            step=base.new_step(),
            weights=jnp.array(first, dtype),
            started=jnp.full(num_tasks, initial_weights is not None),
            inner=inner.init(jnp.zeros(num_tasks, dtype)),
        )

    def update_fn(losses, /, state, params=None, *, mask=None, **extra):
        num_tasks, loss_dtype = checks.losses(losses)
        losses = jnp.asarray(losses, base.at_least_float32(loss_dtype))
        arguments.note(("mask",))
        checks.state(state, jax.eval_shape(init_fn, losses), num_tasks, "cr_mogm")
        if mask is not None:
            mask = checks.mask(mask, num_tasks)
            extra["mask"] = mask
            losses = jnp.where(mask, losses, 1.0)

        def objective(losses):
            balanced, new = inner.update(losses, state.inner, params, **extra)
            return balanced.sum(), new

        weights, new = jax.grad(objective, has_aux=True)(jax.lax.stop_gradient(losses))
        weights = weights.astype(state.weights.dtype)
        # A task that the inner method took for absent keeps its smoothed weight.
        known = arguments.ABOUT_LOSSES
        told = sorted(n for n in known.keys() & extra if not known[n].lagged and known[n].axes)
        told = [name for name in told if extra[name] is not None]
        mask, _ = arguments.read(told, extra, mask, num_tasks, losses.dtype)
        moves = base.usable(weights, mask)
        old = base.at_step(alpha, state.step)
        smooth = jnp.where(state.started, old * state.weights + (1 - old) * weights, weights)
        smooth = jnp.where(moves, smooth, state.weights).astype(state.weights.dtype)
        balanced = smooth * losses
        if mask is not None:
            balanced = jnp.where(mask, balanced, 0.0)
        step = optax.safe_increment(state.step)
        state = CRMOGMState(step, smooth, state.started | moves, new)
        return balanced.astype(loss_dtype), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
