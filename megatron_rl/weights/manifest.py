"""What a converted model folder must be, byte for byte: ``manifest.json``, made of what was read back from the disk; of
weights that was compared with what was written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megatron_rl.durable import FileRecord, chunks, forget, read_record
from megatron_rl.weights.safetensors_io import read_header

MANIFEST = "manifest.json"
_FORMAT = 1


class Damaged(ValueError):
    """A folder is not what its manifest says; the message names the first tensor or file that differs."""


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """A tensor in a safetensors file: its bytes [begin, end) of that file, and xxh3-128 over them."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    xxh3: str


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A safetensors file: what comes before its tensors, and them."""

    size_bytes: int
    header_xxh3: str
    tensors: Mapping[str, TensorRecord]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A model folder.

    Attributes:
        plan: of the conversion that wrote it.
        shards: its safetensors files, by name.
        files: all others but the manifest itself.
    """

    plan: str
    shards: Mapping[str, ShardRecord] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    def dump(self) -> str:
        """As JSON, with one flat table of tensors."""
        tensors = {name: asdict(record) for shard in self.shards.values() for name, record in shard.tensors.items()}
        shards = {
            name: {"size_bytes": shard.size_bytes, "header_xxh3": shard.header_xxh3}
            for name, shard in self.shards.items()
        }
        files = {name: asdict(record) for name, record in self.files.items()}
        content = {"format": _FORMAT, "plan": self.plan, "files": files, "shards": shards, "tensors": tensors}
        return json.dumps(content, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        FileNotFoundError: it has none.
        Damaged: it cannot be read.
    """
    text = (folder / MANIFEST).read_bytes()
    try:
        content = json.loads(text)
        if content["format"] != _FORMAT:
            raise Damaged(f"{folder / MANIFEST} must have format {_FORMAT}, got {content['format']!r}")
        tensors: dict[str, dict[str, TensorRecord]] = {name: {} for name in content["shards"]}
        for name, item in content["tensors"].items():
            tensors[item["file"]][name] = _tensor_record(item)
        return Manifest(
            plan=content["plan"],
            files={name: FileRecord(**item) for name, item in content["files"].items()},
            shards={name: ShardRecord(**item, tensors=tensors[name]) for name, item in content["shards"].items()},
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Damaged(
            f"{folder / MANIFEST} cannot be read: {error!r}; restore it, or remove it if another program wrote it"
        ) from error


def shard_record(item: Mapping[str, Any]) -> ShardRecord:
    """One from JSON."""
    return ShardRecord(**{**item, "tensors": {name: _tensor_record(kept) for name, kept in item["tensors"].items()}})


def _tensor_record(item: Mapping[str, Any]) -> TensorRecord:
    return TensorRecord(**{**item, "shape": tuple(item["shape"])})


def read_back(path: Path, name: str, read: Callable[[int], None]) -> ShardRecord:
    """What a safetensors file holds, from the disk: what the system keeps of it in memory is dropped before.

    Args:
        path: of the file, flushed.
        name: that it will have.
        read: told the bytes read, after each tensor.

    Raises:
        ValueError: it is not a complete safetensors file.
    """
    header, tensors = read_header(path)
    records = {}
    with path.open("rb", buffering=0) as file:
        forget(file, 0, 0)
        for tensor, stored in tensors.items():
            digest, left = xxhash.xxh3_128(), stored.end - stored.begin
            for chunk in chunks(file, stored.begin, stored.end):
                digest.update(chunk)
                left -= len(chunk)
            if left:
                raise ValueError(f"{path} ends within {tensor}")
            records[tensor] = TensorRecord(
                file=name,
                dtype=str(stored.info.dtype).removeprefix("torch."),
                shape=stored.info.shape,
                begin=stored.begin,
                end=stored.end,
                xxh3=digest.hexdigest(),
            )
            read(stored.end - stored.begin)
    return ShardRecord(size_bytes=path.stat().st_size, header_xxh3=xxhash.xxh3_128(header).hexdigest(), tensors=records)


def check_shard(folder: Path, name: str, expected: ShardRecord, read: Callable[[int], None]) -> None:
    """Read a safetensors file and compare.

    Raises:
        Damaged: it is missing, cut short, or a byte of it has changed.
    """
    path = folder / name
    if not path.is_file():
        raise Damaged(f"{path}: the manifest names it, it is not there; first tensor of it: {_first(expected)}")
    size = path.stat().st_size
    if size != expected.size_bytes:
        raise Damaged(f"{path} must have {expected.size_bytes} bytes, it has {size}; {_beyond(expected, size)}")
    try:
        found = read_back(path, name, read)
    except ValueError as error:
        raise Damaged(f"{path}: {error}") from error
    for tensor, record in expected.tensors.items():
        if found.tensors.get(tensor) != record:
            raise Damaged(f"{tensor}: its bytes in {path} are not those that were written")
    if found.header_xxh3 != expected.header_xxh3:
        raise Damaged(f"{path}: its header has changed since it was written")


def check_file(folder: Path, name: str, expected: FileRecord, read: Callable[[int], None]) -> None:
    """Read another file and compare.

    Raises:
        Damaged: it is missing or has changed.
    """
    path = folder / name
    if not path.is_file():
        raise Damaged(f"{path}: the manifest names it, it is not there")
    found = read_record(path, read)
    if found != expected:
        raise Damaged(
            f"{path}: it must have {expected.size_bytes} bytes with sum {expected.xxh3}, it has "
            f"{found.size_bytes} with {found.xxh3}"
        )


def _first(shard: ShardRecord) -> str:
    return next(iter(shard.tensors), "none")


def _beyond(shard: ShardRecord, size: int) -> str:
    names = [name for name, record in shard.tensors.items() if record.end > size]
    return f"first tensor beyond its end: {names[0]}" if names else "every tensor is within it"
