"""Aggregators and bad input: zeros, infinities, wrong shapes and numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import numbers
from test_aggregators import (
    ALL,
    ENTRIES,
    LOSSES,
    PARAMS,
    K,
    compiled,
    every_aggregator,
    example_gradients,
    reading_losses,
)

import bilb

BAD_INPUT = {
    "zero row": lambda g: g.at[1].set(0),
    "all 0": jnp.zeros_like,
    "NaN": lambda g: g.at[1].set(jnp.nan),
    "Inf": lambda g: g.at[1].set(jnp.inf),
    "dup": lambda g: g.at[1].set(g[0]),
    "opposite": lambda g: g.at[1].set(-g[0]),
    "x1e-20": lambda g: 1e-20 * g,
    "x1e20": lambda g: 1e20 * g,
    "row x1e20": lambda g: g.at[1].multiply(1e20),
    "row x1e-20": lambda g: g.at[1].multiply(1e-20),
    "bf16": lambda g: g.astype(jnp.bfloat16),
}


@pytest.mark.slow
def test_bad_input_is_never_a_silent_nan(capsys):
    sequences = {
        name: [jax.tree.map(spoil, example_gradients(seed=seed)) for seed in range(3)]
        for name, spoil in BAD_INPUT.items()
    }

    def after(aggregator, update, steps, *more):
        state = aggregator.init(PARAMS)
        for rows in steps:
            gradient, state = update(rows, state, *more)
        results = [np.asarray(leaf, float) for leaf in jax.tree.leaves(numbers((gradient, state)))]
        if not all(np.isfinite(leaf).all() for leaf in results):
            return "nan"
        return "ok" if any(np.asarray(g).any() for g in jax.tree.leaves(gradient)) else "zero"

    table = {}
    for entry in ENTRIES:
        cells = {name: after(*compiled(entry), steps) for name, steps in sequences.items()}
        single = [example_gradients(1)] * 2
        cells["K=1"] = after(*compiled(entry, 1), single, LOSSES[:1], ALL[:1])
        table[entry.name] = cells
    with capsys.disabled():
        print("\n" + " ".join(f"{name:>11}" for name in ("", *cells)))
        for name, cells in table.items():
            print(" ".join(f"{cell:>11}" for cell in (name, *cells.values())))
    for cells in table.values():
        assert cells == dict.fromkeys(cells, "ok") | {"all 0": "zero"}


@every_aggregator
def test_task_gradients_need_the_task_axis_in_front(entry):
    aggregator = entry.make()
    state = aggregator.init(PARAMS)
    update = functools.partial(aggregator.update, losses=LOSSES)
    last = jax.tree.map(lambda g: jnp.moveaxis(g, 0, -1), example_gradients())
    message = "leading axis must be the number of tasks"
    for wrong in (PARAMS, last):
        with pytest.raises(ValueError, match=message):
            update(wrong, state, PARAMS)
    with pytest.raises(ValueError, match=message):
        update(example_gradients() | {"vector": jnp.ones((K + 1, 4))}, state)
    with pytest.raises(ValueError, match=r"mask must be bool.*shape \(4,\)"):
        update(example_gradients(), state, PARAMS, mask=ALL[1:])


@pytest.mark.parametrize("entry", reading_losses, ids=str)
def test_missing_or_misshapen_losses_are_named(entry):
    aggregator = entry.make()
    state = aggregator.init(PARAMS)
    with pytest.raises(bilb.MissingArgument, match=f"{entry} needs the extra argument `losses`"):
        aggregator.update(example_gradients(), state, PARAMS)
    with pytest.raises(ValueError, match=r"shape \(4,\) but expected \(5\).*losses must"):
        aggregator.update(example_gradients(), state, PARAMS, losses=LOSSES[1:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bilb.graddrop(leak=1.5), "leak must be .*1.5"),
        (lambda: bilb.trimmed_mean(-1), "trim must be .*-1"),
        (lambda: bilb.db_mtl(0), "num_tasks must be >= 1; got 0"),
        (lambda: bilb.db_mtl(2, decay=1.1), "decay must be .*1.1"),
        (lambda: bilb.db_mtl(2, eps=0.0), "eps must be > 0; got 0"),
        (lambda: bilb.moco(0), "num_tasks must be >= 1; got 0"),
        (lambda: bilb.moco(2, beta=-0.1), "beta must be .*-0.1"),
        (lambda: bilb.moco(2, gamma=-1.0), "gamma must be .*-1"),
        (lambda: bilb.moco(2, gamma_sigma=-1.0), "gamma_sigma must be .*-1"),
        (lambda: bilb.moco(2, scheme="mean"), "scheme must be .*'mean'"),
        (lambda: bilb.excess_mtl(0), "num_tasks must be >= 1; got 0"),
        (lambda: bilb.excess_mtl(2, step_size=0.0), "step_size must be > 0; got 0"),
        (lambda: bilb.excess_mtl(2, warmup_steps=-1), "warmup_steps must be >= 0; got -1"),
    ],
)
def test_hyperparameters_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_leaks_have_an_entry_per_task():
    aggregator = bilb.graddrop(leak=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(3,\) but expected \(5\).*leak must be"):
        aggregator.update(example_gradients(), aggregator.init(PARAMS), PARAMS)
