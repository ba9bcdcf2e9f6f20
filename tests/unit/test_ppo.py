"""The loop by itself, on fakes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from megatron_rl.batches import ExperienceBatch, Minibatch, RolloutBatch
from megatron_rl.config.schema import CheckpointConfig, EvaluationConfig, PPOConfig, RolloutConfig, due
from megatron_rl.dataflow import Finish, Outcome, Sample, Sampling, Score
from megatron_rl.experience.batching import NothingToLearn, StaleRollout
from megatron_rl.experience.collect import RewardRuleFails
from megatron_rl.interfaces import RewardScorer
from megatron_rl.parity import ParityFailed
from megatron_rl.ppo import Run, train
from megatron_rl.report import plot_curve, summarise
from tests.fakes import CopyingSync, Ready, StopAfter, fake_config, fake_run


def records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_score_rises_and_every_step_pushes_its_version(tmp_path: Path) -> None:
    run = fake_run(fake_config(tmp_path, steps=12))
    train(run)
    steps = [record for record in records(tmp_path) if "rollout/score" in record]
    assert steps[0]["rollout/accuracy"] < 0.4
    assert steps[-1]["rollout/accuracy"] > 0.9
    assert run.weights.versions == list(range(13))
    assert [step["rollout/policy_version"] for step in steps] == list(range(12))


def test_critic_warm_up_leaves_the_policy_alone(tmp_path: Path) -> None:
    config = fake_config(tmp_path, steps=3, ppo=PPOConfig(minibatch_samples=16, critic_warmup_steps=2))
    run = fake_run(config)
    train(run)
    assert run.critic.updates == 3 * 4
    assert run.policy.updates == 1 * 4


def test_the_coefficient_of_the_kl_is_told_as_it_was_used_and_moves_after_each_step(tmp_path: Path) -> None:
    ppo = PPOConfig(minibatch_samples=16, kl_coef=0.5, kl_target=1e6, kl_horizon=320)
    run = fake_run(fake_config(tmp_path, steps=3, ppo=ppo))
    train(run)
    told = [record["experience/kl_coef"] for record in records(tmp_path) if "rollout/score" in record]
    # far below the target: 1 - 0.2 * 64 samples / 320
    assert told == pytest.approx([0.5, 0.5 * 0.96, 0.5 * 0.96**2])
    assert run.kl_control.coef == pytest.approx(0.5 * 0.96**3)


def test_the_coefficient_of_the_kl_waits_for_the_policy(tmp_path: Path) -> None:
    """While the critic warms up the KL is 0, which says nothing of the coefficient."""
    ppo = PPOConfig(minibatch_samples=16, kl_coef=0.5, kl_target=1e6, kl_horizon=320, critic_warmup_steps=2)
    run = fake_run(fake_config(tmp_path, steps=4, ppo=ppo))
    train(run)
    told = [record["experience/kl_coef"] for record in records(tmp_path) if "rollout/score" in record]
    assert told == pytest.approx([0.5, 0.5, 0.5, 0.5 * 0.96])


@dataclasses.dataclass
class FailsOn:
    """Scores as another scorer does, but for so many of the first samples of a call of ``size`` samples."""

    scorer: RewardScorer
    size: int
    errors: int

    def score(self, requests: Sequence[tuple[str, str, Finish]]) -> list[Score]:
        scores = self.scorer.score(requests)
        failed = [Score(value=0.0, outcome=Outcome.ERROR, reason="no number")] * self.errors
        return [*failed, *scores[self.errors :]] if len(scores) == self.size else scores


def test_an_evaluation_of_which_the_rule_fails_on_too_much_ends_the_run(tmp_path: Path) -> None:
    run = fake_run(fake_config(tmp_path, steps=1))
    size = len(run.heldout)
    quarter = dataclasses.replace(run, rewards=FailsOn(run.rewards, size, size // 4))
    train(quarter)
    assert records(tmp_path)[0]["heldout/errors"] == size // 4
    more = fake_run(fake_config(tmp_path / "more", steps=1))
    more = dataclasses.replace(more, rewards=FailsOn(more.rewards, size, size // 4 + 1))
    with pytest.raises(RewardRuleFails, match=rf"{size // 4 + 1} of {size} samples .*max_error_rate=0\.25 .*no number"):
        train(more)
    assert records(tmp_path / "more")[-1]["heldout/errors"] == size // 4 + 1


@pytest.mark.parametrize(("trainer_temperature", "told"), [(None, True), (1.0, True), (0.5, False)])
def test_a_gap_to_the_engine_is_told_where_both_take_log_probs_at_one_temperature(
    tmp_path: Path, trainer_temperature: float | None, told: bool
) -> None:
    rollout = RolloutConfig(samples_per_prompt=4, max_response_tokens=4, trainer_temperature=trainer_temperature)
    train(fake_run(fake_config(tmp_path, steps=1, rollout=rollout)))
    (step,) = [record for record in records(tmp_path) if "rollout/score" in record]
    gaps = {f"experience/engine_gap_{kind}" for kind in ("mean", "max", "k3")}
    assert gaps & step.keys() == (gaps if told else set())


def cut_at(tokens: range, run: Run) -> Run:
    """The run with an engine whose limit cuts responses of these tokens."""
    sample = run.engine._sample

    def sampled(sampling: Sampling, seed: int) -> Sample:
        drawn = sample(sampling, seed)
        return dataclasses.replace(drawn, finish=Finish.LENGTH if drawn.token_ids[0] in tokens else Finish.STOP)

    run.engine._sample = sampled  # type: ignore[method-assign]
    return run


def test_truncated_samples_teach_neither_policy_nor_critic_and_are_told(tmp_path: Path) -> None:
    ppo = PPOConfig(minibatch_samples=64, mask_truncated=True)
    run = cut_at(range(4), fake_run(fake_config(tmp_path, steps=1, ppo=ppo)))
    seen: dict[str, Tensor] = {}

    def watched(name: str, update: Callable[..., Ready]) -> Callable[..., Ready]:
        def updated(minibatch: Minibatch[ExperienceBatch], loss: object) -> Ready:
            batch, rows = minibatch.source.rollouts, minibatch.rows
            seen[name] = batch.tokens[rows][batch.response_mask[rows]]
            return update(minibatch, loss)

        return updated

    run.policy.update = watched("policy", run.policy.update)
    run.critic.update = watched("critic", run.critic.update)
    train(run)
    (step,) = [record for record in records(tmp_path) if "rollout/score" in record]
    assert seen.keys() == {"policy", "critic"}
    for tokens in seen.values():
        assert int(tokens.min()) == 4
        assert len(tokens) == 64 * (1 - step["rollout/truncation_rate"]) < 50
    assert step["experience/masked_samples"] == step["rollout/truncation_rate"]


def test_a_step_of_which_every_sample_is_cut_ends_the_run_before_an_update(tmp_path: Path) -> None:
    ppo = PPOConfig(minibatch_samples=16, mask_truncated=True)
    run = cut_at(range(8), fake_run(fake_config(tmp_path, steps=2, ppo=ppo)))
    with pytest.raises(NothingToLearn, match="all 64 of this one are cut") as caught:
        train(run)
    assert caught.value.__notes__ == ["at step 0, last phase update"]
    assert run.policy.updates == run.critic.updates == 0
    assert records(tmp_path)[-1]["experience/masked_samples"] == 1


@pytest.mark.parametrize(
    "ppo",
    [
        PPOConfig(minibatch_samples=16, lam=0.9, critic_lam=1.0),
        PPOConfig(minibatch_samples=16, advantage="grpo", loss_mean="sequence"),
        PPOConfig(minibatch_samples=16, advantage="dr_grpo", loss_mean="constant"),
        PPOConfig(minibatch_samples=16, advantage="rloo"),
        PPOConfig(minibatch_samples=16, advantage="reinforce_pp"),
        PPOConfig(minibatch_samples=16, advantage="reinforce_pp_baseline", kl_in="loss", kl_kind="k2"),
        PPOConfig(minibatch_samples=16, advantage="grpo", loss="gspo", loss_mean="sequence"),
        PPOConfig(minibatch_samples=16, advantage="rloo", loss="cispo", engine_correction="tis"),
    ],
    ids=lambda ppo: f"{ppo.advantage} {ppo.loss}",
)
def test_every_algorithm_learns_on_the_same_loop(tmp_path: Path, ppo: PPOConfig) -> None:
    assert list(ppo.problems()) == []
    run = fake_run(fake_config(tmp_path, steps=12, ppo=ppo))
    train(run)
    steps = [record for record in records(tmp_path) if "rollout/score" in record]
    assert steps[0]["rollout/accuracy"] < 0.4
    assert steps[-1]["rollout/accuracy"] > 0.9
    with_critic = {key for step in steps for key in step if key.startswith(("critic", "experience/value"))}
    assert bool(with_critic) == ppo.has_critic
    for family in ("return", "position"):
        tokens = {
            key: value for key, value in steps[-1].items() if re.match(f"critic_calibration/{family}.*/tokens", key)
        }
        assert sum(tokens.values()) == steps[-1]["rollout/response_tokens"] * ppo.has_critic
    assert ("policy/engine_weight" in steps[0]) == (ppo.engine_correction is not None)


def test_a_push_that_does_not_arrive_stops_the_run_and_names_both_versions(tmp_path: Path) -> None:
    run = fake_run(fake_config(tmp_path))
    stuck = CopyingSync(run.policy, run.engine, dead=True)
    with pytest.raises(StaleRollout, match=r"version 1, .* used version 0"):
        train(dataclasses.replace(run, weights=stuck))
    assert run.policy.updates == 4


def test_the_gate_is_passed_after_the_first_push_and_before_the_first_step(tmp_path: Path) -> None:
    run = fake_run(fake_config(tmp_path, steps=2))
    passed = []

    def gate() -> dict[str, float]:
        passed.append((list(run.weights.versions), run.policy.updates))
        return {"policy_against_other/mean": 0.125}

    train(dataclasses.replace(run, gate=gate))
    assert passed == [([0], 0)]
    assert records(tmp_path)[0]["parity/policy_against_other/mean"] == 0.125


def test_a_gate_that_is_not_passed_ends_the_run_before_anything_is_learned(tmp_path: Path) -> None:
    run = fake_run(fake_config(tmp_path))

    def gate() -> dict[str, float]:
        raise ParityFailed("1 comparison failed", "the table", "they differ")

    with pytest.raises(ParityFailed, match="they differ") as caught:
        train(dataclasses.replace(run, gate=gate))
    assert caught.value.__notes__ == ["at step 0, last phase parity"]
    assert run.policy.updates == run.critic.updates == 0


def test_checkpoints_and_evaluations_are_made_when_due(tmp_path: Path) -> None:
    config = fake_config(
        tmp_path, steps=7, checkpoint=CheckpointConfig(every=3), evaluation=EvaluationConfig(every=3, prompts=4)
    )
    run = fake_run(config)
    train(run)
    assert run.checkpoints.steps == [3, 6, 7]
    assert run.checkpoints.awaited == [7], "training goes on while all but the last are written"
    evaluated = [
        record["step"] + (record["kind"] == "step") for record in records(tmp_path) if "heldout/accuracy" in record
    ]
    assert evaluated == [0, 3, 6, 7]


@pytest.mark.parametrize(("parts", "accuracy"), [({"correct": 0.25}, 0.25), ({}, None)])
def test_a_checkpoint_is_told_the_accuracy_of_what_it_saves(
    parts: dict[str, float], accuracy: float | None, tmp_path: Path
) -> None:
    evaluation = EvaluationConfig(every=3, prompts=4)
    run = fake_run(fake_config(tmp_path, steps=7, checkpoint=CheckpointConfig(every=2), evaluation=evaluation))
    rewards: Any = SimpleNamespace(score=lambda requests: [Score(value=0.5, parts=parts) for _ in requests])
    train(dataclasses.replace(run, rewards=rewards))
    assert run.checkpoints.steps == [2, 4, 6, 7]
    assert run.checkpoints.accuracies == [None, None, accuracy, accuracy]


def test_the_evaluation_at_the_start_can_be_left_out(tmp_path: Path) -> None:
    run = fake_run(fake_config(tmp_path, steps=4, evaluation=EvaluationConfig(every=2, at_start=False)), start_step=1)
    train(run)
    assert [record["step"] + 1 for record in records(tmp_path) if "heldout/accuracy" in record] == [2, 4]
    assert records(tmp_path)[0]["kind"] == "evaluation", "the gate's figures are still told"


def test_an_evaluation_draws_as_many_samples_as_asked_with_the_same_seeds_each_time(tmp_path: Path) -> None:
    run = fake_run(fake_config(tmp_path, steps=1, evaluation=EvaluationConfig(samples=3, temperature=0.5)))
    generate, asked = run.engine.generate, []

    def watched(prompts, sampling, seeds):  # type: ignore[no-untyped-def]
        asked.append((sampling.temperature, seeds))
        return generate(prompts, sampling, seeds)

    run.engine.generate = watched  # type: ignore[method-assign]
    train(run)
    (before, first), (_, rollout), (after, last) = asked
    assert before == after == 0.5
    assert first == last
    assert len({seed for own in (*first, *rollout) for seed in own}) == 3 * len(run.heldout) + 64
    evaluated = records(tmp_path)[0]
    assert evaluated["heldout/samples"] == 3 * len(run.heldout)
    assert evaluated["heldout/temperature"] == 0.5
    by_all, by_any = evaluated["heldout/solved_by_all"], evaluated["heldout/solved_by_any"]
    assert 0 <= by_all <= evaluated["heldout/accuracy"] <= by_any <= 1


def test_a_run_that_is_asked_to_stop_saves_the_step_in_progress_and_begins_none(tmp_path: Path) -> None:
    run = dataclasses.replace(fake_run(fake_config(tmp_path, steps=6)), stop=StopAfter(2))
    assert train(run) == 2
    assert run.weights.versions == [0, 1, 2]
    assert (run.checkpoints.steps, run.checkpoints.awaited) == ([2], [2])
    assert records(tmp_path)[-1]["checkpoint/pause_s"] == 0.25


def test_a_run_that_is_asked_to_stop_before_its_first_step_begins_none(tmp_path: Path) -> None:
    run = dataclasses.replace(fake_run(fake_config(tmp_path, steps=6)), stop=StopAfter(0))
    assert train(run) == 0
    assert run.weights.versions == [0]
    assert run.checkpoints.steps == []
    summary = summarise(tmp_path / "metrics.jsonl")
    plot_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert summary["steps"] == 0


def test_a_resumed_run_goes_on_at_its_step(tmp_path: Path) -> None:
    run = fake_run(fake_config(tmp_path, steps=6), start_step=4)
    assert train(run) == 6
    assert run.weights.versions == [4, 5, 6]


def test_steps_that_were_done_stay_done_where_fewer_are_asked_for(tmp_path: Path) -> None:
    assert train(fake_run(fake_config(tmp_path, steps=4), start_step=6)) == 6


def test_old_logprobs_are_the_trainers_not_the_engines(tmp_path: Path) -> None:
    """Were they the engine's, a wrong engine would move the ratio away from 1 on the first minibatch."""
    run = fake_run(fake_config(tmp_path, steps=1, ppo=PPOConfig(minibatch_samples=64)))
    seen = []

    class Spy:
        def logprobs(self, batch: RolloutBatch) -> Ready:
            return run.policy.logprobs(batch)

        def update(self, minibatch, loss):  # type: ignore[no-untyped-def]
            seen.append(minibatch.source)
            return run.policy.update(minibatch, loss)

    run.engine.logits = run.policy.logits.detach() + 1.0
    run.engine.logits[0] += 3.0
    lying = dataclasses.replace(run, policy=Spy(), weights=dataclasses.replace(run.weights))
    lying.weights.push = lambda version: setattr(run.engine, "version", version) or {}  # type: ignore[method-assign]
    train(lying)
    (experience,) = seen
    expected = run.policy.logprobs(experience.rollouts)
    assert experience.old_logprobs.shape == expected.result().shape
    assert float((experience.old_logprobs - experience.rollouts.rollout_logprobs).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("step", "every", "steps", "expected"),
    [(0, 0, 3, False), (2, 0, 3, True), (1, 2, 9, True), (2, 2, 9, False), (8, 2, 9, True)],
)
def test_due(step: int, every: int, steps: int, expected: bool) -> None:
    assert due(step, every, steps) is expected
