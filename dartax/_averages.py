"""Moving averages in float32, and a root that can be differentiated."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dartax import _check

Number = jax.Array | float


def f32(value: Any) -> Any:
    """``value`` in strongly typed float32; a Python number as a NumPy scalar."""
    return np.float32(value) if _check.is_number(value) else jnp.asarray(value, jnp.float32)


def moving_average(average: jax.Array, value: jax.Array, decay: Number) -> jax.Array:
    """One step of an exponential moving average."""
    decay = f32(decay)
    return decay * average + (1 - decay) * value


def debias(average: jax.Array, decay: Number, num: jax.Array) -> jax.Array:
    """Corrects an average of ``num`` values for the zero that it started from."""
    return average / (1 - f32(decay) ** f32(jnp.maximum(num, 1)))


def root(x: jax.Array) -> jax.Array:
    """The square root of non-negative numbers, with derivative 0 at 0.

    The derivative of ``jnp.sqrt`` at 0 is infinite, which makes a gradient through an update NaN.
    """
    positive = x > 0
    otherwise = jax.lax.stop_gradient(x)  # 0 stays 0, and NaN stays NaN
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), otherwise)
