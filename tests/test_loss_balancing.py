"""What the loss-balancing methods promise beyond the contract that all of them share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import logsumexp, softmax

import bilb

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5)


def run(balancer, rows, masks=None, **extra):
    """Returns the balanced losses (T, K), the weights (T, K) and the last state."""
    rows = jnp.asarray(rows, jnp.result_type(float))
    masks = jnp.ones(rows.shape, bool) if masks is None else jnp.asarray(masks)

    def step(state, inputs):
        losses, mask = inputs
        balanced, state = balancer.update(losses, state, mask=mask, **extra)
        return state, (balanced, optax.tree.get(state, "weights"))

    scan = jax.jit(lambda state: jax.lax.scan(step, state, (rows, masks)))
    state, (balanced, weights) = scan(balancer.init(rows[0]))
    return balanced, weights, state


def train(balancer, task_losses, x, steps=5000, rate=1e-3):
    """Returns what gradient descent on the balanced losses ends at."""

    def step(carry, _):
        x, state = carry

        def objective(x):
            balanced, new_state = balancer.update(task_losses(x), state)
            return balanced.sum(), new_state

        gradient, new_state = jax.grad(objective, has_aux=True)(x)
        return (x - rate * gradient, new_state), None

    state = balancer.init(jax.eval_shape(task_losses, x))
    (x, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((x, state))
    return x, state


def two_parabolas(x):
    """Losses whose Pareto set is the segment between (1, 0) and (-1, 0)."""
    return jnp.sum((x - jnp.array([[1.0, 0.0], [-1.0, 0.0]])) ** 2, axis=1)


def test_rlw_draws_anew_and_repeats_with_its_key():
    rows = jnp.ones((2000, 3))
    _, weights, _ = run(bilb.rlw(key=3), rows)
    assert_close(weights.sum(1), 1.0)
    assert_close(weights.mean(0), 1 / 3, atol=0.02)
    assert len(np.unique(weights[:, 0])) > 1900
    np.testing.assert_array_equal(run(bilb.rlw(key=jax.random.key(3)), rows)[1], weights)
    assert not np.allclose(run(bilb.rlw(key=4), rows)[1], weights)


def test_rlw_sums_to_the_number_of_present_tasks():
    mask = jnp.array([[True, False, True, True]])
    balanced, _, _ = run(bilb.rlw(sum_to="tasks"), jnp.ones((1, 4)), mask)
    assert_close(balanced.sum(), 3.0)
    assert_close(run(bilb.rlw(sum_to="one"), jnp.ones((1, 4)), mask)[0].sum(), 1.0)


@pytest.mark.slow
def test_rlw_samples_from_the_given_distribution():
    _, weights, _ = run(bilb.rlw(sample=jax.random.uniform), jnp.ones((500, 3)))
    assert (weights.max(1) / weights.min(1)).max() <= np.e + 1e-5


def dwa_by_hand(rows, window, temperature):
    """DWA of the paper for tasks that are always present: weights (T, K)."""
    means = rows.reshape(-1, window, rows.shape[1]).mean(1)
    weights = []
    for step in range(len(rows)):
        epoch = step // window
        ratio = means[epoch - 1] / means[epoch - 2] if epoch >= 2 else np.ones(rows.shape[1])
        weights.append(rows.shape[1] * softmax(ratio / temperature))
    return np.stack(weights)


def test_dwa_follows_the_ratio_of_the_last_two_windows():
    rows = np.random.default_rng(0).uniform(0.5, 2.0, (12, 3))
    _, weights, _ = run(bilb.dwa(0.7, window=3), rows)
    assert_close(weights, dwa_by_hand(rows, 3, 0.7))
    np.testing.assert_array_equal(weights[:6], 1.0)


def test_dwa_favours_the_loss_that_falls_more_slowly():
    rows = np.stack([0.9 ** np.arange(40), 0.99 ** np.arange(40)], 1)
    for sliding in (False, True):
        _, weights, _ = run(bilb.dwa(window=5, sliding=sliding), rows)
        assert (weights[15:, 1] > weights[15:, 0]).all()


def test_dwa_windows_hold_the_losses_of_a_task_where_it_is_present():
    """Present in every other update, a task has the windows of the losses it has shown."""
    rows = np.random.default_rng(1).uniform(0.5, 2.0, (16, 2))
    masks = np.ones((16, 2), bool)
    masks[1::2, 1] = False
    _, _, state = run(bilb.dwa(window=4), rows, masks)
    assert_close(state.last_mean, [rows[8:12, 0].mean(), rows[8:12:2, 1].mean()])
    assert_close(state.earlier_mean, [rows[4:8, 0].mean(), rows[4:8:2, 1].mean()])
    assert_close(state.running_mean, [rows[12:, 0].mean(), rows[12::2, 1].mean()])
    # Absent when a window ends and for a whole window: its last complete ones are older.
    masks[:] = True
    masks[6:13, 1] = False
    _, weights, state = run(bilb.dwa(window=4), rows, masks)
    assert_close(state.last_mean[1], rows[4:6, 1].mean())
    assert_close(state.earlier_mean[1], rows[:4, 1].mean())
    ratio = np.array(state.last_mean / state.earlier_mean)
    assert_close(weights[-1], 2 * softmax(ratio / 2))


@pytest.mark.parametrize("sliding", [False, True])
def test_dwa_keeps_nonfinite_losses_out_of_its_windows(sliding):
    rows = np.random.default_rng(2).uniform(0.5, 2.0, (9, 2))
    rows[4, 0] = np.nan
    rows[5, 1] = np.inf
    balanced, weights, state = run(bilb.dwa(window=2, sliding=sliding), rows)
    assert np.isfinite(weights).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    np.testing.assert_array_equal(np.isfinite(balanced), np.isfinite(rows))


def test_dwa_survives_losses_that_are_zero_or_far_apart():
    _, weights, _ = run(bilb.dwa(window=1), [[0.0, 1.0]] * 3 + [[1.0, 1.0]] * 3)
    assert_close(weights, 1.0)
    rows = jnp.array([[1e-12, 3e-12], [1e12, 3e11], [1e12, 1e12], [1.0, 1.0]])
    _, weights, _ = run(bilb.dwa(0.3, window=1), rows)
    assert np.isfinite(weights).all()
    assert_close(weights.sum(1), 2.0)


def test_dwa_temperature_may_be_a_schedule_and_the_weights_may_sum_to_one():
    rows = np.random.default_rng(3).uniform(0.5, 2.0, (6, 3))
    warm = bilb.dwa(lambda step: 1.0 + step, window=1, sum_to="one")
    balanced, weights, _ = run(warm, rows)
    expected = softmax(rows[4] / rows[3] / 6.0)
    assert_close(weights[5], expected)
    assert_close(balanced[5], expected * rows[5])


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (bilb.linear_scalarization, lambda step: jnp.array([1.0, 2.0, 0.5]) * step),
        slow(lambda mu: bilb.stch(mu), lambda step: 0.1 + step),
        (lambda r: bilb.stch(preference=r), lambda step: 1.0 + step),
        slow(lambda r: bilb.pbi(preference=r), lambda step: jnp.array([1.0, 2.0, 0.5]) ** step),
        (lambda z: bilb.pbi(reference=z), lambda step: 0.1 * step),
        slow(
            lambda r: bilb.cosmos(2.0, preference=r), lambda step: jnp.array([0.5, 0.2, 0.5]) + step
        ),
    ],
    ids=["weights", "mu", "stch", "pbi", "reference", "cosmos"],
)
def test_schedules_are_those_of_the_step(make, numbers):
    rows = np.random.default_rng(9).uniform(0.5, 2.0, (3, 3))
    balanced, weights, state = run(make(numbers), rows)
    assert state.step == 3
    for step, row in enumerate(rows):
        constant = make(numbers(step))
        expected, expected_state = constant.update(row, constant.init(row))
        assert_close(balanced[step], expected, atol=1e-6)
        assert_close(weights[step], expected_state.weights, atol=1e-6)


def test_initial_losses_are_renewed_by_periods_counted_from_the_first_update():
    """A task that is absent when a period begins takes its own late, and the next one in time."""
    link = bilb.log_scale_by_initial_loss(every=3)
    state, taken = link.init(jnp.ones(2)), []
    update = jax.jit(link.update)
    for step in range(8):
        mask = jnp.array([True, step != 3])
        _, state = update(jnp.full(2, step + 1.0), state, mask=mask)
        taken.append(state.initial_losses)
    np.testing.assert_array_equal(jnp.stack(taken)[:, 0], [1, 1, 1, 4, 4, 4, 7, 7])
    np.testing.assert_array_equal(jnp.stack(taken)[:, 1], [1, 1, 1, 1, 5, 5, 7, 7])


def test_learnt_variances_become_the_losses():
    rows = jnp.tile(jnp.array([4.0, 0.5, 30.0]), (3000, 1))
    _, weights, state = run(bilb.uncertainty_weighting(), rows)
    assert_close(state.log_variances, jnp.log(rows[0]), atol=1e-3)
    assert_close(weights[-1], 0.5 / rows[0], rtol=1e-3)
    balanced, _, state = run(bilb.imtl_l(), rows)
    assert_close(jnp.exp(state.log_scales) * rows[0], 1.0, rtol=1e-3)
    assert_close(balanced[-1], 1.0 + jnp.log(rows[0]), rtol=1e-3)


def test_imtl_l_is_twice_uncertainty_weighting_with_the_opposite_sign():
    rows = np.random.default_rng(4).uniform(0.1, 9.0, (20, 3))
    optimizer = optax.chain(optax.scale(2.0), optax.sgd(0.05))  # of half the objective
    variances, _, uw = run(bilb.uncertainty_weighting(0.3, optimizer=optimizer), rows)
    scales, _, imtl = run(bilb.imtl_l(-0.3, optimizer=optax.sgd(0.05)), rows)
    assert_close(scales, 2 * variances)
    assert_close(imtl.log_scales, -uw.log_variances)


@pytest.mark.parametrize("factory", [bilb.uncertainty_weighting, bilb.imtl_l])
def test_exponents_of_losses_without_a_minimiser_stay_in_range(factory):
    rows = jnp.tile(jnp.array([0.0, -1.0, 1e-12, 1e12]), (6000, 1))
    balanced, weights, state = run(factory(), jnp.append(rows, rows[:1, ::-1], 0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((balanced, weights, state)))
    assert weights[-1, 0] > 1e15


def test_geometric_mean_does_not_depend_on_units():
    losses, units = jnp.array([2.0, 0.3, 7.0]), jnp.array([10.0, 0.1, 3.0])
    (balanced,), (weights,), _ = run(bilb.geometric_mean(), [losses])
    (scaled,), (scaled_weights,), _ = run(bilb.geometric_mean(), [losses * units])
    assert_close(balanced.sum() * jnp.prod(units) ** (1 / 3), scaled.sum())
    assert_close(weights * losses / balanced.sum(), scaled_weights * losses * units / scaled.sum())


def test_geometric_mean_takes_losses_at_the_floor_as_the_floor():
    (balanced,), (weights,), _ = run(bilb.geometric_mean(1e-4), [[0.0, -3.0, 2.0]])
    value = (1e-8 * 2.0) ** (1 / 3)
    assert_close(balanced.sum(), value, rtol=1e-4)
    assert_close(weights, [0.0, 0.0, value / 6.0])


def test_stch_goes_from_the_mean_to_the_maximum():
    losses = jnp.array([3.0, 1.0, 2.0])
    (balanced,), (weights,), _ = run(bilb.stch(1e-3), [losses])
    assert_close(balanced.sum(), 1.0)
    assert_close(weights, [1 / 3, 0.0, 0.0], atol=1e-6)
    _, (weights,), _ = run(bilb.stch(1e4), [losses])
    assert_close(weights, 1 / 9, rtol=1e-3)


def test_stch_of_large_losses_is_their_maximum():
    """The products of large exponents must not be fused with what is subtracted from them."""
    for mu in (0.5, 0.3, 7.0):
        for row in ([0.0, 0.0, 1e12], [9.7e11, 9.9e11, -1e12]):
            (balanced,), (weights,), _ = run(bilb.stch(mu, preference=jnp.full(3, 0.7)), [row])
            assert_close(balanced.sum(), 0.7 * max(row))
            assert_close(weights, 0.7 * (np.array(row) == max(row)))


def test_stch_equalises_the_weighted_losses():
    preference = jnp.array([1.0, 3.0])
    x, _ = train(bilb.stch(0.05, preference=preference), two_parabolas, jnp.array([0.3, 0.4]))
    ratio = two_parabolas(x) * preference
    assert_close(ratio[0], ratio[1], rtol=0.05)


def test_stch_nadir_changes_from_logarithms_to_their_smooth_maximum():
    rows = np.random.default_rng(5).uniform(0.5, 2.0, (8, 3))
    balanced, weights, state = run(bilb.stch_nadir(0.2, nadir_start=2, nadir_steps=3), rows)
    nadir = rows[2:5].mean(0)
    assert_close(state.nadir, nadir)
    assert_close(balanced[:5].sum(1), np.log(rows[:5]).sum(1))
    expected = 3 * 0.2 * logsumexp(np.log(rows[5:] / nadir) / 0.2, axis=1)
    assert_close(balanced[5:].sum(1), expected)
    assert_close((weights * rows).sum(1), 3.0)


def test_stch_nadir_of_a_task_that_comes_late():
    rows = np.random.default_rng(6).uniform(0.5, 2.0, (7, 3))
    masks = np.ones((7, 3), bool)
    masks[:4, 2] = False
    rows[1, 1] = np.nan
    balanced, _, state = run(bilb.stch_nadir(0.2, nadir_start=0, nadir_steps=2), rows, masks)
    nadir = [rows[:2, 0].mean(), rows[[0, 2], 1].mean(), rows[4:6, 2].mean()]
    assert_close(state.nadir, nadir)
    np.testing.assert_array_equal(state.count, 2)
    both = np.log(rows[4, :2] / nadir[:2]) / 0.2
    assert_close(balanced[4].sum(), 2 * 0.2 * logsumexp(both) + np.log(rows[4, 2]))
    assert_close(balanced[6].sum(), 3 * 0.2 * logsumexp(np.log(rows[6] / nadir) / 0.2))


def test_pbi_ends_on_the_ray_and_may_let_a_loss_rise():
    preference = jnp.array([1.0, 3.0])
    x, _ = train(bilb.pbi(preference=preference), two_parabolas, jnp.array([0.3, 0.4]))
    losses = two_parabolas(x)
    assert_close(losses[1] / losses[0], 3.0, rtol=0.05)
    _, (weights,), _ = run(bilb.pbi(), [[5.0, 1.0]])
    assert weights[0] > 0 > weights[1]
    _, (weights,), _ = run(bilb.pbi(0.0, preference=preference), [[5.0, 1.0]])
    assert_close(weights, preference / jnp.sqrt(10.0))


@pytest.mark.parametrize("factory", [bilb.stch, slow(bilb.pbi)])
def test_scalarisations_take_the_preference_of_the_call(factory):
    losses, given = jnp.array([2.0, 0.5]), jnp.array([0.9, 0.1])
    balancer, constant = factory(), factory(preference=given)
    balanced, _ = balancer.update(losses, balancer.init(losses), preference=given)
    expected, _ = constant.update(losses, constant.init(losses))
    np.testing.assert_array_equal(balanced, expected)


def test_cosmos_takes_the_preference_of_the_call():
    losses = jnp.array([2.0, 0.5])
    given = jnp.array([0.9, 0.1])
    balancer = bilb.cosmos(3.0)
    balanced, _ = balancer.update(losses, balancer.init(losses), preference=given)
    cosine = given @ losses / (jnp.linalg.norm(given) * jnp.linalg.norm(losses))
    assert_close(balanced.sum(), given @ losses - 3.0 * cosine)
    by_default, _ = balancer.update(losses, balancer.init(losses))
    equal, _ = balancer.update(losses, balancer.init(losses), preference=0.5)
    np.testing.assert_array_equal(by_default, equal)
    with pytest.raises(ValueError, match="preference must be one number or have an entry"):
        balancer.update(losses, balancer.init(losses), preference=jnp.ones(3))


def test_cosmos_of_zero_losses_is_finite():
    balanced, weights, _ = run(bilb.cosmos(2.0), [[0.0, 0.0]])
    np.testing.assert_array_equal(balanced, 0.0)
    assert np.isfinite(weights).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bilb.rlw(sum_to="K"), "sum_to"),
        (lambda: bilb.dwa(0.0, window=3), "temperature must be > 0; got 0.0"),
        (lambda: bilb.dwa(window=0), "window must be >= 1; got 0"),
        (lambda: bilb.dwa(window=2, sum_to="K"), "sum_to"),
        (lambda: bilb.uncertainty_weighting(jnp.ones(2)).init(jnp.ones(3)), "initial"),
        (lambda: bilb.imtl_l(jnp.ones(2)).init(jnp.ones(3)), "initial"),
        (lambda: bilb.imtl_l(jnp.nan), "initial"),
        (lambda: bilb.geometric_mean(0.0), "floor must be > 0"),
        (lambda: bilb.stch(-1.0), "mu must be > 0; got -1.0"),
        (lambda: bilb.stch(preference=[0.5, -0.5]), "preference must be >= 0"),
        (lambda: bilb.stch(reference=jnp.ones(2)).init(jnp.ones(3)), "reference"),
        (lambda: bilb.stch_nadir(nadir_start=-1, nadir_steps=1), "nadir_start"),
        (lambda: bilb.stch_nadir(nadir_start=0, nadir_steps=0), "nadir_steps"),
        (lambda: bilb.pbi(-1.0), "penalty must be >= 0"),
        (lambda: bilb.pbi(preference=jnp.ones(2)).init(jnp.ones(3)), "preference"),
        (lambda: bilb.cosmos(-1.0), "penalty must be >= 0"),
    ],
)
def test_wrong_hyperparameters_are_value_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
