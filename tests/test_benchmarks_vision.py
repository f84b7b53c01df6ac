"""NYU-v2, Cityscapes and CelebA on small generated data in their true layouts."""

import dataclasses
import math

import celeba
import cityscapes
import dense
import epochs
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import nyuv2
import optax
import protocol
import pytest
import segnet
from conftest import relative_deviation
from PIL import Image

import bilb

HEIGHT, WIDTH = 32, 64


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def write_dense(root, of, numbers=(3, 2), seed=0):
    """Writes random examples as the authors of MTAN lay them out."""
    rng = np.random.default_rng(seed)
    for part, number in zip(of.parts, numbers):
        for folder in of.folders.values():
            (root / part / folder).mkdir(parents=True)
        for index in range(number):
            normal = rng.normal(size=(HEIGHT, WIDTH, 3))
            arrays = {
                "image": rng.uniform(size=(HEIGHT, WIDTH, 3)),
                "semantic": rng.integers(-1, of.channels["semantic"], (HEIGHT, WIDTH)).astype(
                    float
                ),
                "depth": rng.uniform(0.1, 3, (HEIGHT, WIDTH, 1))
                * (rng.random((1, WIDTH, 1)) > 0.2),
                "normal": normal / np.linalg.norm(normal, axis=-1, keepdims=True),
            }
            for name, folder in of.folders.items():
                np.save(root / part / folder / f"{index}.npy", arrays[name])
    return root


class TestLayout:
    @pytest.mark.parametrize("of", [nyuv2.NYUV2, cityscapes.CITYSCAPES], ids=lambda of: of.title)
    def test_true_layout(self, tmp_path, of):
        root = write_dense(tmp_path, of)
        assert dense.check_layout(root, of) == {"train": 3, "val": 2}
        example = dense.load(root, "val", 1, of)
        assert [*example] == [*of.folders]
        assert example["semantic"].dtype == np.int32

    def test_what_is_wrong_is_told(self, tmp_path):
        of = nyuv2.NYUV2
        with pytest.raises(epochs.LayoutError, match=r"train.image is missing[\s\S]*lorenmt/mtan"):
            dense.check_layout(tmp_path, of)
        root = write_dense(tmp_path / "data", of)
        depth = root / "val" / "depth" / "0.npy"
        np.save(depth, np.zeros((HEIGHT, WIDTH)))
        with pytest.raises(epochs.LayoutError, match=r"depth.0.npy has shape \(32, 64\)"):
            dense.check_layout(root, of)
        depth.unlink()
        with pytest.raises(epochs.LayoutError, match="should hold 2 files"):
            dense.check_layout(root, of)

    def test_images_that_the_network_cannot_take(self, tmp_path, monkeypatch):
        monkeypatch.setitem(globals(), "WIDTH", 48)
        root = write_dense(tmp_path, cityscapes.CITYSCAPES)
        with pytest.raises(epochs.LayoutError, match="divisible by 32"):
            dense.check_layout(root, cityscapes.CITYSCAPES)

    def test_main_says_it_without_a_traceback(self, tmp_path):
        options = nyuv2.Options(tmp_path / "nowhere", output=tmp_path)
        with pytest.raises(SystemExit, match="is missing"):
            dense.main(options, nyuv2.NYUV2)
        options = dataclasses.replace(options, methods=("graddrop",))
        with pytest.raises(SystemExit, match="graddrop"):
            dense.main(options, nyuv2.NYUV2)


class Fixed:
    """A generator of the numbers that augmentation draws."""

    def __init__(self, scale, mirrored):
        self.scale, self.mirrored = scale, mirrored

    def choice(self, values):
        return self.scale

    def integers(self, end):
        return end - 1

    def random(self):
        return 0.0 if self.mirrored else 1.0


class TestAugmentation:
    def test_a_mirror(self, tmp_path):
        root = write_dense(tmp_path, nyuv2.NYUV2)
        example = dense.load(root, "train", 0, nyuv2.NYUV2)
        mirrored = dense.augmented(example, Fixed(1.0, mirrored=True))
        for name in ("image", "semantic", "depth"):
            np.testing.assert_allclose(mirrored[name], example[name][:, ::-1], rtol=1e-5)
        expected = example["normal"][:, ::-1] * np.array([-1, 1, 1])
        np.testing.assert_allclose(mirrored["normal"], expected, rtol=1e-4, atol=1e-6)
        same = dense.augmented(example, Fixed(1.0, mirrored=False))
        np.testing.assert_array_equal(same["semantic"], example["semantic"])

    def test_a_crop(self, tmp_path):
        root = write_dense(tmp_path, nyuv2.NYUV2)
        example = dense.load(root, "train", 0, nyuv2.NYUV2)
        crop = dense.augmented(example, Fixed(1.5, mirrored=False))
        assert all(crop[name].shape == example[name].shape for name in example)
        # The last corner stays, and what is seen larger is nearer.
        np.testing.assert_allclose(crop["image"][-1, -1], example["image"][-1, -1], rtol=1e-4)
        np.testing.assert_allclose(crop["depth"][-1, -1], example["depth"][-1, -1] / 1.5, rtol=1e-5)
        assert set(np.unique(crop["semantic"])) <= set(np.unique(example["semantic"]))


class TestSegNet:
    def test_the_derivative_of_a_maximum_goes_to_its_one_place(self):
        derivative = jax.grad(lambda images: segnet.pool(images)[0].sum())(jnp.ones((1, 2, 2, 1)))
        np.testing.assert_array_equal(derivative.ravel(), [1, 0, 0, 0])

    def test_pool_and_unpool(self, rng):
        images = jnp.asarray(rng.normal(size=(2, 4, 6, 3)), jnp.float32)
        maxima, places = segnet.pool(images)
        np.testing.assert_array_equal(maxima, nn.max_pool(images, (2, 2), (2, 2)))
        back = np.asarray(segnet.unpool(maxima, places))
        found = back != 0
        np.testing.assert_array_equal(back[found], np.asarray(images)[found])
        np.testing.assert_array_equal(found.reshape(2, 2, 2, 3, 2, 3).sum((2, 4)), 1)

    @pytest.mark.parametrize(("size", "new"), [(5, 10), (7, 7), (20, 13), (1, 2)])
    def test_interpolation(self, size, new):
        matrix = segnet.interpolation(size, new)
        np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-6)
        line = np.arange(size) * 2.0 + 1
        np.testing.assert_allclose(matrix @ line, np.linspace(1, line[-1], new), rtol=1e-5)

    @pytest.mark.slow
    def test_outputs_at_the_true_size(self):
        network = segnet.SegNetMTAN((13, 1, 3))
        images = jax.ShapeDtypeStruct((2, 288, 384, 3), jnp.float32)
        init = lambda images: network.init_with_output(jax.random.key(0), images, True)
        (outputs, features), variables = jax.eval_shape(init, images)
        assert [o.shape for o in outputs] == [(2, 288, 384, c) for c in (13, 1, 3)]
        assert {f.shape for f in features} == {(2, 288, 384, 64)}
        shared = epochs.shared(variables["params"])
        heads = [name for name, of in shared.items() if not all(jax.tree.leaves(of))]
        assert sorted(heads) == [f"pred_{task}_{i}" for task in range(3) for i in range(2)]

    def test_sizes_that_do_not_fit(self):
        with pytest.raises(ValueError, match="divisible by 32"):
            segnet.SegNetMTAN((2,)).init(jax.random.key(0), jnp.zeros((1, 32, 40, 3)), True)


class TestLossesAndMetrics:
    def test_semantic(self, rng):
        logits = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
        labels = rng.integers(-1, 5, (2, 3, 4))
        logs = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
        picked = [logs[i][labels[i]] for i in np.ndindex(labels.shape) if labels[i] >= 0]
        loss = segnet.semantic_loss(jnp.asarray(logits), jnp.asarray(labels))
        np.testing.assert_allclose(loss, -np.mean(picked), rtol=1e-5)
        matrix = segnet.confusion(logits, labels)
        assert matrix.sum() == len(picked)
        guess, known = logits.argmax(-1), labels >= 0
        of = lambda c: (
            np.sum((guess == c) & (labels == c)) / np.sum(known & ((guess == c) | (labels == c)))
        )
        miou, accuracy = segnet.segmentation_metrics(matrix)
        assert miou == pytest.approx(np.mean([of(c) for c in range(5)]))
        assert accuracy == pytest.approx(np.mean(guess[known] == labels[known]))

    def test_depth(self):
        depth, output = (
            np.array([[0.0, 2.0, 4.0]])[..., None],
            np.array([[9.0, 1.0, 7.0]])[..., None],
        )
        assert segnet.depth_loss(jnp.asarray(output), jnp.asarray(depth)) == pytest.approx(2.0)
        assert segnet.depth_metrics(output, depth) == pytest.approx((2.0, (0.5 + 0.75) / 2))

    def test_normals(self):
        angles = np.radians([0.0, 20.0, 25.0, 60.0])
        truth = np.array([[0.0, 0, 0], *[[0, 0, 1.0]] * 4])[None, None]
        output = np.stack([np.sin(angles), 0 * angles, np.cos(angles)], -1) * 3
        output = np.concatenate([[[1.0, 2, 3]], output])[None, None]
        loss = segnet.normal_loss(jnp.asarray(output), jnp.asarray(truth))
        assert loss == pytest.approx(1 - np.cos(angles).mean(), rel=1e-5)
        found = segnet.normal_metrics(output, truth)
        assert found == pytest.approx((26.25, 22.5, 0.25, 0.5, 0.75), rel=1e-3)

    def test_bases_are_zero(self):
        for of in (nyuv2.NYUV2, cityscapes.CITYSCAPES):
            assert len(of.base) == len(of.metrics)
            assert dense.delta_m(np.array(of.base), of) == pytest.approx(0)
        better = np.array(nyuv2.NYUV2.base) * [1.1, 1.1, 0.9, 0.9, 0.9, 0.9, 1.1, 1.1, 1.1]
        assert dense.delta_m(better, nyuv2.NYUV2) == pytest.approx(-10, rel=1e-3)
        assert len(celeba.PUBLISHED_STL) == celeba.NUM_TASKS


class Tiny(nn.Module):
    """A network with batch normalisation whose first task's outputs are its features."""

    @nn.compact
    def __call__(self, images, train):
        x = nn.BatchNorm(not train, momentum=0.5)(images)
        return nn.Dense(2, name="pred")(nn.Dense(3)(x)), x


class TestTrainer:
    @pytest.mark.slow
    def test_a_step_is_that_of_optax(self, rng):
        batch = {"image": jnp.asarray(rng.normal(2, 3, (6, 4)), jnp.float32), "y": jnp.ones((6, 2))}
        losses = lambda outputs, batch: jnp.mean((outputs - batch["y"]) ** 2, 0)
        trainer = epochs.Trainer(Tiny(), losses, bilb.log_losses(), 0.1)
        carry = epochs.with_rate(trainer.start(0, batch), 0.01)

        def objective(parameters):
            variables = {"params": parameters, "batch_stats": carry.batch_stats}
            (outputs, _), changed = Tiny().apply(
                variables, batch["image"], True, mutable=["batch_stats"]
            )
            return jnp.log(losses(outputs, batch)).sum(), changed

        gradient, changed = jax.grad(objective, has_aux=True)(carry.parameters)
        adam = optax.adam(0.01)
        updates, _ = adam.update(gradient, adam.init(carry.parameters))
        expected = optax.apply_updates(carry.parameters, updates)
        new = trainer.step(jax.tree.map(jnp.copy, carry), batch)
        for ours, theirs in zip(jax.tree.leaves(new.parameters), jax.tree.leaves(expected)):
            assert relative_deviation(ours, theirs) < 1e-3
        mean = new.batch_stats["BatchNorm_0"]["mean"]
        np.testing.assert_allclose(mean, changed["batch_stats"]["BatchNorm_0"]["mean"], rtol=1e-5)
        np.testing.assert_allclose(mean, 0.5 * batch["image"].mean(0), rtol=1e-4)


@pytest.mark.slow
class TestDenseTraining:
    @pytest.mark.parametrize(
        ("of", "options", "method", "images"),
        [
            (nyuv2.NYUV2, nyuv2.Options, "nash_mtl", 4),
            # The last batch has one image. Every size is a program, and a long compilation.
            (cityscapes.CITYSCAPES, cityscapes.Options, "bilb4mtl_cityscapes@penalty=0.1", 3),
        ],
        ids=["nyuv2", "cityscapes"],
    )
    def test_main(self, tmp_path, monkeypatch, of, options, method, images):
        root = write_dense(tmp_path / "data", of, (images, 2))
        options = options(
            root, (method,), seeds=1, epochs=2, batch_size=2, filters=(2, 2), last=1,
            output=tmp_path,
        )  # fmt: skip
        dense.main(options, of)
        (line,) = protocol.read(tmp_path / "runs.jsonl")
        assert len(line["metrics"]) == len(of.metrics)
        assert np.isfinite(line["metrics"]).all()
        assert f"| {method} | 1 |" in (tmp_path / "table.md").read_text()
        monkeypatch.setattr(dense, "train", lambda *args: pytest.fail("trained again"))
        dense.main(options, of)


def write_faces(root, number=12, size=40):
    """Writes random faces as CelebA lays them out."""
    rng = np.random.default_rng(0)
    for folder in ("Anno", "Eval", "Img/img_align_celeba"):
        (root / folder).mkdir(parents=True)
    rows, parts = [], []
    for index in range(number):
        name = f"{index + 1:06d}.jpg"
        labels = rng.choice(["1", "-1"], celeba.NUM_TASKS)
        rows.append(f"{name} {'  '.join(labels)}")
        parts.append(f"{name} {[0, 0, 1, 2][index % 4]}")
        shade = np.full((size + 4, size, 3), 255 * (labels[0] == "1"), np.uint8)
        Image.fromarray(shade).save(root / "Img" / "img_align_celeba" / name)
    names = " ".join(f"attribute_{k}" for k in range(celeba.NUM_TASKS))
    (root / "Anno" / "list_attr_celeba.txt").write_text(
        "\n".join([str(number), names, *rows]) + "\n"
    )
    (root / "Eval" / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return root


class TestCelebA:
    def test_true_layout(self, tmp_path):
        root = write_faces(tmp_path)
        parts = celeba.read_lists(root)
        assert {name: len(faces.names) for name, faces in parts.items()} == {
            "train": 6,
            "validation": 3,
            "test": 3,
        }
        train = parts["train"]
        assert train.names[:3].tolist() == ["000001.jpg", "000002.jpg", "000005.jpg"]
        batch = next(celeba.batches(root, train, [2, 0], size=8, batch_size=5))
        assert batch["image"].shape == (2, 8, 8, 3)
        np.testing.assert_array_equal(batch["labels"], train.labels[[2, 0]])
        np.testing.assert_allclose(batch["image"].mean((1, 2, 3)), batch["labels"][:, 0], atol=0.02)

    def test_what_is_wrong_is_told(self, tmp_path):
        with pytest.raises(epochs.LayoutError, match=r"missing[\s\S]*mmlab"):
            celeba.read_lists(tmp_path)
        root = write_faces(tmp_path / "data")
        partition = root / "Eval" / "list_eval_partition.txt"
        text = partition.read_text()
        partition.write_text("\n".join(text.splitlines()[:-1]))
        with pytest.raises(epochs.LayoutError, match="does not list"):
            celeba.read_lists(root)
        partition.write_text(text)
        (root / "Img" / "img_align_celeba" / "000001.jpg").unlink()
        with pytest.raises(epochs.LayoutError, match=r"000001\.jpg is missing"):
            celeba.read_lists(root)

    def test_f1(self):
        predicted, labels = (
            np.array([[1, 0], [1, 0], [0, 1.0]]),
            np.array([[1, 0], [0, 0], [1, 0.0]]),
        )
        np.testing.assert_allclose(celeba.f1_scores(predicted, labels), [0.5, 0], atol=1e-6)

    def test_network_at_the_true_size(self):
        network = celeba.Network((64, 128, 256, 512))
        images = jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)
        init = lambda images: network.init_with_output(jax.random.key(0), images, True)
        (logits, features), variables = jax.eval_shape(init, images)
        assert (logits.shape, features.shape) == ((4, 40), (4, 512))
        kernels = [math.prod(x.shape) for x in jax.tree.leaves(variables["params"]) if x.ndim > 1]
        expected = 9 * (
            3 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 512 * 512
        )
        assert sum(kernels) == expected + 2 * 512 * 512 + 512 * 40

    @pytest.mark.slow
    def test_main(self, tmp_path, monkeypatch):
        root = write_faces(tmp_path / "data")
        options = celeba.Options(
            root, ("bilb4mtl_celeba@penalty=0.01",), seeds=1, epochs=2, batch_size=4, size=16,
            channels=(2, 2, 2, 2), output=tmp_path,
        )  # fmt: skip
        celeba.main(options)
        (line,) = protocol.read(tmp_path / "runs.jsonl")
        assert len(line["f1"]) == celeba.NUM_TASKS
        assert "-1.31" in (tmp_path / "table.md").read_text()
        monkeypatch.setattr(celeba, "train", lambda *args: pytest.fail("trained again"))
        celeba.main(options)
