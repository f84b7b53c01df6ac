"""The contract that every method keeps, and what methods share.

A *loss transformation* (a *method* where it comes from a paper, a *link* inside a chain, a
*balancer* where a driver takes one) is an :class:`optax.GradientTransformationExtraArgs` whose
updates are the stacked task losses: ``state = init(losses)``, which looks at their shape and dtype
alone, and ``balanced, state = update(losses, state)``, shape ``(K,)`` in and out. The sum of the
balanced losses is the objective of the method, so ``jax.grad`` of that sum with respect to the
losses gives the effective task weights. What they sum to is the method's own affair.

:func:`bilb.value_and_grad` drives it; by hand a step is::

    def objective(params):
        balanced, new_state = balancer.update(task_losses(params), state)
        return balanced.sum(), new_state
    grads, state = jax.grad(objective, has_aux=True)(params)

In ``bilb.chain(a, b)`` the losses go through a and then through b. What is known about them, such
as slopes or a Gram matrix, is given for the losses that a gets, and translated for b.

A method states its formula as two functions, ``init(num_tasks, dtype) -> state`` and
``update(losses, state, *, mask, **extra) -> (balanced, state)``; :func:`loss_transformation` adds
what the contract asks of all of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilb import arguments, checks

Array = jax.Array
PyTree = Any
#: A Python number, a traced scalar, or an Optax schedule of the method's step counter.
Scalar = float | Array | optax.Schedule


class TrainingStep(NamedTuple):
    """A method that evaluates the model itself, so that it is a whole training step.

    Attributes:
        init: ``state = init(params, *args)``.
        update: ``params, state, losses = update(params, state, *args)``, with the losses at the
            parameters before the step, as ``task_losses`` returns them.
    """

    init: Callable[..., PyTree]
    update: Callable[..., tuple[PyTree, PyTree, Array]]


def loss_transformation(
    init: Callable[[int, Any], PyTree],
    update: Callable[..., tuple[Array, PyTree]],
    *,
    reads: tuple[str, ...] = (),
    keeps_absent: bool = True,
    name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes a method's two functions a loss transformation that keeps the whole contract.

    What ``update`` returns may depend on the losses' values in any way, but entry k of
    ``balanced`` must carry the gradient of task k alone: put what a formula holds constant under
    ``jax.lax.stop_gradient``. A chain translates slopes and Gram matrices by those K derivatives.

    A loss that is not finite is passed on as it is: :func:`bilb.skip_nonfinite` guards a method.

    Args:
        init: ``(num_tasks, dtype) -> state``; ``dtype`` is the losses' dtype, float32 at least.
        update: ``(losses, state, *, mask, **extra) -> (balanced, state)`` on losses of that dtype.
            ``mask`` is None or (K,) bool; the loss of an absent task arrives as 1, which does no
            harm under a logarithm or in a quotient. ``update`` may have no ``mask`` (then one is
            an error, also that which a chain makes of a link's zero derivatives) and no
            ``**extra``. A keyword-only argument without default is one that the
            method cannot work without: a driver that can compute it does, and a call that lacks it
            is a :class:`bilb.MissingArgument`.
        reads: which extra arguments speak of the losses, as this link gets them; the chain
            translates them past the links in front. Keyword-only arguments without default that
            have one of these names are among them anyway. ``slopes`` (K,), the derivatives of the
            losses along the previous step; ``losses_after`` (K,), the previous batch's losses after
            that step; ``gradient_norms`` (K,); ``gram`` (K, K), the products of the task gradients;
            ``curvatures`` (K,); ``slope_fn``, ``(K,) weights -> (K,) slopes`` at the current
            parameters; ``gram_fn`` and ``curvature_fn``, functions of nothing, for methods that
            need them at some steps only; or a name of your own for an array with a leading task
            axis. They arrive checked, in the dtype of the losses, without gradient, with zeros for
            absent tasks. A task whose entry (whose row and column of ``gram``) is not finite is an
            absent task. ``slopes`` and ``losses_after`` tell of the previous call: a method that
            takes ``taught`` as well gets (K,) bool, the tasks that they tell of: those whose entry
            is finite and which were present then by the state's field ``present`` (by this call's
            mask where there is none), and at the first call, by the state's field ``step``, none.
        keeps_absent: whether to restore the state entries of absent tasks after ``update``. A
            method whose absent tasks still learn from the previous call, or that has per-task
            shapes in what tasks share (a network, a buffer), gives False and calls
            ``bilb.base.learn_where`` or ``bilb.base.keep_absent`` itself.
        name: of the method, for error messages; that of the function around ``update`` if None.

    Returns:
        A transformation that checks shapes and dtypes, preserves the dtype of the losses and of
        every state leaf, ignores unknown extra arguments, refuses those that speak of the losses
        and that it does not read (the links of :func:`bilb.chain` get their own), and with a mask
        returns 0 for absent tasks and leaves their entries of the state as they were.

    Example:
        Weights by inverse gradient norms, averaged over time:

        >>> import jax, jax.numpy as jnp, optax, typing, bilb
        >>> class InverseNormState(typing.NamedTuple):
        ...     weights: jax.Array  # (K,)
        >>> def inverse_norms(decay):
        ...     def init(num_tasks, dtype):
        ...         return InverseNormState(jnp.ones(num_tasks, dtype))
        ...     def update(losses, state, *, mask, gradient_norms):
        ...         weights = 1 / (1e-8 + gradient_norms)
        ...         weights = decay * state.weights + (1 - decay) * weights
        ...         return weights * losses, InverseNormState(weights)
        ...     return bilb.loss_transformation(init, update)
        >>> balancer = bilb.chain(bilb.log_losses(), inverse_norms(0.5))
        >>> task_losses = lambda x: jnp.stack([jnp.sum((x - 1) ** 2), 10 * jnp.sum((x + 2) ** 2)])
        >>> value_and_grad = bilb.value_and_grad(task_losses, balancer)
        >>> x = jnp.zeros(1)
        >>> losses, grads, state = value_and_grad(x, value_and_grad.init(x))
        >>> print(optax.tree.get(state.balancer, "weights"), state.effective_weights)
        [0.75 1.  ] [0.75  0.025]
    """
    keywords = _keywords(update, reads)
    name = name_of(update) if name is None else name

    specification = shapes_of(init)

    def init_fn(losses):
        num_tasks, dtype = checks.losses(losses)
        return init(num_tasks, at_least_float32(dtype))

    def update_fn(losses, /, state, params=None, *, mask=None, **extra):
        del params
        num_tasks, loss_dtype = checks.losses(losses)
        dtype = at_least_float32(loss_dtype)
        # A driver listens here, and can so tell a mistyped keyword.
        arguments.note(("mask", *keywords.reads, *(keywords.named - _OWN)))
        checks.state(state, specification(num_tasks, dtype), num_tasks, name)
        for needed in (*keywords.reads, *keywords.required):
            if extra.get(needed) is None:
                raise arguments.missing(needed, name)
        arguments.refuse(extra, name, keywords.reads)
        losses = jnp.asarray(losses, dtype)
        if mask is not None:
            mask = checks.mask(mask, num_tasks)
            if not keywords.takes("mask"):
                raise TypeError(f"{name} takes no mask: give its update the keyword `mask`.")
        # A task with a statistic that is not finite leaves the mask here.
        mask, given = _read(keywords.reads, extra, mask, state, num_tasks, dtype)
        if mask is not None:
            # The inner `where` keeps an absent task's NaN out of the method's derivatives too.
            losses = jnp.where(mask, losses, 1.0)
        given = {**extra, **given, "mask": mask}
        given = {keyword: given[keyword] for keyword in given if keywords.takes(keyword)}
        balanced, new_state = update(losses, state, **given)
        if mask is not None:
            balanced = jnp.where(mask, balanced, 0.0)
            if keeps_absent:
                shapes = lambda count: specification(count, dtype)
                new_state = keep_absent(mask, new_state, state, shapes)
        return balanced.astype(loss_dtype), jax.tree.map(like, new_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Keywords(NamedTuple):
    """What a method's update takes by keyword."""

    named: set[str]  # its parameters
    takes_all: bool  # whether it has **extra
    reads: tuple[str, ...]  # those that speak of the losses
    required: list[str]  # the others without a default

    def takes(self, keyword):
        return self.takes_all or keyword in self.named


def _keywords(update, reads):
    """Returns what an update takes, and makes new names among ``reads`` known."""
    parameters = inspect.signature(update).parameters.values()
    required = [
        p.name
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in ("mask", "taught")
    ]
    reads = tuple(dict.fromkeys((*reads, *(n for n in required if n in arguments.ABOUT_LOSSES))))
    for read in reads:
        if read in ("mask", "features", "losses"):
            raise ValueError(f"reads: `{read}` does not speak of the losses; take it as a keyword.")
        # A new name is known to all chains and drivers of the process from now on.
        own = arguments.Argument(
            1, False, "an array with a leading task axis (K, ...).", exact=False
        )
        arguments.ABOUT_LOSSES.setdefault(read, own)
    return _Keywords(
        named={p.name for p in parameters if p.kind is not p.VAR_KEYWORD},
        takes_all=any(p.kind is p.VAR_KEYWORD for p in parameters),
        reads=reads,
        required=[name for name in required if name not in reads],
    )


def _read(reads, extra, mask, state, num_tasks, dtype):
    """Returns the mask less the tasks whose arguments are not finite, and the arguments read."""
    lagged = [read for read in reads if arguments.ABOUT_LOSSES[read].lagged]
    current = [read for read in reads if read not in lagged]
    mask, given = arguments.read(current, extra, mask, num_tasks, dtype)
    if lagged:
        told = getattr(state, "present", mask)
        taught, of_last_step = arguments.read(lagged, extra, told, num_tasks, dtype)
        if hasattr(state, "step"):
            taught &= state.step > 0
        given |= {**of_last_step, "taught": taught}
    return mask, given


#: Parameters of a method's update that are not the user's to give.
_OWN = {"losses", "state", "taught", "statistics_of"}


def shapes_of(init: Callable[[int, Any], PyTree]) -> Callable[[int, Any], PyTree]:
    """Returns ``(num_tasks, dtype) -> `` the shapes of what ``init`` returns, evaluated once."""
    return functools.cache(lambda num_tasks, dtype: jax.eval_shape(lambda: init(num_tasks, dtype)))


def name_of(function: Any) -> str:
    """Returns the name of the public function that a closure belongs to."""
    return function.__qualname__.split(".")[0]


def keep_absent(
    mask: Array, new: PyTree, old: PyTree, specification: Callable[[int], PyTree]
) -> PyTree:
    """Returns ``new`` with the entries of absent tasks as they were in ``old``.

    A task axis is one whose length changes with K. An entry is new if its task is present along all
    of them. Where the state cannot be initialised for another K (it holds constants per task),
    every axis of length K is a task axis.

    Args:
        mask: (K,) bool, the tasks that are present.
        new: any pytree of arrays.
        old: the same pytree, before.
        specification: ``num_tasks -> `` the pytree's shapes.
    """
    num_tasks = mask.shape[0]

    def keep(leaf, other, new, old):
        for axis, (n, m) in enumerate(zip(leaf.shape, other.shape)):
            if n != m:
                shape = [1] * old.ndim
                shape[axis] = num_tasks
                new = jnp.where(mask.reshape(shape), new, old)
        return new

    leaves = specification(num_tasks)
    grown = lambda leaf: tuple(n + (n == num_tasks) for n in leaf.shape)
    other = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(grown(leaf), leaf.dtype), leaves)
    # Bounds such as a router's clip may allow one task fewer but not one more.
    for count in (num_tasks + 1, num_tasks - 1):
        try:
            other = specification(count)
            break
        except (ValueError, TypeError, ZeroDivisionError):
            continue
    return jax.tree.map(keep, leaves, other, new, old)


def learn_where(
    taught: Array, new: PyTree, old: PyTree, specification: Callable[[int], PyTree]
) -> PyTree:
    """Returns ``new`` for the tasks that were taught, ``old`` for the others.

    Where none was taught, all of ``old``, what tasks share included.

    Args:
        taught: (K,) bool.
        new: any pytree of arrays.
        old: the same pytree, before.
        specification: as in :func:`keep_absent`.
    """
    new = keep_absent(taught, new, old, specification)
    return jax.tree.map(lambda n, o: jnp.where(taught.any(), n, o).astype(o.dtype), new, old)


def present(losses: Array, mask: Array | None) -> Array:
    """Returns the mask as (K,) bool."""
    return jnp.ones(losses.shape, bool) if mask is None else mask


def num_present(losses: Array, mask: Array | None) -> int | Array:
    """Returns the number of present tasks, at least 1."""
    return losses.shape[0] if mask is None else jnp.maximum(jnp.sum(mask), 1)


def split_over_tasks(
    value: Array, weights: Array, losses: Array, mask: Array | None
) -> tuple[Array, Array]:
    """Splits the value f(l) of a scalar objective into an entry per task.

    Entry k is ``l_k · stop_gradient(∂f/∂l_k)``, so that it carries task k's gradient, plus a
    constant that makes the sum over the present tasks equal f. Where an entry of finite losses is
    beyond the dtype's largest number, f is split equally, and an f beyond it counts as that number;
    the gradient is right all the same.

    Args:
        value: f(l), scalar.
        weights: ∂f/∂l, (K,); entries of absent tasks do not matter.
        losses: l, (K,).
        mask: None or (K,) bool.

    Returns:
        ``(balanced (K,), weights (K,))``, the weights a constant.
    """
    value, weights, constant = jax.lax.stop_gradient((value, weights, losses))
    count = num_present(losses, mask)
    by_task = weights * constant
    # Divided before they are added up, so that the sum cannot overflow.
    entries = by_task + (value / count - jnp.sum(by_task / count, where=mask))
    fits = jnp.all(jnp.isfinite(entries), where=mask) | ~jnp.all(jnp.isfinite(losses))
    largest = jnp.finfo(losses.dtype).max
    entries = jnp.where(fits, entries, jnp.clip(value, -largest, largest) / count)
    return weights * (losses - constant) + entries, weights


def bounded_gradient(gradient: PyTree) -> PyTree:
    """Clips far beyond any useful size, so that the squares in Adam's moments cannot overflow.

    The bound is a thousandth of the root of the dtype's largest number: 2e16 in float32.
    """

    def leaf(g):
        bound = 1e-3 * float(jnp.finfo(g.dtype).max) ** 0.5
        return jnp.clip(g, -bound, bound)

    return jax.tree.map(leaf, gradient)


def at_step(value: Scalar, step: Array) -> Any:
    """Evaluates a schedule of one number at ``step``; returns numbers and arrays as they are."""
    if not callable(value):
        return value
    value = jnp.asarray(value(step))
    checks.shape(value, (), "a schedule of one number must return one number.")
    return value


def usable(losses: Array, mask: Array | None) -> Array:
    """Returns (K,) bool: the tasks that are present and whose loss is finite."""
    finite = jnp.isfinite(losses)
    return finite if mask is None else finite & mask


def at_least(losses: Array, floor: Any) -> Array:
    """Returns ``max(losses, floor)``; NaN stays NaN.

    At the floor it passes no gradient, where ``jnp.maximum`` passes half.
    """
    return jnp.where(losses > floor, losses, jnp.where(jnp.isnan(losses), losses, floor))


def as_key(key: int | Array) -> Array:
    """Returns a new typed JAX key from a seed, a raw key or a typed key."""
    checks.key(key)
    if isinstance(key, int) or (jnp.ndim(key) == 0 and jnp.issubdtype(key.dtype, jnp.integer)):
        return jax.random.key(key)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            jnp.copy(jax.random.key_data(key)), impl=jax.random.key_impl(key)
        )
    return jax.random.wrap_key_data(jnp.copy(key))


def new_step() -> Array:
    """Returns the step counter of a fresh state, a scalar int32 zero."""
    return jnp.zeros((), jnp.int32)


def at_least_float32(dtype: np.dtype) -> np.dtype:
    """Returns the dtype in which losses of this dtype are weighed and their statistics kept."""
    return jnp.promote_types(dtype, jnp.float32)


def like(new: Any, old: Any) -> Array:
    """Casts to the dtype that ``init`` chose, so that scans and second calls do not retrace."""
    new = jnp.asarray(new)
    return new if jnp.issubdtype(new.dtype, jax.dtypes.prng_key) else new.astype(old.dtype)
