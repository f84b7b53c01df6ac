"""Gradient-norm weights with a moving average, for physics-informed networks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from bilb import base
from bilb.gradient_balancing.inverse import inverse_weighting


def lr_annealing(
    momentum: base.Scalar = 0.9,
    every: int = 1000,
    *,
    reference: int | str | None = None,
    decay: base.Scalar = 0.0,
    eps: float | jax.Array = 1e-5,
) -> optax.GradientTransformationExtraArgs:
    """Weighs the losses such that their gradients have about the same norm.

    With ``n_k = ‖∇l_k‖``, renewed every so many steps and averaged:

    * mean form, arXiv 2308.08468: ``w_k = n / (n_k + ε n)``, n the mean of all n_k
    * with a reference task, after arXiv 2001.04536: ``w_k = n_r / (n_k + ε n_r)``, and ``w_r = 1``

    ``update`` needs the extra argument ``gradient_norms`` (K,) with ``every=1``, and ``gram_fn``
    with more, so that nothing is paid for at the other steps. :func:`bilb.value_and_grad` and
    :func:`bilb.aggregate_by` supply both, of the losses themselves, on the shared parameters.

    "Learning rate annealing" is the name of arXiv 2001.04536, whose Algorithm 1 compares the
    largest entry of the residual's gradient with the mean magnitude of the entries of another's.
    Those need every coordinate; the form here, ``reference=`` the residual's index, compares norms
    instead: the same but for the ratio of the largest entry to the root mean square, and of that to
    the mean, so its weights are smaller. Without ``reference`` it is the norm weighting of
    arXiv 2308.08468 and JAX-PI (``grad_norm``), in which the residual is weighed like the others.

    Both papers average the weights (``momentum``). An average of the squared norms (``decay``) does
    better with the noisy estimates of :func:`bilb.grams.sketch`, whose inverses have no mean:
    ``bilb.lr_annealing(0.0, 1, decay=0.99)``.

    The weights are positive, at most 1 / ``eps``, and of no fixed sum. A task whose norm is not
    finite is absent with ``every=1``, and with more it keeps its weight; norms beyond 2e16
    (float32) count as that. Where all norms are zero, or the reference is absent or has norm zero,
    the weights stay as they were.

    Args:
        momentum: the share of the old weights in the new ones, in [0, 1]; a number, a traced scalar
            or a schedule of the state's ``step``. Default 0.9, as in JAX-PI; arXiv 2001.04536 and
            the codes after it (jinns) put either 0.1 or 0.9 on the new ones.
        every: number of steps that the weights stay the same, from the first update on, whose
            norms already count. Default 1000, as in JAX-PI. Static.
        reference: index or name of the task whose weight is 1, usually the residual; static.
        decay: of a running mean of the squared norms, in [0, 1), taken at the steps of renewal.
        eps: ε > 0; 1e-5 in JAX-PI.

    Returns:
        A loss transformation; ``update(losses, state, *, gradient_norms)``, or ``gram_fn`` with
        ``every > 1``. Its state is a :class:`bilb.InverseWeightsState`. ``every`` and ``reference``
        are static in ``optax.inject_hyperparams``.

    Raises:
        ValueError: for a concrete hyperparameter outside its range, a ``reference`` that is no
            task, or norms that are not (K,).
        MissingArgument: for a call without ``gradient_norms``, or ``gram_fn``.

    Example:
        >>> import jax.numpy as jnp, numpy as np, bilb
        >>> losses = jnp.array([1.0, 1.0])
        >>> norms = jnp.array([9.0, 1.0])
        >>> for balancer in bilb.lr_annealing(0.0, 1), bilb.lr_annealing(0.0, 1, reference=0):
        ...     _, state = balancer.update(losses, balancer.init(losses), gradient_norms=norms)
        ...     print(np.asarray(state.weights).round(3))
        [0.556 5.   ]
        [1.    8.999]

    References:
        Wang et al., *Understanding and mitigating gradient pathologies in physics-informed neural
        networks*, arXiv 2001.04536; Wang et al., *An expert's guide to training physics-informed
        neural networks*, arXiv 2308.08468, section on loss balancing.
    """

    def squares(norms):
        return base.bounded_gradient(norms) ** 2

    def squares_of_gram(gram):
        return squares(jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0.0)))

    return inverse_weighting(
        "lr_annealing",
        each=("gradient_norms", squares),
        at_times=("gram_fn", squares_of_gram),
        size=jnp.sqrt,
        momentum=momentum,
        every=every,
        decay=decay,
        eps=eps,
        reference=reference,
    )
