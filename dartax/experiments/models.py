"""Networks of the experiments."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
    """Multilayer perceptron; ``[batch, features]`` to logits ``[batch, classes]``.

    Attributes:
      hidden: Width of every hidden layer.
      num_classes: Number of outputs.
      scales: For each hidden layer, a factor that multiplies the initial kernel and divides the
        input. The initial function stays the same; the best learning rate of the kernel changes.
      activation: Activation of the hidden layers.
      dtype: Type of the parameters and of the computation.
    """

    hidden: Sequence[int]
    num_classes: int
    scales: Sequence[float] | None = None
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of a batch."""
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.dtype)
        scales = self.scales or [1.0] * len(self.hidden)
        for width, scale in zip(self.hidden, scales, strict=True):
            init = nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")
            x = self.activation(dense(width, kernel_init=init)(x / scale))
        return dense(self.num_classes)(x)


class ConvNet(nn.Module):
    """3 x 3 convolutions of stride 2; ``[batch, height, width, channels]`` to logits."""

    channels: Sequence[int]
    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of a batch."""
        for channels in self.channels:
            x = nn.relu(_conv(channels, 3, 2, self.dtype)(x))
        x = x.reshape(len(x), -1)
        return nn.Dense(self.num_classes, dtype=self.dtype, param_dtype=self.dtype)(x)


class ResNet(nn.Module):
    """Residual network (He et al., 2015) for small images, without running statistics.

    ResNet-18 has ``blocks_per_stage=(2, 2, 2, 2)`` and ``width=64``.

    Attributes:
      blocks_per_stage: Number of blocks of each stage. Every stage but the first halves the image
        and doubles the channels.
      width: Channels of the first stage.
      num_classes: Number of outputs.
      stem_stride: Stride of the first convolution.
      dtype: Type of the parameters and of the computation.
    """

    blocks_per_stage: Sequence[int]
    width: int
    num_classes: int
    stem_stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of a batch."""
        x = _conv(self.width, 3, self.stem_stride, self.dtype, use_bias=False)(x)
        x = nn.relu(_norm(self.width, self.dtype)(x))
        for stage, blocks in enumerate(self.blocks_per_stage):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = ResidualBlock(self.width * 2**stage, stride, self.dtype)(x)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, param_dtype=self.dtype)(x)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut around them."""

    channels: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Features of a batch."""
        conv = functools.partial(_conv, self.channels, dtype=self.dtype, use_bias=False)
        norm = functools.partial(_norm, self.channels, self.dtype)
        y = nn.relu(norm()(conv(3, self.stride)(x)))
        y = norm()(conv(3, 1)(y))
        if x.shape != y.shape:
            x = norm()(conv(1, self.stride)(x))
        return nn.relu(x + y)


class Transformer(nn.Module):
    """Decoder as in GPT-2, without dropout; int symbols ``[batch, length]`` to logits.

    Attributes:
      num_symbols: Number of symbols.
      width: Features per position, a multiple of ``heads``.
      depth: Number of blocks.
      heads: Attention heads per block.
      context: Maximum length.
      dtype: Type of the parameters and of the computation.
    """

    num_symbols: int
    width: int
    depth: int
    heads: int
    context: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, symbols: jax.Array) -> jax.Array:
        """Logits ``[batch, length, symbols]`` of the next symbol at each position."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.dtype}
        batch, length = symbols.shape
        position_init = nn.initializers.normal(0.02)
        positions = self.param("positions", position_init, (self.context, self.width), self.dtype)
        x = nn.Embed(self.num_symbols, self.width, **dtypes)(symbols) + positions[None, :length]
        causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
        for _ in range(self.depth):
            y = nn.Dense(3 * self.width, **dtypes)(nn.LayerNorm(**dtypes)(x))
            y = y.reshape(batch, length, self.heads, -1)
            query, key, value = jnp.split(y, 3, axis=-1)
            y = nn.dot_product_attention(query, key, value, mask=causal)
            x += nn.Dense(self.width, **dtypes)(y.reshape(x.shape))
            y = nn.gelu(nn.Dense(4 * self.width, **dtypes)(nn.LayerNorm(**dtypes)(x)))
            x += nn.Dense(self.width, **dtypes)(y)
        return nn.Dense(self.num_symbols, **dtypes)(nn.LayerNorm(**dtypes)(x))


def patch_convolution(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: str, **_: Any
) -> jax.Array:
    """Computes ``jax.lax.conv_general_dilated`` as a matrix product over patches.

    Args:
      x: Images, ``[batch, height, width, channels]``.
      kernel: ``[height, width, channels, features]``.
      strides: Strides along height and width.
      padding: ``"SAME"`` or ``"VALID"``.
      **_: Other arguments, which must have the defaults of ``nn.Conv``.
    """
    pads = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    height, width = (x.shape[i + 1] - kernel.shape[i] + 1 for i in (0, 1))
    patches = [
        x[:, i : i + height : strides[0], j : j + width : strides[1]]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _conv(features: int, size: int, stride: int, dtype: Any, use_bias: bool = True) -> nn.Conv:
    """Makes a convolution that divides height and width by ``stride``."""
    # On the CPU, lax.scan makes a convolution ten times slower. vmap makes it several times slower,
    # because it becomes a grouped convolution. A matrix product keeps its speed.
    on_cpu = jax.default_backend() == "cpu"
    return nn.Conv(
        features,
        (size, size),
        stride,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=dtype,
        conv_general_dilated=patch_convolution if on_cpu else None,
    )


def _norm(channels: int, dtype: Any) -> nn.GroupNorm:
    """Makes a group norm of eight groups, or fewer if eight do not divide the channels."""
    return nn.GroupNorm(math.gcd(8, channels), dtype=dtype, param_dtype=dtype)
