"""QM9 with eleven tasks by the protocol of the papers, or a smaller one.

As in the experiments of Nash-MTL, FAMO, LDC-MTL and IGB: 10,000 molecules for validation, 10,000
for tests and the others for training, targets standardised, the message-passing network of
molecules.py, batches of 120, Adam at 1e-3, multiplied by 0.7 whenever Δm on the validation set has
not fallen for more than 5 epochs, down to 1e-5, 300 epochs. The test errors are those of the epoch
with the best Δm on validation. Errors are mean absolute ones in the papers' units; Δm is in percent
against their published single-task row, lower is better.

    pip install 'bilb[bench]'
    python benchmarks/qm9.py --methods ls si bilb4mtl --seeds 3
    python benchmarks/qm9.py --molecules 2400 --epochs 25 --dim 16 --batch-size 20    # in small
    python benchmarks/qm9.py --methods STL@task=0 STL@task=1             # own single-task networks
    python benchmarks/qm9.py --report

The whole protocol is for a GPU: a step of SI took 1.2 to 1.3 processor seconds on a CPU, compiled,
which makes about 20 minutes per epoch of 923 steps and a hundred hours per run.

A run is one line of qm9.jsonl when it is done. Until then it is kept in a checkpoint after every
epoch, and goes on from there.

Where this differs from the official code: bonds are read off distances (molecules.py), the
validation and test molecules are the same for all seeds, and biases start at zero.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import balancers
import epochs
import experiment
import molecules
import protocol
import qm9 as example  # the example, which is in front in the path
import report

from bilb import metrics

BATCH_SIZE, LEARNING_RATE = 120, 1e-3
NUM_TASKS = len(example.TARGETS)
#: Errors of the papers' single-task networks, in the order of the targets.
PUBLISHED_STL = (
    0.0671,
    0.1814,
    60.576,
    53.915,
    0.5027,
    4.539,
    58.838,
    64.244,
    63.852,
    66.223,
    0.07212,
)
#: Δm of the papers, with all data, for the table.
PUBLISHED = {
    "ls": 177.6,
    "si": 77.8,
    "rlw": 203.8,
    "dwa": 175.3,
    "uw": 108.0,
    "famo": 58.5,
    "mgda": 120.5,
    "pcgrad": 125.7,
    "cagrad": 112.8,
    "imtl_g": 77.2,
    "nash_mtl": 62.0,
    "fairgrad": 57.9,
    "bilb4mtl": 49.5,
    "igb_v1": 73.9,
    "igb_v2": 67.7,
}
SIZES = ("molecules", "dim", "batch_size")
SETTING = (*SIZES, "epochs")
FIELDS = {"penalty": float, "gram": str, "decay": float, "task": int}


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains on eleven properties of molecules by the protocol of the papers."""

    methods: tuple[str, ...] = ("ls", "si", "famo", "bilb4mtl", "igb_v1", "nash_mtl")
    """Methods and chains, with @field=value where something is given to them."""
    seeds: int = 3
    """Number of seeds."""
    molecules: int = example.NUM_MOLECULES
    """Molecules in all; fewer for a reduced protocol."""
    epochs: int = 300
    """Epochs."""
    dim: int = 64
    """Width of the network."""
    batch_size: int = BATCH_SIZE
    """Molecules per step."""
    learning_rate: float = LEARNING_RATE
    """Initial learning rate of Adam."""
    report: bool = False
    """Only print the table of the runs that are there."""
    output: Path = Path("outputs/qm9_protocol")
    """Folder for the runs, their checkpoints and the table."""

    def mistake(self) -> str | None:
        """Says what is wrong with the options, if anything."""
        try:
            parsed = [protocol.parse(name, FIELDS) for name in self.methods]
        except ValueError as error:
            return str(error)
        known = balancers.METHODS | balancers.REFERENCES
        if mistake := balancers.mistake([method for method, _ in parsed], known):
            return mistake
        for method, fields in parsed:
            if (method in balancers.REFERENCES) != ("task" in fields):
                return f"separate networks, and only they, are of one task: {method}@task=0"
            if not 0 <= fields.get("task", 0) < NUM_TASKS:
                return f"task must be at least 0 and below {NUM_TASKS}; got {fields['task']}"
        if min(self.seeds, self.epochs, self.dim, self.batch_size) < 1:
            return "--seeds, --epochs, --dim and --batch-size must be at least 1"
        if self.learning_rate <= 0:
            return "--learning-rate must be positive"
        smallest = 12 * self.batch_size
        if not smallest <= self.molecules <= example.NUM_MOLECULES:
            return f"--molecules must be between {smallest} and {example.NUM_MOLECULES}"
        return None


class Data(NamedTuple):
    """Molecules for training, validation and test; targets are standardised."""

    train: molecules.Graphs
    validation: molecules.Graphs
    test: molecules.Graphs
    scale: np.ndarray  # (11,) from the standardised targets to the papers' units


def split(graphs: molecules.Graphs) -> Data:
    """Splits molecules as the papers do; of a smaller number a twelfth each is held out."""
    held_out = min(10_000, len(graphs.targets) // 12)
    part = lambda rows: molecules.Graphs(*(array[rows] for array in graphs))
    test, validation, train = (
        part(slice(None, held_out)),
        part(slice(held_out, 2 * held_out)),
        part(slice(2 * held_out, None)),
    )
    mean, spread = train.targets.mean(0), train.targets.std(0, ddof=1)
    standard = lambda graphs: graphs._replace(targets=(graphs.targets - mean) / spread)
    factors = np.array([factor for *_, factor in example.TARGETS])
    return Data(standard(train), standard(validation), standard(test), spread * factors)


class Settings(balancers.Settings):
    """What a method may want to know, with the papers' optimiser."""

    def optimizer(self) -> optax.GradientTransformation:
        """Returns Adam, for what a method learns."""
        return optax.adam(self.learning_rate)


class Plateau:
    """Multiplies the learning rate where a value has not fallen for some epochs.

    As PyTorch's ReduceLROnPlateau with a relative threshold: a value counts as lower if it is below
    ``best (1 - 1e-4)``.
    """

    def __init__(self, rate: float, factor: float = 0.7, patience: int = 5, lowest: float = 1e-5):
        """Starts with a rate."""
        self.rate, self.factor, self.patience, self.lowest = rate, factor, patience, lowest
        self.best, self.bad = math.inf, 0

    def update(self, value: float) -> float:
        """Returns the rate for the next epoch."""
        if self.best == math.inf or value < self.best * (1 - 1e-4):
            self.best, self.bad = value, 0
        else:
            self.bad += 1
        if self.bad > self.patience:
            self.rate, self.bad = max(self.rate * self.factor, self.lowest), 0
        return self.rate


class Trainer:
    """The compiled parts of the training of a method."""

    def __init__(self, name: str, data: Data, seed: int, options: Options):
        """Sets everything up; nothing is compiled before it is needed."""
        method, fields = protocol.parse(name, FIELDS)
        self.task = fields.pop("task", None)
        self.data, self.options, self.seed = data, options, seed
        self.steps = len(data.train.targets) // options.batch_size
        network = molecules.MessagePassing(NUM_TASKS, options.dim)
        apply = jax.vmap(network.apply, in_axes=(None, 0, 0))
        selection = jnp.ones(NUM_TASKS)
        if self.task is not None:
            selection = jax.nn.one_hot(self.task, NUM_TASKS)
        settings = Settings(
            learning_rate=options.learning_rate,
            seed=seed,
            selection=selection,
            steps=self.steps * options.epochs,
            steps_per_epoch=self.steps,
            **({"penalty": 0.05, "gram": "stacked"} | fields),
        )

        def task_losses(parameters, batch):
            outputs = apply(parameters, batch.elements, batch.positions)
            return jnp.mean((outputs - batch.targets) ** 2, axis=0)

        example_molecule = data.train.elements[0], data.train.positions[0]
        self.init_parameters = jax.jit(network.init)
        self.parameters = self.init_parameters(jax.random.key(seed), *example_molecule)
        shared = molecules.trunk(self.parameters)
        self.value_and_grad = experiment.driver(settings, method, task_losses, shared)
        self.optimizer = optax.inject_hyperparams(optax.adam)(options.learning_rate)
        self.train = jax.device_put(data.train)

        def epoch(carry, rows, train):
            batch_of = lambda rows: jax.tree.map(lambda x: x[rows], train)
            parts = self.value_and_grad, self.optimizer
            return experiment.scan_steps(*parts, carry, rows, batch_of, window=len(rows))[0]

        def absolute(parameters, graphs):
            outputs = apply(parameters, graphs.elements, graphs.positions)
            return jnp.abs(outputs - graphs.targets).sum(0)

        self._epoch = jax.jit(epoch, donate_argnums=0)
        self._absolute = jax.jit(absolute)

    def start(self) -> Any:
        """Returns the first carry."""
        batch = jax.tree.map(lambda x: x[: self.options.batch_size], self.train)
        state = jax.jit(self.value_and_grad.init)(self.parameters, batch)
        return self.parameters, self.optimizer.init(self.parameters), state

    def epoch(self, carry: Any, number: int, rate: float) -> Any:
        """Trains one epoch, whose order depends on the seed and its number."""
        rng = np.random.default_rng((self.seed, number))
        size = self.options.batch_size
        order = rng.permutation(len(self.data.train.targets))[: self.steps * size]
        rows = jnp.asarray(order.reshape(self.steps, size))
        parameters, opt_state, state = carry
        opt_state.hyperparams["learning_rate"] = jnp.asarray(rate, jnp.float32)
        return self._epoch((parameters, opt_state, state), rows, self.train)

    def errors(self, parameters: Any, graphs: molecules.Graphs, size: int = 500) -> np.ndarray:
        """Returns the mean absolute errors (11,) in the papers' units."""
        total = 0.0
        for begin in range(0, len(graphs.targets), size):
            part = molecules.Graphs(*(array[begin : begin + size] for array in graphs))
            total = total + np.asarray(self._absolute(parameters, part))
        return total / len(graphs.targets) * self.data.scale

    def criterion(self, errors: np.ndarray) -> float:
        """Returns what selects an epoch and drives the learning rate: Δm, or a task's own error."""
        if self.task is not None:
            return float(errors[self.task])
        return float(metrics.delta_m(errors, np.array(PUBLISHED_STL)))


class Progress(NamedTuple):
    """What is kept of a run beside the carry, as arrays, for its checkpoint."""

    plateau: np.ndarray  # (3,) rate, best value, epochs without a better one
    best: np.ndarray  # () criterion
    best_epoch: np.ndarray  # ()
    validation: np.ndarray  # (11,) errors of the best epoch
    test: np.ndarray  # (11,)
    seconds: np.ndarray  # () training time of all epochs


def train(name: str, data: Data, seed: int, options: Options, folder: Path) -> protocol.Line:
    """Trains a method with a seed, or goes on where it was interrupted; returns its line."""
    trainer = Trainer(name, data, seed, options)
    carry = trainer.start()
    unknown = np.full(NUM_TASKS, np.nan)
    plateau = np.array([options.learning_rate, np.inf, 0.0])
    progress = Progress(plateau, np.array(np.inf), np.array(0), unknown, unknown, np.array(0.0))
    sizes = {name: getattr(options, name) for name in SIZES}
    setting = {"method": name, "seed": seed, **sizes}

    def epoch(number, state):
        carry, progress = state
        carry, progress = _next_epoch(trainer, carry, jax.tree.map(np.asarray, progress), number)
        best, each = float(progress.best), float(progress.seconds) / number
        print(f"{name} seed {seed} epoch {number}: best {best:.2f}, {each:.1f} s", flush=True)
        return carry, progress

    _, progress = epochs.run(folder, setting, (carry, progress), options.epochs, epoch)
    shutil.rmtree(folder)
    return {
        "method": name,
        "learning_rate": options.learning_rate,
        "seed": seed,
        **sizes,
        "epochs": options.epochs,
        "best_epoch": int(progress.best_epoch),
        "validation": protocol.rounded(progress.validation),
        "errors": protocol.rounded(progress.test),
        "seconds_per_epoch": protocol.rounded(float(progress.seconds) / options.epochs),
    }


def _next_epoch(
    trainer: Trainer, carry: Any, progress: Progress, number: int
) -> tuple[Any, Progress]:
    """Trains and evaluates one epoch."""
    plateau = Plateau(float(progress.plateau[0]))
    plateau.best, plateau.bad = float(progress.plateau[1]), int(progress.plateau[2])
    start = time.perf_counter()
    carry = jax.block_until_ready(trainer.epoch(carry, number, plateau.rate))
    seconds = progress.seconds + time.perf_counter() - start
    validation = trainer.errors(carry[0], trainer.data.validation)
    value = trainer.criterion(validation)
    plateau.update(value)
    progress = progress._replace(
        plateau=np.array([plateau.rate, plateau.best, plateau.bad]), seconds=np.array(seconds)
    )
    if value <= progress.best or not np.isfinite(progress.best):
        test = trainer.errors(carry[0], trainer.data.test)
        progress = progress._replace(
            best=np.array(value), best_epoch=np.array(number), validation=validation, test=test
        )
    return carry, progress


def own_stl(lines: Sequence[protocol.Line]) -> np.ndarray | None:
    """Returns the mean errors (11,) of own single-task networks, if there are some of all tasks.

    They are those of the learning rate with the lowest validation error, task by task.
    """
    errors: list[float] = []
    for task in range(NUM_TASKS):
        of: dict[str, dict[float, list[float]]] = {"validation": {}, "errors": {}}
        for line in lines:
            if line["method"] == f"STL@task={task}":
                for what, by_rate in of.items():
                    by_rate.setdefault(line["learning_rate"], []).append(line[what][task])
        if not of["errors"]:
            return None
        errors.append(float(np.mean(of["errors"][protocol.best(of["validation"])])))
    return np.array(errors)


def table(lines: Sequence[protocol.Line]) -> str:
    """Returns a row for every method and learning rate, in Markdown."""
    names = [target[0] for target in example.TARGETS]
    own = own_stl(lines)
    head = ["method", "learning rate", "seeds", *names, "Δm, published STL", "published, full"]
    head += [] if own is None else ["Δm, own STL"]
    rows = []
    multi_task = [line for line in lines if not line["method"].startswith("STL")]
    pair = lambda line: (line["learning_rate"], line["method"])
    for rate, method in sorted(dict.fromkeys(map(pair, multi_task)), key=lambda of: of[0]):
        errors = np.array([x["errors"] for x in multi_task if pair(x) == (rate, method)])
        against = lambda base, e=errors: str(
            protocol.interval(np.asarray(metrics.delta_m(e, np.array(base))))
        )
        rows.append(
            [
                method,
                f"{rate:g}",
                str(len(errors)),
                *map(report.three_digits, errors.mean(0)),
                against(PUBLISHED_STL),
                f"{PUBLISHED[method]:+.1f}" if method in PUBLISHED else "",
                *([] if own is None else [against(own)]),
            ]
        )
    return report.markdown([head, *rows])


def publish(lines: Sequence[protocol.Line], options: Options) -> str:
    """Writes the table as Markdown and returns it."""
    seconds = [line["seconds_per_epoch"] for line in lines] or [math.nan]
    text = (
        f"# QM9, message passing\n\n{options.molecules} molecules, {options.epochs} epochs, "
        f"batches of {options.batch_size}, width {options.dim}; "
        f"{np.median(seconds):.0f} s per epoch (median).\n"
        "Errors in the papers' units; Δm in percent, mean and 95 % t interval.\n\n"
        f"{table(lines)}"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "qm9.md").write_text(text + "\n", encoding="utf-8")
    return text


def main(options: Options) -> None:
    """Trains what is missing and prints the table."""
    if mistake := options.mistake():
        sys.exit(f"error: {mistake}")
    path = options.output / "qm9.jsonl"
    key = lambda of: tuple(of[field] for field in SETTING)
    wanted = dataclasses.asdict(options)
    mine = lambda: [line for line in protocol.read(path) if key(line) == key(wanted)]
    if not options.report:
        try:
            data = split(molecules.load(options.molecules))
        except ModuleNotFoundError as error:  # a data package; the message says how to install it
            sys.exit(f"error: {error}")
        for seed in range(options.seeds):
            for name in options.methods:
                run = (name, seed, options.learning_rate)
                of = lambda line: (line["method"], line["seed"], line["learning_rate"])
                if any(of(line) == run for line in mine()):
                    continue
                setting = described((*key(wanted), options.learning_rate))
                folder = options.output / "checkpoints" / f"{name}-{seed}-{setting}"
                line = train(name, data, seed, options, folder)
                protocol.append(path, [{"problem": "qm9_protocol"} | line])
    print(publish(mine(), options))


def described(setting: tuple) -> str:
    """Returns a setting as part of a folder's name."""
    return "-".join(f"{value:g}" for value in setting)


if __name__ == "__main__":
    main(tyro.cli(Options))
