"""Do adaptive weights beat the best constant ones on physics-informed networks?

Trains the networks of examples/pinn.py on several equations, with every method at every learning
rate of a grid. The learning rate of each method is the one with the lowest error on validation
points, and the table shows the errors on other points. What they are held against is ``constant``:
the best of {1, 10, 100, 1000} as the weight of all losses but those of the equation, chosen
likewise, together with the learning rate.

    python benchmarks/pinn.py                                     # some hours on two cores
    python benchmarks/pinn.py --problems poisson helmholtz --seeds 3 --methods ls constant log
    python benchmarks/pinn.py --report                            # the table of what is there

A method may come with a way to take Gram matrices and the decay of their running mean:
``root+nash_mtl:sketch:0.999``. Every run is one line of runs.jsonl as soon as it is done, and is
not repeated: an interrupted benchmark goes on where it stopped, and more seeds, methods or learning
rates add to what is there.

Times are those of one network, without compilation, while the seeds are trained side by side: the
median over the chunks of a run, then over the runs. They are best taken on a machine that does
nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import scipy.stats
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import balancers
import pinn
import report
from equations import EQUATIONS

METHODS = (
    "ls",
    "constant",
    "log",
    "uw",
    "famo",
    "dwa",
    "rlw",
    "gls",
    "imtl_l",
    "stch",
    "log+bilb4mtl_celeba",
    "igb_v1",
    "log+marigold",
    "root+marigold_nash",
    "log+marigold_nash",
    "root+nash_mtl:sketch:0.999",
    "root+nash_mtl:stacked:0.999",
    "log+nash_mtl:sketch:0.99",
    "nash_mtl:stacked",
    "gradnorm",
    "mgda:stacked",
    "upgrad:stacked",
    "cagrad:stacked",
    "fairgrad:stacked",
    "pcgrad:stacked",
    "imtl_g:stacked",
    "aligned_mtl:stacked",
    "config:stacked",
    "db_mtl",
)
#: Of 2, 5, 3 and 4 losses.
PROBLEMS = ("poisson", "helmholtz", "burgers_viscous", "wave_slow")
BASELINE = "constant"


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares methods on physics-informed networks with the best constant weights."""

    problems: tuple[str, ...] = PROBLEMS
    """The equations to solve."""
    methods: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help="Methods and chains, with :GRAM:DECAY where they read Gram matrices."),
    ] = METHODS
    learning_rates: tuple[float, ...] = (2e-3, 5e-3)
    """Initial learning rates of Adam; for each method the better one counts."""
    weights: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    """Weights of the losses that are not of the equation, for the method constant."""
    seeds: int = 10
    """Number of seeds, trained side by side."""
    steps: int = 3_000
    """Training steps."""
    report: bool = False
    """Only print the table of the runs that are there."""
    output: Path = Path("outputs/pinn_benchmark")
    """Folder for the runs and the table."""

    def mistake(self) -> str | None:
        """Says what is wrong with the options, if anything."""
        for problem in self.problems:
            if problem not in EQUATIONS:
                return f"unknown problem {problem!r}; choose from: {', '.join(EQUATIONS)}"
        names = [name.split(":")[0] for name in self.methods]
        if mistake := balancers.mistake(names, pinn.METHODS):
            return mistake
        for name in self.methods:
            if mistake := _gram_mistake(name):
                return mistake
        if self.seeds < 1 or self.steps < 1:
            return "--seeds and --steps must be at least 1"
        for flag in ("learning_rates", "weights"):
            if not getattr(self, flag) or min(getattr(self, flag)) <= 0:
                return f"--{flag.replace('_', '-')} must be positive"
        return None


def _gram_mistake(name: str) -> str | None:
    _, *of_gram = name.split(":")
    if not of_gram:
        return None
    gram, *decay = of_gram
    if gram not in balancers.GRAMS:
        return f"unknown Gram matrix {gram!r} in {name}; choose from: {', '.join(balancers.GRAMS)}"
    try:
        (value,) = map(float, decay or ["0"])
    except ValueError:
        value = np.nan
    if not 0 <= value < 1:
        return f"the decay in {name} must be at least 0 and less than 1"
    if gram == "sketch" and value == 0:
        return f"one sketch says little about the Gram matrix: give a decay in {name} too"
    return None


class Setting(NamedTuple):
    """What a run is known by, but for its seed."""

    problem: str
    method: str
    learning_rate: float
    weight: float  # 1 but for the method constant
    steps: int


class Run(NamedTuple):
    """What is kept of a run."""

    error: float
    validation: float
    seconds_per_step: float


Runs = dict[Setting, dict[int, Run]]  # by seed


def read(path: Path) -> Runs:
    """Returns the runs of a file; a line that was cut short, the last one maybe, does not count."""
    runs: Runs = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            setting = Setting(*(values[name] for name in Setting._fields))
            numbers = (float(values[name]) for name in Run._fields)
            runs.setdefault(setting, {})[values["seed"]] = Run(*numbers)
    return runs


def append(path: Path, setting: Setting, runs: dict[int, Run]) -> None:
    """Adds runs to a file, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_short = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" if cut_short else "")
        for seed, run in runs.items():
            # Errors of networks that diverged are not numbers that JSON knows.
            numbers = {name: f"{value:.6g}" for name, value in run._asdict().items()}
            file.write(json.dumps(setting._asdict() | {"seed": seed} | numbers) + "\n")


def settings(options: Options) -> list[Setting]:
    """Returns all settings that the options ask for."""
    return [
        Setting(problem, method, learning_rate, weight, options.steps)
        for problem in options.problems
        for method in options.methods
        for weight in (options.weights if method == BASELINE else (1.0,))
        for learning_rate in options.learning_rates
    ]


def execute(setting: Setting, seeds: Sequence[int]) -> dict[int, Run]:
    """Trains the seeds of a setting."""
    method, gram, decay, *_ = [*setting.method.split(":"), "exact", "0"][:3]
    run = pinn.train(
        EQUATIONS[setting.problem],
        method,
        seeds=seeds,
        steps=setting.steps,
        learning_rate=setting.learning_rate,
        weight=setting.weight,
        gram=gram,
        decay=float(decay),
    )
    results = zip(seeds, run.final, run.validation)
    return {seed: Run(float(e), float(v), run.seconds_per_step) for seed, e, v in results}


class Result(NamedTuple):
    """A method on a problem, at the setting that validation chose."""

    setting: Setting
    runs: dict[int, Run]

    @property
    def logs(self) -> np.ndarray:
        """The logarithms of the errors of the seeds, infinite where a network diverged."""
        errors = np.array([run.error for run in self.runs.values()])
        return np.log(np.where(np.isfinite(errors), errors, np.inf))

    @property
    def mean(self) -> float:
        """The geometric mean of the errors."""
        return float(np.exp(self.logs.mean()))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Returns the ends of a t interval for the geometric mean; of one seed nothing is known."""
        number = len(self.logs)
        if number < 2 or not np.isfinite(self.logs).all():
            return 0.0, np.inf
        half = scipy.stats.t.ppf(0.5 + level / 2, number - 1) * self.logs.std(ddof=1)
        half /= np.sqrt(number)
        return tuple(np.exp(self.logs.mean() + np.array([-half, half])).tolist())


def chosen(runs: Runs, wanted: Sequence[Setting], seeds: int) -> dict[tuple[str, str], Result]:
    """Returns the result of each problem and method, where all its settings have all seeds."""
    by_method: dict[tuple[str, str], list[Setting]] = {}
    for setting in wanted:
        by_method.setdefault((setting.problem, setting.method), []).append(setting)

    def validation(setting: Setting) -> float:
        values = np.array([runs[setting][seed].validation for seed in range(seeds)])
        return float(np.log(np.where(np.isfinite(values), values, np.inf)).mean())

    complete = lambda setting: all(seed in runs.get(setting, {}) for seed in range(seeds))
    results = {}
    for key, candidates in by_method.items():
        if all(map(complete, candidates)):
            best = min(candidates, key=validation)
            results[key] = Result(best, {seed: runs[best][seed] for seed in range(seeds)})
    return results


def tables(results: dict[tuple[str, str], Result]) -> tuple[list[list[str]], list[list[str]]]:
    """Returns the table of errors and that of what was chosen and took how long, heads first."""
    problems = list(dict.fromkeys(problem for problem, _ in results))
    methods = list(dict.fromkeys(method for _, method in results))
    against = f"/ {BASELINE}"
    errors = [["method", *problems, against]]
    costs = [["method", *(f"{p}: {what}" for p in problems for what in ("at", "ms/step"))]]

    def ratio(method: str) -> str:
        """Of the geometric means over all problems, where both have them all."""
        pairs = [(results.get((p, method)), results.get((p, BASELINE))) for p in problems]
        if not all(ours and theirs for ours, theirs in pairs):
            return ""
        logs = [ours.logs.mean() - theirs.logs.mean() for ours, theirs in pairs]
        return report.three_digits(float(np.exp(np.mean(logs))))

    def error(result: Result | None) -> str:
        if result is None:
            return ""
        low, high = map(report.three_digits, result.interval())
        mean = report.three_digits(result.mean)
        return mean if len(result.runs) < 2 else f"{mean} [{low}, {high}]"

    def cost(result: Result | None) -> list[str]:
        if result is None:
            return ["", ""]
        setting, runs = result.setting, result.runs.values()
        weight = f", w = {setting.weight:g}" if setting.method == BASELINE else ""
        milliseconds = 1e3 * np.median([run.seconds_per_step for run in runs])
        return [f"{setting.learning_rate:g}{weight}", f"{milliseconds:.2f}"]

    for method in methods:
        row = [results.get((problem, method)) for problem in problems]
        errors.append([method, *map(error, row), ratio(method)])
        costs.append([method, *(cell for result in row for cell in cost(result))])
    return errors, costs


def legend(options: Options) -> str:
    """Says what the columns are."""
    return (
        f"Relative L2 errors after {options.steps} steps: geometric mean over {options.seeds} "
        "seed(s) and, in brackets,\nits 95 % t interval; lower is better. "
        f"Last column: geometric mean over the problems of\nthe ratio to {BASELINE}. "
        "Learning rates, and the constant weight w, by the error on\nvalidation points; "
        f"from {', '.join(f'{rate:g}' for rate in options.learning_rates)}, "
        f"and {', '.join(f'{weight:g}' for weight in options.weights)}."
    )


def publish(runs: Runs, options: Options) -> str:
    """Writes the tables as Markdown and returns them as text."""
    found = tables(chosen(runs, settings(options), options.seeds))
    parts = [*map(report.markdown, found), legend(options)]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "pinn.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return "\n\n".join([*map(report.aligned, found), legend(options)])


def main(options: Options) -> None:
    """Trains what is missing and prints the table."""
    if mistake := options.mistake():
        sys.exit(f"error: {mistake}")
    path = options.output / "runs.jsonl"
    wanted = settings(options)
    for number, setting in enumerate([] if options.report else wanted, start=1):
        done = read(path).get(setting, {})
        missing = [seed for seed in range(options.seeds) if seed not in done]
        if missing:
            print(f"{number}/{len(wanted)} {' '.join(map(str, setting))}", flush=True)
            append(path, setting, execute(setting, missing))
    print(publish(read(path), options))


if __name__ == "__main__":
    main(tyro.cli(Options))
