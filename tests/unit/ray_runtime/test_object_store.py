"""How much a step has in Ray's object store, against what really travels; no Ray is started."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfDiskError, RayError

from megatron_rl.batches import ExperienceBatch, Minibatch, RolloutBatch
from megatron_rl.config.schema import ClusterConfig, RunConfig
from megatron_rl.dataflow import Finish, Prompt, Rollout, Sample
from megatron_rl.ray_runtime import cluster, workers
from megatron_rl.ray_runtime.cluster import Cluster, ClusterProblem, Role
from megatron_rl.ray_runtime.object_store import object_store_bytes, step_bytes
from megatron_rl.ray_runtime.roles import HELD_TYPES
from megatron_rl.ray_runtime.workers import WorkerGroup
from tests.fakes import fake_config
from tests.unit.ray_runtime.test_placement import FakeRay

GIB = 1 << 30


def recipe(folder: Path, *, critic: bool, reference: bool, evaluated: int = 1) -> RunConfig:
    """Eight samples of at most 600 + 1400 tokens, in minibatches of four."""
    config = fake_config(folder, prompts_per_step=4)
    ppo = replace(config.ppo, minibatch_samples=4, kl_coef=0.1 if reference else 0.0)
    return replace(
        config,
        data=replace(config.data, max_prompt_tokens=600),
        rollout=replace(config.rollout, samples_per_prompt=2, max_response_tokens=1400),
        evaluation=replace(config.evaluation, prompts=evaluated, samples=1),
        ppo=ppo if critic else replace(ppo, advantage="grpo"),
        critic=config.critic if critic else None,
    )


class Sent:
    """What groups would put into the store, call by call, in bytes; no worker is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        monkeypatch.setattr(workers.ray, "put", lambda call: self.sizes.append(len(pickle.dumps(call))))

    def group(self, name: str) -> WorkerGroup:
        limit = ClusterConfig().call_limit
        supervisor = SimpleNamespace(call=SimpleNamespace(remote=lambda *_: object()))
        return WorkerGroup(
            name,
            lambda rank: supervisor,
            1,
            watch=workers.Watch(),
            start_limit=limit,
            call_limit=limit,
            held_types=HELD_TYPES,
            restartable=True,
        )

    def take(self) -> int:
        total, self.sizes = sum(self.sizes), []
        return total


@pytest.mark.parametrize("reference", [False, True], ids=["no reference", "reference"])
@pytest.mark.parametrize("critic", [False, True], ids=["no critic", "critic"])
def test_a_step_is_what_groups_are_sent_and_what_they_answer(
    critic: bool, reference: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, sent = recipe(tmp_path, critic=critic, reference=reference), Sent(monkeypatch)
    assert (config.samples_per_step, len(config.trainers)) == (8, 1 + critic)
    shape = (8, 2000)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, 0] = False
    batch = RolloutBatch(
        tokens=torch.ones(shape, dtype=torch.int64),
        lengths=torch.full((8,), 2000),
        response_mask=mask,
        rollout_logprobs=torch.rand(shape),
        sampled_mask=mask.clone(),
        scores=torch.zeros(8),
        truncated=torch.zeros(8, dtype=torch.bool),
        group=torch.zeros(8, dtype=torch.int64),
        policy_version=0,
    )
    groups = [sent.group(name) for name in config.trainers]
    for group in groups:
        group.call("score", batch, finish=list)
    answers = (1 + critic + reference) * len(pickle.dumps(torch.rand(shape)))
    scored = sent.take() + answers
    experience = ExperienceBatch(
        rollouts=batch,
        old_logprobs=torch.rand(shape),
        ref_logprobs=torch.rand(shape) if reference else None,
        values=torch.rand(shape) if critic else None,
        rewards=torch.rand(shape),
        advantages=torch.rand(shape),
        returns=torch.rand(shape) if critic else None,
    )
    minibatch = Minibatch(source=experience, rows=torch.arange(4), loss_weight=torch.rand(4, 2000))
    for group in groups:
        group.call("update", minibatch, None, finish=list)
    learned = sent.take()
    found, most = step_bytes(config), max(scored, learned)
    assert most * 0.95 < found <= most
    samples = replace(config, prompts_per_step=8, ppo=replace(config.ppo, minibatch_samples=8))
    assert step_bytes(samples) == 2 * found


def test_what_engines_answer_counts_where_an_evaluation_is_larger_than_a_step(tmp_path: Path) -> None:
    answered = 1400
    sample = Sample(
        token_ids=tuple(range(100_000, 100_000 + answered)),
        logprobs=tuple(-token / 7 for token in range(answered)),
        text="word" * answered,
        finish=Finish.STOP,
    )
    prompt = Prompt(id="a", token_ids=(1,), answer="1", source="s")
    one = len(pickle.dumps(Rollout(prompt=prompt, samples=(sample,), policy_version=0), pickle.HIGHEST_PROTOCOL))
    few = recipe(tmp_path, critic=True, reference=False)
    many = replace(few, evaluation=replace(few.evaluation, prompts=500, samples=2))
    assert step_bytes(replace(few, evaluation=replace(few.evaluation, prompts=2))) == step_bytes(few)
    assert 1000 * one * 0.95 < step_bytes(many) < 1000 * one * 1.05


@pytest.mark.parametrize(
    ("needed", "memory", "shared", "store"),
    [
        (0, 64, 64, 4),  # as much as it always was
        (0, 8, 64, 2),
        (6, 64, 64, 6),
        (20, 64, 64, 16),
        (20, 640, 16, 8),
        (20, 640, 0, 4),
        (20, 12, 64, 3),
    ],
)
def test_a_store_is_as_large_as_the_step_within_a_share_of_what_is_free(
    needed: int, memory: int, shared: int, store: int
) -> None:
    assert object_store_bytes(needed * GIB, memory * GIB, shared * GIB) == store * GIB


def test_a_ray_that_a_run_starts_has_a_store_of_that_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(cluster.ray, "init", lambda **given: asked.update(given))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    monkeypatch.setattr(cluster, "free_shared_memory", lambda: 64 * GIB)
    monkeypatch.setattr(cluster, "get_authentication_mode", lambda: cluster.AuthenticationMode.TOKEN)
    Cluster(ClusterConfig(), gpus=0, run_dir=tmp_path, objects=6 * GIB)._join()
    assert asked["object_store_memory"] == 6 * GIB


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("10.0.0.1:6379", "export RAY_OBJECT_STORE_BYTES=6442450944 before ray_head.sh and ray_worker.sh, or lower"),
        (None, "have 24.0 GiB of memory and 12.0 GiB of /dev/shm free (--shm-size of a container), or lower"),
    ],
)
def test_a_step_that_a_node_has_no_store_for_is_told_when_the_run_starts(
    address: str | None,
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    nodes = [{"CPU": 8.0, "object_store_memory": size * GIB} for size in (6.0, 4.0)]
    for there in (nodes, nodes[:1]):
        caplog.clear()
        FakeRay(monkeypatch, there, where="a")
        with caplog.at_level(logging.WARNING):
            Cluster(ClusterConfig(address=address), gpus=0, run_dir=tmp_path, objects=6 * GIB).start(
                [Role(name="policy", workers=1)], {}
            )
        if there is nodes:
            assert "up to 6.0 GiB in Ray's object store, which has 4.0 GiB" in caplog.text
            assert advice in caplog.text
        else:
            assert caplog.text == ""


def disk_is_full() -> RayError:
    return OutOfDiskError("Local disk is full")


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (disk_is_full, r"(?s)Ray failed with OutOfDiskError: Local disk is full.*free some in .*\(RAY_TMPDIR names"),
        (ActorDiedError, r"Ray failed with ActorDiedError: The actor died unexpectedly.*"),
    ],
)
def test_what_ray_raises_ends_a_run_with_an_error_of_ours_and_its_notes(
    raised: Callable[[], RayError], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    joined = Cluster(ClusterConfig(address="10.0.0.1:6379"), gpus=0, run_dir=tmp_path)
    monkeypatch.setattr(joined, "_join", lambda: None)
    error = raised()
    error.add_note("at step 7, last phase update")
    with pytest.raises(ClusterProblem, match=told) as found, joined:
        raise error
    assert found.value.__notes__ == ["at step 7, last phase update"]
    assert found.value.__cause__ is error

    def fail() -> None:
        raise raised()

    monkeypatch.setattr(joined, "_join", fail)
    with pytest.raises(ClusterProblem, match=told), joined:
        pass


def test_other_errors_leave_a_cluster_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    joined = Cluster(ClusterConfig(address="10.0.0.1:6379"), gpus=0, run_dir=tmp_path)
    monkeypatch.setattr(joined, "_join", lambda: None)
    with pytest.raises(KeyError, match="ours"), joined:
        raise KeyError("ours")
