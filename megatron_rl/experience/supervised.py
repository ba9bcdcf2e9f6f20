"""(prompt, response) pairs as rows for the supervised stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

from megatron_rl.batches import TokenRows
from megatron_rl.experience.prompts import read_rows, read_texts


def supervised_batches(
    file: Path, tokenizer: Tokenizer, eos_id: int, max_tokens: int, *, steps: int, samples_per_step: int
) -> Iterator[TokenRows]:
    """``steps`` batches of the file's rows in their order, from the start again where the file ends.

    Raises:
        ValueError: a row lacks a key, or is longer than ``max_tokens``.
    """
    rows = read_rows(file, ("prompt", "response"))
    prompts, responses = (
        [encoding.ids for encoding in tokenizer.encode_batch(read_texts(file, rows, key), add_special_tokens=False)]
        for key in ("prompt", "response")
    )
    pairs = [(prompt, [*response, eos_id]) for prompt, response in zip(prompts, responses, strict=True)]
    longest = max(range(len(pairs)), key=lambda index: sum(map(len, pairs[index])))
    if sum(map(len, pairs[longest])) > max_tokens or not all(prompt for prompt, _ in pairs):
        raise ValueError(
            f"{file}: every row needs a prompt and at most {max_tokens} tokens (the model's positions); the longest, "
            f"row {longest + 1}, has {sum(map(len, pairs[longest]))}"
        )
    for step in range(steps):
        chosen = [pairs[index % len(pairs)] for index in range(step * samples_per_step, (step + 1) * samples_per_step)]
        yield _rows(chosen)


def _rows(pairs: list[tuple[list[int], list[int]]]) -> TokenRows:
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in pairs])
    tokens = torch.zeros(len(pairs), int(lengths.max()), dtype=torch.int64)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(pairs):
        tokens[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask[row, len(prompt) : len(prompt) + len(response)] = True
    return TokenRows(tokens=tokens, lengths=lengths, response_mask=mask)
