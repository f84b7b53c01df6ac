"""Compares methods at tuned learning rates: tables, figure, and the run of it all.

reduced.py says how; it and multimnist.py hand their problems to :func:`main`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import protocol
import report
from balancers import REFERENCES
from choice import Book, Candidate, Options, candidate_of, run, tuning_pairs
from runs import CONSTANTS, FIELDS, Split

from bilb import metrics

#: What every row is tested against.
AGAINST = ("si", "ls")


class Row(NamedTuple):
    """A method in the table of a problem."""

    name: str
    learning_rates: tuple[float, ...]
    errors: np.ndarray  # (K,) mean over the seeds
    delta_m: dict[str, dict[int, float]]  # reference -> seed -> percent
    p_values: dict[str, float]  # SI and LS -> Holm-adjusted


def rows(split: Split, problem: str, book: Book) -> list[Row]:
    """Returns the methods that have all seeds, by rising mean Δm; references come first."""
    results = {}
    for name in (*REFERENCES, *dict.fromkeys(book.options.methods)):
        if not (results.get("STL") or name == "STL"):
            return []
        found = book.results(split, problem, name)
        if len(found) == book.options.seeds:
            results[name] = found
    errors_of = lambda found: np.array([line["errors"] for line in found.values()])
    bases = {name: errors_of(results[name]).mean(0) for name in REFERENCES if name in results}
    changes = {
        name: {
            base: dict(zip(found, np.asarray(metrics.delta_m(errors_of(found), of)).tolist()))
            for base, of in bases.items()
        }
        for name, found in results.items()
    }
    tested = [name for name in results if name not in REFERENCES]
    p_values: dict[str, dict[str, float]] = {name: {} for name in results}
    for against in AGAINST:
        if against in results:
            others = [name for name in tested if name != against]
            of = lambda name: changes[name]["STL"]
            raw = [protocol.paired_p_value(of(name), of(against)) for name in others]
            for name, value in zip(others, protocol.holm(raw)):
                p_values[name][against] = float(value)
    found = [
        Row(
            name,
            candidate_of(next(iter(results[name].values()))).learning_rates,
            errors_of(results[name]).mean(0),
            changes[name],
            p_values[name],
        )
        for name in results
    ]
    order = lambda row: np.mean([*row.delta_m["STL"].values()])
    finite = lambda value: value if np.isfinite(value) else np.inf
    references = [row for row in found if row.name in REFERENCES]
    return references + sorted(
        (row for row in found if row.name not in REFERENCES), key=lambda row: finite(order(row))
    )


def table(found: Sequence[Row]) -> str:
    """Returns the rows in Markdown."""
    against = [f"p, {name.upper()}" for name in AGAINST]
    bases = list(found[0].delta_m)
    head = ["method", "learning rate", *(f"Δm, {name}" for name in bases), *against]
    cells = [
        [
            row.name,
            " ".join(f"{rate:g}" for rate in dict.fromkeys(sorted(row.learning_rates))),
            *(str(protocol.interval([*row.delta_m[base].values()])) for base in bases),
            *(_p_value(row.p_values.get(name)) for name in AGAINST),
        ]
        for row in found
    ]
    return report.markdown([head, *cells])


def _p_value(value: float | None) -> str:
    if value is None or np.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def by_learning_rate(split: Split, problem: str, book: Book) -> str | None:
    """Returns the mean Δm of the tuning seeds at every learning rate, in Markdown.

    Test errors against those of the separate networks, with the same seeds, at their rates.
    """
    steps = book.options.steps or split.problem.steps

    def errors(name: str) -> dict[Candidate, np.ndarray]:
        wanted = set(tuning_pairs(split, name, book.options))
        of: dict[Candidate, list] = {}
        for line in book.lines(problem, name, steps):
            if (candidate_of(line), line["seed"]) in wanted:
                of.setdefault(candidate_of(line), []).append(line["errors"])
        return {candidate: np.array(values) for candidate, values in of.items()}

    stl, chosen = errors("STL"), book.chosen(split, problem, "STL")
    if chosen is None:
        return None
    at = {candidate.learning_rates[0]: values.mean(0) for candidate, values in stl.items()}
    base = np.array([at[rate][task] for task, rate in enumerate(chosen.learning_rates)])
    rates = book.options.learning_rates
    lines = [["method", *(f"{rate:g}" for rate in rates)]]
    for name in dict.fromkeys(book.options.methods):
        if protocol.parse(name, FIELDS)[0] in CONSTANTS:
            continue
        found = {c.learning_rates[0]: of for c, of in errors(name).items()}
        if all(rate in found for rate in rates):
            change = [np.mean(metrics.delta_m(found[rate], base)) for rate in rates]
            lines.append([name, *(f"{value:+.1f}" for value in change)])
    return report.markdown(lines) if len(lines) > 1 else None


def legend(options: Options) -> str:
    """Says what the columns are."""
    return (
        f"Δm in percent against the mean errors of the separate networks, mean and 95 % t interval "
        f"over {options.seeds} seeds, lower is better; p-values of paired t-tests, adjusted by "
        f"Holm's method for the rows of the table. Learning rates (and constant weights) were "
        f"chosen on a validation set with other seeds, from "
        f"{', '.join(f'{rate:g}' for rate in options.learning_rates)}."
    )


def figure(found: Mapping[str, Sequence[Row]]) -> Figure:
    """Draws the mean Δm of every row against STL with its interval, a panel per problem."""
    longest = max(map(len, found.values()))
    picture = Figure(figsize=(5 * len(found), 1 + 0.17 * longest), layout="constrained")
    for ax, (title, of) in zip(picture.subplots(1, len(found), squeeze=False).flat, found.items()):
        intervals = [protocol.interval([*row.delta_m["STL"].values()]) for row in of]
        shown = [
            (place, i.mean, i.high - i.mean)
            for place, i in enumerate(intervals)
            if np.isfinite([*i]).all()
        ]
        places, means, halves = zip(*shown) if shown else ((), (), ())
        ax.errorbar(means, places, xerr=halves, fmt="o", markersize=3, linewidth=1)
        ax.set_yticks(range(len(of)), [row.name for row in of], fontsize=6)
        ax.set_ylim(longest - 0.5, -0.5)  # rows as high in every panel, the first on top
        ax.axvline(0, color="0.7", linewidth=1, zorder=0)
        if np.max(np.abs(means), initial=0) > 200:
            limits = ax.get_xlim()
            ax.set_xscale("symlog", linthresh=50)
            ax.set_xticks([-50, 0, 50, 200, 1000, 10_000])
            ax.set(xlim=limits)
            ax.xaxis.set_major_formatter("{x:.0f}")
        ax.set(title=title, xlabel="$\\Delta m$ against STL in %, 95 % interval")
    return picture


def publish(splits: Mapping[str, Split], options: Options, name: str) -> str:
    """Writes the tables as Markdown and a figure; returns the tables."""
    book = Book(options.output / f"{name}.jsonl", options)
    found = {split.problem.title: rows(split, name, book) for name, split in splits.items()}
    found = {title: of for title, of in found.items() if of}
    parts = [f"## {title}\n\n{table(of)}" for title, of in found.items()]
    for problem, split in splits.items():
        if rates := by_learning_rate(split, problem, book):
            title = f"### {split.problem.title}: Δm at every learning rate"
            parts.append(f"{title}\n\nTuning seeds ({options.tuning_seeds}).\n\n{rates}")
    text = "\n\n".join([*parts, legend(options)])
    options.output.mkdir(parents=True, exist_ok=True)
    if found:
        figure(found).savefig(options.output / f"{name}.png", dpi=130)
    titled = f"# Methods at tuned learning rates: {name}\n\n{text}\n"
    (options.output / f"{name}.md").write_text(titled, encoding="utf-8")
    return text


def main(options: Options, problems: Mapping[str, Callable[[], Split]], name: str) -> str:
    """Trains what is missing and returns the tables."""
    if mistake := options.mistake(problems):
        sys.exit(f"error: {mistake}")
    book = Book(options.output / f"{name}.jsonl", options)
    splits = {}
    for problem in options.problems:
        try:
            split = splits[problem] = problems[problem]()
        except ModuleNotFoundError as error:  # a data package; the message says how to install it
            sys.exit(f"error: {error}")
        for method in [] if options.report else (*REFERENCES, *dict.fromkeys(options.methods)):
            start = time.perf_counter()
            run(split, problem, method, book)
            if (seconds := time.perf_counter() - start) > 1:  # else it was there
                print(f"{problem} {method} {seconds:.0f} s", flush=True)
            jax.clear_caches()
    return publish(splits, options, name)
