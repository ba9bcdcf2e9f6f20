"""Samples on the disk: one JSON line each, appended as they are graded, so that a killed evaluation goes on."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.tasks import BadInput
from megatron_rl.dataflow import Finish, Outcome
from megatron_rl.durable import replace_text


@dataclass(frozen=True, kw_only=True)
class Response:
    """What a model answered, before anyone judges it.

    Attributes:
        task: the problem set.
        id: of the problem.
        sample: 0-based number among the problem's samples.
        question, prompt, response: texts; the prompt is the templated question.
        gold: the reference answer.
        finish: why the response ended.
        tokens: of the response, its end-of-sequence token included.
    """

    task: str
    id: str
    sample: int
    question: str
    prompt: str
    response: str
    gold: str
    finish: Finish
    tokens: int

    @property
    def key(self) -> tuple[str, int]:
        """Which sample of the task this is."""
        return self.id, self.sample


@dataclass(frozen=True, kw_only=True)
class GradedSample(Response):
    """A response and its verdict.

    Attributes:
        extracted: the answer that was compared, None where the response has none.
        correct, boxed: what the rule says.
        score: of the rule.
        outcome: whether the rule finished.
    """

    extracted: str | None
    correct: bool
    boxed: bool
    score: float
    outcome: Outcome

    def as_json(self) -> str:
        """One line without its end."""
        return json.dumps(dataclasses.asdict(self) | {"outcome": self.outcome.value, "finish": self.finish.value})


def parse_sample(row: Any) -> GradedSample:
    """The sample that a JSON object describes.

    Raises:
        ValueError: a field is missing, unknown or has an impossible value.
    """
    names = {item.name for item in dataclasses.fields(GradedSample)}
    if not isinstance(row, dict) or row.keys() != names:
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"a sample has the fields {sorted(names)}, got {found}")
    return GradedSample(**(row | {"outcome": Outcome(row["outcome"]), "finish": Finish(row["finish"])}))


def read_samples(file: Path) -> list[GradedSample]:
    """The samples of a file in the order of their writing; a last line that a kill cut short is left out.

    Raises:
        BadInput: another line is not a sample, or a sample that was there before; names the file and the line.
    """
    *lines, cut = file.read_bytes().split(b"\n")  # what follows the last line break was not written whole
    found: dict[tuple[str, str, int], GradedSample] = {}
    for number, line in enumerate(lines, start=1):
        try:
            sample = parse_sample(json.loads(line))
        except ValueError as error:
            raise BadInput(f"{file}:{number}: every line must be a graded sample: {error}") from error
        if (sample.task, *sample.key) in found:
            raise BadInput(
                f"{file}:{number}: sample {sample.sample} of {sample.task} {sample.id} stands there already; every "
                "sample must be there once: remove one of the two lines"
            )
        found[sample.task, *sample.key] = sample
    if not found and cut:
        raise BadInput(f"{file}: there is no whole line in it")
    return list(found.values())


class SampleLog:
    """The file of one task's samples: those that are there, and a place for more."""

    def __init__(self, file: Path) -> None:
        """Read what is there and cut off what a kill left of a line.

        Raises:
            BadInput: as :func:`read_samples`.
        """
        self._file = file
        self.samples: dict[tuple[str, int], GradedSample] = {}
        if file.exists():
            content = file.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(file, whole)
            self.samples = {sample.key: sample for sample in read_samples(file)}

    def append(self, samples: Sequence[GradedSample]) -> None:
        """Add samples; when this returns, the disk has them."""
        with self._file.open("ab") as lines:
            lines.write("".join(sample.as_json() + "\n" for sample in samples).encode())
            lines.flush()
            os.fsync(lines.fileno())
        self.samples |= {sample.key: sample for sample in samples}

    def replace(self, samples: Sequence[GradedSample]) -> None:
        """Put other verdicts in the place of those that are there; a kill leaves the old file or the new one."""
        self.samples |= {sample.key: sample for sample in samples}
        replace_text(self._file, "".join(sample.as_json() + "\n" for sample in self.samples.values()))
