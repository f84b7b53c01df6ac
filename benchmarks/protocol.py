"""What the benchmarks share: results as JSON lines, the choice of a setting, intervals, tests.

A result is one line of a file, written as soon as it is there, with the fields ``problem``,
``method``, ``learning_rate`` and ``seed`` and whatever was measured. A benchmark that is started
again reads the lines and runs what is missing, so that it can be interrupted at any time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """Returns the results of a file; a line that was cut short, the last one maybe, is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return lines


def append(path: Path, lines: Iterable[Line]) -> None:
    """Adds results to a file, one a line. NaN and infinity are written as Python reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_short = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" if cut_short else "")
        file.writelines(json.dumps(line) + "\n" for line in lines)


def rounded(values: Any) -> Any:
    """Returns an array as nested lists of numbers with six digits, for a line."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    return [rounded(v) for v in values] if isinstance(values, list) else float(f"{values:.6g}")


def parse(name: str, fields: Mapping[str, Callable[[str], Any]]) -> tuple[str, dict[str, Any]]:
    """Splits ``method@field=value@...`` into the method or chain and what it is given.

    Args:
        name: such as ``"si+mgda@gram=sketch@decay=0.99"``.
        fields: the known fields, and what makes a value of the text.

    Raises:
        ValueError: for an unknown field or a text that is no value of it.

    Example:
        >>> parse("bilb4mtl@penalty=0.01", {"penalty": float})
        ('bilb4mtl', {'penalty': 0.01})
    """
    method, *options = name.split("@")
    values = {}
    for option in options:
        field, _, text = option.partition("=")
        if field not in fields:
            raise ValueError(
                f"unknown field {field!r} in {name!r}; choose from: {', '.join(fields)}"
            )
        try:
            values[field] = fields[field](text)
        except ValueError as error:
            raise ValueError(f"{field} in {name!r} cannot be {text!r}") from error
    return method, values


def best(scores: Mapping[Any, Sequence[float]]) -> Any:
    """Returns the key with the lowest mean score; one that is not finite comes last."""
    mean = {key: float(np.mean(values)) for key, values in scores.items()}
    return min(mean, key=lambda key: mean[key] if math.isfinite(mean[key]) else math.inf)


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Shows mean and half width."""
        if not math.isfinite(self.mean):
            return "diverged"
        return f"{self.mean:+.1f} ± {self.high - self.mean:.1f}"


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Returns the mean and its t interval; that of one value, or of values not finite, is open."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if values.size < 2 or not np.isfinite(values).all():
        return Interval(mean, -math.inf, math.inf)
    half = scipy.stats.t.ppf(0.5 + level / 2, values.size - 1) * values.std(ddof=1)
    half /= math.sqrt(values.size)
    return Interval(mean, mean - float(half), mean + float(half))


def paired_p_value(values: Mapping[int, float], reference: Mapping[int, float]) -> float:
    """Returns the p-value of the paired t-test over the seeds of both, NaN where it says nothing.

    Seeds whose difference is not finite cannot be tested: then, for fewer than two seeds in common,
    and where all differences are equal, the result is NaN.
    """
    seeds = sorted(values.keys() & reference.keys())
    differences = np.array([values[seed] - reference[seed] for seed in seeds])
    if len(seeds) < 2 or not np.isfinite(differences).all() or np.ptp(differences) == 0:
        return math.nan
    return float(scipy.stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Returns p-values adjusted for their number by Holm's method; NaN stays and does not count.

    Example:
        >>> print(holm([0.01, 0.04, 0.03]))
        [0.03 0.06 0.06]
    """
    p_values = np.asarray(p_values, float)
    adjusted = np.full(p_values.shape, math.nan)
    known = np.flatnonzero(~np.isnan(p_values))
    order = known[np.argsort(p_values[known], kind="stable")]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return adjusted
