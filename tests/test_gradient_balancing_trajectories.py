"""Training runs with gradient balancing against those of the official codes, in float64.

A small model with a shared trunk and one head per task. The codes differ in what they do to the
heads, in a factor K, and in clipping the trunk's gradient; each row below says it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import oracle, relative_deviation

import bilb
from bilb.gradient_balancing import gradvac, pcgrad
from bilb.gradient_balancing.weighting import prepare

pytestmark = [pytest.mark.x64, pytest.mark.slow]

MODEL_RATE = 5e-3


def task_losses(params, x, y):
    hidden = jnp.tanh(x @ params["trunk"]["w"].T + params["trunk"]["b"])
    predicted = hidden @ params["head"]["w"].T + params["head"]["b"]
    return jnp.mean((predicted - y) ** 2, axis=0)


def weighted_sum(weigh=jnp.ones_like):
    """Returns what gives the heads the gradient of a weighted sum of the step's losses."""

    def gradient(params, batches, state):
        weights = weigh(task_losses(params, *batches[0]))
        objective = lambda params: weights @ task_losses(params, *batches[0])
        return jax.grad(objective)(params)["head"]

    return gradient


plain_sum = weighted_sum()
log_sum = weighted_sum(lambda losses: 1 / losses)


def sum_of_all(params, batches, state):
    """Returns the gradient of the heads by the sum of the losses of all three batches."""
    return jax.tree.map(lambda *g: sum(g), *(plain_sum(params, [b], state) for b in batches))


def mean_of_all(params, batches, state):
    return jax.tree.map(lambda g: g / len(batches), sum_of_all(params, batches, state))


def first_link(params, batches, state):
    """Returns that by the first link of the chain."""
    weights = state.balancer.links[0].weights
    return weighted_sum(lambda losses: weights)(params, batches, state)


def in_orders(weigh):
    """A method that visits tasks in the orders that update is given."""

    def update(losses, usual, *, mask, gram, orders):
        weights, usual = weigh(gram, orders, usual)
        return jax.lax.stop_gradient(weights) * losses, usual

    start = lambda num_tasks, dtype: jnp.zeros((num_tasks, num_tasks), dtype)
    return bilb.loss_transformation(start, update)


def surgery():
    return in_orders(lambda gram, orders, usual: (pcgrad.surgery(gram, orders), usual))


def vaccine():
    prepared = lambda gram: prepare(gram, jnp.ones(gram.shape[0], bool))
    return in_orders(
        lambda gram, orders, usual: gradvac.vaccinate(prepared(gram), usual, orders, 0.5, 1e-8)
    )


def gradnorm():
    return bilb.gradnorm(warmup_steps=5, optimizer=optax.adam(MODEL_RATE))


def sdmgrad():
    return bilb.sdmgrad(learning_rate=5.0, eps=1e-8)


def imtl():
    return bilb.chain(bilb.imtl_l(optimizer=optax.adam(MODEL_RATE)), bilb.imtl_g())


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A recorded run.

    Attributes:
        name: of the recording.
        balancer: returns the method.
        heads: ``params, batches -> gradients`` of the heads; None if they follow the balanced sum.
        factor: of the trunk's gradient, or of all where heads follow it: a number, or a function
            of the effective weights.
        clip: largest norm of the trunk's gradient after that, of the whole one if heads follow it.
        batches: which of the three batches of a step are for the step, and for both sides of the
            Gram matrix; None for one batch.
        orders: the array of orders to replay.
        steps: how many are compared; None for all.
        tolerance: of the losses, relative to the largest.
        of_gradients: of the trunk's gradients in the recorded steps, relative to the largest entry.
    """

    name: str
    balancer: Callable[[], Any]
    heads: Callable | None = None
    factor: Any = 1.0
    clip: float | None = None
    batches: tuple[int, int, int] | None = None
    orders: str | None = None
    steps: int | None = None
    tolerance: float = 1e-9
    of_gradients: float = 1e-9

    def __str__(self):
        return self.name


def of_tasks(weights):
    return weights.size


def fairgrad(alpha):
    return lambda: bilb.fairgrad(alpha)


def on_logs(method):
    return lambda: bilb.chain(bilb.log_losses(), method())


# Solvers that stop early: how early decides where the run goes, so only its beginning is compared.
EARLY = {"steps": 4, "tolerance": 1e-5, "of_gradients": 1e-3}
RUNS = [
    Run("famo_repo.imtlg", bilb.imtl_g),
    # It takes log(l + 1e-8).
    Run("famo_repo.log_imtlg", on_logs(bilb.imtl_g), of_gradients=1e-7),
    Run("libmtl.IMTL", imtl, first_link),
    Run("famo_repo.pcgrad", surgery, plain_sum, clip=1.0, orders="shuffle"),
    # It adds 1e-8 to squared norms.
    Run("libmtl.PCGrad", surgery, plain_sum, orders="shuffle", of_gradients=1e-7),
    Run("libmtl.GradVac_b0.5", vaccine, plain_sum, orders="shuffle"),
    Run("libmtl.Aligned_MTL", lambda: bilb.aligned_mtl(preference=1.0), plain_sum),
    Run("libmtl.UPGrad", bilb.upgrad, plain_sum),
    Run("libmtl.GradNorm_a1.5", gradnorm, plain_sum),
    Run("libmtl.MoDo", bilb.modo, mean_of_all, batches=(2, 0, 1)),
    Run("libmtl.SDMGrad_l0.3", sdmgrad, sum_of_all, batches=(0, 1, 2)),
    # Its solver stops at about 1e-8.
    Run("libmtl.FairGrad_a1", fairgrad(1.0), of_gradients=1e-8),
    Run("ldc_repo.fairgrad_a1", fairgrad(1.0), plain_sum, of_tasks, 1.0, of_gradients=1e-8),
    Run("ldc_repo.fairgrad_a2", fairgrad(2.0), plain_sum, of_tasks, 1.0, of_gradients=1e-8),
    Run("famo_repo.mgda", bilb.mgda, None, of_tasks, **EARLY),
    Run("famo_repo.log_mgda", on_logs(bilb.mgda), None, lambda w: 1 / w.sum(), **EARLY),
    Run("libmtl.MGDA_none", bilb.mgda, plain_sum, **EARLY),
    Run("libmtl.MGDA_loss", on_logs(bilb.mgda), plain_sum, **EARLY),
    Run("famo_repo.cagrad_c0.4", bilb.cagrad, plain_sum, of_tasks, 1.0, **EARLY),
    Run("famo_repo.log_cagrad_c0.4", on_logs(bilb.cagrad), log_sum, of_tasks, 1.0, **EARLY),
    Run("libmtl.CAGrad_c0.5_r1", lambda: bilb.cagrad(0.5), plain_sum, **EARLY),
    Run("nash_repo.nashmtl", bilb.nash_mtl, clip=1.0, **EARLY),
    Run("famo_repo.nashmtl_noclip", bilb.nash_mtl, **EARLY),
    Run("libmtl.Nash_MTL", lambda: bilb.nash_mtl(max_norm=1.0), **EARLY),
]


def trained(run, arrays):
    """Returns the losses (T, K) of the batch that the step follows, and the trunk's gradients."""
    parts = {"trunk": ("w", "b"), "head": ("w", "b")}
    params = {
        part: {leaf: jnp.asarray(arrays[f"init_{part}_{leaf}"]) for leaf in leaves}
        for part, leaves in parts.items()
    }
    shared = {"trunk": True, "head": False}
    value_and_grad = bilb.value_and_grad(task_losses, run.balancer(), shared=shared)
    optimizer = optax.adam(MODEL_RATE)
    steps = int(arrays["T"])
    x, y = (jnp.asarray(arrays[key]) for key in ("X", "Y"))
    if run.batches is None:
        batches = [(x[:steps], y[:steps])]
    else:
        of_step = lambda values, b: values[: 3 * steps].reshape(steps, 3, *values.shape[1:])[:, b]
        batches = [(of_step(x, b), of_step(y, b)) for b in range(3)]
    orders = jnp.asarray(arrays[f"{run.name}/{run.orders}"].astype(int)) if run.orders else None

    def step(carry, inputs):
        params, opt_state, state = carry
        batches, orders = inputs
        extra = {} if orders is None else {"orders": orders}
        own = batches[0]
        if run.batches is not None:
            own, *both = (batches[b] for b in run.batches)
            extra["gram_args"] = both
        losses, grads, state = value_and_grad(params, state, *own, **extra)
        factor = run.factor(state.effective_weights) if callable(run.factor) else run.factor
        grads = jax.tree.map(lambda g: factor * g, grads)
        if run.clip is not None:
            norm = optax.tree.norm(grads["trunk"])
            shrink = jnp.minimum(1.0, run.clip / (norm + 1e-6))
            grads["trunk"] = jax.tree.map(lambda g: shrink * g, grads["trunk"])
        if run.heads is not None:
            grads["head"] = run.heads(params, batches, state)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        trunk = jnp.concatenate([grads["trunk"]["w"].ravel(), grads["trunk"]["b"]])
        return (optax.apply_updates(params, updates), opt_state, state), (losses, trunk)

    first = batches[0]
    start = value_and_grad.init(params, first[0][0], first[1][0])
    scan = jax.jit(lambda carry, inputs: jax.lax.scan(step, carry, inputs))
    return scan((params, optimizer.init(params), start), (batches, orders))[1]


@pytest.mark.parametrize("name", ["f3_traj_K3", "f3_traj_K5"])
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_training(name, run):
    arrays = oracle(name)
    if run.name not in arrays["methods"]:
        pytest.skip(f"{run.name} is not in {name}")
    losses, gradients = trained(run, arrays)
    recorded = arrays[f"{run.name}/losses"]
    if run.batches is not None:
        recorded = recorded.reshape(len(losses), 3, -1)[:, run.batches[0]]
    compared = slice(run.steps)
    assert relative_deviation(losses[compared], recorded[compared]) < run.tolerance
    recorded = arrays[f"{run.name}/trunk_grad"]
    steps = arrays.get(f"{run.name}/trunk_grad_steps", np.arange(len(recorded))).astype(int)
    compared = steps < (run.steps or len(losses))
    actual, expected = gradients[steps[compared]], recorded[compared]
    assert relative_deviation(actual, expected) < run.of_gradients
