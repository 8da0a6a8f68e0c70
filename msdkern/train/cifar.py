# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 from a local folder, in either of its two usual layouts; nothing is ever downloaded."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msdkern.cli import CommandError
from msdkern.train.data import Rows

Split = tuple[Rows, Rows, tuple[str, ...]]
NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
)  # fmt: skip
TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
LAYOUTS = (
    "a folder with cifar-10-batches-py/data_batch_1..5 and test_batch, or one with"
    " train/<class>/*.png|jpg and test/<class>/*"
)
SUFFIXES = {".jpg", ".jpeg", ".png"}


def load_cifar10(root: str, cache: str = "") -> Split:
    """Training rows, test rows and class names from ``root``.

    A tree of image files is decoded once; with ``cache`` the pixels are kept in that folder under
    a name that changes with any file's name, size or time. ``root`` is never written to.
    """
    if not root:
        raise CommandError(f"--root: --data cifar10 needs {LAYOUTS}")
    folder = Path(root).expanduser()
    for base in (folder, folder / "cifar-10-batches-py", folder / "cifar10"):
        try:
            if (base / TRAIN_FILES[0]).is_file():
                return read_batches(base)
            if (base / "train").is_dir() and (base / "test").is_dir():
                return read_tree(base, cache)
        except PermissionError as error:
            raise CommandError(f"--root: cannot read {error.filename}: permission denied") from None
    state = "not a folder that can be read" if not os.access(folder, os.R_OK) else "neither layout"
    raise CommandError(f"--root: must be {LAYOUTS}; {root!r} is {state}")


# --- the python batches ---------------------------------------------------------------------


class _BatchUnpickler(pickle.Unpickler):
    """Builds numpy arrays, and nothing else: a pickle may otherwise run any code when read."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        allowed: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _encode,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no image needs")
        return allowed[module, name]


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """What numpy's own pickles start from; the pixels follow as the array's state."""
    if kind is not np.ndarray or shape not in ((0,), [0]):
        raise pickle.UnpicklingError("it builds something other than a plain array")
    return np.ndarray((0,), np.uint8)


def _encode(text: str, encoding: str) -> bytes:
    """Python 3 spells bytes this way in the old pickle protocol that these files use."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it uses the encoding {encoding!r}")
    return text.encode("latin1")


def read_pickle(path: Path) -> Any:
    """The dictionary in one batch file; refuses every pickle that holds more than arrays."""
    data = path.read_bytes()
    try:
        return _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CommandError(f"{path}: not a CIFAR-10 batch: {error}") from None


def read_batches(base: Path) -> Split:
    """The layout of the original archive: six pickles of 3072 bytes per image, planes first."""
    missing = [name for name in (*TRAIN_FILES, "test_batch") if not (base / name).is_file()]
    if missing:
        raise CommandError(f"--root: {base} lacks {', '.join(missing)}")
    parts = [read_batch(base / name) for name in TRAIN_FILES]
    images, labels = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    return Rows(images, labels), Rows(*read_batch(base / "test_batch")), NAMES


def read_batch(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 ``[N, 32, 32, 3]`` and labels int64 ``[N]`` of one file."""
    batch = read_pickle(path)
    if not isinstance(batch, dict):
        raise CommandError(f"{path}: not a CIFAR-10 batch: it holds a {type(batch).__name__}")
    pixels, labels = batch.get(b"data"), batch.get(b"labels")
    if not isinstance(pixels, np.ndarray):
        pixels = np.empty((0, 0))
    right = (
        pixels.dtype == np.uint8
        and pixels.ndim == 2
        and pixels.shape[1] == 3072
        and isinstance(labels, list)
        and len(labels) == len(pixels)
        and all(type(label) is int and 0 <= label < 10 for label in labels)
    )
    if not right:
        raise CommandError(f"{path}: not a CIFAR-10 batch: needs data uint8 [N, 3072] and N labels")
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64)


# --- one folder per class -------------------------------------------------------------------


def read_tree(base: Path, cache: str) -> Split:
    """``train/<class>/*`` and ``test/<class>/*``; labels follow the sorted class names."""
    names = tuple(sorted(entry.name for entry in (base / "train").iterdir() if entry.is_dir()))
    held_out = tuple(sorted(entry.name for entry in (base / "test").iterdir() if entry.is_dir()))
    if not names or names != held_out:
        raise CommandError(
            f"--root: train and test must hold the same class folders; got {list(names)} and"
            f" {list(held_out)} in {base}"
        )
    files = {part: list_images(base / part, names) for part in ("train", "test")}
    return cached(cache, files, names, lambda: {p: decode(*files[p]) for p in files})


def list_images(base: Path, names: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    """The image files below ``base`` in a fixed order, and the label of each."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(p for p in (base / name).iterdir() if p.suffix.lower() in SUFFIXES)
        if not found:
            raise CommandError(f"--root: {base / name} holds no .png or .jpg file")
        paths += found
        labels += [label] * len(found)
    return paths, labels


def decode(paths: list[Path], labels: list[int]) -> Rows:
    """All files as one uint8 array ``[N, H, W, 3]``; they must share one size."""
    try:
        from PIL import Image
    except ImportError:
        raise CommandError(
            "--data cifar10: image files need pillow: pip install 'msdkern[train]'"
        ) from None
    images: np.ndarray | None = None
    for row, path in enumerate(paths):
        try:
            with Image.open(path) as file:
                pixels = np.asarray(file.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise CommandError(f"{path}: cannot be read as an image: {error}") from None
        if images is None:
            images = np.empty((len(paths), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise CommandError(
                f"{path}: every image must be {images.shape[2]}x{images.shape[1]} as the first is;"
                f" got {pixels.shape[1]}x{pixels.shape[0]}"
            )
        images[row] = pixels
    return Rows(torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64))


def cached(
    folder: str,
    files: dict[str, tuple[list[Path], list[int]]],
    names: tuple[str, ...],
    build: Callable[[], dict[str, Rows]],
) -> Split:
    """``build()``, or what an earlier call with the same files left in ``folder``."""
    path = Path(folder) / f"images-{listing_hash(files)}.npz" if folder else None
    parts = _read_cache(path) if path is not None else None
    if parts is None:
        parts = build()
        if path is not None:
            _write_cache(path, parts)
    return parts["train"], parts["test"], names


def listing_hash(files: dict[str, tuple[list[Path], list[int]]]) -> str:
    """Changes when a file is added, taken away, renamed, resized or touched."""
    digest = hashlib.sha256()
    for part, (paths, labels) in files.items():
        for path, label in zip(paths, labels, strict=True):
            facts = path.stat()
            digest.update(
                f"{part}/{label}/{path.name}:{facts.st_size}:{facts.st_mtime_ns}\n".encode()
            )
    return digest.hexdigest()[:16]


def _read_cache(path: Path) -> dict[str, Rows] | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            array = {name: torch.from_numpy(stored[name]) for name in stored.files}
        return {p: Rows(array[f"{p}_images"], array[f"{p}_labels"]) for p in ("train", "test")}
    except Exception:  # absent or damaged: the images themselves are the truth
        return None


def _write_cache(path: Path, parts: dict[str, Rows]) -> None:
    from msdkern.train.files import write_atomically

    arrays = {f"{part}_images": rows.images.numpy() for part, rows in parts.items()}
    arrays |= {f"{part}_labels": rows.labels.numpy() for part, rows in parts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
