"""Questions become prompts, and prompts come in an order that a resumed run continues."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
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


def answer_text(answer: object) -> str:
    """The reference answer of a row as rules see it: text as it stands, anything else as JSON."""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def read_rows(file: Path, keys: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The objects of a JSON-lines file by the number of their line, from 1; lines of nothing but space are skipped.

    Raises:
        ValueError: a line is not UTF-8 or not JSON, lacks one of ``keys`` or has null there, or there is none; names
            the file and the line.
    """
    rows = {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):  # text may hold other line separators
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}:{number}: must be UTF-8: {error}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: every line must be a JSON object: {error}") from error
        missing = [key for key in keys if not isinstance(row, dict) or row.get(key) is None]
        if missing:
            raise ValueError(f"{file}:{number}: needs the keys {list(keys)}, lacks {missing}")
        rows[number] = row
    if not rows:
        raise ValueError(f"{file}: needs at least one line with the keys {list(keys)}, has none")
    return rows


def read_texts(file: Path, rows: Mapping[int, Mapping[str, Any]], key: str) -> list[str]:
    """What ``rows`` of ``file``, as :func:`read_rows` gives them, have under ``key``.

    Raises:
        ValueError: one is not text, as where a chat's messages are given in place of a question; names its line.
    """
    for number, row in rows.items():
        if not isinstance(row[key], str):
            raise ValueError(f"{file}:{number}: every {key} must be text, got {str(row[key])[:200]}")
    return [row[key] for row in rows.values()]


def load_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer in a model's folder. It cuts and fills up no text, also where the file says so, as files do that
    were saved in the midst of somebody's training.

    Raises:
        ValueError: its ``tokenizer.json`` cannot be used.
    """
    file = model / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other type
        raise ValueError(f"{file} must be a tokenizer as Hugging Face's library saves it: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def unwritten_start(tokenizer: Tokenizer, prompt: Sequence[int]) -> str | None:
    """The special token that the tokenizer by itself puts before a text, where ``prompt`` (token ids) does not begin
    with it: prompts get the special tokens alone that are written in them.
    """
    own = tokenizer.encode("a")
    begins = bool(own.ids) and own.special_tokens_mask[0] == 1
    return own.tokens[0] if begins and own.ids[0] != prompt[0] else None


def load_prompts(file: Path, tokenizer: Tokenizer, config: DataConfig) -> PromptSet:
    """Template and tokenise the questions of ``file``; over-long prompts are left out and counted.

    Raises:
        ValueError: a line is not a question with an answer, an answer is empty, an id occurs twice, or no prompt fits.
    """
    rows = read_rows(file, ("question", "answer"))
    for number, row in rows.items():
        if not answer_text(row["answer"]).strip():
            raise ValueError(
                f"{file}:{number}: an answer must not be empty, got {row['answer']!r}: write what a right response "
                "gives, or any text where a reward rule of your own needs none"
            )
    ids = [str(index if row.get("id") is None else row["id"]) for index, row in enumerate(rows.values())]
    if repeated := [name for name, count in Counter(ids).items() if count > 1]:
        raise ValueError(
            f"{file}: every id must be unlike the others, since samples are seeded by it; got {repeated[0]!r} "
            f"{ids.count(repeated[0])} times ({len(repeated)} such ids); without ids, rows are numbered"
        )
    texts = [config.template.replace("{question}", text) for text in read_texts(file, rows, "question")]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    fitting = tuple(
        Prompt(
            id=ids[index],
            token_ids=tuple(encoding.ids),
            answer=answer_text(row["answer"]),
            source=file.stem,
            text=text,
        )
        for index, (row, text, encoding) in enumerate(zip(rows.values(), texts, encoded, strict=True))
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
