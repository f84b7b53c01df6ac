"""The training of nyuv2.py and cityscapes.py: data in .npy files, SegNet-MTAN, the schedule.

Both data sets come preprocessed by the authors of MTAN, one folder for training and one for tests,
with a folder for images and one for each task, and in these one file per image, 0.npy, 1.npy, ...
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import balancers
import epochs
import protocol
import report
import segnet

import bilb
from bilb import metrics

FIELDS = {"penalty": float, "decay": float}
LOSSES = {
    "semantic": segnet.semantic_loss,
    "depth": segnet.depth_loss,
    "normal": segnet.normal_loss,
}
METRICS = {
    "semantic": ("mIoU", "PixAcc"),
    "depth": ("AbsErr", "RelErr"),
    "normal": ("mean", "median", "<11.25", "<22.5", "<30"),
}
HIGHER_IS_BETTER = ("mIoU", "PixAcc", "<11.25", "<22.5", "<30")


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set, its network and what the papers' single-task networks reach on it."""

    title: str
    folders: Mapping[str, str]  # "image" and the tasks, the order of the losses
    channels: Mapping[str, int]  # of the network's output for each task
    base: tuple[float, ...]  # metrics of the single-task networks, for Δm
    published: Mapping[str, float]  # Δm of methods
    preset: str  # the method whose router reads the network's features
    download: str  # what to download and where to put it
    parts: tuple[str, str] = ("train", "val")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(self.channels)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics."""
        return tuple(name for task in self.tasks for name in METRICS[task])


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of both benchmarks."""

    data: Path
    """Folder of the data set."""
    methods: tuple[str, ...] = ("ls", "si", "famo", "igb_v1", "nash_mtl")
    """Methods and chains, with @field=value where something is given to them."""
    seeds: int = 3
    """Number of seeds."""
    epochs: int = 200
    """Epochs; the learning rate is halved after every hundred."""
    batch_size: int = 2
    """Images per step."""
    learning_rate: float = 1e-4
    """Initial learning rate of Adam."""
    filters: tuple[int, ...] = segnet.FILTERS
    """Widths of the network's levels."""
    augmentation: bool = True
    """Crop at scales of 1, 1.2 and 1.5, and mirror, at random."""
    last: int = 10
    """The result is the mean over this many last epochs, as in the papers."""
    report: bool = False
    """Only print the table of the runs that are there."""
    output: Path = Path("outputs")
    """Folder for the runs, their checkpoints and the table."""


def check_layout(root: Path, of: DataSet) -> dict[str, int]:
    """Returns the number of images of each part, after a look at what is there.

    Raises:
        epochs.LayoutError: for a missing folder, parts of a pair that are missing, or arrays of
            another shape; it says what to download and where to put it.
    """
    complain = lambda what: epochs.LayoutError(f"{what}\n{of.download}")
    numbers = {}
    for part in of.parts:
        files = {}
        for name, folder in of.folders.items():
            path = root / part / folder
            if not path.is_dir():
                raise complain(f"{path} is missing.")
            files[name] = {file.name for file in path.glob("*.npy")}
        number = len(files["image"])
        expected = {f"{index}.npy" for index in range(number)}
        for name, found in files.items():
            if found != expected or not number:
                raise complain(
                    f"{root / part / of.folders[name]} should hold {number or 'some'} files, "
                    f"0.npy, 1.npy, ...; there are {len(found)}."
                )
        shapes = {name: np.load(root / part / of.folders[name] / "0.npy").shape for name in files}
        size = shapes["image"][:2]
        wanted = {"image": (*size, 3), "semantic": size, "depth": (*size, 1), "normal": (*size, 3)}
        for name, shape in shapes.items():
            if shape != wanted[name]:
                raise complain(
                    f"{root / part / of.folders[name] / '0.npy'} has shape {shape}, "
                    f"{wanted[name]} expected."
                )
        if any(n % 32 for n in size):
            raise complain(f"images of {root / part} are {size}; both must be divisible by 32.")
        numbers[part] = number
    return numbers


def load(root: Path, part: str, index: int, of: DataSet) -> dict[str, np.ndarray]:
    """Returns image and labels of one example."""
    kinds = {"semantic": np.int32}
    return {
        name: np.load(root / part / folder / f"{index}.npy").astype(kinds.get(name, np.float32))
        for name, folder in of.folders.items()
    }


def augmented(example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns a random crop of the example, as large as before, and mirrored half the time.

    What is nearer looks larger: depths are divided by the scale. In a mirror the first coordinate
    of normals changes its sign.
    """
    height, width = example["image"].shape[:2]
    scale = rng.choice([1.0, 1.2, 1.5])
    h, w = int(height / scale), int(width / scale)
    top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
    mirrored = rng.random() < 0.5
    rows, columns = segnet.interpolation(h, height), segnet.interpolation(w, width)
    nearest = np.ix_(np.arange(height) * h // height, np.arange(width) * w // width)
    new = {}
    for name, array in example.items():
        crop = array[top : top + h, left : left + w]
        if name in ("image", "normal"):
            crop = np.einsum("yh,hwc,xw->yxc", rows, crop, columns, optimize=True)
        else:
            crop = crop[nearest]
        crop = crop / np.float32(scale) if name == "depth" else crop
        crop = crop[:, ::-1] if mirrored else crop
        new[name] = (
            crop * np.array([-1, 1, 1], np.float32) if name == "normal" and mirrored else crop
        )
    return new


def batches(
    root: Path, part: str, order: Sequence[int], of: DataSet, size: int, rng: Any = None
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches, augmented if there is a generator, the last one maybe smaller."""
    for begin in range(0, len(order), size):
        examples = [load(root, part, index, of) for index in order[begin : begin + size]]
        if rng is not None:
            examples = [augmented(example, rng) for example in examples]
        yield {name: np.stack([e[name] for e in examples]) for name in of.folders}


def make_balancer(name: str, of: DataSet, options: Options, steps_per_epoch: int, seed: int) -> Any:
    """Returns a method, and whether its router reads the network's features."""
    method, fields = protocol.parse(name, FIELDS)
    if method == of.preset:
        width = len(of.tasks) * options.filters[0]
        return getattr(bilb.presets, method)(num_features=width, **fields), True
    settings = balancers.Settings(
        learning_rate=options.learning_rate,
        seed=seed,
        selection=jnp.ones(len(of.tasks)),
        steps=steps_per_epoch * options.epochs,
        steps_per_epoch=steps_per_epoch,
        **({"penalty": 0.05} | fields),
    )
    return balancers.make(method, settings), False


def make_trainer(
    name: str, of: DataSet, options: Options, steps_per_epoch: int, seed: int
) -> epochs.Trainer:
    """Returns the training steps of a method."""
    balancer, reads_features = make_balancer(name, of, options, steps_per_epoch, seed)
    pooled = lambda features: jnp.concatenate([f.mean((1, 2)) for f in features], -1)
    return epochs.Trainer(
        segnet.SegNetMTAN(tuple(of.channels.values()), tuple(options.filters)),
        lambda outputs, batch: jnp.stack(
            [LOSSES[task](output, batch[task]) for task, output in zip(of.tasks, outputs)]
        ),
        balancer,
        options.learning_rate,
        pooled if reads_features else None,
    )


def evaluate(
    trainer: epochs.Trainer, carry: epochs.Carry, images: int, of: DataSet, options: Options
) -> np.ndarray:
    """Returns the metrics on the test part: of depth and normals the means over batches."""
    matrix, found = 0, {task: [] for task in of.tasks}
    for batch in batches(options.data, of.parts[1], range(images), of, options.batch_size):
        outputs = trainer.outputs(carry, batch["image"])
        for task, output in zip(of.tasks, map(np.asarray, outputs)):
            if task == "semantic":
                matrix = matrix + segnet.confusion(output, batch[task])
            else:
                measure = {"depth": segnet.depth_metrics, "normal": segnet.normal_metrics}[task]
                found[task].append(measure(output, batch[task]))
    values = {task: np.mean(v, axis=0) for task, v in found.items() if v}
    values["semantic"] = segnet.segmentation_metrics(matrix)
    return np.concatenate([np.asarray(values[task]) for task in of.tasks])


def train(
    name: str, of: DataSet, options: Options, numbers: Mapping[str, int], seed: int, folder: Path
) -> protocol.Line:
    """Trains a method with a seed, or goes on where it was interrupted; returns its line."""
    images, test_images = (numbers[part] for part in of.parts)
    trainer = make_trainer(name, of, options, -(-images // options.batch_size), seed)
    draw = lambda order, rng=None: batches(
        options.data, of.parts[0], order, of, options.batch_size, rng
    )
    history = np.full((options.epochs, len(of.metrics)), np.nan)

    def epoch(number, state):
        carry, history, seconds = state
        rng = np.random.default_rng((seed, number))
        rate = options.learning_rate * 0.5 ** ((number - 1) // 100)
        order = rng.permutation(images)
        carry, passed = trainer.epoch(
            carry, rate, draw(order, rng if options.augmentation else None)
        )
        seconds = np.asarray(seconds) + passed
        history = np.array(history)
        history[number - 1] = evaluate(trainer, carry, test_images, of, options)
        shown = " ".join(f"{n} {v:.4g}" for n, v in zip(of.metrics, history[number - 1]))
        print(f"{name} seed {seed} epoch {number}: {shown}", flush=True)
        return carry, history, seconds

    setting = {"method": name, "seed": seed, "filters": list(options.filters)}
    state = trainer.start(seed, next(draw(range(images)))), history, np.array(0.0)
    _, history, seconds = epochs.run(folder, setting, state, options.epochs, epoch)
    return {
        "problem": of.title,
        "method": name,
        "learning_rate": options.learning_rate,
        "seed": seed,
        "epochs": options.epochs,
        "metrics": protocol.rounded(np.asarray(history)[-options.last :].mean(0)),
        "seconds_per_epoch": protocol.rounded(float(seconds) / options.epochs),
    }


def delta_m(values: np.ndarray, of: DataSet) -> np.ndarray:
    """Returns Δm in percent against the published single-task networks."""
    higher = np.array([name in HIGHER_IS_BETTER for name in of.metrics])
    return np.asarray(metrics.delta_m(values, np.array(of.base), higher_is_better=higher))


def table(lines: Sequence[protocol.Line], of: DataSet) -> str:
    """Returns a row for every method, in Markdown."""
    rows = []
    for method in dict.fromkeys(line["method"] for line in lines):
        values = np.array([line["metrics"] for line in lines if line["method"] == method])
        published = of.published.get(method)
        rows.append(
            [
                method,
                str(len(values)),
                *map(report.three_digits, values.mean(0)),
                str(protocol.interval(delta_m(values, of))),
                "" if published is None else f"{published:+.2f}",
            ]
        )
    return report.markdown([["method", "seeds", *of.metrics, "Δm", "published"], *rows])


def main(options: Options, of: DataSet) -> None:
    """Trains what is missing and prints the table."""
    names = [protocol.parse(name, FIELDS)[0] for name in options.methods]
    known = balancers.METHODS | {of.preset: None}
    if mistake := balancers.mistake(names, known, aggregators={}):
        sys.exit(f"error: {mistake}")
    epochs.complete(
        options,
        of.title,
        check=lambda: check_layout(options.data, of),
        train=lambda name, numbers, seed, folder: train(name, of, options, numbers, seed, folder),
        table=lambda lines: table(lines, of),
    )
