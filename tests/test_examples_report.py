"""The table, the numbers and the figure of the examples."""

import json

import experiment
import numpy as np
import pytest
import qm9
import report
from contract import mostly_slow
from test_examples import small_problem


def made_up_run(method, errors, weights=None):
    errors = np.asarray(errors, np.float32)
    losses = np.full((errors.shape[0], 4, errors.shape[1]), 0.5)
    return experiment.Run(method, errors, np.arange(5, 21, 5), losses, weights, seconds=1.5)


class TestReport:
    RUNS = (
        made_up_run("STL", [[10.0, 2.0], [30.0, 2.0]]),
        made_up_run("STL-log", [[10.0, 1.0], [10.0, 1.0]]),
        made_up_run("ls", [[22.0, 2.0], [26.0, 2.4]], weights=np.ones((2, 4, 2))),
    )

    def test_delta_m_and_ranks(self):
        stl, stl_log, ls = report.rows(self.RUNS, ["STL", "STL-log"])
        # Against STL, (20, 2): changes of 10 and 30 % of the first error, 0 and 20 % of the second.
        np.testing.assert_allclose(ls.delta_m["STL"], [5.0, 25.0], rtol=1e-5)
        np.testing.assert_allclose(ls.delta_m["STL-log"], [110.0, 150.0], rtol=1e-5)
        np.testing.assert_allclose(stl.delta_m["STL"], [-25.0, 25.0], rtol=1e-5)
        np.testing.assert_allclose(ls.errors, [24.0, 2.2], rtol=1e-6)
        assert [row.mean_rank for row in (stl, stl_log, ls)] == [2.0, 1.0, 3.0]

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.012345, "0.0123"),
            (0.9996, "1.00"),
            (9.996, "10.0"),
            (24.04, "24.0"),
            (999.7, "1000"),
            (12345.6, "12346"),
            (-1.5, "-1.50"),
            (0.0, "0"),
            (np.nan, "nan"),
            (np.inf, "inf"),
        ],
    )
    def test_three_digits(self, value, text):
        assert report.three_digits(value) == text

    def test_spread(self):
        assert report.spread(np.array([5.0, 25.0])) == "+15.0 ± 14.1"
        assert report.spread(np.array([-5.04])) == "-5.0"

    def test_text_table_aligns_its_columns(self):
        lines = report.text_table(report.rows(self.RUNS, ["STL", "STL-log"]), ["a", "b"])
        head, rule, *body = lines.splitlines()
        assert {len(line) for line in (head, rule, *body)} == {len(head)}
        assert body[2].split() == [
            *("ls", "24.0", "2.20"),
            *("+15.0", "±", "14.1"),
            *("+130.0", "±", "28.3"),
            *("3.0", "2"),
        ]

    def test_text_table_of_eleven_tasks_fits_a_terminal(self):
        errors = np.geomspace(0.1, 9000, 11)[None] * np.array([[1.0], [1.5]])
        runs = [made_up_run(name, errors) for name in ("STL", "STL-log", "bilb4mtl_celeba")]
        runs.append(made_up_run("ls", 10 * errors))
        names = [name for name, *_ in qm9.TARGETS]
        text = report.text_table(report.rows(runs, ["STL", "STL-log"]), names)
        assert max(map(len, text.splitlines())) <= 120

    def test_markdown_table(self):
        text = report.markdown_table(report.rows(self.RUNS, ["STL", "STL-log"]), ["a", "b"])
        lines = text.splitlines()
        assert lines[0] == "| method | a | b | dm% STL | dm% STL-log | rank | s |"
        assert {line.count("|") for line in lines} == {8}
        assert len(lines) == 5

    @pytest.mark.parametrize("num_tasks", mostly_slow([3, 11, 15], fast=[3]))
    def test_published_files(self, tmp_path, num_tasks):
        errors = np.linspace(1, 2, 2 * num_tasks).reshape(2, num_tasks)
        weights = np.ones((2, 4, num_tasks))
        runs = [
            made_up_run("STL", errors),
            made_up_run("STL-log", errors),
            made_up_run("ls", 8 * errors, weights),
            made_up_run("si", errors),
        ]
        tasks = tuple(experiment.Task(f"t{k}") for k in range(num_tasks))
        problem = small_problem(tasks=tasks)
        folder = tmp_path / "new" / "folder"
        text = report.publish(problem, runs, ["STL", "STL-log"], {"seeds": 2}, folder)
        for name in ("table.md", "results.json", "figure.png"):
            assert str(folder / name) in text
            assert (folder / name).stat().st_size > 100
        assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
        methods = json.loads((folder / "results.json").read_text())["methods"]
        assert list(methods) == ["STL", "STL-log", "ls", "si"]
        np.testing.assert_allclose(methods["ls"]["errors"], 8 * errors, rtol=1e-5)
        np.testing.assert_allclose(
            methods["ls"]["delta_m"]["STL"], report.rows(runs, ["STL"])[2].delta_m["STL"], rtol=1e-5
        )
        assert methods["si"]["weights"] is None
        assert np.shape(methods["ls"]["weights"]) == (2, 4, num_tasks)
