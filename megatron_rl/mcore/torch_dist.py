"""Tensors and metadata of megatron-core's ``torch_dist`` checkpoints, one tensor at a time, without a process group.

``dist_checkpointing.load`` needs all ranks and all tensors at once. What it reads is torch's own format for distributed
checkpoints: here tensors are read by the byte ranges that the checkpoint's metadata give. To import this module takes
0.4 s, for torch's planners.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_rl.mcore.sharded_names import ShardedName
from megatron_rl.weights.safetensors_io import TensorInfo

if TYPE_CHECKING:
    from megatron_rl.mcore.torch_dist_writer import Piece, WrittenFile

METADATA, COMMON, CONFIG = ".metadata", "common.pt", "metadata.json"
"""Torch's account of the tensors; megatron-core's state that is no tensor; its account of the format."""


def write_metadata(
    folder: Path,
    files: Mapping[str, Sequence[Piece]],
    extra_states: Sequence[str],
    written: Sequence[WrittenFile],
    identity: str,
) -> None:
    """Write torch's account of what is where; the same arguments give the same bytes.

    Args:
        folder: of the checkpoint.
        files: the tensors of each file, by its name.
        extra_states: keys of the empty objects, which come first in the first file.
        written: where things are in each file.
        identity: of the checkpoint.
    """
    plans = [SavePlan([_tensor_item(piece) for piece in file]) for file in files.values()]
    plans[0] = SavePlan(
        [*(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in extra_states), *plans[0].items]
    )
    plans, metadata = create_default_global_save_plan(plans)
    metadata.storage_data = {
        item.index: _StorageInfo(name, begin, length)
        for name, plan, file in zip(files, plans, written, strict=True)
        for item, (begin, length) in zip(plan.items, file.places, strict=True)
    }
    metadata.storage_meta = StorageMeta(save_id=identity)  # torch draws one at random
    metadata.version = CURRENT_DCP_VERSION
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def _tensor_item(piece: Piece) -> WriteItem:
    name, shape = piece.name, piece.info.shape
    offset = torch.Size((*name.index, *(0 for _ in shape)))
    return WriteItem(
        index=MetadataIndex(name.key, offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offset, sizes=torch.Size((*(1 for _ in name.axes), *shape))),
            properties=TensorProperties(dtype=piece.info.dtype),
            size=torch.Size((*name.axes, *shape)),
        ),
    )


class TorchDistFolder:
    """The tensors of a checkpoint folder, ours or megatron-core's, whatever layout wrote it; none is read before it is
    asked for.
    """

    def __init__(self, path: Path) -> None:
        """Read what the folder says it holds.

        Raises:
            FileNotFoundError: it is not a complete ``torch_dist`` checkpoint.
            ValueError: its metadata are damaged, or name bytes that its files do not have.
        """
        for name in (METADATA, CONFIG):
            if not (path / name).is_file():
                raise FileNotFoundError(f"a Megatron checkpoint folder needs {name}, found none in {path}")
        self.path = path
        try:
            metadata = FileSystemReader(path).read_metadata()
            kept: Mapping[str, Any] = metadata.state_dict_metadata
            self._tensors = {key: item for key, item in kept.items() if isinstance(item, TensorStorageMetadata)}
            self._places: Mapping[MetadataIndex, Any] = metadata.storage_data
            ends = self._ends()
        except OSError:
            raise
        except Exception as error:  # a pickle that has changed may do anything
            raise ValueError(f"{path / METADATA} is damaged: {error!r}") from error
        self._check_sizes(ends)

    def files_of(self, keys: Iterable[str]) -> frozenset[str]:
        """Those that hold these tensors."""
        chunks = ((key, chunk) for key in keys for chunk in self._tensors[key].chunks)
        return frozenset(self._places[MetadataIndex(key, chunk.offsets)].relative_path for key, chunk in chunks)

    @property
    def keys(self) -> frozenset[str]:
        """Of all tensors."""
        return frozenset(self._tensors)

    def info(self, name: ShardedName) -> TensorInfo:
        """Type and shape of one tensor.

        Raises:
            KeyError: there is no such key.
            ValueError: as many layers or experts as ``name`` says do not share it.
        """
        if name.key not in self._tensors:
            raise KeyError(f"{self.path} has no tensor {name.key}; it has {len(self._tensors)} others")
        kept = self._tensors[name.key]
        lead = len(name.axes)
        if tuple(kept.size[:lead]) != name.axes:
            raise ValueError(
                f"{self.path}: {name.key} must stack {name.axes} layers or experts, its shape is {tuple(kept.size)}; "
                "check that config.json belongs to the weights"
            )
        return TensorInfo(kept.properties.dtype, tuple(kept.size[lead:]))

    def tensor(self, name: ShardedName) -> Tensor:
        """Read one tensor, put together from the shards that it was saved in.

        Raises:
            KeyError, ValueError: as :meth:`info`; or a file is damaged, or does not hold all of the tensor.
        """
        info = self.info(name)
        lead = len(name.axes)
        found = None
        elements = 0
        for chunk in self._tensors[name.key].chunks:
            if any(not at <= i < at + n for i, at, n in zip(name.index, chunk.offsets, chunk.sizes, strict=False)):
                continue
            shard = self._chunk(name.key, chunk)
            for index, at in zip(name.index, chunk.offsets, strict=False):
                shard = shard[index - at]
            if tuple(shard.shape) == info.shape:
                return shard
            if found is None:
                found = torch.empty(info.shape, dtype=info.dtype)
            region = tuple(slice(at, at + n) for at, n in zip(chunk.offsets[lead:], shard.shape, strict=True))
            found[region] = shard
            elements += shard.numel()
            del shard  # before the next one is read
        if found is None or elements != found.numel():
            raise ValueError(
                f"{self.path}: its files hold {elements} elements of {name.key}{list(name.index)}, not all"
            )
        return found

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._places[MetadataIndex(key, chunk.offsets)]
        file = self.path / place.relative_path
        try:
            with file.open("rb") as stream:
                view: Any = _create_file_view(stream, place.offset, place.length)
                shard: Tensor = torch.load(view, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file} must hold {key} at byte {place.offset}, and is damaged: {reason}") from error
        if shard.shape != chunk.sizes:
            raise ValueError(f"{file}: {key} must have shape {tuple(chunk.sizes)}, got {tuple(shard.shape)}")
        return shard

    def _ends(self) -> dict[str, int]:
        """How long each file must be at the least; a tensor without a place in one is an error of any kind."""
        for key, tensor in self._tensors.items():
            for chunk in tensor.chunks:
                self._places[MetadataIndex(key, chunk.offsets)]
        ends: dict[str, int] = {}
        for place in self._places.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        return ends

    def _check_sizes(self, ends: Mapping[str, int]) -> None:
        for file, end in ends.items():
            found = (self.path / file).stat().st_size if (self.path / file).is_file() else None
            if found is None:
                raise FileNotFoundError(f"{self.path}: its metadata name {file}, which is not there")
            if found < end:
                raise ValueError(f"{self.path / file} is cut short: it must have {end} bytes, it has {found}")
