"""MARIGOLD: it solves its lower-level problem, ends on the Pareto set, at the predicted rate."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from conftest import oracle, oracle_names
from contract import jit, mostly_slow

import bilb
from bilb.bilevel import lower_levels
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


SIZES = [(0, 2, 2), (1, 2, 10), (2, 3, 2), (3, 3, 10)]


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


@pytest.mark.parametrize("link", [None, bilb.log_losses()])
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


@pytest.mark.parametrize("scheme", ["softmax", "projection", "exponentiated"])
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
    [("nash", 1.0), ("fairgrad", 0.5), (bilb.lower_levels.fairgrad(alpha=1.0), 1.0)],
)
def test_fair_lower_levels_reach_their_balance(lower, exponent):
    gram, weights = solve(lower)
    balance = weights**exponent * (gram @ weights)
    np.testing.assert_allclose(balance, balance.mean() * jnp.ones(3), rtol=1e-3)


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


def test_a_constant_regulariser_slides_to_equal_weights():
    task_losses, _, x = quadratics(3, 3, 10)
    trace = gram_trace(task_losses, x)
    end = functools.partial(train, task_losses, x=x, steps=20_000, learning_rate=0.1)
    make = functools.partial(bilb.marigold, scheme="projection", optimizer=optax.sgd(1 / trace))
    _, free, _ = end(make())
    _, pulled, _ = end(make(regularization=1e-3 * trace))
    spread = lambda state: jnp.ptp(state.balancer.weights)
    assert spread(pulled) < 1e-2 < spread(free)


def test_weights_learn_only_from_tasks_present_both_times():
    balancer = bilb.marigold()
    losses, mask = jnp.ones(3), jnp.array([True, False, True])
    state = balancer.init(losses)
    _, state = balancer.update(losses, state, slopes=jnp.zeros(3), mask=mask)
    np.testing.assert_allclose(state.weights, [0.5, 1 / 3, 0.5], rtol=1e-6)
    slopes = jnp.array([2.0, jnp.nan, 1.0])
    balanced, learnt = balancer.update(losses, state, slopes=slopes)
    moments = optax.tree.get(learnt.opt_state, "mu")
    assert moments[1] == 0 != moments[0]
    assert learnt.point[1] == 0
    assert learnt.weights[2] > learnt.weights[0]
    np.testing.assert_allclose(balanced.sum(), 1.0, rtol=1e-6)


def test_slopes_that_are_not_finite_teach_nothing():
    balancer = bilb.marigold()
    losses = jnp.ones(2)
    _, state = balancer.update(losses, balancer.init(losses), slopes=jnp.zeros(2))
    _, after = balancer.update(losses, state, slopes=jnp.array([1.0, jnp.inf]))
    np.testing.assert_array_equal(after.point, state.point)
    assert np.isfinite(jax.tree.leaves(after.opt_state)[1]).all()
    balancer = bilb.marigold("cagrad")
    slope_fn = lambda weights: jnp.array([1.0, jnp.nan])
    _, state = balancer.update(losses, balancer.init(losses), slope_fn=slope_fn)
    np.testing.assert_array_equal(state.point, 0.0)
    np.testing.assert_allclose(state.weights, 0.5 / (1 + 0.4**2), rtol=1e-6)


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
    return jit(lambda start: jax.lax.scan(step, start, length=steps))(start)[1]


@pytest.mark.x64
@pytest.mark.parametrize("num_tasks", [2, 4, 20])
@pytest.mark.parametrize(("lower", "expected"), [("nash", 0.75), ("fairgrad", 0.8122526)])
def test_fair_lower_levels_average_over_present_tasks(lower, expected, num_tasks):
    """For G = diag(1, 9) the weights are (1, 1/3) or (1, 9^(-2/3)), whatever is absent."""
    mask = jnp.arange(num_tasks) >= num_tasks - 2
    gram = jnp.diag(jnp.full(num_tasks, 1e4).at[-2:].set(jnp.array([1.0, 9.0])))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.025, 2000))
    weights = follow(bilb.marigold(lower, optimizer=optimizer), gram, mask, 2000)[-1]
    np.testing.assert_allclose(weights[-2:], [expected, 1 - expected], atol=1e-4)


LOWER = {
    **{name: (name, {}) for name in ("mgda", "sdmgrad", "cagrad", "nash", "fairgrad")},
    "mgda-projection": ("mgda", {"scheme": "projection", "optimizer": optax.sgd(0.05)}),
    "sdmgrad-exponentiated": ("sdmgrad", {"scheme": "exponentiated", "optimizer": optax.sgd(0.05)}),
    "dualproj": ("dualproj", {"scheme": "projection", "optimizer": optax.sgd(0.05)}),
    "cagrad-inner_steps": ("cagrad", {"inner_steps": 3}),
}


@pytest.mark.x64
@pytest.mark.parametrize("name", mostly_slow(LOWER, fast=["cagrad-inner_steps", "dualproj"]))
def test_present_tasks_are_balanced_as_if_the_others_did_not_exist(name):
    lower, options = LOWER[name]
    present = np.array([1, 2, 4])
    mask = jnp.zeros(5, bool).at[present].set(True)
    here = conflicting(-2.0)
    gram = jnp.full((5, 5), 50.0).at[np.ix_(present, present)].set(here)
    extra = "slope_fn" if lower == "cagrad" else "slopes"
    run = functools.partial(follow, bilb.marigold(lower, **options), steps=300, extra=extra)
    alone = run(here, jnp.ones(3, bool))
    masked = run(gram, mask)
    np.testing.assert_allclose(masked[:, present], alone, rtol=1e-9)
    assert jnp.ptp(alone[-1]) > 0.05
    if lower == "cagrad":  # CAGrad's own weights: (mean + c ‖g_0‖ / ‖Jᵀ λ‖ λ) / (1 + c²)
        assert (alone > 1 / 3 / (1 + 0.4**2)).all()
    elif lower == "dualproj":
        assert (alone >= 1 / 3).all()
    else:
        np.testing.assert_allclose(masked.sum(1), 1.0, rtol=1e-12)


def test_learns_from_steps_that_the_next_mask_leaves_out():
    """Tasks 0 and 1 are present at even steps only, task 2 at odd ones."""
    balancer, losses = bilb.marigold(), jnp.ones(3)
    state = balancer.init(losses)
    update = jit(balancer.update)
    for step in range(20):
        mask = jnp.array([True, True, False]) ^ (step % 2 == 1)
        slopes = jnp.array([2.0, 1.0, 0.0]) if step % 2 else jnp.array([0.0, 0.0, 1.0])
        _, state = update(losses, state, mask=mask, slopes=slopes * (step > 0))
    assert state.weights[0] < 0.45 < 0.55 < state.weights[1]
    np.testing.assert_allclose(state.weights[:2].sum(), 1.0, rtol=1e-6)


def test_the_momentum_of_an_absent_task_moves_nobody():
    momentum = optax.sgd(0.1, momentum=0.9)
    balancer = bilb.marigold(scheme="exponentiated", optimizer=momentum)
    losses, mask = jnp.ones(3), jnp.array([False, True, True])
    _, state = balancer.update(losses, balancer.init(losses), slopes=jnp.zeros(3))
    slopes = jnp.array([4.0, 0.0, 1.0])
    _, state = balancer.update(losses, state, slopes=slopes, mask=mask)
    _, after = balancer.update(losses, state, slopes=jnp.zeros(3), mask=mask)
    moved = state.point - 0.09 * jnp.where(mask, slopes, 0.0)
    np.testing.assert_allclose(after.point[1:], (moved - moved.mean())[1:], rtol=1e-5)
    assert after.point[0] == state.point[0]


@pytest.mark.parametrize("scheme", ["softmax", "exponentiated"])
def test_one_enormous_slope_does_not_freeze_the_weights(scheme):
    """Adam forgets its square after ln(1e33) / 1e-3 steps."""
    balancer, losses = bilb.marigold(scheme=scheme), jnp.ones(2)

    def run(state, slopes, steps):
        step = lambda state, _: (balancer.update(losses, state, slopes=slopes)[1], None)
        return jax.lax.scan(step, state, length=steps)[0]

    @jit
    def weights():
        state = run(balancer.init(losses), jnp.array([1e20, 0.0]), 2)
        state = run(state, jnp.array([0.0, 1.0]), 100_000)
        return state.weights, state.opt_state

    weights, opt_state = weights()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(opt_state))
    assert weights[0] > 0.9


def half_precision(dtype):
    """Two losses of 1.8e3 and 90 at a point where half precision cannot hold their slopes."""
    task_losses = lambda x: jnp.stack([20 * jnp.sum((x - 3) ** 2), jnp.sum((x + 3) ** 2)])
    return task_losses, jnp.zeros(10, dtype)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_large_losses_in_half_precision_teach(dtype):
    task_losses, x = half_precision(dtype)
    value_and_grad = bilb.value_and_grad(task_losses, bilb.marigold())
    state = value_and_grad.init(x)
    update = jit(value_and_grad)
    losses, grads, state = update(x, state)
    assert losses.dtype == grads.dtype == dtype
    assert losses[0] == 1800 if dtype == jnp.float16 else losses[0] > 1790
    assert state.slopes.dtype == jnp.float32
    jacobian = jax.jacobian(task_losses)(x.astype(jnp.float32))
    np.testing.assert_allclose(state.slopes, jacobian @ jacobian.mean(0), rtol=0.02)
    _, _, state = update(x, state)
    assert state.balancer.weights[0] < 0.5 < state.balancer.weights[1]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_finite_differences_in_half_precision_are_a_type_error(dtype):
    task_losses, x = half_precision(dtype)
    slopes = bilb.slopes.finite_difference()
    value_and_grad = bilb.value_and_grad(task_losses, bilb.marigold(), slopes=slopes)
    with pytest.raises(TypeError, match=r"round to zero: use bilb\.slopes\.forward"):
        value_and_grad(x, value_and_grad.init(x))


def exponentiated(slopes, steps, **options):
    """The state after some steps of plain gradient descent on the logits at fixed slopes."""
    optimizer = optax.sgd(0.1)
    balancer = bilb.marigold(scheme="exponentiated", optimizer=optimizer, **options)
    losses, states = jnp.ones(2), []
    state = balancer.init(losses)
    update = jit(lambda state: balancer.update(losses, state, slopes=jnp.array(slopes))[1])
    for _ in range(steps + 1):
        state = update(state)
        states.append(state)
    return states


def test_logits_are_centred():
    """What all slopes share does not carry the logits to their bound."""
    point = exponentiated([30.0, 31.0], 20)[-1].point
    np.testing.assert_allclose(point, [1.0, -1.0], rtol=1e-4)


def test_logits_stay_within_their_bound():
    states = exponentiated([1.0, -1.0], 40, max_logit=2.0)
    np.testing.assert_allclose(states[-1].point, [-2.0, 2.0])
    np.testing.assert_allclose(states[-1].weights, jax.nn.softmax(jnp.array([-2.0, 2.0])))


def test_bound_and_regularization_follow_schedules():
    bound = lambda step: jnp.where(step < 10, 0.5, 1.5)
    states = exponentiated([1.0, -1.0], 20, max_logit=bound)
    assert [float(states[i].point[1]) for i in (9, 20)] == [0.5, 1.5]

    rho = lambda step: jnp.where(step == 2, 10.0, 0.0)
    states = exponentiated([1.0, -1.0], 3, regularization=rho)
    assert_point = lambda i, value: np.testing.assert_allclose(states[i].point[1], value, rtol=1e-5)
    assert_point(1, 0.1)
    pull = 10 * jnp.diff(jax.nn.softmax(jnp.array([-0.1, 0.1])))[0] / 2
    assert_point(2, 0.2 - 0.1 * pull)
    assert_point(3, 0.3 - 0.1 * pull)


def test_fairgrad_remembers_the_largest_imbalance():
    lam, present = jnp.full(2, 0.5), jnp.ones(2, bool)
    gradient = lambda slopes, memory: lower_levels.nash().gradient(
        lam, lambda _: jnp.array(slopes), memory, present
    )
    ratio, memory = gradient([8.0, -8.0], jnp.array(0.0))
    np.testing.assert_allclose(ratio, [100.0, -100.0], rtol=1e-5)
    ratio, memory = gradient([1.0, -1.0], memory)
    assert memory == 8.0
    np.testing.assert_allclose(ratio, [12.5, -12.5], rtol=1e-5)


@pytest.mark.x64
@pytest.mark.parametrize("scheme", ["softmax", "projection"])
def test_a_lower_level_of_ones_own_may_project_by_a_partial(scheme):
    project = functools.partial(optax.projections.projection_simplex, scale=1.0)
    own = bilb.lower_levels.mgda()._replace(project=project)
    options = {"scheme": scheme, "optimizer": optax.sgd(0.05)}
    run = lambda lower: follow(
        bilb.marigold(lower, **options), conflicting(), jnp.array([True, False, True]), 50
    )
    np.testing.assert_array_equal(run(own), run("mgda"))


INJECTED = {
    "marigold": (bilb.marigold, ("inner_steps",), {"regularization": 0.5, "max_logit": 0.02}),
    "famo": (bilb.famo, (), {"gamma": 0.5}),
    "gradnorm": (bilb.gradnorm, (), {"alpha": 0.3}),
}


@pytest.mark.parametrize("name", INJECTED)
def test_the_documented_call_of_inject_hyperparams_works_in_value_and_grad(name):
    factory, static, hyperparams = INJECTED[name]
    task_losses, _, x = quadratics(0, 2, 2)

    def run(balancer):
        value_and_grad = bilb.value_and_grad(task_losses, balancer)
        params, state = x, value_and_grad.init(x)
        step = jit(value_and_grad)
        for _ in range(4):
            _, grads, state = step(params, state)
            params = params - 0.1 * grads
            state = value_and_grad.after(params, state)
        return params, state

    injected, state = run(optax.inject_hyperparams(factory, static_args=static)(**hyperparams))
    np.testing.assert_allclose(injected, run(factory(**hyperparams))[0], rtol=1e-5)
    for hyperparam, value in hyperparams.items():
        assert state.balancer.hyperparams[hyperparam] == pytest.approx(value)


def test_slopes_on_an_independent_batch_and_of_the_shared_parameters():
    def task_losses(params, batch):
        hidden = batch @ params["trunk"]
        return jnp.stack([jnp.sum((hidden * head) ** 2) for head in params["heads"]])

    params = {"trunk": jnp.ones((3, 2)), "heads": [jnp.ones(2), 2 * jnp.ones(2)]}
    shared = {"trunk": True, "heads": False}
    batches = [jax.random.normal(jax.random.key(k), (4, 3)) for k in range(2)]
    value_and_grad = bilb.value_and_grad(task_losses, bilb.marigold(), shared=shared)
    state = value_and_grad.init(params, batches[0])
    _, grads, state = value_and_grad(params, state, batches[0], slope_args=(batches[1],))
    trunk = jax.jacobian(lambda t: task_losses({**params, "trunk": t}, batches[1]))(params["trunk"])
    np.testing.assert_allclose(
        state.slopes, jnp.einsum("kij,ij->k", trunk, grads["trunk"]), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lower": "pcgrad"}, "pcgrad"),
        ({"scheme": "simplex"}, "simplex"),
        ({"lower": "dualproj"}, "projection"),
        ({"lower": "nash", "scheme": "projection"}, "softmax"),
        ({"inner_steps": 0}, "inner_steps"),
        ({"regularization": -1.0}, "-1"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        bilb.marigold(**options)


def test_says_what_is_missing():
    losses = jnp.ones(2)
    for balancer, argument in [
        (bilb.marigold(), "slopes"),
        (bilb.marigold(inner_steps=2), "slope_fn"),
        (bilb.marigold("cagrad"), "slope_fn"),
    ]:
        with pytest.raises(bilb.MissingArgument, match=argument) as missing:
            balancer.update(losses, balancer.init(losses))
        assert missing.value.argument == argument
        copy = pickle.loads(pickle.dumps(missing.value))
        assert (str(copy), copy.argument) == (str(missing.value), argument)


def test_wrong_shape_of_slopes():
    balancer = bilb.marigold()
    with pytest.raises(ValueError, match=r"\(3,\)"):
        balancer.update(jnp.ones(2), balancer.init(jnp.ones(2)), slopes=jnp.ones(3))
