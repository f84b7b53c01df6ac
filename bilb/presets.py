"""Ready chains: the settings of the papers' experiments, and balancers for a kind of problem.

Each preset of BiLB4MTL is what the official code of that experiment computes, loss by loss; only
the optimiser of the router is yours to choose (the official code trains it with the model's Adam
and learning rate, the default here). With ``optax.inject_hyperparams``, ``num_features`` is static.

:func:`marigold_pinn` and :func:`nash_pinn` are for losses that can reach zero, as those of
physics-informed networks. :func:`igb_v2_near_igb_v1` is a form of IGBv2 for losses of any scales.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from bilb import base, normalize
from bilb.bilevel import lower_levels, routers
from bilb.bilevel.bilb4mtl import bilb4mtl
from bilb.bilevel.marigold import marigold
from bilb.chain import chain
from bilb.gradient_balancing.nash_mtl import nash_mtl
from bilb.improvable_gap.igb_v2 import igb_v2


def bilb4mtl_cityscapes(
    penalty: base.Scalar = 0.1,
    *,
    num_features: int,
    clip: tuple[float, float] | None = (0.2, 0.8),
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """BiLB4MTL on Cityscapes: raw losses, feature router, discrepancy of the unweighted losses.

    Args:
        penalty: λ, default 0.1.
        num_features: width of the pooled shared features given as ``features=``.
        clip: bounds on the router's weights; K must leave room for them.
        optimizer: of the router; Adam at 3e-4 if None.

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
        optimizer=optax.adam(3e-4) if optimizer is None else optimizer,
    )


def bilb4mtl_nyuv2(
    penalty: base.Scalar = 0.05,
    *,
    num_features: int,
    clip: tuple[float, float] | None = (0.2, 0.8),
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """BiLB4MTL on NYU-v2: losses at the level of the smallest, feature router, divided by Σσ.

    Args:
        penalty: λ, default 0.05.
        num_features: width of the pooled shared features given as ``features=``.
        clip: bounds on the router's weights; K must leave room for them.
        optimizer: of the router; Adam at 8e-5 if None.

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
            optimizer=optax.adam(8e-5) if optimizer is None else optimizer,
        ),
    )


def bilb4mtl_celeba(
    penalty: base.Scalar = 0.01, *, optimizer: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    """BiLB4MTL on CelebA: raw losses, sigmoid router, divided by Σσ held constant.

    Args:
        penalty: λ, default 0.01.
        optimizer: of the router; Adam at 1e-3 if None.

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
    optimizer: optax.GradientTransformation | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """BiLB4MTL on QM9: logarithm relative to each epoch's first losses, relu-sigmoid router.

    Args:
        penalty: λ, default 0.05.
        every: updates per epoch, after which the initial losses are taken anew; None takes them
            once.
        optimizer: of the router; Adam at 1e-3 if None.
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


def igb_v2_near_igb_v1(
    steps_per_epoch: int | jax.Array,
    *,
    residual: float | jax.Array = 0.2,
    optimizer: optax.GradientTransformation | None = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """IGBv2 for losses of any scales, whose agent moves the weights of IGBv1 within bounds.

    ``w = K softmax(l / l^b + r tanh u)``, in epochs as the official code. The agent sees losses in
    units of the base losses and acts by the mean of its policy. It is a small one, with a reward
    that outweighs the entropy: that of a step is of the order of the learning rate, and at the
    official temperature of 0.2 the agent would learn to be random and nothing else. At worst it
    changes a weight of :func:`bilb.igb_v1` by the factor ``exp(2 r)``, 1.5 by default.

    On three regressions whose losses are as 1 : 5,600 : 490,000 its test errors are those of IGBv1
    (-0.5 ± 0.7 % in the geometric mean, 32 seeds); with the official settings of state, policy and
    action the same agent ends 22 % above (8 seeds). On QM9 in small, learning rates tuned, Δm is
    -2.1 ± 0.8 % against -1.5 ± 1.1 (10 seeds). It is not shown to be better than IGBv1.

    Args:
        steps_per_epoch: S; the base losses are those of the second epoch, the warm-up lasts five.
        residual: r >= 0; 0 is IGBv1.
        optimizer: of the agent; Adam at 3e-4 if None.
        key: seed or JAX key.

    Returns:
        A loss transformation; see :func:`bilb.igb_v2` for errors and state.

    Example:
        >>> import bilb
        >>> balancer = bilb.presets.igb_v2_near_igb_v1(steps_per_epoch=100)

    References:
        Dai et al., *Improvable Gap Balancing for Multi-Task Learning*, UAI 2023,
        arXiv 2307.15429, of which this is a variant.
    """
    return igb_v2(
        steps_per_epoch,
        steps_per_epoch,
        warmup_steps=5 * steps_per_epoch,
        update_after=3 * steps_per_epoch,
        num_updates=10,
        buffer_size=1000,
        batch_size=64,
        reward_scale=10.0,
        hidden=(64, 64),
        optimizer=optimizer,
        initial_temperature=1e-3,
        units="base",
        residual=residual,
        action="mean",
        key=key,
    )


def marigold_pinn(
    *,
    optimizer: optax.GradientTransformation | None = None,
    max_logit: base.Scalar = 6.0,
    preference: Any = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """MARIGOLD towards the Nash balance of root losses, for losses that can reach zero.

    ``bilb.chain(bilb.power_losses(0.5), bilb.marigold("nash"))``: one forward pass more than a sum
    of losses, nothing random, no task gradients.

    What it does: with ``g_k = ∇√l_k`` and the step's direction ``d = Σ_k λ_k g_k``, the weights
    move until ``λ_k g_kᵀ d`` is the same for all tasks. That d maximises ``Σ_k log g_kᵀ d`` among
    directions of its length, so there is no fixed scalar objective: to first order all losses fall
    together, for as long as a direction exists along which they do. The fixed points are the
    Pareto stationary points of the root losses, which are those of the losses where none is zero.

    Why it does not collapse onto the zero of one task: for ``l = ‖r‖² / N`` the squared length of
    ``∇√l`` is ``rᵀ Θ r / (N ‖r‖²)``, a Rayleigh quotient of the task's tangent kernel Θ. So g_k
    neither vanishes nor explodes with its loss, where ``∇ log l`` is ``2 / √l`` times as long, and
    what λ has learnt stays true for many steps. The balance is free of the losses' scales, and it
    is one of products of gradients: where the residual falls at the cost of the boundary, the
    boundary's ``g_kᵀ d`` is small or negative and its weight grows. A loss of exactly zero has no
    gradient and counts as absent, so that the others move on.

    When it can: where the trivial solution is itself Pareto stationary for the network, λ has
    nothing to learn; where the gradients' lengths differ by more than ``exp(2 max_logit)``, the
    balance is out of reach; where λ is slow against the model, the first steps decide, and they
    are those of a sum of roots, which does collapse. With mini-batches the root is of the batch's
    loss, which is smaller than that of the mean loss.

    The weights sum to 1, so that the direction is short where the gradients conflict: Adam is
    indifferent to that, and the learning rate of SGD is to be tuned. Root losses have gradients
    that do not vanish where a task is solved: let the learning rate decay.

    Other powers are worse: over the equations of ``benchmarks/pinn.py`` the losses, their roots,
    fourth roots and logarithms have 1.5, 0.63, 1.7 and 8.6 times the error of the best constant
    weights. :func:`nash_pinn` with a sketch of the Gram matrix costs as much and has 0.56 times; it
    is also ahead where this one is not, on Helmholtz's equation.

    Args:
        optimizer: of the logits; Adam at 0.025 if None.
        max_logit: bound on the logits.
        preference: of ``bilb.lower_levels.nash``, one number or one per loss; with m pieces of one
            condition 1 / m for each.

    Returns:
        A chain of two loss transformations; ``update(losses, state, *, slopes)``. See
        :func:`bilb.power_losses` and :func:`bilb.marigold` for errors and state.

    Example:
        >>> import jax, jax.numpy as jnp, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum((x - 1) ** 2), 100 * jnp.sum(x[:1] ** 2)])
        >>> value_and_grad = bilb.value_and_grad(task_losses, bilb.presets.marigold_pinn())
        >>> x = jnp.full(2, 2.0)
        >>> losses, grads, state = jax.jit(value_and_grad)(x, value_and_grad.init(x))
        >>> print(state.slopes.shape)
        (2,)

    References:
        *MARIGOLD*, arXiv 2603.07389 (from the abstract); Navon et al., *Multi-task learning as a
        bargaining game*, arXiv 2202.01017; Wang et al., *When and why PINNs fail to train: a neural
        tangent kernel perspective*, arXiv 2007.14527.
    """
    return chain(
        normalize.power_losses(0.5),
        marigold(lower_levels.nash(preference), optimizer=optimizer, max_logit=max_logit),
    )


def nash_pinn(
    decay: base.Scalar = 0.999, *, preference: Any = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Nash-MTL on root losses with a running mean of their Gram matrix, to be sketched.

    ``bilb.chain(bilb.power_losses(0.5), bilb.nash_mtl(decay=0.999))``; with
    ``bilb.value_and_grad(..., gram=bilb.grams.sketch())`` one forward pass more than a sum of
    losses, with the default ``gram=`` K backward passes and no noise.

    It solves at every step what :func:`marigold_pinn` approaches: ``G w = 1 / w`` for the running
    mean G of the products ``∇√l_iᵀ ∇√l_j``. See there for what is minimised and why and when it
    does not collapse. G can be averaged over many steps because gradients of roots keep their size
    while the losses fall; those of logs do not, and their mean is always behind.

    Until a sketch has the rank of G, weights of conflicting tasks are up to 1e3 times too large,
    and a few such steps under Adam's first learning rates can decide the run. Leave it the warm-up
    of :func:`bilb.grams.sketch`: over the equations of ``benchmarks/pinn.py`` it has 0.56 times the
    error of the best constant weights, the exact matrix 0.57 times, and a sketch without warm-up 7
    times, where about half of the runs end far from the solution.

    Every loss has one voice. Where the conditions of an equation are many losses, as the pieces of
    a boundary, the equation itself is outvoted: give each of m pieces the preference 1 / m.

    The direction has ``‖Jᵀ w‖² = K``, or the sum of the preferences, whatever the losses are, so
    with SGD the learning rate is the length of the step over √K, and it must decay for the training
    to settle.

    Args:
        decay: of the running mean, in [0, 1); the sketch's relative noise is about
            ``sqrt((1 - decay) / 2)``.
        preference: of :func:`bilb.nash_mtl`, one number or one per loss.

    Returns:
        A chain of two loss transformations; ``update(losses, state, *, gram)``. See
        :func:`bilb.power_losses` and :func:`bilb.nash_mtl` for errors and state.

    Example:
        >>> import jax, jax.numpy as jnp, bilb
        >>> task_losses = lambda x: jnp.stack([jnp.sum((x - 1) ** 2), 100 * jnp.sum(x[:1] ** 2)])
        >>> value_and_grad = bilb.value_and_grad(
        ...     task_losses, bilb.presets.nash_pinn(), gram=bilb.grams.sketch()
        ... )
        >>> x = jnp.full(2, 2.0)
        >>> losses, grads, state = jax.jit(value_and_grad)(x, value_and_grad.init(x))
        >>> print(grads.shape)
        (2,)

    References:
        Navon et al., *Multi-task learning as a bargaining game*, arXiv 2202.01017.
    """
    return chain(normalize.power_losses(0.5), nash_mtl(preference=preference, decay=decay))
