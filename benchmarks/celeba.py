"""CelebA with forty tasks: attributes of faces, by the protocol of FAMO, FairGrad and LDC-MTL.

A convolutional network of nine layers, images of 64 x 64, batches of 256, Adam at 3e-4, 15 epochs
(LDC-MTL: 1e-3, multiplied by 0.3 after every third: --learning-rate 1e-3 --decay 0.3); the result
is that of the epoch with the best mean F1 on the validation part. Δm is of the F1 scores on the
test part against the single-task networks whose scores FAMO's authors published.

The data cannot come with a package. Download CelebA, aligned and cropped, from
https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html to DATA: Img/img_align_celeba/*.jpg,
Anno/list_attr_celeba.txt and Eval/list_eval_partition.txt:

    python benchmarks/celeba.py --data DATA
    python benchmarks/celeba.py --data DATA --methods bilb4mtl_celeba@penalty=0.01

This was tested on generated data in that layout only; no result of it is known.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import balancers
import epochs
import protocol
import report

from bilb import metrics

NUM_TASKS = 40
#: F1 scores of single-task networks, from the authors of FAMO (github.com/Cranial-XIX/FAMO).
PUBLISHED_STL = (
    *(0.6736886, 0.68121034, 0.81524944, 0.5760289, 0.7205613, 0.8555076, 0.38203922, 0.58225113),
    *(0.787647, 0.8321292, 0.5029583, 0.68694085, 0.6781237, 0.5240381, 0.5161666, 0.95694304),
    *(0.6968786, 0.67976356, 0.8808315, 0.8582131, 0.97034, 0.93267566, 0.5057539, 0.40307626),
    *(0.9703734, 0.48644206, 0.60786104, 0.5261031, 0.56907415, 0.59815097, 0.6858371, 0.924108),
    *(0.5424991, 0.7406311, 0.71019936, 0.87365365, 0.9305602, 0.33704284, 0.7647628, 0.91907),
)
PUBLISHED = {
    "ls": 4.15,
    "si": 7.20,
    "rlw": 1.46,
    "dwa": 3.20,
    "uw": 3.23,
    "famo": 1.21,
    "mgda": 14.85,
    "pcgrad": 3.17,
    "cagrad": 2.48,
    "imtl_g": 0.84,
    "nash_mtl": 2.84,
    "fairgrad": 0.37,
    "bilb4mtl_celeba@penalty=0.01": -1.31,
}
FIELDS = {"penalty": float, "decay": float}
PARTS = ("train", "validation", "test")  # 0, 1 and 2 in the list of the partition
DOWNLOAD = (
    "Download CelebA, aligned and cropped, from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, "
    "so that there are Img/img_align_celeba/, Anno/list_attr_celeba.txt and "
    "Eval/list_eval_partition.txt."
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains on the forty attributes of CelebA by the protocol of the papers."""

    data: Path
    """Folder of the data set."""
    methods: tuple[str, ...] = ("ls", "si", "famo", "igb_v1", "bilb4mtl_celeba@penalty=0.01")
    """Methods and chains, with @field=value where something is given to them."""
    seeds: int = 3
    """Number of seeds."""
    epochs: int = 15
    """Epochs."""
    batch_size: int = 256
    """Images per step."""
    learning_rate: float = 3e-4
    """Initial learning rate of Adam."""
    decay: float = 1.0
    """Factor of the learning rate after every third epoch."""
    size: int = 64
    """Height and width to which images are resized."""
    channels: tuple[int, ...] = (64, 128, 256, 512)
    """Widths of the network's levels."""
    report: bool = False
    """Only print the table of the runs that are there."""
    output: Path = Path("outputs/celeba")
    """Folder for the runs, their checkpoints and the table."""


class Network(nn.Module):
    """Convolutions of 3 x 3 with batch normalisation, two dense layers, a linear head per task."""

    channels: tuple[int, ...]
    num_tasks: int = NUM_TASKS

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns the logits (N, K) and the features that the heads read."""
        x = images
        norm = lambda x: nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        for level, width in enumerate(self.channels):
            for _ in range(1 if level == 0 else 2):
                x = norm(nn.Conv(width, (3, 3), use_bias=False)(x))
            last = level == len(self.channels) - 1
            x = x.mean((1, 2)) if last else nn.max_pool(x, (2, 2), (2, 2))
        for _ in range(2):
            x = norm(nn.Dense(self.channels[-1], use_bias=False)(x))
        return nn.Dense(self.num_tasks, name="pred")(x), x


def task_losses(logits: jax.Array, batch: Any) -> jax.Array:
    """Returns the binary cross-entropies (K,)."""
    return optax.sigmoid_binary_cross_entropy(logits, batch["labels"]).mean(0)


class Faces(NamedTuple):
    """Names of images and their labels."""

    names: np.ndarray  # (N,)
    labels: np.ndarray  # (N, 40) float32, 0 or 1


def read_lists(root: Path) -> dict[str, Faces]:
    """Returns names and labels of each part.

    Raises:
        epochs.LayoutError: if something is missing or the two lists disagree.
    """
    complain = lambda what: epochs.LayoutError(f"{what}\n{DOWNLOAD}")
    attributes = root / "Anno" / "list_attr_celeba.txt"
    partition = root / "Eval" / "list_eval_partition.txt"
    images = root / "Img" / "img_align_celeba"
    for path in (attributes, partition, images):
        if not path.exists():
            raise complain(f"{path} is missing.")
    number, _, *lines = attributes.read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines if line.strip()]
    if len(rows) != int(number) or any(len(row) != NUM_TASKS + 1 for row in rows):
        raise complain(f"{attributes} should hold {number} lines of a name and {NUM_TASKS} values.")
    parts = [line.split() for line in partition.read_text(encoding="utf-8").splitlines() if line]
    if [row[0] for row in rows] != [name for name, _ in parts]:
        raise complain(f"{partition} does not list the images of {attributes.name} in its order.")
    names = np.array([row[0] for row in rows])
    labels = np.array([[value == "1" for value in row[1:]] for row in rows], np.float32)
    part = np.array([int(value) for _, value in parts])
    found = {name: Faces(names[part == i], labels[part == i]) for i, name in enumerate(PARTS)}
    for name, faces in found.items():
        if not len(faces.names):
            raise complain(f"{partition} has no images for {name}.")
        if not (images / faces.names[0]).exists():
            raise complain(f"{images / faces.names[0]} is missing.")
    return found


def batches(
    root: Path, faces: Faces, order: Sequence[int], size: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of images (N, size, size, 3) in [0, 1] and labels, the last maybe smaller."""
    folder = root / "Img" / "img_align_celeba"
    for begin in range(0, len(order), batch_size):
        rows = np.asarray(order[begin : begin + batch_size])
        images = []
        for name in faces.names[rows]:
            with Image.open(folder / name) as image:
                small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            images.append(np.asarray(small, np.float32) / 255)
        yield {"image": np.stack(images), "labels": faces.labels[rows]}


def f1_scores(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the F1 scores (K,) of predictions (N, K) of 0 or 1."""
    hits = (predicted * labels).sum(0)
    precision = hits / (predicted.sum(0) + 1e-8)
    recall = hits / (labels.sum(0) + 1e-8)
    return 2 * precision * recall / (precision + recall + 1e-8)


def train(
    name: str, parts: dict[str, Faces], options: Options, seed: int, folder: Path
) -> protocol.Line:
    """Trains a method with a seed, or goes on where it was interrupted; returns its line."""
    method, fields = protocol.parse(name, FIELDS)
    images = len(parts["train"].names)
    steps = -(-images // options.batch_size)
    settings = balancers.Settings(
        learning_rate=options.learning_rate,
        seed=seed,
        selection=jnp.ones(NUM_TASKS),
        steps=steps * options.epochs,
        steps_per_epoch=steps,
        **({"penalty": 0.01} | fields),
    )
    network, balancer = Network(tuple(options.channels)), balancers.make(method, settings)
    trainer = epochs.Trainer(network, task_losses, balancer, options.learning_rate)
    draw = lambda part, order: batches(
        options.data, parts[part], order, options.size, options.batch_size
    )

    def scores(carry, part):
        of = draw(part, range(len(parts[part].names)))
        logits = [np.asarray(trainer.outputs(carry, batch["image"])) for batch in of]
        return f1_scores(np.concatenate(logits) > 0, parts[part].labels)

    def epoch(number, state):
        carry, history, seconds = state
        rate = options.learning_rate * options.decay ** ((number - 1) // 3)
        order = np.random.default_rng((seed, number)).permutation(images)
        carry, passed = trainer.epoch(carry, rate, draw("train", order))
        seconds = np.asarray(seconds) + passed
        history = np.array(history)
        history[number - 1] = scores(carry, "validation"), scores(carry, "test")
        print(f"{name} seed {seed} epoch {number}: F1 {history[number - 1].mean(1)}", flush=True)
        return carry, history, seconds

    history = np.full((options.epochs, 2, NUM_TASKS), np.nan)
    first = trainer.start(seed, next(draw("train", range(images))))
    setting = {"method": name, "seed": seed, "channels": list(options.channels)}
    state = (first, history, np.array(0.0))
    _, history, seconds = epochs.run(folder, setting, state, options.epochs, epoch)
    best = int(np.asarray(history)[:, 0].mean(1).argmax())
    return {
        "problem": "CelebA",
        "method": name,
        "learning_rate": options.learning_rate,
        "seed": seed,
        "epochs": options.epochs,
        "best_epoch": best + 1,
        "f1": protocol.rounded(np.asarray(history)[best, 1]),
        "seconds_per_epoch": protocol.rounded(float(seconds) / options.epochs),
    }


def table(lines: Sequence[protocol.Line]) -> str:
    """Returns a row for every method, in Markdown."""
    rows = []
    for method in dict.fromkeys(line["method"] for line in lines):
        values = np.array([line["f1"] for line in lines if line["method"] == method])
        change = metrics.delta_m(values, np.array(PUBLISHED_STL), higher_is_better=True)
        published = f"{PUBLISHED[method]:+.2f}" if method in PUBLISHED else ""
        mean = f"{values.mean():.4f}"
        delta = str(protocol.interval(np.asarray(change)))
        rows.append([method, str(len(values)), mean, delta, published])
    return report.markdown([["method", "seeds", "mean F1", "Δm", "published"], *rows])


def main(options: Options) -> None:
    """Trains what is missing and prints the table."""
    names = [protocol.parse(name, FIELDS)[0] for name in options.methods]
    if mistake := balancers.mistake(names, aggregators={}):
        sys.exit(f"error: {mistake}")
    epochs.complete(
        options,
        "CelebA",
        check=lambda: read_lists(options.data),
        train=lambda name, parts, seed, folder: train(name, parts, options, seed, folder),
        table=table,
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
