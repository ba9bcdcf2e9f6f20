"""What flows through the loop before there are tensors: prompt -> sample -> rollout -> score.

Every type is frozen. A later stage contains the earlier one and never changes it. This module imports nothing heavy,
so the reward workers and the configuration can use it without loading torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Finish(Enum):
    """Why a sample ended."""

    STOP = "stop"
    """The model emitted an end-of-sequence token or a stop string."""
    LENGTH = "length"
    """The response limit cut it: the sample is truncated."""


class Outcome(Enum):
    """How scoring a sample ended. A time-out or an error is never a silent zero: each is counted on its own."""

    SCORED = "scored"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question, templated and tokenised, with the answer that the reward rule compares with; ``text`` is for people
    who read samples.
    """

    id: str
    token_ids: tuple[int, ...]
    answer: str
    source: str
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the engine draws tokens. ``temperature=0`` is greedy."""

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion of a prompt.

    Attributes:
        token_ids: the response's tokens, the end-of-sequence token included when the model emitted it.
        logprobs: natural log-probability of each token under the distribution it was drawn from.
        text: the response as text, without special tokens and without the string of ``rollout.stop`` that ended it, of
            which ``token_ids`` have the tokens.
        finish: why it ended.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: Finish

    def __post_init__(self) -> None:
        """Check that every token has its log-probability."""
        if not self.token_ids:
            raise ValueError("a sample needs at least one token, got none")
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"every token needs its log-prob, got {len(self.token_ids)} tokens, {len(self.logprobs)} log-probs"
            )


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """All samples of one prompt, drawn by the weights of ``policy_version``."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    policy_version: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the reward rule gave one sample.

    Attributes:
        value: the number PPO trains on.
        outcome: whether the rule finished; ``value`` is the rule's own failure value where it did not.
        parts: what the value was made of, for the metrics (``correct``, ``boxed``, ...), each 0..1 or in score units.
        reason: of an error, what went wrong; for people.
        answer: what the rule read as the answer of the response; None where there is none, or the rule does not say.
    """

    value: float
    outcome: Outcome = Outcome.SCORED
    parts: Mapping[str, float] = field(default_factory=dict)
    reason: str = field(default="", compare=False)
    answer: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check that the value can be trained on."""
        if not math.isfinite(self.value):
            raise ValueError(f"a score must be finite, the rule gave {self.value}")


@dataclass(frozen=True, kw_only=True)
class ScoredRollout:
    """A rollout with one score per sample."""

    rollout: Rollout
    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        """Check that every sample has its score."""
        if len(self.scores) != len(self.rollout.samples):
            raise ValueError(
                f"prompt {self.rollout.prompt.id}: {len(self.rollout.samples)} samples need as many scores, "
                f"got {len(self.scores)}"
            )
