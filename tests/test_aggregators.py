"""What all aggregators have in common, and what each of them is."""

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
from contract import assert_close, assert_equal, assert_finite, jit, mostly_slow, numbers
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bilb
from bilb.gradient_balancing import solvers
from bilb.gradient_balancing.aggregators import graddrop

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

    @jit
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


@every_aggregator
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


@every_aggregator
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


@every_aggregator
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
        actual = jit(trajectory)({})
    else:
        twice = jax.tree.map(lambda h: jnp.stack([h, h / 2]), entry.numeric)
        both = jit(jax.vmap(trajectory))(twice)
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
    gradient, state = jit(injected.update)(rows, state, PARAMS, losses=LOSSES)
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
        update = jit(functools.partial(aggregator.update, losses=LOSSES))
        for seed in range(3):
            gradient, state = update(example_gradients(seed=seed), state)
        return gradient, state

    assert_close(last(scheduled), last(direct))


@every_aggregator
def test_states_can_be_donated(entry):
    aggregator = entry.make()
    update = functools.partial(aggregator.update, losses=LOSSES)
    donating = jit(update, donate_argnums=1)
    state = aggregator.init(PARAMS)
    for _ in range(2):
        gradient, state = donating(example_gradients(), state, PARAMS)
    assert donating._cache_size() == 1
    assert_finite((gradient, state))


BAD_INPUT = {
    "zero row": lambda g: g.at[1].set(0),
    "all 0": jnp.zeros_like,
    "NaN": lambda g: g.at[1].set(jnp.nan),
    "Inf": lambda g: g.at[1].set(jnp.inf),
    "dup": lambda g: g.at[1].set(g[0]),
    "opposite": lambda g: g.at[1].set(-g[0]),
    "x1e-20": lambda g: 1e-20 * g,
    "x1e20": lambda g: 1e20 * g,
    "row x1e20": lambda g: g.at[1].multiply(1e20),
    "row x1e-20": lambda g: g.at[1].multiply(1e-20),
    "bf16": lambda g: g.astype(jnp.bfloat16),
}


def test_bad_input_is_never_a_silent_nan(capsys):
    sequences = {
        name: [jax.tree.map(spoil, example_gradients(seed=seed)) for seed in range(3)]
        for name, spoil in BAD_INPUT.items()
    }

    def after(aggregator, update, steps, *more):
        state = aggregator.init(PARAMS)
        for rows in steps:
            gradient, state = update(rows, state, *more)
        results = [np.asarray(leaf, float) for leaf in jax.tree.leaves(numbers((gradient, state)))]
        if not all(np.isfinite(leaf).all() for leaf in results):
            return "nan"
        return "ok" if any(np.asarray(g).any() for g in jax.tree.leaves(gradient)) else "zero"

    table = {}
    for entry in ENTRIES:
        cells = {name: after(*compiled(entry), steps) for name, steps in sequences.items()}
        single = [example_gradients(1)] * 2
        cells["K=1"] = after(*compiled(entry, 1), single, LOSSES[:1], ALL[:1])
        table[entry.name] = cells
    with capsys.disabled():
        print("\n" + " ".join(f"{name:>11}" for name in ("", *cells)))
        for name, cells in table.items():
            print(" ".join(f"{cell:>11}" for cell in (name, *cells.values())))
    for cells in table.values():
        assert cells == dict.fromkeys(cells, "ok") | {"all 0": "zero"}


@pytest.mark.parametrize("entry", mostly_slow(ENTRIES, ENTRIES[1:2]), ids=str)
def test_calls_outside_jit_compile_their_loops_once(entry, caplog):
    aggregator, rows = entry.make(), example_gradients()
    state = aggregator.init(PARAMS)
    for _ in range(2):
        with jax.log_compiles():
            caplog.clear()
            _, state = aggregator.update(rows, state, PARAMS, losses=LOSSES)
    assert not [message for message in caplog.messages if "XLA compilation" in message]


@every_aggregator
def test_task_specific_leaves_get_sums_and_take_no_part(entry):
    shared = {"matrix": True, "vector": False, "scalar": True}
    mask = ALL.at[0].set(False)
    rows = example_gradients()
    aggregator = entry.make(shared=shared)
    gradient, state = jit(
        lambda rows, state: aggregator.update(rows, state, PARAMS, losses=LOSSES, mask=mask)
    )(rows, aggregator.init(PARAMS))

    only_shared = lambda tree: {name: tree[name] for name in ("matrix", "scalar")}
    alone = entry.make()
    expected, _ = jit(lambda rows, state: alone.update(rows, state, losses=LOSSES, mask=mask))(
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
    gradient, _ = jit(aggregator.update)(rows, aggregator.init(PARAMS), PARAMS)
    assert_close(gradient["vector"], rows["vector"].sum(0))
    with pytest.raises(ValueError, match="'mean'"):
        bilb.excess_mtl(K, heads="mean")


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
    expected = jit(update)(rows, aggregator.init(params))
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
        gradient, new = jit(update)(place(rows, None), state)
    assert jax.tree.map(jax.typeof, gradient) == jax.tree.map(jax.typeof, sharded)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
    assert_close(jax.device_get((gradient, numbers(new))), (expected[0], numbers(expected[1])))


@every_aggregator
def test_task_gradients_need_the_task_axis_in_front(entry):
    aggregator = entry.make()
    state = aggregator.init(PARAMS)
    update = functools.partial(aggregator.update, losses=LOSSES)
    last = jax.tree.map(lambda g: jnp.moveaxis(g, 0, -1), example_gradients())
    message = "leading axis must be the number of tasks"
    for wrong in (PARAMS, last):
        with pytest.raises(ValueError, match=message):
            update(wrong, state, PARAMS)
    with pytest.raises(ValueError, match=message):
        update(example_gradients() | {"vector": jnp.ones((K + 1, 4))}, state)
    with pytest.raises(ValueError, match=r"mask must be bool.*shape \(4,\)"):
        update(example_gradients(), state, PARAMS, mask=ALL[1:])


@pytest.mark.parametrize("entry", reading_losses, ids=str)
def test_missing_or_misshapen_losses_are_named(entry):
    aggregator = entry.make()
    state = aggregator.init(PARAMS)
    with pytest.raises(bilb.MissingArgument, match=f"{entry} needs the extra argument `losses`"):
        aggregator.update(example_gradients(), state, PARAMS)
    with pytest.raises(ValueError, match=r"shape \(4,\) but expected \(5\).*losses must"):
        aggregator.update(example_gradients(), state, PARAMS, losses=LOSSES[1:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bilb.graddrop(leak=1.5), "leak must be .*1.5"),
        (lambda: bilb.trimmed_mean(-1), "trim must be .*-1"),
        (lambda: bilb.db_mtl(0), "num_tasks must be >= 1; got 0"),
        (lambda: bilb.db_mtl(2, decay=1.1), "decay must be .*1.1"),
        (lambda: bilb.db_mtl(2, eps=0.0), "eps must be > 0; got 0"),
        (lambda: bilb.moco(0), "num_tasks must be >= 1; got 0"),
        (lambda: bilb.moco(2, beta=-0.1), "beta must be .*-0.1"),
        (lambda: bilb.moco(2, gamma=-1.0), "gamma must be .*-1"),
        (lambda: bilb.moco(2, gamma_sigma=-1.0), "gamma_sigma must be .*-1"),
        (lambda: bilb.moco(2, scheme="mean"), "scheme must be .*'mean'"),
        (lambda: bilb.excess_mtl(0), "num_tasks must be >= 1; got 0"),
        (lambda: bilb.excess_mtl(2, step_size=0.0), "step_size must be > 0; got 0"),
        (lambda: bilb.excess_mtl(2, warmup_steps=-1), "warmup_steps must be >= 0; got -1"),
    ],
)
def test_hyperparameters_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_leaks_have_an_entry_per_task():
    aggregator = bilb.graddrop(leak=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(3,\) but expected \(5\).*leak must be"):
        aggregator.update(example_gradients(), aggregator.init(PARAMS), PARAMS)


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


def test_graddrop_follows_one_sign_with_the_probability_of_its_share():
    rows = jnp.stack([jnp.full(10_000, 3.0), jnp.full(10_000, -1.0), jnp.full(10_000, 0.5)])
    aggregator = bilb.graddrop(key=5)
    gradient, state = jit(aggregator.update)(rows, aggregator.init(rows[0]))
    up = gradient > 0
    np.testing.assert_allclose(gradient, jnp.where(up, 3.5, -1.0))
    assert abs(up.mean() - 3.5 / 4.5) < 0.015
    other, _ = jit(aggregator.update)(rows, state)
    assert 0.2 < jnp.mean(up == (other > 0)) < 0.75
    assert_close(jit(aggregator.update)(jnp.abs(rows), state)[0], jnp.abs(rows).sum(0))


def test_graddrop_draws_once_per_leaf_and_step():
    rows = {"a": jnp.ones((2, 500)) * jnp.array([[1.0], [-1.0]])}
    rows["b"] = rows["a"]
    aggregator = bilb.graddrop(key=5)
    gradient, _ = jit(aggregator.update)(rows, aggregator.init(rows["a"][0]))
    assert 0.4 < jnp.mean(gradient["a"] == gradient["b"]) < 0.6
    seeds = jax.vmap(lambda seed: bilb.graddrop(seed).init(None).key)(jnp.arange(2))
    one = bilb.graddrop(jax.random.key(5)).init(None).key
    assert_equal(one, bilb.graddrop(5).init(None).key)
    assert seeds[0] != seeds[1]


def test_graddrop_leaks_what_it_drops():
    rows = jnp.array([[1.0, 1.0], [-2.0, -2.0]])
    kept = graddrop.keep_one_sign(rows, jnp.array([0.1, 0.9]), jnp.array([0.5, 0.25]))
    np.testing.assert_allclose(kept, [1 - 0.25 * 2, 0.5 - 2])
    aggregator = bilb.graddrop(leak=1.0)
    gradient, _ = jit(aggregator.update)(rows, aggregator.init(rows[0]))
    np.testing.assert_allclose(gradient, rows.sum(0))


def test_trimmed_mean_without_trimming_is_the_mean():
    rows = example_gradients()
    mean = jax.tree.map(lambda g: g[1:].mean(0), rows)
    aggregator = bilb.trimmed_mean(0)
    gradient, _ = jit(aggregator.update)(rows, aggregator.init(PARAMS), mask=ALL.at[0].set(False))
    assert_close(gradient, mean)


@pytest.mark.parametrize("present", [1, 2, 3, 4])
def test_trimmed_mean_of_too_few_present_tasks_is_their_median(present):
    rows = jax.random.normal(jax.random.key(0), (5, 7))
    aggregator = bilb.trimmed_mean(2)
    gradient, _ = jit(aggregator.update)(rows, optax.EmptyState(), mask=jnp.arange(5) < present)
    np.testing.assert_allclose(gradient, jnp.median(rows[:present], axis=0), rtol=1e-6)


def test_db_mtl_gives_all_tasks_the_largest_norm():
    rows = jnp.eye(3) * jnp.array([[2.0], [30.0], [0.001]])
    losses = jnp.array([1.0, 10.0, 0.01])
    aggregator = bilb.db_mtl(3, decay=0.0)
    gradient, state = jit(aggregator.update)(rows, aggregator.init(rows[0]), losses=losses)
    np.testing.assert_allclose(gradient, [3.0, 3.0, 3.0], rtol=1e-5)
    np.testing.assert_allclose(state.weights, [1.5, 1.0, 30.0], rtol=1e-5)
    gradient, _ = jit(aggregator.update)(rows, state, losses=losses.at[1].set(-1.0))
    np.testing.assert_allclose(gradient, [2.0, 0.0, 2.0], rtol=1e-5)


def test_db_mtl_of_logarithms_is_the_same_without_losses():
    state = bilb.db_mtl(K).init(PARAMS)
    rows = example_gradients()
    logs = jax.tree.map(lambda g: jax.vmap(jnp.divide)(g, LOSSES), rows)
    expected = jit(bilb.db_mtl(K).update)(rows, state, losses=LOSSES)
    assert_close(jit(bilb.db_mtl(K, log=False).update)(logs, state), expected, rtol=1e-5, atol=1e-5)


def test_moco_of_the_paper_ends_at_the_min_norm_weights_of_the_mean_gradients():
    mean = jnp.array([[1.0, 0.0, 0.2], [0.0, 2.0, 0.2], [0.3, 0.5, 0.0]])
    aggregator = bilb.moco(
        3, gamma=1.0, gamma_sigma=0.5, scheme="projection", normalize=False, beta=1.0
    )

    def step(state, key):
        rows = mean + 0.3 * jax.random.normal(key, mean.shape)
        gradient, state = aggregator.update(rows, state)
        return state, gradient

    keys = jax.random.split(jax.random.key(0), 1000)
    state, _ = jit(lambda: jax.lax.scan(step, aggregator.init(mean[0]), keys))()
    weights = solvers.min_norm_weights(mean @ mean.T)
    np.testing.assert_allclose(state.tracked_gradients, mean, atol=0.1)
    np.testing.assert_allclose(state.weights, weights, atol=0.05)
    assert jnp.ptp(weights) > 0.2


def test_moco_scales_gradients_to_the_length_of_their_loss():
    rows, losses = jnp.eye(2) * jnp.array([[5.0], [0.1]]), jnp.array([3.0, 1.0])
    aggregator = bilb.moco(2, beta=1.0, gamma=0.0)
    gradient, state = jit(aggregator.update)(rows, aggregator.init(rows[0]), losses=losses)
    np.testing.assert_allclose(state.tracked_gradients, jnp.diag(losses), rtol=1e-5)
    np.testing.assert_allclose(gradient, losses / 2, rtol=1e-5)


def test_excess_mtl_two_steps_by_hand():
    first, second = np.array([[1.0, 2.0], [4.0, 0.5]]), np.array([[0.5, 0.5], [4.0, 1.0]])
    aggregator = bilb.excess_mtl(2, step_size=0.7)
    state = aggregator.init(jnp.zeros(2))
    gradient, state = jit(aggregator.update)(jnp.asarray(first), state)
    np.testing.assert_allclose(gradient, first.mean(0), rtol=1e-6)
    gradient, state = jit(aggregator.update)(jnp.asarray(second), state)
    excess = (second**2 / np.sqrt(first**2 + second**2)).sum(1)
    weights = np.exp(0.7 * excess / first.sum(1))
    weights /= weights.sum()
    np.testing.assert_allclose(state.weights, weights, rtol=1e-5)
    np.testing.assert_allclose(gradient, weights @ second, rtol=1e-5)


def test_excess_mtl_warms_up_each_task_in_its_own_first_steps():
    aggregator = bilb.excess_mtl(3, step_size=1.0, warmup_steps=2)
    state = aggregator.init(jnp.zeros(1))
    rows = lambda *values: jnp.array(values)[:, None]
    two = jnp.array([True, True, False])
    for _ in range(2):
        gradient, state = jit(aggregator.update)(rows(1.0, 1.0, 9.0), state, mask=two)
        np.testing.assert_allclose(gradient, [1.0])
    np.testing.assert_allclose(state.weights, [0.5, 0.5, 1 / 3], rtol=1e-6)
    assert state.initial_excess[2] == 0
    # The late task neither moves nor lets the others take its part.
    _, state = jit(aggregator.update)(rows(2.0, 0.1, 9.0), state)
    np.testing.assert_allclose(state.weights[2], 1 / 3, rtol=1e-6)
    assert state.weights[0] > state.weights[1]
    np.testing.assert_allclose(state.initial_excess[2], 9.0, rtol=1e-6)
    np.testing.assert_allclose(state.weights.sum(), 1.0, rtol=1e-6)


def test_excess_mtl_keeps_moving_after_a_task_has_lost_all_its_weight():
    aggregator = bilb.excess_mtl(2, step_size=500.0)
    state = aggregator.init(jnp.zeros(1))
    for values in ([1.0, 1.0], [1.0, 0.0]):
        _, state = jit(aggregator.update)(jnp.array(values)[:, None], state)
    assert state.weights[1] == 0
    for _ in range(3):
        _, state = jit(aggregator.update)(jnp.array([[0.0], [1.0]]), state)
    assert state.weights[1] > 0.99
