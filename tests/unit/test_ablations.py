"""The ablations break what they say they break, and nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from examples.arithmetic_cpu import ablations
from megatron_rl.batches import TokenOutputs
from megatron_rl.maths.losses import PolicyLoss
from megatron_rl.ppo import train
from tests.fakes import CopyingSync, as_micro_batch, fake_config, fake_run

ADVANTAGES = torch.tensor([[0.0, 0.0, 1.0, 2.0, 3.0], [0.0, 4.0, 5.0, 0.0, 0.0]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)


def test_advantages_move_by_one_token_inside_the_response() -> None:
    assert ablations.one_later(ADVANTAGES, MASK).tolist() == [[0, 0, 0, 1, 2], [0, 0, 4, 0, 0]]
    assert ablations.one_earlier(ADVANTAGES, MASK).tolist() == [[0, 0, 2, 3, 0], [0, 5, 0, 0, 0]]
    assert torch.equal(ablations.flipped(ADVANTAGES, MASK), -ADVANTAGES)


def test_a_changed_experience_reaches_every_minibatch_and_the_critic_keeps_the_right_one(tmp_path: Path) -> None:
    run = fake_run(fake_config(tmp_path, steps=1))
    seen = []
    inner = run.policy.update
    run.policy.update = lambda minibatch, loss: seen.append(minibatch.source) or inner(minibatch, loss)
    ours, theirs = [], run.critic.update
    run.critic.update = lambda minibatch, loss: ours.append(minibatch.source) or theirs(minibatch, loss)
    train(ablations.changed(ablations.flipped)(run))
    assert len(seen) == 4
    assert len({id(source) for source in seen}) == 1
    torch.testing.assert_close(seen[0].advantages, -ours[0].advantages)
    assert float(seen[0].advantages.abs().sum()) > 0


def test_a_misaligned_loss_reads_the_next_tokens_log_prob(tmp_path: Path) -> None:
    run = fake_run(fake_config(tmp_path, steps=1))
    caught = []
    inner = run.policy.update
    run.policy.update = lambda minibatch, loss: caught.append(as_micro_batch(minibatch)) or inner(minibatch, loss)
    train(run)
    batch = caught[0]
    loss = PolicyLoss(clip_low=0.2, clip_high=0.2)
    logprobs = torch.linspace(-2, -1, len(batch.targets))
    right = TokenOutputs(logprobs=torch.cat([logprobs[1:], logprobs[-1:]]), entropy=logprobs)
    got = ablations.MisalignedLoss(loss)(TokenOutputs(logprobs=logprobs, entropy=logprobs), batch)
    assert float(got.total) == float(loss(right, batch).total)


def test_shuffled_scores_are_the_same_scores(tmp_path: Path) -> None:
    run = fake_run(fake_config(tmp_path))
    run.weights.push(0)
    plain, shuffled = run.collect, ablations.ShuffledScores(run.collect, random.Random(0))
    before = [score.value for item in plain(16, 0) for score in item.scores]
    run.collect.prompts.restore({"taken": 0})
    after = [score.value for item in shuffled(16, 0) for score in item.scores]
    assert sorted(before) == sorted(after)
    assert before != after


def test_only_the_first_push_arrives(tmp_path: Path) -> None:
    run = fake_run(fake_config(tmp_path))
    sync = CopyingSync(run.policy, run.engine)
    first_only = ablations.FirstPushOnly(sync)
    for version in range(3):
        first_only.push(version)
    assert sync.versions == [0]


def test_samples_of_weights_that_were_never_pushed_are_learnt_from_where_that_is_not_checked(tmp_path: Path) -> None:
    run = fake_run(fake_config(tmp_path))
    train(ablations.ABLATIONS[ablations.UNCHECKED].change(run))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    gaps = [record["experience/engine_gap_mean"] for record in records if "rollout/score" in record]
    assert len(gaps) == 6
    assert gaps[0] < 1e-6
    assert gaps[-1] > 0.1
    assert run.weights.versions == [0]
