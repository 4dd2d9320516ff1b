"""Pictures of a learned distribution over learning rates; needs matplotlib, the extra ``plot``.

Every function takes recorded ``metrics``, in one of these forms:

- a sequence of dicts, one per logged step, as :func:`dartax.metrics` returns them with ``params``;
- a mapping of columns: a dict of arrays such as ``lax.scan`` stacks them, or a pandas DataFrame;
- the path of a run folder of ``dartax train``.

Names may have the prefix ``dart/`` or lack it; other columns are ignored. Every function returns
a ``matplotlib.figure.Figure`` that belongs to no window: show it in a notebook, or ``savefig`` it.
Where leaves share a block, the block is drawn once. All raise ``ValueError`` where ``metrics``
lacks what is drawn, or a name or step was not recorded, and ``TypeError`` for another kind.

Arguments in common:

- ``blocks``: names of leaves, such as ``"Dense_0/kernel"``, to draw only those;
- ``steps``: steps to draw, for each of which the nearest recorded one is taken;
- ``dark``: light ink on dark paper.

Examples:
  >>> import dartax, jax, jax.numpy as jnp
  >>> import dartax.plot
  >>> params = {"flat": jnp.ones(3), "steep": jnp.ones(3)}
  >>> optimizer = dartax.dart()
  >>> def step(carry, _):
  ...     params, state = carry
  ...     grads = {"flat": 0.1 * params["flat"], "steep": 8 * params["steep"]}
  ...     updates, state = optimizer.update(grads, state, params)
  ...     params = jax.tree.map(jnp.add, params, updates)
  ...     return (params, state), dartax.metrics(state, params)
  >>> _, metrics = jax.lax.scan(step, (params, optimizer.init(params)), length=50)
  >>> dartax.plot.learning_rates(metrics).savefig("learning_rates.png")
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from dartax._describe import shorten
from dartax._history import History, load
from dartax._theme import (
    FEW,
    MANY,
    colors,
    finish,
    log_limits,
    name_lines,
    sequential,
    styles,
    theme,
)

__all__ = ["budget", "concentrations", "heatmap", "learning_rates", "ridges", "simplex"]

# Characters of a name beside a picture.
WIDTH = 32
Steps = Sequence[float] | None
Names = Sequence[str] | None


def _figure(width: float = 8.0, height: float = 4.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots()


def _lines(ax: Axes, history: History, values: np.ndarray, dark: bool) -> None:
    """A named line for every block, over steps, inside the limits that are set."""
    for line, style in zip(values.T, styles(len(history.paths), dark), strict=True):
        ax.plot(history.step, line, solid_capstyle="round", **style)
    ax.set_xlabel("step")
    ax.grid(alpha=0.6)
    ax.margins(x=0)
    name_lines(ax, list(values[-1]), history.names(WIDTH), dark)


def learning_rates(metrics: Any, *, blocks: Names = None, dark: bool = False) -> Figure:
    """The rates of the blocks over time, the schedule included.

    Args:
      metrics: See :mod:`dartax.plot`.
      blocks: See there.
      dark: See there.

    Returns:
      A figure with the mean of every block as a line, and for up to 24 blocks a band of one
      standard deviation to each side.
    """
    history = load(metrics).select(blocks)
    mean, std = history["expected_rate"], history["rate_std"]
    num = len(history.paths)
    with theme(dark):
        figure, ax = _figure(height=max(4.5, 0.19 * min(num, MANY)))
        if num <= MANY:
            # The lower edge stays positive, or a log axis would drop it.
            low = np.maximum(mean - std, mean / 10)
            for i, color in enumerate(colors(num, dark)):
                alpha = 0.14 if num <= len(FEW) + 1 else 0.08
                ax.fill_between(
                    history.step, low[:, i], (mean + std)[:, i], color=color, alpha=alpha, lw=0
                )
        log_limits(ax, mean)
        _lines(ax, history, mean, dark)
        band = " (line) and standard deviation (band)" if num <= MANY else ""
        ax.set_title(f"Learning rate of {_count(num)}: mean{band}")
        ax.set_ylabel("learning rate, schedule included")
        return finish(figure)


def concentrations(metrics: Any, *, blocks: Names = None, dark: bool = False) -> Figure:
    """The concentrations of the Dirichlet over time, the slack's as a dashed line.

    Args:
      metrics: See :mod:`dartax.plot`.
      blocks: See there.
      dark: See there.

    Returns:
      A figure on a log axis. A block of concentration c draws its rate with a relative standard
      deviation of about ``c ** -0.5``.
    """
    whole = load(metrics)
    history = whole.select(blocks)
    values = history["concentration"]
    with theme(dark) as tones:
        figure, ax = _figure(height=max(4.5, 0.19 * min(len(history.paths), MANY)))
        slack = _slack(whole)
        shown = values
        if slack is not None and "concentration_total" in whole.columns:
            line = slack * whole["concentration_total"]
            shown = np.concatenate([values, line], axis=1)
            for i in {label: i for i, label in enumerate(whole.labels)}.values():
                ax.plot(history.step, line[:, i], "--", color=tones["line"], lw=1.5)
                ax.annotate(
                    "slack",
                    (history.step[0], line[0, i]),
                    xytext=(4, 4),
                    textcoords="offset points",
                )
        log_limits(ax, shown, decades=40)
        _lines(ax, history, values, dark)
        ax.set_title(f"Concentration of {_count(len(history.paths))}")
        ax.set_ylabel("concentration")
        return finish(figure)


def _count(num: int) -> str:
    return "the block" if num == 1 else f"{num} blocks"


def _slack(history: History) -> np.ndarray | None:
    """Mean share of the budget that no block spends, ``[T, B]``; None where there is no slack."""
    if "spent" not in history.columns:
        return None
    # paper_dart spends all, up to rounding.
    slack = 1 - history["spent"]
    return np.maximum(slack, 1e-7) if np.max(slack) > 1e-5 else None


def heatmap(metrics: Any, *, blocks: Names = None, dark: bool = False) -> Figure:
    """The mean rates of all blocks at all steps, as colours on a log scale.

    Args:
      metrics: See :mod:`dartax.plot`.
      blocks: See there.
      dark: See there.

    Returns:
      A figure with a row for each block, the first one on top.
    """
    history = load(metrics).select(blocks)
    mean = history["expected_rate"]
    num = len(history.paths)
    with theme(dark):
        figure, ax = _figure(height=float(np.clip(0.26 * num + 1.4, 2.6, 8.0)))
        positive = mean[np.isfinite(mean) & (mean > 0)]
        top = positive.max() if len(positive) else 1.0
        low = max(positive.min(), top / 1e5) if len(positive) else 0.1
        # A rate of 0, at the end of a decay, has the colour of the smallest.
        mesh = ax.pcolormesh(
            _edges(history.step),
            np.arange(num + 1) - 0.5,
            np.maximum(mean.T, low),
            norm=LogNorm(low, max(top, low * 1.01)),
            cmap="viridis",
            rasterized=True,
        )
        bar = figure.colorbar(mesh, ax=ax, pad=0.02, aspect=30)
        bar.set_label("mean learning rate, schedule included")
        bar.outline.set_visible(False)
        _name_rows(ax, history)
        ax.set_xlabel("step")
        ax.set_title(f"Learning rate of {_count(num)}")
        return finish(figure)


def _edges(step: np.ndarray) -> np.ndarray:
    """Edges of cells around the steps; cells of one step where there is one."""
    if len(step) == 1:
        return step[0] + np.array([-0.5, 0.5])
    middle = (step[1:] + step[:-1]) / 2
    return np.concatenate([[2 * step[0] - middle[0]], middle, [2 * step[-1] - middle[-1]]])


def _name_rows(ax: Axes, history: History) -> None:
    """Names at the rows of blocks, downwards; of many blocks, at some."""
    num = len(history.paths)
    ticks = np.arange(0, num, -(-num // 40))
    names = history.names(WIDTH)
    ax.set_yticks(ticks, [names[i] for i in ticks], fontsize=8 if num <= 25 else 6)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(num - 0.5, -0.5)


def ridges(
    metrics: Any, *, steps: Steps = None, blocks: Names = None, dark: bool = False
) -> Figure:
    """The law that every block draws its rate from, at chosen steps.

    The share of a block of concentration c is Beta(c, total - c), and its rate is ``min_rate +
    (max_rate - min_rate) * share``. The user's schedule is left out, so that the learned law does
    not follow its decay.

    Args:
      metrics: See :mod:`dartax.plot`.
      steps: See there; four by default, and the first and last of more than 24 blocks.
      blocks: See there.
      dark: See there.

    Returns:
      A figure with a row for each block, and a ridge for each step: the density over the
      logarithm of the rate, each scaled to its own peak.
    """
    history = load(metrics).select(blocks)
    concentration, total = history["concentration"], history["concentration_total"]
    num = len(history.paths)
    many = num > MANY
    rows = history.rows(steps, 2 if many else 4)
    laws = [
        [
            _cumulative(
                concentration[row, i],
                total[row, i],
                history["min_rate"][row, i],
                history["max_rate"][row, i],
            )
            for i in range(num)
        ]
        for row in rows
    ]
    edges = _rate_axis([law for of_step in laws for law in of_step])
    centers = np.sqrt(edges[1:] * edges[:-1])
    with theme(dark) as tones:
        figure = Figure(
            figsize=(8, float(np.clip(0.5 * num + 1.3, 3.0, 9.0))), dpi=110, layout="constrained"
        )
        # Many blocks would hide one another at the other steps.
        panels = figure.subplots(1, len(rows), sharex=True, sharey=True, squeeze=False)[0]
        if not many:
            figure.clear()
            panels = np.array([figure.subplots()] * len(rows))
        tints = sequential(dark)(np.linspace(0, 1, max(len(rows), 2)))[: len(rows)]
        height = 0.85 if not many else 0.03 * num
        for ax, row, of_step, tint in zip(panels, rows, laws, tints, strict=True):
            shades = colors(num, dark) if many else [tint] * num
            for i, (law, shade) in enumerate(zip(of_step, shades, strict=True)):
                density = np.diff(np.interp(np.log(edges), *law, left=0.0, right=1.0))
                density /= max(density.max(), 1e-300)
                top = np.where(density > 1e-3, i + 0.4 - height * density, np.nan)
                face = tones["paper"] if many else shade
                alpha = 0.85 if many else 0.3
                ax.fill_between(centers, top, i + 0.4, color=face, alpha=alpha, lw=0, zorder=2 + i)
                ax.plot(centers, top, color=shade, lw=0.8 if many else 1.2, zorder=2 + i)
            if many:
                ax.set_title(f"step {history.step[row]:,.0f}")
            else:
                ax.fill_between([], [], color=tint, alpha=0.6, label=f"{history.step[row]:,.0f}")
        for ax in panels:
            ax.set_xscale("log")
            ax.set_xlim(edges[0], edges[-1])
            ax.set_xlabel("learning rate before the schedule")
            ax.grid(axis="x", alpha=0.6)
            if not many:
                ax.hlines(np.arange(num) + 0.4, edges[0], edges[-1], color=tones["grid"], lw=1)
        _name_rows(panels[0], history)
        panels[0].set_ylim(num - 0.4, -0.6 - max(height - 1, 0))
        if not many:
            figure.legend(title="step", loc="outside right upper")
        figure.suptitle(
            f"Law of the learning rate of {_count(num)}", x=0.01, ha="left", fontsize=11
        )
        return finish(figure)


def _cumulative(
    concentration: float, total: float, low: float, high: float
) -> tuple[np.ndarray, np.ndarray]:
    """Points of the cumulative distribution over the logarithm of the rate."""
    a, b = concentration, max(total - concentration, 1e-6)
    # With v = logit(share) the density is share^a (1 - share)^b: smooth, at any concentration.
    spread = np.sqrt(1 / a + 1 / a**2 + 1 / b + 1 / b**2)
    v = np.log(a) - np.log(b) + np.linspace(-9, 9, 2001) * spread
    log_density = -a * np.logaddexp(0, -v) - b * np.logaddexp(0, v)
    mass = np.cumsum(np.exp(log_density - log_density.max()))
    with np.errstate(divide="ignore"):
        log_rate = np.logaddexp(np.log(low), np.log(high - low) - np.logaddexp(0, -v))
    return log_rate, mass / mass[-1]


def _rate_axis(laws: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Edges of cells over all rates that are likely under one of the laws, evenly in the log."""
    ends = [np.interp([0.005, 0.5, 0.995], mass, log_rate) for log_rate, mass in laws]
    low, high = min(end[0] for end in ends), max(end[2] for end in ends)
    # A law with a concentration far below 1 reaches down to nothing.
    low = max(low, min(end[1] for end in ends) - np.log(1e3))
    margin = 0.03 * (high - low) + 1e-3
    return np.exp(np.linspace(low - margin, high + margin, 500))


def simplex(
    metrics: Any,
    blocks: Names = None,
    *,
    steps: Steps = None,
    draws: int = 1500,
    dark: bool = False,
) -> Figure:
    """How three blocks share what they spend: draws of the Dirichlet among them.

    The allocation among three components of a Dirichlet is the Dirichlet of their concentrations.

    Args:
      metrics: See :mod:`dartax.plot`.
      blocks: Names of leaves of three blocks; by default those that spend most at the end.
      steps: See :mod:`dartax.plot`; four by default.
      draws: Number of points, positive.
      dark: See :mod:`dartax.plot`.

    Returns:
      A figure with a triangle for each step, whose corners stand for all to one block: draws,
      the denser the brighter, the mean as a ring, and the way of the mean so far as a line.
    """
    history = load(metrics)
    if blocks is None:
        top = np.argsort(-history["concentration"][-1], kind="stable")[:3]
        blocks = [history.paths[i][0] for i in sorted(top)]
    history = history.select(blocks)
    if len(history.paths) != 3:
        raise ValueError(
            f"blocks must name leaves of three blocks, got {len(history.paths)}; pass three of "
            "those that were recorded."
        )
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}; 1500 is usual.")
    concentration = history["concentration"]
    rows = history.rows(steps, 4)
    corners = np.array([[0, 0], [1, 0], [0.5, np.sqrt(0.75)]])
    way = concentration / concentration.sum(axis=1, keepdims=True) @ corners
    with theme(dark) as tones:
        figure = Figure(figsize=(2.9 * len(rows) + 0.4, 3.4), dpi=110, layout="constrained")
        panels = figure.subplots(1, len(rows), squeeze=False)[0]
        for ax, row in zip(panels, rows, strict=True):
            ax.set_aspect("equal")
            ax.set_axis_off()
            ax.set_title(f"step {history.step[row]:,.0f}", loc="center")
            ax.fill(*corners.T, facecolor="none", edgecolor=tones["line"], lw=1)
            points, density = _allocations(concentration[row], draws)
            ax.scatter(*(points @ corners).T, c=density, cmap=sequential(dark), s=5, lw=0)
            ax.plot(*way[: row + 1].T, color=tones["ink"], lw=1)
            ax.plot(*way[row], "o", ms=7, mfc="none", mec=tones["ink"], mew=1.5)
            for letter, corner, offset in zip(
                "ABC", corners, [(0, -13), (0, -13), (8, -4)], strict=True
            ):
                ax.annotate(letter, corner, xytext=offset, textcoords="offset points", ha="center")
        figure.suptitle("How three blocks share what they spend", x=0.01, ha="left", fontsize=11)
        names = zip("ABC", history.names(WIDTH), strict=True)
        figure.supxlabel("    ".join(f"{corner}: {name}" for corner, name in names), fontsize=9)
        return finish(figure)


def _allocations(concentration: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws of the Dirichlet, ``[draws, 3]``, and the rank of their density, the last the most."""
    points = np.random.default_rng(0).dirichlet(concentration, draws)
    log_density = np.log(np.maximum(points, 1e-300)) @ (concentration - 1)
    order = np.argsort(log_density)
    return points[order], np.linspace(0, 1, draws)


def budget(metrics: Any, *, dark: bool = False) -> Figure:
    """What is spent of the budget over time, and by whom.

    Args:
      metrics: See :mod:`dartax.plot`.
      dark: See there.

    Returns:
      A figure of two panels: the mean shares of the budget that the blocks together spend and
      leave as slack (left out for ``paper_dart``, which spends all); and of what is spent, the
      shares of the six largest blocks and of the rest.
    """
    history = load(metrics)
    share = history["concentration"] / history["concentration_total"]
    slack = _slack(history)
    with theme(dark) as tones:
        panels = 1 if slack is None else 2
        figure = Figure(figsize=(8, 3 * panels + 0.5), dpi=110, layout="constrained")
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        if slack is not None:
            _spent(axes[0], history, slack, tones)
        _spenders(axes[-1], history, share / share.sum(axis=1, keepdims=True), dark)
        if slack is None:
            axes[-1].set_title("Who spends the budget, of which all is spent")
        handles, labels = axes[-1].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside right lower", fontsize=8)
        return finish(figure)


def _spent(ax: Axes, history: History, slack: np.ndarray, tones: dict[str, str]) -> None:
    """The spent share and the slack of every DART."""
    for number, (label, i) in enumerate({n: i for i, n in enumerate(history.labels)}.items()):
        color, suffix = FEW[number % len(FEW)], f" [{shorten(label, 12)}]" if label else ""
        ax.plot(history.step, history["spent"][:, i], color=color, lw=2, label="spent" + suffix)
        ax.plot(history.step, slack[:, i], "--", color=tones["line"], label="slack" + suffix)
    log_limits(ax, np.concatenate([history["spent"], slack]), decades=7)
    ax.grid(alpha=0.6)
    ax.margins(x=0)
    ax.set_title("The budget")
    ax.set_ylabel("share of the budget")
    ax.legend(loc="lower right")


def _spenders(ax: Axes, history: History, of_spent: np.ndarray, dark: bool) -> None:
    """Shares of what is spent, stacked: the largest blocks and the rest.

    Several DARTs have a budget each; here they share one.
    """
    top = np.sort(np.argsort(-of_spent.max(axis=0), kind="stable")[: len(FEW)])
    rest = np.setdiff1d(np.arange(len(history.paths)), top)
    names = history.names(WIDTH)
    parts, labels = [of_spent[:, i] for i in top], [names[i] for i in top]
    if len(rest):
        parts.append(of_spent[:, rest].sum(axis=1))
        labels.append(f"{len(rest)} more")
    tints = [*colors(len(FEW), dark)[: len(top)], "#8c959f"][: len(parts)]
    ax.stackplot(history.step, *parts, colors=tints, labels=labels, lw=0)
    ax.set_ylim(0, 1)
    ax.margins(x=0)
    ax.set_title("Who spends it")
    ax.set_ylabel("share of what is spent")
    ax.set_xlabel("step")
