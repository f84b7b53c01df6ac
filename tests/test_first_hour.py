"""Mistakes of a first hour: each is an error that says what to do."""

import jax
import jax.numpy as jnp
import optax
import pytest

import bilb

X = jnp.array([0.5, -0.5])
ONES = jnp.ones(2)
inject = optax.inject_hyperparams


def task_losses(x):
    return jnp.stack([jnp.sum((x - 1) ** 2), 9 * jnp.sum((x + 1) ** 2)])


def with_aux(x):
    return task_losses(x), {"norm": jnp.sum(x**2)}


def driver(losses=task_losses, balancer=None, **options):
    balancer = bilb.bilb4mtl() if balancer is None else balancer
    return bilb.value_and_grad(losses, balancer, **options)


def start(**options):
    value_and_grad = driver(**options)
    return value_and_grad, value_and_grad.init(X)


def call(*args, balancer=None, **extra):
    value_and_grad, state = start(balancer=balancer)
    params, state = args or (X, state)
    return jax.eval_shape(lambda x: value_and_grad(params, state, **extra), X)


def update(balancer, losses=ONES):
    return jax.eval_shape(lambda losses: balancer.update(losses, balancer.init(losses)), losses)


def forgotten_after():
    value_and_grad, state = start(balancer=bilb.famo())
    _, _, state = jax.jit(value_and_grad)(X, state)
    return value_and_grad(X, state)


def swapped_representation():
    driver = bilb.representation_value_and_grad(jnp.tanh, lambda x, z: task_losses(z), bilb.mgda())
    return driver(driver.init(X), X)


COUNTED = {"x": X, "count": jnp.array(3)}
of_counted = lambda params: task_losses(params["x"])
foreign = lambda make, other: lambda: make().update(ONES, other().init(ONES))

CASES = {
    # What task_losses returns.
    "has_aux forgotten": (
        lambda: driver(with_aux).init(X),
        ValueError,
        r"losses\[0\].*shape \(2,\).*give has_aux=True",
    ),
    "has_aux forgotten, named": (
        lambda: driver(lambda x: ({"a": x[0], "b": x[1]}, {"norm": x[0]})).init(X),
        ValueError,
        "give has_aux=True",
    ),
    "has_aux without aux": (
        lambda: driver(has_aux=True).init(X),
        TypeError,
        r"must return \(losses, aux\); got an array of shape \(2,\). Leave has_aux out",
    ),
    "has_aux without aux, named": (
        lambda: driver(lambda x: {"a": x[0]}, has_aux=True).init(X),
        TypeError,
        "got a dict. Leave has_aux out",
    ),
    "has_aux with two losses": (
        lambda: driver(lambda x: (x[0], x[1]), has_aux=True).init(X),
        ValueError,
        "Leave has_aux out if both are losses",
    ),
    "has_aux forgotten, by hand": (
        lambda: bilb.task_gradients(with_aux, X),
        ValueError,
        "give has_aux=True",
    ),
    # States and the order of arguments.
    "the balancer's state": (
        lambda: call(X, bilb.bilb4mtl().init(ONES)),
        TypeError,
        r"value_and_grad.init\(params, \*args\).*got a BiLB4MTLState",
    ),
    "no state": (lambda: call(X, X), TypeError, r"value_and_grad.init\(params, \*args\)"),
    "params and state swapped": (
        lambda: call(start()[1], X),
        TypeError,
        r"wrong order: call value_and_grad\(params, state, \*args\)",
    ),
    "swapped in after": (
        lambda: start()[0].after(start()[1], X),
        TypeError,
        "wrong order",
    ),
    "swapped with a representation": (swapped_representation, TypeError, "wrong order"),
    "task_losses and balancer swapped": (
        lambda: bilb.value_and_grad(bilb.bilb4mtl(), task_losses),
        TypeError,
        r"task_losses must be a function .*Call bilb.value_and_grad\(task_losses, balancer\)",
    ),
    "a foreign state": (
        foreign(bilb.bilb4mtl, bilb.famo),
        ValueError,
        r"to this bilb4mtl: the state is a FAMOState, not a BiLB4MTLState\. Call init",
    ),
    "an optimiser's state": (
        foreign(lambda: bilb.igb_v1(0, 1), lambda: optax.adam(1.0)),
        ValueError,
        r"is a tuple of \['ScaleByAdamState', 'EmptyState'\], not an IGBv1State",
    ),
    "a state of other options": (
        foreign(bilb.bilb4mtl, lambda: bilb.bilb4mtl(optimizer=optax.sgd(1.0))),
        ValueError,
        r"state\.opt_state\[0\] is an EmptyState, not a ScaleByAdamState.*same options",
    ),
    # Keywords.
    "masks=": (
        lambda: call(masks=jnp.array([True, False])),
        TypeError,
        r"`masks=`, which no link.*read \['features', 'mask'\]\. Did you mean `mask=`\?",
    ),
    "masks= in a chain": (
        lambda: call(
            balancer=optax.chain(bilb.log_losses(), bilb.igb_v1(0, 1)),
            masks=jnp.array([True, False]),
        ),
        TypeError,
        r"`masks=`.*read \['mask'\]",
    ),
    "an argument of task_losses by name": (
        lambda: call(batch=X),
        TypeError,
        "`batch=`.*Arguments of task_losses are given by position",
    ),
    "a keyword that is no array": (lambda: call(mode="train"), TypeError, "`mode=`, which no link"),
    "features that nobody reads": (
        lambda: call(balancer=bilb.mgda(), features=X),
        TypeError,
        r"`features=`.*they read \['gram', 'mask'\]",
    ),
    "mask= of an optax transformation": (
        lambda: call(balancer=optax.identity(), mask=jnp.array([True, False])),
        TypeError,
        "`mask=`, which no link",
    ),
    # Steps of the training loop.
    "after forgotten": (
        forgotten_after,
        ValueError,
        r"state = value_and_grad.after\(params, state, \*args\) after the optimiser's step",
    ),
    # What is given in the place of something else.
    "a rate for an optimiser": (
        lambda: bilb.bilb4mtl(optimizer=1e-3),
        TypeError,
        r"optimizer must be an Optax optimiser, such as optax.adam\(1e-3\); got 0.001",
    ),
    "a rate for FAMO's": (
        lambda: bilb.famo(optimizer=0.1),
        TypeError,
        "optimizer must be.*got 0.1",
    ),
    "an optimiser not called": (
        lambda: bilb.igb_v2(0, 1, warmup_steps=1, update_after=1, optimizer=optax.adam),
        TypeError,
        r"optimizer must be an Optax optimiser.*Call it: adam\(\.\.\.\)",
    ),
    "the model's rate": (
        lambda: bilb.moml(task_losses, 1e-3, inner_learning_rate=0.1),
        TypeError,
        "optimizer must be an Optax optimiser.*got 0.001",
    ),
    "a lower level not called": (
        lambda: bilb.marigold(bilb.lower_levels.mgda),
        TypeError,
        r"such as bilb.lower_levels.mgda\(\).*Call it: mgda\(\.\.\.\)",
    ),
    "a router not called": (
        lambda: bilb.bilb4mtl(router=bilb.routers.softmax),
        TypeError,
        r"bilb.Router.*Call it: softmax\(\.\.\.\)",
    ),
    "a method not called": (
        lambda: driver(balancer=bilb.mgda),
        TypeError,
        r"such as bilb.bilb4mtl\(\).*Call it: mgda\(\.\.\.\)",
    ),
    "an engine not called": (
        lambda: driver(gram=bilb.grams.sketch),
        TypeError,
        r"gram= takes what this function returns. Call it: sketch\(\.\.\.\)",
    ),
    "slopes not called": (
        lambda: driver(slopes=bilb.slopes.finite_difference),
        TypeError,
        r"slopes=.*Call it: finite_difference",
    ),
    "losses for a function": (
        lambda: driver(task_losses(X)),
        TypeError,
        r"task_losses must be a function \(params, \*args\) -> losses",
    ),
    "Adam for a balancer": (
        lambda: driver(balancer=optax.adam(1e-3)).init(X),
        TypeError,
        "this is an optimiser, of ScaleByAdamState: give a method such as bilb.bilb4mtl",
    ),
    "Adam for a link": (
        lambda: bilb.chain(bilb.log_losses(), optax.adam(1e-3)).init(ONES),
        TypeError,
        "this is an optimiser, of ScaleByAdamState",
    ),
    "Adam inside aggregate_by": (
        lambda: bilb.aggregate_by(optax.adam(1e-3), 2).init(X),
        TypeError,
        "this is an optimiser, of ScaleByAdamState",
    ),
    # Hyperparameters, when the method is built.
    "penalty=None": (lambda: bilb.bilb4mtl(None), TypeError, "penalty must be a number.*got None"),
    "floor=None": (lambda: bilb.log_losses(None), TypeError, "floor must be a number; got None"),
    "weights=None is the default": (lambda: bilb.linear_scalarization(None), None, None),
    "inner_steps=1.5": (
        lambda: bilb.marigold(inner_steps=1.5),
        ValueError,
        "inner_steps must be a whole number; got 1.5",
    ),
    "base_steps=1.5": (
        lambda: bilb.igb_v1(0, 1.5),
        ValueError,
        "base_steps must be a whole number",
    ),
    "base_steps=10.0": (lambda: bilb.igb_v1(0, 10.0), None, None),
    "key='a'": (
        lambda: bilb.rlw(key="a"),
        TypeError,
        "key must be an int or a JAX key; got 'a'",
    ),
    "key=1.0": (
        lambda: bilb.pcgrad(key=1.0),
        TypeError,
        "key must be an int or a JAX key; got 1.0",
    ),
    "key of a router": (
        lambda: bilb.routers.relu_sigmoid(key="a"),
        TypeError,
        "key must be an int or a JAX key",
    ),
    "key of an aggregator": (
        lambda: bilb.graddrop("a"),
        TypeError,
        "key must be an int or a JAX key",
    ),
    "key of a sketch": (
        lambda: bilb.grams.sketch(key="a"),
        TypeError,
        "key must be an int or a JAX key",
    ),
    "a flag": (
        lambda: bilb.bilb4mtl(weighted="yes"),
        TypeError,
        "weighted must be True or False; got 'yes'",
    ),
    # Parameters.
    "integer parameters": (
        lambda: driver(of_counted)(COUNTED, driver(of_counted).init(COUNTED)),
        TypeError,
        r"params\['count'\] is int32.*nnx.split\(model, nnx.Param, \.\.\.\)",
    ),
    "integer parameters of task_gradients": (
        lambda: bilb.task_gradients(of_counted, COUNTED),
        TypeError,
        r"params\['count'\] is int32",
    ),
    # optax.inject_hyperparams.
    "a static size": (
        lambda: inject(bilb.igb_v2)(0, 1, warmup_steps=1, update_after=1).init(ONES),
        TypeError,
        r"buffer_size is static.*static_args=\('buffer_size', \.\.\.\)",
    ),
    "a static number of steps": (
        lambda: inject(bilb.marigold)().init(ONES),
        TypeError,
        r"static_args=\('inner_steps', \.\.\.\)",
    ),
    "a discrepancy": (
        lambda: inject(bilb.bilb4mtl)(discrepancy=bilb.discrepancies.pairwise).init(ONES),
        ValueError,
        r'a discrepancy takes losses \(K,\); got shape \(\).*static_args=\("discrepancy",\)',
    ),
    "a function that became a number": (
        lambda: inject(bilb.bilb4mtl)(discrepancy=lambda u: jnp.max(u) - jnp.min(u)).init(ONES),
        TypeError,
        r"discrepancy must be a function; got .*static_args=\('discrepancy', \.\.\.\)",
    ),
    "bfloat16": (
        lambda: update(inject(bilb.log_losses)(), jnp.ones(2, jnp.bfloat16)),
        TypeError,
        "floor arrives in bfloat16, which rounds it.*hyperparam_dtype=jnp.float32",
    ),
    "float16": (
        lambda: update(inject(bilb.igb_v1)(0, 1), jnp.ones(2, jnp.float16)),
        TypeError,
        "arrives in float16, which rounds it.*hyperparam_dtype=jnp.float32",
    ),
    "bfloat16 with the dtype": (
        lambda: update(
            inject(bilb.log_losses, hyperparam_dtype=jnp.float32)(), jnp.ones(2, jnp.bfloat16)
        ),
        None,
        None,
    ),
    "defaults need no static argument": (lambda: update(inject(bilb.bilb4mtl)()), None, None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_with_what_to_do(case):
    mistake, error, message = CASES[case]
    if error is None:
        mistake()
        return
    with pytest.raises(error, match=message):
        mistake()


def test_losses_after_teach_nothing_until_they_are_taken():
    """Inside jit, where nothing can be raised, they are not numbers and the weights stay."""
    value_and_grad, state = start(balancer=bilb.chain(bilb.log_losses(), bilb.famo()))
    step = jax.jit(value_and_grad)
    for _ in range(3):
        _, _, state = step(X, state)
        assert jnp.isnan(state.losses_after).all()
    assert state.balancer.links[1].weights.tolist() == [0.5, 0.5]
    state = value_and_grad.after(X + 0.1, state)
    _, _, state = step(X + 0.1, state)
    assert state.balancer.links[1].weights[0] != 0.5


def test_losses_that_are_not_finite_after_a_step_are_not_taken_for_a_forgotten_call():
    value_and_grad, state = start(balancer=bilb.famo())
    step = jax.jit(value_and_grad)
    _, _, state = step(X, state)
    state = value_and_grad.after(X * jnp.nan, state)
    assert not jnp.isnan(state.losses_after).any()
    _, _, state = step(X, state)
    assert jnp.isfinite(state.effective_weights).all()
    assert state.balancer.weights.tolist() == [0.5, 0.5]


def test_a_link_by_hand_may_read_what_it_likes_wherever_it_is():
    def scaled():
        def update(losses, state, params=None, **extra):
            return losses * extra.get("factor", 1.0), state

        return optax.GradientTransformationExtraArgs(lambda losses: (), update)

    def chosen():
        def update(losses, state, params=None, **extra):
            return (losses if extra.get("double") else 2 * losses), state

        return optax.GradientTransformationExtraArgs(lambda losses: (), update)

    for balancer in (
        optax.chain(bilb.log_losses(), scaled()),
        bilb.chain(bilb.log_losses(), scaled()),
    ):
        value_and_grad, state = start(balancer=balancer)
        _, _, plain = jax.jit(value_and_grad)(X, state)
        _, _, doubled = jax.jit(value_and_grad)(X, state, factor=2.0)
        assert jnp.allclose(doubled.effective_weights, 2 * plain.effective_weights)
    call(balancer=bilb.chain(bilb.log_losses(), chosen()), double=True)
    with pytest.raises(TypeError, match="`faktor=`, which no link"):
        call(balancer=optax.chain(bilb.log_losses(), scaled()), faktor=2.0)
