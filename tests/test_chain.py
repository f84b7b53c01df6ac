"""A method behind other links is the method on a model whose losses are transformed by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods import METHODS

import bilb
from bilb.gradient_balancing import solvers

K, STEPS, BASE_STEPS = 3, 200, 3
CENTRES = np.array([[1.0, 0.0, 0.5, -1.0], [-1.0, 0.5, 0.0, 1.0], [0.0, -1.0, 1.0, 0.5]])
START = np.array([0.3, -0.2, 0.1, 0.4])
OPTIMIZER = optax.sgd(0.02)


def task_losses(params, shift):
    """Returns losses of three sizes, large enough for the logarithm of their logarithm."""
    distances = jnp.sum((params + 0.1 * shift - CENTRES) ** 2, axis=1)
    return jnp.asarray([3.0, 4.0, 6.0]) + jnp.asarray([0.5, 1.0, 2.0]) * distances


def igb_v1_by_hand(losses, memory):
    """Returns weights of IGBv1 with base losses from the first updates, and its memory."""
    step, mean = memory
    known = step >= BASE_STEPS
    weights = jnp.where(known, K * jax.nn.softmax(losses / jnp.where(known, mean, 1.0)), 1.0)
    mean = jnp.where(known, mean, mean + (losses - mean) / (step + 1))
    return weights, (step + 1, mean)


# name -> links in front, and by hand: what to take before IGBv1, and whether IGBv1 follows
FRONTS = {
    "alone": ((), lambda losses: losses, False),
    "log": ((bilb.log_losses,), jnp.log, False),
    "igb_v1": ((lambda: bilb.igb_v1(0, BASE_STEPS),), lambda losses: losses, True),
    "log-igb_v1": ((bilb.log_losses, lambda: bilb.igb_v1(0, BASE_STEPS)), jnp.log, True),
}
SHIFTS = np.sin(np.arange(STEPS + 1.0))


def step_of(value_and_grad, params, state, *args):
    """Returns parameters and state after one step, with the losses after it where they are read."""
    _, gradient, state = value_and_grad(params, state, *args)
    updates, _ = OPTIMIZER.update(gradient, OPTIMIZER.init(params))
    params = optax.apply_updates(params, updates)
    return params, value_and_grad.after(params, state, *args)


def by_hand(method, front):
    """Trains the method alone on a model whose losses are transformed by hand."""
    _, link, igb_v1 = FRONTS[front]

    def transformed(params, weights, shift):
        losses = link(task_losses(params, shift))
        return weights * jnp.log(losses) if igb_v1 else losses

    value_and_grad = bilb.value_and_grad(transformed, method.make(K))

    def step(carry, shift):
        params, state, memory = carry
        weights, memory = igb_v1_by_hand(link(task_losses(params, shift)), memory)
        return (*step_of(value_and_grad, params, state, weights, shift), memory), None

    memory = jnp.zeros((), jnp.int32), jnp.zeros(K)
    first = jnp.asarray(START), value_and_grad.init(START, jnp.ones(K), 0.0), memory
    return jax.lax.scan(step, first, SHIFTS[:-1])[0][0]


def by_value_and_grad(balancer):
    value_and_grad = bilb.value_and_grad(task_losses, balancer)

    def step(carry, shift):
        return step_of(value_and_grad, *carry, shift), None

    return jax.lax.scan(step, (jnp.asarray(START), value_and_grad.init(START, 0.0)), SHIFTS[:-1])[
        0
    ][0]


def by_aggregate_by(balancer):
    optimizer = optax.chain(bilb.aggregate_by(balancer, K), OPTIMIZER)

    def step(carry, shift):
        params, state, after = carry
        losses, gradients = bilb.task_gradients(task_losses, params, shift)
        updates, state = optimizer.update(
            gradients, state, params, losses=losses, losses_after=after
        )
        params = optax.apply_updates(params, updates)
        return (params, state, task_losses(params, shift)), None

    first = jnp.asarray(START), optimizer.init(START), jnp.zeros(K)
    return jax.lax.scan(step, first, SHIFTS[:-1])[0][0]


def can_be_behind_links(method):
    """Features are of a model, and curvatures of the losses as they come in."""
    return not {"features", "curvatures"} & {*method.extra(jnp.ones(K))}


OF_EACH_DRIVER, LONGEST = ("bilb4mtl", "marigold", "famo", "mgda"), "log-igb_v1"
#: Every method behind the most links, and one of each way to be driven behind the others.
CHAINED = [
    pytest.param(method, front, marks=() if (of_each and front == LONGEST) else pytest.mark.slow)
    for method in METHODS
    if can_be_behind_links(method)
    for of_each in [method.name in OF_EACH_DRIVER]
    for front in (FRONTS if of_each else [LONGEST])
]


@pytest.mark.x64
@pytest.mark.parametrize(("method", "front"), CHAINED, ids=str)
def test_both_drivers_train_as_the_method_on_losses_transformed_by_hand(method, front):
    links = [link() for link in FRONTS[front][0]]

    @jax.jit
    def train():
        balancer = bilb.chain(*links, method.make(K))
        routes = by_value_and_grad(balancer), by_aggregate_by(balancer)
        return by_hand(method, front), routes

    expected, routes = train()
    assert jnp.abs(expected - START).max() > 1e-3
    for params in routes:
        chex.assert_trees_all_close(params, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.x64
def test_a_chain_of_three_links_is_the_same_written_by_hand():
    """Logarithms, IGBv1's weights, then MGDA's, with nothing of the library but its solver."""

    def by_formula(carry, shift):
        params, memory = carry
        losses, jacobian = task_losses(params, shift), jax.jacrev(task_losses)(params, shift)
        logs = jnp.log(losses)
        weights, memory = igb_v1_by_hand(logs, memory)
        rows = (weights / (logs * losses))[:, None] * jacobian
        gradient = solvers.min_norm_weights(rows @ rows.T) @ rows
        return (params - 0.02 * gradient, memory), None

    links = bilb.log_losses(), bilb.igb_v1(0, BASE_STEPS), bilb.mgda()
    first = jnp.asarray(START), (jnp.zeros((), jnp.int32), jnp.zeros(K))
    train = jax.jit(lambda: jax.lax.scan(by_formula, first, SHIFTS[:-1])[0][0])
    actual = jax.jit(lambda: by_value_and_grad(bilb.chain(*links)))()
    chex.assert_trees_all_close(actual, train(), rtol=1e-9, atol=1e-9)


def test_half_precision_is_rounded_once():
    """What bfloat16 does not hold survives from link to link."""
    losses = jnp.linspace(1.0, 4.0, 50, dtype=jnp.bfloat16)
    links = bilb.divide_by(3.0), bilb.divide_by(0.7)
    run = lambda chain: chain.update(losses, chain.init(losses))[0]
    balanced, rounded_twice = run(bilb.chain(*links)), run(optax.chain(*links))
    assert balanced.dtype == jnp.bfloat16
    exact = losses.astype(jnp.float32) / 3.0 / 0.7
    np.testing.assert_array_equal(balanced, exact.astype(jnp.bfloat16))
    assert (rounded_twice != balanced).any()


def test_a_task_with_derivative_zero_counts_as_absent():
    """A loss below the floor of the logarithm has a zero row, which would get all the weight."""
    balancer = bilb.chain(bilb.log_losses(floor=0.1), bilb.mgda(decay=0.9))
    losses = jnp.array([0.01, 1.0, 2.0])
    gram = jnp.array([[1e6, 0, 0], [0, 1.0, 0], [0, 0, 8.0]])
    update = jax.jit(balancer.update)
    state = balancer.init(losses)
    balanced, after = update(losses, state, gram=gram)
    weights = jax.grad(lambda x: update(x, state, gram=gram)[0].sum())(losses)
    np.testing.assert_allclose(weights, [0.0, 2 / 3, 1 / 6], rtol=1e-6)
    assert balanced[0] == 0
    mean = after.links[1].mean
    assert not mean.total[0].any()
    assert not mean.total[:, 0].any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_products_with_a_gram_matrix_stay_within_float32(sign):
    """Losses of 1e-15 and 1e15 behind the logarithm: derivatives of 1e15 and 1e-15."""
    losses = jnp.array([1e-15, 1.0, 1e15])
    sizes = sign * losses
    seen = []

    def update(losses, state, *, mask, gram, gradient_norms):
        seen.append((gram, gradient_norms))
        return losses, state

    probe = bilb.loss_transformation(lambda *_: (), update)
    chain = bilb.chain(bilb.log_losses(floor=1e-30), probe)
    gram = jnp.outer(sizes, sizes)
    chain.update(losses, chain.init(losses), gram=gram, gradient_norms=jnp.abs(sizes))
    np.testing.assert_allclose(seen[-1][0], jnp.ones((3, 3)), rtol=1e-5)
    np.testing.assert_allclose(seen[-1][1], jnp.ones(3), rtol=1e-5)


@pytest.mark.slow
def test_losses_after_are_seen_through_the_state_that_the_link_had():
    """A running statistic must not move between the losses before and after the step."""
    balancer = bilb.chain(bilb.log_scale_by_initial_loss(every=1), bilb.famo())
    before, after = jnp.array([2.0, 4.0]), jnp.array([1.0, 4.0])
    state = balancer.init(before)
    _, state = balancer.update(before, state, losses_after=jnp.zeros(2))
    _, state = balancer.update(jnp.ones(2) * 9, state, losses_after=after)
    # Behind the link the losses were log(2/2) and log(4/4): both at FAMO's bound of 0.
    np.testing.assert_allclose(state.links[1].logits, jnp.zeros(2), atol=1e-6)
    by_scale = bilb.chain(bilb.divide_by(jnp.array([2.0, 4.0])), bilb.famo())
    state = by_scale.init(before)
    _, state = by_scale.update(before, state, losses_after=jnp.zeros(2))
    _, state = by_scale.update(jnp.ones(2) * 9, state, losses_after=after)
    by_initial = bilb.chain(bilb.scale_by_initial_loss(), bilb.famo())
    other = by_initial.init(before)
    _, other = by_initial.update(before, other, losses_after=jnp.zeros(2))
    _, other = by_initial.update(jnp.ones(2) * 9, other, losses_after=after)
    np.testing.assert_allclose(other.links[1].logits, state.links[1].logits, rtol=1e-6)
    assert (state.links[1].logits != 0).all()


@pytest.mark.parametrize(
    ("links", "given", "message"),
    [
        ((), {}, "at least one link"),
        ((bilb.pmean_losses("data"), bilb.mgda()), {"gram": jnp.eye(2)}, "pmean_losses"),
        (
            (bilb.marigold(), bilb.famo()),
            {"slopes": jnp.zeros(2), "losses_after": jnp.zeros(2)},
            "`slopes`: put the method that reads `losses_after` in front",
        ),
    ],
    ids=["nothing", "pmean", "losses_after"],
)
def test_what_cannot_be_carried_is_an_error(links, given, message):
    losses = jnp.ones(2)

    def update():
        balancer = bilb.chain(*links)
        return balancer.update(losses, balancer.init(losses), **given)

    with pytest.raises((TypeError, ValueError), match=message):
        jax.vmap(lambda _: update(), axis_name="data")(jnp.zeros(2))


def test_an_own_argument_is_not_carried_through_links_in_front():
    def update(losses, state, *, my_curvature):
        return my_curvature[:, 0] * losses, state

    own = bilb.loss_transformation(lambda *_: (), update, reads=("my_curvature",))
    losses, given = jnp.ones(2), {"my_curvature": jnp.ones((2, 3))}
    balanced, _ = own.update(losses, own.init(losses), **given)
    assert (balanced == 1).all()
    chain = bilb.chain(bilb.log_losses(), own)
    with pytest.raises(TypeError, match=r"`my_curvature`.*put the method that reads it first"):
        chain.update(losses, chain.init(losses), **given)
    with pytest.raises(TypeError, match=r"`my_curvature`.*bilb\.chain"):
        bilb.log_losses().update(losses, optax.EmptyState(), **given)


def test_slopes_of_any_weights_are_those_of_the_losses_behind_the_links():
    weights, gram = jnp.array([0.3, 0.7]), jnp.array([[2.0, -1.0], [-1.0, 5.0]])

    def update(losses, state, *, mask, slope_fn):
        return losses, slope_fn(weights)

    link = bilb.loss_transformation(lambda num_tasks, dtype: jnp.zeros(num_tasks, dtype), update)
    balancer, losses = bilb.chain(bilb.log_losses(), link), jnp.array([2.0, 0.5])
    state = balancer.init(losses)
    _, state = balancer.update(losses, state, slope_fn=lambda w: gram @ w)
    np.testing.assert_allclose(state.links[1], (gram / losses[:, None] / losses) @ weights)


def test_a_chain_among_the_links_counts_as_its_links():
    nested = bilb.chain(bilb.chain(bilb.log_losses(), bilb.igb_v1(0, 1)), bilb.mgda())
    flat = bilb.chain(bilb.log_losses(), bilb.igb_v1(0, 1), bilb.mgda())
    losses = jnp.array([5.0, 9.0])
    chex.assert_trees_all_equal_structs(nested.init(losses), flat.init(losses))
