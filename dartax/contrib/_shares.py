"""Rates within a tensor: a second Dirichlet shares its rate out between channels or elements.

DART gives a tensor its rate. Each of its N channels or elements has a share of it, and moves with
``factor_i`` times that rate. The mean of the factors over the tensor is 1:

    w ~ Dirichlet(concentration),    factor_i = N * w_i

(A Dirichlet whose components are shared out by Dirichlets is a Dirichlet again, if the
concentrations add up.) With h_i = -< g_i, z_i > over the memory z of past steps, and
l'_i = d log gamma_i / d log concentration_i, the gradient through the draw is

    G_i = l'_i * h_i,    log concentration_i <- log concentration_i - STEP * m_i / sqrt(v_i)

with its moments m and v. The step is near STEP where every step so far should have been longer, or
shorter, and near 0 where they disagree. Then the new concentrations are multiplied by one number
that restores the mean of the tensor's. The exact gradient has one more term, a sum over all
elements: what one element gains, the others lose. Here the normalization does that. With the sum,
the elements with the steepest gradients would take everything.

A draw with its derivative costs as much as Adam's step of 40 elements. So a step renews only one
slice of a large tensor, each slice in turn: its concentrations learn, with steps multiplied by
the number of slices, and its shares are drawn again. Their sum is set to its expected value.

Around Adam it changes little, since Adam already scales every element by its own gradients.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dartax import _check, _probe, random
from dartax._blocks import LARGEST_ROOT
from dartax._fusable import FusableUpdate, choose, fusable
from dartax._fused._mesh import auto_sharded
from dartax._half import as_half, in_float32
from dartax._trees import PyTree
from dartax.inner import adam

GRANULARITIES = ("channel", "element")

# Decays of the moments, over the renewals of an element.
B1, B2 = 0.9, 0.99
# Change of a log concentration per update while the gradient keeps one sign.
STEP = 0.005
# A tensor has at most so many slices, and a slice at least MIN_SLICE values: small tensors are
# renewed whole.
SLICES, MIN_SLICE = 64, 1024
# Concentrations stay within this factor of their mean.
RANGE = 100.0
# Values that are learned and drawn at a time.
ROW = 1 << 16


class Shares(NamedTuple):
    """What is kept of every channel or element; trees like the parameters, float32.

    Their arrays have the shape of their leaf, or of its last axis: ``[1, ..., channels]``.

    Attributes:
      within_concentration: Concentrations of the Dirichlet of every tensor.
      within_mu: First moment of the gradient of its logarithm.
      within_nu: Second moment.
      within_factor: What multiplies the rate of the tensor; 1 on average.
      within_derivative: d log gamma / d log concentration of the last draw.
    """

    within_concentration: Any
    within_mu: Any
    within_nu: Any
    within_factor: Any
    within_derivative: Any


class ScaleBySharesState(NamedTuple):
    """State of :func:`scale_by_shares`.

    Attributes:
      allocation_count: Number of renewals, int32.
      allocation_key: Raw threefry key data, uint32 ``[2]``.
      shares: What is kept of every channel or element, trees like the parameters: concentrations
        (``within_concentration``), moments of their gradients, and the factors of the last draw.
      inner_state: State of the transform that gives the directions.
    """

    allocation_count: jax.Array
    allocation_key: jax.Array
    shares: Shares
    inner_state: PyTree


class Slice(NamedTuple):
    """What a turn renews of a leaf: ``length`` along ``axis``, the longest one.

    Whole rows of an array are written in place, a part of its flat form is not.
    """

    shape: tuple[int, ...]
    axis: int
    length: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "Slice":
        """The slices of factors of this shape."""
        shape = shape or (1,)
        axis = int(np.argmax(shape))
        others = max(math.prod(shape) // max(shape[axis], 1), 1)
        length = max(math.ceil(shape[axis] / SLICES), math.ceil(MIN_SLICE / others))
        return cls(shape, axis, min(length, shape[axis]))

    @property
    def size(self) -> int:
        """How many values the leaf has."""
        return math.prod(self.shape)

    @property
    def num_values(self) -> int:
        """How many values a turn renews."""
        return self.size // max(self.shape[self.axis], 1) * self.length

    @property
    def turns(self) -> int:
        """How many turns renew them all."""
        return max(math.ceil(self.shape[self.axis] / max(self.length, 1)), 1)

    def start(self, count: jax.Array) -> jax.Array:
        """Where the slice of this turn begins; the last one reaches back over another."""
        return count % self.turns * self.length

    def take(self, values: jax.Array, count: jax.Array) -> jax.Array:
        """The values whose turn it is, in one dimension."""
        values = values.reshape(self.shape)
        part = jax.lax.dynamic_slice_in_dim(values, self.start(count), self.length, self.axis)
        return part.reshape(-1)

    def put(self, values: jax.Array, part: jax.Array, count: jax.Array) -> jax.Array:
        """``values`` with those whose turn it is replaced."""
        shape = list(self.shape)
        shape[self.axis] = self.length
        whole = jax.lax.dynamic_update_slice_in_dim(
            values.reshape(self.shape), part.reshape(shape), self.start(count), self.axis
        )
        return whole.reshape(values.shape)


class Turn:
    """The values of all leaves whose turn it is, as one vector ``[R]``."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], count: jax.Array):
        """The turn number ``count`` for factors of these shapes."""
        self.slices = [Slice.of(shape) for shape in shapes]
        self.count = count
        self._lengths = [part.num_values for part in self.slices]
        self.length = sum(self._lengths)

    def gather(self, leaves: Sequence[jax.Array]) -> jax.Array:
        """The values of the leaves."""
        # Written part by part: XLA's concatenation tests, for every value, which part it came from.
        vector = jnp.zeros(self.length, jnp.float32)
        for part, leaf, end in zip(self.slices, leaves, np.cumsum(self._lengths), strict=True):
            vector = jax.lax.dynamic_update_slice_in_dim(
                vector, part.take(leaf, self.count), end - part.num_values, 0
            )
        return vector

    def scatter(self, leaves: Sequence[jax.Array], values: jax.Array) -> list[jax.Array]:
        """The leaves with new values."""
        parts = zip(self.slices, leaves, self.split(values), strict=True)
        return [part.put(leaf, new, self.count) for part, leaf, new in parts]

    def split(self, values: jax.Array) -> list[jax.Array]:
        """The vector, leaf by leaf."""
        return jnp.split(values, np.cumsum(self._lengths)[:-1])

    def sums(self, values: jax.Array) -> list[jax.Array]:
        """The sum over what belongs to every leaf."""
        return [jnp.sum(part) for part in self.split(values)]

    def spread(self, scalars: Sequence[Any]) -> jax.Array:
        """A scalar of every leaf, for each of its values."""
        pairs = zip(self._lengths, scalars, strict=True)
        return jnp.concatenate([jnp.full(length, x, jnp.float32) for length, x in pairs])


def factor_shape(leaf: jax.Array) -> tuple[int, ...]:
    """Shape of the factors of a leaf's channels, its last axis."""
    shape = jnp.shape(leaf)
    return (1,) * (len(shape) - 1) + shape[-1:]


def hypergradient(part: Slice, gradient: Any, memory: Any, count: jax.Array) -> jax.Array:
    """The h of the values whose turn it is: minus the inner products over the other axes."""
    if gradient.size == part.size:
        gradient, memory = part.take(gradient, count), part.take(memory, count)
        return -gradient.astype(jnp.float32) * memory.astype(jnp.float32)
    product = gradient.astype(jnp.float32) * memory.astype(jnp.float32)
    return part.take(-jnp.sum(product, range(product.ndim - 1), keepdims=True), count)


def learn_and_draw(
    key: jax.Array, shares: Shares, h: jax.Array, debias: Any, speed: Any, level: Any
) -> Shares:
    """One renewal, elementwise. The factors are still gamma draws, not divided by their sum.

    Args:
      key: Key of the draws.
      shares: As they are, ``[R]`` each, as all that follows.
      h: The hypergradients.
      debias: What corrects m / sqrt(v) for the zeros that both started from.
      speed: The longest change of a log concentration.
      level: What brings the mean concentration of the leaf back to where it was.
    """
    concentration, mu, nu, _, derivative = shares
    gradient = derivative * h
    # The square of a greater one would stay in the average forever.
    gradient = jnp.where(jnp.abs(gradient) < LARGEST_ROOT, gradient, 0.0)
    mu = B1 * mu + (1 - B1) * gradient
    nu = B2 * nu + (1 - B2) * gradient**2
    root = jnp.sqrt(nu)
    s = -debias * jnp.where(root > 0, mu / jnp.where(root > 0, root, 1.0), 0.0)
    concentration = level * concentration * jnp.exp(speed * jnp.clip(s, -1.0, 1.0))
    log_gamma = random.loggamma(key, concentration, method="fast")
    derivative = random.log_derivative(log_gamma, concentration)
    return Shares(concentration, mu, nu, jnp.exp(log_gamma), derivative)


def in_rows(function: Any, length: int, *vectors: PyTree) -> PyTree:
    """``function(number, *rows)`` over the rows of vectors ``[length]``, in a loop.

    The loop keeps XLA from compiling all of it again for every leaf that reads a part of it.
    """
    num_rows = max(2, math.ceil(length / ROW))
    width = math.ceil(length / num_rows)

    def rows(vector):
        padded = jnp.pad(vector, (0, num_rows * width - length), constant_values=1.0)
        return padded.reshape(num_rows, width)

    result = jax.lax.map(
        lambda row: function(*row), (jnp.arange(num_rows), *jax.tree.map(rows, vectors))
    )
    return jax.tree.map(lambda table: table.reshape(-1)[:length], result)


def renew(
    state: ScaleBySharesState,
    gradient: PyTree,
    memory: PyTree,
    concentration: Any,
    taken: jax.Array,
) -> ScaleBySharesState:
    """One turn: the slices learn from their hypergradients and are drawn again.

    Args:
      state: As it is.
      gradient: Gradient of the loss.
      memory: z, the past steps that it is compared with.
      concentration: Mean concentration.
      taken: Whether the step is taken; the state stays as it is otherwise.
    """
    structure: Any = jax.tree.structure(state.shares.within_factor)
    leaves = Shares(*(jax.tree.leaves(tree) for tree in state.shares))
    if not leaves.within_factor:  # a label of optax.partition that nobody has
        return state
    count = state.allocation_count
    turn = Turn([leaf.shape for leaf in leaves.within_factor], count)
    slices = turn.slices
    old = Shares(*(turn.gather(arrays) for arrays in leaves))

    products = zip(slices, jax.tree.leaves(gradient), jax.tree.leaves(memory), strict=True)
    h = jnp.concatenate([hypergradient(part, g, z, count) for part, g, z in products])
    nums = [(count // part.turns + 1).astype(jnp.float32) for part in slices]
    means = [jnp.mean(leaf) for leaf in leaves.within_concentration]
    of_leaves = (
        [jnp.sqrt(1 - B2**num) / (1 - B1**num) for num in nums],
        [STEP * part.turns for part in slices],
        [concentration / mean for mean in means],
    )
    key = jax.random.wrap_key_data(state.allocation_key, impl="threefry2x32")
    key = jax.random.fold_in(key, count)

    def row(number, shares, *vectors):
        shares = learn_and_draw(jax.random.fold_in(key, number), shares, *vectors)
        low, high = concentration / RANGE, concentration * RANGE
        return shares._replace(
            within_concentration=jnp.clip(shares.within_concentration, low, high)
        )

    new = in_rows(row, turn.length, old, h, *(turn.spread(scalars) for scalars in of_leaves))
    # The shares of a slice sum to their mean, that of its concentrations over those of the leaf.
    before, after = turn.sums(old.within_concentration), turn.sums(new.within_concentration)
    scales = [
        a / ((mean + (a - b) / max(part.size, 1)) * jnp.maximum(gamma, 1e-30))
        for part, mean, b, a, gamma in zip(
            slices, means, before, after, turn.sums(new.within_factor), strict=True
        )
    ]
    new = new._replace(within_factor=new.within_factor * turn.spread(scales))
    new = [choose(taken, *pair) for pair in zip(new, old, strict=True)]
    trees = [
        jax.tree.unflatten(structure, turn.scatter(arrays, values))
        for arrays, values in zip(leaves, new, strict=True)
    ]
    return state._replace(
        allocation_count=jnp.where(taken, optax.safe_increment(count), count),
        shares=Shares(*trees),
    )


def scale_by_shares(
    inner: optax.GradientTransformation | None,
    granularity: str,
    *,
    concentration: Any = 10.0,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """The directions of ``inner``, each channel or element times its factor.

    For ``dart(inner=...)``, which passes the memory of past steps as ``step_memory``.
    ``dart(blocks="channel")`` and ``dart(blocks="element")`` put it around their inner transform.

    Args:
      inner: Gives the directions; does not flip the sign. ``None`` is ``dartax.inner.adam()``.
      granularity: ``"channel"``, the indices of the last axis, or ``"element"``.
      concentration: Mean concentration of a tensor's channels or elements, positive.
      key: Seed of the draws, an int or a JAX key of any kind.

    Returns:
      A transform with state ``ScaleBySharesState``: 20 bytes per channel or element beside the
      state of ``inner``.

    Raises:
      ValueError: If ``granularity`` is another, a number is outside its range, or ``update`` gets
        no memory of whole tensors.
      TypeError: If an argument has the wrong type.

    Examples:
      >>> import dartax
      >>> shared = dartax.contrib.scale_by_shares(dartax.inner.adam(), "channel")
      >>> optimizer = dartax.dart(inner=shared)
    """
    _check.transformation("inner", inner)
    inner = adam() if inner is None else inner
    _check.one_of("granularity", granularity, GRANULARITIES)
    positive = lambda v: v > 0  # noqa: E731
    _check.number("concentration", concentration, "a positive number", positive, "10.0 is usual")
    random.check_key(key)
    known = fusable(inner)
    inner = in_float32(inner) if known is None else inner

    def init_fn(params):
        _probe.check_sign(inner, params)

        def full(value):
            def leaf(p):
                if granularity == "element":  # lies where the parameters lie
                    return jnp.full_like(p, value, dtype=jnp.float32)
                return jnp.full(factor_shape(p), value, jnp.float32)

            return jax.tree.map(leaf, params)

        # Not the random stream of the tensors, which starts from the same key.
        stream = jax.random.fold_in(random.threefry_key(key), 1)
        return ScaleBySharesState(
            allocation_count=jnp.zeros([], jnp.int32),
            allocation_key=jnp.array(jax.random.key_data(stream)),
            shares=Shares(full(concentration), full(0.0), full(0.0), full(1.0), full(0.0)),
            inner_state=inner.init(params),
        )

    def times(direction, factor):
        product = factor * direction.astype(jnp.float32)
        return as_half(product, direction).astype(direction.dtype)

    def update_fn(
        updates, state, params=None, *, taken=True, step_memory=None, grad=None, **extra_args
    ):
        gradient = updates if grad is None else grad
        if jax.tree.map(jnp.shape, step_memory) != jax.tree.map(jnp.shape, gradient):
            raise ValueError(
                "step_memory must have the shapes of the gradient, got "
                f"{jax.tree.map(jnp.shape, step_memory)}; pass scale_by_shares as it is to "
                "dartax.dart(inner=...), and other transforms as its own inner."
            )
        wanted = jax.tree.map(jnp.shape if granularity == "element" else factor_shape, gradient)
        if jax.tree.map(jnp.shape, state.shares.within_factor) != wanted:
            raise ValueError(
                f"blocks must be those that the state was made for, got {granularity!r} for a "
                "state of other ones; build the optimizer as it was then, or call init again."
            )
        taken = jnp.asarray(taken)
        new = auto_sharded(
            renew,
            state._replace(inner_state=()),
            gradient,
            step_memory,
            jnp.asarray(concentration, jnp.float32),
            taken,
        )
        if known is not None:
            extra_args["taken"] = taken
        direction, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        direction = jax.tree.map(times, direction, new.shares.within_factor)
        return direction, new._replace(inner_state=inner_state)

    inner_again: Any = known.again if known else None

    def again(updates, state, taken, part):
        direction = inner_again(updates, state.inner_state, taken, part)
        return jax.tree.map(times, direction, part(state.shares.within_factor))

    update = FusableUpdate(
        update_fn,
        again=again if inner_again else None,
        finite=known is not None and known.finite,
        whole_memory=True,
        white_noise=known.white_noise if known else None,
    )
    return optax.GradientTransformationExtraArgs(init_fn, update)


def used_factors(state: ScaleBySharesState) -> list[jax.Array]:
    """What the rates were multiplied with at the last update, in the order of the leaves."""
    return jax.tree.leaves(state.shares.within_factor)


def mean_factors(state: ScaleBySharesState) -> list[jax.Array]:
    """Mean of the factors under their Dirichlet, in the order of the leaves."""
    leaves = jax.tree.leaves(state.shares.within_concentration)
    return [leaf / jnp.mean(leaf) for leaf in leaves]


def factor_variances(state: ScaleBySharesState) -> list[jax.Array]:
    """Variance of the factors under their Dirichlet, in the order of the leaves."""
    leaves = jax.tree.leaves(state.shares.within_concentration)
    pairs = [(leaf / jnp.mean(leaf), leaf, jnp.sum(leaf)) for leaf in leaves]
    return [mean**2 * (total - leaf) / (leaf * (total + 1)) for mean, leaf, total in pairs]
