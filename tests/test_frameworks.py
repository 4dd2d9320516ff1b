"""Flax, Equinox and Haiku: parameters are pytrees, and nothing special is needed."""

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import dartax

X = jnp.arange(12.0).reshape(4, 3)


def test_nnx_takes_extra_arguments_filters_split_and_merge():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    kernels = nnx.All(nnx.Param, nnx.PathContains("kernel"))
    optimizer = nnx.Optimizer(model, dartax.dart(init_rate=1e-3), wrt=kernels)

    @nnx.jit
    def train_step(model, optimizer):
        loss, grads = nnx.value_and_grad(
            lambda m: jnp.sum(jnp.square(m(X))), argnums=nnx.DiffState(0, kernels)
        )(model)
        optimizer.update(model, grads, value=loss)

    bias, kernel = jnp.array(model.bias[...]), jnp.array(model.kernel[...])
    train_step(model, optimizer)
    graph, state = nnx.split((model, optimizer))
    model, optimizer = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    train_step(model, optimizer)
    assert np.all(model.bias[...] == bias)
    assert np.all(model.kernel[...] != kernel)
    assert dartax.metrics(optimizer)["dart/step"] == 2
    assert dartax.metrics(optimizer)["dart/skipped"] == 0
    rates = jax.tree.leaves(dartax.learning_rates(optimizer, nnx.state(model, kernels)))
    assert len(rates) == 1

    _, grads = nnx.value_and_grad(
        lambda m: jnp.sum(jnp.square(m(X))), argnums=nnx.DiffState(0, kernels)
    )(model)
    optimizer.update(model, grads, value=jnp.nan)
    assert dartax.metrics(optimizer)["dart/skipped"] == 1


def test_equinox():
    model = eqx.nn.MLP(3, 2, 4, depth=1, key=jax.random.key(0))
    optimizer = dartax.dart(init_rate=1e-3)
    params = eqx.filter(model, eqx.is_inexact_array)
    state = optimizer.init(params)

    @eqx.filter_jit
    def train_step(model, state):
        grads = eqx.filter_grad(lambda m: jnp.sum(jnp.square(jax.vmap(m)(X))))(model)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    for _ in range(2):
        model, state = train_step(model, state)
    rates = dartax.learning_rates(state, eqx.filter(model, eqx.is_inexact_array))
    assert rates.layers[0].weight > 0
    assert "layers/0/weight" in dartax.describe(state, params)


def test_haiku():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 2])(x)))
    params = model.init(jax.random.key(0), X)
    optimizer = dartax.dart(init_rate=1e-3)
    state = optimizer.init(params)

    @jax.jit
    def train_step(params, state):
        grads = jax.grad(lambda p: jnp.sum(jnp.square(model.apply(p, X))))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    before = params
    for _ in range(2):
        params, state = train_step(params, state)
    rates = dartax.learning_rates(state, params)
    chex.assert_trees_all_equal_structs(rates, params)
    assert all(rate > 0 for rate in jax.tree.leaves(rates))
    assert np.any(params["mlp/~/linear_0"]["w"] != before["mlp/~/linear_0"]["w"])
