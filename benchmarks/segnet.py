"""SegNet with task attention (MTAN), and losses and errors of dense prediction.

Images are (N, H, W, C), H and W divisible by 32. Pixels without a label do not count: a class of
-1, a depth of 0, a normal of (0, 0, 0).

References:
    Badrinarayanan et al., SegNet, arXiv 1511.00561. Liu et al., MTAN, arXiv 1803.10704.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

FILTERS = (64, 128, 256, 512, 512)


def pool(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the maxima of 2 x 2 windows (N, H/2, W/2, C), and which of the four they are.

    The derivative goes to that one, as in PyTorch. That of ``max`` is shared by all that equal the
    largest: by none, which is 0 / 0, where the compiler rounds a value twice in two ways.
    """
    n, h, w, c = images.shape
    windows = images.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    windows = windows.reshape(n, h // 2, w // 2, c, 4)
    places = windows.argmax(-1)
    return jnp.take_along_axis(windows, places[..., None], axis=-1)[..., 0], places


def unpool(maxima: jax.Array, places: jax.Array) -> jax.Array:
    """Puts maxima (N, h, w, C) back where :func:`pool` found them, (N, 2 h, 2 w, C)."""
    n, h, w, c = maxima.shape
    windows = (jax.nn.one_hot(places, 4, dtype=maxima.dtype) * maxima[..., None]).reshape(
        n, h, w, c, 2, 2
    )
    return windows.transpose(0, 1, 4, 2, 5, 3).reshape(n, 2 * h, 2 * w, c)


def interpolation(size: int, new_size: int) -> np.ndarray:
    """Returns the matrix (new_size, size) of linear interpolation whose end points stay."""
    places = np.linspace(0, size - 1, new_size)
    distance = np.abs(places[:, None] - np.arange(size))
    return np.maximum(1 - distance, 0).astype(np.float32)


def resize(images: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes bilinearly, corners staying where they are."""
    rows, columns = (interpolation(*sizes) for sizes in zip(images.shape[1:3], (height, width)))
    return jnp.einsum("yh,nhwc,xw->nyxc", rows, images, columns)


class ConvBlock(nn.Module):
    """A 3 x 3 convolution, batch normalisation and ReLU."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Returns (N, H, W, width)."""
        x = nn.Conv(self.width, (3, 3), kernel_init=nn.initializers.xavier_normal())(images)
        return nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))


class Attention(nn.Module):
    """Weights in (0, 1) for the features of the shared network, by two 1 x 1 convolutions."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Returns (N, H, W, width)."""
        init = nn.initializers.xavier_normal()
        for activation in (nn.relu, nn.sigmoid):
            images = nn.Conv(self.width, (1, 1), kernel_init=init)(images)
            images = activation(nn.BatchNorm(not train, momentum=0.9)(images))
        return images


class SegNetMTAN(nn.Module):
    """A shared encoder and decoder, and attention of each task to their features.

    Names of the parameters of one task's prediction begin with ``pred``; all others are shared, as
    in the papers' code, the attention among them.
    """

    outputs: tuple[int, ...]  # channels of each task
    filters: tuple[int, ...] = FILTERS

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[list[jax.Array], list[jax.Array]]:
        """Returns the outputs and the last features of the tasks, (N, H, W, ...) each."""
        f, last = self.filters, len(self.filters) - 1
        if len({*f[-2:]}) > 1 or any(n % 2 ** len(f) for n in images.shape[1:3]):
            raise ValueError(
                "the last two filters must be equal and height and width divisible by "
                f"{2 ** len(f)}; got filters {f} and images {images.shape[1:3]}"
            )

        def blocks(width, name, number, x):
            for layer in range(number):
                x = ConvBlock(width, name=f"{name}_{layer}")(x, train)
            return x

        more = lambda level: 1 if level < 2 else 2
        first, second, places, x = [], [], [], images
        for level, width in enumerate(f):
            first.append(blocks(width, f"encoder_{level}", 1, x))
            second.append(blocks(width, f"encoder_more_{level}", more(level), first[-1]))
            x, at = pool(second[-1])
            places.append(at)
        upsampled, decoded = {}, {}
        for level in reversed(range(len(f))):
            width = f[max(level - 1, 0)]
            upsampled[level] = unpool(x, places[level])
            x = blocks(width, f"decoder_{level}", 1, upsampled[level])
            x = decoded[level] = blocks(width, f"decoder_more_{level}", more(level), x)

        # The blocks between attentions are the same for all tasks.
        down, up = (
            [ConvBlock(f[min(i + 1, last)], name=f"encoder_between_{i}") for i in range(len(f))],
            [ConvBlock(f[max(i - 1, 0)], name=f"decoder_between_{i}") for i in range(len(f))],
        )
        outputs, features = [], []
        for task, channels in enumerate(self.outputs):
            x = None
            for level, width in enumerate(f):
                seen = first[level] if x is None else jnp.concatenate([first[level], x], -1)
                attention = Attention(width, name=f"encoder_attention_{task}_{level}")
                x = down[level](attention(seen, train) * second[level], train)
                x = nn.max_pool(x, (2, 2), (2, 2))
            for level in reversed(range(len(f))):
                x = up[level](resize(x, *(2 * n for n in x.shape[1:3])), train)
                seen = jnp.concatenate([upsampled[level], x], -1)
                attention = Attention(
                    f[max(level - 1, 0)], name=f"decoder_attention_{task}_{level}"
                )
                x = attention(seen, train) * decoded[level]
            features.append(x)
            init = nn.initializers.xavier_normal()
            x = nn.Conv(f[0], (3, 3), kernel_init=init, name=f"pred_{task}_0")(x)
            outputs.append(nn.Conv(channels, (1, 1), kernel_init=init, name=f"pred_{task}_1")(x))
        return outputs, features


def unit(vectors: jax.Array) -> jax.Array:
    """Returns vectors of length 1 along the last axis."""
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors / jnp.sqrt(jnp.maximum(squares, 1e-24))


def semantic_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of labels (N, H, W), -1 where there is none."""
    known = labels >= 0
    logs = jax.nn.log_softmax(logits)
    of = jnp.take_along_axis(logs, jnp.where(known, labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(known, of, 0.0)) / jnp.maximum(known.sum(), 1)


def depth_loss(output: jax.Array, depth: jax.Array) -> jax.Array:
    """Returns the mean absolute error of depths (N, H, W, 1), 0 where there is none."""
    known = depth != 0
    errors = jnp.where(known, jnp.abs(output - depth), 0.0)
    return errors.sum() / jnp.maximum(known.sum(), 1)


def normal_loss(output: jax.Array, normals: jax.Array) -> jax.Array:
    """Returns 1 less the mean cosine with normals (N, H, W, 3), which are 0 where there is none."""
    known = normals.sum(-1) != 0
    cosines = jnp.where(known, jnp.sum(unit(output) * normals, -1), 0.0)
    return 1 - cosines.sum() / jnp.maximum(known.sum(), 1)


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns how often a class (row) was taken for which (column), (classes, classes)."""
    classes = logits.shape[-1]
    known = (labels >= 0) & (labels < classes)
    cells = classes * labels[known].astype(int) + logits.argmax(-1)[known]
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def segmentation_metrics(matrix: np.ndarray) -> tuple[float, float]:
    """Returns mean intersection over union of the classes that occur, and pixel accuracy."""
    hits, union = np.diag(matrix), matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    occurs = union > 0
    return float(np.mean(hits[occurs] / union[occurs])), float(hits.sum() / matrix.sum())


def depth_metrics(output: np.ndarray, depth: np.ndarray) -> tuple[float, float]:
    """Returns the mean absolute and the mean relative error."""
    known = depth != 0
    errors = np.abs(output - depth)[known]
    return float(errors.mean()), float((errors / depth[known]).mean())


def normal_metrics(output: np.ndarray, normals: np.ndarray) -> Sequence[float]:
    """Returns mean and median of the angles in degrees, and the shares below 11.25, 22.5 and 30."""
    known = normals.sum(-1) != 0
    cosines = np.sum(np.asarray(unit(output)) * normals, -1)[known]
    angles = np.degrees(np.arccos(np.clip(cosines, -1, 1)))
    shares = [float(np.mean(angles < limit)) for limit in (11.25, 22.5, 30)]
    return float(angles.mean()), float(np.median(angles)), *shares
