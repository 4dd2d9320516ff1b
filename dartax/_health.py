"""The health of every block: what the state says of it, and one word for it.

The rules read only the state: the Dirichlet, and after the last update the hypergradients, the
moments of the concentrations' gradient and the memory of past steps. Each word is one small
function.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dartax import _dart, _paper_dart, _walk, dirichlet
from dartax._averages import debias
from dartax._block_values import (
    block_concentrations,
    expected_rates,
    mean_shares,
    rate_stds,
    used_rates,
    without_slack,
)
from dartax._state import ScaleByDartState

# A block is pinned at an end of the rates when it is this close to it, relatively.
NEAR = 0.05
# A block has collapsed when its share has a standard deviation of more than this times its mean.
WIDE = 2.0
# A rate of dart that moves by at most this part per update has settled.
STILL = 1e-3
# Two standard deviations of the noise of s, an average over about 10 updates. It judges the words
# for paper_dart, whose concentrations follow s both up and down, and ``needed``.
NOISE = 0.5
# Steps agree when their squared distance is more than this many times that of a random walk.
AGREEMENT = 2.0


class Block(NamedTuple):
    """What the table shows of a block, and what its health is judged by.

    Attributes:
      expected: Mean rate, the schedule included, like the next two.
      std: Standard deviation of the rate.
      last_rate: The rate of the last update.
      judged: Updates so far whose gradient has judged a rate, of any block.
      hypergradient: The last hypergradient.
      share: Mean share of the budget.
      equal_share: What it would be if all blocks had the same.
      relative_std: Standard deviation of the share over its mean.
      lift: Mean rate over ``min_rate``, less one.
      concentration: Concentration of the block.
      slack: Mean share of the budget that no block spends; ``None`` without a slack.
      needed: Whether the block's steps agree, and longer steps of all blocks would have been better
        at the last update, beyond the noise of s; of ``dart`` only.
      s: Mean of the last gradients over their root mean square, with its sign turned: near 1 where
        longer steps would have been better, near -1 where shorter ones would. Only that of
        ``paper_dart`` is read.
      change: Last change of the log concentration; of ``dart`` only.
    """

    expected: float
    std: float
    last_rate: float
    judged: int
    hypergradient: float
    share: float
    equal_share: float
    relative_std: float
    lift: float
    concentration: float
    slack: float | None
    needed: bool
    s: float
    change: float


def _not_started(block: Block) -> bool:
    return block.judged == 0


def _no_signal(block: Block) -> bool:
    return block.hypergradient == 0


def _at_max(block: Block) -> bool:
    if block.slack is None:
        return block.share > 1 - NEAR or block.concentration >= _paper_dart.MAX_ALPHA
    spends = block.share > 1 - NEAR or (
        block.slack < NEAR and block.share > NEAR * block.equal_share
    )
    # Noise can carry a rate there as well, and a larger budget would then do harm.
    return spends and block.needed


def _at_min(block: Block) -> bool:
    least = float(np.float32(_paper_dart.MIN_ALPHA))
    return block.lift < NEAR or (block.slack is None and block.concentration <= least)


def _collapsed(block: Block) -> bool:
    return block.relative_std > WIDE


def _growing(block: Block) -> bool:
    return block.s > NOISE if block.slack is None else block.change > STILL


def _shrinking(block: Block) -> bool:
    return block.s < -NOISE if block.slack is None else block.change < -STILL


# The first rule that holds decides.
RULES: dict[str, Callable[[Block], bool]] = {
    "not started": _not_started,
    "no signal": _no_signal,
    "pinned at max": _at_max,
    "pinned at min": _at_min,
    "collapsed": _collapsed,
    "growing": _growing,
    "shrinking": _shrinking,
    "settled": lambda block: True,
}
TROUBLE = ("no signal", "pinned at max", "pinned at min", "collapsed")


def health(block: Block) -> str:
    """The first of ``RULES`` that holds."""
    return next(word for word, holds in RULES.items() if holds(block))


def _signal(state: ScaleByDartState) -> np.ndarray:
    """The s by which the last update moved the concentration of every block."""
    root = _gradient_size(state)
    inverse_root = np.where(root > 0, 1 / np.where(root > 0, root, 1.0), 0.0)
    decay = _dart.B1 if _has_slack(state) else _paper_dart.B1
    return -np.asarray(debias(state.moments.hyper_mu, decay, _num(state))) * inverse_root


def _gradient_size(state: ScaleByDartState) -> np.ndarray:
    """Root mean square of the gradients of every block's concentration."""
    decay = _dart.B2 if _has_slack(state) else _paper_dart.B2
    return np.sqrt(np.asarray(debias(state.moments.hyper_nu, decay, _num(state))))


def _num(state: ScaleByDartState) -> jax.Array:
    """About how many gradients the moments hold: some may have underflowed."""
    return state.hyper_count if _has_slack(state) else state.count - state.skipped - 1


def _needed(state: ScaleByDartState) -> np.ndarray:
    """See ``Block``.

    When the budget is used up, blocks compete for it, so the s of one does not show whether all
    should grow: the sum of h does.
    """
    length = np.zeros(state.last_rates.size)
    for leaf, block in zip(jax.tree.leaves(state.step_memory), state.block_index, strict=True):
        length[int(block)] += np.sum(np.asarray(leaf, float) ** 2)
    agree = np.asarray(_walk.progress(state.walk, jnp.asarray(length, jnp.float32))) > AGREEMENT
    longer = -float(np.sum(state.hypergradient)) > NOISE * np.max(_gradient_size(state), initial=0)
    return agree & longer


def _has_slack(state: ScaleByDartState) -> bool:
    return state.concentration.size > state.last_rates.size


def table_rows(state: ScaleByDartState) -> list[Block]:
    """Every block of the state, in the order of ``block_index``."""
    share, min_rate = np.asarray(mean_shares(state), float), float(state.min_rate)
    variance = np.asarray(without_slack(dirichlet.variance(state.concentration), state), float)
    relative_std = np.sqrt(variance) / np.where(share > 0, share, 1.0)
    lift = (
        (float(state.rate_budget) - min_rate) * share / min_rate if min_rate else share + math.inf
    )
    columns = {
        "expected": expected_rates(state),
        "std": rate_stds(state),
        "last_rate": used_rates(state),
        "hypergradient": state.hypergradient,
        "share": share,
        "relative_std": relative_std,
        "lift": lift,
        "concentration": block_concentrations(state),
        "needed": _needed(state),
        "s": _signal(state),
        "change": state.moments.hyper_change,
    }
    judged = max(int(state.count - state.skipped) - 1, 0)
    slack = 1 - float(np.sum(share)) if _has_slack(state) else None
    rows = zip(*(np.asarray(column).tolist() for column in columns.values()), strict=True)
    equal = 1 / max(share.size, 1)
    return [
        Block(judged=judged, slack=slack, equal_share=equal, **dict(zip(columns, row, strict=True)))
        for row in rows
    ]
