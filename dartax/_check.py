"""Argument checks: one sentence that names the argument, the constraint, the value, the fix.

Python and NumPy numbers are compared with their range. Scalar arrays and tracers pass, so that
``jax.jit`` and ``optax.inject_hyperparams`` can hand over any hyperparameter. Where an array may
have been rounded out of its range, ``init`` looks at its value, unless it is traced.
"""

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

# The largest value accepted, just below float32's largest. NaN fails every check.
LARGEST = 3.4e38
# The hypergradients of still smaller rates are so small that their squares can be 0 in float32.
LEAST_RATE = 1e-12

Function = TypeVar("Function", bound=Callable[..., Any])


def refused(reasons: dict[str, tuple[str, str]]) -> Callable[[Function], Function]:
    """A decorator that refuses keyword arguments: name to what they must be, and the fix."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in reasons.keys() & kwargs.keys():
                must, fix = reasons[name]
                raise TypeError(f"{name} must {must}, got {name}={kwargs[name]!r}; {fix}.")
            return function(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate


def renamed(**names: str) -> dict[str, tuple[str, str]]:
    """Reasons to refuse old names of arguments, each with its new name."""
    return {old: (f"be given by its new name, {new}", f"pass {new}") for old, new in names.items()}


def is_number(value: Any) -> bool:
    """Whether ``value`` is a Python or NumPy real number, whose value can be checked."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def is_function(value: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether ``value`` is to be called. A pytree that can be called, such as a module, is not."""
    return callable(value) and jax.tree_util.all_leaves([value])


def number(name: str, value: Any, constraint: str, holds: Callable[[Any], bool], fix: str) -> None:
    """Checks that ``value`` is a finite real number for which ``holds`` is true."""
    if is_number(value):
        if not (-LARGEST <= value <= LARGEST and holds(value)):
            raise ValueError(f"{name} must be {constraint}, got {value}; {fix}.")
    elif not (
        isinstance(value, jax.Array | np.ndarray)
        and jnp.issubdtype(value.dtype, jnp.number)
        and not jnp.issubdtype(value.dtype, jnp.complexfloating)
    ):
        if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.complexfloating):
            fix = "with optax.inject_hyperparams pass hyperparam_dtype=jnp.float32"
        raise TypeError(f"{name} must be {constraint}, got {value!r}; {fix}.")
    elif value.shape != ():
        raise ValueError(f"{name} must be {constraint}, got shape {value.shape}; {fix}.")


def within(name: str, value: Any, interval: str, fix: str) -> None:
    """Checks a number in a closed interval, such as ``"[0.1, 10]"``."""
    low, high = map(float, interval.strip("[]").split(","))
    number(name, value, f"a number in {interval}", lambda v: low <= v <= high, fix)


def below(low_name: str, low: Any, high_name: str, high: Any) -> None:
    """Checks ``low < high`` where both can be compared."""
    if is_number(low) and is_number(high) and not low < high:
        raise ValueError(
            f"{low_name} must be below {high_name}, got {low_name}={low} and {high_name}={high}; "
            f"lower {low_name} or raise {high_name}."
        )


def rates(init_rate: Any, min_rate: Any, rate_budget: Any) -> None:
    """Checks ``0 <= min_rate < init_rate < rate_budget``."""
    positive = lambda v: v > 0  # noqa: E731
    least = f"a number of at least {LEAST_RATE}"
    number("init_rate", init_rate, least, lambda v: v >= LEAST_RATE, "1e-4 is usual")
    number("rate_budget", rate_budget, "a positive number", positive, "1.0 is usual")
    number("min_rate", min_rate, "a non-negative number", lambda v: v >= 0, "pass 0.0")
    below("init_rate", init_rate, "rate_budget", rate_budget)
    below("min_rate", min_rate, "init_rate", init_rate)


def first_rate(
    init_rate: Any,
    min_rate: Any,
    rate_budget: Any,
    concentration: Any,
    num_blocks: int,
    max_concentration: float,
) -> None:
    """Checks that the first mean rate of K blocks leaves the slack a concentration in its range.

    The values of scalar arrays are checked, too, unless they are traced.
    """
    init_rate, min_rate, rate_budget, concentration = (
        value if isinstance(value, jax.core.Tracer) else float(value)
        for value in (init_rate, min_rate, rate_budget, concentration)
    )
    below("min_rate", min_rate, "init_rate", init_rate)
    if all(map(is_number, (concentration, init_rate, min_rate, rate_budget))):
        least = float(concentration) * (rate_budget - min_rate) / max_concentration
        if not np.float32(init_rate) - np.float32(min_rate) >= least:
            raise ValueError(
                f"init_rate must be at least {least:.3g} above min_rate, both rounded to float32, "
                f"got init_rate={init_rate} and min_rate={min_rate}; raise init_rate."
            )
    if all(map(is_number, (init_rate, min_rate, rate_budget))):
        most = min_rate + (rate_budget - min_rate) / max(num_blocks, 1)
        if not init_rate < most:
            raise ValueError(
                f"init_rate must be below {most:g}, the mean rate when {num_blocks} blocks "
                f"share all of rate_budget={rate_budget}, got {init_rate}; lower init_rate."
            )


def decay(name: str, value: Any, usual: float = 0.9) -> None:
    """Checks the decay of a moving average."""
    number(name, value, "a number in [0, 1)", lambda v: 0 <= v < 1, f"{usual} is usual")


def rounded_memory_decay(value: Any) -> None:
    """Checks that the decay in a scalar array, unless it is traced, was not rounded to 1."""
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value >= 1:
        raise ValueError(
            f"memory_decay must be below 1, got {value.astype(jnp.float32)} as {value.dtype}; with "
            "optax.inject_hyperparams pass hyperparam_dtype=jnp.float32."
        )


def eps(value: Any) -> None:
    """Checks what keeps a root from dividing by 0: no subnormal number, which may count as 0."""
    tiny = float(np.finfo(np.float32).tiny)
    number("eps", value, f"a number of at least {tiny:.3g}", lambda v: v >= tiny, "1e-8 is usual")


def schedule(name: str, value: Any) -> None:
    """Checks a float or an optax schedule."""
    if not callable(value):
        number(
            name,
            value,
            "a non-negative number or an optax schedule",
            lambda v: v >= 0,
            "pass 1.0 or optax.linear_schedule(1.0, 0.0, steps)",
        )


def not_a_rate(value: Any, greatest: float | None) -> None:
    """Warns of a number or schedule, of known ``greatest`` value, that looks like a rate.

    Raises:
      ValueError: If a schedule is negative throughout.
    """
    if greatest is not None and greatest < 0:
        raise ValueError(
            f"learning_rate must not be negative, got a schedule that never exceeds {greatest:.3g};"
            " pass one that falls from 1 to 0."
        )
    if greatest is not None and 0 < greatest <= np.float32(0.1):
        got = f"{value}" if is_number(value) else f"a schedule that never exceeds {greatest:.3g}"
        warnings.warn(
            "learning_rate must be a multiplier of the rates that dart learns, not a rate, got "
            f"{got}, which scales down every step; leave it out, or pass a schedule that falls "
            "from 1 to 0.",
            stacklevel=_frames_of_dartax() + 1,
        )


def _frames_of_dartax() -> int:
    """How many of the innermost frames, from the caller on, belong to this package."""
    frame: Any = sys._getframe(1)
    count = 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith("dartax."):
        frame, count = frame.f_back, count + 1
    return count


def scalar(name: str, value: Any, fix: str) -> Any:
    """Checks a real scalar, traced or not, of any value, and returns it."""
    if value is None or not (hasattr(value, "dtype") or isinstance(value, int | float)):
        raise TypeError(f"{name} must be a real scalar, got {value!r}; {fix}.")
    if jnp.shape(value) != () or jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
        kind = f"{jnp.result_type(value)} of shape {list(jnp.shape(value))}"
        raise TypeError(f"{name} must be a real scalar, got {kind}; {fix}.")
    return value


def mask(value: Any, name: str = "mask") -> None:
    """Checks ``None``, a tree of bools, or a function that gives one."""
    if is_function(value):
        return
    for leaf in jax.tree.leaves(value):
        is_bool = not isinstance(leaf, jax.core.Tracer) and np.asarray(leaf).dtype.kind == "b"
        if not is_bool or np.ndim(leaf):
            raise TypeError(
                f"{name} must be a tree of bools, or a function from params to one, got the leaf "
                f"{leaf!r}; pass e.g. lambda params: jax.tree.map(lambda p: p.ndim > 1, params)."
            )


def chosen(value: Any, tree: Any, name: str = "mask") -> Any:
    """The bools that ``value``, which passed :func:`mask`, gives for every leaf of ``tree``."""
    found = value(tree) if is_function(value) else value
    mask(found, name)
    try:
        return jax.tree.broadcast(found, tree)
    except (ValueError, TypeError) as error:
        got = "None" if found is None else jax.tree.structure(found)
        raise ValueError(
            f"{name} must give a tree with the structure of params or a prefix of it, got {got}; "
            "pass e.g. lambda params: jax.tree.map(lambda p: p.ndim > 1, params)."
        ) from error


def weight_decay(value: Any) -> None:
    """Checks the coefficient of a weight decay."""
    number(
        "weight_decay", value, "a non-negative number", lambda v: v >= 0, "pass 0.0 for no decay"
    )


def flag(name: str, value: Any) -> None:
    """Checks a switch, which cannot be traced."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}; leave it out for False.")


def one_of(name: str, value: Any, names: Sequence[str]) -> None:
    """Checks a name out of several."""
    if not isinstance(value, str) or value not in names:
        known = " or ".join(map(repr, names))
        raise ValueError(f"{name} must be {known}, got {value!r}; pass {names[0]!r}.")


def blocks(value: Any, names: Sequence[str]) -> None:
    """Checks that ``value``, if it is a string, is one of ``names``."""
    if isinstance(value, str) and value not in names:
        raise ValueError(
            f"blocks must be one of {', '.join(map(repr, names))}, a tree of labels or a function "
            f"from a path to a label, got {value!r}; pass lambda path: 0 for one rate for all."
        )


def transformation(name: str, value: Any) -> None:
    """Checks an optional ``optax.GradientTransformation``."""
    if value is not None and not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got {value!r}; "
            f"pass e.g. optax.scale_by_adam(), or optax.identity() for plain gradients."
        )


def floating_dtype(name: str, value: Any) -> None:
    """Checks a floating dtype, or its name, with the range of float32.

    In float16 and in 8 bits, small steps and moments would be 0.
    """
    try:
        # NumPy reads None as float64.
        dtype = None if value is None else jnp.dtype(value)
        wide = dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
        if wide and jnp.finfo(dtype).tiny <= jnp.finfo(jnp.float32).tiny:
            return
    except (TypeError, ValueError):  # NumPy's for arrays
        pass
    raise TypeError(
        f"{name} must be a floating dtype with the range of float32, got {value!r}; pass "
        "'bfloat16' or 'float32'."
    )
