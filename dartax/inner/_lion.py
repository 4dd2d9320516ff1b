"""Lion's directions, signs of an average."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dartax import _check
from dartax._fusable import FusableUpdate, choose, decayed_sum
from dartax._fused._order import leaf_by_leaf
from dartax._half import widened
from dartax._trees import PyTree


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
    _check.decay("b2", b2, usual=0.99)

    def init_fn(params):
        return LionState(
            mu=jax.tree.map(jnp.zeros_like, widened(params)),
            sign=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.int8), params),
        )

    @jax.jit
    def average(taken, g, mu, last):
        sign = choose(
            jnp.zeros_like(g, dtype=bool) | taken,  # lies where g lies on an explicit mesh
            jnp.sign((1 - b1) * g + b1 * mu).astype(jnp.int8),
            last,
        )
        # sign <= 1 is always true. It forces the signs to be computed before the average is
        # overwritten; else XLA would keep a copy of it for them.
        return decayed_sum(taken & (sign <= 1), b2, mu, (1 - b2) * g), sign

    def update_fn(updates, state, params=None, *, taken=True, **_):
        state = LionState(*leaf_by_leaf(average, taken, widened(updates), state.mu, state.sign))
        like = updates if params is None else params
        directions = jax.tree.map(
            lambda sign, like: sign.astype(jnp.result_type(like)), state.sign, like
        )
        return directions, state

    def again(updates, state, taken, part):
        del updates, taken
        return jax.tree.map(lambda sign: sign.astype(jnp.float32), part(state.sign))

    update = FusableUpdate(update_fn, again)
    return optax.GradientTransformationExtraArgs(init_fn, update)
