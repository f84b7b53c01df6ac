"""Soft actor-critic (SAC) that chooses task weights: the agent of IGBv2, arXiv 2307.15429.

State s = the K losses, action a = the K task weights:

* actor:        ``u = μ(s) + σ(s) ε``, ``a = K softmax(u)``
* critic:       two networks ``Q(s, a)`` and their Polyak averages, the target critic
* temperature:  ``α = exp(log α)``, learnt towards an entropy of -K

Everything is a pure function of an :class:`Agent`, a :class:`ReplayBuffer` and drawn noise, so the
agent can live in the state of a loss transformation, under ``jit``, ``vmap`` and ``lax.scan``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bilb import base

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0


class Settings(NamedTuple):
    """Settings of the agent; the defaults are the official code's.

    Attributes:
        hidden: widths of the hidden layers of actor and critics; static.
        batch_size: B, the most transitions per update, at least 2; static.
        num_updates: the most updates per training, at least 1.
        discount: of the next state's value, 0 to 1.
        polyak: share of the critic that enters its target per update, 0 to 1.
        log_prob: "official" or "gaussian", see :func:`log_prob`; static.
        residual: bound on what the action adds to the state as logits, see :func:`weigh`; None for
            logits of its own.
        optimizer: of actor, critic and temperature, each with a state of its own; static.
    """

    hidden: tuple[int, ...] = (128, 128)
    batch_size: int = 256
    num_updates: int | jax.Array = 50
    discount: float | jax.Array = 0.99
    polyak: float | jax.Array = 0.005
    log_prob: Literal["official", "gaussian"] = "official"
    optimizer: optax.GradientTransformation = optax.adam(3e-4)
    residual: float | jax.Array | None = None


class Losses(NamedTuple):
    """Losses of one update, scalars."""

    critic: jax.Array
    actor: jax.Array
    temperature: jax.Array


class Agent(NamedTuple):
    """Everything the agent learns."""

    actor: base.PyTree
    critic: base.PyTree
    target_critic: base.PyTree
    log_temperature: jax.Array  # ()
    actor_opt_state: optax.OptState
    critic_opt_state: optax.OptState
    temperature_opt_state: optax.OptState
    losses: Losses  # of the last update, to be logged; 0 before the first


class Transitions(NamedTuple):
    """Steps of the environment, stacked along the leading axis."""

    states: jax.Array  # (N, K)
    actions: jax.Array  # (N, K)
    rewards: jax.Array  # (N,)
    next_states: jax.Array  # (N, K)


class ReplayBuffer(NamedTuple):
    """A ring of the last N transitions."""

    transitions: Transitions
    pointer: jax.Array  # () int32, the row to be written next
    size: jax.Array  # () int32, the rows in use


class UpdateDraws(NamedTuple):
    """The randomness of one update."""

    indices: jax.Array  # (B,) int, rows of the buffer
    noise_next: jax.Array  # (B, K) standard normal, for the actions in the next states
    noise: jax.Array  # (B, K) standard normal, for the actions in the states


class Actor(nn.Module):
    """``state (..., K) -> (mean, log_std)``, each (..., K)."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, state):
        """Returns mean and bounded log standard deviation of the Gaussian before the softmax."""
        h = _hidden_layers(self.hidden, state)
        log_std = _linear(state.shape[-1], h, name="log_std")
        return _linear(state.shape[-1], h, name="mean"), jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)


class Critic(nn.Module):
    """``state (..., K), action (..., K) -> value (...)``."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, state, action):
        """Returns the value of the action in the state."""
        h = _hidden_layers(self.hidden, jnp.concatenate([state, action], axis=-1))
        return _linear(1, h, name="value")[..., 0]


class TwinCritic(nn.Module):
    """Two critics: ``state (..., K), action (..., K) -> values (2, ...)``."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, state, action):
        """Returns both values of the action in the state."""
        critics = (Critic(self.hidden, name="q1"), Critic(self.hidden, name="q2"))
        return jnp.stack([critic(state, action) for critic in critics])


def _hidden_layers(widths, h):
    for width in widths:
        h = nn.relu(_linear(width, h))
    return h


def _linear(features, inputs, name=None):
    # U(-1/√fan_in, 1/√fan_in) for kernel and bias, as in the official code.
    bound = inputs.shape[-1] ** -0.5
    init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
    layer = nn.Dense(
        features, param_dtype=inputs.dtype, kernel_init=init, bias_init=init, name=name
    )
    return layer(inputs)


def init_agent(
    key: jax.Array,
    num_tasks: int,
    dtype: Any = jnp.float32,
    *,
    settings: Settings = Settings(),
    initial_temperature: float | jax.Array = 0.2,
) -> Agent:
    """Returns an agent whose target critic equals its critic.

    Args:
        key: a JAX key.
        num_tasks: K.
        dtype: of all parameters.
        settings: widths and optimiser.
        initial_temperature: α at first, positive.

    Example:
        >>> import jax
        >>> from bilb.improvable_gap import sac
        >>> agent = sac.init_agent(jax.random.key(0), num_tasks=3)
        >>> print(agent.critic["params"]["q1"]["Dense_0"]["kernel"].shape)
        (6, 128)
    """
    actor_key, critic_key = jax.random.split(key)
    state = jnp.zeros(num_tasks, dtype)
    actor = Actor(settings.hidden).init(actor_key, state)
    critic = TwinCritic(settings.hidden).init(critic_key, state, state)
    log_temperature = jnp.log(jnp.array(initial_temperature, dtype))
    return Agent(
        actor=actor,
        critic=critic,
        target_critic=jax.tree.map(jnp.copy, critic),
        log_temperature=log_temperature,
        actor_opt_state=settings.optimizer.init(actor),
        critic_opt_state=settings.optimizer.init(critic),
        temperature_opt_state=settings.optimizer.init(log_temperature),
        losses=Losses(*(jnp.zeros((), dtype) for _ in Losses._fields)),
    )


def init_buffer(buffer_size: int, num_tasks: int, dtype: Any = jnp.float32) -> ReplayBuffer:
    """Returns an empty buffer of N = ``buffer_size`` rows: 3 N K + N numbers."""
    zeros = lambda *shape: jnp.zeros((buffer_size, *shape), dtype)
    return ReplayBuffer(
        Transitions(zeros(num_tasks), zeros(num_tasks), zeros(), zeros(num_tasks)),
        pointer=jnp.zeros((), jnp.int32),
        size=jnp.zeros((), jnp.int32),
    )


def store(
    buffer: ReplayBuffer, transition: Transitions, keep: bool | jax.Array = True
) -> ReplayBuffer:
    """Writes one transition over the oldest row, in place where the buffer is donated or carried.

    Args:
        buffer: N rows.
        transition: states, actions and next_states (K,), rewards ().
        keep: whether to count it; otherwise the next call writes the same row, not in use, again.
    """
    length = buffer.transitions.rewards.shape[0]
    pointer = buffer.pointer
    return ReplayBuffer(
        jax.tree.map(
            lambda rows, row: rows.at[pointer].set(row.astype(rows.dtype)),
            buffer.transitions,
            transition,
        ),
        pointer=jnp.where(keep, (pointer + 1) % length, pointer),
        size=jnp.where(keep, jnp.minimum(buffer.size + 1, length), buffer.size),
    )


def grown(most: int | jax.Array, buffer: ReplayBuffer) -> jax.Array:
    """Returns ``int(most k / 2)`` with ``k = 1 + size / N``: half at first, all once it is full."""
    length = buffer.transitions.rewards.shape[0]
    return jnp.asarray(most * (length + buffer.size) // (2 * length), jnp.int32)


def act(
    actor: base.PyTree, state: jax.Array, noise: jax.Array, settings: Settings = Settings()
) -> jax.Array:
    """Returns the action, the weights of the logits ``μ + σ noise`` (:func:`weigh`).

    Args:
        actor: parameters of the actor.
        state: (..., K).
        noise: (..., K) standard normal; 0 for the deterministic action.
        settings: widths.

    Returns:
        (..., K), not negative, with sum K.
    """
    return policy(actor, state, noise, settings)[0]


def policy(
    actor: base.PyTree, state: jax.Array, noise: jax.Array, settings: Settings = Settings()
) -> tuple[jax.Array, jax.Array]:
    """Returns the action of :func:`act` (..., K) and its log-probability (...)."""
    mean, log_std = Actor(settings.hidden).apply(actor, state)
    u = mean + jnp.exp(log_std) * noise
    return weigh(u, state, settings.residual), log_prob(u, log_std, noise, settings.log_prob)


def weigh(u: jax.Array, state: jax.Array, residual: float | jax.Array | None = None) -> jax.Array:
    """Returns weights of sum K: ``K softmax(u)``, or with a residual r ``K softmax(s + r tanh u)``.

    With a residual and the state ``s = l / l^b`` they are IGBv1's, each changed by a factor of at
    most ``exp(2 r)``.
    """
    logits = u if residual is None else state + residual * jnp.tanh(u)
    return u.shape[-1] * jax.nn.softmax(logits)


def log_prob(
    u: jax.Array, log_std: jax.Array, noise: jax.Array, kind: Literal["official", "gaussian"]
) -> jax.Array:
    """Returns ``Σ_k log N(u_k; μ_k, σ_k)``, with the official correction or without.

    The official code subtracts ``2 (log 2 - u - softplus(-2 u))``, the change of variables of
    ``tanh(u)``, although the action is a softmax of u.

    Args:
        u: (..., K), ``μ + σ noise``.
        log_std: (..., K), ``log σ``.
        noise: (..., K).
        kind: "official" or "gaussian".

    Returns:
        (...).
    """
    terms = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    if kind == "official":
        terms -= 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))
    return terms.sum(-1)


def sac_update(
    agent: Agent,
    batch: Transitions,
    mask: jax.Array,
    draws: UpdateDraws,
    settings: Settings = Settings(),
) -> Agent:
    """One update, in the official order: critic, actor, temperature, target critic.

    Args:
        agent: the agent.
        batch: B transitions.
        mask: (B,) bool, the transitions that count, at least one.
        draws: the noise (its indices are not read).
        settings: of the agent.

    Returns:
        The agent with ``losses`` of this update.
    """
    mean = lambda terms: jnp.mean(terms, where=mask)
    value = TwinCritic(settings.hidden).apply
    temperature = jnp.exp(agent.log_temperature)

    next_actions, next_log_prob = policy(agent.actor, batch.next_states, draws.noise_next, settings)
    next_value = _smaller(value(agent.target_critic, batch.next_states, next_actions))
    target = batch.rewards + settings.discount * (next_value - temperature * next_log_prob)

    def critic_loss(critic):
        return mean(jnp.sum((value(critic, batch.states, batch.actions) - target) ** 2, axis=0))

    loss_c, gradient = jax.value_and_grad(critic_loss)(agent.critic)
    critic, critic_opt_state = _step(settings, gradient, agent.critic_opt_state, agent.critic)

    def actor_loss(actor):
        actions, log_prob = policy(actor, batch.states, draws.noise, settings)
        worst = _smaller(value(critic, batch.states, actions))
        return mean(temperature * log_prob - worst), log_prob

    (loss_a, log_prob), gradient = jax.value_and_grad(actor_loss, has_aux=True)(agent.actor)
    actor, actor_opt_state = _step(settings, gradient, agent.actor_opt_state, agent.actor)

    target_entropy = -batch.states.shape[-1]
    # The log-probabilities are those of the actor before its step.
    temperature_loss = lambda log_alpha: -log_alpha * mean(log_prob + target_entropy)
    loss_t, gradient = jax.value_and_grad(temperature_loss)(agent.log_temperature)
    log_temperature, temperature_opt_state = _step(
        settings, gradient, agent.temperature_opt_state, agent.log_temperature
    )

    return Agent(
        actor=actor,
        critic=critic,
        target_critic=optax.incremental_update(critic, agent.target_critic, settings.polyak),
        log_temperature=log_temperature,
        actor_opt_state=actor_opt_state,
        critic_opt_state=critic_opt_state,
        temperature_opt_state=temperature_opt_state,
        losses=Losses(loss_c, loss_a, loss_t),
    )


def train(
    agent: Agent,
    buffer: ReplayBuffer,
    num_updates: jax.Array,
    draw: Callable[[jax.Array], UpdateDraws],
    settings: Settings = Settings(),
) -> Agent:
    """Runs ``num_updates`` updates, a number known only at run time; 0 costs nothing.

    The batch grows with the buffer (:func:`grown`) but needs a static shape: B transitions are
    drawn, and the first ``int(B k / 2)`` count.

    Args:
        agent: the agent.
        buffer: not empty, unless ``num_updates`` is 0.
        num_updates: () int.
        draw: ``number of the update, from 0 -> draws``.
        settings: of the agent.

    Returns:
        The agent after the updates.
    """
    mask = jnp.arange(settings.batch_size) < grown(settings.batch_size, buffer)

    def update(i, agent):
        draws = draw(i)
        batch = jax.tree.map(lambda rows: rows[draws.indices], buffer.transitions)
        return jax.tree.map(_like, sac_update(agent, batch, mask, draws, settings), agent)

    return jax.lax.fori_loop(0, num_updates, update, agent)


def draw_update(
    key: jax.Array, size: jax.Array, batch_size: int, num_tasks: int, dtype: Any
) -> UpdateDraws:
    """Draws the randomness of one update from a buffer with ``size`` rows in use."""
    index_key, next_key, key = jax.random.split(key, 3)
    shape = (batch_size, num_tasks)
    return UpdateDraws(
        jax.random.randint(index_key, shape[:1], 0, size),
        jax.random.normal(next_key, shape, dtype),
        jax.random.normal(key, shape, dtype),
    )


def _smaller(values):
    # The derivative of `min` asks which entry equals the minimum: none does, which is 0 / 0, where
    # the compiler rounds a value that it computes twice in two ways.
    first, second = values
    return jnp.where(first < second, first, second)


def _step(settings, gradient, opt_state, params):
    updates, opt_state = settings.optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _like(new, old):
    return jnp.asarray(new, old.dtype)
