"""Where the rows of a run go: metrics.csv always, TensorBoard or Weights & Biases on request."""

import contextlib
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

# The package behind each log; the extra that installs it is called like the log.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Writer(Protocol):
    """Takes a row per logging interval."""

    def write(self, row: dict[str, Any]) -> None:
        """Takes a row of numbers, among them ``step``."""

    def sync(self) -> None:
        """Waits until the rows so far outlive the process."""

    def close(self) -> None:
        """Waits until every row has been written."""


class Several:
    """Hands every row to several writers."""

    def __init__(self, writers: Sequence[Writer]):
        """Takes over the writers, which it closes."""
        self._writers = writers

    def write(self, row: dict[str, Any]) -> None:
        """Writes the row to each of them."""
        for writer in self._writers:
            writer.write(row)

    def sync(self) -> None:
        """Syncs each of them."""
        for writer in self._writers:
            writer.sync()

    def close(self) -> None:
        """Closes them all, the last one first."""
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)


class TensorBoard:
    """Event files in ``tensorboard/``: a scalar per column, and a histogram of the rates."""

    def __init__(self, config: Config, workdir: Path, last_step: int):
        """Begins a file, which has TensorBoard forget what was logged after ``last_step``."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=last_step + 1,
            # Files are named by the second, and read in the order of their names.
            filename_suffix=f".{last_step:010d}",
        )

    def write(self, row: dict[str, Any]) -> None:
        """Appends the row; the histogram is that of log10, for rates lie decades apart."""
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
    """A run of Weights & Biases, whose id the run folder keeps, so that it can be resumed."""

    def __init__(self, config: Config, workdir: Path, last_step: int):
        """Begins the run, or goes on with it after the last row that it was given.

        Raises:
          ConfigError: If Weights & Biases starts no run, such as for want of a login.
        """
        import wandb

        # What was logged cannot be taken back, but the steps after a kill repeat those before it.
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
        """Logs the row, unless it has been logged."""
        step = int(row["step"])
        if step > self._logged_step:
            self._run.log({name: row[name] for name in row if name != "step"}, step=step)

    def sync(self) -> None:
        """Nothing: a process of its own keeps what was logged."""

    def close(self) -> None:
        """Ends the run, uploading what is left."""
        self._run.finish()


WRITERS: dict[str, Callable[[Config, Path, int], Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def check_installed(log: str) -> None:
    """Checks that the package behind ``log`` is there.

    Raises:
      ConfigError: If it is not; the message names the extra to install.
    """
    if log in PACKAGES and importlib.util.find_spec(PACKAGES[log]) is None:
        raise ConfigError(
            f"log must be one whose package is installed, got {log!r} without {PACKAGES[log]}; "
            f"pip install 'dartax[{log}]'."
        )


def open_writer(
    config: Config, workdir: Path | None, columns: Sequence[str], last_step: int
) -> Writer:
    """What a run writes its rows to.

    Args:
      config: The run; ``config.log`` names what to write beside ``metrics.csv``.
      workdir: The run folder; ``None`` writes nothing: of several processes only one writes.
      columns: Columns of ``metrics.csv``.
      last_step: Step of the checkpoint that the run goes on from. Rows after it are forgotten.

    Raises:
      ConfigError: If the log cannot start.
    """
    if workdir is None:
        return MetricsFile(None, columns, last_step)
    chosen = [WRITERS[config.log](config, workdir, last_step)] if config.log in WRITERS else []
    # Opened last, for it cuts the rows that the others may ask for.
    metrics = MetricsFile(workdir / "metrics.csv", columns, last_step)
    return Several([metrics, *chosen])
