"""Do adaptive weights beat the best constant ones on physics-informed networks?

Trains the networks of examples/pinn.py on several equations, with every method at every learning
rate of a grid. The learning rate of each method is the one with the lowest error on validation
points over the first seeds; the others are trained at that rate only, and the table shows the
errors of all of them on other points. What they are held against is ``constant``: the best of
{1, 10, 100, 1000} as the weight of all losses but those of the equation, chosen likewise, together
with the learning rate.

    python benchmarks/pinn.py                                     # some hours on two cores
    python benchmarks/pinn.py --problems poisson helmholtz --seeds 3 --methods ls constant log
    python benchmarks/pinn.py --report --least 1                  # the table of what is there

A method may come with a way to take Gram matrices and the decay of their running mean,
``root+nash_mtl:sketch:0.999``, and marigold_pinn with the learning rate and the bound of its
logits, ``marigold_pinn@logit_rate=0.1@logit_alpha=0.01@max_logit=4``, with alpha the rate's share
that a cosine ends at; both presets with a preference, ``nash_pinn@conditions=1:sketch``, that all
losses but those of the equation share. Those of jinns, such as ``jinns.soft_adapt``, are run if
named; see pinn_jinns.py. Every run is one line of pinn.jsonl as soon as it is done, and is not
repeated: an interrupted benchmark goes on where it stopped, and more seeds, methods or learning
rates add to what is there. The most telling methods come first, each on all problems.

Times are those of one network, without compilation, while the seeds are trained side by side: the
median over the chunks of a run, then over the runs. They are best taken on a machine that does
nothing else.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import scipy.stats
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import balancers
import pinn
import protocol
import report
from equations import EQUATIONS
from matplotlib.figure import Figure

METHODS = (
    "ls",
    "constant",
    "log",
    "marigold_pinn",
    "nash_pinn:sketch",
    "marigold",
    "lr_annealing:stacked",
    "ntk_weights",
    "softadapt",
    "relobralo",
    "self_adaptive",
    "config:stacked",
    "autobalance",
    "db_pinn:stacked",
    "nash_pinn:stacked",
    "famo",
    "uw",
    "igb_v1",
    "log+bilb4mtl_celeba",
    "log+marigold",
    "log+marigold_nash",
    "log+nash_mtl:sketch:0.99",
    "nash_mtl:stacked",
    "gradnorm:stacked",
    "dwa",
    "rlw",
    "gls",
    "imtl_l",
    "stch",
    "mgda:stacked",
    "upgrad:stacked",
    "cagrad:stacked",
    "fairgrad:stacked",
    "pcgrad:stacked",
    "imtl_g:stacked",
    "aligned_mtl:stacked",
    "db_mtl",
)
#: jinns' own schemes, in the table where they were run.
JINNS = tuple(f"jinns.{n}" for n in ("soft_adapt", "ReLoBRaLo", "lr_annealing", "prior_loss"))
#: Named like methods they stand for their members, beside marigold_pinn (the power 1/2) and
#: nash_pinn (the decay .999): the power of the losses, the decay of the Gram matrix's running mean
#: with and without more random directions in the first steps, how many there are without them,
#: marigold_pinn's own numbers, and the preferences of both.
STUDIES = {
    "exponents": tuple(f"{p}marigold_nash" for p in ("", "quarter+", "log+")),
    "decays": tuple(f"root+nash_mtl:sketch:{d}" for d in (0.9, 0.99, 0.9999)),
    "no_warmup": tuple(f"root+nash_mtl:sketch_1:{d}" for d in (0.9, 0.99, 0.9999)),
    "probes": tuple(f"nash_pinn:sketch_{probes}" for probes in (1, 2, 4)),
    "rates": tuple(f"marigold_pinn@logit_rate={r}" for r in (0.005, 0.01, 0.05, 0.1)),
    "decaying_rates": tuple(
        f"marigold_pinn@logit_rate={rate}@logit_alpha=0.01" for rate in (0.025, 0.05, 0.1, 0.2)
    ),
    "bounds": tuple(f"marigold_pinn@max_logit={bound}" for bound in (2, 4, 10)),
    "conditions": ("nash_pinn@conditions=1:sketch", "marigold_pinn@conditions=1"),
}
#: Of 2, 5, 3 and 4 losses.
PROBLEMS = ("poisson", "helmholtz", "burgers_viscous", "wave_slow")
FIELDS = {"logit_rate": float, "logit_alpha": float, "max_logit": float, "conditions": float}
BASELINE = "constant"
TITLE = "# Physics-informed networks"
HIDDEN = (32, 32, 32)


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares methods on physics-informed networks with the best constant weights."""

    problems: tuple[str, ...] = PROBLEMS
    """The equations to solve."""
    methods: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help="Methods and chains, with :GRAM:DECAY where they read Gram matrices; or the "
            f"studies {', '.join(STUDIES)}."
        ),
    ] = METHODS
    learning_rates: tuple[float, ...] = (5e-3, 1e-2, 2e-2)
    """Initial learning rates of Adam; for each method the best one counts."""
    weights: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    """Weights of the losses that are not of the equation, for the method constant."""
    seeds: int = 10
    """Number of seeds, trained side by side."""
    tuning_seeds: int = 5
    """The first so many choose the learning rate, and the weight of the method constant."""
    steps: int = 2_000
    """Training steps."""
    least: int | None = None
    """A method is in the table with this many seeds at least; with all of them by default."""
    report: bool = False
    """Only print the table of the runs that are there."""
    output: Path = Path(__file__).parent / "results"
    """Folder for the runs, the table and the figure."""

    @property
    def names(self) -> tuple[str, ...]:
        """The methods, those of the studies among them."""
        members = (STUDIES.get(name, (name,)) for name in self.methods)
        return tuple(dict.fromkeys(name for names in members for name in names))

    def mistake(self) -> str | None:
        """Says what is wrong with the options, if anything."""
        for problem in self.problems:
            if problem not in EQUATIONS:
                return f"unknown problem {problem!r}; choose from: {', '.join(EQUATIONS)}"
        own = [name for name in self.names if name not in JINNS]
        try:
            names = [protocol.parse(name.split(":")[0], FIELDS)[0] for name in own]
        except ValueError as error:
            return str(error)
        mistake = balancers.mistake(names, pinn.METHODS)
        if mistake and (own or not self.names):
            return mistake
        for name in own:
            if mistake := _gram_mistake(name):
                return mistake
        if min(self.seeds, self.tuning_seeds, self.steps) < 1:
            return "--seeds, --tuning-seeds and --steps must be at least 1"
        if self.least is not None and not 1 <= self.least <= self.seeds:
            return "--least must be at least 1 and at most --seeds"
        for flag in ("learning_rates", "weights"):
            if not getattr(self, flag) or min(getattr(self, flag)) <= 0:
                return f"--{flag.replace('_', '-')} must be positive"
        return None


def _gram_mistake(name: str) -> str | None:
    method, *of_gram = name.split(":")
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
    if gram.startswith("sketch") and value == 0 and "nash_pinn" not in method:
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
    for line in protocol.read(path):
        setting = Setting(*(line[name] for name in Setting._fields))
        numbers = (float(line[name]) for name in Run._fields)
        runs.setdefault(setting, {})[line["seed"]] = Run(*numbers)
    return runs


def append(path: Path, setting: Setting, runs: dict[int, Run]) -> None:
    """Adds runs to a file, one a line."""
    # Errors of networks that diverged are not numbers that JSON knows.
    numbers = lambda run: {name: f"{value:.6g}" for name, value in run._asdict().items()}
    protocol.append(
        path, [setting._asdict() | {"seed": seed} | numbers(run) for seed, run in runs.items()]
    )


def settings(options: Options) -> list[Setting]:
    """Returns all settings that the options ask for."""
    return [
        Setting(problem, method, learning_rate, weight, options.steps)
        for method in options.names
        for problem in options.problems
        for weight in (options.weights if method == BASELINE else (1.0,))
        for learning_rate in options.learning_rates
    ]


def execute(setting: Setting, seeds: Sequence[int]) -> dict[int, Run]:
    """Trains the seeds of a setting."""
    equation = EQUATIONS[setting.problem]
    common = dict(seeds=seeds, steps=setting.steps, learning_rate=setting.learning_rate)
    if setting.method in JINNS:
        import pinn_jinns

        scheme = setting.method.removeprefix("jinns.")
        final, validation, seconds = pinn_jinns.train(equation, scheme, hidden=HIDDEN, **common)
    else:
        method, *of_gram = setting.method.split(":")
        gram, decay = [*of_gram, *("exact", "0")[len(of_gram) :]]
        method, fields = protocol.parse(method, FIELDS)
        of_method = dict(weight=setting.weight, gram=gram, decay=float(decay), **fields)
        run = pinn.train(equation, method, hidden=HIDDEN, course=False, **common, **of_method)
        final, validation, seconds = run.final, run.validation, run.seconds_per_step
    results = zip(seeds, final, validation)
    return {seed: Run(float(e), float(v), seconds) for seed, e, v in results}


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


def by_method(wanted: Sequence[Setting]) -> dict[tuple[str, str], list[Setting]]:
    """Returns the settings of each problem and method."""
    groups: dict[tuple[str, str], list[Setting]] = {}
    for setting in wanted:
        groups.setdefault((setting.problem, setting.method), []).append(setting)
    return groups


def best(runs: Runs, candidates: Sequence[Setting], tuning_seeds: int) -> Setting | None:
    """Returns the setting with the lowest validation error over the first seeds that all have."""
    first = range(tuning_seeds)
    common = [seed for seed in first if all(seed in runs.get(of, {}) for of in candidates)]
    if not common:
        return None

    def validation(setting: Setting) -> float:
        values = np.array([runs[setting][seed].validation for seed in common])
        return float(np.log(np.where(np.isfinite(values), values, np.inf)).mean())

    return min(candidates, key=validation)


def chosen(runs: Runs, wanted: Sequence[Setting], options: Options) -> dict[Any, Result]:
    """Returns the result of each problem and method, where it has enough seeds."""
    results = {}
    for key, candidates in by_method(wanted).items():
        if setting := best(runs, candidates, options.tuning_seeds):
            found = {s: run for s, run in sorted(runs[setting].items()) if s < options.seeds}
            if len(found) >= (options.least or options.seeds):
                results[key] = Result(setting, found)
    return results


def tables(
    results: dict[tuple[str, str], Result], seeds: int | None = None
) -> tuple[list[list[str]], list[list[str]]]:
    """Returns the table of errors and that of what was chosen and took how long, heads first.

    Where the number of seeds is not ``seeds``, the table of errors says so.
    """
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
        mean, number = report.three_digits(result.mean), len(result.runs)
        cell = mean if number < 2 else f"{mean} [{low}, {high}]"
        return cell if seeds in (None, number) else f"{cell} of {number}"

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
    rates, weights = (
        ", ".join(f"{value:g}" for value in values)
        for values in (options.learning_rates, options.weights)
    )
    first = min(options.tuning_seeds, options.seeds)
    return (
        f"Relative L2 errors after {options.steps} steps: geometric mean over {options.seeds} "
        "seed(s), or as many as the\ncell says, and in brackets its 95 % t interval; lower is "
        "better. Last column: geometric mean over\nthe problems of the ratio to "
        f"{BASELINE}. Learning rates, and the constant weight w, by the error on validation\n"
        f"points over the first {first} seeds; from {rates}, and {weights}. Tanh MLP of\n"
        f"{' x '.join(map(str, HIDDEN))}, Adam decaying along a cosine."
    )


def figure(results: dict[tuple[str, str], Result]) -> Figure:
    """Draws the errors with their intervals, a panel for each problem, a row for each method."""
    problems = list(dict.fromkeys(problem for problem, _ in results))
    methods = list(dict.fromkeys(method for _, method in results))
    size = (2.2 + 2.6 * len(problems), 1.4 + 0.24 * len(methods))
    picture = Figure(figsize=size, layout="constrained")
    panels = picture.subplots(1, len(problems), sharey=True, squeeze=False)[0]
    for ax, problem in zip(panels, problems):
        baseline = results.get((problem, BASELINE))
        if baseline is not None:
            ax.axvline(baseline.mean, color="0.6", linewidth=1.0)
        for row, method in enumerate(methods):
            result = results.get((problem, method))
            if result is None or not np.isfinite(result.mean):
                continue
            low, high = result.interval() if len(result.runs) > 1 else (result.mean, result.mean)
            ax.plot([low, high], [row, row], color="tab:blue", linewidth=1.5)
            ax.plot(result.mean, row, "o", color="tab:blue", markersize=4)
        ax.set_xscale("log")
        ax.set_xlabel("relative L2 error")
        ax.set_title(f"{problem}, K = {len(EQUATIONS[problem].losses)}", fontsize="medium")
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    return picture


def publish(runs: Runs, options: Options) -> str:
    """Writes the tables as Markdown and the figure, and returns the tables as text."""
    # Whatever of the known methods was run is in the table, not only what was asked for.
    shown = dataclasses.replace(options, methods=(*METHODS, *JINNS, *STUDIES, *options.names))
    results = chosen(runs, settings(shown), options)
    found = tables(results, options.seeds)
    parts = [*map(report.markdown, found), legend(options)]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "pinn.md").write_text("\n\n".join([TITLE, *parts]) + "\n", encoding="utf-8")
    if results:
        figure(results).savefig(options.output / "pinn.png", dpi=110)
    return "\n\n".join([*map(report.aligned, found), legend(options)])


def main(options: Options) -> None:
    """Trains what is missing and prints the table."""
    if mistake := options.mistake():
        sys.exit(f"error: {mistake}")
    path = options.output / "pinn.jsonl"
    groups = {} if options.report else by_method(settings(options))

    def train(setting: Setting, seeds: int) -> None:
        done = read(path).get(setting, {})
        if missing := [seed for seed in range(seeds) if seed not in done]:
            print(*setting, f"seeds {missing[0]} to {missing[-1]}", flush=True)
            append(path, setting, execute(setting, missing))

    for candidates in groups.values():
        for setting in candidates:
            train(setting, min(options.tuning_seeds, options.seeds))
        setting = best(read(path), candidates, options.tuning_seeds)
        assert setting is not None  # all of them have these seeds now
        train(setting, options.seeds)
    print(publish(read(path), options))


if __name__ == "__main__":
    main(tyro.cli(Options))
