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
NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def compiled_outside_jit(
    step: Update, outside: Callable[[Any], Any], constants: Sequence[Any]
) -> Update:
    """Runs ``step`` itself on traced values, and compiled where all arguments are concrete.

    Arguments that are no arrays, such as functions, and arrays on several devices go to ``step``,
    and so does everything once an inner transform has shown that it cannot be traced. If one of the
    ``constants`` inside ``step`` is an array, nothing is compiled: ``optax.inject_hyperparams``
    makes such a transform anew at every update.

    Args:
      step: Takes (updates, state, params, extra_args) and what ``outside`` gives.
      outside: From a state to what must be computed outside the compiled program, such as the value
        of a schedule that reads a Python variable.
      constants: Numbers, functions or arrays.

    Returns:
      The update function of an optax transform with extra arguments.
    """
    can_compile = all(callable(constant) or _check.is_number(constant) for constant in constants)
    compiled: Update | None = jax.jit(step) if can_compile else None

    def update_fn(updates, state, params=None, **extra_args):
        nonlocal compiled
        arguments = (updates, state, params, extra_args)
        known = outside(state)
        if compiled is not None and all(map(_is_concrete, jax.tree.leaves(arguments))):
            try:
                return compiled(*arguments, known)
            except NEEDS_VALUES:
                compiled = None
        return step(*arguments, known)

    return update_fn


def _is_concrete(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        return False
    if isinstance(leaf, jax.Array):
        return len(leaf.sharding.device_set) == 1
    return isinstance(leaf, np.ndarray | np.generic | int | float | complex)
