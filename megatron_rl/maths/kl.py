"""How far two policies are apart on sampled tokens, and how hard a run pulls them together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

KlKind = Literal["k1", "k2", "k3"]
LARGEST_LOG_RATIO = 20.0
"""Bound on a log-ratio (nats) before its exponential, far outside any clip range: exp(20) is 5e8, and stays finite."""

_LARGEST_ERROR = 0.2


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KlKind) -> Tensor:
    """Estimate KL(policy || reference), in nats, from tokens drawn by the policy.

    Source: Schulman, "Approximating KL Divergence" (2020). With ``d = logprobs - ref_logprobs``:

    * ``k1 = d``: unbiased, may be negative for a token;
    * ``k2 = d^2 / 2``: biased, never negative;
    * ``k3 = exp(-d) - 1 + d``: unbiased, never negative (``-d`` is bounded to 20 either way before the exponential).

    Args:
        logprobs: of the tokens under the policy that drew them, any shape.
        ref_logprobs: of the same tokens under the other one, same shape.
        kind: which estimator.

    Returns:
        one estimate per token, same shape. Nothing is masked here.

    Raises:
        ValueError: the kind is none of the three.
    """
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference**2
    if kind == "k3":
        opposite = (-difference).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        return opposite.expm1() - opposite
    raise ValueError(f"kl_kind must be k1, k2 or k3, got {kind!r}")


class KlControl:
    """The coefficient of the KL penalty in the reward: fixed, or steered towards a target.

    Source of the adaptive rule: Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), section
    2.2, with the horizon of their released code: ``error = clip(KL / target - 1, -0.2, 0.2)``,
    ``coef *= 1 + error * samples / horizon``.
    """

    def __init__(self, coef: float, *, target: float | None = None, horizon: int = 10_000) -> None:
        """Start at ``coef``.

        Args:
            coef: first coefficient, at least 0.
            target: mean KL per response (nats) to steer towards; None keeps the coefficient fixed.
            horizon: samples over which the coefficient moves.

        Raises:
            ValueError: a number is out of range.
        """
        if not coef >= 0 or (target is not None and not target > 0) or horizon < 1:
            raise ValueError(
                f"KL control needs coef >= 0, target > 0 (or none) and horizon >= 1, got {coef}, {target}, {horizon}"
            )
        self._first = self._coef = float(coef)
        self._target = target
        self._horizon = horizon

    @property
    def coef(self) -> float:
        """The coefficient in force."""
        return self._coef

    def update(self, mean_kl_per_response: float, samples: int) -> None:
        """Move the coefficient after a rollout of ``samples`` samples; nothing where it is fixed.

        Raises:
            ValueError: the measured KL is not finite.
        """
        if self._target is None:
            return
        if not math.isfinite(mean_kl_per_response):
            raise ValueError(f"the adaptive KL coefficient needs a finite mean KL, got {mean_kl_per_response}")
        error = min(max(mean_kl_per_response / self._target - 1.0, -_LARGEST_ERROR), _LARGEST_ERROR)
        self._coef *= 1.0 + error * samples / self._horizon

    def state(self) -> dict[str, float]:
        """What :meth:`restore` needs; plain data."""
        return {"coef": self._coef, "first": self._first}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on with the coefficient of :meth:`state`, unless that began at another one: what the configuration says
        now is then the start. A fixed coefficient keeps the value of the configuration.
        """
        if self._target is not None and state.get("first", self._first) == self._first:
            self._coef = float(state["coef"])
