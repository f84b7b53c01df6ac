"""What all tests share: recorded numbers, eight virtual devices, float64 on request, examples.

The recorded numbers lie in ``tests/data``; where the environment variable BILB_ORACLES names a
folder, they come from there instead, and none of them may be missing. Where BILB_OPTIMIZE is set,
programs are optimised as users' are, and take two to four times as long to compile.
"""

import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import os
import pathlib
import subprocess
import sys

# Before anything imports jax. Most of what the tests do is to compile, and their programs are too
# small to optimise or to divide among threads; the older emitters of loops are faster still where
# there is a choice. The user's own flags come last and win.
os.environ["XLA_FLAGS"] = " ".join(
    flag
    for flag, used in {
        "--xla_force_host_platform_device_count=8": True,
        "--xla_cpu_parallel_codegen_split_count=1": True,
        "--xla_backend_optimization_level=0": not os.environ.get("BILB_OPTIMIZE"),
        "--xla_cpu_use_fusion_emitters=false": not os.environ.get("BILB_OPTIMIZE")
        and importlib.metadata.version("jaxlib").startswith("0.10."),
        os.environ.get("XLA_FLAGS", ""): True,
    }.items()
    if used
)
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
# JAX solves linear systems by OpenBLAS, whose threads wait for each other: a test of 7 seconds took
# 39 with two of them, and 287 when two workers on two cores did so at once.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jax
import numpy as np
import pytest
from contract import Method

# What tracing leaves behind is seldom garbage: a tenth of the time went to looking for some.
gc.set_threshold(100_000, 50, 100)

hypothesis.settings.register_profile("same examples", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same examples")

TESTS = pathlib.Path(__file__).parent
ORACLES = pathlib.Path(os.environ.get("BILB_ORACLES") or TESTS / "data")

# The examples import their neighbours the way scripts do, and so do the benchmarks. Those come
# last: a name in both folders is that of the example, and load_benchmark is for the other.
sys.path.insert(0, str(TESTS.parent / "examples"))
sys.path.append(str(TESTS.parent / "benchmarks"))


def load_benchmark(name):
    """Imports a benchmark under a name of its own, as examples or tests may have the same."""
    path = TESTS.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def help_of(script):
    """Returns what a script prints when it is asked for help."""
    process = subprocess.run(
        [sys.executable, script, "--help"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "PYTHONIOENCODING": "utf-8"},
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keeps the tests of one method on one worker, so that they share its compiled programs."""
    for item in items:
        method = getattr(item, "callspec", None) and item.callspec.params.get("method")
        if isinstance(method, Method):
            item.add_marker(pytest.mark.xdist_group(method.name))
            if method.kin or method.slow:
                item.add_marker(pytest.mark.slow)


_tests_run = itertools.count(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Runs a test marked ``x64``, all its fixtures included, in float64.

    Now and then it drops what was compiled: JAX 0.10 remembers 8,192 calls, those within code that
    is not compiled among them, and beyond them nothing compiled later could be counted.
    """
    if next(_tests_run) % 300 == 0:
        jax.clear_caches()
    if item.get_closest_marker("x64") is None:
        return (yield)
    with jax.enable_x64(True):
        return (yield)


def oracle_names(pattern):
    """Returns the names, without suffix, of the recorded files that match, for parametrisation.

    Tests on files beyond the small copy are slow ones.
    """
    names = sorted(path.stem for path in ORACLES.glob(f"{pattern}.npz"))
    if not names:
        raise FileNotFoundError(f"no {pattern}.npz in {ORACLES}")
    marks = lambda name: [] if (TESTS / "data" / f"{name}.npz").exists() else [pytest.mark.slow]
    return [pytest.param(name, marks=marks(name)) for name in names]


@functools.cache
def oracle(name):
    """Returns the arrays of a recorded file, or skips the test if the small copy lacks it."""
    path = ORACLES / f"{name}.npz"
    if not path.exists() and not os.environ.get("BILB_ORACLES"):
        pytest.skip(f"{path.name} is not in tests/data; set BILB_ORACLES to a folder with it")
    with np.load(path) as arrays:
        return dict(arrays)


def relative_deviation(actual, desired):
    """Returns max |actual - desired| / max |desired|, over whole arrays."""
    actual, desired = np.asarray(actual), np.asarray(desired)
    assert actual.shape == desired.shape, f"shapes {actual.shape} and {desired.shape}"
    deviation, size = np.abs(actual - desired).max(), np.abs(desired).max()
    return deviation / size if size else deviation
