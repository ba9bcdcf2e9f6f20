"""What responses look like, whatever they are worth: repetition, words of second thoughts. Pure functions of text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from eval.samples import GradedSample
from megatron_rl.dataflow import Finish

KEYWORDS = ("recheck", "rethink", "try again", "wait", "alternatively", "retry", "however")
"""Words of second thoughts, as SimpleRL-Zoo counts them (its ``collect_results.py``). The paper calls their count only
weakly related to reflection: read the samples."""
_KEYWORD = re.compile(rf"\b(?:{'|'.join(KEYWORDS)})\b", re.IGNORECASE)
_GRAM = 8
_MOSTLY = 0.5


def keyword_count(text: str) -> int:
    """How often a word of ``KEYWORDS`` stands in ``text``, whole and in any case."""
    return len(_KEYWORD.findall(text))


def repeats_itself(text: str) -> bool:
    """Whether more than half of the runs of 8 words in ``text`` have stood in it before: a response in a loop."""
    words = text.split()
    runs = [tuple(words[at : at + _GRAM]) for at in range(len(words) - _GRAM + 1)]
    return bool(runs) and 1 - len(set(runs)) / len(runs) > _MOSTLY


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """Of the samples of one task at one checkpoint; shares are of all samples, lengths are mean tokens.

    Attributes:
        accuracy: share of right samples.
        length: of a response.
        length_right, length_wrong, length_stopped: of those that are right, are wrong, ended by themselves; None where
            there are none.
        clip_ratio: share that the length limit cut.
        stop_ratio: share that ended by itself.
        box_ratio: share with an answer in a box.
        repeat_ratio: share that repeats itself.
        keywords: words of second thoughts in a response, mean.
        samples: how many.
    """

    accuracy: float
    length: float
    length_right: float | None
    length_wrong: float | None
    length_stopped: float | None
    clip_ratio: float
    stop_ratio: float
    box_ratio: float
    repeat_ratio: float
    keywords: float
    samples: int


def behaviour(samples: Sequence[GradedSample]) -> Behaviour:
    """Count ``samples`` (at least one)."""

    def mean_tokens(chosen: list[GradedSample]) -> float | None:
        return fmean(sample.tokens for sample in chosen) if chosen else None

    stopped = [sample for sample in samples if sample.finish is Finish.STOP]
    return Behaviour(
        accuracy=fmean(sample.correct for sample in samples),
        length=fmean(sample.tokens for sample in samples),
        length_right=mean_tokens([sample for sample in samples if sample.correct]),
        length_wrong=mean_tokens([sample for sample in samples if not sample.correct]),
        length_stopped=mean_tokens(stopped),
        clip_ratio=1 - len(stopped) / len(samples),
        stop_ratio=len(stopped) / len(samples),
        box_ratio=fmean(sample.boxed for sample in samples),
        repeat_ratio=fmean(repeats_itself(sample.response) for sample in samples),
        keywords=fmean(keyword_count(sample.response) for sample in samples),
        samples=len(samples),
    )
