"""How far the past steps got: evidence, from the steps alone, for longer or shorter ones.

The memory z_t = keep * z_{t-1} + w_t * v_t is the displacement of the past steps. If the gradients
were white noise, the directions would still agree for a while, because the inner transform averages
gradients. With a correlation of a * c^n between directions n steps apart, and steps of the lengths
|w_t v_t|, the expected squared length F_t of that *free walk* is

    F_t = keep^2 * F_{t-1} + 2 * |w_t v_t| * keep * O_{t-1} + |w_t v_t|^2
    O_t = c * (keep * O_{t-1} + a * |w_t v_t|)

    progress = |z_t|^2 / F_t

Steps that agree give a progress far above 1, and steps that follow noise 1. In a valley that is too
narrow for them, steps undo one another, and progress falls toward 0. Distance over the root of
summed squares also sets the rate of DoG (Ivgi et al., 2023, `arXiv:2302.12022
<https://arxiv.org/abs/2302.12022>`_).

The size of the directions tells noise from both signal and bouncing. Where the inner transform
scales gradients to a fixed size, as Adam does, white noise gives directions of mean square p, since
an average of noise is small. Gradients that agree give more, and gradients that bounce across a
valley cancel, and give less:

    power_i = (mean square of v_i, averaged over about 20 updates) / p
    noise_i = clip(2 - |log power_i| / NOISE_WIDTH, 0, 1)

Here v_i is the direction as it is remembered, with the weight decay. That hides no noise as long as
the decay is small beside Adam's noise, whose root mean square is 0.23: weight_decay times that of
the weights should be below 0.1.

All elements count. Where nearly all never have a gradient, as most rows of a large embedding table,
power is far below 1 and noise is not seen. With 90 % of them it is.

In the first 30 updates with b1 = 0.9 the inner transform's averages hold too few gradients for
noise to cancel: power is above 1, and nothing is taken for noise yet.

Other directions have a size that depends on the scale of the loss, as plain gradients have, or the
same size whatever the gradients do, as their signs and Muon's. For them p is the average of their
own mean square over about 100 updates. Gradients without noise shrink as the loss falls, and their
power is below 1; noise keeps its size. Where the size is always the same, everything may be noise,
and progress alone tells. As t_i, the number of hypergradients so far, grows, so does the trust in
that p:

    noise_i = min(clip(t_i / TRUST_AFTER - 1, 0, 1), clip(2 - |log power_i| / NOISE_WIDTH, 0, 1))

a, c and p belong to the inner transform. ``init`` runs it on white noise unless it declares them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dartax._averages import debias, root

# Averages of the mean square of the directions, over about 20 and 100 updates.
POWER_DECAY, USUAL_DECAY = 0.95, 0.99
# Power counts fully as noise while |log power| is below this, and not at all from twice this on.
NOISE_WIDTH = 0.3
# Where white noise has no known power, nothing counts as noise for so many hypergradients, and from
# twice this on everything may. Earlier, the averages are alike, and steps that agree have no more
# progress than a free walk.
TRUST_AFTER = 25
# Neither squared lengths nor their sums overflow float32.
LARGEST_LENGTH = 1e15


class WhiteNoise(NamedTuple):
    """What the directions of an inner transform are under white noise; float32 ``[K]``.

    Attributes:
      agreement: a, in [0, 1].
      persistence: c, in [0, 1).
      power: p, mean square of the directions; 0 where it does not tell noise from signal.
    """

    agreement: Any = 0.0
    persistence: Any = 0.0
    power: Any = 0.0


class Walk(NamedTuple):
    """What is kept of the steps' lengths; K blocks, float32.

    Attributes:
      free: Expected squared length of the memory of a free walk, ``[K]``.
      overlap: Expected inner product of the memory and the next direction of length 1, ``[K]``.
      mean_square: Moving average of the mean square of the directions, ``[K]``.
      usual_square: The same over more updates, ``[K]``.
      white_noise: What the inner transform makes of white noise.
    """

    free: jax.Array
    overlap: jax.Array
    mean_square: jax.Array
    usual_square: jax.Array
    white_noise: WhiteNoise


def empty_walk(white_noise: WhiteNoise, num_blocks: int) -> Walk:
    """The walk before the first step."""
    # One buffer for each field: a donated state must not hold an array twice.
    fill = lambda value: jnp.full(num_blocks, value, jnp.float32)  # noqa: E731
    broadcast = lambda value: jnp.array(jnp.broadcast_to(value, num_blocks), jnp.float32)  # noqa: E731
    return Walk(fill(0), fill(0), fill(0), fill(0), WhiteNoise(*map(broadcast, white_noise)))


def progress(walk: Walk, square_length: jax.Array) -> jax.Array:
    """Squared length of the memory over that of a free walk, ``[K]``; 1 where nothing is known."""
    known = (walk.free > 0) & jnp.isfinite(walk.free) & jnp.isfinite(square_length)
    return jnp.where(known, square_length / jnp.where(known, walk.free, 1.0), 1.0)


def power(walk: Walk, count: jax.Array) -> jax.Array:
    """Mean square of the directions over that under white noise, ``[K]``; 0 if they were all 0.

    ``count`` is how many updates the averages hold.
    """
    average = debias(walk.mean_square, POWER_DECAY, count)
    usual = debias(walk.usual_square, USUAL_DECAY, count)
    white = jnp.where(walk.white_noise.power > 0, walk.white_noise.power, usual)
    return jnp.where(white > 0, average / jnp.where(white > 0, white, 1.0), 0.0)


def noise(walk: Walk, count: jax.Array, num: jax.Array) -> jax.Array:
    """How much the directions count as white noise, ``[K]`` in [0, 1].

    ``count`` is the number of updates so far, ``num`` that of every block's hypergradients.
    """
    ratio = power(walk, count)
    positive = ratio > 0  # directions that are all 0 are no noise
    distance = jnp.abs(jnp.log(jnp.where(positive, ratio, 1.0)))
    alike = jnp.where(positive, 2 - distance / NOISE_WIDTH, 0.0)
    trust = jnp.where(walk.white_noise.power > 0, 1.0, num.astype(jnp.float32) / TRUST_AFTER - 1)
    return jnp.clip(jnp.minimum(trust, alike), 0.0, 1.0)


def advance(
    walk: Walk, keep: jax.Array, weights: jax.Array, squares: jax.Array, sizes: Any
) -> Walk:
    """The walk after a step; all arguments ``[K]``.

    Args:
      walk: Before the step.
      keep: Factor of the old memory.
      weights: Weight of the direction in the new one.
      squares: Sum of the squares of the direction.
      sizes: Number of its elements.
    """
    white = walk.white_noise
    squares = jnp.minimum(squares, LARGEST_LENGTH**2)
    length = jnp.minimum(weights * root(squares), LARGEST_LENGTH)
    overlap = keep * walk.overlap
    sizes = jnp.maximum(sizes, 1)
    return walk._replace(
        free=keep**2 * walk.free + 2 * length * overlap + length**2,
        overlap=white.persistence * (overlap + white.agreement * length),
        mean_square=POWER_DECAY * walk.mean_square + (1 - POWER_DECAY) * squares / sizes,
        usual_square=USUAL_DECAY * walk.usual_square + (1 - USUAL_DECAY) * squares / sizes,
    )


def shortened(walk: Walk, keep: jax.Array) -> Walk:
    """The walk where the memory is multiplied by ``keep``, ``[K]``, and no step is taken."""
    return walk._replace(free=keep**2 * walk.free, overlap=keep * walk.overlap)
