"""A rule of one line: whether two answers are equal. A file of its own, because reward workers load rules by path."""

from __future__ import annotations

from megatron_rl.dataflow import Finish
from megatron_rl.rewards.answers import equal


def same_answer(text: str, answer: str, finish: Finish) -> float:
    """1 where ``text``, an answer and not a response, equals ``answer``, else 0."""
    return float(equal(text, answer))
