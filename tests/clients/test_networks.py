"""Networks of four libraries on digits, fine-tuning with LoRA, and differential privacy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import STEPS, batches, cross_entropy, digits

import dartax

TRAIN, TEST = digits()


@pytest.mark.parametrize("filtered", [True, False], ids=["filtered", "unfiltered"])
def test_equinox(compare, filtered):
    eqx = pytest.importorskip("equinox")

    def program(optimizer):
        model = eqx.nn.MLP(64, 10, 64, 2, key=jax.random.key(0))
        state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

        def loss(model, x, y):
            return cross_entropy(jax.vmap(model)(x), y)

        @eqx.filter_jit
        def step(model, state, x, y):
            grads = eqx.filter_grad(loss)(model, x, y)
            params = eqx.filter(model, eqx.is_inexact_array) if filtered else model
            updates, state = optimizer.update(grads, state, params)
            return eqx.apply_updates(model, updates), state

        for batch in batches(TRAIN):
            model, state = step(model, state, *batch)
        return loss(model, *TEST)

    task = f"MLP on digits, {'filtered' if filtered else 'whole model'}: test loss"
    adam, dart, decayed = compare("equinox", task, program, rate=1e-3, steps=STEPS, better="lower")
    assert dart < adam + 0.03
    assert decayed < adam + 0.03


def test_haiku(compare):
    hk = pytest.importorskip("haiku")

    def program(optimizer):
        net = hk.without_apply_rng(
            hk.transform(lambda x: hk.nets.MLP([64, 64, 10])(jnp.asarray(x)))
        )
        params = net.init(jax.random.key(0), TRAIN[0][:1])
        state = optimizer.init(params)

        def loss(params, x, y):
            return cross_entropy(net.apply(params, x), y)

        @jax.jit
        def step(params, state, x, y):
            updates, state = optimizer.update(jax.grad(loss)(params, x, y), state)
            return optax.apply_updates(params, updates), state

        for batch in batches(TRAIN):
            params, state = step(params, state, *batch)
        return loss(params, *TEST)

    adam, dart, decayed = compare(
        "dm-haiku", "MLP on digits: test loss", program, rate=1e-3, steps=STEPS, better="lower"
    )
    assert decayed < adam + 0.03
    assert dart < 2 * adam
    if dart > adam + 0.03:  # between 0.13 and 0.25, by the draws
        pytest.xfail(f"without a schedule the rates are still high: {dart:.3f}, Adam {adam:.3f}")


def test_flax_linen(compare):
    """A convolution, batch normalization and a TrainState."""
    nn = pytest.importorskip("flax.linen")
    from flax.training import train_state

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(16, (3, 3), strides=2)(x.reshape(-1, 8, 8, 1))
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            return nn.Dense(10)(x.reshape(len(x), -1))

    def program(optimizer):
        net = Net()
        variables = net.init(jax.random.key(0), TRAIN[0][:1], True)
        state = train_state.TrainState.create(
            apply_fn=net.apply, params=variables["params"], tx=optimizer
        )

        @jax.jit
        def step(state, stats, x, y):
            def loss(params):
                logits, new = net.apply(
                    {"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"]
                )
                return cross_entropy(logits, y), new["batch_stats"]

            grads, stats = jax.grad(loss, has_aux=True)(state.params)
            return state.apply_gradients(grads=grads), stats

        stats = variables["batch_stats"]
        for batch in batches(TRAIN):
            state, stats = step(state, stats, *batch)
        logits = net.apply({"params": state.params, "batch_stats": stats}, TEST[0], False)
        return cross_entropy(logits, TEST[1])

    adam, dart, decayed = compare(
        "flax", "linen CNN on digits: test loss", program, rate=1e-3, steps=STEPS, better="lower"
    )
    assert dart < adam + 0.03
    assert decayed < adam + 0.03


def test_flax_nnx_lora(compare):
    """A network that knows the digits upright learns them upside down, by LoRA alone."""
    nnx = pytest.importorskip("flax.nnx")

    def train(model, optimizer, wrt, data):
        @nnx.jit
        def step(model, optimizer, x, y):
            grads = nnx.grad(
                lambda model: cross_entropy(model(x), y), argnums=nnx.DiffState(0, wrt)
            )(model)
            optimizer.update(model, grads)

        optimizer = nnx.Optimizer(model, optimizer, wrt=wrt)
        for batch in batches(data):
            step(model, optimizer, *batch)

    def program(optimizer):
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(
            nnx.Linear(64, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 10, rngs=rngs)
        )
        train(model, optax.adam(3e-3), nnx.Param, TRAIN)
        model = nnx.Sequential(
            *[
                nnx.LoRA(layer.in_features, 4, layer.out_features, base_module=layer, rngs=rngs)
                if isinstance(layer, nnx.Linear)
                else layer
                for layer in model.layers
            ]
        )
        frozen = np.asarray(model.layers[0].base_module.kernel[...])
        train(model, optimizer, nnx.LoRAParam, (TRAIN[0][:, ::-1], TRAIN[1]))
        np.testing.assert_array_equal(model.layers[0].base_module.kernel[...], frozen)
        return cross_entropy(model(TEST[0][:, ::-1]), TEST[1])

    adam, dart, decayed = compare(
        "flax", "nnx LoRA, rank 4: test loss", program, rate=3e-3, steps=STEPS, better="lower"
    )
    assert dart < adam + 0.1
    assert decayed < adam + 0.1


def test_jax_privacy(compare):
    """DP-SGD: every gradient is clipped to 1, and the sum gets noise of 1."""
    pytest.importorskip("jax_privacy")
    from jax_privacy import clipping, noise_addition

    def loss(params, x, y):
        hidden = jax.nn.relu(x @ params["w"] + params["b"])
        return cross_entropy(hidden @ params["out"], y)

    def program(optimizer):
        keys = jax.random.split(jax.random.key(0))
        params = {
            "w": jax.random.normal(keys[0], (64, 32)) / 8,
            "b": jnp.zeros(32),
            "out": jax.random.normal(keys[1], (32, 10)) / 6,
        }
        grad = clipping.clipped_grad(loss, l2_clip_norm=1.0, batch_argnums=(1, 2), normalize_by=256)
        privatizer = noise_addition.gaussian_privatizer(
            stddev=grad.sensitivity(), prng_key=jax.random.key(1)
        )
        states = privatizer.init(params), optimizer.init(params)

        @jax.jit
        def step(params, states, x, y):
            private, noise = privatizer.update(grad(params, x, y), states[0])
            updates, state = optimizer.update(private, states[1], params)
            return optax.apply_updates(params, updates), (noise, state)

        for batch in batches(TRAIN, size=256):
            params, states = step(params, states, *batch)
        ended.append((params, states[1]))
        return loss(params, *TEST)

    ended: list = []
    adam, dart, decayed = compare(
        "jax-privacy",
        "DP-SGD on digits: test loss",
        program,
        rate=3e-3,
        steps=STEPS,
        better="lower",
    )
    assert dart < adam + 0.05
    assert decayed < adam + 0.05
    # A small budget is not used up, and the loss is no worse for it.
    assert program(dartax.dart(rate_budget=0.05)) < adam + 0.05
    params, state = ended[-1]
    assert "pinned" not in dartax.describe(state, params)
    assert dartax.metrics(state)["dart/spent"] < 0.9
