"""Reward workers in pools that Ray places, beside one pool in this process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from megatron_rl.config.schema import ClusterConfig
from megatron_rl.dataflow import Finish, Outcome
from megatron_rl.ray_runtime.cluster import Cluster, Role, ray
from megatron_rl.ray_runtime.rewards import RemoteRewards
from megatron_rl.ray_runtime.workers import WorkerDied, WorkerGroup
from megatron_rl.rewards.service import RewardService

RULE = """
import os, time

def rule(text, answer, finish):
    if text == "die":
        os._exit(3)
    if text == "spin":
        while True:
            pass
    time.sleep(float(answer))
    return float(text)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(ClusterConfig(cpus_per_worker=0.5), gpus=0, run_dir=tmp_path_factory.mktemp("run")) as started:
        yield started
    assert not ray.is_initialized()  # so that this process may start another one, as the tests of other files do


@pytest.fixture(scope="module")
def rule(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rule") / "rule.py"
    file.write_text(RULE)
    return f"{file}:rule"


@pytest.fixture
def pools(cluster: Cluster, rule: str, request: pytest.FixtureRequest) -> WorkerGroup:
    """Two pools of one worker; the role has the test's name, since a cluster's roles stay until it ends."""
    roles = [Role(name="bystander", workers=1), Role(name=request.node.name[:20], workers=2, spread=True)]
    group = cluster.start(roles, {})[request.node.name[:20]]
    group.build(partial(RewardService, rule, timeout_s=1.0), [(), ()]).result()
    return group


def requests(*texts: str, pause: str = "0") -> list[tuple[str, str, Finish]]:
    return [(text, pause, Finish.STOP) for text in texts]


def test_scores_come_in_order_and_what_fails_costs_itself_alone(pools: WorkerGroup) -> None:
    rewards = RemoteRewards(pools)
    scores = rewards.score(requests("1", "2", "die", "4", "spin", "6", "7"))
    assert [score.value for score in scores] == [1, 2, 0, 4, 0, 6, 7]
    assert [score.outcome for score in scores] == [
        *[Outcome.SCORED, Outcome.SCORED, Outcome.ERROR, Outcome.SCORED, Outcome.TIMEOUT, Outcome.SCORED],
        Outcome.SCORED,
    ]
    assert scores[2].reason.endswith("exited with code 3"), "what a pool saw reaches the driver"
    assert rewards.score([]) == []
    assert [score.value for score in rewards.score(requests("5"))] == [5]

    rewards.take_busy_seconds()
    began = time.monotonic()
    rewards.score(requests(*"1234", pause="1"))
    took, busy = time.monotonic() - began, rewards.take_busy_seconds()
    assert 4.0 <= busy <= 2 * took, "the seconds of all pools"
    assert took < 0.9 * busy, "the pools must score at the same time"
    assert rewards.take_busy_seconds() == 0.0


def test_a_pool_that_is_killed_is_named_and_leaves_no_worker(pools: WorkerGroup) -> None:
    rewards = RemoteRewards(pools)
    rewards.score(requests("1", "2"))
    pid = pools.births()[1].pid
    workers = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    assert workers
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"rank 1 \(pid \d+ on .*\) was killed by signal 9"):
        rewards.score(requests("1", "2", pause="1"))
    end = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.05)
