"""Complex leaves: one block each, real inner products, squares of the modulus."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax
from dartax import inner
from dartax._complex import in_pairs, out_of_pairs

MATRIX = jnp.array([[1 + 2j, -3j, 0.5], [2, -1j, 3 + 3j]], jnp.complex64)
TARGET = {"matrix": MATRIX, "scalar": jnp.asarray(1 - 1j, jnp.complex64), "real": jnp.arange(2.0)}


def loss(params, target=TARGET):
    terms = jax.tree.map(lambda p, t: jnp.sum(jnp.abs(p - t) ** 2), params, target)
    return sum(jax.tree.leaves(terms))


def zeros(target=TARGET):
    return jax.tree.map(jnp.zeros_like, target)


def train(optimizer, loss, params, steps, conjugate=True):
    def step(carry, _):
        params, state = carry
        gradient = jax.grad(loss)(params)
        gradient = jax.tree.map(jnp.conj, gradient) if conjugate else gradient
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps)[0])
    return scan((params, optimizer.init(params)))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("directions", "implementation"),
    [
        (None, "fused"),
        (None, "plain"),
        (optax.scale_by_adam(), "fused"),
        (optax.identity(), "fused"),
        (inner.muon(), "fused"),
    ],
    ids=["adam", "plain_adam", "optax_adam", "sgd", "muon"],
)
def test_trains_to_the_target(directions, implementation):
    optimizer = dartax.dart(
        optax.linear_schedule(1.0, 0.0, 400), inner=directions, implementation=implementation
    )
    params, _ = train(optimizer, loss, zeros(), 400)
    assert loss(params) < 1e-5
    assert jax.tree.map(lambda p: p.dtype, params) == jax.tree.map(lambda t: t.dtype, TARGET)


def test_paper_dart_trains():
    params, _ = train(dartax.paper_dart(), loss, zeros(), 400)
    assert loss(params) < 0.05 * loss(zeros())


def test_the_hypergradient_is_the_real_part_of_the_inner_product():
    optimizer = dartax.dart(inner=optax.identity(), memory_decay=0.0, init_rate=0.1)
    first, second = MATRIX, (2 - 1j) * MATRIX[::-1]
    state = optimizer.init(jnp.zeros_like(MATRIX))
    _, state = optimizer.update(first, state)
    rate = state[0].last_rates[0]
    _, state = optimizer.update(second, state)
    expected = -np.real(np.vdot(np.asarray(second), np.asarray(first))) * rate
    np.testing.assert_allclose(state[0].hypergradient[0], expected, rtol=1e-5)


def test_a_run_is_that_of_its_real_and_imaginary_parts():
    optimizer = dartax.dart(weight_decay=0.01)
    native, _ = train(optimizer, loss, zeros(), 100)

    def of_pairs(pairs):
        return loss(out_of_pairs(pairs, TARGET))

    pairs, _ = train(optimizer, of_pairs, in_pairs(zeros()), 100, conjugate=False)
    for a, b in zip(
        jax.tree.leaves(native), jax.tree.leaves(out_of_pairs(pairs, TARGET)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_sample_of_a_large_complex_tensor_trains():
    target = jax.random.normal(jax.random.key(0), (600, 300), jnp.complex64)
    optimizer = dartax.dart(optax.linear_schedule(1.0, 0.0, 300))
    params, state = train(optimizer, lambda p: loss(p, target), jnp.zeros_like(target), 300)
    assert state[0].step_memory.size < target.size
    assert loss(params, target) < 1e-3 * loss(jnp.zeros_like(target), target)


def test_double_precision():
    with jax.enable_x64(True):
        target = jnp.asarray(np.asarray(MATRIX), jnp.complex128)
        optimizer = dartax.dart(optax.linear_schedule(1.0, 0.0, 600))
        params, _ = train(optimizer, lambda p: loss(p, target), jnp.zeros_like(target), 600)
        assert params.dtype == jnp.complex128
        assert loss(params, target) < 1e-6


def test_a_fault_in_either_part_costs_its_step():
    optimizer = dartax.dart()
    params = zeros()
    state = optimizer.init(params)
    for bad in (complex(np.nan, 0), complex(0, np.inf)):
        gradient = {**params, "scalar": jnp.asarray(bad, jnp.complex64)}
        updates, state = optimizer.update(gradient, state, params)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert state[0].skipped == 2


def test_what_was_learned_can_be_looked_at():
    params, state = train(dartax.dart(), loss, zeros(), 20)
    table = dartax.describe(state, params)
    assert "matrix" in table
    assert "scalar" in table
    rates = dartax.learning_rates(state, params)
    assert jax.tree.map(jnp.shape, rates) == {"matrix": (), "scalar": (), "real": ()}
    assert dartax.metrics(state, params)["dart/rate/matrix"] == rates["matrix"]


def test_distilled_rates_apply():
    params, history = zeros(), []
    optimizer = dartax.dart()
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(params, state, params)
        history.append(dartax.metrics(state, params))
    schedules = dartax.distill_schedule(history)
    transform = dartax.scale_by_learning_rates(schedules)
    updates, _ = transform.update(TARGET, transform.init(params))
    rate = schedules["matrix"](0)
    np.testing.assert_allclose(updates["matrix"], -rate * MATRIX, rtol=1e-6)


def test_a_real_gradient_of_a_complex_parameter_is_refused():
    optimizer = dartax.dart()
    params = {"z": MATRIX}
    state = optimizer.init(params)
    match = "updates must be complex where the parameters are, got float32 at 'z'; pass the conj"
    with pytest.raises(TypeError, match=match):
        optimizer.update({"z": MATRIX.real}, state, params)


def test_works_in_optax_wrappers():
    for optimizer in (
        optax.chain(optax.clip_by_global_norm(1.0), dartax.dart()),
        optax.apply_if_finite(dartax.dart(), 5),
        optax.masked(dartax.dart(), {"matrix": True, "scalar": True, "real": False}),
    ):
        params = zeros()
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(TARGET, state, params)
        assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda t: t.dtype, TARGET)


def test_rates_of_channels_are_those_of_the_parts():
    optimizer = dartax.dart(blocks="channel")
    state = optimizer.init(MATRIX)
    for _ in range(3):
        updates, state = optimizer.update(MATRIX, state, MATRIX, grad=MATRIX)
    assert updates.dtype == MATRIX.dtype
    assert dartax.learning_rates(state, MATRIX).shape == (1, 6)
