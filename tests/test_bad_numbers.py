"""What bad numbers cost: a fault costs its step, and training goes on to the same loss."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax.experiments import tasks

STEPS = 600
CURVATURE = {"flat": 0.05, "one": 1.0, "steep": 4.0}
SHAPES = {"flat": (3, 2), "one": (), "steep": (4,)}
SCHEDULE = optax.linear_schedule(1.0, 0.0, STEPS)
OPTIMIZERS = {
    "dart": functools.partial(dartax.dart, SCHEDULE),
    "dart_sgd": functools.partial(dartax.dart, SCHEDULE, inner=optax.identity()),
    "paper_dart": functools.partial(dartax.paper_dart, SCHEDULE),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
KEYS = jax.random.split(jax.random.key(0), 16)


def start():
    return {name: jnp.ones(shape) for name, shape in SHAPES.items()}


def loss_fn(params):
    return sum(0.5 * CURVATURE[name] * jnp.sum(params[name] ** 2) for name in SHAPES)


@functools.partial(jax.jit, static_argnames="name")
def run(name, faults, scale):
    """Final loss, state and metrics for every key; ``faults`` are added to the gradients."""

    def one(key):
        optimizer = OPTIMIZERS[name](key=key)

        def step(carry, now):
            (params, state), (t, fault) = carry, now
            noise = optax.tree.random_like(jax.random.fold_in(key, t), params)
            grads = jax.tree.map(
                lambda g, n, f: scale * (g + 0.3 * n) + f, jax.grad(loss_fn)(params), noise, fault
            )
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = start()
        (params, state), _ = jax.lax.scan(
            step, (params, optimizer.init(params)), (jnp.arange(STEPS), faults)
        )
        return loss_fn(params), state, dartax.metrics(state)

    return jax.vmap(one)(KEYS)


NO_FAULT = {name: np.zeros((STEPS, *shape), np.float32) for name, shape in SHAPES.items()}
EVERY_50TH = np.arange(49, STEPS, 50)
IN_A_ROW = np.arange(200, 300)


def faults(when, value, where):
    """``value`` in one element, in one tensor or everywhere, at the steps ``when``."""
    trees = {name: zeros.copy() for name, zeros in NO_FAULT.items()}
    for name, tree in trees.items():
        if where == "everywhere" or name == "flat":
            rows = tree.reshape(STEPS, -1)
            rows[when, : 1 if where == "one element" else None] = value
    return trees


@functools.cache
def undisturbed(name):
    return np.log(run(name, NO_FAULT, 1.0)[0])


@pytest.mark.one_in(3)
@every_optimizer
@pytest.mark.parametrize(
    ("when", "value", "where"),
    [
        (EVERY_50TH, np.nan, "one element"),
        (EVERY_50TH, -np.inf, "one tensor"),
        # Finite, but its hypergradient has an infinite square.
        (EVERY_50TH, 1e30, "one element"),
        (IN_A_ROW, np.nan, "everywhere"),
        (np.arange(40), np.inf, "one element"),
    ],
    ids=["NaN", "infinity", "1e30", "100 in a row", "the first 40"],
)
def test_a_fault_costs_its_step_alone(name, when, value, where):
    loss, state, metrics = run(name, faults(when, value, where), 1.0)
    np.testing.assert_array_equal(metrics["dart/skipped"], len(when))
    chex.assert_tree_all_finite(state)
    # As far from the undisturbed runs as those are from one another, at most.
    gap = np.log(loss) - undisturbed(name)
    noise = undisturbed(name).std() * (2 / len(KEYS)) ** 0.5
    # A hundred steps in a row are missing at the end too.
    assert gap.mean() < 4 * noise + (0.5 if len(when) == 100 else 0.1)


@every_optimizer
def test_a_hypergradient_that_overflows_is_a_fault(name):
    # The squares of these gradients fit into float32, those of their inner products do not.
    options = {} if name == "paper_dart" else {"init_rate": 0.3}
    optimizer, params = OPTIMIZERS[name](**options), start()
    update = jax.jit(optimizer.update)
    ones = jax.tree.map(jnp.ones_like, params)
    huge = jax.tree.map(lambda g: 1.2e19 * g, ones)
    state = optimizer.init(params)
    skipped = 0
    for grads in (*5 * [ones], huge, huge, huge):
        before = dartax.concentrations(state, params)
        updates, state = update(grads, state, params)
        if dartax.metrics(state)["dart/skipped"] > skipped:
            skipped += 1
            chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
            chex.assert_trees_all_equal(dartax.concentrations(state, params), before)
        chex.assert_tree_all_finite((updates, state))
    assert skipped >= 1


@every_optimizer
@pytest.mark.parametrize("size", [1e10, 1e19, 1e30, 3e38])
def test_one_enormous_gradient_does_not_stop_what_follows(name, size):
    optimizer, params = OPTIMIZERS[name](), start()
    update = jax.jit(optimizer.update)
    ones = jax.tree.map(jnp.ones_like, params)
    for first in (True, False):
        state = optimizer.init(params)
        for grads in (
            ([] if first else [ones]) + [jax.tree.map(lambda g: size * g, ones)] + 4 * [ones]
        ):
            updates, state = update(grads, state, params)
            chex.assert_tree_all_finite(state)
        assert dartax.metrics(state)["dart/skipped"] <= 2
        # Adam's directions remember a gradient whose square it can hold.
        if size > 2e19 or name != "dart":
            assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    "inner",
    [
        dartax.inner.adam,
        dartax.inner.lion,
        optax.identity,
        optax.scale_by_adam,
        optax.scale_by_belief,
    ],
)
def test_a_gradient_whose_squared_norm_overflows_is_a_fault(inner):
    optimizer, params = dartax.dart(inner=inner()), start()
    fresh = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for sizes in ({"one": 1e20}, {"flat": 1e19, "steep": 1e19}, {"steep": 3e38}):
        # Of "flat" and "steep" no element has a square that overflows, but each sum does.
        grads = {name: sizes.get(name, 1.0) * leaf for name, leaf in params.items()}
        state = fresh
        for skipped in (1, 2):
            updates, state = update(grads, state, params)
            chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
            chex.assert_tree_all_finite(state)
            chex.assert_trees_all_equal(state[0].inner_state, fresh[0].inner_state)
            assert dartax.metrics(state)["dart/skipped"] == skipped


@pytest.mark.parametrize("name", ["dart", "paper_dart"])
def test_a_fault_needs_no_branch(name):
    optimizer, params = OPTIMIZERS[name](), start()
    state = optimizer.init(params)
    traced = jax.jit(optimizer.update).trace(params, state, params)
    # What differs by platform is decided when the program is lowered: the lowered one holds a case
    # of one branch for it.
    text = str(traced.jaxpr)
    assert text.count("cond[") == text.count("branches_platforms=")
    assert "stablehlo.if" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert " conditional(" not in traced.lower().compile().as_text()


@pytest.mark.parametrize("name", ["dart", "paper_dart"])
def test_zero_gradients_move_nothing(name):
    optimizer, params = OPTIMIZERS[name](), start()
    ones = jax.tree.map(jnp.ones_like, params)
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def wait(state, grads, steps):
        body = lambda _, state: optimizer.update(grads, state, params)[1]  # noqa: E731
        return jax.lax.fori_loop(0, steps, body, state)

    fresh = wait(optimizer.init(params), zeros, 1000)
    chex.assert_tree_all_finite(fresh)
    chex.assert_trees_all_equal(
        dartax.concentrations(fresh, params),
        dartax.concentrations(optimizer.init(params), params),
    )
    assert "no signal" in dartax.describe(fresh, params)
    # After a start the averages run out, and then the rates stand still.
    still = wait(wait(fresh, ones, 50), zeros, 12_000)
    later = wait(still, zeros, 1000)
    chex.assert_tree_all_finite(later)
    chex.assert_trees_all_equal(
        dartax.concentrations(later, params), dartax.concentrations(still, params)
    )
    assert dartax.metrics(later)["dart/skipped"] == 0


@pytest.mark.parametrize("scale", [1e-6, 1e8])
def test_the_scale_of_the_loss_changes_little(scale):
    loss, _, metrics = run("dart", NO_FAULT, scale)
    gap = np.log(loss) - undisturbed("dart")
    assert abs(gap.mean()) < 0.25
    np.testing.assert_array_equal(metrics["dart/skipped"], 0)


def test_a_negative_loss_is_a_loss():
    optimizer, params = dartax.dart(), start()
    update = jax.jit(optimizer.update)
    updates, state = update(params, optimizer.init(params), params, value=-1e30)
    assert dartax.metrics(state)["dart/skipped"] == 0
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("size", [1e-30, 1e30, 3e38])
@pytest.mark.parametrize("name", ["dart", "paper_dart"])
def test_parameters_of_any_size(name, size):
    optimizer = OPTIMIZERS[name]()
    params = jax.tree.map(lambda leaf: size * leaf, start())
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(5):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_tree_all_finite((params, state))
    assert dartax.metrics(state)["dart/skipped"] == 0


def test_one_element_beside_ten_million():
    params = {"large": jnp.full((10_000, 1000), 0.02), "small": jnp.ones(1)}
    grads = {"large": jnp.full((10_000, 1000), 1e-4), "small": jnp.ones(1)}
    optimizer = dartax.dart(memory_dtype="float32")
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(3):
        updates, state = update(grads, state, params)
    rates = dartax.learning_rates(state, params)
    # Both are judged by their own gradients, however many elements these have.
    concentration = dartax.concentrations(state, params)
    assert 0.2 < concentration["small"] / concentration["large"] < 5
    np.testing.assert_allclose(updates["small"], -rates["small"], rtol=1e-3)
    np.testing.assert_allclose(updates["large"][-1, -1], -rates["large"], rtol=1e-3)


def test_float16_with_a_dynamic_loss_scale():
    # Master weights in float32, the loss in float16; an overflow is skipped by dart itself.
    optimizer, target = dartax.dart(init_rate=1e-3), 3.0

    def scaled_loss(params, scale):
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
        loss = sum(jnp.sum((leaf - target) ** 2) for leaf in jax.tree.leaves(half))
        return loss.astype(jnp.float32) * scale

    @jax.jit
    def step(carry, t):
        params, state, scale = carry
        # The scale enters in float16, as the gradient of a float16 output would carry it.
        cotangent = scale.astype(jnp.float16)
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
        grads = jax.tree.map(lambda leaf: 2 * (leaf - target) * cotangent, half)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, grads)
        finite = jnp.all(jnp.asarray([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))
        updates, state = optimizer.update(grads, state, params)
        scale = jnp.where(finite, jnp.where(t % 50 == 49, 2 * scale, scale), scale / 2)
        return (optax.apply_updates(params, updates), state, scale), finite

    carry = start(), optimizer.init(start()), jnp.float32(2.0**24)
    (params, state, scale), finite = jax.lax.scan(step, carry, jnp.arange(1000))
    skipped = dartax.metrics(state)["dart/skipped"]
    assert skipped == np.sum(~finite) >= 8
    assert 2**10 < scale < 2**24
    assert scaled_loss(params, 1.0) < 0.1 * scaled_loss(start(), 1.0)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_float16_parameters(size):
    # In float16 the square of a gradient of 1e-3 is 0, and so is Adam's eps.
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), start())
    grads = jax.tree.map(lambda leaf: (size * leaf).astype(jnp.float16), params)
    optimizer = dartax.dart(init_rate=1e-2)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(5):
        updates, state = update(grads, state, params)
    chex.assert_tree_all_finite(state)
    rates = dartax.learning_rates(state, params)
    # Directions of size 1, but for gradients near Adam's eps.
    expected = {name: np.full(shape, -rates[name]) for name, shape in SHAPES.items()}
    chex.assert_trees_all_close(updates, expected, rtol=0.05)
    chex.assert_trees_all_equal_dtypes(updates, params)


def test_apply_if_finite_around_it():
    optimizer, params = optax.apply_if_finite(dartax.dart(), 5), start()
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    for grads in (params, bad, params):
        updates, state = update(grads, state, params)
        chex.assert_tree_all_finite((updates, state))
    # The wrapper looks first: the step does not reach dart.
    assert state.total_notfinite == 1
    assert dartax.metrics(state)["dart/step"] == 2
    assert dartax.metrics(state)["dart/skipped"] == 0


@pytest.mark.parametrize("name", ["dart", "paper_dart"])
def test_draws_go_on_where_the_count_has_come_to_its_end(name):
    # Frozen concentrations: only another draw can give another rate.
    frozen = functools.partial(dartax.paper_dart, eta=0.0)
    optimizer = {"dart": dartax.dart, "paper_dart": frozen}[name](key=3)
    params = start()
    state = optimizer.init(params)
    end = np.iinfo(np.int32).max
    update = jax.jit(optimizer.update)
    _, state = update(params, state, params)
    state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.asarray(end - 3, jnp.int32)
            if path[-1] == jax.tree_util.GetAttrKey("count")
            else leaf
        ),
        state,
    )
    seen = []
    for t in range(8):
        _, state = update(params, state, params)
        assert dartax.metrics(state)["dart/step"] == min(end - 2 + t, end)
        seen.append(
            dartax.learning_rates(state, params)["steep"]
            / dartax.expected_learning_rates(state, params)["steep"]
        )
        chex.assert_tree_all_finite(state)
    assert len(np.unique(np.float32(seen))) == len(seen)


def test_skipped_ends_where_int32_ends():
    optimizer, params = dartax.scale_by_dart(), start()
    end = np.iinfo(np.int32).max
    state = optax.tree.set(optimizer.init(params), count=jnp.asarray(end), skipped=jnp.asarray(end))
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    _, state = jax.jit(optimizer.update)(bad, state, params)
    assert dartax.metrics(state)["dart/skipped"] == end


@pytest.mark.parametrize("inner", [None, optax.identity()], ids=["adam", "sgd"])
def test_a_first_rate_far_too_high_shows(inner):
    """A network is not mended by smaller steps after its first ones: the table has to say it."""
    task = tasks.build(tasks.TaskConfig("digits", steps=100, batch_size=64, layers=(32, 32)))
    batches = task.batches(jax.random.key(1))
    params = task.init(jax.random.key(0))

    def run(init_rate):
        optimizer = dartax.dart(inner=inner, init_rate=init_rate, rate_budget=100.0)

        def step(carry, batch):
            params, state = carry
            loss, grads = jax.value_and_grad(task.train_loss)(params, task.data, batch)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        start = (params, optimizer.init(params))
        (after, state), losses = jax.jit(lambda c: jax.lax.scan(step, c, batches))(start)
        rows = dartax.describe(state, after).splitlines()[3:]
        return losses, int(state[0].skipped), [row.split("  ")[-1].strip() for row in rows]

    trouble = {"no signal", "pinned at max"}
    losses, skipped, words = run(1e-5)
    assert losses[-1] < losses[0]
    assert skipped == 0
    assert not trouble & set(words)
    losses, skipped, words = run(10.0)
    assert not losses[-1] < 0.9 * losses[0]
    assert skipped > 50 or sum(word in trouble for word in words) > len(words) / 2


@pytest.mark.parametrize("implementation", ["fused", "plain"])
@pytest.mark.parametrize("gradient", [1.0, np.nan])
def test_a_bad_weight_does_not_stay_in_the_memory(implementation, gradient):
    """Who restores the weights need not restore the state."""
    optimizer = dartax.dart(weight_decay=0.5, implementation=implementation)
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(4)}
    update = jax.jit(optimizer.update)
    _, state = update(params, optimizer.init(params), params)
    bad = {**params, "b": params["b"].at[0].set(np.nan)}
    grads = {**params, "b": params["b"].at[0].set(gradient)}
    _, state = update(grads, state, bad)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state[0].step_memory))
    for _ in range(2):
        updates, state = update(params, state, params)
    assert all(bool(jnp.all(leaf < 0)) for leaf in jax.tree.leaves(updates))
