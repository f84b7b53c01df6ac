"""Physics-informed networks: equations and their solutions, the example, and its benchmark."""

import json
import pathlib
import sys

import balancers
import equations
import jax
import jax.numpy as jnp
import numpy as np
import pinn
import pytest
import scipy.integrate
from conftest import help_of
from contract import mostly_slow
from equations import EQUATIONS

EXAMPLES = pathlib.Path(pinn.__file__).parent
BENCHMARK = EXAMPLES.parent / "benchmarks" / "pinn.py"


SOLUTIONS = {
    "poisson": equations.poisson_solution,
    "helmholtz": equations.helmholtz_solution,
    "burgers": equations.burgers_solution,
    "burgers_viscous": lambda points: equations.burgers_solution(points, 0.1 / np.pi),
    "wave": equations.wave_solution,
    "wave_slow": lambda points: equations.wave_solution(points, speed=0.5, overtone=2),
}


class TestEquations:
    @pytest.mark.parametrize(
        ("name", "number"),
        [
            ("poisson", 2),
            ("helmholtz", 5),
            ("burgers", 3),
            ("burgers_viscous", 3),
            ("allen_cahn", 3),
            ("wave", 4),
            ("wave_slow", 4),
            ("navier_stokes_cavity", 5),
        ],
    )
    def test_losses(self, name, number):
        equation = EQUATIONS[name]
        field = lambda x: x @ jnp.ones((2, equation.outputs))
        losses = lambda key: equation.task_losses(field, equation.draw(key))
        assert jax.eval_shape(losses, jax.random.key(0)).shape == (number,)
        assert len(equation.losses) == number > equation.inside

    @pytest.mark.parametrize("name", EQUATIONS)
    def test_points_lie_where_they_should(self, name):
        equation = EQUATIONS[name]
        points, others = map(equation.draw, jax.random.split(jax.random.key(0)))
        low, high = np.array(equation.corners)
        assert set(points) == set(equation.regions)
        for region, boxes in equation.regions.items():
            of_region = np.asarray(points[region])
            assert of_region.shape == (sum(box.number for box in boxes), 2)
            assert (of_region >= low).all()
            assert (of_region <= high).all()
            on_side = ((of_region == low) | (of_region == high)).any(1)
            assert on_side.all() == (region != "inside")
            assert (of_region != others[region]).any(1).all()
            assert len(np.unique(of_region, axis=0)) == len(of_region)

    def test_sides(self):
        (left, right, bottom, top) = equations.boundary(3, ((0.0, 1.0), (2.0, 5.0)))
        assert left == (3, (0.0, 1.0), (0.0, 5.0))
        assert right == (3, (2.0, 1.0), (2.0, 5.0))
        assert bottom == (3, (0.0, 1.0), (2.0, 1.0))
        assert top == (3, (0.0, 5.0), (2.0, 5.0))
        assert equations.boundary(3, ((0.0, 1.0), (2.0, 5.0)), "top") == (top,)

    @pytest.mark.x64
    def test_derivatives(self):
        field = lambda x: jnp.stack([jnp.sin(x[:, 0] * x[:, 1]), x[:, 1] ** 3], axis=1)
        x, y = points = np.array([[0.3, 0.7], [-1.0, 2.0]]).T
        value, first, second = equations.derivatives(field, points.T, 1)
        np.testing.assert_allclose(value, np.stack([np.sin(x * y), y**3], 1), rtol=1e-12)
        np.testing.assert_allclose(first, np.stack([x * np.cos(x * y), 3 * y**2], 1), rtol=1e-12)
        expected = np.stack([-(x**2) * np.sin(x * y), 6 * y], 1)
        np.testing.assert_allclose(second, expected, rtol=1e-12)

    @pytest.mark.x64
    @pytest.mark.parametrize("name", mostly_slow(SOLUTIONS, fast=["poisson", "wave", "wave_slow"]))
    def test_losses_of_the_solution_are_zero(self, name):
        equation, solution = EQUATIONS[name], SOLUTIONS[name]
        points = equation.draw(jax.random.key(0))
        assert (equation.task_losses(solution, points) < 1e-18).all()
        # Nothing of this is zero for a field that is only close.
        wrong = equation.task_losses(
            lambda x: solution(x) + 0.01 * jnp.cos(x[:, :1] + 3 * x[:, 1:]), points
        )
        assert (wrong > 1e-7).all()
        reference = equation.reference()
        values = solution(reference.points()).reshape(reference.values.shape)
        np.testing.assert_allclose(reference.values, values, rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(
            np.stack([reference.points().min(0), reference.points().max(0)]), equation.corners
        )

    @pytest.mark.x64
    def test_residuals_of_known_flows(self):
        """Kovasznay's flow behind a grid, which obeys the equations of the cavity."""
        rate = 50.0 - np.sqrt(50.0**2 + 4 * np.pi**2)

        def flow(points):
            x, y = points[:, 0], 2 * np.pi * points[:, 1]
            wake = jnp.exp(rate * x)
            u, v = 1 - wake * jnp.cos(y), rate / (2 * np.pi) * wake * jnp.sin(y)
            return jnp.stack([u, v, (1 - wake**2) / 2], axis=1)

        cavity = EQUATIONS["navier_stokes_cavity"]
        points = cavity.draw(jax.random.key(0))
        assert (cavity.task_losses(flow, points)[: cavity.inside] < 1e-24).all()
        still = cavity.task_losses(lambda x: jnp.zeros((len(x), 3)), points)
        np.testing.assert_array_equal(still, [0, 0, 0, 0, 0.5])

    @pytest.mark.slow
    @pytest.mark.x64
    def test_residuals_of_known_phases(self):
        allen_cahn = EQUATIONS["allen_cahn"]
        points = allen_cahn.draw(jax.random.key(0))
        width = np.sqrt(2 * equations.DIFFUSION / equations.REACTION)
        front = lambda x: jnp.tanh(x[:, 1:] / width)
        residual, jumps, _ = allen_cahn.residuals(front, points)
        np.testing.assert_allclose(residual, 0, atol=1e-10)
        np.testing.assert_allclose(jumps[:32], 2)
        growing = lambda x: (1 + 3 * jnp.exp(-2 * equations.REACTION * x[:, :1])) ** -0.5
        residual, jumps, _ = allen_cahn.residuals(growing, points)
        np.testing.assert_allclose(residual, 0, atol=1e-12)
        np.testing.assert_array_equal(jumps, 0)


class TestReferences:
    @pytest.mark.x64
    def test_burgers_by_finite_differences(self):
        viscosity, step = 0.01 / np.pi, 1e-4
        rng = np.random.default_rng(0)
        points = rng.uniform((0.05, -0.95), (0.95, 0.95), size=(50, 2))
        solution = jax.jit(equations.burgers_solution)
        at = lambda dt, dx: np.asarray(solution(points + step * np.array([dt, dx])))
        u_t = (at(1, 0) - at(-1, 0)) / (2 * step)
        u_x = (at(0, 1) - at(0, -1)) / (2 * step)
        u_xx = (at(0, 1) - 2 * at(0, 0) + at(0, -1)) / step**2
        residual = u_t + at(0, 0) * u_x - viscosity * u_xx
        np.testing.assert_allclose(residual, 0, atol=1e-4 * np.abs(u_x).max())

    @pytest.mark.x64
    def test_burgers_known_values(self):
        # The steepest slope, from Basdevant et al., Computers and Fluids 14, 1986.
        point = jnp.array([[1.6037 / np.pi, 0.0]])
        _, slope, _ = equations.derivatives(equations.burgers_solution, point, 1)
        np.testing.assert_allclose(slope, -152.00516, rtol=1e-6)
        values = EQUATIONS["burgers"].reference().values[..., 0]
        np.testing.assert_allclose(values, -values[:, ::-1], atol=1e-12)
        np.testing.assert_allclose(values[0], -np.sin(np.pi * np.linspace(-1, 1, 201)), atol=1e-12)

    def test_allen_cahn_by_another_integrator(self):
        size = 1024
        x = np.linspace(-1, 1, size, endpoint=False)
        frequencies = np.pi * np.arange(size // 2 + 1)

        def change(_, u):
            u_xx = np.fft.irfft(-(frequencies**2) * np.fft.rfft(u), size)
            return equations.DIFFUSION * u_xx + equations.REACTION * (u - u**3)

        start = x**2 * np.cos(np.pi * x)
        times = np.linspace(0, 1, 11)
        solved = scipy.integrate.solve_ivp(
            change, (0, 1), start, t_eval=times, rtol=1e-6, atol=1e-8
        )
        reference = equations.allen_cahn_reference()
        thin = slice(None, None, size // len(reference.second))
        np.testing.assert_array_equal(reference.second, x[thin])
        np.testing.assert_allclose(reference.values[::10, :, 0], solved.y[thin].T, atol=5e-4)

    @pytest.mark.slow
    def test_cavity_against_published_values(self):
        reference = equations.cavity_reference()
        middle = len(reference.first) // 2
        assert reference.first[middle] == 0.5
        u, v = reference.values[middle, :, 0], reference.values[:, middle, 1]
        # Ghia et al., tables 1 and 2, Re = 100: extremes are 1.5 to 3.5 % too small there.
        y = [0.9766, 0.9531, 0.8516, 0.7344, 0.6172, 0.5, 0.4531, 0.2813, 0.1719, 0.0703]
        expected = [0.84123, 0.68717, 0.23151, 0.00332, -0.13641, -0.20581]
        expected += [-0.21090, -0.15662, -0.10150, -0.04775]
        np.testing.assert_allclose(np.interp(y, reference.second, u), expected, atol=6e-3)
        x = [0.9453, 0.8594, 0.8047, 0.5, 0.2344, 0.1563, 0.0703]
        expected = [-0.10313, -0.22445, -0.24533, 0.05454, 0.17527, 0.16077, 0.10091]
        np.testing.assert_allclose(np.interp(x, reference.first, v), expected, atol=9e-3)
        # Botella and Peyret, Computers and Fluids 27, 1998: a spectral method, more exact.
        extremes = [u.min(), v.max(), v.min()]
        np.testing.assert_allclose(extremes, [-0.2140424, 0.1795728, -0.2538030], atol=1e-3)

    def test_cavity_obeys_its_equations(self):
        reference = equations.cavity_reference(64)
        u, v = np.moveaxis(reference.values, -1, 0)
        step = reference.first[1]
        by = lambda values, axis: np.gradient(values, step, axis=axis)
        core = (slice(8, -8),) * 2
        divergence = (by(u, 0) + by(v, 1))[core]
        np.testing.assert_allclose(divergence, 0, atol=1e-10)
        vorticity = by(v, 0) - by(u, 1)
        friction = sum(by(by(vorticity, axis), axis) for axis in (0, 1)) / equations.REYNOLDS
        transport = u * by(vorticity, 0) + v * by(vorticity, 1)
        size = np.sqrt(np.mean(transport[core] ** 2))
        assert np.sqrt(np.mean((transport - friction)[core] ** 2)) < 0.05 * size
        assert (u[1:-1, -1] == 1).all()
        assert not u[:, 0].any()
        assert not v[[0, -1]].any()

    @pytest.mark.parametrize("name", EQUATIONS)
    def test_shapes(self, name):
        reference = EQUATIONS[name].reference()
        shape = (len(reference.first), len(reference.second))
        assert reference.values.shape[:2] == shape
        assert reference.values.shape[2] <= EQUATIONS[name].outputs
        assert np.isfinite(reference.values).all()
        assert reference.points().shape == (shape[0] * shape[1], 2)


class TestTraining:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "method"), [("poisson", "constant"), ("burgers_viscous", "root+marigold_nash")]
    )
    def test_lowers_the_error(self, name, method):
        equation = EQUATIONS[name]
        run = pinn.train(equation, method, seeds=[3], steps=400, weight=100.0)
        assert run.errors.shape == (1, 20)
        assert run.final < 0.7 * run.errors[:, 0]
        assert run.final < 0.8
        np.testing.assert_allclose(run.validation, run.final, rtol=0.1)
        assert run.losses.shape == run.weights.shape == (1, len(run.steps), len(equation.losses))
        assert run.steps[-1] == 400
        if method == "constant":
            np.testing.assert_array_equal(run.weights, [[[1, 100]] * len(run.steps)])
        known = run.solution[..., :1] - equation.reference().values
        assert np.abs(known).max() < 2

    @pytest.mark.slow
    def test_a_seed_does_not_depend_on_the_others(self):
        equation = EQUATIONS["poisson"]
        together = pinn.train(equation, "ls", seeds=[0, 5], steps=20)
        alone = pinn.train(equation, "ls", seeds=[5], steps=20)
        np.testing.assert_allclose(together.losses[1:], alone.losses, rtol=1e-3)
        assert (together.losses[0] != together.losses[1]).all()

    @pytest.mark.parametrize(
        "method",
        mostly_slow(
            [
                *("constant", "autobalance", "igb_v2", "marigold_pinn", "ntk_weights"),
                *("root+nash_mtl", "log+graddrop", "moco"),
            ],
            fast=["log+graddrop"],
        ),
    )
    def test_methods_of_every_kind_can_be_trained(self, method):
        """Traces a step; test_examples.py does so with every method."""
        equation = EQUATIONS["burgers"]
        settings = balancers.Settings(
            learning_rate=1e-3,
            penalty=0.1,
            seed=jnp.arange(2),
            selection=jnp.ones(3),
            steps=10,
            steps_per_epoch=5,
        )
        static = dict(method=method, equation=equation)
        carry = jax.eval_shape(lambda s: pinn.start_training(s, **static), settings)
        advance = lambda s, c: pinn.continue_training(s, c, jnp.arange(4), window=2, **static)
        after, (losses, weights) = jax.eval_shape(advance, settings, carry)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, carry)
        assert losses.shape == (2, 2, 3)
        without = {*balancers.AGGREGATORS, "autobalance"}
        assert (weights is None) == (method.split("+")[-1] in without)

    def test_relative_l2(self):
        reference = np.array([[3.0, 1.0], [1.0, 4.0]])[..., None]
        values = np.array([[3.0, 1.0, 1.0, 4.0], [3.0, 2.0, 1.0, 9.0]])[..., None]
        values = np.concatenate([values, 100 + values], axis=-1)  # outputs that nobody knows
        test, validation = pinn.relative_l2(values, reference)
        np.testing.assert_allclose(test, [0, 5 / 5])
        np.testing.assert_allclose(validation, [0, np.sqrt(1 / 2)])


class TestCommandLine:
    @pytest.mark.slow
    @pytest.mark.parametrize("script", [EXAMPLES / "pinn.py", BENCHMARK])
    def test_help(self, script):
        printed = help_of(script)
        for word in ("--problem", "--method", "--seeds", "--steps", "--learning-rate", "constant"):
            assert word in printed

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--method", "nonsense"], "unknown method 'nonsense'; choose from: ls, si"),
            (["--method", "graddrop+root"], "nothing follows it: graddrop+root"),
            (["--learning-rate", "0"], "--learning-rate and --weight must be positive"),
            (["--gram", "sketch"], "give --decay too"),
            (["--seeds", "0"], "at least 1"),
        ],
    )
    def test_mistakes_are_told_before_any_work(self, monkeypatch, arguments, message):
        monkeypatch.setattr(sys, "argv", ["pinn.py", *arguments])
        monkeypatch.setattr(pinn, "train", lambda *_, **__: pytest.fail("work was done"))
        with pytest.raises(SystemExit) as stopped:
            pinn.main()
        assert message in str(stopped.value.code)

    def test_a_run_from_options_to_files(self, monkeypatch, capsys, tmp_path):
        arguments = ["--problem", "poisson", "--method", "constant", "constant", "--weight", "7"]
        arguments += ["--seeds", "2", "--steps", "4", "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["pinn.py", *arguments])
        pinn.main()
        printed = capsys.readouterr().out
        assert printed.count("\nconstant ") == 1
        for name in ("table.md", "results.json", "figure.png"):
            assert str(tmp_path / name) in printed
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["setting"]["problem"] == "poisson"
        assert np.shape(results["methods"]["constant"]["losses"]) == (2, 4, 2)
        assert results["methods"]["constant"]["weights"] == [[[1, 7]] * 4] * 2

    def test_figure_of_a_flow(self):
        equation = EQUATIONS["navier_stokes_cavity"]
        solution = np.dstack([equation.reference().values, np.ones((129, 129))])
        errors, history = np.geomspace(1, 0.1, 10).reshape(2, 5), np.ones((2, 4, 5))
        rest = dict(validation=errors[:, -1], losses=history, seconds=1.0, seconds_per_step=1e-3)
        steps = np.arange(5, 21, 5)
        runs = [
            pinn.Run("ls", errors, solution=solution, steps=steps, weights=history, **rest),
            pinn.Run("moco", errors, solution=0 * solution, steps=steps, weights=None, **rest),
        ]
        panels = {ax.get_title(): ax for ax in pinn.figure(equation, runs).axes if ax.get_title()}
        assert list(panels) == [
            *("reference", "ls: solution", "error, relative L2 0.359", "ls: effective weights"),
            *("moco: solution",),
        ]
        speed = lambda title: panels[title].collections[0].get_array()
        np.testing.assert_allclose(speed("ls: solution"), speed("reference"))
        assert not speed("moco: solution").any()
