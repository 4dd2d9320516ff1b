"""Rates of channels and elements: the distribution of their draws, what they learn, and that no value is left out."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import dartax
from dartax.contrib import _shares

PARAMS = {"kernel": jnp.full((6, 4), 0.5), "bias": jnp.zeros(4), "scale": jnp.ones(())}
SHAPES = {
    "channel": {"kernel": (1, 4), "bias": (4,), "scale": ()},
    "element": {"kernel": (6, 4), "bias": (4,), "scale": ()},
}


def shares(state):
    return optax.tree.get(state, "shares", filtering=lambda path, value: isinstance(value, tuple))


def gradients(steps, params=PARAMS):
    for seed in range(steps):
        yield optax.tree.random_like(jax.random.key(seed), params)


jitted = functools.cache(lambda optimizer: jax.jit(optimizer.update))


def run(optimizer, steps, params=PARAMS):
    state, update = optimizer.init(params), jitted(optimizer)
    for gradient in gradients(steps, params):
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state, updates


@pytest.mark.parametrize("blocks", ["channel", "element"])
def test_accessors_report_what_was_used(blocks):
    optimizer = dartax.scale_by_dart(optax.identity(), blocks=blocks, init_rate=1e-3)
    _, state, updates = run(optimizer, 5)
    rates = dartax.learning_rates(state, PARAMS)
    assert jax.tree.map(jnp.shape, rates) == SHAPES[blocks]
    *_, gradient = gradients(5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5),
        updates,
        jax.tree.map(jnp.multiply, rates, gradient),
    )
    # The mean over a tensor is its own rate, which the metrics report.
    metrics = dartax.metrics(state, PARAMS)
    for name, leaf in rates.items():
        np.testing.assert_allclose(jnp.mean(leaf), metrics[f"dart/rate/{name}"], rtol=1e-5)
    expected = dartax.expected_learning_rates(state, PARAMS)
    assert jax.tree.map(jnp.shape, expected) == SHAPES[blocks]
    assert metrics["dart/factor_std/scale"] == 0
    assert metrics["dart/factor_std/kernel"] > 0


def test_the_first_draws_have_the_law_of_the_dirichlet():
    params = {"kernel": jnp.zeros((200, 300))}
    optimizer = dartax.dart(blocks="element", concentration=3.0)
    _, state, _ = run(optimizer, 2, params)
    (factor,) = jax.tree.leaves(shares(state).within_factor)
    part = _shares.Slice.of((200, 300))
    drawn = np.sort(np.asarray(factor.T[: part.length].ravel()) / part.size)
    assert part.axis == 1
    # Of a slice the shares sum to its mean; one of them has a beta law.
    share = drawn / (part.num_values / part.size)
    law = stats.beta(3.0, 3.0 * (part.num_values - 1))
    assert stats.kstest(share, law.cdf).pvalue > 1e-3
    variance = _shares.factor_variances(state[0].inner_state)[0]
    np.testing.assert_allclose(np.var(factor[:, : part.length]), variance[0, 0], rtol=0.2)


@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (3000,), (70, 900), (900, 70), (3, 3, 40, 30), (0,), (4, 0)]
)
def test_slices_cover_every_value_once_a_round(shape):
    part = _shares.Slice.of(shape)
    values = jnp.zeros(shape)
    for count in range(part.turns):
        before = int(jnp.sum(values))
        values = part.put(values, jnp.ones(part.num_values), jnp.asarray(count))
        assert part.take(values, jnp.asarray(count)).shape == (part.num_values,)
        assert int(jnp.sum(values)) > before or part.size == 0
    assert jnp.all(values == 1)
    assert values.shape == shape
    assert part.num_values <= max(2 * 1024, -(-part.size // 16))


def test_a_turn_renews_one_slice_and_leaves_the_rest(monkeypatch):
    monkeypatch.setattr(_shares, "MIN_SLICE", 4)
    monkeypatch.setattr(_shares, "SLICES", 3)
    optimizer = dartax.dart(blocks="element")
    params = {"kernel": jnp.full((6, 4), 0.5)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for number, gradient in enumerate(gradients(5, params)):
        before = shares(state).within_factor["kernel"]
        _, state = update(gradient, state, params)
        after = shares(state).within_factor["kernel"]
        changed = np.flatnonzero(np.any(after != before, axis=1))
        assert changed.tolist() == [2 * (number % 3), 2 * (number % 3) + 1]
        np.testing.assert_allclose(jnp.mean(after[changed]), 1.0, rtol=0.1)


def test_learning_follows_the_formula():
    rng = np.random.default_rng(0)
    n = 7
    alpha, nu = rng.uniform(1, 20, n), rng.uniform(0.1, 1, n)
    mu, derivative, h = rng.normal(size=n), rng.uniform(0.1, 1, n), rng.normal(size=n)
    nu[2] = h[2] = mu[2] = 0.0  # no gradient yet: it does not move
    old = _shares.Shares(*map(jnp.float32, (alpha, mu, nu, np.ones(n), derivative)))
    new = _shares.learn_and_draw(jax.random.key(0), old, jnp.float32(h), 1.5, 0.01, 1.1)
    G = derivative * h
    m, v = 0.9 * mu + 0.1 * G, 0.99 * nu + 0.01 * G**2
    s = np.divide(1.5 * m, np.sqrt(v), out=np.zeros(n), where=v > 0)
    np.testing.assert_allclose(new.within_mu, m, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(new.within_nu, v, rtol=1e-5)
    expected = 1.1 * alpha * np.exp(-0.01 * np.clip(s, -1, 1))
    np.testing.assert_allclose(new.within_concentration, expected, rtol=1e-5)


def test_elements_of_one_tensor_learn_apart():
    """Plain gradients, steep in one element and flat in the other, whose roles are not symmetric."""
    curvature = jnp.asarray([1.0, 30.0, 1.0])

    def loss(blocks):
        optimizer = dartax.dart(
            optax.linear_schedule(1.0, 0.0, 300), inner=optax.identity(), blocks=blocks
        )
        params = jnp.ones(3)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(curvature * params, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=300)
        return jnp.sum(curvature * params**2), dartax.expected_learning_rates(state, params)

    tensor, _ = jax.jit(functools.partial(loss, "tensor"))()
    element, rates = jax.jit(functools.partial(loss, "element"))()
    assert element < 0.7 * tensor
    assert shares_of(rates)[1] < min(shares_of(rates)[0], shares_of(rates)[2])


def shares_of(rates):
    return np.asarray(rates).ravel()


def test_a_skipped_step_leaves_the_shares():
    optimizer = dartax.dart(blocks="element")
    _, state, _ = run(optimizer, 3)
    poisoned = jax.tree.map(lambda p: p * jnp.nan, PARAMS)
    updates, after = jitted(optimizer)(poisoned, state, PARAMS)
    chex.assert_trees_all_equal(shares(after), shares(state))
    assert after[0].inner_state.allocation_count == state[0].inner_state.allocation_count
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates))


@pytest.mark.slow
@pytest.mark.usefixtures("all_measured")
def test_any_inner_transform_is_shared_out():
    """Around optax's own Adam, whose last direction has to be kept, all is as around ours."""
    make = functools.partial(dartax.dart, blocks="channel", weight_decay=0.1, init_rate=1e-3)
    ours, theirs = (run(make(inner=i), 6)[0] for i in (None, optax.scale_by_adam(b2=0.99)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), ours, theirs)


def test_concentrations_stay_in_their_range_and_keep_their_mean():
    optimizer = dartax.dart(blocks="element", concentration=5.0)
    params = {"w": jnp.ones(40)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(200):
        gradient = {"w": jnp.where(jnp.arange(40) < 3, 1.0, (-1.0) ** step)}
        _, state = update(gradient, state, params)
    concentration = shares(state).within_concentration["w"]
    assert jnp.all((concentration >= 5.0 / 100) & (concentration <= 5.0 * 100))
    np.testing.assert_allclose(jnp.mean(concentration), 5.0, rtol=0.05)
    assert jnp.mean(concentration[:3]) > 1.5 * jnp.mean(concentration[3:])
