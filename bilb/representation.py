"""The driver of a model whose tasks meet in a representation, at which derivatives are taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from bilb import base, training


def representation_value_and_grad(
    trunk: Callable[..., Any],
    heads_losses: Callable[..., Any],
    balancer: optax.GradientTransformation,
    **options: Any,
) -> RepresentationValueAndGrad:
    """As :func:`value_and_grad`, with the task gradients taken at a shared representation.

    For a model whose tasks meet in a representation ``z = trunk(params, batch)``, the gradients
    ``∂l_k/∂z`` bound those by the parameters (Sener and Koltun's upper bound, MGDA-UB): Gram
    matrices, norms and slopes are taken over z, with K backward passes through the heads alone.
    One weighted backward pass through heads and trunk follows.

    Args:
        trunk: ``trunk(params, *args) -> z``, any pytree of floating point arrays.
        heads_losses: ``heads_losses(params, z, *args) -> losses``, as :func:`value_and_grad` takes
            them, or ``(losses, aux)``.
        balancer: a loss transformation or a chain of them.
        **options: ``has_aux``, ``features``, ``slopes``, ``gram``, ``axis_name`` and ``heads`` of
            :func:`value_and_grad`. With ``heads="sum"`` the parameters that ``heads_losses`` reads
            follow the plain sum of the losses.

    Returns:
        A callable like that of :func:`value_and_grad`, with ``init`` and ``after``.

    Example:
        >>> import jax, jax.numpy as jnp, bilb
        >>> trunk = lambda params, x: jnp.tanh(x @ params["trunk"])
        >>> def heads_losses(params, z, x):
        ...     return jnp.mean((z @ params["heads"] - jnp.sin(x[:, :2])) ** 2, axis=0)
        >>> balancer = bilb.chain(bilb.log_losses(), bilb.marigold())
        >>> value_and_grad = bilb.representation_value_and_grad(trunk, heads_losses, balancer)
        >>> params = {"trunk": jnp.ones((3, 4)) / 3, "heads": jnp.ones((4, 2)) / 4}
        >>> x = jnp.arange(15.0).reshape(5, 3) / 10
        >>> state = value_and_grad.init(params, x)
        >>> losses, grads, state = jax.jit(value_and_grad)(params, state, x)
        >>> print(losses.shape, grads["trunk"].shape, state.slopes.shape)
        (2,) (3, 4) (2,)

    References:
        Sener and Koltun, *Multi-task learning as multi-objective optimization*, arXiv 1810.04650,
        section 3.3.
    """
    losses_of = lambda split, *args: heads_losses(split[1], split[0], *args)
    driver = training.value_and_grad(losses_of, balancer, shared=(True, False), **options)
    return RepresentationValueAndGrad(trunk, driver)


@dataclasses.dataclass(frozen=True, eq=False)
class RepresentationValueAndGrad:
    """What :func:`representation_value_and_grad` returns."""

    trunk: Callable[..., Any]
    driver: training.ValueAndGrad  # of the losses by (representation, parameters)

    def init(self, params: base.PyTree, *args: Any, **extra: Any) -> training.ValueAndGradState:
        """Returns the first state."""
        representation = jax.eval_shape(self.trunk, params, *args)
        return self.driver.init((representation, params), *args, **extra)

    def __call__(
        self, params: base.PyTree, state: training.ValueAndGradState, *args: Any, **extra: Any
    ) -> tuple[Any, base.PyTree, training.ValueAndGradState]:
        """Returns losses (and aux), the gradient by all parameters, and the next state."""
        training.check_state(params, state)
        for name in ("slope_args", "gram_args"):
            if name in extra:
                raise TypeError(
                    f"{name}= takes derivatives on another batch, whose representation is another: "
                    "use bilb.value_and_grad for that."
                )
        representation, pullback = jax.vjp(lambda p: self.trunk(p, *args), params)
        losses, (along, of_heads), state = self.driver(
            (representation, params), state, *args, **extra
        )
        (of_trunk,) = pullback(along)
        return losses, optax.tree.add(of_trunk, of_heads), state

    def after(
        self, params: base.PyTree, state: training.ValueAndGradState, *args: Any
    ) -> training.ValueAndGradState:
        """Takes the losses of the same batch after the optimiser's step, where they are read."""
        training.check_state(params, state)
        if state.losses_after is None:
            return state
        return self.driver.after((self.trunk(params, *args), params), state, *args)
