"""The benchmarks of conflicting tasks: the bounded loss, the narrow network, fronts."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_benchmark

conflict = load_benchmark("conflict")


def test_the_bounded_loss_is_the_probability_of_error():
    outputs = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]))
    task = conflict.ExpectedError("left", classes=3)
    np.testing.assert_allclose(task.loss(outputs, jnp.array([0, 2])), (0.3 + 0.75) / 2, rtol=1e-6)


def test_the_network_is_narrow_where_the_tasks_meet():
    split = conflict.PROBLEMS["narrow_bounded"]()
    assert split.problem.network.hidden[-1] == 4
    assert [type(task) for task in split.problem.tasks] == [conflict.ExpectedError] * 2
    for data in (split.problem.pool, split.problem.test, split.validation):
        assert len(data.targets) == 2


@pytest.mark.slow
def test_fronts_from_options_to_files(tmp_path):
    pytest.importorskip("moocore")
    fronts = load_benchmark("fronts")
    assert fronts.hypervolume(np.array([[20.0, 50.0], [60.0, 30.0]])) == pytest.approx(48.0)
    sizes = dict(steps=40, seeds=2, tuning_seeds=1, learning_rates=(1e-2,))
    options = fronts.Options(("narrow",), ("constant", "stch"), output=tmp_path, **sizes)
    fronts.main(options)
    lines = [json.loads(line) for line in (tmp_path / "fronts.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["constant", "stch"]
    for line in lines:
        assert np.shape(line["errors"]) == (2, 9, 2)
        assert all(0 < volume < 100 for volume in line["hypervolumes"])
    assert "| narrow | stch |" in (tmp_path / "fronts.md").read_text()
    assert (tmp_path / "fronts.png").stat().st_size > 1000
    fronts.main(options)
    assert len((tmp_path / "fronts.jsonl").read_text().splitlines()) == 2, "nothing is run twice"
    assert "unknown mgda" in fronts.Options(methods=("mgda",)).mistake()
