"""One draw from the Dirichlet, and what learning from it needs."""

from typing import NamedTuple

import jax

from dartax import random


class Draw(NamedTuple):
    """What learning from a draw needs of it.

    Attributes:
      share: pi, the point of the simplex, float32 ``[C]``.
      log_derivative: d log gamma_j / d log concentration_j, float32 ``[C]``.
    """

    share: jax.Array
    log_derivative: jax.Array


def draw_shares(words: jax.Array, concentration: jax.Array) -> Draw:
    """One draw from the Dirichlet, in log space, with its implicit derivative.

    Args:
      words: Random bits, uint32 ``[2, C]``.
      concentration: ``[C]``.
    """
    log_gamma = random.loggamma_from_words(words, concentration)
    return Draw(
        share=jax.nn.softmax(log_gamma),
        log_derivative=random.log_derivative(log_gamma, concentration),
    )
