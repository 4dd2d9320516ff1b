"""Networks of the experiments."""

from collections.abc import Sequence

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Multilayer perceptron with ReLU; ``[batch, features]`` to logits ``[batch, classes]``."""

    hidden: Sequence[int]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of a batch."""
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)
