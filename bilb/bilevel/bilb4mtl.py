"""BiLB4MTL (LDC-MTL), arXiv 2502.08585: loss balancing as a bilevel problem.

With normalised losses v (K,), a router's weights σ(W) (K,), by default sigmoids of its parameters,
and weighted losses u = σ(W) v, elementwise:

* upper level, the loss discrepancy:   ``f(W, x) = Σ_k |u_k - u_{k+1}|``
* lower level, the scalarised loss:    ``g(W, x) = Σ_k u_k``
* ``min_W f(W, x*(W))`` subject to ``x*(W) = argmin_x g(W, x)``

The lower level becomes a penalty, ``f + (g - min_x g) / λ``, whose minimum the single loop drops.
That leaves one joint gradient step on ``Φ(W, x) = g / s + λ f``, with s = 1 or a sum of weights:
the model moves along ∂Φ/∂x, the router along ∂Φ/∂W, both at the same point, with one backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.bilevel import discrepancies, routers


class BiLB4MTLState(NamedTuple):
    """State of :func:`bilb4mtl`."""

    step: jax.Array  # () int32
    router: base.PyTree  # the router's parameters W
    weights: jax.Array  # (K,) the weights σ(W) just used, not divided by s; 1 at first
    opt_state: optax.OptState  # of the router's optimiser


def bilb4mtl(
    penalty: base.Scalar = 0.01,
    router: routers.Router | None = None,
    discrepancy: Callable[..., jax.Array] | None = None,
    *,
    weighted: bool = True,
    divisor: Literal["sum", "stop_gradient_sum"] | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Bilevel loss balancing in a single loop, with one backward pass whatever K is.

    The objective is

    .. math:: \Phi(W, x) = \frac{1}{s} \sum_k u_k + \lambda f(u), \qquad u_k = \sigma_k(W) v_k

    where v are the losses that arrive, usually through a normalisation in front:
    ``bilb.chain(bilb.log_scale_by_initial_loss(every=steps_per_epoch), bilb.bilb4mtl())``.
    and s = 1 unless ``divisor`` is given. Task k's entry of the balanced losses is
    ``u_k (1 / s + λ ∂f/∂u_k)`` with the derivative held constant (``u_k / s + λ v_k ∂f/∂v_k``
    without ``weighted``), plus a constant without gradient that makes the sum Φ. The settings of
    the paper's four experiments are in ``bilb.presets``.

    Any finite loss will do, a negative one too (logarithms are); a Φ beyond the dtype's largest
    number counts as that number. A loss that is not finite spoils its own entry, those that it is
    compared with, and their router parameters for good: wrap in :func:`bilb.skip_nonfinite`.

    Args:
        penalty: λ >= 0, weight of the discrepancy, the reciprocal of the paper's λ; a number, a
            traced scalar or a schedule of the state's ``step``. The discrepancy is a sum over K - 1
            gaps, so values above about 0.1 can overwhelm the losses; with its mean
            (``functools.partial(bilb.discrepancies.adjacent, mean=True)``) the penalty λ (K - 1)
            gives the same objective. 0 is the ablation without an upper level.
        router: the weights σ(W); ``bilb.routers.sigmoid()`` if None. Routers that read
            ``features`` need them in ``update(..., features=...)``, from
            ``bilb.value_and_grad(..., features=)`` for one; Φ's gradient flows into them too.
        discrepancy: ``u (K,) -> scalar``, one of ``bilb.discrepancies`` or your own; it needs a
            ``where`` keyword only if masks are used. ``bilb.discrepancies.adjacent`` if None,
            which depends on the order of the tasks.
        weighted: whether f compares the weighted losses u (default) or the losses v (then W does
            not enter f, as in the official Cityscapes code).
        divisor: s = 1 (None), the sum of the weights ("sum"), or that sum held constant
            ("stop_gradient_sum", the official CelebA and QM9 code).
        optimizer: Optax optimiser of the router; Adam at 1e-3 if None.

    Returns:
        A loss transformation whose state has the fields ``step``, ``router``, ``weights`` and
        ``opt_state``. With ``optax.inject_hyperparams`` the callable ``discrepancy`` is static:
        ``optax.inject_hyperparams(bilb.bilb4mtl, static_args=("discrepancy",))(penalty=0.05)``.

    Raises:
        ValueError: for a negative concrete penalty or one that is not a scalar, an unknown divisor,
            a router that does not return K weights, or a discrepancy that is not a scalar.
        TypeError: for a router that is not a ``bilb.Router``, and for a mask when ``discrepancy``
            takes no ``where``.
        MissingArgument: for a router that reads features and gets none.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bilb
        >>> balancer = bilb.chain(bilb.log_losses(), bilb.bilb4mtl(penalty=0.05))
        >>> losses = jnp.array([0.2, 3.0, 40.0])
        >>> state = balancer.init(losses)
        >>> balanced, state = balancer.update(losses, state)
        >>> print(balanced.shape, optax.tree.get(state, "weights"))
        (3,) [0.7310586 0.7310586 0.7310586]

    References:
        Xiao et al., *Scalable Bilevel Loss Balancing for Multi-Task Learning* (BiLB4MTL), later
        *LDC-MTL*, arXiv 2502.08585, Algorithm 2.
    """
    optimizer = checks.optimizer("optimizer", optimizer, optax.adam(1e-3))
    checks.number("penalty", penalty, minimum=0, schedule=True)
    router = routers.sigmoid() if router is None else router
    discrepancy = discrepancies.adjacent if discrepancy is None else discrepancy
    balance = balanced_losses(router, discrepancy, weighted=weighted, divisor=divisor)
    # The same with the weights themselves as parameters, for ∂Φ/∂weights.
    as_given = routers.Router(router.init, apply=lambda weights, _: weights)
    balance_with = balanced_losses(as_given, discrepancy, weighted=weighted, divisor=divisor)

    def init(num_tasks, dtype):
        parameters = router.init(num_tasks, dtype)
        return BiLB4MTLState(
            step=base.new_step(),
            router=parameters,
            weights=jnp.ones(num_tasks, dtype),
            opt_state=optimizer.init(parameters),
        )

    def update(losses, state, *, mask, features=None, **_):
        current = base.at_step(penalty, state.step)
        balanced, weights = balance(state.router, losses, features, mask, current)

        constants = jax.lax.stop_gradient((losses, features))

        def objective(weights):
            return balance_with(weights, *constants, mask, current)[0].sum()

        router_weights, pullback = jax.vjp(
            lambda parameters: router.apply(parameters, constants[1]), state.router
        )
        # Bounded before the router adds them up, where inf - inf would be NaN for ever.
        by_weights = base.bounded_gradient(jax.grad(objective)(router_weights))
        gradient = base.bounded_gradient(pullback(by_weights)[0])
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.router)
        return balanced, BiLB4MTLState(
            step=optax.safe_increment(state.step),
            router=optax.apply_updates(state.router, updates),
            weights=jax.lax.stop_gradient(weights),
            opt_state=opt_state,
        )

    return base.loss_transformation(init, update)


def balanced_losses(
    router: routers.Router,
    discrepancy: Callable[..., jax.Array],
    *,
    weighted: bool,
    divisor: Literal["sum", "stop_gradient_sum"] | None,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns ``(W, losses, features, mask, penalty) -> (balanced (K,), weights (K,))``.

    The balanced losses sum to Φ, and the derivative of that sum with respect to W, losses and
    features is Φ's.
    """
    if isinstance(router, nn.Module):
        raise TypeError(
            "router is a flax module; wrap it: bilb.routers.from_module(module, example_features)."
        )
    if not (hasattr(router, "init") and hasattr(router, "apply")):
        raise TypeError(f"router must be a bilb.Router; got {router!r}.{checks.uncalled(router)}")
    if divisor not in (None, "sum", "stop_gradient_sum"):
        raise ValueError(f'divisor must be None, "sum" or "stop_gradient_sum"; got {divisor!r}.')
    checks.function("discrepancy", discrepancy)
    checks.flag("weighted", weighted)
    takes_where = "where" in inspect.signature(discrepancy).parameters

    def distance(u, **options):
        f = discrepancy(u, **options)
        checks.shape(f, (), "the discrepancy must return one number.")
        return f

    def balance(parameters, losses, features, mask, penalty):
        weights = router.apply(parameters, features)
        checks.shape(weights, losses.shape, "the router must return a weight per task.")
        if mask is not None and not takes_where:
            raise TypeError(
                "a mask needs a discrepancy with a `where` keyword, the (K,) bool of the tasks "
                f"that count; {discrepancy!r} has none."
            )
        options = {} if mask is None else {"where": mask}
        u = weights * losses
        compared = u if weighted else losses
        f, df = jax.value_and_grad(distance)(jax.lax.stop_gradient(compared), **options)
        if divisor is None:
            s = 1.0
        else:
            s = jnp.sum(weights, where=mask)
            s = jax.lax.stop_gradient(s) if divisor == "stop_gradient_sum" else s
            s = s if mask is None else jnp.where(mask.any(), s, 1.0)
        balanced = u / s + penalty * base.split_over_tasks(f, df, compared, mask)[0]
        return balanced if mask is None else jnp.where(mask, balanced, 0.0), weights

    return balance
