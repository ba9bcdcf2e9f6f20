from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_rl.config.schema import ClusterConfig
from megatron_rl.dataflow import Finish, Prompt, Rollout, Sample, Sampling
from megatron_rl.ray_runtime.cluster import Cluster
from megatron_rl.ray_runtime.engines import Engines, Evaluated
from megatron_rl.ray_runtime.roles import RemoteEngine, RemoteTrainer
from megatron_rl.ray_runtime.supervisor import Birth
from megatron_rl.ray_runtime.workers import WorkerDied, WorkerFailed, WorkerGroup


class Group:
    """One engine, which lives."""

    names = ("engine",)

    def deaths(self) -> dict[int, str]:
        return {}


@dataclass
class Sync:
    versions: list[int] = field(default_factory=list)

    def push(self, version: int) -> Mapping[str, float]:
        self.versions.append(version)
        return {"bytes": 1.0}


def test_what_pushes_send_is_told_once_after_the_first() -> None:
    sync, told = Sync(), []
    group = cast("WorkerGroup", Group())
    more: dict[str, Any] = {"restarts": 0, "restart": lambda _: None, "tell": told.append}
    engines = Engines(
        RemoteEngine(group), sync, **more, describe=lambda: f"slices, known after version {sync.versions[-1]}"
    )
    assert told == []
    for version in (3, 4):
        assert engines.push(version) == {"bytes": 1.0}
    assert told == ["slices, known after version 3"]


class Dying(Group):
    """An engine that is found dead after a push has failed."""

    def __init__(self) -> None:
        self.asked = 0

    def deaths(self) -> dict[int, str]:
        self.asked += 1
        return {0: "engine was killed by signal 9"} if self.asked > 1 else {}


class Failing:
    def push(self, version: int) -> Mapping[str, float]:
        error = WorkerFailed("policy rank 0 failed in send: rank 0 waited for rank 1, a receiver")
        error.add_note("in phase transfer")
        raise error


def test_an_engine_that_dies_in_a_push_is_the_cause_and_not_the_trainer_that_waited_for_it() -> None:
    more: dict[str, Any] = {"restarts": 1, "restart": lambda _: None, "tell": lambda _: None}
    with pytest.raises(WorkerDied, match="killed by signal 9") as caught:
        Engines(RemoteEngine(cast("WorkerGroup", Dying())), Failing(), **more).push(1)
    assert caught.value.worker == "engine"
    assert caught.value.__notes__ == ["in phase transfer"]
    assert "failed in send" in str(caught.value.__cause__)
    with pytest.raises(WorkerFailed, match="failed in send"):
        Engines(RemoteEngine(cast("WorkerGroup", Group())), Failing(), **more).push(1)


@dataclass
class Restarts:
    """An engine that is found dead, and how each new process of it comes up: with an error, or well."""

    ends: list[Exception | None]
    names: tuple[str, ...] = ("engine",)
    dead: dict[int, str] = field(default_factory=lambda: {0: "engine was killed by signal 9"})

    def deaths(self) -> dict[int, str]:
        return self.dead

    def restart(self, ranks: Sequence[int]) -> None:
        assert ranks == [0]
        self.dead = {}
        if (error := self.ends.pop(0)) is not None:
            if isinstance(error, WorkerFailed):  # told by the trainer, which waited for it
                self.dead = {0: "engine died while it joined"}
            raise error


def pushes(group: Restarts, restarts: int) -> tuple[Sync, list[str]]:
    sync, told = Sync(), []
    more: dict[str, Any] = {"restarts": restarts, "restart": group.restart, "tell": told.append}
    Engines(RemoteEngine(cast("WorkerGroup", group)), sync, **more).push(4)
    return sync, told


def test_an_engine_that_dies_while_it_is_started_anew_is_started_again_as_long_as_restarts_are_left() -> None:
    loading = WorkerDied("engine died while it loaded", worker="engine")
    joining = WorkerFailed("policy failed in open_channel: waited for rank 1")
    sync, told = pushes(Restarts([loading, joining, None]), restarts=3)
    assert sync.versions == [4]
    assert [line.replace("\n", "; ") for line in told] == [
        "engine was killed by signal 9; engine is started anew; restarts left: 2",
        "engine died while it loaded; engine is started anew; restarts left: 1",
        "engine died while it joined; engine is started anew; restarts left: 0",
    ]
    with pytest.raises(WorkerDied, match=r"died while it loaded\nno restart is left of engine\.restarts=2"):
        pushes(Restarts([loading, loading]), restarts=2)


def test_what_no_death_of_an_engine_explains_ends_the_run_though_restarts_are_left() -> None:
    group = Restarts([WorkerDied("critic was killed by signal 9", worker="critic")])
    with pytest.raises(WorkerDied, match="critic was killed"):
        pushes(group, restarts=3)


@dataclass
class BothDead:
    """Two engines that are found dead; the node of the first does not answer when it is first started anew."""

    names: tuple[str, ...] = ("engine rank 0", "engine rank 1")
    dead: dict[int, str] = field(default_factory=lambda: {0: "rank 0 was killed", 1: "rank 1 was killed"})
    built: dict[int, str] = field(default_factory=dict)
    asked: int = 0

    def deaths(self) -> dict[int, str]:
        return dict(self.dead)

    def restart(self, rank: int) -> None:
        self.dead.pop(rank, None)
        self.built[rank] = "not yet"

    def births(self, ranks: Sequence[int]) -> list[Birth]:
        self.asked += 1
        if self.asked == 1:
            raise WorkerDied("engine rank 0: its supervisor did not answer", worker="engine rank 0")
        return [Birth(host="a", address="10.0.0.1", pid=os.getpid()) for _ in ranks]

    def build(self, factory: Any, arguments: Sequence[tuple[str]], ranks: Sequence[int]) -> SimpleNamespace:
        self.built |= {rank: factory(*each) for rank, each in zip(ranks, arguments, strict=True)}
        return SimpleNamespace(result=lambda: None)


def test_an_engine_is_charged_once_for_a_death_though_another_one_failed_to_start(tmp_path: Path) -> None:
    group, sync, told = BothDead(), Sync(), list[str]()
    cluster = Cluster(ClusterConfig(), gpus=0, run_dir=tmp_path)

    def restart(ranks: Sequence[int]) -> None:
        cluster.restart(cast("WorkerGroup", group), ranks, str.upper, [("engine",)] * len(ranks))

    engine = RemoteEngine(cast("WorkerGroup", group))
    Engines(engine, sync, restarts=2, restart=restart, tell=told.append).push(4)
    assert sync.versions == [4]
    assert group.built == {0: "ENGINE", 1: "ENGINE"}
    assert [line.replace("\n", "; ") for line in told] == [
        "rank 0 was killed; engine rank 0 is started anew; restarts left: 1",
        "rank 1 was killed; engine rank 1 is started anew; restarts left: 1",
        "engine rank 0: its supervisor did not answer; engine rank 0 is started anew; restarts left: 0",
    ]


def test_ranks_that_do_not_see_a_file_are_named_with_their_hosts() -> None:
    def call(verb: str, file: Path, *, finish: Any) -> list[str]:
        assert (verb, file) == ("sees", Path("token"))
        return cast("list[str]", finish([True, False, False]))

    hosts = ["a", "b", "c"]
    group = SimpleNamespace(
        names=[f"critic rank {rank}" for rank in range(3)],
        births=lambda ranks: [SimpleNamespace(host=hosts[rank]) for rank in ranks],
        call=call,
    )
    found = RemoteTrainer(cast("WorkerGroup", group)).blind_ranks(Path("token"))
    assert found == ["critic rank 1 on b", "critic rank 2 on c"]


@dataclass
class Drawn:
    rollouts: list[Rollout]

    def result(self) -> list[Rollout]:
        return self.rollouts


@dataclass
class Pair:
    """Two engines, whose responses are as long as the prompt's answer says."""

    names = ("engine rank 0", "engine rank 1")
    dealt: list[list[str]] = field(default_factory=lambda: [[], []])

    def call(
        self, verb: str, prompts: Sequence[Prompt], sampling: Sampling, seeds: Any, *, finish: Any, ranks: list[int]
    ) -> Drawn:
        self.dealt[ranks[0]] = [prompt.id for prompt in prompts]
        return Drawn([self.rollout(prompt, int(prompt.answer)) for prompt in prompts])

    def rollout(self, prompt: Prompt, length: int) -> Rollout:
        sample = Sample(token_ids=(1,) * length, logprobs=(0.0,) * length, text="", finish=Finish.STOP)
        return Rollout(prompt=prompt, samples=(sample,), policy_version=0)


def pair() -> tuple[Pair, Engines]:
    group = Pair()
    more: dict[str, Any] = {"restarts": 0, "restart": lambda _: None, "tell": lambda _: None}
    return group, Engines(RemoteEngine(cast("WorkerGroup", group)), Sync(), **more)


def prompts(*lengths: int) -> list[Prompt]:
    """Each of a source of its own, with a response of so many tokens."""
    return [Prompt(id=str(n), token_ids=(1,), answer=str(n), source=str(n)) for n in lengths]


SAMPLING, ROW = Sampling(temperature=1.0, max_tokens=100), [[0]]


def test_engines_that_go_on_from_a_state_deal_prompts_out_as_those_that_left_it() -> None:
    group, engines = pair()
    engines.generate(prompts(90, 30, 20, 40), SAMPLING, ROW * 4)
    saved = json.loads(json.dumps(engines.state()))
    engines.generate(prompts(90, 30, 20, 40), SAMPLING, ROW * 4)
    later, resumed = pair()
    resumed.restore(saved)
    assert [sorted(ids) for ids in group.dealt] == [["90"], ["20", "30", "40"]]
    resumed.generate(prompts(90, 30, 20, 40), SAMPLING, ROW * 4)
    assert later.dealt == group.dealt
    assert resumed.state() == engines.state()


def test_an_evaluation_leaves_the_lengths_of_rollouts_as_they_are() -> None:
    _, engines = pair()
    engines.generate(prompts(90, 30, 20, 40), SAMPLING, ROW * 4)
    before = engines.state()
    evaluated = Evaluated(engines).generate(prompts(90, 30, 20, 40, 50), SAMPLING, ROW * 5)
    assert [rollout.prompt.answer for rollout in evaluated] == ["90", "30", "20", "40", "50"]
    assert engines.state() == before
