"""Groups of workers as the driver sees them: call a verb on all ranks, wait with a deadline, learn who is late."""

from __future__ import annotations

import io
import itertools
import logging
import pickle
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import cloudpickle
import ray

from megatron_rl.config.limit import Limit
from megatron_rl.ray_runtime.child import Call, Reply
from megatron_rl.ray_runtime.supervisor import Birth, Death

T = TypeVar("T")
_HELD = 3
"""Batches that workers keep: a rollout, its experience, and the probe of the weight push."""
_LARGE_BYTES = 100_000
_GRACE_S = 2.0
_NEAR_LIMIT = 0.5
"""Share of its limit from which on a call is told: responses grow, and the next one may be cut off."""
_LOG = logging.getLogger(__name__)


class WorkerDied(RuntimeError):
    """A worker process is gone; the message says which, how and during what.

    Attributes:
        worker: its name.
    """

    def __init__(self, message: str, *, worker: str) -> None:
        super().__init__(message)
        self.worker = worker


class WorkerFailed(RuntimeError):
    """A worker raised; the message holds its traceback."""


class DeadlineExceeded(TimeoutError):
    """Work did not finish in time; the message says whom it waited for, for how long, and which setting bounds it."""


@dataclass
class Statistics:
    """What the workers of a group say of themselves since it was last taken."""

    busy_of: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    """Seconds by verb and rank: a verb may be one call to all ranks, or one to each."""
    peak_rss_bytes: int = 0
    """Of the largest rank."""

    @property
    def busy_s(self) -> dict[str, float]:
        """Seconds of the busiest rank, by verb."""
        return {verb: max(seconds.values()) for verb, seconds in self.busy_of.items()}


class Watch:
    """Knows every worker of a run, so that each wait ends when any of them dies."""

    def __init__(self) -> None:
        self._deaths: dict[Any, str] = {}

    def add(self, name: str, death: Any) -> None:
        """Watch a worker whose ``death`` reference becomes ready when it is gone."""
        self._deaths[death] = name

    def clear(self) -> None:
        """Watch nobody any more."""
        self._deaths.clear()

    def wait(self, waiting: Mapping[Any, str], *, until: float, limit: Limit, what: str) -> list[Any]:
        """Wait until one of ``waiting`` (reference -> whose) is ready; all that are by then.

        Args:
            waiting: for whom.
            until: on the monotonic clock.
            limit: that ends then; for the message, as is ``what``.
            what: is waited for.

        Raises:
            WorkerDied: a worker, not necessarily one of them, is gone.
            DeadlineExceeded: none was ready in time.
        """
        seconds = max(0.0, until - time.monotonic())
        references = [*waiting, *self._deaths]
        ready, _ = ray.wait(references, num_returns=1, timeout=seconds)
        if not ready:
            raise DeadlineExceeded(f"{what} did not finish within {limit}; still waiting for {_names(waiting)}")
        # all at once: each wait looks at the references of every rank, so one by one would be quadratic in ranks
        more, _ = ray.wait(references, num_returns=len(references), timeout=0)
        ready = [*dict.fromkeys([*ready, *more])]
        if not (answered := [reference for reference in ready if reference in waiting]):
            self.raise_deaths(ready)
        return answered

    def raise_deaths(self, references: Sequence[Any] = (), *, grace_s: float = 0.0) -> None:
        """Raise if a worker is gone; looks at all of them, for ``grace_s``, when no ``references`` are given."""
        if not references and self._deaths:
            references, _ = ray.wait([*self._deaths], num_returns=1, timeout=grace_s)
        for reference in references:
            name = self._deaths[reference]
            raise WorkerDied(str(_got(reference, name)), worker=name)


def _got(reference: Any, name: str) -> Any:
    """What the supervisor of a worker answered."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise WorkerDied(f"{name}: its supervisor did not answer; Ray says: {error}", worker=name) from None


def _names(waiting: Mapping[Any, str]) -> str:
    return ", ".join(sorted(waiting.values()))


class GroupCall(Generic[T]):
    """A verb under way on some or all ranks of a group, or in line behind other calls to them."""

    def __init__(
        self,
        group: WorkerGroup,
        verb: str,
        references: Mapping[Any, str],
        finish: Callable[[list[Any]], T],
        *,
        limit: Limit,
        before: Sequence[GroupCall[Any]] = (),
    ) -> None:
        """Take note.

        Args:
            group: that was called.
            verb: what it is counted and told as.
            references: of the replies -> whose they are.
            finish: makes one result of those of all ranks.
            limit: on it alone.
            before: what the same ranks do first; the limit counts from its end.
        """
        self._group = group
        self._verb = verb
        self._references = references
        self._finish = finish
        self._limit = limit
        self._before = before
        self._asked = time.monotonic()
        self._ended: float | None = None

    @property
    def _deadline(self) -> float:
        """On the monotonic clock; while calls before it are under way, the latest that it can be."""
        turns = [call._deadline if call._ended is None else call._ended for call in self._before]
        return max([self._asked, *turns]) + self._limit.seconds

    def ready(self, within_s: float) -> bool:
        """Whether :meth:`result` would not wait any more, having waited ``within_s``."""
        references = [*self._references]
        done, _ = ray.wait(references, num_returns=len(references), timeout=within_s)
        return len(done) == len(references) or time.monotonic() > self._deadline

    def result(self) -> T:
        """Wait for every rank.

        Raises:
            WorkerDied: a worker of the run, of this group or another, is gone.
            WorkerFailed: a rank raised.
            DeadlineExceeded: a rank did not answer in time, to this call or to one before it.
        """
        watch = self._group.watch
        answers = {}
        for reference in self._arrivals():
            whose = self._references[reference]
            try:
                reply: Reply | Death = ray.get(reference)
            except ray.exceptions.RayError as error:
                watch.raise_deaths(grace_s=_GRACE_S)
                raise WorkerDied(f"{whose} did not answer {self._verb}; Ray says: {error}", worker=whose) from None
            if isinstance(reply, Death):
                raise WorkerDied(str(reply), worker=whose)
            if reply.error:
                watch.raise_deaths(grace_s=_GRACE_S)  # a rank that lost its peer raises before the peer's end is known
                if death := self._group.death_within(whose, _GRACE_S):  # it may end for what it raised
                    raise WorkerDied(death, worker=whose)
                raise WorkerFailed(f"{whose} ({reply.place}) failed in {self._verb}:\n{reply.error}")
            answers[reference] = reply
        replies = [answers[reference] for reference in self._references]
        self._group.note(self._verb, dict(zip(self._references.values(), replies, strict=True)), self._limit)
        return self._finish([pickle.loads(reply.value) for reply in replies])

    def _arrivals(self) -> Iterator[Any]:
        """The replies as they come; first those of the calls before this one, each by its own deadline."""
        for call in self._before:
            if call._ended is None:
                for _ in call._arrivals():
                    pass
        waiting, what = dict(self._references), f"{self._group.name}: {self._verb}"
        while waiting:
            try:
                ready = self._group.watch.wait(waiting, until=self._deadline, limit=self._limit, what=what)
            except DeadlineExceeded:  # told once; whoever goes on has a limit of their own
                self._end()
                raise
            for reference in ready:
                del waiting[reference]
                yield reference
        self._end()

    def _end(self) -> None:
        self._ended = self._ended or time.monotonic()
        self._before = ()
        self._group.forget(self)


class WorkerGroup:
    """The ranks of one role.

    Objects of the types in ``held_types`` are sent to a worker once and named by key afterwards, wherever they stand
    in the arguments of a call.
    """

    def __init__(
        self,
        name: str,
        spawn: Callable[[int], Any],
        workers: int,
        *,
        watch: Watch,
        start_limit: Limit,
        call_limit: Limit,
        held_types: tuple[type[Any], ...] = (),
        restartable: bool = False,
    ) -> None:
        """Start the ranks.

        Args:
            name: of the role.
            spawn: makes the supervisor of a rank.
            workers: how many ranks.
            watch: ends the waits of the run when a rank dies.
            start_limit: on a rank's start, and on what it builds then.
            call_limit: on a call.
            held_types: see above.
            restartable: the death of a rank ends calls of that rank alone, see :meth:`restart`.
        """
        self.name = name
        self.watch = watch
        self.start_limit = start_limit
        self.call_limit = call_limit
        self.names = [name if workers == 1 else f"{name} rank {rank}" for rank in range(workers)]
        self._spawn = spawn
        self._supervisors = [spawn(rank) for rank in range(workers)]
        self._held_types = held_types
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._keys = itertools.count()
        self._numbers = [itertools.count() for _ in self._supervisors]
        self._last: list[GroupCall[Any] | None] = [None] * workers
        self._statistics = Statistics()
        self._told_near_limit: set[str] = set()
        self._counting = threading.Lock()
        self._restartable = restartable
        if not restartable:
            for worker, supervisor in zip(self.names, self._supervisors, strict=True):
                watch.add(worker, supervisor.death.remote())

    def births(self, ranks: Sequence[int] | None = None) -> list[Birth]:
        """Where each rank (all by default) runs."""
        return self._ask("birth", ranks)

    def deaths(self) -> dict[int, str]:
        """How those ended that are gone by now, by rank."""
        asked = {supervisor.death_so_far.remote(): rank for rank, supervisor in enumerate(self._supervisors)}
        answered, _ = ray.wait([*asked], num_returns=len(asked), timeout=_GRACE_S)
        found: dict[int, str] = {}
        for reference in answered:
            rank = asked[reference]
            try:
                death: Death | None = _got(reference, self.names[rank])
            except WorkerDied as died:
                found[rank] = str(died)
            else:
                found |= {} if death is None else {rank: str(death)}
        return found

    def death_within(self, worker: str, seconds: float) -> str | None:
        """How a worker ended, where it is gone within ``seconds``; None also where the watch would have told."""
        if not self._restartable:
            return None
        asked = self._supervisors[self.names.index(worker)].death.remote()
        ended, _ = ray.wait([asked], timeout=seconds)
        return str(_got(asked, worker)) if ended else None

    def restart(self, rank: int) -> None:
        """Put a new process in the place of a rank's old one; it waits for what to build."""
        ray.kill(self._supervisors[rank])
        self._supervisors[rank] = self._spawn(rank)
        self._numbers[rank] = itertools.count()
        self._last[rank] = None

    def keep_port(self) -> int:
        """A port on the host of rank 0 that is kept for that rank, which must listen on it with SO_REUSEPORT."""
        ports: list[int] = self._ask("keep_port", ranks=[0])
        return ports[0]

    def _ask(self, method: str, ranks: Sequence[int] | None = None) -> list[Any]:
        chosen = range(len(self._supervisors)) if ranks is None else ranks
        references = {getattr(self._supervisors[rank], method).remote(): self.names[rank] for rank in chosen}
        waiting, limit = dict(references), self.start_limit
        until = time.monotonic() + limit.seconds
        while waiting:
            for reference in self.watch.wait(waiting, until=until, limit=limit, what=f"{self.name}: {method}"):
                del waiting[reference]
        return [_got(reference, name) for reference, name in references.items()]

    def build(
        self, factory: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], ranks: Sequence[int] | None = None
    ) -> GroupCall[None]:
        """Build the object of each rank (of all by default): ``factory(*arguments[i])`` for the i-th of them."""
        calls = [Call(phase="starting", payload=cloudpickle.dumps((factory, args, {}))) for args in arguments]
        chosen = range(len(self._supervisors)) if ranks is None else ranks
        to = dict(zip(chosen, calls, strict=True))
        return self._send("start", to, lambda _: None, limit=self.start_limit)

    def _send(
        self, verb: str, to: Mapping[int, Any], finish: Callable[[list[Any]], T], *, limit: Limit
    ) -> GroupCall[T]:
        """Send each rank its call, behind those that are on their way to it."""
        references = {
            self._supervisors[rank].call.remote(call, next(self._numbers[rank])): self.names[rank]
            for rank, call in to.items()
        }
        before = {id(call): call for rank in to if (call := self._last[rank]) is not None}
        sent = GroupCall(self, verb, references, finish, limit=limit, before=tuple(before.values()))
        for rank in to:
            self._last[rank] = sent
        return sent

    def forget(self, ended: GroupCall[Any]) -> None:
        """Nothing waits for a call any more, and its replies need not be kept."""
        for rank, call in enumerate(self._last):
            if call is ended:
                self._last[rank] = None

    def call(
        self,
        verb: str,
        *args: Any,
        finish: Callable[[list[Any]], T],
        ranks: Sequence[int] | None = None,
        limit: Limit | None = None,
        label: str | None = None,
    ) -> GroupCall[T]:
        """Call ``verb`` on the ranks at once.

        Args:
            verb: method of what they have built.
            args: of the method.
            finish: makes one result of theirs.
            ranks: which; all by default.
            limit: on this call, where it is not the group's.
            label: what it is counted and told as, where the verb does not say.
        """
        hold: list[tuple[int, bytes]] = []
        payload = self._pickled((verb, args, {}), hold)
        drop = []
        while len(self._held) > _HELD:
            drop.append(self._held.popitem(last=False)[0])
        label = label or verb
        call: Any = Call(phase=label, payload=payload, hold=tuple(hold), drop=tuple(drop))
        if sum(len(data) for _, data in hold) + len(payload) > _LARGE_BYTES:
            call = ray.put(call)  # once for all ranks
        chosen = range(len(self._supervisors)) if ranks is None else ranks
        if hold and len(chosen) < len(self._supervisors):
            raise ValueError(f"{self.name}: {verb} shares a batch, so it must be called on every rank, got {ranks}")
        return self._send(label, dict.fromkeys(chosen, call), finish, limit=limit or self.call_limit)

    def call_beside(self, verb: str, *, finish: Callable[[list[Any]], T]) -> GroupCall[T]:
        """Call a verb on all ranks beside whatever else they do, now or later: it must touch nothing that those use."""
        call = Call(phase=verb, payload=cloudpickle.dumps((verb, (), {})))
        references = {
            supervisor.call_beside.remote(call): name
            for name, supervisor in zip(self.names, self._supervisors, strict=True)
        }
        return GroupCall(self, verb, references, finish, limit=self.call_limit)

    def _pickled(self, value: Any, hold: list[tuple[int, bytes]], *, itself: Any = None) -> bytes:
        group = self

        class Pickler(cloudpickle.Pickler):  # type: ignore[misc] # cloudpickle is untyped
            def persistent_id(self, part: Any) -> int | None:
                return group._key(part, hold) if isinstance(part, group._held_types) and part is not itself else None

        buffer = io.BytesIO()
        Pickler(buffer).dump(value)
        return buffer.getvalue()

    def _key(self, part: Any, hold: list[tuple[int, bytes]]) -> int:
        for key, held in self._held.items():
            if held is part:
                self._held.move_to_end(key)
                return key
        data = self._pickled(part, hold, itself=part)  # parts of it that are held come first
        key = next(self._keys)
        self._held[key] = part
        hold.append((key, data))
        return key

    def note(self, verb: str, replies: Mapping[str, Reply], limit: Limit) -> None:
        """Count what the ranks, by name, said of one call; tell the first of each verb that came near its ``limit``."""
        slowest = max(replies, key=lambda name: replies[name].busy_s)
        spent = replies[slowest].busy_s
        with self._counting:  # a save is waited for by a thread of its own
            if spent > _NEAR_LIMIT * limit.seconds and verb not in self._told_near_limit:
                self._told_near_limit.add(verb)
                _LOG.warning("%s: %s took %.0f s, more than half of its limit of %s", slowest, verb, spent, limit)
            for name, reply in replies.items():
                self._statistics.busy_of[verb][name] += reply.busy_s
            peak = max(reply.peak_rss_bytes for reply in replies.values())
            self._statistics.peak_rss_bytes = max(self._statistics.peak_rss_bytes, peak)

    def take_statistics(self) -> Statistics:
        """What was counted since the last time."""
        with self._counting:
            taken, self._statistics = self._statistics, Statistics()
        return taken

    def stop(self) -> list[Any]:
        """Ask every worker to end; references that are ready when it has."""
        return [supervisor.stop.remote() for supervisor in self._supervisors]

    def kill(self) -> None:
        """End every supervisor, and with it its worker, at once."""
        for supervisor in self._supervisors:
            ray.kill(supervisor)
