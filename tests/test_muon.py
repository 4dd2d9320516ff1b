"""Muon's directions against singular values, optax, and as the inner transform of DART."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax.inner._muon import orthogonalize

PARAMS = {"wide": jnp.ones((6, 20)), "tall": jnp.ones((30, 4)), "bias": jnp.zeros(5)}


def gradients(number, scale=1.0):
    key = jax.random.key(0)
    for step in range(number):
        key_of = jax.random.fold_in(key, step)
        yield jax.tree.map(lambda p, k=key_of: scale * jax.random.normal(k, p.shape), PARAMS)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (5, 5), (3, 7, 4)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_singular_values_come_near_one(shape, scale):
    matrix = scale * jax.random.normal(jax.random.key(1), shape)
    found = orthogonalize(matrix)
    assert found.shape == shape
    u, values, vt = np.linalg.svd(found, full_matrices=False)
    assert np.all((values > 0.6) & (values < 1.3))
    # The factors are those of the matrix, whatever their order.
    u, _, vt = np.linalg.svd(np.asarray(matrix, float), full_matrices=False)
    cosine = np.sum(found * (u @ vt)) / np.linalg.norm(found) / np.linalg.norm(u @ vt)
    assert cosine > 0.97


def test_a_matrix_of_zeros_has_no_direction():
    for shape in ((3, 4), (0, 4)):
        np.testing.assert_array_equal(orthogonalize(jnp.zeros(shape)), np.zeros(shape))


@pytest.mark.slow
def test_directions_are_those_of_optax():
    dims = jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), PARAMS)
    names = ("wide", "tall")
    theirs = optax.contrib.scale_by_muon(
        beta=0.95, weight_dimension_numbers={name: dims[name] for name in names}
    )
    ours = dartax.inner.muon()
    state = ours.init(PARAMS)
    their_state = theirs.init({name: PARAMS[name] for name in names})
    for gradient in gradients(60):
        found, state = ours.update(gradient, state, PARAMS)
        expected, their_state = theirs.update({n: gradient[n] for n in names}, their_state)
    for name in names:
        scaled = 0.2 * max(PARAMS[name].shape) ** 0.5 * expected[name]
        # (The first moment of optax is corrected for its start, which changes their ratio.)
        np.testing.assert_allclose(found[name], scaled, atol=0.05)
        rms = float(jnp.sqrt(jnp.mean(found[name] ** 2)))
        assert 0.12 < rms < 0.25  # as Adam's
    adam = dartax.inner.adam()
    state = adam.init(PARAMS["bias"])
    for gradient in gradients(60):
        expected, state = adam.update(gradient["bias"], state)
    np.testing.assert_allclose(found["bias"], expected, rtol=1e-6)


def test_which_parameters_are_matrices():
    chosen = {"wide": False, "tall": True, "bias": False}
    for matrices in (chosen, lambda params: chosen):
        inner = dartax.inner.muon(matrices=matrices)
        state = inner.init(PARAMS)
        muon, adam = (state.inner_states[name].inner_state for name in ("muon", "adam"))
        assert [leaf.shape for leaf in jax.tree.leaves(muon)] == [(30, 4)]
        assert sorted(leaf.shape for leaf in jax.tree.leaves(adam.mu)) == [(5,), (6, 20)]
    with pytest.raises(ValueError, match=r"matrices must choose .* got shape \(5,\)"):
        dartax.inner.muon(matrices={**chosen, "bias": True}).init(PARAMS)
    with pytest.raises(ValueError, match="matrices must give a tree with the structure of params"):
        dartax.inner.muon(matrices=lambda params: None).init(PARAMS)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"momentum": 1.0}, ValueError, r"momentum must be a number in \[0, 1\), got 1.0"),
        ({"steps": 0}, ValueError, "steps must be a positive integer, got 0"),
        ({"steps": 2.5}, ValueError, "steps must be a positive integer, got 2.5"),
        ({"eps": 0.0}, ValueError, "eps must be a number of at least 1.18e-38, got 0.0"),
        ({"matrices": {"a": 1}}, TypeError, "matrices must be a tree of bools"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=match):
        dartax.inner.muon(**options)


def test_a_whole_muon_optimizer_is_refused():
    with pytest.raises(ValueError, match="inner must keep the sign of the gradient"):
        dartax.dart(inner=optax.contrib.muon(1e-3)).init(PARAMS)


def train(optimizer, steps=300):
    """Fits a small network; returns its loss before and after, and the state."""
    keys = jax.random.split(jax.random.key(2), 4)
    x = jax.random.normal(keys[0], (128, 8))
    y = jnp.sin(x @ jax.random.normal(keys[1], (8, 3)))
    params = {
        "first": jax.random.normal(keys[2], (8, 32)) / 8**0.5,
        "bias": jnp.zeros(32),
        "second": jax.random.normal(keys[3], (32, 3)) / 32**0.5,
    }

    def loss(p):
        return jnp.mean((jnp.tanh(x @ p["first"] + p["bias"][None]) @ p["second"] - y) ** 2)

    @jax.jit
    def run(params):
        def step(carry, t):
            params, state = carry
            # Every 50th gradient is bad.
            fault = jnp.where(t % 50 == 49, jnp.nan, 0.0)
            grads = jax.tree.map(lambda g: g + fault, jax.grad(loss)(params))
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
        return carry

    after, state = run(params)
    return float(loss(params)), float(loss(after)), state


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "options", [{}, {"implementation": "plain"}, {"blocks": "channel"}], ids=str
)
def test_dart_learns_the_rates_of_both(options):
    make = functools.partial(dartax.dart, optax.linear_schedule(1.0, 0.0, 300), **options)
    before, after, state = train(make(inner=dartax.inner.muon()))
    assert after < 0.03 * before
    assert optax.tree.get(state, "skipped") == 6
    rates = optax.tree.get(state, "concentration")[:-1] / jnp.sum(
        optax.tree.get(state, "concentration")
    )
    assert np.all(rates > 1e-3)


def test_fused_is_plain():
    make = functools.partial(
        dartax.dart, inner=dartax.inner.muon(), weight_decay=0.1, init_rate=1e-3
    )
    fused, plain = (
        train(make(implementation=implementation), steps=60)[1]
        for implementation in ("fused", "plain")
    )
    assert fused == pytest.approx(plain, rel=1e-4)
