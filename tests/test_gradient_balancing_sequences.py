"""Methods that remember, over recorded sequences of task gradients, in float64."""

import functools

import jax
import jax.numpy as jnp
import pytest
from conftest import oracle, oracle_names, relative_deviation

import bilb
from bilb.gradient_balancing import gradvac, pcgrad, sdmgrad
from bilb.gradient_balancing.weighting import prepare

pytestmark = pytest.mark.x64

SEQUENCES = oracle_names("f4_seq_K*")
TOLERANCE = 1e-9
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
every_sequence = pytest.mark.parametrize("name", SEQUENCES)


def batches(name):
    """Returns the task gradients of three batches per step, each (T, K, P)."""
    arrays = oracle(name)
    return [jnp.asarray(arrays[key]) for key in ("J", "J2", "J3")]


def product(left, right):
    return jnp.einsum("tip,tjp->tij", left, right)


def run(balancer, losses, **about_losses):
    """Returns the balanced losses and the state after every step."""

    def step(state, inputs):
        losses, given = inputs
        balanced, state = balancer.update(losses, state, **given)
        return state, (balanced, state)

    scan = jax.jit(lambda state, inputs: jax.lax.scan(step, state, inputs)[1])
    return scan(balancer.init(losses[0]), (losses, about_losses))


def run_on(balancer, gram):
    """Returns the state after every step of a method that does not look at the losses' values."""
    return run(balancer, jnp.ones(gram.shape[:2]), gram=gram)[1]


def follows_given():
    """A method whose weights are those it is given."""

    def update(losses, state, *, mask, given):
        return given * losses, state

    return bilb.loss_transformation(lambda num_tasks, dtype: (), update)


@pytest.mark.parametrize(
    ("case", "alpha", "inner", "start"),
    [
        ("UPGrad_a0.9", 0.9, "UPGrad", None),
        slow("MGDA_a0.5", 0.5, "MGDA_tight", None),
        ("UPGrad_a0.9_init", 0.9, "UPGrad", "equal"),
    ],
)
@every_sequence
def test_cr_mogm_smooths_recorded_weights(name, case, alpha, inner, start):
    arrays = oracle(name)
    given = jnp.asarray(arrays[f"torchjd.{inner}/w"])
    initial = 1 / given.shape[1] if start else None
    balancer = bilb.cr_mogm(follows_given(), alpha, initial_weights=initial)
    balanced, state = run(balancer, jnp.ones(given.shape), given=given)
    expected = arrays[f"torchjd.CRMOGM_{case}/w"]
    assert relative_deviation(balanced, expected) < TOLERANCE
    assert relative_deviation(state.weights, expected) < TOLERANCE


@every_sequence
def test_cr_mogm_of_upgrad(name):
    rows, *_ = batches(name)
    state = run_on(bilb.cr_mogm(bilb.upgrad(), 0.9), product(rows, rows))
    expected = oracle(name)["torchjd.CRMOGM_UPGrad_a0.9/w"]
    assert relative_deviation(state.weights, expected) < TOLERANCE


@pytest.mark.parametrize(("tau", "beta"), [(0.02, 0.999), slow(0.3, 0.9)])
@every_sequence
def test_pcd(name, tau, beta):
    rows, *_ = batches(name)
    state = run_on(bilb.pcd(tau, beta=beta), product(rows, rows))
    expected = oracle(name)[f"torchjd.PCD_tau{tau}_b{beta}/w"]
    assert relative_deviation(state.weights, expected) < TOLERANCE


@pytest.mark.parametrize("code", [slow("torchjd"), "libmtl"])
@every_sequence
def test_gradvac_in_recorded_orders(name, code):
    arrays = oracle(name)
    rows, *_ = batches(name)
    num_tasks = rows.shape[1]
    present = jnp.ones(num_tasks, bool)

    def step(usual, inputs):
        gram, orders = inputs
        weights, usual = gradvac.vaccinate(prepare(gram, present), usual, orders, 0.5, 1e-8)
        return usual, (weights, usual)

    orders = jnp.asarray(arrays[f"{code}.GradVac_b0.5/perm"])
    inputs = product(rows, rows), orders
    scan = jax.jit(lambda usual, inputs: jax.lax.scan(step, usual, inputs)[1])
    weights, usual = scan(jnp.zeros((num_tasks, num_tasks)), inputs)
    state = "phi" if code == "torchjd" else "state"
    assert relative_deviation(usual, arrays[f"{code}.GradVac_b0.5/{state}"]) < TOLERANCE
    if code == "torchjd":
        assert relative_deviation(weights, arrays["torchjd.GradVac_b0.5/w"]) < TOLERANCE
    else:
        gradients = jnp.einsum("tk,tkp->tp", weights, rows)
        assert relative_deviation(gradients, arrays["libmtl.GradVac_b0.5/g"]) < TOLERANCE


@every_sequence
def test_pcgrad_in_recorded_orders(name):
    arrays = oracle(name)
    rows, *_ = batches(name)
    weights = jax.jit(jax.vmap(pcgrad.surgery))(
        product(rows, rows), jnp.asarray(arrays["libmtl.PCGrad/perm"])
    )
    gradients = jnp.einsum("tk,tkp->tp", weights, rows)
    # LibMTL adds 1e-8 to squared norms.
    smallest = float(jnp.min(jnp.sum(rows**2, axis=2)))
    assert relative_deviation(gradients, arrays["libmtl.PCGrad/g"]) < 10 * 1e-8 / smallest


@pytest.mark.parametrize(
    ("every", "case"),
    [
        slow(1, "torchjd.NashMTL_every1_norm0"),
        (1, "torchjd.NashMTL_every1_norm1"),
        slow(1, "nash_repo.NashMTL_every1"),
        (3, "torchjd.NashMTL_every3_norm0"),
        slow(3, "nash_repo.NashMTL_every3"),
    ],
)
@every_sequence
def test_nash_mtl_every_few_steps(name, every, case):
    rows, *_ = batches(name)
    balancer = bilb.nash_mtl(max_norm=1.0 if case.endswith("norm1") else None, every=every)
    losses = jnp.ones(rows.shape[1])

    def step(state, gram):
        given = {"gram": gram} if every == 1 else {"gram_fn": lambda: gram}
        _, state = balancer.update(losses, state, **given)
        return state, state.weights

    scan = jax.jit(lambda state, gram: jax.lax.scan(step, state, gram)[1])
    weights = scan(balancer.init(losses), product(rows, rows))
    # The official solver stops at about 1e-8.
    assert relative_deviation(weights, oracle(name)[f"{case}/w"]) < 1e-8


@pytest.mark.parametrize("gamma", [0.1, 0.001])
@every_sequence
def test_modo_on_two_batches(name, gamma):
    first, second, _ = batches(name)
    state = run_on(bilb.modo(gamma, 0.1), product(first, second))
    expected = oracle(name)[f"torchjd.MoDo_g{gamma}_r0.1/w"]
    assert relative_deviation(state.weights, expected) < TOLERANCE


@every_sequence
def test_modo_on_three_batches(name):
    arrays = oracle(name)
    first, second, third = batches(name)
    weights = run_on(bilb.modo(1e-3, 0.1), product(first, second)).weights
    gradients = jnp.einsum("tk,tkp->tp", weights, third)
    assert relative_deviation(weights, arrays["libmtl.MoDo_g1e-3_r0.1/state"]) < TOLERANCE
    assert relative_deviation(gradients, arrays["libmtl.MoDo_g1e-3_r0.1/g"]) < TOLERANCE


@pytest.mark.parametrize(
    ("case", "options"),
    [
        slow("l0.3", {}),
        ("l0.6_lr5", {"lamb": 0.6, "learning_rate": 5.0}),
        slow("l0.3_lr0.5_n50", {"learning_rate": 0.5, "steps": 50}),
    ],
)
@every_sequence
def test_sdmgrad_on_two_batches(name, case, options):
    arrays = oracle(name)
    first, second, _ = batches(name)
    state = run_on(bilb.sdmgrad(**options, eps=1e-8), product(first, second))
    w = arrays[f"torchjd.SDMGrad_{case}/simplex_w"]
    # Inner steps beyond what is stable, as the official 10, blow rounding up.
    tolerance = TOLERANCE if case == "l0.3_lr0.5_n50" else 10 * TOLERANCE
    assert relative_deviation(state.memory, w) < tolerance
    assert relative_deviation(state.weights, arrays[f"torchjd.SDMGrad_{case}/w"]) < tolerance


@every_sequence
def test_sdmgrad_on_three_batches(name):
    arrays = oracle(name)
    own, first, second = batches(name)
    balancer = bilb.sdmgrad(learning_rate=5.0, eps=1e-8)
    state = run_on(balancer, product(first, second))
    gradients = jnp.einsum("tk,tkp->tp", state.weights, own)
    assert relative_deviation(state.memory, arrays["libmtl.SDMGrad_l0.3/state"]) < TOLERANCE
    assert relative_deviation(gradients, arrays["libmtl.SDMGrad_l0.3/g"]) < TOLERANCE


@every_sequence
def test_sdmgrad_of_the_official_code(name):
    """It scales by ``mean sqrt(diag + 1e-4)`` and takes the pull from the rows' mean."""
    arrays = oracle(name)
    first, second, own = batches(name)
    num_tasks = own.shape[1]
    present = jnp.ones(num_tasks, bool)

    def step(w, products):
        scale = jnp.mean(jnp.sqrt(jnp.diagonal(products) + 1e-4))
        pull = jnp.full(num_tasks, 0.3 / num_tasks)
        w = sdmgrad.descend(products / scale**2, w, pull, present, 20, 10.0, 0.5)
        return w, w

    scan = jax.jit(lambda w, products: jax.lax.scan(step, w, products)[1])
    w = scan(jnp.full(num_tasks, 1 / num_tasks), product(first, second))
    gradients = jnp.einsum("tk,tkp->tp", (w + 0.3 / num_tasks) / 1.3, own)
    recorded = "sdm_repo.method_zetaJ3_xi1J1_xi2J2"
    assert relative_deviation(w, arrays[f"{recorded}/simplex_w"]) < TOLERANCE
    assert relative_deviation(gradients, arrays[f"{recorded}/g"]) < TOLERANCE


@every_sequence
def test_gradnorm(name):
    arrays = oracle(name)
    rows, *_ = batches(name)
    norms = jnp.linalg.norm(rows, axis=2)
    _, state = run(bilb.gradnorm(), jnp.asarray(arrays["losses"]), gradient_norms=norms)
    recorded = "libmtl.GradNorm_a1.5_adam0.025"
    assert relative_deviation(state.weights, arrays[f"{recorded}/w"]) < TOLERANCE
    assert relative_deviation(state.scales, arrays[f"{recorded}/state"]) < TOLERANCE
