"""Min-norm points: the minimum over the simplex, however the Gram matrix is conditioned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import oracle
from contract import mostly_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from test_metrics import gram_of

from bilb import metrics
from bilb.gradient_balancing import solvers

FLOAT32_EPS = float(jnp.finfo(jnp.float32).eps)


class TestMinNormWeights:
    def test_two_rows_closed_form(self):
        jacobian = np.array([[1.0, 2.0], [-1.0, 0.5]])
        difference = jacobian[1] - jacobian[0]
        first = np.clip(jacobian[1] @ difference / (difference @ difference), 0, 1)
        weights = solvers.min_norm_weights(gram_of(jacobian))
        np.testing.assert_allclose(weights, [first, 1 - first], atol=1e-6)

    def test_orthogonal_rows(self):
        norms = np.array([1.0, 2.0, 4.0])
        weights = solvers.min_norm_weights(jnp.diag(jnp.asarray(norms) ** 2))
        np.testing.assert_allclose(weights, norms**-2 / np.sum(norms**-2), rtol=1e-5)

    def test_one_task(self):
        for gram in ([[4.0]], [[0.0]], [[1e-30]]):
            np.testing.assert_array_equal(solvers.min_norm_weights(jnp.array(gram)), [1.0])

    def test_zero_rows_share_the_weight(self):
        jacobian = np.array([[1.0, 2.0], [0.0, 0.0], [-1.0, 1.0], [0.0, 0.0]])
        weights = solvers.min_norm_weights(gram_of(jacobian))
        np.testing.assert_array_equal(weights, [0, 0.5, 0, 0.5])
        np.testing.assert_allclose(solvers.min_norm_weights(jnp.zeros((4, 4))), 0.25)

    def test_opposite_and_repeated_rows(self):
        row = np.array([1.0, -2.0, 3.0])
        jacobian = np.stack([row, -row, row, -0.5 * row])
        weights = solvers.min_norm_weights(gram_of(jacobian))
        np.testing.assert_allclose(weights @ jacobian, 0, atol=1e-6)
        np.testing.assert_allclose(jnp.sum(weights), 1, rtol=1e-6)

    @pytest.mark.parametrize("scale", mostly_slow([1e-17, 1e-4, 1.0, 1e4, 1e18], fast=[1e18]))
    def test_common_scale_changes_nothing(self, scale):
        jacobian = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
        gram = gram_of(jacobian)
        weights = solvers.min_norm_weights(gram)
        np.testing.assert_allclose(solvers.min_norm_weights(scale**2 * gram), weights, atol=1e-6)
        # Zero lies in the hull of these rows: the weights are not unique.
        gram = gram_of(jacobian[:, :3])
        weights = solvers.min_norm_weights(scale**2 * gram)
        assert weights @ gram @ weights <= 10 * FLOAT32_EPS * jnp.max(jnp.diagonal(gram))

    def test_rows_of_very_different_norms_keep_their_digits(self):
        jacobian = np.diag([1e-3, 1.0, 1e3])
        weights = solvers.min_norm_weights(gram_of(jacobian))
        np.testing.assert_allclose(weights, [1.0, 1e-6, 1e-12], rtol=2e-6)

    def test_large_opposite_rows_beat_a_small_one(self):
        jacobian = np.array([[0.0, 1e-2], [8.0, 0.0], [-8.0, 0.0]])
        weights = solvers.min_norm_weights(gram_of(jacobian))
        assert np.linalg.norm(weights @ jacobian) < 1e-3

    def test_rows_that_rounding_makes_dependent_do_not_block_others(self):
        # In float32 the second and third row are exactly opposite beside the first.
        jacobian = np.array([[1e-3, 0, 0], [0, 1e3, 0], [0, -1e3, 0], [0, 0, 1e4]])
        weights = solvers.min_norm_weights(gram_of(jacobian.astype(np.float32)))
        np.testing.assert_allclose(jnp.sum(weights), 1, rtol=1e-6)
        np.testing.assert_allclose(weights[3] / weights[0], 1e-14, rtol=1e-4)

    @pytest.mark.slow
    @settings(max_examples=60)
    @given(
        jacobian=st.integers(1, 6).flatmap(
            lambda k: npst.arrays(
                np.float32, (k, 3), elements=st.sampled_from([-3.0, -1.0, -0.5, 0, 0.5, 1.0, 2.0])
            )
        )
    )
    def test_optimality_conditions(self, jacobian):
        gram = gram_of(jacobian)
        weights = np.asarray(solvers.min_norm_weights(gram), np.float64)
        assert np.all(weights >= 0)
        np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)
        slopes = np.asarray(gram, np.float64) @ weights
        # No vertex of the simplex lies further down than the point itself.
        gap = weights @ slopes - np.min(slopes)
        assert gap <= 20 * FLOAT32_EPS * np.max(np.diagonal(gram))

    @pytest.mark.slow
    @pytest.mark.parametrize(("num_tasks", "dimension"), [(40, 10), (40, 500), (100, 60)])
    def test_many_tasks(self, num_tasks, dimension):
        jacobian = np.random.default_rng(2).normal(size=(num_tasks, dimension)).astype(np.float32)
        gram = gram_of(jacobian)
        weights = np.asarray(solvers.min_norm_weights(gram), np.float64)
        slopes = np.asarray(gram, np.float64) @ weights
        assert weights @ slopes - np.min(slopes) <= 30 * FLOAT32_EPS * np.max(np.diagonal(gram))

    def test_where_solves_for_the_rest(self):
        jacobian = np.random.default_rng(3).normal(size=(5, 8)).astype(np.float32)
        keep = np.array([True, False, True, True, False])
        poisoned = jacobian.copy()
        poisoned[1], poisoned[4] = np.nan, 1e30
        weights = solvers.min_norm_weights(gram_of(poisoned), where=keep)
        np.testing.assert_array_equal(weights[~keep], 0)
        expected = solvers.min_norm_weights(gram_of(jacobian[keep]))
        np.testing.assert_allclose(weights[keep], expected, atol=1e-6)
        np.testing.assert_array_equal(
            solvers.min_norm_weights(gram_of(jacobian), where=np.zeros(5, bool)), 0
        )

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_non_finite_entries_show(self, bad):
        gram = jnp.eye(3).at[1, 2].set(bad).at[2, 1].set(bad)
        assert jnp.all(jnp.isnan(solvers.min_norm_weights(gram)))
        assert jnp.all(jnp.isnan(solvers.min_norm_weights(jnp.full((3, 3), bad))))

    @pytest.mark.slow
    def test_permutation_of_the_tasks(self):
        jacobian = np.random.default_rng(4).normal(size=(6, 9)).astype(np.float32)
        order = np.array([3, 1, 5, 0, 4, 2])
        weights = solvers.min_norm_weights(gram_of(jacobian))
        permuted = solvers.min_norm_weights(gram_of(jacobian[order]))
        np.testing.assert_allclose(permuted, weights[order], atol=1e-6)

    @pytest.mark.slow
    def test_jit_and_vmap_agree(self):
        rng = np.random.default_rng(5)
        grams = jnp.stack([gram_of(rng.normal(size=(4, p))) for p in (1, 2, 3, 20)])
        single = jnp.stack([solvers.min_norm_weights(gram) for gram in grams])
        mapped = jax.jit(jax.vmap(solvers.min_norm_weights))(grams)
        # With fewer parameters than tasks the weights are not unique: rounding moves them.
        np.testing.assert_allclose(mapped, single, atol=2e-2)
        np.testing.assert_allclose(mapped[2:], single[2:], atol=1e-6)
        slopes = lambda weights: jnp.einsum("nij,nj->ni", grams, weights)
        np.testing.assert_allclose(slopes(mapped), slopes(single), atol=1e-5)

    def test_equal_rows_share_the_weight(self):
        row, other = np.array([1.0, -2.0, 3.0]), np.array([-3.0, 1.0, 0.5])
        weights = solvers.min_norm_weights(gram_of(np.stack([row, other, row])))
        np.testing.assert_allclose(weights[0], weights[2], rtol=1e-2)

    def test_half_precision_is_solved_in_float32(self):
        weights = solvers.min_norm_weights(jnp.diag(jnp.array([1.0, 4.0], jnp.bfloat16)))
        assert weights.dtype == jnp.float32
        np.testing.assert_allclose(weights, [0.8, 0.2], rtol=1e-6)

    @pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0), (2, 2, 2)])
    def test_bad_gram(self, shape):
        with pytest.raises(ValueError, match="gram"):
            solvers.min_norm_weights(jnp.ones(shape))

    def test_bad_where(self):
        with pytest.raises(ValueError, match=r"where.*\(3,\).*\(2,\)"):
            solvers.min_norm_weights(jnp.eye(3), where=[True, False])


@pytest.mark.parametrize("num_tasks", mostly_slow([2, 3, 5, 11, 40], fast=[3]))
def test_min_norm_point_matches_high_precision_solutions(num_tasks):
    recorded = oracle(f"f4_agg_K{num_tasks}")
    row = list(recorded["exact_names"]).index("mgda")
    assert len(recorded["cases"]) > 0
    with jax.enable_x64(True):
        solve = jax.jit(solvers.min_norm_weights)
        distance = jax.jit(metrics.pareto_stationarity)
        for case in recorded["cases"]:
            jacobian = recorded[f"{case}/J"]
            exact = recorded[f"{case}/exact_W"][row] @ jacobian
            exact_norm = np.sqrt(max(float(recorded[f"{case}/minnorm_sq"]), 0.0))
            largest = np.max(np.linalg.norm(jacobian, axis=1))
            gram = gram_of(jacobian)
            assert gram.dtype == jnp.float64
            point = np.asarray(solve(gram)) @ jacobian
            assert np.linalg.norm(point - exact) <= 1e-13 * largest, case
            assert abs(np.linalg.norm(point) - exact_norm) <= 1e-13 * largest, case
            assert abs(float(distance(gram)) - exact_norm) <= 3e-8 * largest, case
            if exact_norm > 1e-3 * largest:
                assert abs(float(distance(gram)) - exact_norm) <= 1e-10 * largest, case
