"""The agent of IGBv2 against recorded updates of the official code, in float64, and its parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import oracle, oracle_names, relative_deviation

from bilb.improvable_gap import sac

EVALUATION_TOLERANCE = 1e-9
UPDATE_TOLERANCE = 1e-7

ACTOR = {
    "a_net.0": ("Dense_0",),
    "a_net.2": ("Dense_1",),
    "mu_layer": ("mean",),
    "log_std_layer": ("log_std",),
}
CRITIC = {
    f"Q_{i}.{layer}": (f"q{i}", name)
    for i in (1, 2)
    for layer, name in ((0, "Dense_0"), (2, "Dense_1"), (4, "value"))
}
NETWORKS = {"actor": ACTOR, "critic": CRITIC, "target": CRITIC}
FIELDS = {"actor": "actor", "critic": "critic", "target": "target_critic"}


def recorded_parameters(arrays, network, prefix="init"):
    """Returns the parameters of a network, in flax's layout."""
    params = {}
    for name, path in NETWORKS[network].items():
        layer = functools.reduce(lambda node, part: node.setdefault(part, {}), path, params)
        layer["kernel"] = jnp.array(arrays[f"{prefix}.{network}.{name}.weight"].T)
        layer["bias"] = jnp.array(arrays[f"{prefix}.{network}.{name}.bias"])
    return {"params": params}


def recorded_agent(arrays, settings, log_temperature):
    """Returns the agent at the recorded initial parameters."""
    actor, critic = (recorded_parameters(arrays, name) for name in ("actor", "critic"))
    log_temperature = jnp.array(log_temperature)
    return sac.Agent(
        actor=actor,
        critic=critic,
        target_critic=critic,
        log_temperature=log_temperature,
        actor_opt_state=settings.optimizer.init(actor),
        critic_opt_state=settings.optimizer.init(critic),
        temperature_opt_state=settings.optimizer.init(log_temperature),
        losses=sac.Losses(*jnp.zeros(3)),
    )


def deviations(agent, arrays, prefix):
    """Yields (name, relative deviation) of every recorded parameter array."""
    for network, layers in NETWORKS.items():
        for name, path in layers.items():
            layer = functools.reduce(
                lambda node, part: node[part], path, getattr(agent, FIELDS[network])["params"]
            )
            for suffix, value in (("weight", layer["kernel"].T), ("bias", layer["bias"])):
                key = f"{network}.{name}.{suffix}"
                summary = jnp.array([value.sum(), (value**2).sum(), jnp.abs(value).max()])
                kinds = {
                    f"{prefix}.{key}": value,
                    f"{prefix}_rows.{key}": value[:8],
                    f"{prefix}_row0.{key}": value[0],
                    f"{prefix}_sum.{key}": summary,
                }
                for recorded in kinds.keys() & arrays.keys():
                    yield recorded, relative_deviation(kinds[recorded], arrays[recorded])


def recorded_settings(arrays):
    assert arrays["a_lr"] == arrays["c_lr"]
    return sac.Settings(
        hidden=tuple(int(width) for width in arrays["hid"]),
        batch_size=int(arrays["batch_size"]),
        discount=float(arrays["gamma"]),
        polyak=float(arrays["tau"]),
        optimizer=optax.adam(float(arrays["a_lr"])),
    )


def recorded_buffer(arrays):
    return sac.ReplayBuffer(
        sac.Transitions(
            jnp.array(arrays["buf_state"]),
            jnp.array(arrays["buf_action"]),
            jnp.array(arrays["buf_reward"][:, 0]),
            jnp.array(arrays["buf_next_state"]),
        ),
        jnp.array(arrays["buf_ptr"], jnp.int32),
        jnp.array(arrays["buf_size"], jnp.int32),
    )


def padded(rows, length):
    """Returns the rows with zeros behind them, which an update must not see."""
    return jnp.zeros((length, *rows.shape[1:]), rows.dtype).at[: len(rows)].set(rows)


def replayed_draws(arrays, length, dtype):
    pad = jax.vmap(lambda rows: padded(rows, length))
    draws = sac.UpdateDraws(
        pad(jnp.array(arrays["idx"], jnp.int32)),
        pad(jnp.array(arrays["noise_next"], dtype)),
        pad(jnp.array(arrays["noise_cur"], dtype)),
    )
    return lambda i: jax.tree.map(lambda rows: rows[i], draws)


@pytest.mark.x64
@pytest.mark.parametrize("name", oracle_names("f2_sac_*"))
class TestRecorded:
    @pytest.mark.slow
    def test_actor_and_critic(self, name):
        arrays = oracle(name)
        settings = recorded_settings(arrays)
        agent = recorded_agent(arrays, settings, arrays["log_alpha0"])
        state, noise = jnp.array(arrays["ev_state"]), jnp.array(arrays["ev_noise"], float)
        mean, log_std = sac.Actor(settings.hidden).apply(agent.actor, state)
        bounded = np.clip(arrays["ev_log_std_raw"], sac.LOG_STD_MIN, sac.LOG_STD_MAX)
        assert (arrays["ev_log_std_raw"] != bounded).any()
        action, log_prob = sac.policy(agent.actor, state, noise, settings)
        mode, mode_log_prob = sac.policy(agent.actor, state, 0 * noise, settings)
        # The official code recovers the noise from u, which at σ = exp(-20) costs eight digits.
        u = mean + jnp.exp(log_std) * noise
        recovered = (u - mean) / jnp.exp(log_std)
        rounded_log_prob = sac.log_prob(u, log_std, recovered, "official")
        inside = (arrays["ev_log_std_raw"] > sac.LOG_STD_MIN).all(1)
        values = sac.TwinCritic(settings.hidden).apply(agent.critic, state, action)
        single = sac.act(
            agent.actor, state[0], jnp.array(arrays["ev_single_noise"], float), settings
        )
        computed = {
            "ev_mu": (mean, arrays["ev_mu"]),
            "ev_log_std": (log_std, bounded),
            "ev_action": (action, arrays["ev_action"]),
            "ev_logp": (rounded_log_prob, arrays["ev_logp"][:, 0]),
            "ev_logp, unrounded": (log_prob[inside], arrays["ev_logp"][inside, 0]),
            "ev_action_det": (mode, arrays["ev_action_det"]),
            "ev_logp_det": (mode_log_prob, arrays["ev_logp_det"][:, 0]),
            "ev_q1": (values[0], arrays["ev_q1"][:, 0]),
            "ev_q2": (values[1], arrays["ev_q2"][:, 0]),
            "ev_single_action": (single, arrays["ev_single_action"]),
        }
        for key, (actual, desired) in computed.items():
            assert relative_deviation(actual, desired) < EVALUATION_TOLERANCE, key

    def test_updates(self, name):
        arrays = oracle(name)
        settings = recorded_settings(arrays)
        buffer = recorded_buffer(arrays)
        agent = recorded_agent(arrays, settings, arrays["log_alpha0"])
        assert sac.grown(settings.batch_size, buffer) == arrays["batch"]
        assert agent.log_temperature.dtype == jnp.float64

        draw = replayed_draws(arrays, settings.batch_size, jnp.float64)
        train = jax.jit(lambda agent, count: sac.train(agent, buffer, count, draw, settings))
        for count in range(1, 6):
            trained = train(agent, count)
            scalars = {
                "q_loss": (trained.losses.critic, arrays["q_loss"][count - 1]),
                "a_loss": (trained.losses.actor, arrays["a_loss"][count - 1]),
                "alpha_loss": (trained.losses.temperature, arrays["alpha_loss"][count - 1]),
                "log_alpha": (trained.log_temperature, arrays["log_alpha"][count]),
                "alpha": (jnp.exp(trained.log_temperature), arrays["alpha"][count]),
            }
            for key, (actual, desired) in scalars.items():
                assert relative_deviation(actual, desired) < UPDATE_TOLERANCE, (key, count)
            compared = dict(deviations(trained, arrays, f"u{count}"))
            for key, deviation in compared.items():
                assert deviation < UPDATE_TOLERANCE, key
            assert compared or count not in (1, 2, 5) or (count < 5 and "h128" in name)


def agent_and_batch(settings, size=12, num_tasks=3):
    keys = jax.random.split(jax.random.key(1), 5)
    agent = sac.init_agent(keys[0], num_tasks, settings=settings)
    normal = lambda key, *shape: jax.random.normal(key, shape)
    batch = sac.Transitions(
        jnp.exp(normal(keys[1], size, num_tasks)),
        num_tasks * jax.nn.softmax(normal(keys[2], size, num_tasks)),
        normal(keys[3], size),
        jnp.exp(normal(keys[4], size, num_tasks)),
    )
    return agent, batch, sac.draw_update(keys[0], size, size, num_tasks, jnp.float32)


SMALL = sac.Settings(hidden=(8,), batch_size=8)


def test_log_probabilities():
    u, mean, log_std = jnp.array([0.3, -2.0]), jnp.array([0.1, -1.0]), jnp.array([-1.0, 0.5])
    noise = (u - mean) / jnp.exp(log_std)
    gaussian = jax.scipy.stats.norm.logpdf(u, mean, jnp.exp(log_std)).sum()
    np.testing.assert_allclose(sac.log_prob(u, log_std, noise, "gaussian"), gaussian, rtol=1e-5)
    tanh = gaussian - jnp.log(1 - jnp.tanh(u) ** 2).sum()
    np.testing.assert_allclose(sac.log_prob(u, log_std, noise, "official"), tanh, rtol=1e-5)


@pytest.mark.slow
def test_initial_parameters_and_temperature():
    agent = sac.init_agent(jax.random.key(0), 4, settings=SMALL, initial_temperature=0.5)
    np.testing.assert_allclose(jnp.exp(agent.log_temperature), 0.5, rtol=1e-6)
    for name, fan_in in (("Dense_0", 8), ("value", 8)):
        for critic in ("q1", "q2"):
            for leaf in jax.tree.leaves(agent.critic["params"][critic][name]):
                assert (jnp.abs(leaf) <= fan_in**-0.5).all()
    first, second = (agent.critic["params"][name]["Dense_0"]["kernel"] for name in ("q1", "q2"))
    assert not np.allclose(first, second)
    for old, new in zip(jax.tree.leaves(agent.critic), jax.tree.leaves(agent.target_critic)):
        np.testing.assert_array_equal(old, new)
        assert old.unsafe_buffer_pointer() != new.unsafe_buffer_pointer()


def test_the_buffer_is_a_ring():
    buffer = sac.init_buffer(3, 2)
    row = lambda t: sac.Transitions(
        jnp.full(2, t), jnp.full(2, 10 * t), jnp.asarray(t), jnp.full(2, t + 1)
    )
    buffer = sac.store(buffer, row(7.0), keep=False)
    assert (buffer.size, buffer.pointer) == (0, 0)
    counts = []
    for t in (1.0, 2.0, 3.0, 4.0):
        buffer = sac.store(buffer, row(t))
        counts.append((int(buffer.size), int(buffer.pointer), int(sac.grown(256, buffer))))
    # int(256 k / 2), k = 1 + size / 3
    assert counts == [(1, 1, 170), (2, 2, 213), (3, 0, 256), (3, 1, 256)]
    np.testing.assert_array_equal(buffer.transitions.rewards, [4.0, 2.0, 3.0])
    np.testing.assert_array_equal(buffer.transitions.actions[:, 1], [40.0, 20.0, 30.0])


@pytest.mark.slow
def test_transitions_outside_the_mask_do_not_count():
    agent, batch, draws = agent_and_batch(SMALL)
    update = jax.jit(lambda batch, mask: sac.sac_update(agent, batch, mask, draws, SMALL))
    mask = jnp.arange(12) < 7
    changed = jax.tree.map(lambda rows: rows.at[7:].add(100.0), batch)
    expected = update(batch, mask)
    assert update(batch, jnp.ones(12, bool)).losses.critic != expected.losses.critic
    for leaf, other in zip(jax.tree.leaves(expected), jax.tree.leaves(update(changed, mask))):
        np.testing.assert_allclose(leaf, other, rtol=1e-5)


@pytest.mark.slow
def test_polyak_average_and_optimiser():
    settings = SMALL._replace(optimizer=optax.sgd(0.1), polyak=0.25)
    agent, batch, draws = agent_and_batch(settings)
    update = jax.jit(
        lambda agent: sac.sac_update(agent, batch, jnp.ones(12, bool), draws, settings)
    )
    new = update(agent)
    average = lambda old, new: 0.75 * old + 0.25 * new
    for old, critic, target in zip(
        *(jax.tree.leaves(tree) for tree in (agent.critic, new.critic, new.target_critic))
    ):
        np.testing.assert_allclose(target, average(old, critic), rtol=1e-5, atol=1e-7)
    # d/d(log α) of -log α mean(log p + target entropy), with the actor before its step.
    _, log_prob = sac.policy(agent.actor, batch.states, draws.noise, settings)
    np.testing.assert_allclose(
        new.log_temperature - agent.log_temperature, 0.1 * (log_prob.mean() - 3), rtol=1e-4
    )


@pytest.mark.slow
def test_training_runs_the_given_number_of_updates():
    agent, batch, _ = agent_and_batch(SMALL)
    buffer = sac.ReplayBuffer(batch, jnp.int32(0), jnp.int32(12))
    draw = lambda i: sac.draw_update(jax.random.key(i), 12, 8, 3, jnp.float32)
    train = jax.jit(lambda count: sac.train(agent, buffer, count, draw, SMALL))
    for old, new in zip(jax.tree.leaves(train(0)), jax.tree.leaves(agent)):
        np.testing.assert_array_equal(old, new)

    @jax.jit
    def update(agent, draws):
        rows = jax.tree.map(lambda x: x[draws.indices], batch)
        return sac.sac_update(agent, rows, jnp.ones(8, bool), draws, SMALL)

    expected = agent
    for i in range(3):
        expected = update(expected, draw(i))
    for old, new in zip(jax.tree.leaves(train(3)), jax.tree.leaves(expected)):
        np.testing.assert_allclose(old, new, rtol=1e-4, atol=1e-6)
