"""Trainings of many epochs: checkpoints after each of them, and networks with batch normalisation.

A training goes on from its last checkpoint when it is started again; see examples/checkpoints.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import checkpoints
import protocol

import bilb


def run(
    folder: Path,
    setting: Mapping[str, Any],
    state: Any,
    epochs: int,
    epoch: Callable[[int, Any], Any],
) -> Any:
    """Returns ``state`` after ``state = epoch(number, state)`` for the numbers 1 to ``epochs``.

    Args:
        folder: of the checkpoints of this run alone; its last one stays there.
        setting: what must be the same for the run to go on, of JSON's types.
        state: the first state, a pytree of arrays.
        epochs: number of epochs.
        epoch: takes the number of an epoch and the state, which it may donate.
    """
    arrays = lambda state: jax.tree.map(jnp.asarray, state)
    with checkpoints.Checkpoints(folder, arrays(state), setting, keep=1) as kept:
        first = 1
        if found := kept.restore():
            first, state = found[0] + 1, found[1]
        for number in range(first, epochs + 1):
            state = epoch(number, state)
            kept.save(number, arrays(state))
    return state


class LayoutError(Exception):
    """The folder of the data does not look as it should; says how it should."""


def complete(
    options: Any,
    title: str,
    check: Callable[[], Any],
    train: Callable[[str, Any, int, Path], protocol.Line],
    table: Callable[[list[protocol.Line]], str],
) -> None:
    """Trains what is missing of a benchmark, writes its table and prints it.

    Args:
        options: ``methods``, ``seeds``, ``epochs``, ``report`` and ``output``.
        title: of the table.
        check: returns what is known of the data after a look at it, or raises LayoutError.
        train: ``(method, what check returned, seed, folder of checkpoints) -> line``.
        table: of the lines of these epochs, in Markdown.
    """
    path = options.output / "runs.jsonl"
    mine = lambda: [line for line in protocol.read(path) if line["epochs"] == options.epochs]
    if not options.report:
        try:
            data = check()
        except LayoutError as error:
            sys.exit(f"error: {error}")
        for seed in range(options.seeds):
            for name in options.methods:
                if any((x["method"], x["seed"]) == (name, seed) for x in mine()):
                    continue
                folder = options.output / "checkpoints" / f"{name}-{seed}"
                protocol.append(path, [train(name, data, seed, folder)])
    text = f"# {title}\n\n{table(mine())}"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


class Carry(NamedTuple):
    """What a training step changes."""

    parameters: Any
    batch_stats: Any
    opt_state: Any
    state: Any


class Trainer:
    """Training steps of a network with batch normalisation, and its outputs.

    Args:
        network: a module, ``network(images, train) -> (outputs, features)``.
        losses: ``losses(outputs, batch) -> (K,)``; a batch is a dictionary with an ``image``.
        balancer: a loss transformation or a chain of them.
        learning_rate: initial one of Adam; :func:`with_rate` changes it.
        pooled: ``features -> (batch, D)`` for a router that reads features.
    """

    def __init__(
        self,
        network: nn.Module,
        losses: Callable[[Any, Any], jax.Array],
        balancer: optax.GradientTransformation,
        learning_rate: float,
        pooled: Callable[[Any], jax.Array] | None = None,
    ):
        """Sets everything up; nothing is compiled before it is needed."""
        self.network, self.losses, self.balancer = network, losses, balancer
        self.features = None if pooled is None else (lambda aux: pooled(aux["features"]))
        self.optimizer = optax.inject_hyperparams(optax.adam)(learning_rate)
        self.step = jax.jit(self._step, donate_argnums=0)
        self.outputs = jax.jit(self._outputs)

    def start(self, seed: int, batch: Any) -> Carry:
        """Returns the first carry."""
        init = jax.jit(self.network.init, static_argnums=2)
        variables = init(jax.random.key(seed), batch["image"], True)
        parameters, batch_stats = variables["params"], variables["batch_stats"]
        state = self._driver(parameters).init(parameters, batch_stats, batch)
        return Carry(parameters, batch_stats, self.optimizer.init(parameters), state)

    def epoch(self, carry: Carry, learning_rate: float, batches: Iterable) -> tuple[Carry, float]:
        """Returns the carry after a step on each batch, and the seconds that it took."""
        start = time.perf_counter()
        carry = with_rate(carry, learning_rate)
        for batch in batches:
            carry = self.step(carry, batch)
        jax.block_until_ready(carry)
        return carry, time.perf_counter() - start

    def _driver(self, parameters):
        return bilb.value_and_grad(
            self._task_losses,
            self.balancer,
            has_aux=True,
            features=self.features,
            shared=shared(parameters),
            gram=bilb.grams.stacked(),
        )

    def _task_losses(self, parameters, batch_stats, batch):
        variables = {"params": parameters, "batch_stats": batch_stats}
        (outputs, features), changed = self.network.apply(
            variables, batch["image"], True, mutable=["batch_stats"]
        )
        return self.losses(outputs, batch), changed | {"features": features}

    def _step(self, carry: Carry, batch: Any) -> Carry:
        driver = self._driver(carry.parameters)
        given = carry.parameters, carry.state, carry.batch_stats, batch
        (_, aux), gradient, state = driver(*given)
        updates, opt_state = self.optimizer.update(gradient, carry.opt_state, carry.parameters)
        parameters = optax.apply_updates(carry.parameters, updates)
        state = driver.after(parameters, state, carry.batch_stats, batch)
        return Carry(parameters, aux["batch_stats"], opt_state, state)

    def _outputs(self, carry: Carry, images: jax.Array) -> Any:
        variables = {"params": carry.parameters, "batch_stats": carry.batch_stats}
        return self.network.apply(variables, images, False)[0]


def with_rate(carry: Carry, learning_rate: float) -> Carry:
    """Returns the carry with another learning rate."""
    rate = {"learning_rate": jnp.asarray(learning_rate, jnp.float32)}
    hyperparams = carry.opt_state.hyperparams | rate
    return carry._replace(opt_state=carry.opt_state._replace(hyperparams=hyperparams))


def shared(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns which parameters the tasks share: all but those whose names begin with ``pred``."""
    return {
        name: jax.tree.map(lambda _, name=name: not name.startswith("pred"), of)
        for name, of in parameters.items()
    }
