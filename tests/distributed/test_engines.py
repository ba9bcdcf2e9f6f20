"""Engines that die under a real Ray: what they had not finished is drawn again, or the run ends with the cause."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cloudpickle
import pytest

from megatron_rl.config.schema import ClusterConfig
from megatron_rl.dataflow import Finish, Prompt, Rollout, Sample, Sampling
from megatron_rl.ray_runtime.cluster import Cluster, Role, ray
from megatron_rl.ray_runtime.engines import Engines
from megatron_rl.ray_runtime.roles import RemoteEngine
from megatron_rl.ray_runtime.workers import WorkerDied, WorkerGroup

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

PROMPTS = [Prompt(id=str(i), token_ids=(1,) * (1 + i), answer="", source="") for i in range(6)]
SEEDS = [(10 * i, 10 * i + 1) for i in range(6)]
SAMPLING = Sampling(temperature=1.0, max_tokens=4)


class Engine:
    """Stale until it is told a version; a killer's file per death that is to come."""

    def __init__(self, rank: int, deaths: Path) -> None:
        self.rank = rank
        self.deaths = deaths
        self.version = -1

    def commit(self, version: int) -> None:
        self.version = version

    def generate(self, prompts: list[Prompt], sampling: Sampling, seeds: list[tuple[int, ...]]) -> list[Rollout]:
        if self.version < 0:
            raise RuntimeError("stale")
        for death in sorted(self.deaths.glob(f"{self.rank}-*")):
            death.unlink()
            if death.name.endswith("after-raising"):
                threading.Timer(0.5, os._exit, [1]).start()
                raise RuntimeError("a worker of mine is gone")
            os.kill(os.getpid(), signal.SIGKILL)
        return [
            Rollout(
                prompt=prompt,
                samples=tuple(
                    Sample(token_ids=(seed,), logprobs=(0.0,), text=f"{prompt.id} {seed}", finish=Finish.STOP)
                    for seed in of_prompt
                ),
                policy_version=self.version,
            )
            for prompt, of_prompt in zip(prompts, seeds, strict=True)
        ]


@dataclass
class Sync:
    group: WorkerGroup
    versions: list[int] = field(default_factory=list)

    def push(self, version: int) -> Mapping[str, float]:
        self.versions.append(version)
        self.group.call("commit", version, finish=len).result()
        return {}


@dataclass
class Started:
    engines: Engines
    sync: Sync
    group: WorkerGroup
    deaths: Path
    told: list[str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(ClusterConfig(call_deadline_s=30), gpus=0, run_dir=tmp_path_factory.mktemp("logs")) as cluster:
        yield cluster
    assert not ray.is_initialized()  # so that this process may start another one, as the tests of other files do


@pytest.fixture(scope="module")
def group(cluster: Cluster) -> WorkerGroup:
    return cluster.start([Role(name="engine", workers=2, restartable=True)], {})["engine"]


@pytest.fixture
def start(cluster: Cluster, group: WorkerGroup, tmp_path: Path) -> Callable[[int], Started]:
    def start(restarts: int) -> Started:
        def build(ranks: Sequence[int]) -> None:
            cluster.restart(group, ranks, Engine, [(rank, tmp_path) for rank in ranks])

        sync, told = Sync(group), list[str]()
        build(range(2))
        engines = Engines(RemoteEngine(group), sync, restarts=restarts, restart=build, tell=told.append)
        return Started(engines, sync, group, tmp_path, told)

    return start


def test_what_a_dead_engine_had_not_finished_is_drawn_again_with_its_seeds(start: Callable[[int], Started]) -> None:
    run = start(1)
    run.engines.push(7)
    whole = run.engines.generate(PROMPTS, SAMPLING, SEEDS)
    assert [[sample.token_ids[0] for sample in rollout.samples] for rollout in whole] == [[*seeds] for seeds in SEEDS]
    (run.deaths / "1-first").touch()
    assert run.engines.generate(PROMPTS, SAMPLING, SEEDS) == whole
    assert run.sync.versions == [7, 7]
    (told,) = run.told
    assert "engine rank 1 (pid " in told
    assert "signal 9 (SIGKILL)" in told
    assert told.endswith("engine rank 1 is started anew; restarts left: 0")


def test_both_may_die_at_once(start: Callable[[int], Started]) -> None:
    run = start(1)
    run.engines.push(2)
    whole = run.engines.generate(PROMPTS, SAMPLING, SEEDS)
    for rank in range(2):
        (run.deaths / f"{rank}-first").touch()
    assert run.engines.generate(PROMPTS, SAMPLING, SEEDS) == whole


def test_an_engine_that_raises_and_then_ends_is_started_anew(start: Callable[[int], Started]) -> None:
    run = start(1)
    run.engines.push(7)
    (run.deaths / "1-after-raising").touch()
    drawn = run.engines.generate(PROMPTS, SAMPLING, SEEDS)
    assert [[sample.token_ids[0] for sample in rollout.samples] for rollout in drawn] == [[*seeds] for seeds in SEEDS]
    (told,) = run.told
    assert told.startswith("engine rank 1 (pid ")
    assert "exited with code 1" in told
    assert "a worker of mine is gone" in told


def test_restarts_that_are_used_up_end_the_run_with_the_cause(start: Callable[[int], Started]) -> None:
    run = start(1)
    run.engines.push(0)
    for name in ("first", "second"):
        (run.deaths / f"0-{name}").touch()
        if name == "first":
            run.engines.generate(PROMPTS, SAMPLING, SEEDS)
    with pytest.raises(WorkerDied, match=r"engine rank 0 \(pid (.|\n)*no restart is left of engine.restarts=1") as died:
        run.engines.generate(PROMPTS, SAMPLING, SEEDS)
    assert died.value.worker == "engine rank 0"


def test_an_engine_that_died_while_it_had_nothing_to_do_is_there_for_the_next_push(
    start: Callable[[int], Started],
) -> None:
    run = start(1)
    run.engines.push(0)
    os.kill(run.group.births()[1].pid, signal.SIGKILL)
    while not run.group.deaths():
        pass
    run.engines.push(1)
    assert {rollout.policy_version for rollout in run.engines.generate(PROMPTS, SAMPLING, SEEDS)} == {1}
    assert run.sync.versions == [0, 1]
    assert "its last phase: idle after commit" in run.told[0]
