"""Writes megatron-core's ``torch_dist`` checkpoints one tensor at a time, without a process group.

``dist_checkpointing.save`` needs all ranks and all tensors at once. The files hold what torch's own writer puts there,
one ``torch.save`` after another (a test compares the bytes); torch says at the end, in the metadata, where each is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.durable import CheckedFile, FileRecord, read_back
from megatron_rl.mcore.sharded_names import ShardedName
from megatron_rl.weights.manifest import Damaged
from megatron_rl.weights.safetensors_io import TensorInfo, as_bytes

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint: where it goes, and what it is."""

    name: ShardedName
    info: TensorInfo


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """A file of a checkpoint that is on the disk.

    Attributes:
        record: what the disk gave back, which is what was written.
        places: of each object in it, in the order of the plan: its first byte, and its length.
    """

    record: FileRecord
    places: tuple[tuple[int, int], ...]


def written_file(item: Mapping[str, Any]) -> WrittenFile:
    """One from JSON."""
    return WrittenFile(
        record=FileRecord(**item["record"]), places=tuple((begin, length) for begin, length in item["places"])
    )


class TorchDistWriter:
    """Writes a checkpoint file by file; each may be written by another process, forked off the one that planned.

    Nobody needs anything of anybody else, so there are no collectives, and a process that dies is noticed at once.
    """

    def __init__(self, folder: Path, files: Sequence[Sequence[Piece]], extra_states: Sequence[str]) -> None:
        """Plan the files.

        Args:
            folder: exists.
            files: which tensors go into each of them.
            extra_states: keys of the empty objects; they go into the first file.

        Raises:
            ValueError: the tensors do not fill their keys exactly.
        """
        self._folder, self._files, self._extra_states = folder, files, extra_states
        whole: dict[str, int] = {}
        held: dict[str, int] = {}
        for piece in (piece for file in files for piece in file):
            key, elements = piece.name.key, math.prod(piece.info.shape)
            whole[key] = math.prod(piece.name.axes) * elements
            held[key] = held.get(key, 0) + elements
        for key, elements in whole.items():
            if held[key] != elements:
                raise ValueError(f"{key} must have {elements} elements, the plan gives it {held[key]}")

    def path(self, number: int) -> Path:
        """Of file ``number``, from 0: the name that torch's writer gives to that of a rank."""
        return self._folder / f"__{number}_0.distcp"

    def write_file(self, number: int, tensor_of: Callable[[int], Tensor], moved: Callable[[int], None]) -> WrittenFile:
        """Write file ``number``, flush it, and compare what the disk gives back with what was written.

        Args:
            number: from 0.
            tensor_of: gives each of its tensors by its place in the file; called once for each, when it is written.
            moved: told the bytes of the tensors, once when they are written and once when they are read back.

        Returns:
            what :meth:`finish` must be given.

        Raises:
            OSError: the disk does not take it, or gives back something else.
        """
        path, pieces = self.path(number), self._files[number]
        path.unlink(missing_ok=True)
        try:
            with CheckedFile(path) as file, _no_checksums():
                places = [_save([None], file) for _ in (self._extra_states if number == 0 else ())]
                for at, piece in enumerate(pieces):
                    places.append(_save(_stored(tensor_of(at), piece), file))
                    moved(piece.info.size_bytes)
                record = file.checked()
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        moved(self._size(number))
        return WrittenFile(record=record, places=tuple(places))

    def check_file(self, number: int, written: WrittenFile, moved: Callable[[int], None]) -> None:
        """Read file ``number`` and compare it with what was written.

        Raises:
            Damaged: it is missing or has changed.
        """
        path = self.path(number)
        if not path.is_file() or read_back(path) != written.record:
            raise Damaged(f"{path} is not the file that was written")
        moved(2 * self._size(number))

    def finish(self, written: Sequence[WrittenFile], identity: str) -> None:
        """Write what is not tensors, once all files are written.

        Args:
            written: the files.
            identity: of the weights, which tells this checkpoint from another one with the same names and sizes.
        """
        from megatron_rl.mcore.torch_dist import COMMON, CONFIG, write_metadata  # slow, see there

        torch.save({}, self._folder / COMMON)
        (self._folder / CONFIG).write_text(json.dumps(_FORMAT))
        files = {self.path(number).name: file for number, file in enumerate(self._files)}
        write_metadata(self._folder, files, self._extra_states, written, identity)

    def _size(self, number: int) -> int:
        return sum(piece.info.size_bytes for piece in self._files[number])


def _save(content: Tensor | list[None], file: CheckedFile) -> tuple[int, int]:
    begin = file.tell()
    try:
        torch.save(content, file)
    except RuntimeError as error:
        cause = _disk_error(error)
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror) from error
    return begin, file.tell() - begin


def _stored(tensor: Tensor, piece: Piece) -> Tensor:
    """In the shape that the checkpoint keeps it in, and in storage of its own, all of which torch saves; no copy."""
    kept = torch.frombuffer(as_bytes(tensor), dtype=tensor.dtype)
    return kept.reshape((*(1 for _ in piece.name.axes), *piece.info.shape))


@contextmanager
def _no_checksums() -> Iterator[None]:
    """An archive's own ones take as long as writing it, and torch.load never looks at them."""
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(computed)


def _disk_error(error: BaseException | None) -> OSError | None:
    """What the disk said: torch's archive fails once more when it is closed, and hides it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
