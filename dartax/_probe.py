"""What an inner transform does, asked by trying it on small arrays when the state is made.

Any optax transform can give the directions. Whether it keeps the sign of the gradient, and what it
makes of white noise (``dartax/_walk.py``), is measured, not read off its name.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dartax._fusable import fusable
from dartax._trees import PyTree
from dartax._walk import WhiteNoise

# Updates that measure an inner transform, after some that let its averages settle.
TRIAL_STEPS, SETTLING = 256, 128
# Independent trials; the least and most elements of a leaf in each; about how many all leaves have.
TRIALS, LEAF_SIZES, TRIAL_SIZE = 8, (4, 32), 2048
# Lags tried; c comes from lag 1 and the last one before the correlation is below
# LEAST_CORRELATION.
LAGS = (1, 2, 5, 17)
LEAST_CORRELATION = 0.06
# Power tells noise from signal if gradients that agree give at least this many times as much.
LEAST_CONTRAST = 2.0


def check_sign(inner: optax.GradientTransformation, params: Any) -> None:
    """Checks that ``inner`` gives directions along the gradient, not against it.

    A whole optimizer such as ``optax.adam(1e-3)`` flips the sign, for its updates are to be added.
    Two gradients of opposite sign cancel whatever does not depend on the gradient, such as noise or
    decayed weights. A second update shows the sign of a warm-up that starts at a rate of 0.
    """
    leaves = jax.tree.leaves(params)
    if not leaves or fusable(inner):  # those of dartax.inner are known
        return

    update = optax.with_extra_args_support(inner).update

    def response(gradient: Any) -> list[Any]:
        given = {"value": jnp.ones([]), "grad": gradient}  # some ask for them
        first, state = update(gradient, inner.init(small), small, **given)
        second, _ = update(gradient, state, small, **given)
        return jax.tree.leaves([first, second])

    try:
        with jax.core.eval_context():
            small = jax.tree.map(
                lambda p: jnp.full((1,) * jnp.ndim(p), 1e-3, jnp.result_type(p)), params
            )
            up, down = (response(jax.tree.map(lambda p, c=c: 0 * p + c, small)) for c in (1, -1))
            along = sum(
                float(jnp.sum(u.astype(jnp.float32) - d.astype(jnp.float32)))
                for u, d in zip(up, down, strict=True)
            )
    except Exception:
        # It cannot be asked about so small a tree, or depends on traced values. Where something is
        # wrong with it, its own init or update will say so.
        return
    if along < 0:
        raise ValueError(
            "inner must keep the sign of the gradient, got a transform that flips it, as a whole "
            "optimizer such as optax.adam(1e-3) does; pass the direction alone, e.g. "
            "optax.scale_by_adam()."
        )


def white_noise(
    inner: optax.GradientTransformation,
    params: PyTree,
    of_leaf: tuple[int, ...],
    num_blocks: int,
) -> WhiteNoise:
    """What ``inner`` makes of white noise in every block: declared, or measured."""
    known = fusable(inner)
    if known and known.white_noise:
        return known.white_noise
    leaves = measure(inner, params)
    sizes = np.array([max(jnp.size(leaf), 1) for leaf in jax.tree.leaves(params)], float)

    def mean(values: Any, weights: Any) -> np.ndarray:
        total = np.bincount(of_leaf, weights, num_blocks)
        return np.bincount(of_leaf, weights * values, num_blocks) / np.where(total > 0, total, 1)

    # (Power has no meaning for a block if it has none for one of its leaves.)
    unknown = np.bincount(of_leaf, leaves.power == 0, num_blocks) > 0
    return WhiteNoise(
        agreement=mean(leaves.agreement, sizes),
        persistence=mean(leaves.persistence, sizes * leaves.agreement),
        power=np.where(unknown, 0.0, mean(leaves.power, sizes)),
    )


def measure(inner: optax.GradientTransformation, params: PyTree) -> WhiteNoise:
    """Runs ``inner`` on white noise, in small arrays with the structure of ``params``.

    The directions of two opposite gradients are subtracted, which leaves out whatever does not
    depend on the gradient, such as decayed weights. Where that fails or overflows, directions are
    taken to be as independent as the gradients, and their size to say nothing.

    Returns:
      NumPy arrays, with one value for each of the n leaves.
    """
    leaves, structure = jax.tree.flatten(params)
    nothing = WhiteNoise(*np.zeros((len(WhiteNoise._fields), len(leaves))))
    if not leaves:
        return nothing
    width = int(np.clip(TRIAL_SIZE // len(leaves), *LEAF_SIZES))
    shapes = [_small_shape(jnp.ndim(leaf), width) for leaf in leaves]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    # NumPy draws the noise: a JAX program that draws it takes a second longer to compile.
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((TRIALS, 1 + SETTLING + TRIAL_STEPS, ends[-1]), np.float32)
    inner = optax.with_extra_args_support(inner)

    def tree_of(numbers: jax.Array) -> PyTree:
        rows = zip(jnp.split(numbers, ends[:-1]), shapes, leaves, strict=True)
        small = [part.reshape(shape).astype(jnp.result_type(leaf)) for part, shape, leaf in rows]
        return jax.tree.unflatten(structure, small)

    one = jnp.ones([])  # a loss, for those who ask for it

    def trial(noise_scale: jax.Array, signal: jax.Array, draws: jax.Array) -> jax.Array:
        """For every leaf, the mean products of directions 0 and LAGS steps apart."""
        start = tree_of(draws[0])

        def step(states: Any, numbers: jax.Array) -> Any:
            found = []
            for sign, state in zip((1, -1), states, strict=True):
                gradient = tree_of(sign * (noise_scale * numbers + signal))
                direction, state = inner.update(gradient, state, start, value=one, grad=gradient)
                flat = [jnp.asarray(u, jnp.float32).ravel() for u in jax.tree.leaves(direction)]
                found.append((state, jnp.concatenate(flat)))
            (up, u), (down, v) = found
            return (up, down), (u - v) / 2

        u = jax.lax.scan(step, 2 * (inner.init(start),), draws[1:])[1][SETTLING:]
        products = [jnp.mean(u[: TRIAL_STEPS - n] * u[n:], 0) for n in (0, *LAGS)]
        of_leaves = [jnp.mean(part, 1) for part in jnp.split(jnp.stack(products), ends[:-1], 1)]
        return jnp.stack(of_leaves)

    try:
        with jax.core.eval_context():
            trials = jax.jit(jax.vmap(jax.vmap(trial, (None, None, 0)), (0, 0, None)))
            scales = jnp.array([1.0, 2.0, 0.0]), jnp.array([0.0, 0.0, 1.0])
            found = np.asarray(trials(*scales, jnp.asarray(draws)), float)
    except Exception:
        # The transform may reject such small arrays, or close over traced values.
        return nothing
    if not np.all(np.isfinite(found)):
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
    """The a and c of a * c^n, from the correlations at LAGS."""
    near, *others = (float(value) for value in correlation)
    if not near > LEAST_CORRELATION:
        return 0.0, 0.0
    if not others[0] > LEAST_CORRELATION:  # over before the next lag
        return 1.0, near
    lag, far = LAGS[1], others[0]
    for n, value in zip(LAGS[2:], others[1:], strict=True):
        if not value > LEAST_CORRELATION:
            break
        lag, far = n, value
    persistence = min((far / near) ** (1 / (lag - 1)), 0.999)
    return min(near / persistence, 1.0), persistence
