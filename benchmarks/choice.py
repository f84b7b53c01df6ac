"""Tunes methods: candidates are tried on tuning seeds, the best is trained with others.

reduced.py says how. Runs are kept in a file of lines, and none is repeated.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import balancers
import experiment
import protocol
import runs
from balancers import REFERENCES
from runs import CONSTANTS, FIELDS, Split

from bilb import metrics

#: The first seed with which candidates are tried: the seeds of the result are below it.
TUNING = 1_000
KNOWN = balancers.METHODS | REFERENCES


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of benchmarks that tune learning rates."""

    problems: tuple[str, ...] = ()
    """The problems."""
    methods: tuple[str, ...] = ()
    """Methods and chains, with @field=value where something is given to them."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Initial learning rates of Adam to choose from."""
    tuning_seeds: int = 3
    """Seeds with which learning rates are chosen."""
    seeds: int = 10
    """Seeds of the result, others than those."""
    candidates: int = 24
    """Random constant weights to choose from, each with all learning rates and one tuning seed."""
    steps: int | None = None
    """Training steps; each problem's own number by default."""
    report: bool = False
    """Only print the tables of the runs that are there."""
    output: Path = Path("outputs")
    """Folder for the runs and the tables."""

    def mistake(self, known: Mapping[str, Any]) -> str | None:
        """Says what is wrong with the options, if anything."""
        for problem in self.problems:
            if problem not in known:
                return f"unknown problem {problem!r}; choose from: {', '.join(known)}"
        try:
            parsed = [protocol.parse(name, FIELDS) for name in self.methods]
        except ValueError as error:
            return str(error)
        if mistake := balancers.mistake([CONSTANTS.get(m, m) for m, _ in parsed], KNOWN):
            return mistake
        if min(self.tuning_seeds, self.seeds, self.candidates) < 1 or (self.steps or 1) < 1:
            return "--tuning-seeds, --seeds, --candidates and --steps must be at least 1"
        if not self.learning_rates or min(self.learning_rates) <= 0:
            return "--learning-rates must be positive"
        return None


class Candidate(NamedTuple):
    """What is chosen on the validation set."""

    learning_rates: tuple[float, ...]  # (N,)
    weights: tuple[float, ...] | None = None  # (K,), of the methods with constant weights


def candidates(split: Split, method: str, options: Options) -> list[Candidate]:
    """Returns what a method is tried with."""
    problem = split.problem
    num_tasks = len(problem.tasks)
    networks = num_tasks if method in REFERENCES else 1
    rates = [(rate,) * networks for rate in options.learning_rates]
    if method not in CONSTANTS:
        return [Candidate(rate) for rate in rates]
    rng = np.random.default_rng(0)
    decades = 1.0 if method == "constant" else 0.5
    drawn = 10 ** rng.uniform(-decades, decades, (options.candidates, num_tasks))
    drawn[0] = 1.0
    if method == "constant":  # relative to the losses of the best constant predictions
        drawn = drawn / trivial_losses(problem)
    drawn = drawn / drawn.mean(1, keepdims=True)
    return [Candidate(r, tuple(w)) for w, r in itertools.product(protocol.rounded(drawn), rates)]


def trivial_losses(problem: experiment.Problem) -> np.ndarray:
    """Returns the losses (K,) of predictions that do not look at the inputs."""
    losses = []
    for task, target in zip(problem.tasks, problem.pool.targets):
        shares = np.bincount(target) / len(target) if task.classes else None
        logs = None if shares is None else np.log(np.maximum(shares, 1e-30))
        losses.append(np.var(target) if shares is None else -(shares * logs).sum())
    return np.array(losses)


def execute(
    split: Split, name: str, pairs: Sequence[tuple[Candidate, int]], options: Options
) -> list[protocol.Line]:
    """Trains candidates, each with a seed, as many at once as one program takes; a line for each.

    The program takes as many runs as there are learning rates times tuning seeds, or seeds: then
    choosing and testing share what was compiled. Groups that are not full are filled up.
    """
    problem = split.problem
    steps = options.steps or problem.steps
    method, _ = protocol.parse(name, FIELDS)
    num_tasks = len(problem.tasks)
    width = max(len(options.learning_rates) * options.tuning_seeds, options.seeds)
    lines = []
    for begin in range(0, len(pairs), width):
        group = pairs[begin : begin + width]
        full = [*group, *[group[-1]] * (width - len(group))]
        own = np.eye(num_tasks) if method in REFERENCES else np.ones((1, num_tasks))
        together = runs.Runs(
            np.array([candidate.learning_rates for candidate, _ in full]),
            np.array([seed for _, seed in full]),
            np.stack([own if c.weights is None else np.array([c.weights]) for c, _ in full]),
        )
        start = time.perf_counter()
        results = zip(group, *runs.train(split, name, together, steps))
        each = (time.perf_counter() - start) / width
        for (candidate, seed), validation, test in results:
            rates = candidate.learning_rates
            lines.append(
                {
                    "method": name,
                    "learning_rate": list(rates) if method in REFERENCES else rates[0],
                    "weights": candidate.weights,
                    "seed": seed,
                    "steps": steps,
                    "validation": protocol.rounded(validation),
                    "errors": protocol.rounded(test),
                    "seconds": protocol.rounded(each),
                }
            )
    return lines


def candidate_of(line: protocol.Line) -> Candidate:
    """Returns what a line was trained with."""
    rates = line["learning_rate"]
    weights = line["weights"]
    return Candidate(
        tuple(rates) if isinstance(rates, list) else (rates,),
        None if weights is None else tuple(weights),
    )


def choose(lines: Sequence[protocol.Line], method: str, stl: np.ndarray | None) -> Candidate:
    """Returns the candidate that is best on the validation set.

    Args:
        lines: of the tuning seeds.
        method: without fields.
        stl: validation errors (K,) of the separate networks; a reference needs none, as it chooses
            for each task by itself.
    """
    by_candidate: dict[Candidate, list[np.ndarray]] = {}
    for line in lines:
        by_candidate.setdefault(candidate_of(line), []).append(np.array(line["validation"]))
    if method not in REFERENCES:
        score = lambda errors: np.asarray(metrics.delta_m(np.stack(errors), stl)).tolist()
        return protocol.best({c: score(errors) for c, errors in by_candidate.items()})
    num_tasks = len(lines[0]["validation"])
    rates = [
        protocol.best({c.learning_rates[k]: [e[k] for e in es] for c, es in by_candidate.items()})
        for k in range(num_tasks)
    ]
    return Candidate(tuple(rates))


@dataclasses.dataclass(frozen=True)
class Book:
    """The runs of a file, by problem, method and number of steps."""

    path: Path
    options: Options

    def lines(self, problem: str, name: str, steps: int) -> list[protocol.Line]:
        """Returns the runs of a method on a problem."""
        key = (problem, name, steps)
        found = protocol.read(self.path)
        return [x for x in found if (x["problem"], x["method"], x["steps"]) == key]

    def chosen(self, split: Split, problem: str, name: str) -> Candidate | None:
        """Returns the best candidate on the validation set, None where some were not tried."""
        wanted = tuning_pairs(split, name, self.options)
        steps = self.options.steps or split.problem.steps
        lines = self.lines(problem, name, steps)
        of = [line for line in lines if (candidate_of(line), line["seed"]) in set(wanted)]
        if len(of) < len(wanted):
            return None
        method, _ = protocol.parse(name, FIELDS)
        if method in REFERENCES:
            return choose(of, method, None)
        stl = self.results(split, problem, "STL")
        return choose(of, method, np.mean([x["validation"] for x in stl.values()], axis=0))

    def results(self, split: Split, problem: str, name: str) -> dict[int, protocol.Line]:
        """Returns the runs of the chosen candidate by their seeds, as far as they are there."""
        chosen = self.chosen(split, problem, name)
        lines = self.lines(problem, name, self.options.steps or split.problem.steps)
        of = {x["seed"]: x for x in lines if candidate_of(x) == chosen}
        return {seed: of[seed] for seed in range(self.options.seeds) if seed in of}


def tuning_pairs(split: Split, name: str, options: Options) -> list[tuple[Candidate, int]]:
    """Returns the candidates of a method, each with the seeds to try it with."""
    method, _ = protocol.parse(name, FIELDS)
    number = 1 if method in CONSTANTS else options.tuning_seeds
    tried = candidates(split, method, options)
    return [(candidate, TUNING + seed) for candidate in tried for seed in range(number)]


def run(split: Split, problem: str, name: str, book: Book) -> None:
    """Does what is missing of a method on a problem: the choice on validation, then the result."""
    options = book.options
    steps = options.steps or split.problem.steps

    def train_missing(pairs):
        lines = book.lines(problem, name, steps)
        done = {(candidate_of(line), line["seed"]) for line in lines}
        if missing := [pair for pair in pairs if pair not in done]:
            new = execute(split, name, missing, options)
            protocol.append(book.path, [{"problem": problem} | line for line in new])

    train_missing(tuning_pairs(split, name, options))
    chosen = book.chosen(split, problem, name)
    train_missing([(chosen, seed) for seed in range(options.seeds)])
