"""Builds optax optimizers from their configuration."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

import dartax
from dartax.experiments import ablations
from dartax.experiments.config import ConfigError, OptimizerConfig, nearest

PyTree = Any

# Inner transforms of dart. They must not flip the sign.
INNER: dict[str, Callable[[], optax.GradientTransformation | None]] = {
    "adam": lambda: None,
    "optax_adam": optax.scale_by_adam,
    "sgd": optax.identity,
    "momentum": dartax.inner.momentum,
    "lion": dartax.inner.lion,
    "muon": dartax.inner.muon,
}


def mechanic(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float = 0.01, s_init: float = 1e-6
) -> optax.GradientTransformation:
    """Mechanic around AdamW. As in the paper, the rate of AdamW is only the schedule."""
    return optax.contrib.mechanize(
        optax.adamw(learning_rate), weight_decay=weight_decay, s_init=s_init
    )


def schedule_free_dart(key: jax.Array | int = 0) -> optax.GradientTransformation:
    """``dart`` whose momentum is the interpolation of schedule-free learning."""
    directions = dartax.inner.adam(b1=0.0, b2=0.99)
    return optax.contrib.schedule_free(
        dartax.dart(inner=directions, key=key), learning_rate=1.0, b1=0.9
    )


FACTORY: dict[str, Callable[..., optax.GradientTransformation]] = {
    "dart": dartax.dart,
    "dart_averaged": functools.partial(dartax.dart, averaged=True),
    "paper_dart": dartax.paper_dart,
    "adamw": optax.adamw,
    "sgd": optax.sgd,
    "adabelief": optax.adabelief,
    "cocob": optax.contrib.cocob,
    "d_adaptation": optax.contrib.dadapt_adamw,
    "dowg": optax.contrib.dowg,
    "lion": optax.lion,
    "mechanic": mechanic,
    "momo_adam": optax.contrib.momo_adam,
    "muon": optax.contrib.muon,
    "prodigy": optax.contrib.prodigy,
    "schedule_free_adamw": optax.contrib.schedule_free_adamw,
    "schedule_free_dart": lambda learning_rate, key: schedule_free_dart(key),
    **ablations.FACTORY,
}


SCHEDULE_FREE = ("schedule_free_adamw", "schedule_free_dart")


def has_rates(name: str) -> bool:
    """Tells whether dartax can read learned rates from the state of the optimizer."""
    return name in ("dart", "dart_averaged", "paper_dart", *ablations.FACTORY)


def schedule(
    config: OptimizerConfig, steps: int, peak: jax.typing.ArrayLike | None = None
) -> optax.ScalarOrSchedule:
    """Makes the schedule over ``steps`` updates; ``peak`` overrides ``config.learning_rate``."""
    peak = config.learning_rate if peak is None else peak
    warmup = round(config.warmup * steps)
    # Some transforms take a float, but no schedule.
    if config.schedule == "constant" and not warmup:
        return peak
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, 0.0, steps - warmup)
    else:
        after = lambda count: peak * optax.cosine_decay_schedule(1.0, steps - warmup)(count)  # noqa: E731
    if not warmup:
        return after
    # The warmup starts above 0, because an update with rate 0 would be wasted.
    before = lambda count: peak * (count + 1) / (warmup + 1)  # noqa: E731
    return optax.join_schedules([before, after], [warmup])


def _takes_number(parameter: inspect.Parameter) -> bool:
    """Tells whether an option can be a number, as the options in a configuration are."""
    default_is_number = isinstance(parameter.default, int | float)
    return default_is_number or "float" in str(parameter.annotation)


def build(
    config: OptimizerConfig,
    steps: int,
    *,
    key: jax.Array | None = None,
    overrides: Mapping[str, jax.typing.ArrayLike] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer for a run of ``steps`` updates.

    Args:
      config: The configuration of the optimizer.
      steps: Length of the schedule.
      key: Replaces ``config.key``; may be traced.
      overrides: Options that replace those of ``config``; may be traced.

    Raises:
      ConfigError: If an option is unknown or out of range.
    """
    factory = FACTORY[config.name]
    signature = inspect.signature(factory).parameters
    arguments: dict[str, Any] = {}
    if "key" in signature:
        arguments["key"] = config.key if key is None else key
    if "inner" in signature:
        arguments["inner"] = INNER[config.inner]()
    elif config.inner != OptimizerConfig.inner:
        raise ConfigError(
            f"optimizer.inner must be left out under {config.name}, which has its own direction, "
            f"got {config.inner!r}; set optimizer.name to 'dart' or delete the line."
        )
    if "blocks" in signature:
        arguments["blocks"] = config.blocks
    elif config.blocks != OptimizerConfig.blocks:
        raise ConfigError(
            f"optimizer.blocks must be left out under {config.name}, which has one rate for each "
            f"tensor, got {config.blocks!r}; set optimizer.name to 'dart' or delete the line."
        )
    known = [
        name
        for name, parameter in signature.items()
        if name not in ("learning_rate", *arguments) and _takes_number(parameter)
    ]
    options = {**config.options, **(overrides or {})}
    peak = options.pop("learning_rate", None)
    for name in options:
        if name not in known:
            raise ConfigError(
                f"optimizer.options.{name} is not an option of {config.name}; "
                f"{nearest(name, known)}"
            )
    try:
        optimizer = factory(
            learning_rate=schedule(config, steps, peak),
            **arguments,
            **options,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.options: {error}") from error
    return optax.with_extra_args_support(optimizer)


def eval_params(config: OptimizerConfig, opt_state: PyTree, params: PyTree) -> PyTree:
    """Returns the parameters for evaluation, which differ for schedule-free optimizers."""
    if config.name in SCHEDULE_FREE:
        return optax.contrib.schedule_free_eval_params(opt_state, params)
    return params
