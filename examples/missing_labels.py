"""MultiDigits where most labels are missing: masks, and the double ``where``.

The tasks are those of multidigits.py, but one pair in two has no label for its left digit, and only
one in fifty has one for its right digit. Two things then need care:

* A mean over no labels is 0 / 0, and a NaN that enters the loss spoils the gradient of everything,
  whatever weight its task has: 0 · NaN is NaN. So what is missing is replaced *before* the loss
  sees it, and left out of the mean *after*.
* In a batch without any label a task is absent: its loss says nothing, and a method must not learn
  from it. The ``mask`` says so.

    python examples/missing_labels.py                             # some minutes on two cores
    python examples/missing_labels.py --method si famo --steps 100

Nothing is downloaded. In the figure an absent task has loss and weight 0. The single-task network
of the right digit learns from the same few labels.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import experiment
import jax
import jax.numpy as jnp
import multidigits
import numpy as np

KNOWN = (0.5, 0.02, 1.0)  # of the labels of each task


@dataclasses.dataclass(frozen=True)
class Options(experiment.Options):
    """Left digit, right digit and ink, where most labels of the digits are missing."""

    output: Path = Path("outputs/missing_labels")
    """Folder for the table, its numbers and the figure."""


class Task(experiment.Task):
    """A task whose missing labels are NaN."""

    def loss(self, output: jax.Array, target: jax.Array) -> jax.Array:
        """Returns the mean over the labels that there are, 0 where there is none."""
        present = ~jnp.isnan(target)
        label = jnp.where(present, target, 0.0)  # before the loss sees it ...
        if self.classes:
            label = label.astype(jnp.int32)
        losses = jax.vmap(super().loss)(output[:, None], label[:, None])
        losses = jnp.where(present, losses, 0.0)  # ... and in its result
        return losses.sum() / jnp.maximum(present.sum(), 1)


class Masked(NamedTuple):
    """Gives the driver inside the mask of the tasks that the batch has labels for."""

    inside: Any

    def init(self, parameters: Any, batch: experiment.Data) -> Any:
        """Returns the first state."""
        return self.inside.init(parameters, batch)

    def __call__(self, parameters: Any, state: Any, batch: experiment.Data) -> Any:
        """Returns the losses, the gradient and the next state."""
        mask = jnp.stack([~jnp.isnan(target).all() for target in batch.targets])
        return self.inside(parameters, state, batch, mask=mask)

    def after(self, parameters: Any, state: Any, batch: experiment.Data) -> Any:
        """Returns the state with the losses after the step, where the method reads them."""
        return self.inside.after(parameters, state, batch)


def driver(*arguments: Any) -> Masked:
    """Returns the driver of the other examples, with masks."""
    return Masked(experiment.driver(*arguments))


class Problem(experiment.Problem):
    """MultiDigits with masks."""

    @property
    def driver(self) -> Any:
        """The driver with masks."""
        return driver


def make_problem(options: Options) -> Problem:
    """Returns MultiDigits, with NaN for the training labels that are missing."""
    whole = multidigits.make_problem(options)
    rng = np.random.default_rng(3)
    labels = [target.astype(np.float32) for target in whole.pool.targets]
    for label, known in zip(labels, KNOWN, strict=True):
        label[rng.random(len(label)) >= known] = np.nan
    parts = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    return Problem(
        **parts
        | dict(
            title="MultiDigits with ink, labels missing",
            tasks=tuple(Task(**dataclasses.asdict(task)) for task in whole.tasks),
            pool=whole.pool._replace(targets=tuple(labels)),
        )
    )


if __name__ == "__main__":
    experiment.main(Options, make_problem)
