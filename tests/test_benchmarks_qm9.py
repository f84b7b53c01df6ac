"""The papers' QM9 protocol on a handful of molecules: graphs, network, schedule, interruption."""

import itertools

import jax
import jax.numpy as jnp
import molecules
import numpy as np
import pytest
from conftest import load_benchmark

benchmark = load_benchmark("qm9")

H, C, N, O = range(4)  # noqa: E741


def molecule(atoms, positions, size=None):
    """Returns elements and positions, padded."""
    size = size or len(atoms)
    elements, padded = np.full(size, -1, np.int8), np.zeros((size, 3), np.float32)
    elements[: len(atoms)], padded[: len(atoms)] = atoms, positions
    return jnp.asarray(elements), jnp.asarray(padded)


def formaldehyde(size=None):
    return molecule(
        [C, O, H, H], [[0, 0, 0], [1.21, 0, 0], [-0.6, 0.93, 0], [-0.6, -0.93, 0]], size
    )


def benzene():
    angles = np.arange(6) * np.pi / 3
    ring = np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)
    return molecule([C] * 6 + [H] * 6, np.concatenate([1.395 * ring, 2.48 * ring]))


def cyanide():
    return molecule([H, C, N], [[0, 0, 0], [1.07, 0, 0], [2.22, 0, 0]])


def methane():
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    return molecule([C, *[H] * 4], np.concatenate([[[0, 0, 0]], 0.63 * corners]))


class TestGraphs:
    def kinds(self, elements, positions):
        distances = jnp.linalg.norm(positions[:, None] - positions, axis=-1)
        return np.asarray(molecules.bonds(elements, distances))

    @pytest.mark.slow
    def test_bonds(self):
        single, double, triple, aromatic = np.eye(4)
        kinds = self.kinds(*formaldehyde())
        np.testing.assert_array_equal(kinds[0, 1], double)
        np.testing.assert_array_equal(kinds[0, 2], single)
        assert kinds.sum() == 6  # three bonds, both ways
        np.testing.assert_array_equal(self.kinds(*cyanide())[1, 2], triple)
        kinds = self.kinds(*benzene())
        np.testing.assert_array_equal(kinds[0, 1], aromatic)
        np.testing.assert_array_equal(kinds[0, 6], single)
        assert kinds.sum() == 24
        assert self.kinds(*methane()).sum() == 8

    @pytest.mark.parametrize(
        ("made", "atom", "expected"),
        [
            # element, then atomic number, aromatic, sp, sp2, sp3, hydrogens
            (methane, 0, [0, 1, 0, 0, 0, 6, 0, 0, 0, 1, 4]),
            pytest.param(methane, 1, [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0], marks=pytest.mark.slow),
            pytest.param(
                formaldehyde, 0, [0, 1, 0, 0, 0, 6, 0, 0, 1, 0, 2], marks=pytest.mark.slow
            ),
            pytest.param(cyanide, 2, [0, 0, 1, 0, 0, 7, 0, 1, 0, 0, 0], marks=pytest.mark.slow),
            (benzene, 3, [0, 1, 0, 0, 0, 6, 1, 0, 1, 0, 1]),
        ],
    )
    def test_features(self, made, atom, expected):
        atoms, edges = molecules.features(*made())
        np.testing.assert_array_equal(atoms[atom], expected)
        assert atoms.shape[-1] == molecules.ATOM_FEATURES
        assert edges.shape[-1] == molecules.EDGE_FEATURES
        expected = np.linalg.norm(made()[1][1] - made()[1][0])
        np.testing.assert_allclose(edges[0, 1, -1], expected, rtol=1e-6)


class TestNetwork:
    network = molecules.MessagePassing(num_tasks=3, dim=6)

    def outputs(self, parameters, graph):
        return np.asarray(self.network.apply(parameters, *graph))

    @pytest.mark.slow
    def test_neither_order_nor_padding_nor_rotation_matters(self):
        elements, positions = formaldehyde()
        parameters = self.network.init(jax.random.key(0), elements, positions)
        expected = self.outputs(parameters, (elements, positions))
        order = jnp.array([2, 0, 3, 1])
        moved = self.outputs(parameters, (elements[order], positions[order]))
        np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            self.outputs(parameters, formaldehyde(7)), expected, rtol=1e-4, atol=1e-6
        )
        turned = positions @ jnp.linalg.qr(jax.random.normal(jax.random.key(1), (3, 3)))[0]
        np.testing.assert_allclose(
            self.outputs(parameters, (elements, turned)), expected, rtol=1e-3, atol=1e-5
        )
        assert not np.allclose(self.outputs(parameters, methane()), expected)

    @pytest.mark.slow
    def test_messages_are_those_of_a_matrix_per_edge(self):
        dim = 4
        convolution = molecules.EdgeConvolution(dim, hidden=5)
        keys = jax.random.split(jax.random.key(0), 3)
        atoms, edges = (jax.random.normal(k, s) for k, s in zip(keys, [(3, dim), (3, 3, 5)]))
        joined = jnp.array([[0, 1, 1], [1, 0, 0], [1, 0, 0]], jnp.float32)
        variables = convolution.init(keys[2], atoms, edges, joined)
        p = variables["params"] | {"bias": jnp.arange(16.0).reshape(4, 4)}
        dense = lambda layer, x: x @ layer["kernel"] + layer["bias"]
        expected = []
        for i in range(3):
            messages = []
            for j in range(3):
                if joined[i, j]:
                    hidden = jax.nn.relu(dense(p["edge"], edges[i, j]))
                    theta = (hidden @ p["kernel"]).reshape(dim, dim) + p["bias"]
                    messages.append(atoms[j] @ theta)
            expected.append(sum(messages) / len(messages) + dense(p["root"], atoms[i]))
        actual = convolution.apply({"params": p}, atoms, edges, joined)
        np.testing.assert_allclose(actual, jnp.stack(expected), rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_shared_parameters(self):
        parameters = self.network.init(jax.random.key(0), *methane())
        shared = molecules.trunk(parameters)["params"]
        assert not any(jax.tree.leaves(shared.pop("heads")))
        assert all(jax.tree.leaves(shared))


class TestPlateau:
    def test_waits_then_reduces(self):
        plateau = benchmark.Plateau(1.0, factor=0.5, patience=2, lowest=0.2)
        values = [5.0, 4.0, 4.0, 4.0, 4.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
        rates = [plateau.update(value) for value in values]
        assert rates == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.2]

    def test_like_the_original(self):
        torch = pytest.importorskip("torch")
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="min", factor=0.7, patience=5, min_lr=1e-5
        )
        ours = benchmark.Plateau(1e-3)
        for value in np.random.default_rng(0).normal(50, 5, 80):
            theirs.step(float(value))
            assert ours.update(float(value)) == pytest.approx(optimizer.param_groups[0]["lr"])


@pytest.fixture(scope="module")
def data():
    """A hundred and fifty molecules, small ones stretched at random, with targets of their own."""
    rng = np.random.default_rng(0)
    makers = (methane, cyanide, formaldehyde)
    graphs = []
    for maker in itertools.islice(itertools.cycle(makers), 200):
        elements, positions = (np.asarray(part) for part in maker())
        grown = positions * rng.uniform(0.97, 1.03)
        graphs.append([np.asarray(part) for part in molecule(elements, grown, size=5)])
    elements, positions = (np.stack(part) for part in zip(*graphs))
    size = np.abs(positions).sum((1, 2))
    targets = size[:, None] * np.arange(1, 12) + rng.normal(size=(200, 11))
    return benchmark.split(molecules.Graphs(elements, positions, targets.astype(np.float32)))


def options_in(folder, **values):
    values = {"epochs": 2, "dim": 4, "molecules": 1440, "seeds": 1} | values
    return benchmark.Options(output=folder, **values)


class TestTraining:
    def test_split(self, data):
        assert [len(part.targets) for part in data[:3]] == [168, 16, 16]
        np.testing.assert_allclose(data.train.targets.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(data.train.targets.std(0, ddof=1), 1, rtol=1e-4)

    @pytest.mark.slow
    def test_errors_are_in_the_units_of_the_papers(self, data, tmp_path):
        trainer = benchmark.Trainer("ls", data, 0, options_in(tmp_path))
        outputs = jax.vmap(molecules.MessagePassing(11, 4).apply, (None, 0, 0))(
            trainer.parameters, data.test.elements, data.test.positions
        )
        expected = np.abs(outputs - data.test.targets).mean(0) * data.scale
        actual = trainer.errors(trainer.parameters, data.test, size=5)
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
        change = expected / np.array(benchmark.PUBLISHED_STL) - 1
        assert trainer.criterion(actual) == pytest.approx(100 * change.mean(), rel=1e-3)

    @pytest.mark.slow
    def test_an_interrupted_run_goes_on(self, data, tmp_path, monkeypatch):
        options = options_in(tmp_path)
        whole = benchmark.train("si", data, 0, options, tmp_path / "whole")
        next_epoch = benchmark._next_epoch

        def killed(trainer, carry, progress, number):
            if number == 2:
                raise KeyboardInterrupt
            return next_epoch(trainer, carry, progress, number)

        monkeypatch.setattr(benchmark, "_next_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            benchmark.train("si", data, 0, options, tmp_path / "part")
        monkeypatch.setattr(benchmark, "_next_epoch", next_epoch)
        part = benchmark.train("si", data, 0, options, tmp_path / "part")
        np.testing.assert_allclose(part["errors"], whole["errors"], rtol=1e-5)
        assert part["best_epoch"] == whole["best_epoch"]
        assert not (tmp_path / "part").exists()

    @pytest.mark.slow
    def test_the_best_epoch_on_validation_counts(self, data, tmp_path, monkeypatch):
        values = iter([3.0, 1.0, 2.0])
        monkeypatch.setattr(benchmark.Trainer, "criterion", lambda self, errors: next(values))
        line = benchmark.train("ls", data, 0, options_in(tmp_path, epochs=3), tmp_path / "run")
        assert line["best_epoch"] == 2

    @pytest.mark.slow
    def test_main(self, data, tmp_path, monkeypatch):
        monkeypatch.setattr(molecules, "load", lambda size: None)
        monkeypatch.setattr(benchmark, "split", lambda graphs: data)
        options = options_in(tmp_path, methods=("ls", "STL@task=0"), epochs=1)
        benchmark.main(options)
        lines = benchmark.protocol.read(tmp_path / "qm9.jsonl")
        assert [line["method"] for line in lines] == ["ls", "STL@task=0"]
        text = (tmp_path / "qm9.md").read_text()
        assert "| ls | 0.001 | 1 |" in text
        assert "+177.6" in text
        monkeypatch.setattr(benchmark, "train", lambda *args: pytest.fail("trained again"))
        benchmark.main(options)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"methods": ("STL",)}, "task"),
            ({"methods": ("ls@task=1",)}, "task"),
            ({"methods": ("STL@task=11",)}, "11"),
            ({"methods": ("nothing",)}, "nothing"),
            ({"molecules": 10}, "--molecules"),
            ({"epochs": 0}, "--epochs"),
            ({"batch_size": 0}, "--batch-size"),
            ({"learning_rate": 0.0}, "--learning-rate"),
        ],
    )
    def test_mistakes(self, tmp_path, values, message):
        assert message in options_in(tmp_path, **values).mistake()


def made_up_line(method, rate, seed, errors, validation):
    setting = {"method": method, "learning_rate": rate, "seed": seed, "seconds_per_epoch": 1.0}
    return setting | {"errors": [*errors], "validation": [*validation]}


def test_own_single_task_networks():
    """Of each task those at the learning rate with the lowest validation error."""
    ones, lines = np.ones(11), []
    for task in range(11):
        name, better = f"STL@task={task}", 1e-3 if task < 4 else 1e-2
        for rate in (1e-3, 1e-2):
            validation = ones if rate == better else 2 * ones
            for seed in (0, 1):
                errors = (task + seed) * ones if rate == better else -ones
                lines.append(made_up_line(name, rate, seed, errors, validation))
    np.testing.assert_array_equal(benchmark.own_stl(lines), np.arange(11) + 0.5)
    assert benchmark.own_stl(lines[:-4]) is None


def test_the_table_has_a_row_for_each_learning_rate():
    twice, ones = 2 * np.array(benchmark.PUBLISHED_STL), np.ones(11)
    lines = [
        made_up_line("si", 1e-2, 0, twice, ones),
        made_up_line("si", 1e-3, 0, twice / 2, ones),
        made_up_line("si", 1e-3, 1, twice, ones),
        made_up_line("ls", 1e-3, 0, twice, ones),
    ]
    rows = [row.split(" | ") for row in benchmark.table(lines).splitlines()[2:]]
    rows = [(row[0].strip("| "), *row[1:3], row[-2]) for row in rows]
    assert [row[:3] for row in rows] == [
        ("si", "0.001", "2"),
        ("ls", "0.001", "1"),
        ("si", "0.01", "1"),
    ]
    assert rows[0][3].startswith("+50.0 ± ")
    assert rows[2][3] == "+100.0 ± inf"
