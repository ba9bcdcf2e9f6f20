"""Push the policy's weights to the engine, and make sure that what it computes with is what was sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rl.batches import TokenRows
from megatron_rl.interfaces import Pending, PushReceipt


class WeightMismatch(RuntimeError):
    """What the engine has is not what the trainer sent."""


class WeightSender(Protocol):
    """The trainer's side of a push."""

    def send(self, version: int) -> Pending[PushReceipt]:
        """Send the current weights."""

    def logprobs(self, batch: TokenRows, temperature: float) -> Pending[Tensor]:
        """[B, T] f32 log-probs of the response tokens, 0 elsewhere."""


class WeightReceiver(Protocol):
    """The engine's side of a push."""

    def receive(self, version: int) -> Pending[PushReceipt]:
        """Receive and load weights."""

    def score(self, rows: Sequence[Sequence[int]]) -> Pending[list[list[float]]]:
        """For each row the log-prob of each token given those before it, at temperature 1; 0.0 for the first."""


class CheckedSync:
    """Push and check twice: that the same bytes arrived, and that both sides then say the same of fixed tokens.

    The digest speaks of what arrived; only the probe speaks of what was loaded and is computed with.
    """

    def __init__(
        self, sender: WeightSender, receiver: WeightReceiver, probe: TokenRows, probe_tolerance: float
    ) -> None:
        """Keep the parts.

        Args:
            sender: the policy.
            receiver: the engine.
            probe: a handful of rows that both score after every push; its response mask says which tokens count.
            probe_tolerance: largest mean absolute difference in log-prob, in nats.

        Raises:
            ValueError: the probe marks no token.
        """
        if not bool(probe.response_mask.any()):
            raise ValueError("the probe's response_mask must mark at least one token to compare, it marks none")
        self._sender = sender
        self._receiver = receiver
        self._probe = probe
        self._tolerance = probe_tolerance

    def push(self, version: int) -> Mapping[str, float]:
        """Push the weights as ``version`` and check them.

        Returns:
            ``bytes`` sent, and ``probe_mean_abs`` and ``probe_max_abs``, the difference in log-prob (nats).

        Raises:
            WeightMismatch: the receipts differ, or the probe does by more than its tolerance.
            Exception: what a side raised; where both failed, the other side's error is a note on it.
        """
        sent, received = _both(
            {"the trainer": self._sender.send(version), "the engine": self._receiver.receive(version)}
        )
        if sent != received or sent.version != version:
            raise WeightMismatch(
                f"version {version}: both sides must report the same, the trainer sent {sent}, "
                f"the engine received {received}"
            )
        return {"bytes": float(sent.size_bytes), **self._compare_probe(version)}

    def _compare_probe(self, version: int) -> dict[str, float]:
        probe = self._probe
        lengths = probe.lengths.tolist()
        rows = [tokens[:length] for tokens, length in zip(probe.tokens.tolist(), lengths, strict=True)]
        trainer, scores = _both(
            {"the trainer": self._sender.logprobs(probe, 1.0), "the engine": self._receiver.score(rows)}
        )
        if [len(score) for score in scores] != lengths:
            raise WeightMismatch(
                f"version {version}: the engine must score {lengths} probe tokens, got {[len(s) for s in scores]}"
            )
        engine = torch.zeros(probe.tokens.shape)
        for row, score in enumerate(scores):
            engine[row, : len(score)] = torch.tensor(score)
        ours, theirs = trainer[probe.response_mask].float(), engine[probe.response_mask]
        difference = (ours - theirs).abs()
        mean, worst = float(difference.mean()), int(difference.argmax())
        if not mean <= self._tolerance:  # so that not-a-number fails, too
            raise WeightMismatch(
                f"version {version}: the engine does not compute with the weights that it received: the log-probs of "
                f"{len(ours)} probe tokens differ by {mean:.3g} in the mean (at most {self._tolerance:g} allowed) and "
                f"{float(difference[worst]):.3g} at worst (trainer {float(ours[worst]):.6g}, "
                f"engine {float(theirs[worst]):.6g})"
            )
        return {"probe_mean_abs": mean, "probe_max_abs": float(difference[worst])}


def _both(pending: Mapping[str, Pending[Any]]) -> list[Any]:
    """Wait for all, also after one has failed: its cause may lie with the other, which must not be left at work."""
    results, failures = [], []
    for side, handle in pending.items():
        try:
            results.append(handle.result())
        except Exception as error:
            failures.append((side, error))
    if failures:
        (_, first), *others = failures
        for side, other in others:
            first.add_note(f"{side} failed, too: {type(other).__name__}: {other}")
        raise first
    return results
