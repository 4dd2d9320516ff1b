import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import dartax

PARAMS = {"dense": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}, "scale": jnp.ones(())}


def after(optimizer, steps):
    state = optimizer.init(PARAMS)
    update = jax.jit(optimizer.update)
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: (i + 1.0) * p, PARAMS)
        updates, state = update(grads, state, PARAMS)
    return updates if steps else None, state


def test_rates_are_those_that_were_used():
    updates, state = after(dartax.dart(inner=optax.identity(), init_rate=0.01), 3)
    rates = dartax.learning_rates(state, PARAMS)
    jax.tree.map(lambda u, r: np.testing.assert_allclose(u, -3 * r, rtol=1e-6), updates, rates)
    # Reading changes nothing and never draws.
    chex.assert_trees_all_equal(rates, dartax.learning_rates(state, PARAMS))


def test_mean_and_deviation_are_those_of_the_draws():
    n = 4000

    def rates(key):
        optimizer = dartax.dart(0.5, min_rate=0.1, rate_budget=2.0, init_rate=0.4, key=key)
        state = optimizer.init(PARAMS)
        _, state = optimizer.update(PARAMS, state, PARAMS)
        return dartax.learning_rates(state, PARAMS)["scale"]

    draws = jax.jit(jax.vmap(rates))(jax.random.split(jax.random.key(1), n))
    _, state = after(dartax.dart(0.5, min_rate=0.1, rate_budget=2.0, init_rate=0.4), 1)
    mean = dartax.expected_learning_rates(state, PARAMS)["scale"]
    std = dartax.learning_rate_std(state, PARAMS)["scale"]
    np.testing.assert_allclose(mean, 0.5 * 0.4, rtol=1e-5)
    assert abs(np.mean(draws) - mean) < 5 * std / np.sqrt(n)
    np.testing.assert_allclose(np.std(draws), std, rtol=0.06)


@pytest.mark.parametrize("init_rate", [1e-8, 1e-5, 1e-2])
def test_init_rate_is_the_first_mean_rate(init_rate):
    state = dartax.dart(init_rate=init_rate).init(PARAMS)
    for rate in jax.tree.leaves(dartax.expected_learning_rates(state, PARAMS)):
        np.testing.assert_allclose(rate, init_rate, rtol=1e-5)
    for rate in jax.tree.leaves(dartax.learning_rates(state, PARAMS)):
        assert rate == 0


def test_blocks_share_a_rate():
    by_layer = lambda path: path.split("/")[0]  # noqa: E731
    labels = {"dense": "dense", "scale": "scale"}
    for blocks in (by_layer, labels, {"dense": {"bias": 0, "kernel": 0}, "scale": 1}):
        _, state = after(dartax.dart(blocks=blocks), 3)
        rates = dartax.learning_rates(state, PARAMS)
        assert rates["dense"]["bias"] == rates["dense"]["kernel"] != rates["scale"]
        assert dartax.concentrations(state, PARAMS)["scale"].shape == ()
    assert "dense/bias, dense/kernel" in dartax.describe(state, PARAMS)


def test_metrics_are_scalars_inside_jit():
    optimizer = dartax.dart()

    @jax.jit
    def step(state):
        _, state = optimizer.update(PARAMS, state, PARAMS)
        return state, dartax.metrics(state)

    _, metrics = step(optimizer.init(PARAMS))
    assert all(value.shape == () for value in metrics.values())
    assert metrics["dart/step"] == 1
    assert metrics["dart/multiplier"] == 1
    assert metrics["dart/rate_min"] <= metrics["dart/rate_mean"] <= metrics["dart/rate_max"]
    np.testing.assert_allclose(metrics["dart/spent"], 3e-4, rtol=1e-4)


def test_metrics_of_every_leaf():
    optimizer = dartax.dart(0.5, min_rate=0.1, rate_budget=2.0, init_rate=0.4)
    _, state = after(optimizer, 3)
    metrics = jax.jit(dartax.metrics)(state, PARAMS)
    accessors = {
        "rate": dartax.learning_rates,
        "expected_rate": dartax.expected_learning_rates,
        "rate_std": dartax.learning_rate_std,
        "concentration": dartax.concentrations,
    }
    for name, accessor in accessors.items():
        leaves = accessor(state, PARAMS)
        np.testing.assert_allclose(
            metrics[f"dart/{name}/dense/kernel"], leaves["dense"]["kernel"], rtol=1e-6
        )
        np.testing.assert_allclose(metrics[f"dart/{name}/scale"], leaves["scale"], rtol=1e-6)
    assert (metrics["dart/min_rate"], metrics["dart/rate_budget"]) == (np.float32(0.1), 2.0)
    # The rates and their spread follow from the concentrations: a Beta law.
    a, total = metrics["dart/concentration/scale"], metrics["dart/concentration_total"]
    share = scipy.stats.beta(a, total - a)
    np.testing.assert_allclose(
        metrics["dart/expected_rate/scale"], 0.5 * (0.1 + 1.9 * share.mean()), rtol=1e-5
    )
    np.testing.assert_allclose(metrics["dart/rate_std/scale"], 0.5 * 1.9 * share.std(), rtol=1e-5)
    assert not any("/dense/" in name or name.endswith("/scale") for name in dartax.metrics(state))


def test_metrics_of_several_darts_and_of_leaves_without_one():
    labels = {"dense": {"bias": "plain", "kernel": "matrix"}, "scale": "other"}
    transforms = {"matrix": dartax.dart(), "other": dartax.paper_dart(), "plain": optax.sgd(0.1)}
    state = optax.partition(transforms, labels).init(PARAMS)
    metrics = dartax.metrics(state, PARAMS)
    assert {name for name in metrics if "expected_rate/" in name} == {
        "dart/matrix/expected_rate/dense/kernel",
        "dart/other/expected_rate/scale",
    }
    np.testing.assert_allclose(metrics["dart/matrix/concentration_total"], 1e5, rtol=1e-5)
    assert metrics["dart/other/concentration_total"] == 1.0


def test_state_is_found_in_any_nesting():
    nested = optax.MultiSteps(
        optax.chain(
            optax.masked(
                optax.inject_hyperparams(dartax.dart)(init_rate=1e-3),
                {"dense": True, "scale": False},
            ),
            optax.apply_if_finite(optax.identity(), 3),
        ),
        every_k_schedule=1,
    )
    state = nested.init(PARAMS)
    rates = dartax.expected_learning_rates(state, PARAMS)
    np.testing.assert_allclose(rates["dense"]["kernel"], 1e-3, rtol=1e-5)
    assert np.isnan(rates["scale"])


def test_logged_fields_have_unique_names_in_a_chain():
    state = optax.chain(optax.scale_by_adam(), dartax.dart()).init(PARAMS)
    for name in ("concentration", "last_rates", "skipped", "hyper_mu", "hypergradient"):
        assert optax.tree.get(state, name) is not None


def test_several_darts_without_labels_are_numbered():
    state = optax.chain(
        optax.masked(dartax.dart(), {"dense": True, "scale": False}),
        optax.masked(dartax.paper_dart(), {"dense": False, "scale": True}),
    ).init(PARAMS)
    metrics = dartax.metrics(state)
    assert {"dart/0/step", "dart/1/step"} <= set(metrics)
    assert "DART [1] after 0 updates" in dartax.describe(state, PARAMS)


def test_state_without_dart():
    state = optax.adam(1e-3).init(PARAMS)
    with pytest.raises(ValueError, match=r"opt_state must hold the state of a DART transform"):
        dartax.learning_rates(state, PARAMS)
    with pytest.raises(ValueError, match=r"opt_state must hold the state of a DART transform"):
        dartax.metrics(state)


def test_params_of_another_tree():
    state = dartax.dart().init(PARAMS)
    with pytest.raises(ValueError, match="params must be the tree that init was given, with 3"):
        dartax.learning_rates(state, {"dense": PARAMS["dense"]})


def test_a_single_array_is_named():
    params = jnp.ones((3, 2))
    state = dartax.dart().init(params)
    assert "dart/expected_rate/array" in dartax.metrics(state, params)
    assert "array" in str(dartax.describe(state, params))
    assert list(dartax.distill_schedule([dartax.metrics(state, params)])) == ["array"]


def test_a_field_named_value_keeps_its_name():
    heads = collections.namedtuple("heads", ["policy", "value"])
    params = heads(jnp.ones(2), jnp.ones(3))
    metrics = dartax.metrics(dartax.dart().init(params), params)
    assert {"dart/expected_rate/policy", "dart/expected_rate/value"} <= metrics.keys()


def test_factors_of_an_empty_leaf_have_no_spread():
    params = {"empty": jnp.zeros((3, 0)), "full": jnp.zeros(2)}
    metrics = dartax.metrics(dartax.dart(blocks="channel").init(params), params)
    assert metrics["dart/factor_std/empty"] == 0
