"""Weights for physics-informed networks against their published formulas, written in numpy.

The problem is small enough for derivatives by hand: three tasks, means of squared residuals that
are sines, linear, and a cube.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_finite

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

    return jax.jit(run)(jnp.asarray(START))


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

    @jax.jit
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
    update = jax.jit(lambda losses, state: balancer.update(losses, state, **{argument: function}))
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

    @jax.jit
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
        update = jax.jit(balancer.update)
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

    @jax.jit
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
    exact, by_probes, second = jax.jit(lambda: [weights(engine) for engine in engines])()
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
