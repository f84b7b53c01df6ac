"""Physics-informed networks: the equation, its boundary and its initial values are the tasks.

A small network learns the solution of a partial differential equation. It sees no data: its losses
are the mean squares of the equation's residual inside and of what is wrong at the boundary and at
first, at points that are drawn anew at every step. Their scales have nothing to do with one
another, and a plain sum of them is often the worst choice. The error shown is the relative L2
distance to a solution that was computed otherwise.

    python examples/pinn.py                                  # about a minute
    python examples/pinn.py --problem burgers --method ls root+marigold_nash
    python examples/pinn.py --problem wave --method constant --weight 100
    python examples/pinn.py --method root+nash_mtl --gram sketch --decay 0.999

It prints a table and writes a figure: the solutions, their errors, and the weights of the losses
over time. ``constant`` weighs all losses but those of the equation with ``--weight``; ``root``
stands for the square roots of the losses; ``autobalance`` gives each loss an optimiser of its own
and adds their updates, which no weights can say. The equations are in equations.py.

References:
    An et al., *AutoBalance: an automatic balancing framework for training physics-informed neural
    networks*, arXiv 2510.06684.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import balancers
import experiment
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import tqdm
import tyro
from balancers import AGGREGATORS, Settings
from equations import EQUATIONS, Array, Equation
from matplotlib.figure import Figure

import bilb
from bilb import plots

METHODS = balancers.METHODS | {
    "constant": lambda s: bilb.linear_scalarization(s.selection),
    "autobalance": lambda s: bilb.linear_scalarization(),  # what differs is the optimiser
}
HIDDEN = (48, 48, 48)
STEPS = 3_000
LEARNING_RATE = 5e-3
STEPS_PER_EPOCH = 100  # of methods that look back an epoch; every batch is new here


@dataclasses.dataclass(frozen=True)
class Options(experiment.Options):
    """Trains physics-informed networks with several balancers and compares their errors."""

    known: ClassVar = METHODS

    problem: Literal[tuple(EQUATIONS)] = "helmholtz"
    """The equation to solve."""
    method: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help=f"Methods to train, out of: {', '.join(METHODS | AGGREGATORS)}, or chains such as "
            "root+marigold_nash."
        ),
    ] = ("ls", "constant", "root+marigold_nash")
    learning_rate: float = LEARNING_RATE
    """Of Adam at first; it decays along a cosine."""
    weight: float = 100.0
    """Of all losses but those of the equation, for the method constant."""
    output: Path = Path("outputs/pinn")
    """Folder for the table, its numbers and the figure."""

    def mistake(self) -> str | None:
        """Says what is wrong with the options, if anything."""
        if not (self.learning_rate > 0 and self.weight > 0):
            return "--learning-rate and --weight must be positive"
        return super().mistake()


class Network(nn.Module):
    """A multi-layer perceptron of a point in a box."""

    corners: tuple[tuple[float, ...], tuple[float, ...]]
    outputs: int
    hidden: tuple[int, ...] = HIDDEN

    @nn.compact
    def __call__(self, points: Array) -> Array:
        """Returns the values (N, outputs) at points (N, D)."""
        low, high = np.array(self.corners)
        features = 2.0 * (points - low) / (high - low) - 1.0
        for width in self.hidden:
            features = jnp.tanh(
                nn.Dense(width, kernel_init=nn.initializers.glorot_normal())(features)
            )
        return nn.Dense(self.outputs, kernel_init=nn.initializers.glorot_normal())(features)


@dataclasses.dataclass(frozen=True)
class Run:
    """What training one method with all seeds gave."""

    method: str
    errors: np.ndarray  # (seeds, chunks) relative L2 errors in the course of the training
    validation: np.ndarray  # (seeds,) the same after it, at other points, to choose by
    solution: np.ndarray  # (N, M, outputs) of the first seed, on the reference's grid
    steps: np.ndarray  # (T,) the last step of each window that the histories average over
    losses: np.ndarray  # (seeds, T, K)
    weights: np.ndarray | None  # (seeds, T, K) effective weights, None without such
    seconds: float  # wall time, compilation included
    seconds_per_step: float  # of one seed, without compilation: the median over the chunks

    @property
    def final(self) -> np.ndarray:
        """The relative L2 errors (seeds,) after the training."""
        return self.errors[:, -1]


def train(
    equation: Equation,
    method: str,
    *,
    seeds: Sequence[int],
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    weight: float = 1.0,
    penalty: float = 0.05,
    gram: str = "exact",
    decay: float = 0.0,
    conditions: float | None = None,
    hidden: tuple[int, ...] = HIDDEN,
    course: bool = True,
    **of_method: float,
) -> Run:
    """Trains one method for a fixed number of steps with several seeds at once.

    A seed changes the initial parameters and the points. The network after the last step is the one
    tested; nothing is selected on the way.

    Args:
        equation: what to solve.
        method: names in `METHODS` joined by ``+``, at last one in `AGGREGATORS` maybe.
        seeds: the seeds.
        steps: number of steps.
        learning_rate: of Adam at first.
        weight: of all losses but those of the equation, for the method ``constant``.
        penalty: weight of the loss discrepancy in the bilevel methods.
        gram: a name in `GRAMS`, the way to take Gram matrices.
        decay: of the running mean of the Gram matrix, in [0, 1).
        conditions: the preference that marigold_pinn and nash_pinn give to all losses but those of
            the equation together, which have 1 each; with None every loss has 1.
        hidden: the widths of the network's hidden layers.
        course: whether errors are taken in the course of the training, or only after it.
        of_method: other numbers in ``Settings``, such as ``logit_rate`` of marigold_pinn.
    """
    start = time.perf_counter()
    number = len(equation.losses)
    numbers = dict(learning_rate=learning_rate, penalty=penalty, decay=decay, **of_method)
    inside = np.arange(number) < equation.inside
    each = 1.0 if conditions is None else conditions / (number - equation.inside)
    settings = Settings(
        seed=jnp.asarray(seeds),
        selection=jnp.where(inside, 1.0, weight),
        preference=jnp.where(inside, 1.0, each),
        steps=steps,
        steps_per_epoch=STEPS_PER_EPOCH,
        gram=gram,
        **{name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()},
    )
    static = dict(method=method, equation=equation, hidden=hidden)
    carry = start_training(settings, **static)
    reference = equation.reference()
    points = reference.points().astype(np.float32)
    length, window = experiment.chunking(steps)
    history, errors, seconds = [], [], []
    with tqdm.tqdm(total=steps, desc=f"{method:>20}", unit="step", disable=None) as progress:
        for first in range(0, steps, length):
            begin = time.perf_counter()
            chunk = jnp.arange(first, first + length)
            carry, records = continue_training(settings, carry, chunk, window=window, **static)
            history.append(jax.tree.map(np.asarray, records))
            seconds.append(time.perf_counter() - begin)
            if course or first + length >= steps:
                values = np.asarray(evaluate(carry[0], points, equation=equation, hidden=hidden))
                errors.append(relative_l2(values, reference.values))
            progress.update(length)
    losses, weights = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *history)
    test, validation = np.moveaxis(errors, 0, -1)
    return Run(
        method=method,
        errors=test,
        validation=validation[:, -1],
        solution=values[0].reshape(*reference.values.shape[:2], -1),
        steps=np.arange(window, steps + 1, window),
        losses=losses,
        weights=weights,
        seconds=time.perf_counter() - start,
        seconds_per_step=float(np.median(seconds[1:] or seconds)) / length / len(seeds),
    )


def relative_l2(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns relative L2 errors (2, seeds) of values (seeds, N M, outputs) on a reference's grid.

    The first is for testing, the second for choosing hyperparameters: they take the grid's points
    in turns, as the black and white fields of a chessboard.
    """
    known = reference.reshape(-1, reference.shape[-1])
    difference = values[..., : known.shape[1]].astype(float) - known
    black = np.indices(reference.shape[:2]).sum(0).ravel() % 2 == 0
    size = lambda values: np.sqrt((values**2).sum((-2, -1)))
    return np.stack([size(difference[:, c]) / size(known[c]) for c in (black, ~black)])


def ingredients(
    settings: Settings, method: str, equation: Equation, hidden: tuple[int, ...] = HIDDEN
) -> tuple[Any, optax.GradientTransformation]:
    """Returns the value and gradient of the losses, and the network's optimiser."""
    network = Network(equation.corners, equation.outputs, hidden)

    def task_losses(parameters: Any, points: dict[str, Array]) -> Array:
        return equation.task_losses(functools.partial(network.apply, parameters), points)

    if method.endswith("autobalance"):
        balancer = balancers.make(method, settings, METHODS)
        optimizer = balancers.one_for_each_loss(settings.optimizer(), len(equation.losses))
        aggregator = optax.with_extra_args_support(optax.identity())
        return experiment.Aggregated(task_losses, balancer, aggregator), optimizer
    driver = experiment.driver(settings, method, task_losses, known=METHODS)
    return driver, settings.optimizer()


def over_seeds(function: Any, settings: Settings) -> Any:
    """Vectorises ``function(settings, x, chunk)`` over the seeds, which share the chunk."""
    shared = jax.tree.map(lambda _: None, settings)
    return jax.vmap(function, in_axes=(dataclasses.replace(shared, seed=0), 0, None))


def draw(equation: Equation, seed: Array, step: Array) -> dict[str, Array]:
    """Returns the points of a step."""
    _, key = jax.random.split(jax.random.key(seed))
    return equation.draw(jax.random.fold_in(key, step))


@functools.partial(jax.jit, static_argnames=("method", "equation", "hidden"))
def start_training(settings, *, method, equation, hidden=HIDDEN):
    """Returns (parameters, optimiser state, balancer state), leading axis seeds."""
    network = Network(equation.corners, equation.outputs, hidden)

    def start(settings, seed, _):
        value_and_grad, optimizer = ingredients(settings, method, equation, hidden)
        key, _ = jax.random.split(jax.random.key(seed))
        parameters = network.init(key, jnp.zeros((1, len(equation.coordinates))))
        points = draw(equation, seed, 0)
        return parameters, optimizer.init(parameters), value_and_grad.init(parameters, points)

    return over_seeds(start, settings)(settings, settings.seed, None)


@functools.partial(
    jax.jit, static_argnames=("method", "equation", "window", "hidden"), donate_argnames="carry"
)
def continue_training(settings, carry, chunk, *, method, equation, window, hidden=HIDDEN):
    """Takes the steps whose numbers are in ``chunk``.

    Returns:
        The new carry, and the losses and effective weights averaged over windows of steps,
        (seeds, steps / window, K) each.
    """

    def run(settings, carry, chunk):
        points_of = functools.partial(draw, equation, settings.seed)
        parts = ingredients(settings, method, equation, hidden)
        return experiment.scan_steps(*parts, carry, chunk, points_of, window)

    return over_seeds(run, settings)(settings, carry, chunk)


@functools.partial(jax.jit, static_argnames=("equation", "hidden"))
def evaluate(parameters, points, *, equation, hidden=HIDDEN):
    """Returns the values (seeds, N, outputs) of the networks at points (N, 2)."""
    network = Network(equation.corners, equation.outputs, hidden)
    return jax.vmap(network.apply, in_axes=(0, None))(parameters, points)


def geometric_mean(values: np.ndarray) -> float:
    """Returns the geometric mean; NaN or infinite if one of the values is."""
    return float(np.exp(np.log(values).mean()))


def cells(equation: Equation, runs: Sequence[Run]) -> list[list[str]]:
    """Returns the table, its head first."""
    head = ["method", "L2", "from", "to", *equation.losses, "ms/step", "s"]
    body = [
        [
            run.method,
            *map(report.three_digits, (geometric_mean(run.final), run.final.min())),
            report.three_digits(run.final.max()),
            *(f"{geometric_mean(loss):.1e}" for loss in run.losses[:, -1].T),
            f"{1e3 * run.seconds_per_step:.2f}",
            f"{run.seconds:.0f}",
        ]
        for run in runs
    ]
    return [head, *body]


def legend(seeds: int) -> str:
    """Says what the columns are."""
    over = "1 seed" if seeds == 1 else f"{seeds} seeds"
    return (
        "L2: relative L2 error against the reference solution, lower is better; geometric mean\n"
        f"and range over {over}. Then the losses of the last steps, their geometric means.\n"
        "ms/step: of one network, without compilation. s: wall seconds, compilation included."
    )


def shown(values: np.ndarray) -> np.ndarray:
    """Returns what a picture shows of values (N, M, outputs): of a flow its speed."""
    return values[..., 0] if values.shape[-1] == 1 else np.linalg.norm(values[..., :2], axis=-1)


def figure(equation: Equation, runs: Sequence[Run]) -> Figure:
    """Draws the reference and the errors over time; then, for each method, a row of three panels.

    They are its solution and its error, both of the first seed, and its weights over time.
    """
    reference = equation.reference()
    picture = Figure(figsize=(12.0, 2.9 * (len(runs) + 1)), layout="constrained")
    picture.get_layout_engine().set(w_pad=0.1)
    grid = picture.add_gridspec(len(runs) + 1, 3, width_ratios=[1.0, 1.0, 1.5])
    exact = shown(reference.values)
    limits = dict(vmin=exact.min(), vmax=exact.max())

    def picture_of(place: Any, values: np.ndarray, title: str, **style: Any) -> None:
        ax = picture.add_subplot(place)
        mesh = ax.pcolormesh(
            reference.first, reference.second, values.T, cmap="cividis", rasterized=True, **style
        )
        picture.colorbar(mesh, ax=ax)
        first, second = equation.coordinates
        ax.set(xlabel=first, ylabel=second)
        ax.set_title(title, fontsize="medium")

    picture_of(grid[0, 0], exact, "reference", **limits)
    course = picture.add_subplot(grid[0, 1:])
    ends = np.linspace(0, runs[0].steps[-1], runs[0].errors.shape[1] + 1)[1:]
    histories = np.stack([run.errors for run in runs], axis=-1)
    plots.losses_over_time(
        histories, steps=ends, names=[run.method for run in runs], log=True, ax=course
    )
    course.set_ylabel("relative L2 error")
    for i, run in enumerate(runs, start=1):
        picture_of(grid[i, 0], shown(run.solution), f"{run.method}: solution", **limits)
        known = run.solution[..., : reference.values.shape[-1]]
        error = np.linalg.norm(known - reference.values, axis=-1)
        picture_of(grid[i, 1], error, f"error, relative L2 {report.three_digits(run.final[0])}")
        ax = picture.add_subplot(grid[i, 2])
        if run.weights is None:
            ax.set_axis_off()
            ax.text(0.5, 0.5, f"{run.method} has no weights", ha="center", va="center")
        else:
            plots.weights_over_time(run.weights, steps=run.steps, names=equation.losses, ax=ax)
            ax.set_title(f"{run.method}: effective weights", fontsize="medium")
    picture.suptitle(equation.title)
    return picture


def publish(equation: Equation, runs: Sequence[Run], setting: dict[str, Any], folder: Path) -> str:
    """Writes table.md, results.json and figure.png; returns what to print."""
    folder.mkdir(parents=True, exist_ok=True)
    table, explanation = cells(equation, runs), legend(len(runs[0].final))
    (folder / "table.md").write_text(
        f"# {equation.title}\n\n{report.markdown(table)}\n\n{explanation}\n", encoding="utf-8"
    )
    methods = {
        run.method: {
            "seconds": round(run.seconds, 2),
            "seconds_per_step": float(f"{run.seconds_per_step:.6g}"),
            "steps": run.steps.tolist(),
            **{
                name: report.plain(getattr(run, name))
                for name in ("errors", "validation", "losses", "weights")
            },
        }
        for run in runs
    }
    results = json.dumps({"setting": setting, "methods": methods})
    (folder / "results.json").write_text(results, encoding="utf-8")
    figure(equation, runs).savefig(folder / "figure.png", dpi=130)
    written = "\n".join(str(folder / name) for name in ("table.md", "results.json", "figure.png"))
    return "\n\n".join([equation.title, report.aligned(table), explanation, written])


def main() -> None:
    """Reads the command line, trains the methods, prints the table and writes the files."""
    options = tyro.cli(Options)
    if mistake := options.mistake():
        sys.exit(f"error: {mistake}")
    start = time.perf_counter()
    equation = EQUATIONS[options.problem]
    chosen = ("learning_rate", "weight", "penalty", "gram", "decay")
    arguments = {name: getattr(options, name) for name in chosen}
    arguments |= {"seeds": list(range(options.seeds)), "steps": options.steps or STEPS}
    runs = [train(equation, name, **arguments) for name in dict.fromkeys(options.method)]
    setting = {"problem": options.problem, **arguments}
    print(publish(equation, runs, setting, options.output))
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
