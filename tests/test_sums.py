"""Sums over each of many arrays: on a GPU those of one shape are summed together."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dartax._fused import _sums

SHAPES = [(5, 4), (3,), (), (5, 4), (2, 3, 4), (3,), (0, 2), (5, 4), (2, 3, 4), (40,), (40,)]


def arrays(dtype, seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return [jax.random.normal(k, shape, dtype) for k, shape in zip(keys, SHAPES, strict=True)]


@pytest.mark.parametrize("sums", [_sums.one_by_one, _sums.together])
@pytest.mark.parametrize("small", [0, 3, 1 << 17])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_sum_is_in_its_place(sums, small, dtype, monkeypatch):
    monkeypatch.setattr(_sums, "LAUNCH_BOUND", small)
    left, right = arrays(dtype, 0), arrays("float32", 1)
    expected = [np.sum(np.float64(x) * np.float64(y)) for x, y in zip(left, right, strict=True)]
    got = jax.jit(lambda *columns: sums(operator.mul, *columns))(left, right)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(lambda *columns: sums(operator.pos, *columns))(right),
        [np.sum(np.float64(y)) for y in right],
        rtol=1e-5,
        atol=1e-6,
    )


def test_arrays_of_other_dtypes_are_not_mixed():
    # 257 is no number of bfloat16; together they would be cast to one dtype.
    left = [jnp.array([257.0, 0.0]), jnp.array([1.0, 1.0], jnp.bfloat16)]
    np.testing.assert_array_equal(_sums.together(operator.pos, left), [257.0, 2.0])


def test_no_arrays():
    assert _sums.sums(operator.mul, [], []).shape == (0,)


def test_a_gpu_sums_together_and_a_cpu_does_not():
    columns = [[jnp.ones(3)] * 20] * 2
    traced = jax.jit(lambda *columns: _sums.sums(operator.mul, *columns)).trace(*columns)
    stacks = {
        platform: "tensor<20x3xf32>" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "rocm", "tpu")
    }
    assert stacks == {"cpu": False, "cuda": True, "rocm": True, "tpu": True}


def test_sums_of_models_under_vmap():
    left = [jnp.stack([x, 2 * x]) for x in arrays("float32", 0)]
    right = [jnp.stack([x, 3 * x]) for x in arrays("float32", 1)]
    got = jax.vmap(lambda *columns: _sums.together(operator.mul, *columns))(left, right)
    for model in range(2):
        alone = _sums.one_by_one(operator.mul, [x[model] for x in left], [y[model] for y in right])
        np.testing.assert_allclose(got[model], alone, rtol=1e-5, atol=1e-6)
