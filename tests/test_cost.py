"""What balancing costs on top of training on the plain sum of the losses, read off programs."""

import functools

import cost
import jax
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bilb

SMALL = cost.Trunk(widths=(64, 64), batch=32, inputs=64)
LARGE = cost.Trunk(widths=(512, 512, 512), batch=256, inputs=512)
CASES = [
    pytest.param(
        trunk,
        num_tasks,
        id=f"{name}-{num_tasks}",
        marks=() if name == "small" and num_tasks in (8, 40) else pytest.mark.slow,
    )
    for name, trunk in (("small", SMALL), ("large", LARGE))
    for num_tasks in (2, 8, 40, 200)
]
balanced = functools.partial(cost.balanced_step, balancer=bilb.bilb4mtl())


@pytest.mark.parametrize(("trunk", "num_tasks"), CASES)
def test_bilb4mtl_costs_what_the_plain_sum_costs(trunk, num_tasks):
    plain = cost.plain_cost(trunk, num_tasks)
    measured = cost.training_cost(trunk, num_tasks, balanced)
    assert abs(measured.flops - plain.flops) <= 1e-3 * plain.flops + 200 * num_tasks
    allowed = 1.01 * plain.temporary_bytes + 64 * num_tasks
    assert measured.temporary_bytes <= allowed
    assert measured.matrix_products == plain.matrix_products


@pytest.mark.parametrize(
    ("optimizer", "per_parameter"),
    [(optax.sgd(1e-3), 16), (optax.adam(1e-3), 24)],
    ids=["sgd", "adam"],
)
def test_a_feature_router_costs_its_layer_and_the_pooling(optimizer, per_parameter):
    num_features, num_tasks = SMALL.widths[-1], 40
    router = bilb.routers.linear_softmax(num_features, clip=None)
    measured = cost.training_cost(
        SMALL,
        num_tasks,
        functools.partial(
            cost.balanced_step,
            balancer=bilb.bilb4mtl(router=router, optimizer=optimizer),
            features=lambda features: features,
        ),
    )
    plain = cost.plain_cost(SMALL, num_tasks)
    extra = per_parameter * num_features * num_tasks
    pooling = 4 * SMALL.batch * num_features
    assert measured.flops - plain.flops <= extra + pooling + 200 * num_tasks
    # The router's layer forward, and back to the features.
    assert measured.matrix_products <= plain.matrix_products + 2


def data_parallel_cost(trunk, num_tasks, make_step, optimizer=optax.adamw(1e-3)):
    """Returns the cost per device of a training step whose batch is split over eight devices."""
    step, init = make_step(trunk, optimizer)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(
        step,
        in_shardings=(replicated, replicated, replicated, split, split),
        out_shardings=replicated,
        donate_argnums=(0, 1, 2),
    )
    return cost.measure(step, *cost.arguments(trunk, num_tasks, optimizer, init))


def test_data_parallel_training_moves_no_more_bytes_than_the_plain_sum():
    num_tasks = 40
    plain = data_parallel_cost(SMALL, num_tasks, cost.plain_step)
    measured = data_parallel_cost(SMALL, num_tasks, balanced)
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(SMALL.params(num_tasks)))
    plain_operations, plain_bytes = cost.moved(plain.collectives)
    operations, moved_bytes = cost.moved(measured.collectives)
    assert plain_bytes == parameters + 4 * num_tasks
    assert moved_bytes == plain_bytes
    assert operations <= plain_operations + 1


def test_the_measure_sees_what_it_should():
    gradients = functools.partial(many_backward_passes, balancer=bilb.bilb4mtl())
    plain = cost.plain_cost(SMALL, 8)
    measured = cost.training_cost(SMALL, 8, gradients)
    assert measured.flops > 3 * plain.flops
    assert measured.temporary_bytes > 3 * plain.temporary_bytes


def many_backward_passes(trunk, optimizer, balancer):
    """Returns a training step that takes K backward passes."""

    def step(params, opt_state, state, inputs, targets):
        task_losses = lambda params: trunk.task_losses(params, inputs, targets)[0]
        losses, gradients = task_losses(params), jax.jacrev(task_losses)(params)
        combine = bilb.aggregate_by(balancer, losses.shape[0])
        gradient, state = combine.update(gradients, state, params, losses=losses)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state, losses

    def init(params, inputs, targets):
        return bilb.aggregate_by(balancer, targets.shape[-1]).init(params)

    return step, init
