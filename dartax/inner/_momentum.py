"""Heavy-ball momentum."""

import jax
import optax

from dartax import _check
from dartax._fusable import FusableUpdate, decayed_sum
from dartax._fused._order import leaf_by_leaf
from dartax._half import as_half, widened
from dartax._walk import WhiteNoise


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
        return optax.trace(decay).init(widened(params))

    @jax.jit
    def add(taken, g, trace):
        return (decayed_sum(taken, decay, trace, g),)

    def update_fn(updates, state, params=None, *, taken=True, **_):
        (trace,) = leaf_by_leaf(add, taken, widened(updates), state.trace)
        like = updates if params is None else params
        return jax.tree.map(as_half, trace, like), optax.TraceState(trace)

    def again(updates, state, taken, part):
        del updates, taken
        return part(state.trace)

    update = FusableUpdate(update_fn, again, white_noise=WhiteNoise(1.0, decay))
    return optax.GradientTransformationExtraArgs(init_fn, update)
