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
    noise_i = clip(2 - |log power_i| / NOISE_WIDTH, 0, 1)

For about 50 updates the inner transform's averages hold too few gradients for noise to cancel:
power is above 1, and nothing is taken for noise yet. If directions have the same size whatever the
gradients do, as their signs have, or a size that depends on the scale of the loss, power says
nothing, and noise is 0.

a, c and p belong to the inner transform. ``init`` runs it on white noise unless it declares them.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dartax._averages import root
from dartax._blocks import PyTree

# Average of the mean square of the directions, over about 20 updates.
POWER_DECAY = 0.95
# Within this of 1, in logarithms, power is that of noise; from twice as far on it is not.
NOISE_WIDTH = 0.3
# Neither squared lengths nor their sums overflow float32.
LARGEST_LENGTH = 1e15

# Updates that measure an inner transform, after some that let its averages settle.
TRIAL_STEPS, SETTLING = 256, 128
# Trials, and the elements of a leaf in each, fewer where there are many leaves.
TRIALS, LEAF_SIZES, TRIAL_SIZE = 8, (4, 32), 2048
# Lags tried; c comes from lag 1 and the last one before the correlation is below
# LEAST_CORRELATION.
LAGS = (1, 2, 5, 17)
LEAST_CORRELATION = 0.06
# Power tells noise from signal if gradients that agree give at least this many times as much.
LEAST_CONTRAST = 2.0


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
      power: Average of the mean square of the directions, ``[K]``.
      white_noise: What the inner transform makes of white noise.
    """

    free: jax.Array
    overlap: jax.Array
    power: jax.Array
    white_noise: WhiteNoise


def empty_walk(known: WhiteNoise, num_blocks: int) -> Walk:
    """The walk before the first step."""
    # One buffer for each field: a donated state must not hold an array twice.
    fill = lambda value: jnp.full(num_blocks, value, jnp.float32)  # noqa: E731
    broadcast = lambda value: jnp.array(jnp.broadcast_to(value, num_blocks), jnp.float32)  # noqa: E731
    return Walk(fill(0), fill(0), fill(0), WhiteNoise(*map(broadcast, known)))


def declared(inner: optax.GradientTransformation) -> tuple[Any, Any, Any] | None:
    """a, c and p as ``inner`` declares them."""
    return getattr(inner.update, "white_noise", None)


def white_noise(
    inner: optax.GradientTransformation,
    params: PyTree,
    of_leaf: tuple[int, ...],
    num_blocks: int,
) -> WhiteNoise:
    """What ``inner`` makes of white noise in every block: declared, or measured."""
    known = declared(inner)
    if known is not None:
        return WhiteNoise(*known)
    leaves = measure(inner, params)
    sizes = np.array([max(jnp.size(leaf), 1) for leaf in jax.tree.leaves(params)], float)
    total = np.maximum(np.bincount(of_leaf, sizes, num_blocks), 1)
    means = [np.bincount(of_leaf, sizes * value, num_blocks) / total for value in leaves]
    # (Power has no meaning for a block if it has none for one of its leaves.)
    without = np.bincount(of_leaf, leaves.power == 0, num_blocks) > 0
    return WhiteNoise(means[0], means[1], np.where(without, 0.0, means[2]))


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
    distance = jnp.abs(jnp.log(jnp.where(positive, power, 1.0)))
    return jnp.where(positive, jnp.clip(2 - distance / NOISE_WIDTH, 0.0, 1.0), 0.0)


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

    The directions of two opposite gradients are subtracted, which leaves out whatever does not
    depend on the gradient, such as decayed weights. Where that fails, directions are taken to be as
    independent as the gradients.

    Returns:
      NumPy arrays, with one value for each of the n leaves.
    """
    leaves, structure = jax.tree.flatten(params)
    nothing = WhiteNoise(*np.zeros((3, len(leaves))))
    if not leaves:
        return nothing
    width = int(np.clip(TRIAL_SIZE // len(leaves), *LEAF_SIZES))
    shapes = [_small_shape(jnp.ndim(leaf), width) for leaf in leaves]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    # Of NumPy, for a program that draws it would take a second more to compile.
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((TRIALS, 1 + SETTLING + TRIAL_STEPS, ends[-1]), np.float32)
    inner = optax.with_extra_args_support(inner)

    def tree_of(numbers: jax.Array) -> PyTree:
        rows = zip(jnp.split(numbers, ends[:-1]), shapes, leaves, strict=True)
        small = [part.reshape(shape).astype(jnp.result_type(leaf)) for part, shape, leaf in rows]
        return jax.tree.unflatten(structure, small)

    def trial(noise_scale: jax.Array, signal: jax.Array, draws: jax.Array) -> jax.Array:
        """Of every leaf the mean products of directions 0 and LAGS steps apart."""
        start = tree_of(draws[0])

        def step(states: Any, numbers: jax.Array) -> Any:
            found = []
            for sign, state in zip((1, -1), states, strict=True):
                gradient = tree_of(sign * (noise_scale * numbers + signal))
                direction, state = inner.update(gradient, state, start)
                flat = [jnp.asarray(u, jnp.float32).ravel() for u in jax.tree.leaves(direction)]
                found.append((state, jnp.concatenate(flat)))
            (up, u), (down, v) = found
            return (up, down), (u - v) / 2

        u = jax.lax.scan(step, 2 * (inner.init(start),), draws[1:])[1][SETTLING:]
        products = [jnp.mean(u[: TRIAL_STEPS - n] * u[n:], 0) for n in (0, *LAGS)]
        of_leaves = [jnp.mean(part, 1) for part in jnp.split(jnp.stack(products), ends[:-1], 1)]
        return jnp.stack(of_leaves)

    try:
        with jax.ensure_compile_time_eval():
            trials = jax.jit(jax.vmap(jax.vmap(trial, (None, None, 0)), (0, 0, None)))
            scales = jnp.array([1.0, 2.0, 0.0]), jnp.array([0.0, 0.0, 1.0])
            found = np.asarray(trials(*scales, jnp.asarray(draws)), float)
    except Exception:
        # The transform may reject such small arrays, or close over traced values.
        return nothing
    noise, twice, signal = np.mean(found, axis=1)  # [n leaves, lags]
    power = noise[:, 0]
    moves = power > 0
    positive = np.where(moves, power, 1.0)
    tells = moves & (np.abs(twice[:, 0] / positive - 1) < 0.1)
    tells &= signal[:, 0] > LEAST_CONTRAST * power
    fitted = np.array([_fit(row) for row in noise[:, 1:] / positive[:, None]])
    return WhiteNoise(fitted[:, 0], fitted[:, 1], np.where(tells, power, 0.0))


def _small_shape(ndim: int, width: int) -> tuple[int, ...]:
    """A shape of about ``width`` elements, square-like for a matrix."""
    if ndim < 2:
        return (width,) * ndim
    rows = 4
    return (*(1,) * (ndim - 2), rows, -(-width // rows))


def _fit(correlation: np.ndarray) -> tuple[float, float]:
    """A and c of a * c^n, from the correlations at LAGS."""
    near, *others = (float(value) for value in correlation)
    if not near > LEAST_CORRELATION:
        return 0.0, 0.0
    lag, far = LAGS[1], 0.0
    for n, value in zip(LAGS[1:], others, strict=True):
        if not value > LEAST_CORRELATION:
            break
        lag, far = n, value
    persistence = min((far / near) ** (1 / (lag - 1)), 0.999)
    return (min(near / persistence, 1.0) if persistence else 0.0), persistence
