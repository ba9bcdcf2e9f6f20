from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from megatron_rl.interfaces import PushReceipt
from megatron_rl.weights.messages import Listener, TransferError, listen
from megatron_rl.weights.transfer import Channel
from megatron_rl.weights.transports import SharedMemory, Transport, choose_transport, decode_handle, encode_handle

TIMEOUT_S = 20.0
LARGE = [("large", torch.zeros(64 << 20, dtype=torch.uint8))]  # more than the sockets hold
_kept: list[Channel] = []
"""The channel of another process, between two calls."""
_listening: list[Listener] = []


def join(port: int, rank: int, world_size: int, timeout_s: float) -> None:
    _kept[:] = [Channel.join(("127.0.0.1", port), rank=rank, world_size=world_size, timeout_s=timeout_s)]


def receive(version: int) -> tuple[dict[str, Tensor], PushReceipt | None]:
    reception = _kept[0].receive(version)
    return {name: tensor.clone() for name, tensor in reception}, reception.receipt


def receive_one_and_give_up(version: int) -> str:
    reception = _kept[0].receive(version)
    name, _ = next(reception)
    reception.drain()
    return name


def receive_nothing(seconds: float) -> None:
    time.sleep(seconds)


def wait_at_most(seconds: float) -> None:
    _kept[0]._messages.timeout_s = seconds


def die() -> None:
    os._exit(9)


def start_to_listen() -> int:
    _listening[:] = [listen("127.0.0.1")]
    return _listening[0].port


def open_as_sender(transport: Transport, bucket_bytes: int = 1 << 20) -> None:
    _kept[:] = [
        Channel.open(_listening[0], world_size=2, timeout_s=TIMEOUT_S, transport=transport, bucket_bytes=bucket_bytes)
    ]


def send_one_bucket_and_die() -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "large", torch.zeros(1 << 20, dtype=torch.uint8)
        time.sleep(1.0)  # until the receiver waits for the next
        os.kill(os.getpid(), signal.SIGKILL)

    _kept[0].send(1, tensors())


def reason_of_failure(version: int) -> str:
    try:
        receive(version)
    except TransferError as error:
        return str(error)
    return "none"


def tensors() -> list[tuple[str, Tensor]]:
    """Of many types and shapes; 256 KiB in the largest."""
    generator = torch.Generator().manual_seed(0)
    return [
        ("embedding", torch.randn(256, 256, generator=generator)),
        ("bf16", torch.randn(33, 5, generator=generator).bfloat16()),
        ("transposed", torch.randn(7, 11, generator=generator).t()),
        ("scalar", torch.tensor(2.5)),
        ("bytes", torch.arange(3, dtype=torch.uint8)),
        ("empty", torch.zeros(0, 4)),
        ("half", torch.randn(9, generator=generator).half()),
    ]


@contextmanager
def pool_of(workers: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.prepared"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            yield pool


@pytest.fixture(scope="module")
def receivers() -> Iterator[list[ProcessPoolExecutor]]:
    """Two processes, which live through all tests of the module."""
    with pool_of(1) as first, pool_of(1) as second:
        for pool in (first, second):  # they are up before anything is timed
            pool.submit(receive_nothing, 0.0).result(timeout=60)
        yield [first, second]


@pytest.fixture(params=[Transport.SHARED_MEMORY, Transport.GLOO], ids=lambda transport: transport.name)
def transport(request: pytest.FixtureRequest) -> Transport:
    """Every test that asks for it holds for each transport that a CPU has."""
    found: Transport = request.param
    return found


def connected(
    receivers: list[ProcessPoolExecutor],
    transport: Transport = Transport.SHARED_MEMORY,
    bucket_bytes: int = 1 << 20,
) -> Channel:
    listener = listen("127.0.0.1")
    world = len(receivers) + 1
    joining = [pool.submit(join, listener.port, rank, world, TIMEOUT_S) for rank, pool in enumerate(receivers, 1)]
    channel = Channel.open(
        listener, world_size=world, timeout_s=TIMEOUT_S, transport=transport, bucket_bytes=bucket_bytes
    )
    for pending in joining:
        pending.result(timeout=TIMEOUT_S)
    return channel


def descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def shared_files(size: int) -> set[Path]:
    """Those of so many bytes that have a name."""
    return {file for file in Path("/dev/shm").iterdir() if file.is_file() and file.stat().st_size == size}


def on_all(receivers: list[ProcessPoolExecutor], function: object, *args: object) -> list[Future]:
    return [pool.submit(function, *args) for pool in receivers]


@pytest.mark.parametrize("bucket_bytes", [999, 4096, 8 << 20])  # within an element, within a tensor, all in one
def test_all_receivers_get_equal_tensors_and_receipts(
    receivers: list[ProcessPoolExecutor], transport: Transport, bucket_bytes: int
) -> None:
    channel = connected(receivers, transport, bucket_bytes=bucket_bytes)
    pending = on_all(receivers, receive, 7)
    sent = channel.send(7, iter(tensors()))
    for future in pending:
        received, receipt = future.result(timeout=TIMEOUT_S)
        assert (receipt,) == sent
        assert list(received) == [name for name, _ in tensors()]
        for name, tensor in tensors():
            assert received[name].dtype == tensor.dtype
            assert torch.equal(received[name], tensor)
    size = sum(tensor.nbytes for _, tensor in tensors())
    assert [(r.version, r.tensors, r.slices, r.size_bytes, r.tensor_bytes) for r in sent] == [(7, 7, 0, size, size)]


def test_the_digest_depends_on_content_alone_and_on_all_of_it(receivers: list[ProcessPoolExecutor]) -> None:
    def digest(content: list[tuple[str, Tensor]], transport: Transport = Transport.GLOO, bucket: int = 1 << 20) -> str:
        channel = connected(receivers[:1], transport, bucket_bytes=bucket)
        pending = receivers[0].submit(receive, 1)
        (sent,) = channel.send(1, content)
        assert pending.result(timeout=TIMEOUT_S)[1] == sent
        return sent.digest

    one = torch.ones(2, 2)
    original = digest([("a", one), ("b", one)])
    assert digest([("a", one), ("b", one)], bucket=3) == original
    assert digest([("a", one), ("b", one)], Transport.SHARED_MEMORY) == original
    others = [
        [("b", one), ("a", one)],
        [("a", one), ("c", one)],
        [("a", one), ("b", one.view(4))],
        [("a", one), ("b", one.view(torch.int32))],
        [("a", one), ("b", 2 * one)],
        [("a", one)],
    ]
    assert len({original, *map(digest, others)}) == 7


def test_many_pushes_go_through_one_channel(receivers: list[ProcessPoolExecutor], transport: Transport) -> None:
    channel = connected(receivers, transport)
    for version in range(3):
        pending = on_all(receivers, receive, version)
        channel.send(version, [("step", torch.full((4,), float(version)))])
        for future in pending:
            received, receipt = future.result(timeout=TIMEOUT_S)
            assert received["step"].tolist() == [float(version)] * 4
            assert receipt is not None
            assert receipt.version == version


def test_a_failing_source_reaches_the_receivers_and_the_channel_stays_usable(
    receivers: list[ProcessPoolExecutor], transport: Transport
) -> None:
    channel = connected(receivers, transport, bucket_bytes=4096)

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from tensors()
        raise ValueError("rank 3 is gone")

    pending = on_all(receivers, reason_of_failure, 1)
    with pytest.raises(ValueError, match="rank 3 is gone"):
        channel.send(1, failing())
    for future in pending:
        assert future.result(timeout=TIMEOUT_S) == "version 1: the sender gave up: ValueError: rank 3 is gone"
    pending = on_all(receivers, receive, 2)
    (sent,) = channel.send(2, tensors())
    assert [future.result(timeout=TIMEOUT_S)[1] for future in pending] == [sent, sent]


def test_a_type_that_cannot_travel_is_an_abort(receivers: list[ProcessPoolExecutor]) -> None:
    channel = connected(receivers[:1])
    pending = receivers[0].submit(reason_of_failure, 1)
    with pytest.raises(ValueError, match=r"z: type must be one of float32, .* got complex64"):
        channel.send(1, [("z", torch.zeros(2, dtype=torch.complex64))])
    assert "the sender gave up" in pending.result(timeout=TIMEOUT_S)


def test_a_receiver_that_gives_up_keeps_nobody_waiting(
    receivers: list[ProcessPoolExecutor], transport: Transport
) -> None:
    channel = connected(receivers, transport, bucket_bytes=4096)
    giving_up = receivers[0].submit(receive_one_and_give_up, 1)
    complete = receivers[1].submit(receive, 1)
    (sent,) = channel.send(1, tensors())
    assert giving_up.result(timeout=TIMEOUT_S) == "embedding"
    assert complete.result(timeout=TIMEOUT_S)[1] == sent


def test_another_version_than_asked_for_is_refused(receivers: list[ProcessPoolExecutor]) -> None:
    channel = connected(receivers[:1])
    pending = receivers[0].submit(reason_of_failure, 5)
    channel.send(4, tensors())
    assert pending.result(timeout=TIMEOUT_S) == "asked for version 5, the sender sends version 4"


def test_a_silent_sender_and_a_closed_one_are_named(receivers: list[ProcessPoolExecutor], transport: Transport) -> None:
    channel = connected(receivers[:1], transport)
    receivers[0].submit(wait_at_most, 1.0).result(timeout=TIMEOUT_S)
    reason = receivers[0].submit(reason_of_failure, 3).result(timeout=TIMEOUT_S)
    told = r"version 3: the first tensor: rank 1 waited [1-9]\d*\.\d s \(at most 1\) for rank 0, the sender"
    assert re.match(told, reason), reason
    channel.close()
    channel = connected(receivers[:1], transport)
    pending = receivers[0].submit(reason_of_failure, 3)
    channel.close()
    started = time.monotonic()
    assert "for rank 0, the sender" in pending.result(timeout=TIMEOUT_S)
    assert time.monotonic() - started < TIMEOUT_S / 2  # long before its time is up
    with pytest.raises(TransferError, match="the channel is closed; join again"):
        channel.send(3, tensors())


def test_a_stopped_receiver_is_named_with_the_tensor(
    receivers: list[ProcessPoolExecutor], transport: Transport
) -> None:
    channel = connected(receivers, transport)
    channel._messages.timeout_s = 1.0
    other = receivers[0].submit(reason_of_failure, 1)
    stopped = receivers[1].submit(os.getpid).result(timeout=TIMEOUT_S)
    receivers[1].submit(reason_of_failure, 1)
    os.kill(stopped, signal.SIGSTOP)
    try:
        told = r"version 1: large: rank 0 waited [1-9]\d*\.\d s .* for rank 2, a receiver"
        with pytest.raises(TransferError, match=told):
            channel.send(1, LARGE)
        channel.close()
        assert "for rank 0, the sender" in other.result(timeout=TIMEOUT_S)
    finally:
        os.kill(stopped, signal.SIGCONT)


def test_a_receiver_that_dies_stops_the_sender_at_once(transport: Transport) -> None:
    with pool_of(1) as pool:
        pool.submit(receive_nothing, 0.0).result(timeout=TIMEOUT_S)  # it is up
        channel = connected([pool], transport)
        pool.submit(die)
        started = time.monotonic()
        with pytest.raises(TransferError, match=r"version 1: large: rank 0 waited .* for rank 1, a receiver"):
            channel.send(1, LARGE)
        assert time.monotonic() - started < TIMEOUT_S / 2


def test_a_receiver_that_is_known_to_be_dead_is_named(transport: Transport) -> None:
    with pool_of(1) as pool:
        channel = connected([pool], transport)
        with pytest.raises(BrokenProcessPool):
            pool.submit(die).result(timeout=TIMEOUT_S)
        for _ in range(3):  # gloo learns of it at the latest from the first
            with pytest.raises(TransferError, match=r"version 1: large: rank 0 waited .* for rank 1, a receiver"):
                channel.send(1, LARGE)


def test_an_error_that_is_still_handled_does_not_keep_a_closed_channel_open(
    receivers: list[ProcessPoolExecutor], transport: Transport
) -> None:
    with pool_of(1) as pool:
        channel = connected([receivers[0], pool], transport)
        pending = receivers[0].submit(reason_of_failure, 1)
        with pytest.raises(BrokenProcessPool):
            pool.submit(die).result(timeout=TIMEOUT_S)
        with pytest.raises(TransferError, match="for rank 2, a receiver") as caught:
            channel.send(1, LARGE)
        channel.close()
        assert "for rank 0, the sender" in pending.result(timeout=TIMEOUT_S / 2)
        assert caught.value.__traceback__ is not None


def test_what_the_source_raised_is_told_though_the_receivers_are_gone(transport: Transport) -> None:
    with pool_of(1) as pool:
        channel = connected([pool], transport)
        with pytest.raises(BrokenProcessPool):
            pool.submit(die).result(timeout=TIMEOUT_S)
        with pytest.raises(TransferError):
            channel.send(1, LARGE)
        with pytest.raises(ValueError, match="must be one of float32"):
            channel.send(2, [("z", torch.zeros(2, dtype=torch.complex64))])


def test_a_sender_that_is_known_to_be_dead_is_named(receivers: list[ProcessPoolExecutor], transport: Transport) -> None:
    with pool_of(1) as pool:
        port = pool.submit(start_to_listen).result(timeout=TIMEOUT_S)
        opening = pool.submit(open_as_sender, transport)
        receivers[0].submit(join, port, 1, 2, TIMEOUT_S).result(timeout=TIMEOUT_S)
        opening.result(timeout=TIMEOUT_S)
        with pytest.raises(BrokenProcessPool):
            pool.submit(die).result(timeout=TIMEOUT_S)
        for _ in range(2):
            reason = receivers[0].submit(reason_of_failure, 1).result(timeout=TIMEOUT_S)
            assert reason.startswith("version 1: the first tensor: rank 1 waited")
            assert "for rank 0, the sender" in reason


def test_a_killed_sender_is_named_at_once_and_leaves_no_memory_behind(
    receivers: list[ProcessPoolExecutor], transport: Transport
) -> None:
    before = shared_files(2 << 20)
    with pool_of(1) as pool:
        port = pool.submit(start_to_listen).result(timeout=TIMEOUT_S)
        opening = pool.submit(open_as_sender, transport)
        receivers[0].submit(join, port, 1, 2, TIMEOUT_S).result(timeout=TIMEOUT_S)
        opening.result(timeout=TIMEOUT_S)
        pending = receivers[0].submit(reason_of_failure, 1)
        pool.submit(send_one_bucket_and_die)
        started = time.monotonic()
        reason = pending.result(timeout=TIMEOUT_S)
        assert reason.startswith("version 1: what follows large: rank 1 waited")
        assert "for rank 0, the sender" in reason
        assert time.monotonic() - started < TIMEOUT_S / 2
    assert shared_files(2 << 20) <= before


def test_a_sender_that_is_killed_before_its_channel_is_open_leaves_no_memory_behind() -> None:
    bucket_bytes = 1_234_567
    with pool_of(1) as pool:
        pid = pool.submit(os.getpid).result(timeout=TIMEOUT_S)
        pool.submit(start_to_listen).result(timeout=TIMEOUT_S)
        pool.submit(open_as_sender, Transport.SHARED_MEMORY, bucket_bytes)  # nobody joins
        maps = Path(f"/proc/{pid}/maps")
        end = time.monotonic() + TIMEOUT_S
        while not re.search(r"/dev/shm/(?!sem\.)", maps.read_text()):  # locks of the pool lie there too
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
    assert shared_files(2 * bucket_bytes) == set()


def test_memory_that_is_not_on_this_host_is_told() -> None:
    nothing = f"/proc/{os.getpid()}/fd/99999"
    with pytest.raises(TransferError, match=f"must be on this host: .*No such file or directory: '{nothing}'"):
        SharedMemory.open(json.dumps([nothing, 1, 1]), 10)
    memory = SharedMemory.create(10)
    path, device, number = json.loads(memory.name)
    with pytest.raises(TransferError, match=rf"must be on this host: {path} is another file; .*one list of processes"):
        SharedMemory.open(json.dumps([path, device, number + 1]), 10)
    SharedMemory.open(memory.name, 10).staging(1)[:] = 7
    assert memory.staging(1).tolist() == [7] * 10
    memory.release()


def test_too_little_shared_memory_is_told_before_anything_is_sent() -> None:
    listener, before = listen("127.0.0.1"), descriptors()
    with pytest.raises(TransferError, match="/dev/shm must have room for 2 buckets of 1125899906842624 bytes"):
        Channel.open(listener, world_size=2, timeout_s=1.0, transport=Transport.SHARED_MEMORY, bucket_bytes=1 << 50)
    assert descriptors() == before


def test_the_transport_follows_from_the_places() -> None:
    assert choose_transport("a", ["a", "a"], cuda=False) is Transport.SHARED_MEMORY
    assert choose_transport("a", ["a", "b"], cuda=False) is Transport.GLOO
    assert choose_transport("a", ["a"], cuda=True) is Transport.NCCL
    assert choose_transport("a", ["a"], cuda=True, shared=True) is Transport.CUDA_IPC
    assert choose_transport("a", ["a", "a"], cuda=True, shared=True) is Transport.SHARED_MEMORY
    assert choose_transport("a", ["b"], cuda=True, shared=True) is Transport.GLOO
    assert choose_transport("a", ["a"], cuda=False, shared=True) is Transport.SHARED_MEMORY


def test_a_handle_of_gpu_memory_travels_as_text() -> None:
    parts = (b"\x00handle\xff", 4096, 0, b"counter", 8, b"", False)
    assert decode_handle(encode_handle(parts)) == parts
    assert json.loads(encode_handle(parts))[1:3] == [4096, 0], "data only, no pickle"


def test_whoever_does_not_join_is_named(receivers: list[ProcessPoolExecutor]) -> None:
    listener = listen("127.0.0.1")
    joining = receivers[0].submit(join, listener.port, 2, 3, 3.0)
    found = r"rank 0 waited 3 s at 127.0.0.1:\d+ for ranks \[1\] of 3 \(0 is the sender\)"
    with pytest.raises(TransferError, match=found):
        Channel.open(listener, world_size=3, timeout_s=3.0)
    with pytest.raises(TransferError, match=r"for ranks \[.*1\] of 3"):
        joining.result(timeout=TIMEOUT_S)


def test_a_sender_that_does_not_listen_is_named() -> None:
    with pytest.raises(TransferError, match=r"waited 0.3 s for the sender to listen at 127.0.0.1:1:"):
        Channel.join(("127.0.0.1", 1), rank=1, world_size=2, timeout_s=0.3)


def test_different_world_sizes_are_refused(receivers: list[ProcessPoolExecutor]) -> None:
    listener = listen("127.0.0.1")
    joining = receivers[0].submit(join, listener.port, 1, 3, TIMEOUT_S)
    with pytest.raises(TransferError, match="rank 0 joined with world_size 2, rank 1 with 3"):
        Channel.open(listener, world_size=2, timeout_s=TIMEOUT_S)
    with pytest.raises(TransferError, match="rank 1 joined with world_size 3, rank 0 with 2"):
        joining.result(timeout=TIMEOUT_S)


def test_receivers_that_joined_alike_hear_of_the_one_that_did_not(receivers: list[ProcessPoolExecutor]) -> None:
    listener = listen("127.0.0.1")
    alike = receivers[0].submit(join, listener.port, 1, 3, TIMEOUT_S)
    other = receivers[1].submit(join, listener.port, 2, 4, TIMEOUT_S)
    started = time.monotonic()
    with pytest.raises(TransferError, match="rank 0 joined with world_size 3, rank 2 with 4"):
        Channel.open(listener, world_size=3, timeout_s=TIMEOUT_S)
    with pytest.raises(TransferError, match="rank 0 joined with world_size 3, rank 2 with 4"):
        alike.result(timeout=TIMEOUT_S)
    with pytest.raises(TransferError, match="rank 2 joined with world_size 4, rank 0 with 3"):
        other.result(timeout=TIMEOUT_S)
    assert time.monotonic() - started < TIMEOUT_S / 2


def test_a_receiver_is_connected_to_the_sender_and_not_to_the_others() -> None:
    world, before = 16, descriptors()
    listener = listen("127.0.0.1")
    at = (listener.host, listener.port)
    with ThreadPoolExecutor(world) as threads:
        joining = [
            threads.submit(Channel.join, at, rank=rank, world_size=world, timeout_s=TIMEOUT_S)
            for rank in range(1, world)
        ]
        channel = Channel.open(listener, world_size=world, timeout_s=TIMEOUT_S, bucket_bytes=1 << 10)
        joined = [each.result(timeout=TIMEOUT_S) for each in joining]
    # all are in this process: with every two connected, 15 of each would be its peers
    assert (descriptors() - before) / world < 12
    for each in (channel, *joined):
        each.close()


def test_wrong_arguments_are_refused() -> None:
    listener = listen("127.0.0.1")
    with pytest.raises(ValueError, match="must be from 1 to world_size - 1, got 0 of 2"):
        Channel.join(("127.0.0.1", listener.port), rank=0, world_size=2, timeout_s=1.0)
    with pytest.raises(ValueError, match="there must be a receiver"):
        Channel.open(listener, world_size=1, timeout_s=1.0)
    with pytest.raises(TransferError, match=r"must be an address of this machine, got '192.0.2.1'"):
        listen("192.0.2.1")


def test_on_loopback_nothing_listens_anywhere_else(receivers: list[ProcessPoolExecutor]) -> None:
    channel = connected(receivers)
    connections = psutil.Process().net_connections(kind="inet")
    listening = {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}
    channel.close()
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_the_default_group_is_left_alone(receivers: list[ProcessPoolExecutor]) -> None:
    channel = connected(receivers[:1])
    assert not torch.distributed.is_initialized()
    channel.close()
