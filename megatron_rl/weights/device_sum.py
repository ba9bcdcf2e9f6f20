"""A checksum of bytes that the device computes where they lie: to hash them on the host, they would have to go there.

Each 8 bytes, with a number of their place added, go through splitmix64's mixing function (Steele et al., "Fast
splittable pseudorandom number generators", 2014, figure 17), which maps no two words to one, and the results are summed
modulo 2^64. So one wrong word is always seen; of several wrong ones, or words in another order, none but what chance
lets pass as equal numbers of 64 bits. It finds damage; it does not keep anyone from forging a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


class DeviceSum:
    """Sums contents of up to a largest size, whose numbers of places are made once."""

    def __init__(self) -> None:
        self._places: Tensor | None = None

    def of(self, content: Tensor) -> Tensor:
        """The checksum of ``content`` [n] uint8, a scalar int64 on its device; nothing waits for it.

        Zeros at the end count as nothing beside the length, which whoever compares knows.
        """
        words = torch.zeros(-(-len(content) // 8), dtype=torch.int64, device=content.device)
        words.view(torch.uint8)[: len(content)] = content  # a part of a bucket begins at any byte
        if self._places is None or len(self._places) < len(words):
            self._places = torch.arange(1, len(words) + 1, device=content.device).mul_(_GAMMA)
        words.add_(self._places[: len(words)])
        _fold(words, 30).mul_(_FIRST)
        _fold(words, 27).mul_(_SECOND)
        return _fold(words, 31).sum()


def _fold(words: Tensor, bits: int) -> Tensor:
    """In place, ``words ^ words >> bits`` of numbers without a sign."""
    return words.bitwise_xor_((words >> bits).bitwise_and_((1 << 64 - bits) - 1))
