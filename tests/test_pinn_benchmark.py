"""The benchmark of physics-informed networks: settings, choice, table, and what it runs."""

import json
import pathlib
import sys

import balancers
import jax
import numpy as np
import optax
import pinn
import pytest
from conftest import load_benchmark
from equations import EQUATIONS

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


benchmark = load_benchmark("pinn")


def made_up_runs(errors, validation):
    return {
        seed: benchmark.Run(error, v, 1e-3)
        for seed, (error, v) in enumerate(zip(errors, validation, strict=True))
    }


class TestBenchmark:
    def test_validation_chooses_and_the_other_points_are_shown(self, tmp_path):
        options = benchmark.Options(
            problems=("poisson",),
            methods=("ls", "constant", "log"),
            learning_rates=(1e-3, 1e-2),
            weights=(10.0, 100.0),
            seeds=2,
            steps=7,
        )
        wanted = benchmark.settings(options)
        assert len(wanted) == 2 + 4 + 2
        runs = {setting: made_up_runs([0.5, 0.5], [0.5, 0.5]) for setting in wanted}
        best = benchmark.Setting("poisson", "constant", 1e-2, 100.0, 7)
        runs[best] = made_up_runs([0.1, 0.4], [0.1, 0.1])
        runs[best._replace(weight=10.0)] = made_up_runs([0.01, 0.01], [0.2, np.nan])
        runs[best._replace(method="log", weight=1.0)] = made_up_runs([np.nan, 0.3], [0.1, 0.1])
        for setting, of_seeds in runs.items():
            benchmark.append(tmp_path / "runs.jsonl", setting, of_seeds)
        read = benchmark.read(tmp_path / "runs.jsonl")
        results = benchmark.chosen(read, wanted, options)
        assert results["poisson", "constant"].setting == best
        np.testing.assert_allclose(results["poisson", "constant"].mean, 0.2)
        # log 0.2 ± t(0.975, 1) log 2: with two seeds next to nothing is known.
        low, high = results["poisson", "constant"].interval()
        half = 12.7062 * np.log(2)
        np.testing.assert_allclose(
            np.log([low, high]), np.log(0.2) + np.array([-half, half]), rtol=1e-4
        )
        errors, costs = benchmark.tables(results)
        assert errors[1:] == [
            ["ls", "0.500 [0.500, 0.500]", "2.50"],
            ["constant", errors[2][1], "1.00"],
            ["log", "inf [0, inf]", "inf"],
        ]
        assert costs[2] == ["constant", "0.01, w = 100", "1.00"]
        # A chosen setting that lacks a seed leaves its method out.
        del read[best][1]
        assert set(benchmark.chosen(read, wanted, options)) == {
            ("poisson", "ls"),
            ("poisson", "log"),
        }

    def test_a_line_that_was_cut_short_does_not_count(self, tmp_path):
        path = tmp_path / "new" / "runs.jsonl"
        setting = benchmark.Setting("poisson", "ls", 1e-3, 1.0, 7)
        assert benchmark.read(path) == {}
        benchmark.append(path, setting, made_up_runs([0.5, 0.25], [1.0, 2.0]))
        path.write_text(path.read_text()[:-9])
        assert set(benchmark.read(path)[setting]) == {0}
        benchmark.append(path, setting, {1: benchmark.Run(0.3, np.inf, 1e-3)})
        assert benchmark.read(path)[setting] == {
            0: benchmark.Run(0.5, 1.0, 1e-3),
            1: benchmark.Run(0.3, np.inf, 1e-3),
        }

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(problems=("heat",)), "unknown problem 'heat'; choose from: poisson"),
            (dict(methods=("nonsense:exact",)), "unknown method 'nonsense'; choose from: ls"),
            (dict(methods=("mgda:guess",)), "unknown Gram matrix 'guess' in mgda:guess"),
            (dict(methods=("mgda:exact:1",)), "the decay in mgda:exact:1 must be"),
            (dict(methods=("mgda:exact:x",)), "the decay in mgda:exact:x must be"),
            (dict(methods=("mgda:exact:0.9:2",)), "the decay in mgda:exact:0.9:2 must be"),
            (dict(methods=("mgda:sketch",)), "give a decay in mgda:sketch too"),
            (dict(methods=("nash_pinn:sketch", "jinns.soft_adapt")), None),
            (dict(methods=("ls", *benchmark.STUDIES)), None),
            (dict(methods=("jinns.mine",)), "unknown method 'jinns.mine'"),
            (dict(methods=("marigold_pinn@rate=1",)), "unknown field 'rate'"),
            (dict(methods=("marigold_pinn@max_logit=4",)), None),
            (dict(methods=("nash_pinn@conditions=1:sketch",)), None),
            (dict(methods=()), "no method"),
            (dict(least=11), "--least must be at least 1 and at most --seeds"),
            (dict(weights=()), "--weights must be positive"),
            (dict(learning_rates=(0.1, 0.0)), "--learning-rates must be positive"),
            (dict(seeds=0), "at least 1"),
            ({}, None),
        ],
    )
    def test_mistakes(self, changes, message):
        found = benchmark.Options(**changes).mistake()
        assert found is None if message is None else message in found

    @pytest.mark.slow
    def test_goes_on_where_it_stopped(self, tmp_path, monkeypatch, capsys):
        options = dict(
            problems=("poisson",),
            methods=("constant", "root+nash_mtl:sketch:0.9"),
            learning_rates=(1e-3,),
            weights=(10.0,),
            steps=4,
            output=tmp_path,
        )
        asked = []
        execute = benchmark.execute

        def recording(setting, seeds):
            asked.append((setting.method, list(seeds)))
            if len(asked) == 2:
                raise KeyboardInterrupt
            return execute(setting, seeds)

        monkeypatch.setattr(benchmark, "execute", recording)
        with pytest.raises(KeyboardInterrupt):
            benchmark.main(benchmark.Options(**options, seeds=1))
        benchmark.main(benchmark.Options(**options, seeds=1))
        benchmark.main(benchmark.Options(**options, seeds=2))
        benchmark.main(benchmark.Options(**options, seeds=2))
        constant, nash = options["methods"]
        assert asked == [(constant, [0]), (nash, [0]), (nash, [0]), (constant, [1]), (nash, [1])]
        lines = (tmp_path / "pinn.jsonl").read_text().splitlines()
        assert [json.loads(line)["seed"] for line in lines] == [0, 0, 1, 1]
        assert "root+nash_mtl:sketch:0.9" in (tmp_path / "pinn.md").read_text()
        capsys.readouterr()
        benchmark.main(benchmark.Options(**options, seeds=2, report=True))
        assert "w = 10" in capsys.readouterr().out
        assert len(asked) == 5

    def test_the_first_seeds_choose_and_the_others_train_what_was_chosen(
        self, tmp_path, monkeypatch
    ):
        asked = []

        def execute(setting, seeds):
            asked.append((setting.learning_rate, seeds))
            error = setting.learning_rate
            return made_up_runs_of(seeds, error)

        def made_up_runs_of(seeds, error):
            # The seed that does not choose would have chosen the other rate.
            return {s: benchmark.Run(error, error if s < 2 else 1 / error, 1e-3) for s in seeds}

        monkeypatch.setattr(benchmark, "execute", execute)
        options = benchmark.Options(
            problems=("poisson",),
            methods=("ls",),
            learning_rates=(1e-3, 1e-2),
            tuning_seeds=2,
            seeds=3,
            output=tmp_path,
        )
        benchmark.main(options)
        assert asked == [(1e-3, [0, 1]), (1e-2, [0, 1]), (1e-3, [2])]
        assert "| ls | 0.00100 [0.00100, 0.00100] |" in (tmp_path / "pinn.md").read_text()
        assert "over the first 2 seeds" in (tmp_path / "pinn.md").read_text()

    @pytest.mark.slow
    def test_what_is_given_to_a_method_reaches_it(self):
        def error(method):
            run = benchmark.execute(benchmark.Setting("poisson", method, 1e-2, 1.0, 20), [0])
            return run[0].error

        default = error("marigold_pinn")
        assert error("marigold_pinn@logit_rate=0.025@max_logit=6") == default
        assert error("marigold_pinn@logit_rate=0.5") != default
        assert error("marigold_pinn@max_logit=0.01") != default
        # One condition has what all conditions share.
        for name in ("marigold_pinn", "nash_pinn"):
            assert error(f"{name}@conditions=1") == error(name) != error(f"{name}@conditions=0.1")

    def test_a_study_stands_for_its_methods(self):
        options = benchmark.Options(methods=("exponents", "ls", "log+marigold_nash"))
        names = ("marigold_nash", "quarter+marigold_nash")
        assert options.names == (*names, "log+marigold_nash", "ls")
        assert {setting.method for setting in benchmark.settings(options)} == {*options.names}

    def test_the_first_methods_come_first_on_all_problems(self):
        options = benchmark.Options(learning_rates=(1e-3,))
        settings = benchmark.settings(options)
        number = len(options.problems)
        assert [s.method for s in settings[:number]] == ["ls"] * number
        assert {s.method for s in settings[number : 5 * number]} == {"constant"}
        assert tuple(dict.fromkeys(s.problem for s in settings)) == options.problems
        assert not set(benchmark.JINNS) & {s.method for s in settings}

    def test_what_is_there_counts_with_the_seeds_that_all_settings_have(self, tmp_path):
        options = benchmark.Options(
            problems=("poisson", "helmholtz"),
            methods=("ls", "constant"),
            learning_rates=(1e-3, 1e-2),
            weights=(1.0,),
            seeds=4,
            steps=7,
            least=2,
            output=tmp_path,
        )
        runs = {}
        for setting in benchmark.settings(options):
            if (setting.problem, setting.method) == ("helmholtz", "ls"):
                runs[setting] = made_up_runs([0.1], [0.1])
            elif setting.learning_rate == 1e-3:
                runs[setting] = made_up_runs([0.1] * 3, [0.1] * 3)
            else:
                runs[setting] = made_up_runs([0.2] * 4, [0.2] * 4)
        jinns = benchmark.Setting("poisson", "jinns.soft_adapt", 1e-3, 1.0, 7)
        for rate in options.learning_rates:
            runs[jinns._replace(learning_rate=rate)] = made_up_runs([0.4] * 4, [0.4] * 4)
        benchmark.publish(runs, options)
        table = (tmp_path / "pinn.md").read_text().splitlines()
        assert table[0].startswith("# ")
        assert table[4:7] == [
            "| ls | 0.100 [0.100, 0.100] of 3 |  |  |",
            "| constant | 0.100 [0.100, 0.100] of 3 | 0.100 [0.100, 0.100] of 3 | 1.00 |",
            "| jinns.soft_adapt | 0.400 [0.400, 0.400] |  |  |",
        ]
        assert (tmp_path / "pinn.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.slow
    def test_a_method_of_jinns_is_run_by_jinns(self):
        pytest.importorskip("jinns")
        setting = benchmark.Setting("burgers_viscous", "jinns.lr_annealing", 5e-3, 1.0, 20)
        sys.path.insert(0, str(BENCHMARKS))
        try:
            runs = benchmark.execute(setting, [3, 0])
        finally:
            sys.path.remove(str(BENCHMARKS))
        assert set(runs) == {0, 3}
        assert 0 < runs[0].error != runs[3].error > 0


class TestOneOptimizerForEachLoss:
    def test_adds_what_each_would_do_alone(self):
        parameters = {"w": np.float32([1.0, -2.0]), "b": np.float32(0.5)}
        gradients = [{"w": np.array([3.0, 1e-3]), "b": np.array(g)} for g in (0.1, -40.0)]
        adam = optax.adam(optax.cosine_decay_schedule(1e-2, 5))
        both = balancers.one_for_each_loss(adam, 2)
        state, alone = both.init(parameters), [adam.init(parameters)] * 2
        together, apart = map(jax.jit, (both.update, adam.update))
        for step in range(3):
            longer = lambda g, times=1 + step: np.float32(times * g)
            of_step = [jax.tree.map(longer, g) for g in gradients]
            stacked = jax.tree.map(lambda *g: np.stack(g), *of_step)
            updates, state = together(stacked, state, parameters)
            pairs = [apart(g, s, parameters) for g, s in zip(of_step, alone)]
            alone = [s for _, s in pairs]
            expected = jax.tree.map(lambda a, b: a + b, *(u for u, _ in pairs))
            # Those of b, of 1e-2 each, cancel.
            equal = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
            jax.tree.map(equal, updates, expected)

    @pytest.mark.slow
    def test_is_a_method_of_the_example(self):
        run = pinn.train(EQUATIONS["poisson"], "autobalance", seeds=[0], steps=10, hidden=(8,))
        plain = pinn.train(EQUATIONS["poisson"], "ls", seeds=[0], steps=10, hidden=(8,))
        assert run.weights is None
        np.testing.assert_allclose(run.losses[0, 0], plain.losses[0, 0], rtol=1e-5)
        assert (run.losses[0, -1] != plain.losses[0, -1]).all()
