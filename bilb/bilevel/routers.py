"""Routers: the task weights σ(W) that the bilevel method learns.

A :class:`Router` is two functions, ``init(num_tasks, dtype) -> parameters`` and
``apply(parameters, features) -> weights (K,)``; write your own in two lines. Weights should be
positive. Parameters whose shape grows with K are per task: with a mask, the entries of absent tasks
stay as they are. Those of a network (:func:`from_module`) are shared by all tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from bilb import arguments, base, checks


class Router(NamedTuple):
    """A parametrisation of the task weights.

    Attributes:
        init: ``(num_tasks, dtype) -> parameters``, any pytree.
        apply: ``(parameters, features) -> weights`` of shape (K,); ``features`` is None where the
            router uses none.

    Example:
        >>> import jax, jax.numpy as jnp, bilb
        >>> exponential = bilb.Router(
        ...     init=lambda num_tasks, dtype: jnp.zeros(num_tasks, dtype),
        ...     apply=lambda parameters, features: jnp.exp(parameters),
        ... )
        >>> balancer = bilb.bilb4mtl(router=exponential)
    """

    init: Callable[[int, Any], base.PyTree]
    apply: Callable[[base.PyTree, base.PyTree], jax.Array]


def softmax(initial: jax.Array | float = 0.0, clip: tuple[float, float] | None = None) -> Router:
    """``softmax(W)``: weights that sum to one.

    Without ``clip`` minimising the weighted sum drives the weights onto the smallest loss. With it,
    a weight outside the bounds passes no gradient, as in the official code: its logit moves through
    the other weights alone. Where all weights lie outside, the router never moves again:
    initialise it inside.

    Args:
        initial: initial logits, one number or (K,).
        clip: bounds on the weights after the softmax (they are not renormalised), or None. They
            must leave room for K weights that sum to one: ``low * K < 1 < high * K``.

    Returns:
        A router with parameters (K,).

    Raises:
        ValueError: at init, for clip bounds that K cannot satisfy.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> router = bilb.routers.softmax()
        >>> print(router.apply(router.init(4, jnp.float32), None))
        [0.25 0.25 0.25 0.25]
    """

    checks.number("initial", initial, per_task=True)

    def init(num_tasks, dtype):
        _check_clip(clip, num_tasks)
        return _full(initial, num_tasks, dtype)

    return Router(init, lambda logits, _: _clip(jax.nn.softmax(logits), clip))


def sigmoid(initial: jax.Array | float = 1.0) -> Router:
    """``sigmoid(W)``, independent weights in (0, 1); W = 1 as in the paper's CelebA experiment.

    Args:
        initial: initial W, one number or (K,).

    Returns:
        A router with parameters (K,).

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> router = bilb.routers.sigmoid(0.0)
        >>> print(router.apply(router.init(2, jnp.float32), None))
        [0.5 0.5]
    """
    checks.number("initial", initial, per_task=True)
    return Router(
        lambda num_tasks, dtype: _full(initial, num_tasks, dtype),
        lambda logits, _: jax.nn.sigmoid(logits),
    )


def relu_sigmoid(minval: float = 0.2, maxval: float = 1.0, key: int | jax.Array = 0) -> Router:
    """``sigmoid(relu(W))``, W ~ U[minval, maxval], as in the paper's QM9 experiment.

    The weights stay in [0.5, 1), and a weight that reaches 0.5 learns no more.

    Args:
        minval: lower end of the initial W, one number.
        maxval: upper end of the initial W, one number.
        key: seed or JAX key of the draw.

    Returns:
        A router with parameters (K,).

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> router = bilb.routers.relu_sigmoid()
        >>> weights = router.apply(router.init(5, jnp.float32), None)
        >>> print(bool((weights > 0.54).all() and (weights < 0.74).all()))
        True
    """

    checks.key(key)
    checks.number("minval", minval)
    checks.number("maxval", maxval)

    def init(num_tasks, dtype):
        return jax.random.uniform(base.as_key(key), (num_tasks,), dtype, minval, maxval)

    return Router(init, lambda logits, _: jax.nn.sigmoid(jax.nn.relu(logits)))


def linear_softmax(
    num_features: int,
    clip: tuple[float, float] | None = (0.2, 0.8),
    key: int | jax.Array = 0,
) -> Router:
    """``softmax(A φ + b)`` of a linear layer on the mean feature vector φ, then clipped.

    The router of the paper's Cityscapes and NYU-v2 experiments. The objective is differentiated
    through φ, so the router trains the trunk as well.

    Args:
        num_features: F, the number of features; static.
        clip: bounds on the weights as in :func:`softmax`. The default (0.2, 0.8) of the official
            code can hold for 2 to 4 tasks only; beyond, narrow it or give None. While all weights
            lie outside the bounds the layer does not move; other features may bring them back.
        key: seed or JAX key of the initial layer, U(-1/√F, 1/√F).

    Returns:
        A router with parameters ``{"kernel": (F, K), "bias": (K,)}`` whose ``features`` is an array
        (..., F), averaged over all leading axes (batch, positions).

    Raises:
        ValueError: for clip bounds that K cannot satisfy, or features of another width.
        MissingArgument: for ``update`` without ``features=``.

    Example:
        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.bilb4mtl(router=bilb.routers.linear_softmax(16))
        >>> losses, features = jnp.array([1.0, 2.0]), jnp.ones((8, 16))
        >>> balanced, state = balancer.update(losses, balancer.init(losses), features=features)
        >>> print(state.weights.shape)
        (2,)
    """
    checks.key(key)
    checks.number("num_features", num_features, minimum=1, whole=True, static=True)

    def init(num_tasks, dtype):
        _check_clip(clip, num_tasks)
        bound = num_features**-0.5
        kernel_key, bias_key = jax.random.split(base.as_key(key))
        draw = lambda k, shape: jax.random.uniform(k, shape, dtype, -bound, bound)
        return {
            "kernel": draw(kernel_key, (num_features, num_tasks)),
            "bias": draw(bias_key, (num_tasks,)),
        }

    def apply(parameters, features):
        features = _check_features(features, num_features, "routers.linear_softmax")
        mean = features.reshape(-1, num_features).mean(0)
        logits = mean @ parameters["kernel"] + parameters["bias"]
        return _clip(jax.nn.softmax(logits), clip)

    return Router(init, apply)


def from_module(
    module: nn.Module, example_features: base.PyTree, key: int | jax.Array = 0
) -> Router:
    """Makes a flax linen module ``features -> weights (K,)`` a router.

    Args:
        module: a linen module with parameters only (no batch statistics).
        example_features: features (arrays or shapes) to initialise it with.
        key: seed or JAX key of the initialisation.

    Returns:
        A router whose parameters are the module's variables.

    Raises:
        TypeError: for a module that is not linen.
        ValueError: for a module with other variable collections than parameters, and in ``update``
            for one that does not return K weights or features of another shape.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, bilb
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, features):
        ...         return nn.softmax(nn.Dense(3)(nn.tanh(nn.Dense(8)(features.mean(0)))))
        >>> router = bilb.routers.from_module(Net(), jnp.zeros((1, 16)))
        >>> balancer = bilb.bilb4mtl(router=router)
        >>> losses = jnp.ones(3)
        >>> _, state = balancer.update(losses, balancer.init(losses), features=jnp.ones((8, 16)))
        >>> print(state.weights.shape)
        (3,)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a flax.linen.Module; got {type(module).__name__}.")
    checks.key(key)

    def init(num_tasks, dtype):
        del num_tasks  # the module's last layer fixes it; update checks what comes out
        variables = module.init(
            base.as_key(key), jax.tree.map(lambda f: jnp.zeros(f.shape, f.dtype), example_features)
        )
        if set(variables) - {"params"}:
            raise ValueError(
                f"a router has parameters only; the module also has {sorted(variables)}."
            )
        return jax.tree.map(lambda leaf: leaf.astype(dtype), variables)

    def apply(variables, features):
        if features is None:
            raise arguments.MissingArgument(
                "features", "routers.from_module", "call update(..., features=...)."
            )
        return module.apply(variables, features)

    return Router(init, apply)


def _full(value, num_tasks, dtype):
    return jnp.array(checks.per_task("initial", value, num_tasks), dtype, copy=True)


def _clip(weights, clip):
    if clip is None:
        return weights
    low, high = clip
    inside = (weights >= low) & (weights <= high)
    # Unlike jnp.clip this passes the whole gradient at the bounds.
    return jnp.where(inside, weights, jax.lax.stop_gradient(jnp.clip(weights, low, high)))


def _check_clip(clip, num_tasks):
    if clip is None or num_tasks == 1:
        return
    low, high = clip
    if not low * num_tasks < 1 < high * num_tasks:
        raise ValueError(
            f"clip={clip} leaves no room for {num_tasks} softmax weights, which sum to 1: need "
            f"low * K < 1 < high * K. Narrow the bounds (for example (0.2 / K, 0.8)), give "
            "clip=None, or use routers.sigmoid()."
        )


def _check_features(features, num_features, router):
    if features is None:
        raise arguments.MissingArgument(
            "features",
            router,
            "call update(losses, state, features=...) with the features that it reads.",
        )
    features = jnp.asarray(features)
    chex.assert_axis_dimension(
        features,
        axis=-1,
        expected=num_features,
        custom_message=f"{router} was built for {num_features} features; got {features.shape}.",
        include_default_message=False,
        exception_type=ValueError,
    )
    return features
