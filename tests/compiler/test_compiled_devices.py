"""A step on eight devices moves no more data between them than Adam's."""

import collections
import functools
import re

import jax
import optax
import pytest
from layouts import LAYOUTS, make_batches, make_params, placed, step, train

import dartax
from dartax._fused import _sample

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="eight devices are there with DARTAX_TEST_DEVICES=8"
)


def collectives(jitted, *arguments):
    """How often the compiled step moves an array of which shape, by which operation."""
    text = jitted.lower(*arguments).compile().as_text()
    found = collections.Counter()
    pattern = (
        r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
    )
    for shapes, operation, _ in re.findall(pattern, text):
        for shape in re.findall(r"\w+\[[\d,]*\]", shapes):
            found[operation, shape] += 1
    return found


def trained(layout, width):
    """Parameters, state, a batch and the compiled step after a few steps."""
    params, batch_sharding = placed(layout, make_params(*3 * [width]))
    batches = [jax.device_put(x, batch_sharding) for x in make_batches(width)[:2]]
    return *train(dartax.dart(init_rate=1e-3), params, batches), batches[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("width", "kept"), [(16, 16), (64, 16)])
def test_a_step_moves_scalars_alone_beside_what_adam_moves(width, kept, layout, monkeypatch):
    monkeypatch.setattr(_sample, "MIN_SAMPLE", 64)  # of the wider ones every fourth row, ...
    monkeypatch.setattr(_sample, "MAX_SOURCES", 2)  # put together from two
    params, state, jitted, batch = trained(layout, width)
    assert state[0].step_memory[0]["kernel"].shape == (kept, width)
    # Of each tensor h and the squares of gradient, memory and direction, along each axis of the mesh.
    adam = optax.adam(1e-3)
    adam_step = jax.jit(functools.partial(step, adam))
    extra = collectives(jitted, params, state, batch) - collectives(
        adam_step, params, adam.init(params), batch
    )
    assert set(extra) <= {("all-reduce", "f32[]")}
    scalars = 4 * len(jax.tree.leaves(params))
    assert sum(extra.values()) <= scalars * len(LAYOUTS[layout][0])


def test_kept_rows_that_lie_unevenly_come_from_a_neighbour(monkeypatch):
    monkeypatch.setattr(_sample, "MIN_SAMPLE", 1 << 15)  # of every 49 rows 3, from 8 each
    params, state, jitted, batch = trained("fully sharded", 784)
    assert state[0].step_memory[0]["kernel"].shape == (48, 784)
    moved = collectives(jitted, params, state, batch)
    rows = [shape for operation, shape in moved if operation == "collective-permute"]
    assert rows
    assert all(int(re.search(r"\[(\d+),784\]", shape)[1]) < 16 for shape in rows)  # of 98
