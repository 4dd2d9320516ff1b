"""Pictures of a learned distribution over learning rates; ``pip install 'dartax[plot]'``.

The notebook ``reading_a_run.ipynb`` shows each of them, of healthy and unhealthy runs.

Every function takes recorded ``metrics``, in one of these forms:

- a sequence of dicts, one per logged step, as :func:`dartax.metrics` returns them with ``params``;
- a mapping of columns: a dict of arrays such as ``lax.scan`` stacks them, or a pandas DataFrame;
- the path of a CSV file, or of a folder with a ``metrics.csv``, such as ``dartax train`` leaves.

Names may have the prefix ``dart/`` or lack it; other columns are ignored. Every function returns
a ``matplotlib.figure.Figure`` that belongs to no window: show it in a notebook, or ``savefig`` it.
Where leaves share a block, the block is drawn once. All raise ``ValueError`` where ``metrics``
lacks what is drawn, or a name or step was not recorded, and ``TypeError`` for another kind.

Arguments in common:

- ``blocks``: names of leaves, such as ``"Dense_0/kernel"``, to draw only those;
- ``steps``: steps to draw; the nearest recorded one is taken for each;
- ``dark``: light ink on dark paper.

Examples:
  >>> import dartax, jax, jax.numpy as jnp
  >>> import dartax.plot
  >>> params = {"flat": jnp.ones(3), "steep": jnp.ones(3)}
  >>> optimizer = dartax.dart()
  >>> def step(carry, _):
  ...     params, state = carry
  ...     grads = {"flat": 0.1 * params["flat"], "steep": 8 * params["steep"]}
  ...     updates, state = optimizer.update(grads, state, params)
  ...     params = jax.tree.map(jnp.add, params, updates)
  ...     return (params, state), dartax.metrics(state, params)
  >>> _, metrics = jax.lax.scan(step, (params, optimizer.init(params)), length=50)
  >>> figure = dartax.plot.learning_rates(metrics, dark=True)
  >>> figure.axes[0].get_ylabel()
  'learning rate, schedule included'
"""

import importlib.util

if importlib.util.find_spec("matplotlib") is None:
    raise ModuleNotFoundError(
        "dartax.plot needs the package matplotlib; pip install 'dartax[plot]'.", name="matplotlib"
    )

from dartax.plot._laws import ridges, simplex
from dartax.plot._over_time import (
    budget,
    concentrations,
    heatmap,
    learning_rates,
)

__all__ = ["budget", "concentrations", "heatmap", "learning_rates", "ridges", "simplex"]
