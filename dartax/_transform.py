"""The step that both optimizers share: learn from the last draw, draw again, scale.

The published DART and the learning-rate-free one differ in how the concentrations move. That is a
:class:`Rule`, one in ``_paper_dart.py`` and one in ``_dart.py``. This file holds the five steps
around the rule. Their arithmetic on the parameters is in ``_plain.py``, and in a faster form in
``_fused/``. With u_t the direction of the inner transform and f_t the user's schedule,

    gamma_j ~ Gamma(concentration_j, 1),      pi = softmax(log gamma)
    rate_i  = min_rate + (rate_budget - min_rate) * pi_i
    update  = f_t * rate_i * (u_{t,i} + weight_decay * params_i)

and the gradient of the next loss with respect to the rates of the steps so far is

    h_i = dL_{t+1}/drate_i = -< g_{t+1,i}, z_{t,i} >,   z_t = memory_decay * z_{t-1} + f_t * v_t,

where v_t is u_t with the weight decay, and the rule may shrink z_{t-1} further. With f_t * (rate_i
- min_rate) * v_t in place of f_t * v_t it is dL_{t+1}/dlog pi_i. Both differentiate with respect to
one common change of all remembered rates. memory_decay = 0 is the hypergradient of Baydin et al.
(2018, `arXiv:1703.04782 <https://arxiv.org/abs/1703.04782>`_). The second form sums what the
Dirichlet moved the parameters by, so the tiny first steps do not outweigh the later ones while the
rates grow by orders of magnitude. Weight decay is part of z because it is part of the steps. Where
it balances the gradient, the weights do not move, z is small, and no rate grows. If z left it
out, the gradient would ask for longer steps forever.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from dartax import _blocks, _check, _fused, _plain, _probe, _trees, _walk, random
from dartax._averages import Number, f32
from dartax._blocks import Labels
from dartax._complex import in_pairs, out_of_pairs
from dartax._decay import decayed_weights, decays
from dartax._draw import Draw, draw_shares
from dartax._eager import compiled_outside_jit
from dartax._fusable import fusable
from dartax._half import in_float32
from dartax._rule import Rule, context_of
from dartax._schedule import ending, value_at
from dartax._state import VERSION, Moments, ScaleByDartState, check_state, next_key
from dartax._trees import PyTree

Implementation = Literal["fused", "plain"]


def scale_by_dirichlet(
    rule: Rule,
    inner: optax.GradientTransformation,
    *,
    learning_rate: optax.ScalarOrSchedule,
    min_rate: Number,
    rate_budget: Number,
    memory_decay: Number,
    memory_dtype: Any,
    whole_memory: bool,
    labels: Labels,
    key: jax.Array | int,
    implementation: Implementation,
    weight_decay: Number = 0.0,
    mask: Any = None,
    averaged: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Scales the directions of ``inner`` by rates drawn from a Dirichlet that ``rule`` moves.

    Args:
      rule: How the concentrations start and move.
      inner: Gives the directions; does not flip the sign of the gradient.
      learning_rate: Float or optax schedule that multiplies the rates.
      min_rate: Lower end of the rates.
      rate_budget: Upper end of the rates; the blocks share ``rate_budget - min_rate``.
      memory_decay: Decay of the memory of past steps, in [0, 1).
      memory_dtype: Its dtype.
      whole_memory: Whether it holds all of a large tensor, not a sample. A fusable ``inner`` can
        ask for that as well (``_fusable.py``).
      labels: Which leaves share a block; see :func:`dartax._blocks.number_blocks`.
      key: Seed of the draws.
      implementation: ``"plain"`` or ``"fused"``.
      weight_decay: Decoupled; takes the rate of its block.
      mask: Where it applies: a tree of bools, or a function from params to one.
      averaged: Whether a mean of the parameters is what will be evaluated.
    """
    random.check_key(key)
    _check.one_of("implementation", implementation, ("fused", "plain"))
    arithmetic: Any = {"fused": _fused, "plain": _plain}[implementation]
    known = fusable(inner)
    inner = in_float32(inner) if known is None else inner
    whole_memory |= known is not None and known.whole_memory
    low, high = f32(min_rate), f32(rate_budget)

    def init_fn(params: PyTree) -> ScaleByDartState:
        _trees.check_params(params)
        _check.rounded_memory_decay(memory_decay)
        params = in_pairs(params)
        _probe.check_sign(inner, params)
        of_leaf, num_blocks = _blocks.number_blocks(params, labels)
        white_noise = (
            _probe.white_noise(inner, params, of_leaf, num_blocks)
            if rule.uses_walk
            else _walk.WhiteNoise()
        )
        concentration = rule.init(num_blocks)
        # One buffer for each field: a donated state must not hold an array twice.
        per_component = lambda: jnp.zeros_like(concentration)  # noqa: E731
        per_block = lambda: jnp.zeros(num_blocks, jnp.float32)  # noqa: E731
        multiplier = value_at(learning_rate, jnp.zeros([], jnp.int32))
        return ScaleByDartState(
            version=jnp.asarray(VERSION, jnp.int32),
            count=jnp.zeros([], jnp.int32),
            skipped=jnp.zeros([], jnp.int32),
            key=jnp.array(jax.random.key_data(random.threefry_key(key))),
            block_index=_blocks.block_index(of_leaf),
            concentration=concentration,
            moments=Moments(*(per_block() for _ in Moments._fields)),
            hyper_count=jnp.zeros(num_blocks, jnp.int32),
            walk=_walk.empty_walk(white_noise, num_blocks),
            silent_updates=jnp.full(num_blocks, _blocks.PATIENCE, jnp.int32),
            sample_phase=jnp.zeros(num_blocks, jnp.int32),
            weight_rms=_blocks.matrix_rms(params, of_leaf, num_blocks),
            hypergradient=per_block(),
            last_draw=Draw(share=per_component(), log_derivative=per_component()),
            last_rates=per_block(),
            last_multiplier=jnp.array(multiplier, jnp.float32),
            min_rate=jnp.array(min_rate, jnp.float32),
            rate_budget=jnp.array(rate_budget, jnp.float32),
            step_memory=arithmetic.empty_memory(params, memory_dtype, whole_memory),
            inner_state=inner.init(params),
        )

    def blocks_in(state: ScaleByDartState) -> _blocks.Blocks:
        check_state(state)
        return _blocks.blocks_of(state.step_memory, labels, state.block_index, state.sample_phase)

    def score(gradient, grad, value, memory, blocks):
        """h, |z|^2 and |g|^2 of every block, and whether gradients and loss are finite."""
        h, square_length, squares = arithmetic.judge(gradient, memory, blocks)
        usable = jnp.all(jnp.isfinite(squares))
        if grad is not None:
            h, _, squares = arithmetic.judge(grad, memory, blocks)
            usable &= jnp.all(jnp.isfinite(squares))
        if value is not None:
            usable &= jnp.isfinite(_check.scalar("value", value, "pass the loss"))
        return h, square_length, squares, usable

    def decayed(direction, remembered, params, state, blocks):
        """The direction and what the memory holds of it, with the weight decay."""
        # (As in optax, a mask that is a function sees the directions: shapes and dtypes are alike.)
        where = None if mask is None else _check.chosen(mask, direction)
        decay = decayed_weights(weight_decay, where)
        direction, _ = decay.update(direction, decay.init(params), params)
        part = arithmetic.part(params, state.step_memory, blocks)
        # A weight that is not finite would stay in the memory, even if its step is skipped.
        part = jax.tree.map(lambda p: jnp.where(jnp.isfinite(p), f32(p), 0.0), part)
        return direction, decay.update(remembered, decay.init(part), part)[0]

    def step(gradient, state, params, extra_args, multiplier):
        value = extra_args.get("value")
        blocks = blocks_in(state)
        given = {"updates": gradient, "params": params, "grad": extra_args.get("grad")}
        gradient, params, grad = _trees.checked(given, state.step_memory, arithmetic.memory_shape)

        # 1. Score the past rates: the new gradient times the memory of the steps that they made.
        h, square_length, gradient_squares, usable = score(
            gradient, grad, value, state.step_memory, blocks
        )

        # 2. Move the concentrations. At the first update the memory and h are 0: nothing moves.
        sizes = blocks.sizes(state.step_memory)
        end = ending(learning_rate, averaged)
        context = context_of(state, h, square_length, sizes, multiplier, end)
        concentration, moments, shrink = rule.learn(
            state.concentration, state.last_draw, h, state.moments, context
        )

        # 3. Draw the rates.
        step_key, words = arithmetic.random_words(state.key, state.count, (2, *concentration.shape))
        draw = draw_shares(words, concentration)
        spent = (high - low) * draw.share[: blocks.num_blocks]
        rates = low + spent

        # 4. Scale the directions. A skipped step has rates of 0.
        usable &= jnp.all(jnp.isfinite(multiplier * rates))
        overflows = usable & ~jnp.all(jnp.isfinite(h) & jnp.isfinite(moments.hyper_nu))
        is_sampled = sizes < blocks.sizes(gradient)
        silent = _blocks.silent_updates(state.silent_updates, h, gradient_squares, context.updates)
        blind = _blocks.blind(silent, is_sampled)
        blocks = blocks._replace(phase=state.sample_phase + blind.astype(jnp.int32))
        try:
            direction, remembered, inner_state, taken = arithmetic.directions(
                inner, gradient, state.inner_state, params, usable & ~overflows, blocks,
                {**extra_args, "grad": grad, "step_memory": state.step_memory},
            )  # fmt: skip
        except (AttributeError, ValueError):
            _trees.check_inner_state(inner, state.inner_state, gradient)
            raise
        if decays(weight_decay):
            direction, remembered = decayed(direction, remembered, params, state, blocks)
        weights = multiplier * (spent if rule.in_log_space else jnp.ones_like(spent))
        # (0 * last_rates, not 0: a donated array is only overwritten in place if a step reads it.)
        last_rates = jnp.where(taken, multiplier * rates, 0.0 * state.last_rates)
        # A skipped step keeps the memory. But if only a hypergradient overflowed, the memory is
        # emptied, because otherwise every later step would be skipped.
        keep = f32(memory_decay) * jnp.where(blind, 0.0, shrink)
        keep = jnp.where(taken, keep, jnp.where(overflows, 0.0, 1.0))
        updates, step_memory, squares = arithmetic.move(
            direction, remembered, state.step_memory, last_rates, jnp.where(taken, weights, 0.0),
            keep, blocks, reads_params=decays(weight_decay),
        )  # fmt: skip
        walk = _walk.advance(state.walk, keep, weights, squares, blocks.sizes(step_memory))

        # 5. Keep what the next gradient needs. A skipped step keeps all else.
        if_skipped = state._replace(
            last_rates=last_rates, step_memory=step_memory, inner_state=inner_state,
            walk=_walk.shortened(state.walk, keep),
        )  # fmt: skip
        if_taken = if_skipped._replace(
            key=next_key(state, step_key), concentration=concentration, moments=moments, walk=walk,
            hyper_count=context.num, hypergradient=h, last_draw=draw, last_multiplier=multiplier,
            silent_updates=silent, sample_phase=blocks.phase, min_rate=jnp.asarray(low),
            rate_budget=jnp.asarray(high),
        )  # fmt: skip
        updates = out_of_pairs(updates, given["updates"])
        return updates, arithmetic.select(taken, if_taken, if_skipped)._replace(
            count=optax.safe_increment(state.count),
            skipped=jnp.where(taken, state.skipped, optax.safe_increment(state.skipped)),
        )

    def outside(state):
        blocks_in(state)  # the checks need values
        return value_at(learning_rate, state.count)

    constants = (learning_rate, min_rate, rate_budget, memory_decay, weight_decay)
    update = compiled_outside_jit(step, outside, constants)
    return optax.GradientTransformationExtraArgs(init_fn, update)
