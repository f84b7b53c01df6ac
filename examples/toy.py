"""Two objectives in a plane: where do the methods end up from five starting points?

The toy problem of CAGrad and FAMO has two losses of two parameters, two ravines that hold gradient
descent up, and a Pareto set that is a curve at the bottom. The first loss is scaled by 0.1, so that
the sum of the losses sees little of it. At the balance point, the middle of the Pareto set, both
losses are equal once that scale is taken out again.

    python examples/toy.py                       # a few seconds
    python examples/toy.py --method bilb4mtl --penalty 0.1
    python examples/toy.py --method mgda cagrad nash_mtl

It prints where each method ends up and writes a figure of the paths, in the plane of the parameters
and in the plane of the losses. To add a method, add a line to METHODS; ``+`` joins several of them.

References:
    Liu et al., *Conflict-Averse Gradient Descent for Multi-task Learning*, arXiv 2110.14048.
    Liu et al., *FAMO: Fast Adaptive Multitask Optimization*, arXiv 2306.03792.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import balancers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import bilb

SCALE = 0.1  # of the first loss
STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))

METHODS: dict[str, Callable[[Options], optax.GradientTransformation]] = {
    "ls": lambda o: bilb.linear_scalarization(),
    "bilb4mtl": lambda o: bilb.chain(
        bilb.divide_by(jnp.array([SCALE, 1.0])),
        bilb.bilb4mtl(
            o.penalty,
            weighted=False,
            divisor="stop_gradient_sum",
            optimizer=optax.adam(o.learning_rate),
        ),
    ),
    "marigold": lambda o: bilb.marigold(),
    "famo": lambda o: bilb.famo(gamma=0.0, min_losses=jnp.array([SCALE * -21.0, -21.0])),
    "mgda": lambda o: bilb.mgda(),
    "upgrad": lambda o: bilb.upgrad(),
    "cagrad": lambda o: bilb.cagrad(),
    "nash_mtl": lambda o: bilb.nash_mtl(),
    "fairgrad": lambda o: bilb.fairgrad(),
    "pcgrad": lambda o: bilb.pcgrad(),
    "imtl_g": lambda o: bilb.imtl_g(),
    "aligned_mtl": lambda o: bilb.aligned_mtl(),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Runs methods on the toy problem from five starting points."""

    method: Annotated[
        tuple[str, ...], tyro.conf.arg(help=f"Methods to run, out of: {', '.join(METHODS)}.")
    ] = ("ls", "bilb4mtl", "marigold", "famo")
    steps: int = 10_000
    """Number of steps."""
    learning_rate: float = 1e-2
    """Of Adam, for the parameters and for what a method learns."""
    penalty: float = 0.5
    """Weight of the loss discrepancy. From about 0.4 to 0.6, all starts reach the balance point."""
    output: Path = Path("outputs/toy")
    """Folder for the figure."""

    def mistake(self) -> str | None:
        """Says what is wrong with the options, if anything."""
        if mistake := balancers.mistake(self.method, METHODS, {}):
            return mistake
        if self.steps < 1:
            return "--steps must be at least 1"
        return balancers.mistake_in_values(self.penalty, self.output)


def task_losses(x: jax.Array, scale: float | jax.Array = SCALE) -> jax.Array:
    """Returns the two losses at x (2,)."""
    x1, x2 = x
    f1 = jnp.log(_at_least(jnp.abs(0.5 * (-x1 - 7) - jnp.tanh(-x2)), 5e-6)) + 6
    f2 = jnp.log(_at_least(jnp.abs(0.5 * (-x1 + 3) + jnp.tanh(-x2) + 2), 5e-6)) + 6
    above = _at_least(jnp.tanh(0.5 * x2), 0.0)
    below = _at_least(jnp.tanh(-0.5 * x2), 0.0)
    q1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    q2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    return jnp.stack([scale * (f1 * above + q1 * below), f2 * above + q2 * below])


def _at_least(value: jax.Array, bound: float) -> jax.Array:
    # jnp.maximum passes half the gradient at the bound. The original, torch.clamp, passes all of
    # it, which counts at the start (0, 0).
    return jnp.where(value >= bound, value, bound)


def pareto_set(x1: np.ndarray) -> np.ndarray:
    """Returns the points (N, 2) of the Pareto set with the first coordinates ``x1`` in [-7, 7].

    There, only one weighted mean of the losses is stationary along the first coordinate; the Pareto
    point is the minimum of that mean along the second one. The losses' scale has no influence.
    """
    x2 = np.linspace(-8.0, -9.0, 10_001)
    weight = (x1[:, None] + 7) / 14
    q = (weight * (x1[:, None] - 7) ** 2 + (1 - weight) * (x1[:, None] + 7) ** 2) / 10 - 20
    mean = (q + 0.01 * (x2 + 8) ** 2) * np.tanh(-0.5 * x2)
    return np.stack([x1, x2[mean.argmin(1)]], axis=1)


@functools.partial(jax.jit, static_argnames=("method", "options"))
def train(method: str, options: Options, starts: jax.Array | np.ndarray = STARTS) -> jax.Array:
    """Returns the paths (starts, steps + 1, 2) of one method, all starts at once."""
    value_and_grad = bilb.value_and_grad(task_losses, balancers.make(method, options, METHODS))
    optimizer = optax.adam(options.learning_rate)

    def run(start):
        def step(carry, _):
            x, opt_state, state = carry
            _, gradient, state = value_and_grad(x, state)
            updates, opt_state = optimizer.update(gradient, opt_state, x)
            x = optax.apply_updates(x, updates)
            return (x, opt_state, value_and_grad.after(x, state)), x

        carry = (start, optimizer.init(start), value_and_grad.init(start))
        _, path = jax.lax.scan(step, carry, length=options.steps)
        return jnp.concatenate([start[None], path])

    return jax.vmap(run)(jnp.asarray(starts, float))


def table(paths: dict[str, np.ndarray]) -> str:
    """Returns a line for each method and start: where it ended and how far from balance."""
    balance = pareto_set(np.zeros(1))[0]
    widths = (max(12, *map(len, paths)), 12, 16, 16, 12)
    line = lambda cells: "  ".join(cell.rjust(width) for cell, width in zip(cells, widths))
    pair = lambda values, spec: f"({values[0]:{spec}}, {values[1]:{spec}})"
    lines = [
        line(("method", "start", "end", "losses", "from balance")),
        line("-" * width for width in widths),
    ]
    for method, path in paths.items():
        starts, ends = path[:, 0], path[:, -1]
        for start, end, losses in zip(starts, ends, jax.vmap(task_losses)(ends)):
            distance = f"{np.linalg.norm(end - balance):.3f}"
            lines.append(
                line((method, pair(start, "g"), pair(end, ".3f"), pair(losses, ".3f"), distance))
            )
    balanced_losses = task_losses(jnp.asarray(balance))
    lines.append(f"balance: x = {pair(balance, '.3f')}, losses {pair(balanced_losses, '.3f')}")
    return "\n".join(lines)


def figure(paths: dict[str, np.ndarray]):
    """Draws the paths of each method over the mean loss, and in the plane of the losses."""
    import matplotlib.pyplot as plt

    from bilb import plots

    losses = jax.jit(jnp.vectorize(task_losses, signature="(p)->(k)"))
    axis = np.linspace(-10.5, 10.5, 301)
    mean_loss = losses(np.stack(np.meshgrid(axis, axis), axis=-1)).mean(-1)
    optimal = pareto_set(np.linspace(-7, 7, 201))
    balance = pareto_set(np.zeros(1))
    mark = dict(marker="o", markersize=15, fillstyle="none", color="black", linestyle="none")

    fig, axes = plt.subplots(
        2,
        len(paths),
        figsize=(0.7 + 4.2 * len(paths), 8.6),
        sharex="row",
        sharey="row",
        layout="constrained",
        squeeze=False,
    )
    for (method, path), above, below in zip(paths.items(), *axes):
        thin = path[:, :: max(1, path.shape[1] // 2000)]
        plots.trajectories(
            thin,
            grid=(axis, axis),
            values=mean_loss,
            pareto_set=optimal,
            labels=("$x_1$", "$x_2$"),
            ax=above,
        )
        plots.front(
            losses(optimal),
            trajectories=losses(thin),
            labels=(f"loss 1, scaled by {SCALE}", "loss 2"),
            ax=below,
        )
        above.plot(*balance.T, **mark, label="balance point")
        below.plot(*losses(balance).T, **mark)
        above.set_title(method)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    for ax in axes.flat:
        ax.set_box_aspect(1)
        ax.get_legend().remove()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return fig


def main() -> None:
    """Reads the command line, runs the methods, prints the table and writes the figure."""
    options = tyro.cli(Options)
    if mistake := options.mistake():
        sys.exit(f"error: {mistake}")
    with jax.enable_x64(True):
        paths = {name: np.asarray(train(name, options)) for name in dict.fromkeys(options.method)}
        print(table(paths))
        fig = figure(paths)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "toy.png"
    fig.savefig(path, dpi=150)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
