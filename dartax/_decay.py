"""Decoupled weight decay."""

from typing import Any

import optax

from dartax import _check
from dartax._averages import Number


def decays(weight_decay: Number) -> bool:
    """Whether there may be any decay: not for a Python 0."""
    return not (isinstance(weight_decay, int | float) and weight_decay == 0)


def decayed_weights(weight_decay: Number, mask: Any) -> optax.GradientTransformation:
    """``optax.add_decayed_weights``, without need of the parameters for a decay of a Python 0."""
    if not decays(weight_decay):
        return optax.identity()
    chosen = None if mask is None else lambda tree: _check.chosen(mask, tree)
    return optax.add_decayed_weights(weight_decay, chosen)
