"""How far the past steps got: evidence for or against growth that needs no gradient.

The memory z_t = keep * z_{t-1} + w_t * u_t is the displacement of the past steps. If the gradients
were white noise, the directions would still agree for a while, because the inner transform averages
gradients. With a correlation of a * c^n between directions n steps apart, and steps of the lengths
|w_t u_t|, the expected squared length F_t of that *free walk* is

    F_t = keep^2 * F_{t-1} + 2 * |w_t u_t| * keep * O_{t-1} + |w_t u_t|^2
    O_t = c * (keep * O_{t-1} + a * |w_t u_t|)

    progress = |z_t|^2 / F_t

Steps that agree give a progress far above 1, and steps that follow noise 1. In a valley that is too
narrow for them, steps undo one another, and progress falls towards 0. Distance over the root of
summed squares also sets the rate of DoG (Ivgi et al., 2023, `arXiv:2302.12022
<https://arxiv.org/abs/2302.12022>`_).

The size of the directions tells noise from both signal and bouncing. Where the inner transform
scales gradients to a fixed size, as Adam does, white noise gives directions of mean square p, since
an average of noise is small. Gradients that agree give more, and gradients that bounce across a
valley cancel, and give less:

    power_i = (mean square of u_i, averaged over about 20 updates) / p
    noise_i = min(power_i, 1 / power_i)^6

Without a fixed size nothing is known of the noise, and it is taken to be 0. a, c and p are those of
the inner transform under white noise. It is run on some at ``init``, unless it knows them.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dartax._blocks import PyTree

# Average of the mean square of the directions, over about 20 updates.
POWER_DECAY = 0.95
# Updates that measure an inner transform, after some that let its averages settle; elements in all.
TRIAL_STEPS, SETTLING, TRIAL_SIZE = 256, 128, 1024
# Distances in steps at which the correlation is taken: 1, and the farthest at which there is any.
DISTANCES = (1, 2, 5, 17)
# A smaller correlation cannot be told from none.
LEAST_CORRELATION = 0.04


class WhiteNoise(NamedTuple):
    """What the directions of an inner transform are under white noise; float32 scalars.

    Attributes:
      agreement: a, in [0, 1].
      persistence: c, in [0, 1).
      power: p, mean square of the directions; 0 where it depends on the scale of the gradient.
    """

    agreement: Any = 0.0
    persistence: Any = 0.0
    power: Any = 0.0


class Walk(NamedTuple):
    """What is kept of the steps' lengths; K blocks, float32.

    Attributes:
      free: Expected squared length of the memory of a free walk, ``[K]``.
      overlap: Expected inner product of the memory and the next direction of length 1, ``[K]``.
      power: Average of the mean square of the directions, ``[K]``.
      white_noise: What the inner transform makes of white noise.
    """

    free: jax.Array
    overlap: jax.Array
    power: jax.Array
    white_noise: WhiteNoise


def no_walk(inner: optax.GradientTransformation | None, params: PyTree, num_blocks: int) -> Walk:
    """The walk before the first step; nothing is known of the inner transform ``None``."""
    known = WhiteNoise() if inner is None else white_noise(inner, params)
    # One buffer for each field: a donated state must not hold an array twice.
    zeros = lambda: jnp.zeros(num_blocks, jnp.float32)  # noqa: E731
    scalars = WhiteNoise(*(jnp.array(value, jnp.float32) for value in known))
    return Walk(zeros(), zeros(), zeros(), scalars)


def white_noise(inner: optax.GradientTransformation, params: PyTree) -> WhiteNoise:
    """What ``inner`` makes of white noise: known, or measured."""
    known = getattr(inner.update, "white_noise", None)
    return measure(inner, params) if known is None else WhiteNoise(*known)


def progress(walk: Walk, length: jax.Array) -> jax.Array:
    """Squared length of the memory over that of a free walk, ``[K]``; 1 where nothing is known."""
    known = (walk.free > 0) & jnp.isfinite(walk.free) & jnp.isfinite(length)
    return jnp.where(known, length / jnp.where(known, walk.free, 1.0), 1.0)


def power(walk: Walk, num: jax.Array) -> jax.Array:
    """Mean square of the directions over that under white noise, ``[K]``; 0 where it says nothing.

    ``num`` is how many updates the average holds.
    """
    average = walk.power / (1 - POWER_DECAY ** jnp.maximum(num, 1).astype(jnp.float32))
    white = walk.white_noise.power
    known = (white > 0) & (num > 0) & jnp.isfinite(average)
    return jnp.where(known, average / jnp.where(known, white, 1.0), 0.0)


def noise(power: jax.Array) -> jax.Array:
    """How much directions of this power look like those of white noise, in [0, 1]."""
    positive = power > 0
    inverse = 1 / jnp.where(positive, power, 1.0)
    return jnp.where(positive, jnp.minimum(power, inverse), 0.0) ** 6


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
    length = weights * jnp.sqrt(squares)
    overlap = keep * walk.overlap
    return walk._replace(
        free=keep**2 * walk.free + 2 * length * overlap + length**2,
        overlap=white.persistence * (overlap + white.agreement * length),
        power=POWER_DECAY * walk.power + (1 - POWER_DECAY) * squares / jnp.maximum(sizes, 1),
    )


def shortened(walk: Walk, keep: jax.Array) -> Walk:
    """The walk where the memory is multiplied by ``keep``, ``[K]``, and no step is taken."""
    return walk._replace(free=keep**2 * walk.free, overlap=keep * walk.overlap)


def measure(inner: optax.GradientTransformation, params: PyTree) -> WhiteNoise:
    """Runs ``inner`` on white noise, in small arrays with the structure of ``params``.

    Where that fails, directions are taken to be as independent as the gradients.
    """
    leaves, structure = jax.tree.flatten(params)
    if not leaves:
        return WhiteNoise()
    width = -(-TRIAL_SIZE // len(leaves))
    shapes = [(1,) * (jnp.ndim(leaf) - 1) + (width,) * min(jnp.ndim(leaf), 1) for leaf in leaves]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    # Of NumPy, for a program that draws it would take a second more to compile.
    noise = np.random.default_rng(0).standard_normal((1 + SETTLING + TRIAL_STEPS, ends[-1]))
    inner = optax.with_extra_args_support(inner)

    def tree_of(numbers: jax.Array) -> PyTree:
        rows = zip(jnp.split(numbers, ends[:-1]), shapes, leaves, strict=True)
        small = [part.reshape(shape).astype(jnp.result_type(leaf)) for part, shape, leaf in rows]
        return jax.tree.unflatten(structure, small)

    def trial(scale: jax.Array, noise: jax.Array) -> jax.Array:
        start = tree_of(noise[0])

        def step(state: Any, numbers: jax.Array) -> Any:
            direction, state = inner.update(tree_of(scale * numbers), state, start)
            flat = [jnp.asarray(u, jnp.float32).ravel() for u in jax.tree.leaves(direction)]
            return state, jnp.concatenate(flat)

        u = jax.lax.scan(step, inner.init(start), noise[1:])[1][SETTLING:]
        return jnp.stack([jnp.mean(u[: TRIAL_STEPS - n] * u[n:]) for n in (0, *DISTANCES)])

    try:
        with jax.ensure_compile_time_eval():
            trials = jax.jit(jax.vmap(trial, in_axes=(0, None)))
            products = trials(jnp.array([1.0, 2.0]), jnp.asarray(noise, jnp.float32))
            once, larger = np.asarray(products, float)
    except Exception:
        # It cannot be asked about so small a tree, or depends on traced values.
        return WhiteNoise()
    power = float(once[0]) if abs(larger[0] / once[0] - 1) < 0.1 else 0.0
    near, *others = (float(product / once[0]) for product in once[1:])
    if not near > LEAST_CORRELATION:
        return WhiteNoise(power=power)
    seen = [
        (n, far) for n, far in zip(DISTANCES[1:], others, strict=True) if far > LEAST_CORRELATION
    ]
    distance, far = max(seen, default=(2, 0.0))
    persistence = min((far / near) ** (1 / (distance - 1)), 0.999)
    agreement = min(near / persistence, 1.0) if persistence else 0.0
    return WhiteNoise(agreement, persistence, power)
