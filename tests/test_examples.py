"""What the example scripts share, MultiDigits, and the command lines."""

import dataclasses
import functools
import json
import pathlib
import sys

import balancers
import experiment
import jax
import jax.numpy as jnp
import multidigits
import numpy as np
import optax
import pytest
from conftest import help_of
from contract import mostly_slow

import bilb

EXAMPLES = pathlib.Path(experiment.__file__).parent
TASKS = (
    experiment.Task("shape", classes=3),
    experiment.Task("side", classes=2),
    experiment.Task("size", unit="m", scale=2.0),
)


def small_problem(pool_size=48, train_size=40, **changes):
    """Three tasks on random inputs, learnable from them."""
    rng = np.random.default_rng(0)

    def data(size):
        inputs = rng.normal(size=(size, 5)).astype(np.float32)
        return experiment.Data(
            inputs,
            (
                inputs[:, :3].argmax(1).astype(np.int32),
                (inputs[:, 3] > 0).astype(np.int32),
                inputs[:, 4] * 3,
            ),
        )

    problem = experiment.Problem(
        title="small",
        tasks=TASKS,
        pool=data(pool_size),
        test=data(16),
        train_size=train_size,
        batch_size=8,
        steps=20,
        learning_rate=1e-2,
        hidden=(8,),
    )
    return dataclasses.replace(problem, **changes)


def with_targets(data, task, targets):
    return data._replace(targets=(*data.targets[:task], targets, *data.targets[task + 1 :]))


class TestMultiDigits:
    def test_canvas_shows_both_digits_and_their_clipped_sum(self):
        images = np.stack([np.full((8, 8), 0.25), np.full((8, 8), 0.9)])
        canvases, (left, right, ink) = multidigits.make_pairs(images, np.array([3, 7]), 40, seed=0)
        assert canvases.shape == (40, 10, 10)
        value = {3: 0.25, 7: 0.9}
        assert {(a, b) for a, b in zip(left, right)} == {(a, b) for a in (3, 7) for b in (3, 7)}
        for canvas, a, b, total in zip(canvases, left, right, ink):
            np.testing.assert_allclose(canvas[:2, :8], value[a])
            np.testing.assert_allclose(canvas[8:, 2:], value[b])
            np.testing.assert_allclose(canvas[2:8, 2:8], min(value[a] + value[b], 1.0))
            assert not canvas[:2, 8:].any()
            assert not canvas[8:, :2].any()
            assert total == pytest.approx(canvas.sum())

    def test_digits_of_the_two_pools_are_disjoint(self):
        (train, _), (test, _) = multidigits.digit_pools()
        assert len(train) + len(test) == 1797
        assert min(len(train), len(test)) > 500
        seen = {image.tobytes() for image in train}
        assert not any(image.tobytes() in seen for image in test)

    def test_problem(self):
        problem = multidigits.make_problem(multidigits.Options())
        assert problem.pool.inputs.shape == (multidigits.POOL_PAIRS, 100)
        assert problem.test.inputs.shape == (2000, 100)
        assert problem.pool.inputs.min() >= 0
        assert problem.pool.inputs.max() == 1
        left, right, ink = problem.pool.targets
        assert set(left) == set(right) == set(range(10))
        assert (left != right).any()
        np.testing.assert_allclose([ink.mean(), ink.std()], [0, 1], atol=1e-4)
        # The error of the mean prediction, shown in the unit of the canvas.
        pixels = problem.test.inputs.sum(1)
        shown = problem.tasks[2].error(np.zeros((2000, 1)), problem.test.targets[2])
        deviation = np.abs(pixels - problem.pool.inputs.sum(1).mean()).mean()
        np.testing.assert_allclose(shown, deviation, rtol=1e-3)


class TestBatches:
    def test_epochs_cover_a_subset_that_depends_on_the_seed(self):
        order = experiment.batch_order(small_problem(), steps=12, seeds=2)
        assert order.shape == (2, 12, 8)
        for seed in range(2):
            first, second = order[seed, :5].ravel(), order[seed, 5:10].ravel()
            assert len(set(first)) == 40
            assert set(first) == set(second)
            assert (first != second).any()
        assert set(order[0].ravel()) != set(order[1].ravel())

    def test_the_first_batches_do_not_depend_on_the_number_of_seeds(self):
        problem = small_problem()
        np.testing.assert_array_equal(
            experiment.batch_order(problem, 7, seeds=1)[0],
            experiment.batch_order(problem, 12, seeds=3)[0, :7],
        )

    @pytest.mark.parametrize("sizes", [dict(train_size=49), dict(train_size=7)])
    def test_impossible_sizes_are_refused(self, sizes):
        with pytest.raises(ValueError, match="cannot draw batches"):
            experiment.batch_order(small_problem(**sizes), 5, 1)

    @pytest.mark.parametrize("steps", [1, 7, 20, 97, 1500, 2000])
    def test_chunks_are_equal_and_hold_whole_windows(self, steps):
        length, window = experiment.chunking(steps)
        assert steps % length == 0
        assert length % window == 0
        assert steps // length <= 20
        assert steps // window <= 150 or window == length

    def test_the_default_runs_have_twenty_chunks(self):
        assert experiment.chunking(1500) == (75, 15)
        assert experiment.chunking(2000) == (100, 20)


class TestTraining:
    @pytest.mark.slow
    def test_shapes_and_progress(self):
        run = experiment.train(small_problem(steps=200), "bilb4mtl", seeds=2)
        assert run.errors.shape == (2, 3)
        assert run.losses.shape == run.weights.shape == (2, len(run.steps), 3)
        assert run.steps[-1] == 200
        assert (run.losses[:, -1] < 0.8 * run.losses[:, 0]).all()
        assert (run.errors[0] != run.errors[1]).any()

    @pytest.mark.parametrize(
        "method",
        mostly_slow([*balancers.METHODS, *balancers.AGGREGATORS], fast=["marigold"]),
    )
    def test_every_method_can_be_trained(self, method):
        """Traces the training of every method; compiling them all would take minutes."""
        problem = small_problem()
        settings = experiment.make_settings(
            problem, method, 2, 20, learning_rate=1e-2, penalty=0.05, decay=0.0
        )
        static = dict(method=method, network=problem.network, tasks=problem.tasks)
        rows = experiment.batch_order(problem, 20, seeds=2)
        initial = functools.partial(experiment.initial_parameters, problem.network)
        parameters = jax.eval_shape(initial, problem.pool.inputs[:1], settings.seed)
        start = functools.partial(experiment.start_training, **static)
        carry = jax.eval_shape(start, settings, parameters, problem.pool, rows[:, 0])
        advance = functools.partial(experiment.continue_training, window=4, **static)
        after, (losses, weights) = jax.eval_shape(advance, settings, carry, problem.pool, rows)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, carry)
        assert losses.shape == (2, 1, 5, 3)
        if method in balancers.AGGREGATORS:
            assert weights is None
        else:
            assert weights.shape == losses.shape

    @pytest.mark.slow
    @pytest.mark.parametrize("gram", list(balancers.GRAMS))
    def test_a_chain_of_methods_trains(self, gram):
        problem = small_problem()
        run = experiment.train(problem, "si+mgda", seeds=2, gram=gram, decay=0.5)
        assert np.isfinite(run.errors).all()
        # The weights of MGDA, which sum to one, over those losses.
        np.testing.assert_allclose((run.weights * run.losses).sum(-1), 1.0, rtol=1e-4)

    @pytest.mark.slow
    def test_an_aggregator_gets_the_gradients_of_the_links_in_front(self, monkeypatch):
        """GradDrop that lets everything through is the sum of the task gradients."""
        leaky = lambda settings, shared: bilb.graddrop(settings.seed, leak=1.0, shared=shared)
        monkeypatch.setitem(balancers.AGGREGATORS, "leaky", leaky)
        whole = experiment.train(small_problem(), "si+leaky", seeds=2)
        expected = experiment.train(small_problem(), "si", seeds=2)
        assert whole.weights is None
        np.testing.assert_allclose(whole.losses, expected.losses, rtol=1e-3)
        np.testing.assert_allclose(whole.errors, expected.errors, rtol=1e-3)

    @pytest.mark.slow
    def test_ways_to_take_the_gram_matrix(self):
        exact, stacked, sketch, slow = (
            experiment.train(small_problem(), "si+mgda", seeds=2, gram=gram, decay=decay).losses
            for gram, decay in (("exact", 0.5), ("stacked", 0.5), ("sketch", 0.5), ("exact", 0.9))
        )
        np.testing.assert_allclose(stacked, exact, rtol=1e-3)
        assert np.abs(sketch - exact).max() > 1e-3
        assert np.abs(slow - exact).max() > 1e-3

    @pytest.mark.slow
    def test_effective_weights_are_those_of_the_whole_chain(self):
        run = experiment.train(small_problem(), "si", seeds=2)
        np.testing.assert_allclose(run.weights, 1 / run.losses, rtol=1e-5)
        assert experiment.train(small_problem(), "STL-log", seeds=2).weights is None

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("method", "objective"),
        [
            ("ls", lambda losses: losses.sum()),
            ("si", lambda losses: jnp.log(losses).sum()),
            ("STL", lambda losses: losses[2]),
            ("STL-log", lambda losses: jnp.log(losses[2])),
        ],
    )
    def test_equals_a_plain_loop(self, method, objective):
        """A loop over one seed, and over its last task for the references."""
        problem, seed = small_problem(), 1
        run = experiment.train(problem, method, seeds=2)
        network = problem.network
        schedule = optax.cosine_decay_schedule(1e-2, 20, alpha=0.01)
        optimizer = optax.adam(schedule)

        @jax.jit
        def step(parameters, state, inputs, targets):
            def losses_of(parameters):
                shape, side, size = network.apply(parameters, inputs)
                entropy = optax.softmax_cross_entropy_with_integer_labels
                return jnp.stack(
                    [
                        entropy(shape, targets[0]).mean(),
                        entropy(side, targets[1]).mean(),
                        jnp.mean((size[:, 0] - targets[2]) ** 2),
                    ]
                )

            gradient = jax.grad(lambda p: objective(losses_of(p)))(parameters)
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(parameters, updates), state, losses_of(parameters)

        parameters = network.init(jax.random.key(seed), problem.pool.inputs[:1])
        state = optimizer.init(parameters)
        for t, rows in enumerate(experiment.batch_order(problem, 20, seeds=2)[seed]):
            targets = [target[rows] for target in problem.pool.targets]
            inputs = problem.pool.inputs[rows]
            parameters, state, losses = step(parameters, state, inputs, targets)
            compared = slice(None) if method in experiment.METHODS else slice(2, 3)
            np.testing.assert_allclose(run.losses[seed, t, compared], losses[compared], rtol=2e-4)
        size = network.apply(parameters, problem.test.inputs)[2][:, 0]
        metres = 2.0 * np.abs(size - problem.test.targets[2]).mean()
        np.testing.assert_allclose(run.errors[seed, 2], metres, rtol=1e-3)

    @pytest.mark.slow
    def test_single_task_networks_see_their_own_task_only(self):
        problem = small_problem()
        other = dataclasses.replace(
            problem, pool=with_targets(problem.pool, 2, problem.pool.targets[2] + 5)
        )
        for method, independent in (("STL", True), ("STL-log", True), ("ls", False)):
            before, after = (experiment.train(p, method, seeds=2).losses for p in (problem, other))
            assert (before[..., :2] == after[..., :2]).all() == independent
            assert (before[..., 2] != after[..., 2]).any()

    @pytest.mark.slow
    def test_one_compilation_per_method_whatever_the_penalty(self):
        problem = small_problem(hidden=(7,))
        start = experiment.continue_training._cache_size()
        runs = [experiment.train(problem, "bilb4mtl", seeds=1, penalty=p) for p in (0.0, 0.5)]
        assert experiment.continue_training._cache_size() == start + 1
        assert (runs[0].losses[:, -1] != runs[1].losses[:, -1]).any()

    @pytest.mark.slow
    def test_history_averages_over_windows(self, monkeypatch):
        problem = small_problem()
        fine = experiment.train(problem, "ls", seeds=2)
        monkeypatch.setattr(experiment, "chunking", lambda steps: (10, 5))
        coarse = experiment.train(problem, "ls", seeds=2)
        np.testing.assert_array_equal(coarse.steps, [5, 10, 15, 20])
        np.testing.assert_allclose(
            coarse.losses, fine.losses.reshape(2, 4, 5, 3).mean(2), rtol=1e-5
        )


class TestCommandLine:
    @pytest.mark.slow
    @pytest.mark.parametrize("script", ["multidigits", "qm9"])
    def test_help(self, script):
        printed = help_of(EXAMPLES / f"{script}.py")
        for word in ("--method", "--seeds", "--steps", "--penalty", "--output", "bilb4mtl", "si"):
            assert word in printed
        assert ("--targets" in printed) == (script == "qm9")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--method", "ls", "nonsense"], "unknown method 'nonsense'; choose from: ls, si"),
            (["--method", "si+none+mgda"], "unknown method 'none' in si+none+mgda; choose from"),
            (["--method", "graddrop+si"], "nothing follows it: graddrop+si"),
            (["--method", "si+"], "unknown method '' in si+; choose from"),
            (["--method"], "no method; choose from: ls, si"),
            (["--decay", "1"], "--decay must be at least 0 and less than 1"),
            (["--gram", "sketch"], "give --decay too"),
            (["--seeds", "0"], "at least 1"),
            (["--steps", "0"], "at least 1"),
            (["--penalty", "-1"], "must not be negative"),
            (["--penalty", "inf"], "--penalty must not be negative, and finite; got inf"),
            (["--penalty", "nan"], "finite; got nan"),
            (["--output", f"{__file__}/here"], "test_examples.py is not a folder"),
        ],
    )
    def test_mistakes_are_told_before_any_work(self, monkeypatch, arguments, message):
        monkeypatch.setattr(sys, "argv", ["multidigits.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            experiment.main(multidigits.Options, lambda options: pytest.fail("work was done"))
        assert message in str(stopped.value.code)

    def test_a_folder_without_permission_is_told_before_any_work(self, monkeypatch, tmp_path):
        monkeypatch.setattr(balancers.os, "access", lambda path, mode: path != tmp_path)
        options = multidigits.Options(output=tmp_path / "new" / "folder")
        assert f"nothing may be written in {tmp_path}" in options.mistake()
        assert multidigits.Options(output=tmp_path.parent / "new").mistake() is None
        assert not (tmp_path.parent / "new").exists()

    @pytest.mark.slow
    def test_a_run_from_options_to_files(self, monkeypatch, capsys, tmp_path):
        arguments = ["--method", "si", "ls", "si", "--seeds", "2", "--steps", "20"]
        arguments += ["--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["small.py", *arguments])
        experiment.main(multidigits.Options, lambda options: small_problem(steps=7))
        printed = capsys.readouterr().out
        assert str(tmp_path / "figure.png") in printed
        assert [printed.count(f"\n{name} ") for name in ("si", "ls")] == [1, 1]
        results = json.loads((tmp_path / "results.json").read_text())
        assert list(results["methods"]) == ["STL", "STL-log", "si", "ls"]
        assert results["setting"]["steps"] == 20
        assert len(results["methods"]["si"]["errors"]) == 2
