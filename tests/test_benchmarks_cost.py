"""Benchmarks of what a step costs, and the side-by-side with PyTorch."""

import importlib.util
import math

import jax
import numpy as np
import protocol
import pytest
from conftest import load_benchmark

import bilb

cost = load_benchmark("cost")


class TestCost:
    @pytest.mark.slow
    def test_small(self, tmp_path):
        options = cost.Options(
            methods=("bilb4mtl", "mgda@gram=stacked"),
            num_tasks=(2, 4),
            inputs=4,
            width=8,
            depth=1,
            batch_size=4,
            rounds=1,
            output=tmp_path,
        )
        cost.main(options)
        lines = protocol.read(tmp_path / "cost.jsonl")
        assert [(x["num_tasks"], x["method"]) for x in lines] == [
            (k, name) for k in (2, 4) for name in ("ls", "bilb4mtl", "mgda@gram=stacked")
        ]
        ratios = cost.relative(lines)
        assert ratios["products"]["bilb4mtl"] == {2: 1, 4: 1}
        assert (
            ratios["products"]["mgda@gram=stacked"][4] > ratios["products"]["mgda@gram=stacked"][2]
        )
        assert all(ratio > 0 for ratio in ratios["time"]["bilb4mtl"].values())
        text = (tmp_path / "cost.md").read_text()
        assert "| mgda@gram=stacked |" in text
        assert (tmp_path / "cost.png").stat().st_size > 1_000
        cost.main(options)  # nothing is left to measure
        assert protocol.read(tmp_path / "cost.jsonl") == lines

    @pytest.mark.parametrize("name", [*cost.TRAINING_STEPS])
    def test_methods_that_are_training_steps(self, name):
        options = cost.Options(inputs=4, width=8, depth=1, batch_size=4)
        of, plain = (cost.training(method, options, 3) for method in (name, "ls"))
        assert jax.tree.structure(jax.eval_shape(of.step, of.carry)) == jax.tree.structure(of.carry)
        products = lambda t: cost.counting.product_flops(jax.make_jaxpr(t.step)(t.carry).jaxpr)
        assert products(of) > 1.5 * products(plain)

    def test_steps_before_the_timed_ones(self):
        """A step is a number here, and the carry counts the steps."""
        taken = {"method": [], "reference": []}
        step, reference = (
            lambda carry, of=of: taken[of].append(carry) or carry + 1 for of in taken
        )
        options = cost.Options(rounds=2)
        numbers = cost.timed(step, 0, reference, 10, options, untimed=3)
        assert taken == {"method": [0, 1, 2, 3, 4], "reference": [10, 11]}
        assert numbers.keys() == {"seconds", "time", "processor"}
        assert cost.timed(step, 0, reference, 10, cost.Options(longest=-1.0)) == {}

    def test_a_sketch_is_timed_after_its_warm_up(self, monkeypatch):
        untimed = []
        monkeypatch.setattr(cost, "counted", lambda of: (of.step, {}))
        monkeypatch.setattr(cost, "timed", lambda *given: untimed.append(given[-1]) or {})
        options = cost.Options(inputs=4, width=8, depth=1, batch_size=4)
        for name in ("mgda", "mgda@gram=sketch"):
            cost.measure(name, options, 2, expected=0.0)
        assert untimed == [1, 1 + bilb.grams.sketch().warmup_steps]

    def test_expected_seconds(self):
        lines = [{"method": "mgda", "num_tasks": 10, "seconds": 0.05}]
        assert cost.expected_seconds(lines, "mgda", 2) == 0
        assert cost.expected_seconds(lines, "mgda", 40) == pytest.approx(0.2)
        lines.append({"method": "mgda", "num_tasks": 40, "seconds": 0.5})
        assert cost.expected_seconds(lines, "mgda", 200) == pytest.approx(12.5)
        lines.append({"method": "mgda", "num_tasks": 200})
        assert cost.expected_seconds(lines, "mgda", 1000) == math.inf

    def test_mistakes(self):
        assert cost.Options().mistake() is None
        assert "nothing" in cost.Options(methods=("nothing",)).mistake()
        assert "thick" in cost.Options(methods=("mgda@gram=thick",)).mistake()


@pytest.fixture(scope="module")
def benchmark():
    return load_benchmark("side_by_side")


@pytest.mark.skipif(not importlib.util.find_spec("torchjd"), reason="needs torchjd")
class TestSideBySide:
    @pytest.mark.parametrize(
        ("kind", "method"),
        [
            *(("torch", name) for name in ("ls", "bilb4mtl", "uw", "famo")),
            *(("torchjd", name) for name in ("imtl_g", "aligned_mtl")),
            ("autogram", "aligned_mtl"),
            ("stacked", "mgda"),
        ],
    )
    def test_the_same_losses(self, benchmark, kind, method):
        options = benchmark.Options(inputs=8, depth=2, batch_size=16)
        problem = benchmark.Problem(options, width=16, num_tasks=5)
        ours, theirs = (benchmark.make_step(k, method, problem) for k in ("bilb", kind))
        for _ in range(5):
            np.testing.assert_allclose(theirs(), ours(), rtol=2e-4)

    def test_peak_memory_is_that_of_what_is_known(self, benchmark):
        # One layer: parameters and two moments of them, the batch, and the gradient at least.
        options = benchmark.Options(inputs=64, depth=1, batch_size=4)
        problem = benchmark.Problem(options, width=512, num_tasks=2)
        kernels = sum(kernel.nbytes for kernel in problem.kernels)
        for kind in ("bilb", "torch"):
            peak = benchmark.make_step(kind, "ls", problem).peak_bytes()
            assert 3 * kernels < peak < 6 * kernels

    def test_no_such_step(self, benchmark):
        problem = benchmark.Problem(benchmark.Options(), width=8, num_tasks=2)
        assert benchmark.make_step("torch", "mgda", problem) is None
        assert benchmark.make_step("torchjd", "ls", problem) is None
        assert benchmark.make_step("stacked", "ls", problem) is None
