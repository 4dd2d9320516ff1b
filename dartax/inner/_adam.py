"""Adam's directions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dartax import _check
from dartax._fusable import FusableUpdate, choose, decayed_sum
from dartax._fused._order import leaf_by_leaf
from dartax._half import as_half, widened
from dartax._walk import WhiteNoise


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
      eps_root: Added to the second moment under the root, non-negative. Positive, it makes the
        gradient through an update finite where an element has had no gradient.
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
    _check.decay("b2", b2, usual=0.99)
    _check.eps(eps)
    _check.number("eps_root", eps_root, "a non-negative number", lambda v: v >= 0, "0.0 is usual")
    if mu_dtype is not None:
        _check.floating_dtype("mu_dtype", mu_dtype)

    def init_fn(params):
        return optax.scale_by_adam(mu_dtype=mu_dtype).init(widened(params))

    @jax.jit
    def moments(taken, g, mu, nu):
        return (
            decayed_sum(taken, b1, mu, (1 - b1) * g),
            decayed_sum(taken, b2, nu, (1 - b2) * g**2),
        )

    @jax.jit
    def direction(taken, t, g, mu, nu):
        dtype = jnp.float64 if mu.dtype == jnp.float64 else jnp.float32
        mu_hat = mu.astype(dtype) / (1 - b1**t)
        if nesterov:
            ahead = mu.astype(dtype) / (1 - b1 ** (t + 1))
            new = jnp.where(taken, g.astype(dtype), 0.0) / (1 - b1**t)
            mu_hat = b1 * ahead + (1 - b1) * new
        nu_hat = nu.astype(dtype) / (1 - b2**t)
        return mu_hat / (jnp.sqrt(nu_hat + eps_root) + eps)

    def number(count):
        return jnp.maximum(count, 1).astype(jnp.float32)

    def update_fn(updates, state, params=None, *, taken=True, **_):
        g = widened(updates)
        mu, nu = leaf_by_leaf(moments, taken, g, state.mu, state.nu)
        taken = jnp.asarray(taken)
        count = choose(taken, optax.safe_increment(state.count), state.count)

        def leaf(g, mu, nu, like):
            return as_half(direction(taken, number(count), g, mu, nu).astype(nu.dtype), like)

        like = updates if params is None else params
        directions = jax.tree.map(leaf, g, mu, nu, like)
        return directions, optax.ScaleByAdamState(count, mu, nu)

    def again(updates, state, taken, part):
        leaf = functools.partial(direction, taken, number(state.count))
        g = part(updates) if nesterov else state.mu  # only its structure is used
        return jax.tree.map(leaf, g, part(state.mu), part(state.nu))

    # The average m of white noise has the mean square (1 - b1) / (1 + b1).
    white_noise = None if nesterov else WhiteNoise(1.0, b1, (1 - b1) / (1 + b1))
    update = FusableUpdate(update_fn, again, white_noise=white_noise)
    return optax.GradientTransformationExtraArgs(init_fn, update)
