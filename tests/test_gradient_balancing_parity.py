"""Closed forms on the Gram matrix against the recorded numbers of the official codes, in float64.

The aggregates ``Jᵀ w`` are compared. Where a case is ill-conditioned, the recorded change of the
official aggregate under a perturbation of J by 1e-11 says how far: ten times that is allowed, too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import oracle, oracle_names

import bilb
from bilb.gradient_balancing import gradvac, pcgrad
from bilb.gradient_balancing.weighting import prepare

pytestmark = pytest.mark.x64

TOLERANCE = 1e-9
every_file = pytest.mark.parametrize("name", oracle_names("f4_agg_K*"))


def cases(name, method):
    """Yields for every case its name, its arrays, the official aggregate and its sensitivity."""
    arrays = oracle(name)
    of_weights = list(arrays["w_methods"])
    for case in arrays["cases"]:
        at = lambda key, case=case: arrays[f"{case}/{key}"]
        if method in of_weights:
            row = of_weights.index(method)
            weights, sensitivity, status = at("W")[row], at("W_sens")[row], at("status")[row]
            aggregate = weights @ at("J")
        else:
            row = list(arrays["g_methods"]).index(method)
            aggregate, sensitivity = at("G")[row], at("G_sens")[row]
            status = at("status")[len(of_weights) + row]
        assert status == "ok", (case, status)
        yield case, at, aggregate, sensitivity


def gram_of(rows):
    return jnp.asarray(rows @ rows.T)


@functools.cache
def weights_of(factory, **options):
    """Returns the compiled ``gram -> weights`` of a method's first call."""

    @jax.jit
    def weights(gram, **more):
        balancer = factory(**options, **more)
        losses = jnp.ones(gram.shape[0])
        return balancer.update(losses, balancer.init(losses), gram=gram)[1].weights

    return weights


def deviation(weights, rows, expected):
    size = np.linalg.norm(expected)
    return np.linalg.norm(np.asarray(weights) @ rows - expected) / (size if size else 1.0)


@pytest.mark.parametrize(
    ("method", "factory", "options", "preference"),
    [
        ("torchjd.ConFIG", bilb.config, {}, False),
        ("torchjd.ConFIG_pref", bilb.config, {}, True),
        ("torchjd.PCD_tau0.02", bilb.pcd, {}, False),
        ("torchjd.PCD_tau0.3", bilb.pcd, {"tau": 0.3}, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@every_file
def test_closed_forms(name, method, factory, options, preference):
    weights = weights_of(factory, **options)
    for case, at, expected, sensitivity in cases(name, method):
        more = {"preference": jnp.asarray(at("pref"))} if preference else {}
        actual = weights(gram_of(at("J")), **more)
        assert deviation(actual, at("J"), expected) < TOLERANCE + 10 * sensitivity, case


@pytest.mark.parametrize(
    ("method", "options", "preference"),
    [
        ("torchjd.AlignedMTL_min", {}, None),
        ("torchjd.AlignedMTL_median", {"scale": "median"}, None),
        ("torchjd.AlignedMTL_rmse", {"scale": "rmse"}, None),
        ("torchjd.AlignedMTL_min_pref", {}, "pref"),
        ("libmtl.Aligned_MTL", {}, 1.0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@every_file
def test_aligned_mtl(name, method, options, preference):
    """Also against the singular values of J itself.

    Eigenvalues of G, which the official codes take, have lost all digits of the smallest ones where
    norms differ by 1e6: in "scales" they are off by up to 3e-4, so there that is the only measure.
    """
    weights = weights_of(bilb.aligned_mtl, **options)
    for case, at, expected, sensitivity in cases(name, method):
        rows, num_tasks = at("J"), len(at("J"))
        target = at("pref") if preference == "pref" else np.full(num_tasks, preference or np.nan)
        actual = weights(gram_of(rows), **({"preference": target} if preference else {}))
        if not case.startswith("scales"):
            assert deviation(actual, rows, expected) < TOLERANCE + 10 * sensitivity, case
        target = target if preference else np.full(num_tasks, 1 / num_tasks)
        left, singular, _ = np.linalg.svd(rows, full_matrices=False)
        kept = singular > 1e-12 * singular[0]
        sigma = {
            "min": singular[kept][-1],
            "median": np.sort(singular[kept])[(kept.sum() - 1) // 2],
            "rmse": np.sqrt(np.mean(singular[kept] ** 2)),
        }[options.get("scale", "min")]
        truth = sigma * (target @ left[:, kept]) / singular[kept] @ (left[:, kept].T @ rows)
        # The smallest singular value is known to the machine epsilon of the largest.
        unknown = np.finfo(float).eps * singular[0] / singular[kept][-1]
        assert deviation(actual, rows, truth) < TOLERANCE + 10 * unknown, case


@every_file
def test_imtl_g(name):
    """Against TorchJD; independent task gradients against the exact solution, which is closer."""
    arrays = oracle(name)
    exact_row = list(arrays["exact_names"]).index("imtlg")
    weights = weights_of(bilb.imtl_g)
    for case, at, expected, sensitivity in cases(name, "torchjd.IMTLG"):
        actual = weights(gram_of(at("J")))
        assert deviation(actual, at("J"), expected) < 1e-8 + 10 * sensitivity, case
        exact = at("exact_W")[exact_row]
        if np.isfinite(exact).all():
            assert deviation(actual, at("J"), exact @ at("J")) < TOLERANCE, case


@pytest.mark.parametrize(("num_byzantine", "num_selected"), [(0, 1), (1, 2)])
@every_file
def test_krum(name, num_byzantine, num_selected):
    options = {"num_byzantine": num_byzantine, "num_selected": num_selected}
    arrays = oracle(name)
    row = list(arrays["w_methods"]).index(f"torchjd.Krum_b{num_byzantine}_s{num_selected}")
    for case in arrays["cases"]:
        rows, recorded = arrays[f"{case}/J"], arrays[f"{case}/W"][row]
        neighbours = max(len(rows) - num_byzantine - 2, 1)
        for squared in (False, True):
            weights = weights_of(bilb.krum, **options, squared=squared)(gram_of(rows))
            distances = np.linalg.norm(rows[:, None] - rows, axis=2) ** (1 + squared)
            scores = np.sort(distances, axis=1)[:, 1 : neighbours + 1].sum(1)
            selected = np.asarray(weights) > 0
            count = min(num_selected, len(rows))
            np.testing.assert_array_equal(weights[selected], np.full(count, 1 / count))
            # Where scores tie, as of equal gradients, any choice is as good.
            np.testing.assert_allclose(
                scores[selected].sum(), np.sort(scores)[:count].sum(), rtol=1e-7, err_msg=case
            )
            if len(rows) >= num_byzantine + 3 and not squared:
                ties = np.isclose(scores[recorded > 0].sum(), scores[selected].sum(), rtol=1e-7)
                assert ties, case
                if len(set(scores.round(9))) == len(rows):
                    np.testing.assert_array_equal(weights, recorded, err_msg=case)


@every_file
def test_sdmgrad_solves_its_problem_exactly(name):
    arrays = oracle(name)
    row = list(arrays["exact_names"]).index("sdmgrad_l0.3_simplex")
    weights = weights_of(bilb.sdmgrad, steps=None)
    compared = 0
    for case in arrays["cases"]:
        rows, exact = arrays[f"{case}/J"], arrays[f"{case}/exact_W"][row]
        if not np.isfinite(exact).all():
            continue
        actual = np.asarray(weights(gram_of(rows))) @ rows
        expected = (exact + 0.3 / len(rows)) / 1.3 @ rows
        # As MGDA, to the largest row: the point of smallest norm may be close to zero.
        largest = np.linalg.norm(rows, axis=1).max()
        assert np.linalg.norm(actual - expected) < 1e-6 * largest, case
        excess = np.sum(actual**2) - np.sum(expected**2)
        assert excess < 1e-13 * largest**2, case
        compared += 1
    assert compared


surgery = jax.jit(pcgrad.surgery)


@pytest.mark.parametrize("method", ["torchjd.PCGrad", "famo_repo.PCGrad_noclip"])
@every_file
def test_pcgrad_in_recorded_orders(name, method):
    """TorchJD skips the task itself, the FAMO code visits it."""
    for case, at, expected, sensitivity in cases(name, method):
        orders = at(f"rand/{method}").astype(int)
        if method.startswith("torchjd"):
            others = [[j for j in order if j != i] for i, order in enumerate(orders)]
            orders = np.array(others).reshape(len(orders), -1)
        actual = surgery(gram_of(at("J")), jnp.asarray(orders))
        assert deviation(actual, at("J"), expected) < TOLERANCE + 10 * sensitivity, case


@jax.jit
def vaccinate(gram, orders):
    num_tasks = gram.shape[0]
    prepared = prepare(gram, jnp.ones(num_tasks, bool))
    return gradvac.vaccinate(prepared, jnp.zeros((num_tasks, num_tasks)), orders, 0.5, 1e-8)[0]


@pytest.mark.parametrize("method", ["torchjd.GradVac", "libmtl.GradVac"])
@every_file
def test_gradvac_in_recorded_orders(name, method):
    # LibMTL does not compute from the Gram matrix; TorchJD's change says what that holds.
    of_gram = {case: sensitivity for case, _, _, sensitivity in cases(name, "torchjd.GradVac")}
    for case, at, expected, sensitivity in cases(name, method):
        actual = vaccinate(gram_of(at("J")), jnp.asarray(at(f"rand/{method}").astype(int)))
        # What rounding leaves of gradients that cancel is known to the root of the epsilon.
        if np.linalg.norm(expected) < 1e-7 * np.linalg.norm(at("J")):
            assert np.linalg.norm(np.asarray(actual) @ at("J")) < 1e-6 * np.linalg.norm(at("J"))
            continue
        sensitivity = max(sensitivity, of_gram[case])
        assert deviation(actual, at("J"), expected) < TOLERANCE + 10 * sensitivity, case


@every_file
def test_random_weighting_is_the_softmax_of_normal_numbers(name):
    for case, at, expected, _ in cases(name, "torchjd.Random"):
        drawn = jnp.asarray(at("rand/torchjd.Random"))
        balancer = bilb.rlw(sample=lambda key, shape, dtype, drawn=drawn: drawn)
        losses = jnp.ones(len(drawn))
        _, state = balancer.update(losses, balancer.init(losses))
        assert deviation(state.weights, at("J"), expected) < TOLERANCE, case


@pytest.mark.parametrize("draw", [pcgrad.random_orders])
def test_random_orders_hold_every_other_task_once(draw):
    orders = np.asarray(draw(jax.random.key(1), 7))
    assert orders.shape == (7, 6)
    for task, order in enumerate(orders):
        assert sorted(order) == [j for j in range(7) if j != task]
    assert len({tuple((order - task) % 7) for task, order in enumerate(orders)}) > 1
