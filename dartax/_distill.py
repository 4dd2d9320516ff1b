"""Learned rates as plain schedules, for a later run without DART.

The mean rates that a run recorded, of every block over its steps, need no hypergradient and no
draw: any optax optimizer can be given them.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dartax import _check
from dartax._history import load
from dartax._schedule import value_at
from dartax._trees import PyTree, path_names


def distill_schedule(run: Any) -> dict[str, optax.Schedule]:
    """Turns the rates that a run learned into an optax schedule for every leaf.

    Between the recorded steps the logarithm of the rate is interpolated linearly (the rate itself
    next to a rate of 0); beyond the first and the last one the rate stays what it is there.

    Args:
      run: What was recorded of a run, in any form that :mod:`dartax.plot` takes: a sequence of
        ``dartax.metrics(opt_state, params)``, a mapping of columns, or a path.
        What is read is ``step``, ``expected_rate/PATH`` and, to tell which leaves share a block,
        ``rate/PATH``, with or without the prefix ``dart/``.
        Missing rates (``None`` or NaN) are left out, and so are rates within tensors.

    Returns:
      A schedule for every PATH, such as ``"Dense_0/kernel"``: a function of the number of updates
      before the present one, as optax counts, safe inside ``jax.jit``. The user's schedule of the
      recorded run is part of the rates. For :func:`scale_by_learning_rates`.

    Raises:
      ValueError: If no rates were recorded, or the steps do not increase.
      TypeError: If ``run`` is of another kind.

    Examples:
      Adam with the rates that DART learned:

      >>> import dartax, jax, jax.numpy as jnp, optax
      >>> def loss(params):  # a flat and a steep direction
      ...     return 0.05 * jnp.sum(params["flat"] ** 2) + 4 * jnp.sum(params["steep"] ** 2)
      >>> metrics = jax.jit(dartax.metrics)
      >>> def train(optimizer, run=None, steps=300):
      ...     params = {"flat": jnp.ones(3), "steep": jnp.ones(3)}
      ...     state, update = optimizer.init(params), jax.jit(optimizer.update)
      ...     grad = jax.jit(jax.grad(loss))
      ...     for step in range(1, steps + 1):
      ...         updates, state = update(grad(params), state, params)
      ...         params = optax.apply_updates(params, updates)
      ...         if run is not None and step % 10 == 0:
      ...             run.append(metrics(state, params))
      ...     return params
      >>> run = []
      >>> _ = train(dartax.dart(optax.linear_schedule(1.0, 0.0, 300)), run)
      >>> schedules = dartax.distill_schedule(run)
      >>> sorted(schedules)
      ['flat', 'steep']
      >>> adam = optax.scale_by_adam(b2=0.99)  # the directions inside dart
      >>> params = train(optax.chain(adam, dartax.scale_by_learning_rates(schedules)))
      >>> bool(loss(params) < 1e-5)
      True
    """
    history = load(run)
    for before, after in itertools.pairwise(history.step):
        if not before < after:
            raise ValueError(
                f"run must have increasing steps, got {after:g} after {before:g}; pass one run, "
                "in the order in which it was recorded."
            )
    schedules: dict[str, optax.Schedule] = {}
    for paths, rates in zip(history.paths, history["expected_rate"].T, strict=True):
        known = np.isfinite(rates)
        if known.any():
            schedule = _interpolation(history.step[known], rates[known])
            schedules |= dict.fromkeys(paths, schedule)
    return schedules


def _interpolation(steps: np.ndarray, rates: np.ndarray) -> optax.Schedule:
    """The schedule through ``rates``; those of row i were used by update number ``steps[i]``."""
    positive = rates > 0
    log_rates = np.log(np.where(positive, rates, 1.0))

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        # The first update has number 1, and a count of 0 before it.
        number = jnp.asarray(count, jnp.float32) + 1

        def interpolate(values: np.ndarray) -> jax.Array:
            return jnp.interp(number, *(jnp.asarray(x, jnp.float32) for x in (steps, values)))

        if positive.all():
            return jnp.exp(interpolate(log_rates))
        beside_zero = interpolate(positive) < 1
        return jnp.where(beside_zero, interpolate(rates), jnp.exp(interpolate(log_rates)))

    return schedule


def scale_by_learning_rates(
    schedules: Mapping[str, optax.ScalarOrSchedule],
) -> optax.GradientTransformation:
    """Multiplies the direction of every leaf by minus its own rate.

    It is ``optax.scale_by_learning_rate`` with a rate for every leaf. Weight decay in proportion
    to the rates, as ``dartax.dart`` has it, stands before it in the chain:

    ```python
    optax.chain(
        optax.scale_by_adam(b2=0.99),
        optax.add_decayed_weights(0.1),
        dartax.scale_by_learning_rates(schedules),
    )
    ```

    Args:
      schedules: An optax schedule, or a non-negative number, for the path of every leaf, such as
        ``"Dense_0/kernel"``; from :func:`distill_schedule`.

    Returns:
      An ``optax.GradientTransformation`` whose state is an ``optax.ScaleByScheduleState``.

    Raises:
      ValueError: If a number is negative, or, by ``init``, if a leaf has no schedule.
      TypeError: If an argument has the wrong type.
    """
    if not isinstance(schedules, Mapping):
        raise TypeError(
            f"schedules must map paths to schedules, got {schedules!r}; pass what "
            "dartax.distill_schedule returned."
        )
    for path, schedule in schedules.items():
        _check.schedule(f"schedules[{path!r}]", schedule)

    def paths_of(tree: PyTree) -> list[str]:
        for path in path_names(tree):
            if path not in schedules:
                raise ValueError(
                    "schedules must have one for every leaf of the parameters, got none for "
                    f"'{path}'; add it, or freeze the leaf with optax.partition and "
                    "optax.set_to_zero."
                )
        return path_names(tree)

    def init_fn(params: PyTree) -> optax.ScaleByScheduleState:
        paths_of(params)
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: PyTree, state: optax.ScaleByScheduleState, params: PyTree = None
    ) -> tuple[PyTree, optax.ScaleByScheduleState]:
        del params

        leaves, structure = jax.tree.flatten(updates)
        rates = [
            value_at(schedules[path], state.count, f"schedules[{path!r}]")
            for path in paths_of(updates)
        ]
        # In float32 at least: in float16 a small rate would be 0.
        leaves = [(-r * u).astype(u.dtype) for r, u in zip(rates, leaves, strict=True)]
        updates = jax.tree.unflatten(structure, leaves)
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init_fn, update_fn)
