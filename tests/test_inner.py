"""The directions of dartax.inner are optax's, and dart around either is the same."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax import _guarded

PARAMS = {"kernel": jnp.full((3, 2), 0.5), "bias": jnp.zeros(2)}


def gradients(steps, dtype=jnp.float32):
    for seed in range(steps):
        yield optax.tree.random_like(jax.random.key(seed), PARAMS, dtype=dtype)


def assert_close(got, expected, rtol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=1e-7
        ),
        got,
        expected,
    )


PAIRS = {
    "adam": (dartax.inner.adam(), optax.scale_by_adam(b2=0.99)),
    "momentum": (dartax.inner.momentum(), optax.trace(0.9)),
    "lion": (dartax.inner.lion(), optax.scale_by_lion()),
}
every_pair = pytest.mark.parametrize("name", PAIRS)


def averages(state):
    """The leaves of a state that the guarded transform and that of optax have in common."""
    return jax.tree.leaves([optax.tree.get(state, name, {}) for name in ("mu", "nu", "trace")])


@every_pair
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_directions_are_those_of_optax(name, dtype, rtol, weight_decay):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    mask = {"kernel": True, "bias": False}
    guarded, plain = (
        _guarded.with_decayed_weights(inner, weight_decay, mask) for inner in PAIRS[name]
    )
    assert isinstance(guarded, _guarded.Guarded)
    assert not isinstance(plain, _guarded.Guarded)
    state, expected_state = guarded.init(params), plain.init(params)
    for gradient in gradients(5, dtype):
        updates, state = guarded.update(gradient, state, params)
        expected, expected_state = plain.update(gradient, expected_state, params)
        chex.assert_trees_all_equal_dtypes(updates, expected)
        assert_close(updates, expected, rtol)
        assert_close(guarded.again(state, params, lambda tree: tree), updates, rtol)
        assert_close(averages(state), averages(expected_state), rtol)
    assert averages(state)


@every_pair
def test_a_skipped_update_leaves_the_state(name):
    guarded, _ = PAIRS[name]
    (first,) = gradients(1)
    _, state = guarded.update(first, guarded.init(PARAMS))
    poisoned = jax.tree.map(lambda g: g * jnp.nan, first)
    for before in (state, guarded.init(PARAMS)):  # the very first finds nothing to correct
        direction, after = guarded.update(poisoned, before, finite=jnp.asarray(False))
        chex.assert_trees_all_equal(after, before)
        chex.assert_tree_all_finite(direction)


@every_pair
def test_an_element_whose_square_overflows_stays_out(name):
    guarded, _ = PAIRS[name]
    first, second = gradients(2)
    _, state = guarded.update(first, guarded.init(PARAMS))
    second["bias"] = second["bias"].at[0].set(1e30)
    direction, after = guarded.update(second, state)
    chex.assert_tree_all_finite((direction, after))
    for old, new in zip(averages(state), averages(after), strict=True):
        changed = np.asarray(old != new)
        assert changed.ravel()[1:].all()
        assert changed.ravel()[0] == (old.ndim == 2)


@every_pair
def test_what_stays_out_is_no_choice_of_what_is_stored(name):
    """That would be a masked store, which takes twice as long on processors of AMD."""
    guarded, params = PAIRS[name][0], {"w": jnp.ones((300, 200))}
    state = guarded.init(params)
    update = jax.jit(lambda g, s, f: guarded.update(g, s, finite=f)[1], donate_argnums=1)
    with jax.default_device(jax.devices("cpu")[0]):
        compiled = update.lower(params, state, jnp.bool_(True)).compile().as_text()
    roots = re.findall(r"ROOT \S+ = f32\[300,200\]\S* ([a-z]+)\(", compiled)
    assert "add" in roots
    assert "select" not in roots


@every_pair
def test_directions_fit_into_float16(name):
    guarded, _ = PAIRS[name]
    params = {"w": jnp.ones(3, jnp.float16)}
    state = guarded.init(params)
    for _ in range(20):
        direction, state = guarded.update({"w": jnp.full(3, 6e4, jnp.float16)}, state, params)
        assert direction["w"].dtype == jnp.float16
        chex.assert_tree_all_finite((direction, state))


@every_pair
def test_a_step_copies_nothing_as_large_as_the_parameters(name):
    """What is donated is overwritten in place, and the old state is read before."""
    optimizer, params = dartax.dart(inner=PAIRS[name][0]), {"w": jnp.ones((300, 200))}
    state = optimizer.init(params)

    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    copies = re.findall(r"\S+\[300,200\]\S* copy\(", lowered.compile().as_text())
    assert not copies


@pytest.mark.parametrize("inner", [PAIRS[name][0] for name in PAIRS], ids=PAIRS)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"memory_decay": 0.0}], ids=str)
def test_leaves_of_one_shape_are_traced_once(inner, options):
    """The text of a program grows by some calls for every leaf, not by what they compute."""
    optimizer = dartax.dart(inner=inner, **options)

    def length(leaves):
        params = [jnp.ones((30, 20))] * leaves
        lowered = jax.jit(optimizer.update).lower(params, optimizer.init(params), params)
        return lowered.as_text().count("\n")

    few, more, most = map(length, (10, 20, 40))
    assert more - few <= 10 * (30 if "weight_decay" in options else 15)
    assert most - more <= 2 * (more - few)


@every_pair
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_dart_around_either_is_the_same(name, weight_decay):
    make = functools.partial(dartax.dart, init_rate=1e-3, weight_decay=weight_decay)
    runs = []
    for inner in PAIRS[name]:
        optimizer, params = make(inner=inner), PARAMS
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for step, gradient in enumerate(gradients(12)):
            if step == 7:
                gradient["bias"] = gradient["bias"].at[0].set(jnp.nan)
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        assert dartax.metrics(state)["dart/skipped"] == 1
        runs.append((params, dartax.learning_rates(state, params)))
    assert_close(runs[0], runs[1], 1e-4)


@every_pair
def test_horizon_0_needs_no_memory_of_the_last_step(name):
    """The direction that is given again is the one that a buffer would hold."""
    make = functools.partial(dartax.dart, init_rate=1e-3, memory_decay=0.0, memory_dtype="float32")
    runs = []
    for inner in PAIRS[name]:
        optimizer, params = make(inner=inner), PARAMS
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for step, gradient in enumerate(gradients(12)):
            if step in (0, 7):
                gradient["bias"] = gradient["bias"].at[0].set(jnp.nan)
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        runs.append((params, dartax.learning_rates(state, params), state[0].hypergradient))
        kept = [leaf.size for leaf in jax.tree.leaves(state[0].step_memory)]
        assert kept == ([0, 0] if inner is PAIRS[name][0] else [2, 6])
    assert_close(runs[0], runs[1], 1e-4)
