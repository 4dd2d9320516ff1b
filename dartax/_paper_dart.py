"""Dirichlet Adaptive Random Tuning (DART), the published formula.

Every parameter tensor i = 1..K draws its learning rate from one Dirichlet,

    gamma_i ~ Gamma(alpha_i, 1),   pi_i = gamma_i / sum_j gamma_j
    lr_i    = lr_min + (lr_max - lr_min) * pi_i
    theta_i <- theta_i - lr_i * g_i

and the concentrations follow the gradient of the next loss through the draw,

    dL/dalpha_j = (lr_max - lr_min) * (dlog gamma_j/dalpha_j) * pi_j * (h_j - sum_k pi_k h_k),
    h_i         = dL/dlr_i = -< g_{t+1,i}, g_{t,i} >
    m     <- b1 * m + (1 - b1) * dL/dalpha
    v     <- b2 * v + (1 - b2) * (dL/dalpha)^2
    alpha <- clip(alpha - eta * m_hat / (sqrt(v_hat) + eps), 0.1, 10).

The arguments are named as those of :func:`dartax.dart`: alpha is ``concentration``, lr_min
``min_rate`` and lr_max ``rate_budget``.

sum_i pi_i = 1 fixes the mean rate at lr_min + (lr_max - lr_min) / K. This DART shares a budget out
between tensors; it does not learn how much to spend. :func:`dartax.dart` does.

Reference: `DART-Optimizer <https://github.com/mdelriolanse/DART-Optimizer>`_, README and
``dartopt/optim/dart.py``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dartax import _check
from dartax._averages import Number, debias, f32, moving_average, root
from dartax._blocks import Labels
from dartax._decay import decayed_weights
from dartax._draw import Draw
from dartax._rule import Rule
from dartax._transform import Implementation, scale_by_dirichlet

# The published clip of the concentrations.
MIN_ALPHA, MAX_ALPHA = 0.1, 10.0
# The published decays of the two moments.
B1, B2 = 0.9, 0.999


def concentration_gradient(draw: Draw, concentration: jax.Array, h: jax.Array) -> jax.Array:
    """dL/dconcentration divided by lr_max - lr_min, from h = dL/drate; ``[C]`` each.

    dL/da_j = (d log gamma_j / da_j) * pi_j * (h_j - sum_k pi_k h_k).
    """
    derivative = draw.log_derivative / concentration
    return derivative * draw.share * (h - jnp.dot(draw.share, h))


def paper_rule(
    alpha: Number, budget: Number, eta: Number, b1: Number, b2: Number, eps: Number
) -> Rule:
    """Adam on alpha itself; ``budget`` is lr_max - lr_min."""

    def learn(concentration, draw, h, moments, context):
        gradient = f32(budget) * concentration_gradient(draw, concentration, h)
        mu = moving_average(moments.hyper_mu, gradient, b1)
        nu = moving_average(moments.hyper_nu, gradient**2, b2)
        num = context.updates
        step = f32(eta) * debias(mu, b1, num) / (root(debias(nu, b2, num)) + f32(eps))
        concentration = jnp.clip(concentration - step, MIN_ALPHA, MAX_ALPHA)
        return concentration, moments._replace(hyper_mu=mu, hyper_nu=nu), jnp.ones_like(h)

    return Rule(
        init=lambda num_blocks: jnp.full(num_blocks, f32(alpha)),
        learn=learn,
        in_log_space=False,
        uses_walk=False,
    )


@_check.refused(
    _check.renamed(
        lr_min="min_rate", lr_max="rate_budget", alpha="concentration", betas="b1 and b2"
    )
)
def paper_dart(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    min_rate: Number = 1e-6,
    rate_budget: Number = 1e-1,
    concentration: Number = 1.0,
    eta: Number = 0.01,
    b1: Number = B1,
    b2: Number = B2,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    mask: Any = None,
    blocks: Labels = None,
    key: jax.Array | int = 0,
    implementation: Implementation = "fused",
) -> optax.GradientTransformationExtraArgs:
    """The published DART, with concentrations that learn.

    The defaults are those of the PyTorch original. Its ``lr``, which its code never reads, is left
    out.

    Args:
      learning_rate: Float or optax schedule that multiplies the learned rates.
      min_rate: Lower end of the rates, positive and below ``rate_budget``.
      rate_budget: Upper end of the rates: the budget that the blocks share.
      concentration: First concentration of every block, in [0.1, 10].
      eta: Step size of the concentrations, non-negative. 0 freezes them, as the published code
        does where it does not crash.
      b1: Decay of the first moment of the concentration gradient, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment, positive.
      weight_decay: L2 coefficient; ``weight_decay * params`` is added to the gradient.
      mask: Tree of bools, or a function from params to one: where the decay applies.
      blocks: Pytree of labels or function from a path such as ``"Dense_0/kernel"`` to a
        label. Leaves with equal labels share a rate. One block per leaf by default.
      key: Seed of the draws, an int or a JAX key of any kind.
      implementation: ``"fused"``, or ``"plain"``, the readable form; see
        :func:`dartax.scale_by_dart`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose updates are to be added.

    Raises:
      ValueError: If a number is outside its range.
      TypeError: If an argument has the wrong type, or an old name.

    Examples:
      >>> import dartax, jax, jax.numpy as jnp, optax
      >>> def loss(params):  # a flat and a steep direction
      ...     return 0.05 * jnp.sum(params["flat"] ** 2) + 4 * jnp.sum(params["steep"] ** 2)
      >>> params = {"flat": jnp.ones(3), "steep": jnp.ones(3)}
      >>> optimizer = dartax.paper_dart()
      >>> state = optimizer.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> bool(loss(params) < 0.15)
      True

    Departures from the published DART:
      1. The concentrations descend the loss; the update in its README ascends it.
      2. The gradient passes through the draw by implicit reparameterization; its README's
         ``Gamma(a, 1) = a * Gamma(1, 1)`` holds only for a = 1.
      3. ``h`` is the hypergradient, known one step later; the published code averages the
         parameters' gradient instead, and crashes there.
      4. Steps are skipped as in :func:`dartax.scale_by_dart`: the updates are zero, and what is
         learned stays as it was.
    """
    positive = lambda v: v > 0  # noqa: E731
    _check.schedule("learning_rate", learning_rate)
    _check.number("min_rate", min_rate, "a positive number", positive, "the original's is 1e-6")
    _check.number(
        "rate_budget", rate_budget, "a positive number", positive, "the original's is 1e-1"
    )
    _check.below("min_rate", min_rate, "rate_budget", rate_budget)
    _check.within("concentration", concentration, "[0.1, 10]", "the original's is 1.0")
    _check.number("eta", eta, "a non-negative number", lambda v: v >= 0, "the original's is 0.01")
    _check.decay("b1", b1)
    _check.decay("b2", b2, usual=B2)
    _check.eps(eps)
    _check.weight_decay(weight_decay)
    _check.mask(mask)
    _check.blocks(blocks, ("tensor",))
    return optax.chain(
        decayed_weights(weight_decay, mask),
        scale_by_dirichlet(
            paper_rule(concentration, rate_budget - min_rate, eta, b1, b2, eps),
            optax.identity(),
            learning_rate=learning_rate,
            min_rate=min_rate,
            rate_budget=rate_budget,
            memory_decay=0.0,
            memory_dtype=jnp.float32,
            whole_memory=True,
            labels=blocks,
            key=key,
            implementation=implementation,
        ),
        optax.scale(-1.0),
    )
