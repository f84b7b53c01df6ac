"""What theory promises of aggregated gradients, on task gradients of every rank and scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import mostly_slow
from hypothesis import given, settings
from hypothesis import strategies as st

import bilb

METHODS = {
    "mgda": bilb.mgda,
    "upgrad": functools.partial(bilb.upgrad, reg_eps=0.0, norm_eps=0.0),
    "upgrad-default": bilb.upgrad,
    "dualproj": functools.partial(bilb.dualproj, reg_eps=0.0, norm_eps=0.0),
    "cagrad": bilb.cagrad,
    "cagrad-far": functools.partial(bilb.cagrad, c=1.5),
    "nash_mtl": bilb.nash_mtl,
    "fairgrad": bilb.fairgrad,
    "imtl_g": bilb.imtl_g,
    "aligned_mtl": bilb.aligned_mtl,
    "config": bilb.config,
    "krum": bilb.krum,
    "pcd": bilb.pcd,
    "sdmgrad": functools.partial(bilb.sdmgrad, steps=None),
    "modo": bilb.modo,
    "pcgrad": bilb.pcgrad,
    "gradvac": bilb.gradvac,
}
# By theory; "full" only where the rows are linearly independent.
NON_CONFLICTING = {
    "mgda": "any",
    "upgrad": "any",
    "dualproj": "any",
    # At a Pareto stationary point it follows the mean gradient.
    "cagrad-far": "full",
    "nash_mtl": "full",
    "fairgrad": "full",
    "config": "full",
    "aligned_mtl": "full",
}
# Those that draw orders or name a primary task do not treat tasks alike.
EQUIVARIANT = [m for m in METHODS if m not in ("pcgrad", "gradvac", "pcd")]
LINEAR_UNDER_SCALING = ("upgrad", "config")
STRONGLY_STATIONARY = ("upgrad", "upgrad-default", "dualproj")
FAST = ("mgda", "nash_mtl", "config", "krum")
SCALES = (0.0, 1e-10, 1e3, 1e5, 1e10, 1e15)
MOST_TASKS, MOST_PARAMS = 50, 100


def sample(num_tasks, num_params, rank, seed):
    """Returns task gradients with ``rank`` singular values between .5 and 1.5."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(num_tasks, rank)))
    right, _ = np.linalg.qr(rng.normal(size=(num_params, rank)))
    return left * rng.uniform(0.5, 1.5, rank) @ right.T


def with_ascent(rows):
    """Returns task gradients with a common direction of ascent, so that none is stationary."""
    direction = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    short = np.minimum(rows @ direction, 0.0)
    return rows - np.outer(short * 1.5, direction) / (direction @ direction)


seeds = st.integers(0, 2**32 - 1)


@st.composite
def task_gradients(draw, independent=False):
    """Returns task gradients of any rank, or linearly independent ones."""
    num_tasks = draw(st.integers(1, MOST_TASKS))
    num_params = draw(st.integers(num_tasks if independent else 1, MOST_PARAMS))
    most = min(num_tasks, num_params)
    rank = most if independent else draw(st.integers(1, most))
    rows = sample(num_tasks, num_params, rank, draw(seeds))
    return with_ascent(rows) if draw(st.booleans()) else rows


@st.composite
def weakly_stationary(draw):
    """Returns task gradients and how many of them are in balance, the others free to be followed.

    The first are in conflict with no common descent; the others are orthogonal to them and
    linearly independent, so that 0 is a convex combination only with weight zero on them.
    """
    stuck, free = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    rows = sample(stuck + free, draw(st.integers(stuck + free, MOST_PARAMS)), stuck + free, 0)
    basis, _ = np.linalg.qr(rows.T)
    rng = np.random.default_rng(draw(seeds))
    first = rng.normal(size=(stuck, stuck)) @ basis[:, :stuck].T
    balance = -rng.uniform(0.5, 1.5, stuck) @ first
    rest = sample(free, free, free, draw(seeds)) @ basis[:, stuck:].T
    return np.vstack([first, balance, with_ascent(rest)]), stuck + 1


@functools.cache
def compiled(name):
    """Returns ``(gram, mask) -> weights`` of a method's first call."""
    balancer = METHODS[name]()

    @jax.jit
    def weights_of(gram, mask):
        losses = jnp.ones(MOST_TASKS, gram.dtype)
        return balancer.update(losses, balancer.init(losses), gram=gram, mask=mask)[0]

    return weights_of


def weigh(name, rows):
    """Returns the weights for task gradients, by one program for any number of tasks."""
    present = np.arange(MOST_TASKS) < len(rows)
    gram = np.pad(rows @ rows.T, (0, MOST_TASKS - len(rows)))
    return np.asarray(compiled(name)(gram, present))[: len(rows)]


def aggregate(name, rows):
    """Returns the aggregated gradient."""
    return weigh(name, rows) @ rows


few = settings(max_examples=20)


@pytest.mark.parametrize("name", mostly_slow(METHODS, FAST))
@few
@given(rows=task_gradients(), scale=st.sampled_from(SCALES))
def test_every_rank_and_scale_gives_a_finite_gradient(name, rows, scale):
    gradient = aggregate(name, (rows * scale).astype(np.float32))
    assert np.isfinite(gradient).all()
    if not scale:
        assert not gradient.any()


@pytest.mark.x64
@pytest.mark.parametrize(
    "name", mostly_slow([m for m, rank in NON_CONFLICTING.items() if rank == "any"], FAST)
)
@few
@given(rows=task_gradients())
def test_no_task_gets_worse(name, rows):
    slopes = rows @ aggregate(name, rows)
    assert slopes.min() >= -1e-6 * np.abs(rows).max() ** 2


@pytest.mark.slow
@pytest.mark.x64
@pytest.mark.parametrize("name", [m for m, rank in NON_CONFLICTING.items() if rank == "full"])
@few
@given(rows=task_gradients(independent=True))
def test_no_task_gets_worse_where_gradients_are_independent(name, rows):
    slopes = rows @ aggregate(name, rows)
    assert slopes.min() >= -1e-6 * np.abs(rows).max() ** 2


@pytest.mark.slow
@pytest.mark.x64
@pytest.mark.parametrize("name", EQUIVARIANT)
@few
@given(rows=task_gradients(), random=st.randoms(use_true_random=False))
def test_the_order_of_the_tasks_does_not_matter(name, rows, random):
    order = random.sample(range(len(rows)), len(rows))
    weights, permuted = weigh(name, rows), weigh(name, rows[order])
    # At a Pareto stationary point weights may be huge, and what they add up to is rounding.
    noise = 1e-12 * np.abs(weights) @ np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(permuted @ rows[order], weights @ rows, rtol=1e-6, atol=1e-6 + noise)


@pytest.mark.x64
@pytest.mark.parametrize("name", mostly_slow(LINEAR_UNDER_SCALING, ["config"]))
@few
@given(rows=task_gradients(independent=True), seed=seeds)
def test_the_gradient_is_linear_in_the_scales_of_the_tasks(name, rows, seed):
    first, second = np.random.default_rng(seed).uniform(0.5, 2.0, (2, len(rows), 1))
    expected = 0.3 * aggregate(name, first * rows) + 0.7 * aggregate(name, second * rows)
    actual = aggregate(name, (0.3 * first + 0.7 * second) * rows)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.x64
@pytest.mark.parametrize("name", mostly_slow(STRONGLY_STATIONARY, ["dualproj"]))
@few
@given(drawn=weakly_stationary())
def test_only_strong_stationarity_stops_the_training(name, drawn):
    rows, stuck = drawn
    assert np.linalg.norm(aggregate("mgda", rows)) < 1e-6
    gradient = aggregate(name, rows)
    # The share of the free ones in the mean gradient, which nothing opposes.
    assert np.linalg.norm(gradient) > 0.5 * np.linalg.norm(rows[stuck:].mean(0)) / len(rows)
    assert (rows[stuck:] @ gradient).max() > 0
