"""An optax optimizer from its configuration."""

import inspect
from collections.abc import Callable
from typing import Any

import optax

import dartax
from dartax.experiments.config import ConfigError, OptimizerConfig, nearest

# Directions for dart: none of them flips the sign.
INNER: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "sgd": optax.identity,
    "momentum": lambda: optax.trace(decay=0.9),
    "lion": optax.scale_by_lion,
}

FACTORY: dict[str, Callable[..., optax.GradientTransformation]] = {
    "dart": dartax.dart,
    "paper_dart": dartax.paper_dart,
    "adamw": optax.adamw,
    "sgd": optax.sgd,
}


def schedule(config: OptimizerConfig, steps: int) -> optax.ScalarOrSchedule:
    """The multiplier over ``steps`` updates."""
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "linear":
        return optax.linear_schedule(config.learning_rate, 0.0, steps)
    return optax.cosine_decay_schedule(config.learning_rate, steps)


def _takes_number(parameter: inspect.Parameter) -> bool:
    """Whether an option can be a number: others cannot be written in a configuration."""
    default_is_number = isinstance(parameter.default, int | float)
    return default_is_number or "float" in str(parameter.annotation)


def build(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer for a run of ``steps`` updates.

    Raises:
      ConfigError: If an option is unknown to the optimizer or out of its range.
    """
    factory = FACTORY[config.name]
    arguments: dict[str, Any] = {}
    if config.name in ("dart", "paper_dart"):
        arguments["key"] = config.key
    if config.name == "dart":
        arguments["inner"] = INNER[config.inner]()
    elif config.inner != OptimizerConfig.inner:
        raise ConfigError(
            f"optimizer.inner must be left out under {config.name}, which has its own direction, "
            f"got {config.inner!r}; set optimizer.name to 'dart' or delete the line."
        )
    known = [
        name
        for name, parameter in inspect.signature(factory).parameters.items()
        if name not in ("learning_rate", *arguments) and _takes_number(parameter)
    ]
    for name in config.options:
        if name not in known:
            raise ConfigError(
                f"optimizer.options.{name} is not an option of {config.name}; "
                f"{nearest(name, known)}"
            )
    try:
        return factory(
            learning_rate=schedule(config, steps),
            **arguments,
            **config.options,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.options: {error}") from error
