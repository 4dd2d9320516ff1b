"""A small network whose parameters lie on eight devices in one way or another."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

STEPS = 6
# Name: mesh shape, and the specs of kernels, biases and the batch.
LAYOUTS = {
    "data parallel": ((8,), P(), P(), P("x")),
    "fully sharded": ((8,), P("x"), P("x"), P("x")),
    "tensor parallel": ((8,), P(None, "x"), P("x"), P()),
    "two axes": ((4, 2), P("x", "y"), P("y"), P("x")),
}


def make_params(*widths):
    """Layers of these widths; by default three of 16."""
    widths = widths or (16, 16, 16)
    keys = jax.random.split(jax.random.key(0), len(widths))
    return [
        {"kernel": jax.random.normal(key, (width, width)) / width**0.5, "bias": jnp.zeros(width)}
        for key, width in zip(keys, widths, strict=True)
    ]


def make_batches(width=16):
    return jax.random.normal(jax.random.key(1), (STEPS, 16, width))


def loss_fn(params, x):
    for layer in params:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    return jnp.mean((x - 0.5) ** 2)


def step(optimizer, params, state, x):
    grads = jax.grad(loss_fn)(params, x)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(optimizer, params, batches):
    """The parameters and the state after all batches, and the compiled step."""
    state = optimizer.init(params)
    jitted = jax.jit(functools.partial(step, optimizer))
    for x in batches:
        # Steps that wait for one another's devices, on fewer cores, can run into a time limit of XLA.
        params, state = jax.block_until_ready(jitted(params, state, x))
    return params, state, jitted


def placed(layout, params):
    """The parameters where they lie, and where the batches do."""
    shape, kernel, bias, batch = LAYOUTS[layout]
    types = (AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)], axis_types=types)
    params = [
        {
            "kernel": jax.device_put(layer["kernel"], NamedSharding(mesh, kernel)),
            "bias": jax.device_put(layer["bias"], NamedSharding(mesh, bias)),
        }
        for layer in params
    ]
    return params, NamedSharding(mesh, batch)
