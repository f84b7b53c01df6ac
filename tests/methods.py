"""The loss transformations of the library, one entry each, and what differs between them.

The contract tests run every entry of ``METHODS``; a new method is a new line there.
"""

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


METHODS = [
    Method("linear_scalarization", bilb.linear_scalarization, {"weights": 0.5}, phi=weighted_sum),
    Method("divide_by", bilb.divide_by, {"scales": 2.5}, values=lambda losses, _: losses / 2.5),
    Method(
        "scale_by_initial_loss",
        bilb.scale_by_initial_loss,
        values=over_initial_loss,
        learns=("initial_losses",),
    ),
    Method(
        "scale_by_initial_ratio",
        bilb.scale_by_initial_ratio,
        values=over_initial_ratio,
        learns=("initial_losses",),
        kin="scale_by_initial_loss",
    ),
    Method(
        "log_losses", bilb.log_losses, {"floor": 1e-8}, values=lambda losses, _: jnp.log(losses)
    ),
    Method(
        "power_losses",
        bilb.power_losses,
        {"exponent": 0.5, "floor": 1e-30},
        values=lambda losses, _: jnp.sqrt(losses),
    ),
    Method(
        "log_scale_by_initial_loss",
        bilb.log_scale_by_initial_loss,
        {"every": 3, "floor": 1e-8},
        values=log_over_initial_loss,
        learns=("taken", "initial_losses"),
    ),
    bilb4mtl("bilb4mtl", sigmoid, "adjacent"),
    bilb4mtl("bilb4mtl-softmax", softmax, "pairwise", divisor="sum", equivariant=True),
    bilb4mtl(
        "bilb4mtl-from_module",
        network,
        "adjacent_mean",
        extra=features,
        shared=("router", "opt_state"),
        kin="bilb4mtl",
    ),
    bilevel(
        "bilb4mtl-relu_sigmoid",
        seeded,
        arguments={"key": 7},
        phi=bilevel_objective("variance", divisor="sum"),
        equivariant=True,
    ),
    bilevel(
        "bilb4mtl-guarded",
        guarded,
        values=lambda losses, state: over_initial_loss(jnp.log(losses), state),
        learns=initial_and_router,
        kin="bilb4mtl",
    ),
    bilevel(
        "bilb4mtl_cityscapes",
        bilb.presets.bilb4mtl_cityscapes,
        phi=bilevel_objective(weighted=False),
        **preset_of_features,
        kin="bilb4mtl-softmax",
    ),
    bilevel(
        "bilb4mtl_nyuv2",
        bilb.presets.bilb4mtl_nyuv2,
        values=over_initial_ratio,
        phi=bilevel_objective(divisor="sum"),
        learns=initial_and_router,
        **preset_of_features,
        kin="bilb4mtl-softmax",
    ),
    bilevel(
        "bilb4mtl_celeba",
        bilb.presets.bilb4mtl_celeba,
        phi=bilevel_objective(divisor="sum"),
    ),
    bilevel(
        "bilb4mtl_qm9",
        bilb.presets.bilb4mtl_qm9,
        {"penalty": 0.05, "every": 3},
        values=log_over_initial_loss,
        phi=bilevel_objective(divisor="sum"),
        learns=initial_and_router,
        kin="bilb4mtl_celeba",
    ),
    Method(
        "marigold",
        bilb.marigold,
        {"regularization": 0.1, "max_logit": 6.0},
        static_args=("inner_steps",),
        extra=slopes,
        phi=weighted_sum,
        learns=("point", "weights", "opt_state"),
    ),
    Method(
        "marigold-cagrad",
        bilb.marigold,
        {"regularization": 0.1},
        {"lower": "cagrad", "inner_steps": 2},
        static_args=("inner_steps",),
        extra=gram,
        keywords=slope_function,
        phi=weighted_sum,
        learns=("point", "weights", "opt_state"),
        kin="marigold",
    ),
    Method(
        "igb_v1-marigold",
        igb_v1_marigold,
        {"max_logit": 6.0},
        extra=slopes,
        phi=None,
        learns=("point", "opt_state"),
        kin="marigold",
    ),
    Method(
        "famo",
        bilb.famo,
        {"gamma": 1e-3, "min_losses": 0.0},
        extra=losses_after,
        values=lambda losses, _: losses + 1e-8,
        phi=famo_objective,
        learns=("logits", "weights", "losses", "opt_state"),
    ),
    Method(
        "initial_loss-famo",
        initial_loss_famo,
        {"gamma": 1e-3},
        extra=losses_after,
        values=lambda losses, state: losses / state.links[0].initial_losses + 1e-8,
        phi=famo_objective,
        learns=("logits", "weights", "opt_state"),
        kin="famo",
    ),
    Method(
        "rlw",
        bilb.rlw,
        arguments={"key": 7},
        phi=weighted_sum,
        equivariant=False,
        learns=("weights",),
    ),
    Method(
        "rlw-tasks",
        bilb.rlw,
        arguments={"key": 7, "sum_to": "tasks"},
        phi=weighted_sum,
        equivariant=False,
        learns=("weights",),
        kin="rlw",
    ),
    Method(
        "dwa",
        bilb.dwa,
        {"temperature": 2.0, "window": 1},
        static_args=("sliding",),
        phi=weighted_sum,
        learns=("weights", "window_index", "count", "running_mean", "last_mean", "earlier_mean"),
    ),
    Method(
        "dwa-sliding",
        bilb.dwa,
        {"temperature": 2.0},
        {"window": 2, "sliding": True, "sum_to": "one"},
        static_args=("window", "sliding"),
        phi=weighted_sum,
        learns=("weights", "recent_losses"),
        kin="dwa",
    ),
    Method(
        "softadapt",
        bilb.softadapt,
        {"beta": 0.1},
        phi=weighted_sum,
        learns=("weights", "last_losses", "seen"),
    ),
    Method(
        "softadapt-normalized",
        bilb.softadapt,
        {"beta": 0.1},
        {"rate": "normalized", "loss_weighted": True},
        static_args=("rate", "loss_weighted"),
        phi=weighted_sum,
        sparse=True,
        learns=("weights", "last_losses", "seen"),
        kin="softadapt",
    ),
    Method(
        "relobralo",
        bilb.relobralo,
        {"alpha": 0.3, "temperature": 0.3, "rho": 0.3},
        {"key": 7},
        phi=weighted_sum,
        learns=("weights", "last_losses", "initial_losses", "seen"),
    ),
    Method(
        "self_adaptive",
        bilb.self_adaptive,
        {"exponent": 2.0, "initial": 1.5},
        phi=weighted_sum,
        learns=("scales", "weights", "opt_state"),
    ),
    Method(
        "uncertainty_weighting",
        bilb.uncertainty_weighting,
        {"initial": 0.5},
        phi=lambda values, weights: (weights * values - jnp.log(2 * weights) / 2).sum(),
        learns=("log_variances", "weights", "opt_state"),
    ),
    Method(
        "imtl_l",
        bilb.imtl_l,
        {"initial": 0.5},
        phi=lambda values, weights: (weights * values - jnp.log(weights)).sum(),
        learns=("log_scales", "weights", "opt_state"),
    ),
    Method(
        "geometric_mean",
        bilb.geometric_mean,
        {"floor": 1e-8},
        phi=lambda values, _: jnp.exp(jnp.log(values).mean()),
        learns=("weights",),
    ),
    Method(
        "stch",
        bilb.stch,
        {"mu": 0.5},
        phi=lambda values, _: 0.5 * jax.nn.logsumexp(values / values.size / 0.5),
        learns=("weights",),
    ),
    Method(
        "stch_nadir",
        bilb.stch_nadir,
        {"mu": 0.5, "nadir_start": 0, "nadir_steps": 1},
        warmup=1,
        values=lambda losses, state: jnp.log(losses / state.nadir),
        phi=lambda values, _: 0.5 * values.size * jax.nn.logsumexp(values / 0.5),
        learns=("weights", "nadir", "count"),
        kin="stch",
    ),
    Method(
        "pbi",
        bilb.pbi,
        {"penalty": 2.0},
        phi=lambda values, _: (
            values.sum() / values.size**0.5
            + 2.0 * jnp.sqrt(jnp.sum((values - values.mean()) ** 2) + 1e-12)
        ),
        learns=("weights",),
    ),
    Method(
        "cosmos",
        bilb.cosmos,
        {"penalty": 2.0},
        phi=lambda values, _: (
            values.mean() - 2.0 * values.sum() / (values.size**0.5 * jnp.linalg.norm(values))
        ),
        learns=("weights",),
    ),
    Method(
        "gradnorm",
        bilb.gradnorm,
        {"alpha": 1.5, "warmup_steps": 1, "decay": 0.3},
        extra=norms,
        phi=weighted_sum,
        learns=("weights", "scales", "initial_losses", "count", "opt_state", "mean"),
    ),
    Method(
        "gradnorm-sum",
        bilb.gradnorm,
        {"alpha": 1.5, "warmup_steps": 1, "decay": 0.3},
        {"scheme": "sum"},
        extra=norms,
        phi=weighted_sum,
        learns=("weights", "scales", "initial_losses", "count", "opt_state", "mean"),
        kin="gradnorm",
    ),
    Method(
        "log-gradnorm",
        log_gradnorm,
        {"alpha": 1.5},
        extra=norms,
        values=lambda losses, _: jnp.log(losses),
        phi=weighted_sum,
        learns=("weights", "scales", "opt_state"),
        kin="gradnorm",
    ),
    Method(
        "lr_annealing",
        bilb.lr_annealing,
        {"momentum": 0.3, "decay": 0.3, "eps": 1e-5},
        {"every": 1},
        static_args=("every",),
        extra=norms,
        phi=weighted_sum,
        learns=("weights", "mean", "total"),
    ),
    Method(
        "lr_annealing-reference",
        bilb.lr_annealing,
        {"momentum": 0.3, "decay": 0.3, "eps": 1e-5},
        {"every": 1, "reference": 0},
        static_args=("every", "reference"),
        extra=norms,
        phi=weighted_sum,
        equivariant=False,
        sparse=True,
        learns=("weights", "mean", "total"),
        kin="lr_annealing",
    ),
    Method(
        "db_pinn",
        bilb.db_pinn,
        {"eps": 1e-5},
        {"every": 1, "reference": 0},
        static_args=("every", "reference"),
        extra=norms,
        phi=weighted_sum,
        equivariant=False,
        sparse=True,
        learns=("weights", "mean_losses"),
        kin="lr_annealing",
    ),
    Method(
        "ntk_weights",
        bilb.ntk_weights,
        {"momentum": 0.3, "decay": 0.3, "eps": 1e-5},
        {"every": 1},
        static_args=("every",),
        extra=curvatures,
        phi=weighted_sum,
        learns=("weights", "mean", "total"),
    ),
    Method(
        "throw_away",
        throw_away,
        {"decay": 0.3},
        extra=gram,
        phi=weighted_sum,
        learns=("weights", "mean"),
    ),
    Method(
        "igb_v1",
        bilb.igb_v1,
        {"base_start": 0, "base_steps": 1, "floor": 1e-8},
        values=lambda losses, _: jnp.log(losses),
        phi=weighted_sum,
        learns=("base_losses", "weights"),
    ),
    Method(
        "igb_v2",
        bilb.igb_v2,
        {
            "base_start": 0,
            "base_steps": 1,
            "warmup_steps": 2,
            "update_after": 1,
            "update_every": 2,
            "num_updates": 4,
            "reward_scale": 1.0,
            "discount": 0.3,
            "polyak": 0.3,
            "initial_temperature": 0.2,
            "clip": 1e6,
            "floor": 1e-8,
        },
        {"buffer_size": 8, "batch_size": 4, "hidden": (4,), "key": 7},
        static_args=("buffer_size", "batch_size", "key"),
        values=lambda losses, _: jnp.log(losses),
        phi=weighted_sum,
        equivariant=False,
        learns=("base_losses", "last_losses", "weights"),
        shared=("agent", "buffer"),
    ),
    Method(
        "marigold_pinn",
        bilb.presets.marigold_pinn,
        {"max_logit": 6.0},
        extra=slopes,
        values=lambda losses, _: jnp.sqrt(losses),
        phi=weighted_sum,
        learns=("point", "weights", "opt_state"),
        kin="marigold",
    ),
    gram_method(
        "nash_pinn",
        bilb.presets.nash_pinn,
        values=lambda losses, _: jnp.sqrt(losses),
        kin="nash_mtl",
    ),
    gram_method("mgda", bilb.mgda, sparse=True),
    gram_method("upgrad", bilb.upgrad, {"reg_eps": 1e-4, "norm_eps": 1e-4, "preference": 0.5}),
    gram_method(
        "dualproj",
        bilb.dualproj,
        {"reg_eps": 1e-4, "norm_eps": 1e-4, "preference": 0.5},
        kin="upgrad",
    ),
    gram_method("cagrad", bilb.cagrad, {"c": 0.4}, static_args=("rescale",)),
    gram_method("nash_mtl", bilb.nash_mtl, {"max_norm": 1.0}, static_args=("every",)),
    gram_method("fairgrad", bilb.fairgrad, {"alpha": 2.0}, kin="nash_mtl"),
    gram_method("pcgrad", bilb.pcgrad, arguments={"key": 7}, equivariant=False),
    gram_method(
        "gradvac",
        bilb.gradvac,
        {"beta": 0.3, "eps": 1e-8},
        arguments={"key": 7},
        equivariant=False,
        kin="pcgrad",
    ),
    gram_method("aligned_mtl", bilb.aligned_mtl, {"preference": 0.5}),
    gram_method("imtl_g", bilb.imtl_g),
    gram_method("config", bilb.config, {"preference": 0.5}, kin="aligned_mtl"),
    gram_method("krum", bilb.krum, {"num_byzantine": 1, "num_selected": 2}, sparse=True),
    gram_method(
        "pcd",
        bilb.pcd,
        {"tau": 0.3, "beta": 0.3, "eps": 1e-8},
        static_args=("primary",),
        equivariant=False,
        sparse=True,
        learns=("weights", "mean", "memory"),
    ),
    gram_method(
        "modo",
        bilb.modo,
        {"gamma": 0.01, "rho": 0.1},
        learns=("weights", "mean", "memory"),
    ),
    gram_method(
        "sdmgrad",
        bilb.sdmgrad,
        {"lamb": 0.3, "learning_rate": 0.5, "momentum": 0.3, "eps": 1e-8},
        static_args=("steps",),
        sparse=True,
        learns=("weights", "mean", "memory"),
    ),
    gram_method(
        "sdmgrad-exact",
        bilb.sdmgrad,
        {"lamb": 0.3},
        arguments={"steps": None},
        static_args=("steps",),
        sparse=True,
        learns=("weights", "mean", "memory"),
        kin="sdmgrad",
    ),
    Method(
        "cr_mogm",
        lambda alpha: bilb.cr_mogm(bilb.log_losses(), alpha),
        {"alpha": 0.3},
        phi=weighted_sum,
        learns=("weights", "started"),
    ),
    Method(
        "cr_mogm-imtl_g",
        lambda alpha: bilb.cr_mogm(bilb.imtl_g(), alpha),
        {"alpha": 0.3},
        extra=gram,
        phi=None,
        learns=("started",),
        kin="cr_mogm",
    ),
    Method(
        "igb_v1-mgda",
        igb_v1_mgda,
        extra=gram,
        phi=None,
        sparse=True,
        kin="mgda",
    ),
]
