"""Gamma draws in log space, with the gradient of the implicit reparameterization.

A draw x ~ Gamma(a, 1) is not a simple function of a and of noise that does not depend on a.
But its distribution function F is smooth: holding F(x; a) fixed while a moves gives

    dx/da = -(dF/da) / f(x; a)                  (Figurnov et al., 2018, eq. 4)

Everything here is in log space, where small a cannot underflow, and in the
scale-free form

    d log x / d log a = V(a, log x),

which is 1 for large a and grows like -log x for small x.

The draws are Marsaglia's and Tsang's (2000), with a block of proposals in place of their loop.
A vectorized loop only ends when two compiled copies of the same comparison agree, and for some
arguments they never do: ``jax.random.loggamma`` of JAX 0.10.2 does not return for some keys at
a = 1093252.75 on a CPU (see also `jax#21352 <https://github.com/jax-ml/jax/issues/21352>`_).

References:
  - Figurnov, Mohamed, Mnih, `Implicit Reparameterization Gradients
    <https://arxiv.org/abs/1805.08498>`_, 2018.
  - Steele, Lea, Flood, `Fast Splittable Pseudorandom Number Generators
    <https://doi.org/10.1145/2714064.2660195>`_, 2014.
  - Wellons, `Prospecting for Hash Functions <https://nullprogram.com/blog/2018/07/31/>`_, 2018.
  - Marsaglia, Tsang, `A Simple Method for Generating Gamma Variables
    <https://doi.org/10.1145/358407.358414>`_, 2000.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["log_derivative", "loggamma", "loggamma_from_words"]

# Coefficients [8, 7] of log V in u and v, log(x / (a + 1)) and 1 / (a + 1) mapped to [-1, 1]: the
# fit of least greatest error (2.5e-5) to jax.lax.random_gamma_grad in float64, on a grid over a
# from 1e-5 to 1e4 and x from (a + 1) / 10 to quantiles of 1e-12 from either end.
_LOG_MIN, _LOG_MAX = -2.312635428847547, 3.258096538021482
_LOG_V = (
    (-0.4771616, -0.2864627, -0.06761254, -0.01526481, -0.003434623, -0.001379635, -0.0005532941),
    (-1.672048, -0.238346, -0.09534505, -0.03451593, -0.01142445, -0.006046341, -0.002366737),
    (-0.3452252, -0.05074745, -0.04440313, -0.02960579, -0.01463037, -0.009717222, -0.006173134),
    (0.0420064, 0.04278203, 0.01170579, -0.01363578, 0.004102836, -0.00352871, -0.01354748),
    (0.02668634, 0.01875782, 0.01004573, 0.004306382, 0.02195037, -0.001031143, -0.01171191),
    (-0.00922963, -0.01401778, -0.00275494, 0.01493663, -0.006444234, 0.01455926, -0.007174798),
    (-0.003365063, -0.006092958, 0.009717102, -0.01201153, -0.03187316, 0.05245077, -0.02055822),
    (0.001304382, 0.003236436, 0.009511465, -0.0188342, -0.01401261, 0.03582761, -0.0161922),
)
# Proposals for each draw. Each is accepted with probability 0.95 at a = 1, and more often above.
# About one draw in 8e7 has no accepted proposal and returns the mode.
_PROPOSALS = 6
# Marks a proposal that is not accepted: greater than any other.
_REJECTED = 1e30


def check_key(key: Any) -> None:
    """Raises unless ``key`` is what :func:`threefry_key` takes."""
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not 0 <= key < 2**32:
            raise ValueError(f"key must be an int in [0, 2**32), got {key}; pass key=0.")
    elif not isinstance(key, jax.Array | np.ndarray) or not (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or jnp.issubdtype(key.dtype, jnp.number)
    ):
        raise TypeError(
            f"key must be an int or a JAX key, got {key!r}; pass key=0 or jax.random.key(0)."
        )
    elif jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.ndim != 0:
            raise ValueError(
                f"key must be one key, got {list(key.shape)} of them; jax.vmap over the keys."
            )
    elif key.ndim != 0 and (key.shape not in ((2,), (4,)) or key.dtype != jnp.uint32):
        raise ValueError(
            f"key must be one key (uint32 data of shape [2] or [4]), got {key.dtype} of shape "
            f"{list(key.shape)}; pass jax.random.key(0)."
        )


def threefry_key(key: jax.Array | int) -> jax.Array:
    """A typed threefry key from an int seed or a JAX key of any kind.

    ``jax.random.gamma`` runs one element after the other for keys of another
    kind (``rbg``, ``unsafe_rbg``), so draws do not depend on the user's default.

    Args:
      key: An int in [0, 2**32), a typed key of any implementation, raw ``uint32``
        key data of shape ``[2]`` or ``[4]``, or a scalar array (a seed, as
        ``optax.inject_hyperparams`` hands it over).

    Returns:
      A scalar typed key.

    Raises:
      TypeError: If ``key`` is none of these.
      ValueError: If an int seed is out of range or an array has another shape.
    """
    check_key(key)
    if isinstance(key, int | np.integer):
        return jax.random.key(int(key), impl="threefry2x32")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    elif key.ndim == 0:
        return jax.random.key(jnp.asarray(key).astype(jnp.uint32), impl="threefry2x32")
    threefry = jax.random.wrap_key_data(key[:2], impl="threefry2x32")
    for word in key[2:]:
        threefry = jax.random.fold_in(threefry, word)
    return threefry


def _polynomial(coefficients: Sequence[Any], x: jax.Array) -> jax.Array:
    """The polynomial with these coefficients, the constant one first, by Horner's rule."""
    value = jnp.zeros_like(x)
    for coefficient in reversed(coefficients):
        value = value * x + coefficient
    return value


def log_derivative(log_x: jax.Array, a: jax.Array) -> jax.Array:
    """V = d log x / d log a of a Gamma(a, 1) draw at a fixed quantile.

    Two regions, without a loop, right to 1e-3 relative in float32 for a from 1e-4 to 1e10:

    For x < (a + 1) / 10, with digamma from three steps of its recurrence, whose terms are those of
    the last sum, and its asymptotic series at a + 4, right to 6e-8:

        F   = x^a e^-x / Gamma(a + 1) * sum_k c_k x^k
        c_k = 1 / ((a + 1)...(a + k))
        V   = sum_k c_k x^k (digamma(a + 1) - log x + sum_{j<=k} 1 / (a + j))

    Above it log V is smooth in log(x / (a + 1)) and 1 / (a + 1), down to a = 0 and up to
    a = infinity, where V = t / (e^t - 1), t = log(x / a): a polynomial in both.

    Args:
      log_x: Log of the draw, any shape.
      a: Concentration, positive, of a shape that broadcasts with ``log_x``.

    Returns:
      V, positive, of the broadcast shape.
    """
    log_x, a = jnp.broadcast_arrays(log_x, a)
    log_ratio = log_x - jnp.log1p(a)

    # Far to the right of any draw the polynomial is held at its end.
    u = jnp.clip((2 * log_ratio - _LOG_MIN - _LOG_MAX) / (_LOG_MAX - _LOG_MIN), -1.0, 1.0)
    v = 2 / (1 + a) - 1
    log_v = _polynomial([_polynomial(row, v) for row in _LOG_V], u)

    x = jnp.exp(jnp.minimum(log_x, jnp.log1p(a)))
    inverse = 1 / (a + 4)
    square = inverse**2
    tail = square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240)))
    digamma = jnp.log(a + 4) - inverse / 2 - tail  # at a + 4
    steps = [1 / (a + k) for k in (1, 2, 3)]
    term, bracket = jnp.ones_like(x), digamma - sum(steps) - log_x
    series = bracket
    for step in steps:
        term, bracket = term * x * step, bracket + step
        series += term * bracket
    return jnp.where(log_ratio < _LOG_MIN + 0.01, series, jnp.exp(log_v))


# Greatest derivative of the log of a draw with respect to its concentration.
STEEPEST = 1e30


@jax.custom_jvp
def _attach(log_x: jax.Array, a: jax.Array) -> jax.Array:
    """``log_x`` itself, with the implicit derivative with respect to ``a``."""
    del a
    return log_x


@_attach.defjvp
def _attach_jvp(primals, tangents):
    (log_x, a), (_, a_dot) = primals, tangents
    # The slope passes STEEPEST below about a = 1e-15, and overflows further down. Components that
    # small have a share of 0 or 1, whose own derivative is 0, and 0 times infinity is NaN.
    slope = jnp.minimum(log_derivative(log_x, a) / a, STEEPEST)
    return log_x, slope * a_dot


def _words(seed: jax.Array, number: int | np.ndarray) -> jax.Array:
    """The ``number``-th random word that follows from a random word: steps, and mixed bits.

    The steps and the mixing of 64 bits are those of SplitMix64 (Steele et al., 2014); 32 bits have
    the multipliers that Wellons found to mix best (hash-prospector, 2018).
    """
    step, shifts, multipliers = {
        32: (0x9E3779B9, (16, 15, 16), (0x7FEB352D, 0x846CA68B)),
        64: (0x9E3779B97F4A7C15, (30, 27, 31), (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)),
    }[seed.dtype.itemsize * 8]
    word = seed + jnp.asarray(number, seed.dtype) * seed.dtype.type(step)
    for shift, multiplier in zip(shifts, (*multipliers, 1), strict=True):
        word = (word ^ (word >> shift)) * seed.dtype.type(multiplier)
    return word


def _log_uniform(word: jax.Array, dtype: Any) -> jax.Array:
    """Log of a uniform draw from (0, 1]."""
    bits = word.dtype.itemsize * 8
    return jnp.log((word.astype(dtype) + 0.5) * dtype.type(2.0**-bits))


def _normal(word: jax.Array, dtype: Any) -> jax.Array:
    """A normal draw over the root of 2."""
    bits = word.dtype.itemsize * 8
    signed = jax.lax.bitcast_convert_type(word, f"int{bits}").astype(dtype)
    most = 1 - float(jnp.finfo(dtype).epsneg)
    return jax.lax.erf_inv(jnp.clip(signed * dtype.type(2.0 ** (1 - bits)), -most, most))


def _marsaglia_tsang(words: jax.Array, a: jax.Array) -> jax.Array:
    """Log of Gamma(a, 1) draws from two random words each, without a loop.

    With d = a - 1/3, y = x / sqrt(9 d) and x a normal draw, d (1 + y)^3 is a draw where
    log u < x^2 / 2 + d (1 - (1 + y)^3 + 3 log(1 + y)), u uniform. Since x^2 / 2 = 9/2 d y^2, the
    right side is 3 d r(y) with r(y) = log(1 + y) - y + y^2 / 2 - y^3 / 3, about -y^4 / 4, in
    which nothing large cancels. Below a = 1 a draw for a + 1 is multiplied by u^(1 / a).

    What the proposals need beyond two words is mixed from these, which costs less than to generate
    them.
    """
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    normal_seed, uniform_seed = words
    boosted = a < 1
    d = jnp.where(boosted, a + 1, a).astype(dtype) - dtype.type(1 / 3)
    scale = jax.lax.rsqrt(4.5 * d)

    numbers = np.arange(_PROPOSALS).reshape(-1, *[1] * a.ndim)
    normals = _normal(_words(normal_seed[None], numbers), dtype) * scale[None]

    def propose(y, number):
        """log(1 + y), or ``_REJECTED`` if the proposal is not accepted."""
        log1p = jnp.log1p(jnp.where(y > -1, y, 0.0))
        series = -(y**4) * (1 / 4 - y * (1 / 5 - y * (1 / 6 - y * (1 / 7 - y / 8))))
        rest = jnp.where(jnp.abs(y) < 0.1, series, log1p - y + y**2 / 2 - y**3 / 3)
        log_u = _log_uniform(_words(uniform_seed, number), dtype)
        return jnp.where((y > -1) & (log_u < 3 * d * rest), log1p, _REJECTED)

    proposals = [propose(normals[number], number) for number in range(_PROPOSALS)]
    chosen = jnp.zeros_like(proposals[0])  # the mode, where none is accepted
    for number in reversed(range(_PROPOSALS)):  # the first that is accepted counts
        chosen = jnp.where(proposals[number] < _REJECTED, proposals[number], chosen)
    log_x = jnp.log(d) + 3 * chosen.reshape(a.shape)
    log_boost = _log_uniform(_words(uniform_seed, _PROPOSALS), dtype) / a.astype(dtype)
    return jnp.where(boosted, log_x + log_boost, log_x).astype(a.dtype)


def loggamma(key: jax.Array | int, a: jax.Array, *, method: str = "jax") -> jax.Array:
    """Draws log x with x ~ Gamma(a, 1), differentiable with respect to ``a``.

    The gradient is the implicit reparameterization (:func:`log_derivative`), right to 1e-3
    relative and of the same cost for every a from 1e-4 to 1e10 in float32.

    Args:
      key: An int or a JAX key of any kind.
      a: Concentrations, positive, of any shape and a floating dtype.
      method: ``"jax"``, the sampler of ``jax.random`` with a threefry key, or ``"fast"``, one of
        the same law without a loop, which is what the optimizers use.

    Returns:
      Log of the draws, shape and dtype of ``a``.

    Raises:
      ValueError: If ``method`` is unknown.
      TypeError: If ``a`` is not of a floating dtype.

    Examples:
      The draw moves to larger values with ``a``, at any scale:

      >>> import jax
      >>> import dartax
      >>> grad = jax.grad(lambda a: dartax.random.loggamma(0, a))
      >>> bool(grad(0.01) > grad(100.0) > 0)
      True
    """
    if method not in ("jax", "fast"):
        raise ValueError(f"method must be 'jax' or 'fast', got {method!r}; leave it out.")
    a = jnp.asarray(a)
    if not jnp.issubdtype(a.dtype, jnp.floating):
        raise TypeError(f"a must have a floating dtype, got {a.dtype}; pass floats, such as 1.0.")
    key, fixed = threefry_key(key), jax.lax.stop_gradient(a)
    if method == "jax":
        log_x = jax.random.loggamma(key, fixed, a.shape, a.dtype)
    else:
        words = jax.random.bits(
            key, (2, *a.shape), "uint64" if a.dtype == jnp.float64 else "uint32"
        )
        return loggamma_from_words(words, a)
    return _attach(log_x, a)


def loggamma_from_words(words: jax.Array, a: jax.Array) -> jax.Array:
    """The draws of ``loggamma(..., method="fast")`` from random words, ``[2, *a.shape]``.

    Words are uint32, or uint64 where ``a`` is float64.
    """
    return _attach(_marsaglia_tsang(words, jax.lax.stop_gradient(a)), a)
