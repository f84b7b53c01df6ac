"""What the methods of this folder share: scalarisations by a preference, and learnt exponents."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks


def scalarization(
    name: str,
    state_type: Callable[[jax.Array, jax.Array], base.PyTree],
    formula: Callable[..., tuple[jax.Array, jax.Array]],
    preference: jax.Array | float | optax.Schedule | None,
    reference: jax.Array | float | optax.Schedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Makes one number f of the distances to a reference point and a preference the objective.

    Args:
        name: of the method, for error messages.
        state_type: ``(step, weights) -> state``.
        formula: ``(u, λ, step, mask) -> (f, ∂f/∂u)`` with the distances u = l - z (K,) and the
            preference λ (K,), both 0 for absent tasks.
        preference: λ, unless ``update`` is given another one; None is one over the number of
            present tasks.
        reference: z.
    """
    checks.number("preference", preference, minimum=0, per_task=True, schedule=True, optional=True)
    checks.number("reference", reference, per_task=True, schedule=True)
    default = preference

    def of_tasks(losses, preference, mask, step):
        """Returns z and λ, (K,)."""
        if preference is None:
            preference = 1.0 / base.num_present(losses, mask) if default is None else default
        pair = {"reference": reference, "preference": preference}
        num_tasks = losses.shape[0]
        return [
            checks.per_task(name, value, num_tasks, step).astype(losses.dtype)
            for name, value in pair.items()
        ]

    def init(num_tasks, dtype):
        ones, step = jnp.ones(num_tasks, dtype), base.new_step()
        of_tasks(ones, None, None, step)
        return state_type(step, ones)

    def update(losses, state, *, mask, preference=None, **_):
        checks.number("preference", preference, minimum=0, per_task=True, optional=True)
        z, lamb = of_tasks(losses, preference, mask, state.step)
        present = base.present(losses, mask)
        u = jnp.where(present, jax.lax.stop_gradient(losses) - z, 0.0)
        value, weights = formula(u, jnp.where(present, lamb, 0.0), state.step, mask)
        balanced, weights = base.split_over_tasks(value, weights, losses, mask)
        return balanced, state_type(optax.safe_increment(state.step), weights)

    return base.loss_transformation(init, update, name=name)


def direction(vector: jax.Array) -> jax.Array:
    """Returns ``v / ‖v‖`` for v of any size, and 0 for 0."""
    size = jnp.max(jnp.abs(vector))
    vector = in_units_of(jnp.where(size > 0, size, 1.0), vector)
    length = jnp.linalg.norm(vector)
    return vector / jnp.where(length > 0, length, 1.0)


def in_units_of(size: jax.Array, vector: jax.Array) -> jax.Array:
    """Returns ``v / size``, also where the reciprocal that XLA takes of the size is subnormal."""
    shrink = jnp.where(size > 1, 2.0**-10, 1.0).astype(vector.dtype)
    return (vector * shrink) / (size * shrink)


def smooth_maximum(
    values: jax.Array, smoothing: jax.Array | float = 1.0, where: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns ``μ log Σ_k exp(v_k / μ)`` and its derivative ``softmax(v / μ)``, for any size of v.

    ``jax.nn.logsumexp`` of a quotient is infinite, or fused with the subtraction of the largest
    value as a multiply-add under ``jit``, which makes the largest exponent a rounding error of
    about epsilon times the value instead of zero.

    Args:
        values: v (K,).
        smoothing: μ > 0.
        where: None or (K,) bool, the values that count; without any, all do.

    Returns:
        ``(scalar, (K,))``, the latter zero where ``where`` is False.
    """
    where = jnp.ones(values.shape, bool) if where is None else where | ~jnp.any(where)
    largest = jnp.max(values, where=where, initial=-jnp.inf)
    exponents = jnp.where(values >= largest, 0.0, jnp.minimum(values - largest, 0.0)) / smoothing
    terms = jnp.where(where, jnp.exp(exponents), 0.0)
    total = jnp.sum(terms)
    return largest + smoothing * jnp.log(total), terms / total


def learnt_exponents(
    name: str,
    state_type: Callable[[jax.Array, jax.Array, optax.OptState], base.PyTree],
    weight: Callable[[jax.Array], jax.Array],
    charge: Callable[[jax.Array], jax.Array],
    initial: float | jax.Array,
    optimizer: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """Makes ``Σ_k w(s_k) l_k + c(s_k)`` the objective and minimises it over the exponents s, too.

    They are kept in ``|s| <= log(largest number) / 2`` (44 in float32, 354 in float64), so that
    for a loss that stays zero, which has no finite minimiser, the weight does not overflow.

    Args:
        name: of the method, for error messages.
        state_type: ``(s, weights, opt_state) -> state``.
        weight: w, elementwise, an exponential.
        charge: c, elementwise.
        initial: initial s, one number or (K,).
        optimizer: Optax optimiser of s; Adam at 0.025 if None.
    """
    checks.number("initial", initial, per_task=True)
    optimizer = checks.optimizer("optimizer", optimizer, optax.adam(0.025))

    def bounded(s):
        bound = 0.5 * math.log(float(jnp.finfo(s.dtype).max))
        return jnp.clip(s, -bound, bound)

    def init(num_tasks, dtype):
        initial_s = checks.per_task("initial", initial, num_tasks)
        s = bounded(jnp.array(initial_s, dtype, copy=True))
        return state_type(s, weight(s), optimizer.init(s))

    def update(losses, state, **_):
        s, _, opt_state = state

        def objective(s, losses):
            return weight(s) * losses + charge(s)

        gradient = jax.grad(lambda s: objective(s, jax.lax.stop_gradient(losses)).sum())(s)
        updates, opt_state = optimizer.update(base.bounded_gradient(gradient), opt_state, s)
        new_s = bounded(optax.apply_updates(s, updates))
        return objective(s, losses), state_type(new_s, weight(s), opt_state)

    return base.loss_transformation(init, update, name=name)
