"""Training problems as pure functions."""

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dartax.experiments import data as data_lib
from dartax.experiments.config import ConfigError, nearest
from dartax.experiments.models import MLP, ConvNet, ResNet, Transformer

PyTree = Any
Problem = Literal[
    "digits",
    "mnist",
    "autoencoder",
    "cifar_convnet",
    "cifar_resnet",
    "shakespeare",
    "friedman",
    "burgers",
    "quadratic",
]

# Test examples evaluated at once. Convolutions of a whole test set would not fit into memory.
TEST_CHUNK = 500
TEST_WINDOWS = 256
VISCOSITY = 0.1 / math.pi


class Task(NamedTuple):
    """A training problem as pure functions, which can be vmapped over seeds and settings.

    Attributes:
      init: Makes parameters from a key.
      batches: Makes the batches of all steps from a key, with leading axis ``[steps]``. A batch
        consists of indices and keys, because the examples would need too much memory.
      train_loss: Maps ``(params, data, batch)`` to a float32 scalar.
      test_loss: Maps ``(params, data)`` to a float32 scalar.
      data: Device arrays. They are arguments, because a closure would compile them as constants.
      metric: Name of the test loss.
    """

    init: Callable[[jax.Array], PyTree]
    batches: Callable[[jax.Array], PyTree]
    train_loss: Callable[[PyTree, PyTree, PyTree], jax.Array]
    test_loss: Callable[[PyTree, PyTree], jax.Array]
    data: PyTree
    metric: str


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A training problem and the size of its network."""

    problem: Problem
    """Kind of problem."""
    steps: int
    """Number of batches."""
    batch_size: int = 64
    """Examples per step: text windows of shakespeare, collocation points of burgers. Determines
    the gradient noise of quadratic."""
    layers: tuple[int, ...] = (128, 128)
    """Hidden widths of an MLP, channels of a ConvNet, blocks per stage of a ResNet, lengths of the
    vectors of quadratic."""
    width: int = 64
    """Features of the transformer, or channels of the first stage of a ResNet."""
    depth: int = 2
    """Number of blocks of the transformer."""
    heads: int = 4
    """Attention heads of the transformer. Must divide width."""
    context: int = 64
    """Context length of the transformer, in characters."""
    stem_stride: int = 2
    """Stride of the first convolution of a ResNet."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters and of the computation. Losses are float32."""
    layer_scale: float = 1.0
    """Factor of the initial size of every second hidden kernel of an MLP, with the same initial
    function. If it is far from 1, no single learning rate suits all layers."""

    def __post_init__(self):
        for name, kind in (("problem", Problem), ("dtype", Literal["float32", "bfloat16"])):
            known = typing.get_args(kind)
            if (value := getattr(self, name)) not in known:
                raise ConfigError(
                    f"{name} must be one of {', '.join(known)}, got {value!r}; "
                    f"{nearest(str(value), known)}"
                )
        for name in ("steps", "batch_size", "width", "depth", "heads", "context", "stem_stride"):
            if not _is_count(value := getattr(self, name)):
                raise ConfigError(f"{name} must be an int of at least 1, got {value!r}; raise it.")
        if not all(_is_count(value) for value in self.layers):
            raise ConfigError(
                f"layers must hold ints of at least 1, got {self.layers!r}; pass e.g. (128, 128)."
            )
        if self.problem == "shakespeare" and self.width % self.heads:
            raise ConfigError(
                f"width must be a multiple of the {self.heads} heads, got {self.width}; "
                f"pass e.g. {16 * self.heads}."
            )
        if self.problem == "burgers" and self.batch_size < 4:
            raise ConfigError(
                f"batch_size must be at least 4 for burgers, got {self.batch_size}; raise it."
            )
        if not 0 < self.layer_scale < math.inf:
            raise ConfigError(
                f"layer_scale must be a positive number, got {self.layer_scale}; pass 1.0."
            )
        has_mlp = self.problem in ("digits", "mnist", "autoencoder", "friedman", "burgers")
        if self.layer_scale != 1 and not (has_mlp and len(self.layers) > 1):
            raise ConfigError(
                "layer_scale must be 1 unless an MLP has two hidden layers, got "
                f"{self.layer_scale} for {self.problem} with layers {self.layers}; pass 1.0."
            )


def build(config: TaskConfig) -> Task:
    """Loads the data and makes the task.

    Raises:
      ConfigError: If the data are too few for ``batch_size`` or ``context``.
      DataError: If the data are missing or damaged.
    """
    dtype = jnp.dtype(config.dtype)
    match config.problem:
        case "digits" | "mnist":
            dataset = data_lib.load(config.problem)
            return _supervised(config, _mlp(config, 10), dataset, cross_entropy, "cross-entropy")
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


def cross_entropy(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of logits ``[..., classes]``, in float32."""
    logits = outputs.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def squared_error(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean squared error over all elements, in float32."""
    return jnp.mean((outputs.astype(jnp.float32).reshape(y.shape) - y) ** 2)


def epoch_batches(key: jax.Array, num_examples: int, batch_size: int, steps: int) -> jax.Array:
    """Returns indices ``[steps, batch_size]``. Each epoch is a permutation without its rest."""
    per_epoch = num_examples // batch_size
    keys = jax.random.split(key, -(-steps // per_epoch))
    orders = jax.vmap(lambda key: jax.random.permutation(key, num_examples))(keys)
    return orders[:, : per_epoch * batch_size].reshape(-1, batch_size)[:steps]


def burgers_solution(t: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Solves u_t + u u_x = nu u_xx with u(0, x) = -sin(pi x), by the Cole-Hopf transform.

    u(t, x) = -E[sin(pi y) f(y)] / E[f(y)], f(y) = exp(-cos(pi y) / (2 pi nu)), over normal y
    of mean x and variance 2 nu t (Basdevant et al., 1986). ``t`` and ``x`` broadcast.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    y = np.pi * (x[..., None] - np.sqrt(4 * VISCOSITY * t[..., None]) * nodes)
    f = weights * np.exp(-np.cos(y) / (2 * np.pi * VISCOSITY))
    return -(np.sin(y) * f).sum(-1) / f.sum(-1)


def _is_count(value: Any) -> bool:
    """Tells whether ``value`` is an int of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


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

    def test_loss(params, data):
        def one(example):
            x, y = example
            return loss_of(params, x[None], y[None])

        return jax.lax.map(one, data["test"], batch_size=TEST_CHUNK).mean()

    return Task(
        init=lambda key: model.init(key, example)["params"],
        batches=batches,
        train_loss=lambda params, data, batch: loss_of(params, *examples(data["train"], batch)),
        test_loss=test_loss,
        data=data,
        metric=metric,
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
