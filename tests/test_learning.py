"""What the concentrations learn, on noisy quadratics with a flat and a steep direction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax

CURVATURE = {"flat": 0.05, "steep": 4.0}
# The flat direction starts far from its minimum; the steep one is at its noise floor, where
# a smaller rate is better.
START = {"flat": 10.0, "steep": 0.1}
DIM = 10


def loss_fn(params):
    return sum(0.5 * c * jnp.sum(params[name] ** 2) for name, c in CURVATURE.items())


@functools.partial(jax.jit, static_argnames=("make", "steps", "noise", "sign"))
def run(keys, *, make, steps, noise, sign=1.0):
    """Final loss and concentrations for every key, with the hypergradient times ``sign``."""

    def one(key):
        optimizer = make(key)
        params = {name: jnp.full(DIM, value) for name, value in START.items()}

        def step(carry, t):
            params, state = carry
            grads = jax.grad(loss_fn)(params)
            step_key = jax.random.fold_in(jax.random.fold_in(key, 1), t)
            grads = {
                name: g + noise * jax.random.normal(jax.random.fold_in(step_key, i), (DIM,))
                for i, (name, g) in enumerate(sorted(grads.items()))
            }
            seen = jax.tree.map(lambda g: sign * g, grads)
            updates, state = optimizer.update(grads, state, params, grad=seen)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
        return loss_fn(params), dartax.concentrations(state, params)

    return jax.vmap(one)(keys)


KEYS = jax.random.split(jax.random.key(0), 32)


def paper(key, eta=0.05, **options):
    return dartax.paper_dart(eta=eta, key=key, **options)


def test_descending_helps_and_the_published_ascent_hurts():
    run_paper = functools.partial(run, KEYS, steps=500, noise=1.0)
    descent, _ = run_paper(make=paper)
    ascent, _ = run_paper(make=paper, sign=-1.0)
    frozen, _ = run_paper(make=functools.partial(paper, eta=0.0))
    for worse, better in ((frozen, descent), (ascent, frozen)):
        gap = np.asarray(worse - better)  # paired: the keys are the same
        assert gap.mean() > 5 * gap.std() / np.sqrt(len(gap))


def test_paper_dart_gives_the_flat_tensor_the_larger_concentration():
    _, concentration = run(KEYS, make=paper, steps=500, noise=1.0)
    ratio = np.log(concentration["flat"] / concentration["steep"])
    assert ratio.mean() > 5 * ratio.std() / np.sqrt(len(ratio))
    assert np.mean(ratio > 0) > 0.9
    _, frozen = run(KEYS, make=functools.partial(paper, eta=0.0), steps=500, noise=1.0)
    np.testing.assert_array_equal(frozen["flat"], 1.0)


def dart_sgd(key, init_rate=1e-5):
    return dartax.dart(inner=optax.identity(), init_rate=init_rate, key=key)


START_LOSS = float(loss_fn({name: jnp.full(DIM, value) for name, value in START.items()}))


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_dart_finds_a_rate_from_far_below(noise):
    loss, _ = run(KEYS, make=dart_sgd, steps=500, noise=noise)
    assert np.all(loss < 0.3 * START_LOSS)


def test_dart_retreats_from_a_rate_that_diverges():
    # The rates of gradient descent on the steep direction must stay below 2 / 4.
    too_high = functools.partial(dart_sgd, init_rate=0.4)
    fixed = functools.partial(paper, eta=0.0, min_rate=0.79, rate_budget=0.8)
    loss, _ = run(KEYS, make=fixed, steps=500, noise=0.3)
    assert not np.any(loss < START_LOSS)
    loss, _ = run(KEYS, make=too_high, steps=500, noise=0.3)
    assert np.all(loss < 0.3 * START_LOSS)


def test_dart_moves_budget_to_the_flat_tensor():
    _, concentration = run(KEYS, make=dart_sgd, steps=500, noise=1.0)
    ratio = np.log(concentration["flat"] / concentration["steep"])
    assert ratio.mean() > 5 * ratio.std() / np.sqrt(len(ratio))


@pytest.mark.parametrize("seed", [2, 3])
def test_weight_decay_drives_no_rate_to_the_budget(seed):
    """Where decay and gradient balance, longer steps would change nothing, and no rate grows."""
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (256, 8))
    y = jnp.sin(x @ jax.random.normal(keys[1], (8, 1)))
    params = {
        "first": {"w": jax.random.normal(keys[2], (8, 32)) / 3, "b": jnp.zeros(32)},
        "last": {"w": jax.random.normal(keys[3], (32, 1)) / 6, "b": jnp.zeros(1)},
    }

    def loss(params, x, y):
        hidden = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"][None])
        return jnp.mean((hidden @ params["last"]["w"] + params["last"]["b"][None] - y) ** 2)

    optimizer = dartax.dart(weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))

    def step(carry, key):
        params, state = carry
        chosen = jax.random.randint(key, (32,), 0, len(x))
        updates, state = optimizer.update(
            jax.grad(loss)(params, x[chosen], y[chosen]), state, params
        )
        params = optax.apply_updates(params, updates)
        return (params, state), dartax.metrics(state, params)["dart/expected_rate/first/w"]

    batches = jax.random.split(keys[4], 1000)
    (params, _), rates = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    assert jnp.max(rates) < 0.2
    assert loss(params, x, y) < 0.1


@pytest.mark.parametrize("inner", ["adam", "momentum"])
@pytest.mark.parametrize("period", [1, 7])
def test_a_block_without_gradients_is_not_moved_by_the_others(inner, period):
    """It has gradients in the first 60 updates, or in every seventh; the others always have."""
    optimizer = dartax.dart(inner=getattr(dartax.inner, inner)())
    params = {"often": 0.3 * jnp.ones((4, 8)), "seldom": 0.3 * jnp.ones((4, 8))}

    def step(carry, t):
        params, state = carry
        target = {"often": 3 * jnp.sin(t / 100), "seldom": 1.0}
        has = (t < 60) if period == 1 else t % period == 0
        grads = jax.tree.map(lambda p, goal: p - goal, params, target)
        grads["seldom"] = jnp.where(has, grads["seldom"], 0.0)
        updates, state = optimizer.update(grads, state, params)
        found = {"h": state[0].hypergradient[1], "change": state[0].moments.hyper_change[1]}
        return (optax.apply_updates(params, updates), state), (has, found)

    start = (params, optimizer.init(params))
    (_, state), (has, found) = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(400)))(start)
    np.testing.assert_array_equal(found["h"][1:] != 0, has[1:])
    np.testing.assert_array_equal(found["change"][~has], 0.0)
    assert np.mean(found["change"][has] != 0) > 0.8
    assert optax.tree.get(state, "hyper_count").tolist() == [399, int(np.sum(has[1:]))]


def test_momentum_survives_a_curvature_that_rises_in_mid_run():
    # After 3,000 steps rates fall slowly, as 1 / t. A surprise divides them at once: without it
    # the loss would rise to 49 here.
    root = jnp.logspace(-1, 0, 50)[:, None] * jax.random.orthogonal(jax.random.key(1), 50)
    optimizer = dartax.dart(inner=dartax.inner.momentum(), key=1)
    params = {"b": jnp.ones(10), "w": jnp.ones((5, 10))}

    def step(carry, t):
        params, state = carry

        def loss_fn(params):
            flat = jnp.sum((root @ params["w"].ravel()) ** 2)
            steep = jnp.sum(params["w"][0] ** 2) + jnp.sum(params["b"] ** 2)
            return 0.5 * flat + jnp.where(t < 3000, 0.5, 50.0) * steep

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(4000))[1])
    loss = np.asarray(run((params, optimizer.init(params))))
    assert loss[2999] < 1e-12
    assert loss[3000:].max() < 1e-6


@pytest.mark.parametrize(
    "inner", [optax.identity(), dartax.inner.momentum()], ids=["sgd", "momentum"]
)
@pytest.mark.parametrize(
    ("curvature", "noise", "schedule", "most"),
    [
        # A tuned rate gives 0.33 here, and rates that do not fall on noise 1.8.
        (np.logspace(-3, 0, 100), 1.0, 1.0, 0.7),
        # Where gradients shrink with the loss, nothing is noise. Rates that fell would leave 0.3.
        (np.array([0.05, 1.0, 20.0]), 0.0, optax.linear_schedule(1.0, 0.0, 500), 3e-3),
    ],
    ids=["noise", "no noise"],
)
def test_gradients_that_keep_their_size_are_noise(inner, curvature, noise, schedule, most):
    def train(key):
        optimizer = dartax.dart(schedule, inner=inner, key=key)
        params = jnp.ones(len(curvature))

        def step(carry, key):
            params, state = carry
            grads = curvature * params + noise * jax.random.normal(key, params.shape)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        steps = 2000 if noise else 500
        keys = jax.random.split(key, steps)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return 0.5 * jnp.sum(curvature * params**2)

    assert jnp.mean(jax.jit(jax.vmap(train))(KEYS[:8])) < most


def test_a_model_that_starts_at_zero_learns_from_gradients_that_are_mostly_noise():
    # The signal is a thirtieth of the noise: rates that fell from the start would leave 1.
    target = jax.random.normal(jax.random.key(7), (50,))

    def train(key):
        optimizer = dartax.dart(optax.linear_schedule(1.0, 0.0, 4000), key=key)
        params = jnp.zeros(50)

        def step(carry, key):
            params, state = carry
            grads = params - target + 30.0 * jax.random.normal(key, params.shape)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, 4000)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return jnp.sum((params - target) ** 2) / jnp.sum(target**2)

    assert jnp.mean(jax.jit(jax.vmap(train))(KEYS[:8])) < 0.8


def test_a_block_that_asks_for_more_than_the_budget_does_not_starve_the_others():
    params = {"greedy": jnp.zeros(50), "noisy": jnp.ones(50)}
    optimizer = dartax.dart(optax.linear_schedule(1.0, 0.0, 1500))

    def step(carry, key):
        params, state = carry
        noise = jax.random.normal(key, (50,))
        gradient = {"greedy": jnp.full(50, -1.0), "noisy": params["noisy"] + noise}
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimizer.init(params))
    (_, state), _ = jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 400))
    rates = dartax.expected_learning_rates(state, params)
    assert rates["greedy"] > 0.5  # the multiplier is at 0.73
    assert rates["noisy"] > 3e-5  # 1e-6 if the growth of the other were not limited
