"""The step that both optimizers share: learn from the last draw, draw again, scale.

What differs between the published DART and the learning-rate-free one is how the
concentrations move. That is a :class:`Rule`, one in ``_paper_dart.py`` and one in
``_dart.py``; this file holds the state and the five steps around the rule.

With u_t the direction of the inner transform and f_t the user's schedule,

    gamma_j ~ Gamma(concentration_j, 1),      pi = softmax(log gamma)
    rate_i  = min_rate + (rate_budget - min_rate) * pi_i
    update  = f_t * rate_i * u_{t,i}

and the gradient of the next loss with respect to the rates of the steps so far is

    h_i = dL_{t+1}/drate_i    = -< g_{t+1,i}, z_{t,i} >,   z_t = memory_decay * z_{t-1} + f_t * u_t
    h_i = dL_{t+1}/dlog pi_i  = the same with f_t * (rate_i - min_rate) * u_t in place of f_t * u_t,

as if the rates of the steps inside the memory_decay moved together. memory_decay = 0 is the hypergradient
of Baydin et al. (2018, `arXiv:1703.04782 <https://arxiv.org/abs/1703.04782>`_). The second form
sums what the Dirichlet moved the parameters by: while the rates grow over decades, the tiny
steps of the beginning do not outweigh the later ones. Of a large tensor a sample stands for all of
both factors (``_thinning.py``).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dartax import _blocks, _check, _memory, _order, _threefry, random
from dartax._blocks import LARGEST_ROOT, Blocks, PyTree
from dartax._guarded import Guarded, choose, zero_unless
from dartax._state import VERSION, Draw, Moments, ScaleByDartState, check_version, next_key
from dartax._thinning import Thinning

# Updates over which a rule sees the user's schedule fall.
LOOK_AHEAD = 32

Number = jax.Array | float


class Context(NamedTuple):
    """What a rule may know beside the gradient.

    Attributes:
      num: Hypergradients seen so far, with this one, int32 scalar.
      weight_rms: Root mean square of every block's matrices at ``init``, float32 ``[K]``.
      fall: How far the user's schedule falls over the next ``LOOK_AHEAD`` updates, non-negative
        float32 scalar; 0 where it rises or is a number.
    """

    num: jax.Array
    weight_rms: jax.Array
    fall: jax.Array


class Rule(NamedTuple):
    """How the concentrations start and move.

    Attributes:
      init: From the number of blocks K to the concentrations ``[C]``, C >= K. The first K
        belong to the blocks; a further one is budget that no block spends.
      learn: From (concentration ``[C]``, draw, hypergradient ``[K]``, moments, context) to the new
        concentration and moments, and to what is kept of the memory of past steps, ``[K]`` in
        [0, 1].
      of_log: Whether the hypergradient is that of log pi, not that of the rates.
    """

    init: Callable[[int], jax.Array]
    learn: Callable[
        [jax.Array, Draw, jax.Array, Moments, Context],
        tuple[jax.Array, Moments, jax.Array],
    ]
    of_log: bool


def f32(value: Any) -> Any:
    """``value`` in strongly typed float32; a Python number stays one that needs no program."""
    return np.float32(value) if _check.is_number(value) else jnp.asarray(value, jnp.float32)


def moving_average(average: jax.Array, value: jax.Array, decay: Number) -> jax.Array:
    """One step of an exponential moving average."""
    decay = f32(decay)
    return decay * average + (1 - decay) * value


def debias(average: jax.Array, decay: Number, num: jax.Array) -> jax.Array:
    """Removes the pull of the zero that an average of ``num`` values started from.

    Without values there is nothing to remove, and the average is 0.
    """
    return average / (1 - f32(decay) ** f32(jnp.maximum(num, 1)))


def draw_shares(key: jax.Array, concentration: jax.Array) -> Draw:
    """One draw from the Dirichlet, in log space, with its implicit derivative."""
    log_gamma = random.loggamma(key, concentration, method="fast")
    return Draw(
        share=jax.nn.softmax(log_gamma),
        log_derivative=random.log_derivative(log_gamma, concentration),
    )


def concentration_gradient(draw: Draw, concentration: jax.Array, h: jax.Array) -> jax.Array:
    """The gradient through the draw: dL/dconcentration from h = dL/dpi, ``[C]`` each.

    dL/da_j = (d log gamma_j / da_j) * pi_j * (h_j - sum_k pi_k h_k).
    """
    derivative = draw.log_derivative / concentration
    return derivative * draw.share * (h - jnp.dot(draw.share, h))


def schedule_fall(learning_rate: optax.ScalarOrSchedule, count: jax.Array) -> jax.Array:
    """How far the schedule falls over the next ``LOOK_AHEAD`` updates, at least 0."""
    if not callable(learning_rate):
        return jnp.zeros([], jnp.float32)
    now, later = f32(learning_rate(count)), f32(learning_rate(count + LOOK_AHEAD))
    return jnp.where(later < now, now - later, 0.0)  # also where one of them is NaN


def fit(tree: PyTree) -> jax.Array:
    """Whether the squares of all elements are finite in float32."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    each = [jnp.max(jnp.abs(leaf.astype(jnp.float32)), initial=0.0) for leaf in leaves]
    return jnp.all(jnp.asarray(each) < LARGEST_ROOT)


@jax.jit
def scale(direction: jax.Array, rate: jax.Array) -> jax.Array:
    """``rate * direction`` in the dtype of the direction, multiplied in float32 at least."""
    dtype = jnp.float64 if direction.dtype == jnp.float64 else jnp.float32
    return (rate.astype(dtype) * direction.astype(dtype)).astype(direction.dtype)


def scale_by_dirichlet(
    rule: Rule,
    inner: optax.GradientTransformation,
    *,
    learning_rate: optax.ScalarOrSchedule,
    min_rate: Number,
    rate_budget: Number,
    memory_decay: Number,
    blocks: Blocks,
    key: jax.Array | int,
    memory_dtype: Any,
    thinning: Thinning,
) -> optax.GradientTransformationExtraArgs:
    """Scales the directions of ``inner`` by rates drawn from a Dirichlet that ``rule`` moves."""
    random.check_key(key)
    guarded = isinstance(inner, Guarded)
    always_finite = guarded and inner.always_finite
    inner = inner if guarded else optax.with_extra_args_support(inner)
    # At memory_decay 0 the inner transform can stand in for the memory of past steps, if it needs no
    # parameters for it: those of the last step are gone.
    remembers = not (
        guarded and not inner.reads_params and _check.is_number(memory_decay) and memory_decay == 0
    )

    def past_steps(state, params, numbers):
        """z, the memory of past steps."""
        if remembers:
            # The barrier: what reads the memory first, and what adds to it later, would else
            # share a copy of it in float32.
            return jax.lax.optimization_barrier(state.step_memory)
        share = state.last_draw.share[: state.last_rates.shape[0]]
        spent = share * (state.rate_budget - state.min_rate) if rule.of_log else jnp.ones_like(share)
        direction = inner.again(state.inner_state, params, thinning.part)
        column = (state.last_multiplier * spent, direction)
        (weight,) = _blocks.spread(numbers, state.block_index, column)
        return _memory.rebuild(direction, weight)

    def judge(gradient, last_steps, numbers, num_blocks):
        """h, the hypergradient of every block, and for each whether the gradient is finite.

        A non-finite element shows in its inner product, whatever the other factor is.
        """
        part = thinning.part(gradient)
        h = -_blocks.block_dots(part, last_steps, numbers, num_blocks, whole=gradient)
        return h, jnp.isfinite(h) & thinning.rest_is_finite(gradient)

    def init_fn(params: PyTree) -> ScaleByDartState:
        _blocks.check_params(params)
        numbers, num_blocks = _blocks.number_blocks(params, blocks)
        concentration = rule.init(num_blocks)
        # One buffer for each field: a donated state must not hold an array twice.
        per_component = lambda: jnp.zeros_like(concentration)  # noqa: E731
        per_block = lambda: jnp.zeros(num_blocks, jnp.float32)  # noqa: E731
        multiplier = learning_rate(0) if callable(learning_rate) else learning_rate
        _check.scalar("learning_rate(count)", multiplier, "return a number from the schedule")
        return ScaleByDartState(
            version=jnp.asarray(VERSION, jnp.int32),
            count=jnp.zeros([], jnp.int32),
            skipped=jnp.zeros([], jnp.int32),
            key=jnp.array(jax.random.key_data(random.threefry_key(key))),
            block_index=_blocks.block_index(numbers, num_blocks),
            concentration=concentration,
            moments=Moments(hyper_mu=per_block(), hyper_nu=per_block(), hyper_trend=per_block()),
            weight_rms=_blocks.matrix_rms(params, tuple(numbers), num_blocks),
            hypergradient=per_block(),
            last_draw=Draw(share=per_component(), log_derivative=per_component()),
            last_rates=per_block(),
            last_multiplier=jnp.array(multiplier, jnp.float32),
            min_rate=jnp.array(min_rate, jnp.float32),
            rate_budget=jnp.array(rate_budget, jnp.float32),
            step_memory=_memory.empty(thinning.part(params), memory_dtype, remembers),
            inner_state=inner.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        if not isinstance(state, ScaleByDartState):
            raise TypeError(
                f"state must be a ScaleByDartState, got {type(state).__name__}; pass what init or "
                "the last update returned, and restore checkpoints into it."
            )
        check_version(state)
        numbers, num_blocks = _blocks.number_blocks(state.step_memory, blocks)
        index, kept_blocks = state.block_index, state.last_rates.shape[0]
        _blocks.check_same_blocks(numbers, num_blocks, index, kept_blocks)
        last_steps = past_steps(state, params, numbers)
        check = functools.partial(_blocks.check_updates, template=last_steps, shape=thinning.shape)
        check("updates", updates)
        if params is not None:
            check("params", params)
        updates = jax.tree.map(jnp.asarray, updates)
        gradient, value = extra_args.get("grad"), extra_args.get("value")
        if gradient is not None:
            check("grad", gradient)
        if value is not None:
            _check.scalar("value", value, "pass the loss")

        # 1. Finish the last gradient: how good were the rates so far?
        h, finite = judge(updates, last_steps, numbers, num_blocks)
        if gradient is not None:
            h, also_finite = judge(gradient, last_steps, numbers, num_blocks)
            finite &= also_finite
        if value is not None:
            finite &= jnp.isfinite(value)

        # 2. Move the concentrations. The first update has no step behind it.
        concentration, moments, kept = rule.learn(
            state.concentration,
            state.last_draw,
            h,
            state.moments,
            Context(
                num=state.count - state.skipped,
                weight_rms=state.weight_rms,
                fall=schedule_fall(learning_rate, state.count),
            ),
        )

        # Squares that leave float32 would stay in their averages for ever.
        fits = jnp.isfinite(moments.hyper_nu)
        overflows = jnp.all(finite) & ~jnp.all(fits)
        finite &= fits
        if not guarded and jax.tree.leaves(state.inner_state):
            finite &= fit(updates)

        # 3. Draw the rates.
        key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
        step_key = _threefry.fold_in(key, state.count)
        draw = draw_shares(step_key, concentration)
        low, high = f32(min_rate), f32(rate_budget)
        rates = low + (high - low) * draw.share[:num_blocks]
        multiplier = f32(learning_rate(state.count) if callable(learning_rate) else learning_rate)

        # 4. Scale the directions. A skipped step has rates of 0. Whether it is one is the result of
        # one reduction, for the reason that _blocks.either gives.
        finite = jnp.all(jnp.isfinite(multiplier * rates) & finite)
        last_rates = _blocks.either(finite, multiplier * rates, 0.0)
        # The barrier reads the rates before, for the sake of a donated state: an array that no step
        # reads is no argument of the program, so that the new one lies elsewhere, and a GPU, which
        # gets the step as a graph of kernels with addresses, another graph at every step.
        last_rates, _ = jax.lax.optimization_barrier((last_rates, state.last_rates))
        if guarded:
            memory = state.step_memory if remembers else last_steps
            extra_args = {**extra_args, "finite": finite, "memory": memory}
        direction, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        if guarded and remembers:
            before = _order.part_before(params, thinning) if inner.reads_params else None
            # What else it takes a part of has no such order.
            part = lambda tree: before if tree is params else thinning.part(tree)  # noqa: E731
            again = inner.again(inner_state, params, part)
        else:
            again = thinning.part(direction)
        if not always_finite:
            direction, again = zero_unless(finite, direction), zero_unless(finite, again)
        new_direction = state.step_memory
        if remembers:
            weight = multiplier * (rates - low if rule.of_log else jnp.ones_like(rates))
            # Directions of any size: what overflowed now would do so in every step to come.
            unchanged = 1.0 if guarded else jnp.where(overflows, 0.0, 1.0)
            leaf_rates, leaf_weights, leaf_kept = _blocks.spread(
                numbers,
                index,
                (last_rates, direction),
                (_blocks.either(finite, weight, 0.0), again),
                (_blocks.either(finite, f32(memory_decay) * kept, unchanged), again),
            )
            new_direction = jax.tree.map(
                _memory.accumulate, again, leaf_weights, state.step_memory, leaf_kept
            )
        else:
            (leaf_rates,) = _blocks.spread(numbers, index, (last_rates, direction))
        if guarded and inner.reads_params:
            leaf_rates = _order.in_order(leaf_rates, params, before, new_direction)
        scaled = jax.tree.map(scale, direction, leaf_rates)

        # 5. Keep what the next gradient is compared with. After a non-finite gradient
        # nothing is kept but the counters, as if the step had not been.
        new_state = ScaleByDartState(
            version=state.version,
            count=state.count,
            skipped=state.skipped,
            key=next_key(state, step_key),
            block_index=index,
            concentration=concentration,
            moments=moments,
            weight_rms=state.weight_rms,
            hypergradient=h,
            last_draw=draw,
            last_rates=last_rates,
            last_multiplier=multiplier,
            min_rate=low,
            rate_budget=high,
            step_memory=new_direction,
            inner_state=inner_state,
        )
        kept_state = state._replace(step_memory=new_direction, last_rates=last_rates)
        if guarded:
            kept_state = kept_state._replace(inner_state=inner_state)
        new_state = jax.tree.map(functools.partial(choose, finite), new_state, kept_state)
        return scaled, new_state._replace(
            count=optax.safe_increment(state.count),
            skipped=choose(finite, state.skipped, optax.safe_increment(state.skipped)),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
