"""Uncertainty weighting (UW), arXiv 1705.07115: learnt homoscedastic uncertainty of every task."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb.loss_balancing import joint


class UncertaintyWeightingState(NamedTuple):
    """State of :func:`uncertainty_weighting`."""

    log_variances: jax.Array  # (K,) s
    weights: jax.Array  # (K,) the weights ½ exp(-s) just used
    opt_state: optax.OptState  # of the log variances


def uncertainty_weighting(
    initial: float | jax.Array = 0.0,
    *,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Divides each loss by a learnt variance, and charges for the logarithm of that variance.

    ``objective = Σ_k ½ (exp(-s_k) l_k + s_k)``, minimised over the log variances s as well

    At the optimum in s the variance equals the loss, so the method follows the logarithms of the
    losses with the delay of ``optimizer``. ``bilb.chain(bilb.log_losses(),
    bilb.uncertainty_weighting())`` is its log form.

    The weights are positive, of no fixed sum. A loss that stays at zero or below (a logarithm,
    say) has no minimiser s: its weight grows with every update until ``|s|`` reaches half the
    logarithm of the dtype's largest number (44 in float32), where it stays. A non-finite loss makes
    its own entry and its own s non-finite: wrap in :func:`bilb.skip_nonfinite`.

    Args:
        initial: initial s, one number or (K,). Default 0, as in Nash-MTL, FAMO and TorchJD; LibMTL
            uses -0.5.
        optimizer: Optax optimiser of s; Adam at 0.025 if None, as in the Nash-MTL family; LibMTL
            trains s with the model's optimiser and learning rate.

    Returns:
        A loss transformation whose state has the fields ``log_variances`` (K,), ``weights`` (K,)
        (the derivative ½ exp(-s), where some official code logs exp(-s)) and ``opt_state``.

    Raises:
        ValueError: for an ``initial`` that is neither a number nor (K,).

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.uncertainty_weighting()
        >>> losses = jnp.array([4.0, 0.5])
        >>> balanced, state = balancer.update(losses, balancer.init(losses))
        >>> print(balanced, state.weights, np.asarray(state.log_variances).round(3))
        [2.   0.25] [0.5 0.5] [ 0.025 -0.025]

    References:
        Kendall et al., *Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
        and Semantics*, arXiv 1705.07115, in terms of s = log σ² and with ½ on both terms.
    """
    return joint.learnt_exponents(
        "uncertainty_weighting",
        UncertaintyWeightingState,
        lambda s: 0.5 * jnp.exp(-s),
        lambda s: 0.5 * s,
        initial=initial,
        optimizer=optimizer,
    )
