"""Tracing a Pareto front: one network for each preference, and what the networks reach together.

The problems are those of conflict.py: two digits, and a shared layer that is too narrow for both.
Each method is given nine preferences between the tasks, ``r`` and ``1 - r`` with r from 0.1 to 0.9:

* ``constant``: the sum of the losses with these weights; ``log``: that of their logarithms
* ``stch``: their smooth maximum, every loss times its preference; μ = 0.05
* ``pbi``: along the ray on which loss times preference is the same for all; θ = 5
* ``cosmos``: the weighted sum less three times the cosine to the preference

The measure is the hypervolume of the nine pairs of test errors, the share of the square from no to
all errors that they dominate, in percent; higher is better. Each method has its learning rate
chosen from one grid by the hypervolume on validation pairs, with seeds of their own.

    pip install 'bilb[bench]'
    python benchmarks/fronts.py
    python benchmarks/fronts.py --problems narrow --methods constant stch --seeds 4
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import moocore
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import conflict
import experiment
import protocol
import report
import runs
from balancers import Settings
from runs import Split

import bilb

#: By the preferences (K,).
METHODS: dict[str, Callable[[jax.Array], optax.GradientTransformation]] = {
    "constant": lambda r: bilb.linear_scalarization(2 * r),
    "log": lambda r: bilb.chain(bilb.log_losses(), bilb.linear_scalarization(2 * r)),
    "stch": lambda r: bilb.stch(0.05, preference=r),
    "pbi": lambda r: bilb.pbi(preference=r[::-1]),
    "cosmos": lambda r: bilb.cosmos(3.0, preference=r),
}
PREFERENCES = np.stack([np.linspace(0.1, 0.9, 9), np.linspace(0.9, 0.1, 9)], axis=1)
#: The first seed with which learning rates are tried.
TUNING = 1_000


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares the fronts that methods trace, given preferences."""

    problems: tuple[str, ...] = tuple(conflict.PROBLEMS)
    """The problems."""
    methods: tuple[str, ...] = tuple(METHODS)
    """The methods."""
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    """Initial learning rates of Adam to choose from."""
    tuning_seeds: int = 2
    """Seeds with which they are chosen."""
    seeds: int = 10
    """Seeds of the result, others than those."""
    steps: int | None = None
    """Training steps; the problem's own number by default."""
    output: Path = Path(__file__).parent / "results"
    """Folder for the numbers, the table and the figure."""

    def mistake(self) -> str | None:
        """Says what is wrong with the options, if anything."""
        for given, known in ((self.problems, conflict.PROBLEMS), (self.methods, METHODS)):
            if unknown := [name for name in given if name not in known]:
                return f"unknown {', '.join(unknown)}; choose from: {', '.join(known)}"
        if min(self.tuning_seeds, self.seeds, self.steps or 1) < 1:
            return "--tuning-seeds, --seeds and --steps must be at least 1"
        return None


@functools.partial(jax.jit, static_argnames=("method", "network", "tasks", "steps"))
def train(pool, rows, preferences, learning_rate, seeds, *, method, network, tasks, steps):
    """Returns the parameters of a network for each seed and preference, leading axes (S, N)."""

    def task_losses(parameters: Any, batch: experiment.Data) -> jax.Array:
        outputs = network.apply(parameters, batch.inputs)
        return jnp.stack([t.loss(o, y) for t, o, y in zip(tasks, outputs, batch.targets)])

    def one(seed, rows, preference):
        value_and_grad = bilb.value_and_grad(task_losses, METHODS[method](preference))
        optimizer = Settings(learning_rate, 0.0, seed, preference, steps, 1).optimizer()
        parameters = network.init(jax.random.key(seed), pool.inputs[:1])
        batch_of = lambda rows: jax.tree.map(lambda x: x[rows], pool)
        state = value_and_grad.init(parameters, batch_of(rows[0]))
        carry = parameters, optimizer.init(parameters), state
        parts = value_and_grad, optimizer, carry, rows, batch_of
        return experiment.scan_steps(*parts, window=steps)[0][0]

    over_preferences = jax.vmap(one, in_axes=(None, None, 0))
    return jax.vmap(over_preferences, in_axes=(0, 0, None))(seeds, rows, preferences)


def fronts(
    split: Split, method: str, learning_rate: float, seeds: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the errors (S, N, 2) of every seed and preference, on validation and test set."""
    problem = split.problem
    static = dict(network=problem.network, tasks=problem.tasks)
    parameters = train(
        jax.tree.map(jnp.asarray, problem.pool), runs.batch_rows(problem, steps, seeds),
        jnp.asarray(PREFERENCES, jnp.float32), jnp.float32(learning_rate), jnp.asarray(seeds),
        method=method, steps=steps, **static,
    )  # fmt: skip
    errors = lambda data: np.asarray(experiment.evaluate(parameters, data, **static))
    return errors(split.validation), errors(problem.test)


def hypervolume(errors: np.ndarray) -> float:
    """Returns the percentage of the square of all pairs of errors that these (N, 2) dominate."""
    return float(moocore.hypervolume(errors, ref=[100.0, 100.0])) / 100.0


def compare(split: Split, method: str, options: Options) -> protocol.Line:
    """Chooses the learning rate of a method and measures the fronts of all seeds."""
    steps = options.steps or split.problem.steps
    tuning = TUNING + np.arange(options.tuning_seeds)
    scores = {
        rate: [-hypervolume(front) for front in fronts(split, method, rate, tuning, steps)[0]]
        for rate in options.learning_rates
    }
    rate = protocol.best(scores)
    _, test = fronts(split, method, rate, np.arange(options.seeds), steps)
    return {
        "method": method,
        "learning_rate": rate,
        "steps": steps,
        "errors": protocol.rounded(test),
        "hypervolumes": [round(hypervolume(front), 4) for front in test],
    }


def table(found: list[protocol.Line]) -> str:
    """Returns the hypervolumes in Markdown, and how far they are from those of constant weights."""
    lines = [["problem", "method", "learning rate", "hypervolume, %", "less that of constant"]]
    of = {(line["problem"], line["method"]): np.array(line["hypervolumes"]) for line in found}
    for line in found:
        own, reference = of[line["problem"], line["method"]], of.get((line["problem"], "constant"))
        difference = "" if reference is None else str(protocol.interval(own - reference))
        shown = str(protocol.interval(own)).removeprefix("+")
        lines.append(
            [line["problem"], line["method"], f"{line['learning_rate']:g}", shown, difference]
        )
    return report.markdown(lines)


def figure(found: list[protocol.Line]) -> Figure:
    """Draws the mean errors of every preference, a panel for each problem."""
    problems = list(dict.fromkeys(line["problem"] for line in found))
    picture = Figure(figsize=(4.5 * len(problems), 4), layout="constrained")
    for ax, problem in zip(picture.subplots(1, len(problems), squeeze=False).flat, problems):
        for line in (line for line in found if line["problem"] == problem):
            left, right = np.mean(line["errors"], axis=0).T
            ax.plot(left, right, "o-", markersize=3, linewidth=1, label=line["method"])
        ax.set(title=problem, xlabel="error left, %", ylabel="error right, %")
        ax.legend(fontsize="small")
    return picture


def main(options: Options) -> None:
    """Compares and writes numbers, table and figure."""
    if mistake := options.mistake():
        sys.exit(f"error: {mistake}")
    path = options.output / "fronts.jsonl"
    done = {(line["problem"], line["method"]) for line in protocol.read(path)}
    for problem in options.problems:
        split = conflict.PROBLEMS[problem]()
        for method in options.methods:
            if (problem, method) not in done:
                line = {"problem": problem} | compare(split, method, options)
                protocol.append(path, [line])
                print(json.dumps({k: v for k, v in line.items() if k != "errors"}), flush=True)
    found = protocol.read(path)
    text = (
        f"# Fronts of nine preferences\n\n{table(found)}\n\nMean and 95 % t interval over "
        f"{options.seeds} seeds, differences paired by seed. `python benchmarks/fronts.py`."
    )
    print(text)
    figure(found).savefig(options.output / "fronts.png", dpi=110)
    (options.output / "fronts.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
