"""Weights are not negative and have their documented sum, whatever the losses."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import compiled, mostly_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from methods import METHODS, OF_EACH_KIND

K = 5
# Methods whose weights have a fixed sum; for the others only the sign is documented.
SUMS = {
    "bilb4mtl-softmax": 1,
    "marigold": 1,
    "famo": 1,
    "igb_v1": K,
    "igb_v2": K,
    "rlw": 1,
    "rlw-tasks": K,
    "dwa": K,
    "softadapt": 1,
    "softadapt-normalized": 1,
    "relobralo": K,
    "dwa-sliding": 1,
    "gradnorm": K,
    "gradnorm-sum": K,
    "stch": 1 / K,
    "krum": 1,
    "modo": 1,
    "sdmgrad": 1,
    "sdmgrad-exact": 1,
}
# Documented to have weights of either sign.
EITHER_SIGN = ("pbi", "cosmos", "aligned_mtl", "imtl_g", "config")
WEIGHTED = [m for m in METHODS if "weights" in m.learns and m.name not in EITHER_SIGN]


def losses(dtype, exponent):
    number = st.one_of(st.just(0.0), st.floats(-exponent, exponent).map(lambda e: 10.0**e))
    return npst.arrays(dtype, (3, K), elements=number.map(lambda x: float(dtype(x))))


def check(method, rows):
    transformation, update = compiled(method, K)
    state = transformation.init(jnp.asarray(rows[0]))
    for row in rows:
        _, state, _ = update(jnp.asarray(row), state)
    weights = np.asarray(optax.tree.get(state, "weights"))
    assert (weights >= 0).all()
    if method.name in SUMS:
        assert weights.sum() == pytest.approx(SUMS[method.name], rel=1e-4)


@pytest.mark.parametrize(
    "method", mostly_slow(WEIGHTED, [m for m in WEIGHTED if m.name in OF_EACH_KIND]), ids=str
)
@settings(max_examples=25)
@given(rows=losses(np.float32, 12))
def test_in_float32(method, rows):
    check(method, rows)


@pytest.mark.slow
@pytest.mark.x64
@pytest.mark.parametrize("method", [m for m in WEIGHTED if not m.kin], ids=str)
@settings(max_examples=25)
@given(rows=losses(np.float64, 30))
def test_in_float64(method, rows):
    check(method, rows)


def test_every_method_is_named():
    assert set(SUMS) <= {m.name for m in WEIGHTED}
