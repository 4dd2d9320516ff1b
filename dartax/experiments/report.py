"""A report on a run: one page with pictures, learned rates, summary and configuration."""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from dartax._history import load
from dartax.experiments import plots
from dartax.experiments.config import ConfigError
from dartax.experiments.files import write_whole
from dartax.experiments.plots import Columns
from dartax.experiments.run_folder import outcome, read_summary

TEMPLATE = Path(__file__).with_name("report.html.jinja")
CAPTIONS = {
    "loss": (
        "Loss",
        "Training loss, averaged over each interval, and test loss at the end of each epoch.",
    ),
    "learning_rates": (
        "Learning rates",
        "Mean rate of each block, including the schedule. If there are few blocks, a band shows "
        "one standard deviation. The width of a line means nothing: it keeps equal lines visible.",
    ),
    "concentrations": (
        "Concentrations",
        "The relative standard deviation of a drawn rate is about the concentration to the power "
        "-1/2. The slack is the part of the budget that no block spends.",
    ),
    "heatmap": ("All blocks", "Mean rate of each block at each step. The first block is on top."),
    "ridges": (
        "The learned distribution",
        "The distribution of the rate of each block, before the schedule, at several steps. Each "
        "ridge is scaled to its own peak.",
    ),
    "simplex": (
        "Three blocks",
        "How the three blocks that spend the most share their budget. Brighter draws have a higher "
        "density. The ring is the mean, and the line is its path so far.",
    ),
    "budget": (
        "Budget",
        "The sum of all rates is at most rate_budget. The picture shows the share of each block, "
        "and the slack, which no block spends.",
    ),
}


def write(workdir: Path) -> Path:
    """Writes ``report.html`` into the run folder ``workdir`` and returns its path.

    The page needs no other files and no network. A report on an unfinished run shows its progress.

    Raises:
      ConfigError: If ``workdir`` holds no metrics or is not writable.
    """
    columns = plots.read_columns(workdir)
    path = workdir / "report.html"
    try:
        write_whole(path, page(workdir, columns))
    except OSError as error:
        raise ConfigError(
            f"RUN must be a writable folder, got {str(workdir)!r} ({error.strerror}); "
            "make a copy and report that."
        ) from error
    return path


def page(workdir: Path, columns: Columns) -> str:
    """Returns the page as HTML."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    summary = read_summary(workdir) or {}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=workdir.resolve().name,
        lead=_lead(summary, columns),
        figures=_figures(columns),
        texts={
            "Learned rates at the end": _text(workdir / "rates.txt"),
            "Configuration": _text(workdir / "config.toml"),
        },
        summary=summary,
    )


def _lead(summary: dict[str, Any], columns: Columns) -> str:
    """Describes the result in one sentence."""
    if not summary:
        return f"Not finished: {columns['step'][-1]:,.0f} steps so far."
    return (
        f"{outcome(summary)} after {summary['epochs']} epochs "
        f"({summary['steps']:,} steps, {summary['wall_s']:,.0f} s)."
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _figures(columns: Columns) -> list[dict[str, Any]]:
    """Draws each picture in a light and a dark theme."""
    figures = []
    pairs = zip(plots.pictures(columns), plots.pictures(columns, dark=True), strict=True)
    for (name, light), (_, dark) in pairs:
        heading, caption = CAPTIONS[name]
        # With its size, the page does not move when the picture is decoded.
        width, height = (96 * light.get_size_inches()).round().astype(int)
        figures.append(
            {
                "heading": heading,
                "caption": caption,
                "words": _in_words(name, columns),
                "light": _embedded(light),
                "dark": _embedded(dark),
                "width": width,
                "height": height,
            }
        )
    return figures


def _embedded(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _in_words(name: str, columns: Columns) -> str:
    """Describes a picture for readers who cannot see it."""
    if name == "loss":
        words = [
            f"the {what} loss goes from {finite[0]:.3g} to {finite[-1]:.3g}"
            for what, values in (
                ("training", columns["train_loss"]),
                ("test", columns["test_loss"]),
            )
            if len(finite := values[np.isfinite(values)])
        ]
        return (", ".join(words) or "no loss is finite") + "."
    history = load(columns)
    if name == "budget":
        spent = history["spent"][:, 0]
        return f"the spent share of the budget goes from {spent[0]:.3g} to {spent[-1]:.3g}."
    quantity = {"concentrations": "concentration", "simplex": "concentration"}
    values = history[quantity.get(name, "expected_rate")][-1]
    order = np.argsort(-values, kind="stable")
    shown = order if len(order) <= 8 else [*order[:3], *order[-3:]]
    names = history.names(80)
    listed = ", ".join(f"{names[i]} {values[i]:.3g}" for i in shown)
    what = quantity.get(name, "mean rate")
    some = "" if len(order) <= 8 else ", the three highest and lowest of them"
    return f"{what} of {len(order)} blocks at step {history.step[-1]:,.0f}{some}: {listed}."
