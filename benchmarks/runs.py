"""Several runs of a method side by side in one program, for benchmarks that compare methods.

A run has a learning rate, a seed and, where a method takes constant weights, weights of its own.
The networks, losses and methods are those of examples/.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import balancers
import experiment
import protocol

FIELDS = {"penalty": float, "gram": str, "decay": float, "clip": float, "order": int}
#: Methods that are given constant weights, by the reference whose objective they are.
CONSTANTS = {"constant": "STL", "si+constant": "STL-log"}


class Split(NamedTuple):
    """A problem, whose test set is looked at in the end, and a validation set of the same size."""

    problem: experiment.Problem
    validation: experiment.Data


class ClipState(NamedTuple):
    """State of :func:`clip_by_running_norm`."""

    step: jax.Array  # () int32
    mean: jax.Array  # () running sum of the norms


def clip_by_running_norm(fraction: Any, decay: float = 0.99) -> optax.GradientTransformation:
    """Clips the global norm at a fraction of its running mean over the steps before and this one.

    With a fraction below 1 nearly all gradients are clipped, so that their length varies slowly:
    what is left for Adam is the direction.
    """

    def init(params):
        del params
        return ClipState(jnp.zeros((), jnp.int32), jnp.zeros(()))

    def update(updates, state, params=None):
        del params
        norm = optax.tree.norm(updates)
        mean = decay * state.mean + (1 - decay) * norm
        step = optax.safe_increment(state.step)
        limit = fraction * mean / (1 - decay**step)
        scale = jnp.where(norm > limit, limit / jnp.where(norm > 0, norm, 1.0), 1.0)
        return optax.tree.scale(scale, updates), ClipState(step, mean)

    return optax.GradientTransformation(init, update)


class Runs(NamedTuple):
    """R runs of a method side by side; N networks each, one per task for a reference, else one."""

    learning_rates: np.ndarray  # (R, N)
    seeds: np.ndarray  # (R,)
    weights: np.ndarray  # (R, N, K): one-hot for a reference, the candidates of constant weights


def ingredients(settings, *, method, clip, network, tasks):
    """Returns the value and gradient of the losses, and the optimiser of the network."""
    value_and_grad, optimizer = experiment.ingredients(settings, method, network, tasks)
    if clip is not None:
        optimizer = optax.chain(clip_by_running_norm(clip), optimizer)
    return value_and_grad, optimizer


def over_runs(function: Callable[..., Any], settings: balancers.Settings) -> Callable[..., Any]:
    """Vectorises ``function(settings, x, rows)`` over runs and, in each, the networks."""
    shared = jax.tree.map(lambda _: None, settings)
    of_network = dataclasses.replace(shared, learning_rate=0, selection=0)
    of_run = dataclasses.replace(of_network, seed=0)
    return jax.vmap(jax.vmap(function, in_axes=(of_network, 0, None)), in_axes=(of_run, 0, 0))


STATIC = ("method", "clip", "network", "tasks")


@functools.partial(jax.jit, static_argnames=STATIC)
def start_training(settings, parameters, pool, rows, **static):
    """Returns (parameters, optimiser state, balancer state), leading axes (R, N)."""

    def start(settings, parameters, rows):
        value_and_grad, optimizer = ingredients(settings, **static)
        batch = jax.tree.map(lambda x: x[rows], pool)
        return parameters, optimizer.init(parameters), value_and_grad.init(parameters, batch)

    return over_runs(start, settings)(settings, parameters, rows)


@functools.partial(jax.jit, static_argnames=STATIC, donate_argnames="carry")
def continue_training(settings, carry, pool, rows, **static):
    """Trains on the batches ``rows`` (R, steps, batch_size) and returns the new carry."""

    def run(settings, carry, rows):
        batch_of = lambda rows: jax.tree.map(lambda x: x[rows], pool)
        parts = ingredients(settings, **static)
        return experiment.scan_steps(*parts, carry, rows, batch_of, window=len(rows))[0]

    return over_runs(run, settings)(settings, carry, rows)


def train(split: Split, name: str, runs: Runs, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Trains a method and returns its errors (R, K) on the validation set and on the test set.

    A seed changes the initial parameters, the training subset and the order of the batches; all
    methods see the same ones.
    """
    problem = split.problem
    method, fields = protocol.parse(name, FIELDS)
    order, clip = fields.pop("order", 0), fields.pop("clip", None)
    settings = balancers.Settings(
        learning_rate=jnp.asarray(runs.learning_rates, jnp.float32),
        seed=jnp.asarray(runs.seeds),
        selection=jnp.asarray(runs.weights, jnp.float32),
        steps=steps,
        steps_per_epoch=max(1, problem.train_size // problem.batch_size),
        **({"penalty": 0.05, "gram": "stacked"} | fields),
    )
    network = problem.network
    static = dict(
        method=CONSTANTS.get(method, method), clip=clip, network=network, tasks=problem.tasks
    )
    pool = jax.tree.map(jnp.asarray, problem.pool)
    # Another order takes the batches of other seeds, far from those in use.
    rows = batch_rows(problem, steps, runs.seeds + 1_000_000 * order)
    parameters = experiment.initial_parameters(network, pool.inputs[:1], settings.seed)
    repeat = lambda x: jnp.repeat(x[:, None], runs.learning_rates.shape[1], axis=1)
    parameters = jax.tree.map(repeat, parameters)
    carry = start_training(settings, parameters, pool, rows[:, 0], **static)
    length, _ = experiment.chunking(steps)
    for begin in range(0, steps, length):
        chunk = rows[:, begin : begin + length]
        carry = continue_training(settings, carry, pool, chunk, **static)
    errors = functools.partial(experiment.evaluate, network=network, tasks=problem.tasks)
    return tuple(
        experiment.of_own_task(np.asarray(errors(carry[0], data)))
        for data in (split.validation, problem.test)
    )


def batch_rows(problem: experiment.Problem, steps: int, seeds: np.ndarray) -> np.ndarray:
    """Returns the rows of each seed's batches, (R, steps, batch_size)."""
    size, batch = problem.train_size, problem.batch_size
    epochs = -(-steps // (size // batch))

    def of(seed):
        rng = np.random.default_rng(seed)
        subset = rng.permutation(len(problem.pool.inputs))[:size]
        drawn = [rng.permutation(subset)[: size // batch * batch] for _ in range(epochs)]
        return np.concatenate(drawn).reshape(-1, batch)[:steps]

    return np.stack([of(seed) for seed in seeds]).astype(np.int32)
