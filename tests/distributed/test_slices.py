"""Pushes to tensor-parallel workers over real channels: each gets what it keeps. A worker is a thread with a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_rl.interfaces import PushReceipt
from megatron_rl.weights.messages import TransferError, listen
from megatron_rl.weights.slices import Slicing
from megatron_rl.weights.transfer import Channel
from megatron_rl.weights.transports import Transport

TIMEOUT_S = 20.0
WORKERS, ENGINES = 2, 2


def tensors(seed: int) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        ("embedding", torch.randn(10, 6, generator=generator)),
        ("norm", torch.randn(6, generator=generator)),
        ("gate", torch.randn(8, 6, generator=generator).bfloat16()),
        ("down", torch.randn(6, 8, generator=generator)),
        ("scale", torch.tensor(2.5)),
    ]


def shards(rank: int, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """What worker ``rank`` of an engine keeps; of the rows of the embedding, padded to 16, the second has but two."""
    return {
        "embedding": whole["embedding"].narrow(0, 8 * rank, (8, 2)[rank]),
        "norm": whole["norm"],
        "gate": whole["gate"].narrow(0, 4 * rank, 4),
        "down": whole["down"].narrow(1, 4 * rank, 4),
        "scale": whole["scale"],
    }


WHOLE_BYTES = 240 + 24 + 96 + 192 + 4
SLICE_BYTES = [192 + 24 + 48 + 96 + 4, 48 + 24 + 48 + 96 + 4]

Loaded = tuple[dict[str, Tensor], PushReceipt | None]


def load_all(reception: Iterator[tuple[str, Tensor]], rank: int) -> dict[str, Tensor]:
    """A loader that cuts tensors and copies what is left, once it has all of them."""
    return copied(shards(rank, dict(reception)))


def copied(cut: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(part.shape, dtype=part.dtype).copy_(part) for name, part in cut.items()}


Loader = Callable[[Iterator[tuple[str, Tensor]], int], dict[str, Tensor]]


@dataclass
class Connected:
    """A sender, and the workers of two engines."""

    sender: Channel
    receivers: list[Channel]
    pool: ThreadPoolExecutor

    def receive(self, version: int, loader: Loader = load_all) -> list[Future[Loaded]]:
        def take(channel: Channel, rank: int) -> Loaded:
            reception = channel.receive(version)
            try:
                loaded = loader(reception, rank)
            finally:
                reception.drain()
            channel.keep(reception.reads)
            return loaded, reception.receipt

        return [self.pool.submit(take, channel, index % WORKERS) for index, channel in enumerate(self.receivers)]

    def push(self, version: int) -> tuple[PushReceipt, ...]:
        """One that must end well at all workers."""
        pending = self.receive(version)
        sent = self.sender.send(version, tensors(version))
        for index, future in enumerate(pending):
            loaded, receipt = future.result(TIMEOUT_S)
            assert receipt == sent[index % WORKERS]
            for name, part in shards(index % WORKERS, dict(tensors(version))).items():
                assert torch.equal(loaded[name], part), name
        return sent


@contextmanager
def connected(
    transport: Transport,
    bucket_bytes: int = 1 << 20,
    known: Slicing | None = None,
    engines: int = ENGINES,
) -> Iterator[Connected]:
    listener, world = listen("127.0.0.1"), 1 + WORKERS * engines
    with ThreadPoolExecutor(world) as pool:
        joining = [
            pool.submit(Channel.join, ("127.0.0.1", listener.port), rank=rank, world_size=world, timeout_s=TIMEOUT_S)
            for rank in range(1, world)
        ]
        sender = Channel.open(
            listener,
            world_size=world,
            timeout_s=TIMEOUT_S,
            transport=transport,
            bucket_bytes=bucket_bytes,
            lanes=WORKERS,
            known=known,
        )
        channels = [future.result(TIMEOUT_S) for future in joining]
        try:
            yield Connected(sender, channels, pool)
        finally:
            for channel in (sender, *channels):
                channel.close()


@pytest.fixture(params=[Transport.SHARED_MEMORY, Transport.GLOO], ids=lambda transport: transport.name)
def transport(request: pytest.FixtureRequest) -> Transport:
    found: Transport = request.param
    return found


def sizes(receipts: Sequence[PushReceipt]) -> list[tuple[int, int, int, int]]:
    return [(r.tensors, r.slices, r.size_bytes, r.tensor_bytes) for r in receipts]


@pytest.mark.parametrize("bucket_bytes", [30, 200, 1 << 20])
def test_after_one_push_each_worker_is_sent_what_it_keeps(transport: Transport, bucket_bytes: int) -> None:
    with connected(transport, bucket_bytes) as group:
        assert sizes(group.push(0)) == [(5, 0, WHOLE_BYTES, WHOLE_BYTES)] * 2
        for version in (1, 2):
            assert sizes(group.push(version)) == [(5, 3, size, WHOLE_BYTES) for size in SLICE_BYTES]
        plan = group.sender.slice_plan()
        assert (plan.slices, plan.whole, plan.worker_bytes) == (3, 2, tuple(SLICE_BYTES))


def test_what_is_kept_is_known_to_a_channel_that_takes_the_place_of_another(transport: Transport) -> None:
    with connected(transport) as group:
        group.push(0)  # the sender has yet to hear what its receivers left
        known = group.sender.slicing()
    with connected(transport, known=known) as group:
        for version in (1, 2):
            assert sizes(group.push(version)) == [(5, 3, size, WHOLE_BYTES) for size in SLICE_BYTES]
    with connected(transport, known=known, engines=1) as group:  # who was which of the others is not known
        assert sizes(group.push(3)) == [(5, 0, WHOLE_BYTES, WHOLE_BYTES)] * 2


def test_no_other_bytes_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(Transport.GLOO) as group:
        group.push(0)
        messages, travelled = group.sender._messages, dict.fromkeys(range(1, 5), 0)
        start_send = messages.start_send

        def counted(to: int, tensor: Tensor, where: str) -> Callable[[], None]:
            # kinds and lengths of messages are int64; headers are JSON
            if tensor.dtype == torch.uint8 and not tensor.numpy().tobytes().startswith(b"{"):
                travelled[to] += tensor.nbytes
            return start_send(to, tensor, where)

        monkeypatch.setattr(messages, "start_send", counted)
        group.push(1)
        assert [*travelled.values()] == SLICE_BYTES * 2


def test_workers_of_two_engines_that_keep_different_parts_are_sent_whole_tensors(transport: Transport) -> None:
    def keeping_more(reception: Iterator[tuple[str, Tensor]], rank: int) -> dict[str, Tensor]:
        whole = dict(reception)
        if next(turns) == 0:
            whole["gate"].narrow(0, 0, 7)
        return copied(shards(rank, whole))

    with connected(transport) as group:
        turns = iter(range(4))
        pending = group.receive(0, keeping_more)
        group.sender.send(0, tensors(0))
        for future in pending:
            future.result(TIMEOUT_S)
        assert [receipt.slices for receipt in group.push(1)] == [2, 2]


def test_a_loader_that_wants_more_than_before_is_refused_by_name_and_the_next_push_ends_well(
    transport: Transport,
) -> None:
    def greedy(reception: Iterator[tuple[str, Tensor]], rank: int) -> dict[str, Tensor]:
        return {name: torch.empty(part.shape).copy_(part) for name, part in reception if name in ("norm", "gate")}

    with connected(transport, bucket_bytes=100) as group:
        group.push(0)
        pending = group.receive(1, greedy)
        sent = group.sender.send(1, tensors(1))
        for future in pending:
            with pytest.raises(ValueError, match=r"gate: the engine reads the whole tensor .* it was sent indices"):
                future.result(TIMEOUT_S)
        assert [receipt.slices for receipt in sent] == [3, 3]
        assert [receipt.slices for receipt in group.push(2)] == [3, 3]


def test_an_aborted_push_teaches_nothing_and_undoes_nothing(transport: Transport) -> None:
    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from tensors(1)[:3]
        raise RuntimeError("a training rank died")

    def abort(group: Connected) -> None:
        pending = group.receive(1)
        with pytest.raises(RuntimeError, match="a training rank died"):
            group.sender.send(1, failing())
        for future in pending:
            with pytest.raises(TransferError, match="the sender gave up: RuntimeError: a training rank died"):
                future.result(TIMEOUT_S)

    with connected(transport, bucket_bytes=100) as group:
        abort(group)
        assert [receipt.slices for receipt in group.push(2)] == [0, 0]
        abort(group)
        assert [receipt.slices for receipt in group.push(3)] == [3, 3]


def test_a_worker_that_takes_no_bucket_is_named_by_its_rank(transport: Transport) -> None:
    with connected(transport, bucket_bytes=20) as group:
        group.push(0)
        group.sender._messages.timeout_s = 1.0
        group.receivers.pop(2)
        pending = group.receive(1)
        told = r"version 1: .*: rank 0 waited [1-9]\d*\.\d s .* for rank 3, a receiver"
        with pytest.raises(TransferError, match=told):
            group.sender.send(1, tensors(1))
        group.sender.close()
        for future in pending:
            with pytest.raises(TransferError, match="for rank 0, the sender"):
                future.result(TIMEOUT_S)


def test_lanes_must_divide_the_receivers() -> None:
    with pytest.raises(ValueError, match="lanes must divide the 3 receivers, got 2"):
        Channel.open(listen("127.0.0.1"), world_size=4, timeout_s=1.0, lanes=2)
