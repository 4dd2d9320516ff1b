"""Arrays that a GPU computes in one kernel are the same arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dartax._fused._siblings import siblings

VALUES = [0.0, -0.0, 1.5, -3e-3, 1e4, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("jit", [False, True])
def test_no_value_changes(dtype, jit):
    values = [*VALUES, float(jnp.finfo(dtype).smallest_normal)]
    arrays = [jnp.asarray(values, dtype), jnp.asarray(values[::-1], dtype).reshape(-1, 1)]
    found = (jax.jit(siblings) if jit else siblings)(arrays)
    for array, other in zip(arrays, found, strict=True):
        assert other.dtype == array.dtype
        got, expected = np.float64(other), np.float64(array)
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


def test_signs_of_lion_stay_integers():
    (found,) = siblings([jnp.asarray([-1, 0, 1], jnp.int8)])
    assert found.dtype == jnp.int8
    np.testing.assert_array_equal(found, [-1, 0, 1])


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        (found,) = siblings([jnp.asarray([1 / 3], jnp.float64)])
        assert found.dtype == jnp.float64
        assert found[0] == 1 / 3


def test_numbers_become_arrays():
    assert siblings([2.0, np.float32(3)]) == [2.0, 3.0]
    assert siblings([]) == []
