"""Directions for ``dart(inner=...)`` around which a step costs less.

Any optax transform can give the directions of DART. These are optax's ``scale_by_adam``, ``trace``
and ``scale_by_lion``, which can also stand alone. With them a step that may be skipped does not
hold their old state beside the new one, and does not write the direction out: see
:class:`dartax._fused._fusable.FusableUpdate`. Inside ``optax.chain`` they are transforms like any
other, and a step costs what it costs with those of optax; ``dart`` has ``weight_decay`` of its own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dartax import _check
from dartax._fused._fusable import FusableUpdate, choose
from dartax._fused._order import leaf_by_leaf

PyTree = Any


def _widened(tree: PyTree) -> PyTree:
    """``tree`` with float32 in place of float16, where ``eps`` and small squares would be 0."""
    is_half = lambda x: jnp.result_type(x) == jnp.float16  # noqa: E731
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_half(x) else x, tree)


def _as_half(direction: jax.Array, like: Any) -> jax.Array:
    """``direction`` in float16, clipped to its range, where ``like``, such as a parameter, is."""
    if jnp.result_type(like) != jnp.float16:
        return direction
    most = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(direction, -most, most).astype(jnp.float16)


def _decayed_sum(finite: jax.Array, decay: Any, old: jax.Array, term: jax.Array) -> jax.Array:
    """``decay * old + term``, or ``old`` where the step is skipped."""
    return jnp.where(finite, decay * old + term, old).astype(old.dtype)


def adam(
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adam's directions, as ``optax.scale_by_adam`` gives them; the default of ``dart``.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1). Shorter than the usual 0.999, which would remember
        the steep beginning of the ramp for long.
      eps: Added to the root of the second moment, positive.
      eps_root: Added to the second moment under the root, non-negative.
      mu_dtype: Dtype of the first moment; ``None`` is that of the parameters. The direction is
        computed from the rounded moment.
      nesterov: Whether the direction looks one step of momentum ahead (Dozat, 2016).

    Returns:
      A transform with state ``optax.ScaleByAdamState``, 8 bytes per float32 parameter. Moments of
      float16 parameters are float32.

    Raises:
      ValueError: If a number is outside its range.
      TypeError: If an argument has the wrong type.

    Examples:
      >>> import dartax
      >>> optimizer = dartax.dart(inner=dartax.inner.adam(b2=0.999))
    """
    _check.decay("b1", b1)
    _check.decay("b2", b2)
    _check.number("eps", eps, "a positive number", lambda v: v > 0, "1e-8 is usual")
    _check.number("eps_root", eps_root, "a non-negative number", lambda v: v >= 0, "0.0 is usual")
    if mu_dtype is not None:
        _check.floating_dtype("mu_dtype", mu_dtype)

    def init_fn(params):
        return optax.scale_by_adam(mu_dtype=mu_dtype).init(_widened(params))

    @jax.jit
    def moments(finite, g, mu, nu):
        return (
            _decayed_sum(finite, b1, mu, (1 - b1) * g),
            _decayed_sum(finite, b2, nu, (1 - b2) * g**2),
        )

    @jax.jit
    def direction(finite, t, g, mu, nu):
        dtype = jnp.float64 if mu.dtype == jnp.float64 else jnp.float32
        mu_hat = mu.astype(dtype) / (1 - b1**t)
        if nesterov:
            ahead = mu.astype(dtype) / (1 - b1 ** (t + 1))
            new = jnp.where(finite, g.astype(dtype), 0.0) / (1 - b1**t)
            mu_hat = b1 * ahead + (1 - b1) * new
        nu_hat = nu.astype(dtype) / (1 - b2**t)
        return mu_hat / (jnp.sqrt(nu_hat + eps_root) + eps)

    def number(count):
        return jnp.maximum(count, 1).astype(jnp.float32)

    def update_fn(updates, state, params=None, *, finite=True, **_):
        g = _widened(updates)
        mu, nu = leaf_by_leaf(moments, finite, g, state.mu, state.nu)
        finite = jnp.asarray(finite)
        count = choose(finite, optax.safe_increment(state.count), state.count)

        def leaf(g, mu, nu, like):
            return _as_half(direction(finite, number(count), g, mu, nu).astype(mu.dtype), like)

        like = updates if params is None else params
        directions = jax.tree.map(leaf, g, mu, nu, like)
        return directions, optax.ScaleByAdamState(count, mu, nu)

    def again(updates, state, params, finite, part):
        del params
        leaf = functools.partial(direction, finite, number(state.count))
        g = part(updates) if nesterov else state.mu  # not read
        return jax.tree.map(leaf, g, part(state.mu), part(state.nu))

    # The average m of white noise has the mean square (1 - b1) / (1 + b1).
    white_noise = None if nesterov else (1.0, b1, (1 - b1) / (1 + b1))
    update = FusableUpdate(update_fn, again, always_finite=True, white_noise=white_noise)
    return optax.GradientTransformationExtraArgs(init_fn, update)


def momentum(decay: float = 0.9) -> optax.GradientTransformationExtraArgs:
    """The heavy ball of Polyak (1964), as ``optax.trace`` gives it.

    Args:
      decay: Decay of the sum of past gradients, in [0, 1).

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
        return (_decayed_sum(finite, decay, trace, g),)

    def update_fn(updates, state, params=None, *, finite=True, **_):
        (trace,) = leaf_by_leaf(add, finite, _widened(updates), state.trace)
        like = updates if params is None else params
        return jax.tree.map(_as_half, trace, like), optax.TraceState(trace)

    def again(updates, state, params, finite, part):
        del updates, params, finite
        return part(state.trace)

    update = FusableUpdate(update_fn, again, always_finite=True, white_noise=(1.0, decay, 0.0))
    return optax.GradientTransformationExtraArgs(init_fn, update)


class LionState(NamedTuple):
    """State of :func:`lion`.

    Attributes:
      mu: Average of the gradients, a tree like the parameters.
      sign: The last direction, int8, a tree like the parameters.
    """

    mu: PyTree
    sign: PyTree


def lion(b1: float = 0.9, b2: float = 0.99) -> optax.GradientTransformationExtraArgs:
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
        sign = choose(
            jnp.zeros_like(g, dtype=bool) | finite,  # lies where g lies on an explicit mesh
            jnp.sign((1 - b1) * g + b1 * mu).astype(jnp.int8),
            last,
        )
        # sign <= 1 is always true. It forces the signs to be computed before the average is
        # overwritten; else XLA would keep a copy of it for them.
        return _decayed_sum(finite & (sign <= 1), b2, mu, (1 - b2) * g), sign

    def update_fn(updates, state, params=None, *, finite=True, **_):
        state = LionState(*leaf_by_leaf(average, finite, _widened(updates), state.mu, state.sign))
        like = updates if params is None else params
        directions = jax.tree.map(
            lambda sign, like: sign.astype(jnp.result_type(like)), state.sign, like
        )
        return directions, state

    def again(updates, state, params, finite, part):
        del updates, params, finite
        return jax.tree.map(lambda sign: sign.astype(jnp.float32), part(state.sign))

    update = FusableUpdate(update_fn, again, always_finite=True)
    return optax.GradientTransformationExtraArgs(init_fn, update)
