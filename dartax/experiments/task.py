"""What a training problem is: its configuration, and its pure functions."""

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dartax.experiments.config import ConfigError, nearest

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
    "variational",
    "gaussian_process",
    "moving_target",
    "vae",
    "embeddings",
    "fine_tuning",
    "ppo_cartpole",
    "ppo_pendulum",
    "dqn_cartpole",
]


class World(NamedTuple):
    """What an agent acts in, for a task whose data depend on the parameters.

    Attributes:
      start: Makes the first state, of environments and memories, from a key.
      collect: Maps ``(params, data, state, batches)`` to the next state and to what the losses of
        the next ``period`` steps are given in place of their ``batches``; both have leading axis
        ``[period]``. Called before every ``period``-th step.
      period: Steps between two calls of ``collect``.
      ceiling: The test loss is this number minus the mean return of episodes.
    """

    start: Callable[[jax.Array], PyTree]
    collect: Callable[[PyTree, PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    period: int
    ceiling: float


class Task(NamedTuple):
    """A training problem as pure functions, which can be vmapped over seeds and settings.

    Attributes:
      init: Makes parameters from a key.
      batches: Makes the batches of all steps from a key, with leading axis ``[steps]``. A batch
        consists of indices and keys, because the examples would need too much memory.
      train_loss: Maps ``(params, data, batch)`` to a float32 scalar.
      test_loss: Maps ``(params, data)`` to a float32 scalar. ``None`` where the training loss along
        the way is what counts.
      data: Device arrays. They are arguments, because a closure would compile them as constants.
      metric: Name of the test loss.
      test_error: Maps ``(params, data)`` to the part of the test examples that is classified
        wrongly, or ``None``.
      gradient: Maps ``(params, data, batch)`` to the loss and its gradient. ``None``: that of
        ``train_loss``.
      world: What an agent acts in, if there is one.
    """

    init: Callable[[jax.Array], PyTree]
    batches: Callable[[jax.Array], PyTree]
    train_loss: Callable[[PyTree, PyTree, PyTree], jax.Array]
    test_loss: Callable[[PyTree, PyTree], jax.Array] | None
    data: PyTree
    metric: str
    test_error: Callable[[PyTree, PyTree], jax.Array] | None = None
    gradient: Callable[[PyTree, PyTree, PyTree], tuple[jax.Array, PyTree]] | None = None
    world: World | None = None

    def value_and_grad(
        self, params: PyTree, data: PyTree, batch: PyTree
    ) -> tuple[jax.Array, PyTree]:
        """The loss of a batch and its gradient."""
        if self.gradient is not None:
            return self.gradient(params, data, batch)
        return jax.value_and_grad(self.train_loss)(params, data, batch)


_ONLY_FOR = {
    "dtype": (
        "digits",
        "mnist",
        "autoencoder",
        "cifar_convnet",
        "cifar_resnet",
        "shakespeare",
        "friedman",
        "burgers",
        "quadratic",
    ),
    "examples": ("digits", "mnist", "fine_tuning"),
    "label_noise": ("digits", "mnist"),
    "privacy_noise": ("digits", "mnist"),
    "rank": ("fine_tuning",),
    "drift": ("moving_target",),
    "judge": ("digits", "mnist", "fine_tuning", "cifar_convnet", "cifar_resnet"),
}


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A training problem and the size of its network."""

    problem: Problem
    """Kind of problem."""
    steps: int
    """Number of batches."""
    batch_size: int = 64
    """Examples per step: text windows of shakespeare, collocation points of burgers, transitions of
    ppo and dqn. Determines the gradient noise of quadratic."""
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
    examples: int = 0
    """Training images of digits, mnist and fine_tuning; 0 uses all."""
    label_noise: float = 0.0
    """Part of the training labels of digits and mnist that is replaced by random ones."""
    privacy_noise: float = 0.0
    """Noise multiplier of differentially private gradients of digits and mnist, which are clipped
    to a norm of 1 per example; 0 is none."""
    rank: int = 0
    """Rank of the adapters of fine_tuning; 0 trains the weights themselves."""
    drift: float = 0.0
    """Standard deviation of the step by which each true weight of moving_target moves."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one update, by ``optax.MultiSteps``."""
    schedule: Literal["", "constant", "linear", "cosine"] = ""
    """Replaces the schedule of all optimizers except those that are schedule-free."""
    judge: Literal["loss", "error"] = "loss"
    """What optimizers are compared by: the test loss, or the part that is classified wrongly."""

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for name in ("problem", "dtype", "schedule", "judge"):
            known = typing.get_args(hints[name])
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
        for name in ("examples", "rank"):
            if not (_is_count(value := getattr(self, name)) or value == 0):
                raise ConfigError(f"{name} must be a non-negative int, got {value!r}; pass 0.")
        if not _is_count(self.accumulate) or self.steps % self.accumulate:
            raise ConfigError(
                f"accumulate must be an int that divides the {self.steps} steps, got "
                f"{self.accumulate!r}; pass 1."
            )
        for name, high in (("label_noise", 1.0), ("privacy_noise", math.inf), ("drift", math.inf)):
            if not 0 <= (value := getattr(self, name)) < high:
                raise ConfigError(f"{name} must be in [0, {high:g}), got {value}; pass 0.0.")
        for name, problems in _ONLY_FOR.items():
            changed = getattr(self, name) != getattr(TaskConfig, name)
            if changed and self.problem not in problems:
                raise ConfigError(
                    f"{name} must be left out unless the problem is {' or '.join(problems)}, got "
                    f"{getattr(self, name)!r} for {self.problem}; delete the line."
                )
        if self.problem == "vae" and len(self.layers) != 2:
            raise ConfigError(
                f"layers must be the width and the number of codes of vae, got {self.layers!r}; "
                "pass e.g. (200, 16)."
            )
        has_mlp = self.problem in ("digits", "mnist", "autoencoder", "friedman", "burgers")
        if self.layer_scale != 1 and not (has_mlp and len(self.layers) > 1):
            raise ConfigError(
                "layer_scale must be 1 unless an MLP has two hidden layers, got "
                f"{self.layer_scale} for {self.problem} with layers {self.layers}; pass 1.0."
            )


def cross_entropy(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of logits ``[..., classes]``, in float32."""
    logits = outputs.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def squared_error(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the mean squared error over all elements, in float32."""
    return jnp.mean((outputs.astype(jnp.float32).reshape(y.shape) - y) ** 2)


def error_rate(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the part of the labels that the logits ``[..., classes]`` get wrong."""
    return jnp.mean((jnp.argmax(outputs, axis=-1) != y).astype(jnp.float32))


def epoch_batches(key: jax.Array, num_examples: int, batch_size: int, steps: int) -> jax.Array:
    """Returns indices ``[steps, batch_size]``. Drops an incomplete last batch of each epoch."""
    per_epoch = num_examples // batch_size
    keys = jax.random.split(key, -(-steps // per_epoch))
    orders = jax.vmap(lambda key: jax.random.permutation(key, num_examples))(keys)
    return orders[:, : per_epoch * batch_size].reshape(-1, batch_size)[:steps]


def _is_count(value: Any) -> bool:
    """Tells whether ``value`` is an int of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
