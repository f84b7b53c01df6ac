"""Hyperparameters that are schedules, arrays or traced values where they may not be."""

import functools

import jax
import jax.numpy as jnp
import pytest
from contract import example_losses
from test_bad_input import IGB_V2, K, update_of

import bilb

ROUTER = lambda make: lambda **keywords: bilb.bilb4mtl(router=make(**keywords))


# Factories, and every numeric argument with a value for it.
NUMBERS = {
    "linear_scalarization": (bilb.linear_scalarization, {"weights": 0.5}),
    "divide_by": (bilb.divide_by, {"scales": 2.0}),
    "log_losses": (bilb.log_losses, {"floor": 0.1}),
    "power_losses": (bilb.power_losses, {"exponent": 0.5, "floor": 0.1}),
    "log_scale_by_initial_loss": (bilb.log_scale_by_initial_loss, {"every": 2, "floor": 0.1}),
    "bilb4mtl": (bilb.bilb4mtl, {"penalty": 0.5}),
    "softmax": (ROUTER(bilb.routers.softmax), {"initial": 0.5}),
    "sigmoid": (ROUTER(bilb.routers.sigmoid), {"initial": 0.5}),
    "relu_sigmoid": (ROUTER(bilb.routers.relu_sigmoid), {"minval": 0.5, "maxval": 2.0}),
    "geometric_mean": (bilb.geometric_mean, {"floor": 0.1}),
    "uncertainty_weighting": (bilb.uncertainty_weighting, {"initial": 0.5}),
    "imtl_l": (bilb.imtl_l, {"initial": 0.5}),
    "stch": (bilb.stch, {"mu": 0.5, "preference": 0.5, "reference": 0.5}),
    "stch_nadir": (
        functools.partial(bilb.stch_nadir, nadir_start=1, nadir_steps=1),
        {"mu": 0.5, "nadir_start": 1, "nadir_steps": 1, "floor": 0.1},
    ),
    "pbi": (bilb.pbi, {"penalty": 0.5, "preference": 0.5, "reference": 0.5}),
    "cosmos": (functools.partial(bilb.cosmos, penalty=1.0), {"penalty": 0.5, "preference": 0.5}),
    "dwa": (functools.partial(bilb.dwa, window=1), {"temperature": 0.5, "window": 2}),
    "softadapt": (bilb.softadapt, {"beta": 0.5}),
    "relobralo": (bilb.relobralo, {"alpha": 0.5, "temperature": 0.5, "rho": 0.5}),
    "self_adaptive": (bilb.self_adaptive, {"exponent": 1.5, "initial": 0.5}),
    "igb_v1": (
        functools.partial(bilb.igb_v1, base_start=0, base_steps=1),
        {"base_start": 1, "base_steps": 1, "floor": 0.1},
    ),
    "igb_v2": (
        IGB_V2,
        {
            "base_start": 1,
            "base_steps": 1,
            "warmup_steps": 1,
            "update_after": 1,
            "update_every": 1,
            "num_updates": 1,
            "reward_scale": 0.5,
            "discount": 0.5,
            "polyak": 0.5,
            "initial_temperature": 0.5,
            "clip": 2.0,
            "floor": 0.1,
        },
    ),
}


# Those that may also be (K,), and those that may also be a function of the step.
PER_TASK = {"weights", "scales", "initial", "preference", "reference"}


SCHEDULES = {
    *("linear_scalarization-weights", "bilb4mtl-penalty", "dwa-temperature"),
    *("stch-mu", "stch-preference", "stch-reference", "stch_nadir-mu"),
    *("pbi-penalty", "pbi-preference", "pbi-reference", "cosmos-penalty", "cosmos-preference"),
    "igb_v2-reward_scale",
}


every_number = pytest.mark.parametrize(
    ("factory", "argument", "value", "scheduled"),
    [
        pytest.param(
            factory, argument, value, f"{name}-{argument}" in SCHEDULES, id=f"{name}-{argument}"
        )
        for name, (factory, values) in NUMBERS.items()
        for argument, value in values.items()
    ],
)


def shapes_of(factory, **keywords):
    return jax.eval_shape(lambda: update_of(factory(**keywords)))


@every_number
def test_a_schedule_is_evaluated_or_refused(factory, argument, value, scheduled):
    steps = []
    schedule = lambda step: steps.append((step.shape, step.dtype)) or value
    if not scheduled:
        message = rf"{argument} takes no schedule; got .*inject_hyperparams"
        with pytest.raises(TypeError, match=message):
            factory(**{argument: schedule})
        return
    assert shapes_of(factory, **{argument: schedule}) == shapes_of(factory, **{argument: value})
    assert {*steps} == {((), jnp.dtype("int32"))}
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        shapes_of(factory, **{argument: lambda step: jnp.full(2, value)})


@every_number
def test_one_number_is_no_array(factory, argument, value, scheduled):
    del scheduled
    each = jnp.full(3, value)
    if argument in PER_TASK:
        assert shapes_of(factory, **{argument: each}) == shapes_of(factory, **{argument: value})
        return
    with pytest.raises(ValueError, match=rf"shape \(3,\).*{argument} must be one number"):
        factory(**{argument: each})
    # The shape of a traced value is known as well.
    with pytest.raises(ValueError, match=rf"shape \(3,\).*{argument} must be one number"):
        jax.eval_shape(lambda each: update_of(factory(**{argument: each})), each)


@pytest.mark.parametrize(
    "build",
    [
        bilb.linear_scalarization,
        bilb.divide_by,
        bilb.log_losses,
        lambda floor: bilb.log_scale_by_initial_loss(None, floor),
        lambda every: bilb.log_scale_by_initial_loss(every.astype(jnp.int32)),
        bilb.bilb4mtl,
    ],
    ids=["weights", "scales", "floor", "initial_floor", "every", "penalty"],
)
def test_traced_hyperparameters_are_not_checked(build):
    jax.eval_shape(lambda value: update_of(build(value)), jax.ShapeDtypeStruct((), jnp.float32))


def test_a_penalty_of_zero_is_the_ablation():
    losses = example_losses(K)
    balanced, state = update_of(bilb.bilb4mtl(0.0), losses)
    assert jnp.allclose(balanced, state.weights * losses)


def test_a_penalty_per_task_is_refused():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        bilb.bilb4mtl(jnp.array([0.1, 0.2, 0.3]))
