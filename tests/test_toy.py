"""The toy problem of ``examples/toy.py``: its functions, where methods end, the recorded runs."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from conftest import oracle, relative_deviation

import bilb

pytest.importorskip("matplotlib").use("Agg")

BALANCE = np.array([0.0, -8.355])
LOWER_BOUND = -21.0  # of both losses before scaling


@pytest.mark.x64
class TestProblem:
    def test_values_and_gradients(self):
        recorded = oracle("f5_toy")
        points = np.stack(np.meshgrid(recorded["grid_x"], recorded["grid_y"]), axis=-1)
        losses = functools.partial(toy.task_losses, scale=1.0)
        per_point = lambda f: jax.jit(jax.vmap(jax.vmap(f)))(points)
        assert relative_deviation(per_point(losses), recorded["grid_f"]) <= 1e-12
        assert relative_deviation(per_point(jax.jacrev(losses)), recorded["grid_g"]) <= 1e-12

    def test_scale_is_that_of_the_first_loss(self):
        x = jnp.array([1.0, -2.0])
        expected = toy.task_losses(x, 1.0) * jnp.array([0.1, 1.0])
        np.testing.assert_allclose(toy.task_losses(x), expected, rtol=1e-14)

    def test_passes_the_whole_gradient_at_the_kink(self):
        # At x2 = 0, c1 = c2 = 0 with derivatives 1/2 and -1/2: dF/dx2 = (f - q) / 2.
        f = np.log([3.5, 3.5]) + 6
        q = np.array([-14.46, -14.46])
        jacobian = jax.jit(jax.jacrev(lambda x: toy.task_losses(x, 1.0)))(jnp.zeros(2))
        np.testing.assert_allclose(jacobian[:, 1], (f - q) / 2, rtol=1e-12)

    def test_pareto_set(self):
        points = toy.pareto_set(np.linspace(-7, 7, 29))
        jacobians = np.asarray(jax.jit(jax.vmap(jax.jacrev(toy.task_losses)))(points))
        # One convex combination of both gradients vanishes.
        first, second = np.moveaxis(jacobians, 1, 0)
        length = np.linalg.norm(second, axis=-1) + np.linalg.norm(first, axis=-1)
        weight = np.sum((second - first) * second, -1) / np.sum((second - first) ** 2, -1)
        weight = np.clip(weight, 0, 1)
        rest = weight[:, None] * first + (1 - weight[:, None]) * second
        assert np.max(np.linalg.norm(rest, axis=-1) / length) < 1e-3
        recorded = oracle("f5_toy")["grid_f"].reshape(-1, 1, 2)
        front = jax.jit(jax.vmap(functools.partial(toy.task_losses, scale=1.0)))(points)
        assert not np.any(np.all(recorded < np.asarray(front), axis=-1))

    def test_balance_point(self):
        balance = toy.pareto_set(np.zeros(1))[0]
        np.testing.assert_allclose(balance, BALANCE, atol=1e-3)
        scaled = toy.task_losses(jnp.asarray(balance)) / jnp.array([toy.SCALE, 1.0])
        np.testing.assert_allclose(scaled[0], scaled[1], rtol=1e-12)


@pytest.mark.x64
class TestMethods:
    def distances(self, method, starts=toy.STARTS):
        ends = toy.train(method, toy.Options(), starts)[:, -1]
        return np.linalg.norm(np.asarray(ends) - BALANCE, axis=-1)

    def test_bilb4mtl_reaches_the_balance_point_from_every_start(self):
        # The neighbours of the starts show that this is no work of rounding.
        offsets = 1e-12 * np.random.default_rng(0).uniform(-1, 1, (20, 1, 2))
        offsets[0] = 0
        starts = (np.array(toy.STARTS) + offsets).reshape(-1, 2)
        assert np.all(self.distances("bilb4mtl", starts) < 1e-2)

    @pytest.mark.slow
    def test_ls_reaches_it_from_no_start(self):
        distances = self.distances("ls")
        assert np.all(distances > 1e-2)
        # The start (9, 9) spends its time in a ravine, and rounding says when it leaves.
        assert np.sum(distances > 5.0) >= 4

    def test_ls_follows_the_recorded_paths(self):
        recorded = oracle("f5_toy")
        every, count = int(recorded["every"]), 50
        options = toy.Options(steps=every * (count - 1), learning_rate=1e-3)
        paths = toy.train("ls", options, recorded["inits"])[:, ::every]
        # The starts left out meet a ravine, where rounding decides.
        for start in (1, 3, 4):
            actual = np.asarray(paths[start])
            assert relative_deviation(actual, recorded["ls_traj"][:count, start]) <= 1e-9


@functools.partial(jax.jit, static_argnames=("weighted", "steps", "tail"))
def tail_means(scales, shifts, penalties, starts, rate, *, weighted, steps, tail):
    """Returns the mean of the last iterates, (runs, 2), in the setting of the recorded runs."""
    optimizer = optax.adam(rate)

    def run(scale, shift, penalty, start):
        floor = shift * LOWER_BOUND * jnp.stack([scale, 1.0])
        balancer = bilb.bilb4mtl(
            penalty,
            bilb.routers.softmax(),
            weighted=weighted,
            divisor="stop_gradient_sum",
            optimizer=optimizer,
        )
        value_and_grad = bilb.value_and_grad(lambda x: toy.task_losses(x, scale) - floor, balancer)

        def step(carry, index):
            x, opt_state, state, total = carry
            _, gradient, state = value_and_grad(x, state)
            updates, opt_state = optimizer.update(gradient, opt_state, x)
            x = optax.apply_updates(x, updates)
            return (x, opt_state, state, total + jnp.where(index >= steps - tail, x, 0.0)), None

        carry = (start, optimizer.init(start), value_and_grad.init(start), jnp.zeros_like(start))
        (_, _, _, total), _ = jax.lax.scan(step, carry, jnp.arange(steps))
        return total / tail

    return jax.vmap(run)(scales, shifts, penalties, starts)


@pytest.mark.x64
@pytest.mark.slow
def test_reproduces_recorded_bilb4mtl_runs():
    """Where rounding does not decide the outcome.

    Most of the other runs chatter in a ravine; some start on the line of symmetry x1 = 0, which is
    unstable, and the recorded ones stay on it. Which runs these are, neighbouring starts tell.
    """
    recorded = oracle("f5_toy")
    neighbours = 1e-12 * np.array([(0, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)])
    starts = (neighbours[:, None] + recorded["inits"]).reshape(-1, 2)
    *given, indices = np.meshgrid(
        *(recorded[f"ldc_{name}"].astype(float) for name in ("scales", "shifts", "lambdas")),
        np.arange(len(starts)),
        indexing="ij",
    )
    means = [
        tail_means(
            *(values.ravel() for values in given),
            starts[indices.ravel()],
            float(recorded["ldc_lr"]),
            weighted=weighted,
            steps=int(recorded["ldc_n_steps"]),
            tail=1000,
        )
        for weighted in (False, True)
    ]
    desired = recorded["ldc_tail_mean_x"]
    assert desired.shape == (2, 2, 2, 7, 5, 2)
    means = np.reshape(means, (*desired.shape[:4], len(neighbours), *desired.shape[4:]))
    means = np.moveaxis(means, 4, 0)
    moved = np.abs(means[1:] - means[0]).max((0, -1))
    deviation = np.abs(means[0] - desired).max(-1)
    sensitive = moved >= 1e-3
    beyond = np.argwhere(~sensitive & ~(deviation <= 1e-2))
    assert not len(beyond), f"(form, scale, shift, penalty, start): {beyond.tolist()}"
    # 124 to 128 of the 280 were counted, depending on the version of JAX.
    assert sensitive.sum() <= 140
    # The recorded end of a sensitive run lies among those of its neighbours.
    assert np.all(desired >= means.min(0) - 0.5)
    assert np.all(desired <= means.max(0) + 0.5)


class TestScript:
    def run(self, monkeypatch, capsys, *arguments):
        monkeypatch.setattr(sys, "argv", ["toy.py", *arguments])
        toy.main()
        return capsys.readouterr().out

    @pytest.mark.slow
    def test_prints_a_table_and_writes_the_figure(self, monkeypatch, capsys, tmp_path):
        out = self.run(monkeypatch, capsys, "--steps", "30", "--output", str(tmp_path / "toy"))
        assert out.count("bilb4mtl") == out.count("  ls ") == len(toy.STARTS)
        figure = tmp_path / "toy" / "toy.png"
        assert figure.stat().st_size > 10_000
        assert str(figure) in out

    @pytest.mark.slow
    def test_runs_the_named_methods_in_float64(self, monkeypatch, capsys, tmp_path):
        seen = {}
        monkeypatch.setattr(toy, "table", lambda paths: seen.update(paths) or "")
        methods = ("ls", "bilb4mtl+mgda")
        arguments = ("--method", *methods, "--steps", "3", "--output", str(tmp_path))
        self.run(monkeypatch, capsys, *arguments)
        assert tuple(seen) == methods
        assert {path.shape for path in seen.values()} == {(5, 4, 2)}
        assert {path.dtype for path in seen.values()} == {np.dtype(np.float64)}

    @pytest.mark.parametrize(
        "arguments",
        [("--method", "nothing"), ("--method", "ls+si"), ("--steps", "0"), ("--penalty", "-1")],
    )
    def test_names_a_mistake(self, monkeypatch, capsys, arguments):
        with pytest.raises(SystemExit, match="error: "):
            self.run(monkeypatch, capsys, *arguments)

    @pytest.mark.slow
    def test_penalty_is_used(self):
        options = toy.Options(steps=100)
        other = dataclasses.replace(options, penalty=0.0)
        ends = [np.asarray(toy.train("bilb4mtl", o)[:, -1]) for o in (options, other)]
        assert np.abs(ends[0] - ends[1]).max() > 1e-3
