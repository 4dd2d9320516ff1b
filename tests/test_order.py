"""The moments of a leaf wait for those of the leaves before it, and are the same as without."""

import functools
import re

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax._fused import _order

INNERS = {
    "adam": dartax.inner.adam(),
    "momentum": dartax.inner.momentum(),
    "lion": dartax.inner.lion(),
}
PARAMS = [jnp.ones((5, 4)), jnp.ones(3), jnp.zeros(0), jnp.ones((5, 4)), jnp.ones((2, 3, 4))]


def traced_averages(name, group_size, monkeypatch):
    """The program that computes the averages, a group of so many elements after the other."""
    monkeypatch.setattr(_order, "GROUP_SIZE", group_size)
    inner = INNERS[name]

    def averages(finite, gradient, state):
        state = inner.update(gradient, state, taken=finite)[1]
        return state.trace if isinstance(state, optax.TraceState) else state.mu

    return jax.jit(averages).trace(jnp.bool_(True), PARAMS, inner.init(PARAMS))


@pytest.mark.parametrize(("platform", "asks"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_nothing_waits_on_other_platforms(platform, asks, monkeypatch):
    traced = traced_averages("adam", 1, monkeypatch)
    assert "branches_platforms" in str(traced.jaxpr)
    lowered = traced.lower(lowering_platforms=(platform,))
    waits = re.search(r"compare +GT", lowered.as_text())  # of what came before
    assert bool(waits) == asks


def test_a_transform_that_stands_alone_or_is_small_does_not_wait(monkeypatch):
    inner, small = INNERS["adam"], traced_averages("adam", 1000, monkeypatch)
    monkeypatch.setattr(_order, "GROUP_SIZE", 1)
    alone = jax.make_jaxpr(inner.update)(PARAMS, inner.init(PARAMS))
    assert "branches_platforms" not in str(alone) + str(small.jaxpr)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "make", [functools.partial(dartax.dart, weight_decay=0.1), dartax.paper_dart]
)
def test_one_program_for_all_platforms(make, monkeypatch):
    monkeypatch.setattr(_order, "GROUP_SIZE", 1)
    optimizer = make()
    state = optimizer.init(PARAMS)
    update = jax.jit(optimizer.update)
    exported = jax.export.export(update, platforms=("cpu", "cuda", "rocm", "tpu"))(
        PARAMS, state, PARAMS
    )
    assert exported.platforms == ("cpu", "cuda", "rocm", "tpu")
    chex.assert_trees_all_close(
        exported.call(PARAMS, state, PARAMS), update(PARAMS, state, PARAMS), rtol=1e-5
    )


@pytest.mark.one_in(4)
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

    def run(group_size):
        monkeypatch.setattr(_order, "GROUP_SIZE", group_size)
        return jax.jit(lambda p: jax.vmap(train)(p) if over_models else train(p))(params)

    waited, plain = run(1), run(1000)
    chex.assert_trees_all_equal(waited, plain)
    assert np.all(optax.tree.get(waited[1], "skipped") == 2)
    assert not np.array_equal(waited[0][0], params[0])
