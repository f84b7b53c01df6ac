"""MARIGOLD's options: schemes, bounds, schedules, batches, and wrong ones."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import mostly_slow
from test_marigold import conflicting, follow, quadratics

import bilb
from bilb.bilevel import lower_levels


def exponentiated(slopes, steps, **options):
    """The state after some steps of plain gradient descent on the logits at fixed slopes."""
    optimizer = optax.sgd(0.1)
    balancer = bilb.marigold(scheme="exponentiated", optimizer=optimizer, **options)
    losses, states = jnp.ones(2), []
    state = balancer.init(losses)
    update = jax.jit(lambda state: balancer.update(losses, state, slopes=jnp.array(slopes))[1])
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


@pytest.mark.x64
@pytest.mark.parametrize(
    "name", mostly_slow(["mgda", "sdmgrad", "cagrad"], fast=["sdmgrad", "cagrad"])
)
def test_gradients_are_those_of_the_problems_as_written(name):
    rows = np.random.default_rng(0).normal(size=(3, 4))
    norm = lambda w: jnp.linalg.norm(w @ rows)
    mean, lam = jnp.full(3, 1 / 3), jnp.array([0.2, 0.3, 0.5])
    lower, problem = {
        "mgda": (lower_levels.mgda(), lambda lam: norm(lam) ** 2 / 2),
        # Of the weights of the direction, which sum to one.
        "sdmgrad": (lower_levels.sdmgrad(0.7), lambda lam: norm(lam + 0.7 * mean) ** 2 / 2 / 1.7),
        "cagrad": (
            lower_levels.cagrad(0.6),
            lambda lam: lam @ rows @ (mean @ rows) + 0.6 * norm(mean) * norm(lam),
        ),
    }[name]
    product = lambda w: rows @ (w @ rows)
    gradient, _ = lower.gradient(lam, product, jnp.array(0.0), jnp.ones(3, bool))
    np.testing.assert_allclose(gradient, jax.grad(problem)(lam), rtol=1e-12)


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
@pytest.mark.parametrize("scheme", mostly_slow(["softmax", "projection"], fast=["softmax"]))
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


@pytest.mark.parametrize("name", mostly_slow(INJECTED, fast=["marigold"]))
def test_the_documented_call_of_inject_hyperparams_works_in_value_and_grad(name):
    factory, static, hyperparams = INJECTED[name]
    task_losses, _, x = quadratics(0, 2, 2)

    def run(balancer):
        value_and_grad = bilb.value_and_grad(task_losses, balancer)
        params, state = x, value_and_grad.init(x)
        step = jax.jit(value_and_grad)
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
