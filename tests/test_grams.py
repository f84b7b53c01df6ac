"""Ways to take the Gram matrix, which parameters enter it, and its running mean."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import mostly_slow

import bilb

K = 3
INPUTS = np.cos(np.arange(8.0 * 4)).reshape(8, 4)
OTHER, THIRD = INPUTS[::-1] * 0.7, INPUTS + 0.3
PARAMS = {
    "trunk": np.sin(np.arange(4.0 * 5)).reshape(4, 5),
    "heads": np.cos(np.arange(5.0 * K)).reshape(5, K),
}
SHARED = {"trunk": True, "heads": False}
ENGINES = {
    "exact": bilb.grams.exact(),
    "exact, two at once": bilb.grams.exact(chunk_size=2),
    "stacked": bilb.grams.stacked(),
    "stacked, two at once": bilb.grams.stacked(chunk_size=2),
}


def trunk(params, inputs):
    return jnp.tanh(inputs @ params["trunk"])


def heads_losses(params, representation, inputs):
    del inputs
    return jnp.mean((representation @ params["heads"] - jnp.arange(1.0, K + 1)) ** 2, axis=0)


def task_losses(params, inputs):
    return heads_losses(params, trunk(params, inputs), inputs)


def jacobian_of(inputs, shared=True):
    """Returns the task gradients as a matrix (K, P), of the shared parameters or of all."""
    rows = jax.jacrev(task_losses)(PARAMS, inputs)
    leaves = [rows["trunk"]] if shared is not True else [rows["trunk"], rows["heads"]]
    return np.concatenate([np.reshape(leaf, (K, -1)) for leaf in leaves], axis=1)


def step(balancer, *args, extra=None, **options):
    value_and_grad = bilb.value_and_grad(task_losses, balancer, **options)
    state = value_and_grad.init(PARAMS, *args)
    run = jax.jit(lambda params, state: value_and_grad(params, state, *args, **(extra or {})))
    return run(PARAMS, state)


def spy():
    """Returns a balancer that keeps the Gram matrix and the norms that it was given."""
    zeros = lambda k, dtype: {"gram": jnp.zeros((k, k), dtype), "norms": jnp.zeros(k, dtype)}

    def update(losses, state, *, gram, gradient_norms):
        return losses, {"gram": gram, "norms": gradient_norms}

    return bilb.loss_transformation(zeros, update)


@pytest.mark.x64
@pytest.mark.parametrize("shared", [True, SHARED], ids=["all", "trunk"])
@pytest.mark.parametrize("engine", mostly_slow(ENGINES, fast=["exact", "stacked"]))
def test_all_engines_give_the_same_gram_matrix_norms_and_gradient(engine, shared):
    _, grads, state = step(spy(), INPUTS, gram=ENGINES[engine], shared=shared)
    jacobian = jacobian_of(INPUTS, shared)
    np.testing.assert_allclose(state.balancer["gram"], jacobian @ jacobian.T, rtol=1e-12)
    norms = np.linalg.norm(jacobian, axis=1)
    np.testing.assert_allclose(state.balancer["norms"], norms, rtol=1e-12)
    expected = jax.grad(lambda p: task_losses(p, INPUTS).sum())(PARAMS)
    chex.assert_trees_all_close(grads, expected, rtol=1e-12)


@pytest.mark.x64
@pytest.mark.parametrize("engine", mostly_slow(ENGINES, fast=["exact"]))
def test_engines_are_callable_by_hand(engine):
    jacobian = jacobian_of(INPUTS)
    gram = ENGINES[engine](task_losses, PARAMS, INPUTS)
    np.testing.assert_allclose(gram, jacobian @ jacobian.T, rtol=1e-12)
    np.testing.assert_array_equal(gram, gram.T)


@pytest.mark.slow
@pytest.mark.x64
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batches", [(OTHER,), [(OTHER,), (THIRD,)]], ids=["two", "three"])
def test_independent_batches_give_the_product_of_two_jacobians(engine, batches):
    """Entry (i, j) joins task i on the first batch named with task j on the other one."""
    extra = {"gram_args": batches}
    balancer = bilb.modo(gamma=0.5)
    _, grads, _ = step(balancer, INPUTS, gram=ENGINES[engine], extra=extra)
    left = jacobian_of(OTHER)
    right = jacobian_of(THIRD if isinstance(batches, list) else INPUTS)
    state = balancer.init(jnp.ones(K))
    balanced, _ = balancer.update(jnp.ones(K), state, gram=jnp.asarray(left @ right.T))
    rows = jax.jacrev(task_losses)(PARAMS, INPUTS)
    expected = jax.tree.map(lambda leaf: jnp.tensordot(balanced, leaf, 1), rows)
    assert jnp.ptp(balanced) > 0.01
    chex.assert_trees_all_close(grads, expected, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.x64
def test_heads_follow_the_plain_sum_where_asked():
    mask = jnp.array([True, False, True])
    rows = jax.jacrev(task_losses)(PARAMS, INPUTS)
    for given, present in (({}, jnp.ones(K)), ({"mask": mask}, mask.astype(float))):
        for heads in ("weighted", "sum"):
            options = {"shared": SHARED, "heads": heads}
            _, grads, state = step(bilb.mgda(), INPUTS, extra=given, **options)
            weights = state.effective_weights
            assert not np.allclose(weights, present)
            aggregator = bilb.aggregate_by(bilb.mgda(), K, **options)
            stacked, _ = aggregator.update(rows, aggregator.init(PARAMS), PARAMS, **given)
            chex.assert_trees_all_close(grads, stacked, rtol=1e-9)
            expected = jnp.tensordot(weights, rows["trunk"], 1)
            np.testing.assert_allclose(grads["trunk"], expected, rtol=1e-9)
            of_heads = weights if heads == "weighted" else present
            expected = jnp.tensordot(of_heads, rows["heads"], 1)
            np.testing.assert_allclose(grads["heads"], expected, rtol=1e-9)


def test_an_unknown_policy_for_heads_is_named():
    for build in (
        lambda: bilb.value_and_grad(task_losses, bilb.mgda(), heads="raw"),
        lambda: bilb.aggregate_by(bilb.mgda(), K, heads="raw"),
    ):
        with pytest.raises(ValueError, match=r"heads.*'raw'"):
            build()


class TestRepresentation:
    """Task gradients at the representation, one pullback through the trunk."""

    @pytest.mark.x64
    def test_weights_come_from_the_gradients_at_the_representation(self):
        driver = bilb.representation_value_and_grad(trunk, heads_losses, bilb.mgda())
        state = driver.init(PARAMS, INPUTS)
        losses, grads, state = jax.jit(driver)(PARAMS, state, INPUTS)
        z = trunk(PARAMS, INPUTS)
        rows = jax.jacrev(lambda z: heads_losses(PARAMS, z, INPUTS))(z).reshape(K, -1)
        weights = bilb.gradient_balancing.solvers.min_norm_weights(rows @ rows.T)
        np.testing.assert_allclose(state.effective_weights, weights, rtol=1e-9)
        expected = jax.grad(lambda p: weights @ task_losses(p, INPUTS))(PARAMS)
        chex.assert_trees_all_close(grads, expected, rtol=1e-9)
        np.testing.assert_allclose(losses, task_losses(PARAMS, INPUTS), rtol=1e-12)

    @pytest.mark.slow
    @pytest.mark.x64
    def test_slopes_and_losses_after_work_as_in_value_and_grad(self):
        z = trunk(PARAMS, INPUTS)
        driver = bilb.representation_value_and_grad(trunk, heads_losses, bilb.marigold())
        state = driver.init(PARAMS, INPUTS)
        _, _, state = driver(PARAMS, state, INPUTS)
        rows = jax.jacrev(lambda z: heads_losses(PARAMS, z, INPUTS))(z).reshape(K, -1)
        np.testing.assert_allclose(state.slopes, rows @ rows.T @ jnp.ones(K) / K, rtol=1e-9)
        driver = bilb.representation_value_and_grad(trunk, heads_losses, bilb.famo())
        state = driver.init(PARAMS, INPUTS)
        _, _, state = driver(PARAMS, state, INPUTS)
        state = driver.after(PARAMS, state, OTHER)
        np.testing.assert_allclose(state.losses_after, task_losses(PARAMS, OTHER), rtol=1e-9)

    def test_another_batch_has_another_representation(self):
        driver = bilb.representation_value_and_grad(trunk, heads_losses, bilb.sdmgrad())
        state = driver.init(PARAMS, INPUTS)
        with pytest.raises(TypeError, match=r"gram_args=.*bilb\.value_and_grad"):
            driver(PARAMS, state, INPUTS, gram_args=(OTHER,))


class TestSketch:
    @pytest.mark.x64
    def test_the_mean_over_steps_is_the_gram_matrix(self):
        jacobian = jacobian_of(INPUTS)
        gram, steps, probes = jacobian @ jacobian.T, 4000, 2
        engine = bilb.grams.sketch(probes, key=1)
        estimates = jax.jit(jax.vmap(lambda step: engine(task_losses, PARAMS, INPUTS, step=step)))(
            jnp.arange(steps)
        )
        squares = np.outer(np.diagonal(gram), np.diagonal(gram))
        deviation = np.sqrt((squares + gram**2) / (steps * probes))
        assert (np.abs(estimates.mean(0) - gram) < 4 * deviation).all()
        # The documented spread of one entry; directions of ±1 spread less than Gaussian ones.
        spread = np.asarray(estimates.std(0))
        bound = np.sqrt((squares + gram**2) / probes)
        assert (spread < 1.1 * bound).all()
        assert (spread > 0.5 * bound).all()

    def test_one_probe_is_positive_semi_definite_of_rank_one(self):
        gram = bilb.grams.sketch(warmup_steps=0)(task_losses, PARAMS, INPUTS)
        values = np.linalg.eigvalsh(gram)
        assert values[-1] > 0
        np.testing.assert_allclose(values[:-1], 0, atol=1e-5 * values[-1])

    @pytest.mark.x64
    def test_the_first_steps_take_more_probes(self):
        of = lambda probes, **given: (
            lambda step: bilb.grams.sketch(probes, **given)(task_losses, PARAMS, INPUTS, step=step)
        )
        steps = jnp.arange(6)
        warm = of(2, warmup_steps=3, warmup_probes=8)
        few, many = of(2, warmup_steps=0), of(8, warmup_steps=0)
        expected = [(many if step < 3 else few)(step) for step in range(6)]
        for found in (jax.vmap(warm)(steps), jax.lax.map(warm, steps), [*map(warm, range(6))]):
            np.testing.assert_allclose(found, expected, rtol=1e-12)
        # The larger number counts, and neither is needed for the other's sake.
        np.testing.assert_allclose(of(8, warmup_probes=2)(0), many(0), rtol=1e-12)
        floats = of(2.0, warmup_steps=3.0, warmup_probes=8.0)
        np.testing.assert_allclose(floats(0), many(0), rtol=1e-12)

    @pytest.mark.parametrize(("num_tasks", "first"), [(2, 16), (8, 16), (9, 18), (40, 80)])
    def test_the_first_steps_see_the_whole_matrix(self, num_tasks, first):
        """By default they take 16 probes each, or twice as many as there are tasks."""
        engine = bilb.grams.sketch()
        numbers = [int(engine.probes_of(jnp.array(s), num_tasks)) for s in (0, 19, 20)]
        assert numbers == [first, first, 1]
        losses = lambda x: x * jnp.arange(1.0, num_tasks + 1)
        gram = engine(losses, jnp.ones(num_tasks), step=0)
        assert np.linalg.matrix_rank(gram) == num_tasks

    @pytest.mark.slow
    def test_directions_depend_on_key_and_step_alone(self):
        take = lambda key, step: bilb.grams.sketch(key=key)(task_losses, PARAMS, INPUTS, step=step)
        np.testing.assert_array_equal(take(0, 3), take(jax.random.key(0), 3))
        assert not np.allclose(take(0, 3), take(0, 4))
        assert not np.allclose(take(0, 3), take(1, 3))

    @pytest.mark.x64
    def test_only_shared_parameters_enter(self):
        gram = bilb.grams.sketch(warmup_steps=0)
        state = step(spy(), INPUTS, gram=gram, shared=SHARED)[2]
        frozen = lambda trunk: task_losses({**PARAMS, "trunk": trunk}, INPUTS)
        # The same entries of ±1 for the trunk, by their place in the tree.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)
        direction = optax.tree.random_like(key, PARAMS, sampler=jax.random.rademacher)["trunk"]
        _, slopes = jax.jvp(frozen, (PARAMS["trunk"],), (direction.astype(float),))
        np.testing.assert_allclose(state.balancer["gram"], np.outer(slopes, slopes), rtol=1e-9)

    @pytest.mark.slow
    @pytest.mark.parametrize("make", [bilb.mgda, bilb.nash_mtl, bilb.imtl_g])
    def test_with_a_running_mean_the_weights_come_near_the_exact_ones(self, make):
        balancer = make(decay=0.999)
        value_and_grad = bilb.value_and_grad(task_losses, balancer, gram=bilb.grams.sketch())
        state = value_and_grad.init(PARAMS, INPUTS)
        carry = lambda state, _: (value_and_grad(PARAMS, state, INPUTS)[2], None)
        state, _ = jax.jit(lambda s: jax.lax.scan(carry, s, length=3000))(state)
        jacobian = jacobian_of(INPUTS)
        exact, _ = balancer.update(
            jnp.ones(K), balancer.init(jnp.ones(K)), gram=jnp.asarray(jacobian @ jacobian.T)
        )
        relative = np.abs(state.balancer.weights - exact) / np.abs(exact).max()
        assert relative.max() < 0.15


def random_grams(count):
    rows = np.random.default_rng(0).normal(size=(count, K, 6))
    return rows @ rows.transpose(0, 2, 1)


@pytest.mark.x64
def test_the_running_mean_is_corrected_for_its_start_and_by_pair():
    """Entry (i, j) is the weighted mean over the steps in which both tasks were there."""
    decay, grams = 0.8, random_grams(6)
    masks = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 1]], bool)
    balancer = bilb.mgda(decay=decay)
    state, update = balancer.init(jnp.ones(K)), jax.jit(balancer.update)
    for gram, mask in zip(grams, masks):
        _, state = update(jnp.ones(K), state, gram=gram, mask=mask)
    for i in range(K):
        for j in range(K):
            seen = [g[i, j] for g, m in zip(grams, masks) if m[i] and m[j]]
            weights = decay ** np.arange(len(seen))[::-1]
            mean = state.mean.sum[i, j] / state.mean.total[i, j]
            np.testing.assert_allclose(mean, np.average(seen, weights=weights), rtol=1e-12)
    exact = jnp.asarray(state.mean.sum / state.mean.total)
    plain, _ = bilb.mgda().update(jnp.ones(K), bilb.mgda().init(jnp.ones(K)), gram=exact)
    np.testing.assert_allclose(state.weights, plain, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.x64
def test_the_running_mean_is_that_of_the_losses_as_the_link_sees_them():
    """Behind the logarithm each step's matrix is divided by that step's losses."""
    grams = random_grams(4)
    losses = np.abs(np.random.default_rng(1).normal(size=(4, K))) + 0.5
    behind, alone = bilb.chain(bilb.log_losses(), bilb.mgda(decay=0.5)), bilb.mgda(decay=0.5)
    state, expected = behind.init(jnp.ones(K)), alone.init(jnp.ones(K))
    for gram, loss in zip(grams, losses):
        _, state = behind.update(jnp.asarray(loss), state, gram=gram)
        _, expected = alone.update(jnp.asarray(loss), expected, gram=gram / np.outer(loss, loss))
    chex.assert_trees_all_close(state.links[1], expected, rtol=1e-9)


def test_a_gram_matrix_that_is_not_due_is_not_taken():
    """Nash-MTL that renews its weights at every third step takes the passes at those only."""
    balancer = bilb.nash_mtl(every=3)
    taken = []
    gram = jnp.asarray(random_grams(1)[0], jnp.float32)

    def gram_fn():
        jax.debug.callback(lambda: taken.append(1))
        return gram

    update = jax.jit(lambda state: balancer.update(jnp.ones(K), state, gram_fn=gram_fn))
    state, weights = balancer.init(jnp.ones(K)), []
    for _ in range(7):
        balanced, state = update(state)
        weights.append(balanced)
    jax.effects_barrier()
    assert len(taken) == 3
    each, _ = bilb.nash_mtl().update(jnp.ones(K), bilb.nash_mtl().init(jnp.ones(K)), gram=gram)
    np.testing.assert_allclose(weights, np.broadcast_to(each, (7, K)), rtol=1e-5)
    value_and_grad = bilb.value_and_grad(task_losses, balancer)
    state = value_and_grad.init(PARAMS, INPUTS)
    for _ in range(4):
        _, _, state = jax.jit(value_and_grad)(PARAMS, state, INPUTS)
    assert state.balancer.step == 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: bilb.grams.exact(chunk_size=0), "chunk_size.*0"),
        (lambda: bilb.grams.stacked(chunk_size=-1), "chunk_size.*-1"),
        (lambda: bilb.grams.sketch(probes=0), "probes.*0"),
        (lambda: bilb.grams.sketch(warmup_steps=-1), "warmup_steps.*-1"),
        (lambda: bilb.grams.sketch(warmup_probes=0), "warmup_probes.*0"),
        (lambda: bilb.mgda(decay=1.0), "decay.*1"),
        (lambda: bilb.mgda(decay=-0.1), r"decay.*-0\.1"),
        (
            lambda: bilb.mgda().update(jnp.ones(3), bilb.mgda().init(jnp.ones(3)), gram=jnp.eye(2)),
            r"gram must have shape \(3, 3\).*\(2, 2\)",
        ),
    ],
    ids=["exact", "stacked", "sketch", "steps", "warm-up", "decay", "negative decay", "shape"],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
