"""Every bad argument gets one sentence: the argument, the constraint, the value, the fix."""

import functools
import itertools

import chex
import flax.linen
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax._state import VERSION

NAN = float("nan")
PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}


def sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    assert "got" in text
    assert ";" in text  # the fix
    return text


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be a non-negative number or an optax schedule, got -1"),
        ({"learning_rate": NAN}, ValueError, "learning_rate must be .* got nan"),
        ({"learning_rate": "1"}, TypeError, "learning_rate must be .* got '1'"),
        ({"init_rate": 0.0}, ValueError, "init_rate must be a number of at least 1e-12, got 0.0"),
        ({"init_rate": NAN}, ValueError, "init_rate must be a number of at least 1e-12, got nan"),
        ({"init_rate": True}, TypeError, "init_rate must be a number of at least 1e-12, got True"),
        ({"init_rate": np.float32(-1)}, ValueError, "init_rate must be a number of at least 1e-12, got -1"),
        ({"init_rate": 2.0}, ValueError, "init_rate must be below rate_budget, got init_rate=2.0 and rate_budget=1.0"),
        ({"rate_budget": float("inf")}, ValueError, "rate_budget must be a positive number, got inf"),
        ({"min_rate": -0.1}, ValueError, "min_rate must be a non-negative number, got -0.1"),
        ({"min_rate": 0.1}, ValueError, "min_rate must be below init_rate, got min_rate=0.1 and init_rate"),
        ({"concentration": 0.0}, ValueError, "concentration must be a number in .* got 0.0"),
        ({"concentration": None}, TypeError, "concentration must be .* got None"),
        ({"memory_decay": 1.0}, ValueError, r"memory_decay must be a number in \[0, 1\), got 1.0"),
        ({"memory_decay": -0.5}, ValueError, r"memory_decay must be a number in \[0, 1\), got -0.5"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be a non-negative number, got -0.1"),
        ({"init_rate": np.str_("a")}, TypeError, "init_rate must be a number of at least 1e-12, got"),
        ({"init_rate": np.array("a")}, TypeError, "init_rate must be a number of at least 1e-12, got"),
        ({"init_rate": np.True_}, TypeError, "init_rate must be a number of at least 1e-12, got"),
        ({"memory_decay": jnp.ones(2)}, ValueError, r"memory_decay must be .* got shape \(2,\)"),
        ({"rate_budget": 10**400}, ValueError, "rate_budget must be a positive number, got 1000"),
        ({"blocks": "chanel"}, ValueError, "blocks must be one of 'tensor', 'channel', 'element', a tree .* got 'chanel'"),
        ({"memory_dtype": "foo"}, TypeError, "memory_dtype must be a floating dtype with the range of float32, got 'foo'"),
        ({"memory_dtype": "int32"}, TypeError, "memory_dtype must be a floating dtype with the range of float32, got 'int32'"),
        ({"inner": "adam"}, TypeError, "inner must be an optax.GradientTransformation, got 'adam'"),
        ({"inner": optax.adam}, TypeError, "inner must be an optax.GradientTransformation, got <function adam"),
        ({"learning_rate": float("inf")}, ValueError, "learning_rate must be .* got inf"),
        ({"learning_rate": None}, TypeError, "learning_rate must be .* got None"),
        ({"learning_rate": 1j}, TypeError, "learning_rate must be .* got 1j"),
        ({"learning_rate": jnp.asarray(1j)}, TypeError, r"learning_rate must be .* got Array\(0"),
        ({"learning_rate": jnp.ones(3)}, ValueError, r"learning_rate must be .* got shape \(3,\)"),
        ({"init_rate": -1e-5}, ValueError, "init_rate must be a number of at least 1e-12, got -1e-05"),
        ({"init_rate": [1e-5]}, TypeError, r"init_rate must be a number of at least 1e-12, got \[1e-05\]"),
        ({"rate_budget": 0.0}, ValueError, "rate_budget must be a positive number, got 0.0"),
        ({"rate_budget": 1e-6}, ValueError, "init_rate must be below rate_budget, got init_rate=0.0001 and rate_budget=1e-06"),
        ({"min_rate": NAN}, ValueError, "min_rate must be a non-negative number, got nan"),
        ({"min_rate": 1e-4}, ValueError, "min_rate must be below init_rate, got min_rate=0.0001"),
        ({"concentration": 1e5}, ValueError, r"concentration must be a number in \[1e-4, 1e4\], got 100000.0"),
        ({"concentration": -10}, ValueError, "concentration must be a number in .* got -10"),
        ({"memory_decay": None}, TypeError, r"memory_decay must be a number in \[0, 1\), got None"),
        ({"memory_decay": NAN}, ValueError, r"memory_decay must be a number in \[0, 1\), got nan"),
        ({"weight_decay": "0.1"}, TypeError, "weight_decay must be a non-negative number, got '0.1'"),
        ({"averaged": 1}, TypeError, "averaged must be True or False, got 1; leave it out"),
        ({"averaged": jnp.asarray(True)}, TypeError, "averaged must be True or False, got Array"),
        ({"mask": 3}, TypeError, "mask must be a tree of bools, .* got the leaf 3; pass e.g."),
        ({"mask": {"w": "yes"}}, TypeError, "mask must be a tree of bools, .* got the leaf 'yes'"),
        ({"mask": {"w": 1.0}}, TypeError, "mask must be a tree of bools, .* got the leaf 1.0"),
        ({"memory_dtype": None}, TypeError, "memory_dtype must be a floating dtype with the range of float32, got None"),
        ({"memory_dtype": "complex64"}, TypeError, "memory_dtype must be a floating dtype with the range of float32, got 'complex64'"),
    ],
)  # fmt: skip
def test_dart_arguments(arguments, error, match):
    with pytest.raises(error, match=match) as caught:
        dartax.dart(**arguments)
    sentence(caught)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"min_rate": 0.0}, ValueError, "min_rate must be a positive number, got 0.0"),
        ({"min_rate": 0.1, "rate_budget": 0.1}, ValueError, "min_rate must be below rate_budget, got min_rate=0.1 and rate_budget=0.1"),
        ({"rate_budget": "big"}, TypeError, "rate_budget must be a positive number, got 'big'"),
        ({"concentration": 0.01}, ValueError, r"concentration must be a number in \[0.1, 10\], got 0.01"),
        ({"concentration": NAN}, ValueError, "concentration must be .* got nan"),
        ({"b2": 1.0}, ValueError, r"b2 must be a number in \[0, 1\), got 1.0"),
        ({"b1": "a"}, TypeError, r"b1 must be a number in \[0, 1\), got 'a'"),
        ({"b1": -0.1}, ValueError, r"b1 must be a number in \[0, 1\), got -0.1"),
        ({"implementation": "slow"}, ValueError, "implementation must be 'fused' or 'plain', got 'slow'; pass 'fused'"),
        ({"eps": 0.0}, ValueError, "eps must be a number of at least 1.18e-38, got 0.0"),
        ({"eta": -0.01}, ValueError, "eta must be a non-negative number, got -0.01"),
        ({"weight_decay": NAN}, ValueError, "weight_decay must be .* got nan"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be .* got -1"),
        ({"min_rate": 0.2}, ValueError, "min_rate must be below rate_budget, got min_rate=0.2 and rate_budget=0.1"),
        ({"rate_budget": float("inf")}, ValueError, "rate_budget must be a positive number, got inf"),
        ({"rate_budget": jnp.ones(2)}, ValueError, r"rate_budget must be a positive number, got shape \(2,\)"),
        ({"concentration": 11.0}, ValueError, r"concentration must be a number in \[0.1, 10\], got 11.0"),
        ({"eps": NAN}, ValueError, "eps must be a number of at least 1.18e-38, got nan"),
        ({"eta": None}, TypeError, "eta must be a non-negative number, got None"),
        ({"eta": NAN}, ValueError, "eta must be a non-negative number, got nan"),
        ({"mask": "w"}, TypeError, "mask must be a tree of bools, .* got the leaf 'w'"),
    ],
)  # fmt: skip
def test_paper_dart_arguments(arguments, error, match):
    with pytest.raises(error, match=match) as caught:
        dartax.paper_dart(**arguments)
    sentence(caught)


@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (dartax.dart, "horizon", "memory_decay"),
        (dartax.dart, "max_rate", "rate_budget"),
        (dartax.dart, "direction_dtype", "memory_dtype"),
        (dartax.scale_by_dart, "horizon", "memory_decay"),
        (dartax.paper_dart, "lr_min", "min_rate"),
        (dartax.paper_dart, "lr_max", "rate_budget"),
        (dartax.paper_dart, "alpha", "concentration"),
        (dartax.paper_dart, "betas", "b1 and b2"),
    ],
)
def test_old_names_are_refused_with_the_new_ones(make, old, new):
    with pytest.raises(TypeError, match=f"{old} must .* got {old}=0.5; pass {new}.") as caught:
        make(**{old: 0.5})
    sentence(caught)


WHOLE_OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "sgd": optax.sgd(0.1),
    "adamw": optax.adamw(1e-3, weight_decay=10.0),
    "schedule": optax.adam(optax.linear_schedule(1.0, 0.0, 10)),
    "lion": optax.lion(1e-3),
    "warm-up": optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1.0, 5, 100)),
    "rprop": optax.rprop(1e-3),
    "noisy": optax.noisy_sgd(0.1, eta=100.0, key=0),
    "dart": dartax.dart(),
}
DIRECTIONS = {
    "decay alone": optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e3)),
    "noise": optax.chain(optax.identity(), optax.add_noise(1e6, 0.55, key=0)),
    "clip": optax.clip_by_global_norm(1e-3),
    "trust ratio": optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio()),
    "factored": optax.scale_by_factored_rms(),
    "scale_by_dart": dartax.scale_by_dart(),
    "partition": optax.partition(
        {"x": optax.scale_by_adam(), "y": optax.identity()}, {"w": "x", "b": "y"}
    ),
    "one that counts elements": optax.stateless(
        lambda u, p: {**u, "w": jnp.reshape(u["w"], (2, 3))}
    ),
}


@pytest.mark.parametrize("inner", WHOLE_OPTIMIZERS.values(), ids=WHOLE_OPTIMIZERS)
@pytest.mark.parametrize(
    "make",
    [dartax.dart, dartax.scale_by_dart, functools.partial(dartax.dart, blocks="channel")],
    ids=["dart", "scale_by_dart", "channel"],
)
def test_a_whole_optimizer_as_inner(make, inner):
    match = "inner must keep the sign .* optax.adam.1e-3. does; pass .* optax.scale_by_adam"
    for init in (make(inner=inner).init, jax.jit(make(inner=inner).init)):
        with pytest.raises(ValueError, match=match) as caught:
            init(PARAMS)
        sentence(caught)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("inner", DIRECTIONS.values(), ids=DIRECTIONS)
def test_directions_as_inner(inner):
    optimizer = dartax.dart(inner=inner)
    state = optimizer.init(PARAMS)
    assert jax.tree.structure(jax.jit(optimizer.init)(PARAMS)) == jax.tree.structure(state)
    optimizer.update(PARAMS, state, PARAMS)
    dartax.dart(inner=inner, implementation="plain").update(PARAMS, optimizer.init(PARAMS), PARAMS)


def test_an_inner_transform_that_depends_on_a_traced_value():
    make = optax.inject_hyperparams(lambda eps: dartax.dart(inner=optax.scale_by_adam(eps=eps)))
    assert jax.jit(make(eps=1e-6).init)(PARAMS).hyperparams["eps"] == np.float32(1e-6)


@pytest.mark.parametrize("make", [dartax.dart, dartax.scale_by_dart, dartax.paper_dart])
@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ({}, ValueError, "params must have at least one array, got the empty tree"),
        (None, ValueError, "params must have at least one array, got the empty tree"),
        ({"n": jnp.arange(3)}, TypeError, "params must have floating or complex dtypes, got int32 at 'n'"),
        ({"n": 3}, TypeError, "params must have floating or complex dtypes, got int32 at 'n'"),
        ({"n": "x"}, TypeError, "params must be arrays, got a str at 'n'"),
        ({"m": True}, TypeError, "params must have floating or complex dtypes, got bool at 'm'; pass what"),
        ({"k": jax.random.key(0)}, TypeError, "params must have floating or complex dtypes, got key<fry> at 'k'; pass what"),
        (jnp.ones(3, jnp.uint8), TypeError, "params must have floating or complex dtypes, got uint8; pass"),
        ([jnp.ones(1), jnp.sin], TypeError, "params must be arrays, got a .* at '1'; pass what is trained"),
        (object(), TypeError, "params must be arrays, got a object; pass"),
    ],
)  # fmt: skip
def test_parameters(make, params, error, match):
    with pytest.raises(error, match=match) as caught:
        make().init(params)
    sentence(caught)


@pytest.mark.parametrize("make", [dartax.dart, dartax.scale_by_dart, dartax.paper_dart])
def test_gradients_of_another_structure_or_shape(make):
    optimizer = make()
    state = optimizer.init(PARAMS)
    with pytest.raises(ValueError, match=r"updates must .* structure .* missing \['b'\]") as caught:
        optimizer.update({"w": PARAMS["w"]}, state, PARAMS)
    sentence(caught)
    transposed = {"w": PARAMS["w"].T, "b": PARAMS["b"]}
    with pytest.raises(
        ValueError, match=r"updates must .* got \(3, 2\) instead of \(2, 3\) at 'w'"
    ) as caught:
        optimizer.update(transposed, state, PARAMS)
    sentence(caught)
    with pytest.raises(ValueError, match=r"grad must .* shapes") as caught:
        optimizer.update(PARAMS, state, PARAMS, grad=transposed)
    sentence(caught)
    state = optimizer.init([PARAMS["w"]])
    with pytest.raises(ValueError, match="updates must .* other containers") as caught:
        optimizer.update((PARAMS["w"],), state)
    sentence(caught)


@pytest.mark.parametrize("make", [dartax.dart, dartax.scale_by_dart])
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"lr": 1e-3}, "lr must not be given to .*dart, got lr=0.001; leave it out"),
        ({"b1": 0.9}, r"b1 must not .* pass inner=dartax.inner.adam\(b1=...\)"),
        ({"schedule": 1.0}, "schedule must not .* pass it as learning_rate, the first"),
    ],
)
def test_arguments_of_other_optimizers_are_answered(make, arguments, match):
    with pytest.raises(TypeError, match=match) as caught:
        make(**arguments)
    sentence(caught)


def test_a_module_is_not_taken_for_an_array():
    with pytest.raises(TypeError, match="params must be arrays, got a Dense; pass") as caught:
        dartax.dart().init(flax.linen.Dense(3))
    sentence(caught)


@pytest.mark.parametrize("make", [dartax.dart, dartax.scale_by_dart, dartax.paper_dart])
@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"updates": None}, ValueError, r"updates must have the tree structure .* missing \['b', 'w'\]"),
        ({"updates": {"w": "x", "b": jnp.ones(3)}}, ValueError, r"updates must have the shapes .* got \(\) instead of \(2, 3\) at 'w'"),
        ({"updates": {"w": 1j * jnp.ones((2, 3)), "b": jnp.ones(3)}}, TypeError, "updates must be real where the parameters are, got complex64 at 'w'; take"),
        ({"grad": {"w": 1j * jnp.ones((2, 3)), "b": jnp.ones(3)}}, TypeError, "grad must be real where the parameters are, got complex64 at 'w'; take"),
        ({"grad": 3}, ValueError, r"grad must have the tree structure .* unknown \['array'\]; pass the same"),
        ({"params": {"w": jnp.ones((2, 3))}}, ValueError, r"params must have the tree structure .* missing \['b'\]"),
        ({"params": {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}}, ValueError, r"params must have the shapes .* got \(3, 2\)"),
        ({"value": "low"}, TypeError, "value must be a real scalar, got 'low'; pass the loss"),
        ({"value": jnp.ones(3)}, TypeError, r"value must be a real scalar, got float32 of shape \[3\]; pass the loss"),
        ({"value": jnp.asarray(1j)}, TypeError, r"value must be a real scalar, got complex64 of shape \[\]; pass the loss"),
    ],
)  # fmt: skip
def test_update_arguments(make, arguments, error, match):
    optimizer = make()
    state = optimizer.init(PARAMS)
    with pytest.raises(error, match=match) as caught:
        optimizer.update(**{"updates": PARAMS, "state": state, "params": PARAMS, **arguments})
    sentence(caught)


@pytest.mark.parametrize("make", [dartax.dart, dartax.paper_dart])
@pytest.mark.parametrize(
    ("returned", "match"),
    [
        (None, "got None"),
        ("1", "got '1'"),
        (jnp.ones(2), r"got float32 of shape \[2\]"),
        (jnp.asarray(1j), r"got complex64 of shape \[\]"),
    ],
)
def test_what_a_schedule_returns(make, returned, match):
    optimizer = make(learning_rate=lambda count: returned)
    match = rf"learning_rate\(count\) must be a real scalar, {match}; return a number"
    with pytest.raises(TypeError, match=match) as caught:
        optimizer.init(PARAMS)
    sentence(caught)


def test_blocks():
    with pytest.raises(ValueError, match="blocks must be a pytree of labels") as caught:
        dartax.dart(blocks={"other": "x"}).init(PARAMS)
    sentence(caught)
    with pytest.raises(TypeError, match="blocks must give hashable labels") as caught:
        dartax.dart(blocks=lambda path: [path]).init(PARAMS)
    sentence(caught)
    for labels in (["a"], {"w": None, "b": 1}, {"w": 1, "b": 2, "c": 3}):
        with pytest.raises(ValueError, match="blocks must be a pytree of labels .* got") as caught:
            dartax.dart(blocks=labels).init(PARAMS)
        sentence(caught)
    with pytest.raises(
        TypeError, match=r"blocks must give hashable labels, got \[1, array"
    ) as caught:
        dartax.dart(blocks={"w": np.ones(2), "b": 1}).init(PARAMS)
    sentence(caught)


def test_state_of_another_kind():
    optimizer = dartax.scale_by_dart()
    saved = flax.serialization.to_state_dict(optimizer.init(PARAMS))
    plain = tuple(optimizer.init(PARAMS))
    # What a chain holds is not what its member holds.
    of_chain = dartax.dart().init(PARAMS)
    for state in (None, optax.adam(1e-3).init(PARAMS), vars, saved, plain, of_chain):
        with pytest.raises(TypeError, match="state must be a ScaleByDartState, got") as caught:
            optimizer.update(PARAMS, state, PARAMS)
        sentence(caught)


def test_state_of_other_blocks():
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    optimizer = dartax.dart(blocks={"a": 0, "b": 0, "c": 1})
    for blocks, message in (
        (None, "got 3 blocks instead of 2; build the optimizer as it was then"),
        ({"a": 0, "b": 1, "c": 1}, "got others for 1 of 3 leaves; .* call init again"),
    ):
        state = optimizer.init(params)
        with pytest.raises(ValueError, match=f"blocks must be those that .* {message}") as error:
            dartax.dart(blocks=blocks).update(params, state, params)
        sentence(error)


def test_state_of_another_inner_transform():
    inners = [dartax.inner.adam(), dartax.inner.momentum(), dartax.inner.muon(), optax.trace(0.9)]
    for before, now in itertools.permutations(inners[:3], 2):
        state = dartax.dart(inner=before).init(PARAMS)
        with pytest.raises(ValueError, match="inner and blocks must be those") as error:
            dartax.dart(inner=now).update(PARAMS, state)
        sentence(error)
    for before, now in ((None, "channel"), ("channel", None), ("channel", "element")):
        state = dartax.dart(blocks=before).init(PARAMS)
        with pytest.raises(ValueError, match="blocks must be those that the state was") as error:
            dartax.dart(blocks=now).update(PARAMS, state, PARAMS)
        sentence(error)
    # Those with one kind of state may follow one another.
    state = dartax.dart(inner=inners[1]).init(PARAMS)
    dartax.dart(inner=inners[3]).update(PARAMS, state, PARAMS)


def test_state_of_another_version():
    params = {"w": jnp.ones(2)}
    optimizer = dartax.dart()
    state = optimizer.init(params)
    old = (state[0]._replace(version=jnp.asarray(1, jnp.int32)), *state[1:])
    for call in (
        lambda: optimizer.update(params, old, params),
        lambda: dartax.learning_rates(old, params),
        lambda: dartax.metrics(old),
        lambda: dartax.describe(old, params),
    ):
        with pytest.raises(
            ValueError, match=f"state must have version {VERSION}, got 1 .* call init"
        ) as error:
            call()
        sentence(error)


READERS = [
    dartax.learning_rates,
    dartax.expected_learning_rates,
    dartax.learning_rate_std,
    dartax.concentrations,
    dartax.describe,
    lambda state, params: dartax.metrics(state),
]


@pytest.mark.parametrize("read", READERS)
def test_readers(read):
    for state, found in ((None, "NoneType"), (PARAMS, "dict"), (optax.EmptyState(), "EmptyState")):
        match = f"opt_state must hold the state of a DART transform, got {found} without one"
        with pytest.raises(ValueError, match=match) as caught:
            read(state, PARAMS)
        sentence(caught)
    batch = jax.vmap(dartax.dart().init)(jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS))
    with pytest.raises(ValueError, match=r"opt_state must be .* got a batch of \[2\]") as caught:
        read(batch, PARAMS)
    sentence(caught)


@pytest.mark.parametrize("read", READERS[:-1])
def test_readers_of_another_tree(read):
    state = dartax.dart().init(PARAMS)
    for params, number in ((None, 0), ({"w": PARAMS["w"]}, 1), ([1, 2, 3], 3)):
        match = f"params must be the tree that init was given, with 2 leaves, got {number}; pass"
        with pytest.raises(ValueError, match=match) as caught:
            read(state, params)
        sentence(caught)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda d: d.sample(0, 1.0), ValueError, r"concentration must have shape \[..., C\], got the scalar 1.0"),
        (lambda d: d.mean(1.0), ValueError, "concentration must have shape .* got the scalar 1.0"),
        (lambda d: d.variance(2.0), ValueError, "concentration must have shape .* got the scalar 2.0"),
        (lambda d: d.entropy(3.0), ValueError, "concentration must have shape .* got the scalar 3.0"),
        (lambda d: d.log_prob(0.5, 4.0), ValueError, "concentration must have shape .* got the scalar 4.0"),
        (lambda d: d.kl_divergence(jnp.ones(2), 5.0), ValueError, "concentration must have shape .* got the scalar 5.0"),
        (lambda d: d.sample(0, jnp.ones(3, int)), TypeError, "concentration must have a floating dtype, got int32; pass floats"),
        (lambda d: d.entropy(jnp.ones(3, int)), TypeError, "concentration must have a floating dtype, got int32"),
        (lambda d: d.mean(jnp.ones(3, bool)), TypeError, "concentration must have a floating dtype, got bool"),
        (lambda d: d.sample(0, jnp.ones(3), 4), TypeError, r"shape must be a sequence of ints, got 4; pass \(4,\)"),
        (lambda d: d.sample("x", jnp.ones(3)), TypeError, "key must be an int or a JAX key, got 'x'"),
        (lambda d: d.sample(-1, jnp.ones(3)), ValueError, r"key must be an int in \[0, 2\*\*32\), got -1"),
    ],
)  # fmt: skip
def test_dirichlet(call, error, match):
    with pytest.raises(error, match=match) as caught:
        call(dartax.dirichlet)
    sentence(caught)


def test_describe_inside_jit():
    state = dartax.dart().init(PARAMS)
    with pytest.raises(TypeError, match="must hold concrete arrays, got a tracer") as caught:
        jax.jit(lambda state: dartax.describe(state, PARAMS))(state)
    sentence(caught)


def test_init_rate_above_the_share_of_a_block():
    with pytest.raises(
        ValueError, match="init_rate must be below 0.5, the mean rate when 2 blocks"
    ) as caught:
        dartax.dart(init_rate=0.6).init(PARAMS)
    sentence(caught)


@pytest.mark.parametrize("rates", [{"init_rate": 1e-5 * (1 + 1e-12), "min_rate": 1e-5}])
def test_init_rate_beside_min_rate_in_float32(rates):
    with pytest.raises(
        ValueError, match="init_rate must be at least .* above min_rate, .* got init_rate"
    ) as caught:
        dartax.dart(**rates).init(PARAMS)
    sentence(caught)


def test_keys():
    keys = (
        (-1, ValueError),
        (2**32, ValueError),
        (np.int64(-1), ValueError),
        (0.5, TypeError),
        ("k", TypeError),
        (np.array("k"), TypeError),
        (None, TypeError),
        (True, TypeError),
        (jnp.zeros(3, jnp.uint32), ValueError),
        (jnp.zeros(2), ValueError),
        (jax.random.split(jax.random.key(0), 3), ValueError),
    )
    for key, error in keys:
        with pytest.raises(error, match="key must be") as caught:
            dartax.dart(key=key)
        sentence(caught)
        with pytest.raises(error, match="key must be") as caught:
            dartax.paper_dart(key=key)
        sentence(caught)


def test_arrays_and_tracers_are_not_compared_with_their_range():
    # optax.inject_hyperparams hands over arrays whose values are not known yet.
    optax.inject_hyperparams(dartax.dart)(init_rate=1e-3, rate_budget=0.5).init(PARAMS)
    dartax.dart(init_rate=jnp.asarray(1e-3)).init(PARAMS)


@pytest.mark.parametrize(
    ("make", "arguments", "error", "match"),
    [
        (dartax.inner.adam, {"b1": 1.0}, ValueError, r"b1 must be a number in \[0, 1\), got 1.0"),
        (dartax.inner.adam, {"b2": NAN}, ValueError, r"b2 must be a number in \[0, 1\), got nan"),
        (
            dartax.inner.adam,
            {"eps": 0.0},
            ValueError,
            "eps must be a number of at least 1.18e-38, got 0.0",
        ),
        (
            dartax.inner.adam,
            {"eps": "1e-8"},
            TypeError,
            "eps must be a number of at least 1.18e-38, got '1e-8'",
        ),
        (
            dartax.inner.momentum,
            {"decay": -0.1},
            ValueError,
            r"decay must be a number in \[0, 1\), got -0.1",
        ),
        (
            dartax.inner.momentum,
            {"decay": None},
            TypeError,
            r"decay must be a number in \[0, 1\), got None",
        ),
        (dartax.inner.lion, {"b1": 2}, ValueError, r"b1 must be a number in \[0, 1\), got 2"),
        (
            dartax.inner.lion,
            {"b2": (0.9,)},
            TypeError,
            r"b2 must be a number in \[0, 1\), got \(0.9,\)",
        ),
    ],
)
def test_bad_directions(make, arguments, error, match):
    with pytest.raises(error, match=match) as caught:
        make(**arguments)
    sentence(caught)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"init_rate": 1e-4, "min_rate": 1e-3}, "min_rate must be below init_rate"),
        ({"init_rate": 0.6}, "init_rate must be below 0.5, the mean rate when 2 blocks"),
    ],
)
def test_first_rates_that_are_arrays(arguments, match):
    params = {"b": jnp.ones(3), "w": jnp.ones(3)}
    optimizer = optax.inject_hyperparams(dartax.dart)(**arguments)
    with pytest.raises(ValueError, match=match) as caught:
        optimizer.init(params)
    sentence(caught)
    # Inside jit they have no values. Then the rates stay in their range, and finite.
    state = jax.jit(optimizer.init)(params)
    updates, _ = jax.jit(optimizer.update)(params, state, params)
    chex.assert_tree_all_finite(updates)
    assert sum(float(-jnp.mean(u)) for u in jax.tree.leaves(updates)) <= 1.01


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e8m0fnu", "float16"])
def test_a_memory_where_small_steps_are_zero_is_refused(dtype):
    match = f"memory_dtype must be a floating dtype with the range of float32, got '{dtype}'; pass"
    with pytest.raises(TypeError, match=match) as caught:
        dartax.scale_by_dart(memory_dtype=dtype)
    sentence(caught)


def test_a_memory_decay_that_was_rounded_to_one_is_refused():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    match = "memory_decay must be below 1, got 1.0 as bfloat16; with optax.inject_hyperparams pass"
    with pytest.raises(ValueError, match=match) as caught:
        optax.inject_hyperparams(dartax.dart)().init(params)
    sentence(caught)
    optax.inject_hyperparams(dartax.dart, hyperparam_dtype=jnp.float32)().init(params)


@pytest.mark.parametrize("make", [dartax.dart, dartax.paper_dart])
@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        ({"w": True}, ValueError, "mask must give a tree with the structure of params .* got PyTree"),
        (lambda params: None, ValueError, "mask must give a tree with the structure .* got None"),
        (lambda params: 1.0, TypeError, "mask must be a tree of bools, .* got the leaf 1.0"),
        (lambda params: {"w": params["w"] > 0, "b": True}, TypeError, "mask must be a tree of bools, .* got the leaf"),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit(make, mask, error, match):
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    optimizer = make(weight_decay=0.1, mask=mask)
    with pytest.raises(error, match=match) as caught:
        optimizer.update(params, optimizer.init(params), params)
    sentence(caught)


@pytest.mark.parametrize(
    ("schedules", "match"),
    [
        (None, "schedules must map paths to schedules, got None; pass what"),
        ({"w": None}, r"schedules\['w'\] must be a non-negative number or an optax schedule"),
    ],
)
def test_rates_that_are_none(schedules, match):
    with pytest.raises(TypeError, match=match) as caught:
        dartax.scale_by_learning_rates(schedules)
    sentence(caught)
