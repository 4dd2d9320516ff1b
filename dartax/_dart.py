"""Learning-rate-free DART: a Dirichlet with slack, learned in log space.

The published DART (``_paper_dart.py``) shares a fixed budget out. Here the Dirichlet has one more
component, the slack, which no block spends, so the total is learned too. With a = log
concentration, l' = d log gamma / da, and h_i = dL/dlog pi_i over the past steps in the memory, the
gradient through the draw is

    G_i = dL/da_i = l'_i * (h_i - pi_i * sum_j h_j)          i = 1..K
    s_i = -m_i / sqrt(v_i)                                   debiased moments of G_i

s_i is near 1 where about the last ten gradients agree that longer steps would have been better,
and near -1 where they agree on shorter ones. The concentrations move by

    a_i <- a_i + limit_i * clip(s_i + tolerance_i, 0, 1) - fall_i

Then all concentrations, the slack's too, are multiplied by one number. That leaves the mean rates
alone, and makes the smallest concentration of all blocks equal ``concentration``.

A block learns only where h_i is not 0: elsewhere G_i = -l'_i * pi_i * sum_j h_j holds only what the
other blocks want of the budget. Growth needs evidence. Let t_i be the number of the block's
hypergradients so far, f the present value of the user's schedule, T its length, and A in [0, 1] the
part of f that it will still lose (``_schedule.py``). Without an end, A = 0 and A / T = 0. If a mean
of the parameters will be evaluated, which does what a decay to 0 does, A = 1 and A / T = 0 while f
is positive. Let r_i be the progress of the past steps, which is 1 for a random walk, and n_i in [0,
1] the noise of their directions (``_walk.py``). Let rate_i be the mean rate of the block without f,
d_i the root mean square of its memory, and size_i that of its matrices at ``init``. A block without
matrices takes the smallest size of the others, or 0.04 if all are 0. Then

    ramp_i      = min(max(0.05, 10 A / T), 20 / (1 + t_i)) * max(1, 0.025 size_i / rate_i)
    limit_i     = min(ramp_i, 1) * clip(2 r_i, 0, 1) * min(1, share_0 / share_i)
    tolerance_i = 0.3 * A * (1 - n_i) * clip(2 r_i - 1, 0, 1)
    fall_i      = max(0.05 * clip(-4 s_i - 3, 0, 1),
                      min(0.05, 3 / (1 + t_i)) * max(astray_i, clip(1 - 2 r_i, 0, 1)) - fallen)
    astray_i    = n_i * clip(3 - r_i, 0, 1) * max(1 - A, clip(4 d_i^2 / size_i^2 - 1, 0, 1))

Here share_i is the mean share of the budget, and share_0 that of the slack. What the slack cannot
give, growth would take from the other blocks: near the end of the budget, one block that asked for
still more would starve them.

A rate that will be annealed may grow even where s is a little below 0. There the steep directions
of the loss want shorter steps and the flat ones still longer ones. The schedule will shorten the
steps later, which serves the steep ones. On a noisy objective, though, s ends a little below 0 at
any rate (short-horizon bias, Wu et al., 2018, `arXiv:1803.02021
<https://arxiv.org/abs/1803.02021>`_), so the tolerance is 0 where the directions look like noise.
Where the steps follow noise, or undo one another, the pace of the fall is up to 3 / (1 + t_i). On
noise s is above 0 about as often as below, so a rate far below the size of the weights grows as
well, and settles near 0.015 size_i. *fallen* is how far log f has just fallen, if it has not fallen
to -inf; it is subtracted from that fall. Noise needs no fall if the rate will be annealed anyway,
or a mean evaluated, unless it has moved the block by more than half the size of its weights.

Where G_i is more than 10 times the root mean square of the gradients before it, a_i drops by log 10
in place of the change above: steps that diverge leave no time for averages. Whenever a_i falls, the
memory of its block shrinks by the same factor (the *ratchet*). Otherwise steps that went too far
would keep shrinking a rate that is already corrected.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dartax import _check
from dartax._averages import Number, debias, f32, moving_average, root
from dartax._blocks import Labels
from dartax._draw import Draw
from dartax._rule import Context, Rule
from dartax._schedule import greatest
from dartax._state import Moments
from dartax._transform import Implementation, scale_by_dirichlet
from dartax.contrib import GRANULARITIES, scale_by_shares
from dartax.inner import adam

# Decays of the gradient's moments. The second is below Adam's 0.999: hypergradients shrink by
# orders of magnitude as the loss falls, and with 0.999 old large values would keep s near 0.
B1, B2 = 0.9, 0.99
# The ramp, which is also the warm-up: a log rate grows by at most GROWTH per update, later by at
# most RAMP / (1 + t). A run that its schedule shows to be short may grow by SHORT_RUN in all.
GROWTH, RAMP, SHORT_RUN = 0.05, 20.0, 10.0
# The ramp is steeper than that while a step with directions of size 1, such as Adam's, changes less
# than SMALL_STEP of the weights: up to FAST_GROWTH per update.
SMALL_STEP, FAST_GROWTH = 2.5e-2, 1.0
# What counts as the size of the weights of a model without matrices, or whose matrices are 0: rates
# up to 1e-3, which is usual for Adam, are small steps then.
UNKNOWN_WEIGHTS = 0.04
# Rates may grow while s is above -TOLERANCE; progress, noise and the schedule can reduce this.
# (Half of this value loses on Burgers' equation: configs/compare/README.md.)
TOLERANCE = 0.3
# Rates fall as t ** -FALL on noise or without progress, and at full speed where s is near -1.
FALL, RETREAT_BELOW = 3.0, -0.75
# Steps of more progress than this are no noise. Around Lion and Muon progress alone tells.
SIGNAL = 3.0
# Where G is this many times the root mean square of those before it, the rate is divided by
# SURPRISE.
SURPRISE = 10.0
# The largest concentration of a block is at most this many times ``concentration``. At that limit
# the smallest concentrations fall below ``concentration``.
MAX_RATIO = 1e6
# log_derivative is right to 1e-3 from 1e-4 to 1e10, the most that a block has. The slack, whose
# derivative is not read, may be larger; float32 ends at 3e38.
MIN_CONCENTRATION, MAX_CONCENTRATION = 1e-4, 1e30


def log_concentration_gradient(draw: Draw, h: jax.Array) -> jax.Array:
    """G: the gradient through the draw, dL/dlog concentration of every block, ``[K]``.

    The slack's own h is 0, so the sum needs only the blocks.
    """
    share, derivative = draw.share[:-1], draw.log_derivative[:-1]
    return derivative * (h - share * jnp.sum(h))


def confined(context: Context) -> jax.Array:
    """How clearly the past steps undo one another, ``[K]`` in [0, 1]."""
    return jnp.clip(1 - 2 * context.progress, 0.0, 1.0)


def weight_scale(context: Context) -> jax.Array:
    """Root mean square of the weights of every block, ``[K]``.

    A block without matrices, or whose matrices are 0, takes the smallest value of the others.
    """
    known = context.weight_rms > 0
    smallest = jnp.min(jnp.where(known, context.weight_rms, jnp.inf), initial=jnp.inf)
    others = jnp.where(jnp.isfinite(smallest), smallest, UNKNOWN_WEIGHTS)
    return jnp.where(known, context.weight_rms, others)


def room(concentration: jax.Array) -> jax.Array:
    """How much of its growth the slack can give to a block, ``[K]`` in (0, 1]."""
    return jnp.minimum(concentration[-1] / concentration[:-1], 1.0)


def growth_limit(rate: jax.Array, context: Context) -> jax.Array:
    """How far the log concentrations may grow in this update, ``[K]``."""
    # A schedule that takes nothing back, such as a warm-up to a constant, makes no run short.
    short_run = SHORT_RUN * context.annealing / jnp.maximum(context.schedule_steps, 1.0)
    growth = jnp.maximum(GROWTH, short_run)
    limit = jnp.minimum(growth, RAMP / (1 + f32(context.num)))
    limit *= jnp.maximum(SMALL_STEP * weight_scale(context) / rate, 1.0)
    return jnp.minimum(limit, FAST_GROWTH) * (1 - confined(context))


def tolerance(context: Context) -> jax.Array:
    """How far s may be below 0 while the rates still grow, ``[K]``."""
    evidence = jnp.clip(2 * context.progress - 1, 0.0, 1.0)
    return TOLERANCE * context.annealing * (1 - context.noise) * evidence


def carried_away(context: Context) -> jax.Array:
    """How clearly the past steps moved a block by more than half its weights' size, ``[K]``."""
    distance = context.displacement / weight_scale(context)
    return jnp.clip((2 * distance) ** 2 - 1, 0.0, 1.0)


def retreat(s: jax.Array) -> jax.Array:
    """How clearly the gradients ask for shorter steps, ``[K]`` in [0, 1]."""
    return jnp.clip((RETREAT_BELOW - s) / (RETREAT_BELOW + 1), 0.0, 1.0)


def fall(s: jax.Array, context: Context) -> jax.Array:
    """How far the log concentrations fall in this update, ``[K]``."""
    needed = jnp.maximum(1 - context.annealing, carried_away(context))
    astray = context.noise * jnp.clip(SIGNAL - context.progress, 0.0, 1.0) * needed
    pace = jnp.minimum(GROWTH, FALL / (1 + f32(context.num)))
    still_to_fall = pace * jnp.maximum(astray, confined(context)) - context.schedule_fall
    return jnp.maximum(GROWTH * retreat(s), still_to_fall)


def dart_rule(
    concentration: Number, init_rate: Number, min_rate: Number, rate_budget: Number
) -> Rule:
    """Learning in log space; the slack is the last of the K + 1 components."""

    def init(num_blocks):
        _check.first_rate(
            init_rate, min_rate, rate_budget, concentration, num_blocks, MAX_CONCENTRATION
        )
        # The mean rate of a block is min_rate + (rate_budget - min_rate) / inverse_share.
        # (Traced rates cannot be checked. Clipped, they give a slack that is in its range.)
        low = f32(min_rate)
        above = jnp.maximum(f32(init_rate) - low, jnp.finfo(jnp.float32).tiny)
        inverse_share = (f32(rate_budget) - low) / above
        slack = f32(concentration) * (inverse_share - num_blocks)
        slack = jnp.clip(slack, MIN_CONCENTRATION, MAX_CONCENTRATION)
        return jnp.append(jnp.full(num_blocks, f32(concentration)), slack)

    def learn(current, draw, h, moments, context):
        num = context.num
        gradient = log_concentration_gradient(draw, h)
        mu = moving_average(moments.hyper_mu, gradient, B1)
        nu = moving_average(moments.hyper_nu, gradient**2, B2)

        # Without a hypergradient of its own a block learns nothing.
        heard = (h != 0) & (nu > 0)
        mu, nu = jnp.where(heard, mu, moments.hyper_mu), jnp.where(heard, nu, moments.hyper_nu)
        size = root(debias(nu, B2, num))
        inverse_size = jnp.where(heard, 1 / jnp.where(heard, size, 1.0), 0.0)
        s = -debias(mu, B1, num) * inverse_size

        mean_share = current[:-1] / jnp.sum(current)
        rate = f32(min_rate) + (f32(rate_budget) - f32(min_rate)) * mean_share
        grow = jnp.clip(s + tolerance(context), 0.0, 1.0)
        change = growth_limit(rate, context) * room(current) * grow - fall(s, context)
        usual = root(debias(moments.hyper_nu, B2, num - 1))
        diverges = (usual > 0) & (gradient > SURPRISE * usual)
        change = jnp.where(diverges, -jnp.log(SURPRISE), change)
        change = jnp.where(heard, change, 0.0)
        factor = jnp.exp(change)
        moved = current * jnp.append(factor, 1.0)

        # The means do not change where all concentrations, the slack's too, grow by one factor.
        least, most = jnp.min(moved[:-1], initial=jnp.inf), jnp.max(moved[:-1], initial=0.0)
        level = jnp.maximum(least, most / MAX_RATIO)
        moved *= f32(concentration) / level
        moved = jnp.clip(moved, MIN_CONCENTRATION, MAX_CONCENTRATION)
        # Past steps count as if they had been as short as the new rate makes them.
        ratchet = jnp.minimum(factor, 1.0)
        return moved, Moments(mu, nu, change), ratchet

    return Rule(init, learn, in_log_space=True, uses_walk=True)


_check_names = _check.refused(
    {
        **_check.renamed(
            horizon="memory_decay", max_rate="rate_budget", direction_dtype="memory_dtype"
        ),
        "lr": ("not be given to dart", "leave it out, for the rates are learned"),
        "schedule": ("not be given to dart", "pass it as learning_rate, the first argument"),
        **{
            name: ("not be given to dart", f"pass inner=dartax.inner.adam({name}=...)")
            for name in ("b1", "b2", "eps", "nesterov")
        },
    }
)


@_check_names
def scale_by_dart(
    inner: optax.GradientTransformation | None = None,
    *,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    init_rate: Number = 1e-4,
    min_rate: Number = 0.0,
    rate_budget: Number = 1.0,
    concentration: Number = 10.0,
    memory_decay: Number = 0.999,
    weight_decay: Number = 0.0,
    mask: Any = None,
    averaged: bool = False,
    blocks: Labels = None,
    key: jax.Array | int = 0,
    memory_dtype: str = "float32",
    implementation: Implementation = "fused",
) -> optax.GradientTransformationExtraArgs:
    """Scales directions by learned, randomly drawn rates, one for each parameter block.

    The sign is kept: end a chain with ``optax.scale(-1.0)``, or use :func:`dart`.

    The gradient that judges the rates is the one this transform is given. Behind transforms that
    change it, pass the loss's own as ``update(..., grad=gradient)``. Extra arguments go to
    ``inner``, together with the memory of past steps as ``step_memory``.

    Args:
      inner: Gives the directions: an ``optax.GradientTransformation`` that does not flip the sign
        of the gradient. ``None`` is ``dartax.inner.adam(b2=0.99)``; ``optax.identity()`` is SGD. A
        step costs less around ``adam``, ``momentum`` and ``lion`` of ``dartax.inner`` than around
        those of optax; with Adam, less than half.
      learning_rate: Float or optax schedule that multiplies the learned rates. Under
        ``optax.inject_hyperparams``, name a schedule in ``static_args``, or its end is not seen.
      init_rate: Mean rate of every block at the start, at least 1e-12 and between ``min_rate`` and
        the rate of K blocks that share the whole budget, which is rate_budget / K if ``min_rate``
        is 0. It matters little from 1e-8 to 1e-4: the rates grow tenfold in 3 updates while the
        steps are tiny beside the weights, and then, in the first 400 updates, in 50.
      min_rate: Lower end of the rates, non-negative.
      rate_budget: Upper end of the rates, positive. If ``min_rate`` is 0, it is also the most that
        the rates can sum to. The blocks share ``rate_budget - min_rate``.
      concentration: Smallest concentration of a block, restored at every update, in [1e-4, 1e4].
        The relative standard deviation of that block's rate is about ``concentration ** -0.5``;
        those of blocks with higher rates are smaller.
      memory_decay: Decay of the memory of past steps that the next gradient is compared with, in
        [0, 1). 0 is the one-step hypergradient.
      weight_decay: Decoupled: ``weight_decay * params`` is added to the direction, and takes the
        learned rate of its block.
      mask: Tree of bools, or a function from params to one: where the decay applies.
      averaged: Set it only if you evaluate a mean of late parameters. That removes noise as a decay
        to 0 would, so the rates grow further and hardly fall on noise. The end of a schedule is not
        looked at then.
      blocks: Which parameters share a rate. ``"tensor"`` or ``None``: one rate for every leaf. A
        pytree of labels, or a function from a path such as ``"Dense_0/kernel"`` to a label: leaves
        with equal labels share one. ``"channel"`` or ``"element"``: one for every index of a leaf's
        last axis, or for every element, by :func:`dartax.contrib.scale_by_shares`.
      key: Seed of the draws, an int or a JAX key of any kind. Replicas that must stay equal need
        equal keys.
      memory_dtype: Dtype of the memory of past steps. ``bfloat16`` halves its size, but its decay
        and steps below 0.2 % of what it holds are lost to rounding. For most tensors of more than
        131,072 elements the memory holds a sample: at least 1 in 48 elements, and at least 16,384.
        With rates for channels or elements it holds every element.
      implementation: ``"fused"``, or ``"plain"``: the same step in the readable tree maps of
        ``dartax/_plain.py``, with a memory that is always whole. It is several times slower.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state ``ScaleByDartState``.

    Raises:
      ValueError: If a number is outside its range, or, by ``init``, if ``inner`` flips the sign.
      TypeError: If an argument has the wrong type, or an old name.

    Examples:
      Per-layer rates on top of the sign of the momentum:

      >>> import dartax, optax
      >>> optimizer = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     dartax.scale_by_dart(optax.scale_by_lion()),
      ...     optax.scale(-1.0),
      ... )

    A step is skipped if one of these is not finite in float32: the squared norm of a block's
    gradient (and direction, unless it comes from ``dartax.inner``), the square of a concentration's
    gradient, the schedule, or the loss, if it is passed as ``update(..., value=loss)``. Then the
    updates and ``last_rates`` are zero, what is learned stays as it was (but a hypergradient that
    overflows empties the memory), and ``skipped`` counts it.

    A complex leaf is in one block. ``inner``, and a function as ``mask``, see its real and
    imaginary parts side by side along the last axis: Adam normalizes each, and each has rates of
    its own for channels or elements. As everywhere in optax, its gradient is the conjugate of what
    ``jax.grad`` gives.
    """
    _check.transformation("inner", inner)
    _check.schedule("learning_rate", learning_rate)
    _check.not_a_rate(learning_rate, greatest(learning_rate))
    _check.rates(init_rate, min_rate, rate_budget)
    _check.within("concentration", concentration, "[1e-4, 1e4]", "10.0 is usual")
    _check.decay("memory_decay", memory_decay, usual=0.999)
    _check.floating_dtype("memory_dtype", memory_dtype)
    _check.weight_decay(weight_decay)
    _check.mask(mask)
    _check.flag("averaged", averaged)
    _check.blocks(blocks, ("tensor", *GRANULARITIES))
    inner = adam() if inner is None else inner
    if isinstance(blocks, str) and blocks in GRANULARITIES:
        inner = scale_by_shares(inner, blocks, concentration=concentration, key=key)
        blocks = "tensor"
    return scale_by_dirichlet(
        dart_rule(concentration, init_rate, min_rate, rate_budget),
        inner,
        learning_rate=learning_rate,
        min_rate=min_rate,
        rate_budget=rate_budget,
        memory_decay=memory_decay,
        memory_dtype=memory_dtype,
        whole_memory=False,
        labels=blocks,
        key=key,
        implementation=implementation,
        weight_decay=weight_decay,
        mask=mask,
        averaged=averaged,
    )


@_check_names
def dart(  # noqa: D417  (arguments shared with scale_by_dart are described there)
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    inner: optax.GradientTransformation | None = None,
    init_rate: Number = 1e-4,
    min_rate: Number = 0.0,
    rate_budget: Number = 1.0,
    concentration: Number = 10.0,
    memory_decay: Number = 0.999,
    weight_decay: Number = 0.0,
    mask: Any = None,
    averaged: bool = False,
    blocks: Labels = None,
    key: jax.Array | int = 0,
    memory_dtype: str = "float32",
    implementation: Implementation = "fused",
) -> optax.GradientTransformationExtraArgs:
    """An optimizer without a learning rate: Adam directions, learned Dirichlet rates.

    There is nothing to tune. If you know the number of steps, pass a decay from 1 to 0 as
    ``learning_rate``: it multiplies the learned rates, and does the most for the final loss. If you
    do not, pass ``averaged=True`` instead, and evaluate a mean of the parameters, most of it from
    the last quarter of the steps so far. It is yours to keep, beside ``params``: start with
    ``mean = params``, and after update number ``step``, from 0 on,
    ``mean = optax.incremental_update(params, mean, 8 / (step + 8))``. If you do neither, leave both
    out: the rates then fall where the steps follow noise.

    Args:
      learning_rate: Float or optax schedule that multiplies the learned rates; not a rate. One
        that falls to an end also lets them grow further.
      inner: Gives the directions; ``None`` is Adam.
      init_rate: Mean rate of every block at the start; it matters little.
      weight_decay: Decoupled weight decay, in units of the learned rates.
      mask: Tree of bools, or a function from params to one: where the decay applies.
      averaged: Whether you evaluate a mean of the parameters, as above.
      blocks: Which parameters share a rate; ``None`` is one rate for every leaf. See
        :func:`scale_by_dart` for all arguments.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose updates are to be added.

    Raises:
      ValueError: If a number is outside its range, or, by ``init``, if ``inner`` flips the sign.
      TypeError: If an argument has the wrong type, or an old name.

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
    return optax.chain(
        scale_by_dart(
            inner,
            learning_rate=learning_rate,
            init_rate=init_rate,
            min_rate=min_rate,
            rate_budget=rate_budget,
            concentration=concentration,
            memory_decay=memory_decay,
            weight_decay=weight_decay,
            mask=mask,
            averaged=averaged,
            blocks=blocks,
            key=key,
            memory_dtype=memory_dtype,
            implementation=implementation,
        ),
        optax.scale(-1.0),
    )
