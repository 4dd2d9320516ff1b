"""A run goes on from a checkpoint of any kind as if it had not been broken, bit for bit."""

import functools
import pickle

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dartax

OPTIMIZER = dartax.dart(optax.cosine_decay_schedule(1.0, 10), weight_decay=0.1, key=3)


def make_params():
    return {"bias": jnp.ones(8), "kernel": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}


@jax.jit
def step(params, state):
    grads = jax.grad(lambda p: jnp.sum(jnp.square(p["kernel"] @ p["bias"] - 1.0)))(params)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(params, state, steps):
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.fixture(scope="module")
def runs():
    """A template, and one run after 3 and after 5 steps."""
    template = make_params(), OPTIMIZER.init(make_params())
    broken = train(*template, 3)
    return template, broken, train(*broken, 2)


def through_flax(template, tree, _):
    return flax.serialization.from_bytes(template, flax.serialization.to_bytes(tree))


def through_pickle(template, tree, _):
    return pickle.loads(pickle.dumps(jax.device_get(tree)))


def through_numpy(template, tree, folder):
    arrays = {}
    # bfloat16 is no type of NumPy's own: its bytes are.
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        array = np.asarray(leaf)
        arrays[str(i)] = array.view(np.uint16) if array.dtype == jnp.bfloat16 else array
    np.savez(folder / "run.npz", **arrays)
    with np.load(folder / "run.npz", allow_pickle=False) as saved:
        leaves = [
            saved[str(i)].view(leaf.dtype) for i, leaf in enumerate(jax.tree.leaves(template))
        ]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def through_orbax(template, tree, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "run", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "run", template)


def through_orbax_in_the_background(template, tree, folder):
    with ocp.CheckpointManager(folder / "runs") as manager:
        manager.save(3, args=ocp.args.StandardSave(tree))
        # Training goes on, and may donate what it was given, while the files are written.
        jax.block_until_ready(train(*tree, 1))
        manager.wait_until_finished()
        return manager.restore(3, args=ocp.args.StandardRestore(template))


@pytest.mark.parametrize(
    "through",
    [through_flax, through_pickle, through_numpy, through_orbax, through_orbax_in_the_background],
)
def test_a_resumed_run_ends_where_an_unbroken_one_ends(through, runs, tmp_path):
    template, broken, unbroken = runs
    restored = through(template, broken, tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(broken)
    chex.assert_trees_all_equal(train(*restored, 2), unbroken)


@pytest.mark.skipif(jax.device_count() < 8, reason="XLA_FLAGS were set to fewer than eight devices")
@pytest.mark.parametrize("shapes", [((8,), (2,)), ((4,), (1,)), ((1,), (8,))], ids=str)
def test_a_sharded_checkpoint_restores_into_another_topology(shapes, runs, tmp_path):
    def on(shape, tree):
        devices = np.array(jax.devices()[: shape[0]])
        mesh = jax.sharding.Mesh(devices, ("x",), axis_types=(AxisType.Auto,))
        rows = lambda leaf: NamedSharding(  # noqa: E731
            mesh, PartitionSpec("x") if leaf.shape in ((8,), (8, 8)) else PartitionSpec()
        )
        return jax.device_put(tree, jax.tree.map(rows, tree))

    template, broken, unbroken = runs
    saved = on(shapes[0], broken)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, on(shapes[1], template))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "run", abstract)
    chex.assert_trees_all_equal(restored, broken)
    kernel = optax.tree.get(restored[1], "step_memory")["kernel"]
    assert len(kernel.sharding.device_set) == shapes[1][0]
    resumed = jax.tree.map(functools.partial(np.asarray, dtype=np.float32), train(*restored, 2))
    chex.assert_trees_all_close(
        resumed, jax.tree.map(functools.partial(np.asarray, dtype=np.float32), unbroken), rtol=1e-5
    )
