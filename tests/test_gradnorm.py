"""GradNorm: Algorithm 1 of the paper, equal norms, late tasks, and norms that are not usable."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import mostly_slow

import bilb

assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5)


def run(balancer, rows, masks=None, norms=None):
    """Returns the weights (T, K) and the last state, for losses and norms (T, K)."""
    rows = jnp.asarray(rows, jnp.result_type(float))
    masks = jnp.ones(rows.shape, bool) if masks is None else jnp.asarray(masks)
    norms = jnp.broadcast_to(jnp.asarray(norms, rows.dtype), rows.shape)

    def step(state, inputs):
        losses, mask, norms = inputs
        _, state = balancer.update(losses, state, mask=mask, gradient_norms=norms)
        return state, optax.tree.get(state, "weights")

    scan = jax.jit(lambda state: jax.lax.scan(step, state, (rows, masks, norms)))
    state, weights = scan(balancer.init(rows[0]))
    return weights, state


def gradnorm_by_hand(rows, norms, alpha, rate):
    """Algorithm 1 of the paper with gradient descent on the weights: weights (T, K)."""
    weights = np.ones(rows.shape[1])
    history = [weights]
    for row, norm in zip(rows[1:], norms[1:]):
        history.append(weights)
        g = weights * norm
        rates = row / rows[0] / (row / rows[0]).mean()
        weights = weights - rate * np.sign(g - g.mean() * rates**alpha) * norm
        weights = weights * len(weights) / weights.sum()
    return np.stack(history)


def test_is_algorithm_1_of_the_paper():
    rng = np.random.default_rng(7)
    rows, norms = rng.uniform(0.5, 2.0, (10, 3)), rng.uniform(0.5, 2.0, (10, 3))
    balancer = bilb.gradnorm(0.8, scheme="sum", optimizer=optax.sgd(0.05))
    weights, _ = run(balancer, rows, norms=norms)
    assert_close(weights, gradnorm_by_hand(rows, norms, 0.8, 0.05), rtol=1e-4)


def test_present_tasks_are_weighed_as_if_the_others_did_not_exist():
    rng = np.random.default_rng(8)
    rows, norms = rng.uniform(0.5, 2.0, (10, 4)), rng.uniform(0.5, 2.0, (10, 4))
    balancer, present = bilb.gradnorm(0.8, optimizer=optax.sgd(0.05)), np.array([0, 2, 3])
    masks = np.broadcast_to(np.arange(4) != 1, rows.shape)
    weights, _ = run(balancer, rows, masks, norms)
    alone, _ = run(balancer, rows[:, present], norms=norms[:, present])
    assert_close(weights[:, present], alone, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["softmax", "sum"])
def test_equalises_the_norms_of_weighted_gradients(scheme):
    norms = jnp.array([1.0, 4.0, 0.5])
    optimizer = optax.adam(optax.exponential_decay(0.05, 200, 0.5))
    balancer = bilb.gradnorm(0.0, scheme=scheme, optimizer=optimizer)
    weights, _ = run(balancer, jnp.ones((2000, 3)), norms=norms)
    assert_close(weights[-1] * norms, (weights[-1] * norms)[0], rtol=0.02)
    assert_close(weights.sum(1), 3.0)


def test_decay_is_a_running_mean_of_the_squared_norms():
    """Each task's own mean, over the steps at which it was present."""
    rng = np.random.default_rng(9)
    rows, norms = rng.uniform(0.5, 2.0, (8, 3)), rng.uniform(0.0, 2.0, (8, 3))
    masks = rng.uniform(size=(8, 3)) < 0.8
    means = np.zeros_like(norms)
    for step, task in np.ndindex(*norms.shape):
        squares = norms[: step + 1, task][masks[: step + 1, task]] ** 2
        weights = 0.7 ** np.arange(len(squares))[::-1]
        means[step, task] = np.sqrt(squares @ weights / weights.sum()) if len(squares) else 0.0
    actual, _ = run(bilb.gradnorm(0.8, decay=0.7), rows, masks, norms)
    expected, _ = run(bilb.gradnorm(0.8), rows, masks, means)
    assert_close(actual, expected, rtol=1e-4)


@pytest.mark.slow
def test_waits_for_its_initial_losses():
    rows = np.random.default_rng(8).uniform(0.5, 2.0, (6, 2))
    masks = np.ones((6, 2), bool)
    masks[:4, 1] = False
    norms = jnp.array([1.0, jnp.nan])
    balancer = bilb.gradnorm(warmup_steps=3)
    weights, state = run(balancer, rows[:4], masks[:4], norms)
    assert_close(state.initial_losses, [rows[:3, 0].mean(), 0.0])
    np.testing.assert_array_equal(state.count, [3, 0])
    np.testing.assert_array_equal(weights, 1.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    _, state = balancer.update(jnp.asarray(rows[4]), state, gradient_norms=jnp.array([1.0, 2.0]))
    assert_close(state.initial_losses[1], rows[4, 1])


def test_gets_its_norms_from_value_and_grad():
    params = {"trunk": jnp.array([0.3, -0.2]), "head": jnp.array([1.0, 5.0])}
    task_losses = lambda p: jnp.stack([1.0, 10.0]) * p["head"] * jnp.sum((p["trunk"] - 1) ** 2)
    shared = {"trunk": True, "head": False}
    balancer = bilb.gradnorm(optimizer=optax.sgd(1e-3))
    value_and_grad = bilb.value_and_grad(task_losses, balancer, shared=shared)
    state = value_and_grad.init(params)
    for _ in range(2):
        losses, _, state = value_and_grad(params, state)
    jacobian = jax.jacrev(task_losses)(params)["trunk"]
    norms = jnp.linalg.norm(jacobian, axis=1)
    expected = balancer.init(losses)
    for _ in range(2):
        _, expected = balancer.update(losses, expected, gradient_norms=norms)
    assert_close(state.balancer.scales, expected.scales)
    assert not np.allclose(expected.scales, 1.0)


@pytest.mark.parametrize("guarded", mostly_slow([False, True], fast=[False]))
@pytest.mark.parametrize("bad", mostly_slow([jnp.nan, jnp.inf], fast=[jnp.inf]))
def test_a_task_whose_norm_is_not_finite_is_absent(bad, guarded):
    """The others are weighed as if it did not exist; its own entries wait for its next norm."""
    rows, norms = np.random.default_rng(9).uniform(0.5, 2.0, (2, 8, 3))
    norms[3:6, 1] = bad
    guard = bilb.skip_nonfinite if guarded else lambda balancer: balancer
    weights, state = run(guard(bilb.gradnorm()), rows, norms=norms)
    masks = np.isfinite(norms)
    masked, expected = run(bilb.gradnorm(), rows, masks, np.nan_to_num(norms, posinf=0.0))
    np.testing.assert_array_equal(weights, masked)
    for field in ("scales", "initial_losses", "opt_state"):
        leaves = jax.tree.leaves(optax.tree.get(state, field))
        for actual, desired in zip(leaves, jax.tree.leaves(getattr(expected, field))):
            np.testing.assert_array_equal(actual, desired)
    assert_close(weights[3:6, ::2].sum(1), 2.0)
    np.testing.assert_array_equal(weights[3:6, 1], weights[2, 1])
    assert weights[7, 1] != weights[2, 1]


@pytest.mark.parametrize(
    ("scheme", "size"),
    [
        pytest.param("softmax", 1e20, marks=pytest.mark.slow),
        ("softmax", 3e38),
        ("sum", 3e38),
    ],
)
def test_one_enormous_norm_does_not_freeze_the_weights(scheme, size):
    """Adam forgets its square after ln(1e33) / 1e-3 steps."""
    norms = jnp.full((100_000, 2), jnp.array([1.0, 4.0])).at[1, 0].set(size)
    weights, state = run(bilb.gradnorm(scheme=scheme), jnp.ones((100_000, 2)), norms=norms)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert weights[2, 0] < 1.0
    assert_close(weights[-1], [1.6, 0.4], atol=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bilb.gradnorm(-1.0), "alpha must be >= 0; got -1"),
        (lambda: bilb.gradnorm(warmup_steps=0), "warmup_steps"),
        (lambda: bilb.gradnorm(scheme="max"), "scheme"),
    ],
)
def test_wrong_hyperparameters_are_value_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_says_which_argument_is_missing():
    balancer, losses = bilb.gradnorm(), jnp.ones(3)
    with pytest.raises(bilb.MissingArgument, match="gradient_norms") as error:
        balancer.update(losses, balancer.init(losses))
    assert error.value.argument == "gradient_norms"
    with pytest.raises(ValueError, match=r"gradient_norms must have shape \(3,\); got \(2,\)"):
        balancer.update(losses, balancer.init(losses), gradient_norms=jnp.ones(2))
