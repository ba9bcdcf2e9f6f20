"""Questions become prompts, and prompts come in an order that a resumed run continues."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_rl.config.schema import DataConfig
from megatron_rl.dataflow import Prompt


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """The prompts of one file.

    Attributes:
        prompts: those that fit.
        dropped: how many were longer than the limit.
    """

    prompts: tuple[Prompt, ...]
    dropped: int

    def digest(self) -> str:
        """The same for the same prompts in the same order: a position in the data belongs to one digest."""
        summed = hashlib.blake2b(digest_size=16)
        for prompt in self.prompts:
            summed.update(repr((prompt.id, prompt.token_ids, prompt.answer)).encode())
        return summed.hexdigest()


def read_rows(file: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file.

    Raises:
        ValueError: a line is not JSON, or lacks one of ``keys``; names the file and the line.
    """
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: every line must be a JSON object: {error}") from error
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise ValueError(f"{file}:{number}: needs the keys {list(keys)}, lacks {missing}")
        rows.append(row)
    return rows


def load_prompts(file: Path, tokenizer: Tokenizer, config: DataConfig) -> PromptSet:
    """Template and tokenise the questions of ``file``; over-long prompts are left out and counted.

    Raises:
        ValueError: a line is not a question with an answer, or no prompt fits.
    """
    rows = read_rows(file, ("question", "answer"))
    texts = [config.template.replace("{question}", str(row["question"])) for row in rows]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    fitting = tuple(
        Prompt(
            id=str(row.get("id", index)),
            token_ids=tuple(encoding.ids),
            answer=str(row["answer"]),
            source=file.stem,
        )
        for index, (row, encoding) in enumerate(zip(rows, encoded, strict=True))
        if 0 < len(encoding.ids) <= config.max_prompt_tokens
    )
    if not fitting:
        raise ValueError(
            f"{file}: no prompt has between 1 and data.max_prompt_tokens={config.max_prompt_tokens} tokens "
            f"({len(rows)} rows read)"
        )
    return PromptSet(prompts=fitting, dropped=len(rows) - len(fitting))


class PromptStream:
    """Prompts without end, in a new seeded order each epoch; its position is saved and restored."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts = prompts
        self._seed = seed
        self._taken = 0

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts."""
        taken: list[Prompt] = []
        while len(taken) < count:
            epoch, start = divmod(self._taken, len(self._prompts))
            order = random.Random(f"{self._seed}/{epoch}").sample(range(len(self._prompts)), len(self._prompts))
            chosen = order[start : start + count - len(taken)]
            taken += [self._prompts[index] for index in chosen]
            self._taken += len(chosen)
        return taken

    def state(self) -> dict[str, int]:
        """What :meth:`restore` needs."""
        return {"taken": self._taken}

    def restore(self, state: dict[str, int]) -> None:
        """Go on where :meth:`state` was taken."""
        self._taken = state["taken"]
