"""What goes beyond a rate for every tensor."""

from dartax.contrib._shares import (
    GRANULARITIES,
    ScaleBySharesState,
    factor_variances,
    mean_factors,
    scale_by_shares,
    used_factors,
)

__all__ = [
    "GRANULARITIES",
    "ScaleBySharesState",
    "factor_variances",
    "mean_factors",
    "scale_by_shares",
    "used_factors",
]
