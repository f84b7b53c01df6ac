"""The whole of it on one page: two digits and their ink, Optax and Flax linen.

Pairs of real handwritten digits lie on one canvas (multidigits.py). One network reads both and
estimates the ink in pixels, whose squared error is at first five hundred times a cross-entropy: a
plain sum sees little else.

    python examples/quickstart.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import multidigits
import numpy as np
import optax
import report
import tqdm
import tyro

import bilb


class Network(nn.Module):
    """One hidden layer that the tasks share, then an output for each."""

    @nn.compact
    def __call__(self, canvases):  # noqa: D102
        z = nn.relu(nn.Dense(64)(canvases.reshape(len(canvases), -1)))
        return nn.Dense(10)(z), nn.Dense(10)(z), nn.Dense(1)(z)[:, 0]


def task_losses(params, canvases, left, right, ink):  # shape (K,)
    read_left, read_right, guess = Network().apply(params, canvases)
    entropy = optax.softmax_cross_entropy_with_integer_labels
    losses = entropy(read_left, left), entropy(read_right, right), (guess - ink) ** 2
    return jnp.stack(losses).mean(1)


def train(name, balancer, data, steps):
    value_and_grad = bilb.value_and_grad(task_losses, balancer)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def train_step(params, balance, opt_state, rows):
        losses, grads, balance = value_and_grad(params, balance, *(x[rows] for x in data))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), balance, opt_state, losses

    params = Network().init(jax.random.key(0), data[0][:1])
    balance, opt_state = value_and_grad.init(params, *data), optimizer.init(params)
    draws = np.random.default_rng(0).integers(len(data[0]), size=(steps, 64))
    for rows in tqdm.tqdm(draws, desc=f"{name:>8}", disable=None):
        params, balance, opt_state, _ = train_step(params, balance, opt_state, rows)
    return params, balance.effective_weights


def main(steps: int = 1000):
    """Trains on pairs of 900 digits with three balancers and tests on pairs of the others."""
    seen, unseen = multidigits.digit_pools()
    canvases, targets = multidigits.make_pairs(*seen, 6_000, seed=1)
    test, truths = multidigits.make_pairs(*unseen, 2_000, seed=2)
    data = [jnp.asarray(x) for x in (canvases, *targets)]
    balancers = {"sum": bilb.linear_scalarization(), "log": bilb.log_losses()}
    balancers["bilb4mtl"] = bilb.chain(bilb.log_losses(), bilb.bilb4mtl(penalty=0.05))
    table = [["method", "left, wrong %", "right, wrong %", "ink, |error| px", "last weights"]]
    for name, balancer in balancers.items():
        params, weights = train(name, balancer, data, steps)
        *digits, guess = Network().apply(params, test)
        errors = [100 * jnp.mean(d.argmax(1) != y) for d, y in zip(digits, truths)]
        errors.append(jnp.abs(guess - truths[2]).mean())
        table.append([name, *map(report.three_digits, errors), str(np.array(weights).round(3))])
    print(report.aligned(table))


if __name__ == "__main__":
    tyro.cli(main)
