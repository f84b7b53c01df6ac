"""What the benchmarks share: lines of runs, names with fields, statistics, and clipping."""

import math

import jax.numpy as jnp
import numpy as np
import protocol
import pytest
import runs
import scipy.stats


class TestLines:
    def test_are_read_as_written(self, tmp_path):
        path = tmp_path / "new" / "runs.jsonl"
        first, second = {"seed": 0, "errors": [1.0, math.inf]}, {"seed": 1, "errors": [2.0, 3.0]}
        assert protocol.read(path) == []
        protocol.append(path, [first])
        protocol.append(path, [second])
        assert protocol.read(path) == [first, second]

    def test_a_line_cut_short_costs_only_itself(self, tmp_path):
        path = tmp_path / "runs.jsonl"
        protocol.append(path, [{"seed": 0}])
        with path.open("a") as file:
            file.write('{"seed": 1, "err')
        protocol.append(path, [{"seed": 2}])
        assert protocol.read(path) == [{"seed": 0}, {"seed": 2}]

    def test_numbers_have_six_digits(self):
        assert protocol.rounded(np.array([[1 / 3, 12345678.9]])) == [[0.333333, 12345700.0]]


FIELDS = {"decay": float, "gram": str}


class TestParse:
    def test_fields(self):
        name = "si+mgda@gram=sketch@decay=0.99"
        assert protocol.parse(name, FIELDS) == ("si+mgda", {"gram": "sketch", "decay": 0.99})
        assert protocol.parse("si", FIELDS) == ("si", {})

    @pytest.mark.parametrize("name", ["si@unknown=1", "si@decay", "si@decay=much"])
    def test_mistakes_are_told(self, name):
        with pytest.raises(ValueError, match="si@"):
            protocol.parse(name, FIELDS)


class TestStatistics:
    def test_holm_against_its_definition(self):
        p = np.array([0.001, 0.2, 0.012, 0.03, 0.04])
        rejected = lambda level: {
            # Holm: go up the sorted p-values while p(i) <= level / (m - i).
            index
            for rank, index in enumerate(np.argsort(p))
            if all(p[j] <= level / (5 - r) for r, j in enumerate(np.argsort(p)[: rank + 1]))
        }
        adjusted = protocol.holm(p)
        for level in (0.004, 0.01, 0.04, 0.08, 0.2, 0.5):
            assert {i for i in range(5) if adjusted[i] <= level} == rejected(level)

    def test_holm_leaves_out_what_is_unknown(self):
        adjusted = protocol.holm([math.nan, 0.01, 0.02])
        np.testing.assert_allclose(adjusted, [math.nan, 0.02, 0.02])
        assert np.isnan(protocol.holm([math.nan])).all()

    def test_interval_covers_the_mean_as_often_as_it_says(self):
        rng = np.random.default_rng(0)
        intervals = [protocol.interval(rng.normal(3.0, 2.0, 8), level=0.8) for _ in range(400)]
        assert 0.75 < np.mean([i.low < 3.0 < i.high for i in intervals]) < 0.85

    def test_interval_of_one_seed_or_of_divergence_is_open(self):
        assert protocol.interval([1.0]) == (1.0, -math.inf, math.inf)
        assert protocol.interval([1.0, math.inf])[1:] == (-math.inf, math.inf)
        assert str(protocol.interval([1.0, math.inf])) == "diverged"

    def test_paired_test(self):
        ours, theirs = {0: 1.0, 1: 2.5, 2: 2.0, 7: 9.0}, {0: 0.5, 1: 1.0, 2: 1.9, 3: 9.0}
        expected = scipy.stats.ttest_rel([1.0, 2.5, 2.0], [0.5, 1.0, 1.9]).pvalue
        assert protocol.paired_p_value(ours, theirs) == pytest.approx(expected)
        assert math.isnan(protocol.paired_p_value(ours, ours))
        assert math.isnan(protocol.paired_p_value(ours, theirs | {1: math.inf}))

    def test_best_prefers_what_is_finite(self):
        assert protocol.best({"a": [3.0, 1.0], "b": [1.0, 2.0], "c": [math.nan, 0.0]}) == "b"


class TestClipping:
    def test_clips_at_a_fraction_of_the_running_mean(self):
        clip = runs.clip_by_running_norm(0.5, decay=0.9)
        state, mean = clip.init({"w": jnp.zeros(2)}), 0.0
        for step, norm in enumerate([5.0, 10.0, 1.0], start=1):
            updates, state = clip.update({"w": jnp.array([0.6, 0.8]) * norm}, state)
            mean = 0.9 * mean + 0.1 * norm
            limit = min(norm, 0.5 * mean / (1 - 0.9**step))
            np.testing.assert_allclose(updates["w"], np.array([0.6, 0.8]) * limit, rtol=1e-6)

    def test_zero_stays_zero(self):
        clip = runs.clip_by_running_norm(0.5)
        updates, _ = clip.update(jnp.zeros(2), clip.init(jnp.zeros(2)))
        np.testing.assert_array_equal(updates, np.zeros(2))
