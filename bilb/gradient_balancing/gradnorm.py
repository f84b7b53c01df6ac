"""GradNorm, arXiv 1711.02257: learns weights such that all tasks train at similar rates."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.gradient_balancing import running_mean

_SMALLEST_SCALE = 1e-6


class GradNormState(NamedTuple):
    """State of :func:`gradnorm`."""

    step: jax.Array  # () int32
    weights: jax.Array  # (K,) the weights just used; 1 at first
    scales: jax.Array  # (K,) what is learnt: logits, or the weights themselves; 1 at first
    initial_losses: jax.Array  # (K,) mean of the first losses, 0 if none yet
    count: jax.Array  # (K,) int32, losses in that mean
    opt_state: optax.OptState  # of the scales
    mean: running_mean.RunningMean | None  # (K,) of the squared norms, of `decay`; None without


def gradnorm(
    alpha: base.Scalar = 1.5,
    *,
    warmup_steps: int | jax.Array = 1,
    scheme: Literal["softmax", "sum"] = "softmax",
    decay: base.Scalar = 0.0,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Learns weights that pull the tasks' gradient norms to a common size and training rate.

    With the gradient norms ``n_k = w_k ‖∇l_k‖`` of the weighted losses on the shared layer and the
    relative training rates ``r_k = (l_k / L_k) / mean_j (l_j / L_j)``, L the initial losses:

    * the model minimises ``Σ_k w_k l_k``
    * the weights minimise ``Σ_k |n_k - sg(mean_j n_j · r_k^α)|``

    ``update`` needs the extra argument ``gradient_norms`` (K,): the norms ‖∇l_k‖ of the losses as
    the model returns them, not yet weighted, with respect to the parameters that the tasks share
    (the paper: the last shared layer); :func:`bilb.value_and_grad` supplies them, its ``shared=``
    choosing the parameters. They are the square roots of the Gram matrix's diagonal and cost
    K backward passes, over that layer alone if only its gradients are asked for.

    During the first ``warmup_steps`` updates the weights are 1 and nothing is learnt; the initial
    losses L are the mean over them. Every parameter of the model then sees the weighted sum of the
    losses. LibMTL gives heads the gradients of the unweighted losses instead: to do the same, scale
    the gradient of task k's head by ``1 / state.weights[k]``.

    The weights are not negative and sum to K, with a mask to the number of present tasks. A
    relative loss ``l_k / L_k`` below zero counts as 0, and as 1 where L is zero. A task that comes
    late takes L from its own first losses. A task whose norm is not finite is absent; a non-finite
    loss makes weights non-finite: wrap in :func:`bilb.skip_nonfinite`. Gradients of the scales
    beyond 2e16 (float32) count as that.

    Args:
        alpha: α >= 0, how strongly slow tasks are favoured; a number, a traced scalar or a schedule
            of the state's ``step``. Default 1.5, as in LibMTL.
        warmup_steps: updates over which the initial losses are taken, at least 1. Default 1, the
            paper's first loss; LibMTL: the updates of one epoch.
        scheme: "softmax", ``w = K softmax(s)`` as in LibMTL, or "sum", the paper's weights that are
            learnt themselves and divided by their mean after each update (kept above 1e-6 before).
        decay: of a running mean of the squared norms in place of each step's own, in [0, 1), for
            the noisy estimates of :func:`bilb.grams.sketch`: with one probe and eleven losses of
            molecules 0.9 brought the weights from 0.24 to 0.05 (total variation) of the exact ones.
        optimizer: Optax optimiser of the scales; Adam at 0.025 if None.

    Returns:
        A loss transformation whose state has the fields ``step``, ``weights`` (K,), ``scales``
        (K,), ``initial_losses`` (K,), ``count`` (K,), ``opt_state`` and ``mean``. ``scheme`` is
        static in ``optax.inject_hyperparams``.

    Raises:
        ValueError: for a concrete ``alpha`` < 0, ``warmup_steps`` < 1 or ``decay`` outside [0, 1),
            an unknown scheme, or norms that are not (K,).
        MissingArgument: if ``gradient_norms`` is missing.

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.gradnorm()
        >>> losses = jnp.array([1.0, 1.0])
        >>> state = balancer.init(losses)
        >>> for _ in range(3):
        ...     _, state = balancer.update(losses, state, gradient_norms=jnp.array([1.0, 9.0]))
        ...     print(np.asarray(state.weights).round(3))
        [1. 1.]
        [1. 1.]
        [1.025 0.975]

    References:
        Chen et al., *GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
        Networks*, arXiv 1711.02257, Algorithm 1.
    """
    optimizer = checks.optimizer("optimizer", optimizer, optax.adam(0.025))
    checks.number("alpha", alpha, minimum=0, schedule=True)
    checks.number("warmup_steps", warmup_steps, minimum=1, whole=True)
    averages = running_mean.averages(decay)
    if scheme not in ("softmax", "sum"):
        raise ValueError(f'scheme must be "softmax" or "sum"; got {scheme!r}.')

    def weigh(scales, num_tasks, mask):
        if scheme == "softmax":
            return num_tasks * jax.nn.softmax(scales, where=mask)
        # The paper does not differentiate through the division.
        return scales * jax.lax.stop_gradient(num_tasks / jnp.sum(scales, where=mask))

    def init(num_tasks, dtype):
        scales = jnp.ones(num_tasks, dtype)
        return GradNormState(
            step=base.new_step(),
            weights=jnp.ones(num_tasks, dtype),
            scales=scales,
            initial_losses=jnp.zeros(num_tasks, dtype),
            count=jnp.zeros(num_tasks, jnp.int32),
            opt_state=optimizer.init(scales),
            mean=running_mean.start((num_tasks,), dtype) if averages else None,
        )

    def update(losses, state, *, mask, gradient_norms, **_):
        num_tasks = base.num_present(losses, mask)
        norms = base.bounded_gradient(gradient_norms)
        values = jax.lax.stop_gradient(losses)
        mean_square = state.mean
        if averages:
            rate = base.at_step(decay, state.step)
            mean_square = running_mean.move(mean_square, norms**2, rate)
            norms = jnp.sqrt(running_mean.value(mean_square))

        take = base.usable(losses, mask) & (state.count < warmup_steps)
        count = state.count + take
        change = jnp.where(take, (values - state.initial_losses) / jnp.maximum(count, 1), 0)
        initial = state.initial_losses + change
        rates = _training_rates(values, initial, base.present(losses, mask), num_tasks)
        exponent = base.at_step(alpha, state.step)

        def objective(scales):
            n = weigh(scales, num_tasks, mask) * norms
            target = jax.lax.stop_gradient(jnp.sum(n) / num_tasks * rates**exponent)
            distances = n - target
            # The absolute value, with derivative 0 at 0.
            return jnp.sum(jax.lax.stop_gradient(jnp.sign(distances)) * distances)

        gradient = base.bounded_gradient(jax.grad(objective)(state.scales))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.scales)
        scales = optax.apply_updates(state.scales, updates)
        if scheme == "sum":
            scales = jnp.maximum(scales, _SMALLEST_SCALE)
            total = jnp.sum(state.scales, where=mask)
            scales = scales * (total / jnp.sum(scales, where=mask))

        learns = state.step >= warmup_steps
        keep = lambda new, old: jnp.where(learns, new, old)
        weights = keep(weigh(state.scales, num_tasks, mask), jnp.ones_like(losses))
        return weights * losses, GradNormState(
            step=optax.safe_increment(state.step),
            weights=weights,
            scales=keep(scales, state.scales),
            initial_losses=initial,
            count=count,
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            mean=mean_square,
        )

    return base.loss_transformation(init, update)


def _training_rates(losses, initial_losses, present, num_tasks):
    """Returns ``r_k = (l_k / L_k) / mean_j (l_j / L_j)``, 0 for absent tasks."""
    safe = jnp.where(initial_losses == 0, 1.0, initial_losses)
    relative = jnp.where(initial_losses == 0, 1.0, losses / safe)
    relative = jnp.where(present, jnp.maximum(relative, 0.0), 0.0)
    mean = jnp.sum(relative) / num_tasks
    return jnp.where(mean == 0, 1.0, relative / jnp.where(mean == 0, 1.0, mean))
