"""Inner transforms that a step can skip, and whose directions it can compute again.

Any optax transform can give the directions. Around one that is not known better, a step that may
be skipped must hold the old state beside the new one, and the directions, needed by the updates and
by the memory of past steps, are written out and read twice. A :class:`Guarded` transform keeps its
old state by itself, and its directions can be computed again from its state. Those of
``dartax.inner`` are.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any
Again = Callable[[PyTree, PyTree, Callable[[PyTree], PyTree]], PyTree]


class Guarded(optax.GradientTransformationExtraArgs):
    """A transform whose update takes ``finite=``: where it is false the state stays as it was.

    Attributes:
      again: From (state, params, part) to a part of the direction that the update which returned
        ``state`` gave, in float32 at least; ``part`` takes it from trees like the parameters. What
        is computed for it is written differently, for XLA would find an equal computation and
        store its result.
      reads_params: Whether ``again`` needs the parameters.
      always_finite: Whether the directions are finite whatever the gradients are.
    """

    again: Again
    reads_params: bool
    always_finite: bool

    @classmethod
    def make(
        cls,
        init: Any,
        update: Any,
        again: Again,
        *,
        reads_params: bool = False,
        always_finite: bool = False,
    ) -> "Guarded":
        """The transform of these three functions."""
        transform = cls(init, update)
        transform.again = again
        transform.reads_params, transform.always_finite = reads_params, always_finite
        return transform


def choose(finite: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """``new`` or ``old``, in the dtype of ``old``: some inner states change theirs."""
    if new is old:
        return old
    new, old = jnp.asarray(new), jnp.asarray(old)
    return jax.lax.select(finite, new.astype(old.dtype), old)


def zero_unless(finite: jax.Array, tree: PyTree) -> PyTree:
    """``tree``, or zeros."""
    return jax.tree.map(lambda x: jax.lax.select(finite, x, jnp.zeros_like(x)), tree)


class GuardState(NamedTuple):
    """State of :func:`guard`.

    Attributes:
      inner_state: State of the transform inside.
      direction: What its last update gave.
    """

    inner_state: PyTree
    direction: PyTree


def guard(inner: optax.GradientTransformation) -> Guarded:
    """``inner``, guarded, whatever it is, at the price of a copy of its last direction."""
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return GuardState(inner.init(params), jax.tree.map(jnp.zeros_like, params))

    def update_fn(updates, state, params=None, *, finite=True, **extra_args):
        direction, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        new = GuardState(inner_state, direction)
        state = jax.tree.map(functools.partial(choose, jnp.asarray(finite)), new, state)
        return direction, state

    def again(state, params, part):
        del params
        return part(state.direction)

    return Guarded.make(init_fn, update_fn, again)


def is_zero(weight_decay: Any) -> bool:
    """Whether no weights decay, as far as a Python number tells."""
    return isinstance(weight_decay, int | float) and weight_decay == 0


def decayed_weights(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """``optax.add_decayed_weights``, or nothing, which needs no params, where there is no decay."""
    if is_zero(weight_decay):
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, mask)


def with_decayed_weights(
    inner: optax.GradientTransformation, weight_decay: Any, mask: Any
) -> optax.GradientTransformation:
    """``inner``, then :func:`decayed_weights`; guarded where ``inner`` is."""
    decay = decayed_weights(weight_decay, mask)  # has no state of its own
    if not isinstance(inner, Guarded):
        return optax.chain(inner, decay)

    def init_fn(params):
        return inner.init(params), decay.init(params)

    def update_fn(updates, state, params=None, *, finite=True, **extra_args):
        updates, inner_state = inner.update(updates, state[0], params, finite=finite, **extra_args)
        updates, decay_state = decay.update(updates, state[1], params)
        return updates, (inner_state, decay_state)

    def again(state, params, part):
        # What a mask says of the parameters it may not say of a part of them.
        chosen = mask(params) if callable(mask) else mask
        direction = inner.again(state[0], params, part)
        return decayed_weights(weight_decay, chosen).update(direction, state[1], part(params))[0]

    decays = not is_zero(weight_decay)
    return Guarded.make(
        init_fn,
        update_fn,
        again,
        reads_params=inner.reads_params or decays,
        always_finite=inner.always_finite and not decays,
    )
