"""Directions for ``dart(inner=...)`` around which a step costs less.

Any optax transform can give the directions of DART. These are optax's ``scale_by_adam``, ``trace``,
``scale_by_lion``, and Muon; they can also stand alone. A step around them that may be skipped does
not hold their old state beside the new one, and does not write the direction out if it can compute
it again: see ``dartax/_fusable.py``. Inside ``optax.chain`` they are transforms like any other, and
a step costs what it costs with those of optax; ``dart`` has ``weight_decay`` of its own.
"""

from dartax.inner._adam import adam
from dartax.inner._lion import LionState, lion
from dartax.inner._momentum import momentum
from dartax.inner._muon import OrthogonalState, muon

__all__ = ["LionState", "OrthogonalState", "adam", "lion", "momentum", "muon"]
