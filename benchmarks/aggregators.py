"""How fast are the gradient-balancing methods, against TorchJD's on the same Jacobians?

Both aggregate the same (K, P) float32 matrices on the CPU, task gradients that pull together in
some directions and against each other in others. Ours is a jitted
``bilb.aggregate_by(method, K).update``, theirs an aggregator called on the matrix (for SDMGrad and
MoDo a weighting called on the Gram matrix). Both are warm, runs are in turns, each on another
matrix, and medians are compared, so that what else the machine does hits both alike.

    pip install 'bilb[bench-torch]'
    python benchmarks/aggregators.py
    python benchmarks/aggregators.py --methods mgda upgrad --num-tasks 16
    python benchmarks/aggregators.py --methods --scale 1000     # the solvers alone, on many tasks

The second table is what one update of a method takes, given the Gram matrix of many tasks; it does
not need TorchJD. Both are written to a file as well. The methods do not solve to the same accuracy:
TorchJD's MGDA stops after 100 Frank-Wolfe steps at most, CAGrad and Nash-MTL where the tolerances
of their solvers say, in float64; ours all solve to what float32 holds.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import bilb


class Entry(NamedTuple):
    """A method of both libraries."""

    ours: Callable[[int], optax.GradientTransformation]  # of K
    theirs: Callable[[Any, int], Any]  # of torchjd.aggregation and K
    host: str = ""  # what solves TorchJD's subproblem outside of PyTorch
    stacked: bool = False  # whether ours reads the task gradients themselves
    weighting: bool = False  # whether theirs returns weights


ENTRIES = {
    "mgda": Entry(lambda k: bilb.mgda(), lambda t, k: t.MGDA()),
    "upgrad": Entry(lambda k: bilb.upgrad(), lambda t, k: t.UPGrad(), "QP"),
    "dualproj": Entry(lambda k: bilb.dualproj(), lambda t, k: t.DualProj(), "QP"),
    "cagrad": Entry(lambda k: bilb.cagrad(0.4), lambda t, k: t.CAGrad(c=0.4), "QP"),
    "nash_mtl": Entry(lambda k: bilb.nash_mtl(), lambda t, k: t.NashMTL(n_tasks=k), "QP"),
    "fairgrad": Entry(lambda k: bilb.fairgrad(2.0), lambda t, k: t.FairGrad(alpha=2.0), "SciPy"),
    "imtl_g": Entry(lambda k: bilb.imtl_g(), lambda t, k: t.IMTLG()),
    "aligned_mtl": Entry(lambda k: bilb.aligned_mtl(), lambda t, k: t.AlignedMTL()),
    "config": Entry(lambda k: bilb.config(), lambda t, k: t.ConFIG()),
    "pcgrad": Entry(lambda k: bilb.pcgrad(), lambda t, k: t.PCGrad()),
    "gradvac": Entry(lambda k: bilb.gradvac(), lambda t, k: t.GradVac()),
    "krum": Entry(lambda k: bilb.krum(1, squared=False), lambda t, k: t.Krum(n_byzantine=1)),
    "sdmgrad": Entry(lambda k: bilb.sdmgrad(), lambda t, k: t.SDMGradWeighting(), weighting=True),
    "modo": Entry(lambda k: bilb.modo(0.1), lambda t, k: t.MoDoWeighting(), weighting=True),
    "pcd": Entry(lambda k: bilb.pcd(), lambda t, k: t.PCD(), "QP"),
    "graddrop": Entry(lambda k: bilb.graddrop(), lambda t, k: t.GradDrop(), stacked=True),
    "trimmed_mean": Entry(
        lambda k: bilb.trimmed_mean(1), lambda t, k: t.TrimmedMean(trim_number=1), stacked=True
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures how long aggregation takes, against TorchJD, and the solvers on many tasks."""

    methods: tuple[str, ...] = tuple(ENTRIES)
    """Methods to compare with TorchJD's; none for the second table alone."""
    num_tasks: tuple[int, ...] = (4, 16, 64)
    """Numbers of tasks K."""
    num_params: tuple[int, ...] = (1_000, 100_000)
    """Numbers of parameters P."""
    repeats: int = 9
    """Timed runs of each library; fewer, but 3 at least, where one takes more than `seconds`."""
    seconds: float = 6.0
    """About how long to time one method at one size."""
    scale: int = 0
    """Number of tasks of the second table; 0 for none."""
    output: Path = Path("outputs/aggregators")
    """Folder for the tables."""


def jacobian(num_tasks: int, num_params: int, seed: int) -> np.ndarray:
    """Returns task gradients of lengths 1 to 10, half of each in four directions that all share."""
    rng = np.random.default_rng(seed)
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)
    mixture = rng.normal(loc=(1, 0, 0, 0), size=(num_tasks, 4))
    shared = unit(mixture) @ unit(rng.normal(size=(4, num_params)))
    own = unit(rng.normal(size=(num_tasks, num_params)))
    lengths = 10 ** rng.uniform(0, 1, size=(num_tasks, 1))
    return (lengths * unit(shared + own)).astype(np.float32)


def timed(function: Callable[[Any], Any], argument: Any) -> float:
    start = time.perf_counter()
    function(argument)
    return time.perf_counter() - start


def ours(entry: Entry, num_tasks: int, num_params: int) -> Callable[[jax.Array], jax.Array]:
    """Returns a function of the Jacobian, which keeps the method's state."""
    method = entry.ours(num_tasks)
    aggregator = method if entry.stacked else bilb.aggregate_by(method, num_tasks)
    params = jnp.zeros(num_params)
    state = aggregator.init(params)
    update = jax.jit(aggregator.update)

    def aggregate(matrix):
        nonlocal state
        gradient, state = update(matrix, state, params)
        return gradient.block_until_ready()

    return aggregate


def theirs(entry: Entry, num_tasks: int) -> Callable[[Any], Any]:
    """Returns a function of the Jacobian, which keeps the method's state."""
    import torch  # not above: the table of the solvers alone works without it
    import torchjd.aggregation

    method = entry.theirs(torchjd.aggregation, num_tasks)

    @torch.no_grad()
    def aggregate(matrix):
        return method(matrix @ matrix.T) @ matrix if entry.weighting else method(matrix)

    return aggregate


def compare(entry: Entry, num_tasks: int, num_params: int, options: Options) -> tuple[float, float]:
    """Returns the seconds that one aggregation takes, (ours, theirs)."""
    import torch

    matrices = [jacobian(num_tasks, num_params, seed) for seed in range(options.repeats + 1)]
    our, their = ours(entry, num_tasks, num_params), theirs(entry, num_tasks)
    for _ in range(2):
        our(jnp.asarray(matrices[0]))
    start = time.perf_counter()
    their(torch.from_numpy(matrices[0]))
    deadline = start + options.seconds
    times = []
    for matrix in matrices[1:]:
        if len(times) >= 3 and time.perf_counter() > deadline:
            break
        pair = jnp.asarray(matrix), torch.from_numpy(matrix)
        times.append((timed(our, pair[0].block_until_ready()), timed(their, pair[1])))
    return tuple(statistics.median(column) for column in zip(*times))


def solver_seconds(method: optax.GradientTransformation, num_tasks: int, repeats: int = 3) -> float:
    """Returns how long one warm update takes on a random Gram matrix of many tasks."""
    rows = jacobian(num_tasks, 2 * num_tasks, seed=0)
    gram, losses = jnp.asarray(rows @ rows.T), jnp.ones(num_tasks)
    update = jax.jit(lambda state, gram: method.update(losses, state, gram=gram))
    state = method.init(losses)

    def run(gram):
        return jax.block_until_ready(update(state, gram))

    run(gram)
    return min(timed(run, gram) for _ in range(repeats))


def ratio_table(measured: dict[tuple[str, int, int], tuple[float, float]]) -> str:
    """Returns a row for every method: their time over ours at every size."""
    sizes = sorted({(k, p) for _, k, p in measured})
    heads = [f"K={k}, P={p:.0e}".replace("e+0", "e") for k, p in sizes]
    lines = ["| method | solved on the host | " + " | ".join(heads) + " |"]
    lines.append("|" + "---|" * (len(heads) + 2))
    for method in dict.fromkeys(method for method, *_ in measured):
        cells = [method, ENTRIES[method].host]
        for k, p in sizes:
            our, their = measured[method, k, p]
            cells.append(f"{their / our:.1f} ({our * 1e3:.2f} ms)")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(options: Options) -> None:
    texts = []
    measured = {}
    for k in options.num_tasks:
        for p in options.num_params:
            for name in options.methods:
                measured[name, k, p] = our, their = compare(ENTRIES[name], k, p, options)
                print(
                    f"{name:13s} K={k:<3d} P={p:<7d} {their / our:8.1f} x  ({our * 1e3:.2f} ms)",
                    flush=True,
                )
    if measured:
        texts.append("TorchJD's time over ours (ours):\n\n" + ratio_table(measured))
    if options.scale:
        rung_3 = {name: entry for name, entry in ENTRIES.items() if not entry.stacked}
        lines = [f"| method | seconds, K = {options.scale} |", "|---|---|"]
        for name, entry in rung_3.items():
            seconds = solver_seconds(entry.ours(options.scale), options.scale)
            lines.append(f"| {name} | {seconds:.3f} |")
            print(lines[-1], flush=True)
        texts.append("\n".join(lines))
    text = "\n\n".join(texts)
    print("\n" + text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "aggregators.txt").write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
