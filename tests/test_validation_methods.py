"""Auto-Lambda, MOML and FORUM: exact hypergradients, optimal directions, small problems solved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from contract import mostly_slow

import bilb
from bilb.gradient_balancing import solvers
from bilb.training_steps.forum import barrier_weights

K, RATE = 3, 0.05
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
METHODS = [bilb.auto_lambda, bilb.moml, bilb.forum]
every_method = pytest.mark.parametrize("factory", METHODS)


def network_losses(params, batch):
    """Losses (K,) of a small network with curvature."""
    x, y = batch
    hidden = jnp.tanh(x @ params["trunk"])
    return jnp.mean((hidden @ params["heads"] - y) ** 2, axis=0)


def network(seed=0, dtype=None):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.array(rng.normal(size=shape), dtype or jnp.result_type(float))
    params = {"trunk": normal(4, 5), "heads": normal(5, K)}
    return params, (normal(8, 4), normal(8, K)), (normal(8, 4), normal(8, K))


def distances(x, targets):
    """Losses (K,) of a point, squared distances to targets (K, P)."""
    return 0.5 * jnp.sum((x - targets) ** 2, axis=1)


def inner_step(params, weights, batch):
    """One step of gradient descent on the weighted training losses, written out."""
    gradient = jax.grad(lambda p: weights @ network_losses(p, batch))(params)
    return jax.tree.map(lambda p, g: p - RATE * g, params, gradient)


def train(training, x, targets, validation_targets, steps):
    """Returns the last parameters and state."""

    def step(carry, _):
        x, state, _ = training.update(*carry, targets, validation_targets)
        return (x, state), None

    carry = x, training.init(x, targets)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))(carry)[0]


@pytest.mark.x64
def test_auto_lambda_follows_the_gradient_of_the_unrolled_objective():
    params, batch, validation = network()
    primary, initial = jnp.array([1.0, 0.0, 2.0]), jnp.array([2.5, 1.2, 1.9])
    training = bilb.auto_lambda(
        network_losses,
        optax.sgd(0.1),
        inner_learning_rate=RATE,
        primary=primary,
        initial=initial,
        weights_optimizer=optax.sgd(1.0),
    )
    unrolled = lambda weights: (
        primary @ network_losses(inner_step(params, weights, batch), validation)
    )
    state = training.init(params, batch)
    new_params, state, losses = jax.jit(training.update)(params, state, batch, validation)
    hypergradient = jax.grad(unrolled)(initial)
    assert_close(state.weights, initial - hypergradient, rtol=1e-12)
    objective = lambda p: state.weights @ network_losses(p, batch)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(objective)(params))
    jax.tree.map(functools.partial(assert_close, rtol=1e-12), new_params, expected)
    assert_close(losses, network_losses(params, batch))


def test_auto_lambda_switches_off_what_hurts_the_primary_task():
    """The auxiliary task 2 alone pulls closest to the primary task's validation optimum."""
    targets = jnp.array([[0.5, 0.0], [-3.0, 0.0], [0.8, 0.0]])
    validation = jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    training = bilb.auto_lambda(
        distances,
        optax.sgd(0.1),
        inner_learning_rate=0.1,
        primary=jnp.array([1.0, 0.0, 0.0]),
        weights_optimizer=optax.adam(1e-2),
    )
    x, state = train(training, jnp.zeros(2), targets, validation, 2000)
    np.testing.assert_array_equal(state.weights[:2], 0.0)
    assert state.weights[2] > 0.2
    assert_close(x, [0.8, 0.0], atol=0.01)


@pytest.mark.x64
def test_moml_follows_the_common_descent_direction_of_the_unrolled_objectives():
    params, batch, validation = network(2)
    training = bilb.moml(
        network_losses,
        optax.sgd(0.1),
        inner_learning_rate=RATE,
        logits_optimizer=optax.sgd(1.0),
    )
    state = training.init(params, batch)._replace(logits=jnp.array([0.3, -0.2, 0.1]))
    unrolled = lambda logits: network_losses(
        inner_step(params, jax.nn.softmax(logits), batch), validation
    )
    new_params, new_state, losses = jax.jit(training.update)(params, state, batch, validation)
    hypergradients = jax.jacrev(unrolled)(state.logits)
    multipliers = solvers.min_norm_weights(hypergradients @ hypergradients.T)
    direction = multipliers @ hypergradients
    assert_close(new_state.logits, state.logits - direction, rtol=1e-10)
    # No validation loss rises along it, to first order.
    assert (hypergradients @ direction >= direction @ direction * (1 - 1e-6)).all()
    assert_close(new_state.weights, jax.nn.softmax(new_state.logits))
    objective = lambda p: new_state.weights @ network_losses(p, batch)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(objective)(params))
    jax.tree.map(functools.partial(assert_close, rtol=1e-10), new_params, expected)
    assert_close(losses, network_losses(params, batch))


@pytest.mark.slow
def test_moml_does_not_learn_from_the_rounding_error_of_a_vanishing_direction():
    params, batch, validation = network()  # zero lies between the hypergradients
    training = bilb.moml(network_losses, optax.sgd(0.1), inner_learning_rate=RATE)
    _, state, _ = jax.jit(training.update)(params, training.init(params, batch), batch, validation)
    assert (state.multipliers > 0).all()
    np.testing.assert_array_equal(state.logits, 0.0)


TARGETS = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
VALIDATION = jnp.array([[0.4, 0.3], [0.6, -0.3]])


@pytest.mark.slow
def test_moml_finds_weights_whose_model_is_pareto_stationary_on_validation():
    """The weighted training optimum lies at w_0 - w_1, the Pareto set reaches from .4 to .6."""
    training = bilb.moml(
        distances,
        optax.sgd(0.1),
        inner_learning_rate=0.1,
        logits_optimizer=optax.adam(1e-2),
    )
    x, state = train(training, jnp.array([-0.5, 1.0]), TARGETS, VALIDATION, 3000)
    assert 0.35 < x[0] < 0.65
    assert_close(x, state.weights @ TARGETS, atol=0.01)


@pytest.mark.slow
def test_forum_solves_the_bilevel_problem():
    training = bilb.forum(
        distances,
        optax.sgd(1e-2),
        inner_learning_rate=0.1,
        rho=0.5,
        logits_optimizer=optax.adam(1e-2),
    )
    x, state = train(training, jnp.array([-0.5, 1.0]), TARGETS, VALIDATION, 5000)
    assert 0.35 < x[0] < 0.65
    assert_close(x, state.weights @ TARGETS, atol=0.1)


@pytest.mark.x64
@pytest.mark.parametrize("size", mostly_slow([1, 3, 8], fast=[3]))
def test_barrier_weights_are_optimal(size):
    rng = np.random.default_rng(size)
    solve = jax.jit(barrier_weights)
    for towards in (0.0, 2.0, -2.0):  # with 2 every gradient lowers q, so that no push is needed
        for decrease in (0.0, 0.3, 3.0):
            unit = rng.normal(size=size)
            unit /= np.linalg.norm(unit)
            gradients = rng.normal(size=(4, size)) + towards * unit
            weights = solve(gradients @ gradients.T, gradients @ unit, decrease)
            check_barrier_weights(np.asarray(weights), gradients, unit, decrease)


def check_barrier_weights(weights, gradients, unit, decrease):
    def value(x):
        return 0.5 * np.sum((x[:-1] @ gradients + x[-1] * unit) ** 2) - x[-1] * decrease

    solution = scipy.optimize.minimize(
        value,
        np.append(np.full(4, 0.25), 1.0),
        bounds=[(0, None)] * 5,
        constraints={"type": "eq", "fun": lambda x: x[:-1].sum() - 1},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    nu = max(decrease - weights @ (gradients @ unit), 0.0)
    assert_close(weights.sum(), 1.0)
    assert (weights >= 0).all()
    assert value(np.append(weights, nu)) <= solution.fun + 1e-7


@pytest.mark.slow
@pytest.mark.x64
@pytest.mark.parametrize("normalize", [True, False])
def test_forum_descends_on_the_validation_losses_within_the_barrier(normalize):
    params, batch, validation = network(1)
    training = bilb.forum(
        network_losses,
        optax.sgd(1.0),
        inner_learning_rate=RATE,
        inner_steps=2,
        rho=0.2,
        normalize=normalize,
        logits_optimizer=optax.sgd(1.0),
    )
    state = training.init(params, batch)._replace(logits=jnp.array([0.3, -0.2, 0.1]))
    new_params, new_state, losses = jax.jit(training.update)(params, state, batch, validation)
    assert_close(losses, network_losses(params, batch))
    weights = jax.nn.softmax(state.logits)
    target = inner_step(inner_step(params, weights, batch), weights, batch)

    def q(logits, params):
        weights = jax.nn.softmax(logits)
        return weights @ (network_losses(params, batch) - network_losses(target, batch))

    flat = lambda *trees: jax.flatten_util.ravel_pytree(trees)[0]
    q_gradient = flat(*jax.grad(q, argnums=(0, 1))(state.logits, params))
    jacobian = jax.vmap(flat)(jnp.zeros((K, K)), jax.jacrev(network_losses)(params, validation))
    if normalize:
        jacobian /= jnp.linalg.norm(jacobian, axis=1, keepdims=True)
    step = flat(new_state.logits, new_params) - flat(state.logits, params)
    assert q_gradient @ step <= -0.2 * q_gradient @ q_gradient * (1 - 1e-7)

    # No feasible direction close by is better.
    noise = np.random.default_rng(0).normal(size=(200, step.size))
    others = np.asarray(step) + noise * 10.0 ** -(np.arange(200) % 4)[:, None]
    excess = others @ q_gradient + 0.2 * q_gradient @ q_gradient
    others -= np.outer(np.maximum(excess, 0.0) / (q_gradient @ q_gradient), q_gradient)
    value = lambda d: jnp.max(jacobian @ d.T, axis=0) + 0.5 * jnp.sum(d * d, axis=-1)
    assert value(step) <= value(others).min() + 1e-6


@pytest.mark.x64
def test_forum_moves_by_its_averaged_multipliers():
    """They sum to one from the first step on, and ν is that of the average, not of λ*."""
    share, rho = 0.3, 0.5
    training = bilb.forum(
        distances,
        optax.sgd(1.0),
        inner_learning_rate=0.1,
        inner_steps=1,
        rho=rho,
        averaging=share,
        normalize=False,
        logits_optimizer=optax.sgd(1.0),
    )
    x, start = jnp.array([0.2, 0.1]), jnp.full(2, 0.5)
    state = training.init(x, TARGETS)
    new_x, new, _ = jax.jit(training.update)(x, state, TARGETS, VALIDATION)
    np.testing.assert_array_equal(state.multipliers, start)
    # Equal weights put θ_T at 0.9 x.
    falls = distances(x, TARGETS) - distances(0.9 * x, TARGETS)
    of_q = jnp.append(0.5 * (falls - falls.mean()), x)
    of_v = jnp.pad(x - VALIDATION, ((0, 0), (2, 0)))

    def nu(multipliers):
        return jnp.maximum(multipliers @ (rho - of_v @ of_q / (of_q @ of_q)), 0.0)

    def dual(multipliers):
        direction = multipliers @ of_v + nu(multipliers) * of_q
        return 0.5 * direction @ direction - rho * (of_q @ of_q) * nu(multipliers)

    best = (new.multipliers - (1 - share) * start) / share
    grid = jnp.linspace(0, 1, 1001)
    assert dual(best) <= jax.vmap(dual)(jnp.stack([grid, 1 - grid], axis=1)).min() + 1e-9
    assert_close([best.sum(), new.multipliers.sum()], 1.0, rtol=1e-12)
    assert jnp.abs(nu(best) - nu(new.multipliers)) > 0.1
    direction = new.multipliers @ of_v + nu(new.multipliers) * of_q
    assert_close(new.logits, state.logits - direction[:2], rtol=1e-10)
    assert_close(new_x, x - direction[2:], rtol=1e-10)


@pytest.mark.slow
@every_method
def test_steps_run_in_bfloat16_and_keep_every_dtype(factory):
    params, batch, validation = network(dtype=jnp.bfloat16)
    training = factory(network_losses, optax.adam(1e-3), inner_learning_rate=RATE)
    state = training.init(params, batch)
    update = jax.jit(training.update)
    dtypes = lambda tree: jax.tree.map(lambda leaf: leaf.dtype, tree)
    expected = dtypes((params, state))
    for _ in range(2):
        params, state, losses = update(params, state, batch, validation)
        assert dtypes((params, state)) == expected
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))
    assert update._cache_size() == 1
    assert losses.dtype == jnp.bfloat16
    assert state.weights.dtype == jnp.float32
    assert int(state.step) == 2


@pytest.mark.slow
@every_method
def test_rates_may_be_traced_mapped_and_scheduled(factory):
    params, batch, validation = network()

    def run(rate):
        training = factory(network_losses, optax.sgd(0.1), inner_learning_rate=rate)
        return training.update(params, training.init(params, batch), batch, validation)[:2]

    mapped = jax.jit(jax.vmap(run))(jnp.array([0.01, 0.1]))
    picked = jax.tree.map(lambda leaf: leaf[1], mapped)
    scheduled = jax.jit(lambda: run(lambda step: 0.1 + 0.0 * step))()
    jax.tree.map(functools.partial(assert_close, rtol=1e-4, atol=1e-6), picked, scheduled)


@pytest.mark.slow
@every_method
def test_states_can_be_donated(factory):
    params, batch, validation = network()
    training = factory(network_losses, optax.adam(1e-3), inner_learning_rate=RATE)
    update = jax.jit(training.update, donate_argnums=(0, 1))
    state = training.init(params, batch)
    for _ in range(2):
        params, state, _ = update(params, state, batch, validation)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))


@every_method
def test_wrong_arguments_are_value_errors(factory):
    with pytest.raises(ValueError, match=r"inner_learning_rate must be > 0; got 0\.0"):
        factory(distances, optax.sgd(0.1), inner_learning_rate=0.0)
    training = factory(lambda x, batch: jnp.sum(x), optax.sgd(0.1), inner_learning_rate=0.1)
    with pytest.raises(ValueError, match="losses must be one vector"):
        training.init(jnp.ones(2), None)


def test_wrong_options_are_value_errors():
    make = functools.partial(bilb.auto_lambda, distances, optax.sgd(0.1), inner_learning_rate=0.1)
    with pytest.raises(ValueError, match="initial must be >= 0"):
        make(initial=-0.1)
    with pytest.raises(ValueError, match="primary must be one number or have an entry per task"):
        make(primary=jnp.ones(3)).init(jnp.zeros(2), TARGETS)
    make = functools.partial(bilb.forum, distances, optax.sgd(0.1), inner_learning_rate=0.1)
    with pytest.raises(ValueError, match="inner_steps must be >= 1"):
        make(inner_steps=0)
    with pytest.raises(ValueError, match="rho must be >= 0"):
        make(rho=-1.0)
    with pytest.raises(ValueError, match="averaging must be >= 0 and <= 1"):
        make(averaging=2.0)
