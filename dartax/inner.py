"""Directions for ``dart(inner=...)`` that spare a step most of what it costs beside Adam.

Any optax transform can give the directions of DART. Around these a step that may be skipped does
not hold their old state beside the new one, and the directions, which the updates and the memory of
past steps both need, are not written out and read twice: see :class:`dartax._guarded.Guarded`.
They are optax's ``scale_by_adam``, ``trace`` and ``scale_by_lion`` otherwise, and can stand alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dartax import _check
from dartax._blocks import LARGEST_ROOT
from dartax._guarded import Guarded, choose
from dartax._order import leaf_by_leaf

PyTree = Any


def _widened(tree: PyTree) -> PyTree:
    """``tree`` with float32 in place of float16, where ``eps`` and small squares would be 0."""
    is_half = lambda x: jnp.result_type(x) == jnp.float16  # noqa: E731
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_half(x) else x, tree)


def _as_half(direction: jax.Array, like: Any) -> jax.Array:
    """``direction`` in float16, as far as that goes, where ``like``, such as a parameter, is."""
    if jnp.result_type(like) != jnp.float16:
        return direction
    most = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(direction, -most, most).astype(jnp.float16)


def _fits(gradient: jax.Array, finite: jax.Array) -> jax.Array:
    """Which elements may enter an average.

    An infinite square would stay there for ever, and a reduction to skip its whole step would be a
    pass more.
    """
    return finite & (jnp.abs(gradient) < LARGEST_ROOT)


def _decayed_sum(fits: jax.Array, decay: Any, old: jax.Array, term: jax.Array) -> jax.Array:
    """``decay * old + term``, or ``old`` as it is where it does not fit."""
    # The choice is one of factors. One of results would be stored under a mask, for which a CPU of
    # AMD takes twice as long as for all of the sum.
    factor, term = jnp.where(fits, decay, 1.0), jnp.where(fits, term, 0.0)
    return (factor * old + term).astype(old.dtype)


def adam(b1: float = 0.9, b2: float = 0.99, eps: float = 1e-8) -> Guarded:
    """Adam's directions, as ``optax.scale_by_adam`` gives them; the default of ``dart``.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1). Shorter than the usual 0.999, for it must not
        remember the steep beginning of the ramp for long.
      eps: Added to the root of the second moment, positive.

    Returns:
      A transform with state ``optax.ScaleByAdamState``, 8 bytes per float32 parameter; moments of
      float16 parameters are float32.

    Raises:
      ValueError: If a number is outside its range.
      TypeError: If an argument is no number.

    Examples:
      >>> import dartax
      >>> optimizer = dartax.dart(inner=dartax.inner.adam(b2=0.999))
    """
    _check.decay("b1", b1)
    _check.decay("b2", b2)
    _check.number("eps", eps, "a positive number", lambda v: v > 0, "1e-8 is usual")

    def init_fn(params):
        return optax.scale_by_adam(b1, b2, eps).init(_widened(params))

    def corrections(state: optax.ScaleByAdamState) -> tuple[jax.Array, jax.Array]:
        count = jnp.maximum(state.count, 1).astype(jnp.float32)
        return 1 - b1**count, 1 - b2**count

    @jax.jit
    def moments(finite, g, mu, nu):
        fits = _fits(g, finite)
        new_mu = _decayed_sum(fits, b1, mu, (1 - b1) * g)
        return new_mu, _decayed_sum(fits, b2, nu, (1 - b2) * g**2)

    # mu / c1 / (sqrt(nu / c2) + eps) in two forms, each with one division of an element in place of
    # three, which take a CPU a few percent of a step.
    @jax.jit
    def direction(mu, nu, scale, shift):  # c1 / sqrt(c2) and c1 * eps
        wide = jnp.promote_types(mu.dtype, jnp.float32)
        root = jnp.sqrt(nu.astype(wide))
        return (mu.astype(wide) / (root * scale + shift)).astype(mu.dtype)

    @jax.jit
    def same_direction(mu, nu, over_c1, over_c2):
        wide = jnp.promote_types(mu.dtype, jnp.float32)
        return (mu.astype(wide) * over_c1) / (jnp.sqrt(nu.astype(wide) * over_c2) + eps)

    def update_fn(updates, state, params=None, *, finite=True, **_):
        finite = jnp.asarray(finite)
        mu, nu = leaf_by_leaf(moments, finite, _widened(updates), state.mu, state.nu)
        count = choose(finite, optax.safe_increment(state.count), state.count)
        state = optax.ScaleByAdamState(count, mu, nu)
        c1, c2 = corrections(state)
        scale, shift = c1 * jax.lax.rsqrt(c2), c1 * eps

        like = updates if params is None else params
        directions = jax.tree.map(
            lambda mu, nu, like: _as_half(direction(mu, nu, scale, shift), like),
            state.mu,
            state.nu,
            like,
        )
        return directions, state

    def again(state, params, part):
        del params
        c1, c2 = corrections(state)
        over_c1, over_c2 = 1 / c1, 1 / c2
        parts = part(state.mu), part(state.nu)
        return jax.tree.map(lambda mu, nu: same_direction(mu, nu, over_c1, over_c2), *parts)

    return Guarded.make(init_fn, update_fn, again, always_finite=True)


def momentum(decay: float = 0.9) -> Guarded:
    """The heavy ball of Polyak (1964), as ``optax.trace`` gives it.

    Args:
      decay: Of the sum of past gradients, in [0, 1).

    Returns:
      A transform with state ``optax.TraceState``, 4 bytes per float32 parameter; sums of float16
      gradients are float32.

    Raises:
      ValueError: If ``decay`` is outside its range.
      TypeError: If it is no number.

    Examples:
      >>> import dartax
      >>> optimizer = dartax.dart(inner=dartax.inner.momentum(0.9))
    """
    _check.decay("decay", decay)

    def init_fn(params):
        return optax.trace(decay).init(_widened(params))

    @jax.jit
    def add(finite, g, trace):
        return (_decayed_sum(_fits(g, finite), decay, trace, g),)

    def update_fn(updates, state, params=None, *, finite=True, **_):
        (trace,) = leaf_by_leaf(add, jnp.asarray(finite), _widened(updates), state.trace)
        like = updates if params is None else params
        return jax.tree.map(_as_half, trace, like), optax.TraceState(trace)

    def again(state, params, part):
        del params
        return part(state.trace)

    return Guarded.make(init_fn, update_fn, again, always_finite=True)


class LionState(NamedTuple):
    """State of :func:`lion`.

    Attributes:
      mu: Average of the gradients, a tree like the parameters.
      sign: The last direction, int8, a tree like the parameters.
    """

    mu: PyTree
    sign: PyTree


def lion(b1: float = 0.9, b2: float = 0.99) -> Guarded:
    """The directions of Lion (Chen et al., 2023, arXiv:2302.06675), as ``optax.scale_by_lion``.

    Args:
      b1: Weight of the average, beside the gradient, in the direction, in [0, 1).
      b2: Decay of the average, in [0, 1).

    Returns:
      A transform with state ``LionState``, 5 bytes per float32 parameter; averages of float16
      gradients are float32.

    Raises:
      ValueError: If a number is outside its range.
      TypeError: If an argument is no number.

    Examples:
      >>> import dartax
      >>> optimizer = dartax.dart(inner=dartax.inner.lion())
    """
    _check.decay("b1", b1)
    _check.decay("b2", b2)

    def init_fn(params):
        return LionState(
            mu=jax.tree.map(jnp.zeros_like, _widened(params)),
            sign=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.int8), params),
        )

    @jax.jit
    def average(finite, g, mu, last):
        fits = _fits(g, finite)
        sign = choose(fits, jnp.sign((1 - b1) * g + b1 * mu).astype(jnp.int8), last)
        # What all signs are: read here, they are computed before the average is overwritten, of
        # which XLA would else keep a copy for them.
        fits &= sign <= 1
        return _decayed_sum(fits, b2, mu, (1 - b2) * g), sign

    def update_fn(updates, state, params=None, *, finite=True, **_):
        state = LionState(
            *leaf_by_leaf(average, jnp.asarray(finite), _widened(updates), state.mu, state.sign)
        )
        like = updates if params is None else params
        directions = jax.tree.map(
            lambda sign, like: sign.astype(jnp.result_type(like)), state.sign, like
        )
        return directions, state

    def again(state, params, part):
        del params
        return jax.tree.map(lambda sign: sign.astype(jnp.float32), part(state.sign))

    return Guarded.make(init_fn, update_fn, again, always_finite=True)
