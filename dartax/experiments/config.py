"""The configuration of a run: a TOML file becomes a frozen dataclass.

``Config`` is the schema. Its field names are the TOML keys. Every number that affects a run,
including the seeds, is a field.
"""

import dataclasses
import difflib
import math
import os
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w

from dartax.experiments.files import write_whole


# Not a ValueError: tyro would catch one and print it in a box of its own.
class ConfigError(Exception):
    """An invalid configuration; the message says how to fix it."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network, a multilayer perceptron with ReLU."""

    hidden: tuple[int, ...] = (256, 256)
    """Width of every hidden layer."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its inner transform and its schedule."""

    name: Literal[
        "dart",
        "dart_averaged",
        "paper_dart",
        "adamw",
        "sgd",
        "adabelief",
        "cocob",
        "d_adaptation",
        "dowg",
        "lion",
        "mechanic",
        "momo_adam",
        "muon",
        "prodigy",
        "schedule_free_adamw",
        "schedule_free_dart",
        # Ablations.
        "dart_frozen",
        "dart_mean_field",
        "dart_no_carried_away",
        "dart_no_evidence",
        "dart_no_fall",
        "dart_no_room",
        "dart_no_fast_ramp",
        "dart_no_power",
        "dart_no_progress",
        "dart_no_ratchet",
        "dart_no_retreat",
        "dart_no_short_run",
        "dart_no_slack",
        "dart_no_surprise",
        "dart_no_tolerance",
        "dart_one_rate",
        "dart_schedule_ignored",
        "dart_shuffled",
        "dart_whole_memory",
    ] = "dart"
    """Name of the optimizer; those from dart_frozen on are dart without one of its parts."""
    inner: Literal["adam", "optax_adam", "sgd", "momentum", "lion", "muon"] = "adam"
    """Inner transform of dart. The second moment of optax_adam has a longer memory than adam."""
    blocks: Literal["tensor", "channel", "element"] = "tensor"
    """Size of a block of dart. Each block has its own learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the multiplier over the run: constant, or a decay to 0."""
    warmup: float = 0.0
    """Fraction of the run, in [0, 1), during which the multiplier grows from 0."""
    learning_rate: float = 1.0
    """Peak of the schedule: a multiplier for dart and paper_dart, a rate for other optimizers."""
    key: int = 0
    """Seed of the random draws."""
    options: dict[str, float] = dataclasses.field(default_factory=dict)
    """More keyword arguments of the optimizer, such as init_rate or weight_decay."""

    def __post_init__(self):
        if not 0 <= self.key < 2**32:
            raise ConfigError(
                f"optimizer.key must be an int in [0, 2**32), got {self.key}; pass 0."
            )
        if not 0 <= self.learning_rate < math.inf:
            raise ConfigError(
                "optimizer.learning_rate must be a non-negative number, got "
                f"{self.learning_rate}; pass 1.0 for dart, 0.001 for adamw."
            )
        if not 0 <= self.warmup < 1:
            raise ConfigError(
                "optimizer.warmup must be a part of the run in [0, 1), got "
                f"{self.warmup}; pass 0.05."
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Any key can be set on the command line, as in --optimizer.schedule cosine."""

    dataset: Literal["digits", "mnist"] = "digits"
    """Data set to train on."""
    epochs: int = 20
    """Passes over the training data. The schedule covers all of them."""
    batch_size: int = 64
    """Examples per step. An incomplete last batch of an epoch is dropped."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the data."""
    workdir: str = "runs/digits"
    """Run folder. If it already holds this run, the run is resumed."""
    mesh: tuple[int, ...] = ()
    """Devices along the data axis and, optionally, along the model axis. [] uses all devices."""
    log_steps: int = 20
    """Steps per row of metrics.csv. The last row of an epoch may cover fewer."""
    log: Literal["none", "tensorboard", "wandb"] = "none"
    """Additional log, besides metrics.csv: none, TensorBoard, or Weights & Biases."""
    checkpoint_seconds: float = 5.0
    """Minimum time between checkpoints. A checkpoint is only saved after a row of metrics.csv."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The network."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The optimizer."""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "log_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} must be an int of at least 1, got {getattr(self, name)}; raise it."
                )
        if len(self.mesh) > 2 or any(size < 1 for size in self.mesh):
            raise ConfigError(
                "mesh must hold one or two numbers of devices, each at least 1, got "
                f"{list(self.mesh)}; pass e.g. --mesh 4 2, or leave it out to use all."
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be an int in [0, 2**32), got {self.seed}; pass 0.")
        if not self.workdir or "\0" in self.workdir:
            raise ConfigError(f"workdir must be a folder, got {self.workdir!r}; pass e.g. runs/a.")
        if not self.workdir.isprintable() or any("\ud800" <= c <= "\udfff" for c in self.workdir):
            raise ConfigError(
                f"workdir must be printable UTF-8, got {self.workdir!a}; pass e.g. runs/a."
            )
        # (Path.expanduser raises for users that do not exist.)
        home = os.path.expanduser(self.workdir)  # noqa: PTH111
        object.__setattr__(self, "workdir", home)
        if not self.checkpoint_seconds >= 0:
            raise ConfigError(
                "checkpoint_seconds must be a non-negative number, got "
                f"{self.checkpoint_seconds}; pass 5.0."
            )
        if any(not 1 <= width <= 100_000 for width in self.model.hidden):
            raise ConfigError(
                f"model.hidden must hold widths from 1 to 100000, got {list(self.model.hidden)}; "
                "pass [] for a linear model."
            )


def nearest(name: str, known: Sequence[str]) -> str:
    """Ends a message about the unknown ``name``: suggests the nearest known one, or lists all."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"pass one of {', '.join(known)}."


def _convert(value: Any, kind: Any, name: str) -> Any:
    """Converts ``value`` from TOML to the annotated type ``kind``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _from_table(value, kind, name)
    if origin is Literal:
        if value not in arguments:
            known = [str(choice) for choice in arguments]
            raise ConfigError(
                f"{name} must be one of {', '.join(known)}, got {value!r}; "
                f"{nearest(str(value), known)}"
            )
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _convert(item, arguments[1], f"{name}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        # TOML allows integers that are too large for a float.
        return float(value) if abs(value) < 2**1023 else math.inf if value > 0 else -math.inf
    if origin is None and isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    expected = kind.__name__ if isinstance(kind, type) and origin is None else str(kind)
    raise ConfigError(f"{name} must be of type {expected}, got {value!r}; fix that value.")


def _from_table(table: Any, schema: type, prefix: str = "") -> Any:
    """Converts a TOML table to the dataclass ``schema``."""
    if not isinstance(table, dict):
        raise ConfigError(f"{prefix} must be a table, got {table!r}; write [{prefix}] above it.")
    hints = typing.get_type_hints(schema)
    values = {}
    for key, value in table.items():
        name = f"{prefix}.{key}" if prefix else key
        if key not in hints:
            raise ConfigError(f"{name} is not a key of the configuration; {nearest(key, [*hints])}")
        values[key] = _convert(value, hints[key], name)
    return schema(**values)


def load(path: str | Path, schema: type = Config) -> Any:
    """Reads a TOML file as the dataclass ``schema``.

    Raises:
      ConfigError: If the file is missing or is not TOML, a key is unknown, or a value is
        out of range.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"CONFIG must be a readable TOML file, got {str(path)!r} ({error.strerror}); "
            "pass e.g. configs/digits.toml."
        ) from error
    except (ValueError, RecursionError) as error:  # also bad UTF-8, 5,000 digits, deep nesting
        raise ConfigError(
            f"CONFIG must be valid TOML, got {str(path)!r} ({error}); fix that line."
        ) from error
    return _from_table(table, schema)


def save(config: Config, path: Path) -> None:
    """Writes ``config`` as TOML that :func:`load` can read."""
    write_whole(path, tomli_w.dumps(dataclasses.asdict(config)))
