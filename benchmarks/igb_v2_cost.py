"""What does the agent of IGBv2 cost per training step?

Trains a multi-layer perceptron with K heads by linear scalarisation (LS), IGBv1 and IGBv2, the
latter with the paper's agent and with a smaller one, and compares floating point operations and
wall time per step. The agent trains in bursts, one every `update_every` steps; the buffer is full,
which is when it costs most, and what a burst costs is shared out among those steps. What it adds
does not depend on the model: it is given in absolute numbers too, to be held against yours.

    python benchmarks/igb_v2_cost.py
    python benchmarks/igb_v2_cost.py --num-tasks 2 40 --repeats 3

Wall times are the best of `repeats` runs in turns, so that what else the machine does hits all
methods alike. It prints a table and writes it beside a figure.
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
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import report

import bilb
from bilb.improvable_gap import sac

UPDATE_EVERY = 50

#: Agents of IGBv2: the paper's, and one that costs a fraction of it.
AGENTS = {
    "igb_v2": {"hidden": (128, 128), "batch_size": 256, "num_updates": 50, "buffer_size": 10_000},
    "igb_v2 small": {"hidden": (64, 64), "batch_size": 64, "num_updates": 10, "buffer_size": 1000},
}
METHODS = ("ls", "igb_v1", *AGENTS)


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures the cost per training step of IGBv2 against LS and IGBv1."""

    num_tasks: tuple[int, ...] = (2, 10, 40, 200, 1000)
    """Numbers of tasks K."""
    inputs: int = 128
    """Inputs of the model."""
    width: int = 512
    """Width of the model's hidden layers."""
    depth: int = 3
    """Number of the model's hidden layers."""
    batch_size: int = 128
    """Examples per training step."""
    repeats: int = 5
    """Timed runs of UPDATE_EVERY steps for each method."""
    output: Path = Path("outputs/igb_v2_cost")
    """Folder for the table and the figure."""


class Cost(NamedTuple):
    """Of one method at one K, per training step."""

    flops: float
    seconds: float


def balancer(method: str) -> optax.GradientTransformation:
    if method == "ls":
        return bilb.linear_scalarization()
    if method == "igb_v1":
        return bilb.igb_v1(0, 1)
    return bilb.igb_v2(
        0, 1, warmup_steps=0, update_after=0, update_every=UPDATE_EVERY, **AGENTS[method]
    )


def init_params(key: jax.Array, options: Options, num_tasks: int) -> list[jax.Array]:
    sizes = [options.inputs, *[options.width] * options.depth, num_tasks]
    keys = jax.random.split(key, len(sizes) - 1)
    layer = lambda key, n, m: jax.random.normal(key, (n, m)) * n**-0.5
    return [layer(*args) for args in zip(keys, sizes[:-1], sizes[1:])]


def task_losses(params: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    *hidden, heads = params
    for kernel in hidden:
        x = jax.nn.relu(x @ kernel)
    return jnp.mean((x @ heads - y) ** 2, axis=0)


def steady_state(state: Any) -> Any:
    """Returns a state that knows its base losses, has a full buffer and is due to train."""
    if not hasattr(state, "base_losses"):
        return state
    state = state._replace(
        step=jnp.int32(UPDATE_EVERY),
        base_losses=jnp.ones_like(state.base_losses),
        base_counts=jnp.ones_like(state.base_counts),
    )
    if not hasattr(state, "buffer"):
        return state
    length = state.buffer.transitions.rewards.shape[0]
    return state._replace(buffer=state.buffer._replace(size=jnp.int32(length)))


def training(method: str, options: Options, num_tasks: int) -> tuple[Callable, Any]:
    """Returns one training step ``carry -> carry`` and the first carry."""
    value_and_grad = bilb.value_and_grad(task_losses, balancer(method))
    optimizer = optax.sgd(1e-3)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (options.batch_size, options.inputs))
    y = jax.random.normal(keys[1], (options.batch_size, num_tasks))

    def step(carry):
        params, opt_state, state = carry
        _, gradient, state = value_and_grad(params, state, x, y)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state

    params = init_params(keys[2], options, num_tasks)
    state = value_and_grad.init(params, x, y)
    state = state._replace(balancer=steady_state(state.balancer))
    return step, (params, optimizer.init(params), state)


def flops(function: Callable, *args: Any) -> float:
    """Returns the operations of the compiled program, loop bodies counted once."""
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def flops_of_agent_update(method: str, num_tasks: int) -> float:
    """Returns the operations of one update of the agent, its random numbers included."""
    arguments = AGENTS[method]
    settings = sac.Settings(arguments["hidden"], arguments["batch_size"])
    agent = sac.init_agent(jax.random.key(0), num_tasks, settings=settings)
    buffer = sac.init_buffer(arguments["buffer_size"], num_tasks)

    def train(agent, buffer, count):
        key = jax.random.key(0)
        draw = lambda i: sac.draw_update(
            jax.random.fold_in(key, i), buffer.size, settings.batch_size, num_tasks, jnp.float32
        )
        return sac.train(agent, buffer, count, draw, settings)

    # The number of updates is an argument: the loop is there, and its body is counted once.
    return flops(train, agent, buffer, jnp.int32(1))


def measure(options: Options, num_tasks: int) -> dict[str, Cost]:
    """Returns the cost of every method."""
    counted, programs, carries = {}, {}, {}
    for method in METHODS:
        step, carry = training(method, options, num_tasks)
        counted[method] = flops(step, carry)
        if method in AGENTS:
            burst = AGENTS[method]["num_updates"] / UPDATE_EVERY
            counted[method] += (burst - 1) * flops_of_agent_update(method, num_tasks)
        many = lambda carry, step=step: jax.lax.fori_loop(
            0, UPDATE_EVERY, lambda _, c: step(c), carry
        )
        programs[method] = jax.jit(many, donate_argnums=0)
        carries[method] = jax.block_until_ready(programs[method](carry))
    best = dict.fromkeys(METHODS, np.inf)
    for _ in range(options.repeats):
        for method in METHODS:
            start = time.perf_counter()
            carries[method] = jax.block_until_ready(programs[method](carries[method]))
            best[method] = min(best[method], time.perf_counter() - start)
    return {m: Cost(counted[m], best[m] / UPDATE_EVERY) for m in METHODS}


def table(costs: dict[int, dict[str, Cost]]) -> str:
    """Returns a line for every K and method."""
    lines = [["method", "K", "Mflop/step", "more than LS", "x LS", "ms/step", "more", "x LS"]]
    for num_tasks, of in costs.items():
        ls = of["ls"]
        for method, cost in of.items():
            more, slower = cost.flops - ls.flops, cost.seconds - ls.seconds
            cells = [
                method,
                str(num_tasks),
                f"{cost.flops / 1e6:.1f}",
                f"{more / 1e6:.3f}",
                f"{cost.flops / ls.flops:.3f}",
                f"{cost.seconds * 1e3:.2f}",
                f"{slower * 1e3:.2f}",
                f"{cost.seconds / ls.seconds:.2f}",
            ]
            lines.append(cells)
    return report.markdown(lines)


def figure(costs: dict[int, dict[str, Cost]]) -> Figure:
    """Returns what every method adds to LS, in operations, and the ratio of wall times."""
    fig = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = fig.subplots(1, 2)
    ks = list(costs)
    for method in METHODS[1:]:
        added = [(costs[k][method].flops - costs[k]["ls"].flops) / 1e6 for k in ks]
        ratio = [costs[k][method].seconds / costs[k]["ls"].seconds for k in ks]
        left.plot(ks, added, marker="o", label=method)
        right.plot(ks, ratio, marker="o", label=method)
    left.set(xscale="log", yscale="log", xlabel="tasks", ylabel="Mflop per step more than LS")
    right.set(xscale="log", xlabel="tasks", ylabel="wall time, LS = 1")
    right.axhline(1, color="0.7", linewidth=1, zorder=0)
    left.legend(frameon=False)
    return fig


def main(options: Options) -> dict[int, dict[str, Cost]]:
    costs = {}
    for num_tasks in options.num_tasks:
        costs[num_tasks] = measure(options, num_tasks)
    text = table(costs)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    title = f"# Cost of IGBv2's agent\n\njax {jax.__version__}, {jax.default_backend().upper()}."
    (options.output / "igb_v2_cost.md").write_text(f"{title}\n\n{text}\n", encoding="utf-8")
    figure(costs).savefig(options.output / "igb_v2_cost.png", dpi=150)
    return costs


if __name__ == "__main__":
    main(tyro.cli(Options))
