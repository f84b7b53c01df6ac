"""Does the Nash balance of physics-informed losses hold elsewhere, and is there a better probe?

Four studies around pinn.py, with its networks and steps, on two of its equations:

* ``probes``: along what the Gram matrix is sketched, by one direction a step and 16 in each of the
  first twenty: entries ±1 (bilb's), Gaussian ones, the optimiser's last update, and entries ±1 in
  Adam's metric, that is divided by the fourth root of its second moments;
* ``sgd``: SGD with momentum 0.9 in the place of Adam;
* ``fixed``: the points of the first step at all steps;
* ``many``: Helmholtz's equation with each side in nine pieces, so that there are 37 losses; the
  preference of a piece is 1 in ``nash_pinn``, and 1/9 in ``nash_pinn_shares``; likewise for
  ``marigold_pinn``.

The learning rate of each row, and of 10 and 100 the constant weight of all losses but those of the
equation, are the ones with the lowest error on validation points over the seeds; the errors shown
are those of the same seeds on other points.

    python benchmarks/pinn_variants.py                 # half an hour on one core
    python benchmarks/pinn_variants.py --studies sgd --seeds 3
    python benchmarks/pinn_variants.py --report

Every run is one line of pinn_variants.jsonl as soon as it is done, and is not repeated.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import pinn
import protocol
import report
from equations import EQUATIONS, Box, Equation

import bilb

HIDDEN = (32, 32, 32)
PIECES = 9
SKETCH = bilb.grams.sketch()
PROBES = ("signs", "gaussian", "update", "adam")


class Study(NamedTuple):
    """What a study compares, and on what."""

    problems: tuple[str, ...]
    methods: tuple[str, ...]
    learning_rates: tuple[float, ...] = (5e-3, 1e-2, 2e-2)


CONSTANT = ("constant=10", "constant=100")
METHODS = (*CONSTANT, "nash_pinn", "marigold_pinn")
SHARED = ("nash_pinn_shares", "marigold_pinn_shares")
TWO = ("helmholtz", "wave_slow")
STUDIES = {
    "probes": Study(TWO, tuple(f"probe={name}" for name in PROBES)),
    "sgd": Study(TWO, METHODS, (1e-4, 1e-3, 1e-2, 1e-1)),
    "fixed": Study(TWO, METHODS),
    "many": Study(("helmholtz_in_pieces",), (*METHODS, *SHARED)),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares variants of the Nash balance on physics-informed networks."""

    studies: tuple[str, ...] = tuple(STUDIES)
    """The studies."""
    seeds: int = 5
    """Number of seeds, trained side by side."""
    steps: int = 2_000
    """Training steps."""
    report: bool = False
    """Only print the tables of the runs that are there."""
    output: Path = Path(__file__).parent / "results"
    """Folder for the runs and the tables."""

    def mistake(self) -> str | None:
        """Says what is wrong with the options, if anything."""
        for study in self.studies:
            if study not in STUDIES:
                return f"unknown study {study!r}; choose from: {', '.join(STUDIES)}"
        if min(self.seeds, self.steps) < 1:
            return "--seeds and --steps must be at least 1"
        return None


def in_pieces(pieces: int = PIECES, number: int = 4) -> Equation:
    """Returns Helmholtz's equation with a loss for each piece of the boundary."""
    whole = EQUATIONS["helmholtz"]
    inside, *sides = whole.losses
    boxes = {}
    for side in sides:
        (box,) = whole.regions[side]
        ends = np.linspace(box.low, box.high, pieces + 1)
        spans = enumerate(itertools.pairwise(map(tuple, ends.tolist())))
        boxes |= {f"{side} {i}": Box(number, low, high) for i, (low, high) in spans}

    def residuals(field, points):
        together = {
            side: jnp.concatenate([points[name] for name in boxes if name.startswith(side)])
            for side in sides
        }
        of_equation, *on_sides = whole.residuals(field, {"inside": points["inside"], **together})
        return of_equation, *(piece for side in on_sides for piece in jnp.split(side, pieces))

    regions = {"inside": whole.regions["inside"]} | {name: (box,) for name, box in boxes.items()}
    return dataclasses.replace(whole, losses=(inside, *boxes), regions=regions, residuals=residuals)


PROBLEMS = {name: EQUATIONS[name] for name in TWO} | {"helmholtz_in_pieces": in_pieces()}


def balancer_of(method: str, number: int) -> tuple[optax.GradientTransformation, dict[str, Any]]:
    """Returns a balancer of that many losses, and what ``bilb.value_and_grad`` takes with it."""
    name, _, value = method.partition("=")
    if name == "constant":
        return bilb.linear_scalarization(np.array([1.0, *[float(value)] * (number - 1)])), {}
    share = 1 / PIECES if name in SHARED else 1.0
    preference = np.array([1.0, *[share] * (number - 1)])
    if name.startswith("marigold_pinn"):
        return bilb.presets.marigold_pinn(preference=preference), {}
    return bilb.presets.nash_pinn(preference=preference), {"gram": SKETCH}


def direction(kind: str, key: Any, update: Any, moments: Any) -> Any:
    """Returns a probe of a kind, as long as one of entries ±1."""
    random = lambda sample: optax.tree.random_like(key, update, sampler=sample)
    probe = random(jax.random.normal if kind == "gaussian" else jax.random.rademacher)
    if kind == "update":
        probe = update
    if kind == "adam":
        probe = jax.tree.map(lambda p, m: p / jnp.sqrt(jnp.sqrt(m) + 1e-8), probe, moments)
    if kind in ("signs", "gaussian"):
        return probe
    length = np.sqrt(sum(leaf.size for leaf in jax.tree.leaves(update)))
    return optax.tree.scale(length / jnp.maximum(optax.tree.norm(probe), 1e-30), probe)


def sketch(
    kind: str,
    task_losses: Callable[..., Any],
    params: Any,
    points: Any,
    *,
    number: Any,
    key: Any,
    update: Any,
    moments: Any,
) -> Any:
    """Returns the Gram matrix (K, K) of a step, estimated along probes of a kind."""
    losses, _, pushforward = bilb.linearize(task_losses, params, points)
    early = number < SKETCH.warmup_steps
    probes = SKETCH.probes_of(number, losses.size)

    def add(i, total):
        of = lambda kind: direction(kind, jax.random.fold_in(key, i), update, moments)
        probe = of(kind)
        if kind == "update":  # one update is one direction: others until there are many
            probe = jax.tree.map(lambda a, b: jnp.where(early, a, b), of("signs"), probe)
        slopes = pushforward(probe)
        return total + jnp.outer(slopes, slopes)

    return jax.lax.fori_loop(0, probes, add, jnp.zeros((losses.size,) * 2)) / probes


@functools.partial(jax.jit, static_argnames=("study", "problem", "method", "steps"))
def parameters_of(
    seeds: Any, learning_rates: Any, *, study: str, problem: str, method: str, steps: int
) -> Any:
    """Trains networks and returns their parameters, leading axes learning rates and seeds."""
    equation = PROBLEMS[problem]
    network = pinn.Network(equation.corners, equation.outputs, HIDDEN)

    def task_losses(parameters, points):
        return equation.task_losses(functools.partial(network.apply, parameters), points)

    def run(learning_rate, seed):
        schedule = optax.cosine_decay_schedule(learning_rate, steps, alpha=0.01)
        optimizer = optax.sgd(schedule, momentum=0.9) if study == "sgd" else optax.adam(schedule)
        key, probe_key = jax.random.split(jax.random.key(seed))
        params = network.init(key, jnp.zeros((1, len(equation.coordinates))))
        points_of = lambda number: pinn.draw(equation, seed, 0 if study == "fixed" else number)
        balancer, given = balancer_of(method, len(equation.losses))
        driver = bilb.value_and_grad(task_losses, balancer, **given)
        kind = method.partition("=")[2] if study == "probes" else None
        state = driver.init(params, points_of(0))

        def step(carry, number):
            params, opt_state, state, update = carry
            points, given = points_of(number), {}
            if kind:
                of_step = dict(number=number, key=jax.random.fold_in(probe_key, number))
                of_step |= dict(update=update, moments=opt_state[0].nu)
                given["gram"] = sketch(kind, task_losses, params, points, **of_step)
            _, grads, state = driver(params, state, points, **given)
            update, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, update), opt_state, state, update), None

        carry = params, optimizer.init(params), state, optax.tree.zeros_like(params)
        return jax.lax.scan(step, carry, jnp.arange(steps))[0][0]

    return jax.vmap(jax.vmap(run, (None, 0)), (0, None))(learning_rates, seeds)


def execute(study: str, problem: str, method: str, options: Options) -> list[protocol.Line]:
    """Trains all seeds with all learning rates and returns their lines."""
    equation, rates = PROBLEMS[problem], STUDIES[study].learning_rates
    setting = {"study": study, "problem": problem, "method": method}
    numbers = jnp.arange(options.seeds), jnp.array(rates)
    params = parameters_of(*numbers, steps=options.steps, **setting)
    reference = equation.reference()
    points = reference.points().astype(np.float32)
    lines = []
    for number, rate in enumerate(rates):
        of_rate = jax.tree.map(lambda x, i=number: x[i], params)
        values = pinn.evaluate(of_rate, points, equation=equation, hidden=HIDDEN)
        errors = pinn.relative_l2(np.asarray(values), reference.values)
        lines += [
            setting
            | {"learning_rate": rate, "steps": options.steps, "seed": seed}
            | {"error": protocol.rounded(error), "validation": protocol.rounded(validation)}
            for seed, (error, validation) in enumerate(errors.T)
        ]
    return lines


def cell(lines: list[protocol.Line], method: str) -> str:
    """Returns the errors of a method on one problem, at its best setting by validation."""
    logs = lambda of, what: np.log([x[what] if np.isfinite(x[what]) else np.inf for x in of])
    groups: dict[Any, list[protocol.Line]] = {}
    for line in lines:
        if line["method"] == method or line["method"].startswith(f"{method}="):
            groups.setdefault((line["method"], line["learning_rate"]), []).append(line)
    if not groups:
        return ""
    key = protocol.best({key: logs(of, "validation") for key, of in groups.items()})
    found = protocol.interval(logs(groups[key], "error"))
    mean, low, high = (report.three_digits(float(np.exp(x))) for x in found)
    weight = f", w = {key[0].partition('=')[2]}" if method == "constant" else ""
    return f"{mean} [{low}, {high}] at {key[1]:g}{weight}"


def table(name: str, lines: list[protocol.Line]) -> str:
    """Returns the table of a study in Markdown."""
    study = STUDIES[name]
    of = {p: [x for x in lines if (x["study"], x["problem"]) == (name, p)] for p in study.problems}
    methods = dict.fromkeys(m.partition("=")[0] if m in CONSTANT else m for m in study.methods)
    rows = [[method, *(cell(of[problem], method) for problem in of)] for method in methods]
    return f"## {name}\n\n{report.markdown([['method', *study.problems], *rows])}"


def publish(options: Options) -> str:
    """Writes the tables as Markdown and returns them."""
    lines = protocol.read(options.output / "pinn_variants.jsonl")
    lines = [x for x in lines if x["steps"] == options.steps and x["seed"] < options.seeds]
    text = (
        "# Variants of the Nash balance on physics-informed networks\n\nRelative L2 errors after "
        f"{options.steps} steps, geometric mean over {options.seeds} seeds and 95 % t interval, "
        "and the learning rate that validation chose.\n\n"
    )
    text += "\n\n".join(table(name, lines) for name in STUDIES)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "pinn_variants.md").write_text(text + "\n", encoding="utf-8")
    return text


def main(options: Options) -> None:
    """Trains what is missing and prints the tables."""
    if mistake := options.mistake():
        sys.exit(f"error: {mistake}")
    path = options.output / "pinn_variants.jsonl"
    for name in () if options.report else options.studies:
        study = STUDIES[name]
        for problem in study.problems:
            for method in study.methods:
                wanted = {"study": name, "problem": problem, "method": method}
                wanted["steps"] = options.steps
                done = [x for x in protocol.read(path) if wanted.items() <= x.items()]
                known = {(x["learning_rate"], x["seed"]) for x in done}
                if not {*itertools.product(study.learning_rates, range(options.seeds))} <= known:
                    print(name, problem, method, flush=True)
                    lines = execute(name, problem, method, options)
                    new = lambda x, known=known: (x["learning_rate"], x["seed"]) not in known
                    protocol.append(path, filter(new, lines))
                jax.clear_caches()
    print(publish(options))


if __name__ == "__main__":
    main(tyro.cli(Options))
