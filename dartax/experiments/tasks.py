"""Training problems as pure functions."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dartax.experiments import control_tasks, robust_tasks
from dartax.experiments import data as data_lib
from dartax.experiments.config import ConfigError
from dartax.experiments.models import MLP, ConvNet, ResNet, Transformer
from dartax.experiments.task import (
    Task,
    TaskConfig,
    cross_entropy,
    epoch_batches,
    error_rate,
    squared_error,
)

PyTree = Any

# Test examples evaluated at once. Convolutions of a whole test set would not fit into memory.
TEST_CHUNK = 500
TEST_WINDOWS = 256
VISCOSITY = 0.1 / math.pi


def build(config: TaskConfig) -> Task:
    """Loads the data and makes the task.

    Raises:
      ConfigError: If the data are too few for ``batch_size`` or ``context``.
      DataError: If the data are missing or damaged.
    """
    dtype = jnp.dtype(config.dtype)
    match config.problem:
        case "digits" | "mnist":
            dataset = _fewer_and_noisier(config, data_lib.load(config.problem))
            task = _supervised(config, _mlp(config, 10), dataset, cross_entropy, "cross-entropy")
            if config.privacy_noise:
                gradient = robust_tasks.private(task.train_loss, config.privacy_noise)
                task = task._replace(gradient=gradient)
            return task
        case "autoencoder":
            dataset = data_lib.mnist()
            dataset = dataset._replace(train_y=dataset.train_x, test_y=dataset.test_x)
            model = _mlp(config, dataset.train_x.shape[1])
            return _supervised(config, model, dataset, squared_error, "mean squared error")
        case "cifar_convnet" | "cifar_resnet":
            cifar: nn.Module = ConvNet(config.layers, 10, dtype)
            if config.problem == "cifar_resnet":
                cifar = ResNet(config.layers, config.width, 10, config.stem_stride, dtype)
            dataset = data_lib.cifar10()
            return _supervised(config, cifar, dataset, cross_entropy, "cross-entropy", flips=True)
        case "friedman":
            dataset = data_lib.friedman()
            model = _mlp(config, 1)
            return _supervised(config, model, dataset, squared_error, "mean squared error")
        case "shakespeare":
            return _shakespeare(config)
        case "burgers":
            return _burgers(config)
        case "quadratic":
            return _quadratic(config)
        case "ppo_cartpole" | "ppo_pendulum" | "dqn_cartpole":
            return getattr(control_tasks, config.problem)(config)
        case _:
            return getattr(robust_tasks, config.problem)(config)


def _fewer_and_noisier(config: TaskConfig, dataset: data_lib.Dataset) -> data_lib.Dataset:
    """The first ``examples`` training examples, some with a label at random."""
    count = config.examples or len(dataset.train_y)
    train_y = dataset.train_y[:count].copy()
    if config.label_noise:
        rng = np.random.default_rng(0)
        wrong = rng.random(len(train_y)) < config.label_noise
        train_y[wrong] = rng.integers(dataset.num_classes, size=wrong.sum())
    return dataset._replace(train_x=dataset.train_x[:count], train_y=train_y)


def burgers_solution(t: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Solves u_t + u u_x = nu u_xx with u(0, x) = -sin(pi x), by the Cole-Hopf transform.

    u(t, x) = -E[sin(pi y) f(y)] / E[f(y)], f(y) = exp(-cos(pi y) / (2 pi nu)), over normal y
    of mean x and variance 2 nu t (Basdevant et al., 1986). ``t`` and ``x`` broadcast.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    y = np.pi * (x[..., None] - np.sqrt(4 * VISCOSITY * t[..., None]) * nodes)
    f = weights * np.exp(-np.cos(y) / (2 * np.pi * VISCOSITY))
    return -(np.sin(y) * f).sum(-1) / f.sum(-1)


def _mlp(
    config: TaskConfig,
    num_outputs: int,
    activation: Callable[[jax.Array], jax.Array] = nn.relu,
) -> MLP:
    """Makes the MLP of a configuration, with every second hidden layer scaled."""
    scales = [config.layer_scale if i % 2 else 1.0 for i in range(len(config.layers))]
    return MLP(config.layers, num_outputs, scales, activation, jnp.dtype(config.dtype))


def _supervised(
    config: TaskConfig,
    model: nn.Module,
    dataset: data_lib.Dataset,
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    metric: str,
    *,
    flips: bool = False,
) -> Task:
    """Makes a supervised task; ``flips`` mirrors training images at random."""
    num_examples = len(dataset.train_x)
    if config.batch_size > num_examples:
        raise ConfigError(
            f"batch_size must be at most the {num_examples} training examples, got "
            f"{config.batch_size}; lower it."
        )

    def batches(key):
        order_key, flip_key = jax.random.split(key)
        order = epoch_batches(order_key, num_examples, config.batch_size, config.steps)
        return order, jax.random.split(flip_key, config.steps)

    def examples(train, batch):
        index, key = batch
        x, y = train[0][index], train[1][index]
        if flips:
            flipped = jax.random.bernoulli(key, shape=(len(x), 1, 1, 1))
            x = jnp.where(flipped, x[:, :, ::-1], x)
        return x, y

    data = {
        "train": (jnp.asarray(dataset.train_x), jnp.asarray(dataset.train_y)),
        "test": (jnp.asarray(dataset.test_x), jnp.asarray(dataset.test_y)),
    }
    return _task(model, data, batches, examples, loss, metric)


def _shakespeare(config: TaskConfig) -> Task:
    """Makes the task to predict the next character at each position of a window."""
    text = data_lib.shakespeare()
    if config.context >= len(text.test):
        raise ConfigError(
            f"context must be below the {len(text.test)} characters of the test text, got "
            f"{config.context}; lower it."
        )
    model = Transformer(
        text.num_symbols,
        config.width,
        config.depth,
        config.heads,
        config.context,
        jnp.dtype(config.dtype),
    )

    def batches(key):
        shape = (config.steps, config.batch_size)
        return jax.random.randint(key, shape, 0, len(text.train) - config.context)

    def windows(text, starts):
        window = text[starts[:, None] + jnp.arange(config.context + 1)[None]]
        return window[:, :-1], window[:, 1:]

    test_starts = np.linspace(0, len(text.test) - config.context - 1, TEST_WINDOWS, dtype=np.int32)
    data = {
        "train": jnp.asarray(text.train),
        "test": windows(jnp.asarray(text.test), jnp.asarray(test_starts)),
    }
    return _task(model, data, batches, windows, cross_entropy, "cross-entropy")


def _task(
    model: nn.Module,
    data: dict[str, PyTree],
    batches: Callable[[jax.Array], PyTree],
    examples: Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]],
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    metric: str,
) -> Task:
    """Makes a task; ``examples`` maps ``data["train"]`` and a batch to inputs and targets."""
    example = data["test"][0][:1]

    def loss_of(params, x, y):
        outputs: Any = model.apply({"params": params}, x)
        return loss(outputs, y)

    def over_test(measure):
        def mean(params, data):
            def one(example):
                x, y = example
                outputs: Any = model.apply({"params": params}, x[None])
                return measure(outputs, y[None])

            return jax.lax.map(one, data["test"], batch_size=TEST_CHUNK).mean()

        return mean

    return Task(
        init=lambda key: model.init(key, example)["params"],
        batches=batches,
        train_loss=lambda params, data, batch: loss_of(params, *examples(data["train"], batch)),
        test_loss=over_test(loss),
        data=data,
        metric=metric,
        test_error=over_test(error_rate) if loss is cross_entropy else None,
    )


def _burgers(config: TaskConfig) -> Task:
    """Solves Burgers' equation with a physics-informed network (Raissi et al., 2019).

    Viscosity 0.1 / pi, t in [0, 1], x in [-1, 1], u = 0 at x = -1 and x = 1.
    """
    model = _mlp(config, 1, nn.tanh)

    def solution(params, t, x):
        outputs: Any = model.apply({"params": params}, jnp.stack([t, x], axis=-1))
        return outputs[:, 0].astype(jnp.float32)

    def residual(params, t, x):
        one = jnp.ones_like(x)
        _, u_t = jax.jvp(lambda t: solution(params, t, x), (t,), (one,))

        def slope(x):
            return jax.jvp(lambda x: solution(params, t, x), (x,), (one,))

        (u, u_x), (_, u_xx) = jax.jvp(slope, (x,), (one,))
        return u_t + u * u_x - VISCOSITY * u_xx

    def train_loss(params, data, key):
        del data
        inner, initial, boundary = jax.random.split(key, 3)
        t, x = jax.random.uniform(inner, (2, config.batch_size))
        loss = jnp.mean(residual(params, t, 2 * x - 1) ** 2)
        count = config.batch_size // 4
        t = jax.random.uniform(boundary, (count,))
        conditions = (
            (jnp.zeros(count), jax.random.uniform(initial, (count,), minval=-1.0)),
            (t, jnp.where(jnp.arange(count) % 2 == 0, -1.0, 1.0)),
        )
        for t, x in conditions:
            # -sin(pi x), the initial condition, is 0 on the boundary as well.
            loss += jnp.mean((solution(params, t, x) + jnp.sin(jnp.pi * x)) ** 2)
        return loss

    def test_loss(params, data):
        t, x, u = data
        return jnp.linalg.norm(solution(params, t, x) - u) / jnp.linalg.norm(u)

    t, x = np.meshgrid(np.linspace(0, 1, 21), np.linspace(-1, 1, 64))
    grid = t.ravel(), x.ravel(), burgers_solution(t.ravel(), x.ravel())
    return Task(
        init=lambda key: model.init(key, jnp.zeros((1, 2)))["params"],
        batches=lambda key: jax.random.split(key, config.steps),
        train_loss=train_loss,
        test_loss=test_loss,
        data=tuple(jnp.asarray(column, jnp.float32) for column in grid),
        metric="relative L2 error",
    )


def _quadratic(config: TaskConfig) -> Task:
    """The noisy quadratic model: 1/2 sum_i lambda_i x_i^2 with lambda_i = 1 / i.

    The gradient of a batch has covariance diag(lambda) / batch_size (Zhang et al., 2019,
    arXiv:1907.04164). x is split into vectors of the lengths ``layers``.
    """
    if not config.layers:
        raise ConfigError("layers must name the lengths of vectors, got (); pass e.g. (50, 50).")
    curvature = 1 / jnp.arange(1.0, sum(config.layers) + 1)
    noise_scale = jnp.sqrt(curvature / config.batch_size)

    def init(key):
        keys = jax.random.split(key, len(config.layers))
        shapes = enumerate(zip(keys, config.layers, strict=True))
        dtype = jnp.dtype(config.dtype)
        return {f"x_{i}": jax.random.normal(key, (length,), dtype) for i, (key, length) in shapes}

    def point(params):
        return jnp.concatenate([x.astype(jnp.float32) for x in params.values()])

    def test_loss(params, data):
        return jnp.sum(data * point(params) ** 2) / 2

    def train_loss(params, data, key):
        noise = noise_scale * jax.random.normal(key, data.shape)
        return test_loss(params, data) + jnp.sum(noise * point(params))

    return Task(
        init=init,
        batches=lambda key: jax.random.split(key, config.steps),
        train_loss=train_loss,
        test_loss=test_loss,
        data=curvature,
        metric="loss without noise",
    )
