"""What several programs share: handwritten digits, and a cross entropy."""

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

STEPS = 400


def digits():
    """Images of 64 values in [0, 1] and labels: those to learn from, and 450 to test on."""
    x, y = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(x, y, test_size=450, random_state=0)
    return (np.float32(x / 16), y), (np.float32(test_x / 16), test_y)


def batches(data, size=64, steps=STEPS):
    draws = np.random.default_rng(0)
    for _ in range(steps):
        chosen = draws.integers(0, len(data[0]), size)
        yield data[0][chosen], data[1][chosen]


def cross_entropy(logits, y):
    return jax.numpy.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))
