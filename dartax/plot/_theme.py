"""Colors and labels of the pictures: on white or nearly black, told apart by everyone."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure

# Okabe and Ito's colors, told apart by color-blind readers too; the last one is the ink.
FEW = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
LIGHT = {"paper": "#ffffff", "ink": "#1f2328", "line": "#8c959f", "grid": "#d8dee4"}
DARK = {"paper": "#0d1117", "ink": "#e6edf3", "line": "#6e7681", "grid": "#30363d"}
# More lines than these are not named one by one.
MANY = 24
# Characters of a name beside a picture.
WIDTH = 32


@contextlib.contextmanager
def theme(dark: bool) -> Iterator[dict[str, str]]:
    """Draws on white or, with ``dark``, on nearly black, whatever the user's style sheet says."""
    tones = DARK if dark else LIGHT
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "figure.facecolor": tones["paper"],
                "savefig.facecolor": tones["paper"],
                "axes.facecolor": tones["paper"],
                "axes.edgecolor": tones["line"],
                "axes.labelcolor": tones["ink"],
                "axes.titlecolor": tones["ink"],
                "axes.titlesize": 11,
                "axes.titlelocation": "left",
                "axes.spines.top": False,
                "axes.spines.right": False,
                "text.color": tones["ink"],
                "xtick.color": tones["line"],
                "xtick.labelcolor": tones["ink"],
                "ytick.color": tones["line"],
                "ytick.labelcolor": tones["ink"],
                "grid.color": tones["grid"],
                "legend.frameon": False,
                "font.size": 9,
            }
        )
        yield tones


class Picture(Figure):
    """A figure that belongs to no window. A notebook shows it, without ``%matplotlib inline``."""

    def __init__(self, width: float, height: float):
        super().__init__(figsize=(width, height), dpi=110, layout="constrained")

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def new_figure(width: float = 8.0, height: float = 4.5) -> tuple[Figure, Axes]:
    """A picture and its axes."""
    figure = Picture(width, height)
    return figure, figure.subplots()


def finish(figure: Figure) -> Figure:
    """Sets the tick colors now: ticks made at saving would take the style of that time."""
    rc = matplotlib.rcParams
    for ax in figure.axes:
        ax.set_axisbelow(True)
        ax.tick_params(which="both", color=rc["xtick.color"], labelcolor=rc["xtick.labelcolor"])
    return figure


def sequential(dark: bool) -> Colormap:
    """Viridis without the end that is lost on the paper: yellow on white, violet on black."""
    low, high = (0.28, 1.0) if dark else (0.0, 0.78)
    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(low, high, 256)))


def colors(num: int, dark: bool) -> list[Any]:
    """A color for each of ``num`` lines: distinct ones for a few, else in order."""
    if num <= len(FEW) + 1:
        return [*FEW, (DARK if dark else LIGHT)["ink"]][:num]
    return list(sequential(dark)(np.linspace(0, 1, num)))


def styles(num: int, dark: bool = False) -> list[dict[str, Any]]:
    """A style for each of ``num`` lines: equal lines stay visible, many lines fade."""
    if num > MANY:
        return [{"color": color, "lw": 0.9, "alpha": 0.6} for color in colors(num, dark)]
    # Each line is thinner than the one below it.
    widths = np.linspace(3.5 if num <= len(FEW) + 1 else 2.0, 1.2, num)
    return [{"color": c, "lw": lw} for c, lw in zip(colors(num, dark), widths, strict=True)]


def log_limits(ax: Axes, values: np.ndarray, decades: float = 5.0) -> None:
    """A log axis that the last steps of a decay to zero do not stretch over many decades."""
    positive = values[np.isfinite(values) & (values > 0)]
    ax.set_yscale("log")
    if len(positive):
        top = positive.max()
        ax.set_ylim(max(positive.min(), top / 10**decades) / 1.5, top * 1.8)


def count(num: int) -> str:
    """Blocks in words."""
    return "the block" if num == 1 else f"{num} blocks"


def name_lines(
    ax: Axes,
    ends: Sequence[float],
    names: Sequence[str],
    dark: bool,
    tints: Sequence[Any] | None = None,
) -> None:
    """Tells which line is which: beside its end, or for many lines by a color bar.

    Args:
      ax: Axes whose limits are set, with one line per name in ``colors`` of their number.
      ends: Last value of every line.
      names: Name of every line.
      dark: Whether the paper is dark.
      tints: Other colors of the lines.
    """
    if len(names) > MANY:
        bar = ScalarMappable(cmap=sequential(dark))
        bar.set_clim(0, len(names) - 1)
        assert ax.figure is not None
        colorbar = ax.figure.colorbar(bar, ax=ax, pad=0.02, aspect=40)
        ticks = np.linspace(0, len(names) - 1, 5).round().astype(int)
        colorbar.set_ticks(list(ticks), labels=[names[i] for i in ticks], fontsize=7)
        colorbar.ax.invert_yaxis()
        colorbar.outline.set_visible(False)
        return
    points = ax.transData.transform([(1.0, max(end, 1e-300)) for end in ends])
    heights = np.clip(ax.transAxes.inverted().transform(points)[:, 1], 0.0, 1.0)
    places = spread_out(heights, 1 / max(len(names), 18))
    for name, end, place, color in zip(
        names, heights, places, tints or colors(len(names), dark), strict=True
    ):
        ax.annotate(
            name,
            xy=(1.0, end),
            xytext=(1.05, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8 if len(names) <= 18 else 6.5,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "lw": 1.5,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Names at the rows of blocks, downwards; of many blocks, at some."""
    num = len(names)
    ticks = range(0, num, -(-num // 40))
    ax.set_yticks(ticks, [names[i] for i in ticks], fontsize=8 if num <= 25 else 6)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(num - 0.5, -0.5)


def spread_out(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Places in [0, 1] in the order of ``wanted``, near it and at least ``gap`` apart."""
    order = np.argsort(wanted, kind="stable")
    places = np.array(wanted, float)[order]
    for i in range(1, len(places)):  # upwards where it is crowded, then back below the top
        places[i] = max(places[i], places[i - 1] + gap)
    places[-1:] = np.minimum(places[-1:], 1.0)
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - gap)
    result = np.empty_like(places)
    result[order] = places
    return result
