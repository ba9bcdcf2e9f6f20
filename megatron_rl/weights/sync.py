"""Push the policy's weights to the engine, and make sure that what it computes with is what was sent."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rl.batches import TokenRows
from megatron_rl.interfaces import Pending, PushPhase, PushReceipt


class WeightMismatch(RuntimeError):
    """What the engine has is not what the trainer sent."""


class WeightSender(Protocol):
    """The trainer's side of a push."""

    def send(self, version: int, deadline_s: float) -> Pending[tuple[PushReceipt, ...]]:
        """Send the current weights; what each worker of an engine was sent."""

    def logprobs(self, batch: TokenRows, temperature: float) -> Pending[Tensor]:
        """[B, T] f32 log-probs of the response tokens, 0 elsewhere."""


class WeightReceiver(Protocol):
    """The engine's side of a push."""

    def advance(self, phase: PushPhase, version: int, deadline_s: float) -> Pending[tuple[PushReceipt, ...] | None]:
        """Go through the next phase; of the transfer alone come receipts, of each worker of an engine."""

    def score(self, rows: Sequence[Sequence[int]]) -> Pending[list[list[list[float]]]]:
        """By each engine, for each row: the log-prob of each token given those before it, at temperature 1; 0.0 for the
        first.
        """


@dataclass(frozen=True, kw_only=True)
class CheckedSync:
    """Push and check twice: that the same bytes arrived, and that both sides then say the same of fixed tokens.

    The digest speaks of what arrived; only the probe speaks of what was loaded and is computed with. The engine is told
    to commit the version after both: until then, and whatever fails, it is stale and generates nothing.

    Attributes:
        sender: the policy.
        receiver: the engine.
        probe: a handful of rows that both score in every push; its response mask says which tokens count.
        probe_tolerance: largest mean absolute difference in log-prob, in nats.
        phase_deadline_s: bound on each phase.
    """

    sender: WeightSender
    receiver: WeightReceiver
    probe: TokenRows
    probe_tolerance: float
    phase_deadline_s: float

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: the probe marks no token.
        """
        if not bool(self.probe.response_mask.any()):
            raise ValueError("the probe's response_mask must mark at least one token to compare, it marks none")

    def push(self, version: int) -> Mapping[str, float]:
        """Push the weights as ``version`` and check them.

        Returns:
            ``bytes`` sent to the workers of an engine together, and ``tensor_bytes``, what sending all tensors whole
            would be; ``probe_mean_abs`` and ``probe_max_abs``, the difference in log-prob (nats); for each phase
            and the check, as in ``transfer_s``, its seconds.

        Raises:
            WeightMismatch: the receipts differ, or the probe does by more than its tolerance; the phase is
                ``check``, after the last that leaves the engine stale.
            Exception: what a side raised, with a note that names the phase; where both failed, the other side's error
                is a note on it.
        """
        found: dict[str, float] = {}
        for phase in PushPhase:
            if phase is PushPhase.COMMIT:
                started = time.monotonic()
                with _named("check", version):
                    found |= self._compare_probe(version)
                found["check_s"] = time.monotonic() - started
            started = time.monotonic()
            with _named(phase.value, version):
                entered = {"the engine": self.receiver.advance(phase, version, self.phase_deadline_s)}
                if phase is PushPhase.TRANSFER:
                    sending = {"the trainer": self.sender.send(version, self.phase_deadline_s)}
                    found |= _same(version, *_all(sending | entered))
                else:
                    _all(entered)
            found[f"{phase.value}_s"] = time.monotonic() - started
        return found

    def _compare_probe(self, version: int) -> dict[str, float]:
        probe = self.probe
        lengths = probe.lengths.tolist()
        rows = [tokens[:length] for tokens, length in zip(probe.tokens.tolist(), lengths, strict=True)]
        trainer, by_engine = _all(
            {"the trainer": self.sender.logprobs(probe, 1.0), "the engine": self.receiver.score(rows)}
        )
        ours = trainer[probe.response_mask].float()
        compared = [self._compare(version, ours, _marked(version, probe, scores)) for scores in by_engine]
        return {name: max(found[name] for found in compared) for name in compared[0]}

    def _compare(self, version: int, ours: Tensor, theirs: Tensor) -> dict[str, float]:
        difference = (ours - theirs).abs()
        mean, worst = float(difference.mean()), int(difference.argmax())
        if not mean <= self.probe_tolerance:  # so that not-a-number fails, too
            raise WeightMismatch(
                f"version {version}: the engine does not compute with the weights that it received: the log-probs of "
                f"{len(ours)} probe tokens differ by {mean:.3g} in the mean (at most {self.probe_tolerance:g} allowed) "
                f"and {float(difference[worst]):.3g} at worst (trainer {float(ours[worst]):.6g}, "
                f"engine {float(theirs[worst]):.6g})"
            )
        return {"probe_mean_abs": mean, "probe_max_abs": float(difference[worst])}


def _marked(version: int, probe: TokenRows, scores: Sequence[Sequence[float]]) -> Tensor:
    """[tokens] f32: one engine's log-probs of the probe's marked tokens."""
    lengths = probe.lengths.tolist()
    if [len(score) for score in scores] != lengths:
        raise WeightMismatch(
            f"version {version}: the engine must score {lengths} probe tokens, got {[len(s) for s in scores]}"
        )
    whole = torch.zeros(probe.tokens.shape)
    for row, score in enumerate(scores):
        whole[row, : len(score)] = torch.tensor(score)
    return whole[probe.response_mask]


def _same(version: int, sent: Sequence[PushReceipt], received: Sequence[PushReceipt]) -> dict[str, float]:
    """The bytes of a push of which both sides say the same, worker by worker."""
    if len(sent) != len(received):
        raise WeightMismatch(f"version {version}: the trainer sent to {len(sent)} workers, {len(received)} received")
    for rank, (ours, theirs) in enumerate(zip(sent, received, strict=True)):
        if ours != theirs or ours.version != version:
            raise WeightMismatch(
                f"version {version}: both sides must report the same of each worker of an engine, to rank {rank} the "
                f"trainer sent {ours}, the engine received {theirs}"
            )
    return {
        "bytes": float(sum(receipt.size_bytes for receipt in sent)),
        "tensor_bytes": float(sum(receipt.tensor_bytes for receipt in sent)),
    }


@contextmanager
def _named(phase: str, version: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"in phase {phase} of the push of version {version}; the engine is stale")
        raise


def _all(pending: Mapping[str, Pending[Any]]) -> list[Any]:
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
