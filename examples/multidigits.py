"""Three tasks on real handwritten digits: which digit is left, which is right, and how much ink.

Two of scikit-learn's 8x8 digits lie on one 10x10 canvas, one in the top-left and one in the
bottom-right corner, so that they overlap in the middle. One small network reads both digits and
estimates how much ink there is. The two cross-entropies and the squared error have
different scales and fall at different speeds, which is what loss balancing is for.

    python examples/multidigits.py                              # everything, in about a minute
    python examples/multidigits.py --method si bilb4mtl --seeds 5
    python examples/multidigits.py --method si+mgda igb_v1+nash_mtl

It trains the methods and, as references, one separate network per task (STL, and STL-log on the
logarithm of the loss), prints a table and writes a figure. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import experiment
import numpy as np
from sklearn.datasets import load_digits

TRAIN_DIGITS = 900  # of 1,797; the others appear in test pairs only
POOL_PAIRS = 12_000
TEST_PAIRS = 2_000
CANVAS, DIGIT = 10, 8


@dataclasses.dataclass(frozen=True)
class Options(experiment.Options):
    """Left digit, right digit and ink: trains the methods and compares them."""

    output: Path = Path("outputs/multidigits")
    """Folder for the table, its numbers and the figure."""


def digit_pools() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns (images in [0, 1], labels) of the digits for training, and of those for testing."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images[order] / 16.0, digits.target[order]
    train, test = slice(None, TRAIN_DIGITS), slice(TRAIN_DIGITS, None)
    return (images[train], labels[train]), (images[test], labels[test])


def make_pairs(
    images: np.ndarray, labels: np.ndarray, size: int, seed: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Draws pairs of digits and lays each on a canvas, where overlapping ink adds up to 1 at most.

    Returns:
        Canvases (size, 10, 10) in [0, 1] and the targets: left label, right label, and ink, the sum
        of the canvas.
    """
    left, right = np.random.default_rng(seed).integers(len(labels), size=(2, size))
    canvas = np.zeros((size, CANVAS, CANVAS))
    canvas[:, :DIGIT, :DIGIT] += images[left]
    canvas[:, -DIGIT:, -DIGIT:] += images[right]
    canvas = np.minimum(canvas, 1.0)
    return canvas, (labels[left], labels[right], canvas.sum((1, 2)))


def make_problem(options: Options) -> experiment.Problem:
    """Returns the pairs as a problem of three tasks; the ink is standardised."""
    del options  # there is one setting only
    train_digits, test_digits = digit_pools()
    train, test = (
        make_pairs(*train_digits, POOL_PAIRS, seed=1),
        make_pairs(*test_digits, TEST_PAIRS, seed=2),
    )
    mean, spread = train[1][2].mean(), train[1][2].std()

    def data(canvases: np.ndarray, targets: tuple[np.ndarray, ...]) -> experiment.Data:
        left, right, ink = targets
        return experiment.Data(
            canvases.reshape(len(canvases), -1).astype(np.float32),
            (
                left.astype(np.int32),
                right.astype(np.int32),
                ((ink - mean) / spread).astype(np.float32),
            ),
        )

    return experiment.Problem(
        title="MultiDigits with ink",
        tasks=(
            experiment.Task("left", classes=10),
            experiment.Task("right", classes=10),
            experiment.Task("ink", unit="px", scale=float(spread)),
        ),
        pool=data(*train),
        test=data(*test),
        train_size=3_000,
        batch_size=64,
        steps=1_500,
        learning_rate=3e-3,
    )


if __name__ == "__main__":
    experiment.main(Options, make_problem)
