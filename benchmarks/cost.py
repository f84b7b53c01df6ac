"""What does a training step of every method cost as the number of tasks K grows?

A multi-layer perceptron with K linear heads takes one step of Adam under each method. Four things
are measured, each relative to linear scalarisation (LS), the plain sum of the losses:

* products: flops of the matrix products that are traced, loops of known length counted in full,
  others (those of solvers, and of the updates of IGBv2's agent, one a step on average) once.
  Passes through the model are products, so this says how many of them a method needs.
* flops: all flops of the compiled program as XLA counts them, every loop body once. It is what
  shows that a method without such loops adds next to nothing.
* memory: temporary memory of the compiled program, beyond parameters, states and batch.
* time and processor time of a step, by turns with one of LS, the medians of the ratios of
  neighbours. Other work on the machine disturbs them; it does not touch the first three. They are
  of the first steps, a sketch's warm-up left out: IGBv2's agent does not train yet.

    python benchmarks/cost.py
    python benchmarks/cost.py --methods bilb4mtl mgda --num-tasks 2 40
    python benchmarks/cost.py --rounds 0                        # without times
    python benchmarks/cost.py --no-compile                      # matrix products only
    python benchmarks/cost.py --report                          # table and figure of what is there

Rows ``ls`` compare LS with itself: what their times differ from 1 is noise. A chain of methods is
a method, too, and ``method@gram=stacked`` or ``@gram=sketch`` says how Gram matrices are
taken. Every method at every K is one line of cost.jsonl as soon as it is measured, and is not
measured again. Times are left out where a step of the method is expected to take more than
``--longest`` seconds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import balancers
import cost as counting  # tests/cost.py, which reads costs off compiled programs
import experiment
import protocol
import report

import bilb

BASELINE = "ls"
#: Other names of methods that are in the table, and whole settings for equations.
LEFT_OUT = ("log", "root", "marigold_pinn", "nash_pinn")
VARIANTS = (
    "mgda@gram=stacked",
    "mgda@gram=sketch@decay=0.99",
    "nash_mtl@gram=stacked",
    "nash_mtl@gram=sketch@decay=0.99",
    "imtl_g@gram=sketch@decay=0.99",
    "gradnorm@gram=sketch",
)
#: Methods that are training steps of their own; with a validation batch, here the batch itself.
TRAINING_STEPS = {
    "bilb4mtl_double_loop": lambda *given: bilb.bilb4mtl_double_loop(
        *given, inner_optimizer=optax.sgd(1e-3)
    ),
    "auto_lambda": lambda *given: bilb.auto_lambda(*given, inner_learning_rate=1e-3),
    "moml": lambda *given: bilb.moml(*given, inner_learning_rate=1e-3),
    "forum": lambda *given: bilb.forum(*given, inner_learning_rate=1e-3),
}
METHODS = (
    *(name for name in balancers.METHODS if name not in LEFT_OUT),
    *balancers.AGGREGATORS,
    *VARIANTS,
    *TRAINING_STEPS,
)
#: In the figure, one or two of each rung.
DRAWN = ("bilb4mtl", "igb_v1", "igb_v2", "marigold", "famo", "mgda@gram=sketch@decay=0.99", "mgda")
FIELDS = {"gram": str, "decay": float}
TIMES = ("time", "processor")
QUANTITIES = ("products", "flops", "memory", *TIMES)


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures what a training step of every method costs, against the plain sum of the losses."""

    methods: tuple[str, ...] = METHODS
    """Methods and chains; @gram=... and @decay=... say how Gram matrices are taken."""
    num_tasks: tuple[int, ...] = (2, 10, 40, 200, 1000)
    """Numbers of tasks K."""
    inputs: int = 64
    """Inputs of the model."""
    width: int = 256
    """Width of the model's hidden layers."""
    depth: int = 2
    """Number of the model's hidden layers."""
    batch_size: int = 128
    """Examples per training step."""
    compile: bool = True
    """Compile as well as trace; without it, matrix products are all that is counted."""
    rounds: int = 7
    """Timed steps of every method, each beside a step of LS; 0 for no times."""
    longest: float = 2.0
    """No times where a step is expected to take longer than this many seconds."""
    report: bool = False
    """Only write table and figure of the lines that are there."""
    output: Path = Path("outputs/cost")
    """Folder for the lines, the table and the figure."""

    def mistake(self) -> str | None:
        """Says what is wrong with the options, if anything."""
        try:
            parsed = [protocol.parse(name, FIELDS) for name in self.methods]
        except ValueError as error:
            return str(error)
        known = balancers.METHODS | TRAINING_STEPS
        if mistake := balancers.mistake([method for method, _ in parsed], known):
            return mistake
        for _, fields in parsed:
            if fields.get("gram", "exact") not in balancers.GRAMS:
                return f"unknown gram {fields['gram']!r}; choose from: {', '.join(balancers.GRAMS)}"
        if not self.num_tasks or min(self.num_tasks) < 2:
            return "--num-tasks must be at least 2"
        if min(self.inputs, self.width, self.depth, self.batch_size) < 1:
            return "--inputs, --width, --depth and --batch-size must be at least 1"
        return "--rounds must not be negative" if self.rounds < 0 else None


class Training(NamedTuple):
    """A training step ``carry -> carry`` and the first carry."""

    step: Callable[[Any], Any]
    carry: Any


def init_params(key: jax.Array, options: Options, num_tasks: int) -> dict[str, jax.Array]:
    """Returns the kernels of the trunk and, at last, of the heads."""
    sizes = [options.inputs, *[options.width] * options.depth, num_tasks]
    names = [*(f"trunk_{layer}" for layer in range(options.depth)), "heads"]
    keys = jax.random.split(key, len(names))
    layers = zip(names, keys, itertools.pairwise(sizes))
    return {name: jax.random.normal(key, size) * size[0] ** -0.5 for name, key, size in layers}


def task_losses(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns the mean squared errors (K,)."""
    features, targets = batch
    for layer in range(len(params) - 1):
        features = jax.nn.relu(features @ params[f"trunk_{layer}"])
    return jnp.mean((features @ params["heads"] - targets) ** 2, axis=0)


def training(name: str, options: Options, num_tasks: int) -> Training:
    """Returns the training step of a method, on a batch of random numbers."""
    method, fields = protocol.parse(name, FIELDS)
    fields = {"gram": "exact", "decay": 0.0, **fields}
    settings = balancers.Settings(
        learning_rate=1e-3,
        penalty=0.05,
        seed=0,
        selection=jnp.ones(num_tasks),
        steps=1_000,
        steps_per_epoch=10,
        **fields,
    )
    keys = jax.random.split(jax.random.key(0), 3)
    batch = (
        jax.random.normal(keys[0], (options.batch_size, options.inputs)),
        jax.random.normal(keys[1], (options.batch_size, num_tasks)),
    )
    params = init_params(keys[2], options, num_tasks)
    if method in TRAINING_STEPS:
        return training_of_its_own(method, settings.learning_rate, params, batch)
    shared = {name: name != "heads" for name in params}
    value_and_grad = experiment.driver(settings, method, task_losses, shared)
    optimizer = optax.adam(settings.learning_rate)

    def step(carry):
        params, opt_state, state, batch = carry
        _, gradient, state = value_and_grad(params, state, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, value_and_grad.after(params, state, batch), batch

    return Training(
        step, (params, optimizer.init(params), value_and_grad.init(params, batch), batch)
    )


def training_of_its_own(method: str, learning_rate: float, params: Any, batch: Any) -> Training:
    """Returns the training step of a method that evaluates the model itself."""
    of = TRAINING_STEPS[method](task_losses, optax.adam(learning_rate))
    batches = (batch,) if method == "bilb4mtl_double_loop" else (batch, batch)

    def step(carry):
        params, state, batches = carry
        params, state, _ = of.update(params, state, *batches)
        return params, state, batches

    return Training(step, (params, of.init(params, batch), batches))


def counted(of: Training) -> tuple[Any, dict[str, float]]:
    """Returns the compiled step, whose carry is donated, and what can be read off it."""
    compiled = jax.jit(of.step, donate_argnums=0).lower(of.carry).compile()
    return compiled, {
        "flops": compiled.cost_analysis()["flops"],
        "memory": compiled.memory_analysis().temp_size_in_bytes,
    }


def seconds(step: Callable[[Any], Any], carry: Any) -> tuple[np.ndarray, Any]:
    """Returns how long a step takes, (2,) wall time and processor time, and the next carry."""
    now = lambda: np.array([time.perf_counter(), time.process_time()])
    start = now()
    carry = jax.block_until_ready(step(carry))
    return now() - start, carry


def timed(
    step: Any, carry: Any, reference: Any, beside: Any, options: Options, untimed: int = 1
) -> dict[str, float]:
    """Returns the time of a step and the ratios to a neighbouring one of the reference.

    A number of steps are taken before: the first call touches memory that later ones reuse.
    """
    for _ in range(untimed):
        last, carry = seconds(step, carry)
    if last[0] > 2 * options.longest:
        return {}
    pairs = []
    for _ in range(options.rounds):
        of_reference, beside = seconds(reference, beside)
        of_step, carry = seconds(step, carry)
        pairs.append((of_step, of_reference))
    own, other = np.swapaxes(pairs, 0, 1)
    wall, processor = np.median(own / other, axis=0)
    return {"seconds": np.median(own[:, 0]), "time": wall, "processor": processor}


def measure(name: str, options: Options, num_tasks: int, expected: float) -> protocol.Line:
    """Returns a line: the cost of a method, in absolute numbers but for the times."""
    of = training(name, options, num_tasks)
    numbers = {"products": counting.product_flops(jax.make_jaxpr(of.step)(of.carry).jaxpr)}
    if options.compile:
        compiled, more = counted(of)
        numbers |= more
        if options.rounds and expected <= options.longest:
            reference = training(BASELINE, options, num_tasks)
            beside = jax.jit(reference.step, donate_argnums=0).lower(reference.carry).compile()
            sketched = protocol.parse(name, FIELDS)[1].get("gram") == "sketch"
            untimed = 1 + sketched * bilb.grams.sketch().warmup_steps
            numbers |= timed(compiled, of.carry, beside, reference.carry, options, untimed)
    numbers = {key: protocol.rounded(float(value)) for key, value in numbers.items()}
    return {"num_tasks": num_tasks, "method": name} | numbers


def expected_seconds(done: Sequence[protocol.Line], name: str, num_tasks: int) -> float:
    """Returns what a step should take by that at the largest K below, infinite if that is unknown.

    Between two numbers of tasks it is taken to grow as their ratio, or its square where it is
    long: the time of K backward passes through K heads.
    """
    smaller = [line for line in done if line["method"] == name and line["num_tasks"] < num_tasks]
    if not smaller:
        return 0.0
    last = max(smaller, key=lambda line: line["num_tasks"])
    took = last.get("seconds", math.inf)
    return took * (num_tasks / last["num_tasks"]) ** (2 if took > 0.1 else 1)


def relative(lines: Sequence[protocol.Line]) -> dict[str, dict[str, dict[int, float]]]:
    """Returns quantity -> method -> K -> ratio to the baseline."""
    base = {line["num_tasks"]: line for line in lines if line["method"] == BASELINE}
    found: dict[str, dict[str, dict[int, float]]] = {quantity: {} for quantity in QUANTITIES}
    for line in lines:
        num_tasks = line["num_tasks"]
        for quantity in QUANTITIES:
            if quantity in line and num_tasks in base:
                unit = 1.0 if quantity in TIMES else base[num_tasks][quantity]
                of = found[quantity].setdefault(line["method"], {})
                of[num_tasks] = line[quantity] / unit
    return found


def tables(lines: Sequence[protocol.Line]) -> str:
    """Returns a table for each quantity."""
    ks = sorted({line["num_tasks"] for line in lines})
    titles = {
        "products": "Matrix products, loops in full",
        "flops": "All flops of the compiled program, loop bodies once",
        "memory": "Temporary memory",
        "time": "Time of a step",
        "processor": "Processor time of a step",
    }
    parts = []
    for quantity, methods in relative(lines).items():
        if not methods:
            continue
        digits = 2 if quantity in ("memory", *TIMES) else 4
        cell = lambda ratio, d=digits: "" if ratio is None else f"{ratio:.{d}f}"
        rows = [[m, *(cell(of.get(k)) for k in ks)] for m, of in methods.items()]
        table = report.markdown([["method", *(f"K = {k}" for k in ks)], *rows])
        parts.append(f"## {titles[quantity]}, LS = 1\n\n{table}")
    return "\n\n".join(parts)


def figure(lines: Sequence[protocol.Line]) -> Figure:
    """Draws products, memory and time against K."""
    picture = Figure(figsize=(11, 3.6), layout="constrained")
    found = relative(lines)
    all_tasks = sorted({line["num_tasks"] for line in lines})
    titles = {"products": "matrix products", "memory": "temporary memory", "time": "time of a step"}
    titles = {quantity: title for quantity, title in titles.items() if found[quantity]}
    for ax, quantity in zip(picture.subplots(1, len(titles), squeeze=False).flat, titles):
        for method in DRAWN:
            of = found[quantity].get(method, {})
            ks = sorted(of)
            # The first is a band, which shows behind others that cost as little.
            style = {"linewidth": 8, "alpha": 0.4} if method == DRAWN[0] else {"marker": "."}
            ax.plot(ks, [of[k] for k in ks], label=method, **style)
        ax.axhline(1, color="0.7", linewidth=1, zorder=0)
        ax.set(xscale="log", yscale="log", xlabel="tasks", ylabel=f"{titles[quantity]}, LS = 1")
        ax.set_xticks(all_tasks, [str(number) for number in all_tasks], minor=False)
        ax.set_xticks([], minor=True)
    handles, labels = ax.get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside right center", frameon=False)
    return picture


def publish(lines: Sequence[protocol.Line], options: Options) -> str:
    """Writes table and figure; returns the tables."""
    model = (
        f"A perceptron of {options.depth} hidden layers of {options.width} units, "
        f"{options.inputs} inputs and K heads, batches of {options.batch_size}; Adam. "
        f"jax {jax.__version__}, {jax.default_backend().upper()}."
    )
    text = f"# Cost of a training step\n\n{model}\n\n{tables(lines)}"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "cost.md").write_text(text + "\n", encoding="utf-8")
    figure(lines).savefig(options.output / "cost.png", dpi=130)
    return text


def main(options: Options) -> None:
    """Measures what is missing, writes table and figure."""
    if mistake := options.mistake():
        sys.exit(f"error: {mistake}")
    path = options.output / "cost.jsonl"
    names = list(dict.fromkeys([BASELINE, *options.methods]))
    wanted = [(k, name) for k in sorted(options.num_tasks) for name in names]
    for num_tasks, name in [] if options.report else wanted:
        done = protocol.read(path)
        if any(line["num_tasks"] == num_tasks and line["method"] == name for line in done):
            continue
        line = measure(name, options, num_tasks, expected_seconds(done, name, num_tasks))
        protocol.append(path, [line])
        print(" ".join(f"{key}={value}" for key, value in line.items()), flush=True)
        jax.clear_caches()
    known = set(wanted)
    lines = [li for li in protocol.read(path) if (li["num_tasks"], li["method"]) in known]
    print(publish(lines, options))


if __name__ == "__main__":
    main(tyro.cli(Options))
