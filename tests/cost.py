"""What a compiled program costs: flops, memory, matrix products, collectives.

All of it is read off the program; nothing runs. A loop counts as one pass of its body, but for the
collectives in it.
"""

import dataclasses
import functools
import itertools
import math
import re
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import optax

import bilb

_MATRIX_PRODUCT = re.compile(
    r"= \S+ (?:dot|convolution)\(|custom_call_target=\"[^\"]*(?:matmul|dot|conv)", re.I
)
# A pair of start and done counts at its end, whose type is that of the result alone.
_COLLECTIVE = re.compile(
    r"= (.+?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|"
    r"collective-broadcast|ragged-all-to-all)(?:-done)?\((?:.* channel_id=(\d+))?"
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLS = re.compile(
    r"(?:calls|body|condition|true_computation|false_computation)=%?([\w.-]+)|"
    r"branch_computations=\{([^}]*)\}"
)
_CONDITION = re.compile(r" while\(.* condition=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"(?:pred|[a-z]+(\d+))\[([\d,]*)\]")


class Collective(NamedTuple):
    """An operation in which devices exchange data."""

    kind: str  # such as "all-reduce"
    bytes: int  # of the result on each device, all arrays together
    times: int  # how often it runs, more than once in a loop


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a compiled program, of one device's part where it is sharded.

    Attributes:
        flops: as XLA counts them.
        temporary_bytes: memory beyond arguments and results.
        matrix_products: dots, convolutions, and calls of a library that does them.
        collectives: all operations between devices.
    """

    flops: float
    temporary_bytes: int
    matrix_products: int
    collectives: tuple[Collective, ...]


def measure(function, *args):
    """Compiles a function for arrays or shapes and returns its cost."""
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    compiled = jitted.lower(*args).compile()
    text = compiled.as_text()
    return Cost(
        flops=compiled.cost_analysis()["flops"],
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        matrix_products=len(_MATRIX_PRODUCT.findall(text)),
        collectives=tuple(collectives(text)),
    )


def moved(collectives, *kinds):
    """Returns how many collectives of these kinds run, all if none is given, and their bytes."""
    chosen = [c for c in collectives if c.kind in kinds or not kinds]
    return sum(c.times for c in chosen), sum(c.times * c.bytes for c in chosen)


def collectives(text):
    """Returns the collectives of a compiled program's text, loops of known length in full.

    The TPU compiler lets one collective go on beside others' computations: each of these then
    contains it once more, under the same channel. It counts where it is started.
    """
    bodies, entry, body = {}, None, []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            body = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        body.append(line)

    starts = {name for name, body in bodies.items() if "AsyncCollectiveStart" in "".join(body)}
    found_in = lambda names: (_COLLECTIVE.search(line) for name in names for line in bodies[name])
    started = {(moved[2], moved[3]) for moved in found_in(starts) if moved}

    @functools.cache
    def of(name):
        found = []
        for line in bodies.get(name, ()):
            moved = _COLLECTIVE.search(line)
            if moved and (name in starts or (moved[2], moved[3]) not in started):
                found.append(Collective(moved[2], _bytes(moved[1]), 1))
            called = _CALLS.findall(line) if "async-done" not in line else ()
            for one, several in called:
                for inner in (one, *re.split(r"[,%\s]+", several)):
                    found += [c._replace(times=c.times * trips(line)) for c in of(inner)]
        return found

    def trips(line):
        if known := _TRIPS.search(line):
            return int(known[1])
        # The TPU compiler does not say it: a loop from 0 up to a constant in its condition.
        loop = _CONDITION.search(line)
        condition = "\n".join(bodies[loop[1]]) if loop else ""
        bounds = _BOUND.findall(condition)
        return int(bounds[0]) if len(bounds) == 1 and "direction=LT" in condition else 1

    return of(entry)


def product_flops(jaxpr):
    """Returns the flops of matrix products and convolutions, loops counted in full."""
    total = 0
    for equation in jaxpr.eqns:
        params = equation.params
        shapes = [getattr(v.aval, "shape", ()) for v in (*equation.invars, *equation.outvars)]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[0][i] for i in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = params["dimension_numbers"].rhs_spec[1:]
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[1][i] for i in kernel)
        times = params["length"] if equation.primitive.name == "scan" else 1
        inner = jax.extend.core.jaxprs_in_params(params)
        total += times * sum(product_flops(jaxpr) for jaxpr in inner)
    return total


def _bytes(result_type):
    sizes = [
        math.prod(map(int, filter(None, shape.split(",")))) * int(bits or 8) // 8
        for bits, shape in _ARRAY.findall(result_type)
    ]
    return sum(sizes)


@dataclasses.dataclass(frozen=True)
class Trunk:
    """A multi-task network: a shared trunk, a linear head of one output per task."""

    widths: tuple[int, ...]
    batch: int
    inputs: int

    def params(self, num_tasks):
        sizes = [self.inputs, *self.widths, num_tasks]
        return {
            f"layer_{i}": {"kernel": jnp.full((n, m), 0.01), "bias": jnp.zeros(m)}
            for i, (n, m) in enumerate(itertools.pairwise(sizes))
        }

    def examples(self, num_tasks):
        return jnp.ones((self.batch, self.inputs)), jnp.ones((self.batch, num_tasks))

    def task_losses(self, params, inputs, targets):
        """Returns the losses (K,), and the features that the heads read."""
        features = self.features(params, inputs)
        return self.heads_losses(params, features, targets), features

    def features(self, params, inputs):
        """Returns the output of the trunk."""
        *trunk, _ = params.values()
        for layer in trunk:
            inputs = jax.nn.relu(inputs @ layer["kernel"] + layer["bias"])
        return inputs

    def heads_losses(self, params, features, targets):
        """Returns the losses (K,) by the output of the trunk."""
        *_, head = params.values()
        outputs = features @ head["kernel"] + head["bias"]
        return jnp.mean((outputs - targets) ** 2, 0)


def plain_step(trunk, optimizer, wrap=lambda losses: losses):
    """Returns a training step on the plain sum of the losses, which it returns as a vector."""

    def step(params, opt_state, _, inputs, targets):
        def objective(params):
            losses = wrap(trunk.task_losses(params, inputs, targets)[0])
            return losses.sum(), losses

        gradient, losses = jax.grad(objective, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, (), losses

    return step, lambda params, *batch: ()


def balanced_step(trunk, optimizer, balancer, features=None, wrap=lambda losses: losses):
    """Returns a training step through ``bilb.value_and_grad``."""

    def task_losses(params, inputs, targets):
        losses, trunk_features = trunk.task_losses(params, inputs, targets)
        return wrap(losses), trunk_features

    value_and_grad = bilb.value_and_grad(task_losses, balancer, has_aux=True, features=features)

    def step(params, opt_state, state, inputs, targets):
        (losses, _), gradient, state = value_and_grad(params, state, inputs, targets)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state, losses

    return step, value_and_grad.init


def arguments(trunk, num_tasks, optimizer, init):
    """Returns the shapes of a training step's arguments."""

    def make():
        params, batch = trunk.params(num_tasks), trunk.examples(num_tasks)
        return params, optimizer.init(params), init(params, *batch), *batch

    return jax.eval_shape(make)


def training_cost(trunk, num_tasks, make_step, optimizer=optax.adamw(1e-3)):
    """Returns the cost of the training step ``make_step(trunk, optimizer) -> step, init``."""
    step, init = make_step(trunk, optimizer)
    # Donated, as in training; otherwise temporaries hide in the results' memory.
    step = jax.jit(step, donate_argnums=(0, 1, 2))
    return measure(step, *arguments(trunk, num_tasks, optimizer, init))


@functools.cache
def plain_cost(trunk, num_tasks):
    """Returns the cost of a step on the plain sum, which tests of all methods compare with."""
    return training_cost(trunk, num_tasks, plain_step)
