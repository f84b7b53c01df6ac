"""IGBv1 and IGBv2 against recorded runs of the official code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import oracle, oracle_names, relative_deviation
from test_sac import deviations, padded, recorded_agent

import bilb
from bilb.improvable_gap import sac
from bilb.improvable_gap.igb_v1 import igb_v1
from bilb.improvable_gap.igb_v2 import Draws, Settings, igb_v2, igb_v2_step

V1_TOLERANCE = 1e-9


V2_TOLERANCE = 1e-6


@pytest.mark.x64
class TestRecordedV1:
    @pytest.mark.parametrize("base_epoch", [0, 1])
    @pytest.mark.parametrize("num_tasks", [2, 3, 11])
    def test_static(self, num_tasks, base_epoch):
        arrays = oracle("f2_igbv1_static")
        prefix = f"K{num_tasks}_base{base_epoch}"
        steps = int(arrays["batches_per_epoch"])
        balancer = igb_v1(base_start=base_epoch * steps, base_steps=steps)
        losses = jnp.array(arrays[f"K{num_tasks}_losses"])

        def step(state, row):
            objective = lambda row: (lambda b, s: (b.sum(), (b, s)))(*balancer.update(row, state))
            (total, (balanced, state)), effective = jax.value_and_grad(objective, has_aux=True)(row)
            return state, {
                "weights": state.weights,
                "weighted_losses": balanced,
                "total": total,
                "g_losses": effective,
            }

        state, history = jax.lax.scan(step, balancer.init(losses[0]), losses)
        history["base_losses"] = state.base_losses
        for key, value in history.items():
            assert relative_deviation(value, arrays[f"{prefix}_{key}"]) < V1_TOLERANCE, key

    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    @pytest.mark.parametrize("name", oracle_names("f2_igbv1_train_*"))
    def test_training(self, name, optimizer):
        arrays = oracle(name)
        steps = int(arrays["batches_per_epoch"])
        balancer = igb_v1(int(arrays["base_epoch"]) * steps, steps)
        model = getattr(optax, optimizer)(float(arrays[f"lr_{optimizer}"]))
        names = ("trunk_w", "trunk_b", "head_w", "head_b")
        params = {key: jnp.array(arrays[f"init_{key}"]) for key in names}

        def task_losses(params, x, y):
            features = jnp.tanh(x @ params["trunk_w"].T + params["trunk_b"])
            return jnp.mean((features @ params["head_w"].T + params["head_b"] - y) ** 2, axis=0)

        value_and_grad = bilb.value_and_grad(task_losses, balancer)

        def step(carry, batch):
            params, opt_state, state = carry
            losses, gradient, next_state = value_and_grad(params, state, *batch)
            total = balancer.update(losses, state.balancer)[0].sum()
            updates, opt_state = model.update(gradient, opt_state, params)
            record = {"losses": losses, "weights": next_state.balancer.weights, "total": total}
            return (optax.apply_updates(params, updates), opt_state, next_state), record

        batches = (jnp.array(arrays["X"]), jnp.array(arrays["Y"]))
        state = value_and_grad.init(params, *(x[0] for x in batches))
        carry, history = jax.lax.scan(step, (params, model.init(params), state), batches)
        history["base_losses"] = carry[2].balancer.base_losses
        history |= {f"final_{key}": value for key, value in carry[0].items()}
        for key, value in history.items():
            assert relative_deviation(value, arrays[f"{optimizer}_{key}"]) < V1_TOLERANCE, key


def recorded_settings(arrays):
    epoch = int(arrays["train_batch"])
    scale = jnp.array(arrays["reward_scale"])
    return Settings(
        base_start=int(arrays["base_epoch"]) * epoch,
        base_steps=epoch,
        warmup_steps=int(arrays["start_epoch"]) * epoch,
        update_after=int(arrays["update_after"]) * epoch,
        update_every=int(arrays["update_every"]),
        reward_scale=lambda step: scale[step // epoch],
        clip=1e6,
        floor=1e-8,
        agent=sac.Settings(optimizer=optax.adam(float(arrays["sac_lr"]))),
    )


def recorded_draws(arrays, batch_size):
    """Returns the draws of every step, stacked: warm-up, action, and those of 50 updates."""
    steps, num_tasks = arrays["losses"].shape
    warmup, action = np.zeros((2, steps, num_tasks))
    warmup[: len(arrays["warm_randn"])] = arrays["warm_randn"]
    action[len(arrays["warm_randn"]) :] = arrays["act_noise"]
    ends = np.cumsum(arrays["upd_batch"])
    rows = [
        sac.UpdateDraws(*(padded(jnp.array(a[start:end]), batch_size) for a in noise))
        for start, end in zip(ends - arrays["upd_batch"], ends)
        for noise in [
            (
                arrays["upd_idx"].astype(np.int32),
                arrays["upd_noise_next"].astype(float),
                arrays["upd_noise_cur"].astype(float),
            )
        ]
    ]
    updates = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    first = np.cumsum(arrays["n_updates"]) - arrays["n_updates"]
    return jnp.array(warmup), jnp.array(action), jnp.array(first), updates


@pytest.mark.slow
@pytest.mark.x64
def test_recorded_v2():
    arrays = oracle("f2_igbv2_run_K3")
    settings = recorded_settings(arrays)
    losses = jnp.array(arrays["losses"])
    warmup, action, first, updates = recorded_draws(arrays, settings.agent.batch_size)
    template = igb_v2(
        settings.base_start,
        settings.base_steps,
        warmup_steps=settings.warmup_steps,
        update_after=settings.update_after,
        buffer_size=int(arrays["buffer_size"]),
    ).init(losses[0])
    state = template._replace(agent=recorded_agent(arrays, settings.agent, np.log(0.2)))

    def step(state, inputs):
        row, warmup, action, first = inputs
        draw = lambda i, size: jax.tree.map(lambda x: x[first + i], updates)

        def objective(row):
            balanced, new = igb_v2_step(row, state, Draws(warmup, action, draw), settings)
            return balanced.sum(), (balanced, new)

        effective, (balanced, new) = jax.grad(objective, has_aux=True)(row)
        adam = optax.tree.get(new.agent.actor_opt_state, "count")
        return new, {
            "weights": new.weights,
            "weighted_losses": balanced,
            "g_losses": effective,
            "reward": new.buffer.transitions.rewards[new.buffer.pointer - 1],
            "size": new.buffer.size,
            "n_updates": adam - optax.tree.get(state.agent.actor_opt_state, "count"),
            "agent_losses": jnp.stack(new.agent.losses),
        }

    state, history = jax.jit(lambda state, *inputs: jax.lax.scan(step, state, inputs))(
        state, losses, warmup, action, first
    )
    np.testing.assert_array_equal(history["n_updates"], arrays["n_updates"])
    known = ~np.isnan(arrays["reward"])
    np.testing.assert_array_equal(history["size"] > 0, known)
    np.testing.assert_allclose(1 + history["size"] / arrays["buffer_size"], arrays["k"])
    assert state.buffer.pointer == arrays["buf_ptr"]
    assert state.buffer.size == arrays["buf_size"]
    # The official losses of the last of every training's updates.
    last = np.cumsum(arrays["n_updates"])[arrays["n_updates"] > 0] - 1
    recorded_losses = np.stack([arrays[f"upd_{n}_loss"][last] for n in ("q", "a", "alpha")], 1)
    transitions = state.buffer.transitions
    computed = {
        **{key: (history[key], arrays[key]) for key in ("weights", "weighted_losses", "g_losses")},
        "reward": (history["reward"][known], arrays["reward"][known]),
        "agent_losses": (history["agent_losses"][arrays["n_updates"] > 0], recorded_losses),
        "base_losses": (state.base_losses, arrays["base_losses"]),
        "buf_state": (transitions.states, arrays["buf_state"]),
        "buf_action": (transitions.actions, arrays["buf_action"]),
        "buf_reward": (transitions.rewards, arrays["buf_reward"][:, 0]),
        "buf_next_state": (transitions.next_states, arrays["buf_next_state"]),
        "log_alpha": (state.agent.log_temperature, arrays["log_alpha_final"]),
    }
    compared = {key: relative_deviation(*pair) for key, pair in computed.items()}
    parameters = dict(deviations(state.agent, arrays, "final"))
    assert len(parameters) > 10
    compared |= parameters
    beyond = {key: value for key, value in compared.items() if not value < V2_TOLERANCE}
    assert not beyond
