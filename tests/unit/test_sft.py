"""The supervised loop by itself: when it saves, and what it waits for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config.schema import CheckpointConfig
from megatron_rl.experience.supervised import SupervisedRows
from megatron_rl.interfaces import UpdateResult
from megatron_rl.maths.losses import SupervisedLoss
from megatron_rl.metrics import MetricLog
from megatron_rl.sft import SupervisedRun, supervise
from tests.fakes import Ready, fake_supervised


@pytest.mark.parametrize(
    ("start", "stop_at", "every", "saves", "updates", "exports"),
    [
        (0, None, 2, [(2, False), (4, False), (5, True)], 5, 1),
        (0, None, 0, [(5, True)], 5, 1),
        (2, None, 2, [(4, False), (5, True)], 3, 1),
        (0, 3, 2, [(2, False), (3, True)], 3, 0),
        (3, 5, 0, [(5, True)], 2, 1),  # asked in the last step: there is nothing left to do but the export
        (5, None, 2, [], 0, 1),
    ],
)
def test_a_stage_saves_when_it_is_due_or_asked_to_stop_and_exports_at_its_end(
    start: int,
    stop_at: int | None,
    every: int,
    saves: list[tuple[int, bool]],
    updates: int,
    exports: int,
    tmp_path: Path,
) -> None:
    saved: list[tuple[int, bool]] = []
    losses: list[Any] = []
    exported: list[None] = []

    def update(minibatch: Any, loss: Any) -> Ready:
        losses.append(loss)
        return Ready(UpdateResult(metrics={"loss": 1.0}, grad_norm=1.0, learning_rate=1e-3))

    class Stop:
        @property
        def asked(self) -> bool:
            return start + len(losses) == stop_at

    def save(step: int, *, wait: bool) -> dict[str, float]:
        saved.append((step, wait))
        return {}

    with MetricLog(tmp_path, total_steps=5, start_step=start) as metrics:
        done = supervise(
            SupervisedRun(
                config=fake_supervised(tmp_path, steps=5, checkpoint=CheckpointConfig(every=every)),
                start_step=start,
                rows=SupervisedRows([([1, 2], [3, 4])]),
                model=SimpleNamespace(update=update),
                loss=SupervisedLoss(),
                checkpoints=SimpleNamespace(save=save),
                stop=Stop(),
                export=lambda: exported.append(None),
                metrics=metrics,
            )
        )
    assert (saved, len(losses), len(exported)) == (saves, updates, exports)
    assert done == (stop_at or 5)
