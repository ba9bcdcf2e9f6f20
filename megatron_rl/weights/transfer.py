"""Move named tensors from the trainer's rank 0 to every worker of the engine.

The sender and the receivers make a process group of their own, beside whatever default group each process has. What
travels is data only, JSON headers and raw bytes, as a sequence of messages that rank 0 broadcasts:

* DATA: names, types and shapes of some tensors, then their bytes end to end;
* END: how many tensors and bytes there were;
* ABORT: why the sender gives up, so that nobody waits for the rest.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from megatron_rl.interfaces import PushReceipt

_ALIGNMENT = 16  # a tensor can only be viewed in the received bytes where its type's size divides its offset
_DTYPES = {
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


class TransferError(RuntimeError):
    """Tensors did not get from the sender to a receiver."""


class _Kind(IntEnum):
    DATA = 0
    END = 1
    ABORT = 2


@dataclass(frozen=True)
class Listener:
    """Where receivers find the sender.

    Attributes:
        host: address that the sender listens on, and on no other.
        port: a free one that the system chose.
    """

    host: str
    port: int
    _store: Any = field(repr=False)


def listen(host: str) -> Listener:
    """Start to listen for receivers, on a free port of ``host``; ends when the listener and its channel are gone.

    Raises:
        TransferError: this machine has no such address.
    """
    try:
        # the store by itself would listen on every interface
        with socket.create_server((host, 0), family=_family(host)) as server:
            port = server.getsockname()[1]
            store = dist.TCPStore(
                host, port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach(), use_libuv=True
            )
    except OSError as error:
        raise TransferError(f"host must be an address of this machine, got {host!r}: {error}") from error
    return Listener(host, port, store)


class Channel:
    """One sender and its receivers, joined for as many pushes as there are. Not for several threads.

    After an error other than an abort by the sender the two ends may be out of step: close it and join again.
    """

    def __init__(self, group: Any, *, rank: int, world_size: int, backend: str, timeout_s: float) -> None:
        """Use :meth:`join`."""
        self._group = group
        self._rank = rank
        self._peers = "rank 0, the sender" if rank else f"the receivers, ranks 1 to {world_size - 1}"
        self._device = torch.device("cuda" if backend == "nccl" else "cpu")
        self._timeout_s = timeout_s

    @classmethod
    def join(
        cls, at: Listener | tuple[str, int], *, rank: int, world_size: int, timeout_s: float, backend: str = "gloo"
    ) -> Channel:
        """Meet the others; returns when all have joined.

        Args:
            at: the sender's own listener; for a receiver its host and port.
            rank: 0 for the sender.
            world_size: sender and receivers together, at least 2.
            timeout_s: bound on joining, and later on every wait for a message.
            backend: ``gloo``, or ``nccl`` where tensors are sent from GPU to GPU.

        Raises:
            TransferError: somebody did not come in time, or joined with another world size.
            ValueError: an argument is wrong.
        """
        if (rank == 0) != isinstance(at, Listener) or not 0 <= rank < world_size or world_size < 2:
            raise ValueError(
                "the sender joins at its own listener as rank 0, a receiver at (host, port) as a rank from 1 to "
                f"world_size - 1; got rank {rank} of {world_size} at {at}"
            )
        deadline = time.monotonic() + timeout_s
        if isinstance(at, Listener):
            host, port, store = at.host, at.port, at._store
        else:
            host, port = at
            store = _connect(host, port, timeout_s)
        _meet(store, f"{host}:{port}", rank, world_size, deadline, timeout_s)
        wait = timedelta(seconds=timeout_s)
        store.set_timeout(wait)
        try:
            group = _make_group(dist.PrefixStore("channel", store), host, rank, world_size, wait, backend)
        except RuntimeError as error:
            raise TransferError(f"rank {rank} found all others at {host}:{port}, then lost one: {error}") from error
        return cls(group, rank=rank, world_size=world_size, backend=backend, timeout_s=timeout_s)

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]], *, chunk_bytes: int = 64 << 20) -> PushReceipt:
        """Send tensors to every receiver; an exception of the iterable reaches them as an abort.

        Args:
            version: the receivers must ask for the same.
            tensors: name and tensor, consumed one by one.
            chunk_bytes: tensors travel together up to this size; a larger one travels alone.

        Returns:
            what was sent.

        Raises:
            TransferError: a receiver is gone or does not take the data in time.
            Exception: what ``tensors`` raised.
        """
        if self._rank:
            raise ValueError(f"only rank 0 sends, this is rank {self._rank}")
        digest = _Digest()
        try:
            for chunk in _chunks(tensors, chunk_bytes):
                meta = [_meta(name, tensor) for name, tensor in chunk]
                payload = _pack([tensor for _, tensor in chunk], self._device)
                digest.update(meta, payload)
                self._broadcast_message(_Kind.DATA, {"version": version, "tensors": meta}, version)
                self._broadcast(payload, version)
        except TransferError:
            raise  # the group is broken: there is nobody to tell
        except BaseException as error:
            with suppress(TransferError):
                reason = f"{type(error).__name__}: {error}"
                self._broadcast_message(_Kind.ABORT, {"version": version, "reason": reason}, version)
            raise
        receipt = digest.receipt(version)
        counts = {"version": version, "tensors": receipt.tensors, "size_bytes": receipt.size_bytes}
        self._broadcast_message(_Kind.END, counts, version)
        return receipt

    def receive(self, version: int) -> Reception:
        """Receive what the sender sends as ``version``; errors come while the result is iterated."""
        if not self._rank:
            raise ValueError("rank 0 sends, only the others receive")
        return Reception(self, version)

    def close(self) -> None:
        """Leave the group; whoever still waits for this process gets an error."""
        self._group = None

    def _broadcast_message(self, kind: _Kind, header: Mapping[str, Any], version: int) -> None:
        body = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
        self._broadcast(torch.tensor([kind, len(body)]), version)
        self._broadcast(body, version)

    def _next_message(self, version: int) -> tuple[_Kind, dict[str, Any]]:
        kind, length = self._broadcast(torch.empty(2, dtype=torch.int64), version).tolist()
        body = self._broadcast(torch.empty(length, dtype=torch.uint8), version)
        header: dict[str, Any] = json.loads(body.cpu().numpy().tobytes())
        return _Kind(kind), header

    def _broadcast(self, tensor: Tensor, version: int) -> Tensor:
        """From rank 0; gives the tensor as it is on the channel's device."""
        if self._group is None:
            raise TransferError(f"version {version}: the channel is closed; join again")
        moved = tensor.to(self._device)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        started = time.monotonic()
        try:
            self._group.broadcast([moved], options).wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            waited = time.monotonic() - started
            raise TransferError(
                f"version {version}: rank {self._rank} waited {waited:.1f} s (at most {self._timeout_s:g}) for "
                f"{self._peers}: {str(error).splitlines()[0]}"
            ) from error
        return moved


class Reception(Iterator[tuple[str, Tensor]]):
    """The tensors of one push as they arrive: iterate it once.

    Attributes:
        receipt: what arrived; None until the iteration has come to its end.
    """

    def __init__(self, channel: Channel, version: int) -> None:
        """Use :meth:`Channel.receive`."""
        self.receipt: PushReceipt | None = None
        self._channel = channel
        self._version = version
        self._tensors = self._arriving()

    def __next__(self) -> tuple[str, Tensor]:
        """The next name and tensor.

        Raises:
            TransferError: the sender gave up, is gone or is silent for too long, or sends another version.
        """
        return next(self._tensors)

    def drain(self) -> None:
        """Let the rest go by, as a receiver must that cannot use it, so that the others need not wait for it."""
        with suppress(TransferError):
            for _ in self._tensors:
                pass

    def _arriving(self) -> Iterator[tuple[str, Tensor]]:
        digest, channel, version = _Digest(), self._channel, self._version
        stranger: int | None = None
        while True:
            kind, header = channel._next_message(version)
            if header["version"] != version:
                stranger = header["version"]
            if kind is _Kind.ABORT:
                raise TransferError(f"version {header['version']}: the sender gave up: {header['reason']}")
            if kind is _Kind.END:
                break
            meta = header["tensors"]
            offsets, size = _layout(meta)
            payload = channel._broadcast(torch.empty(size, dtype=torch.uint8, device=channel._device), version)
            if stranger is not None:
                continue  # heard to its end, so that the sender is not left waiting
            digest.update(meta, payload)
            for (name, dtype, shape), offset in zip(meta, offsets, strict=True):
                part = payload[offset : offset + _size_bytes(dtype, shape)]
                yield name, part.view(_DTYPES[dtype]).view(shape)
        if stranger is not None:
            raise TransferError(f"asked for version {version}, the sender sends version {stranger}")
        receipt = digest.receipt(version)
        if (receipt.tensors, receipt.size_bytes) != (header["tensors"], header["size_bytes"]):
            raise TransferError(
                f"version {version}: the sender sent {header['tensors']} tensors of {header['size_bytes']} bytes, "
                f"{receipt.tensors} of {receipt.size_bytes} arrived"
            )
        self.receipt = receipt


class _Digest:
    """Counts and hashes tensors in order."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self._tensors = 0
        self._size_bytes = 0

    def update(self, meta: Sequence[Any], payload: Tensor) -> None:
        """Take in the tensors of one chunk."""
        content: Any = payload.cpu().numpy()
        for (name, dtype, shape), offset in zip(meta, _layout(meta)[0], strict=True):
            size = _size_bytes(dtype, shape)
            self._hash.update(json.dumps([name, dtype, list(shape)]).encode())
            self._hash.update(content[offset : offset + size])
            self._tensors += 1
            self._size_bytes += size

    def receipt(self, version: int) -> PushReceipt:
        return PushReceipt(
            version=version, tensors=self._tensors, size_bytes=self._size_bytes, digest=self._hash.hexdigest()
        )


def _meta(name: str, tensor: Tensor) -> tuple[str, str, tuple[int, ...]]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"{name}: type must be one of {', '.join(_DTYPES)}, got {dtype}")
    return name, dtype, tuple(tensor.shape)


def _size_bytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * _DTYPES[dtype].itemsize


def _layout(meta: Sequence[Any]) -> tuple[list[int], int]:
    """Where each tensor of a chunk starts, and the size of the chunk, in bytes."""
    offsets, size = [], 0
    for _, dtype, shape in meta:
        offsets.append(size)
        size += -(-_size_bytes(dtype, shape) // _ALIGNMENT) * _ALIGNMENT
    return offsets, size


def _chunks(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[list[tuple[str, Tensor]]]:
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if chunk and size + tensor.nbytes > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, tensor))
        size += tensor.nbytes
    if chunk:
        yield chunk


def _pack(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The bytes of a chunk, each tensor padded to the alignment."""
    parts = []
    for tensor in tensors:
        content = tensor.detach().to(device).contiguous().reshape(-1).view(torch.uint8)
        padding = -content.numel() % _ALIGNMENT
        parts += [content, content.new_zeros(padding)] if padding else [content]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _connect(host: str, port: int, timeout_s: float) -> Any:
    try:
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise TransferError(
            f"waited {timeout_s:g} s for the sender to listen at {host}:{port}: {str(error).splitlines()[0]}"
        ) from error


def _meet(store: Any, where: str, rank: int, world_size: int, deadline: float, timeout_s: float) -> None:
    """Wait until everyone has signed the store, with the same world size."""
    store.set(f"joined/{rank}", str(world_size))
    for other in range(world_size):
        remaining = timedelta(seconds=max(0.001, deadline - time.monotonic()))
        try:
            store.wait([f"joined/{other}"], remaining)
        except RuntimeError as error:
            missing = [r for r in range(world_size) if not store.check([f"joined/{r}"])]
            raise TransferError(
                f"rank {rank} waited {timeout_s:g} s at {where} for ranks {missing} of {world_size} "
                "(0 is the sender); each must join there, with the same world_size"
            ) from error
        theirs = int(store.get(f"joined/{other}"))
        if theirs != world_size:
            raise TransferError(f"rank {rank} joined with world_size {world_size}, rank {other} with {theirs}")


def _make_group(store: Any, host: str, rank: int, world_size: int, wait: timedelta, backend: str) -> Any:
    """A process group that torch.distributed does not list, so that it is nobody's default."""
    if backend == "nccl":
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = wait
        return nccl(store, rank, world_size, options)
    if backend != "gloo":
        raise ValueError(f"backend must be gloo or nccl, got {backend!r}")
    if host not in ("::1", "localhost") and not host.startswith("127."):
        return dist.ProcessGroupGloo(store, rank, world_size, wait)  # interface: GLOO_SOCKET_IFNAME, or the host's name
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = wait
    options._devices = [gloo.create_device(hostname=host)]
    return gloo(store, rank, world_size, options)
