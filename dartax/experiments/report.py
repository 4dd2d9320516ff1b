"""A run as one page: pictures, learned rates, summary and configuration, without a network."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dartax._history import load
from dartax.experiments import plots
from dartax.experiments.config import ConfigError
from dartax.experiments.files import write_whole
from dartax.experiments.plots import Columns

CAPTIONS = {
    "loss": (
        "Loss",
        "Training loss, the mean over an interval, and test loss at the end of every epoch.",
    ),
    "learning_rates": (
        "Learning rates",
        "Mean rate of every block, with a band of one standard deviation where the blocks are "
        "few. The schedule is included.",
    ),
    "concentrations": (
        "Concentrations",
        "The standard deviation of a drawn rate, over its mean, is about the concentration to the "
        "power -1/2. The slack is budget that no block spends.",
    ),
    "heatmap": ("All blocks", "Mean rate of every block, the first on top, at every step."),
    "ridges": (
        "The learned distribution",
        "What every block draws its rate from at some steps, before the schedule. Each ridge is "
        "scaled to its own peak.",
    ),
    "simplex": (
        "Three blocks",
        "How the three blocks that spend most share what they spend: draws, the brighter the "
        "denser; a ring at the mean, and a line where it has been.",
    ),
    "budget": (
        "Budget",
        "The sum of all rates is at most rate_budget: how much of it is spent, and by whom.",
    ),
}

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --soft: #59636e; --line: #d8dee4;
  --shade: #f6f8fa; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #e6edf3;
  --soft: #9198a1; --line: #30363d; --shade: #161b22; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.2rem; }
h3 { margin: 0 0 .25rem; font-size: 1rem; }
.lead { margin: .25rem 0 0; font-size: 1.1rem; }
figure { margin: 1.5rem 0 2.5rem; }
figcaption { margin-bottom: .5rem; color: var(--soft); }
figcaption h3 { color: var(--ink); }
.wide { overflow-x: auto; }
.wide:focus-visible { outline: 2px solid #0969da; }
img { display: block; width: 100%; min-width: 34rem; height: auto; }
pre { margin: 0; padding: .75rem 1rem; background: var(--shade); border: 1px solid var(--line);
  border-radius: 6px; font: .8125rem/1.45 ui-monospace, monospace; width: max-content;
  min-width: 100%; }
table { border-collapse: collapse; }
th, td { padding: .2rem 1rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: normal; white-space: nowrap; }
footer { margin-top: 3rem; color: var(--soft); font-size: .875rem; }
@media print { body { max-width: none; padding: 0; } figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } img { min-width: 0; } .wide { overflow: visible; }
  pre { white-space: pre-wrap; width: auto; font-size: .65rem; } }
"""


def write(workdir: Path) -> Path:
    """Writes ``report.html`` into the run folder ``workdir`` and returns its path.

    The page holds everything in itself, and shows what the run has left so far.

    Raises:
      ConfigError: If ``workdir`` holds no metrics, or cannot be written to.
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
    """The whole page."""
    summary = read_summary(workdir)
    name = html.escape(workdir.resolve().name)
    sections = [
        _section("Pictures", _figures(columns)),
        _section("Learned rates at the end", _text_file(workdir / "rates.txt", "learned rates")),
        _section("Summary", _table(summary)),
        _section("Configuration", _text_file(workdir / "config.toml", "configuration")),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            # Nothing may be loaded, whatever the run folder holds.
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{name}: dartax report</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{name}</h1>",
            f'<p class="lead">{html.escape(_lead(summary, columns))}</p>',
            *filter(None, sections),
            "</main>",
            "<footer>Made by <code>dartax report</code></footer>",
            "</body>",
            "</html>\n",
        ]
    )


def read_summary(workdir: Path) -> dict[str, Any]:
    """``summary.json``; empty while the run goes on, and where the file is damaged."""
    try:
        summary = json.loads((workdir / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _lead(summary: dict[str, Any], columns: Columns) -> str:
    """The result in a sentence."""
    try:
        return (
            f"Test loss {summary['test_loss']:.4f}, test accuracy "
            f"{100 * summary['test_accuracy']:.2f} % after {summary['epochs']} epochs "
            f"({summary['steps']:,} steps, {summary['wall_s']:,.0f} s)."
        )
    except (KeyError, TypeError, ValueError):
        return f"Not finished: {columns['step'][-1]:,.0f} steps so far."


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>" if content else ""


def _text_file(path: Path, label: str) -> str:
    """A text file as it is, in a frame that a keyboard can scroll."""
    if not path.exists():
        return ""
    text = html.escape(path.read_text(encoding="utf-8", errors="replace"))
    return (
        f'<div class="wide" role="region" aria-label="{label}" tabindex="0"><pre>{text}</pre></div>'
    )


def _table(summary: dict[str, Any]) -> str:
    rows = []
    for key, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, list):
            value = " x ".join(map(str, value))
        elif isinstance(value, float):
            value = f"{value:.6g}"
        rows.append(
            f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>'
        )
    return "<table>\n" + "\n".join(rows) + "\n</table>" if rows else ""


def _figures(columns: Columns) -> str:
    """Every picture, in the theme that the reader prefers; paper is light."""
    figures = []
    pairs = zip(plots.pictures(columns), plots.pictures(columns, dark=True), strict=True)
    for (name, light), (_, dark) in pairs:
        heading, caption = CAPTIONS[name]
        alt = html.escape(f"{heading}: {_in_words(name, columns)}")
        figures.append(
            f"<figure>\n<figcaption><h3>{heading}</h3>{caption}</figcaption>\n"
            f'<div class="wide" role="region" aria-label="{heading}" tabindex="0"><picture>'
            f'<source media="screen and (prefers-color-scheme: dark)" srcset="{_embedded(dark)}">'
            f'<img src="{_embedded(light)}" alt="{alt}" {_size(light)}></picture></div>\n</figure>'
        )
    return "\n".join(figures)


def _embedded(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _size(figure: Figure) -> str:
    """The size on the page before the picture is decoded, so that the text does not jump."""
    width, height = (96 * figure.get_size_inches()).round().astype(int)
    return f'width="{width}" height="{height}"'


def _in_words(name: str, columns: Columns) -> str:
    """What a picture shows, for those who do not see it."""
    if name == "loss":
        train, test = columns["train_loss"], columns["test_loss"][np.isfinite(columns["test_loss"])]
        words = f"the training loss goes from {train[0]:.3g} to {train[-1]:.3g}"
        return words + (f", the test loss from {test[0]:.3g} to {test[-1]:.3g}." * bool(len(test)))
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
