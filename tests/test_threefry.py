"""Threefry, written out, gives the bits of jax.random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dartax import _threefry


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
@pytest.mark.parametrize("shape", [(), (7,), (2, 0), (2, 25), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["uint32", "uint64"])
def test_bits(seed, shape, dtype):
    with jax.enable_x64(dtype == "uint64"):
        key = jax.random.key(seed, impl="threefry2x32")
        got = _threefry.bits(key, shape, dtype)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, jax.random.bits(key, shape, dtype))


@pytest.mark.parametrize("number", [0, 1, 2**31 - 1])
def test_fold_in(number):
    key = jax.random.key(number, impl="threefry2x32")
    got = _threefry.fold_in(key, jnp.int32(number))
    expected = jax.random.fold_in(key, number)
    np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(expected))
