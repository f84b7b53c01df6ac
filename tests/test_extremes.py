"""Ten thousand steps of losses over sixteen orders of magnitude leave every state finite."""

import jax
import jax.numpy as jnp
import optax
import pytest
from contract import assert_finite

import bilb

NUM_TASKS, STEPS = 5, 10_000
BALANCERS = {
    "marigold": bilb.marigold(),
    "marigold-log": bilb.chain(bilb.log_losses(), bilb.marigold()),
    "marigold-projection": bilb.marigold(scheme="projection", optimizer=bilb.adagrad_norm()),
    "marigold-exponentiated": bilb.marigold(scheme="exponentiated", optimizer=optax.sgd(1e-3)),
    "marigold-sdmgrad": bilb.marigold("sdmgrad"),
    "marigold-nash": bilb.marigold("nash"),
    "marigold-fairgrad": bilb.marigold("fairgrad"),
    "marigold-dualproj": bilb.marigold(
        "dualproj", scheme="projection", optimizer=bilb.adagrad_norm()
    ),
    "famo": bilb.famo(),
    "gradnorm": bilb.gradnorm(),
    "igb_v1": bilb.igb_v1(base_start=100, base_steps=100),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BALANCERS)
def test_states_stay_finite_and_weights_non_negative(name):
    balancer = BALANCERS[name]
    keys = jax.random.split(jax.random.key(0), 3)
    spread = lambda key: 10 ** jax.random.uniform(key, (STEPS, NUM_TASKS), minval=-8, maxval=8)
    sign = jax.random.rademacher(keys[2], (STEPS, NUM_TASKS), float)

    def step(state, inputs):
        losses, other, sign = inputs
        about = {
            "marigold": {"slopes": sign * other},
            "famo": {"losses_after": other},
            "gradnorm": {"gradient_norms": other},
        }
        extra = about.get(name.split("-")[0], {})
        balanced, state = balancer.update(losses, state, **extra)
        return state, (balanced, optax.tree.get(state, "weights"))

    inputs = spread(keys[0]), spread(keys[1]), sign
    run = jax.jit(lambda state: jax.lax.scan(step, state, inputs))
    state, (balanced, weights) = run(balancer.init(inputs[0][0]))
    assert_finite((state, balanced))
    assert (weights >= 0).all()
    if name != "marigold-dualproj":
        total = NUM_TASKS if name in ("igb_v1", "gradnorm") else 1
        assert jnp.allclose(weights.sum(1), total, rtol=1e-4)
