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

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from megatron_rl.interfaces import PushReceipt
from megatron_rl.weights.buckets import DTYPES, Piece, Run, Tally, filled, streams
from megatron_rl.weights.messages import Listener, Messages, Notices, TransferError, connect
from megatron_rl.weights.slices import Reads, SlicePlan, Slicing, Window
from megatron_rl.weights.transports import AHEAD, Buckets, CudaMemory, SharedMemory, Transport, buckets_over


class _Kind(IntEnum):
    DATA = 0
    END = 1
    ABORT = 2


class Channel:
    """One sender and its receivers, joined for as many pushes as there are. Not for several threads.

    After an error other than an abort by the sender the two ends may be out of step: close it and join again.

    Attributes:
        transport: how the bytes travel.
    """

    def __init__(
        self,
        messages: Messages,
        buckets: Buckets,
        store: Any,
        transport: Transport,
        bucket_bytes: int,
        known: Slicing | None = None,
    ) -> None:
        """Use :meth:`open` or :meth:`join`."""
        self.transport = transport
        self._messages = messages
        self._buckets: Buckets | None = buckets
        self._bucket_bytes = bucket_bytes
        self._notices = Notices(store, messages)
        lanes = [messages.lane(lane) for lane in range(messages.lanes)]
        self._slicing = Slicing(lanes) if known is None or known.lanes != lanes else known

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
        known: Slicing | None = None,
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
            known: :meth:`slicing` of a channel to receivers that kept the same; left aside where the lanes are others.

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
        memory: SharedMemory | CudaMemory | None = None
        if transport is Transport.SHARED_MEMORY:
            memory = SharedMemory.create(bucket_bytes)
        elif transport is Transport.CUDA_IPC:
            memory = CudaMemory.create(bucket_bytes)
        try:
            offer = _Offer(transport.value, bucket_bytes, timeout_s, lanes, None if memory is None else memory.name)
            listener._store.set("offer", json.dumps(asdict(offer)))
            messages = Messages.meet(listener._store, listener.host, listener.port, 0, world_size, timeout_s)
            messages.lanes = lanes
            for rank in range(1, world_size):  # each is connected, and has the memory open
                messages.receive(rank, torch.empty(1, dtype=torch.int64), "joining")
        finally:
            if memory is not None:
                memory.release()
        buckets = memory or buckets_over(transport, messages, listener._store, bucket_bytes)
        return cls(messages, buckets, listener._store, transport, bucket_bytes, known)

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
        store = connect(host, port, timeout_s)
        messages = Messages.meet(store, host, port, rank, world_size, timeout_s)
        offer = _Offer(**json.loads(store.get("offer")))
        messages.timeout_s, messages.lanes = offer.timeout_s, offer.lanes
        transport = Transport(offer.transport)
        if offer.memory is None:
            buckets: Buckets = buckets_over(transport, messages, store, offer.bucket_bytes)
        else:
            end = CudaMemory if transport is Transport.CUDA_IPC else SharedMemory
            buckets = end.open(offer.memory, offer.bucket_bytes)
        messages.send(0, torch.zeros(1, dtype=torch.int64), "joining")
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
        tally, sent, slicing = Tally(), _Sent(self._messages), self.slicing()
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
        sent.wait(AHEAD - 1)
        staging = self._opened().staging(sent.count)
        placed: list[tuple[int | None, Tensor]] = []
        headers: list[list[Any]] = [[] for _ in range(self._messages.lanes)]
        start = 0
        for run in bucket:
            here = staging[start : start + run.size]
            for piece, content, part in zip(run.pieces, run.contents, _split(here, run.pieces), strict=True):
                tally.copy(run.lane, piece, content, part)
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
        return self.slicing().plan()

    def slicing(self) -> Slicing:
        """What the receivers have told so far; asked of the sender."""
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

    def _opened(self) -> Buckets:
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
                    if piece.start == 0:
                        open_[piece.name] = torch.empty(piece.whole, dtype=torch.uint8, device=part.device)
                    tally.copy(whose, piece, part, open_[piece.name][piece.start : piece.start + piece.size])
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


class _Sent:
    """The buckets of one push that receivers have yet to confirm."""

    def __init__(self, messages: Messages) -> None:
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

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        self._token = torch.zeros(1, dtype=torch.int64)
        self._under_way: list[Callable[[], None]] = []

    def confirm(self, where: str) -> None:
        self.wait(AHEAD - 1)
        self._under_way.append(self._messages.start_send(0, self._token, where))

    def wait(self, most: int) -> None:
        """Until at most so many are under way."""
        while len(self._under_way) > most:
            self._under_way.pop(0)()


def _split(content: Tensor, pieces: Sequence[Piece]) -> Sequence[Tensor]:
    """The bytes of each piece of a run."""
    parts: Sequence[Tensor] = content.split([piece.size for piece in pieces])
    return parts


def _names(pieces: Sequence[Piece]) -> str:
    first, last = pieces[0].name, pieces[-1].name
    return first if first == last else f"{first} to {last}"
