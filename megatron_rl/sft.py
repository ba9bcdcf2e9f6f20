"""The supervised stage: next-token loss on responses, with the engine that PPO trains with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_rl.config.schema import SFTConfig, due
from megatron_rl.experience.batching import whole
from megatron_rl.experience.supervised import SupervisedRows
from megatron_rl.interfaces import Checkpoints, StopRequest, SupervisedModel, SupervisedTokenLoss
from megatron_rl.metrics import MetricLog


@dataclass(frozen=True, kw_only=True)
class SupervisedRun:
    """Everything the stage uses."""

    config: SFTConfig
    start_step: int
    rows: SupervisedRows
    model: SupervisedModel
    loss: SupervisedTokenLoss
    checkpoints: Checkpoints
    stop: StopRequest
    export: Callable[[], object]
    metrics: MetricLog


def supervise(run: SupervisedRun) -> int:
    """One optimizer step per batch from ``run.start_step`` on; then export the model, unless asked to stop before.

    Returns:
        steps done.
    """
    cfg = run.config
    for step in range(run.start_step, cfg.steps):
        with run.metrics.step(step) as log:
            with log.phase("update"):
                rows = run.rows.take(cfg.samples_per_step)
                log.update("model", run.model.update(whole(rows), run.loss).result().as_metrics())
            if (stopping := run.stop.asked) or due(step, cfg.checkpoint.every, cfg.steps):
                with log.phase("checkpoint"):
                    last = stopping or step + 1 == cfg.steps
                    log.update("checkpoint", run.checkpoints.save(step + 1, wait=last))
        if stopping and step + 1 < cfg.steps:
            return step + 1
    run.export()
    return max(run.start_step, cfg.steps)
