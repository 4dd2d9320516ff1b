"""Inner transforms that fuse with the step around them.

Any optax transform can give the directions. With one that is not fusable, a step that may be
skipped has to hold the old inner state beside the new one, and the direction, which both the
updates and the memory read, is written out and read twice. A *fusable* transform skips a step by
itself, and can compute a part of its direction again from its new state.

Gain: a step of 10 M parameters in 24 tensors takes 1.2 times as long as AdamW's in place of 4.6
(``dartax bench --optimizers dart dart_optax_adam``).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dartax._trees import PyTree
from dartax._walk import WhiteNoise


@dataclasses.dataclass(frozen=True)
class FusableUpdate:
    """The ``update`` function of a fusable transform.

    It is the update function itself that knows more, so a transform keeps its abilities wherever
    its two functions are kept: through ``jax.tree.map``, ``_replace`` or unpacking.
    ``optax.chain`` makes a new update function, so a chain is not fusable.

    Attributes:
      update: An optax update function that takes ``taken=`` as well, a bool scalar. Where it is
        false the state stays as it was.
      again: From (updates, state, taken, part) to a part of the direction, that of the update that
        returned ``state``. ``part`` takes this part of any tree like the parameters. ``None`` if
        computing it again would cost more than keeping the direction.
      finite: Whether directions are finite wherever the gradients are, and in skipped steps. If
        not, the step checks them and skips by itself, as it does for other transforms.
      whole_memory: Whether the memory that ``update`` gets as ``step_memory=`` has to hold all of
        large tensors, not samples.
      white_noise: What its directions are under white noise; measured where it is ``None``.
    """

    update: Callable[..., tuple[PyTree, PyTree]]
    again: Callable[[PyTree, PyTree, jax.Array, Callable[[PyTree], PyTree]], PyTree] | None
    finite: bool = True
    whole_memory: bool = False
    white_noise: WhiteNoise | None = None

    def __call__(self, updates, state, params=None, **extra_args):
        """Updates, as optax does."""
        return self.update(updates, state, params, **extra_args)


def fusable(inner: optax.GradientTransformation) -> FusableUpdate | None:
    """What ``inner`` can do beyond optax, or ``None``."""
    return inner.update if isinstance(inner.update, FusableUpdate) else None


def choose(taken: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """``new`` or ``old``, in the dtype of ``old``: some transforms change that of their state."""
    if new is old:
        return old
    new, old = jnp.asarray(new), jnp.asarray(old)
    new = new if new.dtype == old.dtype else new.astype(old.dtype)  # a typed key has no astype
    return jax.lax.select(taken, new, old)


def decayed_sum(taken: jax.Array, decay: Any, old: jax.Array, term: jax.Array) -> jax.Array:
    """``decay * old + term``, or ``old`` where the step is skipped."""
    return jnp.where(taken, decay * old + term, old).astype(old.dtype)


def zero_unless(taken: jax.Array, tree: PyTree) -> PyTree:
    """``tree``, or zeros."""
    return jax.tree.map(lambda x: jax.lax.select(taken, x, jnp.zeros_like(x)), tree)
