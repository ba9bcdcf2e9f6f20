"""Read and write Hugging Face model folders, tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.durable import flush, flush_all, write_at

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    "tiktoken.model",
)
_MORE = "additional_chat_templates"
VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "tekken.json", "tiktoken.model")
"""A tokenizer is made of one of these."""
_CONFIGS = ("config.json", "tokenizer_config.json")
"""That may name files with code."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file.

    Attributes:
        info: type and shape.
        begin: first byte in the file.
        end: the byte after its last one.
    """

    info: TensorInfo
    begin: int
    end: int


def read_header(path: Path) -> tuple[bytes, dict[str, Stored]]:
    """Everything before the first tensor, and where the tensors are.

    Raises:
        ValueError: it is not a safetensors file, its length is not what its header says, or a tensor has a type that no
            model here is made of.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_LENGTH_BYTES)
        length = int.from_bytes(first, "little")
        text = file.read(length) if _LENGTH_BYTES + length <= size else b""
    try:
        listed: dict[str, Any] = json.loads(text)
        listed.pop(_METADATA, None)
        start = _LENGTH_BYTES + length
        placed = {
            name: (str(item["dtype"]), tuple(item["shape"]), *(start + at for at in item["data_offsets"]))
            for name, item in listed.items()
        }
        end = max((end for _, _, _, end in placed.values()), default=start)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: its header cannot be read ({error!r})") from error
    if end != size:
        raise ValueError(f"{path} is not a complete safetensors file: its header asks for {end} bytes, it has {size}")
    found = {
        name: Stored(TensorInfo(_dtype(path, name, dtype), shape), begin, end)
        for name, (dtype, shape, begin, end) in placed.items()
    }
    for name, stored in found.items():
        if stored.end - stored.begin != stored.info.size_bytes:
            raise ValueError(
                f"{path}: {name} must take {stored.info.size_bytes} bytes, its header gives it another range"
            )
    return first + text, found


def _dtype(path: Path, tensor: str, name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"{path}: {tensor} has type {name}; must be one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


@dataclass(frozen=True)
class Written:
    """A tensor that was given to the disk, and xxh3-128 over the bytes that it was given as."""

    name: str
    size_bytes: int
    xxh3: str


def header_of(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """Everything before the first tensor of a file of such tensors, and the byte at which each of them begins."""
    # wide types first keep every tensor aligned
    order = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    at, place = 0, {}
    for name in order:
        info = infos[name]
        place[name], end = at, at + info.size_bytes
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    start = _LENGTH_BYTES + len(text)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, {name: start + at for name, at in place.items()}


def write_tensors(
    path: Path, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[Written]:
    """Write a new safetensors file tensor by tensor, and flush it; the same tensors give the same bytes.

    Args:
        path: to write.
        infos: of every tensor.
        tensors: the same ones, in any order; each is dropped before the next is taken.

    Yields:
        Each tensor, once it is written.

    Raises:
        ValueError: a tensor is not as ``infos`` says, or one is missing.
        OSError: the disk does not take it.
    """
    header, place = header_of(infos)
    with path.open("xb", buffering=0) as file:
        write_at(file.fileno(), header, 0)
        for name, tensor in tensors:
            if name not in place or infos[name] != TensorInfo(tensor.dtype, tuple(tensor.shape)):
                raise ValueError(
                    f"{path.name} must hold {name} once, as {infos.get(name)}, got {tensor.dtype} {list(tensor.shape)}"
                )
            content = as_bytes(tensor)
            write_at(file.fileno(), content, place.pop(name))
            yield Written(name, len(content), xxhash.xxh3_128_hexdigest(content))
        if place:
            raise ValueError(f"{path.name} must hold {', '.join(place)}, which nobody gave")
        os.fsync(file.fileno())


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU; a view of them where they lie in order."""
    content: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)


class HfFolder:
    """The tensors of a model folder; none is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        """Find the tensors.

        Args:
            path: a folder with one ``model.safetensors``, or several files and their index.

        Raises:
            FileNotFoundError: there are no weights, or a file that the index names is missing.
            ValueError: a file is not in safetensors format, the index is none, or it leaves out a
                ``model.safetensors`` that is there.
        """
        self._path = path
        self._open: dict[str, Any] = {}
        if (path / _INDEX).is_file():
            self._file_of = _read_index(path / _INDEX)
            if (path / _SINGLE).is_file() and _SINGLE not in self._file_of.values():
                raise ValueError(
                    f"{path}: {_INDEX} names other files than {_SINGLE}, which is there as well; remove whichever is "
                    "stale"
                )
            missing = sorted(file for file in set(self._file_of.values()) if not (path / file).is_file())
            if missing:
                raise FileNotFoundError(f"{path}: {_INDEX} names files that are not there: {', '.join(missing)}")
        elif (path / _SINGLE).is_file():
            self._file_of = dict.fromkeys(self._reader(_SINGLE).keys(), _SINGLE)
        else:
            found = sorted(file.name for file in path.glob("pytorch_model*.bin"))
            advice = f"; {found[0]} is a pickle, which may run code: save the model as safetensors" if found else ""
            raise FileNotFoundError(f"a model folder needs {_SINGLE} or {_INDEX}, found neither in {path}{advice}")

    @property
    def names(self) -> frozenset[str]:
        """Of all tensors."""
        return frozenset(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, onto the CPU.

        Raises:
            KeyError: the folder has no such tensor.
            ValueError: its file is damaged.
        """
        if name not in self._file_of:
            raise KeyError(f"{self._path} has no tensor {name}; it has {len(self._file_of)} others")
        try:
            tensor: Tensor = self._reader(self._file_of[name]).get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self._path / self._file_of[name]} must hold {name}: {error}") from error
        return tensor

    def slice(self, name: str, index: tuple[slice, ...], *, shape: tuple[int, ...]) -> Tensor:
        """Read a part of one tensor, onto the CPU; the rest of it is not read.

        Args:
            name: of the tensor.
            index: which part.
            shape: what the whole tensor must have.

        Raises:
            KeyError: the folder has no such tensor.
            ValueError: the tensor has another shape, or its file is damaged.
        """
        if name not in self._file_of:
            raise KeyError(f"{self._path} has no tensor {name}; it has {len(self._file_of)} others")
        try:
            stored = self._reader(self._file_of[name]).get_slice(name)
            found = tuple(stored.get_shape())
            if found != shape:
                raise ValueError(
                    f"{name} must have shape {shape}, {self._path} gives {found}; check that config.json belongs to "
                    "its weights"
                )
            part: Tensor = stored[index]
        except SafetensorError as error:
            raise ValueError(f"{self._path / self._file_of[name]} must hold {name}: {error}") from error
        return part

    def infos(self) -> dict[str, TensorInfo]:
        """Of all tensors; reads every file's header.

        Raises:
            ValueError: a file is damaged, or lacks a tensor that the index says it has.
        """
        found: dict[str, TensorInfo] = {}
        for file in sorted(set(self._file_of.values())):
            stored = read_header(self._path / file)[1]
            for name in (name for name, holder in self._file_of.items() if holder == file):
                if name not in stored:
                    raise ValueError(f"{self._path / _INDEX} says that {file} holds {name}, which it does not")
                found[name] = stored[name].info
        return found

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, size and time of the last change (ns) of each weight file."""
        stats = {file: (self._path / file).stat() for file in sorted(set(self._file_of.values()))}
        return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()]

    def _reader(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self._path / file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{self._path / file} is not a complete safetensors file: {error}") from error
        return self._open[file]


def _read_index(file: Path) -> dict[str, str]:
    try:
        listed = json.loads(file.read_text())["weight_map"]
        if not listed or not all(isinstance(holder, str) for holder in listed.values()):
            raise ValueError("it must name a file for each tensor")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not an index of weight files: {error!r}") from error
    return dict(listed)


def save_hf_folder(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    like: Path,
    architecture: str | None = None,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Write a model folder: complete under its name, or not there at all.

    Args:
        folder: to write; the folder that it goes into must exist.
        tensors: Hugging Face names and full tensors. They are consumed one by one; at most one file's worth is held.
        like: folder of a model of the same sizes: configuration and tokenizer come from there.
        architecture: written into ``config.json`` instead of that of ``like``. A ``*ForTokenClassification`` gets one
            label: it is a critic, whose output is a number.
        max_shard_bytes: a file is closed before it grows beyond this; only a larger single tensor makes a larger file.

    Raises:
        FileExistsError: ``folder`` exists.
        ValueError: there are no tensors, or two of one name.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists and is never written over; remove it or name another folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed while it wrote
    partial.mkdir()
    try:
        dtype = _write_tensors(partial, tensors, max_shard_bytes)
        copied = copy_companions(like, partial)
        config = model_config(json.loads((like / "config.json").read_text()), architecture, dtype, beside=copied)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        flush_all(partial)
        partial.rename(folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_companions(like: Path, folder: Path) -> list[str]:
    """Copy what a model folder has beside weights and ``config.json``: its tokenizer above all; the names of it."""
    companions = read_companions(like)
    write_companions(companions, folder)
    return [*companions]


def read_companions(folder: Path) -> dict[str, bytes]:
    """The content of what :func:`copy_companions` copies, by name.

    Raises:
        ValueError: ``config.json`` or ``tokenizer_config.json`` is no JSON.
    """
    code = {file for name in _CONFIGS if (folder / name).is_file() for file in _code(_read_object(folder / name))}
    wanted = [*_COPIED, *sorted(f"{_MORE}/{path.name}" for path in (folder / _MORE).glob("*.jinja"))]
    if any(file.removesuffix(".py").isidentifier() and (folder / file).is_file() for file in code):
        wanted += sorted(path.name for path in folder.glob("*.py"))  # named code may import any other
    return {name: (folder / name).read_bytes() for name in wanted if (folder / name).is_file()}


def has_vocabulary(folder: Path) -> bool:
    """Whether what :func:`copy_companions` copies has what a tokenizer is made of."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def _read_object(file: Path) -> Mapping[str, Any]:
    try:
        held = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} must be JSON: {error}") from error
    return held if isinstance(held, dict) else {}


def _code(config: Mapping[str, Any]) -> set[str]:
    """The files that ``auto_map`` names, as ``file.Class``; of another repository's it is none that a folder has."""
    named: list[Any] = [config.get("auto_map")]
    for value in named:  # one name, several or none for each kind of class
        named += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {f"{value.rpartition('.')[0]}.py" for value in named if isinstance(value, str)}


def write_companions(companions: Mapping[str, bytes], folder: Path) -> None:
    """Write what :func:`read_companions` gave."""
    for name, content in companions.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def write_index(folder: Path, file_of: Mapping[str, str], total_bytes: int) -> None:
    """Say which file holds which tensor."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(file_of)}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def file_names(count: int) -> list[str]:
    """Of a model in so many files."""
    return [_SINGLE] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]


def _write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> torch.dtype:
    """Write the files and, where there are several, their index; the type of the first tensor is the model's."""
    shards: list[list[str]] = []
    total, dtype = 0, None
    for shard in _shards(tensors, max_shard_bytes):
        dtype = dtype or next(iter(shard.values())).dtype
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
    if dtype is None:
        raise ValueError(f"a model needs at least one tensor, got none for {folder.name}")
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / _SINGLE)
        return dtype
    file_of: dict[str, str] = {}
    for number, (names, file) in enumerate(zip(shards, file_names(len(shards)), strict=True)):
        (folder / f"{number}.safetensors").rename(folder / file)
        file_of |= dict.fromkeys(names, file)
    write_index(folder, file_of, total)
    return dtype


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    seen: set[str] = set()
    size = 0
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"every tensor must be written once, got {name} twice")
        seen.add(name)
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = _owned(tensor)
        size += tensor.nbytes
    if shard:
        yield shard


def _owned(tensor: Tensor) -> Tensor:
    """On the CPU, in storage of its own: safetensors refuses tensors that share theirs, as parts of one matrix do."""
    kept = tensor.detach().cpu().contiguous()
    return kept if kept.untyped_storage().nbytes() == kept.nbytes else kept.clone()


def model_config(
    like: Mapping[str, Any], architecture: str | None, dtype: torch.dtype, *, beside: Container[str]
) -> dict[str, Any]:
    """The ``config.json`` of a model of the same sizes as another, in another type or of another architecture.

    It has no layers that predict further tokens: nothing here writes them. And it names code in files that are there,
    or none.

    Args:
        like: of the other model.
        architecture: None: the same.
        dtype: of the model.
        beside: names of the files beside it.
    """
    config = dict(like)
    if not all(file in beside for file in _code(config)):
        del config["auto_map"]
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0
    # transformers loads in the type that the configuration names, which is not always the one that was trained
    for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[key] = str(dtype).removeprefix("torch.")
    if architecture is not None:
        config["architectures"] = [architecture]
        if architecture.endswith("ForTokenClassification"):
            config |= {"num_labels": 1, "id2label": {"0": "value"}, "label2id": {"value": 0}}
    return config
