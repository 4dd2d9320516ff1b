"""Pictures of the Dirichlet itself, at chosen steps."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dartax._history import Names, Steps, load
from dartax.plot._theme import (
    MANY,
    WIDTH,
    Picture,
    colors,
    count,
    finish,
    name_rows,
    sequential,
    theme,
)


def ridges(
    metrics: Any, *, steps: Steps = None, blocks: Names = None, dark: bool = False
) -> Figure:
    """The distribution that every block draws its rate from, at chosen steps.

    The share of a block of concentration c is Beta(c, total - c), and its rate is ``min_rate +
    (rate_budget - min_rate) * share``. The user's schedule is left out, so that the learned
    distribution does not follow its decay.

    Args:
      metrics: Recorded metrics, in any form that :mod:`dartax.plot` takes.
      steps: Steps to draw; four by default, and the first and last of more than 24 blocks.
      blocks: Names of leaves to draw; all by default.
      dark: Light ink on dark paper.

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
                history["rate_budget"][row, i],
            )
            for i in range(num)
        ]
        for row in rows
    ]
    edges = _rate_axis([law for of_step in laws for law in of_step])
    centers = np.sqrt(edges[1:] * edges[:-1])
    with theme(dark) as tones:
        figure = Picture(8.0, float(np.clip(0.5 * num + 1.3, 3.0, 9.0)))
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
        name_rows(panels[0], history.texts(WIDTH))
        panels[0].set_ylim(num - 0.4, -0.6 - max(height - 1, 0))
        if not many:
            figure.legend(title="step", loc="outside right upper")
        title = f"Distribution of the learning rate of {count(num)}, peaks scaled to one height"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
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
      metrics: Recorded metrics, in any form that :mod:`dartax.plot` takes.
      blocks: Names of leaves of three blocks of one DART; by default those of the largest DART
        that spend most at the end.
      steps: Steps to draw; four by default.
      draws: Number of points, positive.
      dark: Light ink on dark paper.

    Returns:
      A figure with a triangle for each step. At a corner one block gets everything. It shows
      draws, brighter where they are denser, the mean as a ring, and its path so far as a line.
    """
    history = load(metrics)
    if blocks is None:
        largest = max(history.labels, key=history.labels.count)
        own = [i for i, label in enumerate(history.labels) if label == largest]
        top = sorted(own, key=lambda i: -history["concentration"][-1, i])[:3]
        blocks = [history.paths[i][0] for i in sorted(top)]
    history = history.select(blocks)
    if len(history.paths) != 3:
        raise ValueError(
            f"blocks must name leaves of three blocks, got {len(history.paths)}; pass three of "
            "those that were recorded."
        )
    if len(set(history.labels)) > 1:
        raise ValueError(
            "blocks must name leaves of one DART, got the labels "
            f"{', '.join(map(repr, history.labels))}; pass blocks that share a budget."
        )
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}; 1500 is usual.")
    concentration = history["concentration"]
    rows = history.rows(steps, 4)
    corners = np.array([[0, 0], [1, 0], [0.5, np.sqrt(0.75)]])
    way = concentration / concentration.sum(axis=1, keepdims=True) @ corners
    with theme(dark) as tones:
        figure = Picture(2.1 * len(rows) + 0.4, 2.8)
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
        names = zip("ABC", history.texts(WIDTH), strict=True)
        figure.supxlabel("    ".join(f"{corner}: {name}" for corner, name in names), fontsize=9)
        return finish(figure)


def _allocations(concentration: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws of the Dirichlet, ``[draws, 3]``, and the rank of their density, the last the most."""
    points = np.random.default_rng(0).dirichlet(concentration, draws)
    log_density = np.log(np.maximum(points, 1e-300)) @ (concentration - 1)
    order = np.argsort(log_density)
    return points[order], np.linspace(0, 1, draws)
