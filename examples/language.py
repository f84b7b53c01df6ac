"""A small transformer on five kinds of text at once: whose next character counts how much?

The text is on every machine that runs this: Python sources of the standard library, the reference
manual that ``help()`` prints, the licences of installed packages, type stubs of NumPy, and the
tables of scikit-learn. One network reads all of them, one cross-entropy per kind is a task, and the
kinds are learnt at different speeds: tables are mostly digits, licences repeat themselves.

    python examples/language.py                              # some minutes on two cores
    python examples/language.py --steps 20 --method ls       # to see it run
    python examples/language.py --method si+marigold rlw --seeds 2

Errors are bits per character on the last tenth of each text. What is compared against is the plain
sum of the losses (ls). Nothing is downloaded; the numbers depend on the installed versions.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pydoc_data.topics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

import experiment
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets
import tyro

SYMBOLS = 98  # tab, newline and printable ASCII count, all else is one more
CONTEXT = 64  # characters
WINDOWS, TEST_WINDOWS = 4_000, 64  # of each text
CHARACTERS = 400_000  # of each text at most


@dataclasses.dataclass(frozen=True)
class Options(experiment.Options):
    """Predicts the next character of code, manual, licences, stubs and tables."""

    method: Annotated[tuple[str, ...], tyro.conf.arg(help="Methods as in multidigits.py.")] = (
        "ls",
        "si",
        "bilb4mtl",
    )
    seeds: int = 1
    """Number of seeds, trained side by side."""
    output: Path = Path("outputs/language")
    """Folder for the table, its numbers and the figure."""


def read(paths: Iterable[Path]) -> Iterator[str]:
    """Returns the text of the files, each once."""
    seen = set()
    for path in sorted(paths):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text not in seen:
            seen.add(text)
            yield text


def licences() -> list[Path]:
    """Returns the licence files of the installed packages."""
    files = [file for dist in importlib.metadata.distributions() for file in dist.files or ()]
    names = [file for file in files if file.name.upper().startswith(("LICENSE", "LICENCE"))]
    return [path for path in (Path(file.locate()) for file in names) if path.is_file()]


LIBRARY = Path(json.__file__).parent.parent
TEXTS: dict[str, Callable[[], Iterable[str]]] = {
    "code": lambda: read((LIBRARY / "asyncio").glob("*.py")),
    "manual": lambda: pydoc_data.topics.topics.values(),
    "licences": lambda: read(licences()),
    "stubs": lambda: read(Path(np.__file__).parent.rglob("*.pyi")),
    "tables": lambda: read((Path(sklearn.datasets.__file__).parent / "data").glob("*.csv")),
}


def encode(texts: Iterable[str]) -> np.ndarray:
    """Returns the symbols of the texts, one after the other."""
    codes = np.frombuffer("\n".join(texts)[:CHARACTERS].encode("latin-1", "replace"), np.uint8)
    table = np.full(256, SYMBOLS - 1)
    table[[9, 10, *range(32, 127)]] = np.arange(SYMBOLS - 1)
    return table[codes].astype(np.int32)


class Text(experiment.Task):
    """The prediction of the next character of one kind of text."""

    def error(self, output: jax.Array, target: jax.Array) -> jax.Array:
        """Returns bits per character."""
        return self.loss(output, target) / jnp.log(2.0)


class Block(nn.Module):
    """Attention to the characters before, and two dense layers."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (..., context, width), from the same shape."""
        mask = nn.make_causal_mask(jnp.ones(x.shape[:-1]))
        x += nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(hidden)


class Transformer(nn.Module):
    """A small causal transformer; everything in it is shared."""

    texts: int
    layers: int = 2
    heads: int = 4
    width: int = 64

    shared = True

    @nn.compact
    def __call__(self, symbols: jax.Array) -> tuple[jax.Array, ...]:
        """Returns logits (batch, context, symbols) for each text, from (batch, texts, context)."""
        positions = nn.Embed(CONTEXT, self.width)(jnp.arange(CONTEXT))
        x = nn.Embed(SYMBOLS, self.width)(symbols) + positions
        for _ in range(self.layers):
            x = Block(self.heads)(x)
        logits = nn.Dense(SYMBOLS)(nn.LayerNorm()(x))
        return tuple(logits[:, k] for k in range(self.texts))


class Problem(experiment.Problem):
    """Texts, for a transformer."""

    @property
    def network(self) -> Transformer:
        """The network to train."""
        return Transformer(len(self.tasks))


def make_problem(options: Options) -> Problem:
    """Returns the texts as a problem: a row has one window of each, at an offset of its own."""
    del options
    texts = [encode(texts()) for texts in TEXTS.values()]
    rng = np.random.default_rng(0)

    def data(number: int, first: float, last: float) -> experiment.Data:
        windows = []
        for text in texts:
            low, high = int(first * len(text)), int(last * len(text)) - CONTEXT - 1
            starts = rng.integers(low, high, size=number)
            windows.append(text[starts[:, None] + np.arange(CONTEXT + 1)])
        stacked = np.stack(windows, axis=1)  # (number, texts, context + 1)
        return experiment.Data(stacked[..., :-1], tuple(np.moveaxis(stacked[..., 1:], 1, 0)))

    return Problem(
        title="Next characters of five kinds of text",
        tasks=tuple(Text(name, classes=SYMBOLS, unit="bits per character") for name in TEXTS),
        pool=data(WINDOWS, 0.0, 0.9),
        test=data(TEST_WINDOWS, 0.9, 1.0),
        train_size=WINDOWS,
        batch_size=8,
        steps=600,
        learning_rate=3e-3,
    )


if __name__ == "__main__":
    experiment.main(Options, make_problem, references=("ls",))
