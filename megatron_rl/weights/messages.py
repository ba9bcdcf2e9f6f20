"""A sender and its receivers meet, and send each other small messages: each wait has a deadline and says for whom."""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_rl.weights.slices import Kept


class TransferError(RuntimeError):
    """Tensors did not get from the sender to a receiver."""


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


class Messages:
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
    def meet(cls, store: Any, host: str, port: int, rank: int, world_size: int, timeout_s: float) -> Messages:
        """Join the group; returns when all have, and raises :class:`TransferError` where somebody has not in time."""
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
        """Send one tensor; ``where`` says in an error what was going on, here and below."""
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
        """Fill a tensor with what ``source`` sends."""
        self.start(lambda: self.open(where).recv([into], source, 0), source, where)()
        return into

    def start_send(self, to: int, tensor: Tensor, where: str) -> Callable[[], None]:
        """Begin to send; what comes back waits until it is done."""
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
        """Raise what fails as a :class:`TransferError` that says who was waited for, and how long."""
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
        """The group, while it is open."""
        if self._group is None:
            raise TransferError(f"{where}: the channel is closed; join again")
        return self._group

    def close(self) -> None:
        """Leave the group."""
        self._group = None
        self._works.clear()


class Notices:
    """What receivers tell the sender they keep. It lies in the store until the sender looks, so that nobody waits."""

    def __init__(self, store: Any, messages: Messages) -> None:
        self._store = store
        self._messages = messages
        self._told: dict[str, Kept] = {}
        self._numbers = dict.fromkeys([*messages.receivers], 0)

    def tell(self, kept: Mapping[str, Kept]) -> None:
        """Leave what is new of it, as a receiver."""
        new = {name: part for name, part in kept.items() if self._told.get(name) != part}
        if not new:
            return
        text = json.dumps({name: part.to_json() for name, part in new.items()})
        with self._messages.named(0, "telling which parts of the tensors are kept"):
            self._opened().set(self._next(self._messages.rank), text)
        self._told |= new

    def hear(self) -> Iterator[tuple[int, dict[str, Kept]]]:
        """Rank and message of what was left since the last call, as the sender."""
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
        """Let the store go."""
        self._store = None


def _whom(peer: int | range) -> str:
    if isinstance(peer, range):
        return f"the receivers, ranks {', '.join(map(str, peer))}"
    return "rank 0, the sender" if peer == 0 else f"rank {peer}, a receiver"


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def connect(host: str, port: int, timeout_s: float) -> Any:
    """The store of a listener, which a receiver may find before it listens."""
    try:
        return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise TransferError(
            f"waited {timeout_s:g} s for the sender to listen at {host}:{port}: {str(error).splitlines()[0]}"
        ) from error


def _meet(store: Any, where: str, rank: int, world_size: int, deadline: float, timeout_s: float) -> None:
    """Wait until everyone has signed the store, with the same world size. Rank 0 looks at each and says so to all: were
    each to look, that would be quadratic in ranks.
    """
    store.set(f"joined/{rank}", str(world_size))
    problem = ""
    try:
        for other in range(world_size) if rank == 0 else [0]:
            store.wait([f"joined/{other}"], _remaining(deadline))
            theirs = int(store.get(f"joined/{other}"))
            if theirs != world_size:
                problem = f"rank {rank} joined with world_size {world_size}, rank {other} with {theirs}"
                break
        if rank and not problem:
            store.wait(["met"], _remaining(deadline))
            problem = store.get("met").decode()
    except RuntimeError as error:
        missing = [r for r in range(world_size) if not store.check([f"joined/{r}"])] or [0]
        problem = (
            f"rank {rank} waited {timeout_s:g} s at {where} for ranks {missing} of {world_size} "
            "(0 is the sender); each must join there, with the same world_size"
        )
        raise TransferError(problem) from error
    finally:
        if rank == 0:
            store.set("met", problem)
    if problem:
        raise TransferError(problem)


def _remaining(deadline: float) -> timedelta:
    return timedelta(seconds=max(0.001, deadline - time.monotonic()))


def _gloo_group(store: Any, host: str, rank: int, world_size: int, wait: timedelta) -> Any:
    """A process group that torch.distributed does not list, so that it is nobody's default. Two ranks are connected
    when they first have something for each other: receivers never have.
    """
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = wait
    if host in ("::1", "localhost") or host.startswith("127."):
        options._devices = [gloo.create_device(hostname=host, lazy_init=True)]
    elif interfaces := os.environ.get("GLOO_SOCKET_IFNAME"):
        options._devices = [gloo.create_device(interface=name, lazy_init=True) for name in interfaces.split(",")]
    else:
        options._devices = [gloo.create_default_device(lazy_init=True)]  # of the host's name
    return gloo(store, rank, world_size, options)
