"""Data sets: digits from scikit-learn, MNIST from IDX files or the network."""

import gzip
import hashlib
import os
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np


class DataError(RuntimeError):
    """Data that is missing or damaged; the message says what to do."""


class Dataset(NamedTuple):
    """Images as rows of float32 features, labels int32, split as published."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    num_classes: int


MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
# SHA-256 of the four files, decompressed: archives of equal content may differ.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


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

    x, y = load_digits(return_X_y=True)
    test = np.arange(len(x)) % 5 == 4
    return _standardized(x[~test], y[~test], x[test], y[test])


def mnist() -> Dataset:
    """MNIST: 60,000 training and 10,000 test images of 28 x 28 pixels, in the original order."""
    files = [_mnist_file(name) for name in MNIST_SHA256]
    train_x, train_y, test_x, test_y = (
        _parse_idx(raw, name) for raw, name in zip(files, MNIST_SHA256, strict=True)
    )
    return _standardized(
        train_x.reshape(len(train_x), -1), train_y, test_x.reshape(len(test_x), -1), test_y
    )


def _standardized(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
) -> Dataset:
    """Ten classes; zero mean and unit variance over all training pixels, one number each."""
    mean, std = train_x.mean(dtype=np.float64), train_x.std(dtype=np.float64)
    return Dataset(
        train_x=((train_x - mean) / std).astype(np.float32),
        train_y=train_y.astype(np.int32),
        test_x=((test_x - mean) / std).astype(np.float32),
        test_y=test_y.astype(np.int32),
        num_classes=10,
    )


def _mnist_file(name: str) -> bytes:
    """The decompressed content of one MNIST file, downloaded where it is missing."""
    folder = data_dir() / "mnist"
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            break
    else:
        _download(path)
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} must be a whole, readable file, got: {error}; delete it and run again."
        ) from error
    if hashlib.sha256(raw).hexdigest() != MNIST_SHA256[name]:
        raise DataError(
            f"{path} must be the published MNIST file, got {len(raw):,} bytes of another "
            "content; delete it and run again."
        )
    return raw


def _download(path: Path) -> None:
    """Fetches ``path`` from the mirror; an interrupted download leaves no such file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(MNIST_URL + path.name, timeout=30) as response:
            content = response.read()
        partial = path.with_suffix(f".part{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)
    except (OSError, urllib.error.URLError) as error:
        raise DataError(
            f"MNIST must be in {path.parent} or downloadable, got neither ({error}); set "
            f"DARTAX_DATA_DIR to a folder that holds mnist/{path.name} and its three siblings."
        ) from error


def _parse_idx(raw: bytes, name: str) -> np.ndarray:
    """An array from the IDX format: two zero bytes, type (8 is uint8), rank, sizes, data."""
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(f"{name} must be an IDX file of uint8, got {raw[:4]!r}; fetch it again.")
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
