"""Metrics against closed forms, the papers' tables and recorded high-precision solutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import mostly_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from bilb import metrics


def gram_of(jacobian):
    jacobian = jnp.asarray(jacobian)
    return jnp.matmul(jacobian, jacobian.T, precision="highest")


class TestDeltaM:
    def test_closed_form(self):
        # 20 % worse error, 10 % better accuracy.
        value = metrics.delta_m([1.2, 0.55], [1.0, 0.5], higher_is_better=[False, True])
        np.testing.assert_allclose(value, 5.0, rtol=1e-5)

    def test_lower_is_better_and_zero_for_the_base(self):
        base = jnp.array([2.0, 4.0])
        assert metrics.delta_m(base, base) == 0
        assert metrics.delta_m(0.9 * base, base) < 0
        assert metrics.delta_m(0.9 * base, base, higher_is_better=True) > 0

    def test_flat_mean_of_a_published_kind_of_table(self):
        # Segmentation (2), depth (2), normals (5): the papers average the nine numbers.
        higher = [True, True, False, False, False, False, True, True, True]
        base = np.array([38.30, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.14, 57.20, 69.15])
        values = np.array([39.29, 65.33, 0.5493, 0.2263, 28.15, 23.96, 22.09, 47.50, 61.08])
        sign = np.where(higher, -1, 1)
        expected = 100 * np.mean(sign * (values - base) / base)
        value = metrics.delta_m(values, base, higher_is_better=higher)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(value, 5.59, atol=0.01)

    def test_grouping_averages_within_tasks_first(self):
        base = jnp.ones(3)
        values = jnp.array([1.1, 1.3, 1.6])
        np.testing.assert_allclose(metrics.delta_m(values, base), 100 / 3, rtol=1e-5)
        grouped = metrics.delta_m(values, base, task=[0, 0, 1])
        np.testing.assert_allclose(grouped, (20 + 60) / 2, rtol=1e-5)

    def test_grouping_needs_neither_order_nor_consecutive_labels(self):
        base = jnp.ones(4)
        values = jnp.array([1.1, 1.6, 1.3, 1.2])
        expected = metrics.delta_m(values[jnp.array([0, 2, 3, 1])], base, task=[0, 0, 0, 1])
        shuffled = metrics.delta_m(values, base, task=[7, -3, 7, 7])
        np.testing.assert_allclose(shuffled, expected, rtol=1e-5)

    def test_tasks_of_one_size_give_the_flat_mean(self):
        values, base = jnp.array([1.1, 0.7, 1.6, 2.0]), jnp.array([1.0, 2.0, 3.0, 4.0])
        flat = metrics.delta_m(values, base)
        np.testing.assert_allclose(
            metrics.delta_m(values, base, task=[0, 0, 1, 1]), flat, rtol=1e-5
        )

    @pytest.mark.slow
    def test_leading_axes_jit_and_vmap(self):
        values = jnp.arange(1.0, 25.0).reshape(2, 3, 4)
        base = jnp.array([1.0, 2.0, 3.0, 4.0])
        whole = metrics.delta_m(values, base, task=[0, 1, 1, 1])
        assert whole.shape == (2, 3)
        function = lambda v, b, t: metrics.delta_m(v, b, task=t)
        one = jax.vmap(jax.vmap(function, (0, None, None)), (0, None, None))
        np.testing.assert_allclose(
            jax.jit(one)(values, base, jnp.array([0, 1, 1, 1])), whole, rtol=1e-5
        )
        np.testing.assert_allclose(
            metrics.delta_m(values, jnp.broadcast_to(base, values.shape), task=[0, 1, 1, 1]),
            whole,
            rtol=1e-6,
        )

    @settings(max_examples=25)
    @given(
        values=npst.arrays(np.float32, 4, elements=st.floats(0.125, 100, width=32)),
        base=npst.arrays(np.float32, 4, elements=st.floats(0.125, 100, width=32)),
        units=npst.arrays(np.float32, 4, elements=st.floats(0.125, 8, width=32)),
    )
    def test_units_do_not_matter(self, values, base, units):
        np.testing.assert_allclose(
            metrics.delta_m(values * units, base * units),
            metrics.delta_m(values, base),
            rtol=1e-3,
            atol=1e-2,
        )

    def test_zero_base_names_the_entry(self):
        with pytest.raises(ValueError, match="entry 1"):
            metrics.delta_m([1.0, 2.0], [1.0, 0.0])
        with pytest.raises(ValueError, match=r"entry \(1, 0\)"):
            metrics.delta_m(np.ones((2, 2)), [[1.0, 1.0], [0.0, 1.0]])

    def test_zero_base_known_at_run_time_propagates(self):
        assert jnp.isinf(jax.jit(metrics.delta_m)(jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])))

    @pytest.mark.parametrize(
        ("values", "base", "options", "message"),
        [
            (np.ones(3), np.ones(2), {}, r"\(3,\).*\(2,\)"),
            (np.ones((2, 3)), np.ones((3, 3)), {}, r"\(2, 3\).*\(3, 3\)"),
            (np.ones(3), np.float32(1), {}, r"\(\)"),
            (np.ones(0), np.ones(0), {}, "M >= 1"),
            (np.ones(3), np.ones(3), {"higher_is_better": [True, False]}, r"\(3,\).*\(2,\)"),
            (np.ones(3), np.ones(3), {"higher_is_better": [1, 0, 1]}, "bool"),
            (np.ones(3), np.ones(3), {"task": [0, 1]}, r"\(3,\).*\(2,\)"),
            (np.ones(3), np.ones(3), {"task": [0.0, 1.0, 1.0]}, "int"),
        ],
    )
    def test_bad_input(self, values, base, options, message):
        with pytest.raises(ValueError, match=message):
            metrics.delta_m(values, base, **options)


class TestMeanRank:
    def test_closed_form_with_signs(self):
        # Errors 9.5 < 46.8: compared as numbers.
        values = [[9.5, 0.7], [46.8, 0.9], [10.0, 0.8]]
        ranks = metrics.mean_rank(values, higher_is_better=[False, True])
        np.testing.assert_allclose(ranks, [2.0, 2.0, 2.0])
        np.testing.assert_allclose(metrics.mean_rank(values), [1.0, 3.0, 2.0])

    def test_ties_share_the_average_rank(self):
        ranks = metrics.mean_rank([[1.0], [0.0], [1.0], [1.0], [5.0]])
        np.testing.assert_allclose(ranks, [3.0, 1.0, 3.0, 3.0, 5.0])

    @pytest.mark.parametrize("higher_is_better", mostly_slow([False, True], fast=[False]))
    def test_nan_ranks_behind_infinity(self, higher_is_better):
        worst = -np.inf if higher_is_better else np.inf
        values = [[np.nan], [worst], [1.0], [np.nan]]
        ranks = metrics.mean_rank(values, higher_is_better=higher_is_better)
        np.testing.assert_allclose(ranks, [3.5, 2.0, 1.0, 3.5])

    @settings(max_examples=25)
    @given(
        npst.arrays(
            np.float32, (5, 3), elements=st.sampled_from([0.0, 1.0, 2.0, 3.5, -1.0, np.nan])
        )
    )
    def test_against_scipy_and_sum(self, values):
        stats = pytest.importorskip("scipy.stats")
        expected = np.mean(
            stats.rankdata(np.where(np.isnan(values), 1e9, values), axis=0, method="average"), 1
        )
        ranks = metrics.mean_rank(values)
        np.testing.assert_allclose(ranks, expected, rtol=1e-6)
        np.testing.assert_allclose(jnp.sum(ranks), 15.0, rtol=1e-6)

    @pytest.mark.slow
    def test_increasing_transformations_change_nothing(self):
        values = np.random.default_rng(0).normal(size=(6, 4))
        np.testing.assert_array_equal(
            metrics.mean_rank(values), metrics.mean_rank(np.exp(values) * [1, 10, 100, 3])
        )

    @pytest.mark.slow
    def test_leading_axes_jit_and_vmap(self):
        values = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, 4)))
        whole = metrics.mean_rank(values)
        assert whole.shape == (3, 5)
        np.testing.assert_allclose(jax.jit(jax.vmap(metrics.mean_rank))(values), whole)

    @pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0)])
    def test_bad_shape(self, shape):
        with pytest.raises(ValueError, match="methods, M"):
            metrics.mean_rank(np.ones(shape))


class TestParetoStationarity:
    def test_closed_forms(self):
        np.testing.assert_allclose(
            metrics.pareto_stationarity(jnp.diag(jnp.array([9.0, 16.0]))), 2.4, rtol=1e-6
        )
        np.testing.assert_allclose(metrics.pareto_stationarity([[4.0]]), 2.0, rtol=1e-6)

    def test_zero_at_stationary_points(self):
        assert metrics.pareto_stationarity(gram_of([[1.0, 2.0], [-2.0, -4.0]])) == 0
        assert metrics.pareto_stationarity(gram_of([[1.0, 2.0], [0.0, 0.0]])) == 0
        assert metrics.pareto_stationarity(jnp.zeros((3, 3))) == 0

    @pytest.mark.parametrize("scale", mostly_slow([1e-18, 1e18], fast=[1e18]))
    def test_scales_with_the_gradients(self, scale):
        gram = scale**2 * jnp.diag(jnp.array([9.0, 16.0]))
        np.testing.assert_allclose(metrics.pareto_stationarity(gram), 2.4 * scale, rtol=1e-5)

    def test_nan_shows(self):
        assert jnp.isnan(metrics.pareto_stationarity(jnp.full((2, 2), jnp.nan)))

    @pytest.mark.slow
    def test_leading_axes_jit_and_vmap(self):
        rng = np.random.default_rng(6)
        grams = jnp.stack([gram_of(rng.normal(size=(3, 5))) for _ in range(4)])
        whole = metrics.pareto_stationarity(grams.reshape(2, 2, 3, 3))
        assert whole.shape == (2, 2)
        mapped = jax.jit(jax.vmap(metrics.pareto_stationarity))(grams)
        np.testing.assert_allclose(mapped, whole.ravel(), rtol=1e-5)

    @pytest.mark.slow
    def test_derivative_is_that_of_the_optimal_value(self):
        jacobian = jnp.asarray(np.random.default_rng(7).normal(size=(3, 4))).at[:, 0].add(2.0)
        direction = jnp.asarray(np.random.default_rng(8).normal(size=(3, 4)))
        function = lambda t: metrics.pareto_stationarity(gram_of(jacobian + t * direction))
        slope = jax.grad(function)(0.0)
        step = 1e-2
        np.testing.assert_allclose(
            slope, (function(step) - function(-step)) / (2 * step), rtol=1e-2, atol=1e-3
        )
        assert jnp.all(jnp.isfinite(jax.grad(metrics.pareto_stationarity)(jnp.zeros((2, 2)))))

    def test_bad_shape(self):
        with pytest.raises(ValueError, match=r"\(2, 3\)"):
            metrics.pareto_stationarity(jnp.ones((2, 3)))


class TestConflicts:
    def test_cosines(self):
        jacobian = np.array([[2.0, 0.0], [3.0, 3.0], [0.0, 0.0], [-1.0, 0.0]])
        half = np.sqrt(0.5)
        expected = [[1, half, 0, -1], [half, 1, 0, -half], [0, 0, 0, 0], [-1, -half, 0, 1]]
        np.testing.assert_allclose(metrics.cosine_matrix(gram_of(jacobian)), expected, atol=1e-6)

    @pytest.mark.slow
    @settings(max_examples=25)
    @given(scales=npst.arrays(np.float32, 4, elements=st.floats(2.0**-20, 2.0**20, width=32)))
    def test_row_scales_change_neither_cosines_nor_conflicts(self, scales):
        jacobian = np.random.default_rng(9).normal(size=(4, 6)).astype(np.float32)
        before, after = gram_of(jacobian), gram_of(jacobian * scales[:, None])
        np.testing.assert_allclose(
            metrics.cosine_matrix(after), metrics.cosine_matrix(before), atol=1e-5
        )
        assert metrics.conflict_rate(after) == metrics.conflict_rate(before)

    def test_cosines_stay_in_range_and_are_differentiable_at_zero_rows(self):
        jacobian = np.array([[0.1, 0.2], [0.3, 0.6], [0.0, 0.0]], np.float32)
        cosines = metrics.cosine_matrix(gram_of(jacobian))
        assert jnp.all(jnp.abs(cosines) <= 1)
        gradient = jax.grad(lambda gram: metrics.cosine_matrix(gram).sum())(gram_of(jacobian))
        assert jnp.all(jnp.isfinite(gradient))

    def test_conflict_rate(self):
        jacobian = np.array([[1.0, 0.0], [-1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
        np.testing.assert_allclose(metrics.conflict_rate(gram_of(jacobian)), 1 / 6, rtol=1e-6)
        assert metrics.conflict_rate(gram_of([[1.0], [-1.0]])) == 1
        assert metrics.conflict_rate([[3.0]]) == 0

    @pytest.mark.slow
    def test_leading_axes_jit_and_vmap(self):
        rng = np.random.default_rng(10)
        grams = jnp.stack([gram_of(rng.normal(size=(3, 5))) for _ in range(4)])
        for function in (metrics.cosine_matrix, metrics.conflict_rate):
            single = jnp.stack([function(gram) for gram in grams])
            np.testing.assert_allclose(function(grams), single, atol=1e-6)
            np.testing.assert_allclose(jax.jit(jax.vmap(function))(grams), single, atol=1e-6)

    @pytest.mark.parametrize("function", [metrics.cosine_matrix, metrics.conflict_rate])
    @pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0)])
    def test_bad_shape(self, function, shape):
        with pytest.raises(ValueError, match="gram"):
            function(jnp.ones(shape))


class TestLossDiscrepancy:
    def test_closed_form(self):
        losses, weights = jnp.array([1.0, 4.0, 2.0]), jnp.array([2.0, 0.5, 3.0])
        assert metrics.loss_discrepancy(losses) == 5
        assert metrics.loss_discrepancy(losses, weights) == 4
        assert metrics.loss_discrepancy([3.0]) == 0

    def test_zero_where_the_weights_equalise(self):
        losses = jnp.array([1.0, 4.0, 2.0])
        assert metrics.loss_discrepancy(losses, 1 / losses) == 0

    def test_order_matters(self):
        assert metrics.loss_discrepancy([1.0, 2.0, 3.0]) != metrics.loss_discrepancy(
            [1.0, 3.0, 2.0]
        )

    @pytest.mark.slow
    def test_history_with_fixed_weights(self):
        losses = jnp.arange(12.0).reshape(2, 2, 3) ** 2
        weights = jnp.array([1.0, 0.5, 2.0])
        whole = metrics.loss_discrepancy(losses, weights)
        assert whole.shape == (2, 2)
        mapped = jax.vmap(jax.vmap(lambda row: metrics.loss_discrepancy(row, weights)))(losses)
        np.testing.assert_allclose(jax.jit(metrics.loss_discrepancy)(losses, weights), mapped)
        np.testing.assert_allclose(whole, mapped)

    def test_bad_shape(self):
        with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
            metrics.loss_discrepancy(jnp.ones(3), jnp.ones(2))
        with pytest.raises(ValueError, match="K >= 1"):
            metrics.loss_discrepancy(jnp.float32(1.0))
