"""The example over a mesh of eight devices, and what its programs move."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
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
from contract import mostly_slow, numbers
from jax.sharding import AxisType, Mesh, NamedSharding
from test_examples import small_problem

import bilb
from bilb import asking

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


few_shards = pytest.mark.parametrize("shards", mostly_slow([1, 2], fast=[1]))
OF_A_KIND = ["bilb4mtl", "si+mgda", "igb_v1+famo", "graddrop"]


@SLOW
@pytest.mark.parametrize(("axis_type", "shards"), [(AxisType.Auto, 2), (AxisType.Explicit, 1)])
@pytest.mark.parametrize("method", OF_A_KIND)
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
    text = lowered.compile().as_text()
    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(program.state.parameters))
    return cost.collectives(text), parameters


@SLOW
def test_the_lists_of_methods_by_what_they_read_are_complete():
    settings = balancers.Settings(1e-3, 0.05, 0, jnp.ones(K), steps=10, steps_per_epoch=5)
    read = {}
    for name, make in balancers.METHODS.items():
        balancer, losses = asking.as_link(make(settings)), jnp.ones(K)
        read[name] = asking.asked(balancer, balancer.init(losses), losses)
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


@pytest.mark.parametrize(
    ("method", "shards"),
    [
        ("bilb4mtl", 1),
        pytest.param("bilb4mtl", 2, marks=SLOW),
        *(pytest.param(m, 1, marks=SLOW) for m in READ_LOSSES if m not in ("ls", "bilb4mtl")),
    ],
)
def test_methods_of_the_first_rung_add_one_reduction_of_k_floats_at_most(method, shards):
    found, plain = collectives(method, shards)[0], collectives("ls", shards)[0]
    assert_adds_reductions(found, plain, 1)


SLOPES = mostly_slow([(method, "exact") for method in READ_SLOPES], [("marigold", "exact")])
SKETCH = pytest.param(("mgda", "sketch"), marks=SLOW)


@few_shards
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


@pytest.mark.slow
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


@few_shards
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
        compiled = lowered.compile()
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
