"""What the memory holds of large tensors, and what a step still sees of the rest."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax import _blocks
from dartax._fused import _sample
from dartax._fused._sample import (
    DEVICES,
    MIN_SAMPLE,
    SPARSEST,
    WHOLE_UP_TO,
    Sample,
    part_like,
    sample_of,
    sample_shape,
)


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((), ()),
        ((0, 5), (0, 5)),
        ((512, 256), (512, 256)),  # not more than eight times what is always kept
        ((368, 368), (48, 368)),
        ((768, 768), (32, 768)),
        ((768, 3072), (16, 3072)),
        ((4096, 4096), (128, 4096)),
        ((50257, 768), (1733, 768)),
        ((1294, 1294), (28, 1294)),
        ((3, 3, 512, 512), (3, 3, 16, 512)),
        ((12, 768, 768), (12, 16, 768)),
        ((1_000_000,), (40_000,)),
        ((1, 1_000_000), (1, 1_000_000)),  # no rows to choose among
    ],
)
def test_kept_shape(shape, kept, monkeypatch):
    assert sample_shape(shape) == kept
    monkeypatch.setattr(_sample, "MIN_SAMPLE", math.inf)
    assert sample_shape(shape) == shape


def test_enough_is_kept_and_split_as_the_tensor_is():
    rng = np.random.default_rng(0)
    sampled = 0
    for _ in range(3000):
        shape = tuple(int(n) for n in rng.choice([1, 3, 8, 48, 368, 777, 1024, 5000], 3))
        shape = shape[: rng.integers(1, 4)]
        kept, sample = sample_shape(shape), sample_of(shape)
        assert math.prod(kept) >= min(math.prod(shape), MIN_SAMPLE)
        assert math.prod(kept) >= math.prod(shape) / SPARSEST
        assert sample is None or math.prod(shape) > WHOLE_UP_TO * MIN_SAMPLE
        if sample:
            sampled += 1
            axis, number, step, sources = sample
            assert 1 <= sources <= step
            assert step > 1
            assert shape[axis] - 2 * step * DEVICES < number * step <= shape[axis]
            for devices in range(2, DEVICES + 1):
                assert shape[axis] % devices or DEVICES % devices or number % devices == 0
    assert sampled > 500


ZEROS = [jnp.zeros([], jnp.int32)] * 2


def test_the_part_of_a_tree(monkeypatch):
    monkeypatch.setattr(_sample, "MIN_SAMPLE", 8)
    tree = {"large": jnp.arange(96.0).reshape(48, 2), "small": jnp.arange(3.0)}
    memory = {"large": jnp.zeros((16, 2)), "small": jnp.zeros(3)}
    part = part_like(memory, tree, ZEROS)
    assert sample_of((48, 2)) == Sample(axis=0, number=16, step=3, sources=1)
    np.testing.assert_array_equal(part["large"], np.arange(96.0).reshape(48, 2)[::3])
    assert part["small"] is tree["small"]
    moved = part_like(memory, tree, [jnp.int32(4), jnp.int32(0)])  # of three rows in a bunch
    np.testing.assert_array_equal(moved["large"], np.arange(96.0).reshape(48, 2)[1::3])
    whole = part_like({**memory, "large": jnp.zeros((48, 2))}, tree, ZEROS)
    assert whole["large"] is tree["large"]


@pytest.mark.parametrize("phase", [0, 1, 5, 6, 13])
def test_groups_of_columns_take_turns(phase, monkeypatch):
    monkeypatch.setattr(_sample, "WIDTH", 2)
    tensor = np.arange(3 * 24 * 7).reshape(3, 24, 7)
    sample = Sample(axis=1, number=4, step=6, sources=3)
    expected = np.zeros((3, 4, 7), int)
    for lead, row, column in np.ndindex(expected.shape):
        expected[lead, row, column] = tensor[
            lead, 6 * row + (2 * (column // 2 % 3) + phase) % 6, column
        ]
    for take in (sample.take, sample.gather):
        np.testing.assert_array_equal(take(jnp.asarray(tensor), jnp.int32(phase)), expected)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "shape", [(1280, 1280), (3, 3, 512, 512), (1024, 4, 100), (400, 3, 7, 100), (200_000,)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_gpu_takes_the_same_sample(shape, dtype):
    sample = sample_of(shape)
    tensor = jnp.arange(math.prod(shape)).reshape(shape).astype(dtype)
    taken, gathered = (take(tensor, jnp.int32(3)) for take in (sample.take, sample.gather))
    assert gathered.shape == sample_shape(shape)
    assert gathered.dtype == dtype
    np.testing.assert_array_equal(gathered, taken)


def test_a_sample_tells_more_than_whole_rows():
    # Outer products of a few inputs and errors, such as the gradients of a layer are.
    rng = np.random.default_rng(0)
    sample = sample_of((1024, 1024))
    assert sample.sources > 1
    errors = []
    for _ in range(100):
        inputs = rng.normal(size=(1024, 8)) * rng.exponential(size=(1024, 1)) ** 2
        products = np.asarray(inputs @ rng.normal(size=(8, 1024)), np.float32) ** 2
        estimates = [
            np.mean(one.take(jnp.asarray(products), ZEROS[0]))
            for one in (sample._replace(sources=1), sample)
        ]
        errors.append(np.log(estimates / np.mean(products)) ** 2)
    rows, interleaved = np.mean(errors, axis=0) ** 0.5
    assert interleaved < 0.7 * rows


PARAMS = {"large": jnp.ones((48, 2)), "small": jnp.ones(3)}
INNERS = {
    "adam": dartax.inner.adam(),
    "lion": dartax.inner.lion(),
    "momentum": dartax.inner.momentum(),
    "optax adam": optax.scale_by_adam(),
    "gradients": optax.identity(),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("inner", INNERS)
def test_a_fault_in_a_row_that_is_not_kept_costs_its_step(inner, monkeypatch):
    monkeypatch.setattr(_sample, "MIN_SAMPLE", 8)
    optimizer = dartax.dart(inner=INNERS[inner])
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    _, state = update(PARAMS, state, PARAMS)
    for value in (np.nan, np.inf, -np.inf):
        poisoned = {**PARAMS, "large": PARAMS["large"].at[1, 1].set(value)}
        part = part_like(optax.tree.get(state, "step_memory"), poisoned, ZEROS)
        assert part["large"].shape == (16, 2)
        assert np.all(np.isfinite(part["large"]))
        updates, after = update(poisoned, state, PARAMS)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
        assert dartax.metrics(after)["dart/skipped"] == 1
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            assert np.all(np.isfinite(np.asarray(new, np.float32)))
            assert np.array_equal(new, old) or np.ndim(new) <= 1  # counters and the rates of 0
    # The gradient that judges the rates counts as well as the one that moves the parameters.
    _, after = update(PARAMS, state, PARAMS, grad=poisoned)
    assert dartax.metrics(after)["dart/skipped"] == 1


def test_state_is_little_more_than_that_of_adam(monkeypatch):
    params = {"kernel": jnp.zeros((1024, 1024)), "bias": jnp.zeros(1024)}
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    state = dartax.dart().init(params)
    assert size(state) < 1.02 * size(optax.adam(1e-3).init(params))
    monkeypatch.setattr(_sample, "MIN_SAMPLE", math.inf)
    assert size(dartax.dart().init(params)) > 1.22 * size(state)


@pytest.mark.parametrize("blocks", ["channel", "element"])
def test_rates_within_tensors_see_all_rows(blocks, monkeypatch):
    monkeypatch.setattr(_sample, "MIN_SAMPLE", 8)
    state = dartax.dart(blocks=blocks).init(PARAMS)
    assert optax.tree.get(state, "step_memory")["large"].shape == PARAMS["large"].shape


@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    ("shape", "live", "inner", "weight_decay"),
    [
        ((20_000, 32), [12_345], "adam", 0.0),
        ((20_000, 32), [3, 4, 5], "gradients", 0.0),
        ((400_000,), range(777, 400_000, 20_000), "adam", 0.01),
        ((64, 5000), [63], "gradients", 0.01),
        ((3, 3, 1000, 40), [2], "optax adam", 0.01),
    ],
)
def test_few_rows_with_gradients_are_found(shape, live, inner, weight_decay):
    live = jnp.asarray(live)
    optimizer = dartax.dart(inner=INNERS[inner], weight_decay=weight_decay)
    params = jnp.zeros(shape).at[live].set(1.0)
    loss = lambda params: jnp.sum((params[live] - 3.0) ** 2)  # noqa: E731

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=400)[0]

    after, state = train(params)
    assert sample_shape(shape) != shape
    assert loss(after) < 1e-2 * loss(params)
    assert np.all(optax.tree.get(state, "skipped") == 0)


def test_the_sample_follows_the_rows_with_gradients():
    # The rows that trained first fall silent; none of the others is in the sample.
    optimizer = dartax.dart()
    params = jnp.zeros((20_000, 32))
    first, later = jnp.asarray([0]), jnp.asarray([12_345])

    @jax.jit
    def train(params, state, live):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda params: jnp.sum((params[live] - 3.0) ** 2))(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=600)[0]

    params, state = train(params, optimizer.init(params), first)
    phase = int(optax.tree.get(state, "sample_phase")[0])
    params, state = train(params, state, later)
    assert optax.tree.get(state, "sample_phase")[0] > phase
    assert jnp.sum((params[later] - 3.0) ** 2) < 1e-2 * 32 * 9.0


def test_few_rows_with_gradients_are_found_beside_other_blocks():
    # Both tables start without a hypergradient, while that of the layer is not 0.
    live, optimizer = jnp.asarray([12_345]), dartax.dart()
    tables = {name: jnp.zeros((20_000, 32)).at[live].set(1.0) for name in ("table", "other")}
    params = {**tables, "layer": jnp.ones((8, 8)), "unused": jnp.ones(8)}

    def loss(params):
        rows = jnp.concatenate([params["table"][live], params["other"][live]])
        return jnp.sum((rows - 3.0) ** 2) + jnp.sum((params["layer"] + 1.0) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    after, state = params, optimizer.init(params)
    first = np.asarray(optax.tree.get(state, "concentration"))
    for _ in range(400):
        after, state = step(after, state)
    assert loss(after) < 1e-2 * loss(params)
    # A block without gradients does not move. (Its share falls where others spend the budget.)
    np.testing.assert_array_equal(after["unused"], params["unused"])
    shares = optax.tree.get(state, "concentration")
    shares, first = shares / jnp.sum(shares), first / np.sum(first)
    assert 0.5 * first[3] < shares[3] <= first[3]


def test_a_sample_that_is_seldom_heard_moves_on():
    before = jnp.asarray([0, 100, 100, 101, 30, 30])
    h, squares = jnp.asarray([0.0, 0.0, 1.0, 0.0, 1.0, 0.0]), jnp.asarray([1.0, 1, 1, 1, 1, 0])
    one = jnp.asarray(1)
    found = _blocks.silent_updates(before, h, squares, one)
    assert found.tolist() == [1, 101, 80, 101, 10, 30]
    assert _blocks.blind(found, np.array(5 * [True] + [False])).tolist() == [0, 1, 0, 1, 0, 0]
    assert _blocks.silent_updates(before, h, squares, 0 * one)[1] == 100  # nothing to judge yet
    # Heard once in 80 updates, it moves; once in 15, it stays.
    for period, stays in ((80, False), (15, True)):
        silent = jnp.zeros(1, jnp.int32)
        for update in range(400):
            heard = jnp.full(1, float(update % period == 0))
            silent = _blocks.silent_updates(silent, heard, jnp.ones(1), one)
            if silent > _blocks.PATIENCE:
                break
        assert (update == 399) == stays


@pytest.mark.parametrize("implementation", ["fused", "plain"])
def test_a_whole_memory_is_not_forgotten_where_rows_take_turns(implementation):
    # Each row has a gradient in one update of ten; plain gradients have no momentum.
    optimizer = dartax.dart(inner=optax.identity(), implementation=implementation)
    params = {"table": jnp.ones((10, 8)), "layer": jnp.ones((8, 8))}

    def step(carry, t):
        params, state = carry
        live = jnp.arange(10)[:, None] == t % 10
        grads = {"table": jnp.where(live, params["table"], 0.0), "layer": params["layer"]}
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimizer.init(params))
    after, state = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(600))[0])(start)
    assert optax.tree.get(state, "sample_phase").tolist() == [0, 0]
    assert jnp.max(after["table"]) < 0.1


def test_a_sample_with_gradients_stays(monkeypatch):
    monkeypatch.setattr(_sample, "MIN_SAMPLE", 8)
    optimizer = dartax.dart()
    state = optimizer.init(PARAMS)
    for step in range(5):
        # Zero gradients, as at a step that misses the rows, and a dead block, move nothing.
        grads = jax.tree.map(
            lambda p, step=step: p * (step != 3), {**PARAMS, "small": 0 * PARAMS["small"]}
        )
        _, state = optimizer.update(grads, state, PARAMS)
        assert optax.tree.get(state, "sample_phase").tolist() == [0, 0]


def test_another_shape_is_refused():
    optimizer = dartax.dart()
    state = optimizer.init({"w": jnp.zeros((1000, 1000))})
    with pytest.raises(ValueError, match=r"its sample has .*\) instead of .* at 'w'"):
        optimizer.update({"w": jnp.zeros((2000, 1000))}, state)
    grads, params = {"w": jnp.zeros((1000, 1000))}, {"w": jnp.zeros((999, 1000))}
    with pytest.raises(ValueError, match="params must have the shapes"):
        optimizer.update(grads, state, params)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_python_numbers_and_numpy_arrays_will_do(weight_decay):
    params = {"a": 1.0, "b": np.ones((400, 400), np.float32)}
    optimizer = dartax.dart(weight_decay=weight_decay)
    state = optimizer.init(params)
    updates, _ = optimizer.update(params, state, params, grad=params)
    expected, _ = optimizer.update(
        jax.tree.map(jnp.asarray, params), state, jax.tree.map(jnp.asarray, params)
    )
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
