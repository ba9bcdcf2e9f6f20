"""The check of log-probs tells wrong kernels from right ones, in whatever they are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.gpu_checks import measure
from benchmarks.gpu_checks.case import Case
from megatron_rl.mcore.logprobs import TorchKernels

PARTS = {f"tiny torch: {part}, relative distance from autograd" for part in measure._PARTS}
GRADIENTS = {part for part in PARTS if "gradient" in part}
FORWARD = PARTS - GRADIENTS


@pytest.fixture(autouse=True)
def no_group_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(measure, "seconds", lambda work, rounds=5: 1.0)
    yield
    dist.destroy_process_group()


def missed(folder: Path) -> set[str]:
    """Figures that miss their goal; those of :data:`PARTS` are all there."""
    rows = list(measure.logprobs(Case(gpus=0, asked_gpus=1, scratch=folder)))
    assert {row.what for row in rows} >= PARTS
    return {row.what for row in rows if row.met is False}


def test_right_kernels_pass(tmp_path: Path) -> None:
    assert missed(tmp_path) == set()


def test_wrong_gradients_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = TorchKernels.logit_gradients

    def wrong(self: TorchKernels, *given: Any, **settings: Any) -> torch.Tensor:
        found = right(self, *given, **settings)
        return torch.cat([found[:-8], 1.5 * found[-8:]])

    monkeypatch.setattr(TorchKernels, "logit_gradients", wrong)
    assert missed(tmp_path) == GRADIENTS


@pytest.mark.parametrize(("number", "part"), [(0, "log-probs"), (3, "entropies")])
def test_a_wrong_number_of_a_late_token_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, part: str
) -> None:
    right = TorchKernels.statistics

    def wrong(self: TorchKernels, *given: Any, **settings: Any) -> torch.Tensor:
        found = right(self, *given, **settings)
        found[:, number, -1] += 5.0
        return found

    monkeypatch.setattr(TorchKernels, "statistics", wrong)
    assert f"tiny torch: {part}, relative distance from autograd" in missed(tmp_path)
