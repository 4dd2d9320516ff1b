"""Inner transforms that spare a step most of what it costs beside Adam.

Any optax transform can give the directions. Around one that is not known better, a step that may
be skipped must hold the old state beside the new one, and the directions, needed by the updates and
by the memory of past steps, are written out and read twice. A :class:`Guarded` transform keeps its
old state by itself, and its directions can be computed again from its state.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class Guarded(optax.GradientTransformationExtraArgs):
    """A transform whose update takes ``finite=``: where it is false the state stays as it was.

    Attributes:
      again: From (state, params) to the direction that the update which returned ``state`` gave, in
        float32 at least. Written differently, for XLA would find an equal computation and store
        its result.
    """

    again: Callable[[PyTree, PyTree], PyTree]

    @classmethod
    def make(cls, init: Any, update: Any, again: Callable[[PyTree, PyTree], PyTree]) -> "Guarded":
        """The transform of these three functions."""
        transform = cls(init, update)
        transform.again = again
        return transform


def choose(finite: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """``new`` or ``old``, in the dtype of ``old``: some inner states change theirs."""
    if new is old:
        return old
    new, old = jnp.asarray(new), jnp.asarray(old)
    return jax.lax.select(finite, new.astype(old.dtype), old)


def adam(b1: float = 0.9, b2: float = 0.99, eps: float = 1e-8) -> Guarded:
    """``optax.scale_by_adam``, guarded; the state is that of optax."""
    inner = optax.scale_by_adam(b1, b2, eps)

    def corrections(state: optax.ScaleByAdamState) -> tuple[jax.Array, jax.Array]:
        count = jnp.maximum(state.count, 1).astype(jnp.float32)
        return 1 - b1**count, 1 - b2**count

    def update_fn(updates, state, params=None, *, finite=True, **_):
        _, new = inner.update(updates, state, params)
        state = jax.tree.map(functools.partial(choose, jnp.asarray(finite)), new, state)
        c1, c2 = corrections(state)

        def direction(mu, nu):
            return (mu / c1.astype(mu.dtype)) / (jnp.sqrt(nu / c2.astype(nu.dtype)) + eps)

        return jax.tree.map(direction, state.mu, state.nu), state

    def again(state, params):
        del params
        c1, c2 = corrections(state)
        scale, shift = c1 * jax.lax.rsqrt(c2), c1 * eps

        def direction(mu, nu):
            dtype = jnp.promote_types(mu.dtype, jnp.float32)
            return mu.astype(dtype) / (jnp.sqrt(nu.astype(dtype)) * scale + shift)

        return jax.tree.map(direction, state.mu, state.nu)

    return Guarded.make(inner.init, update_fn, again)


def decayed_weights(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """``optax.add_decayed_weights``, or nothing, which needs no params, where there is no decay."""
    if isinstance(weight_decay, int | float) and weight_decay == 0:
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

    def again(state, params):
        return decay.update(inner.again(state[0], params), state[1], params)[0]

    return Guarded.make(init_fn, update_fn, again)
