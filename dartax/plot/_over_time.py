"""Pictures over time: rates, concentrations and what is spent of the budget."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from dartax._describe import shorten
from dartax._history import History, Names, load
from dartax.plot._theme import (
    FEW,
    MANY,
    WIDTH,
    Picture,
    colors,
    count,
    finish,
    log_limits,
    name_lines,
    name_rows,
    new_figure,
    styles,
    theme,
)


def _lines(ax: Axes, history: History, values: np.ndarray, dark: bool) -> None:
    """A named line for every block, over steps, inside the limits that are set."""
    # The end of a decay to zero has no place on a log axis.
    values = np.where(values > 0, values, np.nan)
    marker = "o" if len(history.step) == 1 else None
    for line, style in zip(values.T, styles(len(history.paths), dark), strict=True):
        ax.plot(history.step, line, marker=marker, solid_capstyle="round", **style)
    ax.set_xlabel("step")
    ax.set_xlim(*_span(history.step))
    ax.grid(alpha=0.6)
    ends = [line[np.isfinite(line)][-1:].sum() for line in values.T]
    name_lines(ax, ends, history.texts(WIDTH), dark)


def _span(step: np.ndarray) -> tuple[float, float]:
    """All steps, and not nothing where there is one."""
    return step[0], step[-1] if step[-1] > step[0] else step[0] + 1


def learning_rates(metrics: Any, *, blocks: Names = None, dark: bool = False) -> Figure:
    """The rates of the blocks over time, the schedule included.

    Args:
      metrics: Recorded metrics, in any form that :mod:`dartax.plot` takes.
      blocks: Names of leaves to draw; all by default.
      dark: Light ink on dark paper.

    Returns:
      A figure with the mean of every block as a line, and for up to 24 blocks a band of one
      standard deviation to each side.
    """
    history = load(metrics).select(blocks)
    mean, std = history["expected_rate"], history["rate_std"]
    num = len(history.paths)
    with theme(dark):
        figure, ax = new_figure(height=max(4.5, 0.19 * min(num, MANY)))
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
        ax.set_title(f"Learning rate of {count(num)}: mean{band}")
        ax.set_ylabel("learning rate, schedule included")
        return finish(figure)


def concentrations(metrics: Any, *, blocks: Names = None, dark: bool = False) -> Figure:
    """The concentrations of the Dirichlet over time, the slack's as a dashed line.

    Args:
      metrics: Recorded metrics, in any form that :mod:`dartax.plot` takes.
      blocks: Names of leaves to draw; all by default.
      dark: Light ink on dark paper.

    Returns:
      A figure on a log axis. A block of concentration c draws its rate with a relative standard
      deviation of about ``c ** -0.5``.
    """
    whole = load(metrics)
    history = whole.select(blocks)
    values = history["concentration"]
    with theme(dark) as tones:
        figure, ax = new_figure(height=max(4.5, 0.19 * min(len(history.paths), MANY)))
        slack = _slack(whole)
        shown = values
        if slack is not None and "concentration_total" in whole.columns:
            line = slack * whole["concentration_total"]
            shown = np.concatenate([values, line], axis=1)
            for i in {label: i for i, label in enumerate(whole.labels)}.values():
                ax.plot(history.step, line[:, i], "--", color=tones["line"], lw=1.5)
                ax.annotate(
                    "slack: what no block spends",
                    (history.step[0], line[0, i]),
                    xytext=(8, 2),
                    textcoords="offset points",
                )
        log_limits(ax, shown, decades=40)
        _lines(ax, history, values, dark)
        ax.set_title(f"Concentration of {count(len(history.paths))}")
        ax.set_ylabel("concentration")
        return finish(figure)


def _slack(history: History) -> np.ndarray | None:
    """Mean share of the budget that no block spends, ``[T, B]``; None where there is no slack."""
    if "spent" not in history.columns:
        return None
    # paper_dart spends all, up to rounding.
    slack = 1 - history["spent"]
    return np.maximum(slack, 1e-7) if np.max(slack) > 1e-5 else None


def heatmap(metrics: Any, *, blocks: Names = None, dark: bool = False) -> Figure:
    """The mean rates of all blocks at all steps, as colors on a log scale.

    Args:
      metrics: Recorded metrics, in any form that :mod:`dartax.plot` takes.
      blocks: Names of leaves to draw; all by default.
      dark: Light ink on dark paper.

    Returns:
      A figure with a row for each block, the first one on top.
    """
    history = load(metrics).select(blocks)
    mean = history["expected_rate"]
    num = len(history.paths)
    with theme(dark):
        figure, ax = new_figure(height=float(np.clip(0.26 * num + 1.4, 2.6, 8.0)))
        positive = mean[np.isfinite(mean) & (mean > 0)]
        top = positive.max() if len(positive) else 1.0
        low = max(positive.min(), top / 1e5) if len(positive) else 0.1
        # A rate of 0, at the end of a decay, has the color of the smallest.
        mesh = ax.pcolormesh(
            _edges(history.step),
            np.arange(num + 1) - 0.5,
            np.maximum(mean.T, low),
            norm=LogNorm(low, max(top, low * 1.01)),
            cmap="viridis",
            rasterized=True,
        )
        bar = figure.colorbar(mesh, ax=ax, pad=0.02, aspect=30)
        bar.set_label("learning rate")
        bar.outline.set_visible(False)
        name_rows(ax, history.texts(WIDTH))
        ax.set_xlabel("step")
        ax.set_title(f"Mean learning rate of {count(num)}, schedule included")
        return finish(figure)


def _edges(step: np.ndarray) -> np.ndarray:
    """Edges of cells around the steps; cells of one step where there is one."""
    if len(step) == 1:
        return step[0] + np.array([-0.5, 0.5])
    middle = (step[1:] + step[:-1]) / 2
    return np.concatenate([[2 * step[0] - middle[0]], middle, [2 * step[-1] - middle[-1]]])


def budget(metrics: Any, *, dark: bool = False) -> Figure:
    """What is spent of the budget over time, and by whom.

    Args:
      metrics: Recorded metrics, in any form that :mod:`dartax.plot` takes.
      dark: Light ink on dark paper.

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
        figure = Picture(8.0, 3 * panels + 0.5)
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        if slack is not None:
            _spent(axes[0], history, slack, tones)
        _spenders(axes[-1], history, share / share.sum(axis=1, keepdims=True), dark)
        if slack is None:
            axes[-1].set_title("Who spends the budget: all of it is spent")
        return finish(figure)


def _spent(ax: Axes, history: History, slack: np.ndarray, tones: dict[str, str]) -> None:
    """The spent share and the slack of every DART."""
    for number, (label, i) in enumerate({n: i for i, n in enumerate(history.labels)}.items()):
        color, suffix = FEW[number % len(FEW)], f" [{shorten(label, 12)}]" if label else ""
        ax.plot(history.step, history["spent"][:, i], color=color, lw=2, label="spent" + suffix)
        unspent = "slack, not spent" + suffix
        ax.plot(history.step, slack[:, i], "--", color=tones["line"], label=unspent)
    log_limits(ax, np.concatenate([history["spent"], slack]), decades=7)
    ax.grid(alpha=0.6)
    ax.set_title("The budget")
    ax.set_ylabel("share of the budget")
    ax.legend(loc="lower right")


def _spenders(ax: Axes, history: History, of_spent: np.ndarray, dark: bool) -> None:
    """Shares of what is spent, stacked: the largest blocks and the rest.

    Several DARTs have a budget each; here they share one.
    """
    top = np.sort(np.argsort(-of_spent.max(axis=0), kind="stable")[: len(FEW)])
    rest = np.setdiff1d(np.arange(len(history.paths)), top)
    names = history.texts(WIDTH)
    parts, labels = [of_spent[:, i] for i in top], [names[i] for i in top]
    if len(rest):
        parts.append(of_spent[:, rest].sum(axis=1))
        labels.append(f"{len(rest)} more")
    tints = [*colors(len(FEW), dark)[: len(top)], "#8c959f"][: len(parts)]
    ax.stackplot(history.step, *parts, colors=tints, lw=0)
    ax.set_xlim(*_span(history.step))
    ax.set_ylim(0, 1)
    ends = np.array([part[-1] for part in parts])
    name_lines(ax, list(np.cumsum(ends) - ends / 2), labels, dark, tints)
    ax.set_title("Who spends it")
    ax.set_ylabel("share of what is spent")
    ax.set_xlabel("step")
