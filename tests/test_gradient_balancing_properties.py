"""What theory promises of aggregated gradients, on task gradients of every rank and scale."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from contract import jit

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
# Tasks, parameters, rank
SHAPES = {"full": (5, 8, 5), "deficient": (9, 11, 5), "few parameters": (9, 4, 4)}
SCALES = (0.0, 1e-10, 1e3, 1e5, 1e10, 1e15)


def sample(num_tasks, num_params, rank, seed=0):
    """Returns task gradients with ``rank`` singular values between .5 and 1.5."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(num_tasks, rank)))
    right, _ = np.linalg.qr(rng.normal(size=(num_params, rank)))
    return left * rng.uniform(0.5, 1.5, rank) @ right.T


def conflicting(num_tasks, num_params, rank, seed=0):
    """Returns task gradients with a common direction of ascent, so that none is stationary."""
    rows = sample(num_tasks, num_params, rank, seed)
    direction = np.linalg.lstsq(rows, np.ones(num_tasks), rcond=None)[0]
    short = np.minimum(rows @ direction, 0.0)
    return rows - np.outer(short * 1.5, direction) / (direction @ direction)


@functools.cache
def compiled(name):
    """Returns ``task gradients -> aggregated gradient`` of a method's first call."""
    balancer = METHODS[name]()

    @jit
    def weights_of(gram):
        losses = jnp.ones(gram.shape[0], gram.dtype)
        return balancer.update(losses, balancer.init(losses), gram=gram)[0]

    return lambda rows: np.asarray(weights_of(jnp.asarray(rows @ rows.T))) @ rows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_every_scale_gives_a_finite_gradient(name, shape):
    rows = sample(*SHAPES[shape]).astype(np.float32)
    for scale in SCALES:
        gradient = compiled(name)(rows * np.float32(scale))
        assert np.isfinite(gradient).all(), scale
        # Squared norms of 1e-20 are above float32's smallest number, zero gradients are zero.
        assert bool(gradient.any()) <= bool(scale)


@pytest.mark.x64
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NON_CONFLICTING)
def test_no_task_gets_worse(name, shape):
    if NON_CONFLICTING[name] == "full" and shape != "full":
        pytest.skip("promised for linearly independent rows only")
    for seed in range(5):
        for make in (sample, conflicting):
            rows = make(*SHAPES[shape], seed)
            slopes = rows @ compiled(name)(rows)
            assert slopes.min() >= -1e-6 * np.abs(rows).max() ** 2, (make.__name__, seed)


@pytest.mark.x64
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EQUIVARIANT)
def test_the_order_of_the_tasks_does_not_matter(name, shape):
    rows = conflicting(*SHAPES[shape], seed=1)
    order = np.random.default_rng(2).permutation(len(rows))
    np.testing.assert_allclose(
        compiled(name)(rows[order]), compiled(name)(rows), rtol=1e-6, atol=1e-6
    )


@pytest.mark.x64
@pytest.mark.parametrize("name", LINEAR_UNDER_SCALING)
def test_the_gradient_is_linear_in_the_scales_of_the_tasks(name):
    rng = np.random.default_rng(3)
    rows = conflicting(*SHAPES["full"], seed=2)
    first, second = rng.uniform(0.5, 2.0, (2, len(rows), 1))
    aggregate = compiled(name)
    expected = 0.3 * aggregate(first * rows) + 0.7 * aggregate(second * rows)
    actual = aggregate((0.3 * first + 0.7 * second) * rows)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.x64
@pytest.mark.parametrize("name", STRONGLY_STATIONARY)
def test_only_strong_stationarity_stops_the_training(name):
    """Weakly stationary only: 0 lies in the convex hull with one weight zero."""
    rows = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.5]])
    assert np.linalg.norm(compiled("mgda")(rows)) < 1e-6
    gradient = compiled(name)(rows)
    assert np.linalg.norm(gradient) > 0.1
    assert rows[2] @ gradient > 0.1


@pytest.mark.slow
@pytest.mark.x64
@pytest.mark.parametrize("name", METHODS)
def test_fifty_tasks_and_a_hundred_parameters(name):
    for rank in (50, 20):
        rows = sample(50, 100, rank, seed=4)
        gradient = compiled(name)(rows)
        assert np.isfinite(gradient).all()
        if NON_CONFLICTING.get(name) in ("any", "full" if rank == 50 else "any"):
            assert (rows @ gradient).min() >= -1e-6
