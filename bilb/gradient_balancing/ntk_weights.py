"""Weights by the neural tangent kernel, arXiv 2007.14527: slowly learnt losses weigh more."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from bilb import base
from bilb.gradient_balancing.inverse import inverse_weighting


def ntk_weights(
    momentum: base.Scalar = 0.9,
    every: int = 1000,
    *,
    decay: base.Scalar = 0.0,
    eps: float | jax.Array = 1e-5,
) -> optax.GradientTransformationExtraArgs:
    """Weighs the losses such that all are learnt at about the same speed, by their tangent kernels.

    ``w_k = t / (t_k + ε t)``, where ``t_k = tr(J_k J_kᵀ) / N_k`` is the mean diagonal of the
    tangent kernel of task k's N_k residuals, J_k their Jacobian, and t the mean of all t_k

    For a mean of squared residuals under gradient flow, the residuals decay at the rates of the
    tangent kernel's eigenvalues, whose mean is ``t_k``. ``update`` needs the extra argument
    ``curvatures`` (K,) with ``every=1``, and ``curvature_fn`` with more, so that nothing is paid
    for at the other steps. :func:`bilb.value_and_grad` supplies both, ``curvatures=`` saying how:
    :func:`bilb.curvatures.tangent_kernel` takes t_k from the residual vectors, exactly or along
    random directions, and :func:`bilb.curvatures.probe`, the default there, takes ``|vᵀ ∇²l_k v|``,
    which is 2 t_k in the mean but for the curvature of the residuals themselves, and needs the
    losses alone.

    Estimates along random directions are noisy, and their inverses have no mean: average them
    before, not after, with ``bilb.ntk_weights(0.0, 1, decay=0.99)``.

    As published, weights are ``Σ_j tr_j / tr_k`` with traces in place of mean diagonals; the form
    here is JAX-PI's, which does not depend on the numbers of points and K. Curvatures are those of
    the losses as the model returns them: behind links of :func:`bilb.chain` that change the losses
    this method is an error.

    The weights are positive, at most 1 / ``eps``, and of no fixed sum. The magnitude of a curvature
    counts. A task whose curvature is not finite is absent with ``every=1``, and with more it keeps
    its weight; those beyond 2e16 (float32) count as that. Where all are zero, the weights stay as
    they were.

    Args:
        momentum: the share of the old weights in the new ones, in [0, 1]; a number, a traced scalar
            or a schedule of the state's ``step``. Default 0.9, as in JAX-PI.
        every: number of steps that the weights stay the same, from the first update on, whose
            curvatures already count. Default 1000, as in JAX-PI. Static.
        decay: of a running mean of the curvatures, in [0, 1), taken at the steps of renewal.
        eps: ε > 0; 1e-5 in JAX-PI.

    Returns:
        A loss transformation; ``update(losses, state, *, curvatures)``, or ``curvature_fn`` with
        ``every > 1``. Its state is a :class:`bilb.InverseWeightsState`. ``every`` is static in
        ``optax.inject_hyperparams``.

    Raises:
        ValueError: for a concrete hyperparameter outside its range, or curvatures that are not
            (K,).
        MissingArgument: for a call without ``curvatures``, or ``curvature_fn``.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, optax, bilb
        >>> residuals = lambda x: [jnp.sin(3 * x), x[:1] - 1]
        >>> task_losses = lambda x: jnp.stack([jnp.mean(r**2) for r in residuals(x)])
        >>> value_and_grad = bilb.value_and_grad(
        ...     task_losses,
        ...     bilb.ntk_weights(momentum=0.0),
        ...     curvatures=bilb.curvatures.tangent_kernel(residuals),
        ... )
        >>> x = jnp.zeros(4)
        >>> losses, grads, state = jax.jit(value_and_grad)(x, value_and_grad.init(x))
        >>> print(np.asarray(optax.tree.get(state, "weights")).round(3))
        [0.556 5.   ]

    References:
        Wang et al., *When and why PINNs fail to train: A neural tangent kernel perspective*,
        arXiv 2007.14527; Wang et al., *An expert's guide to training physics-informed neural
        networks*, arXiv 2308.08468, section on loss balancing.
    """

    def magnitudes(curvatures):
        return jnp.abs(base.bounded_gradient(curvatures))

    return inverse_weighting(
        "ntk_weights",
        each=("curvatures", magnitudes),
        at_times=("curvature_fn", magnitudes),
        momentum=momentum,
        every=every,
        decay=decay,
        eps=eps,
    )
