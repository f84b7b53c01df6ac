"""Aggregators against the recorded numbers of the official codes, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import oracle, oracle_names, relative_deviation

import bilb
from bilb.gradient_balancing.aggregators import graddrop

pytestmark = pytest.mark.x64

AGGREGATIONS = oracle_names("f4_agg_K*")
SEQUENCES = oracle_names("f4_seq_K*")
TOLERANCE = 1e-9
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def cases(name, method):
    """Yields the case, its arrays, and the gradient that the official code made of it."""
    arrays = oracle(name)
    row = list(arrays["g_methods"]).index(method)
    for case in arrays["cases"]:
        of_case = {
            key[len(case) + 1 :]: arrays[key] for key in arrays if key.startswith(f"{case}/")
        }
        assert of_case["status"][len(arrays["w_methods"]) + row] == "ok" or method.startswith(
            "torchjd.TrimmedMean"
        )
        yield case, of_case, of_case["G"][row]


keep_one_sign = jax.jit(graddrop.keep_one_sign)


@pytest.mark.parametrize(
    "method", ["torchjd.GradDrop", "torchjd.GradDrop_leak", "famo_repo.GradDrop_noclip"]
)
@pytest.mark.parametrize("name", AGGREGATIONS)
def test_graddrop(name, method):
    count = 0
    for case, arrays, expected in cases(name, method):
        rows = jnp.asarray(arrays["J"])
        leaks = arrays["leak"] if method.endswith("leak") else np.zeros(len(rows))
        uniform = arrays[f"rand/{method}"]
        actual = keep_one_sign(rows, jnp.asarray(uniform), jnp.asarray(leaks))
        assert relative_deviation(actual, expected) < TOLERANCE, case
        count += 1
    assert count == 21


@pytest.mark.parametrize("trim", [1, 2])
@pytest.mark.parametrize("name", AGGREGATIONS)
def test_trimmed_mean(name, trim):
    aggregator = bilb.trimmed_mean(trim)
    update = jax.jit(lambda rows: aggregator.update(rows, aggregator.init(rows[0]), rows[0])[0])
    for case, arrays, expected in cases(name, f"torchjd.TrimmedMean_{trim}"):
        rows = jnp.asarray(arrays["J"])
        if len(rows) <= 2 * trim:
            assert np.isnan(expected).all()
            with pytest.raises(ValueError, match="leaves nothing"):
                update(rows)
        else:
            assert relative_deviation(update(rows), expected) < TOLERANCE, case


def run(aggregator, arrays):
    """Returns gradients and states of all steps of a recorded sequence."""
    rows, losses = jnp.asarray(arrays["J"]), jnp.asarray(arrays["losses"])

    def step(state, inputs):
        gradient, state = aggregator.update(inputs[0], state, rows[0, 0], losses=inputs[1])
        return state, (gradient, state)

    return jax.lax.scan(step, aggregator.init(rows[0, 0]), (rows, losses))[1]


@pytest.mark.parametrize(
    ("method", "hyperparameters"),
    [("DB_MTL_b0.9_s0", {}), ("DB_MTL_b0.5_s0.5", {"decay": 0.5, "sigma": 0.5})],
)
@pytest.mark.parametrize("name", SEQUENCES)
def test_db_mtl(name, method, hyperparameters):
    arrays = oracle(name)
    gradients, states = run(bilb.db_mtl(arrays["J"].shape[1], **hyperparameters), arrays)
    assert relative_deviation(gradients, arrays[f"libmtl.{method}/g"]) < TOLERANCE
    if not hyperparameters:
        recorded = arrays[f"libmtl.{method}/state"]
        assert relative_deviation(states.mean_gradients, recorded) < TOLERANCE


@pytest.mark.parametrize(
    ("method", "hyperparameters"), [("MoCo_default", {}), ("MoCo_rho0.5", {"rho": 0.5})]
)
@pytest.mark.parametrize("name", SEQUENCES)
def test_moco(name, method, hyperparameters):
    arrays = oracle(name)
    gradients, states = run(bilb.moco(arrays["J"].shape[1], **hyperparameters), arrays)
    assert relative_deviation(gradients, arrays[f"libmtl.{method}/g"]) < TOLERANCE
    assert relative_deviation(states.weights, arrays[f"libmtl.{method}/w"]) < TOLERANCE
    if not hyperparameters:
        recorded = arrays[f"libmtl.{method}/state"]
        assert relative_deviation(states.tracked_gradients, recorded) < TOLERANCE


@pytest.mark.parametrize(
    ("method", "hyperparameters"),
    [
        slow("torchjd.ExcessMTL_s1", {"step_size": 1.0, "warmup_steps": 0}),
        slow("torchjd.ExcessMTL_s0.01", {"warmup_steps": 0}),
        ("torchjd.ExcessMTL_s0.01_warm3", {"warmup_steps": 3}),
        ("libmtl.ExcessMTL_s0.01", {}),
    ],
)
@pytest.mark.parametrize("name", SEQUENCES)
def test_excess_mtl(name, method, hyperparameters):
    arrays = oracle(name)
    num_tasks = arrays["J"].shape[1]
    gradients, states = run(bilb.excess_mtl(num_tasks, **hyperparameters), arrays)
    # LibMTL's weights sum to K.
    scale = num_tasks if method.startswith("libmtl") else 1
    assert relative_deviation(scale * states.weights, arrays[f"{method}/w"]) < TOLERANCE
    if f"{method}/g" in arrays:
        assert relative_deviation(scale * gradients, arrays[f"{method}/g"]) < TOLERANCE


def task_losses(params, x, y):
    hidden = jnp.tanh(x @ params["trunk_w"].T + params["trunk_b"])
    return jnp.mean((hidden @ params["head_w"].T + params["head_b"] - y) ** 2, axis=0)


@pytest.mark.parametrize(
    ("method", "make"),
    [
        slow("DB_MTL_b0.9_s0", bilb.db_mtl),
        slow("DB_MTL_b0.5_s0.5", functools.partial(bilb.db_mtl, decay=0.5, sigma=0.5)),
        slow("MoCo_default", bilb.moco),
        ("MoCo_rho0.5", functools.partial(bilb.moco, rho=0.5)),
        ("ExcessMTL_s0.01", bilb.excess_mtl),
    ],
)
@pytest.mark.parametrize("name", ["f3_traj_K3", slow("f3_traj_K5")])
def test_trains_a_model_with_task_specific_heads_as_recorded(name, method, make):
    arrays = oracle(name)
    recorded = {key: arrays[f"libmtl.{method}/{key}"] for key in ("losses", "trunk_grad")}
    leaves = ("trunk_w", "trunk_b", "head_w", "head_b")
    params = {leaf: jnp.asarray(arrays[f"init_{leaf}"]) for leaf in leaves}
    num_tasks, steps = arrays["Y"].shape[-1], len(recorded["losses"])
    aggregator = make(num_tasks, shared={leaf: leaf.startswith("trunk") for leaf in leaves})
    # LibMTL's ExcessMTL weights sum to K.
    scale = num_tasks if method.startswith("Excess") else 1
    optimizer = optax.chain(optax.scale(scale), optax.adam(float(arrays["model_lr"])))

    def step(carry, batch):
        params, state, opt_state = carry
        losses, rows = bilb.task_gradients(task_losses, params, *batch)
        gradient, state = aggregator.update(rows, state, params, losses=losses)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        trunk = scale * jnp.append(gradient["trunk_w"].ravel(), gradient["trunk_b"])
        return (optax.apply_updates(params, updates), state, opt_state), (losses, trunk)

    batches = jnp.asarray(arrays["X"][:steps]), jnp.asarray(arrays["Y"][:steps])
    carry = params, aggregator.init(params), optimizer.init(params)
    (params, _, _), (losses, trunk) = jax.jit(lambda: jax.lax.scan(step, carry, batches))()
    assert relative_deviation(losses, recorded["losses"]) < TOLERANCE
    for leaf in leaves:
        final = arrays[f"libmtl.{method}/final_{leaf}"]
        assert relative_deviation(params[leaf], final) < TOLERANCE, leaf
    picked = trunk[arrays[f"libmtl.{method}/trunk_grad_steps"]]
    assert relative_deviation(picked, recorded["trunk_grad"]) < TOLERANCE
