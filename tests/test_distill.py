"""Learned rates as schedules: what they return, and that Adam with them ends where dart ends."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax.experiments import optimizers
from dartax.experiments.config import Config, ModelConfig, OptimizerConfig
from dartax.experiments.run_folder import read_metrics
from dartax.experiments.train import train_and_evaluate

PARAMS = {"dense": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}}
ROWS = [
    {"dart/step": 10, "dart/expected_rate_mean": 1.0, "dart/expected_rate/a": 1e-4},
    {"dart/step": 20, "dart/expected_rate_mean": 1.0, "dart/expected_rate/a": 1e-2},
    {"dart/step": 40, "dart/expected_rate_mean": 1.0, "dart/expected_rate/a": 0.0},
]
COLUMNS = {"step": [10, 20, 40], "expected_rate/a": jnp.array([1e-4, 1e-2, 0.0])}


@pytest.mark.parametrize("run", [ROWS, COLUMNS])
def test_rates_are_interpolated_by_their_logarithm(run):
    (name, schedule), *others = dartax.distill_schedule(run).items()
    assert name == "a"
    assert not others
    # optax counts the updates before the present one; step 10 is the tenth.
    counts = jnp.array([0, 9, 14, 19, 29, 39, 1000])
    expected = [1e-4, 1e-4, 1e-3, 1e-2, 5e-3, 0.0, 0.0]
    np.testing.assert_allclose(schedule(counts), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(schedule)(14), 1e-3, rtol=1e-5)
    assert schedule(14).dtype == jnp.float32


def test_several_darts_give_schedules_for_all_of_their_leaves():
    labels = {"dense": {"bias": "slow", "kernel": "fast"}}
    rates = {"slow": 1e-4, "fast": 1e-2}
    optimizer = optax.partition(
        {k: dartax.dart(init_rate=rate) for k, rate in rates.items()}, labels
    )
    schedules = dartax.distill_schedule([dartax.metrics(optimizer.init(PARAMS), PARAMS)])
    assert set(schedules) == {"dense/bias", "dense/kernel"}
    np.testing.assert_allclose(schedules["dense/bias"](3), 1e-4, rtol=1e-5)
    np.testing.assert_allclose(schedules["dense/kernel"](3), 1e-2, rtol=1e-5)


def test_missing_rates_are_left_out():
    run = [
        {"step": 10, "expected_rate/a": 0.1, "expected_rate/b": None},
        {"step": 20, "expected_rate/a": None, "expected_rate/b": float("nan")},
        {"step": 30, "expected_rate/a": 0.3},
    ]
    schedules = dartax.distill_schedule(run)
    assert list(schedules) == ["a"]
    np.testing.assert_allclose(schedules["a"](19), np.sqrt(0.1 * 0.3), rtol=1e-6)


def test_schedules_return_the_recorded_rates_to_the_updates_that_used_them():
    optimizer = dartax.dart(optax.cosine_decay_schedule(1.0, 30), concentration=1e4)
    state, update, run, rates = optimizer.init(PARAMS), jax.jit(optimizer.update), [], []
    for _ in range(30):
        _, state = update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
        run.append(dartax.metrics(state, PARAMS))
        rates.append(dartax.learning_rates(state, PARAMS)["dense"]["kernel"])
    schedule = dartax.distill_schedule(run)["dense/kernel"]
    # With this concentration a draw is within some percent of its mean.
    np.testing.assert_allclose(schedule(jnp.arange(30)), rates, rtol=0.06)


def test_every_leaf_takes_its_own_rate():
    schedules = {"dense/kernel": lambda count: 0.5 / (count + 1), "dense/bias": 2.0}
    optimizer = dartax.scale_by_learning_rates(schedules)
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    grads = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    for rate in (0.5, 0.25):
        updates, state = update(grads, state, PARAMS)
        np.testing.assert_allclose(updates["dense"]["kernel"].astype(jnp.float32), -rate)
        np.testing.assert_allclose(updates["dense"]["bias"].astype(jnp.float32), -2.0)
    assert updates["dense"]["bias"].dtype == jnp.bfloat16
    assert state.count == 2


@pytest.mark.parametrize(
    ("run", "match"),
    [
        ([], "metrics must hold expected_rate/PATH of every leaf, got nothing; record"),
        ({"step": [1]}, "metrics must hold expected_rate/PATH of every leaf, got step; record"),
        ([ROWS[1], ROWS[0]], "run must have increasing steps, got 10 after 20; pass one run"),
        ([ROWS[1], ROWS[1]], "run must have increasing steps, got 20 after 20; pass one run"),
    ],
)
def test_bad_runs(run, match):
    with pytest.raises(ValueError, match=match):
        dartax.distill_schedule(run)


def test_blocks_whose_draws_were_alike_stay_apart():
    # Both drew the least rate, which is far from their means.
    means = {"a": 0.03, "b": 0.02}
    rows = [
        {
            "dart/step": step,
            **{f"dart/rate/{name}": 0.01 for name in means},
            **{f"dart/expected_rate/{name}": mean for name, mean in means.items()},
        }
        for step in (20, 30)
    ]
    schedules = dartax.distill_schedule(rows)
    for name, mean in means.items():
        np.testing.assert_allclose(schedules[name](29), mean, rtol=1e-6)


def test_a_leaf_without_a_schedule():
    optimizer = dartax.scale_by_learning_rates({"dense/bias": lambda _: 1.0})
    with pytest.raises(
        ValueError, match="schedules must have one for every .* got none for 'dense/kernel'"
    ):
        optimizer.init(PARAMS)


def train_with_rates_of(config, workdir, monkeypatch):
    """Trains by ``config``, and again by Adam with the rates that were learned."""
    train_and_evaluate(config, progress=False)
    schedules = dartax.distill_schedule(config.workdir)
    adam = optax.chain(
        optax.scale_by_adam(b2=0.99),
        optax.add_decayed_weights(config.optimizer.options.get("weight_decay", 0.0)),
        dartax.scale_by_learning_rates(schedules),
    )
    monkeypatch.setattr(optimizers, "build", lambda *_: optax.with_extra_args_support(adam))
    train_and_evaluate(
        dataclasses.replace(config, workdir=workdir, optimizer=OptimizerConfig(name="adamw")),
        progress=False,
    )


@pytest.mark.slow
def test_adam_with_the_distilled_schedules_ends_where_dart_ends(monkeypatch):
    config = Config(
        epochs=6, log_steps=11, mesh=(1,), workdir="runs/dart", model=ModelConfig(hidden=(32,))
    )
    train_with_rates_of(config, "runs/adam", monkeypatch)
    dart, adam = (read_metrics(Path(f"runs/{name}/metrics.csv")) for name in ("dart", "adam"))
    assert dart[0]["train_loss"] > 10 * dart[-1]["train_loss"]
    for column, tolerance in (("train_loss", 0.5), ("test_loss", 0.5)):
        losses = np.array(
            [[a[column], b[column]] for a, b in zip(dart, adam, strict=True) if a[column]]
        )
        np.testing.assert_allclose(*losses.T, rtol=tolerance)


def test_rates_of_zero_join_no_blocks():
    run = [
        {"step": 1, "rate/a": 0.0, "rate/b": 0.0, "rate/c": 1.0, "rate/d": 1.0}
        | {f"expected_rate/{name}": 10.0**-i for i, name in enumerate("abcd")}
    ]
    schedules = dartax.distill_schedule(run)
    np.testing.assert_allclose([schedules[name](0) for name in "abc"], [1, 0.1, 0.01], rtol=1e-5)


def test_darts_that_count_differently_need_a_step_of_their_row():
    run = [
        {"x/step": n, "y/step": 4 * n, "x/expected_rate/a": 0.1 * n, "y/expected_rate/b": 0.01 * n}
        for n in (1, 2, 3)
    ]
    match = "metrics must have one step .* got some .* .up to 3, 12.; add a key 'step' to every row"
    with pytest.raises(ValueError, match=match):
        dartax.distill_schedule(run)
    schedules = dartax.distill_schedule([{"step": 4 * n + 4, **row} for n, row in enumerate(run)])
    np.testing.assert_allclose(schedules["b"](11), 0.03, rtol=1e-5)
