"""IGBv1 by itself."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_igb import K, compiled, play, random_losses, scan

from bilb.improvable_gap.igb_v1 import igb_v1


class TestV1:
    def test_base_losses_are_the_mean_over_the_window(self):
        losses = random_losses(8)
        state, (balanced, weights) = play(compiled(igb_v1, 2, 3), losses)
        np.testing.assert_allclose(state.base_losses, losses[2:5].mean(0), rtol=1e-6)
        np.testing.assert_array_equal(state.base_counts, 3)
        expected = K * jax.nn.softmax(losses / losses[2:5].mean(0))
        expected = jnp.where(jnp.arange(8)[:, None] < 5, 1.0, expected)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
        np.testing.assert_allclose(balanced, expected * jnp.log(losses), rtol=1e-5)

    def test_only_present_and_finite_losses_enter_the_base(self):
        balancer, update = compiled(igb_v1, 0, 3)
        losses = jnp.array([[1.0, 2.0, jnp.nan], [3.0, jnp.inf, jnp.nan], [5.0, 4.0, 7.0]])
        present = jnp.array([[True, True, True], [False, True, True], [True, True, False]])
        state = balancer.init(losses[0])
        for row, mask in zip(losses, present):
            _, state = update(row, state, mask=mask)
        np.testing.assert_array_equal(state.base_losses, [3.0, 3.0, 0.0])
        np.testing.assert_array_equal(state.base_counts, [2, 2, 0])

    def test_a_task_absent_from_the_window_takes_its_first_later_loss(self):
        balancer, update = compiled(igb_v1, 0, 1)
        losses = jnp.array([2.0, 4.0, 8.0])
        mask = jnp.array([True, True, False])
        _, state = update(losses, balancer.init(losses), mask=mask)
        _, state = update(losses.at[2].set(jnp.inf), state)
        assert state.base_counts[2] == 0
        _, state = update(losses, state)
        _, state = update(losses / 2, state)
        np.testing.assert_array_equal(state.base_losses, losses)
        np.testing.assert_allclose(state.weights, 1.0, rtol=1e-6)

    def test_mask_weighs_the_present_tasks_alone(self):
        losses = random_losses(4)
        _, update = compiled(igb_v1, 0, 3)
        state, _ = play(compiled(igb_v1, 0, 3), losses[:3])
        mask = jnp.array([True, False, True, True])
        balanced, masked = update(losses[3], state, mask=mask)
        present = jnp.flatnonzero(mask)
        gap = (losses[3] / state.base_losses)[present]
        np.testing.assert_allclose(masked.weights[present], 3 * jax.nn.softmax(gap), rtol=1e-6)
        assert masked.weights[1] == state.weights[1]
        assert balanced[1] == 0
        nothing, unchanged = update(losses[3], state, mask=jnp.zeros(K, bool))
        np.testing.assert_array_equal(nothing, 0)
        chex.assert_trees_all_equal(unchanged._replace(step=state.step), state)

    @pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
    def test_a_nonfinite_loss_stays_in_its_entry(self, bad):
        losses = random_losses(4)
        _, update = compiled(igb_v1, 0, 3)
        state, _ = play(compiled(igb_v1, 0, 3), losses[:3])
        balanced, after = update(losses[3].at[1].set(bad), state)
        expected, _ = update(losses[3], state, mask=jnp.arange(K) != 1)
        others = jnp.array([0, 2, 3])
        np.testing.assert_allclose(balanced[others], expected[others], rtol=1e-6)
        assert not jnp.isfinite(balanced[1])
        chex.assert_tree_all_finite(after)

    @pytest.mark.slow
    @pytest.mark.x64
    @pytest.mark.parametrize(
        ("dtype", "size"),
        [("float32", 3e38), ("float64", 1e300)],
    )
    def test_extreme_losses_stay_finite(self, dtype, size):
        extremes = jnp.array([0.0, 1 / size, 1.0, size], dtype)
        grid = jnp.stack([x.ravel() for x in jnp.meshgrid(extremes, extremes, extremes)], 1)
        balancer = igb_v1(0, 1)
        first = lambda row: balancer.update(row, balancer.init(row))[1]
        states = jax.jit(jax.vmap(first))(grid)
        objective = lambda row, state: balancer.update(row, state)[0].sum()
        pairs = lambda f: jax.jit(jax.vmap(jax.vmap(f, (None, 0)), (0, None)))(grid, states)
        chex.assert_tree_all_finite(pairs(jax.value_and_grad(objective)))
        weights = pairs(lambda row, state: balancer.update(row, state)[1].weights)
        np.testing.assert_allclose(weights.sum(-1), 3.0, rtol=1e-6)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_gaps_beyond_the_largest_number_count_as_it(self, sign):
        """A softmax of infinite gaps would be inf - inf."""
        balancer, update = compiled(igb_v1, 0, 1)
        first = jnp.array([1e-9, 1.0, 1e-20, 1.0])
        _, state = update(first, balancer.init(first))
        large = jnp.array([3e38, 1.0, 1e35, 2.0])
        _, new = update(sign * large, state)
        expected = [2.0, 0.0, 2.0, 0.0] if sign > 0 else 4 * jax.nn.softmax(-large[1::2])
        present = slice(None) if sign > 0 else slice(1, None, 2)
        np.testing.assert_allclose(new.weights[present], expected, rtol=1e-6)
        _, new = update(sign * jnp.full(K, 3e38), state._replace(base_losses=first[2:3].repeat(K)))
        np.testing.assert_allclose(new.weights, 1.0, rtol=1e-6)

    @pytest.mark.slow
    def test_window_can_be_traced_and_injected(self):
        losses = random_losses(6)
        starts = jnp.array([0, 1, 2])
        run = lambda start: scan(igb_v1(start, 2), losses)[1]
        mapped = jax.vmap(run)(starts)
        for i, start in enumerate((0, 1, 2)):
            single = jax.tree.map(lambda x, i=i: x[i], mapped)
            chex.assert_trees_all_close(single, run(start), rtol=1e-6)
        injected = optax.inject_hyperparams(igb_v1)(1, 2)
        state = injected.init(losses[0])
        for row in losses:
            balanced, state = injected.update(row, state)
        np.testing.assert_allclose(balanced, run(1)[0][-1], rtol=1e-6)

    @pytest.mark.parametrize("arguments", [(-1, 1), (0, 0), (0, 1, 0.0)])
    def test_arguments_out_of_range(self, arguments):
        with pytest.raises(ValueError, match="must be"):
            igb_v1(*arguments)
