"""What a state says of each of its K blocks, ``[K]`` each. Nothing here draws."""

import jax
import jax.numpy as jnp

from dartax import dirichlet
from dartax._state import ScaleByDartState


def used_rates(state: ScaleByDartState) -> jax.Array:
    """Rates of the last update, the schedule included."""
    return state.last_rates


def of_blocks(per_component: jax.Array, state: ScaleByDartState) -> jax.Array:
    """Without the slack, which is the last component where there is one."""
    return per_component[: state.last_rates.shape[0]]


def block_concentrations(state: ScaleByDartState) -> jax.Array:
    """Concentrations, without the slack's."""
    return of_blocks(state.concentration, state)


def mean_shares(state: ScaleByDartState) -> jax.Array:
    """Mean share of the budget."""
    return of_blocks(dirichlet.mean(state.concentration), state)


def expected_rates(state: ScaleByDartState) -> jax.Array:
    """Mean rates, the schedule included."""
    budget = state.rate_budget - state.min_rate
    return state.last_multiplier * (state.min_rate + budget * mean_shares(state))


def rate_stds(state: ScaleByDartState) -> jax.Array:
    """Standard deviations of the rates, the schedule included."""
    variance = of_blocks(dirichlet.variance(state.concentration), state)
    return state.last_multiplier * (state.rate_budget - state.min_rate) * jnp.sqrt(variance)
