"""Data sets: generated, from scikit-learn, from local files, or downloaded."""

import gzip
import hashlib
import os
import re
import urllib.request
import zipfile
import zlib
from collections import Counter
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class DataError(RuntimeError):
    """Missing or damaged data; the message says what to do."""


class Dataset(NamedTuple):
    """Training and test examples, split as published.

    Attributes:
      train_x: float32, ``[examples, features]`` or ``[examples, height, width, channels]``.
      train_y: ``[examples]``; int32 labels, or float32 regression targets.
      test_x: Like ``train_x``, and standardized with the statistics of the training examples.
      test_y: Like ``train_y``.
      num_classes: Number of labels; 1 for a regression.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    num_classes: int


class Text(NamedTuple):
    """A text, as int32 indices into its sorted character set, split in two parts."""

    train: np.ndarray
    test: np.ndarray
    num_symbols: int


# SHA-256 of the pixels followed by the labels, as bytes.
DIGITS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"

MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
# SHA-256 of the decompressed files, because archives of the same content can differ.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

CIFAR_FILE = "cifar10_small.npz"
CIFAR_ARRAYS = (
    "uint8 arrays train_images and test_images of shape [n, 32, 32, 3] and train_labels and "
    "test_labels of shape [n] with values from 0 to 9"
)


def data_dir() -> Path:
    """Returns ``$DARTAX_DATA_DIR``, by default a cache folder."""
    if folder := os.environ.get("DARTAX_DATA_DIR"):
        return Path(folder)
    import pooch  # here, because it warns in notebooks without ipywidgets

    return Path(pooch.os_cache("dartax"))


def load(name: str) -> Dataset:
    """Loads ``"digits"`` or ``"mnist"``."""
    return {"digits": digits, "mnist": mnist}[name]()


def digits() -> Dataset:
    """Loads 1,797 handwritten digits of 8 x 8 pixels. Every fifth one is for testing."""
    from sklearn.datasets import load_digits

    try:
        x, y = load_digits(return_X_y=True)
        sha256 = hashlib.sha256(x.astype(np.uint8).tobytes() + y.astype(np.uint8).tobytes())
        as_published = sha256.hexdigest() == DIGITS_SHA256
    except (OSError, EOFError, ValueError, zlib.error):
        as_published = False
    if not as_published:
        raise DataError(
            "digits must be as scikit-learn publishes them, got different content; reinstall "
            "scikit-learn with pip install --force-reinstall scikit-learn."
        )
    test = np.arange(len(x)) % 5 == 4
    return _classification(x[~test], y[~test], x[test], y[test])


def mnist() -> Dataset:
    """Loads MNIST: 60,000 training and 10,000 test images of 28 x 28 pixels, in their order."""
    train_x, train_y, test_x, test_y = (
        _parse_idx(_mnist_file(name), name) for name in MNIST_SHA256
    )
    return _classification(
        train_x.reshape(len(train_x), -1), train_y, test_x.reshape(len(test_x), -1), test_y
    )


def cifar10() -> Dataset:
    """Loads CIFAR-10, or a part of it, from ``cifar10_small.npz``.

    Raises:
      DataError: If the file is missing or damaged.
    """
    path = data_dir() / CIFAR_FILE
    if not path.exists():
        raise DataError(
            f"CIFAR-10 must be in {path.parent}, got no {CIFAR_FILE} there and no mirror has it; "
            f"set DARTAX_DATA_DIR to a folder that holds {CIFAR_FILE} with {CIFAR_ARRAYS}."
        )
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            train_x, train_y = archive["train_images"], archive["train_labels"]
            test_x, test_y = archive["test_images"], archive["test_labels"]
        as_described = all(
            x.dtype == y.dtype == np.uint8
            and y.ndim == 1
            and len(y) > 0
            and x.shape == (len(y), 32, 32, 3)
            and y.max() < 10
            for x, y in ((train_x, train_y), (test_x, test_y))
        )
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
        as_described = False
    if not as_described:
        raise DataError(
            f"{path} must be an npz file with {CIFAR_ARRAYS}, got {path.stat().st_size:,} bytes "
            "of different content; delete it and fetch it again."
        )
    return _classification(train_x, train_y, test_x, test_y, axis=(0, 1, 2))


def shakespeare() -> Text:
    """Loads Tiny Shakespeare (Karpathy, 2015): 1,115,394 characters, a tenth for testing."""
    symbols, text = np.unique(np.frombuffer(_shakespeare(), np.uint8), return_inverse=True)
    train, test = np.split(text.astype(np.int32), [len(text) * 9 // 10])
    return Text(train, test, len(symbols))


def shakespeare_words(size: int) -> Text:
    """Loads the words of Tiny Shakespeare that are among the ``size`` most frequent.

    Words are numbered from the most frequent one on.
    """
    raw = _shakespeare().lower()
    cut = len(raw) * 9 // 10
    words = [re.findall(rb"[a-z']+", part) for part in (raw[:cut], raw[cut:])]
    number = {word: i for i, (word, _) in enumerate(Counter(words[0]).most_common(size))}
    train, test = (
        np.array([number[word] for word in part if word in number], np.int32) for part in words
    )
    return Text(train, test, len(number))


def _shakespeare() -> bytes:
    name = "tinyshakespeare.txt"
    return _published_file("Tiny Shakespeare", name, SHAKESPEARE_URL, SHAKESPEARE_SHA256, name)


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    """Loads 569 tumors with 30 features, standardized, and whether they are benign."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    x, _ = _standardized(x, x, axis=0)
    return x, y.astype(np.float32)


def friedman(num_train: int = 4000, num_test: int = 2000) -> Dataset:
    """Makes Friedman #1 (Friedman, 1991): ten features, of which five matter, and noisy targets."""
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(num_train + num_test, n_features=10, noise=1.0, random_state=0)
    train_x, test_x = _standardized(x[:num_train], x[num_train:], axis=0)
    train_y, test_y = _standardized(y[:num_train], y[num_train:])
    return Dataset(train_x, train_y, test_x, test_y, num_classes=1)


def _standardized(
    train: np.ndarray, test: np.ndarray, axis: int | tuple[int, ...] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Gives the training values zero mean and unit variance over ``axis``, by default over all."""
    mean, std = train.mean(axis, dtype=np.float64), train.std(axis, dtype=np.float64)
    return ((train - mean) / std).astype(np.float32), ((test - mean) / std).astype(np.float32)


def _classification(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    axis: tuple[int, ...] | None = None,
) -> Dataset:
    """Makes a dataset of ten classes, and standardizes the pixels over ``axis``."""
    train_x, test_x = _standardized(train_x, test_x, axis)
    return Dataset(train_x, train_y.astype(np.int32), test_x, test_y.astype(np.int32), 10)


def _mnist_file(name: str) -> bytes:
    """Returns the decompressed content of one MNIST file."""
    return _published_file(
        "MNIST",
        f"mnist/{name}",
        f"{MNIST_URL}{name}.gz",
        MNIST_SHA256[name],
        needed=f"mnist/{name}.gz and its three siblings",
    )


def _published_file(title: str, name: str, url: str, sha256: str, needed: str) -> bytes:
    """Returns the decompressed content of a file, which is downloaded if it is missing.

    Args:
      title: Name of the data set, for messages.
      name: Path in :func:`data_dir`. The file there may also be compressed, with ``.gz`` added.
      url: Address of the file.
      sha256: Checksum of the decompressed content.
      needed: Files that the folder should hold, for messages.
    """
    path = data_dir() / name
    if not path.exists() and path.with_name(f"{path.name}.gz").exists():
        path = path.with_name(f"{path.name}.gz")
    try:
        if not path.exists():
            import pooch

            pooch.get_logger().setLevel("WARNING")
            pooch.retrieve(url, sha256, path.name, path.parent, downloader=_download)
    except (OSError, HTTPException) as error:
        raise DataError(
            f"{title} must be in {path.parent} or downloadable, got neither ({error}); set "
            f"DARTAX_DATA_DIR to a folder that holds {needed}."
        ) from error
    except (EOFError, ValueError, zlib.error) as error:  # pooch raises ValueError
        raise DataError(
            f"{url} must be the published {title} file, got different content; try again, or set "
            f"DARTAX_DATA_DIR to a folder that holds {needed}."
        ) from error
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} must be a complete, readable file, got: {error}; delete it and run again."
        ) from error
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise DataError(
            f"{path} must be the published {title} file, got {len(raw):,} bytes of different "
            "content; delete it and run again."
        )
    return raw


def _download(url: str, output_file: str, _: Any) -> None:
    """Downloads ``url`` for pooch, and decompresses it, because archives can differ."""
    with urllib.request.urlopen(url, timeout=30) as response:
        raw = response.read()
    Path(output_file).write_bytes(gzip.decompress(raw) if url.endswith(".gz") else raw)


def _parse_idx(raw: bytes, name: str) -> np.ndarray:
    """Parses the IDX format: two zero bytes, the type (8 is uint8), rank, sizes and data."""
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(f"{name} must be an IDX file of uint8, got {raw[:4]!r}; fetch it again.")
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
