"""The routes from a loss vector to a training step agree with each other and with jax.grad."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from method_parts import bilevel_objective
from test_linearize import INPUTS, dense_params, mlp, normed_losses, normed_variables, scaled_tanh

import bilb

K = 3
assert_close = lambda *trees, rtol=1e-9: chex.assert_trees_all_close(*trees, rtol=rtol, atol=1e-12)


def balancer_of(penalty=0.2):
    return optax.chain(bilb.log_losses(), bilb.bilb4mtl(penalty, optimizer=optax.adam(0.05)))


def objective_of(losses, weights, present=slice(None)):
    return bilevel_objective(penalty=0.2)(jnp.log(losses)[present], weights[present])


@pytest.mark.x64
@pytest.mark.parametrize(
    ("activation", "present"),
    [
        (jnp.tanh, None),
        pytest.param(scaled_tanh, None, marks=pytest.mark.slow),
        (jnp.tanh, [0, 2]),
    ],
    ids=["mlp", "custom_vjp", "masked"],
)
def test_value_and_grad_is_the_gradient_of_the_objective(activation, present):
    params = dense_params()
    task_losses = lambda params, inputs: mlp(params, inputs, activation)
    extra = {} if present is None else {"mask": jnp.zeros(K, bool).at[jnp.array(present)].set(True)}
    value_and_grad = bilb.value_and_grad(task_losses, balancer_of())
    state = value_and_grad.init(params, INPUTS)
    step = jax.jit(value_and_grad)
    _, _, state = step(params, state, INPUTS, **extra)
    losses, gradient, state = step(params, state, INPUTS, **extra)
    assert step._cache_size() == 1
    weights = optax.tree.get(state, "weights")
    assert len(set(weights.tolist())) > 1
    chosen = slice(None) if present is None else jnp.array(present)
    objective = lambda params: objective_of(task_losses(params, INPUTS), weights, chosen)
    assert_close(gradient, jax.jit(jax.grad(objective))(params))
    assert_close(losses, task_losses(params, INPUTS))


@pytest.mark.slow
@pytest.mark.x64
def test_value_and_grad_passes_batch_statistics_and_dropout_on():
    variables = normed_variables()
    params, args = variables["params"], (variables["batch_stats"], INPUTS, jax.random.key(3))
    value_and_grad = bilb.value_and_grad(normed_losses, balancer_of(), has_aux=True)
    state = value_and_grad.init(params, *args)
    (losses, aux), gradient, state = jax.jit(value_and_grad)(params, state, *args)
    expected_losses, expected_aux = normed_losses(params, *args)
    assert_close((losses, aux), (expected_losses, expected_aux), rtol=1e-5)
    weights = optax.tree.get(state, "weights")
    objective = lambda params: objective_of(normed_losses(params, *args)[0], weights)
    # flax normalises in float32 whatever comes in.
    expected = jax.jit(jax.grad(objective))(params)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_value_and_grad_can_be_jitted_with_a_tree_of_shared_parameters():
    params = dense_params()
    shared = {"in": True, "layers": True, "out": False}
    value_and_grad = bilb.value_and_grad(mlp, bilb.marigold(), shared=shared)
    state = value_and_grad.init(params, INPUTS)
    _, gradient, state = jax.jit(value_and_grad)(params, state, INPUTS)
    direction = {**gradient, "out": jnp.zeros_like(gradient["out"])}
    _, slopes = jax.jvp(lambda params: mlp(params, INPUTS), (params,), (direction,))
    np.testing.assert_allclose(state.slopes, slopes, rtol=1e-4)


def test_value_and_grad_starts_outside_the_mapped_axis_of_pmean_losses():
    balancer = optax.chain(bilb.pmean_losses("data"), bilb.bilb4mtl())
    state = bilb.value_and_grad(mlp, balancer).init(dense_params(), INPUTS)
    chex.assert_trees_all_equal_structs(state.balancer, balancer.init(jnp.ones(K)))
    assert state.slopes is None


@pytest.mark.slow
def test_value_and_grad_scans_and_maps():
    params = dense_params()
    value_and_grad = bilb.value_and_grad(mlp, balancer_of())
    batches = jnp.stack([INPUTS * scale for scale in (1.0, 0.5, 2.0)])

    def step(carry, inputs):
        params, state = carry
        losses, gradient, state = value_and_grad(params, state, inputs)
        return (jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient), state), losses

    def train(scale):
        start = jax.tree.map(lambda leaf: scale * leaf, params)
        return jax.lax.scan(step, (start, value_and_grad.init(start, INPUTS)), batches)

    mapped = jax.jit(jax.vmap(train))(jnp.array([1.0, 0.5]))
    single = jax.jit(train)(0.5)
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf[1], mapped), single, rtol=1e-3, atol=1e-5
    )


def task_gradients(params, inputs=INPUTS):
    return jax.jit(jax.jacrev(mlp))(params, inputs)


@pytest.mark.x64
def test_aggregate_by_equals_one_backward_pass_over_a_hundred_steps():
    params = dense_params()
    value_and_grad = bilb.value_and_grad(mlp, balancer_of())
    adam = optax.adam(1e-2)
    stacked = optax.chain(bilb.aggregate_by(balancer_of(), K), optax.adam(1e-2))
    batches = INPUTS * (1 + 0.1 * jnp.sin(jnp.arange(100.0)))[:, None, None]

    def one_backward(carry, inputs):
        params, opt_state, state = carry
        losses, gradient, state = value_and_grad(params, state, inputs)
        updates, opt_state = adam.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), losses

    def many_backward(carry, inputs):
        params, opt_state = carry
        losses, gradients = mlp(params, inputs), task_gradients(params, inputs)
        updates, opt_state = stacked.update(gradients, opt_state, params, losses=losses)
        return (optax.apply_updates(params, updates), opt_state), losses

    @jax.jit
    def train(params):
        first = (params, adam.init(params), value_and_grad.init(params, INPUTS))
        (one, _, state), losses = jax.lax.scan(one_backward, first, batches)
        (many, opt_state), _ = jax.lax.scan(many_backward, (params, stacked.init(params)), batches)
        weights = [optax.tree.get(tree, "weights") for tree in (state, opt_state)]
        return one, many, losses, weights

    one, many, losses, weights = train(params)
    chex.assert_trees_all_close(one, many, rtol=1e-6)
    chex.assert_trees_all_close(*weights, rtol=1e-6)
    assert (losses[-1] < losses[0]).any()


def test_aggregate_by_says_what_is_wrong():
    params, losses = dense_params(), jnp.ones(K)
    optimizer = optax.chain(bilb.aggregate_by(bilb.bilb4mtl(), K), optax.sgd(0.1))
    state = optimizer.init(params)
    gradients = jax.eval_shape(task_gradients, params)
    update = lambda gradients, **extra: jax.eval_shape(
        lambda gradients, losses: optimizer.update(gradients, state, params, losses=losses),
        gradients,
        **extra,
    )
    with pytest.raises(bilb.MissingArgument, match="`losses`"):
        optimizer.update(jax.tree.map(jnp.zeros_like, gradients), state, params)
    with pytest.raises(ValueError, match=r"must be the number of tasks, 3.*\(4, 5\)"):
        update(params, losses=losses)
    with pytest.raises(ValueError, match="number of tasks, 3"):
        jax.eval_shape(lambda gradients: optimizer.update(gradients, state, losses=losses), params)
    with pytest.raises(ValueError, match=r"K = 4"):
        update(gradients, losses=jnp.ones(K + 1))
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        update(gradients, losses=jnp.float32(1.0))


def test_aggregate_by_leaves_out_an_absent_tasks_nan_gradient():
    params = dense_params()
    optimizer = bilb.aggregate_by(bilb.bilb4mtl(), K)
    gradients = jax.tree.map(lambda g: g.at[1].set(jnp.nan), task_gradients(params))
    losses = mlp(params, INPUTS).at[1].set(jnp.nan)
    mask = jnp.array([True, False, True])
    update = jax.jit(optimizer.update)
    updates, _ = update(gradients, optimizer.init(params), params, losses=losses, mask=mask)
    chex.assert_tree_all_finite(updates)


class Heads(nn.Module):
    @nn.compact
    def __call__(self, inputs):
        return nn.Dense(K)(nn.tanh(nn.Dense(5)(inputs)))


def module_losses(outputs):
    return jnp.mean((outputs - jnp.arange(1.0, K + 1)) ** 2, 0)


def test_linen_train_state_by_two_lines():
    module = Heads()
    variables = module.init(jax.random.key(0), INPUTS)
    task_losses = lambda params, inputs: module_losses(module.apply({"params": params}, inputs))
    optimizer = optax.chain(bilb.aggregate_by(bilb.bilb4mtl(), K), optax.adam(1e-2))
    state = train_state.TrainState.create(
        apply_fn=module.apply, params=variables["params"], tx=optimizer
    )

    @jax.jit
    def step(state):
        losses = task_losses(state.params, INPUTS)
        gradients = jax.jacrev(task_losses)(state.params, INPUTS)
        updates, opt_state = state.tx.update(
            gradients, state.opt_state, state.params, losses=losses
        )
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), losses

    first, losses = step(state)
    for _ in range(20):
        first, last = step(first)
    assert last.sum() < losses.sum()
    assert first.step == 21
    assert not np.allclose(optax.tree.get(first.opt_state, "weights"), 0.7310586)


def test_nnx_optimizer_forwards_the_losses():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, K, rngs=rngs)

        def __call__(self, inputs):
            return self.last(nnx.tanh(self.first(inputs)))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, optax.chain(bilb.aggregate_by(bilb.bilb4mtl(), K), optax.adam(1e-2)), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer):
        graph, params = nnx.split(model)
        task_losses = lambda params: module_losses(nnx.merge(graph, params)(INPUTS))
        losses, gradients = task_losses(params), jax.jacrev(task_losses)(params)
        optimizer.update(model, gradients, losses=losses)
        return losses

    losses = [step(model, optimizer) for _ in range(20)]
    assert losses[-1].sum() < losses[0].sum()
