"""What a training step costs on TPU pods, read off programs compiled on a machine without a TPU.

Compiles the step of examples/pod.py, on a multi-layer perceptron with K heads, for TPU topologies
of up to thousands of chips, and prints for each method what one chip does: flops, the peak of its
memory, and every exchange of data with the others.

* ls: the plain sum of the losses, what all else is compared with
* the other methods that read losses, from si to self_adaptive, and those that take slopes, from
  marigold to famo
* mgda, which reads the Gram matrix: exact, sketched with one probe, at the representation that the
  heads share, or (jacrev) from all task gradients at once

Nothing is executed: there are no times and no numbers. XLA counts a loop as one pass of its body in
its flops, which are too low for igb_v2, mgda, its sketch and mgda-representation; collectives are
counted in full. The peak of the memory includes what lies in a chip's vector memory. A program that
cannot be compiled is listed with its error.

    pip install 'bilb[tpu]'                                     # libtpu, about 200 MB
    python benchmarks/pod_compile.py
    python benchmarks/pod_compile.py --topology v5e:16x16 --method ls bilb4mtl
    python benchmarks/pod_compile.py --topology v5e:16x16/16    # parameters split among 16 chips
    python benchmarks/pod_compile.py --topology v5e:4x4*2       # two slices
"""

from __future__ import annotations

import os

# Before anything imports jax. Nothing may ask the network for a TPU, and two runs must not collide.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import collections
import dataclasses
import importlib.metadata
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import balancers
import cost
import experiment
import pod
from balancers import READ_LOSSES, READ_SLOPES

import bilb

#: Methods of the examples, with the way to take Gram matrices.
PROGRAMS = {
    **{method: (method, "exact") for method in (*READ_LOSSES, *READ_SLOPES, "mgda")},
    **{f"mgda-{gram}": ("mgda", gram) for gram in ("sketch", "representation", "jacrev")},
}
TOPOLOGIES = ("v5e:2x4", "v5e:16x16", "v5e:16x16/16", "v6e:16x16", "v5p:8x16x16", "v5e:16x16*2")


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles training steps for TPU topologies and prints what they cost."""

    topology: tuple[str, ...] = TOPOLOGIES
    """TPU topologies; v5e:4x4*2 is two slices of v5e:4x4, and v5e:4x4/2 has the parameters split
    among two chips."""
    method: tuple[str, ...] = tuple(PROGRAMS)
    """The programs."""
    num_tasks: int = 40
    """K."""
    widths: tuple[int, ...] = (512, 512, 512)
    """Of the trunk's layers."""
    batch: int = 32
    """Examples per chip."""
    gather: bool = True
    """Gather split parameters once a step, as the option of examples/pod.py says."""
    output: Path = Path("outputs/pod_compile")
    """Folder for the table and its numbers."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What one program costs each chip."""

    topology: str
    chips: int
    method: str
    flops: float
    peak_bytes: int
    collectives: tuple[cost.Collective, ...]
    seconds: float  # to compile


@dataclasses.dataclass(frozen=True)
class Failure:
    """A program that could not be compiled."""

    topology: str
    method: str
    error: str


def make_mesh(name: str) -> Mesh:
    """Returns the chips of a topology as (data, shard), slices one after the other."""
    form = re.fullmatch(r"([^*/]+)(?:\*(\d+))?(?:/(\d+))?", name)
    if not form:
        raise ValueError(f"a topology is like v5e:4x4, v5e:4x4*2 or v5e:4x4/2; got {name}")
    layout, slices, shards = form.groups(1)
    description = topologies.get_topology_desc(
        platform="tpu", topology_name=layout, num_slices=int(slices)
    )
    shape = (len(description.devices) // int(shards), int(shards))
    axes = ("data", "shard")
    if slices == 1:
        return topologies.make_mesh(description, shape, axes)
    chips = sorted(description.devices, key=lambda chip: (chip.slice_index, chip.id))
    return Mesh(np.array(chips).reshape(shape), axes, axis_types=(AxisType.Auto,) * 2)


def make_program(name: str, options: Options, mesh: Mesh) -> tuple[pod.Program, Any]:
    """Returns the training over a mesh, and the shapes of a batch."""
    method, gram = PROGRAMS[name]
    trunk = cost.Trunk(options.widths, options.batch * mesh.size, inputs=128)
    settings = balancers.Settings(
        learning_rate=1e-3,
        penalty=0.05,
        seed=0,
        selection=np.ones(options.num_tasks),
        steps=1_000,
        steps_per_epoch=100,
        decay=0.99 if gram == "sketch" else 0.0,
    )
    task_losses = lambda params, batch: trunk.task_losses(params, *batch)[0]
    balancer = balancers.make(method, settings)
    if gram == "jacrev":
        aggregator = bilb.aggregate_by(balancer, options.num_tasks)
        driver = experiment.Aggregated(task_losses, bilb.linear_scalarization(), aggregator)
    elif gram == "representation":
        driver = bilb.representation_value_and_grad(
            lambda params, batch: trunk.features(params, batch[0]),
            lambda params, features, batch: trunk.heads_losses(params, features, batch[1]),
            balancer,
        )
    else:
        driver = bilb.value_and_grad(task_losses, balancer, gram=balancers.GRAMS[gram](settings))
    split = NamedSharding(mesh, pod.BATCH)
    batch = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=split),
        jax.eval_shape(lambda: trunk.examples(options.num_tasks)),
    )
    parameters = lambda: trunk.params(options.num_tasks)
    optimizer = optax.adamw(1e-3)
    return pod.make_program(driver, optimizer, parameters, batch, mesh, options.gather), batch


def measure(topology: str, method: str, options: Options) -> Row:
    mesh = make_mesh(topology)
    program, batch = make_program(method, options, mesh)
    start = time.perf_counter()
    compiled = program.step.lower(program.state, batch).compile()
    return Row(
        topology=topology,
        chips=mesh.size,
        method=method,
        flops=compiled.cost_analysis()["flops"],
        peak_bytes=compiled.memory_analysis().peak_memory_in_bytes,
        collectives=tuple(cost.collectives(compiled.as_text())),
        seconds=time.perf_counter() - start,
    )


def exchanges(collectives: Sequence[cost.Collective]) -> str:
    """Says which collectives run how often, with the bytes of each."""
    counts = collections.Counter()
    for collective in collectives:
        counts[collective.kind, collective.bytes] += collective.times
    return ", ".join(
        f"{f'{times} x ' if times > 1 else ''}{kind} {size:,}"
        for (kind, size), times in sorted(counts.items())
    )


def markdown(rows: Sequence[Row]) -> str:
    """Returns the rows as a table."""
    plain = {row.topology: row for row in rows if row.method == "ls"}
    lines = ["| topology | chips | method | Mflop | peak MB | of ls | moved bytes | collectives |"]
    lines.append("|" + "---|" * 8)
    for row in rows:
        of_plain = (
            row.peak_bytes / plain[row.topology].peak_bytes if row.topology in plain else None
        )
        cells = [
            row.topology,
            row.chips,
            row.method,
            f"{row.flops / 1e6:.1f}",
            f"{row.peak_bytes / 1e6:.2f}",
            "" if of_plain is None else f"{of_plain:.3f}",
            f"{cost.moved(row.collectives)[1]:,}",
            exchanges(row.collectives),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def heading(options: Options) -> str:
    """Says what was compiled, with what."""
    libtpu = (found.version for found in importlib.metadata.distributions(name="libtpu"))
    return (
        f"The training step of {options.num_tasks} tasks on a multi-layer perceptron, "
        f"{' x '.join(map(str, options.widths))}, {options.batch} examples per chip, "
        f"{'' if options.gather else 'split parameters gathered as the compiler likes, '}"
        "compiled with "
        f"jax {jax.__version__} and libtpu {next(libtpu, 'of another source')}. Per chip: Mflop "
        "(loops count once), peak memory and its ratio to that of ls, bytes of the results of all "
        "collectives, and each of these with its bytes."
    )


def publish(rows: Sequence[Row], failures: Sequence[Failure], options: Options) -> str:
    """Writes the table and its numbers, and returns the table."""
    failed = [f"* {f.topology} {f.method} cannot be compiled: {f.error}" for f in failures]
    text = "\n".join([heading(options), "", markdown(rows), *([""] * bool(failed)), *failed])
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "pod_compile.md").write_text(f"# Programs for TPU pods\n\n{text}\n")
    found = [dataclasses.asdict(row) for row in (*rows, *failures)]
    (options.output / "pod_compile.json").write_text(json.dumps(found, indent=1))
    return text


def main(options: Options) -> None:
    if unknown := set(options.method) - PROGRAMS.keys():
        sys.exit(f"error: unknown method {min(unknown)}; choose from: {', '.join(PROGRAMS)}")
    rows, failures, text = [], [], ""
    for topology in options.topology:
        for method in options.method:
            try:
                rows.append(measure(topology, method, options))
                what = f"compiled in {rows[-1].seconds:.1f} s"
            except Exception as error:  # of whatever kind: the other programs are worth having
                if "TPU support not installed" in str(error):
                    sys.exit("error: no libtpu here; pip install 'bilb[tpu]'")
                lines = str(error).splitlines() or [repr(error)]
                failures.append(Failure(topology, method, lines[0]))
                what = f"not compiled: {lines[0]}"
            print(f"{topology} {method}: {what}", flush=True)
            text = publish(rows, failures, options)
    print(text)
    if failures:
        sys.exit(f"error: {len(failures)} programs cannot be compiled")


if __name__ == "__main__":
    main(tyro.cli(Options))
