"""(prompt, response) pairs as rows for the supervised stage."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from megatron_rl.batches import TokenRows
from megatron_rl.experience.prompts import read_rows, read_texts

Pair = tuple[Sequence[int], Sequence[int]]
"""Tokens of a prompt and of its response."""


class SupervisedRows:
    """Pairs in their order, from the start again where they end; the position is saved and restored."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._taken = 0

    @property
    def first_prompt(self) -> Sequence[int]:
        """Tokens of the first pair's prompt."""
        return self._pairs[0][0]

    def take(self, count: int) -> TokenRows:
        """The next ``count`` pairs as rows; the responses are what is learnt."""
        chosen = [self._pairs[index % len(self._pairs)] for index in range(self._taken, self._taken + count)]
        self._taken += count
        return _rows(chosen)

    def digest(self) -> str:
        """The same for the same pairs in the same order: a position in the data belongs to one digest."""
        summed = hashlib.blake2b(digest_size=16)
        for prompt, response in self._pairs:
            summed.update(repr((tuple(prompt), tuple(response))).encode())
        return summed.hexdigest()

    def state(self) -> dict[str, int]:
        """What :meth:`restore` needs."""
        return {"taken": self._taken}

    def restore(self, state: dict[str, int]) -> None:
        """Go on where :meth:`state` was taken."""
        self._taken = state["taken"]


def load_pairs(file: Path, tokenizer: Tokenizer, eos_id: int, max_tokens: int) -> SupervisedRows:
    """Tokenise the rows of ``file``, with ``eos_id`` behind each response.

    Raises:
        ValueError: a row lacks a key, has no prompt, or is longer than ``max_tokens``; names its line.
    """
    rows = read_rows(file, ("prompt", "response"))
    prompts, responses = (
        [encoding.ids for encoding in tokenizer.encode_batch(read_texts(file, rows, key), add_special_tokens=False)]
        for key in ("prompt", "response")
    )
    pairs = [(prompt, [*response, eos_id]) for prompt, response in zip(prompts, responses, strict=True)]
    if empty := [number for number, (prompt, _) in zip(rows, pairs, strict=True) if not prompt]:
        raise ValueError(
            f"{file}:{empty[0]}: every prompt needs at least one token, got {rows[empty[0]]['prompt']!r} "
            f"({len(empty)} such rows): give it a prompt or remove the row"
        )
    lengths = {number: len(prompt) + len(response) for number, (prompt, response) in zip(rows, pairs, strict=True)}
    if too_long := [number for number, length in lengths.items() if length > max_tokens]:
        raise ValueError(
            f"{file}:{too_long[0]}: prompt, response and end-of-sequence token must fit the model's {max_tokens} "
            f"positions, got {lengths[too_long[0]]} tokens ({len(too_long)} such rows): shorten or remove them"
        )
    return SupervisedRows(pairs)


def _rows(pairs: Sequence[Pair]) -> TokenRows:
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in pairs])
    tokens = torch.zeros(len(pairs), int(lengths.max()), dtype=torch.int64)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(pairs):
        tokens[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        mask[row, len(prompt) : len(prompt) + len(response)] = True
    return TokenRows(tokens=tokens, lengths=lengths, response_mask=mask)
