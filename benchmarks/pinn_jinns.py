"""Trains the networks of examples/pinn.py by jinns, with its own schemes for the loss weights.

What benchmarks/pinn.py runs for methods such as ``jinns.soft_adapt``: ``jinns.solve`` does the
training, jinns' loss object holds and updates the weights; network, points, losses, optimiser and
their random numbers are those of all other methods. Each loss is a term of its own.

    pip install 'bilb[bench-jinns]'
    python benchmarks/pinn.py --methods jinns.soft_adapt jinns.ReLoBRaLo

Written for jinns 1.10.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jinns
import numpy as np
import pinn
from balancers import Settings
from equations import Equation
from jinns.data._AbstractDataGenerator import AbstractDataGenerator
from jinns.loss._loss_components import PDENonStatioComponents

#: The terms that a loss object of jinns can have besides the equation's, in its order.
TERMS = ("norm_loss", "boundary_loss", "observations", "initial_condition")

TaskLosses = Callable[[Any, Any], jax.Array]


class Points(AbstractDataGenerator):
    """Draws the points of a step after the other, as ``pinn.draw``."""

    equation: Equation = eqx.field(static=True)
    seed: jax.Array
    step: jax.Array
    rar_parameters: None = None

    def get_batch(self) -> tuple[Points, dict[str, jax.Array]]:
        """Returns the generator at the next step, and the points."""
        following = eqx.tree_at(lambda data: data.step, self, self.step + 1)
        return following, pinn.draw(self.equation, self.seed, self.step)


class Losses(jinns.loss.LossPDENonStatio):
    """A loss object whose terms are given losses (K,) of parameters and points."""

    task_losses: TaskLosses = eqx.field(static=True)
    number: int = eqx.field(static=True)

    def __init__(self, task_losses: TaskLosses, number: int, scheme: str, params: Any):
        """``scheme`` is jinns' name of one, ``params`` what is trained."""
        self.task_losses, self.number = task_losses, number
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Missing boundary|Initial condition")
            super().__init__(
                u=None,
                dynamic_loss=None,
                initial_condition_fun=None,
                loss_weights=jinns.loss.LossWeightsPDENonStatio(**self._by_name([1.0] * number)),
                update_weight_method=scheme,
                params=params,
            )

    def _by_name(self, values: Sequence[Any]) -> dict[str, Any]:
        # The first is of the equation; schemes of jinns take the others in the order of TERMS.
        used = TERMS[1 : self.number] if self.number < 5 else TERMS
        return {"dyn_loss": values[0], **dict(zip(used, values[1:], strict=True))}

    def _terms(self, values: Sequence[Any]) -> PDENonStatioComponents:
        by_name = self._by_name(values)
        return PDENonStatioComponents(**{n: by_name.get(n) for n in ("dyn_loss", *TERMS)})

    def evaluate(self, params: Any, batch: Any) -> tuple[jax.Array, PDENonStatioComponents]:
        """Returns the weighted sum, and the losses by name."""
        terms = self._terms(list(self.task_losses(params.nn_params, batch)))
        return self.ponderate_and_sum_loss(terms), terms

    def values_and_grads(
        self, params: Any, batch: Any
    ) -> tuple[PDENonStatioComponents, PDENonStatioComponents]:
        """Returns the losses and their gradients by name."""
        losses, pullback = jax.vjp(lambda p: self.task_losses(p.nn_params, batch), params)
        gradients = [pullback(row)[0] for row in jnp.eye(self.number)]
        return self._terms(list(losses)), self._terms(gradients)


def train(
    equation: Equation,
    scheme: str,
    *,
    seeds: Sequence[int],
    steps: int,
    learning_rate: float,
    hidden: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray, float]:
    """Trains a network for each seed, all at once.

    Args:
        equation: what to solve; of at most 5 losses, the first the equation's.
        scheme: "soft_adapt", "ReLoBRaLo", "lr_annealing" or "prior_loss".
        seeds: the seeds.
        steps: number of steps.
        learning_rate: of Adam at first; it decays along a cosine.
        hidden: the widths of the network's hidden layers.

    Returns:
        The relative L2 errors (seeds,) for testing and for choosing hyperparameters, and the
        seconds per step of one network, without compilation.
    """
    number = len(equation.losses)
    if number > 1 + len(TERMS) or equation.inside > 1:
        raise ValueError(f"a loss object of jinns has no place for all of {equation.losses}.")
    network = pinn.Network(equation.corners, equation.outputs, hidden)
    schedule = Settings(learning_rate, 0.0, 0, np.ones(number), steps, pinn.STEPS_PER_EPOCH)

    def task_losses(parameters: Any, points: Any) -> jax.Array:
        return equation.task_losses(lambda x: network.apply(parameters, x), points)

    def initial(key: jax.Array) -> Any:
        parameters = network.init(key, jnp.zeros((1, len(equation.coordinates))))
        return jinns.parameters.Params(nn_params=parameters, eq_params=None)

    loss = Losses(task_losses, number, scheme, initial(jax.random.key(0)))

    def run(seed: jax.Array) -> Any:
        # As in pinn.start_training; the first batch that jinns draws is not trained on.
        key, scheme_key = jax.random.split(jax.random.key(seed))
        solved, *_ = jinns.solve(
            n_iter=steps,
            init_params=initial(key),
            data=Points(equation, seed, jnp.int32(-1)),
            loss=loss,
            optimizer=schedule.optimizer(),
            verbose=False,
            ahead_of_time=False,
            key=jax.random.fold_in(scheme_key, 1),
        )
        return solved.nn_params

    seeds = jnp.asarray(seeds)
    compiled = jax.jit(jax.vmap(run)).lower(seeds).compile()
    start = time.perf_counter()
    parameters = jax.block_until_ready(compiled(seeds))
    seconds = time.perf_counter() - start
    reference = equation.reference()
    points = reference.points().astype(np.float32)
    values = np.asarray(pinn.evaluate(parameters, points, equation=equation, hidden=hidden))
    test, validation = pinn.relative_l2(values, reference.values)
    return test, validation, seconds / steps / len(seeds)
