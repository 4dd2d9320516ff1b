"""How the state tells which block a leaf belongs to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dartax
from dartax import _blocks


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 5, 9, 10, 17, 100])
def test_digits_tell_every_block(num_blocks):
    rng = np.random.default_rng(num_blocks)
    numbers = [*range(num_blocks), *(int(n) for n in rng.integers(num_blocks, size=7))]
    index = _blocks.block_index(numbers, num_blocks)
    values = jnp.asarray(rng.normal(size=num_blocks), jnp.float32)
    leaves = [jnp.zeros(3) if i % 2 else jnp.zeros((300, 300)) for i in range(len(numbers))]
    ones, twos = jax.jit(
        lambda index: _blocks.spread(numbers, index, (values, leaves), (2 * values, leaves))
    )(index)
    np.testing.assert_array_equal(jnp.stack(ones), values[np.array(numbers)])
    np.testing.assert_array_equal(jnp.stack(twos), 2 * values[np.array(numbers)])
    np.testing.assert_array_equal(index.of_leaf, numbers)
    assert len(index.digits) ** 2 >= num_blocks > (len(index.digits) - 1) ** 2


def test_few_arrays_beside_those_of_the_leaves():
    # An array takes the host microseconds to hand over, in every step.
    params = {str(i): jnp.ones(2) for i in range(100)}
    state = dartax.dart().init(params)
    assert len(jax.tree.leaves(state)) <= 3 * 100 + 30
