"""How long responses are: what a rollout's time depends on beyond their mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Mean tokens of a prompt and of a response."""

    prompt: float
    response: float

    @property
    def row(self) -> float:
        """Of both together."""
        return self.prompt + self.response


@dataclass(frozen=True)
class Responses:
    """Lengths as if each token were the last one with the same chance, and a limit cut what goes on: exponential, with
    the mean that is asked for. What real models do differs; the mean and the limit are theirs.

    Attributes:
        mean: tokens, at least 1 and at most ``longest``.
        longest: the limit, in tokens.
    """

    mean: float
    longest: float

    @cached_property
    def _scale(self) -> float:
        """Mean without the limit: the ``s`` of ``mean = s (1 - exp(-longest / s))``, by bisection."""
        low, high = self.mean, 1e6 * self.longest
        if high * -math.expm1(-self.longest / high) <= self.mean:
            return math.inf
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if middle * -math.expm1(-self.longest / middle) < self.mean else (low, middle)
        return high

    def alive(self, tokens: float) -> float:
        """Share of the responses that are longer than this."""
        return math.exp(-tokens / self._scale) if tokens < self.longest else 0.0

    @property
    def running(self) -> float:
        """Tokens that a response has so far, on the average over all that run at one time: ``E[l^2] / (2 E[l])``, since
        the long ones run for longer.
        """
        scale, reach = self._scale, self.longest / self._scale
        if reach < 1e-3:
            return self.longest / 2
        return scale**2 * (1 - math.exp(-reach) * (1 + reach)) / self.mean

    def token_row(self, prompt: float) -> float:
        """Tokens of the row, ``prompt`` and response, that a token is in, on the average over tokens:
        ``E[l^2] / E[l]``.
        """
        squared = prompt**2 + 2 * prompt * self.mean + 2 * self.mean * self.running
        return squared / (prompt + self.mean)

    def longest_of(self, count: float, steps: int = 256) -> float:
        """The longest of so many, in tokens, on the average."""
        width = self.longest / steps
        return width * sum(self.any_alive((step + 0.5) * width, count) for step in range(steps))

    def any_alive(self, tokens: float, count: float) -> float:
        """The chance that at least one of so many is longer than this."""
        share = self.alive(tokens)
        return 1.0 if share == 1 else -math.expm1(count * math.log1p(-share))
