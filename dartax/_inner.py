"""Inner transforms that spare a step most of what it costs beside Adam.

Any optax transform can give the directions. Around one that is not known better, a step that may
be skipped must hold the old state beside the new one, and the directions, needed by the updates and
by the memory of past steps, are written out and read twice. A :class:`Guarded` transform keeps its
old state by itself, and its directions can be computed again from its state.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dartax._blocks import LARGEST_ROOT

PyTree = Any


class Guarded(optax.GradientTransformationExtraArgs):
    """A transform whose update takes ``finite=``: where it is false the state stays as it was.

    Attributes:
      again: From (state, params) to the direction that the update which returned ``state`` gave, in
        float32 at least. Written differently, for XLA would find an equal computation and store
        its result.
      reads_params: Whether ``again`` needs the parameters.
      always_finite: Whether the directions are finite whatever the gradients are.
    """

    again: Callable[[PyTree, PyTree], PyTree]
    reads_params: bool
    always_finite: bool

    @classmethod
    def make(
        cls,
        init: Any,
        update: Any,
        again: Callable[[PyTree, PyTree], PyTree],
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


def widened(tree: PyTree) -> PyTree:
    """``tree`` with float32 in place of float16, where ``eps`` and small squares would be 0."""
    is_half = lambda x: jnp.result_type(x) == jnp.float16  # noqa: E731
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_half(x) else x, tree)


def adam(b1: float = 0.9, b2: float = 0.99, eps: float = 1e-8) -> Guarded:
    """``optax.scale_by_adam``, guarded; the state is that of optax, in float32 for float16."""

    def init_fn(params):
        return optax.scale_by_adam(b1, b2, eps).init(widened(params))

    def corrections(state: optax.ScaleByAdamState) -> tuple[jax.Array, jax.Array]:
        count = jnp.maximum(state.count, 1).astype(jnp.float32)
        return 1 - b1**count, 1 - b2**count

    def update_fn(updates, state, params=None, *, finite=True, **_):
        gradient, finite = widened(updates), jnp.asarray(finite)
        mu = optax.tree.update_moment(gradient, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(gradient, state.nu, b2, 2)
        # An infinite square would stay for ever; a reduction to skip it would be a pass more.
        fits = jax.tree.map(lambda g: finite & (jnp.abs(g) < LARGEST_ROOT), gradient)
        state = optax.ScaleByAdamState(
            count=choose(finite, optax.safe_increment(state.count), state.count),
            mu=jax.tree.map(choose, fits, mu, state.mu),
            nu=jax.tree.map(choose, fits, nu, state.nu),
        )
        c1, c2 = corrections(state)

        def direction(mu, nu, like):
            u = (mu / c1.astype(mu.dtype)) / (jnp.sqrt(nu / c2.astype(nu.dtype)) + eps)
            return u.astype(jnp.float16) if jnp.result_type(like) == jnp.float16 else u

        like = updates if params is None else params
        return jax.tree.map(direction, state.mu, state.nu, like), state

    def again(state, params):
        del params
        c1, c2 = corrections(state)
        scale, shift = c1 * jax.lax.rsqrt(c2), c1 * eps

        def direction(mu, nu):
            dtype = jnp.promote_types(mu.dtype, jnp.float32)
            return mu.astype(dtype) / (jnp.sqrt(nu.astype(dtype)) * scale + shift)

        return jax.tree.map(direction, state.mu, state.nu)

    return Guarded.make(init_fn, update_fn, again, always_finite=True)


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

    def again(state, params):
        del params
        return state.direction

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

    def again(state, params):
        return decay.update(inner.again(state[0], params), state[1], params)[0]

    decays = not is_zero(weight_decay)
    return Guarded.make(
        init_fn,
        update_fn,
        again,
        reads_params=inner.reads_params or decays,
        always_finite=inner.always_finite and not decays,
    )
