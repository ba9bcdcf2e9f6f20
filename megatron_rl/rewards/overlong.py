"""What a response loses for coming close to the length limit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_rl.dataflow import ScoredRollout


@dataclass(frozen=True, kw_only=True)
class OverlongPenalty:
    """A soft penalty on the last ``buffer`` tokens before the limit, added to a rule's score.

    Source: Yu et al., "DAPO" (2025), equation 13: with L tokens in the response, 0 up to ``max_tokens - buffer``, then
    ``(max_tokens - buffer - L) / buffer``, which reaches -1 at ``max_tokens``.

    Attributes:
        max_tokens: the longest response, in tokens.
        buffer: where the penalty begins, in tokens below that; from 1 to ``max_tokens``.
    """

    max_tokens: int
    buffer: int

    def of(self, length: int) -> float:
        """The penalty of a response of ``length`` tokens, from -1 to 0."""
        return max(-1.0, min(0.0, (self.max_tokens - self.buffer - length) / self.buffer))

    def apply(self, scored: ScoredRollout) -> ScoredRollout:
        """The same samples, each with its penalty in its score and as the part ``overlong``."""
        penalties = [self.of(len(sample.token_ids)) for sample in scored.rollout.samples]
        scores = tuple(
            replace(score, value=score.value + penalty, parts={**score.parts, "overlong": penalty})
            for score, penalty in zip(scored.scores, penalties, strict=True)
        )
        return replace(scored, scores=scores)
