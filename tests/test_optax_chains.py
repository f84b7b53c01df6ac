"""Aggregators, and loss transformations as aggregators, inside chains of Optax."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import assert_close, assert_finite, mostly_slow, numbers
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bilb

K = 3
TARGETS = jnp.array([1.0, -2.0, 3.0])
INPUTS = jnp.sin(jnp.arange(20.0)).reshape(5, 4)
PARAMS = {
    "trunk": jnp.cos(jnp.arange(24.0)).reshape(4, 6),
    "heads": 0.1 * jnp.sin(jnp.arange(18.0)).reshape(6, K),
}

by_mgda = lambda **more: bilb.aggregate_by(bilb.mgda(), K, **more)
by_logs = lambda **more: bilb.aggregate_by(bilb.log_losses(), K, **more)
AGGREGATORS = {
    "aggregate_by-mgda": by_mgda,
    "aggregate_by-log_losses": by_logs,
    "graddrop": bilb.graddrop,
    "trimmed_mean": functools.partial(bilb.trimmed_mean, 0),
    "db_mtl": functools.partial(bilb.db_mtl, K),
    "moco": functools.partial(bilb.moco, K),
    "excess_mtl": functools.partial(bilb.excess_mtl, K),
}
every_aggregator = pytest.mark.parametrize("make", AGGREGATORS.values(), ids=AGGREGATORS)
mostly_slow_aggregators = pytest.mark.parametrize(
    "make",
    mostly_slow(AGGREGATORS.values(), fast=[by_logs, AGGREGATORS["db_mtl"], AGGREGATORS["moco"]]),
    ids=AGGREGATORS,
)


def task_losses(params, inputs=INPUTS):
    outputs = jnp.tanh(inputs @ params["trunk"]) @ params["heads"]
    return jnp.mean((outputs - TARGETS) ** 2, 0)


LOSSES, ROWS = bilb.task_gradients(task_losses, PARAMS)


def train(optimizer, steps, spoil=lambda step, rows: rows):
    """Returns parameters and state after some steps of one program."""

    @jax.jit
    def step(index, params, state):
        losses, rows = bilb.task_gradients(task_losses, params)
        rows = spoil(index, rows)
        updates, state = optimizer.update(rows, state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for index in range(steps):
        params, state = step(index, params, state)
    assert step._cache_size() == 1
    return params, state


def as_extra_args(wrapper):
    """Returns a wrapper of Optax that is no transformation by type, such as MultiSteps, as one."""
    return optax.GradientTransformationExtraArgs(wrapper.init, wrapper.update)


@mostly_slow_aggregators
def test_first_in_a_chain_with_adam_it_trains(make):
    params, state = train(
        optax.chain(make(), optax.add_decayed_weights(1e-4), optax.adam(0.05)), 30
    )
    assert task_losses(params).sum() < 0.4 * LOSSES.sum()
    chex.assert_trees_all_equal_shapes_and_dtypes(params, PARAMS)
    assert_finite(state)


def test_aggregate_by_in_a_chain_takes_the_steps_of_value_and_grad():
    params, _ = train(optax.chain(by_mgda(), optax.adam(0.05)), 5)
    value_and_grad = bilb.value_and_grad(task_losses, bilb.mgda())
    optimizer = optax.adam(0.05)

    @jax.jit
    def step(params, state, opt_state):
        _, gradient, state = value_and_grad(params, state)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), state, opt_state

    carry = PARAMS, value_and_grad.init(PARAMS), optimizer.init(PARAMS)
    for _ in range(5):
        carry = step(*carry)
    assert_close(params, carry[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_methods_that_look_at_no_loss_need_no_losses():
    state = by_mgda().init(PARAMS)
    without, _ = jax.jit(by_mgda().update)(ROWS, state, PARAMS)
    given, _ = jax.jit(by_mgda().update)(ROWS, state, PARAMS, losses=LOSSES)
    assert_close(without, given)
    logs = bilb.aggregate_by(bilb.chain(bilb.log_losses(), bilb.mgda()), K)
    with pytest.raises(bilb.MissingArgument, match="`losses`"):
        jax.eval_shape(logs.update, ROWS, logs.init(PARAMS), PARAMS)


@pytest.mark.slow
def test_multi_steps_behind_it_accumulates_what_it_returns():
    multi_steps = as_extra_args(optax.MultiSteps(optax.sgd(0.1), 2))
    optimizer = optax.chain(by_mgda(), multi_steps)
    update = jax.jit(functools.partial(optimizer.update, losses=LOSSES))
    aggregate = jax.jit(functools.partial(by_mgda().update, losses=LOSSES))
    state = optimizer.init(PARAMS)
    batches = [ROWS, jax.tree.map(lambda g: g * jnp.cos(g), ROWS)]
    for rows in batches:
        updates, state = update(rows, state, PARAMS)
    both = [aggregate(rows, by_mgda().init(PARAMS), PARAMS)[0] for rows in batches]
    assert_close(updates, jax.tree.map(lambda a, b: -0.1 * (a + b) / 2, *both))


@pytest.mark.slow
def test_multi_steps_around_it_is_an_error_and_can_accumulate_task_gradients():
    multi_steps = as_extra_args(optax.MultiSteps(optax.chain(by_mgda(), optax.sgd(0.1)), 2))
    state = multi_steps.init(PARAMS)
    update = functools.partial(multi_steps.update, losses=LOSSES)
    with pytest.raises(ValueError, match="leading axis must be the number of tasks"):
        jax.eval_shape(update, ROWS, state, PARAMS)
    state = state._replace(acc_grads=optax.tree.zeros_like(ROWS))
    first, state = jax.jit(update)(ROWS, state, PARAMS)
    assert not any(leaf.any() for leaf in jax.tree.leaves(first))
    twice = jax.tree.map(lambda g: 3 * g, ROWS)
    updates, _ = jax.jit(update)(twice, state, PARAMS)
    mean = jax.tree.map(lambda g: 2 * g, ROWS)
    expected, _ = by_mgda().update(mean, by_mgda().init(PARAMS), PARAMS)
    assert_close(updates, jax.tree.map(lambda g: -0.1 * g, expected))


def test_apply_if_finite_behind_it_rejects_a_step_that_is_not_finite():
    spoil = lambda index, rows: rows | {"trunk": jnp.where(index == 1, jnp.nan, rows["trunk"])}
    guarded = lambda: optax.apply_if_finite(optax.adam(0.05), max_consecutive_errors=3)
    params, state = train(optax.chain(by_logs(), guarded()), 3, spoil)
    expected, _ = train(optax.chain(by_logs(), guarded()), 2)
    assert_close(params, expected)
    assert state[1].total_notfinite == 1


def test_apply_if_finite_around_it_is_an_error():
    optimizer = optax.apply_if_finite(optax.chain(by_mgda(), optax.adam(0.05)), 3)
    update = functools.partial(optimizer.update, losses=LOSSES)
    with pytest.raises(TypeError, match="cond branches"):
        jax.eval_shape(update, ROWS, optimizer.init(PARAMS), PARAMS)


@mostly_slow_aggregators
def test_partition_aggregates_each_group_by_itself(make):
    trunk = optax.chain(make(), optax.sgd(0.1))
    heads = optax.chain(bilb.aggregate_by(bilb.linear_scalarization(), K), optax.sgd(1.0))
    labels = {"trunk": "shared", "heads": "own"}
    optimizer = optax.partition({"shared": trunk, "own": heads}, labels)
    update = jax.jit(functools.partial(optimizer.update, losses=LOSSES))
    updates, state = update(ROWS, optimizer.init(PARAMS), PARAMS)
    updates, state = update(ROWS, state, PARAMS)

    only_trunk = lambda tree: {"trunk": tree["trunk"]}
    alone = jax.jit(functools.partial(trunk.update, losses=LOSSES))
    _, alone_state = alone(only_trunk(ROWS), trunk.init(only_trunk(PARAMS)), only_trunk(PARAMS))
    expected, alone_state = alone(only_trunk(ROWS), alone_state, only_trunk(PARAMS))
    assert_close(only_trunk(updates), expected)
    assert_close(updates["heads"], -ROWS["heads"].sum(0))
    pairs = zip(jax.tree.leaves(state.inner_states["shared"]), jax.tree.leaves(alone_state))
    for of_group, by_itself in pairs:
        assert_close(of_group, by_itself)


@every_aggregator
def test_half_precision_parameters_get_half_precision_updates(make):
    half = lambda tree: jax.tree.map(lambda p: p.astype(jnp.bfloat16), tree)
    optimizer = optax.chain(make(), optax.sgd(0.1))
    update = functools.partial(optimizer.update, losses=half(LOSSES))
    state = jax.eval_shape(optimizer.init, half(PARAMS))
    updates, new = jax.eval_shape(update, half(ROWS), state, half(PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, half(PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    weights = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(new)
        if "weights" in jax.tree_util.keystr(path[-1:])
    ]
    assert all(leaf.dtype == jnp.float32 for leaf in weights)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    "make", mostly_slow([by_mgda, by_logs], fast=[by_logs]), ids=["mgda", "logs"]
)
def test_explicitly_sharded_leaves_stay_sharded(make):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    params = {"wide": jnp.ones((4, 16)), "whole": jnp.ones(3)}
    rows = {
        "wide": jnp.sin(jnp.arange(64.0 * K)).reshape(K, 4, 16),
        "whole": jnp.cos(jnp.arange(3.0 * K)).reshape(K, 3),
    }
    optimizer = optax.chain(make(), optax.adam(0.1))
    update = lambda rows, state, params: optimizer.update(rows, state, params, losses=LOSSES)
    expected = jax.jit(update)(rows, optimizer.init(params), params)

    def place(tree, *axes):
        wide = NamedSharding(mesh, PartitionSpec(*axes, None, "data"))
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.device_put(tree, {"wide": wide, "whole": whole})

    with jax.set_mesh(mesh):
        sharded = place(params)
        state = optimizer.init(sharded)
        updates, new = jax.jit(update)(place(rows, None), state, sharded)
    types = functools.partial(jax.tree.map, jax.typeof)
    assert types(updates) == types(sharded)
    assert types(new) == types(state)
    assert_close(jax.device_get((updates, numbers(new))), (expected[0], numbers(expected[1])))


@pytest.mark.slow
def test_what_a_mask_leaves_out_stays_stacked_and_partition_is_the_remedy():
    # Nothing inside of optax.masked can tell; apply_updates would broadcast the parameters.
    trunk_only = {"trunk": True, "heads": False}
    masked = optax.masked(by_mgda(), trunk_only)
    updates, _ = masked.update(ROWS, masked.init(PARAMS), PARAMS)
    assert updates["heads"].shape == (K, *PARAMS["heads"].shape)
    heads_as_sums = by_mgda(shared=trunk_only, heads="sum")
    whole, _ = heads_as_sums.update(ROWS, heads_as_sums.init(PARAMS), PARAMS)
    assert_close(whole["trunk"], updates["trunk"])
    assert_close(whole["heads"], ROWS["heads"].sum(0))


@pytest.mark.slow
def test_the_memory_of_task_gradients_grows_with_the_chunk_and_not_with_the_tasks():
    inputs = jnp.ones((2, 256))

    def task_losses(params, scales):
        features = inputs
        for weights in params:
            features = jnp.tanh(features @ weights)
        return jnp.sin(scales[:, None, None] * features).mean((1, 2))

    weights = jax.ShapeDtypeStruct((256, 256), jnp.float32)

    def temporary(num_tasks, chunk_size):
        gradients = functools.partial(bilb.task_gradients, task_losses, chunk_size=chunk_size)
        lowered = jax.jit(gradients).lower([weights] * 3, jnp.arange(1.0, num_tasks + 1))
        bytes_per_gradient = 3 * 4 * weights.size
        return lowered.compile().memory_analysis().temp_size_in_bytes / bytes_per_gradient

    few, many = ([temporary(num_tasks, chunk) for chunk in (1, 8)] for num_tasks in (16, 64))
    np.testing.assert_allclose(many, few, atol=0.25)
    assert few[0] < 1
    assert 1.5 < few[1] - few[0] < 7
    assert temporary(64, None) - temporary(16, None) > 10
