"""What methods read about the losses: entries that are not finite, huge, zero, or degenerate."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import assert_close, assert_finite, compiled, example_losses, spoiled, warm
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from methods import METHODS

import bilb
from bilb import arguments
from bilb.chain import Chain

K, TASK = 5, 1
WITHOUT = np.arange(K) != TASK
READERS = [m for m in METHODS if m.about_losses(K)]
every_reader = pytest.mark.parametrize("method", READERS, ids=str, scope="module")


ONLY_FUNCTIONS = [m for m in READERS if "slope_fn" in m.keywords(m.extra(jnp.ones(K)))]
READS_ARRAYS = [m for m in READERS if m not in ONLY_FUNCTIONS]
every_array = pytest.mark.parametrize("method", READS_ARRAYS, ids=str, scope="module")


def without_previous(state):
    """Returns a state that says the task was absent in the previous call."""

    def change(path, leaf):
        return leaf & WITHOUT if jax.tree_util.keystr(path).endswith(".present") else leaf

    return jax.tree_util.tree_map_with_path(change, state)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@every_array
def test_an_entry_that_is_not_finite_is_an_absent_task(method, value):
    transformation, update = compiled(method, K)
    state, losses = warm(method, K)
    extra = method.extra(losses)
    actual = update(losses, state, extra=spoiled(extra, TASK, value))
    assert_finite(actual)
    if isinstance(transformation, Chain) and len(transformation.links) > 1:
        return
    if any(arguments.ABOUT_LOSSES[name].lagged for name in method.about_losses(K)):
        expected = update(losses, without_previous(state), extra=extra)
    else:
        expected = update(losses, state, WITHOUT, extra)
        assert not actual[2][TASK]
    assert_close(actual, expected)


def test_a_product_that_is_not_finite_leaves_both_tasks_out():
    """The norms of both are finite; those of tasks that are out anyway do not count."""
    gram = jnp.eye(4).at[0, 2].set(jnp.nan).at[2, 0].set(jnp.nan)
    np.testing.assert_array_equal(arguments.finite_rows(gram, 2), [False, True, False, True])
    gram = jnp.eye(4).at[1].set(jnp.inf).at[:, 1].set(jnp.inf)
    np.testing.assert_array_equal(arguments.finite_rows(gram, 2), [True, False, True, True])


@every_array
def test_one_huge_entry_does_not_end_the_learning(method):
    _, update = compiled(method, K)
    state, losses = warm(method, K)
    _, state, _ = update(losses, state, extra=spoiled(method.extra(losses), TASK, 1e20))
    assert_finite(state)
    first = state
    for row in example_losses(40, K, seed=3):  # so long that running means forget it
        balanced, state, _ = update(row, state)
    assert_finite((balanced, state))
    # Some are learnt once, and weights without memory say nothing.
    learnt = {*method.learns} - {"weights", "mean", "initial_losses", "count", "started"}
    for name in learnt:
        before, after = optax.tree.get(first, name), optax.tree.get(state, name)
        moved = jax.tree.map(lambda a, b: (a != b).any(), before, after)
        assert any(jax.tree.leaves(moved)), name


@every_reader
def test_nothing_but_zeros_is_finite(method):
    _, update = compiled(method, K)
    state, losses = warm(method, K)
    zeros = jax.tree.map(jnp.zeros_like, method.extra(losses))
    for _ in range(2):
        balanced, state, gradient = update(losses, state, extra=zeros)
        assert_finite((balanced, state, gradient))


def sizes(exponent):
    return st.one_of(st.just(0.0), st.floats(-exponent, exponent).map(lambda e: 10.0**e))


def arrays(shape, elements):
    return npst.arrays(np.float32, shape, elements=elements, fill=st.nothing())


@st.composite
def about_losses(draw):
    """Returns norms, slopes, losses and Gram matrices, of any rank, far beyond any useful size."""
    rank = draw(st.integers(1, K))
    entries = st.integers(-3, 3).map(float)
    rows = draw(arrays((K, rank), entries)) * draw(arrays((K, 1), sizes(8)))
    signed = sizes(18).flatmap(lambda x: st.sampled_from([np.float32(x), np.float32(-x)]))
    return {
        "gram": jnp.asarray(rows @ rows.T),
        "gradient_norms": jnp.asarray(draw(arrays(K, sizes(18).map(np.float32)))),
        "slopes": jnp.asarray(draw(arrays(K, signed))),
        "losses_after": jnp.asarray(draw(arrays(K, signed))),
        "curvatures": jnp.asarray(draw(arrays(K, signed))),
    }


@every_reader
@settings(max_examples=25)
@given(told=st.tuples(about_losses(), about_losses()))
def test_whatever_is_told_state_and_weights_stay_finite(method, told):
    transformation, update = compiled(method, K)
    losses = example_losses(K)
    state = transformation.init(losses)
    for about in told:
        usual = method.extra(losses)
        extra = {name: about.get(name, usual[name]) for name in usual}
        balanced, state, gradient = update(losses, state, extra=extra)
        assert_finite((balanced, state, gradient))


class TestOwnMethods:
    """Methods of users, by `bilb.loss_transformation` and by hand."""

    task_losses = staticmethod(lambda x: jnp.stack([jnp.sum((x - 1) ** 2), 4 * jnp.sum(x**2)]))
    x = np.full(2, 2.0, np.float32)

    def run(self, balancer):
        value_and_grad = bilb.value_and_grad(self.task_losses, balancer)
        state = value_and_grad.init(self.x)
        for _ in range(2):
            losses, gradient, state = value_and_grad(self.x, state)
        return losses, gradient, state

    def test_a_required_keyword_is_supplied(self):
        seen = []

        def update(losses, state, *, slopes, gradient_norms):
            seen.append((slopes, gradient_norms))
            return losses, state

        balancer = bilb.loss_transformation(lambda *_: (), update)
        _, gradient, _ = self.run(balancer)
        jacobian = jax.jacrev(self.task_losses)(self.x)
        slopes, norms = seen[-1]
        np.testing.assert_allclose(slopes, jacobian @ gradient, rtol=1e-6)
        np.testing.assert_allclose(norms, jnp.linalg.norm(jacobian, axis=1), rtol=1e-6)

    def test_a_transformation_by_hand_is_asked_likewise(self):
        def update(losses, state, params=None, *, gram, **extra):
            return losses / jnp.sqrt(jnp.diagonal(gram)), state

        balancer = optax.GradientTransformationExtraArgs(lambda losses: (), update)
        _, gradient, _ = self.run(balancer)
        jacobian = jax.jacrev(self.task_losses)(self.x)
        expected = (jacobian / jnp.linalg.norm(jacobian, axis=1, keepdims=True)).sum(0)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)

    def test_what_no_driver_knows_is_named(self):
        def update(losses, state, *, my_weights):
            return my_weights * losses, state

        balancer = bilb.loss_transformation(lambda *_: (), update)
        with pytest.raises(bilb.MissingArgument, match="`my_weights`: pass it to update"):
            self.run(balancer)
        value_and_grad = bilb.value_and_grad(self.task_losses, balancer)
        state = value_and_grad.init(self.x, my_weights=jnp.ones(2))
        _, gradient, state = value_and_grad(self.x, state, my_weights=jnp.array([1.0, 0.0]))
        np.testing.assert_allclose(gradient, 2 * (self.x - 1))
        np.testing.assert_array_equal(state.effective_weights, [1.0, 0.0])

    def test_an_error_of_the_users_own_is_not_swallowed(self):
        def task_losses(x):
            return undefined_name(x)  # noqa: F821

        with pytest.raises(NameError, match="undefined_name"):
            bilb.value_and_grad(task_losses, bilb.mgda()).init(self.x)

        def update(losses, state, **_):
            return undefined_name(losses), state  # noqa: F821

        own = bilb.loss_transformation(lambda *_: (), update)
        with pytest.raises(NameError, match="undefined_name"):
            bilb.value_and_grad(self.task_losses, own).init(self.x)

    def test_without_a_mask_a_mask_is_an_error(self):
        own = bilb.loss_transformation(lambda *_: (), lambda losses, state: (losses, state))
        with pytest.raises(TypeError, match="takes no mask"):
            own.update(jnp.ones(2), (), mask=jnp.ones(2, bool))


def test_effective_weights_are_the_derivative_of_the_objective():
    """Whatever the chain holds, and by both drivers."""
    task_losses = TestOwnMethods.task_losses
    x = jnp.array([2.0, 3.0])
    balancer = bilb.chain(bilb.log_losses(), bilb.divide_by(2.0), bilb.linear_scalarization(3.0))
    value_and_grad = bilb.value_and_grad(task_losses, balancer)
    losses, _, state = value_and_grad(x, value_and_grad.init(x))
    np.testing.assert_allclose(state.effective_weights, 1.5 / losses, rtol=1e-6)
    aggregator = bilb.aggregate_by(balancer, 2)
    losses, gradients = bilb.task_gradients(task_losses, x)
    _, state = aggregator.update(gradients, aggregator.init(x), x, losses=losses)
    np.testing.assert_allclose(state.effective_weights, 1.5 / losses, rtol=1e-6)
    chex.assert_type(state.effective_weights, jnp.float32)
