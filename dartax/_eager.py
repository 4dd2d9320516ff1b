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


def compiled_outside_jit(
    update: Update, check: Callable[[Any], Any], constants: Sequence[Any]
) -> Update:
    """``update`` itself on traced values, and compiled where all of its arguments are concrete.

    Arguments that are no arrays, such as functions, and arrays on several devices go to ``update``.
    ``check`` sees the state before it is traced. If one of the ``constants`` inside ``update`` is
    an array, nothing is compiled: ``optax.inject_hyperparams`` makes such a transform anew at every
    update.
    """
    if not all(callable(constant) or _check.is_number(constant) for constant in constants):
        return update
    compiled = jax.jit(update)

    def update_fn(updates, state, params=None, **extra_args):
        check(state)
        leaves = jax.tree.leaves((updates, state, params, extra_args))
        function = compiled if all(map(_is_concrete, leaves)) else update
        return function(updates, state, params, **extra_args)

    return update_fn


def _is_concrete(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        return False
    if isinstance(leaf, jax.Array):
        return len(leaf.sharding.device_set) == 1
    return isinstance(leaf, np.ndarray | np.generic | int | float | complex)
