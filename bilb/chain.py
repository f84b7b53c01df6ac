"""Chains of loss transformations that carry what is known about the losses from link to link.

A link maps losses l to balanced losses b(l), and by the contract the Jacobian of that map is
diagonal: ``d = ∂ Σ_k b_k / ∂l``, all else held constant. For the task gradients behind it, rows
``d_k ∇l_k``, this means

* ``gram``: ``d_i G_ij d_j``, and likewise what ``gram_fn`` returns
* ``gradient_norms``: ``|d| n``
* ``slope_fn``: ``w -> d · slope_fn(d · w)``
* ``slopes``: ``d · s``, with the d of the step that the slopes tell of
* ``losses_after``: the link's own values there, in the state that it then had
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import arguments, asking, base, checks


class ChainState(NamedTuple):
    """State of :func:`chain`."""

    links: tuple[optax.OptState, ...]
    kept: tuple[Kept | None, ...]  # one entry per link, None where a link needs nothing kept


class Kept(NamedTuple):
    """What a link that learns from the step just taken needs to know of the previous call."""

    derivative: jax.Array | None  # (K,) of what the link saw by the losses; of `slopes`
    links: tuple[optax.OptState, ...] | None  # the states of the links in front; of `losses_after`
    losses: jax.Array | None  # (K,), of `losses_after`
    present: jax.Array | None  # (K,) bool, of `losses_after`


class Chain(optax.GradientTransformationExtraArgs):
    """What :func:`chain` returns; ``links`` are the transformations that it joins."""

    links: tuple[optax.GradientTransformationExtraArgs, ...]


def chain(*links: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Joins loss transformations: the second balances what the first returns, and so on.

    As ``optax.chain``, and it also carries what is known about the losses, as they come in, through
    the links in front of a method that reads it: ``slopes``, ``losses_after``, ``slope_fn``,
    ``gradient_norms``, ``gram`` and ``gram_fn``. So any method can follow any normalisation or any
    other method. Half precision is rounded once, at the end.

    For a link that reads such an argument, a task whose loss has derivative 0 behind the links in
    front (it lies below a floor, or its weight is 0) counts as absent. What a link learnt from is
    not carried through: ``losses_after`` behind a link that itself reads one of these arguments, or
    features, is an error, and so is any of them behind :func:`bilb.pmean_losses`, which is not
    diagonal over the devices (take the mean inside ``task_losses`` there).

    Args:
        *links: loss transformations, at least one; other elementwise Optax transformations work,
            too. A chain among them counts as its links.

    Returns:
        A loss transformation whose state has the fields ``links``, the states of the links, and
        ``kept``, what links that learn from the step just taken need of the previous call.

    Raises:
        ValueError: for no links at all.
        TypeError: for something that is not a gradient transformation, and when an argument cannot
            be carried.

    Example:
        MARIGOLD on the logarithms of the losses:

        >>> import jax.numpy as jnp, bilb
        >>> balancer = bilb.chain(bilb.log_losses(), bilb.marigold())
        >>> losses = jnp.array([1.0, 4.0])
        >>> state = balancer.init(losses)
        >>> balanced, state = balancer.update(losses, state, slopes=jnp.zeros(2))
        >>> print(balanced)
        [0.        0.6931472]
    """
    if not links:
        raise ValueError("bilb.chain joins at least one link; got none.")
    links = tuple(
        asking.as_link(inner) for link in links for inner in getattr(link, "links", (link,))
    )

    def init_fn(losses):
        num_tasks, dtype = checks.losses(losses)
        zeros = jnp.zeros(num_tasks, base.at_least_float32(dtype))
        states = tuple(link.init(zeros) for link in links)
        asking.refuse_optimizer(states)
        asked = [asking.asked(link, state, zeros) for link, state in zip(links, states)]
        kept = tuple(_first_kept(asked[i], states[:i], zeros) for i in range(len(links)))
        return ChainState(states, kept)

    def update_fn(losses, /, state, params=None, *, mask=None, **extra):
        num_tasks, dtype = checks.losses(losses)
        arguments.note(("mask",))
        if not isinstance(state, ChainState) or len(state.links) != len(links):
            raise ValueError(
                f"the state does not belong to this chain of {len(links)} links: got a "
                f"{type(state).__name__}. Call init of the chain itself."
            )
        if mask is not None:
            mask = checks.mask(mask, num_tasks)
        about = {name: extra.pop(name) for name in [*extra] if name in arguments.ABOUT_LOSSES}
        run = _Run(links, state, params, jnp.asarray(losses, base.at_least_float32(dtype)), about)
        values, states, kept = run.values, [], []
        for i in range(len(links)):
            values, new = run.call(i, values, {**extra, "mask": mask})
            states.append(new)
            kept.append(jax.tree.map(base.like, run.keep(i, mask), state.kept[i]))
            if isinstance(links[i], Collective) and mask is not None:
                mask = links[i].anywhere(mask)
        if mask is not None:
            values = jnp.where(mask, values, 0.0)
        return values.astype(dtype), ChainState(tuple(states), tuple(kept))

    joined = Chain(init_fn, update_fn)
    joined.links = links
    return joined


class Collective(optax.GradientTransformationExtraArgs):
    """A link that joins the losses of several devices, so that nothing is carried through it.

    Attributes:
        axis_name: of the mapped axis, or a tuple of names.
    """

    axis_name: Any

    def anywhere(self, mask: jax.Array) -> jax.Array:
        """Returns (K,) bool: the tasks that are present on any device."""
        return jax.lax.pmax(mask.astype(jnp.int32), self.axis_name) > 0


class _Run:
    """One update of a chain: what the links were given so far, and what follows for the next."""

    def __init__(self, links, state, params, values, about):
        self.links, self.state, self.params, self.values = links, state, params, values
        self.about = about
        self.given = []

    def call(self, i, values, given):
        """Calls link i, translating for it what it asks for."""
        mask = given["mask"]

        def update(given):
            return self.links[i].update(values, self.state.links[i], self.params, **given)

        while True:
            try:
                result = update(given)
                break
            except arguments.MissingArgument as missing:
                name = missing.argument
                if name not in self.about or name in given:
                    raise
                given = {**given, name: self.carried(name, i)}
                if i:
                    alive = self.derivative(i) != 0
                    given["mask"] = alive if mask is None else mask & alive
        self.given.append(given)
        return result

    def in_front(self, i, losses):
        """Returns what link i sees of the losses."""
        for link, state, given in zip(self.links[:i], self.state.links, self.given):
            losses, _ = link.update(losses, state, self.params, **given)
        return losses

    def derivative(self, i):
        """Returns (K,): the derivative of what link i sees by the losses."""
        constants = jax.lax.stop_gradient(self.values)
        return jax.grad(lambda losses: self.in_front(i, losses).sum())(constants)

    def carried(self, name, i):
        """Returns an argument about the chain's losses as one about what link i sees."""
        value = self.about[name]
        if i == 0:
            return value
        for link in self.links[:i]:
            if isinstance(link, Collective):
                raise TypeError(
                    f"`{name}` cannot be carried through pmean_losses, which mixes the losses of "
                    "several devices: take the mean inside task_losses instead, so that the "
                    "model's derivatives are averaged as well."
                )
        kept = self.state.kept[i]
        if name == "losses_after":
            return self.after(i, kept, jnp.asarray(value, self.values.dtype))
        if name == "slopes":
            return kept.derivative * jnp.asarray(value, self.values.dtype)
        if name not in _CARRY:
            raise TypeError(
                f"`{name}` speaks of the losses, and bilb.chain does not know how to carry it "
                "through the links in front: put the method that reads it first."
            )
        return _CARRY[name](value, self.derivative(i))

    def after(self, i, kept, losses_after):
        """Returns what link i would have seen of the losses after the step."""
        losses, present = kept.losses, kept.present
        for link, state in zip(self.links[:i], kept.links):
            try:
                # Statistics are those of the losses before the step, as in the call itself.
                after, _ = link.update(
                    losses_after, state, self.params, mask=present, statistics_of=losses
                )
                losses, _ = link.update(losses, state, self.params, mask=present)
            except arguments.MissingArgument as missing:
                raise TypeError(
                    "`losses_after` cannot be carried through a link that reads "
                    f"`{missing.argument}`: put the method that reads `losses_after` in front."
                ) from missing
            losses_after = after
        return losses_after

    def keep(self, i, mask):
        """Returns what link i needs of this call in the next one."""
        kept = self.state.kept[i]
        if kept is None:
            return None
        derivative = None if kept.derivative is None else self.derivative(i)
        if kept.links is None:
            return Kept(derivative, None, None, None)
        present = base.present(self.values, mask)
        losses = jnp.where(present, jax.lax.stop_gradient(self.values), 1.0)
        # Copies, as a link may return parts of its state as they were.
        links = jax.tree.map(jnp.copy, self.state.links[:i])
        return Kept(derivative, links, jnp.copy(losses), jnp.copy(present))


def carry_gram(gram: jax.Array, derivative: jax.Array) -> jax.Array:
    """Returns ``d_i G_ij d_j`` without leaving the dtype's range on the way."""
    size = jnp.abs(derivative)
    small = jnp.minimum(size[:, None], size)
    large = jnp.maximum(size[:, None], size)
    sign = jnp.sign(derivative)
    # The factor that brings the product towards 1 comes first.
    product = jnp.where(jnp.abs(gram) > 1, (gram * small) * large, (gram * large) * small)
    return sign[:, None] * sign * product


_CARRY = {
    "gram": lambda gram, d: carry_gram(jnp.asarray(gram, d.dtype), d),
    "gram_fn": lambda function, d: lambda: carry_gram(jnp.asarray(function(), d.dtype), d),
    "gradient_norms": lambda norms, d: jnp.abs(d) * jnp.asarray(norms, d.dtype),
    "slope_fn": lambda function, d: lambda w: d * jnp.asarray(function(d * w), d.dtype),
}


def _first_kept(asked, links_in_front, losses):
    reads_slopes, reads_after = "slopes" in asked, "losses_after" in asked
    if not links_in_front or not (reads_slopes or reads_after):
        return None
    derivative = jnp.ones_like(losses) if reads_slopes else None
    if not reads_after:
        return Kept(derivative, None, None, None)
    # Copies, so that the state can be donated.
    links = jax.tree.map(jnp.copy, links_in_front)
    return Kept(derivative, links, jnp.ones_like(losses), jnp.ones(losses.shape, bool))
