"""Pictures of a run."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dartax import plot
from dartax._history import load
from dartax.experiments.config import ConfigError
from dartax.experiments.run_folder import read_metrics
from dartax.plot._theme import FEW, finish, new_figure, theme

Columns = dict[str, np.ndarray]


def loss(columns: Columns, *, dark: bool = False) -> Figure:
    """Draws the training and test loss."""
    with theme(dark):
        figure, ax = new_figure()
        ax.plot(
            columns["step"],
            columns["train_loss"],
            lw=1,
            color=FEW[5],
            label="training, mean over an interval",
        )
        test = np.isfinite(columns["test_loss"])
        step, test_loss = columns["step"][test], columns["test_loss"][test]
        ax.plot(step, test_loss, "o-", ms=3, color=FEW[1], label="test, end of an epoch")
        if len(test_loss):
            accuracy = columns["test_accuracy"][test][-1]
            ax.set_title(f"Test loss {test_loss[-1]:.4f}, test accuracy {100 * accuracy:.2f} %")
        ax.set_yscale("log")
        ax.set_ylabel("cross-entropy")
        ax.set_xlabel("step")
        ax.grid(alpha=0.6)
        ax.legend()
        return finish(figure)


# In the order of the report. A run draws FIRST when it ends.
PICTURES: dict[str, Callable[..., Figure]] = {
    "loss": loss,
    "learning_rates": plot.learning_rates,
    "concentrations": plot.concentrations,
    "heatmap": plot.heatmap,
    "ridges": plot.ridges,
    "simplex": plot.simplex,
    "budget": plot.budget,
}
FIRST = ("loss", "learning_rates", "concentrations")


def read_columns(workdir: Path) -> Columns:
    """Reads the columns of ``metrics.csv``, with NaN for empty cells.

    Raises:
      ConfigError: If ``workdir`` holds no metrics.
    """
    rows = read_metrics(workdir / "metrics.csv")
    if not rows:
        raise ConfigError(
            f"RUN must be a run folder with a metrics.csv of at least one row, got "
            f"{str(workdir)!r}; pass the workdir of a dartax train."
        )
    return {
        name: np.array([np.nan if row[name] is None else row[name] for row in rows], float)
        for name in rows[0]
    }


def pictures(
    columns: Columns, names: Sequence[str] = tuple(PICTURES), *, dark: bool = False
) -> Iterator[tuple[str, Figure]]:
    """Draws the named pictures, except those that need columns that are missing."""
    possible = {"loss"}
    if any(name.startswith("expected_rate/") for name in columns):
        possible |= {"learning_rates", "concentrations", "heatmap"}
        if "concentration_total" in columns:  # older versions did not record it
            possible |= {"ridges", "budget"}
        if len(load(columns).paths) >= 3:
            possible.add("simplex")
    for name in names:
        if name in possible:
            yield name, PICTURES[name](columns, dark=dark)


def draw(workdir: Path, names: Sequence[str] = tuple(PICTURES)) -> list[Path]:
    """Draws ``plots/*.png`` of the run in ``workdir`` and returns their paths.

    Raises:
      ConfigError: If ``workdir`` holds no metrics.
    """
    columns = read_columns(workdir)
    folder = workdir / "plots"
    folder.mkdir(exist_ok=True)
    paths = []
    for name, figure in pictures(columns, names):
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths
