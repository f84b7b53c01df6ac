"""What does a balancer cost the host: called outside jit, and as a part of what a step carries?

For every method, on the losses of K tasks, three times and their ratio to those of the plain sum:

* eager: `balancer.update` called outside jit, operation by operation
* dispatch: a call of a compiled function that takes the method's state, donated, and returns it,
  with one addition per array. It does nothing else: this is what the number of arrays in the state
  costs the host at every step
* step: a compiled training step through `bilb.value_and_grad` on a linear model of few parameters,
  the method's own arithmetic included, without an accelerator to hide it behind

    python benchmarks/host_overhead.py
    python benchmarks/host_overhead.py --method bilb4mtl igb_v2 --num-tasks 40

Times are CPU time of the process, the least of many short rounds in which a method and the plain
sum take turns, so that what else the machine does hits neither. It prints a table and writes it.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from contract import Method
from methods import METHODS

import bilb

PLAIN = "linear_scalarization"
KNOWN = {method.name: method for method in METHODS if method.kin is None}


@dataclasses.dataclass(frozen=True)
class Options:
    """Times balancers outside jit, and compiled steps that carry their states."""

    method: tuple[str, ...] = tuple(KNOWN)
    """Entries of tests/methods.py."""
    num_tasks: int = 3
    """K."""
    rounds: int = 15
    """Turns that a method and the plain sum take."""
    output: Path = Path("outputs/host_overhead")
    """Folder for the table."""


class Measured(NamedTuple):
    """CPU time of a call, and its ratio to that of the plain sum."""

    seconds: float
    ratio: float


def eager(method: Method, num_tasks: int) -> Callable[[], Any]:
    """Returns a call of update outside jit."""
    transformation, losses = method.make(num_tasks), jnp.arange(1.0, num_tasks + 1)
    carry = [transformation.init(losses)]
    extra = method.keywords(method.extra(losses))

    def call():
        balanced, carry[0] = transformation.update(losses, carry[0], **extra)
        return balanced

    return call


def dispatch(method: Method, num_tasks: int) -> Callable[[], Any]:
    """Returns a call of a compiled function that does nothing but carry the state."""

    def add(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(add(jax.random.key_data(leaf)))
        return leaf + jnp.ones((), leaf.dtype) if leaf.dtype != bool else ~leaf

    return carrying(lambda state: jax.tree.map(add, state), start(method, num_tasks)[1])


def step(method: Method, num_tasks: int) -> Callable[[], Any]:
    """Returns a call of a compiled training step."""
    value_and_grad, carry = start(method, num_tasks)
    batch = jnp.ones((8, 4)), jnp.ones((8, num_tasks))

    def step(carry):
        params, opt_state, balance = carry
        _, gradient, balance = value_and_grad(params, balance, *batch)
        updates, opt_state = optax.adam(1e-3).update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, value_and_grad.after(params, balance, *batch)

    return carrying(step, carry)


def start(method: Method, num_tasks: int) -> tuple[Any, Any]:
    """Returns value and gradient of a linear model, and parameters and states to start from."""
    task_losses = lambda params, x, y: jnp.mean((x @ params - y) ** 2, axis=0)
    value_and_grad = bilb.value_and_grad(task_losses, method.make(num_tasks))
    params = jnp.full((4, num_tasks), 0.1)
    balance = value_and_grad.init(params, jnp.ones((8, 4)), jnp.ones((8, num_tasks)))
    return value_and_grad, (params, optax.adam(1e-3).init(params), balance)


def carrying(function: Callable, state: Any) -> Callable[[], Any]:
    """Returns a call of a compiled function that goes on from what it returned last."""
    compiled, carry = jax.jit(function, donate_argnums=0), [jax.tree.map(jnp.copy, state)]

    def call():
        carry[0] = compiled(carry[0])
        return carry[0]

    return call


def measure(call: Callable, plain: Callable, calls: int, rounds: int) -> Measured:
    """Times calls in turns with those of the plain sum."""

    def seconds(call):
        begin = time.process_time()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        return (time.process_time() - begin) / calls

    for function in (call, plain):
        seconds(function)
    least, least_plain = np.min([(seconds(call), seconds(plain)) for _ in range(rounds)], axis=0)
    return Measured(least, least / least_plain)


#: What is timed, with the number of calls in a round.
TIMED = {"eager": (eager, 3), "dispatch": (dispatch, 100), "step": (step, 100)}


def leaves(method: Method, num_tasks: int) -> int:
    """Returns the number of arrays in the method's own state."""
    return len(
        jax.tree.leaves(jax.eval_shape(lambda: method.make(num_tasks).init(jnp.ones(num_tasks))))
    )


def table(found: dict[str, dict[str, Measured]], num_tasks: int) -> str:
    """Returns a line per method."""
    heads = [f"{name}, µs | ratio" for name in TIMED]
    lines = [f"| method | arrays in its state | {' | '.join(heads)} |"]
    lines.append("|" + "---|" * (2 + 2 * len(TIMED)))
    for name, of in found.items():
        cells = [f"{m.seconds * 1e6:,.0f} | {m.ratio:.2f}" for m in of.values()]
        lines.append(f"| {name} | {leaves(KNOWN[name], num_tasks)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    if unknown := set(options.method) - KNOWN.keys():
        sys.exit(f"error: unknown method {min(unknown)}; choose from: {', '.join(KNOWN)}")
    plain = {name: make(KNOWN[PLAIN], options.num_tasks) for name, (make, _) in TIMED.items()}
    found = {}
    for name in options.method:
        found[name] = {
            timed: measure(
                make(KNOWN[name], options.num_tasks), plain[timed], calls, options.rounds
            )
            for timed, (make, calls) in TIMED.items()
        }
        print(name, *(f"{timed} x {m.ratio:.2f}" for timed, m in found[name].items()), flush=True)
    device = jax.devices()[0].device_kind
    text = f"{options.num_tasks} tasks, jax {jax.__version__}, {device}; ratios to {PLAIN}\n\n"
    text += table(found, options.num_tasks)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "host_overhead.md").write_text(f"# Overhead on the host\n\n{text}\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
