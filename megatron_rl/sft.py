"""The supervised stage: next-token loss on responses, with the engine that PPO trains with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_rl.batches import TokenRows
from megatron_rl.experience.batching import whole
from megatron_rl.interfaces import SupervisedModel, SupervisedTokenLoss
from megatron_rl.metrics import MetricLog


@dataclass(frozen=True, kw_only=True)
class SupervisedRun:
    """Everything the stage uses."""

    batches: Iterable[TokenRows]
    model: SupervisedModel
    loss: SupervisedTokenLoss
    export: Callable[[], object]
    metrics: MetricLog


def supervise(run: SupervisedRun) -> None:
    """One optimizer step per batch, then export the model."""
    for step, rows in enumerate(run.batches):
        with run.metrics.step(step) as log, log.phase("update"):
            log.update("model", run.model.update(whole(rows), run.loss).result().as_metrics())
    run.export()
