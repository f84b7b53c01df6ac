"""What the example scripts print and write: a table, its numbers as JSON, and a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from bilb import metrics, plots

if TYPE_CHECKING:
    from experiment import Problem, Run


class Row(NamedTuple):
    """One method in the table."""

    method: str
    errors: np.ndarray  # (K,) mean over the seeds
    delta_m: dict[str, np.ndarray]  # reference -> (seeds,) percent
    mean_rank: float
    seconds: float


def rows(runs: Sequence[Run], references: Sequence[str]) -> list[Row]:
    """Compares the runs.

    Args:
        runs: all runs, those of the references among them.
        references: names of the runs against which Δm is taken. A reference's errors are its means
            over the seeds, so that its own Δm is 0 with the spread of its seeds.
    """
    means = {run.method: run.errors.mean(0) for run in runs}
    ranks = metrics.mean_rank(np.stack(list(means.values())))
    return [
        Row(
            method=run.method,
            errors=means[run.method],
            delta_m={
                name: np.asarray(metrics.delta_m(run.errors, means[name])) for name in references
            },
            mean_rank=float(rank),
            seconds=run.seconds,
        )
        for run, rank in zip(runs, ranks, strict=True)
    ]


def _cells(table: Sequence[Row], task_names: Sequence[str]) -> list[list[str]]:
    references = list(table[0].delta_m)
    head = ["method", *task_names, *(f"dm% {name}" for name in references), "rank", "s"]
    body = [
        [
            row.method,
            *map(three_digits, row.errors),
            *(spread(row.delta_m[name]) for name in references),
            f"{row.mean_rank:.1f}",
            f"{row.seconds:.0f}",
        ]
        for row in table
    ]
    return [head, *body]


def text_table(table: Sequence[Row], task_names: Sequence[str]) -> str:
    """Returns the table in columns of fixed width."""
    return aligned(_cells(table, task_names))


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Returns lines of cells, the head first, in columns of fixed width."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        " ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
        for line in cells
    ]
    lines.insert(1, " ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(table: Sequence[Row], task_names: Sequence[str]) -> str:
    """Returns the same table in Markdown."""
    return markdown(_cells(table, task_names))


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Returns lines of cells, the head first, in Markdown."""
    head, *body = cells
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def three_digits(value: float) -> str:
    """Formats with three significant digits, without an exponent."""
    if not math.isfinite(value) or value == 0:
        return f"{value:.0f}"
    # Rounding first: 9.996 has one digit before the point, but becomes 10.0.
    magnitude = math.floor(math.log10(abs(float(f"{value:.2e}"))))
    return f"{value:.{max(0, 2 - magnitude)}f}"


def spread(values: np.ndarray) -> str:
    """Formats as mean ± standard deviation over the seeds; the mean alone for one seed."""
    mean = f"{values.mean():+z.1f}"
    return mean if len(values) < 2 else f"{mean} ± {values.std(ddof=1):.1f}"


REFERENCES = {
    "STL": "separate single-task networks (STL)",
    "STL-log": "single-task networks trained on the logarithm of the loss (STL-log)",
}


def legend(problem: Problem, seeds: int, references: Sequence[str]) -> str:
    """Says what the columns are."""
    units: dict[str, list[str]] = {}
    for task in problem.tasks:
        units.setdefault(task.unit, []).append(task.name)
    errors = "; ".join(f"{', '.join(names)} in {unit}" for unit, names in units.items())
    against = "\nand against ".join(REFERENCES.get(name, name) for name in references)
    return (
        f"Test errors, lower is better:\n{errors}.\n"
        f"dm%: mean relative change of the errors against {against},\n"
        f"lower is better; mean ± sd over {_seeds(seeds)}. rank: mean rank over the tasks.\n"
        "s: wall seconds, compilation included."
    )


def _seeds(number: int) -> str:
    return f"{number} seed" if number == 1 else f"{number} seeds"


def write_numbers(path: Path, runs: Sequence[Run], table: Sequence[Row], setting: Any) -> None:
    """Writes everything behind the table and the figure as JSON."""
    methods = {
        run.method: {
            "errors": plain(run.errors),
            "delta_m": {name: plain(values) for name, values in row.delta_m.items()},
            "mean_rank": row.mean_rank,
            "seconds": round(run.seconds, 2),
            "steps": run.steps.tolist(),
            "losses": plain(run.losses),
            "weights": plain(run.weights),
        }
        for run, row in zip(runs, table)
    }
    path.write_text(json.dumps({"setting": setting, "methods": methods}), encoding="utf-8")


def plain(values: np.ndarray | None) -> Any:
    """Returns an array as nested lists of numbers with six digits."""
    return None if values is None else [_rounded(v) for v in values.tolist()]


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}")


def figure(problem: Problem, runs: Sequence[Run]) -> Figure:
    """Draws losses and task weights over time, a row for each method, and Δm below.

    The first run is what Δm is taken against.
    """
    names = [task.name for task in problem.tasks]
    base, *compared = runs if len(runs) > 1 else 2 * list(runs)
    methods = [run for run in runs if run.method not in REFERENCES]
    # Bands of many tasks hide each other.
    banded = len(names) <= 6 and len(base.errors) > 1
    shown = lambda history: history if banded else history.mean(0)

    picture = Figure(figsize=(11.0, 2.3 * len(methods) + 4.2), layout="constrained")
    picture.get_layout_engine().set(w_pad=0.1)
    grid = picture.add_gridspec(len(methods) + 1, 2, height_ratios=[*[2.3] * len(methods), 3.4])
    losses = None
    for i, run in enumerate(methods):
        losses = picture.add_subplot(grid[i, 0], sharex=losses, sharey=losses)
        weights = picture.add_subplot(grid[i, 1])
        style = dict(steps=run.steps, names=names)
        plots.losses_over_time(shown(run.losses), log=True, ax=losses, **style)
        losses.set_title(f"{run.method}: training losses", fontsize="medium")
        if run.weights is None:
            weights.set_axis_off()
            weights.text(0.5, 0.5, f"{run.method} has no weights", ha="center", va="center")
        else:
            plots.weights_over_time(shown(run.weights), ax=weights, **style)
            weights.set_title(f"{run.method}: effective task weights", fontsize="medium")
        for ax in (losses, weights):
            ax.set_xlabel("step" if i == len(methods) - 1 else "")
    changes = [100 * (run.errors.mean(0) / base.errors.mean(0) - 1) for run in compared]
    bars = picture.add_subplot(grid[-1, :])
    plots.delta_m_bars(changes, methods=[run.method for run in compared], names=names, ax=bars)
    bars.set_title(f"test errors against {base.method}, mean over the seeds", fontsize="medium")
    if np.max(np.abs(changes)) > 200:
        limits = bars.get_ylim()
        bars.set_yscale("symlog", linthresh=100)
        bars.set_yticks([-100, -50, 0, 50, 100, 200, 500, 1000, 10_000])
        bars.set(ylim=1.2 * np.array(limits))
        bars.yaxis.set_major_formatter("{x:.0f}")

    for ax in picture.axes:
        if ax.get_legend():
            ax.get_legend().remove()
    drawn = "mean and range" if banded else "mean"
    title = f"{problem.title}; {drawn} over {_seeds(len(base.errors))}"
    places = ((losses, "outside upper center", title), (bars, "outside lower center", None))
    for ax, place, title in places:
        handles, labels = ax.get_legend_handles_labels()
        picture.legend(handles, labels, loc=place, title=title, ncols=11, frameon=False)
    return picture


def publish(
    problem: Problem,
    runs: Sequence[Run],
    references: Sequence[str],
    setting: dict[str, Any],
    folder: Path,
) -> str:
    """Writes table.md, results.json and figure.png; returns what to print.

    The runs of the references come first, the one for the bars of the figure at their head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = rows(runs, references)
    names = [task.name for task in problem.tasks]
    explanation = legend(problem, setting["seeds"], references)
    (folder / "table.md").write_text(
        f"# {problem.title}\n\n{markdown_table(table, names)}\n\n{explanation}\n", encoding="utf-8"
    )
    write_numbers(folder / "results.json", runs, table, setting)
    figure(problem, runs).savefig(folder / "figure.png", dpi=130)
    written = "\n".join(str(folder / name) for name in ("table.md", "results.json", "figure.png"))
    return "\n\n".join([problem.title, text_table(table, names), explanation, written])
