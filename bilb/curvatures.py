"""Curvatures: a positive number per task (K,) that says how fast its loss is learnt.

For a mean of squared residuals with Jacobian J_k (N_k, P), the mean diagonal of the tangent kernel,
``tr(J_k J_kᵀ) / N_k``, or what estimates a multiple of it. Both functions here return what
:func:`bilb.value_and_grad` takes as ``curvatures=``, and can be called by hand:
``bilb.curvatures.probe()(task_losses, params, *args)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks, grams, jacobian, names

#: ``(task_losses, params, *args, shared=True, step=0) -> (K,)``
Curvatures = Callable[..., jax.Array]


def probe(probes: int = 1, key: int | jax.Array = 0) -> Curvatures:
    """Second derivatives of the losses along random directions, ``|vᵀ ∇²l_k v|``.

    The directions have entries ±1, so that ``E[vᵀ ∇²l v] = tr ∇²l``; for a mean of squared
    residuals that is ``2 tr(J Jᵀ) / N`` plus a term that vanishes with the residuals. The mean of
    the magnitudes over the probes is taken. Costs about three forward passes per probe, in forward
    mode, whatever K is; a model with a ``jax.custom_vjp`` has no forward mode.

    Args:
        probes: how many directions per step, at least 1; static.
        key: seed or JAX key. The directions depend on it and on the step only.

    Returns:
        ``curvatures(task_losses, params, *args, shared=True, step=0) -> (K,)``.

    Raises:
        ValueError: for ``probes`` below 1.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum(x**2), 5 * x[0] ** 2])
        >>> print(bilb.curvatures.probe()(task_losses, jnp.ones(3)))
        [ 6. 10.]

    References:
        Hutchinson, *A stochastic estimator of the trace of the influence matrix*, 1989.
    """
    checks.number("probes", probes, minimum=1, whole=True, static=True)
    checks.key(key)

    def curvatures(task_losses, params, *args, shared=True, step=0):
        losses = lambda p: names.stack(task_losses(p, *args))

        def along(direction):
            slopes = lambda p: jax.jvp(losses, (p,), (direction,))[1]
            return jnp.abs(jax.jvp(slopes, (params,), (direction,))[1])

        return _mean_over_probes(along, params, shared, probes, key, step)

    return curvatures


def tangent_kernel(
    residuals: Callable[..., Sequence[jax.Array]],
    probes: int | None = None,
    key: int | jax.Array = 0,
    chunk_size: int | None = None,
) -> Curvatures:
    """The mean diagonal of each task's tangent kernel, from its residual vector.

    ``t_k = Σ_i ‖∇r_ki‖² / N_k``, exactly for one backward pass per residual, or as the mean of
    ``‖J_k v‖² / N_k`` over random directions v of entries ±1, one forward pass each, unbiased.

    Args:
        residuals: ``residuals(params, *args) ->`` K arrays of any shapes, the residuals of each
            task in the order of the losses.
        probes: number of random directions per step, at least 1; None for the exact value; static.
        key: seed or JAX key of the directions, which depend on it and on the step only.
        chunk_size: how many backward passes are computed at once for the exact value; one if None;
            static.

    Returns:
        ``curvatures(task_losses, params, *args, shared=True, step=0) -> (K,)``.

    Raises:
        ValueError: for ``probes`` or ``chunk_size`` below 1.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> residuals = lambda x: [jnp.sin(3 * x), x[:1] - 1]
        >>> task_losses = lambda x: jnp.stack([jnp.mean(r**2) for r in residuals(x)])
        >>> print(bilb.curvatures.tangent_kernel(residuals)(task_losses, jnp.zeros(4)))
        [9. 1.]

    References:
        Wang et al., *When and why PINNs fail to train: A neural tangent kernel perspective*,
        arXiv 2007.14527.
    """
    checks.number("probes", probes, minimum=1, whole=True, static=True, optional=True)
    checks.number("chunk_size", chunk_size, minimum=1, whole=True, static=True, optional=True)
    checks.key(key)

    def curvatures(task_losses, params, *args, shared=True, step=0):
        del task_losses
        of_params = lambda p: [jnp.ravel(r) for r in residuals(_held(p, shared), *args)]

        def exact(k):
            at = jacobian.linearized(lambda p: of_params(p)[k], params)
            norms = grams.norms_of_linearization(at, chunk_size)
            return jnp.mean(norms**2)

        def along(direction):
            moved = jax.jvp(of_params, (params,), (direction,))[1]
            wide = [m.astype(base.at_least_float32(m.dtype)) for m in moved]
            return jnp.stack([jnp.mean(m**2) for m in wide])

        if probes is None:
            num_tasks = len(jax.eval_shape(of_params, params))
            return jnp.stack([exact(k) for k in range(num_tasks)])
        return _mean_over_probes(along, params, shared, probes, key, step)

    return curvatures


def _held(params, shared):
    """Returns the parameters with those that are not shared held constant."""
    hold = lambda is_shared, part: part if is_shared else jax.lax.stop_gradient(part)
    return jax.tree.map(hold, shared, params)


def _mean_over_probes(along, params, shared, probes, key, step):
    """Returns the mean of ``along`` over random directions in the shared parameters."""

    def of_key(key):
        direction = optax.tree.random_like(key, params, sampler=jax.random.rademacher)
        keep = lambda is_shared, part: part if is_shared else optax.tree.zeros_like(part)
        return along(jax.tree.map(keep, shared, direction))

    keys = jax.random.split(jax.random.fold_in(base.as_key(key), step), probes)
    return jnp.mean(jax.lax.map(of_key, keys), axis=0)
