"""IGBv2, improvable gap balancing, arXiv 2307.15429: an agent learns the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilb import base, checks
from bilb.improvable_gap import base_losses as windows
from bilb.improvable_gap import sac


class IGBv2State(NamedTuple):
    """State of :func:`igb_v2`."""

    step: jax.Array  # () int32
    base_losses: jax.Array  # (K,), the mean so far; 0 where there is none yet
    base_counts: jax.Array  # (K,) int32, the losses in that mean
    last_losses: jax.Array  # (K,), the state of the agent; 0 before the first
    weights: jax.Array  # (K,)
    buffer: sac.ReplayBuffer
    agent: sac.Agent
    key: jax.Array


class Settings(NamedTuple):
    """The arguments of :func:`igb_v2` that an update reads."""

    base_start: int | jax.Array
    base_steps: int | jax.Array
    warmup_steps: int | jax.Array
    update_after: int | jax.Array
    update_every: int | jax.Array
    reward_scale: base.Scalar
    clip: float | jax.Array
    floor: float | jax.Array
    agent: sac.Settings
    units: str = "losses"
    action: str = "sample"


class Draws(NamedTuple):
    """The randomness of one update of :func:`igb_v2`.

    Attributes:
        warmup: (K,) standard normal, logits of the weights during the warm-up.
        action: (K,) standard normal, the noise of the action afterwards.
        updates: ``(number of the agent's update, rows in the buffer) -> draws``.
    """

    warmup: jax.Array
    action: jax.Array
    updates: Callable[[jax.Array, jax.Array], sac.UpdateDraws]


def igb_v2(
    base_start: int | jax.Array,
    base_steps: int | jax.Array,
    *,
    warmup_steps: int | jax.Array,
    update_after: int | jax.Array,
    update_every: int | jax.Array = 50,
    num_updates: int | jax.Array = 50,
    buffer_size: int = 10_000,
    batch_size: int = 256,
    reward_scale: base.Scalar = 1.0,
    log_prob: Literal["official", "gaussian"] = "official",
    hidden: tuple[int, ...] = (128, 128),
    optimizer: optax.GradientTransformation | None = None,
    discount: float | jax.Array = 0.99,
    polyak: float | jax.Array = 0.005,
    initial_temperature: float | jax.Array = 0.2,
    clip: float | jax.Array = 1e6,
    floor: float | jax.Array = 1e-8,
    units: Literal["losses", "base"] = "losses",
    residual: float | jax.Array | None = None,
    action: Literal["sample", "mean"] = "sample",
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Weighs the log losses by the action of a soft actor-critic agent that learns as it goes.

    With the base losses l^b, the mean losses of one early epoch, and w constant in the derivative:

    * state ``l``, action ``w = K softmax(u)`` with ``u ~ N(μ(l), σ(l))``, soft actor-critic
    * reward of the step from l' to l: ``scale · min_k (l'_k - l_k) / l^b_k``
    * ``objective = Σ_k w_k log l_k``

    Counting updates from 0:

    * ``base_start ... base_start + base_steps - 1`` give the base losses, as in
      :func:`bilb.igb_v1`. From update ``base_start + base_steps`` on, every update stores the
      transition from the losses and weights before it to its losses.
    * At every multiple of ``update_every`` not below ``update_after`` the agent trains:
      ``int(num_updates k / 2)`` steps on ``int(batch_size k / 2)`` transitions each, with
      ``k = 1 + stored / buffer_size``. While nothing is stored it does not train.
    * Updates before ``warmup_steps`` weigh with ``K softmax(N(0, I))``, the others with the
      agent's action for the losses at hand.

    The official code counts epochs; with S steps per epoch it runs ``igb_v2(base_start=S,
    base_steps=S, warmup_steps=5 * S, update_after=3 * S)``.

    The agent and its buffer live in the state and train inside ``update``, in a loop that makes no
    turn on the other updates; a whole training run is one ``lax.scan``, and ``vmap`` over seeds
    (``key``) or over states keeps the cost. Outside a scan donate the state, or the buffer of
    ``3 * buffer_size * K`` numbers is copied at every update.

    Scaling with K: averaged over the updates of the model, with a full buffer, the default agent
    adds 140 Mflop to each at K = 2, 220 at K = 40 and 2,300 at K = 1,000, whatever the model, and
    its buffer takes 12 bytes times ``buffer_size * K`` in float32, 120 MB at K = 1,000. For many
    tasks or a small model, ``hidden=(64, 64), batch_size=64, num_updates=10, buffer_size=1000``
    adds 2, 4 and 60 Mflop.

    When not to use it: in short runs, and where the losses differ in scale. With the official
    defaults the agent sees the losses as they are, and its weights swing between the tasks;
    :func:`bilb.igb_v1` costs nothing more than a sum of losses. ``units``, ``residual`` and
    ``action`` are options without these faults: :func:`bilb.presets.igb_v2_near_igb_v1`.

    An absent task, by ``mask`` or because its loss is not finite, stands in the agent's state with
    its last loss (0 before its first) and takes no part in the minimum of the reward, which is 0
    when no task is left. Transitions are stored all the same. With a mask its weight stays as it
    was and it contributes nothing; without one a non-finite loss stays in its own entry. Losses
    should be positive; the floor is that of :func:`bilb.igb_v1`.

    Args:
        base_start: first update of the base window, at least 0.
        base_steps: updates in the window, at least 1.
        warmup_steps: updates with random weights, at least 0 (official: 5 epochs).
        update_after: first update that may train the agent, at least 0 (official: 3 epochs).
        update_every: updates of the model per training of the agent, at least 1.
        num_updates: the most steps of the agent per training, at least 1.
        buffer_size: transitions kept; static.
        batch_size: the most transitions per step of the agent, at least 2; static. The batch that
            grows with the buffer is this many draws of which the first ones count.
        reward_scale: factor of the reward, at least 0: a number, a traced scalar or a schedule of
            the state's ``step``. The paper uses the initial over the current learning rate:
            ``lambda step: schedule(0) / schedule(step)``.
        log_prob: "official" subtracts the change of variables of tanh from the Gaussian's
            log-probability although the action is a softmax, as the official code does;
            "gaussian" does not.
        hidden: widths of the hidden layers of actor and critics; static.
        optimizer: Optax optimiser of actor, critics and temperature, each with its own state; Adam
            at 3e-4 if None. The official code takes 1e-4 when combined with MGDA, PCGrad or
            Nash-MTL.
        discount: of future rewards, 0 to 1.
        polyak: share of the critics that enters their targets per step, 0 to 1.
        initial_temperature: positive; learnt towards an entropy of -K.
        clip: positive bound on the magnitude of the losses and rewards that the agent sees, far
            above what losses are in practice; ``jnp.inf`` for none.
        floor: positive, in the units of the losses; of the logarithm and the base losses.
        units: "losses", the official code's, or "base": the agent sees ``l / l^b``, 1 until the
            base losses are known, so that no scale of a loss is seen anywhere.
        residual: None for weights ``K softmax(u)`` of the agent alone, as in the official code; or
            r >= 0 for ``K softmax(l / l^b + r tanh u)``, the weights of :func:`bilb.igb_v1` changed
            by a factor of at most ``exp(2 r)``, during the warm-up, too. Needs ``units="base"``.
        action: after the warm-up, "sample" from the policy, or act by its "mean", without noise.
        key: seed or JAX key.

    Returns:
        A loss transformation whose state has the fields ``step``, ``base_losses`` (K,),
        ``base_counts`` (K,), ``last_losses`` (K,), ``weights`` (K,), ``buffer``, ``agent`` and
        ``key``; ``state.agent.losses`` are the agent's own losses at its last step. With
        ``optax.inject_hyperparams`` give ``static_args=("buffer_size", "batch_size", "key")``.

    Raises:
        ValueError: for concrete numbers outside these ranges, an unknown ``log_prob``, ``units`` or
            ``action``, a ``residual`` without ``units="base"``, or ``batch_size * buffer_size`` of
            2**30 and more.

    Example:
        >>> import jax, jax.numpy as jnp, bilb
        >>> steps = 4
        >>> balancer = bilb.igb_v2(
        ...     steps, steps, warmup_steps=5 * steps, update_after=3 * steps, hidden=(16, 16)
        ... )
        >>> losses = jnp.array([0.2, 3.0, 40.0])
        >>> state = balancer.init(losses)
        >>> balanced, state = balancer.update(losses, state)
        >>> print(balanced.shape, f"{state.weights.sum():.3f}")
        (3,) 3.000

    References:
        Dai et al., *Improvable Gap Balancing for Multi-Task Learning*, UAI 2023,
        arXiv 2307.15429, IGBv2.
    """
    settings = Settings(
        base_start=base_start,
        base_steps=base_steps,
        warmup_steps=warmup_steps,
        update_after=update_after,
        update_every=update_every,
        reward_scale=reward_scale,
        clip=clip,
        floor=floor,
        agent=sac.Settings(
            hidden=tuple(hidden),
            batch_size=batch_size,
            num_updates=num_updates,
            discount=discount,
            polyak=polyak,
            log_prob=log_prob,
            optimizer=checks.optimizer("optimizer", optimizer, optax.adam(3e-4)),
            residual=residual,
        ),
        units=units,
        action=action,
    )
    checks.key(key)
    _check(settings, buffer_size, initial_temperature)

    def init(num_tasks, dtype):
        agent_key, state_key = jax.random.split(base.as_key(key))
        return IGBv2State(
            base.new_step(),
            *windows.init(num_tasks, dtype),
            last_losses=jnp.zeros(num_tasks, dtype),
            weights=jnp.ones(num_tasks, dtype),
            buffer=sac.init_buffer(buffer_size, num_tasks, dtype),
            agent=sac.init_agent(
                agent_key,
                num_tasks,
                dtype,
                settings=settings.agent,
                initial_temperature=initial_temperature,
            ),
            key=state_key,
        )

    @jax.jit  # so that calls outside jit compile the agent's training once
    def step(losses, state, mask):
        key, *keys = jax.random.split(state.key, 4)
        draws = _draw(keys, losses, batch_size)
        balanced, state = igb_v2_step(losses, state, draws, settings, mask)
        return balanced, state._replace(key=key)

    def update(losses, state, *, mask, statistics_of=None, **_):
        if statistics_of is None:
            return step(losses, state, mask)
        _, state = step(statistics_of, state, mask)
        return state.weights * jnp.log(base.at_least(losses, settings.floor)), state

    return base.loss_transformation(init, update, keeps_absent=False)


def _check(settings, buffer_size, initial_temperature):
    """Raises ValueError for what is outside the ranges that :func:`igb_v2` gives."""
    agent = settings.agent
    windows.check(settings.base_start, settings.base_steps)
    checks.number("warmup_steps", settings.warmup_steps, minimum=0, whole=True)
    checks.number("update_after", settings.update_after, minimum=0, whole=True)
    checks.number("update_every", settings.update_every, minimum=1, whole=True)
    checks.number("num_updates", agent.num_updates, minimum=1, whole=True)
    checks.number("buffer_size", buffer_size, minimum=1, whole=True, static=True)
    checks.number("batch_size", agent.batch_size, minimum=2, whole=True, static=True)
    checks.number("batch_size * buffer_size", agent.batch_size * buffer_size, maximum=2**30 - 1)
    checks.number("reward_scale", settings.reward_scale, minimum=0, schedule=True)
    for width in agent.hidden:
        checks.number("hidden", width, minimum=1, whole=True, static=True)
    checks.number("discount", agent.discount, minimum=0, maximum=1)
    checks.number("polyak", agent.polyak, minimum=0, maximum=1)
    checks.number("initial_temperature", initial_temperature, minimum=0, exclusive=True)
    checks.number("clip", settings.clip, minimum=0, exclusive=True)
    checks.number("floor", settings.floor, minimum=0, exclusive=True)
    checks.number("residual", agent.residual, minimum=0, optional=True)
    if settings.units not in ("losses", "base"):
        raise ValueError(f'units must be "losses" or "base"; got {settings.units!r}.')
    if settings.action not in ("sample", "mean"):
        raise ValueError(f'action must be "sample" or "mean"; got {settings.action!r}.')
    if agent.residual is not None and settings.units != "base":
        raise ValueError('a residual changes the logits l / l^b: give units="base" as well.')
    if agent.log_prob not in ("official", "gaussian"):
        raise ValueError(f'log_prob must be "official" or "gaussian"; got {agent.log_prob!r}.')


def _draw(keys, losses, batch_size):
    """Returns the randomness of one update, from three keys."""
    warmup, action, updates = keys
    shape, dtype = losses.shape, losses.dtype
    return Draws(
        warmup=jax.random.normal(warmup, shape, dtype),
        action=jax.random.normal(action, shape, dtype),
        updates=lambda i, size: sac.draw_update(
            jax.random.fold_in(updates, i), size, batch_size, *shape, dtype
        ),
    )


def igb_v2_step(
    losses: jax.Array,
    state: IGBv2State,
    draws: Draws,
    settings: Settings,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, IGBv2State]:
    """One update of :func:`igb_v2` with given randomness.

    Args:
        losses: (K,).
        state: the state; its key is not used.
        draws: the randomness.
        settings: the arguments of :func:`igb_v2`.
        mask: (K,) bool or None, the tasks that are present.

    Returns:
        The balanced losses (K,) and the next state, with the same key.
    """
    scale = base.at_step(settings.reward_scale, state.step)
    bounded = lambda x: jnp.clip(x, -settings.clip, settings.clip)
    usable = base.usable(losses, mask)
    observed = jnp.where(usable, jax.lax.stop_gradient(losses), state.last_losses)
    means, known = windows.observe(
        windows.BaseLosses(state.base_losses, state.base_counts),
        losses, usable, state.step, settings.base_start, settings.base_steps,
    )  # fmt: skip

    gap = windows.relative(state.last_losses - observed, means.mean, settings.floor)
    gap = jnp.min(gap, where=usable & (state.base_counts > 0), initial=jnp.inf)

    def seen(losses):
        if settings.units == "losses":
            return bounded(losses)
        relative = windows.relative(losses, means.mean, settings.floor)
        # A residual is one on IGBv1's logits, which are equal until the base losses are known.
        return bounded(jnp.where(known & (means.count > 0), relative, 1.0))

    now = seen(observed)
    transition = sac.Transitions(
        states=seen(state.last_losses),
        actions=state.weights,
        rewards=bounded(scale * jnp.where(gap < jnp.inf, gap, 0.0)),
        next_states=now,
    )
    buffer = sac.store(state.buffer, transition, keep=known)

    due = (state.step >= settings.update_after) & (state.step % settings.update_every == 0)
    # Not a `cond`: under a batched predicate that would train at every step, this loop does not.
    agent = sac.train(
        state.agent,
        buffer,
        jnp.where(due & (buffer.size > 0), sac.grown(settings.agent.num_updates, buffer), 0),
        lambda i: draws.updates(i, buffer.size),
        settings.agent,
    )

    random = sac.weigh(draws.warmup, now, settings.agent.residual)
    noise = draws.action if settings.action == "sample" else jnp.zeros_like(draws.action)
    action = sac.act(agent.actor, now, noise, settings.agent)
    weights = jnp.where(state.step < settings.warmup_steps, random, action)
    if mask is not None:
        weights = jnp.where(mask, weights, state.weights)
    balanced = weights * jnp.log(base.at_least(losses, settings.floor))
    step = optax.safe_increment(state.step)
    return balanced, IGBv2State(step, *means, observed, weights, buffer, agent, state.key)
