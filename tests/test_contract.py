"""One table drives every transform through what optax users rely on."""

import functools
import pickle

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import dartax

OPTIMIZERS = {
    "dart": functools.partial(dartax.dart, optax.cosine_decay_schedule(1.0, 100), weight_decay=0.1),
    "dart_sgd_blocks": functools.partial(
        dartax.dart,
        inner=optax.identity(),
        memory_decay=0.0,
        blocks=lambda path: path.split("/")[-1],
        memory_dtype="float32",
    ),
    "dart_element": functools.partial(dartax.dart, blocks="element", weight_decay=0.1),
    "paper_dart": functools.partial(dartax.paper_dart, weight_decay=0.1),
    "scale_by_dart": lambda **kwargs: optax.chain(
        optax.clip_by_global_norm(1.0), dartax.scale_by_dart(**kwargs), optax.scale(-1.0)
    ),
}

every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def make_params(dtype=jnp.float32):
    return {
        "dense": {"bias": jnp.ones(2, dtype), "kernel": jnp.full((3, 2), 0.5, dtype)},
        "scale": jnp.asarray(2.0, dtype),
    }


def loss_fn(params):
    return sum(
        (i + 1.0) * jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        for i, leaf in enumerate(jax.tree.leaves(params))
    )


def step(optimizer, params, state):
    updates, state = optimizer.update(jax.grad(loss_fn)(params), state, params)
    return optax.apply_updates(params, updates), state


# Tests of one row share what they make and compile.
made = functools.cache(lambda make: make())
jitted_step = functools.cache(lambda optimizer: jax.jit(functools.partial(step, optimizer)))
jitted_update = functools.cache(lambda optimizer: jax.jit(optimizer.update))


def trained(optimizer, params, steps=5, state=None):
    state = optimizer.init(params) if state is None else state
    for _ in range(steps):
        params, state = jitted_step(optimizer)(params, state)
    return params, state


def weak_types(tree):
    return [jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(tree)]


@pytest.mark.one_in(4)
@every_optimizer
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_state_is_a_fixed_point_and_dtypes_are_kept(make, dtype):
    optimizer, params = made(make), make_params(dtype)
    state = optimizer.init(params)
    assert not any(weak_types(state))
    updates, after = jitted_update(optimizer)(jax.grad(loss_fn)(params), state, params)
    chex.assert_trees_all_equal_structs(state, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    assert weak_types(after) == weak_types(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    # lax.scan refuses a carry that changes in any of these.
    steps = lambda *carry: jax.lax.scan(  # noqa: E731
        lambda carry, _: (step(optimizer, *carry), None), carry, length=3
    )
    jax.eval_shape(steps, params, state)


@pytest.mark.one_in(3)
@every_optimizer
def test_update_compiles_once(make):
    optimizer, params = make(), make_params()
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def jitted(params, state):
        return step(optimizer, params, state)

    state = optimizer.init(params)
    for _ in range(3):
        params, state = jitted(params, state)


@pytest.mark.one_in(2)
@every_optimizer
def test_same_key_same_run_and_other_key_other_run(make):
    def run(key):
        # From the state that the key gives, by the step of another one.
        return trained(made(make), make_params(), state=make(key=key).init(make_params()))

    expected = trained(make(key=3), make_params())
    chex.assert_trees_all_equal(trained(make(key=3), make_params()), expected)
    chex.assert_trees_all_equal(run(3), expected)
    chex.assert_trees_all_equal(run(jax.random.key(3)), expected)
    rates = [optax.tree.get(run(key)[1], "last_rates") for key in (3, 4)]
    assert np.all(rates[0] != rates[1])


@every_optimizer
def test_vmap_over_keys(make):
    def rates(key):
        optimizer, params = make(key=key), make_params()
        return optax.tree.get(step(optimizer, params, optimizer.init(params))[1], "last_rates")

    batch = jax.jit(jax.vmap(rates))(jax.random.split(jax.random.key(0), 4))
    assert len(np.unique(batch)) == batch.size


@pytest.mark.one_in(2)
@every_optimizer
def test_donation_of_params_and_state(make):
    optimizer, params = made(make), make_params()
    state = optimizer.init(params)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))]
    assert len(set(buffers)) == len(buffers), "a buffer donated twice is an error on a GPU"
    donated = jax.jit(functools.partial(step, optimizer), donate_argnums=(0, 1))
    expected = trained(optimizer, make_params(), steps=2)
    for _ in range(2):
        params, state = donated(params, state)
    chex.assert_trees_all_close((params, state), expected, rtol=1e-6)


@every_optimizer
def test_unknown_extra_arguments_pass(make):
    optimizer, params = made(make), make_params()
    jax.eval_shape(
        optimizer.update, params, optimizer.init(params), params, value=1.0, anything=None
    )


@every_optimizer
def test_grad_argument_replaces_the_judge_of_the_rates(make):
    optimizer = made(make)
    start = make_params()
    _, state = trained(optimizer, start, steps=3)
    grads = jax.grad(loss_fn)(start)
    opposite = jax.tree.map(jnp.negative, grads)
    update = jitted_update(optimizer)
    _, same = update(grads, state, start, grad=grads)
    _, other = update(grads, state, start, grad=opposite)
    h, minus_h = (optax.tree.get(s, "hypergradient") for s in (same, other))
    assert np.all(h != 0)
    np.testing.assert_allclose(minus_h, -h, rtol=1e-6)


@every_optimizer
def test_none_leaves(make):
    optimizer = made(make)
    params = {"used": jnp.ones(3), "unused": None}
    state = optimizer.init(params)
    updates, _ = jax.eval_shape(optimizer.update, params, state, params)
    assert updates["unused"] is None
    assert dartax.learning_rates(state, params)["unused"] is None


@every_optimizer
def test_non_finite_gradient_skips_the_step_and_shows(make):
    optimizer = made(make)
    params, state = trained(optimizer, make_params())
    grads = jax.grad(loss_fn)(params)
    grads["dense"]["kernel"] = grads["dense"]["kernel"].at[0, 0].set(jnp.nan)
    grads["scale"] = jnp.asarray(jnp.inf)
    update = jitted_update(optimizer)
    for where, start in (("later", state), ("first", optimizer.init(params))):
        updates, after = update(grads, start, params)
        if where == "later" or make is not OPTIMIZERS["scale_by_dart"]:
            chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
        chex.assert_tree_all_finite(after)
        before, now = dartax.metrics(start), dartax.metrics(after)
        assert now["dart/skipped"] == before["dart/skipped"] + 1
        assert now["dart/rate_max"] == 0.0
        assert "1 skipped" in dartax.describe(after, params)
        for field in ("concentration", "step_memory", "hyper_mu"):
            chex.assert_trees_all_equal(optax.tree.get(after, field), optax.tree.get(start, field))
    # and learning goes on
    _, recovered = trained(optimizer, params)
    chex.assert_tree_all_finite(recovered)


def test_non_finite_updates_behind_a_finite_grad_and_schedules_are_skipped():
    params, state = trained(dartax.dart(), make_params())
    grads = jax.grad(loss_fn)(params)
    bad = jax.tree.map(lambda g: jnp.nan * g, grads)
    no_rate = dartax.dart(lambda count: jnp.nan)
    for optimizer, updates, grad in (
        (dartax.dart(), bad, grads),
        (dartax.dart(), grads, bad),
        (no_rate, grads, grads),
    ):
        updates, after = jax.jit(optimizer.update)(updates, state, params, grad=grad)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
        assert dartax.metrics(after)["dart/skipped"] == 1
        chex.assert_tree_all_finite(after)


def test_state_owns_its_arrays():
    params = make_params()
    key = jax.random.PRNGKey(0)
    mine = {"key": key, "min_rate": jnp.zeros(()), "rate_budget": jnp.ones(()), "init_rate": 1e-3}
    injected = optax.inject_hyperparams(dartax.dart)(learning_rate=0.5)
    for optimizer in (dartax.dart(**mine), injected):
        state = optimizer.init(params)
        update = jax.jit(lambda s, o=optimizer: o.update(params, s, params), donate_argnums=0)
        _, state = update(state)
        update(state)
    assert np.all(key == 0)
    assert mine["rate_budget"] == 1


def test_inner_state_keeps_its_dtypes_under_other_gradients():
    params = make_params(jnp.bfloat16)
    grads = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    inner = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(0)), optax.scale_by_adam())
    optimizer = dartax.dart(inner=inner)
    state = optimizer.init(params)
    _, after = jax.jit(optimizer.update)(grads, state, params)
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]


def test_numpy_and_python_leaves():
    params = {"a": np.ones(3, np.float32), "b": 2.0}
    optimizer = dartax.dart(inner=optax.identity())
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = update({"a": np.ones(3, np.float32), "b": 1.0}, state, params)
    assert updates["b"] < 0


@every_optimizer
def test_resume_from_bytes(make):
    optimizer = made(make)
    params, state = trained(optimizer, make_params(), steps=4)
    saved = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(optimizer.init(params), saved)
    pickled = pickle.loads(pickle.dumps(state))
    jitted = jitted_step(optimizer)
    expected = jitted(params, state)
    chex.assert_trees_all_equal(jitted(params, restored), expected)
    chex.assert_trees_all_equal(jitted(params, pickled), expected)
    assert optax.tree.get(state, "version") == dartax._state.VERSION


@pytest.mark.one_in(8)
@every_optimizer
def test_masked_and_partition(make):
    params = make_params()
    mask = {"dense": {"bias": True, "kernel": True}, "scale": False}
    params_after, state = trained(optax.masked(make(), mask), params)
    rates = dartax.learning_rates(state, params)
    assert np.isnan(rates["scale"])
    assert np.all(rates["dense"]["kernel"] > 0)
    assert np.all(params_after["dense"]["kernel"] < params["dense"]["kernel"])

    labels = {"dense": "matrix", "scale": "other"}
    two = optax.partition({"matrix": make(key=1), "other": make(key=2), "none": make()}, labels)
    _, state = trained(two, params)
    found = {
        key: value for key, value in dartax.metrics(state).items() if key.endswith("rate_mean")
    }
    assert set(found) == {
        f"dart/{label}/{name}" for label in ("matrix", "other") for name in ("rate_mean", "expected_rate_mean")
    }  # fmt: skip
    assert not np.isnan(dartax.expected_learning_rates(state, params)["scale"])
    assert "[matrix]" in dartax.describe(state, params)


@pytest.mark.one_in(3)
@every_optimizer
def test_multi_steps(make):
    optimizer = optax.MultiSteps(made(make), every_k_schedule=2)
    params = make_params()
    after, state = trained(optimizer, params, steps=4)
    assert dartax.metrics(state)["dart/step"] == 2
    assert np.all(after["dense"]["kernel"] != params["dense"]["kernel"])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_inject_hyperparams(dtype):
    params = make_params(dtype)
    injected = optax.inject_hyperparams(dartax.dart)(
        init_rate=0.01, memory_decay=0.5, weight_decay=0.1
    )
    after, state = trained(injected, params)
    assert state.hyperparams["init_rate"] == jnp.asarray(0.01, dtype)
    direct, direct_state = trained(
        dartax.dart(init_rate=0.01, memory_decay=0.5, weight_decay=0.1), params
    )
    tolerance = 1e-6 if dtype == jnp.float32 else 0.01
    np.testing.assert_allclose(
        *(jnp.asarray(p["dense"]["kernel"], jnp.float32) for p in (after, direct)), rtol=tolerance
    )
    chex.assert_trees_all_close(
        *(dartax.concentrations(s, params) for s in (state, direct_state)), rtol=tolerance
    )
    # In bfloat16 the b2 of 0.999 would be 1.
    scheduled = optax.inject_hyperparams(dartax.paper_dart, hyperparam_dtype=jnp.float32)(
        rate_budget=optax.linear_schedule(0.1, 0.01, 5)
    )
    _, state = trained(scheduled, params)
    np.testing.assert_allclose(optax.tree.get(state.inner_state, "rate_budget"), 0.028, rtol=0.01)


def test_zero_weight_decay_needs_no_params():
    params = make_params()
    for optimizer in (dartax.dart(), dartax.paper_dart()):
        jax.jit(optimizer.update)(jax.grad(loss_fn)(params), optimizer.init(params))


def test_float64_parameters_keep_their_dtype():
    with jax.enable_x64(True):
        params = make_params(jnp.float64)
        optimizer = dartax.dart(0.5, weight_decay=0.1)
        after, state = trained(optimizer, params)
        chex.assert_trees_all_equal_dtypes(params, after)
        chex.assert_trees_all_equal_shapes_and_dtypes(optimizer.init(params), state)
        dart_state = next(s for s in state if isinstance(s, dartax.ScaleByDartState))
        kept = dart_state._replace(step_memory=None, inner_state=None)
        assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {
            jnp.dtype(name) for name in ("float32", "int32", "uint32")
        }


def test_strict_dtype_promotion():
    params = make_params(jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        trained(dartax.dart(), params)
        trained(dartax.dart(inner=optax.trace(0.9)), params)
        trained(dartax.paper_dart(), params)


def test_state_memory_is_twelve_bytes_per_parameter_of_small_tensors():
    params = {"w": jnp.ones((1000, 100)), "b": jnp.ones(100)}
    state = dartax.dart().init(params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert size < 12 * 100_100 + 500


def test_inner_transform_receives_extra_arguments():
    def update(updates, state, params=None, *, value, scale=lambda value: value, **_):
        return jax.tree.map(lambda u: scale(value) * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    optimizer = dartax.dart(inner=inner)
    params = make_params()
    state = optimizer.init(params)
    once, _ = optimizer.update(params, state, params, value=1.0)
    for arguments in ({"value": 3.0}, {"value": 1.0, "scale": lambda value: 3.0 * value}):
        threefold, _ = optimizer.update(params, state, params, **arguments)
        chex.assert_trees_all_close(threefold, jax.tree.map(lambda u: 3.0 * u, once), rtol=1e-6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("make", [dartax.dart, functools.partial(dartax.dart, blocks="channel")])
def test_updates_outside_jit_are_compiled_once(make):
    calls = []

    def schedule(count):
        if isinstance(count, jax.core.Tracer):
            calls.append(count)
        return jnp.where(count < 10, 1.0, 0.5)

    optimizer = make(schedule)
    params = make_params()
    state = optimizer.init(params)
    other, update = state, jax.jit(optimizer.update)
    traced = []
    for _ in range(4):
        updates, state = optimizer.update(params, state, params)
        traced.append(len(calls))
        expected, other = update(params, other, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    assert traced[1] - traced[0] <= 1  # that of jax.jit
    assert traced[1:] == 3 * [traced[1]]


def test_infinities_inside_a_step_are_nobodys_business():
    optimizer = dartax.dart()
    params = make_params()
    with jax.debug_infs(True):
        state = optimizer.init(params)
        for _ in range(3):
            _, state = optimizer.update(params, state, params)
    assert optax.tree.get(state, "skipped") == 0


def test_schedule_multiplies_the_learned_rates():
    params = make_params()
    full = dartax.dart(1.0)
    fifth = dartax.dart(lambda count: jnp.where(count < 0, 1.0, 0.2))
    grads = jax.grad(loss_fn)(params)
    updates, state = full.update(grads, full.init(params))
    less, less_state = fifth.update(grads, fifth.init(params))
    chex.assert_trees_all_close(less, jax.tree.map(lambda u: 0.2 * u, updates), rtol=1e-5)
    rates, fewer = (dartax.learning_rates(s, params) for s in (state, less_state))
    chex.assert_trees_all_close(fewer, jax.tree.map(lambda r: 0.2 * r, rates), rtol=1e-5)


def test_decoupled_decay_takes_the_learned_rate_where_the_mask_says():
    params = make_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = dartax.dart(weight_decay=0.5, mask={"dense": True, "scale": False}, init_rate=0.1)
    updates, state = optimizer.update(zeros, optimizer.init(params), params)
    rates = dartax.learning_rates(state, params)
    np.testing.assert_allclose(updates["scale"], 0.0)
    np.testing.assert_allclose(
        updates["dense"]["bias"], -0.5 * rates["dense"]["bias"] * params["dense"]["bias"], rtol=1e-6
    )


def test_flax_train_state():
    model = nn.Dense(2)
    x = jnp.arange(12.0).reshape(4, 3)
    params = model.init(jax.random.key(0), x)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=dartax.dart())

    @jax.jit
    def train_step(state):
        grads = jax.grad(lambda p: jnp.sum(jnp.square(model.apply({"params": p}, x))))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(3):
        state = train_step(state)
    rates = dartax.learning_rates(state, state.params)
    chex.assert_trees_all_equal(rates, dartax.learning_rates(state.opt_state, state.params))
    chex.assert_trees_all_equal_structs(rates, params)
    assert all(rate > 0 for rate in jax.tree.leaves(rates))


def test_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, dartax.dart(blocks=lambda path: path), wrt=nnx.Param)
    x = jnp.arange(12.0).reshape(4, 3)

    @nnx.jit
    def train_step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(jnp.square(m(x))))(model)
        optimizer.update(model, grads)
        return dartax.metrics(optimizer)["dart/rate_mean"]

    before = jnp.array(model.kernel[...])
    for _ in range(3):
        mean_rate = train_step(model, optimizer)
    params = nnx.state(model, nnx.Param)
    rates = [jnp.asarray(r) for r in jax.tree.leaves(dartax.learning_rates(optimizer, params))]
    np.testing.assert_allclose(np.mean(rates), mean_rate, rtol=1e-6)
    assert np.all(model.kernel[...] != before)
    lines = dartax.describe(optimizer, params).splitlines()
    assert [line.split()[0] for line in lines[3:]] == ["bias", "kernel"]


def test_extra_arguments_may_have_any_name():
    seen = {}

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    given = {"multiplier": 5.0, "taken": 6.0, "blocks": 7.0, "inner": 8.0, "known": 9.0}
    params = {"w": jnp.ones(3)}
    for implementation in ("fused", "plain"):
        optimizer = dartax.scale_by_dart(inner, implementation=implementation)
        state = optimizer.init(params)
        expected, _ = optimizer.update(params, state, params)
        for step in (optimizer.update, jax.jit(optimizer.update)):
            updates, _ = step(params, state, params, **given)
            chex.assert_trees_all_equal(updates, expected)
            assert given.keys() <= seen.keys()


def test_a_schedule_may_begin_in_a_run_that_had_none():
    # As where a run with constant rates ends with a decay, from a checkpoint.
    def ended(before):
        params = {"w": jnp.ones((4, 3))}
        state = before.init(params)
        update = jax.jit(dartax.dart(optax.linear_schedule(1.0, 0.0, 60)).update)
        for _ in range(60):
            updates, state = update(jax.tree.map(lambda p: 2 * p, params), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    chex.assert_trees_all_equal(
        ended(dartax.dart()), ended(dartax.dart(optax.linear_schedule(1.0, 0.0, 60)))
    )


def test_an_infinite_hypergradient_of_one_block_skips_the_step():
    # With one block, sum_j h_j is infinite, too, and its gradient through the draw is NaN.
    huge = optax.chain(optax.scale_by_sign(), optax.scale(9e18))
    optimizer = dartax.scale_by_dart(huge, init_rate=0.5)
    params = {"w": jnp.ones(4)}
    state = optimizer.init(params)
    for _ in range(3):
        _, state = optimizer.update(params, state, params)
    updates, state = optimizer.update({"w": jnp.full(4, 9e18)}, state, params)
    assert int(state.skipped) == 1
    chex.assert_tree_all_finite((updates, state))
    updates, state = optimizer.update(params, state, params)
    assert int(state.skipped) == 1
    assert np.any(np.asarray(updates["w"]) != 0)


def test_an_inner_transform_that_needs_the_value_of_its_count():
    scales = [1.0, 2.0, 3.0]  # a list, which no tracer can index
    inner = optax.scale_by_schedule(lambda count: scales[count])
    params = {"w": jnp.ones(3)}
    optimizer = dartax.scale_by_dart(inner)
    state = optimizer.init(params)
    for scale in scales:
        updates, state = optimizer.update(params, state, params)
        np.testing.assert_allclose(updates["w"], scale * state.last_rates[0], rtol=1e-6)
