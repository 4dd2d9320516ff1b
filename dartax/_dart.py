"""Learning-rate-free DART: a Dirichlet with slack, learned in log space at two speeds.

The published DART (``_paper_dart.py``) shares a fixed budget out. Here the Dirichlet has one
more component, the slack, which no block spends, so that the total is learned too. With
a = log concentration, l' = d log gamma / da, w_i = pi_i / sum_{j<=K} pi_j and
h_i = dL/dlog pi_i over the steps inside the horizon:

    allocation   A_i = l'_i * (h_i - w_i * sum_j h_j)         who gets the budget
    scale        S   = -l'_0 * pi_0 * sum_j h_j               how much is spent

each through its own Adam normalizer,

    a_i <- a_i - allocation_step * (A_hat_i - mean_j A_hat_j),      A_hat = m_A / sqrt(v_A)
    a_0 <- a_0 - min(0.05, 20 / t) * clip(min(s, s_long) + 0.3, 0, 1) + 0.05 * clip(-4 s - 3, 0, 1)

with s = m_S / sqrt(v_S), and s_long the same over a longer window: s is near 1 where every
step so far should have been longer, near -1 where every step should have been shorter.

The first term grows the rates, and not only up to s = 0: there the steep directions ask for less
already while the flat ones still ask for more, and the decay of the schedule serves the steep ones
later. For the same reason the rates never shrink because s is a little below 0: on a noisy
objective a hypergradient always ends up there (short-horizon bias, Wu et al., 2018,
`arXiv:1803.02021 <https://arxiv.org/abs/1803.02021>`_), the less so the longer its horizon. The
second term is the retreat from rates that are clearly too high, or diverge.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dartax import _check
from dartax._blocks import Blocks
from dartax._transform import (
    Draw,
    Moments,
    Number,
    Rule,
    debias,
    decayed_weights,
    f32,
    moving_average,
    scale_by_dirichlet,
)

# Of the averages of the gradient: Adam's first moment, the long average that must agree
# with it, and the second moment. The last is short of Adam's 0.999 because hypergradients
# shrink by orders of magnitude as the loss falls, and would stall under their own past.
B1, B_TREND, B2 = 0.9, 0.98, 0.99
# The ramp: at most SCALE_STEP per update in log space, and less than RAMP / t later on. It is
# the warm-up too.
SCALE_STEP, RAMP = 0.05, 20.0
# Rates grow while s is above the first and shrink where it is below the second.
GROW_ABOVE, RETREAT_BELOW = -0.3, -0.75
# loggamma and its derivative are exact from 1e-4 on; float32 ends at 3e38.
MIN_CONCENTRATION, MAX_CONCENTRATION = 1e-4, 1e30


def allocation_gradient(draw: Draw, h: jax.Array) -> jax.Array:
    """A: the gradient of log concentration that shares the spent budget out, ``[K]``."""
    share, derivative = draw.share[:-1], draw.log_derivative[:-1]
    # Before the first draw every share is 0, and so is the gradient.
    w = share / jnp.maximum(jnp.sum(share), jnp.finfo(share.dtype).tiny)
    return derivative * (h - w * jnp.sum(h))


def scale_gradient(draw: Draw, h: jax.Array) -> jax.Array:
    """S: the gradient of the slack's log concentration, a scalar; positive asks for more."""
    return -draw.log_derivative[-1] * draw.share[-1] * jnp.sum(h)


def dart_rule(
    concentration: Number,
    init_rate: Number,
    min_rate: Number,
    max_rate: Number,
    allocation_step: Number,
) -> Rule:
    """Two-speed learning in log space; the slack is the last of the K + 1 components."""

    def init(num_blocks):
        # The mean rate of a block is min_rate + (max_rate - min_rate) / inverse_share.
        if _check.is_number(init_rate) and _check.is_number(max_rate):
            top = min_rate + (max_rate - min_rate) / max(num_blocks, 1)
            if _check.is_number(top) and not init_rate < top:
                raise ValueError(
                    f"init_rate must be below {top:g}, the mean rate when {num_blocks} blocks "
                    f"share all of max_rate={max_rate}, got {init_rate}; lower init_rate."
                )
        low = f32(min_rate)
        inverse_share = (f32(max_rate) - low) / (f32(init_rate) - low)
        slack = f32(concentration) * (inverse_share - num_blocks)
        return jnp.append(jnp.full(num_blocks, f32(concentration)), slack)

    def learn(concentration, draw, h, moments, num):
        gradient = jnp.append(allocation_gradient(draw, h), scale_gradient(draw, h))
        mu = moving_average(moments.hyper_mu, gradient, B1)
        nu = moving_average(moments.hyper_nu, gradient**2, B2)
        trend = moving_average(moments.hyper_trend, gradient, B_TREND)

        # A component that has seen no gradient yet does not move.
        root = jnp.sqrt(debias(nu, B2, num))
        seen = root > 0
        inverse_root = jnp.where(seen, 1 / jnp.where(seen, root, 1.0), 0.0)
        short = debias(mu, B1, num) * inverse_root
        long = debias(trend, B_TREND, num) * inverse_root

        allocation = -f32(allocation_step) * (short[:-1] - jnp.mean(short[:-1]))
        limit = jnp.minimum(SCALE_STEP, RAMP / f32(1 + num))
        above = jnp.minimum(short[-1], long[-1]) - GROW_ABOVE
        grow = limit * jnp.where(seen[-1], jnp.clip(above, 0.0, 1.0), 0.0)
        # At full speed where s is -1.
        below = (RETREAT_BELOW - short[-1]) / (RETREAT_BELOW + 1)
        retreat = SCALE_STEP * jnp.clip(below, 0.0, 1.0)
        moved = concentration * jnp.exp(jnp.append(allocation, retreat - grow))
        return jnp.clip(moved, MIN_CONCENTRATION, MAX_CONCENTRATION), Moments(mu, nu, trend)

    return Rule(init, learn, of_log=True)


def scale_by_dart(
    inner: optax.GradientTransformation | None = None,
    *,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    init_rate: Number = 1e-5,
    min_rate: Number = 0.0,
    max_rate: Number = 1.0,
    concentration: Number = 10.0,
    horizon: Number = 0.999,
    allocation_step: Number = 0.005,
    blocks: Blocks = None,
    key: jax.Array | int = 0,
    direction_dtype: str = "bfloat16",
) -> optax.GradientTransformationExtraArgs:
    """Scales directions by learned, randomly drawn rates, one for each parameter block.

    The sign is kept: end a chain with ``optax.scale(-1.0)``, or use :func:`dart`.

    The gradient that judges the rates is the one this transform is handed. Behind
    transforms that change it, pass the loss's own as ``update(..., grad=gradient)``. Other
    extra arguments go to ``inner``.

    Args:
      inner: Direction of the step, an ``optax.GradientTransformation`` that does not flip
        the sign. ``None`` is ``optax.scale_by_adam()``; ``optax.identity()`` is SGD.
      learning_rate: Float or optax schedule that multiplies the learned rates.
      init_rate: Mean rate of every block at the start, in (min_rate, max_rate / K) for K
        blocks. Start low: the rates grow by a factor of 10 in some 50 updates.
      min_rate: Lower end of the rates, non-negative.
      max_rate: Budget: the rates of all blocks sum to at most this (above ``min_rate``).
      concentration: First concentration of every block, positive. The relative standard
        deviation of a drawn rate is about ``concentration ** -0.5``.
      horizon: Decay, in [0, 1), of the memory of past steps that the next gradient is
        compared with; 0 is the one-step hypergradient.
      allocation_step: Largest change of a block's log concentration at one update,
        non-negative; 0 keeps the initial allocation.
      blocks: Pytree of labels or function from a path such as ``"Dense_0/kernel"`` to a
        label. Leaves with equal labels share a rate. One block per leaf by default.
      key: Seed of the draws, an int or a JAX key of any kind. Replicas that must stay equal
        need equal keys.
      direction_dtype: Name of the dtype of the memory of past steps; ``bfloat16`` holds it
        in 2 bytes per parameter.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state ``ScaleByDartState``.

    Raises:
      ValueError: If a number is outside its range.
      TypeError: If an argument has the wrong type.

    Examples:
      Per-layer rates on top of the sign of the momentum:

      >>> import dartax, jax.numpy as jnp, optax
      >>> optimizer = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     dartax.scale_by_dart(optax.scale_by_lion()),
      ...     optax.scale(-1.0),
      ... )
      >>> state = optimizer.init({"w": jnp.ones(3), "b": jnp.zeros(2)})

    A step with a non-finite gradient, or one so large that its inner product with past steps
    leaves float32, is skipped: the updates are zero, and the state keeps all but its counters
    ``count`` and ``skipped``.
    """
    _check.transformation("inner", inner)
    _check.schedule("learning_rate", learning_rate)
    positive = lambda v: v > 0  # noqa: E731
    _check.number("init_rate", init_rate, "a positive number", positive, "1e-5 is usual")
    _check.number("max_rate", max_rate, "a positive number", positive, "1.0 is usual")
    _check.number("min_rate", min_rate, "a non-negative number", lambda v: v >= 0, "pass 0.0")
    _check.below("init_rate", init_rate, "max_rate", max_rate)
    _check.below("min_rate", min_rate, "init_rate", init_rate)
    _check.number(
        "concentration",
        concentration,
        "a number in [1e-4, 1e4]",
        lambda v: MIN_CONCENTRATION <= v <= 1e4,
        "10.0 is usual",
    )
    _check.decay("horizon", horizon)
    _check.number(
        "allocation_step", allocation_step, "a number in [0, 1]", lambda v: 0 <= v <= 1, "try 0.005"
    )
    _check.floating_dtype("direction_dtype", direction_dtype)
    return scale_by_dirichlet(
        dart_rule(concentration, init_rate, min_rate, max_rate, allocation_step),
        optax.scale_by_adam() if inner is None else inner,
        learning_rate=learning_rate,
        min_rate=min_rate,
        max_rate=max_rate,
        horizon=horizon,
        blocks=blocks,
        key=key,
        direction_dtype=direction_dtype,
    )


def dart(  # noqa: D417  (arguments shared with scale_by_dart are described there)
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    inner: optax.GradientTransformation | None = None,
    init_rate: Number = 1e-5,
    min_rate: Number = 0.0,
    max_rate: Number = 1.0,
    concentration: Number = 10.0,
    horizon: Number = 0.999,
    allocation_step: Number = 0.005,
    weight_decay: Number = 0.0,
    mask: Any = None,
    blocks: Blocks = None,
    key: jax.Array | int = 0,
    direction_dtype: str = "bfloat16",
) -> optax.GradientTransformationExtraArgs:
    """An optimizer without a learning rate: Adam directions, learned Dirichlet rates.

    There is nothing to tune. Where the number of steps is known, pass a decay from 1 to 0 as
    ``learning_rate``: it multiplies the learned rates, and does most for the final loss.

    Args:
      learning_rate: Float or optax schedule that multiplies the learned rates; not a rate.
      inner: Direction of the step; ``None`` is Adam. See :func:`scale_by_dart`, also for
        all arguments that are not listed here.
      weight_decay: Decoupled: ``weight_decay * params`` joins the direction, and takes the
        learned rate of its block.
      mask: Tree of bools, or a function from params to one: where the decay applies.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose updates are to be added.

    Raises:
      ValueError: If a number is outside its range.
      TypeError: If an argument has the wrong type.

    Examples:
      >>> import dartax, jax, jax.numpy as jnp, optax
      >>> def loss(params):  # a flat and a steep direction
      ...     return 0.05 * jnp.sum(params["flat"] ** 2) + 4 * jnp.sum(params["steep"] ** 2)
      >>> params = {"flat": jnp.ones(3), "steep": jnp.ones(3)}
      >>> optimizer = dartax.dart(optax.linear_schedule(1.0, 0.0, 500))
      >>> state = optimizer.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(500):
      ...     params, state = step(params, state)
      >>> bool(loss(params) < 0.05)
      True
    """
    _check.transformation("inner", inner)
    _check.weight_decay(weight_decay)
    direction = optax.scale_by_adam() if inner is None else inner
    return optax.chain(
        scale_by_dart(
            optax.chain(direction, decayed_weights(weight_decay, mask)),
            learning_rate=learning_rate,
            init_rate=init_rate,
            min_rate=min_rate,
            max_rate=max_rate,
            concentration=concentration,
            horizon=horizon,
            allocation_step=allocation_step,
            blocks=blocks,
            key=key,
            direction_dtype=direction_dtype,
        ),
        optax.scale(-1.0),
    )
