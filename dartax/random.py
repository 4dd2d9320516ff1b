"""Gamma draws in log space, with the gradient of the implicit reparameterization.

A draw x ~ Gamma(a, 1) has no noise variable to differentiate around, but its
distribution function F has: holding the quantile F(x; a) fixed while a moves gives

    dx/da = -(dF/da) / f(x; a)                  (Figurnov et al., 2018, eq. 4)

Everything here is in log space, where small a cannot underflow, and in the
scale-free form

    d log x / d log a = V(a, log x),

which is 1 for large a and grows like -a log x for small x.

The draws are Marsaglia's and Tsang's (2000), with a block of proposals in place of their loop.
Vectorized, such a loop ends for an element when two compilations of one comparison agree, and
for some arguments they never do: ``jax.random.loggamma`` of JAX 0.10.2 does not return for some
keys at a = 1093252.75 on a CPU (see also `jax#21352 <https://github.com/jax-ml/jax/issues/21352>`_).

References:
  Figurnov, Mohamed, Mnih, `Implicit Reparameterization Gradients
  <https://arxiv.org/abs/1805.08498>`_, 2018.
  Marsaglia, Tsang, `A Simple Method for Generating Gamma Variables
  <https://doi.org/10.1145/358407.358414>`_, 2000.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma

# Below this log x the power series of F needs three terms for 1e-6 relative.
_LOG_SMALL = -4.6
# From here on the expansion in 1/a is right to 1e-4 relative, and JAX's own
# derivative starts to slow down (it is also wrong from about 1e6 on).
_LARGE = 16.0
# Proposals for each draw. One is accepted with probability 0.95 at a = 1 and more above: of 4e10
# draws one finds none, and takes its first.
_PROPOSALS = 8


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


def log_derivative(log_x: jax.Array, a: jax.Array) -> jax.Array:
    """V = d log x / d log a of a Gamma(a, 1) draw at a fixed quantile.

    Three regions, each cheap and right to 1e-3 relative in float32 for a from
    1e-4 to 1e10:

    * small x: with F = x^a e^-x / Gamma(a + 1) * sum_k c_k x^k, c_k = 1 / ((a+1)...(a+k)),
      V = sum_k c_k x^k (digamma(a + 1) - log x + sum_{j<=k} 1 / (a + j));
    * large a: with t = log(x / a), the continuity equation
      V = (t + log a - digamma(a) + dV/dt / a) / (e^t - 1), solved in powers of 1/a:
      V = t / (e^t - 1) + V_1(t) / a + O(a^-2),
      V_1 = (sinh t - t) e^(-t/2) / (8 sinh^3(t/2)) = e^(-t/2 - 3 t^2 / 40 + O(t^4)) / 6;
    * between them ``jax.lax.random_gamma_grad``.

    Args:
      log_x: Log of the draw, any shape.
      a: Concentration, positive, of a shape that broadcasts with ``log_x``.

    Returns:
      V, positive, of the broadcast shape.
    """
    log_x, a = jnp.broadcast_arrays(log_x, a)
    small, large = log_x < _LOG_SMALL, a >= _LARGE
    between = ~(small | large)

    # Each branch sees harmless arguments outside its own region: the value is not
    # used there, but a slow or non-finite one would still be paid for.
    l_s, a_s = jnp.where(small, log_x, -10.0), jnp.where(large, 1.0, a)
    x, c1, base = jnp.exp(l_s), 1 / (a_s + 1), digamma(a_s + 1) - l_s
    c2 = c1 / (a_s + 2)
    harmonic2 = c1 + 1 / (a_s + 2)
    series = base + c1 * x * (base + c1) + c2 * x**2 * (base + harmonic2)

    a_l = jnp.where(large, a, _LARGE)
    t = jnp.where(large, log_x - jnp.log(a_l), 1.0)
    bernoulli = jnp.where(t == 0, 1.0, t / jnp.where(t == 0, 1.0, jnp.expm1(t)))
    expansion = bernoulli + jnp.exp(-t / 2 - 0.075 * t**2) / (6 * a_l)

    a_b, x_b = jnp.where(between, a, 1.0), jnp.exp(jnp.where(between, log_x, 0.0))
    library = jax.lax.random_gamma_grad(a_b, x_b) * a_b / x_b

    return jnp.where(large, expansion, jnp.where(small, series, library))


@jax.custom_jvp
def _attach(log_x: jax.Array, a: jax.Array) -> jax.Array:
    """``log_x`` itself, with the implicit derivative with respect to ``a``."""
    del a
    return log_x


@_attach.defjvp
def _attach_jvp(primals, tangents):
    (log_x, a), (_, a_dot) = primals, tangents
    return log_x, log_derivative(log_x, a) / a * a_dot


def _marsaglia_tsang(key: jax.Array, a: jax.Array) -> jax.Array:
    """Log of Gamma(a, 1) draws, without a loop.

    With d = a - 1/3, y = x / sqrt(9 d) and x a normal draw, d (1 + y)^3 is a draw where
    log u < x^2 / 2 + d (1 - (1 + y)^3 + 3 log(1 + y)), u uniform. Since x^2 / 2 = 9/2 d y^2, the
    right side is 3 d r(y) with r(y) = log(1 + y) - y + y^2 / 2 - y^3 / 3, about -y^4 / 4, in
    which nothing large cancels. Below a = 1 a draw for a + 1 is multiplied by u^(1 / a).
    """
    normal_key, uniform_key, boost_key = jax.random.split(key, 3)
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    boosted = a < 1
    d = jnp.where(boosted, a + 1, a).astype(dtype)[None] - 1 / 3
    shape = (_PROPOSALS, *a.shape)
    y = jax.random.normal(normal_key, shape, dtype) / jnp.sqrt(9 * d)
    valid = y > -1
    log1p = jnp.log1p(jnp.where(valid, y, 0.0))
    series = -(y**4) * (1 / 4 - y * (1 / 5 - y * (1 / 6 - y * (1 / 7 - y / 8))))
    rest = jnp.where(jnp.abs(y) < 0.1, series, log1p - y + y**2 / 2 - y**3 / 3)
    log_u = -jax.random.exponential(uniform_key, shape, dtype)
    accepted = valid & (log_u < 3 * d * rest)
    first = jnp.argmax(accepted, axis=0, keepdims=True)
    log_x = (jnp.log(d) + 3 * jnp.take_along_axis(log1p, first, axis=0))[0]
    log_boost = -jax.random.exponential(boost_key, a.shape, dtype) / a.astype(dtype)
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
        log_x = _marsaglia_tsang(key, fixed)
    return _attach(log_x, a)
