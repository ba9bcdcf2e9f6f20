"""How long responses will be, guessed from those seen: what engines that share a rollout are loaded by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rl.dataflow import Prompt, Rollout

_NEWS = 0.5
"""Share of the newest rollout in a running mean: responses grow while a policy learns."""

Kind = tuple[str, int]
"""Prompts of one source and of about one length: its number of binary digits."""


@dataclass(frozen=True, kw_only=True)
class ExpectedLength:
    """Running means of the tokens of a response, by kind of prompt.

    Attributes:
        means: exponential, in tokens; empty before the first rollout.
    """

    means: Mapping[Kind, float] = field(default_factory=dict)

    def of(self, prompt: Prompt, most: int) -> float:
        """Tokens of one response to ``prompt``: at most ``most``, which is also the guess for a kind never seen."""
        return min(float(most), self.means.get(_kind(prompt), float(most)))

    def after(self, rollouts: Sequence[Rollout]) -> ExpectedLength:
        """The means once ``rollouts`` have been seen."""
        seen: dict[Kind, list[int]] = {}
        for rollout in rollouts:
            seen.setdefault(_kind(rollout.prompt), []).extend(len(sample.token_ids) for sample in rollout.samples)
        new = {kind: sum(lengths) / len(lengths) for kind, lengths in seen.items()}
        return ExpectedLength(
            means={
                **self.means,
                **{kind: _NEWS * mean + (1 - _NEWS) * self.means.get(kind, mean) for kind, mean in new.items()},
            }
        )

    def state(self) -> list[tuple[str, int, float]]:
        """What :meth:`restored` needs; plain data."""
        return [(*kind, mean) for kind, mean in self.means.items()]

    @staticmethod
    def restored(state: Sequence[tuple[str, int, float]]) -> ExpectedLength:
        """What :meth:`state` was taken of."""
        return ExpectedLength(means={(source, digits): mean for source, digits, mean in state})


def _kind(prompt: Prompt) -> Kind:
    return prompt.source, len(prompt.token_ids).bit_length()
