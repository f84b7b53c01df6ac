"""MARIGOLD: it solves its lower-level problem, ends on the Pareto set, at the predicted rate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from conftest import oracle, oracle_names
from contract import mostly_slow

import bilb
from bilb.gradient_balancing.solvers import min_norm_weights

EXACT_CASES = ("generic", "mixed", "opposed")


def train(task_losses, balancer, x, steps, learning_rate, optimizer=None, state=None):
    """Returns the last parameters, the value_and_grad state and the norms of all directions."""
    value_and_grad = bilb.value_and_grad(task_losses, balancer)
    optimizer = optimizer or optax.sgd(learning_rate)

    def step(carry, _):
        x, state, opt_state = carry
        _, grads, state = value_and_grad(x, state)
        updates, opt_state = optimizer.update(grads, opt_state, x)
        return (optax.apply_updates(x, updates), state, opt_state), jnp.linalg.norm(grads)

    @jax.jit
    def run(x, state):
        carry = (x, state, optimizer.init(x))
        (x, state, _), norms = jax.lax.scan(step, carry, length=steps)
        return x, state, norms

    return run(x, value_and_grad.init(x) if state is None else state)


@pytest.mark.x64
@pytest.mark.parametrize("file", oracle_names("f4_agg_K*"))
def test_fixed_parameters_reach_the_min_norm_point(file):
    recorded = oracle(file)
    row = list(recorded["exact_names"]).index("mgda")
    cases = [c for c in recorded["cases"] if c.split("_")[0] in EXACT_CASES]
    width = max(recorded[f"{c}/J"].shape[1] for c in cases)
    widen = lambda j: np.pad(j, ((0, 0), (0, width - j.shape[1])))
    jacobians = jnp.array([widen(recorded[f"{c}/J"]) for c in cases])
    exact = jnp.array([recorded[f"{c}/exact_W"][row] for c in cases])

    balancer = bilb.marigold(scheme="projection", optimizer=bilb.adagrad_norm())

    def weights(jacobian):
        value_and_grad = bilb.value_and_grad(lambda x: jacobian @ x, balancer)
        x = jnp.zeros(width)
        step = lambda state, _: (value_and_grad(x, state)[2], None)
        state, _ = jax.lax.scan(step, value_and_grad.init(x), length=20_000)
        return optax.tree.get(state, "weights")

    ours = jax.jit(jax.vmap(weights))(jacobians)
    distance = jnp.abs(jnp.einsum("ck,ckp->cp", ours - exact, jacobians)).max(1)
    assert (distance < 1e-3 * jnp.linalg.norm(jacobians, axis=2).max(1)).all()


def quadratics(seed, num_tasks, width):
    """Losses ½ (x - c_k)ᵀ A_k (x - c_k), the eigenvalues of A_k in [0.5, 2], and a start."""
    rng = np.random.default_rng(seed)
    centres = jnp.array(3 * rng.normal(size=(num_tasks, width)))
    bases = [np.linalg.qr(rng.normal(size=(width, width)))[0] for _ in range(num_tasks)]
    hessians = jnp.array([q @ np.diag(rng.uniform(0.5, 2, width)) @ q.T for q in bases])

    def task_losses(x):
        offset = x - centres
        return 0.5 * jnp.einsum("kp,kpq,kq->k", offset, hessians, offset)

    return task_losses, hessians, jnp.array(3 * rng.normal(size=width))


def gram_trace(task_losses, x):
    return jnp.sum(jax.jacobian(task_losses)(x) ** 2)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SIZES = [slow(0, 2, 2), slow(1, 2, 10), (2, 3, 2), slow(3, 3, 10)]


@pytest.mark.slow
@pytest.mark.x64
@pytest.mark.parametrize(("seed", "num_tasks", "width"), SIZES)
def test_many_inner_steps_end_at_the_point_of_mgda(seed, num_tasks, width):
    task_losses, _, x = quadratics(seed, num_tasks, width)
    beta = 2 / gram_trace(task_losses, x)
    balancer = bilb.marigold(scheme="projection", optimizer=optax.sgd(beta), inner_steps=50)
    ours, _, _ = train(task_losses, balancer, x, 5_000, 0.1)

    def mgda(x, _):
        jacobian = jax.jacobian(task_losses)(x)
        return x - 0.1 * min_norm_weights(jacobian @ jacobian.T) @ jacobian, None

    exact, _ = jax.lax.scan(mgda, x, length=5_000)
    np.testing.assert_allclose(ours, exact, atol=1e-3)


@pytest.mark.x64
@pytest.mark.parametrize(
    "scheme", mostly_slow(["projection", "exponentiated", "softmax"], fast=["softmax"])
)
@pytest.mark.parametrize(("seed", "num_tasks", "width"), SIZES)
def test_single_loop_ends_pareto_stationary(seed, num_tasks, width, scheme):
    task_losses, _, x = quadratics(seed, num_tasks, width)
    beta = 0.5 / gram_trace(task_losses, x)
    # A decaying rate ends the jitter of Adam's steps on the logits.
    adam = optax.adam(optax.cosine_decay_schedule(0.025, 20_000))
    optimizer = {"projection": bilb.adagrad_norm(), "exponentiated": optax.sgd(beta)}
    balancer = bilb.marigold(scheme=scheme, optimizer=optimizer.get(scheme, adam))
    x, state, norms = train(task_losses, balancer, x, 20_000, 0.1)
    largest = jnp.linalg.norm(jax.jacobian(task_losses)(x), axis=1).max()
    assert norms[-1] < 1e-3 * largest
    assert state.balancer.weights.sum() == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.x64
@pytest.mark.parametrize(("seed", "num_tasks", "width"), [(4, 2, 2), (1, 2, 10), (3, 3, 10)])
def test_contraction_rate_is_the_predicted_one(seed, num_tasks, width):
    """Near an interior equilibrium d ← (I - α H - β Jᵀ P J) d, H = Σ λ_k A_k, P = I - 11ᵀ/K."""
    task_losses, hessians, x = quadratics(seed, num_tasks, width)
    alpha, beta = 0.1, 0.5 / gram_trace(task_losses, x)
    balancer = bilb.marigold(scheme="projection", optimizer=optax.sgd(beta))
    x, state, _ = train(task_losses, balancer, x, 3_000, alpha)
    weights = state.balancer.weights
    assert (weights > 1e-3).all(), "the equilibrium is not interior; choose another seed"
    jacobian = jax.jacobian(task_losses)(x)
    hessian = jnp.einsum("k,kpq->pq", weights, hessians)
    centre = jnp.eye(num_tasks) - 1 / num_tasks
    matrix = jnp.eye(width) - alpha * hessian - beta * jacobian.T @ centre @ jacobian
    values, vectors = jnp.linalg.eigh(matrix)
    for mode in (0, -1):
        # A displacement whose direction d is one mode of the linear map.
        start = x + 1e-6 * jnp.linalg.solve(hessian, vectors[:, mode])
        _, _, norms = train(task_losses, balancer, start, 10, alpha, state=state)
        measured = float((norms[-1] / norms[0]) ** (1 / 9))
        assert measured == pytest.approx(abs(float(values[mode])), rel=5e-4)


@pytest.mark.x64
@pytest.mark.slow
def test_defaults_end_on_the_pareto_set_of_the_toy_problem():
    run = lambda x: train(
        toy.task_losses, bilb.marigold(), x, 50_000, None, optimizer=optax.adam(1e-3)
    )[0]
    ends = jax.vmap(run)(jnp.array(toy.STARTS))

    def stationarity(x):
        jacobian = jax.jacobian(toy.task_losses)(x)
        return bilb.metrics.pareto_stationarity(jacobian @ jacobian.T)

    assert (jax.vmap(stationarity)(ends) < 1e-2).all(), ends


@pytest.mark.x64
def test_finite_differences_are_first_order():
    task_losses, _, x = quadratics(3, 3, 10)
    direction = jax.grad(lambda x: task_losses(x).sum())(x)
    exact = bilb.slopes.forward(task_losses, x, direction)
    np.testing.assert_allclose(exact, jax.jacobian(task_losses)(x) @ direction, rtol=1e-12)

    def error(h):
        return jnp.abs(bilb.slopes.finite_difference(h)(task_losses, x, direction) - exact).max()

    assert error(1e-3) / error(5e-4) == pytest.approx(2.0, rel=1e-4)
    assert error(1e-3) < 1e-3 * jnp.abs(exact).max()


def test_default_displacement_suits_float32():
    task_losses, _, x = quadratics(3, 3, 10)
    direction = jax.grad(lambda x: task_losses(x).sum())(x)
    exact = bilb.slopes.forward(task_losses, x, direction)
    approximate = bilb.slopes.finite_difference()(task_losses, x, direction)
    assert approximate.dtype == jnp.float32
    np.testing.assert_allclose(approximate, exact, atol=5e-3 * jnp.abs(exact).max())


def test_finite_difference_along_nothing_is_zero():
    task_losses, _, x = quadratics(0, 2, 2)
    slopes = bilb.slopes.finite_difference()(task_losses, x, jnp.zeros(2))
    np.testing.assert_array_equal(slopes, jnp.zeros(2))


@pytest.mark.slow
@pytest.mark.x64
def test_a_chain_pushes_the_slopes_through():
    """After one step the weights are those that the slopes of the log losses ask for."""
    task_losses, _, x = quadratics(3, 3, 10)
    marigold = bilb.marigold(scheme="exponentiated", optimizer=optax.sgd(0.01))
    value_and_grad = bilb.value_and_grad(task_losses, bilb.chain(bilb.log_losses(), marigold))
    state = value_and_grad.init(x)
    _, grads, state = value_and_grad(x, state)
    jacobian = jax.jacobian(lambda x: jnp.log(task_losses(x)))(x)
    np.testing.assert_allclose(grads, jacobian.mean(0), rtol=1e-12)
    _, _, state = value_and_grad(x - 0.01 * grads, state)
    expected = jax.nn.softmax(-0.01 * jacobian @ grads)
    np.testing.assert_allclose(optax.tree.get(state, "weights"), expected, rtol=1e-12)


def on_logs_by_hand(task_losses, x, steps, learning_rate):
    """MARIGOLD's softmax scheme on log losses from raw slopes, ``s = (J d) / l``, written out."""
    adam = optax.adam(0.025)

    def step(carry, t):
        x, logits, opt_state, losses, raw_slopes = carry
        lam = jax.nn.softmax(logits)
        slopes = raw_slopes / losses
        gradient = lam * (slopes - lam @ slopes)
        updates, moved = adam.update(gradient, opt_state)
        moved = logits + updates, moved
        first = lambda new, old: jnp.where(t == 0, old, new)
        logits, opt_state = jax.tree.map(first, moved, (logits, opt_state))
        logits = jnp.clip(logits - logits.mean(), -6.0, 6.0)
        lam = jax.nn.softmax(logits)
        losses, jacobian = task_losses(x), jax.jacobian(task_losses)(x)
        direction = (lam / losses) @ jacobian
        carry = (x - learning_rate * direction, logits, opt_state, losses, jacobian @ direction)
        return carry, (x, lam)

    zeros = jnp.zeros_like(task_losses(x))
    carry = x, zeros, adam.init(zeros), zeros + 1, zeros
    return jax.lax.scan(step, carry, jnp.arange(steps))[1]


@pytest.mark.x64
def test_on_logs_it_has_the_trajectory_of_slopes_divided_by_losses():
    task_losses, _, x = quadratics(3, 3, 10)
    expected = jax.jit(lambda x: on_logs_by_hand(task_losses, x, 200, 0.1))(x)
    log_losses = lambda x: jnp.log(task_losses(x))
    chained = bilb.chain(bilb.log_losses(), bilb.marigold())
    for losses, balancer in [(task_losses, chained), (log_losses, bilb.marigold())]:
        value_and_grad = bilb.value_and_grad(losses, balancer)

        def step(carry, _, value_and_grad=value_and_grad):
            x, state = carry
            _, grads, state = value_and_grad(x, state)
            return (x - 0.1 * grads, state), (x, optax.tree.get(state, "weights"))

        run = lambda x, step=step, init=value_and_grad.init: jax.lax.scan(
            step, (x, init(x)), length=200
        )
        ours = jax.jit(run)(x)[1]
        for actual, desired in zip(ours, expected):
            np.testing.assert_allclose(actual, desired, rtol=1e-10, atol=1e-12)
    assert jnp.ptp(expected[1][-1]) > 0.1


@pytest.mark.parametrize("link", [None, slow(bilb.log_losses())])
def test_slope_fn_and_inner_steps_solve_the_problem_at_once(link):
    task_losses, _, x = quadratics(4, 3, 10)
    x = 0.2 * x
    balanced = lambda x: jnp.log(task_losses(x)) if link else task_losses(x)
    jacobian = jax.jacobian(balanced)(x)
    gram = jacobian @ jacobian.T
    optimizer = optax.sgd(1 / jnp.trace(gram))
    marigold = bilb.marigold(scheme="projection", inner_steps=2_000, optimizer=optimizer)
    balancer = bilb.chain(link, marigold) if link else marigold
    value_and_grad = bilb.value_and_grad(task_losses, balancer)
    _, _, state = jax.jit(value_and_grad)(x, value_and_grad.init(x))
    exact = min_norm_weights(gram)
    assert (exact > 0.1).all(), "the solution is not interior; choose another seed"
    np.testing.assert_allclose(optax.tree.get(state, "weights"), exact, atol=2e-3)


@pytest.mark.parametrize("scheme", ["softmax", slow("projection"), "exponentiated"])
def test_first_call_learns_nothing(scheme):
    balancer = bilb.marigold(scheme=scheme, regularization=1.0)
    losses = jnp.array([1.0, 2.0, 3.0])
    state = balancer.init(losses)
    _, after = balancer.update(losses, state, slopes=jnp.zeros(3))
    np.testing.assert_array_equal(after.weights, state.weights)
    old, new = (jax.tree.leaves((s.point, s.opt_state, s.memory)) for s in (state, after))
    for before, now in zip(old, new):
        np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize(
    "link", [bilb.log_losses(), bilb.divide_by(2.0), bilb.scale_by_initial_loss()]
)
def test_a_normalisation_given_slopes_is_an_error(link):
    task_losses, _, x = quadratics(0, 2, 2)
    value_and_grad = bilb.value_and_grad(task_losses, optax.chain(link, bilb.marigold()))
    with pytest.raises(TypeError, match=r"bilb\.chain"):
        value_and_grad.init(x)


def conflicting(entry=-0.6):
    """A Gram matrix of three conflicting gradients; by default MGDA's solution is interior."""
    jacobian = jnp.array([[1.0, 0.2, 0.0], [entry, 1.0, 0.3], [0.3, -0.8, 1.0]])
    return jacobian @ jacobian.T


def solve(lower, scheme="softmax", optimizer=None, steps=20_000, entry=-0.6, **options):
    """The weights after many steps at fixed gradients, by the balancer alone."""
    gram = conflicting(entry)
    optimizer = optimizer or optax.adam(optax.cosine_decay_schedule(0.025, steps))
    balancer = bilb.marigold(lower, scheme=scheme, optimizer=optimizer, **options)
    losses = jnp.ones(3)
    slope_fn = lambda weights: gram @ weights

    def step(carry, _):
        state, slopes = carry
        extra = {"slope_fn": slope_fn} if lower == "cagrad" else {"slopes": slopes}
        _, state = balancer.update(losses, state, **extra)
        return (state, gram @ state.weights), None

    (state, _), _ = jax.lax.scan(step, (balancer.init(losses), jnp.zeros(3)), length=steps)
    return gram, state.weights


@pytest.mark.x64
@pytest.mark.parametrize(
    ("lower", "exponent"),
    [("nash", 1.0), ("fairgrad", 0.5), slow(bilb.lower_levels.fairgrad(alpha=1.0), 1.0)],
)
def test_fair_lower_levels_reach_their_balance(lower, exponent):
    gram, weights = solve(lower)
    balance = weights**exponent * (gram @ weights)
    np.testing.assert_allclose(balance, balance.mean() * jnp.ones(3), rtol=1e-3)


@pytest.mark.x64
@pytest.mark.parametrize("alpha", [1.0, slow(2.0)])
def test_fair_lower_levels_share_by_preference(alpha):
    """The weights are those of the method that solves it, and only ratios of preferences matter."""
    preference = jnp.array([1.0, 0.2, 3.0])
    lower = bilb.lower_levels.nash if alpha == 1.0 else bilb.lower_levels.fairgrad
    gram, weights = solve(lower(preference=preference))
    method, losses = bilb.fairgrad(alpha, preference=preference), jnp.ones(3)
    expected = method.update(losses, method.init(losses), gram=gram)[1].weights
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-3)
    _, equal = solve(lower(preference=0.1))
    np.testing.assert_allclose(equal, solve(lower())[1], rtol=1e-9)


# Lower level: the same problem solved to rounding, the options of MARIGOLD, the fourth entry of J.
SOLVED = {
    "mgda": (bilb.mgda(), {}, -0.6),
    "sdmgrad": (bilb.sdmgrad(0.3, steps=None), {}, -0.6),
    "cagrad": (bilb.cagrad(0.4), {}, -0.6),
    "nash": (bilb.nash_mtl(), {}, -0.6),
    "fairgrad": (bilb.fairgrad(2.0), {}, -0.6),
    "dualproj": (
        bilb.dualproj(reg_eps=0.0, norm_eps=0.0),
        {"scheme": "projection", "optimizer": optax.sgd(0.05)},
        -2.0,
    ),
}


@pytest.mark.slow
@pytest.mark.x64
@pytest.mark.parametrize("lower", SOLVED)
def test_lower_levels_end_where_the_gradient_balancing_methods_are(lower):
    """The fair ones up to a factor: λ is on the simplex."""
    method, options, entry = SOLVED[lower]
    gram, weights = solve(lower, entry=entry, **options)
    losses = jnp.ones(3)
    expected = method.update(losses, method.init(losses), gram=gram)[1].weights
    if lower in ("nash", "fairgrad"):
        expected /= expected.sum()
    np.testing.assert_allclose(weights, expected, atol=1e-3)
    assert jnp.ptp(weights) > 0.05


@pytest.mark.slow
def test_a_constant_regulariser_slides_to_equal_weights():
    task_losses, _, x = quadratics(3, 3, 10)
    trace = gram_trace(task_losses, x)
    end = functools.partial(train, task_losses, x=x, steps=20_000, learning_rate=0.1)
    make = functools.partial(bilb.marigold, scheme="projection", optimizer=optax.sgd(1 / trace))
    _, free, _ = end(make())
    _, pulled, _ = end(make(regularization=1e-3 * trace))
    spread = lambda state: jnp.ptp(state.balancer.weights)
    assert spread(pulled) < 1e-2 < spread(free)


def follow(balancer, gram, mask, steps, extra="slopes"):
    """The weights (steps, K) at fixed gradients, those of absent tasks as large as can be."""
    losses = jnp.ones(len(gram))

    def step(carry, _):
        state, slopes = carry
        given = {"slopes": slopes, "slope_fn": lambda weights: gram @ weights}
        _, state = balancer.update(losses, state, mask=mask, **{extra: given[extra]})
        used = jnp.where(mask, state.weights, 0.0)
        return (state, jnp.where(mask, gram @ used, 1e30)), used

    start = balancer.init(losses), jnp.zeros(len(gram))
    return jax.jit(lambda start: jax.lax.scan(step, start, length=steps))(start)[1]
