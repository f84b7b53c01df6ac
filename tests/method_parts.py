"""What the entries of methods.py are made of: objectives, ways to make them, shorthands."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from contract import Method

import bilb

NUM_FEATURES = 4


def features(losses):
    """Returns the features of a batch of three, the same at every call."""
    rows = jnp.sin(jnp.arange(3 * NUM_FEATURES)).reshape(3, NUM_FEATURES)
    return {"features": rows.astype(losses.dtype)}


def weighted_sum(values, weights):
    return (weights * values).sum()


def famo_objective(values, weights):
    c = jax.lax.stop_gradient((weights / values).sum())
    return weighted_sum(jnp.log(values), weights) / c


def over_initial_loss(losses, state):
    return losses / jnp.abs(optax.tree.get(state, "initial_losses"))


def over_initial_ratio(losses, state):
    initial = optax.tree.get(state, "initial_losses")
    return losses / (initial / initial.min())


def log_over_initial_loss(losses, state):
    return jnp.log(losses / optax.tree.get(state, "initial_losses"))


def gap(x):
    # The absolute value with derivative 0 at 0.
    return x * jnp.sign(x)


# Each discrepancy of the library beside its definition.
DISCREPANCIES = {
    "adjacent": (bilb.discrepancies.adjacent, lambda u: gap(u[1:] - u[:-1]).sum()),
    "adjacent_mean": (
        functools.partial(bilb.discrepancies.adjacent, mean=True),
        lambda u: gap(u[1:] - u[:-1]).mean(),
    ),
    "pairwise": (bilb.discrepancies.pairwise, lambda u: gap(u[:, None] - u).sum() / 2),
    "spread": (bilb.discrepancies.spread, lambda u: u.max() - u.min()),
    "variance": (bilb.discrepancies.variance, lambda u: jnp.mean(u**2) - jnp.mean(u) ** 2),
}


def bilevel_objective(discrepancy="adjacent", weighted=True, divisor=None, penalty=0.05):
    """Returns BiLB4MTL's objective ``(values, weights) -> scalar``."""
    distance = DISCREPANCIES[discrepancy][1]

    def phi(values, weights):
        u = weights * values
        s = 1.0 if divisor is None else weights.sum()
        return u.sum() / s + penalty * distance(u if weighted else values)

    return phi


def bilevel(name, factory=bilb.bilb4mtl, numeric=None, arguments=None, **fields):
    """Returns the entry of a method that ends in BiLB4MTL with the default objective."""
    return Method(
        name,
        factory,
        numeric or {"penalty": 0.05},
        arguments or {},
        **{
            "phi": bilevel_objective(),
            "equivariant": False,
            "learns": ("router", "weights", "opt_state"),
            **fields,
        },
    )


def bilb4mtl(name, router, discrepancy, weighted=True, divisor=None, **fields):
    """Returns an entry of ``bilb.bilb4mtl`` itself; ``router`` may be a function of K."""

    def arguments(num_tasks):
        return {
            "router": router if isinstance(router, bilb.Router) else router(num_tasks),
            "discrepancy": DISCREPANCIES[discrepancy][0],
            "weighted": weighted,
            "divisor": divisor,
        }

    phi = bilevel_objective(discrepancy, weighted, divisor)
    fields = {"static_args": ("discrepancy",), "phi": phi, **fields}
    return bilevel(name, arguments=arguments, **fields)


class Network(nn.Module):
    """A router as users write it."""

    num_tasks: int

    @nn.compact
    def __call__(self, features):
        hidden = nn.tanh(nn.Dense(3)(features.mean(0)))
        return nn.softmax(nn.Dense(self.num_tasks)(hidden))


sigmoid, softmax = bilb.routers.sigmoid(), bilb.routers.softmax()
# These bounds leave room for 2 to 1000 tasks.
CLIP = (5e-4, 0.99)
network = lambda k: bilb.routers.from_module(Network(k), jnp.zeros((1, NUM_FEATURES)))
seeded = lambda key, penalty: bilb.bilb4mtl(
    penalty,
    bilb.routers.relu_sigmoid(key=key),
    bilb.discrepancies.variance,
    divisor="stop_gradient_sum",
)
preset_of_features = {
    "arguments": {"num_features": NUM_FEATURES, "clip": CLIP},
    "static_args": ("num_features",),
    "extra": features,
}
guarded = lambda penalty: bilb.skip_nonfinite(
    bilb.chain(bilb.log_losses(), bilb.scale_by_initial_loss(), bilb.bilb4mtl(penalty))
)
initial_and_router = ("initial_losses", "router", "weights", "opt_state")
slopes = lambda losses: {"slopes": losses / 2}
losses_after = lambda losses: {"losses_after": losses / 2}
norms = lambda losses: {"gradient_norms": jnp.linspace(1.0, 2.0, losses.size, dtype=losses.dtype)}
curvatures = lambda losses: {"curvatures": norms(losses)["gradient_norms"]}


def gram(losses):
    """Returns a well-conditioned Gram matrix of gradients whose lengths differ."""
    k = jnp.arange(1.0, losses.size + 1, dtype=losses.dtype)
    lengths = 1 + 0.1 * (k % 5)
    cosines = 0.3 * jnp.cos(k[:, None] * k) / losses.size**0.5
    cosines = jnp.where(k[:, None] == k, 1.0, 0.5 * (cosines + cosines.T))
    return {"gram": lengths[:, None] * cosines * lengths}


def slope_function(arrays):
    """Returns the slopes along any weights; a task of weight 0 takes no part, whatever its row."""
    return {"slope_fn": lambda weights: jnp.where(weights == 0, 0.0, arrays["gram"]) @ weights}


def gram_method(name, factory, numeric=None, **fields):
    """Returns the entry of a method that reads the Gram matrix, here a running mean of it."""
    return Method(
        name,
        factory,
        {**(numeric or {}), "decay": 0.3},
        **{"extra": gram, "phi": weighted_sum, "learns": ("weights", "mean"), **fields},
    )


class ThrowAwayState(NamedTuple):
    step: jax.Array
    weights: jax.Array  # (K,)
    mean: jax.Array  # (K, K)


def throw_away(decay):
    """A method with a (K, K) state, as a user would write it."""

    def init(num_tasks, dtype):
        return ThrowAwayState(
            jnp.zeros((), jnp.int32),
            jnp.ones(num_tasks, dtype),
            jnp.zeros((num_tasks, num_tasks), dtype),
        )

    def update(losses, state, *, mask, gram):
        present = jnp.ones(losses.shape, bool) if mask is None else mask
        size = jnp.max(jnp.abs(gram))
        mean = decay * state.mean + (1 - decay) * gram / jnp.where(size > 0, size, 1.0)
        weights = 1 / (1 + jnp.abs(mean).sum(1, where=present))
        return weights * losses, ThrowAwayState(state.step + 1, weights, mean)

    return bilb.loss_transformation(init, update)


# Chains of which the last link reads what speaks of the losses.
igb_v1_marigold = lambda max_logit: bilb.chain(
    bilb.igb_v1(0, 1), bilb.marigold(max_logit=max_logit)
)
initial_loss_famo = lambda gamma: bilb.chain(bilb.scale_by_initial_loss(), bilb.famo(gamma=gamma))
log_gradnorm = lambda alpha: bilb.chain(bilb.log_losses(), bilb.gradnorm(alpha))
igb_v1_mgda = lambda: bilb.chain(bilb.igb_v1(0, 1), bilb.mgda())
