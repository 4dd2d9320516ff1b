"""The Dirichlet distribution, as functions of its concentrations.

With total alpha_0 = sum_j alpha_j, over the last axis:

    density   p(x) = Gamma(alpha_0) / prod_j Gamma(alpha_j) * prod_j x_j^(alpha_j - 1)
    mean      alpha_i / alpha_0
    variance  alpha_i (alpha_0 - alpha_i) / (alpha_0^2 (alpha_0 + 1))

``concentration`` has shape ``[..., C]``, C >= 1, and is positive. The log density, entropy and
divergence subtract log-gammas: in float32 their absolute error is about 1e-7 alpha_0 log alpha_0.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma, gammaln, xlogy

from dartax import random


def _check_concentration(concentration: jax.Array) -> jax.Array:
    """``concentration`` as an array; raises unless it is floating and has an axis."""
    array = jnp.asarray(concentration)
    if array.ndim == 0:
        raise ValueError(
            f"concentration must have shape [..., C], got the scalar {concentration}; "
            "pass an array of the concentrations."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"concentration must have a floating dtype, got {array.dtype}; pass floats."
        )
    return array


def sample(key: jax.Array | int, concentration: jax.Array, shape: Sequence[int] = ()) -> jax.Array:
    """Draws points of the simplex, differentiable with respect to the concentrations.

    A Dirichlet draw is a vector of gamma draws over its sum, here
    ``softmax(loggamma)``, so that small concentrations do not underflow.

    Args:
      key: An int or a JAX key of any kind.
      concentration: ``[..., C]``.
      shape: How many draws, put before the shape of ``concentration``.

    Returns:
      ``[*shape, ..., C]``, non-negative, summing to 1 over the last axis.

    Raises:
      ValueError: If ``concentration`` is a scalar.
      TypeError: If it is not of a floating dtype, or ``shape`` is not a sequence.
    """
    concentration = _check_concentration(concentration)
    if isinstance(shape, int):
        raise TypeError(f"shape must be a sequence of ints, got {shape}; pass ({shape},).")
    concentration = jnp.broadcast_to(concentration, (*shape, *concentration.shape))
    return jax.nn.softmax(random.loggamma(key, concentration, method="fast"), axis=-1)


@jax.custom_jvp
def _log_power(exponent: jax.Array, x: jax.Array) -> jax.Array:
    """``exponent * log(x)``, 0 for an exponent of 0."""
    return xlogy(exponent, x)


@_log_power.defjvp
def _log_power_jvp(primals, tangents):
    (exponent, x), (exponent_dot, x_dot) = primals, tangents
    # On the boundary the derivatives are those of the nearest point inside, and 0 with respect to
    # an x that does not matter; 0 times infinity would be NaN.
    inside = jnp.maximum(x, jnp.finfo(x.dtype).tiny)
    slope = jnp.where(exponent == 0, 0.0, exponent / inside)
    return xlogy(exponent, x), jnp.log(inside) * exponent_dot + slope * x_dot


def log_prob(value: jax.Array, concentration: jax.Array) -> jax.Array:
    """Log density at ``value`` ``[..., C]`` on the simplex; returns ``[...]``."""
    concentration = _check_concentration(concentration)
    total = jnp.sum(concentration, axis=-1)
    normalizer = gammaln(total) - jnp.sum(gammaln(concentration), axis=-1)
    value = jnp.asarray(value)
    return normalizer + jnp.sum(_log_power(concentration - 1.0, value), axis=-1)


def mean(concentration: jax.Array) -> jax.Array:
    """Mean of every component, ``[..., C]``."""
    concentration = _check_concentration(concentration)
    return concentration / jnp.sum(concentration, axis=-1, keepdims=True)


def variance(concentration: jax.Array) -> jax.Array:
    """Variance of every component, ``[..., C]``."""
    concentration = _check_concentration(concentration)
    total = jnp.sum(concentration, axis=-1, keepdims=True)
    # As ratios: total**3 leaves float32 at a total of 1e13.
    share = concentration / total
    return share * ((total - concentration) / total) / (total + 1.0)


def entropy(concentration: jax.Array) -> jax.Array:
    """Differential entropy in nats, ``[...]``."""
    concentration = _check_concentration(concentration)
    total = jnp.sum(concentration, axis=-1)
    log_beta = jnp.sum(gammaln(concentration), axis=-1) - gammaln(total)
    expected_log = digamma(concentration) - digamma(total)[..., None]
    return log_beta - jnp.sum((concentration - 1.0) * expected_log, axis=-1)


def kl_divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(Dirichlet(p) || Dirichlet(q)) in nats from concentrations ``[..., C]``; ``[...]``."""
    p, q = _check_concentration(p), _check_concentration(q)
    total_p, total_q = jnp.sum(p, axis=-1), jnp.sum(q, axis=-1)
    expected_log = digamma(p) - digamma(total_p)[..., None]
    return (
        gammaln(total_p)
        - gammaln(total_q)
        + jnp.sum(gammaln(q) - gammaln(p) + (p - q) * expected_log, axis=-1)
    )
