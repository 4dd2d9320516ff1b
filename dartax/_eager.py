"""Updates outside ``jax.jit``, as in notebooks: compiled all the same.

Run one by one, the operations of a step would take seconds to compile at the first update, and tens
of milliseconds at every later one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dartax import _check

Update = Callable[..., tuple[Any, Any]]
# What JAX raises where a function needs the values of its arguments.
NEEDS_VALUES = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)


def compiled_outside_jit(
    update: Update, outside: Callable[[Any], dict[str, Any]], constants: Sequence[Any]
) -> Update:
    """``update`` itself on traced values, and compiled where all of its arguments are concrete.

    Arguments that are no arrays, such as functions, and arrays on several devices go to ``update``,
    and so does everything once an inner transform has shown that it cannot be traced. If one of the
    ``constants`` inside ``update`` is an array, nothing is compiled: ``optax.inject_hyperparams``
    makes such a transform anew at every update.

    Args:
      update: Takes (updates, state, params) and keywords.
      outside: From a concrete state to keywords of ``update`` that must be computed outside the
        compiled program, such as the value of a schedule that reads a Python variable.
      constants: Numbers, functions or arrays.
    """
    if not all(callable(constant) or _check.is_number(constant) for constant in constants):
        return update
    compiled: Update | None = jax.jit(update)

    def update_fn(updates, state, params=None, **extra_args):
        nonlocal compiled
        leaves = jax.tree.leaves((updates, state, params, extra_args))
        if compiled is not None and all(map(_is_concrete, leaves)):
            try:
                return compiled(updates, state, params, **extra_args, **outside(state))
            except NEEDS_VALUES:
                compiled = None
        return update(updates, state, params, **extra_args)

    return update_fn


def _is_concrete(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        return False
    if isinstance(leaf, jax.Array):
        return len(leaf.sharding.device_set) == 1
    return isinstance(leaf, np.ndarray | np.generic | int | float | complex)
