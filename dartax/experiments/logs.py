"""Logs of a run: always metrics.csv, and optionally TensorBoard or Weights & Biases."""

import dataclasses
import importlib.util
import math
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from dartax.experiments.config import Config, ConfigError
from dartax.experiments.files import write_whole
from dartax.experiments.run_folder import MetricsFile, read_metrics

# The package of each log. The extra that installs it has the name of the log.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Log(Protocol):
    """Receives one row per logging interval."""

    def write(self, row: dict[str, Any]) -> None:
        """Logs a row of numbers, one of which is ``step``."""

    def sync(self) -> None:
        """Waits until a kill cannot lose the rows so far."""

    def close(self) -> None:
        """Waits until all rows are written."""


class TensorBoard:
    """Writes event files to ``tensorboard/``: each column, and a histogram of the rates."""

    def __init__(self, config: Config, workdir: Path, last_step: int):
        """Begins a file that makes TensorBoard discard the events after ``last_step``."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=last_step + 1,
            # TensorBoard reads files in the order of their names, which start with the second.
            filename_suffix=f".{last_step:010d}",
        )

    def write(self, row: dict[str, Any]) -> None:
        """Logs the row. The histogram is of log10, because rates can differ by decades."""
        step = int(row["step"])
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)
        rates = [value for name, value in row.items() if name.startswith("rate/") and value > 0]
        if rates:
            self._writer.add_histogram("rates/log10", [math.log10(rate) for rate in rates], step)

    def sync(self) -> None:
        """Flushes the file."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()


class WeightsAndBiases:
    """Logs to Weights & Biases. The run folder keeps the id, so that the run can be resumed."""

    def __init__(self, config: Config, workdir: Path, last_step: int):
        """Begins or resumes the run.

        Raises:
          ConfigError: If Weights & Biases cannot start a run, for example without a login.
        """
        import wandb

        # Logged rows cannot be deleted. A resumed run repeats some steps: do not log them again.
        path = workdir / "wandb_id"
        rows = read_metrics(workdir / "metrics.csv") if path.exists() else []
        self._logged_step = rows[-1]["step"] or 0 if rows else 0
        if not path.exists():
            write_whole(path, secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project="dartax",
                name=workdir.name,
                id=path.read_text(),
                resume="allow",
                dir=workdir,
                config=dataclasses.asdict(config),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"log must be one that can start here, got 'wandb' ({error}); run wandb login, or "
                "set WANDB_MODE=offline."
            ) from error

    def write(self, row: dict[str, Any]) -> None:
        """Logs the row, unless it was logged before."""
        step = int(row["step"])
        if step > self._logged_step:
            self._run.log({name: row[name] for name in row if name != "step"}, step=step)

    def sync(self) -> None:
        """Does nothing, because a separate process keeps the logged rows."""

    def close(self) -> None:
        """Uploads the remaining rows and ends the run."""
        self._run.finish()


LOGS: dict[str, Callable[[Config, Path, int], Log]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def check_installed(log: str) -> None:
    """Checks that the package of ``log`` is installed.

    Raises:
      ConfigError: If it is not installed. The message names the extra to install.
    """
    if log in PACKAGES and importlib.util.find_spec(PACKAGES[log]) is None:
        raise ConfigError(
            f"log must be one whose package is installed, got {log!r} without {PACKAGES[log]}; "
            f"pip install 'dartax[{log}]'."
        )


def open_logs(config: Config, workdir: Path, columns: Sequence[str], last_step: int) -> list[Log]:
    """Opens the logs of a run.

    Args:
      config: The run. ``config.log`` is the log besides ``metrics.csv``.
      workdir: The run folder.
      columns: Columns of ``metrics.csv``.
      last_step: Step of the checkpoint that the run resumes from. Rows after it are dropped.

    Raises:
      ConfigError: If a log cannot start.
    """
    chosen = [LOGS[config.log](config, workdir, last_step)] if config.log in LOGS else []
    # This drops rows that other logs may read, so open it last.
    return [MetricsFile(workdir / "metrics.csv", columns, last_step), *chosen]
