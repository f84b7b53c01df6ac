"""The examples that tell one story each: quickstart, NNX, missing labels, language."""

import json
import sys

import experiment
import jax
import jax.numpy as jnp
import language
import missing_labels
import multidigits
import nnx
import numpy as np
import pytest
import quickstart
import tyro
from flax import nnx as flax_nnx

STORIES = {
    "nnx": (nnx.Options, multidigits.make_problem, dict(references=("ls",), trained=nnx.train)),
    "missing_labels": (missing_labels.Options, missing_labels.make_problem, {}),
    "language": (language.Options, language.make_problem, dict(references=("ls",))),
}


def run(monkeypatch, story, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{story}.py", *arguments])
    options, make_problem, keywords = STORIES[story]
    experiment.main(options, make_problem, **keywords)


class TestCommandLines:
    @pytest.mark.parametrize("story", STORIES)
    def test_help(self, monkeypatch, capsys, story):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, story, "--help")
        assert stopped.value.code == 0
        printed = capsys.readouterr().out
        for option in ("--method", "--seeds", "--steps", "--output"):
            assert option in printed

    def test_help_of_the_quickstart(self, capsys):
        with pytest.raises(SystemExit):
            tyro.cli(quickstart.main, args=["--help"])
        assert "--steps" in capsys.readouterr().out

    @pytest.mark.slow
    @pytest.mark.parametrize("story", STORIES)
    def test_a_short_run_ends_with_a_table_and_a_figure(self, monkeypatch, capsys, tmp_path, story):
        few = ("--method", "ls", "famo", "--steps", "4", "--seeds", "2", "--output", str(tmp_path))
        run(monkeypatch, story, *few)
        printed = capsys.readouterr().out
        assert "\nfamo " in printed
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        methods = json.loads((tmp_path / "results.json").read_text())["methods"]
        famo = methods["famo"]
        assert np.shape(famo["losses"]) == np.shape(famo["weights"])
        assert np.shape(famo["errors"]) == (2, np.shape(famo["losses"])[-1])
        assert np.isfinite(famo["errors"]).all()
        assert "dm% STL" in printed if story == "missing_labels" else "dm% ls" in printed

    @pytest.mark.slow
    def test_the_quickstart_balances(self, capsys):
        quickstart.main(steps=200)
        _, _, *rows = capsys.readouterr().out.splitlines()
        wrong = {row.split()[0]: float(row.split()[1]) for row in rows}
        assert wrong["log"] < wrong["sum"]
        assert wrong["bilb4mtl"] < wrong["sum"]

    def test_nnx_refuses_aggregators(self, monkeypatch):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, "nnx", "--method", "graddrop")
        assert "unknown method 'graddrop'" in str(stopped.value.code)


class TestNNX:
    @pytest.mark.slow
    def test_statistics_leave_and_those_given_stay(self):
        problem = multidigits.make_problem(multidigits.Options())
        graph, parameters, statistics = flax_nnx.split(
            nnx.Network((10, 10, 1), rngs=flax_nnx.Rngs(0)), flax_nnx.Param, ...
        )
        before = jax.tree.map(np.asarray, statistics)
        settings = experiment.make_settings(problem, "ls", 1, 5, learning_rate=0.0, penalty=0.0)
        value_and_grad, _ = nnx.ingredients(settings, "ls", graph, problem.tasks)
        batch = jax.tree.map(lambda x: x[:8], problem.pool)
        state = value_and_grad.init(parameters, statistics, batch)
        (losses, after), grads, _ = jax.jit(value_and_grad)(parameters, state, statistics, batch)
        assert losses.shape == (3,)
        assert jax.tree.structure(grads) == jax.tree.structure(parameters)
        jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, statistics))
        moved = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), before, after)
        assert all(jax.tree.leaves(moved))


class TestMissingLabels:
    OUTPUTS = jnp.array([[1.0, 2.0, 0.5], [0.0, -1.0, 1.0], [2.0, 0.0, 1.0], [1.0, 1.0, 0.0]])

    @pytest.mark.parametrize("classes", [3, 0])
    def test_loss_is_that_of_the_labels_there_are(self, classes):
        task = missing_labels.Task("task", classes=classes)
        outputs = self.OUTPUTS if classes else self.OUTPUTS[:, :1]
        labels = jnp.array([2.0, jnp.nan, 0.0, jnp.nan])
        known = labels[jnp.array([0, 2])].astype(int if classes else float)
        plain = experiment.Task("task", classes=classes)
        loss, gradient = jax.jit(jax.value_and_grad(task.loss))(outputs, labels)
        there = outputs[jnp.array([0, 2])]
        expected, of_known = jax.jit(jax.value_and_grad(plain.loss))(there, known)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient[jnp.array([0, 2])], of_known, rtol=1e-6)
        np.testing.assert_array_equal(gradient[jnp.array([1, 3])], 0)

    def test_no_label_at_all_teaches_nothing(self):
        tasks = [missing_labels.Task("a", classes=3), missing_labels.Task("b", classes=3)]

        def task_losses(outputs, batch):
            return jnp.stack([t.loss(outputs, y) for t, y in zip(tasks, batch.targets)])

        settings = experiment.Settings(1e-2, 0.05, 0, jnp.ones(2), steps=5, steps_per_epoch=1)
        value_and_grad = missing_labels.driver(settings, "si", task_losses, True)
        labels = jnp.array([2.0, 0.0, 1.0, 1.0]), jnp.full(4, jnp.nan)
        batch = experiment.Data(self.OUTPUTS, labels)
        state = value_and_grad.init(self.OUTPUTS, batch)
        losses, gradient, state = jax.jit(value_and_grad.__call__)(self.OUTPUTS, state, batch)
        assert losses[1] == 0
        assert jnp.isfinite(gradient).all()
        np.testing.assert_array_equal(state.effective_weights > 0, [True, False])

    def test_problem(self):
        problem = missing_labels.make_problem(missing_labels.Options())
        known = [np.mean(~np.isnan(target)) for target in problem.pool.targets]
        np.testing.assert_allclose(known, missing_labels.KNOWN, atol=0.02)
        assert all(np.isfinite(target).all() for target in problem.test.targets)
        # The labels left are those of MultiDigits.
        whole = multidigits.make_problem(multidigits.Options())
        there = ~np.isnan(problem.pool.targets[1])
        np.testing.assert_array_equal(problem.pool.targets[1][there], whole.pool.targets[1][there])


class TestLanguage:
    def test_symbols(self):
        codes = language.encode(["a\n\tä", "~"])
        assert codes.min() >= 0
        assert codes.max() == language.SYMBOLS - 1  # of ä
        assert len(codes) == 6
        assert len(set(codes)) == 5  # the texts are joined by a newline

    def test_texts_are_long_and_differ(self):
        texts = {name: "\n".join(text())[:50_000] for name, text in language.TEXTS.items()}
        assert min(map(len, texts.values())) == 50_000
        assert "async def" in texts["code"]
        assert "Permission" in texts["licences"]
        assert np.mean([c.isdigit() for c in texts["tables"]]) > 0.5

    def test_targets_are_the_next_symbols(self, monkeypatch):
        symbols = iter(range(5))
        numbered = lambda texts: np.arange(20_000) + 100_000 * next(symbols)
        monkeypatch.setattr(language, "encode", numbered)
        problem = language.make_problem(language.Options())
        inputs = problem.pool.inputs
        assert inputs.shape == (language.WINDOWS, 5, language.CONTEXT)
        for k, target in enumerate(problem.pool.targets):
            np.testing.assert_array_equal(target, inputs[:, k] + 1)
            assert target.max() % 100_000 < 18_000  # the last tenth is for testing
            assert problem.test.inputs[:, k].min() % 100_000 >= 18_000

    @pytest.mark.slow
    def test_the_network_does_not_look_ahead(self):
        network = language.Transformer(texts=2, layers=1, heads=2, width=8)
        symbols = jnp.zeros((1, 2, language.CONTEXT), int)
        changed = symbols.at[:, 0, 40:].set(5)

        @jax.jit
        def logits():
            parameters = network.init(jax.random.key(0), symbols)
            return [jnp.stack(network.apply(parameters, s)) for s in (symbols, changed)]

        before, after = logits()
        assert before.shape == (2, 1, language.CONTEXT, language.SYMBOLS)
        np.testing.assert_allclose(after[0, :, :40], before[0, :, :40], atol=1e-5)
        assert (after[0, :, 40:] != before[0, :, 40:]).any(-1).all()
        np.testing.assert_array_equal(after[1], before[1])

    def test_errors_are_bits_per_character(self):
        task = language.Text("text", classes=8)
        bits = jax.jit(task.error)(jnp.zeros((2, 4, 8)), jnp.zeros((2, 4), int))
        np.testing.assert_allclose(bits, 3.0, rtol=1e-6)
