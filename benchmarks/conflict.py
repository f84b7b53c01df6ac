"""Where tasks compete for capacity: do directions from gradients beat the best constant weights?

Two digits lie on one canvas, as in examples/multidigits.py, and the network that reads both has a
last shared layer of a few units only, so that what one task gains there the other loses:

* ``narrow``: cross-entropies, four units
* ``narrow_bounded``: the probability of error under the network's own distribution,
  ``1 - p(label)``, four units. It is bounded, so that giving up a task costs little, and a sum of
  such losses may do that: the front of what both can reach need not be convex.

The protocol is that of reduced.py: every row has its learning rate chosen on a validation set from
one grid, as have the constant weights, and the gradient of some rows is clipped.

    python benchmarks/conflict.py                              # about an hour on two cores
    python benchmarks/conflict.py --report                     # the table of what is there
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import experiment
import reduced
import tuned
from runs import Split

METHODS = (
    *("ls", "constant", "si", "si+constant", "si@clip=0.5", "ls@clip=0.5"),
    *("mgda", "nash_mtl", "cagrad", "imtl_g", "fairgrad", "upgrad", "pcgrad", "aligned_mtl"),
    *("si+mgda", "si+nash_mtl", "si+cagrad", "si+imtl_g", "mgda@clip=0.5", "nash_mtl@clip=0.5"),
    *("stch", "bilb4mtl", "igb_v1", "famo", "marigold", "marigold_nash"),
)


class ExpectedError(experiment.Task):
    """A classification by the probability of a wrong label under the network's distribution."""

    def loss(self, output: experiment.Array, target: experiment.Array) -> experiment.Array:
        """Returns the mean of 1 - p(label)."""
        probabilities = jax.nn.softmax(output)
        return 1 - jnp.take_along_axis(probabilities, target[:, None], axis=1).mean()


def narrow(units: int, task: type[experiment.Task] = experiment.Task) -> Split:
    """Returns the two digits for a network whose last shared layer has so many units."""
    problem, validation = reduced.multidigits_split()
    digits = lambda data: data._replace(targets=data.targets[:2])
    problem = dataclasses.replace(
        problem,
        title=f"Two digits, {units} shared units"
        + ("" if task is experiment.Task else ", bounded"),
        tasks=(task("left", classes=10), task("right", classes=10)),
        pool=digits(problem.pool),
        test=digits(problem.test),
        hidden=(64, units),
    )
    return Split(problem, digits(validation))


PROBLEMS: dict[str, Callable[[], Split]] = {
    "narrow": lambda: narrow(4),
    "narrow_bounded": lambda: narrow(4, ExpectedError),
}


@dataclasses.dataclass(frozen=True)
class Options(tuned.Options):
    """Compares methods where two tasks compete for the capacity of a narrow layer."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    """The problems."""
    methods: tuple[str, ...] = METHODS
    """Methods and chains, with @field=value where something is given to them."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Initial learning rates of Adam to choose from."""
    output: Path = Path(__file__).parent / "results"
    """Folder for the runs, the tables and the figure."""


if __name__ == "__main__":
    print(tuned.main(tyro.cli(Options), PROBLEMS, "conflict"))
