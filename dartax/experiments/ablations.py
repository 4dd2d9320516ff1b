"""Variants of ``dart``, each without one of its parts.

Parts that an argument of ``dart`` can turn off need no variant: ``concentration=1e4`` makes nearly
every draw equal to the mean, and ``memory_decay=0`` gives the one-step hypergradient.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from dartax import _dart
from dartax._averages import Number
from dartax._draw import Draw
from dartax._rule import Context, Rule
from dartax._transform import scale_by_dirichlet
from dartax.inner import adam


def frozen(rule: Rule) -> Rule:
    """Keeps the initial concentrations."""
    return rule._replace(
        learn=lambda current, draw, h, moments, context: (current, moments, jnp.ones_like(h))
    )


def shuffled(rule: Rule) -> Rule:
    """Makes each block learn from the hypergradient of another block."""

    def learn(current, draw, h, moments, context):
        return rule.learn(current, draw, jnp.roll(h, 1), moments, context)

    return rule._replace(learn=learn)


def mean_field(rule: Rule) -> Rule:
    """Uses the gradient of the mean rate, as if d log gamma / d log concentration were 1."""

    def learn(current, draw, h, moments, context):
        draw = draw._replace(log_derivative=jnp.ones_like(draw.log_derivative))
        return rule.learn(current, draw, h, moments, context)

    return rule._replace(learn=learn)


def no_progress(rule: Rule) -> Rule:
    """Takes the past steps for a free walk, however far they got."""

    def learn(current, draw, h, moments, context):
        context = context._replace(progress=jnp.ones_like(h))
        return rule.learn(current, draw, h, moments, context)

    return rule._replace(learn=learn)


def no_power(rule: Rule) -> Rule:
    """Takes nothing for noise."""

    def learn(current, draw, h, moments, context):
        return rule.learn(current, draw, h, moments, context._replace(noise=jnp.zeros_like(h)))

    return rule._replace(learn=learn)


def no_evidence(rule: Rule) -> Rule:
    """Ignores progress and noise: rates grow unless the hypergradient objects, and seldom fall."""

    def learn(current, draw, h, moments, context):
        most = context._replace(progress=jnp.full_like(h, 1.5), noise=jnp.zeros_like(h))
        return rule.learn(current, draw, h, moments, most)

    return rule._replace(learn=learn)


def schedule_ignored(rule: Rule) -> Rule:
    """Does not count the fall of the schedule toward the fall that noise asks for."""

    def learn(current, draw, h, moments, context):
        return rule.learn(current, draw, h, moments, context._replace(schedule_fall=0.0))

    return rule._replace(learn=learn)


def _nowhere(context: Context) -> jax.Array:
    return jnp.zeros_like(context.progress)


def with_constants(**constants: Any) -> Callable[[Rule], Rule]:
    """Gives constants or functions of ``dartax/_dart.py`` other values."""

    def change(rule):
        def learn(*arguments):
            with mock.patch.multiple(_dart, **constants):  # while the step is traced
                return rule.learn(*arguments)

        return rule._replace(learn=learn)

    return change


def no_ratchet(rule: Rule) -> Rule:
    """Leaves the memory as it is where a rate falls."""

    def learn(current, draw, h, moments, context):
        moved, moments, _ = rule.learn(current, draw, h, moments, context)
        return moved, moments, jnp.ones_like(h)

    return rule._replace(learn=learn)


def no_slack(rule: Rule) -> Rule:
    """Always spends the whole budget, and learns only its allocation."""

    def init(num_blocks):
        return rule.init(num_blocks)[:-1]

    def learn(current, draw, h, moments, context):
        # The rule expects the slack: pass one that is too small to matter.
        padded = Draw(*(jnp.append(leaf, 0.0) for leaf in draw))
        with mock.patch.object(_dart, "room", return_value=1.0):
            _, moments, _ = rule.learn(jnp.append(current, 1.0), padded, h, moments, context)
        change = moments.hyper_change - jnp.mean(moments.hyper_change)
        moments = moments._replace(hyper_change=change)
        moved = jnp.clip(current * jnp.exp(change), _dart.MIN_CONCENTRATION, 1e6)
        return moved, moments, jnp.minimum(jnp.exp(change), 1.0)

    return rule._replace(init=init, learn=learn)


def _factory(
    change: Callable[[Rule], Rule] = lambda rule: rule,
    blocks: Callable[[str], int] | None = None,
    whole_memory: bool = False,
) -> Callable[..., optax.GradientTransformation]:
    """Makes a factory with the arguments of ``dart`` that ablations need."""

    def factory(
        learning_rate: optax.ScalarOrSchedule = 1.0,
        *,
        inner: optax.GradientTransformation | None = None,
        init_rate: Number = 1e-4,
        rate_budget: Number = 1.0,
        concentration: Number = 10.0,
        memory_decay: Number = 0.999,
        key: jax.Array | int = 0,
    ) -> optax.GradientTransformation:
        rule = _dart.dart_rule(concentration, init_rate, 0.0, rate_budget)
        transform = scale_by_dirichlet(
            change(rule),
            adam() if inner is None else inner,
            learning_rate=learning_rate,
            min_rate=0.0,
            rate_budget=rate_budget,
            memory_decay=memory_decay,
            memory_dtype="float32",
            whole_memory=whole_memory,
            labels=blocks,
            key=key,
            implementation="fused",
        )
        return optax.chain(transform, optax.scale(-1.0))

    return factory


FACTORY: dict[str, Callable[..., optax.GradientTransformation]] = {
    "dart_frozen": _factory(frozen),
    "dart_shuffled": _factory(shuffled),
    "dart_mean_field": _factory(mean_field),
    "dart_no_ratchet": _factory(no_ratchet),
    "dart_no_slack": _factory(no_slack),
    "dart_no_progress": _factory(no_progress),
    "dart_no_power": _factory(no_power),
    "dart_no_evidence": _factory(no_evidence),
    "dart_no_room": _factory(with_constants(room=lambda _: 1.0)),
    "dart_no_fast_ramp": _factory(with_constants(SMALL_STEP=0.0)),
    "dart_no_short_run": _factory(with_constants(SHORT_RUN=0.0)),
    "dart_no_tolerance": _factory(with_constants(TOLERANCE=0.0)),
    "dart_no_fall": _factory(with_constants(FALL=0.0)),
    "dart_no_carried_away": _factory(with_constants(carried_away=_nowhere)),
    "dart_no_retreat": _factory(with_constants(retreat=jnp.zeros_like)),
    "dart_no_surprise": _factory(with_constants(SURPRISE=1e30)),
    "dart_schedule_ignored": _factory(schedule_ignored),
    "dart_one_rate": _factory(blocks=lambda path: 0),
    "dart_whole_memory": _factory(whole_memory=True),
}
