"""The main example over a mesh of devices: one CPU, a TPU pod, and what lies between.

The tasks are those of multidigits.py: which digit is left, which is right, and how much ink. Every
batch is split over all devices. With ``--shards N`` the parameters and the optimiser's state are
split as well, over groups of N devices; otherwise every device holds them whole. Whatever the
method, the compiler adds the communication, and the balancer sees the losses of the whole batch.
The training step says one thing about devices: split parameters are gathered once, for all that a
method does with them. With ``--no-gather`` the compiler gathers where it needs them.

    python examples/pod.py                                      # whatever devices JAX finds
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/pod.py --shards 2
    python examples/pod.py --method si+mgda --output outputs/mgda
    python examples/pod.py --distributed                        # the same on every host of a pod

On several processes that cannot find each other, say where the first one listens:

    python examples/pod.py --coordinator 127.0.0.1:9876 --processes 2 --process 0 &
    python examples/pod.py --coordinator 127.0.0.1:9876 --processes 2 --process 1

Started again, a run goes on from its last checkpoint, on any number of devices; on as many as
before it ends with the very same parameters. The folder of checkpoints must be one that all
processes share. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import balancers
import checkpoints
import experiment
import jax
import jax.numpy as jnp
import multidigits
import numpy as np
import optax
import tyro
from balancers import AGGREGATORS, METHODS
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH = PartitionSpec(("data", "shard"))  # over all devices
WHOLE = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Options:
    """Left digit, right digit and ink, trained over all devices that JAX finds."""

    method: Annotated[
        str,
        tyro.conf.arg(
            help=f"Method to train, out of: {', '.join(METHODS | AGGREGATORS)}, or a chain such as "
            "si+mgda."
        ),
    ] = "bilb4mtl"
    steps: int = 600
    """Training steps."""
    batch_size: int = 64
    """Examples per step on all devices together, a multiple of their number."""
    shards: int = 1
    """Devices among which the parameters are split, a divisor of their number."""
    gather: bool = True
    """Gather split parameters once a step, and keep the whole gradient while slopes are taken along
    it; otherwise the compiler gathers anew where it sees fit, in less memory."""
    seed: int = 0
    """Of the initial parameters, the training subset, the batches and the method."""
    penalty: float = 0.05
    """Weight of the loss discrepancy in the bilevel methods."""
    gram: Literal["exact", "stacked", "sketch"] = "exact"
    """How methods of the third rung get the Gram matrix; a sketch needs --decay as well."""
    decay: float = 0.0
    """Of a running mean of the Gram matrix, in [0, 1)."""
    output: Path = Path("outputs/pod")
    """Folder for the checkpoints of this run, which all processes must share."""
    every: int = 100
    """Steps between two checkpoints."""
    distributed: bool = False
    """Whether there are other processes that JAX finds by itself (TPU pods, Slurm, Open MPI)."""
    coordinator: str | None = None
    """Address host:port of the first process, where JAX cannot find it."""
    processes: int | None = None
    """Number of processes, with --coordinator."""
    process: int | None = None
    """Number of this process, from 0, with --coordinator."""
    timeout: int = 100
    """Seconds after which a silent process counts as dead, and the others end."""

    def mistake(self) -> str | None:
        """Says what is wrong with the options, if anything."""
        if mistake := balancers.mistake([self.method]):
            return mistake
        if min(self.steps, self.batch_size, self.shards, self.every, self.timeout) < 1:
            return "--steps, --batch-size, --shards, --every and --timeout must be at least 1"
        if not 0 <= self.decay < 1:
            return "--decay must be at least 0 and less than 1"
        if self.gram == "sketch" and self.decay == 0:
            return "one sketch says little about the Gram matrix: give --decay too, such as 0.99"
        together = (self.coordinator, self.processes, self.process)
        if None in together and together != (None,) * 3:
            return "--coordinator, --processes and --process go together"
        return balancers.mistake_in_values(self.penalty, self.output)


class State(NamedTuple):
    """What training changes, and checkpoints hold."""

    parameters: Any
    optimizer: optax.OptState
    balance: Any  # of the driver, the balancer's state in it
    batch: Any = None  # the last one, where the method reads its losses after the step


class Program(NamedTuple):
    """A training run over a mesh, not yet started."""

    init: Callable[[], State]
    step: Callable[[State, Any], tuple[State, jax.Array]]  # state, batch -> state, losses (K,)
    state: State  # shapes, with their shardings


def connect(options: Options) -> None:
    """Joins the other processes, if there are any; nothing of JAX may run before."""
    if options.distributed or options.coordinator:
        jax.distributed.initialize(
            options.coordinator,
            num_processes=options.processes,
            process_id=options.process,
            heartbeat_timeout_seconds=options.timeout,
            shutdown_timeout_seconds=options.timeout,
        )


def make_mesh(shards: int = 1, axis_type: AxisType = AxisType.Auto) -> Mesh:
    """Returns all devices of all processes as (data, shard)."""
    count = jax.device_count()
    if count % shards:
        raise ValueError(f"--shards {shards} does not divide the number of devices, {count}")
    axis_types = (axis_type, axis_type)
    return jax.make_mesh((count // shards, shards), ("data", "shard"), axis_types=axis_types)


def partition(array: Any, shards: int) -> PartitionSpec:
    """Splits the longest axis of a matrix that ``shards`` divides; keeps other arrays whole."""
    axes = [axis for axis, size in enumerate(array.shape) if size % shards == 0]
    if shards == 1 or array.ndim < 2 or not axes:
        return WHOLE
    split = max(axes, key=lambda axis: array.shape[axis])
    return PartitionSpec(*["shard" if axis == split else None for axis in range(array.ndim)])


def lay_out(tree: Any, shardings: Any) -> Any:
    """Has the compiler split arrays so, whatever they are computed from and used for."""
    mesh = jax.tree.leaves(shardings)[0].mesh
    explicit = AxisType.Explicit in mesh.axis_types
    return (jax.reshard if explicit else jax.lax.with_sharding_constraint)(tree, shardings)


def make_program(
    value_and_grad: Any,
    optimizer: optax.GradientTransformation,
    parameters: Callable[[], Any],
    batch: Any,
    mesh: Mesh,
    gather: bool = True,
) -> Program:
    """Returns the training of a network over a mesh.

    Losses after a step are taken at the start of the next one, on the batch that is kept for it:
    so one gathering of split parameters serves them and the losses of the next batch.

    Args:
        value_and_grad: of the task losses, ``bilb.value_and_grad`` or the like.
        optimizer: of the network.
        parameters: returns the initial parameters.
        batch: the shapes of a batch.
        mesh: of :func:`make_mesh`, or one of devices to compile for.
        gather: whether split parameters are gathered once a step, and slopes taken along the
            gradient before it is split.
    """
    whole, over_all = NamedSharding(mesh, WHOLE), NamedSharding(mesh, BATCH)
    split = lambda array: NamedSharding(mesh, partition(array, mesh.shape["shard"]))

    def start():
        initial, zeros = parameters(), jax.tree.map(jnp.zeros_like, batch)
        balance = value_and_grad.init(initial, zeros)
        unread = value_and_grad.after(initial, balance, zeros) is balance
        return State(initial, optimizer.init(initial), balance, None if unread else zeros)

    def step(state, batch):
        parameters = lay_out(state.parameters, whole) if gather else state.parameters
        balance = value_and_grad.after(parameters, state.balance, state.batch)
        losses, gradient, balance = value_and_grad(parameters, balance, batch)
        if gather and getattr(balance, "slopes", None) is not None:
            # Otherwise it is split where it is made, and gathered again for its own slopes.
            gradient = lay_out(gradient, whole)
        gradient = lay_out(gradient, jax.tree.map(split, gradient))
        updates, opt_state = optimizer.update(gradient, state.optimizer, state.parameters)
        updated = optax.apply_updates(state.parameters, updates)
        last = None if state.batch is None else batch
        return State(updated, opt_state, balance, last), losses

    shapes = jax.eval_shape(start)
    of_leaves = jax.tree.map(split, shapes)._replace(
        balance=jax.tree.map(lambda _: whole, shapes.balance),
        batch=jax.tree.map(lambda _: over_all, shapes.batch),
    )
    shardings = of_leaves._replace(balance=whole)
    placed = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    return Program(
        init=jax.jit(start, out_shardings=shardings),
        step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole)),
        state=jax.tree.map(placed, shapes, of_leaves),
    )


def make_batches(
    problem: experiment.Problem, options: Options, mesh: Mesh, first: int
) -> Iterator[experiment.Data]:
    """Yields the batches from step ``first`` on; every process lays out its own examples only."""
    split = NamedSharding(mesh, BATCH)
    problem = dataclasses.replace(problem, batch_size=options.batch_size)
    order = experiment.batch_order(problem, options.steps, options.seed + 1)[options.seed]

    def place(array, rows):
        shape = (len(rows), *array.shape[1:])
        return jax.make_array_from_callback(shape, split, lambda index: array[rows[index[0]]])

    for rows in order[first:]:
        yield jax.tree.map(lambda array, rows=rows: place(array, rows), problem.pool)


def say(*words: Any) -> None:
    """Prints once, whatever the number of processes."""
    if jax.process_index() == 0:
        print(*words, flush=True)


def describe(options: Options, mesh: Mesh, program: Program) -> str:
    """Says what was found and how the work is divided."""
    device = jax.devices()[0]
    leaves = jax.tree.leaves(program.state.parameters)
    on_each = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    return (
        f"found {mesh.size} {device.device_kind} devices, {jax.local_device_count()} of them here; "
        f"processes: {jax.process_count()}; jax {jax.__version__}\n"
        f"mesh of {mesh.shape['data']} x {mesh.shape['shard']}, on each device "
        f"{options.batch_size // mesh.size} of {options.batch_size} examples and {on_each} of "
        f"{sum(leaf.size for leaf in leaves)} parameters"
    )


def program_of(options: Options, problem: experiment.Problem, mesh: Mesh) -> Program:
    """Returns the training of a problem's network with the chosen method."""
    settings = balancers.Settings(
        learning_rate=problem.learning_rate,
        penalty=options.penalty,
        seed=options.seed,
        selection=np.ones(len(problem.tasks)),
        steps=options.steps,
        steps_per_epoch=max(1, problem.train_size // options.batch_size),
        decay=options.decay,
        gram=options.gram,
    )
    network, tasks = problem.network, problem.tasks
    value_and_grad, optimizer = experiment.ingredients(settings, options.method, network, tasks)
    batch = jax.tree.map(lambda array: array[: options.batch_size], problem.pool)
    parameters = lambda: network.init(jax.random.key(options.seed), batch.inputs[:1])
    return make_program(value_and_grad, optimizer, parameters, batch, mesh, options.gather)


def train(options: Options, problem: experiment.Problem, mesh: Mesh) -> State:
    """Trains from the last checkpoint, or from the start, and returns the state in the end."""
    program = program_of(options, problem, mesh)
    say(describe(options, mesh, program))
    same = ("method", "steps", "batch_size", "seed", "penalty", "gram", "decay")
    setting = {name: getattr(options, name) for name in same}
    with checkpoints.Checkpoints(options.output, program.state, setting) as kept:
        first, state = kept.restore() or (0, program.init())
        say(f"{options.method}: from step {first} to {options.steps}")
        batches = make_batches(problem, options, mesh, first)
        for step, batch in enumerate(batches, start=first + 1):
            state, losses = program.step(state, batch)
            if step % options.every == 0 or step == options.steps:
                kept.save(step, state)
                say(f"step {step}: losses {rounded(losses)}{weights_of(state)}")
    return state


def weights_of(state: State) -> str:
    """Says how much each task counted in the last step, where the method has such weights."""
    weights = state.balance.effective_weights
    return "" if weights is None else f", weights {rounded(weights)}"


def rounded(values: jax.Array) -> np.ndarray:
    """Returns replicated values as they are printed."""
    return np.round(np.asarray(values, float), 3)


def errors_of(state: State, problem: experiment.Problem, mesh: Mesh) -> np.ndarray:
    """Returns the errors (K,) on the test set."""

    def errors(parameters, test):
        outputs = problem.network.apply(parameters, test.inputs)
        pairs = zip(problem.tasks, outputs, test.targets)
        return jnp.stack([task.error(*pair) for task, *pair in pairs])

    whole = NamedSharding(mesh, WHOLE)
    return np.asarray(jax.jit(errors, out_shardings=whole)(state.parameters, problem.test))


def run(options: Options, make_problem: Callable[[], experiment.Problem]) -> State:
    """Joins the other processes, trains, prints the errors, and returns the final state."""
    connect(options)
    mesh = make_mesh(options.shards)
    if options.batch_size % mesh.size:
        raise ValueError(
            f"--batch-size {options.batch_size} is not a multiple of the {mesh.size} devices"
        )
    problem = make_problem()
    state = train(options, problem, mesh)
    for task, error in zip(problem.tasks, errors_of(state, problem, mesh)):
        say(f"{task.name}: {error:.2f} {task.unit}")
    return state


def main() -> None:
    options = tyro.cli(Options)
    if mistake := options.mistake():
        sys.exit(f"error: {mistake}")
    try:
        run(options, lambda: multidigits.make_problem(multidigits.Options()))
    except ValueError as error:  # what does not fit the devices found, or the checkpoint
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
