"""Weights for physics-informed networks against their published formulas, written in numpy.

The problem is small enough for derivatives by hand: three tasks, means of squared residuals that
are sines, linear, and a cube.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import assert_finite, example_losses, jit

import bilb

A = np.random.default_rng(0).normal(size=(5, 4))
B = np.random.default_rng(1).normal(size=(3, 4))
START = np.array([0.4, -0.3, 0.8, 0.1])
STEPS, RATE = 8, 0.02
EXACT = dict(rtol=1e-9, atol=1e-12)


def residuals(x, shift):
    return [jnp.sin(A @ x + shift), (B @ x - 1).reshape(3, 1), 2 * x[:1] ** 3]


def task_losses(x, shift):
    return jnp.stack([jnp.mean(r**2) for r in residuals(x, shift)])


def by_hand(x, shift):
    """Returns losses (K,), their gradients (K, P), and the Jacobians of the residuals."""
    r = [np.sin(A @ x + shift), B @ x - 1, 2 * x[:1] ** 3]
    jacobians = [np.cos(A @ x + shift)[:, None] * A, B, np.array([[6 * x[0] ** 2, 0, 0, 0]])]
    losses = np.array([np.mean(v**2) for v in r])
    gradients = np.stack([2 * v @ j / len(v) for v, j in zip(r, jacobians)])
    return losses, gradients, jacobians


def train(balancer, **options):
    """Returns the effective weights (steps, K) and the parameters after as many steps of SGD."""
    value_and_grad = bilb.value_and_grad(task_losses, balancer, **options)

    def step(carry, shift):
        x, state = carry
        _, gradient, state = value_and_grad(x, state, shift)
        return (x - RATE * gradient, state), state.effective_weights

    def run(x):
        carry = x, value_and_grad.init(x, 0.0)
        (x, _), weights = jax.lax.scan(step, carry, 0.1 * jnp.arange(STEPS))
        return x, weights

    return jit(run)(jnp.asarray(START))


def train_by_hand(weigh):
    """As :func:`train`, with ``weigh(step, losses, gradients, jacobians) -> weights``."""
    x, rows = START, []
    for step in range(STEPS):
        now = by_hand(x, 0.1 * step)
        rows.append(weigh(step, *now))
        x = x - RATE * rows[-1] @ now[1]
    return x, np.stack(rows)


def averaged(measure, formula, momentum, every, decay):
    """Returns ``weigh`` of weights that are renewed every so many steps and averaged."""
    memory = {"weights": np.ones(3), "mean": np.zeros(3), "total": 0.0}

    def weigh(step, losses, gradients, jacobians):
        if step % every == 0:
            measured = measure(gradients, jacobians)
            memory["mean"] = decay * memory["mean"] + (1 - decay) * measured
            memory["total"] = decay * memory["total"] + 1 - decay
            new = formula(memory["mean"] / memory["total"])
            memory["weights"] = momentum * memory["weights"] + (1 - momentum) * new
        return memory["weights"]

    return weigh


def squared_norms(gradients, jacobians):
    return (gradients**2).sum(1)


def mean_diagonals(gradients, jacobians):
    return np.array([np.trace(j @ j.T) / len(j) for j in jacobians])


def jaxpi(sizes):
    return sizes.mean() / (sizes + 1e-5 * sizes.mean())


def relative_to_first(sizes):
    return np.array([1.0, *sizes[0] / (sizes[1:] + 1e-5 * sizes[0])])


@pytest.mark.x64
@pytest.mark.parametrize(
    ("momentum", "every", "decay", "reference", "gram"),
    [
        (0.9, 3, 0.0, None, bilb.grams.exact()),
        (0.9, 2, 0.3, 0, bilb.grams.stacked()),
        (0.0, 1, 0.0, 0, bilb.grams.exact()),
        (0.5, 1, 0.7, None, bilb.grams.stacked()),
    ],
)
def test_gradient_norm_weights(momentum, every, decay, reference, gram):
    balancer = bilb.lr_annealing(momentum, every, decay=decay, reference=reference)
    formula = jaxpi if reference is None else relative_to_first
    of_squares = lambda squares: formula(np.sqrt(squares))
    weigh = averaged(squared_norms, of_squares, momentum, every, decay)
    x, weights = train(balancer, gram=gram)
    expected_x, expected_weights = train_by_hand(weigh)
    np.testing.assert_allclose(weights, expected_weights, **EXACT)
    np.testing.assert_allclose(x, expected_x, **EXACT)


@pytest.mark.x64
@pytest.mark.parametrize(("momentum", "every", "decay"), [(0.9, 3, 0.0), (0.0, 1, 0.7)])
def test_tangent_kernel_weights(momentum, every, decay):
    balancer = bilb.ntk_weights(momentum, every, decay=decay)
    weigh = averaged(mean_diagonals, jaxpi, momentum, every, decay)
    engine = bilb.curvatures.tangent_kernel(residuals, chunk_size=2)
    x, weights = train(balancer, curvatures=engine)
    expected_x, expected_weights = train_by_hand(weigh)
    np.testing.assert_allclose(weights, expected_weights, **EXACT)
    np.testing.assert_allclose(x, expected_x, **EXACT)


@pytest.mark.x64
@pytest.mark.parametrize("every", [1, 3])
def test_dual_balancing(every):
    """Against the update of the official code, with norms for its standard deviations."""
    memory = {"weights": np.zeros(2), "mean": np.zeros(3), "renewals": 0}

    def weigh(step, losses, gradients, jacobians):
        if step % every == 0:
            memory["renewals"] += 1
            forget = 1 / memory["renewals"]
            norms = np.sqrt(squared_norms(gradients, jacobians))
            aggregated = (norms[0] / (norms[1:] + 1e-5 * norms[0])).sum()
            memory["mean"] = (1 - forget) * memory["mean"] + forget * losses
            difficulty = (losses / memory["mean"])[1:]
            new = aggregated * difficulty / difficulty.sum()
            memory["weights"] = memory["weights"] + forget * (new - memory["weights"])
        return np.array([1.0, *memory["weights"]])

    x, weights = train(bilb.db_pinn(every), gram=bilb.grams.stacked())
    expected_x, expected_weights = train_by_hand(weigh)
    assert np.ptp(expected_weights[:, 1:], axis=0).min() > 0.01
    np.testing.assert_allclose(weights, expected_weights, **EXACT)
    np.testing.assert_allclose(x, expected_x, **EXACT)


@pytest.mark.parametrize("every", [1, 2])
def test_dual_balancing_leaves_out_what_is_not_finite(every):
    balancer = bilb.db_pinn(every=every)

    @jit
    def update(losses, norms, state):
        given = {"gradient_norms": norms} if every == 1 else {"gram_fn": lambda: jnp.diag(norms**2)}
        return balancer.update(losses, state, **given)

    losses, norms = jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 2.0, 1.0])
    _, state = update(losses, norms, balancer.init(losses))
    np.testing.assert_allclose(state.weights, [1.0, 3.0, 3.0], rtol=1e-4)
    state = state._replace(step=0 * state.step)
    # Nothing is known of the second: the first has all that the third's ratio gives.
    _, without = update(losses, norms.at[1].set(jnp.nan), state)
    np.testing.assert_allclose(without.weights, [1.0, 3.0, 3.5], rtol=1e-4)
    np.testing.assert_array_equal(without.count, [2, 1, 2])
    for nothing in (norms.at[0].set(0.0), norms.at[0].set(jnp.inf)):
        _, same = update(losses, nothing, state)
        np.testing.assert_array_equal(same.weights, state.weights)
    # A condition that is solved adds nothing to the mean of its weights.
    for solved, expected in [([1.0, 0.0, 3.0], [1.0, 1.5, 4.5]), ([1.0, 0.0, 0.0], [1, 1.5, 1.5])]:
        balanced, after = update(jnp.array(solved), norms, state)
        assert_finite((balanced, after))
        np.testing.assert_allclose(after.weights, expected, rtol=1e-4)


@pytest.mark.x64
@pytest.mark.parametrize("name", ["lr_annealing", "ntk_weights"])
def test_nothing_is_measured_between_renewals(name):
    """The weights stay the same, and what they are made of is not computed: it would fail."""
    calls = []

    def counted(x):
        jax.debug.callback(lambda: calls.append(1))
        return x

    measure = {
        "lr_annealing": ("gram_fn", lambda: counted(jnp.diag(jnp.array([4.0, 1.0])))),
        "ntk_weights": ("curvature_fn", lambda: counted(jnp.array([2.0, 1.0]))),
    }
    argument, function = measure[name]
    balancer = getattr(bilb, name)(momentum=0.0, every=3)
    update = jit(lambda losses, state: balancer.update(losses, state, **{argument: function}))
    losses = jnp.array([1.0, 3.0])
    state = balancer.init(losses)
    for step in range(7):
        balanced, state = update(losses, state)
        jax.effects_barrier()
        assert len(calls) == step // 3 + 1
        np.testing.assert_allclose(state.weights, 1.5 / (np.array([2.0, 1.0]) + 1.5e-5))
        np.testing.assert_allclose(balanced, state.weights * losses)


@pytest.mark.parametrize("name", ["lr_annealing", "ntk_weights"])
def test_a_measure_that_is_not_finite_keeps_the_weight_of_its_task(name):
    argument = {"lr_annealing": "gram_fn", "ntk_weights": "curvature_fn"}[name]
    balancer = getattr(bilb, name)(momentum=0.0, every=2)
    values = jnp.array([[1.0, 2.0, 3.0], [0.0] * 3, [jnp.nan, 1.0, 3.0]])
    losses = jnp.array([1.0, 2.0, 4.0])

    @jit
    def update(state, value):
        given = lambda: jnp.diag(value**2) if argument == "gram_fn" else value
        return balancer.update(losses, state, **{argument: given})

    state, seen = balancer.init(losses), []
    for value in values[jnp.array([0, 1, 2, 2, 2])]:
        balanced, state = update(state, value)
        assert_finite((balanced, state))
        seen.append(state.weights)
    first = 2 / (np.array([1.0, 2.0, 3.0]) + 2e-5)
    np.testing.assert_allclose(seen[1], first, rtol=1e-6)
    np.testing.assert_allclose(seen[2][0], first[0], rtol=1e-6)
    np.testing.assert_allclose(seen[2][1:], 2 / (np.array([1.0, 3.0]) + 2e-5), rtol=1e-6)


def test_where_there_is_nothing_to_compare_with_the_weights_stay():
    losses = jnp.ones(3)
    norms = jnp.array([2.0, 1.0, 4.0])
    every, absent = jnp.ones(3, bool), jnp.array([False, True, True])
    for balancer, nothing, mask in [
        (bilb.lr_annealing(0.0, 1), jnp.zeros(3), every),
        (bilb.lr_annealing(0.0, 1, reference=0), norms.at[0].set(0.0), every),
        (bilb.lr_annealing(0.0, 1, reference=0), norms, absent),
    ]:
        update = jit(balancer.update)
        _, state = update(losses, balancer.init(losses), mask=every, gradient_norms=norms)
        kept = state.weights
        assert not np.allclose(kept, 1.0)
        _, state = update(losses, state, mask=mask, gradient_norms=nothing)
        np.testing.assert_array_equal(state.weights, kept)


@pytest.mark.x64
def test_curvatures_by_hand():
    shift, jacobians = 0.3, by_hand(START, 0.3)[2]
    # A convex loss each, so that magnitudes do not matter.
    convex = lambda x: jnp.stack([jnp.sum((A @ x) ** 2), jnp.sum(jnp.exp(B @ x))])
    of_kernel, probe = bilb.curvatures.tangent_kernel, bilb.curvatures.probe

    @jit
    def take(x):
        kernels = [
            engine(task_losses, x, shift)
            for engine in (of_kernel(residuals), of_kernel(residuals, probes=500, key=1))
        ]
        steps = jnp.stack([probe(key=2)(convex, x, step=step) for step in range(3)])
        return kernels, probe(probes=500, key=1)(convex, x), steps, jax.hessian(convex)(x)

    (exact, by_probes), second, steps, hessian = take(jnp.asarray(START))
    expected = mean_diagonals(None, jacobians)
    np.testing.assert_allclose(exact, expected, **EXACT)
    np.testing.assert_allclose(by_probes, expected, rtol=0.1)
    # Directions of entries ±1: probes are exact where there is one parameter.
    np.testing.assert_allclose(by_probes[2], expected[2], **EXACT)
    np.testing.assert_allclose(second, np.trace(hessian, axis1=1, axis2=2), rtol=0.1)
    assert len(np.unique(np.asarray(steps[:, 0]))) == 3


@pytest.mark.x64
def test_curvatures_of_the_shared_parameters():
    """The driver holds the others constant, for all ways to take them."""
    outputs = lambda params: [A @ params["trunk"] * params["head"], params["trunk"] ** 2]
    losses = lambda params: jnp.stack([jnp.mean(r**2) for r in outputs(params)])
    params = {"trunk": jnp.asarray(START), "head": jnp.array(3.0)}

    def weights(curvatures):
        shared = {"trunk": True, "head": False}
        balancer = bilb.ntk_weights(0.0, 1)
        value_and_grad = bilb.value_and_grad(losses, balancer, shared=shared, curvatures=curvatures)
        return value_and_grad(params, value_and_grad.init(params))[2].effective_weights

    kernel = functools.partial(bilb.curvatures.tangent_kernel, outputs)
    engines = kernel(), kernel(probes=500), bilb.curvatures.probe(500)
    exact, by_probes, second = jit(lambda: [weights(engine) for engine in engines])()
    traces = np.array([np.trace(9 * A @ A.T) / 5, np.sum(4 * START**2) / 4])
    np.testing.assert_allclose(exact, jaxpi(traces), **EXACT)
    np.testing.assert_allclose(by_probes, jaxpi(traces), rtol=0.1)
    of_hessian = np.array([2 * traces[0], np.sum(12 * START**2) / 4])
    np.testing.assert_allclose(second, jaxpi(of_hessian), rtol=0.1)


def test_curvatures_are_not_carried_through_links_nor_found_in_gradients():
    balancer = bilb.chain(bilb.log_losses(), bilb.ntk_weights(0.0, 1))
    value_and_grad = bilb.value_and_grad(lambda x: x**2, balancer)
    x = jnp.ones(2)
    with pytest.raises(TypeError, match=r"`curvatures`.*put the method that reads it first"):
        value_and_grad(x, value_and_grad.init(x))
    aggregator = bilb.aggregate_by(bilb.ntk_weights(), 2)
    with pytest.raises(bilb.MissingArgument, match=r"`curvature_fn`.*bilb\.value_and_grad"):
        aggregator.update(jnp.eye(2), aggregator.init(x), x, losses=x)


ROWS = np.asarray(example_losses(6, 3, seed=4), np.float64)


def run(balancer, rows=ROWS):
    """Returns the weights (steps, K) over rows of losses."""
    rows = jnp.asarray(rows)
    step = lambda state, row: (lambda b, s: (s, b / row))(*balancer.update(row, state))
    return jit(lambda rows: jax.lax.scan(step, balancer.init(rows[0]), rows)[1])(rows)


def softmax(values):
    exponents = np.exp(values - values.max())
    return exponents / exponents.sum()


@pytest.mark.x64
@pytest.mark.parametrize("loss_weighted", [False, True])
@pytest.mark.parametrize("rate", ["difference", "normalized", "ratio"])
def test_softadapt(rate, loss_weighted):
    beta = 0.7
    expected = []
    for t, losses in enumerate(ROWS):
        last = ROWS[t - 1] if t else losses
        change = losses - last
        if rate == "normalized":
            change = change / np.abs(change).sum() if t else change
        if rate == "ratio":
            change = losses / (last + 1e-6) if t else np.ones(3)
        weights = softmax(beta * change)
        if loss_weighted:
            weights = weights * losses / (weights * losses).sum()
        expected.append(weights)
    balancer = bilb.softadapt(beta, rate=rate, loss_weighted=loss_weighted)
    np.testing.assert_allclose(run(balancer), expected, **EXACT)


def test_softadapt_of_changes_below_one():
    """Normalised rates add up to 1 whatever their size."""
    balancer = bilb.softadapt(1.0, rate="normalized")
    update = jit(balancer.update)
    _, state = update(jnp.zeros(3), balancer.init(jnp.zeros(3)))
    for size in (1e-30, 1e-3, 1e30):
        change = jnp.array([1.0, -2.0, 0.0], jnp.float32) * size
        _, new = update(change, state)
        np.testing.assert_allclose(new.weights, softmax(np.array([1, -2, 0]) / 3), rtol=1e-5)


@pytest.mark.x64
def test_relobralo():
    alpha, temperature, rho, key = 0.9, 0.4, 0.6, jax.random.key(3)
    lamb, expected, coins = np.ones(3), [], []
    for t, losses in enumerate(ROWS):
        key, subkey = jax.random.split(key)
        coins.append(float(jax.random.bernoulli(subkey, rho)))
        balance = lambda s, losses=losses: 3 * softmax(losses / (temperature * s))
        last = ROWS[max(t - 1, 0)]
        lookback = coins[-1] * lamb + (1 - coins[-1]) * balance(ROWS[0])
        lamb = alpha * lookback + (1 - alpha) * balance(last)
        expected.append(lamb)
    assert {*coins[1:]} == {0.0, 1.0}
    balancer = bilb.relobralo(alpha, temperature, rho, key=3)
    np.testing.assert_allclose(run(balancer), expected, **EXACT)


@pytest.mark.x64
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_self_adaptive(exponent):
    lamb, expected = np.full(3, 0.5), []
    for losses in ROWS:
        expected.append(lamb**exponent)
        lamb = lamb + 0.1 * exponent * lamb ** (exponent - 1) * losses
    balancer = bilb.self_adaptive(exponent, initial=0.5, optimizer=optax.sgd(0.1))
    np.testing.assert_allclose(run(balancer), expected, **EXACT)


def test_a_loss_that_is_not_finite_teaches_self_adaptive_weights_nothing():
    balancer = bilb.self_adaptive()
    update = jit(balancer.update)
    losses = jnp.array([1.0, 2.0])
    _, state = update(losses, balancer.init(losses))
    balanced, new = update(losses.at[1].set(jnp.inf), state)
    assert balanced[1] == jnp.inf
    assert new.scales[0] > state.scales[0]
    of_second = lambda state: [leaf[1] for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert of_second(new.scales) == of_second(state.scales)
    assert of_second(new.opt_state) == of_second(state.opt_state)


@pytest.mark.x64
@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0, 2.0])
def test_powers_of_losses(exponent):
    link = bilb.power_losses(exponent)
    losses = ROWS[0]
    objective = lambda losses: link.update(losses, link.init(losses))[0].sum()
    value, gradient = jax.value_and_grad(objective)(jnp.asarray(losses))
    np.testing.assert_allclose(value, (losses**exponent).sum(), **EXACT)
    np.testing.assert_allclose(gradient, exponent * losses ** (exponent - 1), **EXACT)


def test_powers_of_losses_that_have_none():
    link = bilb.power_losses()
    losses = jnp.array([0.0, -1.0, 1e-31, 4.0, jnp.nan, jnp.inf])
    balanced, pullback = jax.vjp(lambda losses: link.update(losses, link.init(losses))[0], losses)
    np.testing.assert_allclose(balanced, [1e-15, 1e-15, 1e-15, 2.0, np.nan, np.inf])
    (gradient,) = pullback(jnp.ones(6))
    np.testing.assert_allclose(gradient[:4], [0.0, 0.0, 0.0, 0.25])


@pytest.mark.x64
def test_gradients_of_root_losses_keep_their_size():
    """‖∇√l‖² is rᵀ J Jᵀ r / (N ‖r‖²), for residuals of any size."""
    loss = lambda x, r: jnp.mean((A @ x + r) ** 2)[None]
    value_and_grad = bilb.value_and_grad(loss, bilb.power_losses())
    take = jit(lambda x, r: value_and_grad(x, value_and_grad.init(x, r), r)[1])
    for size in (1.0, 1e-3, 1e-6):
        r = size * np.array([1.0, -2.0, 0.5, 3.0, 1.0])
        gradient = take(jnp.zeros(4), r)
        quotient = r @ A @ A.T @ r / (len(r) * r @ r)
        np.testing.assert_allclose(gradient @ gradient, quotient, **EXACT)


def root_gradients(losses, gradients):
    return gradients / (2 * np.sqrt(losses))[:, None]


@pytest.mark.x64
def test_nash_pinn_solves_the_balance_of_the_mean_gram_matrix():
    decay = 0.6
    x, weights = train(bilb.presets.nash_pinn(decay))
    mean = total = 0.0
    at = START
    for step, of_losses in enumerate(np.asarray(weights)):
        losses, gradients, _ = by_hand(at, 0.1 * step)
        rows = root_gradients(losses, gradients)
        mean, total = decay * mean + (1 - decay) * rows @ rows.T, decay * total + 1 - decay
        w = of_losses * 2 * np.sqrt(losses)
        np.testing.assert_allclose(mean / total @ w * w, np.ones(3), rtol=1e-7)
        at = at - RATE * w @ rows
    np.testing.assert_allclose(x, at, **EXACT)


@pytest.mark.x64
def test_marigold_pinn_is_a_step_towards_equal_products_of_weight_and_slope():
    """Adam on the logits, the slopes those of the step just taken."""
    logits, moments, slopes, largest, expected = np.zeros(3), np.zeros((2, 3)), None, 0.0, []
    x = START
    for step in range(STEPS):
        losses, gradients, _ = by_hand(x, 0.1 * step)
        rows = root_gradients(losses, gradients)
        if slopes is not None:
            q = 3 * softmax(logits) * slopes
            largest = max(largest, np.abs(q).max())
            g = (q - q.mean()) / (abs(q.mean()) + 1e-2 * largest)
            moments = np.stack([0.9 * moments[0] + 0.1 * g, 0.999 * moments[1] + 0.001 * g**2])
            m, v = moments[0] / (1 - 0.9**step), moments[1] / (1 - 0.999**step)
            logits = logits - 0.025 * m / (np.sqrt(v) + 1e-8)
            logits = logits - logits.mean()
        direction = softmax(logits) @ rows
        slopes = rows @ direction
        expected.append(softmax(logits) / (2 * np.sqrt(losses)))
        x = x - RATE * direction
    actual_x, weights = train(bilb.presets.marigold_pinn())
    np.testing.assert_allclose(weights, expected, rtol=1e-7)
    np.testing.assert_allclose(actual_x, x, rtol=1e-7)


POINTS = np.linspace(0.05, 0.95, 16)


def oscillator(params):
    """``u = a sin(b t)`` for ``u'' + π² u = 0`` and u(½) = 1: solved by (1, π), trivially a = 0."""
    a, b = params
    residual = a * (np.pi**2 - b**2) * jnp.sin(b * POINTS)
    return jnp.stack([jnp.mean(residual**2), (a * jnp.sin(b / 2) - 1) ** 2])


@functools.cache
def solve(name):
    balancer, options = {
        "sum": (bilb.linear_scalarization(), {}),
        "log": (bilb.log_losses(), {}),
        "log-nash": (bilb.chain(bilb.log_losses(), bilb.marigold("nash")), {}),
        "root": (bilb.power_losses(), {}),
        "marigold_pinn": (bilb.presets.marigold_pinn(), {}),
        "nash_pinn": (bilb.presets.nash_pinn(), {}),
        "nash_pinn-sketch": (bilb.presets.nash_pinn(), {"gram": bilb.grams.sketch()}),
        "lr_annealing": (bilb.lr_annealing(), {}),
        "ntk_weights": (bilb.ntk_weights(0.0, 1, decay=0.99), {}),
    }[name]
    value_and_grad = bilb.value_and_grad(oscillator, balancer, **options)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 3000))

    def step(carry, _):
        params, state, opt_state = carry
        _, gradient, state = value_and_grad(params, state)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), state, opt_state), None

    def run(params):
        carry = params, value_and_grad.init(params), optimizer.init(params)
        return jax.lax.scan(step, carry, length=3000)[0][0]

    return jit(run)(jnp.array([0.3, 1.0], jnp.float32))


OTHERS = ["nash_pinn", "lr_annealing", "ntk_weights"]


@pytest.mark.parametrize("name", ["sum", "log", "log-nash", "root"])
def test_these_are_caught_by_the_trivial_solution(name):
    assert jnp.abs(solve(name)[0]) < 0.05


@pytest.mark.parametrize(
    "name",
    [
        "marigold_pinn",
        "nash_pinn-sketch",
        *[pytest.param(n, marks=pytest.mark.slow) for n in OTHERS],
    ],
)
def test_these_find_the_solution(name):
    np.testing.assert_allclose(solve(name), [1.0, np.pi], rtol=1e-5)
