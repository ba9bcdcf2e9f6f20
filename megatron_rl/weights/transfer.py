"""Move named tensors from the trainer's rank 0 to every worker of the engines.

The sender and the receivers make a process group of their own, beside whatever default group each process has. What
travels is data only, JSON headers and raw bytes, as a sequence of messages from rank 0 to each receiver:

* DATA: names, types and shapes of some tensors, or of pieces of them; their bytes travel as a bucket of bounded size,
  the way that the :class:`Transport` says, and each receiver confirms when it has taken them;
* END: how many tensors and bytes there were;
* ABORT: why the sender gives up, so that nobody waits for the rest.

Messages and confirmations go to and from one rank at a time, so that whoever does not answer is known by its rank.

The workers of an engine keep different parts of a tensor. Receivers are divided into *lanes*, one for each
tensor-parallel rank; a bucket has a run of bytes for all receivers and one for each lane, and no receiver gets another
lane's. Each tells what it keeps of the tensors of a push (:meth:`Channel.keep`), and the next push sends it no more.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from enum import Enum, IntEnum
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.device import device
from megatron_rl.interfaces import PushReceipt
from megatron_rl.weights.buckets import DTYPES, Piece, Run, Tally, filled, streams
from megatron_rl.weights.slices import Kept, Reads, SlicePlan, Slicing, Window

_SHARED_MEMORY = Path("/dev/shm")
_AHEAD = 2
"""Buckets that may be under way: the sender fills one while receivers take the one before."""


class TransferError(RuntimeError):
    """Tensors did not get from the sender to a receiver."""


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

    Attributes:
        transport: how the bytes travel.
    """

    def __init__(
        self, messages: _Messages, buckets: _Buckets, store: Any, transport: Transport, bucket_bytes: int
    ) -> None:
        """Use :meth:`open` or :meth:`join`."""
        self.transport = transport
        self._messages = messages
        self._buckets: _Buckets | None = buckets
        self._bucket_bytes = bucket_bytes
        self._notices = _Notices(store, messages)
        self._slicing = Slicing([messages.lane(lane) for lane in range(messages.lanes)])

    @classmethod
    def open(
        cls,
        listener: Listener,
        *,
        world_size: int,
        timeout_s: float,
        transport: Transport = Transport.GLOO,
        bucket_bytes: int = 32 << 20,
        lanes: int = 1,
    ) -> Channel:
        """Meet the receivers, as the sender, rank 0; returns when all have joined.

        Args:
            listener: the sender's own.
            world_size: sender and receivers together, at least 2.
            timeout_s: bound on joining, and later on every wait for one receiver; theirs is the same.
            transport: how bytes travel.
            bucket_bytes: size of a bucket; two of them bound what is under way.
            lanes: receivers of one engine. Ranks follow one another within an engine, so that the lane of a rank from 1
                is ``(rank - 1) % lanes``.

        Raises:
            TransferError: somebody did not come in time, joined with another world size, or cannot reach the memory.
            ValueError: an argument is wrong.
        """
        if world_size < 2 or bucket_bytes < 1:
            raise ValueError(
                f"there must be a receiver (world_size >= 2) and bytes in a bucket, got {world_size}, {bucket_bytes}"
            )
        if lanes < 1 or (world_size - 1) % lanes:
            raise ValueError(f"lanes must divide the {world_size - 1} receivers, got {lanes}")
        memory: _SharedMemory | _CudaMemory | None = None
        if transport is Transport.SHARED_MEMORY:
            memory = _SharedMemory.create(bucket_bytes)
        elif transport is Transport.CUDA_IPC:
            memory = _CudaMemory.create(bucket_bytes)
        try:
            offer = _Offer(transport.value, bucket_bytes, timeout_s, lanes, None if memory is None else memory.name)
            listener._store.set("offer", json.dumps(asdict(offer)))
            messages = _Messages.meet(listener._store, listener.host, listener.port, 0, world_size, timeout_s)
            messages.lanes = lanes
            if memory is not None:
                for rank in range(1, world_size):  # each has it open
                    messages.receive(rank, torch.empty(1, dtype=torch.int64), "joining: the shared memory")
        finally:
            if memory is not None:
                memory.unname()  # whoever has it open keeps it; nothing is left whichever way this process ends
        buckets = memory or _buckets_over(transport, messages, listener._store, bucket_bytes)
        return cls(messages, buckets, listener._store, transport, bucket_bytes)

    @classmethod
    def join(cls, at: tuple[str, int], *, rank: int, world_size: int, timeout_s: float) -> Channel:
        """Meet the sender and the other receivers; returns when all have joined.

        Args:
            at: host and port of the sender's listener.
            rank: from 1.
            world_size: sender and receivers together.
            timeout_s: bound on joining.

        Raises:
            TransferError: somebody did not come in time, joined with another world size, or the sender's shared memory
                is not there.
            ValueError: an argument is wrong.
        """
        if not 1 <= rank < world_size:
            raise ValueError(f"a receiver's rank must be from 1 to world_size - 1, got {rank} of {world_size}")
        host, port = at
        store = _connect(host, port, timeout_s)
        messages = _Messages.meet(store, host, port, rank, world_size, timeout_s)
        offer = _Offer(**json.loads(store.get("offer")))
        messages.timeout_s, messages.lanes = offer.timeout_s, offer.lanes
        transport = Transport(offer.transport)
        if offer.memory is None:
            buckets: _Buckets = _buckets_over(transport, messages, store, offer.bucket_bytes)
        else:
            end = _CudaMemory if transport is Transport.CUDA_IPC else _SharedMemory
            buckets = end.open(offer.memory, offer.bucket_bytes)
            messages.send(0, torch.zeros(1, dtype=torch.int64), "joining: the shared memory")
        return cls(messages, buckets, store, transport, offer.bucket_bytes)

    def send(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> tuple[PushReceipt, ...]:
        """Send tensors to every receiver: of each what the receiver keeps, as far as all have told it. An exception of
        the iterable reaches them as an abort.

        Args:
            version: the receivers must ask for the same.
            tensors: name and tensor, consumed one by one.

        Returns:
            by lane, what was sent; every receiver has taken it.

        Raises:
            TransferError: a receiver is gone or does not take the data in time.
            Exception: what ``tensors`` raised.
        """
        if self._messages.rank:
            raise ValueError(f"only rank 0 sends, this is rank {self._messages.rank}")
        lanes = range(self._messages.lanes)
        tally, sent, slicing = Tally(), _Sent(self._messages), self._heard()
        parts = (streams(name, tensor, slicing.regions(name, tensor)) for name, tensor in tensors)
        try:
            for bucket in filled(parts, self._bucket_bytes):
                self._send_bucket(version, bucket, sent, tally)
        except TransferError:
            raise  # the group is broken: there is nobody to tell
        except BaseException as error:
            with suppress(TransferError):
                header = {"version": version, "reason": f"{type(error).__name__}: {error}"}
                self._tell(_Kind.ABORT, [header for _ in lanes], f"version {version}: giving up")
                sent.wait(0)
            raise
        receipts = tuple(tally.receipt(version, lane) for lane in lanes)
        counts = [{"version": version, "tensors": r.tensors, "size_bytes": r.size_bytes} for r in receipts]
        self._tell(_Kind.END, counts, f"version {version}: the end")
        sent.wait(0)
        return receipts

    def _send_bucket(self, version: int, bucket: Sequence[Run], sent: _Sent, tally: Tally) -> None:
        where = f"version {version}: {_names([piece for run in bucket for piece in run.pieces])}"
        sent.wait(_AHEAD - 1)
        staging = self._opened().staging(sent.count)
        placed: list[tuple[int | None, Tensor]] = []
        headers: list[list[Any]] = [[] for _ in range(self._messages.lanes)]
        start = 0
        for run in bucket:
            here = staging[start : start + run.size]
            for piece, content, part in zip(run.pieces, run.contents, _split(here, run.pieces), strict=True):
                part.copy_(content)
                tally.update(run.lane, piece, part)
            placed.append((run.lane, here))
            for header in headers if run.lane is None else [headers[run.lane]]:
                header.append([run.lane is not None, start, run.pieces])
            start += run.size
        if self.transport is Transport.CUDA_IPC:
            torch.accelerator.synchronize()  # the receiver reads as soon as it is told
        self._tell(_Kind.DATA, [{"version": version, "runs": runs} for runs in headers], where)
        self._opened().send(placed, where)
        sent.add(where)

    def keep(self, reads: Reads) -> None:
        """Tell the sender, as a receiver of a push, what was read of it.

        Raises:
            TransferError: the sender is gone.
        """
        self._notices.tell(reads.kept())

    def slice_plan(self) -> SlicePlan:
        """What the next push sends, if its tensors are those of the last one; asked of the sender."""
        return self._heard().plan()

    def _heard(self) -> Slicing:
        for rank, kept in self._notices.hear():
            self._slicing.learn(rank, kept)
        return self._slicing

    def receive(self, version: int) -> Reception:
        """Receive what the sender sends as ``version``; errors come while the result is iterated."""
        if not self._messages.rank:
            raise ValueError("rank 0 sends, only the others receive")
        return Reception(self, version)

    def close(self) -> None:
        """Leave the group; whoever still waits for this process gets an error."""
        self._messages.close()
        self._notices.close()
        self._buckets = None

    def _opened(self) -> _Buckets:
        if self._buckets is None:
            raise TransferError("the channel is closed; join again")
        return self._buckets

    def _tell(self, kind: _Kind, headers: Sequence[Mapping[str, Any]], where: str) -> None:
        """Say to each lane what is its own."""
        bodies = [torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8) for header in headers]
        for parts in ([torch.tensor([kind, len(body)]) for body in bodies], bodies):
            self._messages.send_all(enumerate(parts), where)

    def _next_message(self, where: str) -> tuple[_Kind, dict[str, Any]]:
        kind, length = self._messages.receive(0, torch.empty(2, dtype=torch.int64), where).tolist()
        body = self._messages.receive(0, torch.empty(length, dtype=torch.uint8), where)
        header: dict[str, Any] = json.loads(body.numpy().tobytes())
        return _Kind(kind), header


class Reception(Iterator[tuple[str, Tensor]]):
    """The tensors of one push as they arrive, each in memory of its own: iterate it once.

    Where there are several lanes, tensors of at least one dim are windows
    (:class:`megatron_rl.weights.slices.Window`): of a slice, and of a whole tensor to see what is read of it.

    Attributes:
        receipt: what arrived; None until the iteration has come to its end.
        reads: of the tensors that came whole.
    """

    def __init__(self, channel: Channel, version: int) -> None:
        """Use :meth:`Channel.receive`."""
        self.receipt: PushReceipt | None = None
        self.reads = Reads()
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
        tally, channel, version = Tally(), self._channel, self._version
        lane = channel._messages.own_lane
        stranger: int | None = None
        open_: dict[str, Tensor] = {}
        count, last, taken = 0, "the first tensor", _Taken(channel._messages)
        while True:
            kind, header = channel._next_message(f"version {version}: {last}")
            if header["version"] != version:
                stranger = header["version"]
            if kind is not _Kind.DATA:
                taken.wait(0)
            if kind is _Kind.ABORT:
                raise TransferError(f"version {header['version']}: the sender gave up: {header['reason']}")
            if kind is _Kind.END:
                break
            staging = channel._opened().staging(count)
            runs = [
                (lane if own else None, start, [Piece(*fields) for fields in pieces])
                for own, start, pieces in header["runs"]
            ]
            placed = [
                (whose, staging[start : start + sum(piece.size for piece in pieces)]) for whose, start, pieces in runs
            ]
            pieces = [piece for _, _, pieces in runs for piece in pieces]
            where = f"version {version}: {_names(pieces) if pieces else 'what others get'}"
            channel._opened().receive(placed, where)
            for (whose, _, of_run), (_, here) in zip(runs, placed, strict=True):
                for piece, part in zip(of_run, _split(here, of_run), strict=True):
                    # a stranger is heard to its end, so that the sender is not left waiting
                    if stranger is not None:
                        continue
                    tally.update(whose, piece, part)
                    if piece.start == 0:
                        open_[piece.name] = torch.empty(piece.whole, dtype=torch.uint8, device=part.device)
                    open_[piece.name][piece.start : piece.start + piece.size] = part
                    if piece.start + piece.size == piece.whole:
                        yield piece.name, self._tensor(piece, open_.pop(piece.name))
            taken.confirm(where)
            count, last = count + 1, f"what follows {pieces[-1].name}" if pieces else last
        if stranger is not None:
            raise TransferError(f"asked for version {version}, the sender sends version {stranger}")
        receipt = tally.receipt(version, lane)
        if (receipt.tensors, receipt.size_bytes) != (header["tensors"], header["size_bytes"]):
            raise TransferError(
                f"version {version}: the sender sent {header['tensors']} tensors of {header['size_bytes']} bytes, "
                f"{receipt.tensors} of {receipt.size_bytes} arrived"
            )
        self.receipt = receipt

    def _tensor(self, piece: Piece, content: Tensor) -> Tensor:
        tensor = content.view(DTYPES[piece.dtype]).view(piece.content_shape)
        if (region := piece.region) is not None:
            return Window(region, tensor)
        return self.reads.watch(piece.name, tensor) if self._channel._messages.lanes > 1 and tensor.dim() else tensor


@dataclass(frozen=True)
class _Offer:
    """What the sender tells receivers before they join."""

    transport: str
    bucket_bytes: int
    timeout_s: float
    lanes: int
    memory: str | None


class _Messages:
    """Small tensors between rank 0 and one receiver at a time, each within the deadline."""

    def __init__(self, group: Any, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank = rank
        self.receivers = range(1, world_size)
        self.lanes = 1
        self.timeout_s = timeout_s
        self._group = group
        self._numbers = itertools.count()
        self._works: dict[int, Any] = {}

    @classmethod
    def meet(cls, store: Any, host: str, port: int, rank: int, world_size: int, timeout_s: float) -> _Messages:
        deadline = time.monotonic() + timeout_s
        _meet(store, f"{host}:{port}", rank, world_size, deadline, timeout_s)
        wait = timedelta(seconds=timeout_s)
        store.set_timeout(wait)
        try:
            group = _gloo_group(dist.PrefixStore("channel", store), host, rank, world_size, wait)
        except RuntimeError as error:
            raise TransferError(f"rank {rank} found all others at {host}:{port}, then lost one: {error}") from error
        return cls(group, rank, world_size, timeout_s)

    def send(self, to: int, tensor: Tensor, where: str) -> None:
        self.start_send(to, tensor, where)()

    @property
    def own_lane(self) -> int:
        """Of this receiver."""
        return (self.rank - 1) % self.lanes

    def lane(self, lane: int | None) -> range:
        """The ranks of its receivers; of None all receivers."""
        return self.receivers if lane is None else self.receivers[lane :: self.lanes]

    def send_all(self, parts: Iterable[tuple[int | None, Tensor]], where: str) -> None:
        """To each receiver what is for its lane or for all, at the same time."""
        for wait in [self.start_send(rank, part, where) for lane, part in parts for rank in self.lane(lane)]:
            wait()

    def receive(self, source: int, into: Tensor, where: str) -> Tensor:
        self.start(lambda: self.open(where).recv([into], source, 0), source, where)()
        return into

    def start_send(self, to: int, tensor: Tensor, where: str) -> Callable[[], None]:
        return self.start(lambda: self.open(where).send([tensor], to, 0), to, where)

    def start(self, begin: Callable[[], Any], peer: int | range, where: str) -> Callable[[], None]:
        """Begin some work; what comes back waits for it. A peer that is known to be gone fails it at the beginning.

        Neither ``begin`` nor what comes back holds the group or the work: an error that is handled would hold both,
        and would keep a channel open that was closed.
        """
        number = next(self._numbers)
        with self.named(peer, where):
            self._works[number] = begin()

        def wait() -> None:
            if number not in self._works:
                raise TransferError(f"{where}: the channel is closed; join again")
            with self.named(peer, where):
                self._works.pop(number).wait(timedelta(seconds=self.timeout_s))

        return wait

    @contextmanager
    def named(self, peer: int | range, where: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except TransferError:
            raise
        except RuntimeError as error:
            waited = time.monotonic() - started
            raise TransferError(
                f"{where}: rank {self.rank} waited {waited:.1f} s (at most {self.timeout_s:g}) for {_whom(peer)}: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def open(self, where: str) -> Any:
        if self._group is None:
            raise TransferError(f"{where}: the channel is closed; join again")
        return self._group

    def close(self) -> None:
        self._group = None
        self._works.clear()


class _Notices:
    """What receivers tell the sender they keep. It lies in the store until the sender looks, so that nobody waits."""

    def __init__(self, store: Any, messages: _Messages) -> None:
        self._store = store
        self._messages = messages
        self._told: dict[str, Kept] = {}
        self._numbers = dict.fromkeys([*messages.receivers], 0)

    def tell(self, kept: Mapping[str, Kept]) -> None:
        new = {name: part for name, part in kept.items() if self._told.get(name) != part}
        if not new:
            return
        text = json.dumps({name: part.to_json() for name, part in new.items()})
        with self._messages.named(0, "telling which parts of the tensors are kept"):
            self._opened().set(self._next(self._messages.rank), text)
        self._told |= new

    def hear(self) -> Iterator[tuple[int, dict[str, Kept]]]:
        for rank in self._messages.receivers:
            while self._opened().check([key := f"kept/{rank}/{self._numbers[rank]}"]):
                found = json.loads(self._opened().get(key))
                self._opened().delete_key(self._next(rank))
                yield rank, {name: Kept.from_json(part) for name, part in found.items()}

    def _next(self, rank: int) -> str:
        key = f"kept/{rank}/{self._numbers[rank]}"
        self._numbers[rank] += 1
        return key

    def _opened(self) -> Any:
        if self._store is None:
            raise TransferError("the channel is closed; join again")
        return self._store

    def close(self) -> None:
        self._store = None


class _Sent:
    """The buckets of one push that receivers have yet to confirm."""

    def __init__(self, messages: _Messages) -> None:
        self.count = 0
        self._messages = messages
        self._open: list[str] = []

    def add(self, where: str) -> None:
        self.count += 1
        self._open.append(where)

    def wait(self, most: int) -> None:
        """Until at most so many are open."""
        while len(self._open) > most:
            where = self._open.pop(0)
            for rank in self._messages.receivers:
                self._messages.receive(rank, torch.empty(1, dtype=torch.int64), where)


class _Taken:
    """A receiver's confirmations, as many under way as there are buckets: gloo ends a send when the other side asks for
    it, and the sender has something to send before it asks.
    """

    def __init__(self, messages: _Messages) -> None:
        self._messages = messages
        self._token = torch.zeros(1, dtype=torch.int64)
        self._under_way: list[Callable[[], None]] = []

    def confirm(self, where: str) -> None:
        self.wait(_AHEAD - 1)
        self._under_way.append(self._messages.start_send(0, self._token, where))

    def wait(self, most: int) -> None:
        """Until at most so many are under way."""
        while len(self._under_way) > most:
            self._under_way.pop(0)()


class _Buckets(Protocol):
    """One end of a transport."""

    def staging(self, number: int) -> Tensor:
        """Where the sender fills bucket ``number`` (from 0 in each push) and a receiver finds it: bytes."""

    def send(self, runs: Sequence[tuple[int | None, Tensor]], where: str) -> None:
        """Get parts of the staging to the receivers, who were told where they lie: to one lane, or (None) to all."""

    def receive(self, runs: Sequence[tuple[int | None, Tensor]], where: str) -> None:
        """Fill this receiver's parts of the staging."""


class _SharedMemory:
    """Two buckets in memory that the sender and all receivers map."""

    def __init__(self, path: Path, bucket_bytes: int) -> None:
        self.path = path
        size = _AHEAD * bucket_bytes
        self._memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8).view(_AHEAD, bucket_bytes)

    @classmethod
    def create(cls, bucket_bytes: int) -> _SharedMemory:
        path = _SHARED_MEMORY / f"megatron_rl-{os.getpid()}-{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, _AHEAD * bucket_bytes)  # else a full one is a SIGBUS at some write
            return cls(path, bucket_bytes)
        except OSError as error:
            path.unlink()
            raise TransferError(
                f"{_SHARED_MEMORY} must have room for {_AHEAD} buckets of {bucket_bytes} bytes: {error}; enlarge it or "
                "make buckets smaller"
            ) from error
        finally:
            os.close(descriptor)

    @property
    def name(self) -> str:
        return str(self.path)

    def unname(self) -> None:
        self.path.unlink()

    @classmethod
    def open(cls, name: str, bucket_bytes: int) -> _SharedMemory:
        path = Path(name)
        if not path.is_file():
            raise TransferError(
                f"the sender's shared memory must be on this host, there is no {path}: the two go by one host name, so "
                f"give them one {_SHARED_MEMORY} (containers) or two names"
            )
        return cls(path, bucket_bytes)

    def staging(self, number: int) -> Tensor:
        return self._memory[number % _AHEAD]

    def send(self, runs: Sequence[tuple[int | None, Tensor]], where: str) -> None:
        """The receivers see it already."""

    def receive(self, runs: Sequence[tuple[int | None, Tensor]], where: str) -> None:
        """It is there already."""


class _CudaMemory:
    """Two buckets on the GPU that sender and receiver have; the receiver maps the sender's by CUDA's handle of them."""

    def __init__(self, memory: Tensor, name: str, *, received: bool = False) -> None:
        self.name = name
        self._memory = memory
        self._received = received

    @classmethod
    def create(cls, bucket_bytes: int) -> _CudaMemory:
        memory = torch.empty(_AHEAD, bucket_bytes, dtype=torch.uint8, device=device())
        return cls(memory, encode_handle(memory.untyped_storage()._share_cuda_()[1:]))

    @classmethod
    def open(cls, name: str, bucket_bytes: int) -> _CudaMemory:
        here = device()
        try:
            # GPUs are numbered by each process: the receiver's number, not the sender's
            storage = torch.UntypedStorage._new_shared_cuda(here.index, *decode_handle(name))
        except RuntimeError as error:
            raise TransferError(f"the sender's memory must lie on {here}, the GPU of this receiver: {error}") from error
        memory = torch.empty(0, dtype=torch.uint8, device=here).set_(storage)
        return cls(memory[: _AHEAD * bucket_bytes].view(_AHEAD, bucket_bytes), name, received=True)

    def unname(self) -> None:
        """It has no name that could be left."""

    def staging(self, number: int) -> Tensor:
        bucket = self._memory[number % _AHEAD]
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

    def __init__(self, messages: _Messages, bucket_bytes: int) -> None:
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

    def __init__(self, messages: _Messages, store: Any, bucket_bytes: int) -> None:
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


def _buckets_over(transport: Transport, messages: _Messages, store: Any, bucket_bytes: int) -> _Buckets:
    if transport is Transport.NCCL:
        return _NcclBuckets(messages, store, bucket_bytes)
    return _GlooBuckets(messages, bucket_bytes)


def _split(content: Tensor, pieces: Sequence[Piece]) -> Sequence[Tensor]:
    """The bytes of each piece of a run."""
    parts: Sequence[Tensor] = content.split([piece.size for piece in pieces])
    return parts


def _whom(peer: int | range) -> str:
    if isinstance(peer, range):
        return f"the receivers, ranks {', '.join(map(str, peer))}"
    return "rank 0, the sender" if peer == 0 else f"rank {peer}, a receiver"


def _names(pieces: Sequence[Piece]) -> str:
    first, last = pieces[0].name, pieces[-1].name
    return first if first == last else f"{first} to {last}"


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


def _gloo_group(store: Any, host: str, rank: int, world_size: int, wait: timedelta) -> Any:
    """A process group that torch.distributed does not list, so that it is nobody's default."""
    if host not in ("::1", "localhost") and not host.startswith("127."):
        return dist.ProcessGroupGloo(store, rank, world_size, wait)  # interface: GLOO_SOCKET_IFNAME, or the host's name
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = wait
    options._devices = [gloo.create_device(hostname=host)]
    return gloo(store, rank, world_size, options)
