"""Figures of multi-task training: losses and weights over time, results per task, trade-offs.

Every function draws on the Axes that it is given, or on those of a new figure, and returns them,
so that titles, limits and files stay in the caller's hands. Arrays may be NumPy or JAX. Colours
are safe for colour-blind readers: seven of Wong's palette, which then come back with another line
style or hatching, and the perceptually uniform map cividis for heat maps and contours.

Needs matplotlib: ``pip install 'bilb[plots]'``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Wong, Points of view: color blindness, Nature Methods 8 (2011), without yellow, which is too
#: pale for a line on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
#: With more tasks than this, lines and bars of single tasks can no longer be told apart.
MAX_LINES = 12

_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
_HATCHES = (None, "////", "....", "xxxx")


def losses_over_time(
    losses: Any,
    *,
    steps: Any | None = None,
    names: Sequence[str] | None = None,
    band: str = "range",
    log: bool | None = None,
    heatmap: bool | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the loss of each task over the steps of training.

    Args:
        losses: (T, K) losses, or (seeds, T, K): their mean over seeds and a band. By name, a dict
            of (T,) or (seeds, T) arrays, or a list of what ``value_and_grad`` returned at each of T
            steps: ``[{"segmentation": 0.3, "depth": 0.7}, ...]``.
        steps: (T,) step or epoch numbers. Default: 0 to T - 1.
        names: K task names. Default: those of the values, or "task 1" to "task K".
        band: What the band over seeds shows, "range" from least to largest, or "sd", one standard
            deviation (divisor seeds - 1) to each side. A heat map shows the mean only.
        log: Whether the losses are on a logarithmic scale. Default: if all finite ones are positive
            and they span more than a factor of ten.
        heatmap: Whether to draw a row of colours for each task instead of a line. Default: if
            there are more than 12 tasks.
        ax: Axes to draw on. Default: those of a new figure.

    Returns:
        The Axes.

    Raises:
        ValueError: Shapes do not match, or ``band`` is unknown.
        ImportError: matplotlib is missing.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import numpy as np
        >>> from bilb import plots
        >>> ax = plots.losses_over_time(np.exp(-np.arange(20.0)[:, None] * [0.1, 0.3]))
        >>> ax.get_yscale()
        'log'
    """
    history = _History(losses, steps, names, "losses")
    return _draw_history(history, "loss", band, history.log(log), heatmap, ax)


def weights_over_time(
    weights: Any,
    *,
    steps: Any | None = None,
    names: Sequence[str] | None = None,
    band: str = "range",
    log: bool | None = None,
    heatmap: bool | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the weight of each task over the steps of training.

    The ``effective_weights`` of the drivers' states, ∂Φ/∂l, are there for every method and chain,
    and compare across them: those of the sum of log losses, say, are 1 / l.

    Args:
        weights: (T, K) weights, or (seeds, T, K): their mean over seeds and a band; by name as in
            :func:`losses_over_time`. They may be negative.
        steps: (T,) step or epoch numbers. Default: 0 to T - 1.
        names: K task names. Default: those of the values, or "task 1" to "task K".
        band: What the band over seeds shows, "range" from least to largest, or "sd", one standard
            deviation (divisor seeds - 1) to each side. A heat map shows the mean only.
        log: Whether the weights are on a logarithmic scale. Default: if all finite ones are
            positive and they span more than a factor of ten. A linear axis that has no negative
            weights starts at zero.
        heatmap: Whether to draw a row of colours for each task instead of a line. Default: if
            there are more than 12 tasks.
        ax: Axes to draw on. Default: those of a new figure.

    Returns:
        The Axes.

    Raises:
        ValueError: Shapes do not match, or ``band`` is unknown.
        ImportError: matplotlib is missing.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import numpy as np
        >>> from bilb import plots
        >>> ax = plots.weights_over_time(np.ones((5, 2)), names=["segmentation", "depth"])
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['segmentation', 'depth']
    """
    history = _History(weights, steps, names, "weights")
    log = history.log(log)
    ax = _draw_history(history, "task weight", band, log, heatmap, ax)
    if ax.lines and not log and np.nanmin(history.values, initial=0.0) >= 0:
        ax.set_ylim(bottom=0)
    return ax


def delta_m_bars(
    relative_changes: Any,
    *,
    methods: Sequence[str],
    names: Sequence[str] | None = None,
    delta_m: Any | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the relative change of every task or metric, and the mean of each method.

    Up to 12 columns: one group of bars for each column, one bar in it for each method, and a last
    group, set apart, for the mean. More than 12: one group for each method, its bars sorted from
    the best to the worst column, whose names are then not shown, and a diamond for the mean.

    Args:
        relative_changes: (methods, K) changes against the reference in percent, lower is better:
            the summands of :func:`bilb.metrics.delta_m`, sign included.
        methods: Names of the methods.
        names: K names of the tasks or metrics. Default: "task 1" to "task K".
        delta_m: (methods,) means to mark, in percent. Default: the flat mean over the K columns.
        ax: Axes to draw on. Default: those of a new figure.

    Returns:
        The Axes.

    Raises:
        ValueError: Shapes do not match.
        ImportError: matplotlib is missing.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> from bilb import plots
        >>> changes = [[4.0, -2.0], [1.0, -1.0]]
        >>> ax = plots.delta_m_bars(changes, methods=["LS", "BiLB4MTL"], names=["seg", "depth"])
        >>> [float(bar.get_height()) for bar in ax.containers[0]]
        [4.0, -2.0, 1.0]
    """
    changes = np.asarray(relative_changes, dtype=np.float64)
    if changes.ndim != 2 or 0 in changes.shape:
        raise ValueError(f"relative_changes must have shape (methods, K); got {changes.shape}.")
    num_methods, num_columns = changes.shape
    methods = _names(methods, num_methods, "methods", "method")
    names = _names(names, num_columns, "names", "task")
    means = changes.mean(axis=1) if delta_m is None else np.asarray(delta_m, dtype=np.float64)
    if means.shape != (num_methods,):
        raise ValueError(f"delta_m must have shape ({num_methods},); got {means.shape}.")

    if num_columns <= MAX_LINES:
        num_bars = num_methods * (num_columns + 1)
        ax = _axes(ax, width=min(max(6.4, 1.8 + 0.16 * num_bars), 14.0))
        centres = np.append(np.arange(num_columns), num_columns + 0.35)
        width = 0.8 / num_methods
        for i, method in enumerate(methods):
            colour, turn = _colour(i)
            position = centres + (i - (num_methods - 1) / 2) * width
            bars = ax.bar(
                position,
                [*changes[i], means[i]],
                width,
                color=colour,
                hatch=_HATCHES[turn % len(_HATCHES)],
                edgecolor="white" if turn else None,
                linewidth=0,
                label=method,
            )
            bars[-1].set(edgecolor="black", linewidth=1.0)
        ax.axvline(num_columns - 0.325, color="0.6", linewidth=0.8, linestyle=":")
        ax.set_xticks(centres, [*names, r"mean, $\Delta m$"])
        _legend(ax)
    else:
        ax = _axes(ax, width=min(max(6.4, 1.5 + 1.6 * num_methods), 14.0))
        width = 0.85 / num_columns
        offsets = (np.arange(num_columns) - (num_columns - 1) / 2) * width
        for i in range(num_methods):
            ax.bar(i + offsets, np.sort(changes[i]), width, color=PALETTE[0])
        marks = ax.plot(
            np.arange(num_methods), means, "D", color="white", label=r"mean, $\Delta m$"
        )
        marks[0].set(markeredgecolor="black", markersize=7, zorder=3)
        ax.set_xticks(np.arange(num_methods), methods)
        ax.set_xlabel(f"{num_columns} tasks of each method, best to worst")
        _legend(ax)
    # About 0.1 inch a character at the usual font size.
    if 0.1 * sum(len(t.get_text()) for t in ax.get_xticklabels()) > ax.bbox.width / ax.figure.dpi:
        ax.tick_params(axis="x", labelrotation=40)
        for label in ax.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.margins(x=0.02)
    ax.set_ylabel("relative change in %\n(lower is better)")
    return ax


def front(
    points: Any | None = None,
    *,
    trajectories: Any | None = None,
    names: Sequence[str] | None = None,
    labels: Sequence[str] = ("loss 1", "loss 2"),
    ax: Axes | None = None,
) -> Axes:
    """Draws a Pareto front of two losses and the paths of training runs towards it.

    Args:
        points: (N, 2) losses of points of the Pareto front, in any order; they are joined in the
            order of the first loss.
        trajectories: (runs, T, 2) or (T, 2) losses along each run, or a sequence of (T_i, 2).
            A circle marks the start of a run, a star its last finite point.
        names: Names of the runs, for the legend. Default: they have no entry.
        labels: Names of the two losses.
        ax: Axes to draw on. Default: those of a new figure.

    Returns:
        The Axes.

    Raises:
        ValueError: Shapes do not match, or neither ``points`` nor ``trajectories`` is given.
        ImportError: matplotlib is missing.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import numpy as np
        >>> from bilb import plots
        >>> t = np.linspace(0, 1, 11)
        >>> ax = plots.front(np.stack([t**2, (1 - t) ** 2], axis=1))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('loss 1', 'loss 2')
    """
    if points is None and trajectories is None:
        raise ValueError("front needs points, trajectories or both.")
    runs = [] if trajectories is None else _runs(trajectories, "trajectories")
    if points is not None:
        points = _pairs(points, "points")
    x_label, y_label = labels
    ax = _axes(ax, width=5.6)
    if points is not None:
        points = points[np.argsort(points[:, 0], kind="stable")]
        ax.plot(*points.T, color="0.55", linewidth=5, solid_capstyle="round", label="Pareto front")
    _draw_runs(ax, runs, names)
    ax.set(xlabel=x_label, ylabel=y_label)
    _legend(ax)
    return ax


def trajectories(
    paths: Any,
    *,
    grid: tuple[Any, Any] | None = None,
    values: Any | None = None,
    pareto_set: Any | None = None,
    names: Sequence[str] | None = None,
    labels: Sequence[str] = ("parameter 1", "parameter 2"),
    levels: int | Sequence[float] = 16,
    ax: Axes | None = None,
) -> Axes:
    """Draws the paths of training runs in a plane of two parameters, over contours of a function.

    Args:
        paths: (runs, T, 2) or (T, 2) parameters along each run, or a sequence of (T_i, 2). A
            circle marks the start of a run, a star its last finite point.
        grid: The coordinates of ``values``, (X,) and (Y,).
        values: (Y, X) values of a function, such as the mean loss, for the contours.
        pareto_set: (N, 2) parameters of points of the Pareto set, in the order in which they are to
            be joined.
        names: Names of the runs, for the legend. Default: they have no entry.
        labels: Names of the two parameters.
        levels: Number of contours, or their values.
        ax: Axes to draw on. Default: those of a new figure.

    Returns:
        The Axes.

    Raises:
        ValueError: Shapes do not match, or only one of ``grid`` and ``values`` is given.
        ImportError: matplotlib is missing.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import numpy as np
        >>> from bilb import plots
        >>> x, y = np.linspace(-1, 1, 21), np.linspace(-2, 2, 31)
        >>> path = np.linspace([1.0, 2.0], [0.0, 0.0], 10)
        >>> ax = plots.trajectories(path, grid=(x, y), values=x**2 + y[:, None] ** 2)
        >>> ax.get_legend().get_texts()[0].get_text()
        'start'
    """
    runs = _runs(paths, "paths")
    if pareto_set is not None:
        pareto_set = _pairs(pareto_set, "pareto_set")
    if (grid is None) != (values is None):
        raise ValueError("grid and values belong together: give both or neither.")
    if grid is not None:
        x, y = (np.asarray(axis, dtype=np.float64) for axis in grid)
        values = np.asarray(values, dtype=np.float64)
        if x.ndim != 1 or y.ndim != 1 or values.shape != (y.size, x.size):
            raise ValueError(
                f"grid of shapes {x.shape} and {y.shape} needs values of shape (Y, X); got "
                f"{values.shape}."
            )
    x_label, y_label = labels
    ax = _axes(ax, width=5.6)
    if grid is not None:
        ax.contour(x, y, values, levels=levels, cmap="cividis", linewidths=0.7)
        ax.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()))
    if pareto_set is not None:
        ax.plot(
            *pareto_set.T, color="0.55", linewidth=5, solid_capstyle="round", label="Pareto set"
        )
    _draw_runs(ax, runs, names)
    ax.set(xlabel=x_label, ylabel=y_label)
    _legend(ax)
    return ax


class _History:
    """Values over time, checked and brought to the shape (seeds, T, K)."""

    def __init__(self, values, steps, names, what):
        values, task_names = _by_name(values)
        names = task_names if names is None else names
        self.values = np.asarray(values, dtype=np.float64)
        if self.values.ndim not in (2, 3) or 0 in self.values.shape:
            raise ValueError(f"{what} must be (T, K) or (seeds, T, K); got {self.values.shape}.")
        self.values = self.values.reshape(-1, *self.values.shape[-2:])
        num_seeds, num_steps, num_tasks = self.values.shape
        self.steps = np.arange(num_steps) if steps is None else np.asarray(steps)
        if self.steps.shape != (num_steps,):
            raise ValueError(f"steps must have shape ({num_steps},); got {self.steps.shape}.")
        self.names = _names(names, num_tasks, "names", "task")
        self.mean = self.values.mean(axis=0)
        self.has_band = num_seeds > 1

    def log(self, chosen):
        """Returns the choice of a logarithmic scale, made by the values where it is None."""
        if chosen is not None:
            return chosen
        finite = self.values[np.isfinite(self.values)]
        return bool(finite.size and np.min(finite) > 0 and np.max(finite) > 10 * np.min(finite))

    def band(self, kind):
        if kind == "range":
            return self.values.min(axis=0), self.values.max(axis=0)
        deviation = self.values.std(axis=0, ddof=1)
        return self.mean - deviation, self.mean + deviation


def _draw_history(history, label, band, log, heatmap, ax):
    if band not in ("range", "sd"):
        raise ValueError(f'band must be "range" or "sd"; got {band!r}.')
    num_tasks = len(history.names)
    if heatmap if heatmap is not None else num_tasks > MAX_LINES:
        ax = _axes(ax, height=max(4.8, 1.0 + 0.16 * num_tasks))
        # The name of the norm leaves its limits to the data.
        mesh = ax.pcolormesh(
            history.steps,
            np.arange(num_tasks),
            history.mean.T,
            shading="nearest",
            cmap="cividis",
            norm="log" if log else "linear",
            rasterized=True,
        )
        ax.figure.colorbar(mesh, ax=ax, label=label)
        ax.set_yticks(np.arange(num_tasks), history.names)
        ax.tick_params(axis="y", labelsize="small" if num_tasks <= 20 else "x-small")
        ax.invert_yaxis()
    else:
        ax = _axes(ax)
        edges = history.band(band) if history.has_band else None
        for k, name in enumerate(history.names):
            colour, turn = _colour(k)
            style = _DASHES[turn % len(_DASHES)]
            ax.plot(history.steps, history.mean[:, k], color=colour, linestyle=style, label=name)
            if edges is not None:
                lower, upper = (edge[:, k] for edge in edges)
                ax.fill_between(history.steps, lower, upper, color=colour, alpha=0.2, linewidth=0)
        if log:
            ax.set_yscale("log")
        ax.set_ylabel(label)
        ax.margins(x=0)
        _legend(ax)
    ax.set_xlabel("step")
    return ax


def _draw_runs(ax, runs, names):
    names = [None] * len(runs) if names is None else _names(names, len(runs), "names", "run")
    start = {"marker": "o", "markersize": 6, "markeredgecolor": "white", "linestyle": "none"}
    end = {"marker": "*", "markersize": 12, "markeredgecolor": "black", "linestyle": "none"}
    for i, (run, name) in enumerate(zip(runs, names)):
        colour, turn = _colour(i)
        style = _DASHES[turn % len(_DASHES)]
        finite = run[np.isfinite(run).all(axis=1)]
        ax.plot(*run.T, color=colour, linestyle=style, label=name, zorder=3)
        ax.plot(*finite[:1].T, color=colour, zorder=4, **start)
        ax.plot(*finite[-1:].T, color=colour, zorder=5, **end)
    if runs:
        ax.plot([], [], color="0.5", label="start", **start)
        ax.plot([], [], color="0.5", label="end", **end)


def _axes(ax, width=6.4, height=4.8):
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("bilb.plots needs matplotlib: pip install 'bilb[plots]'") from error
    if ax is None:
        _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    return ax


def _legend(ax):
    """Puts the legend beside the Axes, where it hides nothing however many entries it has."""
    number = len(ax.get_legend_handles_labels()[0])
    if number:
        ax.legend(
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            borderaxespad=0,
            frameon=False,
            ncols=-(-number // 18),
        )


def _colour(index):
    """Returns the colour of an item and how often the palette has come round before it."""
    return PALETTE[index % len(PALETTE)], index // len(PALETTE)


def _names(names, number, argument, noun):
    if names is None:
        return [f"{noun} {i + 1}" for i in range(number)]
    names = [str(name) for name in names]
    if len(names) != number:
        raise ValueError(f"{argument} must have {number} entries; got {len(names)}.")
    return names


def _by_name(values):
    """Returns values by task name, or a list of such, as one array with the tasks last, and names.

    The names are None where there are none.
    """
    if isinstance(values, Sequence) and values and all(isinstance(v, Mapping) for v in values):
        values = {name: [step[name] for step in values] for name in values[0]}
    if not isinstance(values, Mapping):
        return values, None
    return np.stack([np.asarray(v, np.float64) for v in values.values()], axis=-1), [*values]


def _pairs(values, argument):
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != 2 or values.shape[0] == 0:
        raise ValueError(f"{argument} must have shape (N, 2) with N >= 1; got {values.shape}.")
    return values


def _runs(paths, argument):
    if isinstance(paths, (list, tuple)) and paths and np.ndim(paths[0]) == 2:
        return [_pairs(path, f"each of {argument}") for path in paths]
    paths = np.asarray(paths, dtype=np.float64)
    if paths.ndim not in (2, 3):
        raise ValueError(f"{argument} must have shape (runs, T, 2) or (T, 2); got {paths.shape}.")
    return [_pairs(path, f"each of {argument}") for path in paths.reshape(-1, *paths.shape[-2:])]
