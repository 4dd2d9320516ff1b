"""Muon's directions: matrices by orthogonalized momentum, everything else by Adam.

With G the Nesterov momentum of the gradients of a matrix, and G = U S V^T its singular values, the
direction is close to U V^T (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/). Five
steps of a Newton-Schulz iteration bring most singular values of X = G / |G| near 1, without
computing them:

    X <- 3.4445 X - 4.7750 (X X^T) X + 2.0315 (X X^T)^2 X

The direction is then scaled by 0.2 * sqrt(max(rows, columns)), which gives its elements about the
size of Adam's (Liu et al., 2025, arXiv:2502.16982), so that both kinds of blocks share one scale.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dartax import _check
from dartax._fusable import FusableUpdate, decayed_sum
from dartax._fused._mesh import auto_sharded
from dartax._half import as_half, widened
from dartax._trees import PyTree
from dartax.inner._adam import adam

# Coefficients of the iteration. They make small singular values grow fast: five steps bring those
# above 0.002 |G| to between 0.68 and 1.21.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Root mean square of the elements of a direction of Adam.
ADAM_RMS = 0.2


class OrthogonalState(NamedTuple):
    """State of the matrices' part of :func:`muon`.

    Attributes:
      trace: Decayed sum of the gradients, a tree like the matrices.
    """

    trace: PyTree


def orthogonalize(matrix: jax.Array, steps: int = 5) -> jax.Array:
    """The nearly orthogonal factor of ``[..., rows, columns]``; 0 for a matrix of zeros."""
    wide = matrix.shape[-1] >= matrix.shape[-2]
    x = matrix if wide else jnp.matrix_transpose(matrix)
    axes = (-2, -1)
    # The squares of x itself may underflow.
    largest = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0.0)
    x = x / jnp.where(largest > 0, largest, 1.0)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=axes, keepdims=True), 1.0)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ jnp.matrix_transpose(x)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else jnp.matrix_transpose(x)


def _orthogonal(momentum: float, steps: int) -> optax.GradientTransformationExtraArgs:
    """Orthogonalized Nesterov momentum of matrices."""

    def init_fn(params):
        return OrthogonalState(jax.tree.map(jnp.zeros_like, widened(params)))

    def update_fn(updates, state, params=None, *, taken=True, **_):
        del params
        gradient = jax.tree.map(lambda g: jnp.where(taken, g, jnp.zeros_like(g)), widened(updates))
        trace = jax.tree.map(functools.partial(decayed_sum, taken, momentum), state.trace, gradient)

        def direction(g, m, like):
            ahead = (g + momentum * m).astype(jnp.float32)
            scale = ADAM_RMS * max(m.shape[-2:]) ** 0.5
            # For sharded matrices, XLA chooses how the products are sharded.
            found = auto_sharded(functools.partial(orthogonalize, steps=steps), ahead)
            return as_half((scale * found).astype(g.dtype), like)

        return jax.tree.map(direction, gradient, trace, updates), OrthogonalState(trace)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def muon(
    momentum: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    *,
    steps: int = 5,
    matrices: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon's directions for matrices, Adam's for the other parameters.

    The rates of both kinds of blocks are learned together, and mean about the same: how far the
    elements move at a step.

    Args:
      momentum: Decay of the sum of past gradients of the matrices, in [0, 1).
      b1: Decay of Adam's first moment, in [0, 1).
      b2: Decay of Adam's second moment, in [0, 1).
      eps: Added to the root of Adam's second moment, positive.
      steps: Newton-Schulz steps, positive.
      matrices: Which parameters are matrices, a tree of bools or a function from params to one;
        ``None`` takes those of two dimensions. Usually the embedding and the output layer of a
        language model are left to Adam. If there are more dimensions, the last two are the matrix.

    Returns:
      A transform with state ``optax.PartitionState``: 4 bytes per float32 parameter for matrices,
      8 for the others.

    Raises:
      ValueError: If a number is outside its range, or a parameter of ``matrices`` is a vector.
      TypeError: If an argument has the wrong type.

    Examples:
      >>> import dartax
      >>> def hidden(params):  # all matrices but the first and the last
      ...     return {name: 0 < int(name[-1]) < 3 and p.ndim == 2 for name, p in params.items()}
      >>> optimizer = dartax.dart(inner=dartax.inner.muon(matrices=hidden))
    """
    _check.decay("momentum", momentum, usual=0.95)
    _check.number("steps", steps, "a positive integer", lambda v: v > 0 and v == int(v), "pass 5")
    _check.mask(matrices, "matrices")

    def labels(tree):
        if matrices is None:
            chosen = jax.tree.map(lambda leaf: jnp.ndim(leaf) == 2, tree)
        else:
            chosen = _check.chosen(matrices, tree, "matrices")

        def label(is_matrix, leaf):
            if is_matrix and jnp.ndim(leaf) < 2:
                raise ValueError(
                    "matrices must choose parameters of two dimensions or more, got shape "
                    f"{jnp.shape(leaf)}; leave it to Adam."
                )
            return "muon" if is_matrix else "adam"

        return jax.tree.map(label, chosen, tree)

    parts = {"muon": _orthogonal(momentum, int(steps)), "adam": adam(b1, b2, eps)}
    both = optax.partition(parts, labels)
    update = FusableUpdate(both.update, again=None)
    return optax.GradientTransformationExtraArgs(both.init, update)
