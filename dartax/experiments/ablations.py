"""Variants of ``dart``, each without one of its parts."""

from collections.abc import Callable

import optax

FACTORY: dict[str, Callable[..., optax.GradientTransformation]] = {}
