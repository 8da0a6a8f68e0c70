# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that every process writes its part of: a folder, by torch.distributed.checkpoint.

PyTorch keeps the index of such a folder as a pickle, and reading a pickle may run any code that
somebody put there. So here the index is JSON (`INDEX`), written last, with the size and check sum
of every other file; what is no tensor is in `REST`, which is read without unpickling, as the parts
themselves are. Any number of processes reads the folder, in any mode; each takes what it needs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from msdkern.cli import CommandError
from msdkern.train import parallel
from msdkern.train.files import sync_folder, write_atomically

FORMAT = "msdkern sharded checkpoint 1"
INDEX, REST = "index.json", "rest.pt"
Index = dict[str, Any]


def write(folder: Path, tensors: dict[str, Tensor], rest: bytes) -> None:
    """Writes ``tensors`` into a new folder, every process those that it holds.

    All processes call it and all return, or raise ``CommandError``, when the folder is complete.
    """
    parallel.first(lambda: folder.mkdir())
    writer = _Writer(str(folder))
    try:
        with _quietly():
            dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise parallel.agreed(f"{folder}: cannot be written: {_line(reason)}") from None
    parallel.first(lambda: write_atomically(folder / REST, lambda file: file.write(rest)))
    names = parallel.first(lambda: sorted(path.name for path in folder.iterdir()))
    share = names[parallel.rank() :: parallel.size()]
    mine = parallel.together(lambda: {name: _file(folder / name) for name in share})
    files = {name: entry for part in parallel.gathered(mine) for name, entry in part.items()}
    index = {
        "format": FORMAT,
        "tensors": writer.index,
        "crc32": _crc(writer.index),
        "files": files,
    }
    text = json.dumps(index).encode()
    parallel.first(lambda: write_atomically(folder / INDEX, lambda file: file.write(text)))


def read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills ``tensors`` in place, whole ones and shards alike.

    All processes of the group call it, each with its own. Raises ``CommandError`` if one is not
    in the folder, or there in another shape.
    """
    try:
        with _quietly():
            dcp.load(dict(tensors), storage_reader=_Reader(str(folder)))
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise parallel.agreed(f"{folder}: does not fit this run: {_line(reason)}") from None


def read_whole(folder: Path, index: Index) -> dict[str, Tensor]:
    """All tensors of the folder, by one process alone."""
    tensors = {
        name: torch.empty(entry["size"], dtype=_dtype(entry["dtype"]))
        for name, entry in index["tensors"].items()
    }
    read(folder, tensors)
    return tensors


def names(folder: Path) -> list[str]:
    """Of the tensors in the folder."""
    return list(read_index(folder)["tensors"])


def fill(tensors: dict[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """`read`, from tensors in memory."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, target in tensors.items():
        value = whole.get(name)
        if value is None or value.shape != target.shape:
            got = "none" if value is None else list(value.shape)
            raise CommandError(f"checkpoint: {name} must be {list(target.shape)}; got {got}")
        if isinstance(target, DTensor):
            value = value.to(target.device)
            value = distribute_tensor(value, target.device_mesh, target.placements)
        target.copy_(value)


def is_sharded(path: Path) -> bool:
    return (path / INDEX).is_file()


def verify(folder: Path) -> None:
    """Raises ``CommandError`` unless the folder is whole and undamaged."""
    for name, expected in read_index(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise CommandError(f"{folder}: damaged: {name} is missing")
        if _file(path) != expected:
            raise CommandError(f"{folder}: damaged: the check sum of {name} does not match")


def read_index(folder: Path) -> Index:
    """The index, its contents checked: names stay inside the folder, pieces make up tensors."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}")
        if any(Path(name).name != name or name in ("", "..") for name in index["files"]):
            raise ValueError("it names files outside the folder")
        if REST not in index["files"]:
            raise ValueError(f"it does not list {REST}")
        if index["crc32"] != _crc(index["tensors"]):
            raise ValueError("its check sum does not match")
        for name, entry in index["tensors"].items():
            _check(name, entry, index["files"])
    except OSError as error:
        raise CommandError(f"{folder}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CommandError(f"{folder}: not a checkpoint, or a damaged one: {error}") from None
    return index


def _check(name: str, entry: Index, files: Mapping[str, Any]) -> None:
    width, pieces = _dtype(entry["dtype"]).itemsize, entry["pieces"]
    if sum(math.prod(piece["size"]) for piece in pieces) != math.prod(entry["size"]):
        raise ValueError(f"the pieces of {name} do not make up {entry['size']}")
    _check_cover(name, entry["size"], pieces)
    for piece in pieces:
        if piece["file"] not in files:
            raise ValueError(f"a piece of {name} is in a file that is not listed")
        if width * math.prod(piece["size"]) > files[piece["file"]]["bytes"]:
            raise ValueError(f"a piece of {name} is larger than its file")


def _check_cover(name: str, size: Sequence[int], pieces: Sequence[Index]) -> None:
    """Pieces of the right number of elements lie inside the tensor, and apart."""
    if any(type(n) is not int or n < 0 for n in size):
        raise ValueError(f"{name} has the size {size}")
    boxes = []
    for piece in pieces:
        begins, sizes = piece["offset"], piece["size"]
        if not len(begins) == len(sizes) == len(size):
            raise ValueError(f"a piece of {name} has other dimensions")
        boxes.append([(a, a + n) for a, n in zip(begins, sizes, strict=True)])
        if not all(0 <= a <= b <= n for (a, b), n in zip(boxes[-1], size, strict=True)):
            raise ValueError(f"a piece of {name} lies outside it")
    for one, other in itertools.combinations(boxes, 2):
        if all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True)):
            raise ValueError(f"pieces of {name} overlap")


def _crc(tensors: Index | None) -> int:
    return zlib.crc32(json.dumps(tensors, sort_keys=True).encode())


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return dtype


def _file(path: Path) -> Index:
    """Size and check sum of a file."""
    crc, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


# The index, as PyTorch's own classes and as JSON ----------------------------------------------


class _Writer(dcp.FileSystemWriter):
    """Keeps the index, in the process that coordinates, where PyTorch would pickle it."""

    index: Index | None = None

    def finish(self, metadata: Metadata, results: Sequence[Sequence[Any]]) -> None:  # type: ignore[override]
        written = {
            (result.index.fqn, tuple(result.index.offset or ())): result.storage_data
            for part in results
            for result in part
        }
        self.index = {
            name: _entry(name, entry, written)
            for name, entry in metadata.state_dict_metadata.items()
        }
        sync_folder(Path(self.path))


def _entry(name: str, entry: Any, written: Mapping[tuple, Any]) -> Index:
    pieces = []
    for chunk in entry.chunks:
        where = written[name, tuple(chunk.offsets)]
        pieces.append(
            {
                "offset": list(chunk.offsets),
                "size": list(chunk.sizes),
                "file": where.relative_path,
                "begin": where.offset,
                "length": where.length,
            }
        )
    dtype = str(entry.properties.dtype).removeprefix("torch.")
    return {"dtype": dtype, "size": list(entry.size), "pieces": pieces}


class _Reader(dcp.FileSystemReader):
    """Takes the index from JSON. It holds tensors only, which PyTorch reads by weights_only."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        entries = read_index(Path(self.path))["tensors"]
        storage = {
            MetadataIndex(name, piece["offset"]): _StorageInfo(
                piece["file"], piece["begin"], piece["length"]
            )
            for name, entry in entries.items()
            for piece in entry["pieces"]
        }
        known: dict[str, Any] = {name: _metadata(entry) for name, entry in entries.items()}
        return Metadata(known, storage_data=storage, storage_meta=StorageMeta())


def _metadata(entry: Index) -> TensorStorageMetadata:
    chunks = [
        ChunkStorageMetadata(torch.Size(piece["offset"]), torch.Size(piece["size"]))
        for piece in entry["pieces"]
    ]
    properties = TensorProperties(dtype=_dtype(entry["dtype"]))
    return TensorStorageMetadata(properties, torch.Size(entry["size"]), chunks)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without PyTorch's remark that a single process works alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
