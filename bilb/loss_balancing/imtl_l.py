"""IMTL-L, the loss balance of impartial multi-task learning, ICLR 2021."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb.loss_balancing import joint


class IMTLLState(NamedTuple):
    """State of :func:`imtl_l`."""

    log_scales: jax.Array  # (K,) s
    weights: jax.Array  # (K,) the weights exp(s) just used
    opt_state: optax.OptState  # of the scales


def imtl_l(
    initial: float | jax.Array = 0.0,
    *,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Learns a scale for each loss such that all scaled losses approach 1.

    ``objective = Σ_k exp(s_k) l_k - s_k``, minimised over the scales s as well

    Twice :func:`bilb.uncertainty_weighting` with s of the opposite sign. An aggregator after it,
    IMTL-G in the paper, sees the gradients of the scaled losses.

    The weights are positive, of no fixed sum. A loss that stays at zero or below has no minimiser
    s: its weight grows with every update until ``|s|`` reaches half the logarithm of the dtype's
    largest number (44 in float32), where it stays. A non-finite loss makes its own entry and its
    own s non-finite: wrap in :func:`bilb.skip_nonfinite`.

    Args:
        initial: initial s, one number or (K,); default 0, as in LibMTL and TorchJD.
        optimizer: Optax optimiser of s; Adam at 0.025 if None, the rate that the Nash-MTL family
            gives to learnt weights; LibMTL trains s with the model's optimiser.

    Returns:
        A loss transformation whose state has the fields ``log_scales`` (K,), ``weights`` (K,) and
        ``opt_state``.

    Raises:
        ValueError: for an ``initial`` that is neither a number nor (K,).

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> balancer = bilb.imtl_l()
        >>> losses = jnp.array([4.0, 0.5])
        >>> balanced, state = balancer.update(losses, balancer.init(losses))
        >>> print(balanced, state.weights, np.asarray(state.log_scales).round(3))
        [4.  0.5] [1. 1.] [-0.025  0.025]

    References:
        Liu et al., *Towards Impartial Multi-task Learning*, ICLR 2021.
    """
    return joint.learnt_exponents(
        "imtl_l", IMTLLState, jnp.exp, lambda s: -s, initial=initial, optimizer=optimizer
    )
