"""The settings of the papers' experiments: normalisation and method in one chain.

Each preset is what the official code of that experiment computes, loss by loss; only the
optimiser of the router is yours to choose (the official code trains it with the model's Adam and
learning rate, the default here). With ``optax.inject_hyperparams``, ``num_features`` is static.
"""

from __future__ import annotations

import jax
import optax

from bilb import base, normalize
from bilb.bilevel import routers
from bilb.bilevel.bilb4mtl import bilb4mtl
from bilb.chain import chain


def bilb4mtl_cityscapes(
    penalty: base.Scalar = 0.1,
    *,
    num_features: int,
    clip: tuple[float, float] | None = (0.2, 0.8),
    optimizer: optax.GradientTransformation = optax.adam(3e-4),
) -> optax.GradientTransformationExtraArgs:
    """BiLB4MTL on Cityscapes: raw losses, feature router, discrepancy of the unweighted losses.

    Args:
        penalty: λ, default 0.1.
        num_features: width of the pooled shared features given as ``features=``.
        clip: bounds on the router's weights; K must leave room for them.
        optimizer: of the router.

    Returns:
        A loss transformation; see :func:`bilb.bilb4mtl` for errors and state.

    Example:
        >>> import bilb
        >>> balancer = bilb.presets.bilb4mtl_cityscapes(num_features=128)

    References:
        Xiao et al., arXiv 2502.08585, Cityscapes, 2 tasks.
    """
    return bilb4mtl(
        penalty,
        routers.linear_softmax(num_features, clip),
        weighted=False,
        optimizer=optimizer,
    )


def bilb4mtl_nyuv2(
    penalty: base.Scalar = 0.05,
    *,
    num_features: int,
    clip: tuple[float, float] | None = (0.2, 0.8),
    optimizer: optax.GradientTransformation = optax.adam(8e-5),
) -> optax.GradientTransformationExtraArgs:
    """BiLB4MTL on NYU-v2: losses at the level of the smallest, feature router, divided by Σσ.

    Args:
        penalty: λ, default 0.05.
        num_features: width of the pooled shared features given as ``features=``.
        clip: bounds on the router's weights; K must leave room for them.
        optimizer: of the router.

    Returns:
        A chain of two loss transformations; see :func:`bilb.bilb4mtl` for errors and state.

    Example:
        >>> import bilb
        >>> balancer = bilb.presets.bilb4mtl_nyuv2(num_features=192)

    References:
        Xiao et al., arXiv 2502.08585, NYU-v2, 3 tasks.
    """
    return chain(
        normalize.scale_by_initial_ratio(),
        bilb4mtl(
            penalty,
            routers.linear_softmax(num_features, clip),
            divisor="sum",
            optimizer=optimizer,
        ),
    )


def bilb4mtl_celeba(
    penalty: base.Scalar = 0.01, *, optimizer: optax.GradientTransformation = optax.adam(1e-3)
) -> optax.GradientTransformationExtraArgs:
    """BiLB4MTL on CelebA: raw losses, sigmoid router, divided by Σσ held constant.

    Args:
        penalty: λ, default 0.01.
        optimizer: of the router.

    Returns:
        A loss transformation; see :func:`bilb.bilb4mtl` for errors and state.

    Example:
        >>> import bilb
        >>> balancer = bilb.presets.bilb4mtl_celeba()

    References:
        Xiao et al., arXiv 2502.08585, CelebA, 40 tasks.
    """
    return bilb4mtl(
        penalty,
        routers.sigmoid(),
        divisor="stop_gradient_sum",
        optimizer=optimizer,
    )


def bilb4mtl_qm9(
    penalty: base.Scalar = 0.05,
    *,
    every: int | None,
    optimizer: optax.GradientTransformation = optax.adam(1e-3),
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """BiLB4MTL on QM9: logarithm relative to each epoch's first losses, relu-sigmoid router.

    Args:
        penalty: λ, default 0.05.
        every: updates per epoch, after which the initial losses are taken anew; None takes them
            once.
        optimizer: of the router.
        key: seed or JAX key of the router's initial parameters.

    Returns:
        A chain of two loss transformations; see :func:`bilb.bilb4mtl` for errors and state.

    Example:
        >>> import bilb
        >>> balancer = bilb.presets.bilb4mtl_qm9(every=1000)

    References:
        Xiao et al., arXiv 2502.08585, QM9, 11 tasks.
    """
    return chain(
        normalize.log_scale_by_initial_loss(every),
        bilb4mtl(
            penalty,
            routers.relu_sigmoid(key=key),
            divisor="stop_gradient_sum",
            optimizer=optimizer,
        ),
    )
