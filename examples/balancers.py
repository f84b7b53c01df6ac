"""The methods that the examples know by name, alone or in a chain such as ``igb_v1+mgda``.

To add one, add a line to :data:`METHODS`: a function of the run's :class:`Settings` that returns a
loss transformation. Aggregators of task gradients have a table of their own; links of METHODS go in
front of them, as in ``si+graddrop``.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilb

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """What a method may want to know about the training run.

    All but the numbers of steps and the way to take Gram matrices are traced, so that changing them
    compiles nothing anew.
    """

    learning_rate: float | Array
    penalty: float | Array
    seed: int | Array  # the key of methods that draw random numbers
    selection: Array  # (K,) constant weights, one-hot for a single-task network
    steps: int = dataclasses.field(metadata={"static": True})
    steps_per_epoch: int = dataclasses.field(metadata={"static": True})
    temperature: float | Array = 2.0  # of dwa
    gamma: float | Array = 1e-3  # the decay of famo's logits
    logit_rate: float | Array = 0.025  # of Adam for the logits of marigold_pinn
    logit_alpha: float | Array = 1.0  # what is left of that rate in the end, along a cosine
    max_logit: float | Array = 6.0  # their bound
    preference: float | Array = 1.0  # of marigold_pinn and nash_pinn
    decay: float | Array = 0.0  # of the running mean of the Gram matrix
    gram: str = dataclasses.field(default="exact", metadata={"static": True})  # of GRAMS

    def optimizer(self) -> optax.GradientTransformation:
        """Adam whose learning rate decays to 1 % of its initial value along a cosine.

        Trains the network and, as in the official code of the papers, what a method learns.
        """
        return optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.steps, alpha=0.01))


Factory = Callable[[Settings], optax.GradientTransformation]

METHODS: dict[str, Factory] = {
    "ls": lambda s: bilb.linear_scalarization(),
    "si": lambda s: bilb.log_losses(),
    "log": lambda s: bilb.log_losses(),  # another name for a link in front of others
    "root": lambda s: bilb.power_losses(0.5),
    "quarter": lambda s: bilb.power_losses(0.25),
    "bilb4mtl": lambda s: bilb.presets.bilb4mtl_qm9(
        s.penalty, every=s.steps_per_epoch, optimizer=s.optimizer(), key=s.seed
    ),
    "bilb4mtl_celeba": lambda s: bilb.presets.bilb4mtl_celeba(s.penalty, optimizer=s.optimizer()),
    "marigold": lambda s: bilb.marigold(),
    "marigold_nash": lambda s: bilb.marigold("nash"),
    "igb_v1": lambda s: bilb.igb_v1(s.steps_per_epoch, s.steps_per_epoch),
    "igb_v2": lambda s: bilb.igb_v2(
        s.steps_per_epoch,
        s.steps_per_epoch,
        warmup_steps=5 * s.steps_per_epoch,
        update_after=3 * s.steps_per_epoch,
        key=s.seed,
    ),
    "igb_v2_near_igb_v1": lambda s: bilb.presets.igb_v2_near_igb_v1(s.steps_per_epoch, key=s.seed),
    "famo": lambda s: bilb.famo(gamma=s.gamma),
    "rlw": lambda s: bilb.rlw(key=s.seed),
    "dwa": lambda s: bilb.dwa(s.temperature, window=s.steps_per_epoch),
    "uw": lambda s: bilb.uncertainty_weighting(),
    "gls": lambda s: bilb.geometric_mean(),
    "imtl_l": lambda s: bilb.imtl_l(),
    "stch": lambda s: bilb.stch(),
    "stch_nadir": lambda s: bilb.stch_nadir(
        nadir_start=4 * s.steps_per_epoch, nadir_steps=s.steps_per_epoch
    ),
    "pbi": lambda s: bilb.pbi(),
    "cosmos": lambda s: bilb.cosmos(penalty=1.0),
    "gradnorm": lambda s: bilb.gradnorm(warmup_steps=s.steps_per_epoch),
    "mgda": lambda s: bilb.mgda(decay=s.decay),
    "upgrad": lambda s: bilb.upgrad(decay=s.decay),
    "dualproj": lambda s: bilb.dualproj(decay=s.decay),
    "cagrad": lambda s: bilb.cagrad(decay=s.decay),
    "nash_mtl": lambda s: bilb.nash_mtl(decay=s.decay),
    "fairgrad": lambda s: bilb.fairgrad(decay=s.decay),
    "pcgrad": lambda s: bilb.pcgrad(key=s.seed, decay=s.decay),
    "gradvac": lambda s: bilb.gradvac(key=s.seed, decay=s.decay),
    "imtl_g": lambda s: bilb.imtl_g(decay=s.decay),
    "aligned_mtl": lambda s: bilb.aligned_mtl(decay=s.decay),
    "config": lambda s: bilb.config(decay=s.decay),
    "sdmgrad": lambda s: bilb.sdmgrad(decay=s.decay),
    "modo": lambda s: bilb.modo(decay=s.decay),
    "pcd": lambda s: bilb.pcd(decay=s.decay),
    "krum": lambda s: bilb.krum(decay=s.decay),
    "cr_mogm": lambda s: bilb.cr_mogm(bilb.mgda(decay=s.decay)),
    "softadapt": lambda s: bilb.softadapt(),
    "relobralo": lambda s: bilb.relobralo(key=s.seed),
    "self_adaptive": lambda s: bilb.self_adaptive(),
    "lr_annealing": lambda s: bilb.lr_annealing(every=s.steps_per_epoch),
    "db_pinn": lambda s: bilb.db_pinn(every=s.steps_per_epoch),
    "ntk_weights": lambda s: bilb.ntk_weights(every=s.steps_per_epoch),
    "marigold_pinn": lambda s: bilb.presets.marigold_pinn(
        optimizer=optax.adam(
            optax.cosine_decay_schedule(s.logit_rate, s.steps, alpha=s.logit_alpha)
        ),
        max_logit=s.max_logit,
        preference=s.preference,
    ),
    "nash_pinn": lambda s: bilb.presets.nash_pinn(preference=s.preference),
}

#: Those that read the losses alone; and those that also learn from the slopes along the last step.
READ_LOSSES = ("ls", "si", "root", "bilb4mtl", "bilb4mtl_celeba", "igb_v1", "igb_v2", "rlw", "dwa")
READ_LOSSES += ("uw", "gls", "imtl_l", "stch", "stch_nadir", "pbi", "cosmos", "softadapt")
READ_LOSSES += ("relobralo", "self_adaptive", "igb_v2_near_igb_v1")
READ_SLOPES = ("marigold", "marigold_nash", "marigold_pinn", "famo")

#: By the settings and the parameters that the tasks share.
AGGREGATORS: dict[str, Callable[[Settings, Any], optax.GradientTransformation]] = {
    "graddrop": lambda s, shared: bilb.graddrop(s.seed, shared=shared),
    "moco": lambda s, shared: bilb.moco(len(s.selection), shared=shared),
    "db_mtl": lambda s, shared: bilb.db_mtl(len(s.selection), shared=shared),
    "excess_mtl": lambda s, shared: bilb.excess_mtl(len(s.selection), shared=shared),
    "trimmed_mean": lambda s, shared: bilb.trimmed_mean(1, shared=shared),
}

GRAMS = {
    "exact": lambda s: bilb.grams.exact(),
    "stacked": lambda s: bilb.grams.stacked(),
    "sketch": lambda s: bilb.grams.sketch(key=s.seed),
    # The same number of probes at all steps.
    "sketch_1": lambda s: bilb.grams.sketch(probes=1, key=s.seed, warmup_steps=0),
    "sketch_2": lambda s: bilb.grams.sketch(probes=2, key=s.seed, warmup_steps=0),
    "sketch_4": lambda s: bilb.grams.sketch(probes=4, key=s.seed, warmup_steps=0),
}

REFERENCES: dict[str, Factory] = {
    "STL": lambda s: bilb.linear_scalarization(s.selection),
    "STL-log": lambda s: bilb.chain(bilb.log_losses(), bilb.linear_scalarization(s.selection)),
}


def make(
    name: str, settings: Any, known: Mapping[str, Callable] = METHODS | REFERENCES
) -> optax.GradientTransformation:
    """Returns a method by its name, or the chain of those whose names ``+`` joins."""
    return bilb.chain(*(known[part](settings) for part in name.split("+")))


def one_for_each_loss(
    optimizer: optax.GradientTransformation, number: int
) -> optax.GradientTransformation:
    """Adds the updates of ``number`` copies of an optimiser, each with a loss of its own.

    Its gradients have a leading axis of losses, its updates have none.
    """

    def init(parameters: Any) -> Any:
        return jax.vmap(lambda _: optimizer.init(parameters))(jnp.arange(number))

    def update(gradients: Any, states: Any, parameters: Any) -> tuple[Any, Any]:
        each = jax.vmap(optimizer.update, in_axes=(0, 0, None))
        updates, states = each(gradients, states, parameters)
        return jax.tree.map(lambda u: u.sum(0), updates), states

    return optax.GradientTransformation(init, update)


def mistake(
    names: Sequence[str],
    known: Mapping[str, Callable] = METHODS,
    aggregators: Mapping[str, Callable] = AGGREGATORS,
) -> str | None:
    """Says what is wrong with names of methods and chains, if anything."""
    for name in names:
        for part in name.split("+")[:-1]:
            if part in aggregators:
                return f"{part} aggregates task gradients, so that nothing follows it: {name}"
    known = known | aggregators
    unknown = [
        repr(part) if part == name else f"{part!r} in {name}"
        for name in names
        for part in name.split("+")
        if part not in known
    ]
    if names and not unknown:
        return None
    what = f"unknown method {', '.join(unknown)}" if unknown else "no method"
    return f"{what}; choose from: {', '.join(known)}, alone or several joined by +"


def mistake_in_values(penalty: float, output: Path) -> str | None:
    """Says what is wrong with a penalty, or with a folder to write to, if anything."""
    if not (math.isfinite(penalty) and penalty >= 0):
        return f"--penalty must not be negative, and finite; got {penalty}"
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir():
        return f"--output {output}: {nearest} is not a folder"
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"--output {output}: nothing may be written in {nearest}"
    return None
