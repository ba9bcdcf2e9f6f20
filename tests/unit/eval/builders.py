"""Graded samples to count."""

from __future__ import annotations

from typing import Any

from eval.samples import GradedSample
from megatron_rl.dataflow import Finish, Outcome


def graded(identity: str, number: int, answer: str | None, gold: str = "1", **changes: Any) -> GradedSample:
    fields = {
        "task": "t",
        "id": identity,
        "sample": number,
        "question": "Q",
        "prompt": "Q:",
        "response": "no" if answer is None else f"\\boxed{{{answer}}}",
        "extracted": answer,
        "gold": gold,
        "correct": answer == gold,
        "boxed": answer is not None,
        "score": float(answer == gold),
        "outcome": Outcome.SCORED,
        "finish": Finish.STOP,
        "tokens": 10,
    }
    return GradedSample(**(fields | changes))
