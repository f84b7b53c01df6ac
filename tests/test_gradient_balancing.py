"""What the methods on the Gram matrix do: independent batches, special cases, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_close, assert_equal, mostly_slow

import bilb


def weights_of(balancer, gram, mask=None):
    """Returns the weights of a method's first call, 0 for absent tasks."""
    gram = jnp.asarray(gram, jnp.float32)
    losses = jnp.ones(gram.shape[0])
    balanced, _ = balancer.update(losses, balancer.init(losses), gram=gram, mask=mask)
    return np.asarray(balanced)


def of_rows(*rows):
    rows = np.array(rows, np.float32)
    return rows @ rows.T


def task_losses(params, x):
    outputs = jnp.tanh(x @ params["in"]) @ params["out"]
    return jnp.mean((outputs - jnp.sin(x[:, :3])) ** 2, axis=0)


def batch(seed):
    return jax.random.normal(jax.random.key(seed), (6, 4))


def params():
    first, second = jax.random.split(jax.random.key(0))
    return {"in": jax.random.normal(first, (4, 5)), "out": jax.random.normal(second, (5, 3)) / 2}


def jacobian(x):
    _, gradients = bilb.task_gradients(task_losses, params(), x)
    return np.concatenate([leaf.reshape(3, -1) for leaf in jax.tree.leaves(gradients)], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "balancer",
    [bilb.sdmgrad(learning_rate=0.5, steps=50), bilb.modo(0.01), bilb.modo(0.01, decay=0.5)],
    ids=["sdmgrad", "modo", "modo-decay"],
)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_batches_of_their_own_for_the_three_factors(balancer, number):
    """The gradient is the step's own batch's; the Gram matrix has task i of the first in row i."""
    own, first, second = (batch(seed) for seed in range(3))
    gram_args = {1: None, 2: (first,), 3: [(first,), (second,)]}[number]
    left, right = {1: (own, own), 2: (first, own), 3: (first, second)}[number]
    value_and_grad = bilb.value_and_grad(task_losses, balancer)
    step = jax.jit(lambda state: value_and_grad(params(), state, own, gram_args=gram_args))
    state = value_and_grad.init(params(), own)
    expected = state.balancer
    for _ in range(2):
        losses, grads, state = step(state)
        gram = jacobian(left) @ jacobian(right).T
        _, expected = balancer.update(losses, expected, gram=jnp.asarray(gram))
        assert_close(state.balancer, expected, rtol=1e-4)
        direction = expected.weights @ jacobian(own)
        flat = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])
        np.testing.assert_allclose(flat, direction, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected.weights) > 1e-3
    # Rows and columns do not mean the same.
    if number > 1:
        _, transposed = balancer.update(
            losses, value_and_grad.init(params(), own).balancer, gram=gram.T
        )
        assert np.abs(transposed.memory - expected.memory).max() > 1e-5


@pytest.mark.slow
def test_the_exact_sdmgrad_is_where_small_steps_end():
    gram = of_rows([1, 0.2, 0], [-0.5, 1, 0.3], [0.1, -0.4, 2])
    steps = weights_of(bilb.sdmgrad(steps=2000, learning_rate=0.1, momentum=0.0), gram)
    np.testing.assert_allclose(weights_of(bilb.sdmgrad(steps=None), gram), steps, atol=1e-4)
    # With no pull it is MGDA.
    mgda = weights_of(bilb.mgda(), gram)
    np.testing.assert_allclose(weights_of(bilb.sdmgrad(0.0, steps=None), gram), mgda, atol=1e-5)


def test_sdmgrad_keeps_its_weights_where_the_product_says_nothing():
    balancer = bilb.sdmgrad()
    losses = jnp.ones(2)
    _, state = balancer.update(losses, balancer.init(losses), gram=jnp.diag(jnp.array([4.0, 1.0])))
    _, after = balancer.update(losses, state, gram=-jnp.eye(2))
    np.testing.assert_array_equal(after.memory, state.memory)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize("balancer", [bilb.modo(10.0), bilb.sdmgrad()], ids=["modo", "sdmgrad"])
def test_simplex_weights_keep_their_sum_at_any_scale(balancer, scale):
    gram = scale**2 * of_rows([1, 0.2, 0], [-0.5, 1, 0.3], [0.1, -0.4, 2])
    weights = weights_of(balancer, gram)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-6)


def test_pcgrad_of_two_tasks_projects_both():
    rows = np.array([[1.0, 0.0], [-1.0, 1.0]], np.float32)
    projected = [rows[0] + rows[1] / 2, rows[1] + rows[0]]
    np.testing.assert_allclose(weights_of(bilb.pcgrad(), of_rows(*rows)) @ rows, sum(projected))
    # What does not conflict is summed.
    np.testing.assert_array_equal(weights_of(bilb.pcgrad(), of_rows([1, 0], [1, 1])), [1, 1])


@pytest.mark.parametrize("method", mostly_slow([bilb.pcgrad, bilb.gradvac], [bilb.pcgrad]))
def test_the_orders_are_drawn_anew_and_by_the_key(method):
    """Three gradients in the plane, all in conflict: the order decides."""
    gram = of_rows([1, 0], [-0.6, 1.2], [-0.5, -1.1])
    losses = jnp.ones(3)
    balancer = method(key=3)
    update = jax.jit(lambda state: balancer.update(losses, state, gram=jnp.asarray(gram))[1])
    state, seen = balancer.init(losses), set()
    for _ in range(20):
        state = update(state)
        seen.add(tuple(np.asarray(state.weights).round(4).tolist()))
    assert len(seen) > 3
    same = weights_of(method(key=3), gram)
    np.testing.assert_array_equal(same, weights_of(method(key=3), gram))
    assert any((weights_of(method(key=k), gram) != same).any() for k in range(4, 12))


def test_gradvac_turns_a_gradient_to_its_usual_cosine():
    """After a call on gradients that agree, those that agree less are turned back."""
    balancer = bilb.gradvac(beta=1.0)
    losses = jnp.ones(2)
    agree = of_rows([1, 0], [0.6, 0.8])
    _, state = balancer.update(losses, balancer.init(losses), gram=jnp.asarray(agree))
    np.testing.assert_allclose(state.weights, 1)
    np.testing.assert_allclose(state.memory.cosines, [[0, 0.6], [0.6, 0]], atol=1e-6)
    rows = np.array([[1, 0], [0.0, 2.0]], np.float32)
    _, state = balancer.update(losses, state, gram=jnp.asarray(of_rows(*rows)))
    extra = np.asarray(state.weights) - 1
    turned = rows[0] + extra[1] * rows[1], rows[1] + extra[0] * rows[0]
    for gradient, other in zip(turned, rows[::-1]):
        cosine = gradient @ other / np.linalg.norm(gradient) / np.linalg.norm(other)
        assert cosine == pytest.approx(0.6, abs=1e-6)


def test_gradvac_with_a_usual_cosine_of_one_stays_finite():
    balancer = bilb.gradvac(beta=1.0)
    losses = jnp.ones(2)
    _, state = balancer.update(losses, balancer.init(losses), gram=jnp.ones((2, 2)))
    _, state = balancer.update(losses, state, gram=jnp.eye(2))
    assert np.isfinite(state.weights).all()


def test_gradients_below_the_smallest_norm_are_not_projected():
    """It bounds the trace of the Gram matrix, whatever this one is divided by."""
    gram = jnp.array([[4.0, -1.9], [-1.9, 1.0]]) / 5
    balancer = bilb.dualproj(norm_eps=0.01)
    np.testing.assert_allclose(weights_of(balancer, 0.009 * gram), [0.5, 0.5])
    assert (weights_of(balancer, 0.011 * gram) > 0.5).any()


def test_imtl_g_has_equal_projections_and_config_equal_cosines():
    rows = np.random.default_rng(0).normal(size=(4, 9)) * np.array([[1e-3], [1], [10], [1e3]])
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for balancer in (bilb.imtl_g(), bilb.config()):
        direction = weights_of(balancer, rows @ rows.T) @ rows
        projections = units @ direction
        np.testing.assert_allclose(projections, projections.mean(), rtol=1e-2)
    total = rows @ (direction / np.linalg.norm(direction))
    assert np.linalg.norm(direction) == pytest.approx(total.sum(), rel=1e-3)
    # A preference decides the proportions.
    preference = jnp.array([1.0, 2.0, 3.0, 4.0])
    direction = weights_of(bilb.config(preference=preference), rows @ rows.T) @ rows
    cosines = units @ direction / preference
    np.testing.assert_allclose(cosines, cosines.mean(), rtol=1e-2)


FAIR = {
    "nash_mtl": (bilb.nash_mtl, 1.0),
    "fairgrad_2": (lambda **more: bilb.fairgrad(2.0, **more), 2.0),
    "fairgrad_0.5": (lambda **more: bilb.fairgrad(0.5, **more), 0.5),
}


@pytest.mark.parametrize(("make", "alpha"), FAIR.values(), ids=FAIR)
class TestPreferenceOfFairShares:
    rows = np.random.default_rng(3).normal(size=(4, 9)) * np.array([[0.3], [1], [2], [5]])
    preference = np.array([1.0, 0.1, 7.0, 10.0])

    def test_the_equation(self, make, alpha):
        gram = self.rows @ self.rows.T
        weights = weights_of(make(preference=self.preference), gram)
        expected = (self.preference / weights) ** (1 / alpha)
        np.testing.assert_allclose(gram @ weights, expected, rtol=1e-3)
        for one in (1.0, np.ones(4)):
            np.testing.assert_array_equal(
                weights_of(make(preference=one), gram), weights_of(make(), gram)
            )

    def test_a_task_that_is_there_three_times_is_what_it_is_alone(self, make, alpha):
        whole = weights_of(make(preference=self.preference), self.rows @ self.rows.T) @ self.rows
        parts = np.concatenate([self.rows, self.rows[-1:], self.rows[-1:]])
        shares = np.append(self.preference[:3], [self.preference[3] / 3] * 3)
        weights = weights_of(make(preference=shares), parts @ parts.T)
        np.testing.assert_allclose(weights[3:], weights[3], rtol=1e-3)
        np.testing.assert_allclose(weights @ parts, whole, rtol=1e-3, atol=1e-4)

    def test_zero_leaves_a_task_out(self, make, alpha):
        gram = self.rows @ self.rows.T
        weights = weights_of(make(preference=np.array([1.0, 0.0, 1.0, 1.0])), gram)
        left = [0, 2, 3]
        assert weights[1] == 0
        np.testing.assert_allclose(
            weights[left], weights_of(make(), gram[np.ix_(left, left)]), rtol=1e-5
        )
        assert not weights_of(make(preference=0.0), gram).any()

    def test_what_is_none(self, make, alpha):
        with pytest.raises(ValueError, match=r"preference must be >= 0.*-1"):
            make(preference=jnp.array([1.0, -1.0, 1.0, 1.0]))
        with pytest.raises(ValueError, match="preference"):
            weights_of(make(preference=jnp.ones(3)), np.eye(4))


def test_nash_mtl_bounds_the_norm_under_a_preference():
    rows = np.random.default_rng(3).normal(size=(3, 9))
    for preference, norm in ((np.array([1.0, 4.0, 4.0]), 2.0), (0.01, 0.03**0.5), (0.0, 0.0)):
        balancer = bilb.nash_mtl(2.0, preference=preference)
        direction = weights_of(balancer, rows @ rows.T) @ rows
        assert np.linalg.norm(direction) == pytest.approx(norm, rel=1e-4)


def test_imtl_g_of_dependent_gradients_is_the_solution_of_least_norm():
    rows = np.random.default_rng(2).normal(size=(4, 2)) * np.array([[1.0], [2.0], [0.5], [3.0]])
    solution = np.linalg.pinv(rows @ rows.T) @ np.linalg.norm(rows, axis=1)
    weights = weights_of(bilb.imtl_g(), rows @ rows.T)
    np.testing.assert_allclose(weights, solution / solution.sum(), rtol=1e-3)


def test_imtl_g_ascends_where_the_solution_has_a_negative_sum():
    rows = np.array([[2.0, 3.0, -2.0], [-2.0, -2.0, -2.0], [0.0, 0.0, -1.0]])
    weights = weights_of(bilb.imtl_g(), rows @ rows.T)
    assert weights.sum() == pytest.approx(1, abs=1e-4)
    assert (rows @ (weights @ rows) < 0).all()


@pytest.mark.slow
def test_aligned_components_have_one_length():
    rows = np.random.default_rng(1).normal(size=(3, 7))
    gram = rows @ rows.T
    eigenvalues = np.linalg.eigvalsh(gram)
    for scale, sigma in [
        ("min", eigenvalues[0]),
        ("median", eigenvalues[1]),
        ("rmse", eigenvalues.mean()),
    ]:
        # The columns of the transformation, one for each preference.
        one_hots = np.eye(3, dtype=np.float32)
        columns = [weights_of(bilb.aligned_mtl(scale, preference=e), gram) for e in one_hots]
        aligned = np.array(columns) @ gram @ np.array(columns).T
        np.testing.assert_allclose(aligned, sigma * np.eye(3), atol=1e-4 * eigenvalues[-1])


@pytest.mark.slow
def test_pcd_gives_the_others_their_share_and_no_more():
    rows = np.array([[1.0, 0.0, 0.0], [-1.0, 2.0, 0.0], [0.0, 0.0, 3.0]], np.float32)
    direction = weights_of(bilb.pcd(tau=0.2, eps=0.0), of_rows(*rows)) @ rows
    assert np.linalg.norm(direction) == pytest.approx(1, abs=1e-5)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    # Before it gets the length of the primary gradient, the share of both others is τ.
    shares = units[1:] @ direction
    np.testing.assert_allclose(shares, shares[0], rtol=1e-4)
    assert shares[0] > 0
    # Tasks that agree anyway get nothing extra.
    agreeing = of_rows([1, 0, 0], [1, 1, 0], [1, 0, 1])
    np.testing.assert_allclose(weights_of(bilb.pcd(tau=0.2), agreeing), [1, 0, 0], atol=1e-6)
    # Another primary task is the same problem in another order.
    order = [1, 0, 2]
    swapped = weights_of(bilb.pcd(tau=0.2, eps=0.0, primary=1), of_rows(*rows[order]))
    np.testing.assert_allclose(swapped @ rows[order], direction, atol=1e-5)


def test_pcd_drops_shares_that_exclude_each_other():
    gram = of_rows([1, 0, 0], [0, 1, 0], [0, -1, 0])
    np.testing.assert_allclose(weights_of(bilb.pcd(tau=0.1), gram), [1, 0, 0], atol=1e-6)


@pytest.mark.slow
def test_pcd_follows_nobody_without_its_primary_task():
    gram = of_rows([1, 0], [0, 1])
    assert not weights_of(bilb.pcd(), gram, mask=jnp.array([False, True])).any()
    assert not weights_of(bilb.pcd(), of_rows([0, 0], [0, 1])).any()


def test_krum_leaves_outliers_out():
    rows = np.concatenate([np.eye(5, 6) + 3, [[-90.0] * 6]])
    weights = weights_of(bilb.krum(num_byzantine=1, num_selected=5), rows @ rows.T)
    np.testing.assert_allclose(weights, [0.2] * 5 + [0])
    # Of the present tasks alone.
    mask = jnp.array([True, True, False, False, False, True])
    weights = weights_of(bilb.krum(1, 2), rows @ rows.T, mask)
    np.testing.assert_allclose(weights, [0.5, 0.5, 0, 0, 0, 0])
    weights = weights_of(bilb.krum(1, 9), rows @ rows.T, mask)
    np.testing.assert_allclose(weights, np.array(mask) / 3, rtol=1e-6)


@pytest.mark.slow
def test_cr_mogm_asks_for_what_its_inner_method_reads():
    balancer = bilb.cr_mogm(bilb.mgda())
    losses = jnp.ones(2)
    with pytest.raises(bilb.MissingArgument, match="mgda needs the extra argument `gram`"):
        balancer.update(losses, balancer.init(losses))
    value_and_grad = bilb.value_and_grad(task_losses, bilb.cr_mogm(bilb.marigold()))
    state = value_and_grad.init(params(), batch(0))
    for seed in range(3):
        _, _, state = value_and_grad(params(), state, batch(seed))
    assert state.slopes.any()
    np.testing.assert_allclose(state.effective_weights, state.balancer.weights, rtol=1e-6)


@pytest.mark.slow
def test_cr_mogm_with_alpha_zero_is_its_inner_method_and_with_one_stands_still():
    losses = jnp.array([1.0, 2.0])
    grams = [jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(2)]
    inner = bilb.mgda()
    bare, frozen = bilb.cr_mogm(inner, 0.0), bilb.cr_mogm(inner, 1.0)
    states = [balancer.init(losses) for balancer in (inner, bare, frozen)]
    for gram in grams:
        states = [
            balancer.update(losses, state, gram=gram)[1]
            for balancer, state in zip((inner, bare, frozen), states)
        ]
    np.testing.assert_allclose(states[1].weights, states[0].weights, rtol=1e-6)
    np.testing.assert_allclose(states[2].weights, [0.2, 0.8], rtol=1e-5)
    assert_equal(states[1].inner, states[0])


def test_cr_mogm_starts_a_task_that_comes_late_at_its_own_first_weight():
    balancer = bilb.cr_mogm(bilb.log_losses(), 0.5)
    losses = jnp.array([2.0, 4.0])
    _, state = balancer.update(losses, balancer.init(losses), mask=jnp.array([True, False]))
    np.testing.assert_array_equal(state.started, [True, False])
    _, state = balancer.update(losses / 2, state)
    np.testing.assert_allclose(state.weights, [0.75, 0.5])


GRAM_METHODS = {
    "pcgrad": bilb.pcgrad,
    "gradvac": bilb.gradvac,
    "aligned_mtl": bilb.aligned_mtl,
    "aligned_mtl-median": lambda: bilb.aligned_mtl("median"),
    "aligned_mtl-rmse": lambda: bilb.aligned_mtl("rmse"),
    "imtl_g": bilb.imtl_g,
    "config": bilb.config,
    "krum": bilb.krum,
    "pcd": bilb.pcd,
    "modo": bilb.modo,
    "sdmgrad": bilb.sdmgrad,
    "sdmgrad-exact": lambda: bilb.sdmgrad(steps=None),
}
# (rows, the documented answer of some methods: the aggregate, or None for "finite")
SPECIAL = {
    "zero row": [[1, 0.5], [0, 0], [-0.5, 1]],
    "all zero": [[0, 0], [0, 0], [0, 0]],
    "opposite": [[1, 2], [-1, -2], [0, 0]],
    "duplicates": [[1, 2], [1, 2], [1, 2]],
    "more tasks than parameters": [[1, 0.5], [0.3, -2], [-0.5, 1]],
    "scales": [[1e-9, 0], [0, 1e9], [1, 1]],
}


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_special_gradients_have_finite_answers(name):
    balancer = GRAM_METHODS[name]()
    update = jax.jit(
        lambda gram: balancer.update(jnp.ones(3), balancer.init(jnp.ones(3)), gram=gram)[1].weights
    )
    weights = {}
    for case, rows in SPECIAL.items():
        rows = np.array(rows, np.float32)
        weights[case] = np.asarray(update(jnp.asarray(rows @ rows.T)))
        assert np.isfinite(weights[case]).all(), case
    aggregate = {case: w @ np.array(SPECIAL[case]) for case, w in weights.items()}
    if name in ("pcgrad", "gradvac", "config", "sdmgrad-exact"):
        # Opposite gradients cancel.
        np.testing.assert_allclose(aggregate["opposite"], 0, atol=1e-3)
    if name in ("imtl_g", "config"):
        assert not weights["all zero"].any()
        assert weights["zero row"][1] == 0
    if name != "krum":
        along = aggregate["duplicates"] / np.array([1, 2])
        np.testing.assert_allclose(along, along[0], rtol=1e-4)
        assert along[0] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bilb.aligned_mtl("max"), 'scale must be "min", "median" or "rmse"'),
        (lambda: bilb.krum(-1), "num_byzantine must be >= 0"),
        (lambda: bilb.krum(0, 0), "num_selected must be >= 1"),
        (lambda: bilb.gradvac(1.5), "beta must be >= 0 and <= 1"),
        (lambda: bilb.pcd(1.5), "tau must be >= 0 and <= 1"),
        (lambda: bilb.pcd(beta=1.0), "beta must be < 1"),
        (lambda: bilb.pcd(primary=3).init(jnp.ones(3)), "primary must be one of 3 tasks; got 3"),
        (lambda: bilb.pcd(jnp.ones(2) / 2).init(jnp.ones(3)), "tau must be one number or have"),
        (lambda: bilb.modo(0.0), "gamma must be > 0"),
        (lambda: bilb.sdmgrad(-1.0), "lamb must be >= 0"),
        (lambda: bilb.sdmgrad(steps=0), "steps must be >= 1"),
        (lambda: bilb.cr_mogm(bilb.mgda(), 2.0), "alpha must be >= 0 and <= 1"),
        (lambda: bilb.pcgrad(decay=1.0), "decay must be < 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hyperparameters_outside_their_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
