"""What the docstrings and the README promise, for whatever numbers arrive.

Whatever is fed, of extreme values, NaN and infinities, under hyperparameters anywhere in their
documented ranges:

1. The state and the updates are finite, and keep their structure, shapes and dtypes.
2. Every rate lies in [min_rate, rate_budget], the multiplier apart, and all blocks together spend at
   most rate_budget - min_rate above min_rate.
3. Mean rates lie there too, deviations are at most half the range, metrics are finite, and the
   spent share of the budget lies in [0, 1].
4. Concentrations are at least 1e-4 and at most 1e30 under ``dart``, whose smallest one is
   ``concentration`` (or the largest over 1e6); in [0.1, 10] under ``paper_dart``.
5. ``step`` counts all updates. ``skipped`` counts those with an element that is not finite; of the
   others at most those whose hypergradient, or its square, leaves float32.
6. A skipped update is zero and leaves concentrations and mean rates as they were; its rates are 0.
7. The first mean rate is ``init_rate``.
8. Any tree, of any nesting and sizes, with scalars and leaves of size zero, gets updates like itself.
9. Points of ``dirichlet.sample`` lie on the simplex, variances are at most mean (1 - mean),
   divergences are not negative; gamma draws and their derivatives are finite and positive.
"""

import functools

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax

quick = functools.partial(hypothesis.settings, derandomize=True, deadline=None, database=None)
STEPS = 6
# One tree holds every dtype, rank and size, so that each optimizer compiles once.
PARAMS = {
    "matrix": jnp.full((3, 2), 0.5),
    "nested": [jnp.ones(3, jnp.bfloat16), (jnp.ones((), jnp.float16), jnp.ones((0, 2)))],
    "one": jnp.ones(1),
}
SIZES = [leaf.size for leaf in jax.tree.leaves(PARAMS)]
EXTREMES = [0.0, 1e-45, 1e-30, 1e-8, 1.0, 6e4, 1e10, 1e18, 1.8e19, 2e19, 3e38, np.inf, np.nan]
numbers = st.one_of(
    st.sampled_from([sign * x for x in EXTREMES for sign in (1, -1)]),
    st.floats(-10, 10, width=32),
)


def log_range(low, high):
    return st.floats(np.log(low), np.log(high)).map(np.exp)


@st.composite
def dart_options(draw):
    rate_budget = draw(log_range(1e-6, 1.0))
    init_rate = rate_budget * draw(log_range(1e-12, 0.19))  # below the share of one of five blocks
    return {
        "rate_budget": rate_budget,
        "init_rate": init_rate,
        "min_rate": init_rate * draw(st.sampled_from([0.0, 1e-3, 0.5])),
        "concentration": draw(log_range(1e-3, 1e4)),
        "memory_decay": draw(st.sampled_from([0.0, 0.9, 0.999])),
        "learning_rate": draw(st.sampled_from([0.0, 1e-3, 1.0])),
    }


@st.composite
def paper_options(draw):
    rate_budget = draw(log_range(1e-6, 1.0))
    return {
        "rate_budget": rate_budget,
        "min_rate": rate_budget * draw(log_range(1e-6, 0.9)),
        "concentration": draw(st.floats(0.1, 10.0)),
        "eps": draw(log_range(1e-12, 1.0)),
        "eta": draw(st.sampled_from([0.0, 0.01, 10.0])),
        "learning_rate": draw(st.sampled_from([0.0, 1e-3, 1.0])),
    }


ROWS = {
    "dart": (dartax.dart, dart_options()),
    "dart_sgd": (functools.partial(dartax.dart, inner=optax.identity()), dart_options()),
    "paper_dart": (dartax.paper_dart, paper_options()),
}


def seen(state):
    """What a user sees of a state."""
    return {
        "rates": dartax.learning_rates(state, PARAMS),
        "expected": dartax.expected_learning_rates(state, PARAMS),
        "std": dartax.learning_rate_std(state, PARAMS),
        "concentration": dartax.concentrations(state, PARAMS),
        "metrics": dartax.metrics(state),
    }


@functools.partial(jax.jit, static_argnames="name")
def run(name, options, gradients):
    """The updates, states and all that is seen of them, at every step; and the first state."""
    optimizer = ROWS[name][0](**options)
    leaves, structure = jax.tree.flatten(PARAMS)
    cuts = np.cumsum(SIZES)[:-1]

    def step(state, row):
        pieces = jnp.split(row, cuts)
        grads = [
            piece.reshape(leaf.shape).astype(leaf.dtype)
            for piece, leaf in zip(pieces, leaves, strict=True)
        ]
        fits = jnp.asarray([jnp.all(jnp.isfinite(g)) for g in grads])
        updates, state = optimizer.update(jax.tree.unflatten(structure, grads), state, PARAMS)
        return state, (updates, state, seen(state), jnp.all(fits))

    state = optimizer.init(PARAMS)
    _, steps = jax.lax.scan(step, state, gradients)
    return *steps, seen(state)


def floats(tree):
    return np.stack([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)])


def check(name, options, gradients):
    arrays = {key: np.float32(value) for key, value in options.items()}
    updates, states, after, fits, first = jax.device_get(run(name, arrays, gradients))
    low, high = options["min_rate"], options["rate_budget"]
    factor, spread = options["learning_rate"], high - low
    above, below = 1 + 1e-4, 1 - 1e-4

    # 1. Finite, and shaped like the parameters.
    chex.assert_tree_all_finite((updates, states))
    jax.tree.map(
        lambda u, p: chex.assert_shape(u, (STEPS, *p.shape)) or chex.assert_type(u, p.dtype),
        updates,
        PARAMS,
    )

    # 2. and 3. Rates and means inside their bounds, [blocks, steps].
    metrics = after["metrics"]
    skips = np.diff(metrics["dart/skipped"], prepend=0)
    used = floats(after["rates"])[:, skips == 0]
    mean, std = floats(after["expected"]), floats(after["std"])
    for rates in (used, mean):
        assert np.all(rates >= factor * low * below)
        assert np.all(rates <= factor * high * above)
    assert np.all(np.sum(used - factor * low, axis=0) <= factor * spread * above)
    assert np.all(std >= 0)
    assert np.all(std <= factor * spread / 2 * above)
    assert np.all(metrics["dart/spent"] >= 0)
    assert np.all(metrics["dart/spent"] <= above)
    assert all(np.all(np.isfinite(value)) for value in metrics.values())

    # 4. Concentrations.
    concentration = floats(after["concentration"])
    if name == "paper_dart":
        assert np.all((concentration >= 0.1 * below) & (concentration <= 10 * above))
    else:
        assert np.all((concentration >= 1e-4 * below) & (concentration <= 1e30))
        level = np.maximum(concentration.min(0), concentration.max(0) / 1e6)
        np.testing.assert_allclose(level, options["concentration"], rtol=1e-3)

    # 5. Counters.
    np.testing.assert_array_equal(metrics["dart/step"], np.arange(1, STEPS + 1))
    assert np.all(skips[~fits] == 1)
    if np.max(np.abs(gradients), initial=0.0, where=np.isfinite(gradients)) < 1e8:
        np.testing.assert_array_equal(skips, ~fits)

    # 6. A skipped step is as if it had not been.
    assert all(np.all(leaf[skips == 1] == 0) for leaf in jax.tree.leaves(updates))
    assert np.all(floats(after["rates"])[:, skips == 1] == 0)
    for key in ("concentration", "expected"):
        values = np.concatenate([floats(first[key])[:, None], floats(after[key])], axis=1)
        skipped = np.flatnonzero(skips)
        np.testing.assert_allclose(values[:, skipped + 1], values[:, skipped], rtol=1e-6)

    # 7. The first mean.
    if name != "paper_dart":
        np.testing.assert_allclose(
            floats(first["expected"]), factor * options["init_rate"], rtol=1e-3
        )


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ROWS)
def test_whatever_is_fed(name):
    gradients = hnp.arrays(np.float32, (STEPS, sum(SIZES)), elements=numbers)
    # Mostly one kind of number in a step, as a fault comes.
    rows = st.tuples(gradients, hnp.arrays(np.float32, (STEPS, 1), elements=numbers), st.booleans())
    fed = rows.map(lambda r: np.broadcast_to(r[1], r[0].shape).copy() if r[2] else r[0])

    @quick(max_examples=75)
    @hypothesis.given(ROWS[name][1], fed)
    def holds(options, gradients):
        check(name, options, gradients)

    holds()


shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
leaves = st.tuples(shapes, st.sampled_from(["float32", "bfloat16", "float16"])).map(
    lambda pair: jnp.ones(pair[0], pair[1])
)
trees = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.lists(children, min_size=1, max_size=3),
        st.tuples(children, st.none(), children),
        st.dictionaries(st.sampled_from("abc"), children, min_size=1),
    ),
    max_leaves=6,
)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("make", [dartax.dart, dartax.paper_dart])
def test_any_tree(make):
    def step(params):
        optimizer = make()
        state = optimizer.init(params)
        updates, after = optimizer.update(params, state, params)
        return updates, state, after, dartax.learning_rates(after, params)

    @quick(max_examples=12)
    @hypothesis.given(trees)
    def holds(params):
        updates, state, after, rates = jax.eval_shape(step, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        chex.assert_trees_all_equal_structs(rates, params)

    holds()


@jax.jit
def simplex(seed, concentration):
    log_gamma = dartax.random.loggamma(seed, concentration, method="fast")
    flipped = concentration[::-1]
    return {
        "point": dartax.dirichlet.sample(seed, concentration),
        "mean": dartax.dirichlet.mean(concentration),
        "variance": dartax.dirichlet.variance(concentration),
        "divergence": dartax.dirichlet.kl_divergence(concentration, flipped),
        "log_gamma": log_gamma,
        "derivative": dartax.random.log_derivative(log_gamma, concentration),
    }


@quick(max_examples=100)
@hypothesis.given(
    st.integers(0, 2**32 - 1), st.lists(log_range(1e-4, 1e10), min_size=5, max_size=5)
)
def test_draws_stay_on_the_simplex(seed, concentration):
    concentration = np.float32(concentration)
    got = jax.device_get(simplex(np.uint32(seed), concentration))
    assert np.all(got["point"] >= 0)
    np.testing.assert_allclose(got["point"].sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(got["mean"].sum(), 1, rtol=1e-5)
    assert np.all(got["variance"] >= 0)
    assert np.all(got["variance"] <= got["mean"] * (1 - got["mean"]) + 1e-6)
    total = concentration.sum(dtype=np.float64)
    assert got["divergence"] > -1e-6 * total * max(np.log(total), 1)
    assert np.all(np.isfinite(got["log_gamma"]))
    assert np.all(np.isfinite(got["derivative"]) & (got["derivative"] > 0))
