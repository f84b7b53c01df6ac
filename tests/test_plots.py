"""What the figures draw: numbers of artists, their data, labels, legends and scales."""

import itertools
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from bilb import plots

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def history(num_tasks, num_steps=30, seeds=None):
    shape = (num_steps, num_tasks) if seeds is None else (seeds, num_steps, num_tasks)
    return np.random.default_rng(0).uniform(0.1, 5.0, size=shape)


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def tick_texts(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def render(ax):
    """Draws the figure and fails on matplotlib's warnings, such as a collapsed layout."""
    ax.figure.canvas.draw()


pytestmark = pytest.mark.filterwarnings("error::UserWarning")
over_time = pytest.mark.parametrize("plot", [plots.losses_over_time, plots.weights_over_time])


@over_time
class TestOverTime:
    @pytest.mark.parametrize("num_tasks", [1, 2, 3, 11])
    def test_one_line_a_task(self, plot, num_tasks):
        values = history(num_tasks)
        steps = np.arange(30) * 100
        names = [f"name {k}" for k in range(num_tasks)]
        ax = plot(jnp.asarray(values), steps=steps, names=names)
        render(ax)
        assert len(ax.lines) == num_tasks
        for k, line in enumerate(ax.lines):
            np.testing.assert_array_equal(line.get_xdata(), steps)
            np.testing.assert_allclose(line.get_ydata(), values[:, k], rtol=1e-6)
        assert legend_texts(ax) == names
        assert not ax.collections
        assert ax.get_xlabel() == "step"

    @pytest.mark.parametrize("num_tasks", [7, 8, 12])
    def test_lines_look_different(self, plot, num_tasks):
        lines = plot(history(num_tasks)).lines
        looks = {(line.get_color(), str(line.get_linestyle())) for line in lines}
        assert len(looks) == num_tasks

    def test_default_steps_and_names(self, plot):
        ax = plot(history(2))
        np.testing.assert_array_equal(ax.lines[0].get_xdata(), np.arange(30))
        assert legend_texts(ax) == ["task 1", "task 2"]

    def test_seeds_give_mean_and_range(self, plot):
        values = history(2, seeds=4)
        ax = plot(values)
        assert len(ax.lines) == len(ax.collections) == 2
        for k in range(2):
            np.testing.assert_allclose(ax.lines[k].get_ydata(), values[..., k].mean(0))
            corners = ax.collections[k].get_paths()[0].vertices
            for t in (0, 17):
                at_step = corners[corners[:, 0] == t, 1]
                np.testing.assert_allclose(np.min(at_step), values[:, t, k].min())
                np.testing.assert_allclose(np.max(at_step), values[:, t, k].max())

    def test_standard_deviation_band(self, plot):
        values = history(1, seeds=3)
        corners = plot(values, band="sd").collections[0].get_paths()[0].vertices
        at_step = corners[corners[:, 0] == 5, 1]
        mean, deviation = values[:, 5, 0].mean(), values[:, 5, 0].std(ddof=1)
        np.testing.assert_allclose(np.max(at_step), mean + deviation)
        np.testing.assert_allclose(np.min(at_step), mean - deviation)

    def test_one_seed_has_no_band(self, plot):
        assert not plot(history(2, seeds=1), band="sd").collections

    def test_many_tasks_give_a_heat_map(self, plot):
        values = history(40, seeds=3)
        ax = plot(values)
        render(ax)
        assert not ax.lines
        (mesh,) = ax.collections
        np.testing.assert_allclose(np.ravel(mesh.get_array()), values.mean(0).T.ravel())
        assert tick_texts(ax.yaxis) == [f"task {k}" for k in range(1, 41)]
        bottom, top = ax.get_ylim()
        assert bottom > top, "the first task is at the top"
        (bar,) = [other for other in ax.figure.axes if other is not ax]
        assert bar.get_ylabel() in ("loss", "task weight")

    def test_heat_map_is_a_choice(self, plot):
        assert len(plot(history(40), heatmap=False).lines) == 40
        assert len(plot(history(3), heatmap=True).collections) == 1

    def test_legend_of_many_lines_fits(self, plot):
        ax = plot(history(40), heatmap=False)
        render(ax)
        legend = ax.get_legend().get_window_extent()
        assert legend.y0 >= 0
        assert legend.x0 >= ax.get_window_extent().x1

    @pytest.mark.parametrize("num_tasks", [2, 40])
    def test_one_step(self, plot, num_tasks):
        render(plot(history(num_tasks, num_steps=1)))

    def test_given_axes_are_used(self, plot):
        _, ax = plt.subplots()
        assert plot(history(2), ax=ax) is ax
        assert len(plt.get_fignums()) == 1

    @pytest.mark.parametrize(
        ("shape", "options", "message"),
        [
            ((3,), {}, r"\(3,\)"),
            ((0, 2), {}, r"\(0, 2\)"),
            ((4, 2), {"steps": np.arange(3)}, r"\(4,\).*\(3,\)"),
            ((4, 2), {"names": ["a"]}, "2 entries; got 1"),
            ((4, 2), {"band": "iqr"}, "iqr"),
        ],
    )
    def test_bad_input(self, plot, shape, options, message):
        with pytest.raises(ValueError, match=message):
            plot(np.ones(shape), **options)

    def test_missing_matplotlib_says_what_to_install(self, plot, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
        with pytest.raises(ImportError, match=r"pip install 'bilb\[plots\]'"):
            plot(history(2))


class TestScales:
    @pytest.mark.parametrize(
        ("losses", "scale"),
        [
            ([1.0, 0.5], "linear"),
            ([1.0, 0.05], "log"),
            ([1.0, 0.0], "linear"),
            ([1.0, -30.0], "linear"),
            ([1.0, 0.05, np.nan], "log"),
            ([np.nan, np.nan], "linear"),
        ],
    )
    def test_values_choose_their_axis(self, losses, scale):
        for plot in (plots.losses_over_time, plots.weights_over_time):
            assert plot(np.array(losses)[:, None]).get_yscale() == scale

    def test_the_choice_can_be_overruled(self):
        wide = np.array([[1.0], [1e-3]])
        assert plots.losses_over_time(wide, log=False).get_yscale() == "linear"
        ax = plots.weights_over_time(wide, log=False)
        assert ax.get_yscale() == "linear"
        assert ax.get_ylim()[0] == 0
        assert plots.weights_over_time(np.ones((2, 1)), log=True).get_yscale() == "log"

    def test_heat_map_colours_follow(self):
        values = np.geomspace(1e-3, 1, 60).reshape(3, 20)
        (mesh,) = plots.losses_over_time(values).collections
        assert isinstance(mesh.norm, matplotlib.colors.LogNorm)
        (mesh,) = plots.losses_over_time(values, log=False).collections
        assert not isinstance(mesh.norm, matplotlib.colors.LogNorm)

    def test_weights_start_at_zero_unless_negative(self):
        assert plots.weights_over_time([[1.0], [2.0]]).get_ylim()[0] == 0
        assert plots.weights_over_time([[1.0], [-2.0]]).get_ylim()[0] <= -2


class TestDeltaMBars:
    changes = np.array([[4.0, -2.0, 7.0], [1.0, -1.0, 0.0]])

    def test_bars_and_mean(self):
        ax = plots.delta_m_bars(self.changes, methods=["LS", "ours"], names=["seg", "depth", "sn"])
        render(ax)
        assert legend_texts(ax) == ["LS", "ours"]
        assert len(ax.containers) == 2
        for container, row in zip(ax.containers, self.changes):
            heights = [bar.get_height() for bar in container]
            np.testing.assert_allclose(heights, [*row, row.mean()])
        assert tick_texts(ax.xaxis) == ["seg", "depth", "sn", r"mean, $\Delta m$"]
        assert "lower is better" in ax.get_ylabel()

    def test_bars_do_not_overlap(self):
        ax = plots.delta_m_bars(np.ones((5, 11)), methods=list("abcde"))
        spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches)
        assert len(spans) == 5 * 12
        assert all(left[1] <= right[0] + 1e-9 for left, right in itertools.pairwise(spans))

    def test_given_means_are_marked(self):
        ax = plots.delta_m_bars(self.changes, methods=["a", "b"], delta_m=[9.0, -3.0])
        assert [c[-1].get_height() for c in ax.containers] == [9.0, -3.0]

    def test_many_tasks_are_sorted(self):
        changes = np.random.default_rng(1).normal(size=(3, 40))
        ax = plots.delta_m_bars(changes, methods=["a", "b", "c"])
        render(ax)
        for container, row in zip(ax.containers, changes):
            np.testing.assert_allclose([bar.get_height() for bar in container], np.sort(row))
        np.testing.assert_allclose(ax.lines[0].get_ydata(), changes.mean(1))
        assert tick_texts(ax.xaxis) == ["a", "b", "c"]
        assert legend_texts(ax) == [r"mean, $\Delta m$"]

    def test_many_methods_look_different(self):
        ax = plots.delta_m_bars(np.ones((10, 2)), methods=[str(i) for i in range(10)])
        looks = {(c[0].get_facecolor(), c[0].get_hatch()) for c in ax.containers}
        assert len(looks) == 10

    def test_long_names_are_turned(self):
        ax = plots.delta_m_bars(self.changes, methods=["a", "b"], names=["long name " * 3] * 3)
        assert all(label.get_rotation() == 40 for label in ax.get_xticklabels())
        ax = plots.delta_m_bars(self.changes, methods=["a", "b"], names=["u", "v", "w"])
        assert all(label.get_rotation() == 0 for label in ax.get_xticklabels())

    @pytest.mark.parametrize(
        ("changes", "options", "message"),
        [
            (np.ones(3), {"methods": ["a"]}, r"\(3,\)"),
            (np.ones((2, 3)), {"methods": ["a"]}, "methods must have 2"),
            (np.ones((2, 3)), {"methods": ["a", "b"], "names": ["x"]}, "names must have 3"),
            (np.ones((2, 3)), {"methods": ["a", "b"], "delta_m": [1.0]}, r"\(2,\).*\(1,\)"),
        ],
    )
    def test_bad_input(self, changes, options, message):
        with pytest.raises(ValueError, match=message):
            plots.delta_m_bars(changes, **options)


class TestFront:
    points = np.array([[1.0, 0.0], [0.0, 1.0], [0.25, 0.25]])
    runs = np.array([[[2.0, 2.0], [1.0, 0.5], [0.25, 0.25]], [[3.0, 1.0], [2.0, 0.5], [1.0, 0.0]]])

    def test_front_is_joined_in_order(self):
        ax = plots.front(self.points, labels=("depth", "normals"))
        render(ax)
        np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0.0, 0.25, 1.0])
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), [1.0, 0.25, 0.0])
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("depth", "normals")
        assert legend_texts(ax) == ["Pareto front"]

    def test_runs_with_starts_and_ends(self):
        ax = plots.front(self.points, trajectories=self.runs, names=["MGDA", "ours"])
        assert legend_texts(ax) == ["Pareto front", "MGDA", "ours", "start", "end"]
        for i, run in enumerate(self.runs):
            line, start, end = ax.lines[1 + 3 * i : 4 + 3 * i]
            np.testing.assert_array_equal(line.get_xydata(), run)
            np.testing.assert_array_equal(start.get_xydata(), run[:1])
            np.testing.assert_array_equal(end.get_xydata(), run[-1:])
            assert line.get_color() == start.get_color() == end.get_color()

    def test_runs_alone(self):
        assert legend_texts(plots.front(trajectories=self.runs)) == ["start", "end"]

    def test_the_end_of_a_diverged_run_is_its_last_finite_point(self):
        run = np.array([[1.0, 1.0], [2.0, 3.0], [np.nan, 4.0], [np.inf, np.nan]])
        ax = plots.front(trajectories=run)
        render(ax)
        np.testing.assert_array_equal(ax.lines[2].get_xydata(), [[2.0, 3.0]])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "points, trajectories"),
            ({"points": np.ones((3, 3))}, r"points.*\(3, 3\)"),
            ({"trajectories": np.ones(3)}, r"trajectories.*\(3,\)"),
            ({"trajectories": np.ones((2, 4, 3))}, r"trajectories.*\(4, 3\)"),
            ({"trajectories": np.ones((2, 4, 2)), "names": ["a"]}, "2 entries"),
        ],
    )
    def test_bad_input(self, options, message):
        with pytest.raises(ValueError, match=message):
            plots.front(**options)


class TestTrajectories:
    x, y = np.linspace(-1, 1, 11), np.linspace(-2, 2, 21)
    values = x**2 + 10 * y[:, None]

    def test_contours_runs_and_pareto_set(self):
        paths = [
            np.array([[1.0, 2.0], [0.5, 1.0], [0.0, 0.0]]),
            np.array([[-1.0, 2.0], [0.0, 0.1]]),
        ]
        ax = plots.trajectories(
            paths,
            grid=(self.x, self.y),
            values=self.values,
            pareto_set=[[0, 0], [1, 1]],
            levels=[0],
        )
        render(ax)
        (contours,) = ax.collections
        corners = np.concatenate([path.vertices for path in contours.get_paths()])
        # Where x^2 + 10 y = 0, to the linear interpolation of the grid.
        np.testing.assert_allclose(corners[:, 0] ** 2 + 10 * corners[:, 1], 0, atol=0.02)
        assert len(ax.lines) == 1 + 3 * 2 + 2
        np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0, 0], [1, 1]])
        np.testing.assert_array_equal(ax.lines[1].get_xydata(), paths[0])
        np.testing.assert_array_equal(ax.lines[6].get_xydata(), paths[1][-1:])
        assert legend_texts(ax) == ["Pareto set", "start", "end"]
        assert ax.get_xlim() == (-1, 1)
        assert ax.get_ylim() == (-2, 2)

    def test_runs_alone(self):
        ax = plots.trajectories(jnp.ones((2, 5, 2)), names=["a", "b"])
        assert legend_texts(ax) == ["a", "b", "start", "end"]
        assert not ax.collections

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"grid": (x, y)}, "both or neither"),
            ({"values": values}, "both or neither"),
            ({"grid": (x, y), "values": values.T}, r"\(Y, X\).*\(11, 21\)"),
            ({"pareto_set": np.ones(2)}, r"pareto_set.*\(2,\)"),
        ],
    )
    def test_bad_input(self, options, message):
        with pytest.raises(ValueError, match=message):
            plots.trajectories(np.ones((2, 5, 2)), **options)


def test_histories_by_name_name_the_tasks():
    rows = [{"depth": 1.0 * step, "segmentation": 2.0} for step in range(5)]
    columns = {"depth": np.arange(5.0), "segmentation": np.full(5, 2.0)}
    for history in (rows, columns):
        ax = plots.losses_over_time(history)
        assert [text.get_text() for text in ax.get_legend().get_texts()] == [*columns]
        for line, values in zip(ax.lines, columns.values()):
            np.testing.assert_array_equal(line.get_ydata(), values)
    seeds = {name: np.stack([values, values + 1]) for name, values in columns.items()}
    ax = plots.weights_over_time(seeds, names=["d", "s"])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["d", "s"]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), columns["depth"] + 0.5)
