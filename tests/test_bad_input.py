"""Every bad argument gets one sentence: the argument, the constraint, the value, the fix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax

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
        ({"init_rate": 0.0}, ValueError, "init_rate must be a positive number, got 0.0"),
        ({"init_rate": NAN}, ValueError, "init_rate must be a positive number, got nan"),
        ({"init_rate": True}, TypeError, "init_rate must be a positive number, got True"),
        ({"init_rate": np.float32(-1)}, ValueError, "init_rate must be a positive number, got -1"),
        ({"init_rate": 2.0}, ValueError, "init_rate must be below max_rate, got init_rate=2.0 and max_rate=1.0"),
        ({"max_rate": float("inf")}, ValueError, "max_rate must be a positive number, got inf"),
        ({"min_rate": -0.1}, ValueError, "min_rate must be a non-negative number, got -0.1"),
        ({"min_rate": 0.1}, ValueError, "min_rate must be below init_rate, got min_rate=0.1 and init_rate"),
        ({"concentration": 0.0}, ValueError, "concentration must be a number in .* got 0.0"),
        ({"concentration": None}, TypeError, "concentration must be .* got None"),
        ({"horizon": 1.0}, ValueError, r"horizon must be a number in \[0, 1\), got 1.0"),
        ({"horizon": -0.5}, ValueError, r"horizon must be a number in \[0, 1\), got -0.5"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be a non-negative number, got -0.1"),
        ({"init_rate": np.str_("a")}, TypeError, "init_rate must be a positive number, got"),
        ({"init_rate": np.array("a")}, TypeError, "init_rate must be a positive number, got"),
        ({"init_rate": np.True_}, TypeError, "init_rate must be a positive number, got"),
        ({"horizon": jnp.ones(2)}, ValueError, r"horizon must be .* got shape \(2,\)"),
        ({"max_rate": 10**400}, ValueError, "max_rate must be a positive number, got 1000"),
        ({"direction_dtype": "foo"}, TypeError, "direction_dtype must be a floating dtype, got 'foo'"),
        ({"direction_dtype": "int32"}, TypeError, "direction_dtype must be a floating dtype, got 'int32'"),
        ({"inner": "adam"}, TypeError, "inner must be an optax.GradientTransformation, got 'adam'"),
    ],
)  # fmt: skip
def test_dart_arguments(arguments, error, match):
    with pytest.raises(error, match=match) as caught:
        dartax.dart(**arguments)
    sentence(caught)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"lr_min": 0.0}, ValueError, "lr_min must be a positive number, got 0.0"),
        ({"lr_min": 0.1, "lr_max": 0.1}, ValueError, "lr_min must be below lr_max, got lr_min=0.1 and lr_max=0.1"),
        ({"lr_max": "big"}, TypeError, "lr_max must be a positive number, got 'big'"),
        ({"alpha": 0.01}, ValueError, r"alpha must be a number in \[0.1, 10\], got 0.01"),
        ({"alpha": NAN}, ValueError, "alpha must be .* got nan"),
        ({"betas": 0.9}, TypeError, "betas must be a pair of numbers, got 0.9"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be a number in \[0, 1\), got 1.0"),
        ({"eps": 0.0}, ValueError, "eps must be a positive number, got 0.0"),
        ({"eta": -0.01}, ValueError, "eta must be a non-negative number, got -0.01"),
        ({"weight_decay": NAN}, ValueError, "weight_decay must be .* got nan"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be .* got -1"),
    ],
)  # fmt: skip
def test_paper_dart_arguments(arguments, error, match):
    with pytest.raises(error, match=match) as caught:
        dartax.paper_dart(**arguments)
    sentence(caught)


@pytest.mark.parametrize("make", [dartax.dart, dartax.scale_by_dart, dartax.paper_dart])
@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ({}, ValueError, "params must have at least one array, got the empty tree"),
        (None, ValueError, "params must have at least one array, got the empty tree"),
        ({"n": jnp.arange(3)}, TypeError, "params must have real floating dtypes, got int32 at 'n'"),
        ({"n": 3}, TypeError, "params must have real floating dtypes, got int32 at 'n'"),
        ({"n": "x"}, TypeError, "params must be arrays, got 'x' at 'n'"),
        ({"z": jnp.ones(2, jnp.complex64)}, TypeError, "got complex64 at 'z'; .*split_real_and_imaginary"),
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


def test_blocks():
    with pytest.raises(ValueError, match="blocks must be a pytree of labels") as caught:
        dartax.dart(blocks={"other": "x"}).init(PARAMS)
    sentence(caught)
    with pytest.raises(TypeError, match="blocks must give hashable labels") as caught:
        dartax.dart(blocks=lambda path: [path]).init(PARAMS)
    sentence(caught)


def test_state_of_another_kind():
    optimizer = dartax.scale_by_dart()
    for state in (None, optax.adam(1e-3).init(PARAMS), vars):
        with pytest.raises(TypeError, match="state must be a ScaleByDartState, got") as caught:
            optimizer.update(PARAMS, state, PARAMS)
        sentence(caught)


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
            ValueError, match="state must have version 3, got 1 .* call init"
        ) as error:
            call()
        sentence(error)


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


def test_keys():
    keys = (
        (-1, ValueError),
        (2**32, ValueError),
        (np.int64(-1), ValueError),
        (0.5, TypeError),
        ("k", TypeError),
        (np.array("k"), TypeError),
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
    optax.inject_hyperparams(dartax.dart)(init_rate=1e-3, max_rate=0.5).init(PARAMS)
    dartax.dart(init_rate=jnp.asarray(1e-3)).init(PARAMS)
