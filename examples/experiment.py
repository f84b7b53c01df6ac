"""What the example scripts share: a small multi-task network, its training, a table and a figure.

An example describes its data as a :class:`Problem` and hands it to :func:`main`. Every method is
trained on the same batches from the same initial parameters, together with one separate network
per task (STL), whose losses are plain (``STL``) or logarithms (``STL-log``): methods that balance
the logarithms of the losses owe part of their success to the logarithm alone, and the second
reference shows how much.

To add a method, add a line to ``METHODS`` in balancers.py. Names of methods may be joined by ``+``:
``si+mgda`` is MGDA on the logarithms of the losses.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import balancers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import tqdm
import tyro
from balancers import AGGREGATORS, METHODS, REFERENCES, Settings

import bilb

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Task:
    """One task: a classification with ``classes`` classes, or a regression where that is 0."""

    name: str
    classes: int = 0
    unit: str = "%"
    scale: float = 1.0  # from the target as trained on to the unit in which the error is shown

    def loss(self, output: Array, target: Array) -> Array:
        """Returns the mean loss of a batch: cross-entropy, or the mean squared error."""
        if self.classes:
            return optax.softmax_cross_entropy_with_integer_labels(output, target).mean()
        return jnp.mean((output.squeeze(1) - target) ** 2)

    def error(self, output: Array, target: Array) -> Array:
        """Returns the error shown, lower is better: misclassified %, or the mean absolute error."""
        if self.classes:
            return 100.0 * jnp.mean(output.argmax(-1) != target)
        return self.scale * jnp.mean(jnp.abs(output.squeeze(1) - target))


class Data(NamedTuple):
    """Examples: inputs (N, D) and, for each task, targets (N,)."""

    inputs: Array
    targets: tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Data, tasks and the training setting, the same for every method."""

    title: str
    tasks: tuple[Task, ...]
    pool: Data  # every seed draws its own `train_size` training examples from here
    test: Data
    train_size: int
    batch_size: int
    steps: int
    learning_rate: float
    hidden: tuple[int, ...] = (64, 64)

    @property
    def network(self) -> MultiTaskNetwork:
        """The network to train."""
        return MultiTaskNetwork(self.hidden, tuple(max(task.classes, 1) for task in self.tasks))

    @property
    def driver(self) -> Callable[..., Any]:
        """What makes the value and gradient of the task losses, `driver` or one around it."""
        return driver


class MultiTaskNetwork(nn.Module):
    """A multi-layer perceptron shared by all tasks, then one linear head per task."""

    hidden: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def shared(self) -> Any:
        """Which parameters the tasks share."""
        trunk = {f"trunk_{layer}": True for layer in range(len(self.hidden))}
        return {"params": trunk | {f"head_{k}": False for k in range(len(self.heads))}}

    @nn.compact
    def __call__(self, inputs: Array) -> tuple[Array, ...]:
        """Returns the outputs of the tasks, (batch, width) each."""
        features = inputs
        for layer, width in enumerate(self.hidden):
            features = nn.relu(nn.Dense(width, name=f"trunk_{layer}")(features))
        return tuple(nn.Dense(w, name=f"head_{k}")(features) for k, w in enumerate(self.heads))


@dataclasses.dataclass(frozen=True)
class Run:
    """What training one method with all seeds gave."""

    method: str
    errors: np.ndarray  # (seeds, K) on the test set, in the tasks' units
    steps: np.ndarray  # (T,) the last step of each window that the histories average over
    losses: np.ndarray  # (seeds, T, K) training losses
    weights: np.ndarray | None  # (seeds, T, K) effective weights, None without such
    seconds: float  # wall time, compilation included


def train(
    problem: Problem,
    method: str,
    *,
    seeds: int,
    steps: int | None = None,
    penalty: float = 0.05,
    gram: str = "exact",
    decay: float = 0.0,
) -> Run:
    """Trains one method for a fixed number of steps with several seeds at once.

    A seed changes the initial parameters, the training subset and the order of the batches. The
    network after the last step is the one tested; nothing is selected on the way.

    Args:
        problem: data, tasks and setting.
        method: names in `METHODS` joined by ``+``, at last one in `AGGREGATORS` maybe, or a name
            in `REFERENCES` for one separate network per task.
        seeds: number of seeds: 0, 1, ..., seeds - 1.
        steps: number of steps; the problem's by default.
        penalty: weight of the loss discrepancy in the bilevel methods.
        gram: a name in `GRAMS`, the way to take Gram matrices.
        decay: of the running mean of the Gram matrix, in [0, 1).
    """
    start = time.perf_counter()
    steps = problem.steps if steps is None else steps
    network = problem.network
    hyperparameters = dict(learning_rate=problem.learning_rate, penalty=penalty, decay=decay)
    settings = make_settings(problem, method, seeds, steps, gram, **hyperparameters)
    static = dict(method=method, network=network, tasks=problem.tasks, drive=problem.driver)
    pool = jax.tree.map(jnp.asarray, problem.pool)
    batches = jnp.asarray(batch_order(problem, steps, seeds))
    parameters = initial_parameters(network, pool.inputs[:1], settings.seed)
    carry = start_training(settings, parameters, pool, batches[:, 0], **static)

    length, window = chunking(steps)
    history = []
    with tqdm.tqdm(total=steps, desc=f"{method:>15}", unit="step", disable=None) as progress:
        for begin in range(0, steps, length):
            chunk = batches[:, begin : begin + length]
            carry, records = continue_training(
                settings, carry, pool, chunk, window=window, **static
            )
            history.append(jax.tree.map(np.asarray, records))
            progress.update(length)
    errors = evaluate(carry[0], problem.test, network=network, tasks=problem.tasks)
    losses, weights = jax.tree.map(lambda *parts: np.concatenate(parts, axis=2), *history)
    return Run(
        method=method,
        errors=of_own_task(np.asarray(errors)),
        steps=np.arange(window, steps + 1, window),
        losses=of_own_task(losses),
        # A network of a reference has one task, and an aggregator has no weights.
        weights=None if weights is None or method in REFERENCES else of_own_task(weights),
        seconds=time.perf_counter() - start,
    )


def make_settings(
    problem: Problem,
    method: str,
    seeds: int,
    steps: int,
    gram: str = "exact",
    **hyperparameters: float | Array,
) -> Settings:
    """Returns the settings of a method's run with the seeds 0, 1, ..., seeds - 1."""
    num_tasks = len(problem.tasks)
    return Settings(
        seed=jnp.arange(seeds),
        selection=jnp.eye(num_tasks) if method in REFERENCES else jnp.ones((1, num_tasks)),
        steps=steps,
        steps_per_epoch=max(1, problem.train_size // problem.batch_size),
        gram=gram,
        **{name: jnp.asarray(value, jnp.float32) for name, value in hyperparameters.items()},
    )


def of_own_task(values: np.ndarray) -> np.ndarray:
    """Drops the axis of networks, second of (seeds, R, ..., K).

    Network k of a reference (R = K) speaks for task k alone; otherwise there is one network.
    """
    if values.shape[1] == 1:
        return values[:, 0]
    return np.moveaxis(np.diagonal(values, axis1=1, axis2=values.ndim - 1), -1, values.ndim - 2)


def batch_order(problem: Problem, steps: int, seeds: int) -> np.ndarray:
    """Returns rows of the pool, (seeds, steps, batch_size): epochs over each seed's own subset."""
    size, batch = problem.train_size, problem.batch_size
    per_epoch = size // batch
    if per_epoch == 0 or size > len(problem.pool.inputs):
        raise ValueError(f"cannot draw batches of {batch} from {size} training examples")
    order = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        subset = rng.permutation(len(problem.pool.inputs))[:size]
        epochs = [
            rng.permutation(subset)[: per_epoch * batch] for _ in range(-(-steps // per_epoch))
        ]
        order.append(np.concatenate(epochs).reshape(-1, batch)[:steps])
    return np.stack(order).astype(np.int32)


def chunking(steps: int, chunks: int = 20, points: int = 150) -> tuple[int, int]:
    """Returns steps per chunk and steps per history point; the latter divides the former.

    All chunks are equally long, so that one compiled program runs them all.
    """
    length = min(d for d in range(1, steps + 1) if steps % d == 0 and steps // d <= chunks)
    divisors = [d for d in range(1, length + 1) if length % d == 0]
    return length, next((d for d in divisors if steps // d <= points), length)


@functools.partial(jax.jit, static_argnames=("network",))
def initial_parameters(network: MultiTaskNetwork, example: Array, seeds: Array) -> Any:
    """Returns initial parameters with a leading axis of seeds."""
    return jax.vmap(lambda seed: network.init(jax.random.key(seed), example))(seeds)


class Aggregated(NamedTuple):
    """Drives an aggregator of task gradients as bilb.value_and_grad drives a balancer."""

    task_losses: Callable[..., Array]
    balancer: optax.GradientTransformation  # in front; it reads nothing but losses
    aggregator: optax.GradientTransformation

    class State(NamedTuple):
        """The states of both; an aggregator has no weights for whole tasks."""

        balancer: optax.OptState
        aggregator: optax.OptState
        effective_weights: None = None

    def init(self, parameters: Any, batch: Data) -> State:
        """Returns the first state."""
        losses = jax.eval_shape(self.task_losses, parameters, batch)
        return self.State(self.balancer.init(losses), self.aggregator.init(parameters))

    def __call__(self, parameters: Any, state: State, batch: Data) -> tuple[Array, Any, State]:
        """Returns the losses, the aggregated gradient and the next state."""
        losses = self.task_losses(parameters, batch)
        _, balancer = self.balancer.update(losses, state.balancer)

        def balanced_losses(parameters):
            return self.balancer.update(self.task_losses(parameters, batch), state.balancer)[0]

        balanced, gradients = bilb.task_gradients(balanced_losses, parameters)
        gradient, aggregator = self.aggregator.update(
            gradients, state.aggregator, parameters, losses=balanced
        )
        return losses, gradient, self.State(balancer, aggregator)

    def after(self, parameters: Any, state: State, batch: Data) -> State:
        """Returns the state as it is."""
        return state


def ingredients(
    settings: Settings,
    method: str,
    network: MultiTaskNetwork,
    tasks: tuple[Task, ...],
    drive: Callable[..., Any] | None = None,
) -> tuple[Any, optax.GradientTransformation]:
    """Returns the value and gradient of the task losses, and the network's optimiser."""

    def task_losses(parameters: Any, batch: Data) -> Array:
        outputs = network.apply(parameters, batch.inputs)
        return jnp.stack([t.loss(o, y) for t, o, y in zip(tasks, outputs, batch.targets)])

    # Slopes, norms and Gram matrices concern what the tasks share.
    value_and_grad = (drive or driver)(settings, method, task_losses, network.shared)
    return value_and_grad, settings.optimizer()


def driver(
    settings: Settings,
    method: str,
    task_losses: Callable[..., Array],
    shared: Any = True,
    known: Mapping[str, Callable] = METHODS | REFERENCES,
) -> Any:
    """Returns the value and gradient of task losses under a method, a chain or an aggregator."""
    *front, last = method.split("+")
    if last in AGGREGATORS:
        balancer = balancers.make("+".join(front) or "ls", settings, known)
        return Aggregated(task_losses, balancer, AGGREGATORS[last](settings, shared))
    return bilb.value_and_grad(
        task_losses,
        balancers.make(method, settings, known),
        shared=shared,
        gram=balancers.GRAMS[settings.gram](settings),
    )


def over_networks(function: Callable[..., Any], settings: Settings, networks: int | None) -> Any:
    """Vectorises ``function(settings, x, rows)`` over the seeds and R networks of each.

    R is K for a single-task reference, one network per selected task, else 1. Networks of a seed
    share the batches ``rows``; ``networks`` is the axis of ``x`` for them, None if they share it.
    """
    shared = jax.tree.map(lambda _: None, settings)
    axes = (dataclasses.replace(shared, selection=0), networks, None)
    return jax.vmap(
        jax.vmap(function, in_axes=axes), in_axes=(dataclasses.replace(shared, seed=0), 0, 0)
    )


@functools.partial(jax.jit, static_argnames=("method", "network", "tasks", "drive"))
def start_training(settings, parameters, pool, rows, *, method, network, tasks, drive=None):
    """Returns (parameters, optimiser state, balancer state), leading axes (seeds, R)."""

    def start(settings, parameters, rows):
        value_and_grad, optimizer = ingredients(settings, method, network, tasks, drive)
        batch = jax.tree.map(lambda x: x[rows], pool)
        return parameters, optimizer.init(parameters), value_and_grad.init(parameters, batch)

    return over_networks(start, settings, networks=None)(settings, parameters, rows)


@functools.partial(
    jax.jit,
    static_argnames=("method", "network", "tasks", "window", "drive"),
    donate_argnames="carry",
)
def continue_training(settings, carry, pool, rows, *, method, network, tasks, window, drive=None):
    """Trains on the batches ``rows`` (seeds, steps, batch_size).

    Returns:
        The new carry, and the losses and effective weights averaged over windows of steps,
        (seeds, R, steps / window, K) each.
    """

    def run(settings, carry, rows):
        parts = ingredients(settings, method, network, tasks, drive)
        batch_of = lambda rows: jax.tree.map(lambda x: x[rows], pool)
        return scan_steps(*parts, carry, rows, batch_of, window)

    return over_networks(run, settings, networks=0)(settings, carry, rows)


def scan_steps(value_and_grad, optimizer, carry, draws, batch_of, window):
    """Takes a training step on ``batch_of(draw)`` for each of the draws, leading axis steps.

    Returns:
        The new carry, and the losses and effective weights averaged over windows of steps.
    """

    def step(carry, draw):
        parameters, opt_state, state = carry
        batch = batch_of(draw)
        losses, gradient, state = value_and_grad(parameters, state, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        state = value_and_grad.after(parameters, state, batch)
        return (parameters, opt_state, state), (losses, state.effective_weights)

    carry, history = jax.lax.scan(step, carry, draws)
    thin = lambda x: x.reshape(-1, window, *x.shape[1:]).mean(1)
    return carry, jax.tree.map(thin, history)


@functools.partial(jax.jit, static_argnames=("network", "tasks"))
def evaluate(parameters, test, *, network, tasks):
    """Returns the errors (seeds, R, K) on the test set."""

    def errors(parameters):
        outputs = network.apply(parameters, test.inputs)
        return jnp.stack([t.error(o, y) for t, o, y in zip(tasks, outputs, test.targets)])

    return jax.vmap(jax.vmap(errors))(parameters)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that all examples have."""

    known: ClassVar[Mapping[str, Callable]] = METHODS

    method: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help=f"Methods to train, out of: {', '.join(METHODS | AGGREGATORS)}, or chains such as "
            "si+mgda."
        ),
    ] = ("ls", "si", "bilb4mtl")
    seeds: int = 3
    """Number of seeds, trained side by side."""
    steps: int | None = None
    """Training steps; the example's own number by default."""
    penalty: float = 0.05
    """Weight of the loss discrepancy in the bilevel methods; above 0.1 it does harm here."""
    gram: Literal["exact", "stacked", "sketch"] = "exact"
    """How methods of the third rung get the Gram matrix; a sketch needs --decay as well."""
    decay: float = 0.0
    """Of a running mean of the Gram matrix, in [0, 1)."""
    output: Path = Path("outputs")
    """Folder for the table, its numbers and the figure."""

    def mistake(self) -> str | None:
        """Says what is wrong with the options, if anything."""
        if mistake := balancers.mistake(self.method, self.known):
            return mistake
        if self.seeds < 1 or (self.steps is not None and self.steps < 1):
            return "--seeds and --steps must be at least 1"
        if not 0 <= self.decay < 1:
            return "--decay must be at least 0 and less than 1"
        if self.gram == "sketch" and self.decay == 0:
            return "one sketch says little about the Gram matrix: give --decay too, such as 0.99"
        return balancers.mistake_in_values(self.penalty, self.output)


def main(
    options_type: type[Options],
    make_problem: Callable[[Any], Problem],
    references: Sequence[str] = tuple(REFERENCES),
    trained: Callable[..., Run] = train,
) -> None:
    """Reads the command line, trains references and methods, prints the table, writes the files.

    Args:
        options_type: the example's options.
        make_problem: ``options -> `` the problem.
        references: what Δm is taken against, single-task networks or methods.
        trained: trains one method, as `train` does.
    """
    options = tyro.cli(options_type)
    if mistake := options.mistake():
        sys.exit(f"error: {mistake}")
    start = time.perf_counter()
    try:
        problem = make_problem(options)
    except ModuleNotFoundError as error:  # a data package; the message says how to install it
        sys.exit(f"error: {error}")
    chosen = ("seeds", "steps", "penalty", "gram", "decay")
    arguments = {name: getattr(options, name) for name in chosen}
    names = dict.fromkeys([*references, *options.method])
    runs = [trained(problem, name, **arguments) for name in names]
    setting = {"title": problem.title, **arguments, "steps": options.steps or problem.steps}
    print(report.publish(problem, runs, list(references), setting, options.output))
    print(f"{time.perf_counter() - start:.0f} s in all")
