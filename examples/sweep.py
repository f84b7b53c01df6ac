"""Hyperparameters and seeds of a method side by side, in one program that is compiled once.

The factories of bilb accept traced hyperparameters, so a grid of them is one more `jax.vmap` over
the training of the other examples. The problem is that of multidigits.py: left digit, right digit
and ink. Whatever a method reads is swept: the learning rate always, the penalty of the bilevel
methods, the temperature of dwa, the gamma of famo, the decay of methods that read the Gram matrix.
The configurations are spread over all devices that JAX finds.

    python examples/sweep.py                                    # about a minute
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/sweep.py
    python examples/sweep.py --method dwa famo --temperature 1 2 4 --gamma 0 0.01 --seeds 5
    python examples/sweep.py --method si+mgda --decay 0.9 0.99 --gram sketch

It trains single-task networks (STL) with the same learning rates for reference, prints a table,
says what compiling every configuration would have cost, and writes a figure. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import balancers
import experiment
import jax
import multidigits
import numpy as np
import report
import tqdm
import tyro
from balancers import AGGREGATORS, METHODS
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

from bilb import metrics, plots

HYPERPARAMETERS = ("learning_rate", "penalty", "temperature", "gamma", "decay")  # traced Settings

Configuration = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Options:
    """Left digit, right digit and ink: trains every combination of hyperparameters at once."""

    method: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help=f"Methods to train, out of: {', '.join(METHODS | AGGREGATORS)}, or chains such as "
            "si+mgda."
        ),
    ] = ("bilb4mtl",)
    learning_rate: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Initial learning rates of Adam."""
    penalty: tuple[float, ...] = (0.0, 0.01, 0.05, 0.2, 0.5)
    """Weights of the loss discrepancy, for the bilevel methods."""
    temperature: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Temperatures, for dwa."""
    gamma: tuple[float, ...] = (0.0, 1e-3, 1e-2)
    """Decays of the logits, for famo."""
    decay: tuple[float, ...] = (0.0, 0.9, 0.99)
    """Decays of the running mean of the Gram matrix, for methods that read it."""
    gram: Literal["exact", "stacked", "sketch"] = "exact"
    """How they get it; a sketch needs decays above 0."""
    seeds: int = 3
    """Number of seeds of each configuration."""
    steps: int = 1_500
    """Training steps."""
    timing: bool = True
    """Also measure one configuration by itself, to tell what the single program saves."""
    output: Path = Path("outputs/sweep")
    """Folder for the table, its numbers and the figure."""

    def mistake(self) -> str | None:
        """Says what is wrong with the options, if anything."""
        if mistake := balancers.mistake(self.method):
            return mistake
        if self.seeds < 1 or self.steps < 1:
            return "--seeds and --steps must be at least 1"
        taken = {name for method in self.method for name in hyperparameters(method)}
        for name in HYPERPARAMETERS:
            flag, values = f"--{name.replace('_', '-')}", getattr(self, name)
            if not values:
                return f"{flag} needs at least one value"
            if name not in taken and values != getattr(Options, name):
                return f"{flag} is read by none of the methods: {', '.join(self.method)}"
            positive = name in ("learning_rate", "temperature")
            if not all(np.isfinite(v) and (v > 0 if positive else v >= 0) for v in values):
                return f"{flag} must be {'positive' if positive else 'finite and not negative'}"
        if max(self.decay) >= 1:
            return "--decay must be less than 1"
        if "decay" in taken and self.gram == "sketch" and min(self.decay) == 0:
            return "one sketch says little about the Gram matrix: give --decay above 0"
        return balancers.mistake_in_values(0.0, self.output)


def hyperparameters(method: str) -> tuple[str, ...]:
    """Returns the names of the hyperparameters that a method's training reads."""
    read = set()

    class Recording(experiment.Settings):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    settings = Recording(
        learning_rate=1e-3, penalty=0.1, seed=0, selection=np.ones(1), steps=1, steps_per_epoch=1
    )
    network = experiment.MultiTaskNetwork(hidden=(), heads=(1,))
    experiment.ingredients(settings, method, network, tasks=())
    return tuple(name for name in HYPERPARAMETERS if name in read)


def grid(method: str, options: Options) -> list[Configuration]:
    """Returns every combination of the hyperparameters that a method reads, in rising order."""
    names = hyperparameters(method)
    values = [sorted(set(getattr(options, name))) for name in names]
    return [dict(zip(names, combination)) for combination in itertools.product(*values)]


class Seconds(NamedTuple):
    """Wall time of a training."""

    compiling: float
    running: float


class Trained(NamedTuple):
    """A method trained with C configurations and several seeds."""

    configurations: list[Configuration]
    errors: np.ndarray  # (C, seeds, K) on the test set, in the tasks' units
    losses: np.ndarray  # (C, seeds, T, K) training losses, means over windows of steps
    seconds: Seconds


def train(
    problem: experiment.Problem,
    method: str,
    configurations: Sequence[Configuration],
    *,
    seeds: int,
    steps: int,
    gram: str = "exact",
    constant: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Trained:
    """Trains all configurations and seeds side by side, with one compilation.

    Args:
        problem: data, tasks and setting.
        method: as in `experiment.train`.
        configurations: values of the hyperparameters that the method reads.
        seeds: number of seeds: 0, 1, ..., seeds - 1.
        steps: number of steps.
        gram: a name in `balancers.GRAMS`.
        constant: whether to make the hyperparameters constants of the program, as numbers written
            into a script are. New ones then need a new program.
        devices: to spread the configurations over; all by default.
    """
    mesh, padded = spread(configurations, jax.devices() if devices is None else devices)
    columns = {  # what a method does not read has no influence
        name: [values.get(name, 0.0) for values in padded] for name in HYPERPARAMETERS
    }
    settings = experiment.make_settings(problem, method, seeds, steps, gram, **columns)
    # NumPy arrays that a traced function encloses end up in the program as constants.
    enclosed = jax.tree.map(np.asarray, settings)
    axes = jax.tree.map(lambda _: None, settings)
    axes = dataclasses.replace(axes, **dict.fromkeys(HYPERPARAMETERS, 0))
    network, tasks = problem.network, problem.tasks
    length, window = experiment.chunking(steps)
    compiling = 0.0

    def compiled(function: Any, in_axes: tuple, *arguments: Any, donate=(), **static: Any) -> Any:
        nonlocal compiling
        begin = time.perf_counter()
        # The undecorated function: a trace that an earlier call left behind would flatter.
        function = functools.partial(function.__wrapped__, network=network, tasks=tasks, **static)
        program = over_all = over_configurations(function, in_axes, mesh)
        if constant and in_axes[0] is axes:
            program = lambda _, *rest: over_all(enclosed, *rest)
        program = jax.jit(program, donate_argnums=donate).lower(*arguments).compile()
        compiling += time.perf_counter() - begin
        return program

    whole = NamedSharding(mesh, PartitionSpec())
    pool, test = jax.device_put((problem.pool, problem.test), whole)
    batches = experiment.batch_order(problem, steps, seeds)
    parameters = experiment.initial_parameters(network, pool.inputs[:1], settings.seed)
    begin = time.perf_counter()
    arguments = (settings, parameters, pool, batches[:, 0])
    start = compiled(experiment.start_training, (axes, None, None, None), *arguments, method=method)
    carry, history = start(*arguments), []
    arguments = (settings, carry, pool, batches[:, :length])
    own = dict(method=method, window=window, donate=(1,))
    advance = compiled(experiment.continue_training, (axes, 0, None, None), *arguments, **own)
    label = f"{method}, {len(configurations)} x {seeds} runs"
    with tqdm.tqdm(total=steps, desc=f"{label:>26}", unit="step", disable=None) as progress:
        for first in range(0, steps, length):
            chunk = batches[:, first : first + length]
            carry, (losses, _) = advance(settings, carry, pool, chunk)
            history.append(np.asarray(losses))
            progress.update(length)
    evaluate = compiled(experiment.evaluate, (0, None), carry[0], test)
    errors = np.asarray(evaluate(carry[0], test))
    of_each = lambda found: np.stack(
        [experiment.of_own_task(values) for values in found[: len(configurations)]]
    )
    return Trained(
        list(configurations),
        of_each(errors),
        of_each(np.concatenate(history, axis=3)),
        Seconds(compiling, time.perf_counter() - begin - compiling),
    )


def spread(
    configurations: Sequence[Configuration], devices: Sequence[jax.Device]
) -> tuple[Mesh, list[Configuration]]:
    """Returns a mesh of as many devices as help, and as many configurations for each of them.

    Where the number of configurations is no multiple of the number of devices, the last one is
    there more than once.
    """
    each = -(-len(configurations) // len(devices))
    count = -(-len(configurations) // each)
    more = count * each - len(configurations)
    mesh = Mesh(np.array(devices[:count]), ("configuration",))
    return mesh, [*configurations, *configurations[-1:] * more]


def over_configurations(function: Callable, in_axes: tuple, mesh: Mesh) -> Callable:
    """Vectorises over the configurations, each device over its own: no data is exchanged.

    What has no axis of configurations, every device holds whole.
    """
    spec = lambda axis: PartitionSpec() if axis is None else PartitionSpec("configuration")
    return jax.shard_map(
        jax.vmap(function, in_axes=in_axes),
        mesh=mesh,
        in_specs=jax.tree.map(spec, in_axes, is_leaf=lambda axis: axis is None),
        out_specs=PartitionSpec("configuration"),
        check_vma=False,
    )


def lowest(values: np.ndarray) -> int:
    """Returns the index of the smallest finite value, that of diverged runs only if all are."""
    return int(np.where(np.isfinite(values), values, np.inf).argmin())


class Comparison(NamedTuple):
    """All trainings, with the change of their errors against the best single-task networks."""

    problem: experiment.Problem
    trained: dict[str, Trained]  # "STL" first
    reference: Configuration  # of STL
    delta_m: dict[str, np.ndarray]  # (C, seeds) percent
    best: dict[str, int]


def compare(problem: experiment.Problem, trained: dict[str, Trained]) -> Comparison:
    """Compares all configurations with STL at its best learning rate, one reference for all."""
    stl = trained["STL"]
    # The geometric mean over the tasks does not depend on their units.
    index = lowest(np.log(np.maximum(stl.errors.mean(1), 1e-12)).mean(1))
    means = stl.errors[index].mean(0)
    delta_m = {
        name: np.asarray(metrics.delta_m(result.errors, means)) for name, result in trained.items()
    }
    best = {name: lowest(values.mean(1)) for name, values in delta_m.items()}
    return Comparison(problem, trained, stl.configurations[index], delta_m, best | {"STL": index})


def table(comparison: Comparison) -> str:
    """Returns a Markdown table, aligned for reading as it is."""
    read = [name for r in comparison.trained.values() for name in r.configurations[0]]
    names = [name for name in HYPERPARAMETERS if name in read]
    tasks = [task.name for task in comparison.problem.tasks]
    lines = [["method", *(name.replace("_", " ") for name in names), *tasks, "dm% STL", "best"]]
    for method, result in comparison.trained.items():
        for c, values in enumerate(result.configurations):
            lines.append(
                [
                    method,
                    *(f"{values[name]:g}" if name in values else "" for name in names),
                    *map(report.three_digits, result.errors[c].mean(0)),
                    report.spread(comparison.delta_m[method][c]),
                    "*" if c == comparison.best[method] else "",
                ]
            )
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, [f"{'-' * (width - 1)}:" for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.rjust(w) for cell, w in zip(line, widths))} |" for line in lines
    )


def legend(comparison: Comparison, seeds: int) -> str:
    """Says what the columns are."""
    units = ", ".join(f"{task.name} in {task.unit}" for task in comparison.problem.tasks)
    return (
        f"Test errors, lower is better: {units}; mean over the seeds ({seeds}).\n"
        "dm%: mean relative change of the errors against STL, one network per task, at its best\n"
        f"learning rate ({comparison.reference['learning_rate']:g}); mean ± sd over the seeds.\n"
        "*: the best of each method, chosen by the errors shown, hence flattered; to compare\n"
        "methods fairly, choose on data of its own."
    )


def ways_to_train(
    problem: experiment.Problem, method: str, result: Trained, **size: Any
) -> dict[str, Seconds]:
    """Returns the time for a grid in one program, and what two other ways would take.

    For these, one configuration is trained by itself, with constants and with traced values.
    """
    n = len(result.configurations)
    one = [result.configurations[n // 2]]
    fixed = train(problem, method, one, constant=True, **size).seconds
    traced = train(problem, method, one, **size).seconds
    one_by_one = traced._replace(running=n * traced.running)
    return {
        "all together in one program": result.seconds,
        f"{n} programs with constants, {n} x one measured": Seconds(*(n * t for t in fixed)),
        f"one program used {n} times, one use measured": one_by_one,
    }


def describe_time(method: str, result: Trained, ways: dict[str, Seconds]) -> str:
    """Says how long each way to train a grid takes, also relative to the first."""
    together, recompiled, one_by_one = map(sum, ways.values())
    title = f"{method}, {len(result.configurations)} configurations, seconds"
    lines = [f"{title:48} {'compile':>8} {'run':>8} {'total':>8} {'ratio':>6}"]
    lines += [
        f"{way:48} {t.compiling:8.1f} {t.running:8.1f} {sum(t):8.1f} {sum(t) / together:6.1f}"
        for way, t in ways.items()
    ]
    end = f"Compiling every configuration would take {recompiled / together:.1f} times as long,"
    lines += [end, f"using one program again and again {one_by_one / together:.1f} times."]
    return "\n".join(lines)


def figure(comparison: Comparison, seeds: int) -> Figure:
    """Draws Δm against each method's own hyperparameter, a line per learning rate."""
    methods = [method for method in comparison.trained if method != "STL"]
    columns = min(len(methods), 3)
    rows = -(-len(methods) // columns)
    picture = Figure(figsize=(max(6.4, 4.2 * columns), 4.2 * rows), layout="constrained")
    panels = picture.subplots(rows, columns, sharey=True, squeeze=False)
    for ax, method in zip(panels.flat, methods):
        _draw(ax, comparison.trained[method].configurations, comparison.delta_m[method])
        ax.set_title(method, fontsize="medium")
    for ax in panels.flat[len(methods) :]:
        ax.set_axis_off()
    for ax in panels[:, 0]:
        ax.set_ylabel("$\\Delta m$ in % (lower is better)")
    drawn = "mean and range over the seeds" if seeds > 1 else "one seed"
    reference = f"STL at its best learning rate, {comparison.reference['learning_rate']:g}"
    title = f"{comparison.problem.title}: change of the test errors against\n{reference}; {drawn}"
    picture.suptitle(title, fontsize="medium")
    return picture


def _draw(ax: Any, configurations: list[Configuration], delta_m: np.ndarray) -> None:
    """Draws one method: (C, seeds) values over its last hyperparameter, a line for the others."""
    *others, last = configurations[0]
    x = sorted({values[last] for values in configurations})
    # In a grid the last hyperparameter varies fastest.
    for i, y in enumerate(delta_m.reshape(-1, len(x), delta_m.shape[1])):
        values = configurations[i * len(x)]
        text = ", ".join(f"{name.replace('_', ' ')} {values[name]:g}" for name in others)
        style = dict(color=plots.PALETTE[i % len(plots.PALETTE)], marker="osD^vPX"[i % 7])
        ax.plot(x, y.mean(1), label=text or "mean", **style)
        ax.fill_between(x, y.min(1), y.max(1), color=style["color"], alpha=0.2, linewidth=0)
    if x[0] > 0:
        ax.set_xscale("log")
    elif len(x) > 2:
        # Zero has no place on a logarithmic axis; up to the first positive value it is linear.
        ax.set_xscale("symlog", linthresh=x[1])
    ax.set_xticks(x, [f"{value:g}" for value in x])
    ax.set_xticks([], minor=True)
    ax.set_xlabel(last.replace("_", " "))
    ax.axhline(0, color="black", linewidth=0.8, linestyle="--", label="STL")
    ax.legend(frameon=False)


def publish(
    comparison: Comparison,
    times: dict[str, dict[str, Seconds]],
    size: dict[str, Any],
    folder: Path,
) -> str:
    """Writes table.md, results.json and figure.png; returns what to print."""
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{comparison.problem.title}, {size['steps']} steps"
    head, explained = table(comparison), legend(comparison, size["seeds"])
    timed = "\n\n".join(
        describe_time(method, comparison.trained[method], ways) for method, ways in times.items()
    )
    fenced = f"\n```\n{timed}\n```\n" if timed else ""
    text = f"# {title}\n\n{head}\n\n{explained}\n{fenced}"
    (folder / "table.md").write_text(text, encoding="utf-8")
    runs = [
        {
            "method": method,
            **values,
            "errors": result.errors[c].tolist(),
            "delta_m": comparison.delta_m[method][c].tolist(),
            "last_losses": result.losses[c, :, -1].tolist(),
            "best": c == comparison.best[method],
        }
        for method, result in comparison.trained.items()
        for c, values in enumerate(result.configurations)
    ]
    seconds = {
        method: {way: t._asdict() for way, t in ways.items()} for method, ways in times.items()
    }
    numbers = {"title": title, **size, "runs": runs, "seconds": seconds}
    (folder / "results.json").write_text(json.dumps(numbers), encoding="utf-8")
    figure(comparison, size["seeds"]).savefig(folder / "figure.png", dpi=130)
    written = "\n".join(str(folder / name) for name in ("table.md", "results.json", "figure.png"))
    return "\n\n".join(filter(None, [title, head, explained, timed, written]))


def main(make_problem: Callable[[Any], experiment.Problem] = multidigits.make_problem) -> None:
    """Reads the command line, trains, prints the table, writes the files."""
    options = tyro.cli(Options)
    if mistake := options.mistake():
        sys.exit(f"error: {mistake}")
    begin = time.perf_counter()
    print(f"found {jax.device_count()} {jax.devices()[0].device_kind} devices")
    problem = make_problem(options)
    # Programs that a cache on disk keeps from earlier runs would cost nothing to compile.
    jax.config.update("jax_enable_compilation_cache", False)
    size = dict(seeds=options.seeds, steps=options.steps, gram=options.gram)
    names = ["STL", *dict.fromkeys(options.method)]
    trained = {name: train(problem, name, grid(name, options), **size) for name in names}
    timed = names[1:] if options.timing else []
    times = {name: ways_to_train(problem, name, trained[name], **size) for name in timed}
    print(publish(compare(problem, trained), times, size, options.output))
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
