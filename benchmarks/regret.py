"""How far is each method from the best one, on each problem and in the worst case?

Reads the JSON lines that the other benchmarks write, one a run, and of as many files as are given.
What a line has tells what is compared:

* ``error`` (physics-informed networks, pinn.py): the ratio of the geometric mean of a method's
  errors to that of the best method; 1 is the best;
* ``errors``, one for each task: the difference in Δm, in points of percent, against the mean errors
  of the separate networks, method ``STL`` of the same problem; 0 is the best.

Of the settings of a method (learning rate, weights, steps) the one with the lowest ``validation``
counts where lines have one number, compared over the seeds that all settings have; where they have
one per task, seeds from 1000 on were for that choice, and the setting that has others is the one
that was chosen. Means are over the seeds of both, and the brackets are 95 % t intervals of the
differences, of logarithms for ratios, from seed to seed: methods share the seeds, and with them the
points, batches and initial parameters. ``--against`` takes one method in the place of the best.

    python benchmarks/regret.py benchmarks/results/*.jsonl
    python benchmarks/regret.py benchmarks/results/pinn.jsonl --against constant
    python benchmarks/regret.py outputs/reduced/reduced.jsonl --problems qm9 --methods si ls famo

The worst case is over the problems that a method was run on; how many they are stands beside it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import scipy.stats
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import protocol
import report
from protocol import Line

from bilb import metrics

BASE = "STL"
#: Separate networks are what Δm is measured against, not methods to choose from.
REFERENCES = (BASE, "STL-log")
TUNING = 1_000
#: The same method under two names.
ALIASES = {"log": "si", "root+marigold_nash": "marigold_pinn"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares methods with the best one on each problem."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON lines of the other benchmarks."""
    methods: tuple[str, ...] = ()
    """The methods to compare; all of the files by default."""
    problems: tuple[str, ...] = ()
    """The problems; all of the files by default."""
    against: str | None = None
    """The method to compare with, on each problem the best one by default."""
    seeds: int = 2
    """A method counts on a problem with at least this many seeds."""
    output: Path | None = None
    """Folder for regret.md, or against.md."""


class Scores(NamedTuple):
    """What the methods reach on a problem, lower is better."""

    ratio: bool  # whether they are logarithms, whose differences are shown as ratios
    by_method: dict[str, dict[int, float]]  # method -> seed -> score


class Regret(NamedTuple):
    """The distance to the best method, and the ends of its interval."""

    mean: float
    low: float
    high: float


def grouped(lines: Sequence[Line], key: Callable[[Line], Any]) -> dict[Any, list[Line]]:
    """Returns the lines by a key, in their order."""
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return groups


def setting(line: Line) -> str:
    """Returns what a run is known by besides problem, method and seed."""
    names = ("learning_rate", "weight", "weights", "steps")
    return json.dumps({name: line.get(name) for name in names})


def finite(value: Any) -> float:
    """Returns a number, infinity for what is not finite."""
    value = float(value)
    return value if math.isfinite(value) else math.inf


def logs_of_best(lines: Sequence[Line]) -> dict[int, float]:
    """Returns the logarithms of the errors at the setting that validation chooses, by seed."""
    by_setting = [{line["seed"]: line for line in of} for of in grouped(lines, setting).values()]
    common = set.intersection(*(set(runs) for runs in by_setting))
    log = lambda line, name: math.log(max(finite(line[name]), 1e-30))
    if not common:
        return {}
    best = min(by_setting, key=lambda runs: sum(log(runs[s], "validation") for s in common))
    return {seed: log(best[seed], "error") for seed in sorted(best)}


def chosen_before(lines: Sequence[Line]) -> dict[int, list[float]]:
    """Returns the errors (K,) of the setting that was run with seeds for the result, by seed."""
    tested = [line for line in lines if line["seed"] < TUNING]
    if not tested:
        return {}
    most = max(grouped(tested, setting).values(), key=len)
    return {line["seed"]: line["errors"] for line in most}


def scores(lines: Sequence[Line]) -> Scores:
    """Returns the scores of the methods on the problem that all lines are of.

    Raises:
        ValueError: for lines without ``error`` or ``errors``, and for ``errors`` without STL.
    """
    by_method = grouped(lines, lambda line: ALIASES.get(line["method"], line["method"]))
    if all("error" in line for line in lines):
        return Scores(True, {method: logs_of_best(of) for method, of in by_method.items()})
    problem = lines[0]["problem"]
    if not all("errors" in line for line in lines):
        raise ValueError(f"the lines of {problem} have neither `error` nor `errors` throughout.")
    errors = {method: chosen_before(of) for method, of in by_method.items()}
    if not errors.get(BASE):
        raise ValueError(f"the lines of {problem} lack the method {BASE}, which Δm is against.")
    base = np.mean([*errors[BASE].values()], axis=0)
    delta_m = lambda values: finite(metrics.delta_m(np.array(values), base))
    return Scores(
        False, {m: {seed: delta_m(e) for seed, e in of.items()} for m, of in errors.items()}
    )


def regrets(
    found: Scores, methods: Sequence[str], seeds: int, against: str | None = None
) -> dict[str, Regret]:
    """Returns the distance of each method to the one with the lowest mean over the seeds of all.

    Or to the one to compare ``against``; none where that was not run.
    """
    of = found.by_method
    asked = lambda name: name not in REFERENCES and (not methods or name in methods)
    if against is not None:
        both = lambda name: len(of[name].keys() & of.get(against, {}).keys())
        names = [name for name in of if asked(name) and both(name) >= seeds]
        return {name: distance(of[name], of[against], found.ratio) for name in names}
    counted = {name: of[name] for name in of if asked(name) and len(of[name]) >= seeds}
    if not counted:
        return {}
    shared = set.intersection(*(set(of) for of in counted.values()))
    mean = lambda name: np.mean([counted[name][seed] for seed in shared or counted[name]])
    best = min(counted, key=mean)
    return {name: distance(counted[name], counted[best], found.ratio) for name in counted}


def distance(own: dict[int, float], best: dict[int, float], ratio: bool) -> Regret:
    """Returns the difference of the means over the seeds of both, and its t interval.

    Without a seed that both have the means are of all seeds, and the interval has no ends.
    """
    shape = np.exp if ratio else lambda x: x
    worst = float(shape(np.inf))
    common = sorted(own.keys() & best.keys())
    mean_of = lambda of: np.mean([of[seed] for seed in common or of])
    mean = mean_of(own) - mean_of(best)
    if not np.isfinite(mean):
        return Regret(worst, worst, worst)
    half = np.inf
    if own == best:
        half = 0.0
    elif len(common) > 1:
        differences = np.array([own[seed] - best[seed] for seed in common])
        half = scipy.stats.t.ppf(0.975, len(common) - 1) * differences.std(ddof=1)
        half /= np.sqrt(len(common))
    return Regret(*(float(shape(value)) for value in (mean, mean - half, mean + half)))


def table(
    found: dict[str, Scores],
    methods: Sequence[str] = (),
    seeds: int = 2,
    against: str | None = None,
) -> list[list[str]]:
    """Returns a row for each method: its distances, and the worst of each kind. Head first.

    Rows are in the order of the worst cases: those of all problems first.
    """
    by_problem = {name: regrets(of, methods, seeds, against) for name, of in found.items()}
    names = dict.fromkeys(name for of in by_problem.values() for name in of)
    kinds = [kind for kind in (True, False) if any(of.ratio == kind for of in found.values())]
    titles = {True: "worst ratio", False: "worst points"}

    def number(value: float, ratio: bool) -> str:
        return report.three_digits(value) if ratio else f"{value:+.1f}"

    def cell(problem: str, name: str) -> str:
        regret = by_problem[problem].get(name)
        if regret is None:
            return ""
        mean, low, high = (number(value, found[problem].ratio) for value in regret)
        return mean if low == high else f"{mean} [{low}, {high}]"

    def of_kind(name: str, kind: bool) -> list[float]:
        problems = [p for p, of in found.items() if of.ratio == kind and name in by_problem[p]]
        return [by_problem[p][name].mean for p in problems]

    def worst(name: str, kind: bool) -> str:
        number_of_kind = sum(of.ratio == kind for of in found.values())
        values = of_kind(name, kind)
        return f"{number(max(values), kind)} ({len(values)}/{number_of_kind})" if values else ""

    def order(name: str) -> Any:
        values = [of_kind(name, kind) for kind in kinds]
        return -sum(map(len, values)), [max(v, default=math.inf) for v in values]

    head = ["method", *found, *(titles[kind] for kind in kinds)]
    rows = [
        [name, *(cell(p, name) for p in found), *(worst(name, kind) for kind in kinds)]
        for name in sorted(names, key=order)
    ]
    return [head, *rows]


def main(options: Options) -> None:
    """Prints the table, and writes it if there is a folder for it."""
    missing = [str(path) for path in options.files if not path.exists()]
    if missing or not options.files:
        sys.exit(f"error: no such file: {', '.join(missing) or 'give at least one'}")
    lines = [line for path in options.files for line in protocol.read(path)]
    try:
        found = {
            problem: scores(of)
            for problem, of in grouped(lines, lambda line: line["problem"]).items()
            if not options.problems or problem in options.problems
        }
    except (KeyError, ValueError) as error:
        sys.exit(f"error: not lines of a benchmark: {error}")
    if options.against not in (None, *(name for of in found.values() for name in of.by_method)):
        sys.exit(f"error: no lines of {options.against!r}, which --against names")
    cells = table(found, options.methods, options.seeds, options.against)
    print(report.aligned(cells))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        name = "regret.md" if options.against is None else "against.md"
        title = "Regret" if options.against is None else f"Against {options.against}"
        text = f"# {title}\n\n{report.markdown(cells)}\n"
        (options.output / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options))
