"""Data sets: generated, shipped with scikit-learn, from local files, or from the network."""

import gzip
import hashlib
import os
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class DataError(RuntimeError):
    """Data that is missing or damaged; the message says what to do."""


class Dataset(NamedTuple):
    """Examples and what to predict of them, split as published where they are.

    Attributes:
      train_x: float32, ``[examples, features]`` or ``[examples, height, width, channels]``.
      train_y: ``[examples]``; int32 labels, or float32 targets of a regression.
      test_x: Like ``train_x``, standardized by the training examples.
      test_y: Like ``train_y``.
      num_classes: Number of labels; 1 for a regression.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    num_classes: int


class Text(NamedTuple):
    """A text as int32 indices into its sorted character set, cut in two."""

    train: np.ndarray
    test: np.ndarray
    num_symbols: int


# SHA-256 of the pixels, then the labels, as bytes.
DIGITS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"

MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
# SHA-256 of the four files, decompressed: archives of equal content may differ.
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
    """``$DARTAX_DATA_DIR``, by default a cache folder."""
    if folder := os.environ.get("DARTAX_DATA_DIR"):
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dartax"


def load(name: str) -> Dataset:
    """Loads ``"digits"`` or ``"mnist"``."""
    return {"digits": digits, "mnist": mnist}[name]()


def digits() -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels, every fifth one held out for testing."""
    from sklearn.datasets import load_digits

    try:
        x, y = load_digits(return_X_y=True)
        sha256 = hashlib.sha256(x.astype(np.uint8).tobytes() + y.astype(np.uint8).tobytes())
        as_published = sha256.hexdigest() == DIGITS_SHA256
    except (OSError, EOFError, ValueError, zlib.error):
        as_published = False
    if not as_published:
        raise DataError(
            "digits must be as scikit-learn publishes them, got another content; reinstall it "
            "with pip install --force-reinstall scikit-learn."
        )
    test = np.arange(len(x)) % 5 == 4
    return _classification(x[~test], y[~test], x[test], y[test])


def mnist() -> Dataset:
    """MNIST: 60,000 training and 10,000 test images of 28 x 28 pixels, in the original order."""
    train_x, train_y, test_x, test_y = (
        _parse_idx(_mnist_file(name), name) for name in MNIST_SHA256
    )
    return _classification(
        train_x.reshape(len(train_x), -1), train_y, test_x.reshape(len(test_x), -1), test_y
    )


def cifar10() -> Dataset:
    """CIFAR-10, or a part of it: colour images ``[n, 32, 32, 3]`` from ``cifar10_small.npz``.

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
            "of another content; delete it and fetch it again."
        )
    return _classification(train_x, train_y, test_x, test_y, axis=(0, 1, 2))


def shakespeare() -> Text:
    """Tiny Shakespeare (Karpathy, 2015): 1,115,394 characters, the last tenth for testing."""
    name = "tinyshakespeare.txt"
    raw = _published_file(
        "Tiny Shakespeare", [name], SHAKESPEARE_URL, SHAKESPEARE_SHA256, needed=name
    )
    symbols, text = np.unique(np.frombuffer(raw, np.uint8), return_inverse=True)
    train, test = np.split(text.astype(np.int32), [len(text) * 9 // 10])
    return Text(train, test, len(symbols))


def friedman(num_train: int = 4000, num_test: int = 2000) -> Dataset:
    """Friedman #1 (Friedman, 1991): five of ten features matter, targets with noise."""
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(num_train + num_test, n_features=10, noise=1.0, random_state=0)
    train_x, test_x = _standardized(x[:num_train], x[num_train:], axis=0)
    train_y, test_y = _standardized(y[:num_train], y[num_train:])
    return Dataset(train_x, train_y, test_x, test_y, num_classes=1)


def _standardized(
    train: np.ndarray, test: np.ndarray, axis: int | tuple[int, ...] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Zero mean and unit variance of the training values over ``axis``, by default over all."""
    mean, std = train.mean(axis, dtype=np.float64), train.std(axis, dtype=np.float64)
    return ((train - mean) / std).astype(np.float32), ((test - mean) / std).astype(np.float32)


def _classification(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    axis: tuple[int, ...] | None = None,
) -> Dataset:
    """Ten classes; pixels standardized over ``axis``."""
    train_x, test_x = _standardized(train_x, test_x, axis)
    return Dataset(train_x, train_y.astype(np.int32), test_x, test_y.astype(np.int32), 10)


def _mnist_file(name: str) -> bytes:
    """The decompressed content of one MNIST file."""
    return _published_file(
        "MNIST",
        [f"mnist/{name}", f"mnist/{name}.gz"],
        f"{MNIST_URL}{name}.gz",
        MNIST_SHA256[name],
        needed=f"mnist/{name}.gz and its three siblings",
    )


def _published_file(title: str, names: Sequence[str], url: str, sha256: str, needed: str) -> bytes:
    """The decompressed content of a file, downloaded where it is missing.

    Args:
      title: What it belongs to, for messages.
      names: Where it may be in :func:`data_dir`; the last one is what ``url`` holds.
      url: Where to download it from.
      sha256: Checksum of the decompressed content.
      needed: What the folder should hold, for messages.
    """
    paths = [data_dir() / name for name in names]
    path = next((path for path in paths if path.exists()), paths[-1])
    if not path.exists():
        try:
            _download(url, path)
        except (OSError, urllib.error.URLError) as error:
            raise DataError(
                f"{title} must be in {path.parent} or downloadable, got neither ({error}); set "
                f"DARTAX_DATA_DIR to a folder that holds {needed}."
            ) from error
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} must be a whole, readable file, got: {error}; delete it and run again."
        ) from error
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise DataError(
            f"{path} must be the published {title} file, got {len(raw):,} bytes of another "
            "content; delete it and run again."
        )
    return raw


def _download(url: str, path: Path) -> None:
    """Fetches ``url``; an interrupted download leaves no file at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url, timeout=30) as response:
        content = response.read()
    partial = path.with_suffix(f".part{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def _parse_idx(raw: bytes, name: str) -> np.ndarray:
    """An array from the IDX format: two zero bytes, type (8 is uint8), rank, sizes, data."""
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(f"{name} must be an IDX file of uint8, got {raw[:4]!r}; fetch it again.")
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
