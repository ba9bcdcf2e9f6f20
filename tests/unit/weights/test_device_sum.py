"""The checksum that GPUs compute, on a CPU: integers wrap alike on both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_rl.weights.device_sum import DeviceSum

WORD = 2**64


def by_hand(content: bytes) -> int:
    """In Python's integers, which do not wrap."""
    total = 0
    for place in range(-(-len(content) // 8)):
        word = int.from_bytes(content[8 * place : 8 * place + 8].ljust(8, b"\0"), "little")
        mixed = (word + (place + 1) * 0x9E3779B97F4A7C15) % WORD
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % WORD
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % WORD
        total += mixed ^ mixed >> 31
    return total % WORD


def found(content: Tensor) -> int:
    return int(DeviceSum().of(content)) % WORD


@pytest.mark.parametrize("size", [1, 7, 8, 64, 1003])
def test_it_is_the_sum_of_mixed_words_wherever_they_lie(size: int) -> None:
    bucket = torch.randint(0, 256, (size + 5,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    sums = DeviceSum()
    for start in (0, 5):  # the second does not begin at a word
        part = bucket[start : start + size]
        assert int(sums.of(part)) % WORD == by_hand(bytes(part.tolist()))
    longer = bucket.repeat(3)
    assert int(sums.of(longer)) % WORD == by_hand(bytes(longer.tolist()))  # than the places that were known


def test_every_changed_bit_and_every_exchange_is_seen() -> None:
    content = torch.randint(0, 256, (64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = {found(content)}
    for byte in range(64):
        for bit in range(8):
            changed = content.clone()
            changed[byte] ^= 1 << bit
            seen.add(found(changed))
    assert len(seen) == 1 + 64 * 8
    signs = torch.zeros(800, dtype=torch.uint8)
    signs[7] = 128  # of words that differ in their highest bit alone
    assert len({found(signs.roll(8 * words)) for words in range(100)}) == 100
