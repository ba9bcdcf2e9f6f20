"""Tensors, and slices of tensors, as buckets of bounded size: what is in them, and what both ends say they saw."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from megatron_rl.interfaces import PushReceipt
from megatron_rl.weights.device_sum import DeviceSum
from megatron_rl.weights.plan import Region

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}

_CACHED_BYTES = 1 << 18
"""Copied and hashed at a time."""


class Piece(NamedTuple):
    """Some bytes of a tensor, or of a slice of one: as many as go into one bucket. Plain data."""

    name: str
    dtype: str
    shape: Sequence[int]
    """Of the tensor."""
    cut: Sequence[int] | None
    """Dim, first index and the one behind the last of the slice; None: it is the tensor."""
    start: int
    size: int

    @property
    def region(self) -> Region | None:
        """Of the slice."""
        if self.cut is None:
            return None
        dim, first, behind = self.cut
        return Region(rank=None, name=self.name, shape=tuple(self.shape), dim=dim, start=first, stop=behind)

    @property
    def content_shape(self) -> tuple[int, ...]:
        """Of the slice, or the tensor."""
        region = self.region
        return tuple(self.shape) if region is None else region.region_shape

    @property
    def whole(self) -> int:
        """Bytes of the slice, or the tensor."""
        return math.prod(self.content_shape) * DTYPES[self.dtype].itemsize

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Stream:
    """The bytes of a tensor, or of a slice of it, that go to the same receivers.

    Attributes:
        lane: whose slice it is; None: all receivers get it.
        head: a piece with all of it.
        content: the bytes.
    """

    lane: int | None
    head: Piece
    content: Tensor


def streams(name: str, tensor: Tensor, regions: Sequence[Region] | None) -> list[Stream]:
    """What of a tensor goes to whom.

    Args:
        name: of the tensor.
        tensor: whole.
        regions: by lane, which part it gets; None: all receivers get all of it.

    Raises:
        ValueError: there is no way to send its type.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"{name}: type must be one of {', '.join(DTYPES)}, got {dtype}")
    tensor = tensor.detach()
    parts: list[tuple[int | None, tuple[int, int, int] | None, Tensor]] = [(None, None, tensor)]
    if regions is not None:
        parts = [
            (lane, (region.dim, region.start, region.stop), tensor[region.index]) for lane, region in enumerate(regions)
        ]
    return [
        Stream(lane, Piece(name, dtype, tuple(tensor.shape), cut, 0, part.nbytes), _bytes(part))
        for lane, cut, part in parts
    ]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@dataclass
class Run:
    """The part of a bucket that goes to the same receivers.

    Attributes:
        lane: whose it is; None: all receivers get it.
        pieces: what is in it, one behind the other.
        contents: their bytes.
    """

    lane: int | None
    pieces: list[Piece] = field(default_factory=list)
    contents: list[Tensor] = field(default_factory=list)

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(piece.size for piece in self.pieces)


def filled(tensors: Iterable[Sequence[Stream]], bucket_bytes: int) -> Iterator[list[Run]]:
    """Buckets of at most ``bucket_bytes``, each but the last full. The slices of a tensor fill them side by side, so
    that no lane waits until another has all of its own.

    Args:
        tensors: what goes to whom of each.
        bucket_bytes: at least 1.

    Yields:
        the runs of a bucket: what all get, then by lane.
    """
    runs: dict[int | None, Run] = {}
    room = bucket_bytes
    for parts in tensors:
        left = [(part, 0) for part in parts]
        while left:
            share, rest = -(-room // len(left)), []
            for part, start in left:
                size = min(share, room, part.head.size - start)
                if size or not part.head.size:
                    run = runs.setdefault(part.lane, Run(part.lane))
                    run.pieces.append(part.head._replace(start=start, size=size))
                    run.contents.append(part.content[start : start + size])
                if start + size < part.head.size:
                    rest.append((part, start + size))
                room -= size
            left = rest
            if room == 0:
                yield _in_order(runs)
                runs, room = {}, bucket_bytes
    if runs:
        yield _in_order(runs)


def _in_order(runs: dict[int | None, Run]) -> list[Run]:
    return [runs[lane] for lane in sorted(runs, key=lambda lane: -1 if lane is None else lane)]


class Tally:
    """Counts and hashes what goes to all receivers, and what to each lane, each in order: on the host the bytes, on a
    GPU sums of them, which are waited for once.
    """

    def __init__(self) -> None:
        """Nothing so far."""
        self._counts: dict[int | None, _Count] = {}
        self._device_sum = DeviceSum()

    def copy(self, lane: int | None, piece: Piece, content: Tensor, into: Tensor) -> None:
        """Copy the next bytes, and take them in as they are then; what the host copies it hashes from its cache."""
        count = self._counts.setdefault(lane, _Count())
        if piece.start == 0:
            count.digest.update(json.dumps([piece.name, piece.dtype, piece.shape, piece.cut]).encode())
            count.tensors += 1
            count.slices += piece.cut is not None
            count.tensor_bytes += piece.tensor_bytes
        if into.device.type == "cpu":
            for to, part in zip(into.split(_CACHED_BYTES), content.split(_CACHED_BYTES), strict=True):
                to.copy_(part)
                array: Any = to.numpy()
                count.digest.update(array)
        else:
            into.copy_(content)
            count.sums.append(self._device_sum.of(into))
        count.size_bytes += piece.size

    def receipt(self, version: int, lane: int) -> PushReceipt:
        """Of what a receiver of the lane gets: its own and what all get."""
        parts = [self._counts.get(whose, _Count()) for whose in (None, lane)]
        return PushReceipt(
            version=version,
            tensors=sum(part.tensors for part in parts),
            slices=sum(part.slices for part in parts),
            size_bytes=sum(part.size_bytes for part in parts),
            tensor_bytes=sum(part.tensor_bytes for part in parts),
            digest=":".join(part.hexdigest() for part in parts),
        )


@dataclass
class _Count:
    digest: Any = field(default_factory=xxhash.xxh3_128)
    sums: list[Tensor] = field(default_factory=list)
    tensors: int = 0
    slices: int = 0
    size_bytes: int = 0
    tensor_bytes: int = 0

    def hexdigest(self) -> str:
        """Of all that was counted."""
        if self.sums:
            sums: Any = torch.stack(self.sums).cpu().numpy()
            self.digest.update(sums)
            self.sums = []
        return str(self.digest.hexdigest())
