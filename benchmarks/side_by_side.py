"""A training step in bilb beside the same step in PyTorch: steps per second and peak memory.

Both train one perceptron with K linear heads on the same batch with Adam. Methods that read Gram
matrices have them of :func:`bilb.grams.exact`, the default, in ``bilb``, and of all task gradients
stacked in ``stacked``. The opponents:

* ``torch``: a plain PyTorch step written from the method's formulas;
* ``compiled``: the same with its losses and weights under ``torch.compile``;
* ``torchjd``: TorchJD's Jacobian, aggregated by its own implementation of the method;
* ``autogram``: TorchJD's Gram matrix, and its weights by that implementation.

Every round takes a few steps of each, in turns, so that what else the machine does hits all alike;
the table has the median over the rounds of the ratios to bilb's own time and, in brackets, to its
processor time, which other work disturbs less, but which counts threads that wait for each other.
Peak memory is what parameters, optimiser and batch take and, on top of it, what XLA says that the
step needs, or what PyTorch's profiler sees allocated at most.

    pip install 'bilb[bench-torch]'
    python benchmarks/side_by_side.py
    python benchmarks/side_by_side.py --methods bilb4mtl --num-tasks 40 --rounds 51
    taskset -c 0 python benchmarks/side_by_side.py              # one thread each, on one core

Every method at every width and K is a line of side_by_side.jsonl as soon as it is measured, and is
not measured again.
The last column says how far apart the losses are after two steps from the same parameters: not at
all, but for rounding, and for methods that draw random numbers or that TorchJD solves less closely.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import protocol
import report
import torch_steps

import bilb

LEARNING_RATE, PENALTY = 1e-3, 0.01

#: The methods of bilb, by name; what PyTorch does for each is in torch_steps.py.
METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "ls": lambda: bilb.linear_scalarization(),
    "bilb4mtl": lambda: bilb.presets.bilb4mtl_celeba(PENALTY, optimizer=optax.adam(LEARNING_RATE)),
    "uw": lambda: bilb.uncertainty_weighting(optimizer=optax.adam(LEARNING_RATE)),
    "famo": lambda: bilb.famo(gamma=1e-3),
    "mgda": lambda: bilb.mgda(),
    "cagrad": lambda: bilb.cagrad(c=0.4),
    "pcgrad": lambda: bilb.pcgrad(),
    "imtl_g": lambda: bilb.imtl_g(),
    "aligned_mtl": lambda: bilb.aligned_mtl(),
    "upgrad": lambda: bilb.upgrad(),
}
#: Those of them that read Gram matrices.
READ_GRAM = ("mgda", "cagrad", "pcgrad", "imtl_g", "aligned_mtl", "upgrad")
OPPONENTS = ("stacked", "torch", "compiled", "torchjd", "autogram")


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares training steps of bilb with those of PyTorch."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to compare."""
    num_tasks: tuple[int, ...] = (40,)
    """Numbers of tasks K."""
    inputs: int = 128
    """Inputs of the model."""
    widths: tuple[int, ...] = (64, 512)
    """Widths of the model's hidden layers."""
    depth: int = 3
    """Number of the model's hidden layers."""
    batch_size: int = 256
    """Examples per training step."""
    rounds: int = 21
    """Timed rounds."""
    steps: int = 5
    """Steps of each opponent in a round; one where a step takes a tenth of a second."""
    output: Path = Path("outputs/side_by_side")
    """Folder for the tables and the numbers."""

    def mistake(self) -> str | None:
        """Says what is wrong with the options, if anything."""
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            return f"unknown method {', '.join(unknown)}; choose from: {', '.join(METHODS)}"
        if min(self.rounds, self.steps, *self.num_tasks, *self.widths) < 1:
            return "--rounds, --steps, --num-tasks and --widths must be at least 1"
        return None


class Problem:
    """Parameters and a batch as NumPy arrays, the same for both libraries."""

    def __init__(self, options: Options, width: int, num_tasks: int):
        """Draws them."""
        rng = np.random.default_rng(0)
        sizes = [options.inputs, *[width] * options.depth, num_tasks]
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        self.kernels = [draw(n, m) * np.float32(n**-0.5) for n, m in itertools.pairwise(sizes)]
        self.inputs = draw(options.batch_size, options.inputs)
        # Scales of the tasks that differ, so that weights have something to do.
        self.targets = draw(options.batch_size, num_tasks) * np.geomspace(
            0.3, 3, num_tasks, dtype=np.float32
        )


class BilbStep:
    """A jitted training step of bilb; calling it takes one and returns the losses before it."""

    def __init__(self, method: str, problem: Problem, gram: bilb.grams.Engine):
        """Compiles nothing yet."""

        def task_losses(params, inputs, targets):
            *hidden, heads = params
            for kernel in hidden:
                inputs = jax.nn.relu(inputs @ kernel)
            return jnp.mean((inputs @ heads - targets) ** 2, axis=0)

        value_and_grad = bilb.value_and_grad(task_losses, METHODS[method](), gram=gram)
        optimizer = optax.adam(LEARNING_RATE)

        def step(params, opt_state, state, *batch):
            losses, gradient, state = value_and_grad(params, state, *batch)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
            return params, opt_state, value_and_grad.after(params, state, *batch), losses

        self.step = jax.jit(step, donate_argnums=(0, 1, 2))
        params = [jnp.array(kernel) for kernel in problem.kernels]
        self.batch = jnp.array(problem.inputs), jnp.array(problem.targets)
        self.carry = params, optimizer.init(params), value_and_grad.init(params, *self.batch)

    def __call__(self) -> np.ndarray:
        """Takes a step, and waits for it."""
        *self.carry, losses = self.step(*self.carry, *self.batch)
        jax.block_until_ready(self.carry)
        return np.asarray(losses)

    def peak_bytes(self) -> float:
        """Returns the memory of the compiled step: arguments, results and temporaries."""
        of = self.step.lower(*self.carry, *self.batch).compile().memory_analysis()
        sizes = of.argument_size_in_bytes + of.output_size_in_bytes - of.alias_size_in_bytes
        return sizes + of.temp_size_in_bytes


def make_step(kind: str, method: str, problem: Problem) -> Callable[[], np.ndarray] | None:
    """Returns a step of bilb or of an opponent, None where the opponent has none of the method."""
    if kind == "bilb":
        return BilbStep(method, problem, bilb.grams.exact())
    if kind == "stacked":
        return BilbStep(method, problem, bilb.grams.stacked()) if method in READ_GRAM else None
    return torch_steps.make(kind, method, problem, learning_rate=LEARNING_RATE, penalty=PENALTY)


def time_rounds(
    steps: dict[str, Callable[[], Any]], rounds: int, number: int
) -> dict[str, np.ndarray]:
    """Returns seconds per step of each in every round, (rounds, 2): wall time and processor time.

    The order turns from round to round.
    """
    for step in steps.values():
        step()  # compiles if it has not been called before
    start = time.perf_counter()
    for step in steps.values():
        step()
    number = number if time.perf_counter() - start < 0.1 * len(steps) else 1
    seconds: dict[str, list[Any]] = {name: [] for name in steps}
    names = list(steps)
    now = lambda: np.array([time.perf_counter(), time.process_time()])
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = now()
            for _ in range(number):
                steps[name]()
            seconds[name].append((now() - start) / number)
    return {name: np.array(of) for name, of in seconds.items()}


def ratios(seconds: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Returns the medians over the rounds of the ratios of two times."""
    wall, processor = np.median(seconds / reference, axis=0).tolist()
    return {"wall": wall, "processor": processor}


def compare(width: int, num_tasks: int, options: Options) -> Iterator[dict[str, Any]]:
    """Yields the numbers of every method, opponents as far as they have it."""
    for method in options.methods:
        problem = Problem(options, width, num_tasks)
        made = {kind: make_step(kind, method, problem) for kind in ("bilb", *OPPONENTS)}
        steps = {kind: step for kind, step in made.items() if step is not None}
        losses = {kind: [step() for _ in range(3)][-1] for kind, step in steps.items()}
        apart = {
            kind: float(np.abs(of / losses["bilb"] - 1).max())
            for kind, of in losses.items()
            if kind != "bilb"
        }
        if method != "ls":
            steps["ls"] = make_step("bilb", "ls", problem)
        seconds = time_rounds(steps, options.rounds, options.steps)
        memory = {kind: step.peak_bytes() / 2**20 for kind, step in steps.items() if kind in losses}
        yield {
            "width": width,
            "num_tasks": num_tasks,
            "method": method,
            "steps_per_second": {k: 1 / float(np.median(of[:, 0])) for k, of in seconds.items()},
            "time_over_bilb": {k: ratios(of, seconds["bilb"]) for k, of in seconds.items()},
            "time_over_ls": ratios(seconds["bilb"], seconds.get("ls", seconds["bilb"])),
            "peak_mib": memory,
            "apart": apart,
        }


def table(found: Sequence[dict[str, Any]]) -> str:
    """Returns the numbers in Markdown; ratios of processor time are in brackets."""
    of_time = lambda of: f"{of['wall']:.2f} ({of['processor']:.2f})"
    head = ["width", "K", "method", "bilb, steps/s", "bilb / its LS"]
    head += [f"{kind}: time / bilb's" for kind in OPPONENTS]
    head += ["bilb, peak MiB", *(f"{kind}: peak / bilb's" for kind in OPPONENTS), "losses apart"]
    cells = []
    for of in found:
        time_of, memory = of["time_over_bilb"], of["peak_mib"]
        own = memory.get("bilb", math.nan)
        cells.append(
            [
                str(of["width"]),
                str(of["num_tasks"]),
                of["method"],
                f"{of['steps_per_second']['bilb']:.0f}",
                of_time(of["time_over_ls"]),
                *(of_time(time_of[kind]) if kind in time_of else "" for kind in OPPONENTS),
                f"{own:.1f}" if memory else "",
                *(f"{memory[kind] / own:.2f}" if kind in memory else "" for kind in OPPONENTS),
                f"{max(of['apart'].values(), default=0.0):.0e}",
            ]
        )
    return report.markdown([head, *cells])


def main(options: Options) -> None:
    """Compares and writes table and numbers."""
    if mistake := options.mistake():
        sys.exit(f"error: {mistake}")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "side_by_side.jsonl"
    sizes = lambda of: (of["width"], of["num_tasks"])
    for size in itertools.product(options.widths, options.num_tasks):
        known = {of["method"] for of in protocol.read(path) if sizes(of) == size}
        left = tuple(method for method in options.methods if method not in known)
        for of in compare(*size, dataclasses.replace(options, methods=left)):
            protocol.append(path, [of])
            print(json.dumps(of), flush=True)
    found = sorted(protocol.read(path), key=sizes)
    model = (
        f"A perceptron of {options.depth} hidden layers, {options.inputs} inputs, batches of "
        f"{options.batch_size}; jax {jax.__version__}, {torch_steps.versions()}; "
        f"{jax.default_backend().upper()}."
    )
    text = f"# Training steps beside PyTorch's\n\n{model}\n\n{table(found)}"
    print(text)
    (options.output / "side_by_side.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
