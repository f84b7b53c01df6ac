"""BiLB4MTL against recorded runs of the official code, step by step, in float64."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import oracle, oracle_names, relative_deviation
from contract import mostly_slow

import bilb

pytestmark = pytest.mark.x64

FORMS = ("cityscapes", "nyuv2", "celeba", "qm9")
LEARNING_RATE = 1e-2
OPTIMIZERS = {"sgd": optax.sgd(LEARNING_RATE), "adam": optax.adam(LEARNING_RATE)}
TOLERANCE = {"sgd": 1e-9, "adam": 1e-8}
PENALTIES = {"off": "lamb_off", "big": "lamb_big"}
STATIC_TOLERANCE = 1e-12


def form_of(name):
    return name.split("_")[2]


def preset(form, penalty, optimizer, *, every, num_features=None, clip=None):
    if form in ("cityscapes", "nyuv2"):
        make = getattr(bilb.presets, f"bilb4mtl_{form}")
        return make(penalty, num_features=num_features, clip=clip, optimizer=optimizer)
    if form == "celeba":
        return bilb.presets.bilb4mtl_celeba(penalty, optimizer=optimizer)
    return bilb.presets.bilb4mtl_qm9(penalty, every=every, optimizer=optimizer)


def task_losses(params, inputs, targets):
    features = jnp.tanh(inputs @ params["trunk_w"].T + params["trunk_b"])
    outputs = features @ params["head_w"].T + params["head_b"]
    return jnp.mean((outputs - targets) ** 2, axis=0), features


def initial_parameters(arrays):
    names = ("trunk_w", "trunk_b", "head_w", "head_b")
    return {name: jnp.array(arrays[f"init_{name}"]) for name in names}


def router_parameters(arrays, prefix):
    if f"{prefix}_wparam" in arrays:
        return jnp.array(arrays[f"{prefix}_wparam"])
    return {
        "kernel": jnp.array(arrays[f"{prefix}_router_w"].T),
        "bias": jnp.array(arrays[f"{prefix}_router_b"]),
    }


@functools.partial(jax.jit, static_argnames=("form", "optimizer", "clip", "every"))
def replay(params, router, batches, penalty, *, form, optimizer, clip, every):
    """Trains on the batches; returns the final parameters and what every step computed."""
    optimizer = OPTIMIZERS[optimizer]
    balancer = preset(
        form,
        penalty,
        optimizer,
        num_features=params["trunk_b"].shape[0],
        clip=clip,
        every=every,
    )
    value_and_grad = bilb.value_and_grad(
        task_losses, balancer, has_aux=True, features=lambda features: features
    )
    first_batch = jax.tree.map(lambda x: x[0], batches)
    state = optax.tree.set(value_and_grad.init(params, *first_batch), router=router)

    def step(carry, batch):
        params, opt_state, state = carry
        (losses, features), gradient, next_state = value_and_grad(params, state, *batch)

        def objective(losses):
            return balancer.update(losses, state.balancer, features=features)[0].sum()

        total, effective = jax.value_and_grad(objective)(losses)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        record = {
            "losses": losses,
            "weights": optax.tree.get(next_state, "weights"),
            "total": total,
            "g_losses": effective,
        }
        return (optax.apply_updates(params, updates), opt_state, next_state), record

    carry = (params, optimizer.init(params), state)
    (params, _, state), history = jax.lax.scan(step, carry, batches)
    return params, optax.tree.get(state, "router"), history


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("optimizer", mostly_slow(OPTIMIZERS, fast=["sgd"]))
@pytest.mark.parametrize("name", oracle_names("f1_ldc_*_K*"))
def test_replays_the_official_training(name, optimizer, penalty):
    arrays = oracle(name)
    params, router, history = replay(
        initial_parameters(arrays),
        router_parameters(arrays, "init"),
        (jnp.array(arrays["X"]), jnp.array(arrays["Y"])),
        jnp.array(arrays[PENALTIES[penalty]]),
        form=form_of(name),
        optimizer=optimizer,
        clip=(float(arrays["clamp_lo"]), float(arrays["clamp_hi"])),
        every=len(arrays["X"]) // int(arrays["n_epochs"]),
    )
    run = f"{optimizer}_{penalty}"
    deviations = {key: relative_deviation(history[key], arrays[f"{run}_{key}"]) for key in history}
    for key, value in params.items():
        deviations[key] = relative_deviation(value, arrays[f"{run}_final_{key}"])
    recorded = router_parameters(arrays, f"{run}_final")
    for path, value in jax.tree_util.tree_leaves_with_path(recorded):
        actual = router[path[0].key] if path else router
        assert actual.dtype == jnp.float64
        deviations["router" + jax.tree_util.keystr(path)] = relative_deviation(actual, value)
    beyond = {key: value for key, value in deviations.items() if not value <= TOLERANCE[optimizer]}
    assert not beyond


#: Moves nothing; its state is the gradient that it was given.
LAST_GRADIENT = optax.chain(optax.trace(0.0), optax.set_to_zero())


def with_given_weights(form, penalty, optimizer):
    """Returns a form whose router's parameters are the weights themselves."""
    router = bilb.Router(lambda num_tasks, dtype: jnp.ones(num_tasks, dtype), lambda w, _: w)
    method = functools.partial(bilb.bilb4mtl, penalty, router, optimizer=optimizer)
    if form == "cityscapes":
        return method(weighted=False)
    if form == "nyuv2":
        return optax.chain(bilb.scale_by_initial_ratio(), method(divisor="sum"))
    if form == "celeba":
        return method(divisor="stop_gradient_sum")
    return optax.chain(bilb.log_scale_by_initial_loss(), method(divisor="stop_gradient_sum"))


def evaluate(balancer, losses, initial_losses, router):
    """Returns objectives, their gradients in the losses, and the router's, for many points."""

    def at_point(losses, initial_losses, router):
        state = optax.tree.set(balancer.init(losses), router=router)
        if optax.tree.get(state, "initial_losses") is not None:
            state = optax.tree.set(state, initial_losses=initial_losses)
        if optax.tree.get(state, "taken") is not None:
            state = optax.tree.set(state, taken=jnp.zeros_like(losses, jnp.int32))

        def objective(losses):
            balanced, next_state = balancer.update(losses, state)
            return balanced.sum(), next_state

        (total, state), effective = jax.value_and_grad(objective, has_aux=True)(losses)
        return total, effective, optax.tree.get(state, "trace")

    return jax.jit(jax.vmap(at_point))(losses, initial_losses, router)


def agrees(recorded, **values):
    deviations = {key: relative_deviation(value, recorded(key)) for key, value in values.items()}
    assert not {key: d for key, d in deviations.items() if not d <= STATIC_TOLERANCE}


def static_sizes():
    return sorted({int(key.split("_")[0][1:]) for key in oracle("f1_ldc_static")})


@pytest.mark.parametrize("num_tasks", mostly_slow(static_sizes(), fast=[3]))
@pytest.mark.parametrize("form", FORMS)
def test_objective_and_its_gradients(form, num_tasks):
    arrays = oracle("f1_ldc_static")
    given = lambda key: jnp.array(arrays[f"K{num_tasks}_{key}"])
    losses, initial_losses = given("losses"), given("l0")
    for lamb in PENALTIES:
        penalty = float(oracle(f"f1_ldc_{form}_K3")[PENALTIES[lamb]])
        check = functools.partial(
            agrees, recorded=lambda key, lamb=lamb: arrays[f"K{num_tasks}_{form}_{lamb}_{key}"]
        )
        balancer = with_given_weights(form, penalty, LAST_GRADIENT)
        total, effective, gradient = evaluate(balancer, losses, initial_losses, given("w"))
        check(total=total, g_losses=effective, g_w=gradient)
        if form in ("celeba", "qm9"):
            balancer = preset(form, penalty, LAST_GRADIENT, every=None)
            total, _, gradient = evaluate(balancer, losses, initial_losses, given("param"))
            check(param_total=total, g_param=gradient)
