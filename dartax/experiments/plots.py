"""Pictures of a run, drawn from its ``metrics.csv``."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dartax.experiments.config import ConfigError
from dartax.experiments.run_folder import read_metrics


def draw(workdir: Path) -> list[Path]:
    """Draws ``plots/*.png`` of the run in ``workdir`` and returns their paths.

    Raises:
      ConfigError: If ``workdir`` holds no metrics.
    """
    rows = read_metrics(workdir / "metrics.csv")
    if not rows:
        raise ConfigError(
            f"RUN must be a run folder with a metrics.csv of at least one row, got "
            f"{str(workdir)!r}; pass the workdir of a dartax train."
        )
    columns = {
        name: np.array([np.nan if row[name] is None else row[name] for row in rows], float)
        for name in rows[0]
    }
    blocks = [
        name.removeprefix("expected_rate/") for name in columns if name.startswith("expected_rate/")
    ]
    folder = workdir / "plots"
    folder.mkdir(exist_ok=True)
    paths = [_save(folder / "loss.png", lambda ax: _loss(ax, columns))]
    if blocks:
        paths += [
            _save(folder / "learning_rates.png", lambda ax: _rates(ax, columns, blocks)),
            _save(folder / "concentrations.png", lambda ax: _concentrations(ax, columns, blocks)),
        ]
    return paths


def _save(path: Path, draw_on) -> Path:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    draw_on(axes)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path


def _loss(ax: Axes, columns: dict[str, np.ndarray]) -> None:
    ax.plot(columns["step"], columns["train_loss"], lw=1, label="training, mean over an interval")
    test = np.isfinite(columns["test_loss"])
    step, loss = columns["step"][test], columns["test_loss"][test]
    ax.plot(step, loss, "o-", ms=3, label="test, end of an epoch")
    if len(loss):
        accuracy = columns["test_accuracy"][test][-1]
        ax.set_title(f"test loss {loss[-1]:.4f}, test accuracy {100 * accuracy:.2f} %")
    ax.set_yscale("log")
    ax.set_ylabel("cross-entropy")
    ax.legend(frameon=False)


def _rates(ax: Axes, columns: dict[str, np.ndarray], blocks: list[str]) -> None:
    for block, style in zip(blocks, styles(len(blocks)), strict=True):
        mean, std = columns[f"expected_rate/{block}"], columns[f"rate_std/{block}"]
        ax.plot(columns["step"], mean, label=block, **style)
        # The lower edge stays positive, or a log axis would drop it.
        low = np.maximum(mean - std, mean / 10)
        ax.fill_between(columns["step"], low, mean + std, color=style["color"], alpha=0.12, lw=0)
    ax.set_title("learning rate of every block: mean (line) and standard deviation (band)")
    ax.set_ylabel("learning rate, schedule included")
    _log_axis(ax, [columns[f"expected_rate/{block}"] for block in blocks])
    _legend(ax, len(blocks))


def _concentrations(ax: Axes, columns: dict[str, np.ndarray], blocks: list[str]) -> None:
    for block, style in zip(blocks, styles(len(blocks)), strict=True):
        ax.plot(columns["step"], columns[f"concentration/{block}"], label=block, **style)
    ax.set_title("concentration of every block")
    ax.set_ylabel("concentration")
    ax.set_yscale("log")
    _legend(ax, len(blocks))


def styles(num: int) -> list[dict]:
    """A colour a block, each line thinner than the one below it: equal ones stay visible."""
    if num <= 10:
        colors = [matplotlib.colormaps["tab10"](i) for i in range(num)]
    else:
        colors = [matplotlib.colormaps["turbo"](i / (num - 1)) for i in range(num)]
    widths = np.linspace(4.0, 1.0, num)
    return [{"color": color, "lw": width} for color, width in zip(colors, widths, strict=True)]


def _log_axis(ax: Axes, values: list[np.ndarray]) -> None:
    """A log axis that the last steps of a decay to zero do not stretch over many decades."""
    positive = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in values])
    ax.set_yscale("log")
    if len(positive):
        ax.set_ylim(max(positive.min(), positive.max() / 1e5) / 2, positive.max() * 3)


def _legend(ax: Axes, num: int) -> None:
    if num <= 30:
        ax.figure.legend(frameon=False, fontsize=8, ncols=1 + num // 16, loc="outside right center")
