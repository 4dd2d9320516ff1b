"""The moments of a leaf wait for those of the leaves before it, and are the same as without."""

import re

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax import _order

INNERS = {
    "adam": dartax.inner.adam(),
    "momentum": dartax.inner.momentum(),
    "lion": dartax.inner.lion(),
}
PARAMS = [jnp.ones((5, 4)), jnp.ones(3), jnp.zeros(0), jnp.ones((5, 4)), jnp.ones((2, 3, 4))]


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # of those that the tests have
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def averages(inner, gradient, state):
    """The first field of the new state that is like the parameters."""
    state = inner.update(gradient, state)[1]
    return state.trace if isinstance(state, optax.TraceState) else state.mu


def traced_averages(name, turn, monkeypatch):
    """The program that computes the averages, with turns of so many elements."""
    monkeypatch.setattr(_order, "TURN", turn)
    inner = INNERS[name]
    jitted = jax.jit(lambda gradient, state: averages(inner, gradient, state))
    return jitted.trace(PARAMS, inner.init(PARAMS))


def waits(text):
    """For every output of a compiled program, after which of the others it is computed."""
    entry = text[text.index("\nENTRY") :]
    reads = {
        name: re.findall(r"%([\w.-]+)", operands)
        for name, operands in re.findall(r"%([\w.-]+) = [^(]*?\w\((.*?)\)", entry)
    }
    root = re.search(r"ROOT %[\w.-]+ = .*? tuple\((.*?)\)", entry)
    outputs = re.findall(r"%([\w.-]+)", root[1])

    def before(name):
        return set().union(*({read} | before(read) for read in reads.get(name, ())))

    return [{i for i, other in enumerate(outputs) if other in before(name)} for name in outputs]


ALONE = [set()] * len(PARAMS)


@pytest.mark.parametrize("name", INNERS)
@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (1, [set(), {0}, set(), {0, 1}, {0, 1, 3}]),  # an array without elements waits for nobody
        (21, [set(), set(), set(), {1}, {1}]),  # a matrix and a vector go together
        (1000, ALONE),
    ],
)
def test_large_leaves_wait_for_those_before_them(name, turn, expected, monkeypatch):
    text = traced_averages(name, turn, monkeypatch).lower().compile().as_text()
    assert waits(text) == expected


def test_nothing_waits_on_several_devices(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert jax.device_count() > 1
    text = traced_averages("adam", 1, monkeypatch).lower().compile().as_text()
    assert waits(text) == ALONE


@pytest.mark.parametrize(("platform", "asks"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_nothing_waits_on_other_platforms(platform, asks, monkeypatch):
    lowered = traced_averages("adam", 1, monkeypatch).lower(lowering_platforms=(platform,))
    isnan = re.search(r"compare +NE", lowered.as_text())  # of what came before
    assert bool(isnan) == asks


def test_one_program_for_all_platforms(monkeypatch):
    monkeypatch.setattr(_order, "TURN", 1)
    optimizer = dartax.dart(weight_decay=1e-2)
    state = optimizer.init(PARAMS)
    exported = jax.export.export(
        jax.jit(optimizer.update), platforms=("cpu", "cuda", "rocm", "tpu")
    )(PARAMS, state, PARAMS)
    got = jax.tree.leaves(exported.call(PARAMS, state, PARAMS))
    for leaf, expected in zip(
        got, jax.tree.leaves(optimizer.update(PARAMS, state, PARAMS)), strict=True
    ):
        np.testing.assert_allclose(leaf, expected, rtol=1e-5)


@pytest.mark.parametrize("name", INNERS)
@pytest.mark.parametrize("over_models", [False, True])
def test_waiting_changes_no_number(name, over_models, monkeypatch):
    optimizer = dartax.dart(inner=INNERS[name], init_rate=1e-3, weight_decay=1e-2)
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), PARAMS) if over_models else PARAMS

    def step(carry, fault):
        params, state = carry
        gradient = jax.tree.map(lambda p: jnp.sin(p) + fault, params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    def train(params):
        faults = jnp.asarray([0.0, 0.0, np.nan, 0.0, np.inf, 0.0])
        return jax.lax.scan(step, (params, optimizer.init(params)), faults)[0]

    def run(turn):
        monkeypatch.setattr(_order, "TURN", turn)
        return jax.jit(lambda p: jax.vmap(train)(p) if over_models else train(p))(params)

    waited, plain = run(1), run(1000)
    chex.assert_trees_all_equal(waited, plain)
    assert np.all(optax.tree.get(waited[1], "skipped") == 2)
    assert not np.array_equal(waited[0][0], params[0])
