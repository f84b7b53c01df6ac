"""The example over a mesh of eight devices, what its programs move, and its checkpoints."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import balancers
import chex
import cost
import experiment
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pod
import pytest
from balancers import READ_LOSSES, READ_SLOPES
from checkpoints import SEAL, Checkpoints
from contract import assert_equal, mostly_slow, numbers
from jax.sharding import AxisType, Mesh, NamedSharding
from methods import METHODS
from test_examples import small_problem

import bilb
from bilb import base

DEVICES = 8
SLOW = pytest.mark.slow
NEEDS_LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
K = 5
BENCHMARK = pathlib.Path(pod.__file__).parents[1] / "benchmarks" / "pod_compile.py"

pytestmark = pytest.mark.skipif(len(jax.devices()) < DEVICES, reason="needs eight devices")


@dataclasses.dataclass(frozen=True)
class Task(experiment.Task):
    """One whose cross-entropy is written such that explicit axes take its derivative."""

    def loss(self, output, target):
        if not self.classes:
            return super().loss(output, target)
        return optax.softmax_cross_entropy(output, jax.nn.one_hot(target, self.classes)).mean()


def problem():
    """Five tasks: those of the small problem, and two of them once more."""
    three = small_problem(train_size=48, hidden=(16, 16))
    again = lambda data: data._replace(targets=(*data.targets, *data.targets[1:]))
    tasks = tuple(Task(**vars(task)) for task in (*three.tasks, *three.tasks[1:]))
    return dataclasses.replace(three, tasks=tasks, pool=again(three.pool), test=again(three.test))


def options_of(method, folder="unused", **changes):
    return pod.Options(method=method, batch_size=16, steps=6, every=3, output=folder, **changes)


def one_device():
    axis_types = (AxisType.Auto,) * 2
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "shard"), axis_types)


@functools.cache
def steps(method, mesh, count=4):
    """Returns the last batch, state and losses after some steps, without checkpoints."""
    options, trained = options_of(method), problem()
    program, state = pod.program_of(options, trained, mesh), None
    for batch in pod.make_batches(trained, options, mesh, options.steps - count):
        state, losses = program.step(program.init() if state is None else state, batch)
    return batch, state, losses


OF_A_KIND = ["bilb4mtl", "si+mgda", "igb_v1+famo", "graddrop"]


@pytest.mark.parametrize(
    ("axis_type", "shards"),
    [
        (AxisType.Auto, 2),
        (AxisType.Explicit, 1),
        pytest.param(AxisType.Explicit, 2, marks=SLOW),
        pytest.param(AxisType.Auto, 1, marks=SLOW),
    ],
)
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[SLOW] * (m != "bilb4mtl")) for m in OF_A_KIND]
)
def test_training_on_eight_devices_is_that_on_one(method, axis_type, shards):
    mesh = pod.make_mesh(shards, axis_type)
    batch, state, losses = steps(method, mesh)
    assert batch.inputs.sharding == NamedSharding(mesh, pod.BATCH)
    assert mesh.axis_types == (axis_type, axis_type)
    kernel = state.parameters["params"]["trunk_1"]["kernel"]
    assert kernel.addressable_data(0).size == kernel.size // shards
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state.balance))
    _, expected, expected_losses = steps(method, one_device())
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-3, atol=1e-4)
    close(np.asarray(losses), np.asarray(expected_losses))
    close(*(jax.tree.map(np.asarray, numbers(tree)) for tree in (state, expected)))


@functools.cache
def collectives(method, shards, **changes):
    """Returns the collectives of a step over a mesh, and the bytes of the parameters."""
    options, mesh = options_of(method, **changes), pod.make_mesh(shards)
    program = pod.program_of(options, problem(), mesh)
    placed = NamedSharding(mesh, pod.BATCH)
    rows = lambda array: jax.ShapeDtypeStruct((16, *array.shape[1:]), array.dtype, sharding=placed)
    lowered = program.step.lower(program.state, jax.tree.map(rows, problem().pool))
    text = lowered.compile({"xla_backend_optimization_level": 0}).as_text()
    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(program.state.parameters))
    return cost.collectives(text), parameters


@SLOW
def test_the_lists_of_methods_by_what_they_read_are_complete():
    settings = balancers.Settings(1e-3, 0.05, 0, jnp.ones(K), steps=10, steps_per_epoch=5)
    read = {}
    for name, make in balancers.METHODS.items():
        balancer, losses = base.as_link(make(settings)), jnp.ones(K)
        read[name] = base.asked(balancer, balancer.init(losses), losses)
    of_slopes = {"slopes", "losses_after"}
    assert {name for name, asked in read.items() if not asked} == {*READ_LOSSES, "log", "quarter"}
    assert {name for name, asked in read.items() if asked and asked <= of_slopes} == {*READ_SLOPES}


def assert_adds_reductions(found, plain, at_most, num_tasks=K):
    """Whether there are the collectives of the plain sum and so many reductions of K floats."""
    others = lambda collectives: sorted(c for c in collectives if c.kind != "all-reduce")
    assert others(found) == others(plain)
    (times, size), (plain_times, plain_size) = (cost.moved(c, "all-reduce") for c in (found, plain))
    assert plain_times > 0
    assert times <= plain_times + at_most
    assert size <= plain_size + at_most * 4 * num_tasks


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("method", mostly_slow([m for m in READ_LOSSES if m != "ls"], ["bilb4mtl"]))
def test_methods_of_the_first_rung_add_one_reduction_of_k_floats_at_most(method, shards):
    found, plain = collectives(method, shards)[0], collectives("ls", shards)[0]
    assert_adds_reductions(found, plain, 1)


SLOPES = mostly_slow([(method, "exact") for method in READ_SLOPES], [("marigold", "exact")])
SKETCH = pytest.param(("mgda", "sketch"), marks=SLOW)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("method_and_gram", [*SLOPES, SKETCH], ids="-".join)
def test_slopes_and_sketches_add_two_reductions_of_k_floats_at_most(method_and_gram, shards):
    method, gram = method_and_gram
    found, plain = (
        collectives(method, shards, gram=gram, decay=0.9)[0],
        collectives("ls", shards)[0],
    )
    assert_adds_reductions(found, plain, 2)


@SLOW
def test_without_gathering_the_gradient_of_split_parameters_is_gathered_for_its_slopes():
    gathered, parameters = collectives("marigold", 2)
    found, _ = collectives("marigold", 2, gather=False)
    more = cost.moved(found, "all-gather")[1] - cost.moved(gathered, "all-gather")[1]
    assert 0 < more <= parameters


def test_the_exact_gram_matrix_reduces_every_task_gradient():
    """It needs them whole; and the count of collectives sees what is in a loop."""
    plain, parameters = collectives("ls", 1)
    found, _ = collectives("imtl_g", 1)
    assert cost.moved(found)[1] > cost.moved(plain)[1] + 0.5 * K * parameters
    assert max(c.times for c in found) == K


INTERLEAVED = """
%start (x: bf16[4,8]) -> (bf16[4,8], bf16[64,8]) {
  %all-gather.1 = bf16[64,8]{1,0} all-gather(%x), channel_id=3, replica_groups=[1,16]<=[16]
  ROOT %call = (bf16[4,8], bf16[64,8]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}
%beside (x: bf16[4,8]) -> bf16[64,8] {
  ROOT %all-gather.2 = bf16[64,8]{1,0} all-gather(%x), channel_id=3, replica_groups=[1,16]<=[16]
}
ENTRY %main (x: bf16[4,8]) -> bf16[64,8] {
  %a = (bf16[4,8], bf16[64,8]) fusion(%x), kind=kCustom, calls=%start
  %b = bf16[64,8]{1,0} fusion(%a), kind=kOutput, calls=%beside
  %c = bf16[64,8]{1,0} fusion(%b), kind=kOutput, calls=%beside
  %all-reduce.1 = f32[8]{0} all-reduce(%c), channel_id=3, replica_groups=[1,16]<=[16]
  %all-gather.3 = bf16[64,8]{1,0} all-gather(%x), channel_id=4, replica_groups=[1,16]<=[16]
}
"""  # noqa: E501


def test_a_collective_that_goes_on_beside_computations_counts_once():
    gather = cost.Collective("all-gather", 2 * 64 * 8, 1)
    assert cost.collectives(INTERLEAVED) == [gather, cost.Collective("all-reduce", 32, 1), gather]


@SLOW
def test_losses_after_a_step_are_taken_on_its_own_batch():
    """When the next one begins, and the parameters are whole for its own losses anyway."""
    task_losses = lambda params, x: jnp.mean((jnp.tanh(x @ params) - jnp.arange(K)) ** 2, axis=0)
    driver, optimizer = bilb.value_and_grad(task_losses, bilb.famo()), optax.adam(0.1)
    params, mesh = jnp.ones((4, K)) / 4, pod.make_mesh(4)
    batches = jnp.sin(jnp.arange(3 * 8 * 4.0)).reshape(3, 8, 4)
    program = pod.make_program(driver, optimizer, lambda: params, batches[0], mesh)
    state, opt_state, expected = (
        program.init(),
        optimizer.init(params),
        driver.init(params, batches[0]),
    )
    for batch in batches:
        placed = jax.device_put(batch, NamedSharding(mesh, pod.BATCH))
        state, _ = program.step(state, placed)
        assert state.parameters.addressable_data(0).shape == (1, K)
        _, gradient, expected = driver(params, expected, batch)
        updates, opt_state = optimizer.update(gradient, opt_state)
        params = optax.apply_updates(params, updates)
        close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-5)
        close(np.asarray(state.parameters), np.asarray(params))
        close(*(jax.tree.map(np.asarray, s.balancer) for s in (state.balance, expected)))
        expected = driver.after(params, expected, batch)
    assert jnp.ptp(expected.effective_weights) > 1e-3


@pytest.mark.parametrize("shards", [1, 2])
def test_gram_matrices_at_a_representation_move_what_depends_on_the_tasks_alone(shards):
    """Whatever the trunk: K columns of K floats, and one for the losses."""
    mesh, placed = pod.make_mesh(shards), NamedSharding(pod.make_mesh(shards), pod.BATCH)
    batch = jax.ShapeDtypeStruct((16, 5), jnp.float32, sharding=placed)

    def found(width, method):
        trunk = lambda params, x: jnp.tanh(jnp.tanh(x @ params["in"]) @ params["out"])
        losses = lambda params, z, x: jnp.mean((z @ params["heads"] - x) ** 2, axis=0)
        parameters = lambda: {
            "in": jnp.ones((5, width)),
            "out": jnp.ones((width, 8)),
            "heads": jnp.ones((8, K)),
        }
        driver = bilb.representation_value_and_grad(trunk, losses, method)
        program = pod.make_program(driver, optax.sgd(0.1), parameters, batch, mesh)
        lowered = program.step.lower(program.state, batch)
        compiled = lowered.compile({"xla_backend_optimization_level": 0})
        return cost.moved(cost.collectives(compiled.as_text()))

    methods = bilb.imtl_g(), bilb.linear_scalarization()
    more = [np.subtract(*(found(width, method) for method in methods)) for width in (16, 64)]
    np.testing.assert_array_equal(more[0], more[1])
    times, size = more[0]
    assert K <= times <= K + 1
    assert 4 * K * K <= size <= 4 * K * (K + 1)


def compiled_for_chips(topology, methods, folder, *more):
    """Returns what the benchmark says of these programs, by their names."""
    command = [sys.executable, str(BENCHMARK), "--topology", topology, "--method", *methods]
    subprocess.run([*command, "--output", str(folder), *more], check=True, timeout=1200)
    rows = json.loads((folder / "pod_compile.json").read_text())
    assert {row["chips"] for row in rows} == {256}
    for row in rows:
        row["collectives"] = [cost.Collective(*c) for c in row["collectives"]]
    return {row["method"]: row for row in rows}


@SLOW
@NEEDS_LIBTPU
@pytest.mark.parametrize("topology", ["v5e:16x16", "v5e:16x16/16"])
def test_programs_for_256_chips_move_and_hold_what_they_should(tmp_path, topology):
    methods = [*READ_LOSSES, *READ_SLOPES, "mgda", "mgda-sketch", "mgda-representation"]
    rows = compiled_for_chips(topology, methods, tmp_path)
    assert {*rows} == {*methods}
    peak = {name: row["peak_bytes"] / rows["ls"]["peak_bytes"] for name, row in rows.items()}
    assert peak["bilb4mtl"] <= 1.01
    assert peak["mgda"] <= 2.2
    allowed = dict.fromkeys(READ_LOSSES, 1)
    allowed |= dict.fromkeys((*READ_SLOPES, "mgda-sketch"), 2)
    allowed["mgda-representation"] = 40 + 1
    for name, more in allowed.items():
        found, plain = (rows[of]["collectives"] for of in (name, "ls"))
        assert_adds_reductions(found, plain, more, num_tasks=40)


@SLOW
@NEEDS_LIBTPU
@pytest.mark.parametrize("topology", ["v5e:16x16", "v5e:16x16/16"])
def test_gram_matrices_at_a_representation_move_the_same_whatever_the_trunk(tmp_path, topology):
    """Once for each task K floats, and all else as the plain sum does."""
    for width in ("256", "512"):
        rows = compiled_for_chips(
            topology, ["ls", "mgda-representation"], tmp_path, "--widths", width, width, "128"
        )
        found, plain = (rows[name]["collectives"] for name in ("mgda-representation", "ls"))
        assert [c for c in found if c.times > 1] == [cost.Collective("all-reduce", 4 * 40, 40)]
        assert_adds_reductions(found, plain, 40 + 1, num_tasks=40)


def numbered(shapes):
    """Returns arrays of these shapes and dtypes, keys among them, whose entries all differ."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(rng.integers(99)), leaf.shape)
        values = rng.normal(size=leaf.shape) * 100
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size > 2:
            values.flat[:2] = -0.0, np.nan
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(fill, shapes)


def states(params):
    """Returns the first state of every method, aggregator, training step and driver."""
    task_losses = lambda params, *_: jnp.arange(1.0, K + 1) * params["kernel"].sum()
    settings = balancers.Settings(1e-3, 0.05, 0, jnp.ones(K), steps=10, steps_per_epoch=5)
    made = {method.name: method.make(K).init(jnp.ones(K)) for method in METHODS}
    for name, make in balancers.AGGREGATORS.items():
        made[name] = make(settings, True).init(params)
    optimizer = optax.adam(1e-3)
    for make in (bilb.auto_lambda, bilb.moml, bilb.forum):
        training = make(task_losses, optimizer, inner_learning_rate=0.1)
        made[make.__name__] = training.init(params, ())
    training = bilb.bilb4mtl_double_loop(task_losses, optimizer, inner_optimizer=optimizer)
    made["double_loop"] = training.init(params)
    chained = bilb.chain(bilb.log_losses(), bilb.marigold())
    made["value_and_grad"] = bilb.value_and_grad(task_losses, chained).init(params)
    made["aggregate_by"] = bilb.aggregate_by(chained, K).init(params)
    return made


def whole_state():
    """Returns parameters, Adam's state, and all that :func:`states` does."""
    params = {"kernel": jnp.sin(jnp.arange(96.0)).reshape(16, 6), "bias": jnp.ones(6, jnp.bfloat16)}
    balance = numbered(jax.eval_shape(states, params))
    balance["keys"] = {"threefry": jax.random.key(1), "rbg": jax.random.key(1, impl="rbg")}
    return pod.State(params, numbered(jax.eval_shape(optax.adam(1e-3).init, params)), balance)


def place(state, devices):
    """Returns a state over so many devices, the kernels split over them, and its shapes."""
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(1, devices), ("data", "shard"))
    of = lambda leaf: NamedSharding(mesh, pod.partition(leaf, devices))
    whole = NamedSharding(mesh, pod.WHOLE)
    shardings = jax.tree.map(of, state)._replace(balance=jax.tree.map(lambda _: whole, state[2]))
    placed = lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s)
    return jax.device_put(state, shardings), jax.tree.map(placed, state, shardings)


def bits(tree):
    """Returns every array as bytes: zeros differ in sign, and a NaN equals itself."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), numbers(tree))


def test_checkpoints_are_exact_for_every_method_on_as_many_devices_fewer_and_more(tmp_path):
    whole = whole_state()
    assert {method.name for method in METHODS} <= {*whole.balance}
    dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    for saved, others in ((8, (8, 2)), (1, (8,))):
        state, template = place(whole, saved)
        assert state.parameters["kernel"].is_fully_replicated == (saved == 1)
        with Checkpoints(tmp_path / str(saved), template, {}) as kept:
            assert kept.restore() is None
            kept.save(3, state)
        for devices in others:
            _, template = place(whole, devices)
            with Checkpoints(tmp_path / str(saved), template, {}) as kept:
                step, restored = kept.restore()
            assert step == 3
            chex.assert_trees_all_equal_structs(restored, state)
            assert dtypes(restored) == dtypes(state)
            assert bits(restored) == bits(state)
            kernel = lambda tree: tree.parameters["kernel"].sharding
            assert kernel(restored) == kernel(template)


def counting(value):
    """Returns a state of one vector, and its shape."""
    state = {"count": jnp.full(1000, value) + jnp.arange(1000.0)}
    return place(pod.State(state, {}, {}), 1)


def save(folder, *steps, setting=None):
    template = counting(0)[1]
    with Checkpoints(folder, template, setting or {}) as kept:
        for step in steps:
            kept.save(step, counting(step)[0])


def restore(folder, setting=None):
    with Checkpoints(folder, counting(0)[1], setting or {}) as kept:
        step, state = kept.restore()
    return step, state.parameters["count"][0]


def largest_file(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return max(files, key=lambda path: path.stat().st_size)


def cut_short(folder):
    file = largest_file(folder)
    file.write_bytes(file.read_bytes()[:-100])


def lose(folder):
    largest_file(folder).unlink()


def alter(folder):
    file = largest_file(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def cut_seal(folder):
    seal = folder / "state" / SEAL
    seal.write_bytes(seal.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, "bytes instead of"),
        (lose, "is missing"),
        (alter, "has been altered"),
        (cut_seal, "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_used(
    tmp_path, capsys, spoil, message
):
    save(tmp_path, 1, 2)
    spoil(tmp_path / "2")
    assert restore(tmp_path) == (1, 1.0)
    printed = capsys.readouterr().out
    assert "the checkpoint of step 2 is damaged and not used" in printed
    assert message in printed
    # The run comes to that step again.
    save(tmp_path, 2)
    assert restore(tmp_path) == (2, 2.0)
    for step in (1, 2):
        spoil(tmp_path / str(step))
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        restore(tmp_path)


def test_a_checkpoint_that_was_never_finished_does_not_count(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    (tmp_path / "2.orbax-checkpoint-tmp" / "state" / SEAL).unlink()
    assert restore(tmp_path) == (1, 1.0)


def test_a_checkpoint_of_another_run_is_an_error_that_names_what_differs(tmp_path):
    save(tmp_path, 1, setting={"method": "famo", "steps": 10})
    with pytest.raises(ValueError, match="method is famo there and bilb4mtl here"):
        restore(tmp_path, {"method": "bilb4mtl", "steps": 10})
    assert restore(tmp_path, {"method": "famo", "steps": 10}) == (1, 1.0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: bilb.bilb4mtl().init(jnp.ones(4)),
            r"weights float32\[3\] there and float32\[4\] here",
        ),
        (
            lambda: bilb.famo().init(jnp.ones(3)),
            r"only there .*\.router.*; only here .*\.logits float32\[3\]",
        ),
        (
            lambda: bilb.chain(bilb.log_scale_by_initial_loss(), bilb.bilb4mtl()).init(jnp.ones(3)),
            r"only here .*\.links\[0\]\.initial_losses float32\[3\]",
        ),
        (lambda: bilb.bilb4mtl().init(jnp.ones(3, jnp.float16)), None),
    ],
    ids=["tasks", "method", "chain", "same"],
)
def test_a_state_of_other_tasks_or_links_is_an_error_that_names_them(tmp_path, other, message):
    state_of = lambda balance: place(pod.State({}, {}, balance), 1)
    state, template = state_of(bilb.bilb4mtl().init(jnp.ones(3)))
    with Checkpoints(tmp_path, template, {}) as kept:
        kept.save(1, state)
    with Checkpoints(tmp_path, state_of(other())[1], {}) as kept:
        if message is None:
            assert_equal(kept.restore()[1], state)
        else:
            with pytest.raises(ValueError, match=message):
                kept.restore()


@pytest.mark.parametrize("method", ["bilb4mtl", pytest.param("igb_v2", marks=SLOW)])
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, capsys, method):
    """Its state was donated while it was being written."""
    mesh = pod.make_mesh(2)
    whole = pod.train(options_of(method, tmp_path), problem(), mesh)
    assert "from step 0 to 6" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "6")
    resumed = pod.train(options_of(method, tmp_path), problem(), mesh)
    assert "from step 3 to 6" in capsys.readouterr().out
    assert bits(resumed) == bits(whole)
    # Nothing is left to do.
    again = pod.train(options_of(method, tmp_path), problem(), mesh)
    assert bits(again) == bits(whole)


def test_what_was_found_is_said_at_the_start():
    options, mesh = options_of("ls"), pod.make_mesh(4)
    text = pod.describe(options, mesh, pod.program_of(options, problem(), mesh))
    assert "found 8 cpu devices, 8 of them here; processes: 1" in text
    assert "mesh of 2 x 4, on each device 2 of 16 examples" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "nonsense"], "unknown method 'nonsense'; choose from: ls, si"),
        (["--steps", "0"], "at least 1"),
        (["--processes", "2"], "--coordinator, --processes and --process go together"),
        (["--gram", "sketch"], "give --decay too"),
        (["--shards", "3"], "--shards 3 does not divide the number of devices, 8"),
        (["--batch-size", "12"], "--batch-size 12 is not a multiple of the 8 devices"),
    ],
)
def test_mistakes_are_told_before_any_work(monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["pod.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        pod.main()
    assert message in str(stopped.value.code)
