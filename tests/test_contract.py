"""Every loss transformation keeps the contract of the library: values, dtypes, transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import (
    assert_close,
    assert_finite,
    compiled,
    example_losses,
    permuted,
    train,
    warm,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from methods import METHODS, every_method, few_methods

import bilb

K = 5


def specification(tree):
    """Returns the structure, and shape, dtype and weak type of every leaf."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: tree))
    return structure, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]


def check_dtypes(method, init_dtype, dtype):
    transformation, _ = compiled(method, K)
    state = transformation.init(jax.ShapeDtypeStruct((K,), init_dtype))
    expected = specification(state)
    assert specification(transformation.init(jnp.ones(K, init_dtype))) == expected
    losses = jax.ShapeDtypeStruct((K,), dtype)
    balanced, state = jax.eval_shape(method.step(transformation), losses, state)
    assert (balanced.shape, balanced.dtype, balanced.weak_type) == ((K,), dtype, False)
    assert specification(state) == expected
    statistics = jnp.promote_types(init_dtype, jnp.float32)
    for leaf in jax.tree.leaves(state):
        assert not leaf.weak_type
        assert leaf.dtype == statistics or not jnp.issubdtype(leaf.dtype, jnp.floating)


@every_method
@pytest.mark.parametrize(
    ("init_dtype", "dtype"),
    [
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("float32", "float32"),
        ("bfloat16", "float32"),
    ],
)
def test_dtypes_are_kept_and_statistics_are_float32_at_least(method, init_dtype, dtype):
    check_dtypes(method, init_dtype, dtype)


@pytest.mark.slow
@pytest.mark.x64
@every_method
@pytest.mark.parametrize(
    ("init_dtype", "dtype"),
    [("float64", "float64"), ("float32", "float64"), ("float64", "float32")],
)
def test_dtypes_are_kept_in_float64(method, init_dtype, dtype):
    check_dtypes(method, init_dtype, dtype)


@few_methods
def test_half_precision_rounds_only_what_comes_out(method):
    state, losses = warm(method, K)
    _, update = compiled(method, K)
    halve = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    widen = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    half, extra = halve((losses, method.extra(losses)))
    balanced, half_state, _ = update(half, state, extra=extra)
    expected, expected_state, _ = update(*widen((half,)), state, extra=widen(extra))
    # In an optax.chain every link rounds what it passes on, hence not closer.
    tolerance = dict(rtol=2**-7, atol=1e-3)
    assert_close((widen(balanced), half_state), (expected, expected_state), **tolerance)


@every_method
@pytest.mark.filterwarnings("error")
def test_float64_numbers_of_numpy_are_float32_unless_asked_for(method):
    transformation, _ = compiled(method, K)
    losses = np.linspace(0.5, 2.0, K)
    extra = method.keywords(method.extra(jnp.ones(K)))
    state = transformation.init(losses)
    # As in an eager call, what is given reaches the update as it is.
    balanced, state = jax.eval_shape(lambda: transformation.update(losses, state, **extra))
    assert balanced.dtype == jnp.float32
    assert specification(state) == specification(transformation.init(jnp.ones(K)))


@functools.cache
def compiled_jacobian(method):
    """Returns the transformation and ``(losses, state) -> balanced, state, Jacobian``."""
    transformation = method.make(K)

    @jax.jit
    def function(losses, state):
        def update(losses):
            balanced, new_state = method.update(transformation, losses, state)
            return balanced, (balanced, new_state)

        jacobian, (balanced, new_state) = jax.jacrev(update, has_aux=True)(losses)
        return balanced, new_state, jacobian

    return transformation, function


@pytest.mark.x64
@pytest.mark.parametrize("method", [m for m in METHODS if m.phi], ids=str, scope="module")
def test_sum_is_the_objective_and_each_entry_is_its_tasks_alone(method):
    transformation, function = compiled_jacobian(method)
    losses = example_losses(5, K)
    state = transformation.init(losses[0])
    for step, row in enumerate(losses):
        balanced, state, jacobian = function(row, state)
        if step in (method.warmup, 4):
            objective = functools.partial(method.objective, state=state)
            value, effective_weights = jax.value_and_grad(objective)(row)
            np.testing.assert_allclose(balanced.sum(), value, rtol=1e-9, atol=1e-12)
            expected = np.diag(effective_weights)
            np.testing.assert_allclose(jacobian, expected, rtol=1e-9, atol=1e-12)


@every_method
def test_jit_equals_eager_and_both_compile_once(method, caplog):
    """The compiled program has a mask of all tasks, the eager call none: both mean the same."""
    transformation, update = compiled(method, K)
    losses = example_losses(3, K)
    train(transformation, update, losses[:1])
    programs = update.cache_size()
    jitted = train(transformation, update, losses)
    assert update.cache_size() == programs >= 1
    eager = method.step(transformation)
    assert_close(train(transformation, eager, losses), jitted)
    with jax.log_compiles():
        train(transformation, eager, losses[:1])
    if method.name != "marigold-cagrad":  # loops over a function that is another at every call
        assert not [message for message in caplog.messages if "XLA compilation" in message]


@pytest.mark.slow
@every_method
def test_a_thousand_steps_under_scan_and_vmap_trace_once_and_stay_finite(method):
    """Maps over losses, states, hyperparameters and seeds at once."""
    values = {name: [value, 2 * value, 3 * value] for name, value in method.numeric.items()}
    if "key" in method.fixed(K):
        values["key"] = [7, 8, 9]
    losses = example_losses(3, 1000, K)
    traces = []

    def run(changes, losses):
        transformation = method.make(K, **changes)

        def step(state, row):
            traces.append(1)
            balanced, state = method.update(transformation, row, state)
            return state, balanced

        return jax.lax.scan(step, transformation.init(losses[0]), losses)

    stacked = {name: jnp.array(value) for name, value in values.items()}
    state, balanced = jax.jit(jax.vmap(run))(stacked, losses)
    assert len(traces) == 1
    assert_finite((state, balanced))
    for _, step in optax.tree.get_all_with_path(state, "step"):
        assert (step == 1000).all()
    for i in range(3):
        transformation = method.make(K, **{name: value[i] for name, value in values.items()})
        alone, _ = train(transformation, method.step(transformation), losses[i, :2])
        assert_close(balanced[i, 1], alone, rtol=1e-4)


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("num_tasks", [1, 1000])
def test_one_task_and_a_thousand(method, num_tasks):
    transformation = method.make(num_tasks)
    losses = example_losses(num_tasks)
    first = jax.jit(
        lambda losses: method.update(transformation, losses, transformation.init(losses))
    )
    balanced, state = first(losses)
    assert balanced.shape == losses.shape
    assert_finite((balanced, state))


@pytest.mark.parametrize("method", [m for m in METHODS if m.equivariant], ids=str, scope="module")
def test_permuting_the_tasks_permutes_what_comes_out(method):
    state, losses = warm(method, K)
    _, update = compiled(method, K)
    order = jnp.array([3, 0, 4, 1, 2])
    extra = method.extra(losses)
    balanced, new_state, _ = update(losses, state)
    actual = update(losses[order], method.take(state, order, K), extra=permuted(extra, order))
    expected = balanced[order], method.take(new_state, order, K)
    assert_close(actual[:2], expected)


@every_method
def test_unknown_extra_arguments_are_ignored(method):
    transformation = method.make(K)
    losses = example_losses(K)
    state = transformation.init(losses)

    def program(**more):
        update = lambda losses, state: method.update(transformation, losses, state, **more)
        return str(jax.make_jaxpr(update)(losses, state))

    assert program(value=3.0, value_fn=print, tag="x") == program()


@few_methods
def test_optax_chain_in_front_and_behind(method):
    transformation, update = compiled(method, K)
    losses = example_losses(2, K)
    chain = optax.chain(optax.scale(0.5), transformation, bilb.linear_scalarization(3.0))
    given = lambda losses: method.keywords(method.extra(losses))
    if method.about_losses(K):
        chain = optax.chain(optax.scale(0.5), transformation)
    update_chain = jax.jit(lambda losses, state: chain.update(losses, state, **given(losses / 2)))
    chained, chain_state = train(chain, update_chain, losses)
    balanced, state = train(transformation, update, losses / 2)
    factor = 1 if method.about_losses(K) else 3
    assert_close((chained, chain_state[1]), (factor * balanced, state))


@pytest.mark.parametrize(
    "method", [m for m in METHODS if "weights" in m.learns], ids=str, scope="module"
)
def test_weights_of_any_chain_are_logged_by_name(method):
    state, _ = warm(method, K)
    weights = optax.tree.get(state, "weights")
    assert weights.shape == (K,)
    assert not np.allclose(weights, 1.0)


def vectors(dtype, exponent):
    """Returns K zeros and numbers of either sign between 10**-exponent and 10**exponent."""
    size = st.floats(-exponent, exponent).map(lambda e: 10.0**e)
    number = st.one_of(st.just(0.0), size, size.map(lambda x: -x))
    return npst.arrays(dtype, K, elements=number.map(lambda x: float(dtype(x))), fill=st.nothing())


@every_method
@settings(max_examples=25)
@given(losses=st.tuples(*[vectors(np.float32, 12)] * 2))
def test_finite_losses_stay_finite_in_float32(method, losses):
    transformation, update = compiled(method, K)
    first, second = map(jnp.asarray, losses)
    _, state, _ = update(first, transformation.init(first))
    assert_finite(update(second, state))


@pytest.mark.slow
@pytest.mark.x64
@every_method
@settings(max_examples=25)
@given(losses=st.tuples(*[vectors(np.float64, 30)] * 2))
def test_finite_losses_stay_finite_in_float64(method, losses):
    transformation, function = compiled_jacobian(method)
    first, second = map(jnp.asarray, losses)
    _, state, _ = function(first, transformation.init(first))
    balanced, state, jacobian = function(second, state)
    assert_finite((balanced, state, jacobian))
