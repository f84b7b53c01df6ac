"""The driver of task gradients that exist anyway: the first link of an optimiser's chain."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import arguments, asking, base, checks, jacobian, names
from bilb import grams as gram_engines


class AggregateByState(NamedTuple):
    """State of :func:`aggregate_by`."""

    effective_weights: base.PyTree  # (K,) ∂Φ/∂l of the call, or by task name; 0 at first
    balancer: optax.OptState
    slopes: jax.Array | None  # (K,) of the step just taken, None where the method reads none


def aggregate_by(
    balancer: optax.GradientTransformation,
    num_tasks: int | Sequence[str],
    *,
    shared: base.PyTree = True,
    heads: Literal["weighted", "sum"] = "weighted",
) -> optax.GradientTransformationExtraArgs:
    """Makes a loss transformation the first link of an optimiser that gets stacked task gradients.

    ``optax.chain(bilb.aggregate_by(bilb.mgda(), num_tasks=3), optax.adam(1e-3))`` reads gradients
    whose leaves are ``(K, *shape)``, as :func:`bilb.task_gradients` returns them, and passes on
    their sum under the balancer's effective weights. What the balancer reads about the losses, it
    computes from the gradients: ``gram``, ``gradient_norms``, ``slope_fn``, and the ``slopes`` of
    the previous call's step; ``losses_after`` and a mask go to ``update`` as keywords. The
    parameters are those of :func:`value_and_grad`, to rounding, unless a router reads features,
    through which no gradient flows here. Use it where the task gradients exist anyway.

    Give it the whole tree, with ``shared`` and ``heads`` for what is task-specific, or
    ``optax.partition`` with a static tree of labels whose groups each begin with one.
    ``optax.masked`` would leave the other leaves stacked, and ``optax.apply_updates`` would then
    broadcast their parameters to (K, ...). Wrappers that look at updates, such as
    ``optax.clip_by_global_norm``, ``optax.MultiSteps`` and ``optax.apply_if_finite``, go behind it.

    The gradient of a task that is absent, or whose weight is 0, is left out, NaN included.

    Args:
        balancer: a loss transformation or a chain of them.
        num_tasks: K, or the names of the tasks in any order, where the losses come in a dict and
            something is given or wanted by name; static.
        shared: bools in a pytree prefix of the parameters, True for those that tasks share: Gram
            matrices, norms and slopes are taken over them only.
        heads: what the other parameters follow, as in :func:`value_and_grad`.

    Returns:
        An aggregator: ``update(task_gradients, state, params, losses=losses, **extra)``. A balancer
        whose weights do not depend on the values of the losses, such as :func:`bilb.mgda` alone,
        needs no ``losses=``.

    Raises:
        ValueError: if ``num_tasks`` < 1, for an unknown ``heads``, if ``losses`` are not (K,), or a
            leaf's leading axis is not the number of tasks.
        MissingArgument: if ``losses=`` is missing and its values matter.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum((x - 1) ** 2), jnp.sum((x + 1) ** 2)])
        >>> optimizer = optax.chain(bilb.aggregate_by(bilb.bilb4mtl(), 2), optax.sgd(0.1))
        >>> x = jnp.array([0.5, 0.5])
        >>> state = optimizer.init(x)
        >>> losses, task_gradients = bilb.task_gradients(task_losses, x)
        >>> updates, state = optimizer.update(task_gradients, state, x, losses=losses)
        >>> print(updates.shape)
        (2,)
    """
    named = num_tasks
    if isinstance(num_tasks, Sequence):
        named, num_tasks = dict.fromkeys(num_tasks, 0.0), len(num_tasks)
    checks.number("num_tasks", num_tasks, minimum=1, whole=True, static=True)
    jacobian.check_heads(heads)
    balancer = asking.as_link(balancer)

    def init_fn(params):
        del params
        zeros = lambda: jnp.zeros(num_tasks, jnp.result_type(float))
        with names.known(named):
            state = balancer.init(zeros())
            asking.refuse_optimizer(state)
            reads_slopes = "slopes" in asking.asked(balancer, state, zeros())
        weights = names.unstack(zeros(), named)
        return AggregateByState(weights, state, zeros() if reads_slopes else None)

    def update_fn(task_gradients, state, params=None, *, losses=None, **extra):
        with names.known(named), names.known(losses):
            own, given = names.names_of(named), names.current()
            if given not in (None, own or given):
                raise ValueError(f"aggregate_by was made for {own}; got losses of {given}.")
            if extra.get("mask") is not None:
                extra["mask"] = checks.mask(extra["mask"], num_tasks)
            losses = None if losses is None else names.stack(losses)
            return named_update_fn(task_gradients, state, params, losses, **extra)

    def named_update_fn(task_gradients, state, params, losses, **extra):
        jacobian.check_task_gradients(task_gradients, params, num_tasks)
        shared_rows = jacobian.shared_part(task_gradients, shared)
        take_gram = lambda: gram_engines.of_rows(shared_rows)
        given = dict(extra)
        if state.slopes is not None:
            given["slopes"] = state.slopes

        weigh = lambda losses: _weigh(balancer, losses, state.balancer, given, take_gram)
        dtype = names.stack(state.effective_weights).dtype
        if losses is None:
            losses = jnp.ones(num_tasks, dtype)
            if asking.depends_on_its_argument(weigh, losses):
                raise arguments.MissingArgument(
                    "losses",
                    "aggregate_by",
                    "call update(task_gradients, state, params, losses=...).",
                )
        losses = jnp.asarray(losses)
        weights, new = weigh(losses.astype(base.at_least_float32(losses.dtype)))
        combine = lambda weights: jacobian.combine(weights, task_gradients)
        combined = jacobian.with_heads(combine, weights, shared, heads, extra.get("mask"))
        along = lambda: gram_engines.products(shared_rows, jacobian.shared_part(combined, shared))
        slopes = None if state.slopes is None else along().astype(dtype)
        weights = names.unstack(weights.astype(dtype), named)
        return combined, AggregateByState(weights, new, slopes)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _weigh(balancer, losses, state, given, take_gram):
    """Returns ∂Φ/∂l and the balancer's next state, with what it asks of the Gram matrix."""
    gram = functools.cache(take_gram)
    supply = {
        "slope_fn": lambda: functools.partial(jnp.matmul, gram(), precision="highest"),
        "gram": gram,
        "gram_fn": lambda: take_gram,
        "gradient_norms": lambda: jnp.sqrt(jnp.diagonal(gram())),
    }

    def weigh(given):
        def objective(losses):
            balanced, new = balancer.update(losses, state, **given)
            return balanced.sum(), new

        return jax.grad(objective, has_aux=True)(losses)

    return asking.supply_missing(weigh, given, supply)[0]
