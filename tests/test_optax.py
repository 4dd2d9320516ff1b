"""Every transform, inside everything of optax that people put an optimizer in.

Whether shapes, dtypes and structures survive shows in the trace, without a compilation; what
needs numbers runs on the rows where it can differ.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax

ROWS = {
    "dart": dartax.dart,
    "dart_sgd": functools.partial(dartax.dart, inner=optax.identity()),
    "dart_lion": functools.partial(dartax.dart, inner=optax.scale_by_lion()),
    "dart_inner_lion": functools.partial(dartax.dart, inner=dartax.inner.lion()),
    "dart_inner_momentum": functools.partial(dartax.dart, inner=dartax.inner.momentum()),
    "dart_muon": functools.partial(dartax.dart, inner=dartax.inner.muon()),
    "dart_adabelief": functools.partial(dartax.dart, inner=optax.scale_by_belief()),
    # A budget of 0.1 is beyond what SGD can spend on Rosenbrock's function.
    "paper_dart": functools.partial(dartax.paper_dart, rate_budget=2e-3),
    "first": lambda **kwargs: optax.chain(
        dartax.scale_by_dart(**kwargs), optax.clip(1.0), optax.scale(-1.0)
    ),
    "middle": lambda **kwargs: optax.chain(
        optax.clip_by_global_norm(1.0), dartax.scale_by_dart(**kwargs), optax.scale(-1.0)
    ),
    "last": lambda **kwargs: optax.chain(
        optax.scale(-1.0), dartax.scale_by_dart(optax.identity(), **kwargs)
    ),
}
every_row = pytest.mark.parametrize("make", ROWS.values(), ids=ROWS.keys())


def rows(*names):
    return pytest.mark.parametrize("make", [ROWS[name] for name in names], ids=names)


def make_params(dtype=jnp.float32):
    return {
        "bias": jnp.ones(2, dtype),
        "kernel": jnp.full((3, 2), 0.5, dtype),
        "scale": jnp.asarray(2.0, dtype),
    }


def loss_fn(params):
    return sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(params))


def step(optimizer, params, state, **extra_args):
    updates, state = optimizer.update(jax.grad(loss_fn)(params), state, params, **extra_args)
    return optax.apply_updates(params, updates), state


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def assert_step_keeps_types(optimizer, params, **extra_args):
    """Traces two steps: parameters and state come out as they went in."""
    state = jax.eval_shape(optimizer.init, params)
    one = functools.partial(step, optimizer, **extra_args)
    params, state = jax.eval_shape(lambda p, s: (p, s), params, state)
    after = jax.eval_shape(one, params, state)
    assert types(after) == types((params, state))
    return state


TARGETS = {
    "parabola": ([-1.0, 10.0, 1.0], [1.0, -1.0, 1.0]),
    "rosenbrock": ([0.0, 0.0], [1.0, 1.0]),
    "mixed": (
        (np.zeros(3), np.zeros((2, 2))),
        ([1.0, -1.0, 2.0], [[1.0, 0.0], [-1.0, 1.0]]),
    ),
}


@pytest.mark.one_in(6)
@every_row
@pytest.mark.parametrize("target", TARGETS)
def test_converges_inside_scan(make, target):
    # Targets, the number of steps and the tolerance of optax's own tests of optimizers.
    start, end = (
        jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float32),
            tree,
            is_leaf=lambda node: not isinstance(node, tuple),
        )
        for tree in TARGETS[target]
    )

    def objective(params):
        if target == "rosenbrock":
            return (1.0 - params[0]) ** 2 + 100.0 * (params[1] - params[0] ** 2) ** 2
        return sum(
            jnp.sum(jnp.square(x - y))
            for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(end), strict=True)
        )

    optimizer = make()

    @jax.jit
    def run(params):
        def one(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(objective)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, optimizer.init(params)), length=30_000)[0][0]

    for got, expected in zip(jax.tree.leaves(run(start)), jax.tree.leaves(end), strict=True):
        np.testing.assert_allclose(got, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.one_in(2)
@rows(
    "dart_inner_lion", "dart_inner_momentum", "dart_muon", "dart_adabelief"
)  # beside test_contract
def test_no_second_compilation(make):
    optimizer, params = make(), make_params()
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for _ in range(3):
        _, state = update(params, state, params, unexpected=1)
    assert update._cache_size() == 1


@pytest.mark.one_in(4)
@every_row
@pytest.mark.parametrize(
    ("dtype", "x64"),
    [("float16", False), ("bfloat16", True), ("float32", True), ("float64", True)],
)
def test_dtypes(make, dtype, x64):
    with jax.enable_x64(x64):
        params = make_params(dtype)
        state = assert_step_keeps_types(make(), params)
        for node in jax.tree.leaves(
            state, is_leaf=lambda n: isinstance(n, dartax.ScaleByDartState)
        ):
            if isinstance(node, dartax.ScaleByDartState):
                kept = node._replace(step_memory=None, inner_state=None)
                names = {leaf.dtype.name for leaf in jax.tree.leaves(kept)}
                assert names == {"float32", "int32", "uint32"}


@rows("dart", "dart_lion", "paper_dart", "middle")
@pytest.mark.parametrize(
    "value",
    [1.0, 1, True, np.float64(1), jnp.float16(1), jnp.ones((), jnp.bfloat16), None],
    ids=repr,
)
def test_cond_with_any_value(make, value):
    optimizer, params = make(), make_params()

    def maybe(params, state):
        return jax.lax.cond(
            jnp.sum(params["bias"]) > 0,
            lambda: optimizer.update(params, state, params, value=value),
            lambda: (params, state),
        )

    jax.eval_shape(maybe, params, optimizer.init(params))


@every_row
def test_map_params(make):
    optimizer, params = make(), make_params()
    state = optimizer.init(params)
    seen = []
    mapped = optax.tree.map_params(optimizer, lambda leaf: seen.append(leaf.shape) or leaf, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    # The memory of past steps, and what the inner transform keeps of every parameter.
    assert set(seen) <= {(), (2,), (3, 2)}
    assert seen.count((3, 2)) >= 1


WRAPPERS = {
    "MultiSteps": lambda make: optax.MultiSteps(make(), 2),
    "masked": lambda make: optax.masked(make(), {"bias": True, "kernel": True, "scale": False}),
    "partition": lambda make: optax.partition(
        {"a": make(key=1), "b": make(key=2)}, {"bias": "a", "kernel": "b", "scale": "a"}
    ),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(), 3),
    "mechanize": lambda make: optax.contrib.mechanize(make()),
    "schedule_free": lambda make: optax.contrib.schedule_free(make(), 1.0),
    "freeze": lambda make: optax.chain(
        make(), optax.transforms.freeze({"bias": True, "kernel": False, "scale": False})
    ),
    "sam": lambda make: optax.contrib.sam(make(), optax.sgd(0.1), sync_period=2),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(lambda learning_rate: make())(0.5),
}


@pytest.mark.one_in(5)
@rows("dart", "dart_sgd", "dart_inner_lion", "dart_muon", "paper_dart", "middle")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers(make, wrapper):
    state = assert_step_keeps_types(WRAPPERS[wrapper](make), make_params())
    found = [
        node
        for node in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, dartax.ScaleByDartState))
        if isinstance(node, dartax.ScaleByDartState)
    ]
    assert len(found) == (2 if wrapper == "partition" else 1)


@pytest.mark.one_in(3)
@every_row
def test_lookahead(make):
    params = optax.LookaheadParams.init_synced(make_params())
    optimizer = optax.lookahead(make(), sync_period=2, slow_step_size=0.5)
    state = jax.eval_shape(optimizer.init, params)
    after = jax.eval_shape(optimizer.update, params.fast, state, params)
    assert types(after[1]) == types(state)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ["dart", "paper_dart"])
@pytest.mark.parametrize(
    "wrapper", ["apply_if_finite", "mechanize", "schedule_free", "sam", "freeze"]
)
def test_wrapped_runs_descend(name, wrapper):
    """Behind schedule_free, whose gradients lag, the rates of dart go too far at first."""
    make = functools.partial(
        ROWS[name], **({"init_rate": 1e-3} if name == "dart" else {"rate_budget": 0.1})
    )
    optimizer, params = WRAPPERS[wrapper](make), make_params()
    state = optimizer.init(params)

    @jax.jit
    def run(params, state):
        one = lambda _, carry: step(optimizer, *carry)  # noqa: E731
        return jax.lax.fori_loop(0, 1200, one, (params, state))

    after, state = run(params, state)
    assert loss_fn(after) < loss_fn(params)
    assert np.all(after["bias"] == 1.0) == (wrapper == "freeze")
    assert dartax.metrics(state)["dart/step"] in (600, 1200)  # sam steps every second time


@pytest.mark.one_in(5)
@every_row
@pytest.mark.parametrize(
    "params",
    [
        {"used": jnp.ones(3), "unused": None},
        {"used": jnp.ones(3), "masked": optax.MaskedNode()},
        {"empty": jnp.ones((0, 2)), "used": jnp.ones(3)},
        jnp.ones((3, 2)),
        jnp.ones(()),
        [jnp.ones(()), (jnp.ones(2), {"x": jnp.ones((2, 1))})],
    ],
    ids=["None", "MaskedNode", "size zero", "one tensor", "one scalar", "containers"],
)
def test_trees(make, params):
    if make is ROWS["dart_muon"] and any(leaf.size == 0 for leaf in jax.tree.leaves(params)):
        pytest.skip("optax's Muon divides by the size of a leaf")
    assert_step_keeps_types(make(), params)


@every_row
def test_a_label_of_a_partition_that_nobody_has(make):
    optimizer = optax.partition({"used": make(), "unused": make()}, lambda _: "used")
    params = make_params()
    state = assert_step_keeps_types(optimizer, params)
    assert set(state.inner_states) == {"used", "unused"}


def test_a_size_zero_leaf_leaves_the_others_finite():
    params = {"empty": jnp.ones((0, 2)), "used": jnp.ones(3)}
    optimizer = dartax.dart()
    state = optimizer.init(params)
    update = jax.jit(functools.partial(step, optimizer))
    for _ in range(5):
        params, state = update(params, state)
    assert np.all(params["used"] < 1.0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_default_prng_of_any_kind(impl):
    with jax.default_prng_impl(impl):
        params = make_params()
        optimizer = dartax.dart(key=jax.random.key(1))
        _, state = jax.jit(functools.partial(step, optimizer))(params, optimizer.init(params))
        assert np.all(optax.tree.get(state, "last_rates") > 0)


def test_vmap_over_models():
    optimizer = dartax.dart(init_rate=1e-2)
    models = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), make_params())
    states = jax.vmap(optimizer.init)(models)
    both = jax.jit(jax.vmap(functools.partial(step, optimizer)))
    one = jax.jit(functools.partial(step, optimizer))
    params, state = (jax.tree.map(lambda leaf: leaf[1], tree) for tree in (models, states))
    for _ in range(4):
        models, states = both(models, states)
        params, state = one(params, state)
    for got, expected in zip(jax.tree.leaves(models), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(got[1], expected, rtol=1e-5)
    rates = dartax.learning_rates(jax.tree.map(lambda leaf: leaf[1], states), params)
    assert all(rate > 0 for rate in jax.tree.leaves(rates))


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (
            dartax.dart,
            {"init_rate": 1e-3, "memory_decay": 0.5, "learning_rate": 0.5, "weight_decay": 0.1},
        ),
        (dartax.dart, {"min_rate": 1e-6, "rate_budget": 0.5, "concentration": 30.0}),
        (
            dartax.paper_dart,
            {"min_rate": 1e-4, "rate_budget": 0.3, "concentration": 2.0, "eps": 1e-6, "eta": 0.1},
        ),
    ],
)
def test_another_hyperparameter_needs_no_compilation(make, changed):
    first = {name: number / 2 for name, number in changed.items()}
    injected = optax.inject_hyperparams(make)(**first)
    params = make_params()
    update = jax.jit(injected.update)
    update(params, injected.init(params), params)
    other = optax.inject_hyperparams(make)(**changed)
    direct = make(**changed)
    state, direct_state = other.init(params), direct.init(params)
    direct_update = jax.jit(direct.update)
    for _ in range(3):
        updates, state = update(params, state, params)
        expected, direct_state = direct_update(params, direct_state, params)
        for got, want in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5)
    for got, want in zip(
        jax.tree.leaves(state.inner_state), jax.tree.leaves(direct_state), strict=True
    ):
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=1e-4, atol=1e-6
        )
    assert update._cache_size() == 1


def test_a_non_finite_loss_skips_the_step():
    optimizer, params = dartax.dart(), make_params()
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for value, skipped in ((1.0, 0), (jnp.nan, 1), (jnp.inf, 2), (1.0, 2)):
        updates, state = update(params, state, params, value=value)
        assert dartax.metrics(state)["dart/skipped"] == skipped
        moved = [np.any(leaf != 0) for leaf in jax.tree.leaves(updates)]
        assert all(moved) if value == 1.0 else not any(moved)


def test_many_tensors():
    params = [jnp.ones(3)] * 60
    optimizer = dartax.dart()
    state = jax.jit(optimizer.init)(params)
    _, state = jax.jit(optimizer.update)(params, state, params)
    assert len(jax.tree.leaves(dartax.learning_rates(state, params))) == 60


# optax's wheel ships the table that its own contributions are held to.
theirs = pytest.importorskip(
    "optax.contrib._common_test", reason="this release of optax is installed without its tests"
)
COLUMNS = [
    ("test_optimizers_accept_extra_args", {"wrap": False}),
    ("test_optimizers_can_be_wrapped_in_inject_hyperparams", {}),
    ("test_preserve_dtype", {"dtype": "bfloat16"}),
    ("test_gradient_accumulation", {"dtype": "float32"}),
    *(
        ("test_state_shape_dtype_shard_stability", {"dtype": dtype})
        for dtype in (jnp.float16, jnp.float32)
    ),
    ("test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such", {}),
]


# (Rates that are none, to dart, are told.)
@pytest.mark.one_in(3)
@pytest.mark.filterwarnings("ignore:learning_rate must be a multiplier:UserWarning")
@pytest.mark.parametrize("name", ["dart", "paper_dart"])
@pytest.mark.parametrize(("column", "arguments"), COLUMNS)
def test_the_table_of_optax(name, column, arguments, monkeypatch):
    found = [f for n, f in vars(theirs.ContribTest).items() if n.startswith(column)]
    if not found:
        pytest.skip(f"this release of optax has no {column}")
    signature = inspect.signature(found[0].__wrapped__, follow_wrapped=False)
    if "opt_name" not in signature.parameters:
        pytest.skip(f"{column} takes other arguments in this release of optax")
    monkeypatch.setattr(theirs, "_get_opt_factory", lambda name: getattr(dartax, name))
    case = theirs.ContribTest()
    with jax.numpy_rank_promotion("allow"):
        found[0].__wrapped__(
            case, opt_name=name, opt_kwargs={}, wrapper_name=None, wrapper_kwargs=None, **arguments
        )
