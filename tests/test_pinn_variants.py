"""The studies around the benchmark of physics-informed networks."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import load_benchmark
from equations import EQUATIONS

import bilb

benchmark = load_benchmark("pinn_variants")


def test_the_pieces_make_up_the_sides():
    """With points that both have, the losses of a side's pieces have its loss as their mean."""
    pieces, whole = benchmark.in_pieces(3, number=4), EQUATIONS["helmholtz"]
    points = pieces.draw(jax.random.key(0))
    sides = {"inside": points["inside"]}
    for side in whole.losses[1:]:
        of_side = [points[name] for name in pieces.losses if name.startswith(side)]
        assert len(of_side) == 3
        sides[side] = jnp.concatenate(of_side)
        along = sides[side][:, 0 if side in ("bottom", "top") else 1]
        ends = np.linspace(-1, 1, 4)
        assert ((along >= np.repeat(ends[:-1], 4)) & (along <= np.repeat(ends[1:], 4))).all()
        across = sides[side][:, 1 if side in ("bottom", "top") else 0]
        assert (across == (-1 if side in ("left", "bottom") else 1)).all()
    field = lambda x: jnp.sin(x[:, :1] + 2 * x[:, 1:])
    found, expected = pieces.task_losses(field, points), whole.task_losses(field, sides)
    means = found[1:].reshape(4, 3).mean(1)
    np.testing.assert_allclose([found[0], *means], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", benchmark.PROBES)
def test_probes_are_as_long_as_signs(kind):
    update = {"a": jnp.linspace(-1e-3, 2e-3, 3_000), "b": jnp.ones((10, 20))}
    moments = jax.tree.map(jnp.square, update)
    probe = benchmark.direction(kind, jax.random.key(1), update, moments)
    assert jax.tree.map(jnp.shape, probe) == jax.tree.map(jnp.shape, update)
    np.testing.assert_allclose(optax.tree.norm(probe), math.sqrt(3_200), rtol=0.05)
    if kind == "adam":  # entries are as large as the fourth root of the moments is small
        product = jax.tree.map(lambda p, m: jnp.abs(p) * m**0.25, probe, moments)
        large = np.concatenate([product["a"][2_000:], product["b"].ravel()])
        np.testing.assert_allclose(large, large[0], rtol=1e-3)


def line(study, method, rate, seed, error, validation):
    return {
        "study": study,
        "problem": "helmholtz",
        "method": method,
        "learning_rate": rate,
        "steps": 7,
        "seed": seed,
        "error": error,
        "validation": validation,
    }


def test_validation_chooses_rate_and_weight(tmp_path):
    lines = [
        line("fixed", "constant=10", 5e-3, 0, 0.1, 0.3),
        line("fixed", "constant=10", 1e-2, 0, 0.2, math.nan),
        line("fixed", "constant=100", 1e-2, 0, 0.4, 0.2),
        line("sgd", "constant=10", 1e-2, 0, 0.01, 0.01),
    ]
    text = benchmark.table("fixed", lines)
    assert "| constant | 0.400 [0, " in text
    assert "at 0.01, w = 100" in text
    assert "| nash_pinn |  |  |" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [({"studies": ("probe",)}, "'probe'.*probes"), ({"seeds": 0}, "--seeds"), ({"steps": 0}, "1")],
)
def test_mistakes(values, message):
    assert re.search(message, benchmark.Options(**values).mistake())
    assert benchmark.Options().mistake() is None


@pytest.mark.slow
@pytest.mark.parametrize("study", ["probes", "many"])
def test_runs_are_written_once(study, tmp_path, monkeypatch):
    methods = ("probe=signs", "probe=update") if study == "probes" else ("nash_pinn",)
    whole = benchmark.STUDIES[study]
    few = whole._replace(problems=whole.problems[:1], methods=methods)
    monkeypatch.setitem(benchmark.STUDIES, study, few)
    options = benchmark.Options(studies=(study,), seeds=2, steps=3, output=tmp_path)
    benchmark.main(options)
    lines = benchmark.protocol.read(tmp_path / "pinn_variants.jsonl")
    assert len(lines) == 2 * 3 * len(methods)
    assert all(0 < x["error"] < 10 for x in lines)
    monkeypatch.setattr(benchmark, "execute", lambda *args: pytest.fail("trained again"))
    benchmark.main(options)
    assert f"| {methods[0]} | " in (tmp_path / "pinn_variants.md").read_text()


def test_signs_are_the_sketch_of_the_library():
    """With the same keys the directions are the same, in the first steps and after them."""
    task_losses = lambda p, x: jnp.stack([jnp.sum(x * p["a"] ** 2), jnp.sum(p["b"]), p["a"][0]])
    params, points = {"a": jnp.arange(1.0, 5.0), "b": jnp.ones((2, 3))}, jnp.ones(4)
    key, engine = jax.random.key(3), bilb.grams.sketch(key=3)
    found, expected = (
        jax.jit(jax.vmap(of))(jnp.array([0, 19, 20]))
        for of in (
            lambda number: benchmark.sketch(
                "signs",
                task_losses,
                params,
                points,
                number=number,
                key=jax.random.fold_in(key, number),
                update=params,
                moments=params,
            ),
            lambda number: engine(task_losses, params, points, step=number),
        )
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert [np.linalg.matrix_rank(gram) for gram in found] == [3, 3, 1]
