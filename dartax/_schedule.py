"""What the user's schedule is going to do."""

import jax
import jax.numpy as jnp
import optax

# An update by which every schedule has ended.
THE_END = 2**30


def annealing(learning_rate: optax.ScalarOrSchedule, count: jax.Array) -> jax.Array:
    """What part of its value the schedule will lose until its end, in [0, 1]; 0 of a number."""
    if not callable(learning_rate):
        return jnp.zeros([], jnp.float32)
    now, late = (jnp.asarray(learning_rate(c), jnp.float32) for c in (count, THE_END))
    part = 1 - late / jnp.where(now > 0, now, 1.0)
    return jnp.where(late < now, jnp.clip(part, 0.0, 1.0), 0.0)  # a comparison: NaN gives 0
