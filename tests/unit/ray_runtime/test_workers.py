"""Calls to a group of workers by themselves, without Ray: whose deadline runs when, and what is counted as what."""

from __future__ import annotations

import re
import time
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rl.batches import TokenRows
from megatron_rl.config.limit import Limit
from megatron_rl.config.schema import ClusterConfig
from megatron_rl.ray_runtime import workers
from megatron_rl.ray_runtime.child import Call, Reply, _Worker
from megatron_rl.ray_runtime.roles import HELD_TYPES, RemotePolicy, RemoteReference
from megatron_rl.ray_runtime.workers import DeadlineExceeded, Watch, WorkerDied, WorkerGroup

FOREVER = 100.0


class Threads:
    """Ray where references are futures."""

    exceptions = SimpleNamespace(RayError=ConnectionError)
    get = staticmethod(Future.result)
    put = staticmethod(lambda value: value)

    @staticmethod
    def wait(
        references: list[Future[Any]], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Future[Any]], list[Future[Any]]]:
        mode = futures.FIRST_COMPLETED if num_returns == 1 else futures.ALL_COMPLETED
        done = futures.wait(references, timeout, mode).done
        return [one for one in references if one in done], [one for one in references if one not in done]


class Thread:
    """A supervisor with its worker, which does calls in their order."""

    def __init__(self) -> None:
        self._worker, self._pool = _Worker(), ThreadPoolExecutor(1)
        self.call = SimpleNamespace(remote=lambda call, number: self._pool.submit(self._do, call))
        self.death = SimpleNamespace(remote=Future[Any])

    def _do(self, call: Call) -> Reply:
        started = time.monotonic()
        value = workers.pickle.dumps(self._worker.run(call))
        return Reply(value=value, place="here", busy_s=time.monotonic() - started, peak_rss_bytes=1)


class Sleeper:
    """What the ranks build."""

    def __init__(self, seconds: float = 0.0) -> None:
        time.sleep(seconds)

    def nap(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def logprobs(self, batch: TokenRows, temperature: float | None, reference: bool, packed: bool = True) -> Any:
        rows = torch.zeros(batch.tokens.shape)
        return list(range(len(rows))), rows


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ray", Threads)


def group(*, start: float = FOREVER, call: float = FOREVER, ranks: int = 1) -> WorkerGroup:
    config = ClusterConfig(start_deadline_s=start, call_deadline_s=call)
    return WorkerGroup(
        "engine",
        lambda rank: Thread(),
        ranks,
        watch=Watch(),
        start_limit=config.start_limit,
        call_limit=config.call_limit,
        held_types=HELD_TYPES,
    )


def built(**limits: Any) -> WorkerGroup:
    made = group(**limits)
    made.build(Sleeper, [()] * len(made.names)).result()
    return made


def test_loading_has_the_deadline_of_starting_and_a_call_has_its_own() -> None:
    told = r"^engine: start did not finish within 0\.3 s \(cluster\.start_deadline_s, .*\); still waiting for engine$"
    with pytest.raises(DeadlineExceeded, match=told):
        group(start=0.3).build(Sleeper, [(1.0,)]).result()
    group(call=0.3).build(Sleeper, [(1.0,)]).result()
    with pytest.raises(
        DeadlineExceeded, match=r"^engine: nap did not finish within 0\.3 s \(cluster\.call_deadline_s, "
    ):
        built(call=0.3).call("nap", 1.0, finish=sum).result()


def test_a_call_that_waits_in_line_does_not_use_up_its_deadline() -> None:
    line = built(call=4.0)
    naps = [line.call("nap", 1.0, finish=sum) for _ in range(5)]
    assert [nap.result() for nap in naps] == [1.0] * 5
    naps = [line.call("nap", 1.0, finish=sum) for _ in range(5)]
    assert [nap.result() for nap in reversed(naps)] == [1.0] * 5, "whoever is waited for first"


def test_the_one_at_the_head_of_a_line_is_told_of_and_at_its_own_deadline() -> None:
    line = built(ranks=2)
    line.call("nap", 4.0, finish=sum, ranks=[1], limit=Limit(0.3, "a.key"))
    behind = line.call("nap", 0.0, finish=sum)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"engine: nap .* 0\.3 s \(a\.key, .*; still waiting for engine rank 1$"):
        behind.result()
    assert time.monotonic() - started < 3.5
    assert behind.result() == 0.0, "told once; its own limit holds then"


def test_whether_a_call_behind_others_is_overdue_is_known_without_waiting() -> None:
    line = built()
    line.call("nap", 6.0, finish=sum, limit=Limit(2.0, "a.key"))
    behind = line.call("nap", 0.0, finish=sum, limit=Limit(2.0, "a.key"))
    assert not behind.ready(within_s=2.3), "its own time may not have begun"
    assert behind.ready(within_s=2.0)


def test_the_first_call_of_a_verb_that_took_more_than_half_of_its_limit_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    line, limit = built(ranks=2), Limit(4.0, "a.key")
    naps = [line.call("nap", seconds, finish=sum, ranks=[1], limit=limit) for seconds in (0.0, 2.2, 2.3)]
    queued = line.call("nap", 0.0, finish=sum, ranks=[1], limit=limit, label="behind them")
    assert queued.result() == 0.0
    assert caplog.messages == [], "it waited for long, and took no time"
    assert [nap.result() for nap in naps] == [0.0, 2.2, 2.3]
    [told] = caplog.messages
    assert re.sub("took [23] s", "took 2 s", told) == (
        "engine rank 1: nap took 2 s, more than half of its limit of 4 s (a.key, to be raised if it may take longer)"
    )


def test_replies_are_not_kept_once_they_are_taken() -> None:
    line = built(ranks=2)
    calls = [line.call("nap", 0.0, finish=sum, ranks=ranks) for ranks in ([0], [1], None)]
    assert [call.result() for call in calls] == [0.0] * 3
    assert line._last == [None, None]
    assert all(call._before == () for call in calls)


def test_the_reference_and_comparisons_are_counted_apart_from_the_policys_own_logprobs() -> None:
    ranks = built()
    policy, reference = RemotePolicy(ranks), RemoteReference(ranks)
    mask = torch.tensor([[False, True]])
    rows = TokenRows(tokens=torch.ones(1, 2, dtype=torch.int64), lengths=torch.tensor([2]), response_mask=mask)
    ranks.take_statistics()
    for pending in (policy.logprobs(rows), reference.logprobs(rows), policy.logprobs(rows, 1.0)):
        pending.result()
    assert [*ranks.take_statistics().busy_s] == ["logprobs", "reference_logprobs", "compared_logprobs"]


def test_what_ray_says_of_a_supervisor_is_told_as_the_death_of_its_worker() -> None:
    line = built()
    line._restartable = True
    gone = Future[Any]()
    gone.set_exception(ConnectionError("the actor died"))
    line._supervisors[0].birth = SimpleNamespace(remote=lambda: gone)
    line._supervisors[0].death = SimpleNamespace(remote=lambda: gone)
    with pytest.raises(WorkerDied, match=r"^engine: its supervisor did not answer; Ray says: the actor died$") as died:
        line.births()
    assert died.value.worker == "engine"
    with pytest.raises(WorkerDied, match=r"Ray says: the actor died$"):
        line.death_within("engine", 1.0)


def test_replies_that_are_there_are_taken_at_once_however_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    line = built(ranks=24)
    call = line.call("nap", 0.0, finish=len)
    assert call.ready(within_s=20)
    waits: list[int] = []
    wait = Threads.wait
    monkeypatch.setattr(
        Threads, "wait", staticmethod(lambda references, **more: waits.append(1) or wait(references, **more))
    )
    assert call.result() == 24
    assert len(waits) <= 2
