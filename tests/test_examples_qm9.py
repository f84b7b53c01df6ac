"""The QM9 example: cache, descriptors and targets."""

import importlib.util
import os
import sys
import time

import experiment
import numpy as np
import pytest
import qm9

ARRAYS = dict(inputs=np.arange(600.0).reshape(30, 20), targets=np.ones((30, 2), np.float32))


class TestCache:
    @pytest.fixture
    def calls(self):
        return []

    @pytest.fixture
    def prepare(self, calls):
        return lambda: calls.append("prepared") or ARRAYS

    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "cache" / "data.bin"

    def check(self, arrays):
        assert set(arrays) == set(ARRAYS)
        for name, expected in ARRAYS.items():
            np.testing.assert_array_equal(arrays[name], expected)
            assert arrays[name].dtype == expected.dtype

    def test_prepares_once(self, path, prepare, calls):
        self.check(qm9.cached(path, prepare))
        self.check(qm9.cached(path, prepare))
        assert calls == ["prepared"]
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize("length", [0, 10, 32, 33, 2000, -1])
    def test_a_truncated_file_is_prepared_anew(self, path, prepare, calls, length):
        qm9.cached(path, prepare)
        whole = path.read_bytes()
        path.write_bytes(whole[:length])
        self.check(qm9.cached(path, prepare))
        assert len(calls) == 2
        assert path.read_bytes() == whole

    @pytest.mark.parametrize("position", [0, 31, 32, 1000, -1])
    def test_a_flipped_bit_is_noticed(self, path, prepare, calls, position):
        qm9.cached(path, prepare)
        content = bytearray(path.read_bytes())
        content[position] ^= 4
        path.write_bytes(content)
        self.check(qm9.cached(path, prepare))
        assert len(calls) == 2
        self.check(qm9.cached(path, prepare))
        assert len(calls) == 2

    def test_an_interrupted_preparation_leaves_no_cache(self, path, prepare, calls):
        def interrupted():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            qm9.cached(path, interrupted)
        assert not path.exists()
        self.check(qm9.cached(path, prepare))
        assert calls == ["prepared"]

    def test_an_interrupted_rename_leaves_no_file(self, path, prepare, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(qm9.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qm9.cached(path, prepare)
        assert list(path.parent.iterdir()) == []

    def test_temporary_files_of_killed_runs_are_ignored_and_removed(self, path, prepare, calls):
        path.parent.mkdir()
        old, recent = (path.with_name(f"data.bin.{name}.tmp") for name in ("old", "recent"))
        for file in (old, recent):
            file.write_bytes(b"half a cache")
        os.utime(old, (time.time() - 7200,) * 2)
        self.check(qm9.cached(path, prepare))
        assert calls == ["prepared"]
        assert not old.exists()
        assert recent.exists()  # its run may be at work


class TestQM9:
    METHANE = np.array(
        [
            [0, 0, 0],
            [0.63, 0.63, 0.63],
            [-0.63, -0.63, 0.63],
            [-0.63, 0.63, -0.63],
            [0.63, -0.63, -0.63],
        ]
    )

    def describe(self, elements, coordinates):
        padded = np.full((1, qm9.MAX_ATOMS), -1)
        padded[0, : len(elements)] = elements
        positions = np.zeros((1, qm9.MAX_ATOMS, 3))
        positions[0, : len(elements)] = coordinates
        return qm9.descriptors(padded, positions)[0]

    def test_descriptors_of_methane(self):
        values = self.describe([1, 0, 0, 0, 0], self.METHANE)
        eigenvalues, histogram = values[: qm9.MAX_ATOMS], values[qm9.MAX_ATOMS :]
        np.testing.assert_allclose(eigenvalues.sum(), 0.5 * 6**2.4 + 4 * 0.5, rtol=1e-6)
        assert not eigenvalues[5:].any()
        histogram = histogram.reshape(5, 5, -1)
        # Four C-H distances of 1.09 and six H-H ones of 1.78 Angstrom, in bins of 0.36 from 0.8.
        assert histogram.sum() == 10
        assert histogram[0, 1, 0] == 4
        assert histogram[0, 0, 2] == 6

    def test_descriptors_do_not_depend_on_order_or_orientation(self):
        rng = np.random.default_rng(0)
        rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        order = rng.permutation(5)
        elements = np.array([1, 0, 3, 0, 4])
        coordinates = self.METHANE * [1.0, 1.3, 0.8]
        np.testing.assert_allclose(
            self.describe(elements, coordinates),
            self.describe(elements[order], coordinates[order] @ rotation + 3.0),
            atol=1e-6,
        )

    @pytest.mark.parametrize("targets", ["standardised", "raw"])
    def test_problem_keeps_test_molecules_and_units_apart(self, monkeypatch, targets):
        rng = np.random.default_rng(0)
        arrays = dict(
            inputs=rng.normal(3, 2, size=(60, 4)).astype(np.float32),
            targets=rng.normal(5, np.arange(1, 12), size=(60, 11)).astype(np.float32),
        )
        arrays["inputs"][:, 0] = np.arange(60)
        monkeypatch.setattr(qm9, "load", lambda: arrays)
        monkeypatch.setattr(qm9, "TEST", 20)
        problem = qm9.make_problem(qm9.Options(targets=targets))
        assert [task.name for task in problem.tasks] == [name for name, *_ in qm9.TARGETS]
        assert len(problem.pool.inputs) == 40
        assert not set(problem.pool.inputs[:, 0]) & set(problem.test.inputs[:, 0])
        np.testing.assert_allclose(problem.pool.inputs.mean(0), 0, atol=1e-5)
        for k, task in enumerate(problem.tasks):
            column = arrays["targets"][:, k]
            expected = column[20:].std() if targets == "raw" else 1.0
            np.testing.assert_allclose(problem.pool.targets[k].std(), expected, rtol=1e-4)
            error = np.abs(column[:20] - column[20:].mean()).mean()
            error *= 1000 if task.unit == "meV" else 1
            shown = task.error(np.zeros((20, 1)), problem.test.targets[k])
            np.testing.assert_allclose(shown, error, rtol=1e-4)

    def test_a_missing_package_is_explained(self, monkeypatch):
        monkeypatch.setattr(qm9.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(sys, "argv", ["qm9.py"])
        with pytest.raises(SystemExit) as stopped:
            experiment.main(qm9.Options, qm9.make_problem)
        assert "pip install 'bilb[bench]'" in str(stopped.value.code)

    @pytest.mark.slow
    @pytest.mark.skipif(importlib.util.find_spec("qm9pack") is None, reason="needs qm9pack")
    def test_the_molecules(self):
        arrays = qm9.prepare(400)
        for name, values in qm9.prepare(400).items():
            np.testing.assert_array_equal(values, arrays[name])
        targets = arrays["targets"]
        assert targets.shape == (400, 11)
        # Of the whole set; atomisation energies in eV from PyTorch Geometric's documentation.
        mean = [2.7, 75, -6.5, 0.3, 1190, 4.1, -76.0, -76.5, -76.9, -70.7, 31.6]
        spread = [1.5, 8.2, 0.6, 1.3, 280, 0.9, 10.35, 10.44, 10.51, 9.52, 4.1]
        np.testing.assert_allclose(targets.std(0), spread, rtol=0.2)
        assert (np.abs(targets.mean(0) - mean) < 0.25 * np.array(spread)).all()
        assert np.isfinite(arrays["inputs"]).all()
        assert (arrays["inputs"].std(0) > 0).all()
        # Rows of inputs and targets belong together: atoms and atomisation energy.
        atoms = arrays["inputs"][:, :5].sum(1)
        assert np.corrcoef(atoms, targets[:, 6])[0, 1] < -0.9
