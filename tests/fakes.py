"""Stand-ins to test the loop by itself: a policy that is one row of logits, and an engine that samples from its copy.

Nothing of Megatron, vLLM or Ray; the mathematics is the real one.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.batches import (
    ExperienceBatch,
    LossTerms,
    MicroBatch,
    Minibatch,
    TokenOutputs,
    TokenRows,
    ValueOutputs,
)
from megatron_rl.config.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    RolloutConfig,
    RunConfig,
    SFTConfig,
    TrainerConfig,
)
from megatron_rl.dataflow import Finish, Prompt, Rollout, Sample, Sampling, Score
from megatron_rl.durable import FileRecord, write_file
from megatron_rl.experience.algorithm import advantage_estimator, loss_mean, policy_loss
from megatron_rl.experience.collect import FreshRollouts
from megatron_rl.experience.prompts import PromptStream
from megatron_rl.interfaces import UpdateResult
from megatron_rl.maths.kl import KlControl
from megatron_rl.maths.losses import ValueLoss
from megatron_rl.metrics import MetricLog
from megatron_rl.phases import OwnDevices
from megatron_rl.ppo import Run

VOCABULARY = 8
RIGHT = 5


@dataclass(frozen=True)
class Ready:
    """Work that was done when it was asked for."""

    value: Any

    def result(self) -> Any:
        return self.value


def as_micro_batch(minibatch: Minibatch[ExperienceBatch]) -> MicroBatch:
    """The minibatch's rows, packed by plain indexing: every response token, nothing else."""
    source, rows = minibatch.source, minibatch.rows
    batch = source.rollouts
    mask = batch.response_mask[rows]
    named = {
        name: getattr(source, name) for name in ("old_logprobs", "ref_logprobs", "values", "advantages", "returns")
    }
    picked = {name: None if values is None else values[rows][mask] for name, values in named.items()}
    tokens = batch.tokens[rows][mask]
    return MicroBatch(
        inputs=tokens,
        targets=tokens,
        positions=torch.arange(len(tokens)),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]).to(torch.int32),
        max_length=int(mask.sum(1).max()),
        loss_mask=torch.ones(len(tokens), dtype=torch.bool),
        loss_weight=minibatch.loss_weight[mask],
        sampled_mask=batch.sampled_mask[rows][mask],
        rollout_logprobs=batch.rollout_logprobs[rows][mask],
        **picked,
    )


def _step(terms: LossTerms, batch: MicroBatch, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Ready:
    optimizer.zero_grad()
    (terms.total / len(batch.targets)).backward()
    norm = float(parameter.grad.norm()) if parameter.grad is not None else 0.0
    optimizer.step()
    metrics = {name: float(value) / len(batch.targets) for name, value in terms.metrics.items()}
    return Ready(UpdateResult(metrics=metrics, grad_norm=norm, learning_rate=optimizer.param_groups[0]["lr"]))


class BanditPolicy:
    """The same distribution over tokens at every place."""

    def __init__(self, lr: float = 0.2) -> None:
        self.logits = torch.zeros(VOCABULARY, requires_grad=True)
        self._optimizer = torch.optim.Adam([self.logits], lr=lr)
        self.updates = 0

    def logprobs(self, batch: TokenRows) -> Ready:
        with torch.no_grad():
            return Ready(torch.where(batch.response_mask, self.logits.log_softmax(0)[batch.tokens], 0.0))

    def update(self, minibatch: Minibatch[ExperienceBatch], loss: Any) -> Ready:
        self.updates += 1
        batch = as_micro_batch(minibatch)
        logprobs = self.logits.log_softmax(0)
        entropy = -(logprobs.exp() * logprobs).sum().expand(len(batch.targets))
        outputs = TokenOutputs(logprobs=logprobs[batch.targets], entropy=entropy)
        return _step(loss(outputs, batch), batch, self.logits, self._optimizer)


class FrozenPolicy:
    """A reference."""

    def __init__(self, policy: BanditPolicy) -> None:
        self._frozen = BanditPolicy()
        self._frozen.logits = policy.logits.detach().clone()

    def logprobs(self, batch: TokenRows) -> Ready:
        return self._frozen.logprobs(batch)


class ConstantCritic:
    """One value for every state."""

    def __init__(self, lr: float = 0.1) -> None:
        self.value = torch.zeros((), requires_grad=True)
        self._optimizer = torch.optim.Adam([self.value], lr=lr)
        self.updates = 0

    def values(self, batch: TokenRows) -> Ready:
        return Ready(batch.response_mask * self.value.detach())

    def update(self, minibatch: Minibatch[ExperienceBatch], loss: Any) -> Ready:
        self.updates += 1
        batch = as_micro_batch(minibatch)
        outputs = ValueOutputs(values=self.value.expand(len(batch.targets)))
        return _step(loss(outputs, batch), batch, self.value, self._optimizer)


class BanditEngine:
    """Samples one token per seed from its own copy of the logits."""

    def __init__(self) -> None:
        self.logits = torch.zeros(VOCABULARY)
        self.version = -1

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        return [
            Rollout(
                prompt=prompt,
                samples=tuple(self._sample(sampling, seed) for seed in prompt_seeds),
                policy_version=self.version,
            )
            for prompt, prompt_seeds in zip(prompts, seeds, strict=True)
        ]

    def _sample(self, sampling: Sampling, seed: int) -> Sample:
        logprobs = self.logits.log_softmax(0)
        generator = torch.Generator().manual_seed(seed)
        greedy = sampling.temperature == 0
        token = int(logprobs.argmax() if greedy else torch.multinomial(logprobs.exp(), 1, generator=generator))
        return Sample(token_ids=(token,), logprobs=(float(logprobs[token]),), text=str(token), finish=Finish.STOP)


@dataclass
class CopyingSync:
    """Hands the policy's logits to the engine; ``dead=True`` forgets to, after the first time."""

    policy: BanditPolicy
    engine: BanditEngine
    dead: bool = False
    versions: list[int] = field(default_factory=list)

    def push(self, version: int) -> Mapping[str, float]:
        if not (self.dead and self.versions):
            self.engine.logits = self.policy.logits.detach().clone()
            self.engine.version = version
        self.versions.append(version)
        return {"bytes": 4.0 * VOCABULARY}


class ExactScorer:
    """+1 for the answer, -1 otherwise."""

    def score(self, requests: Sequence[tuple[str, str, Finish]]) -> list[Score]:
        return [
            Score(value=1.0 if text == answer else -1.0, parts={"correct": float(text == answer), "boxed": 1.0})
            for text, answer, _ in requests
        ]


@dataclass
class RecordingCheckpoints:
    """Remembers which steps were saved."""

    steps: list[int] = field(default_factory=list)
    awaited: list[int] = field(default_factory=list)
    accuracies: list[float | None] = field(default_factory=list)

    def save(self, step: int, accuracy: float | None = None, *, wait: bool) -> dict[str, float]:
        self.steps.append(step)
        self.accuracies.append(accuracy)
        if wait:
            self.awaited.append(step)
        return {"pause_s": 0.25}


@dataclass
class StopAfter:
    """Asks to stop from the given question on (one is asked before the first step, and one in each)."""

    questions: int
    asked_so_far: int = 0

    @property
    def asked(self) -> bool:
        self.asked_so_far += 1
        return self.asked_so_far > self.questions


@dataclass
class FileModel:
    """A model that is one number, saved as text; ``gate`` holds the writing up, ``error`` lets it fail, ``blind`` ranks
    have another folder.
    """

    value: int = 0
    error: Exception | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    blind: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()

    def blind_ranks(self, file: Path) -> Ready:
        assert file.is_file()
        return Ready(self.blind)

    def save(self, folder: Path) -> Ready:
        folder.mkdir()
        self._staged = folder / "weights.txt", str(self.value).encode() * 100
        return Ready(None)

    def written(self) -> FileModel:
        return self

    def ready(self, within_s: float) -> bool:
        return self.gate.wait(within_s)

    def result(self) -> dict[str, FileRecord]:
        path, content = self._staged
        if self.error is not None:
            path.write_bytes(content[:10])
            raise self.error
        return {path.name: write_file(path, content)}

    def load(self, folder: Path) -> Ready:
        text = (folder / "weights.txt").read_text()
        self.value = int(text[: len(text) // 100])
        return Ready(None)

    def export_hf(self, folder: Path, like: Path) -> Ready:
        folder.mkdir()
        (folder / "model.safetensors").write_text(str(self.value))
        return Ready(None)


def fake_supervised(run_dir: Path, **changes: Any) -> SFTConfig:
    """A supervised stage's configuration; paths are never opened."""
    config = SFTConfig(
        run_dir=run_dir,
        output=run_dir / "model",
        model=ModelConfig(path=Path("nowhere"), dtype="float32"),
        data=Path("nowhere"),
        steps=6,
        samples_per_step=4,
        trainer=TrainerConfig(optimizer=OptimizerConfig(lr=1e-3)),
    )
    return dataclasses.replace(config, **changes)


def fake_config(run_dir: Path, **changes: Any) -> RunConfig:
    """A configuration for the fakes; paths are never opened."""
    trainer = TrainerConfig(optimizer=OptimizerConfig(lr=1e-3))
    config = RunConfig(
        run_dir=run_dir,
        steps=6,
        prompts_per_step=16,
        model=ModelConfig(path=Path("none"), dtype="float32"),
        data=DataConfig(train=Path("none"), heldout=Path("none")),
        policy=trainer,
        critic=trainer,
        rollout=RolloutConfig(samples_per_prompt=4, max_response_tokens=4),
        ppo=PPOConfig(minibatch_samples=16, kl_coef=0.01),
    )
    return dataclasses.replace(config, **changes)


def fake_run(config: RunConfig, *, start_step: int = 0) -> Run:
    """A whole run on fakes."""
    prompts = tuple(Prompt(id=str(i), token_ids=(1, 2), answer=str(RIGHT), source="fake") for i in range(40))
    policy, engine, scorer = BanditPolicy(), BanditEngine(), ExactScorer()
    return Run(
        config=config,
        start_step=start_step,
        collect=FreshRollouts(
            prompts=PromptStream(prompts, config.seed),
            engine=engine,
            rewards=scorer,
            config=config.rollout,
            seed=config.seed,
            max_error_rate=config.reward.max_error_rate,
        ),
        engine=engine,
        rewards=scorer,
        policy=policy,
        reference=FrozenPolicy(policy),
        critic=ConstantCritic() if config.ppo.has_critic else None,
        advantage=advantage_estimator(config.ppo),
        policy_loss=policy_loss(config.ppo),
        value_loss=ValueLoss(clip=0.2),
        loss_mean=loss_mean(config),
        kl_control=KlControl(config.ppo.kl_coef, target=config.ppo.kl_target, horizon=config.ppo.kl_horizon),
        weights=CopyingSync(policy, engine),
        gate=None,
        checkpoints=RecordingCheckpoints(),
        stop=StopAfter(1 + config.steps),
        heldout=prompts[:4],
        forced_eos=(),
        phases=OwnDevices(),
        metrics=MetricLog(config.run_dir, total_steps=config.steps, start_step=start_step),
    )
