"""How the bytes of a bucket get from the sender to the receivers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import timedelta
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.device import device
from megatron_rl.weights.messages import Messages, TransferError

_SHARED_MEMORY = Path("/dev/shm")
AHEAD = 2
"""Buckets that may be under way: the sender fills one while receivers take the one before."""


class Transport(Enum):
    """How the bytes of a bucket get from the sender to the receivers."""

    SHARED_MEMORY = "shared memory"
    """The receivers read them where the sender wrote them; all on one host."""
    GLOO = "gloo"
    """TCP, from CPU to CPU."""
    NCCL = "nccl"
    """From GPU to GPU, different ones."""
    CUDA_IPC = "cuda ipc"
    """The one receiver reads them in the sender's memory of the GPU that both have. Never run yet: it needs a GPU."""


def choose_transport(sender: str, receivers: Sequence[str], *, cuda: bool, shared: bool = False) -> Transport:
    """The fastest one that works.

    Args:
        sender: its host.
        receivers: their hosts.
        cuda: whether tensors live on GPUs.
        shared: whether a receiver may have the sender's GPU, which NCCL refuses.
    """
    if cuda and not shared:
        return Transport.NCCL
    if cuda and list(receivers) == [sender]:  # further ones have other GPUs, and do not see the sender's
        return Transport.CUDA_IPC
    return Transport.SHARED_MEMORY if set(receivers) <= {sender} else Transport.GLOO


class Buckets(Protocol):
    """One end of a transport."""

    def staging(self, number: int) -> Tensor:
        """Where the sender fills bucket ``number`` (from 0 in each push) and a receiver finds it: bytes."""

    def send(self, runs: Sequence[tuple[int | None, Tensor]], where: str) -> None:
        """Get parts of the staging to the receivers, who were told where they lie: to one lane, or (None) to all."""

    def receive(self, runs: Sequence[tuple[int | None, Tensor]], where: str) -> None:
        """Fill this receiver's parts of the staging."""


class SharedMemory:
    """Two buckets in memory that the sender and all receivers map. It has no name in the file system, so nothing is
    left whichever way, and whenever, a process ends: receivers find it among the files that the sender has open.
    """

    def __init__(self, path: str, bucket_bytes: int, *, name: str = "", descriptor: int | None = None) -> None:
        size = AHEAD * bucket_bytes
        self.name = name
        """By which a receiver opens them."""
        self._descriptor = descriptor
        self._memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8).view(AHEAD, bucket_bytes)

    @classmethod
    def create(cls, bucket_bytes: int) -> SharedMemory:
        """Make them, as the sender; :class:`TransferError` where there is no room."""
        try:
            descriptor = os.open(_SHARED_MEMORY, os.O_RDWR | os.O_TMPFILE, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, AHEAD * bucket_bytes)  # else a full one is a SIGBUS at some write
                found = os.fstat(descriptor)
                path = f"/proc/{os.getpid()}/fd/{descriptor}"
                name = json.dumps([path, found.st_dev, found.st_ino])
                return cls(path, bucket_bytes, name=name, descriptor=descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise TransferError(
                f"{_SHARED_MEMORY} must have room for {AHEAD} buckets of {bucket_bytes} bytes: {error}; enlarge it or "
                "make buckets smaller"
            ) from error

    def release(self) -> None:
        """Nobody opens them any more; whoever has them open keeps them."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @classmethod
    def open(cls, name: str, bucket_bytes: int) -> SharedMemory:
        """Open the sender's, as a receiver; :class:`TransferError` where they are not there."""
        path, *identity = json.loads(name)
        try:
            found = Path(path).stat()
            reason = f"{path} is another file" if [found.st_dev, found.st_ino] != identity else ""
        except OSError as error:
            reason = str(error)
        if reason:
            raise TransferError(
                f"the sender's shared memory must be on this host: {reason}; the two go by one host name, so give them "
                f"one {_SHARED_MEMORY}, one list of processes and one user (containers), or two names"
            )
        return cls(path, bucket_bytes)

    def staging(self, number: int) -> Tensor:
        """As :meth:`Buckets.staging`."""
        return self._memory[number % AHEAD]

    def send(self, runs: Sequence[tuple[int | None, Tensor]], where: str) -> None:
        """The receivers see it already."""

    def receive(self, runs: Sequence[tuple[int | None, Tensor]], where: str) -> None:
        """It is there already."""


class CudaMemory:
    """Two buckets on the GPU that sender and receiver have; the receiver maps the sender's by CUDA's handle of them."""

    def __init__(self, memory: Tensor, name: str, *, received: bool = False) -> None:
        self.name = name
        self._memory = memory
        self._received = received

    @classmethod
    def create(cls, bucket_bytes: int) -> CudaMemory:
        """Make them, as the sender."""
        memory = torch.empty(AHEAD, bucket_bytes, dtype=torch.uint8, device=device())
        return cls(memory, encode_handle(memory.untyped_storage()._share_cuda_()[1:]))

    @classmethod
    def open(cls, name: str, bucket_bytes: int) -> CudaMemory:
        """Map the sender's, as a receiver; :class:`TransferError` where they are on another GPU."""
        here = device()
        try:
            # GPUs are numbered by each process: the receiver's number, not the sender's
            storage = torch.UntypedStorage._new_shared_cuda(here.index, *decode_handle(name))
        except RuntimeError as error:
            raise TransferError(f"the sender's memory must lie on {here}, the GPU of this receiver: {error}") from error
        memory = torch.empty(0, dtype=torch.uint8, device=here).set_(storage)
        return cls(memory[: AHEAD * bucket_bytes].view(AHEAD, bucket_bytes), name, received=True)

    def release(self) -> None:
        """It goes with the tensor."""

    def staging(self, number: int) -> Tensor:
        """As :meth:`Buckets.staging`."""
        bucket = self._memory[number % AHEAD]
        if not self._received:
            return bucket
        mine = bucket.clone()
        torch.accelerator.synchronize()  # once the receiver has confirmed the bucket, the sender overwrites it
        return mine

    def send(self, runs: Sequence[tuple[int | None, Tensor]], where: str) -> None:
        """The receiver sees it already."""

    def receive(self, runs: Sequence[tuple[int | None, Tensor]], where: str) -> None:
        """It is there already."""


def encode_handle(parts: Sequence[int | bytes | None]) -> str:
    """A handle of CUDA memory as text: what torch gives for a storage that is shared, without the device's number."""
    return json.dumps([part.hex() if isinstance(part, bytes) else part for part in parts])


def decode_handle(text: str) -> tuple[int | bytes | None, ...]:
    """What :func:`encode_handle` took."""
    return tuple(bytes.fromhex(part) if isinstance(part, str) else part for part in json.loads(text))


class _GlooBuckets:
    """A buffer at each end, and transfers to each receiver."""

    def __init__(self, messages: Messages, bucket_bytes: int) -> None:
        self._messages = messages
        self._buffer = torch.empty(bucket_bytes, dtype=torch.uint8)

    def staging(self, number: int) -> Tensor:
        return self._buffer

    def send(self, runs: Sequence[tuple[int | None, Tensor]], where: str) -> None:
        self._messages.send_all([(lane, content) for lane, content in runs if len(content)], where)

    def receive(self, runs: Sequence[tuple[int | None, Tensor]], where: str) -> None:
        for _, into in runs:
            if len(into):
                self._messages.receive(0, into, where)


class _NcclBuckets:
    """A buffer on each GPU, and broadcasts: over a group of all, and over one of the sender and each lane."""

    def __init__(self, messages: Messages, store: Any, bucket_bytes: int) -> None:
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = timedelta(seconds=messages.timeout_s)
        lanes = range(messages.lanes) if messages.rank == 0 else [messages.own_lane]
        self._groups: dict[int | None, Any] = {}
        for lane in [None, *lanes] if messages.lanes > 1 else [None]:
            members = [0, *messages.lane(lane)]
            prefix = dist.PrefixStore("nccl" if lane is None else f"nccl/{lane}", store)
            self._groups[lane] = nccl(prefix, members.index(messages.rank), len(members), options)
        self._messages = messages
        self._buffer = torch.empty(bucket_bytes, dtype=torch.uint8, device="cuda")

    def staging(self, number: int) -> Tensor:
        return self._buffer

    def send(self, runs: Sequence[tuple[int | None, Tensor]], where: str) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        for lane, content in runs:  # one after the other: groups at work together must be so in one order on all GPUs
            if len(content):
                peer = 0 if self._messages.rank else self._messages.lane(lane)
                self._messages.start(partial(self._groups[lane].broadcast, [content], options), peer, where)()

    receive = send  # a broadcast is the same call at both ends


def buckets_over(transport: Transport, messages: Messages, store: Any, bucket_bytes: int) -> Buckets:
    """One end of a transport that copies from memory to memory."""
    if transport is Transport.NCCL:
        return _NcclBuckets(messages, store, bucket_bytes)
    return _GlooBuckets(messages, bucket_bytes)
