"""dartax: learning rates as a learned Dirichlet distribution, for JAX."""

from dartax import contrib, dirichlet, inner, random
from dartax._dart import dart, scale_by_dart
from dartax._describe import describe
from dartax._distill import distill_schedule, scale_by_learning_rates
from dartax._inspect import (
    concentrations,
    expected_learning_rates,
    learning_rate_std,
    learning_rates,
    metrics,
)
from dartax._paper_dart import paper_dart
from dartax._state import ScaleByDartState
from dartax._version import __version__

__all__ = [
    "ScaleByDartState",
    "__version__",
    "concentrations",
    "contrib",
    "dart",
    "describe",
    "dirichlet",
    "distill_schedule",
    "expected_learning_rates",
    "inner",
    "learning_rate_std",
    "learning_rates",
    "metrics",
    "paper_dart",
    "random",
    "scale_by_dart",
    "scale_by_learning_rates",
]
