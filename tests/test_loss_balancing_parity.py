"""The loss-balancing methods against recorded runs of the official implementations, in float64.

The recorded runs are of Nash-MTL, FAMO and IGB ("repo"), LibMTL and TorchJD. Their reported weights
are compared only where they are the derivative of the objective, up to the stated factor.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import oracle, oracle_names, relative_deviation
from contract import mostly_slow

import bilb

pytestmark = pytest.mark.x64

UW_STATES = {"logsigma": "log_variances", "log_var": "log_variances", "loss_scale": "log_variances"}


def replayed(draws):
    """Returns a distribution for ``bilb.rlw(key=0)`` that plays back the draws, by their keys."""
    keys, key = [], jax.random.key(0)
    for _ in draws:
        key, subkey = jax.random.split(key)
        keys.append(jax.random.key_data(subkey))
    keys, draws = jnp.stack(keys), jnp.array(draws)

    def sample(key, shape, dtype):
        row = jnp.argmax(jnp.all(keys == jax.random.key_data(key), axis=1))
        return draws[row].astype(dtype)

    return sample


def rlw(name, sum_to="one", log=False):
    def make(recorded, _):
        sample = replayed(recorded[f"{name}/randn"])
        balancer = bilb.rlw(sum_to=sum_to, sample=sample, key=0)
        return optax.chain(bilb.log_losses(), balancer) if log else balancer

    return make


def of(factory, **options):
    return lambda recorded, rate: factory(**options)


def log_of(factory, **options):
    return lambda recorded, rate: optax.chain(bilb.log_losses(), factory(**options))


def with_preference(factory, *names, **options):
    return lambda recorded, rate: factory(**{n: recorded[n] for n in names}, **options)


def stch(mu):
    return with_preference(bilb.stch, "preference", "reference", mu=mu)


def epochs(factory, **options):
    return lambda recorded, rate: factory(window=int(recorded["J"]), **options)


def nadir(mu):
    def make(recorded, rate):
        steps = int(recorded["J"])
        return bilb.stch_nadir(mu, nadir_start=steps, nadir_steps=steps)

    return make


# name: (how to make it, tolerance, reported weights / ours or None where they are others)
STATIC = {
    "libmtl.EW": (of(bilb.linear_scalarization), 1e-9, 1),
    "famo_repo.si": (of(bilb.log_losses), 1e-9, None),
    "famo_repo.rlw": (rlw("famo_repo.rlw"), 1e-9, 1),
    "igb_repo.rlw": (rlw("igb_repo.rlw", "tasks"), 1e-9, 1),
    "libmtl.RLW": (rlw("libmtl.RLW"), 1e-9, 1),
    "torchjd.Random": (rlw("torchjd.Random"), 1e-9, None),
    # The Nash-MTL family keeps losses and weights of DWA in float32.
    "famo_repo.dwa_win25_mean": (
        of(bilb.dwa, window=25, sliding=True, sum_to="one"),
        1e-6,
        "num_tasks",
    ),
    "famo_repo.dwa_win5_T1": (
        of(bilb.dwa, temperature=1.0, window=5, sliding=True, sum_to="one"),
        1e-6,
        "num_tasks",
    ),
    "igb_repo.dwa_win25_sum": (of(bilb.dwa, window=25, sliding=True), 1e-6, 1),
    "igb_repo.dwalog_win25_sum": (
        of(bilb.dwa, window=25, sliding=True, transform=jnp.log),
        1e-6,
        1,
    ),
    "libmtl.DWA_T2": (epochs(bilb.dwa), 1e-9, 1),
    "torchjd.DWA_T2": (epochs(bilb.dwa), 1e-9, None),
    "famo_repo.uw": (of(bilb.uncertainty_weighting), 1e-9, 2),
    "igb_repo.uw": (of(bilb.uncertainty_weighting), 1e-9, 2),
    "igb_repo.uwlog": (log_of(bilb.uncertainty_weighting), 1e-9, 2),
    "libmtl.UW": (of(bilb.uncertainty_weighting, initial=-0.5), 1e-9, 1),
    "torchjd.UW": (of(bilb.uncertainty_weighting), 1e-9, None),
    "torchjd.IMTLL": (of(bilb.imtl_l), 1e-9, None),
    "libmtl.GLS": (of(bilb.geometric_mean), 1e-9, None),
    "torchjd.GeometricMean": (of(bilb.geometric_mean), 1e-9, None),
    "torchjd.STCH_mu0.01": (of(bilb.stch, mu=0.01), 1e-9, None),
    "torchjd.STCH_mu0.1": (of(bilb.stch, mu=0.1), 1e-9, None),
    "torchjd.STCH_mu1.0": (of(bilb.stch, mu=1.0), 1e-9, None),
    "torchjd.STCH_mu0.01_pref_ref": (stch(0.01), 1e-9, None),
    "torchjd.STCH_mu0.1_pref_ref": (stch(0.1), 1e-9, None),
    "torchjd.STCH_mu1.0_pref_ref": (stch(1.0), 1e-9, None),
    "libmtl.STCH_mu0.1_warm1": (nadir(0.1), 1e-9, None),
    "libmtl.STCH_mu1.0_warm1": (nadir(1.0), 1e-9, None),
    "torchjd.PBI_theta5_pref_ref": (
        with_preference(bilb.pbi, "preference", "reference", penalty=5.0),
        1e-9,
        None,
    ),
    "torchjd.COSMOS_l2_pref": (
        with_preference(bilb.cosmos, "preference", penalty=2.0),
        1e-9,
        None,
    ),
}


def numbers(file):
    recorded = dict(oracle(file))
    recorded["preference"] = recorded.get("pref")
    return recorded


def learnt(state, recorded, name):
    """Returns what the method has learnt, by the recorded name."""
    fields = {"log_scale": "log_scales", **UW_STATES}
    return {
        theirs: optax.tree.get(state, ours)
        for theirs, ours in fields.items()
        if f"{name}/{theirs}" in recorded and optax.tree.get(state, ours) is not None
    }


@pytest.mark.parametrize("file", oracle_names("f3_static_K*"))
@pytest.mark.parametrize(
    "name", mostly_slow(STATIC, fast={*STATIC} - {"famo_repo.rlw", "igb_repo.rlw"})
)
def test_replays_recorded_losses(file, name):
    recorded = numbers(file)
    make, tolerance, factor = STATIC[name]
    balancer = make(recorded, None)
    losses = jnp.array(recorded["losses"])

    def objective(losses, state):
        balanced, state = balancer.update(losses, state)
        return balanced.sum(), state

    def step(state, losses):
        gradient = jax.value_and_grad(objective, has_aux=True)
        (value, state), effective = gradient(losses, state)
        weights = optax.tree.get(state, "weights")
        return state, (value, effective, weights, learnt(state, recorded, name))

    state = balancer.init(losses[0])
    state, (value, effective, weights, states) = jax.lax.scan(step, state, losses)
    num_tasks = losses.shape[1]
    ours = {"loss": value, "g_losses": effective, **states}
    if factor is not None:
        ours["weights"] = weights * (num_tasks if factor == "num_tasks" else factor)
    if name.startswith("libmtl.STCH"):
        ours["nadir_vector"] = state.nadir
    found = [key for key in ours if f"{name}/{key}" in recorded]
    assert "g_losses" in found
    assert (factor is None) == ("weights" not in found)
    for key in found:
        assert relative_deviation(ours[key], recorded[f"{name}/{key}"]) < tolerance, key
    if weights is not None and "log" not in name:
        assert relative_deviation(weights, effective) < 1e-12


def test_every_recorded_variant_is_replayed_here_or_elsewhere():
    recorded = set(oracle("f3_static_K3")["methods"])
    elsewhere = {name for name in recorded if name.startswith(("famo_py.", "famo_repo.g"))}
    elsewhere |= {"libmtl.FAMO_g1e-3", "torchjd.FAMO_wd1e-3", "igb_repo.igbv1_base1"}
    assert recorded - elsewhere == set(STATIC)


@pytest.mark.slow
@pytest.mark.parametrize("file", oracle_names("f4_seq_K*"))
def test_gradnorm_replays_recorded_task_gradients(file):
    recorded = oracle(file)
    name = "libmtl.GradNorm_a1.5_adam0.025"
    jacobians = jnp.array(recorded["J"])
    losses = jnp.array(recorded["losses"])
    balancer = bilb.gradnorm(alpha=1.5, warmup_steps=1)

    def step(state, inputs):
        losses, jacobian = inputs
        norms = jnp.linalg.norm(jacobian, axis=1)
        _, state = balancer.update(losses, state, gradient_norms=norms)
        return state, (state.weights, state.weights @ jacobian, state.scales)

    _, (weights, gradient, scales) = jax.lax.scan(
        step, balancer.init(losses[0]), (losses, jacobians)
    )
    for key, ours in {"w": weights, "g": gradient, "state": scales}.items():
        assert relative_deviation(ours, recorded[f"{name}/{key}"]) < 1e-9, key


# name: (how to make it with the model's learning rate, tolerance)
MODEL_RATE = lambda factory, **options: (
    lambda recorded, rate: factory(optimizer=optax.adam(rate), **options)
)
TRAINED = {
    "famo_repo.uw": (of(bilb.uncertainty_weighting), 1e-9),
    "igb_repo.uwlog": (log_of(bilb.uncertainty_weighting), 1e-9),
    "libmtl.UW": (MODEL_RATE(bilb.uncertainty_weighting, initial=-0.5), 1e-9),
    "famo_repo.rlw": (rlw("famo_repo.rlw"), 1e-9),
    "igb_repo.rlw": (rlw("igb_repo.rlw", "tasks"), 1e-9),
    "igb_repo.rlwlog": (rlw("igb_repo.rlwlog", "tasks", log=True), 1e-9),
    "libmtl.RLW": (rlw("libmtl.RLW"), 1e-9),
    "famo_repo.dwa_win5": (of(bilb.dwa, window=5, sliding=True, sum_to="one"), 1e-6),
    "igb_repo.dwa_win5": (of(bilb.dwa, window=5, sliding=True), 1e-6),
    "igb_repo.dwalog_win5": (of(bilb.dwa, window=5, sliding=True, transform=jnp.log), 1e-6),
    "libmtl.DWA_T2": (epochs(bilb.dwa), 1e-9),
    "libmtl.GLS": (of(bilb.geometric_mean), 1e-9),
    "libmtl.STCH_mu1_warm1": (nadir(1.0), 1e-9),
    "libmtl.STCH_mu0.1_warm1": (nadir(0.1), 1e-9),
    "libmtl.GradNorm_a1.5": (
        lambda recorded, rate: bilb.gradnorm(
            warmup_steps=int(recorded["J"]), optimizer=optax.adam(rate)
        ),
        1e-9,
    ),
}


def task_losses(params, x, y):
    hidden = jnp.tanh(x @ params["trunk_w"].T + params["trunk_b"])
    return jnp.mean((hidden @ params["head_w"].T + params["head_b"] - y) ** 2, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["f3_traj_K3", "f3_traj_K5"])
@pytest.mark.parametrize("name", TRAINED)
def test_trains_a_model_as_recorded(file, name):
    recorded = numbers(file)
    make, tolerance = TRAINED[name]
    rate = float(recorded["model_lr"])
    leaves = ("trunk_w", "trunk_b", "head_w", "head_b")
    params = {leaf: jnp.array(recorded[f"init_{leaf}"]) for leaf in leaves}
    shared = {leaf: leaf.startswith("trunk") for leaf in leaves}
    value_and_grad = bilb.value_and_grad(task_losses, make(recorded, rate), shared=shared)
    optimizer = optax.adam(rate)

    def step(carry, batch):
        params, state, opt_state = carry
        losses, grads, state = value_and_grad(params, state, *batch)
        if "GradNorm" in name:  # LibMTL gives heads the gradients of the unweighted losses
            weights = state.balancer.weights
            grads["head_w"] /= weights[:, None]
            grads["head_b"] /= weights
        updates, opt_state = optimizer.update(grads, opt_state, params)
        trunk_grad = jnp.append(grads["trunk_w"].ravel(), grads["trunk_b"])
        return (optax.apply_updates(params, updates), state, opt_state), (losses, trunk_grad)

    steps = len(recorded[f"{name}/losses"])
    batches = jnp.array(recorded["X"][:steps]), jnp.array(recorded["Y"][:steps])
    state = value_and_grad.init(params, batches[0][0], batches[1][0])
    carry = params, state, optimizer.init(params)
    (params, _, _), (losses, trunk_grads) = jax.lax.scan(step, carry, batches)
    assert relative_deviation(losses, recorded[f"{name}/losses"]) < tolerance
    for leaf in leaves:
        final = recorded[f"{name}/final_{leaf}"]
        assert relative_deviation(params[leaf], final) < tolerance, leaf
    default = np.arange(len(recorded[f"{name}/trunk_grad"]))
    picked = trunk_grads[recorded.get(f"{name}/trunk_grad_steps", default)]
    assert relative_deviation(picked, recorded[f"{name}/trunk_grad"]) < tolerance
