"""examples/sweep.py: a grid in one program equals its configurations trained one by one."""

import dataclasses
import json
import pathlib
import sys

import cost
import experiment
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sweep
from conftest import help_of

SCRIPT = pathlib.Path(sweep.__file__)
EIGHT = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
SIZE = dict(seeds=2, steps=20)


def small_problem():
    rng = np.random.default_rng(0)

    def data(size):
        inputs = rng.normal(size=(size, 6)).astype(np.float32)
        side = (inputs[:, 0] > 0).astype(np.int32)
        return experiment.Data(inputs, (side, inputs[:, 1] * inputs[:, 2] + 0.1))

    tasks = (experiment.Task("side", classes=2), experiment.Task("size", unit="m", scale=2.0))
    return experiment.Problem(
        title="small",
        tasks=tasks,
        pool=data(200),
        test=data(400),
        train_size=80,
        batch_size=8,
        steps=20,
        learning_rate=1e-2,
        hidden=(8,),
    )


def made_up(configurations, errors):
    return sweep.Trained(
        configurations, np.array(errors), np.ones((len(errors), 2, 4, 2)), sweep.Seconds(2.0, 1.0)
    )


def made_up_comparison():
    stl = [{"learning_rate": 0.1}, {"learning_rate": 0.2}]
    swept = [{"learning_rate": 0.1, "penalty": p} for p in (0.0, 0.5, 1.0)]
    trained = {
        "STL": made_up(stl, [[[20.0, 4.0], [20.0, 4.0]], [[9.0, 2.0], [11.0, 2.0]]]),
        "bilb4mtl": made_up(
            swept, [[[12.0, 2.0], [12.0, 2.0]], [[9.0, 2.0], [10.0, 2.0]], [[10.0, np.nan]] * 2]
        ),
    }
    return sweep.compare(small_problem(), trained)


class TestTraining:
    @pytest.mark.slow
    def test_equals_the_configurations_one_by_one(self):
        problem = small_problem()
        options = sweep.Options(penalty=(0.0, 0.5), learning_rate=(1e-2, 3e-2))
        for method in ("bilb4mtl", "STL"):
            configurations = sweep.grid(method, options)
            result = sweep.train(problem, method, configurations, **SIZE)
            assert len(configurations) == (4 if method == "bilb4mtl" else 2)
            for c, values in enumerate(configurations):
                alone = dataclasses.replace(problem, learning_rate=values["learning_rate"])
                run = experiment.train(alone, method, penalty=values.get("penalty", 0.0), **SIZE)
                np.testing.assert_allclose(result.losses[c], run.losses, rtol=1e-4)
                np.testing.assert_allclose(result.errors[c], run.errors, rtol=1e-4)
        assert len(np.unique(result.losses[:, :, -1])) == 8

    @pytest.mark.slow
    def test_constants_give_the_same(self):
        configurations = [{"learning_rate": 1e-2, "penalty": 0.5}]
        traced, constant = (
            sweep.train(small_problem(), "bilb4mtl", configurations, constant=constant, **SIZE)
            for constant in (False, True)
        )
        np.testing.assert_allclose(constant.losses, traced.losses, rtol=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("method", "name"),
        [
            ("bilb4mtl_celeba", "penalty"),
            ("dwa", "temperature"),
            ("famo", "gamma"),
            ("si+mgda", "decay"),
        ],
    )
    def test_methods_follow_their_own_hyperparameter(self, method, name):
        assert sweep.hyperparameters(method) == ("learning_rate", name)
        values = (0.01, 0.99 if name == "decay" else 10.0)
        configurations = [{"learning_rate": 1e-2, name: value} for value in values]
        result = sweep.train(small_problem(), method, configurations, seeds=1, steps=40)
        assert np.abs(result.losses[0] - result.losses[1]).max() > 1e-5

    @pytest.mark.slow
    @EIGHT
    @pytest.mark.parametrize(
        ("method", "number"), [("bilb4mtl", 3), ("bilb4mtl", 10), ("mgda", 10), ("rlw", 3)]
    )
    def test_on_eight_devices_it_is_that_on_one(self, method, number):
        """Three configurations are fewer than the devices, ten no multiple of their number."""
        devices = jax.devices()[:8]
        configurations = [{"learning_rate": 0.003 * (1 + i)} for i in range(number)]
        for values in configurations if method == "bilb4mtl" else ():
            values["penalty"] = 10 * values["learning_rate"]
        found, alone = (
            sweep.train(small_problem(), method, configurations, devices=of, **SIZE)
            for of in (devices, devices[:1])
        )
        assert found.configurations == configurations
        np.testing.assert_allclose(found.losses, alone.losses, rtol=1e-4)
        np.testing.assert_allclose(found.errors, alone.errors, rtol=1e-4)
        assert len(np.unique(found.losses[:, :, -1])) == 4 * number

    @EIGHT
    @pytest.mark.parametrize(
        ("number", "used", "each"), [(1, 1, 1), (3, 3, 1), (8, 8, 1), (9, 5, 2)]
    )
    def test_configurations_lie_on_as_many_devices_as_help(self, number, used, each):
        mesh, padded = sweep.spread([*range(number)], jax.devices()[:8])
        assert padded == [*range(number), *[number - 1] * (used * each - number)]
        function = sweep.over_configurations(lambda x, y: jnp.sin(x @ y), (0, None), mesh)
        arguments = jnp.ones((used * each, 2, 3)), jnp.ones((3, 4))
        compiled = jax.jit(function).lower(*arguments).compile()
        assert not cost.collectives(compiled.as_text())
        assert {s.data.shape for s in compiled(*arguments).addressable_shards} == {(each, 2, 4)}
        assert mesh.size == used

    @pytest.mark.parametrize("method", ["ls", "si", "si+marigold", "STL"])
    def test_other_methods_have_the_learning_rate_alone(self, method):
        assert sweep.hyperparameters(method) == ("learning_rate",)

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [1, 3])
    def test_compiled_once(self, caplog, number):
        configurations = [{"learning_rate": 10.0 ** -(2 + i)} for i in range(number)]
        with jax.log_compiles():
            result = sweep.train(small_problem(), "ls", configurations, **SIZE)
        names = [
            message.split("jit(")[1].split(")")[0]
            for message in caplog.messages
            if message.startswith("Finished XLA compilation of jit(")
        ]
        for name in ("start_training", "continue_training", "evaluate"):
            assert names.count(name) == 1, names
        assert result.seconds.compiling > 0
        assert result.losses.shape == (number, 2, 20, 2)


class TestReport:
    def test_the_best_single_task_networks_are_the_reference(self):
        comparison = made_up_comparison()
        assert comparison.reference == {"learning_rate": 0.2}
        np.testing.assert_allclose(comparison.delta_m["STL"], [[100, 100], [-5, 5]], atol=1e-4)
        np.testing.assert_allclose(comparison.delta_m["bilb4mtl"][:2], [[10, 10], [-5, 0]])

    def test_a_diverged_configuration_is_never_the_best(self):
        comparison = made_up_comparison()
        assert comparison.best == {"STL": 1, "bilb4mtl": 1}
        assert sweep.lowest(np.array([np.nan, np.inf, 3.0])) == 2

    def test_table(self):
        lines = sweep.table(made_up_comparison()).splitlines()
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        assert len({len(line) for line in lines}) == 1
        assert cells[0] == [
            *("method", "learning rate", "penalty"),
            *("side", "size", "dm% STL", "best"),
        ]
        assert cells[2] == ["STL", "0.1", "", "20.0", "4.00", "+100.0 ± 0.0", ""]
        assert cells[5] == ["bilb4mtl", "0.1", "0.5", "9.50", "2.00", "-2.5 ± 3.5", "*"]
        assert cells[6][4:] == ["nan", "+nan ± nan", ""]

    def test_ratio(self):
        result = made_up_comparison().trained["bilb4mtl"]
        ways = {
            "together": result.seconds,
            "recompiled": sweep.Seconds(6.0, 1.5),
            "one by one": sweep.Seconds(2.0, 1.9),
        }
        text = sweep.describe_time("bilb4mtl", result, ways)
        assert [line.split()[-1] for line in text.splitlines()[1:4]] == ["1.0", "2.5", "1.3"]
        assert "2.5 times as long" in text

    def test_figure_has_a_panel_per_method_and_a_line_per_learning_rate(self):
        options = sweep.Options(gamma=(0.0, 0.1), penalty=(0.5,))
        methods = ("STL", "ls", "famo", "dwa", "bilb4mtl")
        trained = {}
        for method in methods:
            configurations = sweep.grid(method, options)
            errors = np.linspace(1, 2, 4 * len(configurations)).reshape(-1, 2, 2)
            trained[method] = made_up(configurations, errors)
        picture = sweep.figure(sweep.compare(small_problem(), trained), seeds=2)
        panels = [ax for ax in picture.axes if ax.axison]
        assert [ax.get_title() for ax in panels] == list(methods[1:])
        # The dashed line of STL comes on top.
        assert [len(ax.lines) for ax in panels] == [2, 4, 4, 4]
        assert panels[1].get_xlabel() == "gamma"


class TestCommandLine:
    @pytest.mark.slow
    def test_help(self):
        printed = help_of(SCRIPT)
        flags = ("--method", "--learning-rate", "--penalty", "--temperature", "--gamma", "--decay")
        for word in (
            *flags,
            "--gram",
            "--seeds",
            "--steps",
            "--no-timing",
            "--output",
            "bilb4mtl",
            "famo",
        ):
            assert word in printed

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--method", "nonsense"], "unknown method 'nonsense'; choose from: ls, si"),
            (["--method"], "no method; choose from"),
            (["--seeds", "0"], "at least 1"),
            (["--steps", "0"], "at least 1"),
            (["--penalty"], "--penalty needs at least one value"),
            (["--penalty", "0.1", "-1"], "--penalty must be finite and not negative"),
            (["--learning-rate", "0"], "--learning-rate must be positive"),
            (["--learning-rate", "nan"], "--learning-rate must be positive"),
            (["--method", "dwa", "--temperature", "0"], "--temperature must be positive"),
            (["--method", "ls", "--penalty", "1"], "--penalty is read by none of the methods: ls"),
            (["--gamma", "1"], "--gamma is read by none of the methods: bilb4mtl"),
            (["--method", "mgda", "--decay", "1"], "--decay must be less than 1"),
            (["--method", "mgda", "--gram", "sketch"], "give --decay above 0"),
        ],
    )
    def test_mistakes_are_told_before_any_work(self, monkeypatch, arguments, message):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            sweep.main(lambda options: pytest.fail("work was done"))
        assert message in str(stopped.value.code)

    @pytest.mark.slow
    @pytest.mark.parametrize("timing", [True, False])
    def test_a_run_from_options_to_files(self, monkeypatch, capsys, tmp_path, timing):
        arguments = ["--method", "dwa", "dwa", "--temperature", "4", "0.5", "4", "--seeds", "2"]
        arguments += ["--learning-rate", "0.01", "--steps", "20", "--output", str(tmp_path)]
        arguments += [] if timing else ["--no-timing"]
        monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
        sweep.main(lambda options: small_problem())
        printed = capsys.readouterr().out
        assert ("times as long" in printed) == timing
        for name in ("table.md", "results.json", "figure.png"):
            assert str(tmp_path / name) in printed
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        results = json.loads((tmp_path / "results.json").read_text())
        assert [run.get("temperature") for run in results["runs"]] == [None, 0.5, 4.0]
        assert np.shape(results["runs"][1]["errors"]) == (2, 2)
        assert list(results["seconds"]) == (["dwa"] if timing else [])
