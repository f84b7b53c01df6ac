"""What the methods of the first two rungs cost beyond the plain sum of losses."""

import functools

import cost
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from methods import METHODS

import bilb


class MLP(nn.Module):
    num_tasks: int

    @nn.compact
    def __call__(self, x):
        for _ in range(4):
            x = nn.relu(nn.Dense(256)(x))
        return nn.Dense(self.num_tasks)(x)


class ConvNet(nn.Module):
    num_tasks: int

    @nn.compact
    def __call__(self, x):
        for channels in (16, 32, 32):
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
        return nn.Dense(self.num_tasks)(x.mean((1, 2)))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(x.shape[-1])(x)), None


class ScannedMLP(nn.Module):
    num_tasks: int

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=8)
        x, _ = layers()(nn.Dense(256)(x), None)
        return nn.Dense(self.num_tasks)(x)


NETWORKS = {
    "mlp": (MLP, (256, 128)),
    "conv": (ConvNet, (32, 16, 16, 3)),
    "scan": (ScannedMLP, (256, 128)),
}
WITH_SLOPES = {
    "finite_difference": (bilb.marigold, {"slopes": bilb.slopes.finite_difference()}, 1.40),
    "exact": (bilb.marigold, {}, 1.70),
    "famo": (bilb.famo, {}, 1.40),
}


def flops(network, shape, balancer, **options):
    """Flops of a training step; a network with a loop is counted by its products."""
    task_losses = lambda params, x, y: jnp.mean((network.apply(params, x) - y) ** 2, axis=0)
    value_and_grad = bilb.value_and_grad(task_losses, balancer, **options)
    optimizer = optax.adamw(1e-3)

    def step(params, opt_state, state, x, y):
        _, grads, state = value_and_grad(params, state, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, value_and_grad.after(params, state, x, y)

    def start():
        x, y = jnp.zeros(shape), jnp.zeros((shape[0], network.num_tasks))
        params = network.init(jax.random.key(0), x)
        return params, optimizer.init(params), value_and_grad.init(params, x, y), x, y

    traced = jax.jit(step).trace(*jax.eval_shape(start))
    if isinstance(network, ScannedMLP):
        return cost.product_flops(traced.jaxpr.jaxpr)
    return traced.lower().compile().cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_slopes_cost_a_forward_pass_whatever_the_number_of_tasks(network):
    make, shape = NETWORKS[network]
    ratios = {name: [] for name in WITH_SLOPES}
    for num_tasks in (2, 40):
        plain = flops(make(num_tasks), shape, bilb.linear_scalarization())
        for name, (method, options, most) in WITH_SLOPES.items():
            ratio = flops(make(num_tasks), shape, method(), **options) / plain
            assert 1.2 < ratio <= most, (name, num_tasks)
            ratios[name].append(ratio)
    for name, (few, many) in ratios.items():
        assert many == pytest.approx(few, rel=0.02), name


LOSSES_ONLY = [m for m in METHODS if not m.extra(jnp.ones(2)) and m.name != "igb_v2"]


@pytest.mark.slow
@pytest.mark.parametrize("method", LOSSES_ONLY, ids=str)
def test_methods_that_read_losses_cost_what_the_plain_sum_costs(method):
    trunk, num_tasks = cost.Trunk(widths=(512, 512, 512), batch=256, inputs=512), 40
    plain = cost.plain_cost(trunk, num_tasks)
    make_step = functools.partial(cost.balanced_step, balancer=method.make(num_tasks))
    measured = cost.training_cost(trunk, num_tasks, make_step)
    assert measured.flops == pytest.approx(plain.flops, rel=1e-3)
    assert measured.matrix_products == plain.matrix_products


def test_counting_a_loop_in_full():
    """The count of a scanned network is that of its layers written out."""
    weights = jnp.zeros((5, 7, 7))
    scanned = lambda x: jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]
    traced = jax.jit(scanned).trace(jnp.zeros((3, 7)))
    assert cost.product_flops(traced.jaxpr.jaxpr) == 5 * 2 * 3 * 7 * 7
