from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.batches import TokenRows
from megatron_rl.interfaces import PushPhase, PushReceipt
from megatron_rl.weights.sync import CheckedSync, WeightMismatch

PROBE = TokenRows(
    tokens=torch.tensor([[5, 6, 7], [8, 9, 0]]),
    lengths=torch.tensor([3, 2]),
    response_mask=torch.tensor([[False, True, True], [False, True, False]]),
)


@dataclass(frozen=True)
class Done:
    value: Any

    def result(self) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def receipt(version: int) -> PushReceipt:
    return PushReceipt(version=version, tensors=3, slices=2, size_bytes=48, tensor_bytes=80, digest="aa")


@dataclass
class Trainer:
    """Its weights are one number, which is also every log-prob."""

    weight: float = -2.0
    failure: Exception | None = None
    asked: list[Any] = field(default_factory=list)

    def send(self, version: int, deadline_s: float) -> Done:
        self.asked.append(("send", deadline_s))
        return Done(self.failure or (receipt(version), receipt(version)))

    def logprobs(self, batch: TokenRows, temperature: float) -> Done:
        self.asked.append(temperature)
        logprobs: Tensor = torch.where(batch.response_mask, self.weight, 0.0)
        return Done(logprobs)


@dataclass
class Engine:
    trainer: Trainer
    loads: bool = True
    change: dict[str, Any] = field(default_factory=dict)
    weight: float = -1.0
    others: tuple[float, ...] = ()
    failure: Exception | None = None
    fails_in: PushPhase = PushPhase.TRANSFER
    went_through: list[PushPhase] = field(default_factory=list)

    def advance(self, phase: PushPhase, version: int, deadline_s: float) -> Done:
        assert deadline_s == 7.0
        self.went_through.append(phase)
        if self.failure is not None and phase is self.fails_in:
            return Done(self.failure)
        if phase is not PushPhase.TRANSFER:
            return Done(None)
        if self.loads:
            self.weight = self.trainer.weight
        return Done((receipt(version), dataclasses.replace(receipt(version), **self.change)))

    def score(self, rows: Sequence[Sequence[int]]) -> Done:
        assert rows == [[5, 6, 7], [8, 9]]
        engines = [self.weight, *self.others]
        return Done([[[0.0] + [weight] * (len(row) - 1) for row in rows] for weight in engines])


def sync(trainer: Trainer, engine: Engine, probe: TokenRows = PROBE) -> CheckedSync:
    return CheckedSync(sender=trainer, receiver=engine, probe=probe, probe_tolerance=0.05, phase_deadline_s=7.0)


def test_a_good_push_tells_bytes_and_differences() -> None:
    trainer = Trainer()
    engine = Engine(trainer)
    found = sync(trainer, engine).push(4)
    seconds = {name: found.pop(name) for name in [*found] if name.endswith("_s")}
    assert found == {"bytes": 96.0, "tensor_bytes": 160.0, "probe_mean_abs": 0.0, "probe_max_abs": 0.0}
    assert list(seconds) == ["drain_s", "start_s", "transfer_s", "finish_s", "reset_cache_s", "check_s", "commit_s"]
    assert all(0 <= took < 1 for took in seconds.values())
    assert trainer.asked == [("send", 7.0), 1.0]
    assert engine.went_through == list(PushPhase)


@pytest.mark.parametrize("phase", PushPhase)
def test_a_failing_phase_is_named_and_none_follows(phase: PushPhase) -> None:
    trainer = Trainer()
    engine = Engine(trainer, failure=TimeoutError("rank 1 is late"), fails_in=phase)
    with pytest.raises(TimeoutError, match="rank 1 is late") as caught:
        sync(trainer, engine).push(4)
    assert caught.value.__notes__ == [f"in phase {phase.value} of the push of version 4; the engine is stale"]
    assert engine.went_through[-1] is phase


def test_one_engine_among_several_that_differs_is_caught_before_any_commits() -> None:
    trainer = Trainer()
    assert sync(trainer, Engine(trainer, others=(-2.01,))).push(4)["probe_max_abs"] == pytest.approx(0.01, abs=1e-6)
    engine = Engine(trainer, others=(-2.0, -3.0))
    with pytest.raises(WeightMismatch, match="trainer -2, engine -3"):
        sync(trainer, engine).push(4)
    assert PushPhase.COMMIT not in engine.went_through


def test_a_small_difference_is_told_and_allowed() -> None:
    trainer = Trainer()
    engine = Engine(trainer, loads=False, weight=-2.03)
    metrics = sync(trainer, engine).push(4)
    assert metrics["probe_mean_abs"] == pytest.approx(0.03, abs=1e-6)
    assert metrics["probe_max_abs"] == pytest.approx(0.03, abs=1e-6)


def test_an_engine_that_loads_nothing_is_caught_by_the_probe() -> None:
    trainer = Trainer()
    found = (
        r"version 4: .* 3 probe tokens differ by 1 in the mean \(at most 0.05 .* 1 at worst \(trainer -2, engine -1\)"
    )
    with pytest.raises(WeightMismatch, match=found):
        sync(trainer, Engine(trainer, loads=False)).push(4)


def test_log_probs_that_are_no_numbers_are_caught() -> None:
    trainer = Trainer()
    with pytest.raises(WeightMismatch, match="differ by nan"):
        sync(trainer, Engine(trainer, loads=False, weight=math.nan)).push(4)


@pytest.mark.parametrize(
    "change", [{"digest": "bb"}, {"tensors": 2}, {"slices": 1}, {"size_bytes": 40}, {"version": 3}]
)
def test_a_receipt_that_differs_is_caught_with_both_sides_figures(change: dict[str, Any]) -> None:
    trainer = Trainer()
    with pytest.raises(WeightMismatch) as caught:
        sync(trainer, Engine(trainer, change=change)).push(4)
    sent, received = receipt(4), dataclasses.replace(receipt(4), **change)
    assert f"to rank 1 the trainer sent {sent}, the engine received {received}" in str(caught.value)
    assert caught.value.__notes__ == ["in phase transfer of the push of version 4; the engine is stale"]


def test_when_both_sides_fail_both_are_heard() -> None:
    trainer = Trainer(failure=RuntimeError("connection closed"))
    engine = Engine(trainer, failure=ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="connection closed") as caught:
        sync(trainer, engine).push(4)
    assert caught.value.__notes__[0] == "the engine failed, too: ValueError: out of memory"


def test_a_probe_without_tokens_to_compare_is_refused() -> None:
    empty = dataclasses.replace(PROBE, response_mask=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="must mark at least one token"):
        sync(Trainer(), Engine(Trainer()), empty)
