"""How the state tells which block a leaf belongs to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dartax

PARAMS = [jnp.ones(2), jnp.ones((3, 2)), jnp.ones(()), jnp.ones((3, 2))]
LABELS = {
    None: [0, 1, 2, 3],
    "tensor": [0, 1, 2, 3],
    ("a", "b", "a", "b"): [0, 1, 0, 1],
    ("b", "a", "a", "a"): [0, 1, 1, 1],
    (3, 3, 3, 3): [0, 0, 0, 0],
}


@pytest.mark.parametrize(("labels", "numbers"), LABELS.items(), ids=str)
def test_the_state_holds_a_number_for_every_leaf(labels, numbers):
    blocks = list(labels) if isinstance(labels, tuple) else labels
    state = optax.tree.get(dartax.dart(blocks=blocks).init(PARAMS), "block_index")
    assert [int(number) for number in state] == numbers
    assert all(number.dtype == jnp.uint32 and number.shape == () for number in state)


@pytest.mark.parametrize("implementation", ["fused", "plain"])
def test_a_leaf_moves_with_the_rate_of_its_block(implementation):
    numbers = np.random.default_rng(0).integers(9, size=40)
    params = [jnp.ones((3, 2)) if i % 2 else jnp.ones(()) for i in range(40)]
    optimizer = dartax.scale_by_dart(
        optax.identity(), blocks=numbers.tolist(), implementation=implementation
    )
    updates, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    assert len(set(np.asarray(state.last_rates))) == len(set(numbers)) == 9
    _, first = np.unique(numbers, return_index=True)
    of_leaf = {numbers[i]: rank for rank, i in enumerate(sorted(first))}
    for update, number in zip(updates, numbers, strict=True):
        np.testing.assert_allclose(update, np.full(update.shape, state.last_rates[of_leaf[number]]))


def test_few_arrays_beside_those_of_the_leaves():
    # An array takes the host microseconds to hand over, in every step.
    params = {str(i): jnp.ones(2) for i in range(100)}
    state = dartax.dart().init(params)
    assert len(jax.tree.leaves(state)) <= 4 * 100 + 30
