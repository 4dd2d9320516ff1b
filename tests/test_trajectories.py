"""Both optimizers against the slow references, step by step, on shared draws."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import dartax
from dartax import _schedule, random
from dartax._fused import _sample

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

STEPS = 50
SHAPES = {"a": (3,), "b": (2, 2), "c": (4,)}
CURVATURE = {"a": 0.05, "b": 1.0, "c": 4.0}


def problem(seed=0, shapes=SHAPES):
    """Noisy gradients of an asymmetric quadratic, as functions of the parameters."""
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(1.0, 0.5, shape) for name, shape in shapes.items()}
    noise = [
        {name: 0.3 * rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(STEPS)
    ]
    gradients = [
        lambda p, n=n: {name: CURVATURE[name] * p[name] + n[name] for name in SHAPES} for n in noise
    ]
    return params, noise, gradients


def shared_draws(key):
    """The draws of the transform, for the concentrations of the reference."""

    def draw(t, concentration):
        step_key = jax.random.fold_in(random.threefry_key(key), t)
        concentration = jnp.asarray(concentration, jnp.float32)
        return np.asarray(random.loggamma(step_key, concentration, method="fast"), float)

    return draw


def dartax_trajectory(optimizer, params, noise):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, n):
        grads = {name: CURVATURE[name] * params[name] + n[name] for name in params}
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for n in noise:
        params, state = step(params, state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), n))
        found = optax.tree.get(state, "concentration"), optax.tree.get(state, "last_rates")
        yield params, *found


def assert_equal_trajectories(got, expected):
    moved = 0.0
    first = None
    for (p, a, r), (p_ref, a_ref, r_ref) in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, a_ref, rtol=1e-3)
        np.testing.assert_allclose(r, r_ref, rtol=1e-3)
        for name in SHAPES:
            np.testing.assert_allclose(p[name], p_ref[name], rtol=1e-3, atol=1e-4)
        first = a_ref if first is None else first
        moved = np.max(np.abs(a_ref / first - 1))
    assert moved > 0.05, "the concentrations have to move for this test to mean anything"


@pytest.mark.parametrize(
    "options",
    [
        {"eta": 0.05},
        {
            "eta": 0.05,
            "concentration": 2.0,
            "b1": 0.8,
            "b2": 0.95,
            "min_rate": 0.01,
            "rate_budget": 0.3,
        },
        {"eta": 0.05, "weight_decay": 0.1},
    ],
)
def test_paper_dart_follows_the_reference(options):
    params, noise, gradients = problem()
    got = dartax_trajectory(dartax.paper_dart(key=5, **options), params, noise)
    expected = reference.paper_dart(params, gradients, reference.sgd(), shared_draws(5), **options)
    assert_equal_trajectories(got, expected)


def test_paper_dart_with_adam_directions_follows_the_reference():
    from dartax._paper_dart import paper_rule
    from dartax._transform import scale_by_dirichlet

    params, noise, gradients = problem(1)
    transform = scale_by_dirichlet(
        paper_rule(1.0, 0.1 - 1e-6, 0.05, 0.9, 0.999, 1e-8),
        optax.scale_by_adam(),
        learning_rate=1.0,
        min_rate=1e-6,
        rate_budget=0.1,
        memory_decay=0.0,
        memory_dtype="float32",
        whole_memory=True,
        labels=None,
        key=2,
        implementation="fused",
    )
    got = dartax_trajectory(optax.chain(transform, optax.scale(-1.0)), params, noise)
    expected = reference.paper_dart(params, gradients, reference.adam(), shared_draws(2), eta=0.05)
    assert_equal_trajectories(got, expected)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("direction", ["adam", "sgd", "sign"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"memory_decay": 0.0, "init_rate": 1e-3},
        {"memory_decay": 0.9, "init_rate": 0.1},  # high enough for rates that part and retreat
        {"weight_decay": 0.1, "min_rate": 1e-4, "rate_budget": 0.5, "init_rate": 1e-2},
        {"averaged": True},
    ],
)
def test_dart_follows_the_reference(direction, options):
    inner, directions, white_noise = {
        "adam": (None, reference.adam(beta2=0.99), (1.0, 0.9, 0.1 / 1.9)),
        "sgd": (optax.identity(), reference.sgd(), (0.0, 0.0, 0.0)),
        "sign": (optax.scale_by_sign(), reference.sign(), (0.0, 0.0, 0.0)),
    }[direction]
    params, noise, gradients = problem(2)
    decay = lambda t: max(1.0 - t / 60.0, 0.0)  # noqa: E731
    optimizer = dartax.dart(
        optax.linear_schedule(1.0, 0.0, 60),
        inner=inner,
        key=9,
        memory_dtype="float32",
        **options,
    )
    got = dartax_trajectory(optimizer, params, noise)
    expected = reference.dart(
        params,
        gradients,
        directions,
        shared_draws(9),
        multiplier=decay,
        schedule_steps=float(_schedule.ending(optax.linear_schedule(1.0, 0.0, 60)).steps),
        white_noise=white_noise,
        **options,
    )
    expected = list(expected)
    assert_equal_trajectories(got, expected)
    if options.get("init_rate") == 0.1:
        blocks = expected[-1][1][:-1]
        assert max(blocks) > 1.2 * min(blocks)


@pytest.mark.parametrize("averaged", [False, True])
def test_shared_blocks_follow_the_reference(averaged):
    params, noise, gradients = problem(3)
    optimizer = dartax.dart(
        blocks={"a": "outer", "b": "inner", "c": "outer"},
        init_rate=1e-3,
        averaged=averaged,
        memory_dtype="float32",
    )
    got = list(dartax_trajectory(optimizer, params, noise))
    follows = functools.partial(
        reference.dart,
        params,
        gradients,
        reference.adam(beta2=0.99),
        shared_draws(0),
        init_rate=1e-3,
        labels={"a": 0, "b": 1, "c": 0},
    )
    assert_equal_trajectories(got, follows(averaged=averaged))
    with pytest.raises(AssertionError, match="Not equal"):
        assert_equal_trajectories(got, follows(averaged=not averaged))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("options", "inner"),
    [
        ({}, optax.scale_by_adam(b2=0.99)),
        ({"weight_decay": 0.1, "init_rate": 1e-2}, None),
        slow({"memory_decay": 0.0, "init_rate": 0.1}, None),
        slow({"weight_decay": 0.1, "init_rate": 1e-2}, optax.scale_by_adam(b2=0.99)),
    ],
)
def test_thin_memory_follows_the_reference(options, inner, monkeypatch):
    monkeypatch.setattr(_sample, "MIN_SAMPLE", 8)
    monkeypatch.setattr(_sample, "MAX_SOURCES", 2)
    params, noise, gradients = problem(5, {"a": (3,), "b": (64, 48), "c": (100,)})
    optimizer = dartax.dart(inner=inner, memory_dtype="float32", **options)
    got = dartax_trajectory(optimizer, params, noise)
    # Of 64 rows every fourth, which 16 columns in turn have from two rows later. Of a vector, in 4
    # parts of 25, every twelfth number.
    row, column = np.indices((64, 48))
    expected = reference.dart(
        params,
        gradients,
        reference.adam(beta2=0.99),
        shared_draws(0),
        sample={
            "b": row % 4 == 2 * (column // 16 % 2),
            "c": np.isin(np.arange(100), np.arange(0, 96, 12)),
        },
        white_noise=tuple(map(np.asarray, optimizer.init(params)[0].walk.white_noise)),
        **options,
    )
    expected = list(expected)
    assert_equal_trajectories(got, expected)
    monkeypatch.setattr(_sample, "MIN_SAMPLE", math.inf)
    whole = dartax.dart(inner=inner, memory_dtype="float32", **options)
    with pytest.raises(AssertionError, match="Not equal"):
        assert_equal_trajectories(dartax_trajectory(whole, params, noise), expected)


def test_bfloat16_memory_stays_near_float32():
    params, noise, _ = problem(4)
    exact, rounded = (
        list(dartax_trajectory(dartax.dart(init_rate=0.1, memory_dtype=d), params, noise))
        for d in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(rounded[-1][1], exact[-1][1], rtol=0.05)
    assert np.any(rounded[-1][1] != exact[-1][1])
