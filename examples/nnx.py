"""Flax NNX with batch normalisation: statistics are auxiliary output, the rest is as ever.

A network with a convolution and a batch normalisation reads MultiDigits (multidigits.py). NNX
modules hold their state, JAX wants functions of it, and the two meet in one function:

* ``nnx.split`` takes the module apart: its graph, its parameters, and its batch statistics.
* ``nnx.merge(graph, parameters, statistics, copy=True)`` puts a module together inside the loss.
  The copy is needed: the forward pass writes new statistics into the module, and without it into
  the variables that came from outside the transformation.
* The new statistics leave as auxiliary output, ``has_aux=True``. One backward pass in all.

    python examples/nnx.py                                   # some minutes on two cores
    python examples/nnx.py --method si marigold --seeds 1 --steps 100

What is compared against is the plain sum of the losses (ls). Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import balancers
import experiment
import jax
import jax.numpy as jnp
import multidigits
import numpy as np
import optax
import tqdm
from balancers import METHODS, Settings
from flax import nnx

import bilb


@dataclasses.dataclass(frozen=True)
class Options(experiment.Options):
    """Left digit, right digit and ink, with an NNX network that has batch normalisation."""

    seeds: int = 2
    """Number of seeds, trained one after the other."""
    output: Path = Path("outputs/nnx")
    """Folder for the table, its numbers and the figure."""

    def mistake(self) -> str | None:
        """Says what is wrong with the options, if anything."""
        return balancers.mistake(self.method, METHODS, {}) or super().mistake()


class Network(nnx.Module):
    """A convolution with batch normalisation shared by all tasks, then one linear head per task."""

    def __init__(self, heads: tuple[int, ...], *, rngs: nnx.Rngs):
        """Makes the layers; ``heads`` are the widths of the outputs."""
        self.convolution = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.trunk = nnx.Linear(16 * 25, 64, rngs=rngs)
        self.heads = nnx.List([nnx.Linear(64, width, rngs=rngs) for width in heads])

    def __call__(self, inputs: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the outputs of the tasks, (batch, width) each."""
        x = nnx.relu(self.norm(self.convolution(inputs.reshape(-1, 10, 10, 1))))
        x = nnx.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
        x = nnx.relu(self.trunk(x))
        return tuple(head(x) for head in self.heads)


def ingredients(
    settings: Settings, method: str, graph: Any, tasks: tuple[experiment.Task, ...]
) -> tuple[Any, optax.GradientTransformation]:
    """Returns the value and gradient of the task losses, and the network's optimiser."""

    def task_losses(parameters, statistics, batch):
        model = nnx.merge(graph, parameters, statistics, copy=True)
        outputs = model(batch.inputs)
        losses = jnp.stack([t.loss(o, y) for t, o, y in zip(tasks, outputs, batch.targets)])
        return losses, nnx.state(model, nnx.BatchStat)

    balancer = balancers.make(method, settings)
    gram = balancers.GRAMS[settings.gram](settings)
    value_and_grad = bilb.value_and_grad(task_losses, balancer, has_aux=True, gram=gram)
    return value_and_grad, settings.optimizer()


@functools.partial(jax.jit, static_argnames=("method", "graph", "tasks"), donate_argnames="carry")
def continue_training(settings, carry, pool, rows, *, method, graph, tasks):
    """Trains on the batches ``rows`` (steps, batch_size); losses and weights are (steps, K)."""
    value_and_grad, optimizer = ingredients(settings, method, graph, tasks)

    def step(carry, rows):
        parameters, statistics, opt_state, state = carry
        batch = jax.tree.map(lambda x: x[rows], pool)
        before = statistics
        (losses, statistics), gradient, state = value_and_grad(parameters, state, before, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        state = value_and_grad.after(parameters, state, before, batch)
        return (parameters, statistics, opt_state, state), (losses, state.effective_weights)

    return jax.lax.scan(step, carry, rows)


@functools.partial(jax.jit, static_argnames=("graph", "tasks"))
def evaluate(parameters, statistics, test, *, graph, tasks):
    """Returns the errors (K,) on the test set, normalised by the running statistics."""
    model = nnx.merge(graph, parameters, statistics, copy=True)
    model.eval()
    outputs = model(test.inputs)
    return jnp.stack([t.error(o, y) for t, o, y in zip(tasks, outputs, test.targets)])


def train(
    problem: experiment.Problem,
    method: str,
    *,
    seeds: int,
    steps: int | None = None,
    **hyperparameters: Any,
) -> experiment.Run:
    """Trains one method, seed after seed; as `experiment.train`, of which this is the NNX form."""
    start = time.perf_counter()
    steps = problem.steps if steps is None else steps
    hyperparameters = dict(learning_rate=problem.learning_rate, **hyperparameters)
    all_settings = experiment.make_settings(problem, method, seeds, steps, **hyperparameters)
    pool = jax.tree.map(jnp.asarray, problem.pool)
    batches = experiment.batch_order(problem, steps, seeds)
    length, window = experiment.chunking(steps)
    widths = tuple(max(task.classes, 1) for task in problem.tasks)
    errors, histories = [], []
    progress = tqdm.tqdm(total=seeds * steps, desc=f"{method:>15}", unit="step", disable=None)
    for seed in range(seeds):
        settings = dataclasses.replace(
            all_settings, seed=all_settings.seed[seed], selection=all_settings.selection[0]
        )
        network = Network(widths, rngs=nnx.Rngs(seed))
        graph, parameters, statistics = nnx.split(network, nnx.Param, ...)
        static = dict(method=method, graph=graph, tasks=problem.tasks)
        value_and_grad, optimizer = ingredients(settings, **static)
        batch = jax.tree.map(lambda x, rows=batches[seed, 0]: x[rows], pool)
        state = value_and_grad.init(parameters, statistics, batch)
        carry = (parameters, statistics, optimizer.init(parameters), state)
        chunks = []
        for begin in range(0, steps, length):
            rows = batches[seed, begin : begin + length]
            carry, records = continue_training(settings, carry, pool, rows, **static)
            chunks.append(jax.tree.map(np.asarray, records))
            progress.update(length)
        histories.append(jax.tree.map(lambda *parts: np.concatenate(parts), *chunks))
        errors.append(evaluate(*carry[:2], problem.test, graph=graph, tasks=problem.tasks))
    progress.close()
    windows = lambda *values: np.stack(values).reshape(seeds, steps // window, window, -1).mean(2)
    losses, weights = jax.tree.map(windows, *histories)
    return experiment.Run(
        method=method,
        errors=np.stack(errors),
        steps=np.arange(window, steps + 1, window),
        losses=losses,
        weights=weights,
        seconds=time.perf_counter() - start,
    )


if __name__ == "__main__":
    experiment.main(Options, multidigits.make_problem, references=("ls",), trained=train)
