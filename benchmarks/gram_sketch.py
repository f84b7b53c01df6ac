"""How far does the noise of a sketched Gram matrix move the weights of the methods that read it?

Trains the small networks of examples/ on the mean of the log losses and takes, at every step, the
Gram matrix of the log losses over the shared trunk: exactly, and by ``bilb.grams.sketch`` with 1, 4
and 16 probes. From the running means of both, with the same decay, each method makes its weights;
what is measured is the distance between them, the median over the last third of the training.

* K = 3: MultiDigits, left digit, right digit and ink
* K = 11: the properties of QM9's molecules
* K = 40: MultiDigits, is it this digit (left, right), and the ink in every row and column

Distances are total variations of weights that are scaled to sum 1, between 0 and 1; for IMTL-G,
whose weights may be negative, the norm of the difference over the norm of the exact weights. Two
columns give the scale: how far the exact weights are from those of the batch's own Gram matrix
(mini-batch noise), and from equal weights. GradNorm reads norms and has no decay of its own: the
row "none" gives it each step's norms, as the library does, the other rows those of running means.

What was seen, in one run each (results/gram_sketch.md): call a sketch good enough where the
distance is at most 0.1. With one probe and decay .99 that holds for MGDA and Nash-MTL at K = 3 and
11, and for Nash-MTL at K = 40; MGDA needs four probes or decay .999 there. IMTL-G, which solves a
linear system, has .05, .15 and .47, and with .999 .03, .06 and .17: with many tasks it wants more
probes. GradNorm averages by itself, yet needs a decay at K = 11: .24 without, .05 with .9.

    pip install 'bilb[bench]'
    python benchmarks/gram_sketch.py
    python benchmarks/gram_sketch.py --num-tasks 3 40      # without QM9
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import experiment
import multidigits

import bilb

METHODS = {"mgda": bilb.mgda(), "nash_mtl": bilb.nash_mtl(), "imtl_g": bilb.imtl_g()}


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures how far sketched Gram matrices move the weights of the methods."""

    num_tasks: tuple[int, ...] = (3, 11, 40)
    """The problems, by their number of tasks."""
    probes: tuple[int, ...] = (1, 4, 16)
    """Probes per step."""
    decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    """Decays of the running mean."""
    steps: int = 3_000
    """Training steps; weights are compared in the last third of them."""
    every: int = 20
    """Steps between two comparisons."""
    learning_rate: float = 1e-3
    """Of Adam, which trains the network."""
    output: Path = Path("outputs/gram_sketch")
    """Folder for the table."""


def forty_tasks() -> experiment.Problem:
    """Returns MultiDigits as 20 yes-or-no questions about digits and 20 sums of ink."""
    problem = multidigits.make_problem(multidigits.Options())
    canvases = np.asarray(problem.pool.inputs).reshape(-1, multidigits.CANVAS, multidigits.CANVAS)
    sums = [*canvases.sum(2).T, *canvases.sum(1).T]
    left, right, _ = problem.pool.targets
    questions = [(side == digit).astype(np.int32) for side in (left, right) for digit in range(10)]
    inks = [((s - s.mean()) / s.std()).astype(np.float32) for s in sums]
    tasks = [experiment.Task(f"is_{i}", classes=2) for i in range(len(questions))]
    tasks += [experiment.Task(f"ink_{i}") for i in range(len(inks))]
    pool = experiment.Data(problem.pool.inputs, (*questions, *inks))
    return dataclasses.replace(problem, tasks=tuple(tasks), pool=pool)


def make_problem(num_tasks: int) -> experiment.Problem:
    if num_tasks == 3:
        return multidigits.make_problem(multidigits.Options())
    if num_tasks == 11:
        import qm9  # not above: its data is a package of its own

        return qm9.make_problem(qm9.Options())
    if num_tasks == 40:
        return forty_tasks()
    raise ValueError(f"the problems have 3, 11 and 40 tasks; got {num_tasks}.")


def record(problem: experiment.Problem, options: Options) -> tuple[np.ndarray, dict[int, Any]]:
    """Trains the network.

    Returns:
        The log losses of every step (T, K), and its Gram matrices (T, K, K), with the number of
        probes as keys, 0 for the exact ones.
    """
    engines = {0: bilb.grams.stacked()} | {n: bilb.grams.sketch(n, key=n) for n in options.probes}
    network, optimizer = problem.network, optax.adam(options.learning_rate)
    pool = jax.tree.map(jnp.asarray, problem.pool)
    is_trunk = lambda name: name.startswith("trunk")

    def log_losses(params, batch):
        outputs = network.apply({"params": params}, batch.inputs)
        pairs = zip(problem.tasks, outputs, batch.targets)
        return jnp.log(jnp.stack([task.loss(*pair) for task, *pair in pairs]))

    def step(carry, given):
        params, opt_state = carry
        number, rows = given
        batch = jax.tree.map(lambda x: x[rows], pool)
        trunk = {name: layer for name, layer in params.items() if is_trunk(name)}
        of_trunk = lambda trunk: log_losses(params | trunk, batch)
        grams = {n: engine(of_trunk, trunk, step=number) for n, engine in engines.items()}
        gradient = jax.grad(lambda p: log_losses(p, batch).mean())(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        carry = optax.apply_updates(params, updates), opt_state
        return carry, (log_losses(params, batch), grams)

    rows = jnp.asarray(experiment.batch_order(problem, options.steps, seeds=1)[0])
    params = network.init(jax.random.key(0), pool.inputs[:1])["params"]
    given = jnp.arange(options.steps), rows
    train = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), given)[1])
    return jax.tree.map(np.asarray, train(params))


def running_mean(grams: np.ndarray, decay: float) -> np.ndarray:
    """Returns the running means (T, K, K) after every step, corrected for their start at zero."""
    mean, means = np.zeros_like(grams[0]), []
    for step, gram in enumerate(grams, start=1):
        mean = decay * mean + (1 - decay) * gram
        means.append(mean / (1 - decay**step))
    return np.stack(means)


def weights_of(method: optax.GradientTransformation) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the weights (T, K) that a method makes of Gram matrices (T, K, K), one by one."""

    def weigh(gram):
        losses = jnp.ones(gram.shape[0])
        return method.update(losses, method.init(losses), gram=gram)[0]

    return jax.jit(lambda grams: jax.lax.map(weigh, grams))


@jax.jit
def gradnorm_weights(log_losses: jax.Array, norms: jax.Array) -> jax.Array:
    """Returns the weights (T, K) that GradNorm learns from losses and norms (T, K) in turn."""
    method = bilb.gradnorm()

    def step(state, given):
        losses, norms = given
        _, state = method.update(losses, state, gradient_norms=norms)
        return state, state.weights

    # Relative losses l / L mean something for losses, not for their logarithms.
    losses = jnp.exp(log_losses)
    return jax.lax.scan(step, method.init(losses[0]), (losses, norms))[1]


def distance(method: str, of: np.ndarray, to: np.ndarray) -> float:
    """Returns the median distance of weights (T, K) to weights."""
    if method == "imtl_g":
        distances = np.linalg.norm(of - to, axis=1) / np.linalg.norm(to, axis=1)
    else:
        unit = lambda weights: weights / weights.sum(1, keepdims=True)
        distances = 0.5 * np.abs(unit(of) - unit(to)).sum(1)
    return float(np.median(distances))


def measure(num_tasks: int, options: Options) -> list[list[Any]]:
    """Returns rows of the table: K, method, decay, distances by probes, by batch, to equal ones."""
    log_losses, grams = record(make_problem(num_tasks), options)
    last = slice(2 * options.steps // 3, None, options.every)
    norms = lambda grams: np.sqrt(np.diagonal(grams, axis1=1, axis2=2))
    learned = lambda grams: np.asarray(gradnorm_weights(log_losses, norms(grams)))[last]
    makers = {name: weights_of(method) for name, method in METHODS.items()}
    own = {name: np.asarray(make(grams[0][last])) for name, make in makers.items()}
    own["gradnorm"] = learned(grams[0])
    equal = np.ones((1, num_tasks)) / num_tasks

    def row(name, decay, exact, sketched):
        of = [distance(name, weights, exact) for weights in sketched]
        scale = [distance(name, own[name], exact), distance(name, equal, exact)]
        return [num_tasks, name, decay, *of, *scale]

    sketches = [grams[n] for n in options.probes]
    table = [row("gradnorm", "none", own["gradnorm"], [learned(s) for s in sketches])]
    for decay in options.decays:
        means = [running_mean(series, decay) for series in (grams[0], *sketches)]
        for name, make in makers.items():
            exact, *sketched = [np.asarray(make(mean[last])) for mean in means]
            table.append(row(name, decay, exact, sketched))
        exact, *sketched = [learned(mean) for mean in means]
        table.append(row("gradnorm", decay, exact, sketched))
    return sorted(table, key=lambda row: [*METHODS, "gradnorm"].index(row[1]))


def markdown(rows: Sequence[Sequence[Any]], options: Options) -> str:
    """Returns the rows as a table."""
    heads = ["K", "method", "decay", *[f"{n} probes" for n in options.probes], "batch", "equal"]
    cell = lambda x: f"{x:.3f}" if isinstance(x, float) and x not in options.decays else str(x)
    lines = [heads, ["---"] * len(heads), *[[*map(cell, row)] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(options: Options) -> None:
    rows = []
    for num_tasks in options.num_tasks:
        rows += measure(num_tasks, options)
        print(f"K = {num_tasks} done", flush=True)
    text = markdown(rows, options)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gram_sketch.md").write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
