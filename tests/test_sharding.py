"""One step on eight devices is the step on one: shard_map with pmean_losses, and sharded jit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bilb

K = 5
DEVICES = 8
STEPS = 3
INPUTS = jnp.cos(jnp.arange(16.0 * 4)).reshape(16, 4)
PARAMS = {
    "trunk": jnp.sin(jnp.arange(4.0 * 6)).reshape(4, 6),
    "heads": jnp.cos(jnp.arange(6.0 * K)).reshape(6, K),
}

pytestmark = pytest.mark.skipif(len(jax.devices()) < DEVICES, reason="needs eight devices")


def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def task_losses(params, inputs):
    outputs = jnp.tanh(inputs @ params["trunk"]) @ params["heads"]
    return jnp.mean((outputs - jnp.arange(1.0, K + 1)) ** 2, 0)


def core():
    return [bilb.log_scale_by_initial_loss(), bilb.bilb4mtl(0.1, optimizer=optax.sgd(0.5))]


def train_step(value_and_grad, params, state, inputs):
    losses, gradient, state = value_and_grad(params, state, inputs)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), state, losses, gradient


@functools.cache
def unsharded():
    """Returns parameters, state, losses and gradient after some steps on one device."""
    value_and_grad = bilb.value_and_grad(task_losses, optax.chain(*core()))
    step = jax.jit(functools.partial(train_step, value_and_grad))
    params, state = PARAMS, value_and_grad.init(PARAMS, INPUTS)
    for _ in range(STEPS):
        params, state, losses, gradient = step(params, state, INPUTS)
    return params, state, losses, gradient


def assert_same_step(actual):
    params, state, losses, gradient = actual
    expected_params, expected_state, expected_losses, expected_gradient = unsharded()
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-5)
    close(params, expected_params)
    close(losses, expected_losses)
    close(gradient, expected_gradient)
    assert jnp.ptp(optax.tree.get(expected_state, "weights")) > 1e-3
    for field in ("weights", "router", "initial_losses", "effective_weights"):
        close(optax.tree.get(state, field), optax.tree.get(expected_state, field))


@functools.cache
def sharded(check_vma):
    """Does the same with ``shard_map``; every result has a leading axis, one entry a device."""
    balancer = optax.chain(bilb.pmean_losses("data"), *core())
    value_and_grad = bilb.value_and_grad(task_losses, balancer)
    state = value_and_grad.init(PARAMS, INPUTS)

    def step(params, state, inputs):
        losses, gradient, state = value_and_grad(params, state, inputs)
        if not check_vma:
            # With the check JAX sums over the devices on the way back to replicated parameters.
            gradient = jax.lax.pmean(gradient, "data")
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        return params, state, jax.lax.pmean(losses, "data"), gradient

    def steps(params, state, inputs):
        for _ in range(STEPS):
            params, state, losses, gradient = step(params, state, inputs)
        results = params, state, losses, gradient
        if check_vma:
            results = jax.tree.map(lambda r: jax.lax.pcast(r, "data", to="varying"), results)
        return jax.tree.map(lambda r: r[None], results)

    whole, split = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(
        steps, mesh=mesh(), in_specs=(whole, whole, split), out_specs=split, check_vma=check_vma
    )
    return jax.jit(mapped)(PARAMS, state, INPUTS)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_pmean_losses_is_the_step_of_one_device(check_vma):
    results = sharded(check_vma)
    for device in range(DEVICES):
        one = jax.tree.map(lambda leaf, device=device: leaf[device], results)
        chex.assert_trees_all_equal(one, jax.tree.map(lambda leaf: leaf[0], results))
    assert_same_step(one)


def test_without_pmean_losses_every_device_has_its_own_weights():
    def router_of(inputs, front):
        balancer = optax.chain(*front, bilb.bilb4mtl(optimizer=optax.sgd(0.5)))
        losses = task_losses(PARAMS, inputs)
        _, state = balancer.update(losses, balancer.init(losses))
        return jax.lax.all_gather(optax.tree.get(state, "router"), "data")

    def spread(*front):
        router = jax.shard_map(
            functools.partial(router_of, front=front),
            mesh=mesh(),
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        return np.ptp(jax.jit(router)(INPUTS), axis=0)

    assert (spread() > 1e-3).all()
    assert not spread(bilb.pmean_losses("data")).any()


@pytest.mark.slow
def test_sharded_jit_is_the_step_of_one_device():
    value_and_grad = bilb.value_and_grad(task_losses, optax.chain(*core()))
    whole = NamedSharding(mesh(), PartitionSpec())
    split = NamedSharding(mesh(), PartitionSpec("data"))
    step = jax.jit(functools.partial(train_step, value_and_grad), out_shardings=whole)
    params = jax.device_put(PARAMS, whole)
    state = jax.device_put(value_and_grad.init(PARAMS, INPUTS), whole)
    inputs = jax.device_put(INPUTS, split)
    for _ in range(STEPS):
        params, state, losses, gradient = step(params, state, inputs)
    assert step._cache_size() == 1
    assert_same_step((params, state, losses, gradient))


def test_slopes_with_axis_name_are_those_of_the_averaged_gradient():
    """Without ``check_vma`` each device has a gradient of its own, though the losses are means."""
    balancer = bilb.marigold(optimizer=optax.sgd(1.0))
    mean_losses = lambda params, inputs: jax.lax.pmean(task_losses(params, inputs), "data")

    def steps(value_and_grad, params, inputs):
        state = value_and_grad.init(params, inputs)
        for _ in range(STEPS):
            params, state, losses, gradient = train_step(value_and_grad, params, state, inputs)
        return params, state, losses, gradient

    def sharded(axis_name):
        value_and_grad = bilb.value_and_grad(mean_losses, balancer, axis_name=axis_name)

        def of_device(params, inputs):
            return jax.tree.map(lambda r: r[None], steps(value_and_grad, params, inputs))

        whole, split = PartitionSpec(), PartitionSpec("data")
        mapped = jax.shard_map(
            of_device, mesh=mesh(), in_specs=(whole, split), out_specs=split, check_vma=False
        )
        return jax.jit(mapped)(PARAMS, INPUTS)

    results = sharded("data")
    expected = jax.jit(functools.partial(steps, bilb.value_and_grad(task_losses, balancer)))(
        PARAMS, INPUTS
    )
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-5)
    for device in range(DEVICES):
        close(jax.tree.map(lambda leaf, device=device: leaf[device], results), expected)
    assert jnp.ptp(expected[1].balancer.weights) > 1e-2
    local = sharded(None)[1].slopes
    assert jnp.abs(local - expected[1].slopes).max() > 1e-2 * jnp.abs(expected[1].slopes).max()


def test_pmean_losses_keeps_the_contract_of_a_link():
    link = bilb.pmean_losses("data")
    losses = jnp.array([[1.0, 4.0, jnp.nan], [3.0, 0.0, 7.0]], jnp.float16)
    mask = jnp.array([True, True, False])
    update = lambda losses: link.update(losses, link.init(losses), mask=mask)[0]
    balanced = jax.vmap(update, axis_name="data")(losses)
    assert balanced.dtype == jnp.float16
    np.testing.assert_array_equal(balanced, [[2.0, 2.0, 0.0], [2.0, 2.0, 0.0]])
