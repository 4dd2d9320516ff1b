"""What a compiled step writes in place, copies, and repeats for every leaf."""

import functools
import operator
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import dartax
from dartax._fused import _sums
from dartax.experiments import bench
from dartax.experiments.traffic import traffic

INNERS = {
    "adam": dartax.inner.adam(),
    "momentum": dartax.inner.momentum(),
    "lion": dartax.inner.lion(),
}
every_inner = pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS.keys())
PARAMS = {"w": jnp.ones((300, 200))}
TREE = {"dense": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}, "scale": jnp.asarray(2.0)}
OPTIMIZERS = {
    "dart": dartax.dart(weight_decay=0.1),
    "dart_sgd": dartax.dart(inner=optax.identity()),
    "dart_blocks": dartax.dart(memory_decay=0.0, blocks=lambda path: path.split("/")[-1]),
    "dart_element": dartax.dart(blocks="element", weight_decay=0.1),
    "paper_dart": dartax.paper_dart(weight_decay=0.1),
}


def step(optimizer, params, state, gradient):
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def compiled(optimizer, params):
    """The text of a step, of which parameters and state are donated."""
    donated = jax.jit(functools.partial(step, optimizer), donate_argnums=(0, 1))
    return donated.lower(params, optimizer.init(params), params).compile().as_text()


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_whatever_is_donated_is_written_in_place(optimizer):
    """Else a GPU, which gets a step as a graph with addresses, would be given a new one each time."""
    header = compiled(optimizer, TREE).split("\n", 1)[0]
    assert header.count("-alias)") == len(jax.tree.leaves((TREE, optimizer.init(TREE))))


@every_inner
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_copies_nothing_as_large_as_the_parameters(inner, weight_decay):
    """What is donated is overwritten in place, and the old state is read before."""
    text = compiled(dartax.dart(inner=inner, weight_decay=weight_decay), PARAMS)
    assert not re.findall(r"\S+\[300,200\]\S* copy\(", text)


def lowered(optimizer, leaf, num_leaves):
    params = [leaf] * num_leaves
    state = optimizer.init(params)
    return jax.jit(optimizer.update).lower(params, state, params).as_text()


@every_inner
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_leaves_of_one_shape_are_traced_once(inner, weight_decay):
    """The text of a program grows by some calls for every leaf, not by what they compute."""
    optimizer = dartax.dart(inner=inner, weight_decay=weight_decay)
    few, more, most = (lowered(optimizer, jnp.ones((30, 20)), n).count("\n") for n in (10, 20, 40))
    assert more - few <= 10 * (31 if weight_decay else 17)
    assert most - more <= 2 * (more - few)


def test_leaves_of_a_shape_share_their_program():
    # A slice at an offset of its own costs every leaf some 10 ms of compilation.
    slices = [lowered(dartax.dart(), jnp.ones(3), n).count("stablehlo.slice ") for n in (4, 8)]
    assert 0 < slices[0] == slices[1]


@pytest.mark.parametrize(("platform", "reductions"), [("cpu", 20), ("cuda", 1)])
def test_small_arrays_of_one_shape_are_one_reduction_on_a_gpu(platform, reductions):
    columns = [[jnp.ones(4)] * 20] * 2
    traced = jax.jit(lambda *columns: _sums.sums(operator.mul, *columns)).trace(*columns)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert len(re.findall(r"call @_sum\b", text)) == reductions


@pytest.mark.parametrize("name", ["adamw", "dart"])
def test_traffic_is_what_xla_says(name):
    optimizer, step = bench.make_step(name)
    params = bench.make_params(bench.Size(10_000, 4), jnp.bfloat16)
    state = optimizer.init(params)
    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    found = traffic(program.as_text())
    assert found.bytes == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.02)
    assert found.kernels >= 4
