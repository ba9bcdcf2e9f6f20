"""Supervised workers under a real Ray: calls, order, what is sent once, and every way a wait can end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import cloudpickle
import psutil
import pytest
import torch

from megatron_rl.batches import TokenRows
from megatron_rl.config.limit import Limit
from megatron_rl.config.schema import ClusterConfig, SyncConfig
from megatron_rl.dataflow import Finish, Prompt, Rollout, Sample, Sampling
from megatron_rl.interfaces import PushPhase
from megatron_rl.ray_runtime.cluster import Cluster, ClusterProblem, Role, check_machine, ray
from megatron_rl.ray_runtime.roles import HELD_TYPES, RemoteEngine, RemotePolicy, connect
from megatron_rl.ray_runtime.workers import DeadlineExceeded, WorkerDied, WorkerFailed, WorkerGroup
from megatron_rl.weights.sync import CheckedSync

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


class Recorder:
    """What the workers of these tests run."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.seen: list[int] = []
        self.unpickled: list[int] = []

    def note(self, number: int, pause_s: float = 0.0) -> int:
        time.sleep(pause_s)
        self.seen.append(number)
        return self.rank

    def history(self) -> list[int]:
        return self.seen

    def remember(self, batch: TokenRows) -> tuple[int, int]:
        """The identity of the batch in this process, and a figure from it."""
        return id(batch), int(batch.tokens.sum())

    def fail(self, rank: int) -> None:
        if self.rank == rank:
            raise ValueError(f"rank {rank} was told to fail")
        time.sleep(60)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def advance(self, phase: PushPhase, version: int, deadline_s: float) -> None:
        """As an engine does."""

    def gpus_in_sight(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    def listen(self, address: str) -> tuple[str, int]:
        """As a sender whose channel will not open."""
        return address, 1

    def open_channel(self, *_: object) -> None:
        if self.rank == 0:
            raise ValueError("/dev/shm must have room")

    def join(self, *_: object) -> None:
        """As an engine that waits for the sender in vain."""
        time.sleep(8)
        raise ValueError("waited for ranks [0]")

    def generate(self, prompts: list[Prompt], sampling: Sampling, seeds: list[tuple[int, ...]]) -> list[Rollout]:
        """Samples whose text names this rank and their seed."""
        return [
            Rollout(
                prompt=prompt,
                samples=tuple(
                    Sample(token_ids=(1,), logprobs=(0.0,), text=f"{self.rank} {seed}", finish=Finish.STOP)
                    for seed in of_prompt
                ),
                policy_version=0,
            )
            for prompt, of_prompt in zip(prompts, seeds, strict=True)
        ]


def first(answers: list[object]) -> object:
    return answers[0]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, WorkerGroup]]:
    roles = [
        Role(name="pair", workers=2, held_types=HELD_TYPES),
        Role(name="engine", workers=1),
        Role(name="other", workers=1),
    ]
    with Cluster(ClusterConfig(call_deadline_s=30), gpus=0, run_dir=tmp_path_factory.mktemp("logs")) as cluster:
        started = cluster.start(roles, {})
        for group in started.values():
            group.build(Recorder, [(rank,) for rank in range(len(group.names))]).result()
        yield started
    assert not ray.is_initialized()  # so that this process may start another one, as the tests of other files do


@pytest.fixture
def group(groups: dict[str, WorkerGroup]) -> WorkerGroup:
    return groups["pair"]


def rows(value: int) -> TokenRows:
    tokens = torch.full((2, 3), value)
    mask = torch.tensor([[False, True, True]] * 2)
    return TokenRows(tokens=tokens, lengths=torch.tensor([3, 3]), response_mask=mask)


def test_calls_that_overlap_run_in_one_order_on_every_rank(group: WorkerGroup) -> None:
    under_way = [group.call("note", number, 0.02 if number % 3 == 0 else 0.0, finish=list) for number in range(12)]
    assert [call.result() for call in reversed(under_way)] == [[0, 1]] * 12
    assert group.call("history", finish=list).result() == [list(range(12))] * 2


def test_a_call_beside_others_runs_at_once_and_one_that_fails_is_told(group: WorkerGroup) -> None:
    long = group.call("sleep", 3, finish=first)
    beside = group.call_beside("history", finish=len)
    assert beside.ready(within_s=2)
    assert beside.result() == 2
    assert not long.ready(within_s=0)
    long.result()
    with pytest.raises(WorkerFailed, match="'Recorder' object has no attribute 'nothing'"):
        group.call_beside("nothing", finish=first).result()


def test_a_batch_is_sent_once_and_forgotten_when_newer_ones_come(group: WorkerGroup) -> None:
    batch = rows(1)
    seen = [group.call("remember", batch, finish=first).result() for _ in range(3)]
    assert len(set(seen)) == 1, "the worker must have kept the same object"
    assert seen[0][1] == 6
    for value in (2, 3, 4):
        assert group.call("remember", rows(value), finish=first).result()[1] == 6 * value
    assert group.call("remember", batch, finish=first).result()[1] == 6


def test_several_engines_share_the_prompts_and_rollouts_come_back_in_order(group: WorkerGroup) -> None:
    prompts = [
        Prompt(id=str(i), token_ids=(1,) * length, answer="", source="") for i, length in enumerate((9, 1, 1, 8))
    ]
    seeds = [(10 * row, 10 * row + 1) for row in range(4)]
    sampling = Sampling(temperature=1.0, max_tokens=1)
    rollouts = RemoteEngine(group).generate(prompts, sampling, seeds)
    # of 10, 2, 2 and 9 expected tokens a sample: the first with one of the short ones, the last with the other
    assert [[sample.text for sample in rollout.samples] for rollout in rollouts] == [
        ["0 0", "0 1"],
        ["1 10", "1 11"],
        ["0 20", "0 21"],
        ["1 30", "1 31"],
    ]
    assert [rollout.prompt.id for rollout in rollouts] == ["0", "1", "2", "3"]
    (alone,) = RemoteEngine(group).generate(prompts[:1], sampling, seeds[:1])
    assert alone == rollouts[0]


def test_a_channel_that_does_not_open_is_told_by_the_side_that_failed_first(groups: dict[str, WorkerGroup]) -> None:
    started = time.monotonic()
    policy, engine = RemotePolicy(groups["pair"]), RemoteEngine(groups["engine"])
    with pytest.raises(WorkerFailed, match=r"pair rank 0 .* failed in open_channel:(.|\n)*/dev/shm must have room"):
        connect(policy, engine, SyncConfig(), tensor=1, cuda=False, shared=False, pushed_format=None, timeout_s=8)
    assert time.monotonic() - started < 6


def test_without_gpus_workers_see_none_even_where_the_node_has_some(group: WorkerGroup) -> None:
    assert group.call("gpus_in_sight", finish=list).result() == ["", ""]


def test_a_failure_names_the_rank_and_does_not_wait_for_its_peers(group: WorkerGroup) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerFailed, match=r"pair rank 1 \(pid \d+ on .+\) failed in fail:(.|\n)*rank 1 was told to"):
        group.call("fail", 1, finish=first).result()
    assert time.monotonic() - started < 10


def test_a_deadline_names_whom_it_waited_for(groups: dict[str, WorkerGroup]) -> None:
    engine = groups["engine"]
    told = r"engine: sleep did not finish within 1 s \(a\.key, .*\); still waiting for engine$"
    with pytest.raises(DeadlineExceeded, match=told):
        engine.call("sleep", 2, finish=first, limit=Limit(1, "a.key")).result()


def test_a_stopped_engine_ends_the_push_in_a_phase_that_is_named(groups: dict[str, WorkerGroup]) -> None:
    engine = groups["engine"]
    (birth,) = engine.births()
    sync = CheckedSync(
        sender=RemotePolicy(groups["pair"]),
        receiver=RemoteEngine(engine),
        probe=rows(1),
        probe_tolerance=0.05,
        phase_deadline_s=1.0,
    )
    told = r"engine: advance did not finish within 1 s \(sync\.phase_deadline_s, .*\); still waiting for engine"
    os.kill(birth.pid, signal.SIGSTOP)
    try:
        with pytest.raises(DeadlineExceeded, match=told) as caught:
            sync.push(3)
    finally:
        os.kill(birth.pid, signal.SIGCONT)
    assert caught.value.__notes__ == ["in phase drain of the push of version 3; the engine is stale"]


def test_any_death_ends_every_wait_and_is_told_in_full(groups: dict[str, WorkerGroup]) -> None:
    (birth,) = groups["other"].births()
    waiting = groups["engine"].call("sleep", 20, finish=first)
    os.kill(birth.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied) as died:
        waiting.result()
    assert f"other (pid {birth.pid} on " in str(died.value)
    assert "killed by signal 9 (SIGKILL); who sent it is not known" in str(died.value)
    assert "its last phase: idle after starting" in str(died.value)
    assert not psutil.pid_exists(birth.pid)


@pytest.mark.parametrize(
    ("workers", "gpus", "says"),
    [
        (1000, 0, r"1000 workers x cluster.cpus_per_worker=0.4 = 400 CPUs, this machine has \d+"),
        (9, 8, "9 workers of one GPU each, this machine has 8 GPUs"),
    ],
)
def test_a_machine_that_is_too_small_is_refused(workers: int, gpus: int, says: str) -> None:
    with pytest.raises(ClusterProblem, match=says):
        check_machine(workers, gpus, ClusterConfig())
