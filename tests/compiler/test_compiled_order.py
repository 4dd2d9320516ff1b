"""The moments of a leaf are computed after those of the leaves before it, on a CPU."""

import re

import jax
import jax.numpy as jnp
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


@pytest.mark.parametrize("name", INNERS)
@pytest.mark.parametrize(
    ("group_size", "expected"),
    [
        (1, [set(), {0}, set(), {0, 1}, {0, 1, 3}]),  # an array without elements waits for nobody
        (21, [set(), set(), set(), {1}, {1}]),  # a matrix and a vector go together
        (1000, [set()] * len(PARAMS)),
    ],
)
def test_large_leaves_wait_for_those_before_them(name, group_size, expected, monkeypatch):
    monkeypatch.setattr(_order, "GROUP_SIZE", group_size)
    inner = INNERS[name]

    def averages(finite, gradient, state):
        state = inner.update(gradient, state, taken=finite)[1]
        return state.trace if isinstance(state, optax.TraceState) else state.mu

    lowered = jax.jit(averages).lower(jnp.bool_(True), PARAMS, inner.init(PARAMS))
    assert waits(lowered.compile().as_text()) == expected
