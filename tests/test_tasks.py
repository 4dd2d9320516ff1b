import dataclasses
import gzip
import hashlib
import urllib.error
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dartax.experiments import compare, data, models, tasks
from dartax.experiments.config import ConfigError
from dartax.experiments.tasks import TaskConfig

GPU_CONFIG = Path(__file__).parent.parent / "configs" / "compare" / "gpu.toml"

# Every problem, as small as it gets.
TINY = {
    "digits": {"layers": (8, 8)},
    "mnist": {"layers": (8,)},
    "autoencoder": {"layers": (8, 2, 8)},
    "cifar_convnet": {"layers": (4, 8)},
    "cifar_resnet": {"layers": (1,), "width": 4, "stem_stride": 4},
    "shakespeare": {"width": 8, "depth": 1, "heads": 2, "context": 6},
    "friedman": {"layers": (8, 8)},
    "burgers": {"layers": (8, 8)},
    "quadratic": {"layers": (2, 3)},
}
METRICS = {
    "autoencoder": "mean squared error",
    "friedman": "mean squared error",
    "burgers": "relative L2 error",
    "quadratic": "loss without noise",
}
TEXT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 10


def tiny(problem, **settings):
    return TaskConfig(problem, **{"steps": 9, "batch_size": 8, **TINY.get(problem, {}), **settings})


def write_cifar(folder, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(256, size=(40, 32, 32, 3), dtype=np.uint8),
        "train_labels": np.arange(40, dtype=np.uint8) % 10,
        "test_images": rng.integers(256, size=(20, 32, 32, 3), dtype=np.uint8),
        "test_labels": np.arange(20, dtype=np.uint8) % 10,
    }
    arrays |= changes
    np.savez(folder / "cifar10_small.npz", **{k: v for k, v in arrays.items() if v is not None})
    return arrays


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A data folder, and no network."""

    def no_network(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setenv("DARTAX_DATA_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def small_files(monkeypatch, folder):
    """Stand-ins for the published files, few examples each."""
    (folder / "mnist").mkdir()
    rng = np.random.default_rng(0)
    for name in data.MNIST_SHA256:
        count = 40 if name.startswith("train") else 20
        if "images" in name:
            head = b"\0\0\x08\3" + np.array([count, 28, 28], ">u4").tobytes()
            raw = head + rng.integers(256, size=count * 784, dtype=np.uint8).tobytes()
        else:
            head = b"\0\0\x08\1" + np.array([count], ">u4").tobytes()
            raw = head + bytes(i % 10 for i in range(count))
        monkeypatch.setitem(data.MNIST_SHA256, name, hashlib.sha256(raw).hexdigest())
        (folder / "mnist" / name).write_bytes(raw)
    write_cifar(folder)
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT).hexdigest())
    (folder / "tinyshakespeare.txt").write_bytes(TEXT)
    return folder


@pytest.mark.one_in(3)
@pytest.mark.parametrize("problem", TINY)
def test_every_problem_trains_under_vmap_and_scan(problem, small_files):
    dtype = "bfloat16" if problem == "mnist" else "float32"
    task = tasks.build(tiny(problem, dtype=dtype))
    assert task.metric == METRICS.get(problem, "cross-entropy")
    optimizer = optax.adam(3e-3)

    @jax.jit
    @jax.vmap
    def run(key):
        init_key, batch_key = jax.random.split(key)
        params = task.init(init_key)
        batches = task.batches(batch_key)
        first = jax.tree.map(lambda leaf: leaf[0], batches)

        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(task.train_loss)(params, task.data, first)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        (last, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), length=4)
        return params, batches, losses, task.test_loss(last, task.data)

    params, batches, losses, test_loss = run(jax.random.split(jax.random.key(0), 2))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert all(leaf.shape[:2] == (2, 9) for leaf in jax.tree.leaves(batches))
    assert losses.shape == (2, 4)
    assert losses.dtype == test_loss.dtype == jnp.float32
    assert np.isfinite(losses).all()
    assert np.isfinite(test_loss).all()
    assert (losses[:, -1] < losses[:, 0]).all()
    assert losses[0, 0] != losses[1, 0]
    assert test_loss[0] != test_loss[1]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("problem", TINY)
def test_bfloat16_is_that_of_parameters_and_activations(problem, small_files):
    task = tasks.build(tiny(problem, dtype="bfloat16"))
    key = jax.random.key(0)
    params = jax.eval_shape(task.init, key)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    batch = jax.eval_shape(lambda key: jax.tree.map(lambda leaf: leaf[0], task.batches(key)), key)
    program = jax.make_jaxpr(jax.value_and_grad(task.train_loss))(params, task.data, batch)
    loss, *grads = program.out_avals
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in grads} == {jnp.dtype("bfloat16")}
    assert jax.eval_shape(task.test_loss, params, task.data).dtype == jnp.float32
    products = [line for line in str(program).splitlines() if "= dot_general[" in line]
    assert products or problem == "quadratic"
    assert not [line for line in products if ":f32[" in line]


def test_every_epoch_is_another_permutation():
    batches = np.asarray(tasks.epoch_batches(jax.random.key(0), 10, 3, 7))
    assert batches.shape == (7, 3)
    assert batches.dtype == np.int32
    epochs = batches[:6].reshape(2, 9)
    for epoch in epochs:
        assert len(set(epoch)) == 9
        assert set(epoch) <= set(range(10))
    assert (epochs[0] != epochs[1]).any()
    # Over many epochs no example is left out more than others.
    left_out = 45 - np.asarray(tasks.epoch_batches(jax.random.key(1), 10, 9, 2000)).sum(1)
    counts = np.bincount(left_out, minlength=10)
    assert np.abs(counts - 200).max() < 5 * np.sqrt(2000 * 0.1 * 0.9)


@jax.default_matmul_precision("highest")  # a GPU would round to TF32
def test_supervised_losses_are_those_of_the_indexed_examples(small_files):
    task = tasks.build(tiny("mnist"))
    params = jax.jit(task.init)(jax.random.key(0))
    index, keys = task.batches(jax.random.key(1))

    def expected(x, y):
        hidden = np.maximum(x @ params["Dense_0"]["kernel"], 0)
        logits = hidden @ np.asarray(params["Dense_1"]["kernel"])
        log_z = np.log(np.exp(logits).sum(1))
        return np.mean(log_z - logits[np.arange(len(y)), y])

    mnist = data.mnist()
    loss = jax.jit(task.train_loss)(params, task.data, (index[2], keys[2]))
    rows = np.asarray(index[2])
    assert loss == pytest.approx(expected(mnist.train_x[rows], mnist.train_y[rows]), rel=1e-5)
    loss = jax.jit(task.test_loss)(params, task.data)
    assert loss == pytest.approx(expected(mnist.test_x, mnist.test_y), rel=1e-5)


def test_flips_mirror_about_half_of_the_images(small_files, monkeypatch):
    seen = []

    def apply(self, params, x):
        seen.append(x)
        return jnp.zeros((len(x), 10))

    task = tasks.build(tiny("cifar_convnet", batch_size=40))
    monkeypatch.setattr(models.ConvNet, "apply", apply)

    @jax.jit
    def inputs(data, key):
        index, keys = task.batches(key)
        task.train_loss({}, data, (index[0], keys[0]))
        return seen[-1], data["train"][0][index[0]]

    images, plain = map(np.asarray, inputs(task.data, jax.random.key(0)))
    kept = (images == plain).all((1, 2, 3))
    mirrored = (images == plain[:, :, ::-1]).all((1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 8 <= kept.sum() <= 32


def test_text_windows(small_files):
    task = tasks.build(tiny("shakespeare", steps=2000))
    starts = np.asarray(task.batches(jax.random.key(0)))
    train, (x, y) = np.asarray(task.data["train"]), task.data["test"]
    assert starts.shape == (2000, 8)
    # Every window of context + 1 characters, and none beyond the end.
    assert starts.min() == 0
    assert starts.max() == len(train) - 7
    assert x.shape == y.shape == (256, 6)
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    symbols = np.array(sorted(set(TEXT)))
    test = TEXT[len(TEXT) * 9 // 10 :]
    assert bytes(symbols[np.asarray(x[0])].tolist()) == test[:6]
    assert bytes(symbols[np.asarray(y[-1])].tolist()) == test[-6:]


def test_the_transformer_sees_no_later_symbols():
    model = models.Transformer(num_symbols=5, width=8, depth=1, heads=2, context=6)
    symbols = jnp.array([[0, 1, 2, 3, 4, 0]])

    @jax.jit
    def run(key):
        params = model.init(key, symbols)
        versions = (symbols, symbols.at[0, 3].set(1), symbols[:, :2])
        return [model.apply(params, version) for version in versions]

    logits, changed, prefix = run(jax.random.key(0))
    assert logits.shape == (1, 6, 5)
    np.testing.assert_allclose(logits[:, :3], changed[:, :3], rtol=1e-5, atol=1e-6)
    assert (jnp.abs(logits - changed)[:, 3:].max(-1) > 1e-4).all()
    np.testing.assert_allclose(logits[:, :2], prefix, rtol=1e-5, atol=1e-6)


def test_layer_scale_keeps_the_function_and_scales_the_kernels():
    task = tasks.build(tiny("digits", layers=(64, 64, 64)))
    scaled = tasks.build(tiny("digits", layers=(64, 64, 64), layer_scale=1000.0))

    @jax.jit
    def run(key):
        all_params = [task.init(key), scaled.init(key)]
        # Biases are not divided: the same ones in both networks.
        for params in all_params:
            params["Dense_1"]["bias"] += 1.0
        losses = [t.test_loss(p, t.data) for t, p in zip((task, scaled), all_params, strict=True)]
        return all_params, losses

    (params, params_scaled), (loss, loss_scaled) = run(jax.random.key(1))
    for i, factor in enumerate([1, 1000, 1, 1]):
        layer = f"Dense_{i}"
        np.testing.assert_allclose(
            params_scaled[layer]["kernel"], factor * params[layer]["kernel"], rtol=1e-4
        )
    assert loss_scaled == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@jax.default_matmul_precision("highest")  # a GPU would round to TF32
def test_patch_convolution_is_the_convolution(kernel, stride):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 7, 6, 3))
    weights = jax.random.normal(keys[1], (kernel, kernel, 3, 4))

    def by_lax(x, weights):
        return jax.lax.conv_general_dilated(
            x, weights, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def by_patches(x, weights):
        return models.patch_convolution(x, weights, (stride, stride), "SAME")

    @jax.jit
    def both(x, weights, cotangent_key):
        expected, transposed = jax.vjp(by_lax, x, weights)
        got, transposed_patches = jax.vjp(by_patches, x, weights)
        cotangent = jax.random.normal(cotangent_key, expected.shape)
        return (expected, *transposed(cotangent)), (got, *transposed_patches(cotangent))

    for expected, got in zip(*both(x, weights, keys[2]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "model", [models.ConvNet((4, 8), 10), models.ResNet((1, 2), 4, 10, stem_stride=2)]
)
def test_only_the_cpu_gathers_patches(model, monkeypatch):
    x = jax.ShapeDtypeStruct((2, 9, 9, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(1), x)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    program = jax.make_jaxpr(model.apply)(params, x)
    assert "conv_general_dilated" not in str(program)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    other = jax.make_jaxpr(model.apply)(params, x)
    assert "conv_general_dilated" in str(other)
    assert other.out_avals == program.out_avals
    assert other.out_avals[0].shape == (2, 10)


def test_resnet18_has_its_layers():
    model = models.ResNet((2, 2, 2, 2), 64, 10)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    kernels = [k for k in jax.tree.leaves(params) if k.ndim == 4]
    assert len(kernels) == 1 + 16 + 3
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 11_173_962


def test_burgers_reference_solves_the_equation():
    x = np.linspace(-1, 1, 33)
    np.testing.assert_allclose(
        tasks.burgers_solution(np.zeros(33), x), -np.sin(np.pi * x), atol=1e-12
    )
    t, x = np.meshgrid(np.linspace(0.1, 1, 10), np.linspace(-1, 1, 33))
    u = tasks.burgers_solution(t, x)
    np.testing.assert_allclose(u, -u[::-1], atol=1e-12)
    np.testing.assert_allclose(u[[0, -1]], 0, atol=1e-12)

    def at(dt, dx):
        return tasks.burgers_solution(t + dt, x + dx)

    h = 1e-4
    u_t, u_x = (at(h, 0) - at(-h, 0)) / (2 * h), (at(0, h) - at(0, -h)) / (2 * h)
    u_xx = (at(0, h) - 2 * u + at(0, -h)) / h**2
    residual = u_t + u * u_x - tasks.VISCOSITY * u_xx
    assert np.abs(residual).max() < 1e-4 * np.abs(u * u_x).max()


def test_burgers_loss_vanishes_only_at_the_solution(monkeypatch):
    task = tasks.build(tiny("burgers", batch_size=256))

    def solution(t, x):
        nodes, weights = np.float32(np.polynomial.hermite.hermgauss(60))
        width = jnp.sqrt(4 * tasks.VISCOSITY * jnp.maximum(t, 1e-6))[:, None]
        y = jnp.pi * (x[:, None] - width * nodes[None])
        f = weights[None] * jnp.exp(-jnp.cos(y) / (2 * jnp.pi * tasks.VISCOSITY))
        return -(jnp.sin(y) * f).sum(-1) / f.sum(-1)

    def apply(self, variables, tx):
        t, x = tx.T
        candidates = [solution(t, x), -jnp.sin(jnp.pi * x), 0 * t + 1]
        return (variables["params"] @ jnp.stack(candidates))[:, None]

    monkeypatch.setattr(models.MLP, "apply", apply)

    @jax.jit
    def losses(factors):
        key = task.batches(jax.random.key(0))[0]
        return task.train_loss(factors, task.data, key), task.test_loss(factors, task.data)

    train, test = losses(jnp.array([1.0, 0.0, 0.0]))
    assert train < 1e-4
    assert test < 1e-3
    # Zero misses the initial condition, by sin(pi x)^2, of mean 1/2, and nothing else.
    train, test = losses(jnp.zeros(3))
    assert train == pytest.approx(0.5, abs=0.15)
    assert test == pytest.approx(1.0)
    # One misses the boundary condition by 1, and the initial one by 1 + sin(pi x).
    train, _ = losses(jnp.array([0.0, 0.0, 1.0]))
    assert train == pytest.approx(1 + 1.5, abs=0.6)
    # The initial state at all times misses the equation alone, by pi sin (cos - nu pi).
    train, _ = losses(jnp.array([0.0, 1.0, 0.0]))
    assert train == pytest.approx(np.pi**2 * (1 / 8 + 0.1**2 / 2), rel=0.15)


def test_cifar(folder):
    arrays = write_cifar(folder)
    cifar = data.cifar10()
    assert cifar.train_x.shape == (40, 32, 32, 3)
    assert cifar.test_x.shape == (20, 32, 32, 3)
    assert cifar.train_x.dtype == np.float32
    assert cifar.train_y.dtype == np.int32
    assert cifar.num_classes == 10
    train_x = cifar.train_x.astype(np.float64)
    np.testing.assert_allclose(train_x.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(train_x.std((0, 1, 2)), 1, atol=1e-5)
    pixels = arrays["train_images"][..., 1].astype(np.float64)
    expected = (arrays["test_images"][..., 1] - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(cifar.test_x[..., 1], expected, atol=1e-5)


def test_missing_cifar(folder):
    with pytest.raises(data.DataError, match="no mirror has it; set DARTAX_DATA_DIR to a folder that holds cifar10_small.npz with uint8 arrays train_images"):  # fmt: skip
        data.cifar10()


@pytest.mark.parametrize(
    "changes",
    [
        {"train_images": None},
        {"train_images": np.zeros((40, 32, 32, 3), np.float32)},
        {"train_images": np.zeros((40, 3, 32, 32), np.uint8)},
        {"train_images": np.zeros((0, 32, 32, 3), np.uint8), "train_labels": np.zeros(0, np.uint8)},
        {"train_images": np.array([{}])},
        {"test_labels": np.zeros(19, np.uint8)},
        {"test_labels": np.full(20, 10, np.uint8)},
        {"test_labels": np.uint8(3)},
    ],
)
def test_wrong_cifar_arrays(folder, changes):
    write_cifar(folder, **changes)
    with pytest.raises(data.DataError, match="must be an npz file with uint8 arrays train_images"):
        data.cifar10()


def test_damaged_cifar(folder):
    write_cifar(folder)
    path = folder / "cifar10_small.npz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[5000] ^= 255
    for content in (whole[:-100], flipped, b"", b"not an archive", b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(data.DataError, match="of different content; delete it and fetch it"):
            data.cifar10()
    np.save(path.with_suffix(".npy"), np.zeros(3))
    path.with_suffix(".npy").replace(path)
    with pytest.raises(data.DataError, match="of different content; delete it and fetch it"):
        data.cifar10()


def test_shakespeare(small_files):
    text = data.shakespeare()
    assert text.num_symbols == len(set(TEXT))
    assert text.train.dtype == text.test.dtype == np.int32
    assert len(text.train) == 549
    whole = np.concatenate([text.train, text.test])
    assert bytes(np.array(sorted(set(TEXT)))[whole].tolist()) == TEXT


def test_missing_and_damaged_shakespeare(folder):
    with pytest.raises(data.DataError, match=r"Tiny Shakespeare must be in .* or downloadable, got neither \(<urlopen error no route to host>\); set DARTAX_DATA_DIR to a folder that holds tinyshakespeare.txt"):  # fmt: skip
        data.shakespeare()
    (folder / "tinyshakespeare.txt").write_bytes(b"To be")
    with pytest.raises(data.DataError, match="must be the published Tiny Shakespeare file, got 5 bytes of different content; delete it"):  # fmt: skip
        data.shakespeare()


def test_shakespeare_is_downloaded_once(monkeypatch, folder, serve):
    asked = serve(TEXT)
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT).hexdigest())
    data.shakespeare()
    data.shakespeare()
    assert asked == [data.SHAKESPEARE_URL]
    assert [path.name for path in folder.iterdir()] == ["tinyshakespeare.txt"]


def test_mnist_may_be_packed(small_files):
    plain = data.mnist()
    for path in list((small_files / "mnist").iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    np.testing.assert_array_equal(data.mnist().train_x, plain.train_x)


def test_quadratic_gradients():
    task = tasks.build(tiny("quadratic", batch_size=4))
    params = task.init(jax.random.key(0))
    curvature = 1 / np.arange(1.0, 6.0)
    x = np.concatenate([params["x_0"], params["x_1"]])
    assert x.shape == (5,)
    np.testing.assert_allclose(task.test_loss(params, task.data), curvature @ x**2 / 2, rtol=1e-6)
    gradients = jax.vmap(jax.grad(task.train_loss), (None, None, 0))(
        params, task.data, jax.random.split(jax.random.key(1), 20_000)
    )
    gradients = np.concatenate([gradients["x_0"], gradients["x_1"]], axis=1)
    np.testing.assert_allclose(gradients.mean(0), curvature * x, atol=0.02)
    np.testing.assert_allclose(np.cov(gradients.T), np.diag(curvature / 4), atol=0.01)


def test_friedman():
    friedman = data.friedman(300, 200)
    assert friedman.train_x.shape == (300, 10)
    assert friedman.test_x.shape == (200, 10)
    assert friedman.train_y.shape == (300,)
    assert friedman.test_y.dtype == np.float32
    assert friedman.num_classes == 1
    np.testing.assert_allclose(friedman.train_x.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(friedman.train_x.std(0), 1, atol=1e-6)
    assert abs(friedman.train_y.mean()) < 1e-6
    assert friedman.train_y.std() == pytest.approx(1, abs=1e-6)
    # The fourth feature enters with factor 10, the last not at all; noise keeps R^2 below 1.
    correlation = np.corrcoef(friedman.train_x.T, friedman.train_y)[-1]
    assert correlation[3] > 0.4
    assert abs(correlation[9]) < 0.2


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"problem": "mnits"}, "problem must be one of digits, .* got 'mnits'; did you mean 'mnist'?"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
        ({"steps": 0}, "steps must be an int of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an int of at least 1, got 2.5"),
        ({"depth": True}, "depth must be an int of at least 1, got True"),
        ({"layers": (8, 0)}, r"layers must hold ints of at least 1, got \(8, 0\)"),
        ({"problem": "shakespeare", "width": 10}, "width must be a multiple of the 4 heads, got 10"),
        ({"problem": "burgers", "batch_size": 3}, "batch_size must be at least 4 for burgers, got 3"),
        ({"layer_scale": 0.0}, "layer_scale must be a positive number, got 0.0"),
        ({"layer_scale": float("nan")}, "layer_scale must be a positive number, got nan"),
        ({"layer_scale": 9.0, "layers": (8,)}, "layer_scale must be 1 unless .* got 9.0 for digits with"),
        ({"layer_scale": 9.0, "problem": "cifar_convnet"}, "layer_scale must be 1 unless"),
    ],
)  # fmt: skip
def test_bad_configs(settings, match):
    with pytest.raises(ConfigError, match=match):
        TaskConfig(**{"problem": "digits", "steps": 9, **settings})


def test_configs_that_the_data_rule_out(small_files):
    with pytest.raises(ConfigError, match="batch_size must be at most the 40 training examples"):
        tasks.build(tiny("mnist", batch_size=41))
    with pytest.raises(ConfigError, match="context must be below the 61 characters of the test"):
        tasks.build(tiny("shakespeare", context=61))


@pytest.mark.slow
def test_the_larger_comparison_runs_at_reduced_size(small_files, tmp_path):
    """The configuration for a GPU: its networks narrower, its runs two steps long."""
    config = compare.load(GPU_CONFIG, workdir=str(tmp_path / "results"), seeds=1)
    shrunk = {"steps": 2, "batch_size": 2, "width": 12, "context": 8}
    config = dataclasses.replace(
        config,
        evaluations=2,
        tasks={
            name: dataclasses.replace(task, layers=(1, 1), depth=1, **shrunk)
            for name, task in config.tasks.items()
        },
        target="dart",
        optimizers={"dart": config.optimizers["dart"]},
    )
    results = compare.run(config, progress=False)
    for cells in results.values():
        assert np.all(np.isfinite(np.array(cells["dart"]["test_loss"], float)))
