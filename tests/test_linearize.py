"""linearize: both directions of the Jacobian of models as people write them."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilb

K = 3
INPUTS = jnp.cos(jnp.arange(24.0)).reshape(6, 4)


def errors(outputs):
    return jnp.mean((outputs - jnp.arange(1, K + 1, dtype=outputs.dtype)) ** 2, 0)


@jax.custom_vjp
def scaled_tanh(x):
    return jnp.tanh(x)


scaled_tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (2 * g * (1 - jnp.tanh(x) ** 2),))


def dense_params(width=5):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"in": (4, width), "layers": (3, width, width), "out": (width, K)}
    return {n: 0.5 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}


def mlp(params, inputs, activation=jnp.tanh):
    hidden = activation(inputs @ params["in"])
    for layer in params["layers"]:
        hidden = activation(hidden @ layer)
    return errors(hidden @ params["out"])


def scanned(params, inputs, wrap=lambda block: block):
    block = wrap(lambda hidden, layer: (jnp.tanh(hidden @ layer), None))
    hidden, _ = jax.lax.scan(block, jnp.tanh(inputs @ params["in"]), params["layers"])
    return errors(hidden @ params["out"])


class Normed(nn.Module):
    @nn.compact
    def __call__(self, inputs, train):
        hidden = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(inputs))
        return nn.Dense(K)(nn.Dropout(0.4, deterministic=not train)(nn.tanh(hidden)))


def normed_variables():
    return Normed().init(jax.random.key(1), INPUTS, train=False)


def normed_losses(params, batch_stats, inputs, key):
    outputs, updates = Normed().apply(
        {"params": params, "batch_stats": batch_stats},
        inputs,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": key},
    )
    return errors(outputs), updates["batch_stats"]


def check(task_losses, params, *args, has_aux=False, rtol=1e-10, atol=1e-12):
    """Compares both maps with the Jacobian row by row, in one program."""
    direction = jax.tree.map(lambda leaf: jnp.sin(jnp.arange(1.0 * leaf.size)), params)
    direction = jax.tree.map(lambda d, leaf: d.reshape(leaf.shape), direction, params)
    weights = jnp.array([0.2, -1.0, 3.0])

    @jax.jit
    def both(params):
        value, pullback, pushforward = bilb.linearize(task_losses, params, *args, has_aux=has_aux)
        jacobian = jax.jacrev(task_losses, has_aux=has_aux)(params, *args)
        jacobian = jacobian[0] if has_aux else jacobian
        along = lambda j, d: jnp.tensordot(j, d, d.ndim)
        expected = (
            task_losses(params, *args),
            jax.tree.map(lambda j: jnp.tensordot(weights, j, 1), jacobian),
            jax.tree.reduce(jnp.add, jax.tree.map(along, jacobian, direction)),
        )
        return (value, pullback(weights), pushforward(direction)), expected

    actual, expected = both(params)
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.x64
@pytest.mark.parametrize(
    "task_losses",
    [
        pytest.param(mlp, marks=pytest.mark.slow),
        lambda params, inputs: mlp(params, inputs, scaled_tanh),
        scanned,
        pytest.param(
            lambda params, inputs: scanned(params, inputs, jax.checkpoint), marks=pytest.mark.slow
        ),
    ],
    ids=["mlp", "custom_vjp", "scan", "scan of checkpoints"],
)
def test_both_maps_equal_the_jacobian(task_losses):
    check(task_losses, dense_params(), INPUTS)


@pytest.mark.x64
def test_batch_statistics_and_dropout_come_back_as_aux():
    variables = normed_variables()
    batch_stats, key = variables["batch_stats"], jax.random.key(3)
    args = (variables["params"], batch_stats, INPUTS, key)
    # flax normalises in float32 whatever comes in.
    check(normed_losses, *args, has_aux=True, rtol=1e-4, atol=1e-5)
    value_of = lambda *args: bilb.linearize(normed_losses, *args, has_aux=True)[0]
    _, new_stats = jax.jit(value_of)(*args)
    chex.assert_trees_all_equal_shapes(new_stats, batch_stats)
    moved = jax.tree.map(lambda new, old: bool((new != old).all()), new_stats, batch_stats)
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_half_precision_parameters_keep_their_dtype():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), dense_params())
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    @jax.jit
    def function(params, weights):
        losses, pullback, pushforward = bilb.linearize(mlp, params, INPUTS.astype(jnp.bfloat16))
        gradient = pullback(weights)
        in_float32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)
        _, exact = jax.jvp(lambda params: mlp(params, INPUTS), (single,), (in_float32,))
        return losses, gradient, pushforward(gradient), pushforward(in_float32), exact

    # Weights and directions come in float32, from balancers and optimisers.
    losses, gradient, slopes, slopes_too, exact = function(params, jnp.array([0.2, 1.0, 3.0]))
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)
    assert (losses.dtype, slopes.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(slopes, slopes_too)
    np.testing.assert_allclose(slopes, exact, rtol=0.1)


def test_losses_that_are_no_vector():
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        bilb.linearize(lambda x: (x**2).sum(), jnp.ones(3))
    with pytest.raises(ValueError, match=r"got shape \(3, 1\)"):
        bilb.linearize(lambda x: x[:, None], jnp.ones(3))
    with pytest.raises(TypeError, match="int32"):
        bilb.linearize(lambda x: x.astype(jnp.int32), jnp.ones(3))
