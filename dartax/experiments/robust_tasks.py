"""Training problems on which a learning rate that is learned has gone wrong.

They are noisy, short, sparse, or have few parameters or few data. ``tasks.py`` holds the others.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dartax.experiments import data as data_lib
from dartax.experiments.config import ConfigError
from dartax.experiments.models import MLP
from dartax.experiments.task import Task, TaskConfig, cross_entropy, epoch_batches, error_rate

PyTree = Any

# Samples that estimate the evidence lower bound in a test.
TEST_SAMPLES = 256
# Updates of Adam that make the network for fine-tuning, and their peak rate.
PRETRAINING_STEPS, PRETRAINING_RATE = 1000, 1e-3
# Words of the vocabulary, reach of a context to either side, and random words for every pair.
VOCABULARY, REACH, NEGATIVES = 5000, 4, 5
# Standard deviation of the noise of the regression with a moving target.
DRIFT_NOISE = 0.3


def variational(config: TaskConfig) -> Task:
    """Bayesian logistic regression by a factorized Gaussian, one sample of it per step.

    The loss is the negative evidence lower bound per example on the 569 examples of
    scikit-learn's breast cancer data; the prior is N(0, 1) (Blundell et al., 2015,
    arXiv:1505.05424).
    """
    x, y = data_lib.breast_cancer()
    count, features = x.shape

    def negative_bound(params, data, noise):
        x, y = data
        mean, log_std = params["mean"], params["log_std"]
        weights = mean + jnp.exp(log_std) * noise
        logits = x @ weights[:-1] + weights[-1]
        likelihood = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, y))
        divergence = jnp.sum((jnp.exp(2 * log_std) + mean**2 - 1) / 2 - log_std)
        return (likelihood + divergence) / count

    def train_loss(params, data, key):
        return negative_bound(params, data, jax.random.normal(key, (features + 1,)))

    def test_loss(params, data):
        noise = jax.random.normal(jax.random.key(0), (TEST_SAMPLES, features + 1))
        return jnp.mean(jax.vmap(lambda one: negative_bound(params, data, one))(noise))

    return Task(
        init=lambda key: {
            "mean": 0.1 * jax.random.normal(key, (features + 1,)),
            "log_std": jnp.full(features + 1, -2.0),
        },
        batches=lambda key: jax.random.split(key, config.steps),
        train_loss=train_loss,
        test_loss=test_loss,
        data=(jnp.asarray(x), jnp.asarray(y, jnp.float32)),
        metric="negative evidence lower bound",
    )


def gaussian_process(config: TaskConfig) -> Task:
    """Exact Gaussian process regression: three log hyperparameters, gradients without noise.

    The loss is the negative log marginal likelihood per example of ``batch_size`` points of
    a sine under an RBF kernel (Rasmussen and Williams, 2006, chapter 5).
    """
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(-3, 3, config.batch_size))
    y = 2 * np.sin(2 * x) + rng.normal(size=x.shape)

    def loss(params, data):
        x, y = data
        scale, variance, noise = (jnp.exp(params[k]) for k in ("scale", "variance", "noise"))
        square = (x[:, None] - x[None]) ** 2
        covariance = variance * jnp.exp(-square / (2 * scale**2)) + (noise + 1e-5) * jnp.eye(len(x))
        root = jnp.linalg.cholesky(covariance)
        white = jax.scipy.linalg.solve_triangular(root, y, lower=True)
        return jnp.mean(white**2 / 2 + jnp.log(jnp.diagonal(root)) + np.log(2 * np.pi) / 2)

    return Task(
        init=lambda key: dict(
            zip(("scale", "variance", "noise"), 0.3 * jax.random.normal(key, (3,)), strict=True)
        ),
        batches=lambda key: jax.random.split(key, config.steps),  # not read
        train_loss=lambda params, data, batch: loss(params, data),
        test_loss=loss,
        data=(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)),
        metric="negative log marginal likelihood",
    )


def moving_target(config: TaskConfig) -> Task:
    """Linear regression whose true weights walk at random: nothing to converge to.

    Judged by the mean loss along the way, before each update. Every step has ``batch_size``
    examples and moves each true weight by N(0, ``drift``^2).
    """
    features = sum(config.layers)

    def batches(key):
        walk_key, start_key, batch_key = jax.random.split(key, 3)
        moves = config.drift * jax.random.normal(walk_key, (config.steps, features))
        path = jax.random.normal(start_key, (1, features)) + jnp.cumsum(moves, axis=0)
        return path, jax.random.split(batch_key, config.steps)

    def train_loss(params, data, batch):
        true, key = batch
        x_key, noise_key = jax.random.split(key)
        x = jax.random.normal(x_key, (config.batch_size, features))
        noise = DRIFT_NOISE * jax.random.normal(noise_key, (config.batch_size,))
        weights = jnp.concatenate(list(params.values()))
        return jnp.mean((x @ (weights - true) - noise) ** 2)

    return Task(
        init=lambda key: {f"w_{i}": jnp.zeros(n) for i, n in enumerate(config.layers)},
        batches=batches,
        train_loss=train_loss,
        test_loss=None,
        data=(),
        metric="squared error along the way",
    )


class Autoencoder(nn.Module):
    """An MLP from codes to logits of pixels, and one from pixels to the distribution of codes."""

    width: int
    codes: int
    pixels: int

    def setup(self):
        """Makes the two networks."""
        self.encoder = MLP((self.width,), 2 * self.codes)
        self.decoder = MLP((self.width,), self.pixels)

    def __call__(self, x, noise):
        """Logits, and mean and log standard deviation of the codes."""
        mean, log_std = jnp.split(self.encoder(x), 2, axis=-1)
        return self.decoder(mean + jnp.exp(log_std) * noise), mean, log_std


def vae(config: TaskConfig) -> Task:
    """Variational autoencoder of MNIST (Kingma and Welling, 2014); ``layers``: width and codes."""
    dataset = data_lib.mnist()
    black, white = dataset.train_x.min(), dataset.train_x.max()
    train, test = ((x - black) / (white - black) for x in (dataset.train_x, dataset.test_x[:2000]))
    width, codes = config.layers
    model = Autoencoder(width, codes, train.shape[1])

    def loss(params, x, key):
        noise = jax.random.normal(key, (len(x), codes))
        outputs: Any = model.apply({"params": params}, x, noise)
        logits, mean, log_std = outputs
        likelihood = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, x), axis=-1)
        divergence = jnp.sum((jnp.exp(2 * log_std) + mean**2 - 1) / 2 - log_std, axis=-1)
        return jnp.mean(likelihood + divergence)

    def train_loss(params, data, batch):
        index, key = batch
        return loss(params, data["train"][index], key)

    def init(key):
        return model.init(key, train[:1], jnp.zeros((1, codes)))["params"]

    return Task(
        init=init,
        batches=lambda key: (
            epoch_batches(key, len(train), config.batch_size, config.steps),
            jax.random.split(key, config.steps),
        ),
        train_loss=train_loss,
        test_loss=lambda params, data: loss(params, data["test"], jax.random.key(0)),
        data={
            "train": jnp.asarray(train),
            "test": jnp.asarray(test),
        },
        metric="negative evidence lower bound",
    )


def embeddings(config: TaskConfig) -> Task:
    """Word vectors by skip-gram with negative samples (Mikolov et al., 2013, arXiv:1310.4546).

    Words of tiny Shakespeare in tables of 5,000 rows of ``width`` numbers. A step reads few rows;
    the gradients of all others are zero.
    """
    text = data_lib.shakespeare_words(VOCABULARY)
    if min(len(text.train), len(text.test)) < 2 * REACH + 2:
        raise ConfigError(
            f"the text must hold more than {2 * REACH + 1} words for training and for testing, got "
            f"{len(text.train)} and {len(text.test)}; take the published file."
        )
    # Negative samples follow the word counts to the power of 3/4 (Mikolov et al., section 2.2).
    weights = np.bincount(text.train, minlength=text.num_symbols) ** 0.75
    ends = jnp.asarray(np.cumsum(weights) / np.sum(weights), jnp.float32)

    def pairs(text, key, count):
        at_key, step_key, side_key, negative_key = jax.random.split(key, 4)
        at = jax.random.randint(at_key, (count,), REACH, len(text) - REACH)
        step = jax.random.randint(step_key, (count,), 1, REACH + 1)
        side = jnp.where(jax.random.bernoulli(side_key, shape=(count,)), 1, -1)
        negatives = jnp.searchsorted(ends, jax.random.uniform(negative_key, (count, NEGATIVES)))
        return text[at], text[at + side * step], negatives

    def loss(params, word, context, negatives):
        vector = params["word"][word]
        positive = jnp.sum(vector * params["context"][context], axis=-1)
        negative = jnp.einsum("bd,bnd->bn", vector, params["context"][negatives])
        return -jnp.mean(
            jax.nn.log_sigmoid(positive) + jnp.sum(jax.nn.log_sigmoid(-negative), axis=-1)
        )

    def init(key):
        shape = (text.num_symbols, config.width)
        return {
            "word": jax.random.uniform(key, shape, minval=-0.5, maxval=0.5) / config.width,
            "context": jnp.zeros(shape),
        }

    return Task(
        init=init,
        batches=lambda key: jax.random.split(key, config.steps),
        train_loss=lambda params, data, key: loss(
            params, *pairs(data["train"], key, config.batch_size)
        ),
        test_loss=lambda params, data: loss(params, *pairs(data["test"], jax.random.key(0), 4096)),
        data={"train": jnp.asarray(text.train), "test": jnp.asarray(text.test)},
        metric="negative log-likelihood",
    )


def fine_tuning(config: TaskConfig) -> Task:
    """A network that knows the digits 0 to 4 goes on with ``examples`` images of 5 to 9.

    With ``rank`` the weights stay as they are, and each kernel gets a product of two factors
    added (Hu et al., 2022, arXiv:2106.09685).
    """
    dataset = data_lib.mnist()
    model = MLP(config.layers, 10)
    base = _pretrained(model, dataset)

    def part(x, y, limit=None):
        chosen = np.flatnonzero(y >= 5)[:limit]
        return jnp.asarray(x[chosen]), jnp.asarray(y[chosen])

    data = {
        "train": part(dataset.train_x, dataset.train_y, config.examples or None),
        "test": part(dataset.test_x, dataset.test_y),
        "base": base,
    }

    def weights(params, data):
        if not config.rank:
            return params
        return {
            name: {
                "kernel": layer["kernel"] + params[name]["a"] @ params[name]["b"],
                "bias": layer["bias"],
            }
            for name, layer in data["base"].items()
        }

    def init(key):
        if not config.rank:
            return jax.tree.map(jnp.asarray, base)
        factors = {}
        for i, (name, layer) in enumerate(base.items()):
            rows, columns = layer["kernel"].shape
            normal = jax.random.normal(jax.random.fold_in(key, i), (rows, config.rank))
            factors[name] = {"a": normal / np.sqrt(rows), "b": jnp.zeros((config.rank, columns))}
        return factors

    def logits(params, data, x):
        return model.apply({"params": weights(params, data)}, x)

    def train_loss(params, data, index):
        x, y = (column[index] for column in data["train"])
        return cross_entropy(logits(params, data, x), y)

    def test_loss(params, data):
        return cross_entropy(logits(params, data, data["test"][0]), data["test"][1])

    def test_error(params, data):
        return error_rate(logits(params, data, data["test"][0]), data["test"][1])

    return Task(
        init=init,
        batches=lambda key: epoch_batches(
            key, len(data["train"][0]), config.batch_size, config.steps
        ),
        train_loss=train_loss,
        test_loss=test_loss,
        test_error=test_error,
        data=data,
        metric="cross-entropy",
    )


def _pretrained(model: MLP, dataset: data_lib.Dataset) -> PyTree:
    """Weights of ``model`` after 1,000 steps of Adam on the digits 0 to 4."""
    chosen = np.flatnonzero(dataset.train_y < 5)
    x, y = jnp.asarray(dataset.train_x[chosen]), jnp.asarray(dataset.train_y[chosen])
    decay = optax.linear_schedule(PRETRAINING_RATE, 0.0, PRETRAINING_STEPS)
    optimizer = optax.adam(decay)

    @jax.jit
    def train(params, x, y):
        def step(carry, key):
            params, state = carry
            index = jax.random.randint(key, (128,), 0, len(x))

            def loss(params):
                outputs: Any = model.apply({"params": params}, x[index])
                return cross_entropy(outputs, y[index])

            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(1), PRETRAINING_STEPS)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    return train(model.init(jax.random.key(0), x[:1])["params"], x, y)


def private(
    train_loss: Callable[[PyTree, PyTree, PyTree], jax.Array], noise_multiplier: float
) -> Callable[[PyTree, PyTree, PyTree], tuple[jax.Array, PyTree]]:
    """Loss and gradient of a batch under differential privacy (Abadi et al., 2016).

    The gradient of each example is clipped to a norm of 1. Normal noise of standard deviation
    ``noise_multiplier`` is added to their sum.

    Args:
      train_loss: Maps ``(params, data, (indices, keys))`` to the mean loss of the examples.
      noise_multiplier: Standard deviation over the clipping norm.
    """

    def gradient(params, data, batch):
        index, key = batch
        one = jax.value_and_grad(lambda p, i: train_loss(p, data, (i[None], key)))
        losses, grads = jax.vmap(one, in_axes=(None, 0))(params, index)
        leaves, tree = jax.tree.flatten(grads)
        total, _ = optax.per_example_global_norm_clip(leaves, 1.0)
        keys = jax.random.split(key, len(leaves))
        noisy = [
            (leaf + noise_multiplier * jax.random.normal(k, leaf.shape)) / len(index)
            for leaf, k in zip(total, keys, strict=True)
        ]
        return jnp.mean(losses), jax.tree.unflatten(tree, noisy)

    return gradient
