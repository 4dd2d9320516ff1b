"""What a state says of each of its K blocks, ``[K]`` each. Nothing here draws."""

import jax
import jax.numpy as jnp

from dartax import dirichlet
from dartax._state import ScaleByDartState


def used_rates(state: ScaleByDartState) -> jax.Array:
    """Rates of the last update, the schedule included."""
    return state.last_rates


def without_slack(per_component: jax.Array, state: ScaleByDartState) -> jax.Array:
    """The components of the blocks, without the slack: the last one, where there is one."""
    return per_component[: state.last_rates.shape[0]]


def block_concentrations(state: ScaleByDartState) -> jax.Array:
    """Concentrations, without the slack's."""
    return without_slack(state.concentration, state)


def mean_shares(state: ScaleByDartState) -> jax.Array:
    """Mean share of the budget."""
    return without_slack(dirichlet.mean(state.concentration), state)


def expected_rates(state: ScaleByDartState) -> jax.Array:
    """Mean rates, the schedule included."""
    budget = state.rate_budget - state.min_rate
    return state.last_multiplier * (state.min_rate + budget * mean_shares(state))


def rate_stds(state: ScaleByDartState) -> jax.Array:
    """Standard deviations of the rates, the schedule included."""
    variance = without_slack(dirichlet.variance(state.concentration), state)
    return state.last_multiplier * (state.rate_budget - state.min_rate) * jnp.sqrt(variance)
