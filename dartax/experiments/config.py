"""The configuration of a run: TOML in, one frozen dataclass out.

``Config`` is the schema: field names are the TOML keys, and every number that decides a
run, its seeds included, is a field.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import math
import re
import tomllib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
import tyro

from dartax.experiments.files import write_whole

# Its keys are those of the optimizer, which only the optimizer knows.
OPTIONS = "--optimizer.options"


class ConfigError(ValueError):
    """A configuration that no run can be made of; the message says how to mend it."""


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
        "dart_frozen",
        "dart_mean_field",
        "dart_no_ratchet",
        "dart_no_slack",
        "dart_one_rate",
        "dart_shuffled",
        "dart_whole_memory",
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
    ] = "dart"
    """Which optimizer."""
    inner: Literal["adam", "optax_adam", "sgd", "momentum", "lion"] = "adam"
    """Direction of the step under dart; the others have their own. adam is dart's own default,
    optax_adam that of optax, whose second moment has a longer memory."""
    blocks: Literal["tensor", "channel", "element"] = "tensor"
    """What has a rate of its own under dart."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Decay of the multiplier to 0 over the run."""
    warmup: float = 0.0
    """Part of the run over which the multiplier first grows from 0, in [0, 1)."""
    learning_rate: float = 1.0
    """First value of the schedule: a multiplier for dart and paper_dart, a rate for the others."""
    key: int = 0
    """Seed of the draws."""
    options: dict[str, float] = dataclasses.field(default_factory=dict)
    """Further keyword arguments of the optimizer, such as init_rate or weight_decay."""

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
    """One run. Nested keys take a dot on the command line: --optimizer.schedule cosine.

    As one of several processes: --distributed, where JAX knows the cluster, or
    --coordinator HOST:PORT --processes N --process-id I. All of them see one workdir.
    """

    dataset: Literal["digits", "mnist"] = "digits"
    """What to learn."""
    epochs: int = 20
    """Passes over the training data; the schedule spans them all."""
    batch_size: int = 64
    """Examples per step; a last, smaller batch of an epoch is dropped."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the data."""
    workdir: str = "runs/digits"
    """Run folder; a run that it already holds is resumed."""
    mesh: tuple[int, ...] = ()
    """Devices that share a batch and, if given, those that share each parameter; [] takes all."""
    log_steps: int = 20
    """Steps per row of metrics.csv; an epoch's last row may cover fewer."""
    log: Literal["none", "tensorboard", "wandb"] = "none"
    """Where the rows go beside metrics.csv: nowhere, to TensorBoard, to Weights & Biases."""
    checkpoint_seconds: float = 5.0
    """Least time between checkpoints, which are taken where metrics.csv has a row."""
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
    """The end of a message about the unknown ``name``: the nearest known one, or all."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}."


def _convert(value: Any, kind: Any, name: str) -> Any:
    """``value`` from TOML as the annotated type ``kind``."""
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
        # An int may be of any size: one that no float holds is as good as infinite.
        return float(value) if abs(value) < 2**1023 else math.inf if value > 0 else -math.inf
    if origin is None and isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    expected = kind.__name__ if isinstance(kind, type) and origin is None else str(kind)
    raise ConfigError(f"{name} must be of type {expected}, got {value!r}; mend that value.")


def _from_table(table: Any, schema: type, prefix: str = "") -> Any:
    """The dataclass ``schema`` from a TOML table; unknown keys name the nearest known one."""
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
      ConfigError: If the file is missing, is not TOML, or holds an unknown key or a value
        out of range.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"CONFIG must be a readable TOML file, got {str(path)!r} ({error.strerror}); "
            "pass e.g. configs/digits.toml."
        ) from error
    except (ValueError, RecursionError) as error:  # TOML, UTF-8, an int of 5,000 digits, [[[[
        raise ConfigError(
            f"CONFIG must be valid TOML, got {str(path)!r} ({error}); mend that line."
        ) from error
    return _from_table(table, schema)


def override(config: Config, arguments: Sequence[str], prog: str) -> Config:
    """``config`` with ``--key value`` pairs applied, which tyro parses.

    Nested keys take a dot, lists any number of values, and a table a further dot
    (``--optimizer.options.init-rate 1e-5``) or a pair (``--optimizer.options init_rate 1e-5``).
    With ``--help``, exits with a list of the keys.

    Raises:
      ConfigError: If a key is unknown, or a value is of another type or out of range.
    """
    words: list[str] = []
    for argument in arguments:
        if words and words[-1] == OPTIONS:
            words[-1] = f"{OPTIONS}.{argument}"
        else:
            words.append(argument)
    flags = [word.partition("=")[0] for word in words if word.startswith(f"{OPTIONS}.")]
    # tyro knows the keys of a table by what the table holds; a value follows, or is missed.
    named = {flag.removeprefix(f"{OPTIONS}.").replace("-", "_"): math.nan for flag in flags}
    options = {**named, **config.optimizer.options}
    default = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, options=options)
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            changed, unknown = tyro.cli(
                Config, prog=prog, default=default, args=words, return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:  # after --help
            raise
        raise _mistake(stop, said.getvalue(), prog) from stop
    if unknown:
        word, known = unknown[0].partition("=")[0], list(_flags(dataclasses.asdict(config)))
        if word.startswith("--"):
            raise ConfigError(f"{word} is not a key of the configuration; {nearest(word, known)}")
        raise ConfigError(
            f"CONFIG must be followed by --key value pairs, got {word!r} without a key; leave it "
            "out, or write its --key before it."
        )
    return changed


def _flags(table: dict[str, Any], prefix: str = "--") -> Iterator[str]:
    """The flag of every key."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flags(value, f"{prefix}{key}.")
        else:
            yield prefix + key.replace("_", "-")


def _mistake(stop: SystemExit, said: str, prog: str) -> ConfigError:
    """What stopped tyro: an error of ours, or else what stands first in the box that it drew."""
    error: BaseException | None = stop
    while error is not None:
        if isinstance(error, ConfigError):
            return error
        error = error.__context__
    plain = re.sub(r"\x1b\[[\d;]*m", "", said)
    title, *lines = [line.strip("│| ") for line in plain.splitlines() or [said]]
    # Rules end the part, and where the box has no borders one begins it too.
    parts = itertools.groupby(lines, key=lambda line: bool(line.strip("╰╯─-")))
    part = next((" ".join(part) for is_text, part in parts if is_text), title)
    told = part.rstrip(".").replace(". ", "; ")
    return ConfigError(f"{told}; {prog} --help lists what there is.")


def save(config: Config, path: Path) -> None:
    """Writes ``config`` as TOML that :func:`load` reads back."""
    write_whole(path, tomli_w.dumps(dataclasses.asdict(config)))
