"""Methods that solve a convex problem, against solutions of 80 digits and the official codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import oracle, oracle_names
from contract import mostly_slow

import bilb
from bilb import metrics
from bilb.gradient_balancing import solvers as qp

FILES = oracle_names("f4_agg_K*")
# The targets are 1e-6; what is seen in float64 is below 1e-11.
TOLERANCE = 1e-9
RAGGED = ("scales", "tiny")

# The recorded row beside the method whose weights it is, and what its weights are to be divided by.
EXACT = {
    "mgda": ("mgda", bilb.mgda, 1.0),
    "upgrad_reg": ("upgrad_reg", bilb.upgrad, 1.0),
    "upgrad_pure": ("upgrad_pure", lambda: bilb.upgrad(0.0, 0.0), 1.0),
    "dualproj_reg": ("dualproj_reg", bilb.dualproj, 1.0),
    "dualproj_pure": ("dualproj_pure", lambda: bilb.dualproj(0.0, 0.0), 1.0),
    "cagrad": ("cagrad_c0.4_total", lambda: bilb.cagrad(0.4, rescale=0), 1.0),
    "cagrad_rescale1": ("cagrad_c0.5_total", lambda: bilb.cagrad(0.5, rescale=1), 1 + 0.5**2),
    "cagrad_rescale2": ("cagrad_c0.5_total", lambda: bilb.cagrad(0.5, rescale=2), 1 + 0.5),
    "nash_mtl": ("nash", bilb.nash_mtl, 1.0),
    "fairgrad_1": ("nash", lambda: bilb.fairgrad(1.0), 1.0),
    "fairgrad_2": ("fairgrad_a2", bilb.fairgrad, 1.0),
    "fairgrad_0.5": ("fairgrad_a0.5", lambda: bilb.fairgrad(0.5), 1.0),
}
FAST = ("mgda", "upgrad_reg", "nash_mtl", "fairgrad_2")
every_file = pytest.mark.parametrize("name", FILES)


def solve(balancer, jacobian):
    """Returns the weights for the Gram matrix of a Jacobian, in its dtype."""
    return compiled(balancer, len(jacobian))(jacobian @ jacobian.T)


@functools.cache
def compiled(balancer, num_tasks):
    def weights(gram):
        losses = jnp.ones(num_tasks, gram.dtype)
        return balancer.update(losses, balancer.init(losses), gram=gram)[1].weights

    return jax.jit(weights)


def cases(name, skip=()):
    """Yields the arrays of every case, by their names, with the weights by the method's name."""
    arrays = oracle(name)
    for case in arrays["cases"]:
        if not case.startswith(skip or ("-",)):
            of_case = {k[len(case) + 1 :]: v for k, v in arrays.items() if k.startswith(f"{case}/")}
            of_case["exact"] = dict(zip(arrays["exact_names"], of_case["exact_W"]))
            of_case["official"] = dict(zip(arrays["w_methods"], of_case["W"]))
            of_case["sensitivity"] = dict(zip(arrays["w_methods"], of_case["W_sens"]))
            yield case, of_case


def distance(jacobian, actual, desired, relative_to):
    """Returns the distance of two aggregated gradients, relative to a size.

    That is the norm of the desired one or the longest row of the Jacobian. At a Pareto stationary
    point the desired one is zero, so that it is always the longest row there.
    """
    longest = np.linalg.norm(jacobian, axis=1).max()
    size = np.linalg.norm(desired @ jacobian)
    if relative_to == "longest" or size < 1e-12 * longest:
        size = longest
    return np.linalg.norm((np.asarray(actual, np.float64) - desired) @ jacobian) / size


def relative_to(method):
    return "longest" if method.startswith(("mgda", "cagrad")) else "own"


@pytest.mark.x64
@pytest.mark.parametrize("method", mostly_slow(EXACT, fast=[*FAST, "cagrad_rescale1"]))
@every_file
def test_exact_solutions(name, method):
    row, factory, divisor = EXACT[method]
    balancer = factory()
    seen = 0
    for case, arrays in cases(name):
        jacobian, exact = arrays["J"], arrays["exact"][row] / divisor
        weights = solve(balancer, jacobian)
        assert np.isfinite(weights).all(), case
        # Without a unique solution there is nothing to compare with.
        if np.isfinite(exact).all():
            assert distance(jacobian, weights, exact, relative_to(method)) < TOLERANCE, case
            seen += 1
    assert seen >= 7


@pytest.mark.parametrize("method", FAST)
@every_file
def test_exact_solutions_in_float32(name, method):
    row, factory, divisor = EXACT[method]
    balancer = factory()
    seen = 0
    for case, arrays in cases(name):
        jacobian, exact = arrays["J"], arrays["exact"][row] / divisor
        if case.startswith(("generic", "mixed", "parallel")) and np.isfinite(exact).all():
            # At P = 3 zero may lie in the hull, or all but.
            if not arrays["minnorm_sq"] > (0.05 * np.linalg.norm(jacobian, axis=1).max()) ** 2:
                continue
            weights = solve(balancer, jacobian.astype(np.float32))
            assert weights.dtype == jnp.float32
            assert distance(jacobian, weights, exact, relative_to(method)) < 1e-3, case
            seen += 1
    assert seen >= 4


OFFICIAL = {
    "torchjd.UPGrad": lambda preference: bilb.upgrad(),
    "libmtl.UPGrad": lambda preference: bilb.upgrad(),
    "torchjd.UPGrad_pref": lambda preference: bilb.upgrad(preference=preference),
    "torchjd.DualProj": lambda preference: bilb.dualproj(),
    "torchjd.DualProj_pref": lambda preference: bilb.dualproj(preference=preference),
}


@pytest.mark.x64
@pytest.mark.parametrize("method", OFFICIAL)
@every_file
def test_official_projections(name, method):
    @jax.jit
    def solve(gram, preference):
        balancer = OFFICIAL[method](preference)
        losses = jnp.ones(len(gram))
        return balancer.update(losses, balancer.init(losses), gram=gram)[1].weights

    for case, arrays in cases(name):
        jacobian = arrays["J"]
        weights = solve(jacobian @ jacobian.T, arrays["pref"])
        deviation = distance(jacobian, weights, arrays["official"][method], "own")
        # 1e-11 of relative noise in J moves the official weights that much.
        assert deviation < max(1e-8, arrays["sensitivity"][method]), case


@pytest.mark.x64
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@every_file
def test_official_fairgrad(name, alpha):
    balancer = bilb.fairgrad(alpha)
    method, row = (
        f"torchjd.FairGrad_a{alpha:g}",
        f"fairgrad_a{alpha:g}".replace("fairgrad_a1", "nash"),
    )
    seen = 0
    for case, arrays in cases(name, skip=RAGGED):
        jacobian, official, exact = arrays["J"], arrays["official"][method], arrays["exact"][row]
        if np.isfinite(official).all() and np.isfinite(exact).all():
            deviation = distance(jacobian, solve(balancer, jacobian), official, "own")
            # The official solver stops up to 6e-6 from the solution where rows are opposed.
            error = distance(jacobian, official, exact, "own")
            assert deviation < max(1e-8, arrays["sensitivity"][method], 1.01 * error), case
            seen += deviation < 1e-8
    assert seen >= 6


@pytest.mark.slow
@pytest.mark.x64
@every_file
def test_as_good_as_the_best_recorded_solver(name):
    mgda, cagrad, nash = bilb.mgda(), bilb.cagrad(0.4, rescale=0), bilb.nash_mtl()
    for case, arrays in cases(name):
        jacobian, exact = arrays["J"], arrays["exact"]
        gram = jacobian @ jacobian.T
        rounding = 1e-14 * gram.diagonal().max()
        finite = {m: w for m, w in arrays["official"].items() if np.isfinite(w).all()}
        minima = ("torchjd.MGDA", "torchjd.MGDA_tight", "senersolver.min_norm")
        minima = [finite[m] for m in (*minima, "senersolver.min_norm_FW") if m in finite]
        value = lambda w, gram=gram: w @ gram @ w
        gap = lambda w, gram=gram: w @ gram @ w - (gram @ w).min()
        weights = np.asarray(solve(mgda, jacobian))
        assert value(weights) <= min(map(value, minima)) + rounding, case
        assert gap(weights) <= min(map(gap, minima)) + rounding, case

        best = exact["cagrad_c0.4_total"]
        if np.isfinite(best).all():
            recorded = distance(jacobian, finite["torchjd.CAGrad_c0.4"], best, "longest")
            error = distance(jacobian, solve(cagrad, jacobian), best, "longest")
            assert error <= recorded + 1e-12, case

        if np.isfinite(exact["nash"]).all():
            residual = lambda w, gram=gram: np.abs(w * (gram @ w) - 1).max()
            solvers = ("torchjd.NashMTL_nonorm", "nash_repo.NashMTL", "torchjd.FairGrad_a1")
            recorded = [residual(finite[m]) for m in solvers if m in finite]
            # A product of rounded numbers: a row's own entry is eps of 1, others cancel.
            noise = 1e-15 * (np.abs(gram) @ exact["nash"] * exact["nash"]).max()
            assert residual(np.asarray(solve(nash, jacobian))) <= min(recorded) + 4 * noise, case


@pytest.mark.slow
@pytest.mark.x64
@every_file
def test_cagrad_is_the_official_one_without_its_smoothing(name):
    balancer = bilb.cagrad(0.4, rescale=1)
    for case, arrays in cases(name):
        if case.startswith(("generic_P20", "mixed_P20", "parallel")):
            expected = arrays["exact"]["cagrad_official_c0.4_raw_total"]
            weights = solve(balancer, arrays["J"])
            assert distance(arrays["J"], weights, expected, "longest") < 1e-6, case


@pytest.mark.slow
@pytest.mark.x64
def test_min_norm_point_agrees_with_the_metric():
    for _, arrays in cases("f4_agg_K3"):
        jacobian = arrays["J"]
        norm = np.linalg.norm(solve(bilb.mgda(), jacobian) @ jacobian)
        longest = np.linalg.norm(jacobian, axis=1).max()
        shown = metrics.pareto_stationarity(jacobian @ jacobian.T)
        assert abs(float(shown) - norm) <= 3e-8 * longest


@pytest.mark.slow
@pytest.mark.x64
@pytest.mark.parametrize("rank", [40, 400])
def test_more_tasks_than_are_solved_row_by_row_have_the_same_solutions(rank):
    num_tasks = 128
    rng = np.random.default_rng(rank)
    rows = rng.normal(size=(num_tasks, rank)) * 10 ** rng.uniform(-1, 1, size=(num_tasks, 1))
    hessian = jnp.array(rows @ rows.T) / np.square(rows).sum() + 1e-4 * jnp.eye(num_tasks)
    where = jnp.arange(num_tasks) != 5
    lower = jnp.diag(where / num_tasks)
    together = qp.lift_all(hessian, lower, where)
    alone = jax.vmap(lambda row: qp.lift(hessian, row, where))(lower)
    distance = np.linalg.norm((together - alone) @ rows, axis=1)
    assert (distance < 1e-9 * np.linalg.norm(alone @ rows)).all()
