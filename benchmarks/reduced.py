"""All methods on small real problems: learning rates tuned, ten seeds and more, and controls.

Problems: ``multidigits`` and QM9 with standardised and raw targets, ``qm9`` and ``qm9_raw``, as in
examples/, with a validation set of their own. Every method, chain and reference is treated alike:

1. It is trained with every learning rate of one grid on tuning seeds. The rate with the lowest mean
   Δm on the validation set is taken; separate networks (STL) choose one per task by their error.
2. It is trained at that rate with other seeds. Their errors on the test set are the result.

Δm is the mean relative change against the mean errors of STL, in percent; lower is better. The
table has 95 % t intervals over the seeds and p-values of paired t-tests against SI (the plain sum
of the log losses) and LS (the plain sum), adjusted by Holm's method for all rows of the problem.

    pip install 'bilb[bench]'
    python benchmarks/reduced.py
    python benchmarks/reduced.py --problems multidigits --methods ls si igb_v1+nash_mtl
    python benchmarks/reduced.py --report                              # the table of what is there

Rows that are there to keep the table honest:

* ``STL-log``: separate networks on the logarithm of their loss;
* ``si@clip=0.5``: SI, its total gradient clipped at half the running mean of its norm;
* ``constant``, ``si+constant``: the best constant weights, of the losses and of their logarithms.
  Candidates are drawn at random, and learning rate and weights are chosen on the validation set;
* ``si@order=1``: SI once more, with other training subsets and orders of the batches. What lies
  between it and ``si`` is noise.

``method@field=value`` gives a method what it takes: ``bilb4mtl@penalty=0.01``,
``mgda@gram=sketch@decay=0.99``. Every run is one line of reduced.jsonl as soon as its method is
done, and nothing is run twice: an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import balancers
import choice
import experiment
import multidigits
import tuned
from runs import Split

#: Rows by what they answer, the most important first.
CONTROLS = ("ls", "si", "si@order=1", "si@clip=0.5")
PAPERS = (
    *("bilb4mtl", "bilb4mtl@penalty=0.01", "igb_v1", "famo", "nash_mtl"),
    *("marigold", "si+marigold", "uw"),
)
BALANCED = ("mgda", "cagrad", "pcgrad", "imtl_g", "nash_mtl")
COMBINATIONS = tuple(f"{first}+{name}" for first in ("igb_v1", "si") for name in BALANCED)
#: The agent's own training takes many times as long as that of these small networks.
WITH_AGENT = ("igb_v2_near_igb_v1", "igb_v2", *(f"igb_v2+{name}" for name in BALANCED))
WEIGHTS = ("constant", "si+constant")
OTHERS = (
    *("dwa", "rlw", "gls", "imtl_l", "stch", "upgrad", "fairgrad", "aligned_mtl", "gradnorm"),
    *("graddrop", "moco", "db_mtl", "excess_mtl", "trimmed_mean"),
    *("cagrad@clip=0.5", "nash_mtl@clip=0.5", "ls@clip=0.5", "bilb4mtl@clip=0.5", "si@clip=1"),
    *("si+upgrad", "si+fairgrad", "si+aligned_mtl", "si+mgda@gram=sketch@decay=0.99"),
    *("dualproj", "gradvac", "config", "sdmgrad", "modo", "pcd", "krum", "cr_mogm"),
    *("stch_nadir", "pbi", "cosmos", "root", "softadapt", "relobralo", "self_adaptive"),
    *("bilb4mtl_celeba", "lr_annealing", "ntk_weights", "marigold_nash", "si+marigold_nash"),
    *("quarter", "marigold_pinn", "nash_pinn", "db_pinn"),
    *(f"si+{name}" for name in balancers.AGGREGATORS),
)
METHODS = tuple(
    dict.fromkeys((*CONTROLS, *PAPERS, *WEIGHTS, *BALANCED, *COMBINATIONS, *OTHERS, *WITH_AGENT))
)


def multidigits_split() -> Split:
    """Returns MultiDigits; validation and test pairs are of digits that are in no other pair."""
    problem = multidigits.make_problem(multidigits.Options())
    ink = problem.pool.inputs.sum(1)
    _, (images, labels) = multidigits.digit_pools()
    half = len(labels) // 2

    def data(rows: slice, seed: int) -> experiment.Data:
        pairs = multidigits.make_pairs(images[rows], labels[rows], multidigits.TEST_PAIRS, seed)
        canvases, (left, right, amount) = pairs
        targets = (left.astype(np.int32), right.astype(np.int32))
        amount = ((amount - ink.mean()) / ink.std()).astype(np.float32)
        inputs = canvases.reshape(len(canvases), -1).astype(np.float32)
        return experiment.Data(inputs, (*targets, amount))

    test, validation = data(slice(half, None), seed=2), data(slice(None, half), seed=3)
    return Split(dataclasses.replace(problem, test=test), validation)


def qm9_split(targets: str) -> Split:
    """Returns QM9; the validation molecules are taken from those that are not test molecules."""
    import qm9  # not above: its data is a package of its own

    problem = qm9.make_problem(qm9.Options(targets=targets))
    size = len(problem.test.inputs)
    validation, pool = (
        jax.tree.map(lambda x, rows=rows: x[rows], problem.pool)
        for rows in (slice(None, size), slice(size, None))
    )
    return Split(dataclasses.replace(problem, pool=pool), validation)


PROBLEMS: dict[str, Callable[[], Split]] = {
    "multidigits": multidigits_split,
    "qm9": lambda: qm9_split("standardised"),
    "qm9_raw": lambda: qm9_split("raw"),
}


@dataclasses.dataclass(frozen=True)
class Options(choice.Options):
    """Compares all methods on small real problems, learning rates tuned, against references."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    """The problems."""
    methods: tuple[str, ...] = METHODS
    """Methods and chains, with @field=value where something is given to them."""
    output: Path = Path("outputs/reduced")
    """Folder for the runs and the tables."""


if __name__ == "__main__":
    print(tuned.main(tyro.cli(Options), PROBLEMS, "reduced"))
