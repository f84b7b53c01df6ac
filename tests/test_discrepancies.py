"""Discrepancies against their definitions, with ties, absent tasks and derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from bilb import discrepancies

pytestmark = pytest.mark.x64

K = 6


def definition(name, u, mean=False):
    """Returns the discrepancy of a list of numbers and its derivative, in plain loops."""
    count, value, derivative = len(u), 0.0, np.zeros(len(u))
    if name in ("adjacent", "pairwise"):
        pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
        if name == "adjacent":
            pairs = [(i, j) for i, j in pairs if j == i + 1]
        for i, j in pairs:
            value += abs(u[i] - u[j])
            derivative[i] += np.sign(u[i] - u[j])
            derivative[j] -= np.sign(u[i] - u[j])
        scale = max(len(pairs), 1) if mean else 1
        return value / scale, derivative / scale
    if count == 0:
        return value, derivative
    if name == "spread":
        high, low = u == u.max(), u == u.min()
        return u.max() - u.min(), high / high.sum() - low / low.sum()
    return np.mean((u - u.mean()) ** 2), 2 * (u - u.mean()) / count


OPTIONS = [
    ("adjacent", {}),
    ("adjacent", {"mean": True}),
    ("pairwise", {}),
    ("pairwise", {"mean": True}),
    ("spread", {}),
    ("variance", {}),
]
every_discrepancy = pytest.mark.parametrize(("name", "options"), OPTIONS)
# Few distinct values, so that most examples have ties.
numbers = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e3, 1e3, width=32))
vectors = npst.arrays(np.float64, K, elements=numbers)
masks = npst.arrays(np.bool_, K)


@functools.cache
def derivative_of(name, mean=False):
    function = functools.partial(getattr(discrepancies, name), **({"mean": True} if mean else {}))
    return jax.jit(lambda u, where=None: jax.value_and_grad(function)(u, where=where))


@every_discrepancy
@settings(max_examples=60)
@given(u=vectors)
def test_value_and_derivative_follow_the_definition(name, options, u):
    expected, slope = definition(name, u, **options)
    value, derivative = derivative_of(name, **options)(u)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-11)
    np.testing.assert_allclose(derivative, slope, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*o, marks=[pytest.mark.slow] * (o == ("pairwise", {}))) for o in OPTIONS],
)
@settings(max_examples=60)
@given(u=vectors, where=masks)
def test_absent_tasks_are_left_out(name, options, u, where):
    expected, slope = definition(name, u[where], **options)
    value, derivative = derivative_of(name, **options)(u, where)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-11)
    np.testing.assert_allclose(derivative[where], slope, rtol=1e-12, atol=1e-11)
    assert not derivative[~where].any()


@every_discrepancy
def test_absent_values_of_any_size_do_not_matter(name, options):
    where = jnp.array([True, False, True, True, False, True])
    u = jnp.array([3.0, 0.0, -1.0, 2.0, 0.0, 7.0])
    function = derivative_of(name, **options)
    expected = function(u, where)
    for value in (1e30, -1e30):
        np.testing.assert_array_equal(
            np.hstack(function(u.at[1].set(value), where)), np.hstack(expected)
        )


def test_adjacent_gaps_join_present_neighbours():
    u = jnp.array([1.0, 100.0, 4.0, 100.0, 100.0, 2.0])
    where = jnp.array([True, False, True, False, False, True])
    assert discrepancies.adjacent(u, where=where) == 3 + 2
    assert discrepancies.adjacent(u, where=where, mean=True) == (3 + 2) / 2
    _, derivative = derivative_of("adjacent")(u, where)
    np.testing.assert_array_equal(derivative, [-1, 0, 2, 0, 0, -1])


@every_discrepancy
def test_all_gaps_zero_gives_zero_and_no_derivative(name, options):
    for where in (None, jnp.array([True, False, True, True, True, False])):
        value, derivative = derivative_of(name, **options)(jnp.full(K, 0.7), where)
        np.testing.assert_allclose(value, 0, atol=1e-15)
        np.testing.assert_allclose(derivative, 0, atol=1e-15)


@pytest.mark.slow
@every_discrepancy
def test_none_or_one_task_gives_zero(name, options):
    function = functools.partial(getattr(discrepancies, name), **options)
    assert function(jnp.array([3.0])) == 0
    for where in (jnp.zeros(3, bool), jnp.array([False, True, False])):
        value, derivative = jax.value_and_grad(function)(jnp.arange(3.0), where=where)
        assert value == 0
        assert not derivative.any()


@pytest.mark.slow
def test_adjacent_depends_on_the_order_and_pairwise_does_not():
    u, permuted = jnp.array([1.0, 4.0, 2.0]), jnp.array([1.0, 2.0, 4.0])
    assert discrepancies.adjacent(u) != discrepancies.adjacent(permuted)
    assert discrepancies.pairwise(u) == discrepancies.pairwise(permuted)


@pytest.mark.slow
def test_mean_counts_gaps_and_pairs():
    u = jnp.array([1.0, 4.0, 2.0, 8.0])
    assert discrepancies.adjacent(u, mean=True) * 3 == discrepancies.adjacent(u)
    assert discrepancies.pairwise(u, mean=True) * 6 == discrepancies.pairwise(u)


@pytest.mark.slow
def test_pairwise_of_many_tasks_sorts_rather_than_compares_all():
    u = jax.random.normal(jax.random.key(0), (1000,))
    expected = jnp.abs(u[:, None] - u).sum() / 2
    np.testing.assert_allclose(discrepancies.pairwise(u), expected, rtol=1e-10)
    memory = jax.jit(jax.grad(discrepancies.pairwise)).lower(u).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 100 * u.size * u.dtype.itemsize


@every_discrepancy
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_are_kept(name, options, dtype):
    function = functools.partial(getattr(discrepancies, name), **options)
    u = jax.ShapeDtypeStruct((K,), dtype)
    where = jax.ShapeDtypeStruct((K,), bool)
    for value in (
        jax.eval_shape(function, u),
        jax.eval_shape(lambda u, where: function(u, where=where), u, where),
    ):
        assert (value.shape, value.dtype) == ((), dtype)


def test_spread_has_a_derivative_where_no_entry_equals_the_largest(monkeypatch):
    # As where a compiler computes the entries twice, and rounds them in two ways.
    largest, smallest = jnp.max, jnp.min
    monkeypatch.setattr(jnp, "max", lambda u: jnp.nextafter(largest(u), jnp.inf))
    monkeypatch.setattr(jnp, "min", lambda u: jnp.nextafter(smallest(u), -jnp.inf))
    derivative = jax.grad(discrepancies.spread)
    np.testing.assert_array_equal(derivative(jnp.array([1.0, 4.0, 2.0])), [-1, 1, 0])
    where = jnp.array([True, False, True])
    np.testing.assert_array_equal(derivative(jnp.array([1.0, 4.0, 2.0]), where=where), [-1, 0, 1])


def test_a_nan_shows_in_the_derivative_of_the_spread_unless_it_is_absent():
    derivative, u = jax.grad(discrepancies.spread), jnp.array([jnp.nan, 1.0, 2.0])
    assert jnp.isnan(derivative(u)[0])
    np.testing.assert_array_equal(derivative(u, where=jnp.array([False, True, True])), [0, -1, 1])
