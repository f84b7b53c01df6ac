"""What all aggregators have in common."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import assert_close, assert_equal, assert_finite, mostly_slow, numbers
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bilb

K = 5
PARAMS = {"matrix": jnp.ones((3, 2)), "vector": jnp.ones(4), "scalar": jnp.ones(())}
LOSSES = jnp.array([0.5, 2.0, 1.0, 30.0, 0.1])
ALL = jnp.ones(K, bool)


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """An aggregator under test.

    Attributes:
        name: the test id.
        factory: ``(num_tasks, **hyperparameters) -> aggregator``.
        numeric: hyperparameters to inject and to vmap over.
        static_args: the documented static arguments of ``optax.inject_hyperparams``.
    """

    name: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    numeric: dict[str, Any] = dataclasses.field(default_factory=dict)
    static_args: tuple[str, ...] = ()

    def __str__(self):
        return self.name

    def make(self, num_tasks=K, **more):
        return self.factory(num_tasks, **self.numeric, **more)


ENTRIES = [
    Entry("graddrop", lambda num_tasks, **more: bilb.graddrop(key=3, **more), {"leak": 0.25}),
    Entry("trimmed_mean", lambda num_tasks, **more: bilb.trimmed_mean(int(num_tasks > 2), **more)),
    Entry("db_mtl", bilb.db_mtl, {"decay": 0.6, "sigma": 0.2}, ("log", "num_tasks")),
    Entry("moco", bilb.moco, {"beta": 0.4, "gamma": 0.2, "rho": 0.1}, ("normalize", "num_tasks")),
    Entry(
        "moco-paper",
        lambda num_tasks, **more: bilb.moco(
            num_tasks, scheme="projection", normalize=False, **more
        ),
        {"gamma": 0.05},
    ),
    Entry("excess_mtl", bilb.excess_mtl, {"step_size": 0.5, "warmup_steps": 1}, ("num_tasks",)),
]
every_aggregator = pytest.mark.parametrize("entry", ENTRIES, ids=str)
some_fast = [entry for entry in ENTRIES if entry.name == "excess_mtl"]
mostly_slow_aggregators = pytest.mark.parametrize("entry", mostly_slow(ENTRIES, some_fast), ids=str)
reading_losses = [entry for entry in ENTRIES if entry.name in ("db_mtl", "moco")]


@functools.cache
def example_gradients(num_tasks=K, seed=0):
    """Returns task gradients of different sizes."""
    random = np.random.default_rng(seed)
    sizes = 2.0 ** np.arange(num_tasks)
    rows = lambda p: sizes.reshape(-1, *(1,) * p.ndim) * random.normal(size=(num_tasks, *p.shape))
    return jax.tree.map(lambda p: jnp.asarray(rows(p), jnp.float32), PARAMS)


@functools.cache
def compiled(entry, num_tasks=K):
    """Returns the aggregator and its jitted update, shared by tests."""
    aggregator = entry.make(num_tasks)

    @jax.jit
    def update(rows, state, losses=LOSSES, mask=ALL):
        return aggregator.update(rows, state, PARAMS, losses=losses, mask=mask)

    return aggregator, update


@functools.cache
def after_two_steps(entry):
    aggregator, update = compiled(entry)
    state = aggregator.init(PARAMS)
    for seed in (1, 2):
        _, state = update(example_gradients(seed=seed), state)
    return state


def task_axes(entry):
    """Returns for every leaf of the state whether it has an axis of tasks in front."""
    shapes = lambda k: jax.eval_shape(entry.make(k).init, PARAMS)
    return jax.tree.map(lambda a, b: a.shape != b.shape, shapes(K), shapes(K + 1))


def take(entry, state, tasks):
    return jax.tree.map(lambda of_tasks, x: x[tasks] if of_tasks else x, task_axes(entry), state)


@every_aggregator
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_and_shapes_are_those_of_the_gradients_and_the_state_is_stable(entry, dtype):
    check_types(entry, dtype, jnp.float32)


@pytest.mark.x64
@every_aggregator
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtypes_are_kept_in_float64(entry, dtype):
    check_types(entry, dtype, jnp.promote_types(dtype, jnp.float32))


def check_types(entry, dtype, wide):
    aggregator = entry.make()
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    state = jax.eval_shape(aggregator.init, params)
    assert all(leaf.dtype == wide for leaf in jax.tree.leaves(state) if is_float(leaf))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    rows = jax.tree.map(lambda p: jax.ShapeDtypeStruct((K, *p.shape), dtype), params)
    for losses in (LOSSES.astype(dtype), LOSSES.astype(jnp.float32)):
        update = functools.partial(aggregator.update, losses=losses, mask=ALL)
        gradient, new = jax.eval_shape(update, rows, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves((gradient, new)))


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


@mostly_slow_aggregators
def test_half_precision_rounds_only_what_comes_out(entry):
    half = jax.tree.map(lambda g: g.astype(jnp.bfloat16), example_gradients())
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), half)
    _, update = compiled(entry)
    state = after_two_steps(entry)
    gradient, new = update(half, state)
    expected, expected_state = update(wide, state)
    rounded = jax.tree.map(lambda g: g.astype(jnp.bfloat16), expected)
    chex.assert_trees_all_close(gradient, rounded, rtol=2**-7, atol=1e-6)
    assert_close(new, expected_state, rtol=1e-4, atol=1e-5)


@mostly_slow_aggregators
def test_absent_tasks_are_as_if_they_did_not_exist_and_learn_nothing(entry):
    tasks = jnp.array([0, 2, 3])
    mask = jnp.zeros(K, bool).at[tasks].set(True)
    rows, losses, state = example_gradients(), LOSSES, after_two_steps(entry)
    rows = jax.tree.map(lambda g: g.at[1].set(jnp.nan).at[4].set(jnp.inf), rows)
    gradient, new = compiled(entry)[1](rows, state, losses.at[1].set(jnp.nan), mask)

    present = jax.tree.map(lambda g: g[tasks], rows)
    fewer = take(entry, state, tasks)
    expected, expected_state = compiled(entry, 3)[1](
        present, fewer, losses[tasks], jnp.ones(3, bool)
    )
    assert_close(gradient, expected)
    assert_close(take(entry, new, tasks), expected_state)
    absent = jnp.array([1, 4])
    of_tasks = lambda state: [
        leaf
        for leaf, per_task in zip(jax.tree.leaves(state), jax.tree.leaves(task_axes(entry)))
        if per_task
    ]
    assert_equal(of_tasks(take(entry, new, absent)), of_tasks(take(entry, state, absent)))


@every_aggregator
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_gradient_with_a_nonfinite_entry_is_that_of_an_absent_task(entry, value):
    state, update = after_two_steps(entry), compiled(entry)[1]
    rows = example_gradients()
    spoilt = rows | {"vector": rows["vector"].at[1, 2].set(value)}
    expected = update(rows, state, LOSSES, ALL.at[1].set(False))
    assert_equal(update(spoilt, state), expected)
    if entry in reading_losses:
        assert_equal(update(rows, state, LOSSES.at[1].set(value)), expected)


@every_aggregator
def test_without_any_task_the_gradient_is_zero_and_training_comes_back(entry):
    state, update = after_two_steps(entry), compiled(entry)[1]
    gradient, new = update(example_gradients(), state, LOSSES, ~ALL)
    assert_equal(gradient, jax.tree.map(jnp.zeros_like, PARAMS))
    per_task = task_axes(entry)
    for same, old, kept in zip(*map(jax.tree.leaves, (new, state, per_task))):
        if kept:
            assert_equal(same, old)
    back, _ = update(example_gradients(), new)
    assert_finite(back)
    assert optax.tree.norm(back) > 0


@every_aggregator
def test_permuting_the_tasks_changes_nothing(entry):
    order = jnp.array([3, 0, 4, 1, 2])
    state, update = after_two_steps(entry), compiled(entry)[1]
    rows = example_gradients()
    gradient, new = update(rows, state)
    permuted = jax.tree.map(lambda g: g[order], rows)
    again, permuted_state = update(permuted, take(entry, state, order), LOSSES[order])
    assert_close(again, gradient, rtol=1e-4, atol=1e-4)
    assert_close(permuted_state, take(entry, new, order), rtol=1e-4, atol=1e-4)


@mostly_slow_aggregators
def test_steps_under_scan_and_vmap_are_the_steps_one_by_one(entry):
    aggregator, update = compiled(entry)
    steps = [example_gradients(seed=seed) for seed in range(3)]
    state = aggregator.init(PARAMS)
    programs = set()
    for rows in steps:
        gradient, state = update(rows, state)
        programs.add(update._cache_size())
    assert len(programs) == 1  # no step after the first compiles anew

    def trajectory(numeric):
        aggregator = entry.factory(K, **numeric)

        def step(state, rows):
            gradient, state = aggregator.update(rows, state, PARAMS, losses=LOSSES)
            return state, gradient

        state, gradients = jax.lax.scan(
            step, aggregator.init(PARAMS), jax.tree.map(lambda *rows: jnp.stack(rows), *steps)
        )
        return jax.tree.map(lambda g: g[-1], gradients), state

    if not entry.numeric:
        actual = jax.jit(trajectory)({})
    else:
        twice = jax.tree.map(lambda h: jnp.stack([h, h / 2]), entry.numeric)
        both = jax.jit(jax.vmap(trajectory))(twice)
        assert_finite(both)
        actual = jax.tree.map(lambda x: x[0], both)
    assert_close(actual, (gradient, state), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.static_args], ids=str)
def test_injected_hyperparameters_equal_the_direct_call(entry):
    injected = optax.inject_hyperparams(
        entry.factory, static_args=entry.static_args, hyperparam_dtype=jnp.float32
    )(num_tasks=K, **entry.numeric)
    rows = example_gradients()
    state = injected.init(PARAMS)
    gradient, state = jax.jit(injected.update)(rows, state, PARAMS, losses=LOSSES)
    aggregator, update = compiled(entry)
    expected, expected_state = update(rows, aggregator.init(PARAMS))
    assert set(entry.numeric) <= set(state.hyperparams)
    assert_close((gradient, state.inner_state), (expected, expected_state))


@pytest.mark.parametrize(
    ("direct", "scheduled"),
    [
        (
            bilb.db_mtl(K, decay=0.5, sigma=0.5),
            bilb.db_mtl(K, decay=lambda step: 0.5 / (step + 1) ** 0.5),
        ),
        (bilb.moco(K), bilb.moco(K, beta=lambda step: 0.5 / (step + 1) ** 0.5, beta_sigma=0.0)),
        (bilb.excess_mtl(K), bilb.excess_mtl(K, step_size=optax.constant_schedule(0.01))),
    ],
    ids=["db_mtl", "moco", "excess_mtl"],
)
def test_schedules_count_the_steps(direct, scheduled):
    def last(aggregator):
        state = aggregator.init(PARAMS)
        update = jax.jit(functools.partial(aggregator.update, losses=LOSSES))
        for seed in range(3):
            gradient, state = update(example_gradients(seed=seed), state)
        return gradient, state

    assert_close(last(scheduled), last(direct))


@pytest.mark.slow
@every_aggregator
def test_states_can_be_donated(entry):
    aggregator = entry.make()
    update = functools.partial(aggregator.update, losses=LOSSES)
    donating = jax.jit(update, donate_argnums=1)
    state = aggregator.init(PARAMS)
    for _ in range(2):
        gradient, state = donating(example_gradients(), state, PARAMS)
    assert donating._cache_size() == 1
    assert_finite((gradient, state))


@pytest.mark.parametrize("entry", mostly_slow(ENTRIES, ENTRIES[1:2]), ids=str)
def test_calls_outside_jit_compile_their_loops_once(entry, caplog):
    aggregator, rows = entry.make(), example_gradients()
    state = aggregator.init(PARAMS)
    for _ in range(2):
        with jax.log_compiles():
            caplog.clear()
            _, state = aggregator.update(rows, state, PARAMS, losses=LOSSES)
    assert not [message for message in caplog.messages if "XLA compilation" in message]


@mostly_slow_aggregators
def test_task_specific_leaves_get_sums_and_take_no_part(entry):
    shared = {"matrix": True, "vector": False, "scalar": True}
    mask = ALL.at[0].set(False)
    rows = example_gradients()
    aggregator = entry.make(shared=shared)
    gradient, state = jax.jit(
        lambda rows, state: aggregator.update(rows, state, PARAMS, losses=LOSSES, mask=mask)
    )(rows, aggregator.init(PARAMS))

    only_shared = lambda tree: {name: tree[name] for name in ("matrix", "scalar")}
    alone = entry.make()
    expected, _ = jax.jit(lambda rows, state: alone.update(rows, state, losses=LOSSES, mask=mask))(
        only_shared(rows), alone.init(only_shared(PARAMS))
    )
    assert_close(only_shared(gradient), expected)

    weights = mask.astype(float)
    if entry.name == "db_mtl":
        weights = mask / LOSSES
    if entry.name == "excess_mtl":
        weights = mask * state.weights
    assert_close(gradient["vector"], weights @ rows["vector"])
    kept = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim > 1 or leaf.size > K)
    assert kept <= K * sum(leaf.size for leaf in jax.tree.leaves(only_shared(PARAMS)))


def test_excess_mtl_can_sum_the_heads():
    shared = {"matrix": True, "vector": False, "scalar": True}
    aggregator = bilb.excess_mtl(K, shared=shared, heads="sum")
    rows = example_gradients()
    gradient, _ = jax.jit(aggregator.update)(rows, aggregator.init(PARAMS), PARAMS)
    assert_close(gradient["vector"], rows["vector"].sum(0))
    with pytest.raises(ValueError, match="'mean'"):
        bilb.excess_mtl(K, heads="mean")


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@every_aggregator
def test_explicitly_sharded_leaves_stay_sharded(entry):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    params = {"wide": jnp.ones((4, 16)), "whole": jnp.ones(3)}
    rows = {
        "wide": jnp.sin(jnp.arange(64.0 * K)).reshape(K, 4, 16),
        "whole": jnp.cos(jnp.arange(3.0 * K)).reshape(K, 3),
    }
    aggregator = entry.make()
    update = lambda rows, state: aggregator.update(rows, state, losses=LOSSES)
    expected = jax.jit(update)(rows, aggregator.init(params))
    place = lambda tree, *axes: jax.device_put(
        tree,
        {
            "wide": NamedSharding(mesh, PartitionSpec(*axes, None, "data")),
            "whole": NamedSharding(mesh, PartitionSpec()),
        },
    )
    with jax.set_mesh(mesh):
        sharded = place(params)
        state = aggregator.init(sharded)
        gradient, new = jax.jit(update)(place(rows, None), state)
    assert jax.tree.map(jax.typeof, gradient) == jax.tree.map(jax.typeof, sharded)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
    assert_close(jax.device_get((gradient, numbers(new))), (expected[0], numbers(expected[1])))


@jax.tree_util.register_pytree_node_class
class Model:
    """A pytree without an equality of its own."""

    def __init__(self, weights):
        self.weights = weights

    def tree_flatten(self):
        return (self.weights,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_parameters_may_be_any_pytree():
    aggregator = bilb.trimmed_mean(0)
    gradient, _ = aggregator.update(
        Model(jnp.eye(2)), aggregator.init(Model(0)), Model(jnp.ones(2))
    )
    np.testing.assert_allclose(gradient.weights, [0.5, 0.5])
    with pytest.raises(ValueError, match="leading axis"):
        aggregator.update(Model(jnp.eye(2)), aggregator.init(Model(0)), Model(jnp.ones(3)))


# What each of them is.
