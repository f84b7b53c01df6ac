"""Checkpoints of the example over a mesh: exact on other devices, and damaged ones told of."""

import shutil

import balancers
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pod
import pytest
from checkpoints import SEAL, Checkpoints
from contract import assert_equal, numbers
from jax.sharding import Mesh, NamedSharding
from methods import METHODS
from test_pod import DEVICES, SLOW, K, options_of, problem

import bilb

pytestmark = pytest.mark.skipif(len(jax.devices()) < DEVICES, reason="needs eight devices")


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


@SLOW
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
        pytest.param(cut_short, "bytes instead of", marks=SLOW),
        pytest.param(lose, "is missing", marks=SLOW),
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


@SLOW
@pytest.mark.parametrize("method", ["bilb4mtl", "igb_v2"])
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
