"""Recorded metrics as arrays, for :mod:`dartax.plot` and :func:`dartax.distill_schedule`."""

import csv
import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dartax._describe import block_name, common_folder

# The column of a leaf, such as expected_rate/Dense_0/kernel. The label of its DART may precede it.
LEAF = re.compile(r"(?:(?P<label>.*?)/)?expected_rate/(?P<path>.+)")
Names = Sequence[str] | None
Steps = Sequence[float] | None
OF_LEAVES = ("rate", "expected_rate", "rate_std", "concentration")
OF_DARTS = ("concentration_total", "spent", "multiplier", "min_rate", "rate_budget")


def read_csv(path: Path) -> list[dict[str, float | None]]:
    """Reads the rows of a CSV file of numbers; an empty cell becomes ``None``.

    Raises:
      OSError: If the file cannot be read.
      ValueError: If a cell is not a number.
    """
    rows = []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        # A last line without a newline may be incomplete: the program that writes it may be running
        # or may have been killed.
        lines = [line for line in file if line.endswith("\n")]
    try:
        for row in csv.DictReader(lines):
            rows.append({name: float(cell) if cell else None for name, cell in row.items()})
    except (TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} must hold a number in every cell, got something else at line {len(rows) + 2} "
            f"({error}); delete that line."
        ) from error
    return rows


@dataclasses.dataclass(frozen=True)
class History:
    """Recorded values of B blocks at T steps.

    Attributes:
      step: Number of updates, ``[T]``.
      paths: For each block, the paths of its leaves.
      labels: For each block, the label of its DART in ``optax.partition``, or "".
      columns: The recorded values by name, each ``[T, B]``. The names come from ``OF_LEAVES`` and
        ``OF_DARTS``.
    """

    step: np.ndarray
    paths: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    columns: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns the values ``[T, B]`` of a column.

        Raises:
          ValueError: If the column was not recorded.
        """
        if name not in self.columns:
            per_leaf = "/PATH of every leaf" if name in OF_LEAVES else ""
            raise ValueError(
                f"metrics must hold {name}{per_leaf}, got {', '.join(sorted(self.columns))}; "
                "record dartax.metrics(opt_state, params)."
            )
        return self.columns[name]

    def names(self, width: int) -> list[str]:
        """Names the blocks in at most ``width`` characters each, without their common prefix."""
        folder = common_folder(self.paths)
        return [
            block_name([path.removeprefix(folder) for path in paths], width) for paths in self.paths
        ]

    def texts(self, width: int) -> list[str]:
        """Like :meth:`names`, with dollar signs escaped for matplotlib."""
        return [name.replace("$", r"\$") for name in self.names(width)]

    def rows(self, steps: Steps, num: int) -> list[int]:
        """Returns the row nearest to each of ``steps``; by default ``num`` evenly spaced rows."""
        if steps is None:
            return sorted(set(np.linspace(0, len(self.step) - 1, num).round().astype(int)))
        if np.ndim(steps) != 1 or np.asarray(steps).dtype.kind not in "iuf":
            raise TypeError(f"steps must be a sequence of numbers, got {steps!r}; pass a list.")
        first, last = self.step[0], self.step[-1]
        outside = [step for step in steps if not first <= step <= last]
        if outside or not len(steps):
            raise ValueError(
                f"steps must be between the first and the last recorded step, {first:g} and "
                f"{last:g}, got {outside[0] if outside else 'none'}; pass some of those."
            )
        return sorted({int(np.argmin(np.abs(self.step - step))) for step in steps})

    def select(self, blocks: Names) -> "History":
        """Keeps the blocks of the named leaves, in the order of the names; ``None`` keeps all."""
        if blocks is None:
            return self
        if isinstance(blocks, str) or not isinstance(blocks, Iterable):
            raise TypeError(f"blocks must be a sequence of names, got {blocks!r}; pass a list.")
        number = {path: i for i, paths in enumerate(self.paths) for path in paths}
        for name in blocks:
            if name not in number:
                near = difflib.get_close_matches(str(name), number, n=1, cutoff=0) or ["none"]
                raise ValueError(
                    f"blocks must name recorded leaves, got {name!r}; did you mean {near[0]!r}?"
                )
        if not blocks:
            raise ValueError("blocks must name recorded leaves, got none; pass None for all.")
        return self._of(list(dict.fromkeys(number[name] for name in blocks)))

    def _of(self, chosen: list[int]) -> "History":
        return dataclasses.replace(
            self,
            paths=tuple(self.paths[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            columns={name: values[:, chosen] for name, values in self.columns.items()},
        )


def load(metrics: Any) -> History:
    """Converts ``metrics``, in any form that :mod:`dartax.plot` accepts.

    Args:
      metrics: A sequence of metrics dicts, a mapping of columns, or the path of a CSV file whose
        header names the metrics. The path may be that of a folder with a ``metrics.csv``.

    Raises:
      TypeError: If ``metrics`` is of another kind.
      ValueError: If ``metrics`` has no learning rates of leaves.
    """
    columns = _columns(metrics)
    leaves = [match for match in map(LEAF.fullmatch, columns) if match]
    if not leaves:
        some = ", ".join(list(columns)[:4]) or "nothing"
        raise ValueError(
            f"metrics must hold expected_rate/PATH of every leaf, got {some}; record "
            "dartax.metrics(opt_state, params)."
        )
    labels = [match["label"] or "" for match in leaves]
    prefixes = [f"{label}/" if label else "" for label in labels]
    found: dict[str, np.ndarray] = {}
    for name in OF_LEAVES + OF_DARTS:
        endings = [f"/{match['path']}" if name in OF_LEAVES else "" for match in leaves]
        keys = [prefix + name + ending for prefix, ending in zip(prefixes, endings, strict=True)]
        if all(key in columns for key in keys):
            found[name] = np.stack([columns[key] for key in keys], axis=1)
    step = _steps(columns, list(dict.fromkeys(prefixes)), len(found["expected_rate"]))
    # A log may also have rows without learning rates.
    kept = np.isfinite(found["expected_rate"]).any(axis=1) & np.isfinite(step)
    if not kept.any():
        raise ValueError(
            "metrics must hold at least one row with rates, got none; record some updates."
        )
    history = History(
        step=step[kept],
        paths=tuple((match["path"],) for match in leaves),
        labels=tuple(labels),
        columns={name: values[kept] for name, values in found.items()},
    )
    return _joined(history)


def _steps(columns: dict[str, np.ndarray], prefixes: list[str], num: int) -> np.ndarray:
    """Returns the step of each of the ``num`` rows: that of all DARTs, or just the row's number."""
    if "step" in columns:
        return columns["step"]
    steps = [columns[prefix + "step"] for prefix in prefixes if prefix + "step" in columns]
    if not steps:
        return np.arange(num)
    if not all(np.array_equal(steps[0], other, equal_nan=True) for other in steps):
        counts = ", ".join(f"{np.nanmax(step):g}" for step in steps)
        raise ValueError(
            "metrics must have one step for all DARTs of a row, got some that count differently "
            f"(up to {counts}); add a key 'step' to every row, or pass the metrics of one label."
        )
    return steps[0]


def _joined(history: History) -> History:
    """Joins leaves that share a block, which have the same drawn and mean rate at every step."""
    rate, mean = history.columns.get("rate"), history["expected_rate"]
    if rate is None:
        return history
    blocks: dict[Any, list[int]] = {}
    for leaf, label in enumerate(history.labels):
        drawn = rate[:, leaf]
        # Rates that are all 0 tell nothing: no step was taken, or the draws underflowed.
        recorded = (label, drawn.tobytes(), mean[:, leaf].tobytes())
        same = recorded if np.any(drawn > 0) else leaf
        blocks.setdefault(same, []).append(leaf)
    joined = history._of([leaves[0] for leaves in blocks.values()])
    return dataclasses.replace(
        joined,
        paths=tuple(tuple(history.paths[i][0] for i in leaves) for leaves in blocks.values()),
    )


def _columns(metrics: Any) -> dict[str, np.ndarray]:
    """Returns the columns that are drawn, as float arrays, without the prefix ``dart/``."""
    if isinstance(metrics, str | os.PathLike):
        path = Path(metrics)
        path = path / "metrics.csv" if path.is_dir() else path
        rows: Any = read_csv(path) if path.is_file() else []
        if not rows:
            raise ValueError(
                "metrics must be a CSV file with a header and at least one row, or a folder with a "
                f"metrics.csv, got {os.fspath(metrics)!r}; pass the path of such a file."
            )
    elif hasattr(metrics, "keys") and hasattr(metrics, "__getitem__"):
        names = {str(name).removeprefix("dart/"): name for name in metrics.keys()}  # noqa: SIM118
        columns = {short: np.asarray(metrics[names[short]]) for short in filter(_of_dart, names)}
        columns = {name: np.atleast_1d(column) for name, column in columns.items()}
        shapes = {column.shape for column in columns.values()}
        if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
            raise ValueError(
                f"metrics must have columns of one length, got the shapes {sorted(shapes)}; "
                "pass one value per recorded step."
            )
        return {name: column.astype(float) for name, column in columns.items()}
    elif isinstance(metrics, Iterable):
        rows = list(metrics)
    else:
        rows = [metrics]
    if not all(isinstance(row, dict) for row in rows):
        raise TypeError(
            "metrics must be a sequence of dicts, a mapping of columns or the path of a CSV "
            f"file, got {type(metrics).__name__}; record dartax.metrics(opt_state, params)."
        )
    return _stack(rows)


def _stack(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Converts rows to columns; a missing value becomes NaN."""
    kept = jax.device_get(
        [
            {short: row[name] for name in row if _of_dart(short := str(name).removeprefix("dart/"))}
            for row in rows
        ]
    )
    names = dict.fromkeys(name for row in kept for name in row)

    def value(row: dict[str, Any], name: str) -> float:
        try:
            return float("nan") if row.get(name) is None else float(row[name])
        except (TypeError, ValueError):
            raise TypeError(
                f"metrics must hold numbers, got {row[name]!r} for {name}; record "
                "dartax.metrics(opt_state, params)."
            ) from None

    return {name: np.array([value(row, name) for row in kept]) for name in names}


def _of_dart(name: str) -> bool:
    """Tells whether a column, named without the prefix ``dart/``, is drawn."""
    parts = str(name).split("/")
    return parts[-1] in ("step", *OF_DARTS) or any(part in OF_LEAVES for part in parts[:-1])
