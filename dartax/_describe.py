"""The learned rates as a table for a person, with a word on the health of every block."""

import collections
import itertools
import textwrap
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from dartax import _check
from dartax._colored import Description
from dartax._find import find_states, labels_of, own_leaves
from dartax._health import RULES, TROUBLE, Block, health, table_rows
from dartax._state import ScaleByDartState
from dartax._trees import PyTree, path_names

WIDTH = 80


def shorten(name: str, width: int) -> str:
    """``name`` with an ellipsis in its middle where it is longer than ``width``."""
    if len(name) <= width:
        return name
    head = (width - 1) // 2
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def block_name(paths: Sequence[str], width: int = 1000) -> str:
    """The leaves of a block in at most ``width`` characters: the first, and how many more."""
    more = ""
    for shown in (2, 1):
        more = f" + {len(paths) - shown} more" if len(paths) > shown else ""
        name = ", ".join(paths[:shown]) + more
        if len(name) <= width:
            return name
    return shorten(paths[0], width - len(more)) + more


def common_folder(names: Sequence[Sequence[str]]) -> str:
    """What the paths of several blocks all begin with, such as ``decoder/``, or nothing."""
    folders = [path.split("/")[:-1] for paths in names for path in paths]
    levels = zip(*folders, strict=False)
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, levels)
    return "".join(level[0] + "/" for level in shared) if len(names) > 1 else ""


def describe(opt_state: PyTree, params: PyTree, *, max_rows: int | None = 40) -> Description:
    """A table for a person: each block with its mean rate, spread, last draw and health.

    Args:
      opt_state: See :func:`learning_rates`. Concrete arrays, not tracers.
      params: The parameters.
      max_rows: How many blocks to show at most: first those in trouble, then those with a rare
        word, then those whose rates are farthest from the median. One line sums up the blocks in
        between. ``None`` shows all.

    Returns:
      A string of at most 80 columns, one table for each DART state. A notebook shows it in color;
      for a terminal its method ``in_color()`` adds ANSI colors. ``size`` counts the parameters.
      ``E[rate]``, ``std`` and ``last rate`` include the schedule. ``health`` is the first of
      these words whose rule holds:

      - ``not started``: No gradient has judged a rate yet: fewer than two updates.
      - ``no signal``: The last gradient of the block was zero, or orthogonal to its steps. Look for
        a dead or unused layer, or a schedule that is 0.
      - ``pinned at max``: The block has more than 95 % of the budget, or more than 5 % of an equal
        share while the slack has less than 5 % of the budget. Its steps also agree, and longer
        steps of all blocks would have been better. Raise ``rate_budget``. With ``paper_dart``: it
        has more than 95 %, or its concentration is at 10, where the published formula clips it.
      - ``pinned at min``: The mean rate is within 5 % of a positive ``min_rate``; with
        ``paper_dart``: or the concentration is clipped at 0.1. Lower ``min_rate``.
      - ``collapsed``: The standard deviation of the share is more than twice its mean (a
        concentration below about 1/4): nearly all draws are close to ``min_rate``, and a few
        are large. Raise ``concentration``.
      - ``growing``: ``dart`` raised the concentration by more than 0.1 % in the last update, and
        so the rate, as long as there is slack; with
        ``paper_dart``: ``s > 0.5``. If a run on few data ends like this, watch the test loss: the
        model may overfit.
      - ``shrinking``: ``dart`` lowered it by more than 0.1 %; with ``paper_dart``: ``s < -0.5``.
        The steps follow noise, undo one another, or go too far. If it lasts from the start, clip
        the gradients.
      - ``settled``: None of these.

      s is the mean of the last gradients of the concentration over their root mean square, with its
      sign turned. The decays of ``paper_dart`` are taken to be its defaults.

    Raises:
      ValueError: If there is no DART state, or ``params`` has another number of leaves.
      TypeError: If ``opt_state`` is traced.

    Examples:
      >>> import dartax, jax.numpy as jnp
      >>> params = {"dense": {"bias": jnp.zeros(2), "kernel": jnp.ones((3, 2))}}
      >>> print(dartax.describe(dartax.dart().init(params), params))
      DART after 0 updates, 0 skipped: 2 not started
      multiplier 1; before it, rates in [0, 1], 0.0002 of the budget spent
      block         size  E[rate]      std  last rate  health
      dense/bias       2   0.0001  3.2e-05          0  not started
      dense/kernel     6   0.0001  3.2e-05          0  not started
    """
    if max_rows is not None:
        whole = lambda v: v >= 1 and v == int(v)  # noqa: E731
        _check.number("max_rows", max_rows, "None or a positive integer", whole, "40 is usual")
    paths = path_names(params)
    sizes = [int(np.size(leaf)) for leaf in jax.tree.leaves(params)]
    tables = []
    states = find_states(opt_state)
    for label, (_, state) in zip(labels_of(states), states, strict=True):
        if isinstance(state.count, jax.core.Tracer):
            raise TypeError(
                "opt_state must hold concrete arrays, got a tracer; call describe outside jax.jit, "
                "and metrics inside."
            )
        blocks = table_rows(state)
        members: list[list[int]] = [[] for _ in blocks]
        for leaf, block in zip(own_leaves(state, params), map(int, state.block_index), strict=True):
            members[block].append(leaf)
        title = _title(label, state, blocks)
        table = _table(
            blocks,
            names=[[paths[i] for i in leaves] for leaves in members],
            sizes=[sum(sizes[i] for i in leaves) for leaves in members],
            max_rows=int(max_rows or len(blocks)),
        )
        tables.append("\n".join([*title, *table]))
    return Description("\n\n".join(tables))


def _title(label: str, state: ScaleByDartState, blocks: list[Block]) -> list[str]:
    """What concerns all blocks."""
    name = f"DART [{shorten(label, 30)}]" if label else "DART"
    facts = f"{name} after {int(state.count)} updates, {int(state.skipped)} skipped: "
    limits = f"rates in [{float(state.min_rate):.3g}, {float(state.rate_budget):.3g}]"
    spent = f"{sum(block.share for block in blocks):.3g} of the budget spent"
    return [
        *_wrapped(facts + _count(map(health, blocks))),
        *_wrapped(f"multiplier {float(state.last_multiplier):.3g}; before it, {limits}, {spent}"),
    ]


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ")


def _count(words: Iterable[str]) -> str:
    """Such as "3 growing, 1 settled", in the order of the rules."""
    found = collections.Counter(words)
    return ", ".join(f"{found[word]} {word}" for word in RULES if found[word]) or "no block"


def _table(
    blocks: list[Block], names: list[list[str]], sizes: list[int], max_rows: int
) -> list[str]:
    """The aligned lines of the table, with a line for every run of blocks that is left out."""
    header = ("size", "E[rate]", "std", "last rate", "health")
    cells = [
        (
            f"{size:,}",
            f"{block.expected:.3g}",
            f"{block.std:.2g}",
            f"{block.last_rate:.3g}",
            health(block),
        )
        for block, size in zip(blocks, sizes, strict=True)
    ]
    shown = _choose(blocks, max_rows)
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    room = WIDTH - sum(widths) - 2 * len(widths)
    labels = ["block"] + [block_name(names[i], room) for i in shown]
    folder = common_folder(names)
    if folder and any("…" in label for label in labels):
        short = [[path.removeprefix(folder) for path in names[i]] for i in shown]
        labels = [
            shorten(f"block in {folder}", room),
            *(block_name(paths, room) for paths in short),
        ]
    widths = [max(map(len, labels)), *widths]

    def line(row: Sequence[str]) -> str:
        aligned = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        aligned[0], aligned[-1] = row[0].ljust(widths[0]), row[-1]
        return "  ".join(aligned)

    lines = [line((labels[0], *header))]
    after = 0
    for label, i in zip(labels[1:], shown, strict=True):
        lines += [*_gap(blocks[after:i]), line((label, *cells[i]))]
        after = i + 1
    return lines + _gap(blocks[after:])


def _choose(blocks: list[Block], max_rows: int) -> list[int]:
    """The blocks to show, in their order: first those in trouble, rare words, extreme rates."""
    rates = np.log([max(block.expected, 1e-45) for block in blocks])
    distance = np.abs(rates - np.median(rates)) if blocks else rates
    words = [health(block) for block in blocks]
    found = collections.Counter(words)
    ranked = sorted(
        range(len(blocks)), key=lambda i: (words[i] not in TROUBLE, found[words[i]], -distance[i])
    )
    return sorted(ranked[:max_rows])


def _gap(blocks: list[Block]) -> list[str]:
    """A line for blocks that are left out, if there are any."""
    if not blocks:
        return []
    rates = [block.expected for block in blocks]
    range_ = f"{min(rates):.3g} to {max(rates):.3g}"
    line = f"  … {len(blocks)} more, {range_}: {_count(map(health, blocks))}"
    return [line if len(line) <= WIDTH else f"  … {len(blocks)} more, {range_}"]
