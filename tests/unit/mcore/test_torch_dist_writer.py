"""Checkpoint files that are written one tensor at a time are those of torch's own writer, and are on the disk."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.metadata import Metadata

from megatron_rl.durable import read_record
from megatron_rl.mcore.sharded_names import ShardedName
from megatron_rl.mcore.torch_dist_writer import Piece, TorchDistWriter
from megatron_rl.weights.safetensors_io import TensorInfo

TENSORS = {"wide": torch.arange(12.0).reshape(3, 4), "narrow": torch.arange(5).bfloat16()}


def writer(folder: Path) -> TorchDistWriter:
    pieces = [
        Piece(ShardedName(key, (), ()), TensorInfo(tensor.dtype, tuple(tensor.shape)))
        for key, tensor in TENSORS.items()
    ]
    return TorchDistWriter(folder, [pieces], [])


def given(place: int) -> Tensor:
    """As a part of something larger, which must not get into the file."""
    tensor = list(TENSORS.values())[place]
    return torch.cat([tensor, tensor])[: len(tensor)]


@pytest.fixture
def no_checksums() -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(before)


def metadata(folder: Path) -> Metadata:
    kept: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    kept.storage_meta = None  # an identity that is drawn anew for each
    return kept


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.usefixtures("no_checksums")
def test_file_and_metadata_are_those_that_torch_writes(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir()
    told: list[int] = []
    file = writer(mine).write_file(0, given, told.append)
    writer(mine).finish([file], "one of its own")
    save(dict(TENSORS), storage_writer=FileSystemWriter(theirs), no_dist=True)
    assert (mine / "__0_0.distcp").read_bytes() == (theirs / "__0_0.distcp").read_bytes()
    assert metadata(mine).storage_data == metadata(theirs).storage_data
    assert metadata(mine).state_dict_metadata == metadata(theirs).state_dict_metadata
    assert file.record == read_record(mine / "__0_0.distcp")
    assert told == [48, 10, 58], "written one by one, and all read back"


def test_a_byte_that_the_disk_gives_back_otherwise_is_an_error_and_the_file_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = os.fdatasync

    def spoiled(descriptor: int) -> None:
        flushed(descriptor)
        path = tmp_path / "__0_0.distcp"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr("os.fdatasync", spoiled)
    with pytest.raises(OSError, match="what the disk gives back is not what was written") as told:
        writer(tmp_path).write_file(0, given, lambda _: None)
    assert told.value.errno == errno.EIO
    assert not list(tmp_path.iterdir())


def test_tensors_must_fill_their_keys(tmp_path: Path) -> None:
    pieces = [Piece(ShardedName("layers", (at,), (3,)), TensorInfo(torch.float32, (2, 2))) for at in range(2)]
    with pytest.raises(ValueError, match="layers must have 12 elements, the plan gives it 8"):
        TorchDistWriter(tmp_path, [pieces], [])
