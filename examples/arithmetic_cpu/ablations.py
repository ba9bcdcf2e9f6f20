"""Break PPO on purpose, one way at a time, and print what the curve makes of it.

``python examples/arithmetic_cpu/ablations.py [NAME...]`` after ``make quickstart`` (it needs the warmed-up base); about
half a minute each. A run whose advantages have the wrong sign or stand one token off must not learn; a run whose
weights never reach the engine must stop; a critic that never learns must show in its explained variance.

Advantages that stand one token off still teach every token but the first, or but the last; what they cannot teach is
the choice that the first token makes, between reasoning and answering at once. A critic that knows what each choice is
worth leaves no other trace of it, so those runs, and a control, take larger rollouts, warm up the critic for longer and
stop after three steps of the policy: given time, a policy that reasons better makes the critic lag behind, and the
choice is learnt from that. The run that learns from samples of weights it has left behind stops early as well: it gets
better before it falls apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_rl.assemble import open_engine, open_run
from megatron_rl.batches import ExperienceBatch, LossTerms, MicroBatch, Minibatch, TokenOutputs
from megatron_rl.config.load import load
from megatron_rl.config.schema import RunConfig
from megatron_rl.dataflow import ScoredRollout
from megatron_rl.experience.batching import StaleRollout
from megatron_rl.experience.collect import rollout_metrics, score_rollouts
from megatron_rl.interfaces import Collect, Pending, PolicyModel, TokenLoss, UpdateResult, WeightSync
from megatron_rl.maths.masking import whiten
from megatron_rl.ppo import Run, heldout_sampling, train
from megatron_rl.report import summarise

PPO = Path(__file__).with_name("ppo.toml")
FOLDER = Path("runs/ablations")
UNCHECKED = "few steps, no push, unchecked"
FEW_STEPS = (
    "prompts_per_step=256",
    "ppo.minibatch_samples=256",
    "ppo.critic_warmup_steps=16",
    "ppo.value_clip=inf",
    "steps=19",
)

Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(advantages [B, T], response mask [B, T]) -> advantages."""


@dataclass
class ChangedExperience:
    """A policy that learns from other advantages than it is given, changed before they are whitened."""

    policy: PolicyModel
    change: Change
    _last: tuple[ExperienceBatch, ExperienceBatch] | None = field(default=None, init=False)

    def logprobs(self, batch: Any) -> Pending[torch.Tensor]:
        return self.policy.logprobs(batch)

    def update(self, minibatch: Minibatch[ExperienceBatch], loss: TokenLoss) -> Pending[UpdateResult]:
        source = minibatch.source
        if self._last is None or self._last[0] is not source:
            mask = source.rollouts.response_mask
            advantages = whiten(self.change(source.returns - source.values, mask), mask)
            self._last = (source, dataclasses.replace(source, advantages=advantages))
        return self.policy.update(dataclasses.replace(minibatch, source=self._last[1]), loss)


@dataclass(frozen=True)
class MisalignedLoss:
    """A loss that reads the log-prob of the next token in place of each token's own."""

    loss: TokenLoss

    def __call__(self, outputs: TokenOutputs, batch: MicroBatch) -> LossTerms:
        logprobs = torch.cat([outputs.logprobs[1:], outputs.logprobs[-1:]])
        return self.loss(dataclasses.replace(outputs, logprobs=logprobs), batch)


@dataclass(frozen=True)
class ShuffledScores:
    """Scores handed out to the wrong samples."""

    collect: Collect
    rng: random.Random

    def __call__(self, prompts: int, step: int) -> list[ScoredRollout]:
        scored = self.collect(prompts, step)
        scores = [score for item in scored for score in item.scores]
        self.rng.shuffle(scores)
        left = iter(scores)
        return [dataclasses.replace(item, scores=tuple(next(left) for _ in item.scores)) for item in scored]


@dataclass
class FirstPushOnly:
    """Weights that reach the engine once and never again."""

    weights: WeightSync
    pushed: bool = False

    def push(self, version: int) -> Mapping[str, float]:
        if self.pushed:
            return {}
        self.pushed = True
        return self.weights.push(version)


@dataclass(frozen=True)
class ClaimedVersion:
    """Samples that are said to be drawn by the trainer's weights, whichever drew them."""

    collect: Collect

    def __call__(self, prompts: int, step: int) -> list[ScoredRollout]:
        return [
            dataclasses.replace(item, rollout=dataclasses.replace(item.rollout, policy_version=step))
            for item in self.collect(prompts, step)
        ]


def unchecked(run: Run) -> Run:
    return dataclasses.replace(run, weights=FirstPushOnly(run.weights), collect=ClaimedVersion(run.collect))


def flipped(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return -advantages


def one_later(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return advantages.roll(1, dims=1) * mask


def one_earlier(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return advantages.roll(-1, dims=1) * mask


@dataclass(frozen=True)
class Ablation:
    """One way to break the run."""

    expected: str
    change: Callable[[Run], Run] = lambda run: run
    overrides: tuple[str, ...] = ()


def changed(change: Change) -> Callable[[Run], Run]:
    return lambda run: dataclasses.replace(run, policy=ChangedExperience(run.policy, change))


ABLATIONS = {
    "none": Ablation("after >= 0.85"),
    "advantages flipped": Ablation("after < 0.45", changed(flipped)),
    "few steps": Ablation("after >= 0.85", overrides=FEW_STEPS),
    "few steps, advantages one token later": Ablation("after < 0.45", changed(one_later), FEW_STEPS),
    "few steps, advantages one token earlier": Ablation("after < 0.45", changed(one_earlier), FEW_STEPS),
    "log-probs misaligned": Ablation(
        "after < 0.45", lambda run: dataclasses.replace(run, policy_loss=MisalignedLoss(run.policy_loss))
    ),
    "rewards shuffled": Ablation(
        "after < 0.45",
        lambda run: dataclasses.replace(run, collect=ShuffledScores(run.collect, random.Random(run.config.seed))),
    ),
    "no push": Ablation(
        "stops at the first stale sample", lambda run: dataclasses.replace(run, weights=FirstPushOnly(run.weights))
    ),
    UNCHECKED: Ablation(
        "rollouts stay within 0.10 of the base, checkpoint > 0.60, gap grows",
        unchecked,
        FEW_STEPS,
    ),
    "critic learning rate 0": Ablation("explained variance stays 0", overrides=("critic.optimizer.lr=0.0",)),
}


class Unhurried:
    """Nobody asks an ablation to stop."""

    asked = False


def run_ablation(name: str, ablation: Ablation, seed: int) -> dict[str, Any]:
    """Run it whole; what the summary, the metrics and a fresh engine on the final checkpoint say."""
    folder = FOLDER / name.replace(" ", "_").replace(",", "")
    shutil.rmtree(folder, ignore_errors=True)
    config = load(RunConfig, [PPO], [f"run_dir={folder}", f"seed={seed}", *ablation.overrides])
    row: dict[str, Any] = {"ablation": name, "expected": ablation.expected}
    try:
        with open_run(config, Unhurried()) as run:
            train(ablation.change(run))
    except StaleRollout as error:
        return row | {"stopped": str(error)}
    summary = summarise(folder / "metrics.jsonl")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "rollout/accuracy" in step]
    row |= {
        "before": summary["accuracy_before"],
        "after": summary["accuracy_after"],
        "rollouts_first": steps[0]["rollout/accuracy"],
        "rollouts_last": steps[-1]["rollout/accuracy"],
        "gap_last": steps[-1]["experience/engine_gap_mean"],
        "explained_variance": max(abs(step["experience/explained_variance"]) for step in steps),
    }
    if name == UNCHECKED:
        row["checkpoint"] = checkpoint_accuracy(config)
    return row


def checkpoint_accuracy(config: RunConfig) -> float:
    """Held-out greedy accuracy of the newest checkpoint in an engine that has seen no other weights."""
    newest = sorted((config.run_dir / "checkpoints").glob("step_*"))[-1] / "hf"
    with open_engine(config, newest) as (engine, rewards, heldout):
        rollouts = engine.generate(heldout, heldout_sampling(config), [(0,)] * len(heldout))
        return rollout_metrics(score_rollouts(rollouts, rewards))["accuracy"]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table."""
    columns = ["ablation", "before", "after", "rollouts_first", "rollouts_last", "checkpoint"]
    columns += ["gap_last", "explained_variance", "expected"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        if "stopped" in row:
            cells[2] = f"stopped: {row['stopped']}"
        lines.append("| " + " | ".join(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Break PPO on purpose and print what the curve makes of it.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {list(ABLATIONS)}; all by default")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in ABLATIONS]
    if unknown:
        parser.error(f"unknown ablations {unknown}; known: {list(ABLATIONS)}")
    rows = []
    for chosen in arguments.names or list(ABLATIONS):
        rows.append(run_ablation(chosen, ABLATIONS[chosen], arguments.seed))
        print(table(rows), flush=True)
    (FOLDER / "table.md").write_text(table(rows))
