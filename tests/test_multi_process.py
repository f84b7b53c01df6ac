"""Training in several processes, which talk over the loopback interface, and the death of one."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import multidigits
import numpy as np
import pod
import pytest
from contract import numbers
from jax.sharding import AxisType, Mesh

TESTS = pathlib.Path(__file__).parent
WALL_LIMIT = 300  # seconds, for the processes of a run together; a quiet machine needs some 30
SETTING = ["--method", "marigold", "--steps", "12", "--every", "5"]

#: Trains, and stores what this process holds of the final state. With a step to die at, it waits
#: for the checkpoint before and ends as if killed. The alarm ends it even where it hangs in a
#: library and nobody is left to kill it.
WORKER = f"""
import os, pathlib, signal, sys, time
signal.alarm({WALL_LIMIT + 10})
import jax, multidigits, numpy as np, pod, tyro
from contract import numbers

folder, last = pathlib.Path(sys.argv[1]), int(sys.argv[2])
options = tyro.cli(pod.Options, args=sys.argv[3:])
batches = pod.make_batches

def until_death(*args):
    for step, batch in enumerate(batches(*args), start=args[-1] + 1):
        if step == last:
            while not (options.output / str(options.every)).exists():
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

pod.make_batches = until_death
state = pod.run(options, lambda: multidigits.make_problem(multidigits.Options()))
leaves = [np.asarray(leaf.addressable_data(0)) for leaf in jax.tree.leaves(numbers(state))]
np.savez(folder / f"process_{{jax.process_index()}}.npz", *leaves)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices"),
    pytest.mark.xdist_group("processes"),
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(folder, processes, dies_at=0):
    """Runs so many processes with four devices in all; returns their exit codes and outputs.

    The last of them dies before step ``dies_at``. None outlives the call.
    """
    devices = 4 // processes
    paths = (TESTS.parent, TESTS.parent / "examples", TESTS)
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    arguments = [*SETTING, "--output", str(folder / "checkpoints"), "--timeout", "30"]
    arguments += ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(processes)]
    started = []
    try:
        for i in range(processes):
            dies = str(dies_at if i == processes - 1 else 0)
            command = [sys.executable, "-c", WORKER, str(folder), dies, *arguments]
            command += ["--process", str(i)]
            log = (folder / f"log_{i}").open("w+")
            started.append(
                (subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT), log)
            )
        end = time.monotonic() + WALL_LIMIT
        for process, _ in started:
            process.wait(timeout=max(0.0, end - time.monotonic()))
    finally:
        for process, _ in started:
            process.kill()
            process.wait()
    outputs = []
    for _, log in started:
        log.seek(0)
        outputs.append(log.read())
        log.close()
    return [process.returncode for process, _ in started], outputs


def held(folder, process):
    """Returns the final state as a process stored it."""
    with np.load(folder / f"process_{process}.npz") as arrays:
        return [arrays[name] for name in arrays.files]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Returns the final state of a run in this process, on four devices."""
    options = pod.Options(
        method="marigold", steps=12, every=5, output=tmp_path_factory.mktemp("one")
    )
    devices = np.array(jax.devices()[:4]).reshape(4, 1)
    mesh = Mesh(devices, ("data", "shard"), axis_types=(AxisType.Auto,) * 2)
    state = pod.train(options, multidigits.make_problem(multidigits.Options()), mesh)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(numbers(state))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Returns the folder, the exit codes and the outputs of two processes of two devices each."""
    folder = tmp_path_factory.mktemp("two")
    return folder, *run(folder, 2)


def test_all_processes_hold_the_state_of_a_single_one(undisturbed, expected):
    folder, codes, outputs = undisturbed
    assert codes == [0, 0], outputs
    assert "found 4 cpu devices, 2 of them here" in outputs[0]
    assert "processes: 2" in outputs[0]
    assert "losses" not in outputs[1]
    first = held(folder, 0)
    chex.assert_trees_all_equal(held(folder, 1), first)
    chex.assert_trees_all_close(first, expected, rtol=1e-4, atol=1e-5)


def test_after_the_death_of_a_process_all_go_on_from_the_last_checkpoint(
    tmp_path, undisturbed, expected
):
    (code, died), outputs = run(tmp_path, 2, dies_at=9)
    assert died == -signal.SIGKILL, outputs
    # The other one does not wait for it for ever.
    assert code != 0, outputs
    assert not list(tmp_path.glob("process_*.npz"))
    codes, outputs = run(tmp_path, 2)
    assert codes == [0, 0], outputs
    assert "marigold: from step 5 to 12" in outputs[0]
    resumed = held(tmp_path, 0)
    chex.assert_trees_all_equal(held(tmp_path, 1), resumed)
    chex.assert_trees_all_close(resumed, expected, rtol=1e-4, atol=1e-5)
    # To the last bit as without the death.
    chex.assert_trees_all_equal(held(undisturbed[0], 0), resumed)
