"""What the loop asks of its parts. The parts know nothing of each other; ``assemble`` brings them together.

Verbs of a model return a :class:`Pending` at once, so that policy and critic work side by side on their own devices;
:func:`results` collects them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol, TypeVar

from megatron_rl.dataflow import Finish, Prompt, Rollout, Sampling, Score, ScoredRollout

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_rl.batches import (
        ExperienceBatch,
        LossTerms,
        MicroBatch,
        Minibatch,
        PackedTokens,
        TokenOutputs,
        TokenRows,
        ValueOutputs,
    )

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")
K = TypeVar("K")


class Pending(Protocol[T_co]):
    """Work under way."""

    def result(self) -> T_co:
        """Wait for it.

        Raises:
            Exception: what the work raised, or why its worker is gone, or that the deadline passed and for whom.
        """


def results(pending: Mapping[K, Pending[T]]) -> dict[K, T]:
    """Wait for all of ``pending``."""
    return {key: handle.result() for key, handle in pending.items()}


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """What one optimizer step did.

    Attributes:
        metrics: means over the loss tokens of the whole step.
        grad_norm: global L2 norm before clipping.
        learning_rate: the one used.
    """

    metrics: Mapping[str, float]
    grad_norm: float
    learning_rate: float

    def as_metrics(self) -> dict[str, float]:
        """All of it under metric names."""
        return {**self.metrics, "grad_norm": self.grad_norm, "learning_rate": self.learning_rate}


@dataclass(frozen=True, kw_only=True)
class PushReceipt:
    """What one side of a weight push saw of what one worker of each engine was sent: equal on both sides, or the push
    failed.

    Attributes:
        version: of the weights.
        tensors: how many were moved.
        slices: of how many of them the part alone that the worker keeps.
        size_bytes: of what was moved.
        tensor_bytes: of the tensors, whole.
        digest: two of xxh3-128, over names, types, shapes, parts and bytes, in order, before anything was loaded: of
            what all workers were sent, and of what this one was.
    """

    version: int
    tensors: int
    slices: int
    size_bytes: int
    tensor_bytes: int
    digest: str


class TrainerPart(Enum):
    """What of a trained model takes device memory and may leave it."""

    WEIGHTS = "weights"
    STATE = "state"
    """Gradients, optimizer states and the frozen reference."""


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Of a worker, or of the one with the most.

    Attributes:
        planned_bytes: what it keeps on the device on purpose.
        measured_bytes: see :func:`megatron_rl.device.memory_used`.
    """

    planned_bytes: int
    measured_bytes: int


class PushPhase(Enum):
    """What an engine goes through in a push, in this order. From the first until the last it is stale: it generates
    nothing. So it stays where a phase fails, or is left out, until a push comes to its end.
    """

    DRAIN = "drain"
    """Nothing is being generated."""
    START = "start"
    """The model can be loaded again."""
    TRANSFER = "transfer"
    """All tensors have arrived; the engine tells which."""
    FINISH = "finish"
    """The last layers are in place."""
    RESET_CACHE = "reset_cache"
    """Keys and values of the old weights are forgotten."""
    COMMIT = "commit"
    """The weights have their version, and the engine generates again."""


class TokenLoss(Protocol):
    """A loss on the policy's outputs; a picklable value."""

    def __call__(self, outputs: TokenOutputs, batch: MicroBatch) -> LossTerms:
        """Sum over the loss tokens of ``batch``."""


class SupervisedTokenLoss(Protocol):
    """A loss that needs the tokens alone; a picklable value."""

    def __call__(self, outputs: TokenOutputs, batch: PackedTokens) -> LossTerms:
        """Sum over the loss tokens of ``batch``."""


class ValueLoss(Protocol):
    """A loss on the critic's outputs; a picklable value."""

    def __call__(self, outputs: ValueOutputs, batch: MicroBatch) -> LossTerms:
        """Sum over the loss tokens of ``batch``."""


class AdvantageEstimator(Protocol):
    """Turns rewards into what each token was worth; a picklable value."""

    def __call__(
        self, rewards: Tensor, values: Tensor | None, mask: Tensor, group: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Estimate.

        Args:
            rewards: [B, T] per token, after the KL penalty.
            values: [B, T] of the state before each token, or None where there is no critic.
            mask: [B, T] bool, the responses.
            group: [B] int64, the prompt that each row answers.

        Returns:
            advantages [B, T], 0 outside the mask; and the critic's targets [B, T], None from an estimator that needs
            no critic.
        """


class LossMean(Protocol):
    """Which average over the tokens of an optimizer step a loss is; a picklable value."""

    def __call__(self, mask: Tensor) -> Tensor:
        """[b, T] bool, the loss tokens -> [b, T] f32, the weights that make "sum / loss tokens" that average."""


class RolloutEngine(Protocol):
    """Generates."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        """One sample per prompt and seed; the rollout names the version of the weights that drew it."""


class ReferenceModel(Protocol):
    """Scores tokens."""

    def logprobs(self, batch: TokenRows) -> Pending[Tensor]:
        """[B, T] f32 log-probs of the response tokens at the temperature of training, 0 elsewhere."""


class PolicyModel(ReferenceModel, Protocol):
    """Scores tokens and learns."""

    def update(self, minibatch: Minibatch[ExperienceBatch], loss: TokenLoss) -> Pending[UpdateResult]:
        """One optimizer step."""


class SupervisedModel(Protocol):
    """A policy during the supervised stage."""

    def update(self, minibatch: Minibatch[TokenRows], loss: SupervisedTokenLoss) -> Pending[UpdateResult]:
        """One optimizer step."""


class ValueModel(Protocol):
    """Predicts returns and learns."""

    def values(self, batch: TokenRows) -> Pending[Tensor]:
        """[B, T] f32 value of the state before each response token, 0 elsewhere."""

    def update(self, minibatch: Minibatch[ExperienceBatch], loss: ValueLoss) -> Pending[UpdateResult]:
        """One optimizer step."""


class ScoresTokens(Protocol):
    """One implementation of a model, as the parity gate sees it."""

    @property
    def name(self) -> str:
        """For messages."""

    def score(self, rows: TokenRows) -> Pending[Tensor]:
        """[B, T] f32, 0 outside the response: log-probs at temperature 1, or values of the state before each token."""

    def activations(self, rows: TokenRows) -> Pending[Mapping[str, Tensor]]:
        """What leaves the embedding, each attention, each layer and the final norm.

        Returns:
            by the module's Hugging Face name (``model.embed_tokens``, ``model.layers.0.self_attn``, ``model.layers.0``,
            ``model.norm``): [n, h] f32, for all tokens but the last of each row, row after row. Empty where the layers
            cannot be watched.
        """

    def tensors(self, prefixes: Sequence[str]) -> Pending[Mapping[str, Tensor]]:
        """Whole weights whose Hugging Face name starts with one of ``prefixes``, on the CPU; the rotary frequencies
        count as ``model.rotary_emb.inv_freq``.
        """


class Gate(Protocol):
    """What must hold before the first step of a run."""

    def __call__(self) -> Mapping[str, float]:
        """Check it.

        Returns:
            metrics of the check.

        Raises:
            ParityFailed: trainer, engine and reference do not compute the same.
        """


class RewardScorer(Protocol):
    """Scores samples; a :class:`~megatron_rl.rewards.service.RewardService` is one."""

    def score(self, requests: Sequence[tuple[str, str, Finish]]) -> list[Score]:
        """One score per ``(response text, answer, finish)``, in order."""


class Collect(Protocol):
    """Where scored rollouts come from: takes prompts, generates, scores. Resampling hides here."""

    def __call__(self, prompts: int, step: int) -> list[ScoredRollout]:
        """The scored rollouts of ``prompts`` prompts for this step."""


class WeightSync(Protocol):
    """Trainer -> engine."""

    def push(self, version: int) -> Mapping[str, float]:
        """Hand the policy's weights to the engine as ``version`` and check that they arrived.

        Returns:
            metrics of the push.

        Raises:
            WeightMismatch: what the engine loaded is not what the trainer sent.
        """


class Phases(Protocol):
    """Takes turns on devices that trainer and engine share; nothing to do where they have their own. One block at a
    time.
    """

    def generating(self) -> AbstractContextManager[None]:
        """The engine generates."""

    def training(self) -> AbstractContextManager[None]:
        """Policy and critic compute; a push comes before anything is generated."""

    def pushing(self) -> AbstractContextManager[None]:
        """Weights go from the policy to the engine."""

    def saving(self) -> AbstractContextManager[None]:
        """Policy and critic are saved."""

    def comparing(self) -> AbstractContextManager[None]:
        """All models score tokens."""


class Checkpoints(Protocol):
    """Where a run is saved."""

    def save(self, step: int, accuracy: float | None = None, *, wait: bool) -> Mapping[str, float]:
        """Save all that is needed to go on from ``step``; complete or not there at all.

        Args:
            step: steps done.
            accuracy: of the policy that is saved, on the held-out prompts, where it was evaluated.
            wait: return only once it is on the disk; else it may be written while training goes on.

        Returns:
            metrics of this save, and of an earlier one that came to its end since the last call.

        Raises:
            Exception: this save, or the one before it, could not be written.
        """


class StopRequest(Protocol):
    """Whether somebody wants the run to end early."""

    @property
    def asked(self) -> bool:
        """True from then on: the step in progress is finished and saved, and none is begun."""
