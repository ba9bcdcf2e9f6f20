"""What a rank must know to start. Light to import: the driver makes it, the rank's own process loads Megatron."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_rl.config.precision import Gpu, Severity, fp8_problems
from megatron_rl.config.schema import ModelConfig, TrainerConfig
from megatron_rl.device import compute_capability, cuda_version, prepare_megatron
from megatron_rl.mcore.capabilities import lacking, transformer_engine_version
from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.weight_map import Head

if TYPE_CHECKING:
    from megatron_rl.mcore.worker import Worker

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What every rank of a model must know; picklable.

    Attributes:
        role: for messages, such as ``policy``.
        head: TOKEN for a policy, VALUE for a critic.
        model: the folder with the weights that ranks begin with, of Hugging Face or of megatron-core (``torch_dist``);
            and their type.
        dims: of that model.
        trainer: layout, optimizer, memory.
        temperature: the policy's logits are divided by it.
        total_updates: optimizer steps of the whole run, for the learning-rate schedule; None: ranks only score, without
            gradients and an optimizer's states.
        seed: of the random states.
        keep_reference: keep a frozen copy of the initial weights beside the model.
    """

    role: str
    head: Head
    model: ModelConfig
    dims: ModelDims
    trainer: TrainerConfig
    temperature: float
    total_updates: int | None
    seed: int
    keep_reference: bool


def fp8_faults(spec: WorkerSpec) -> list[str]:
    """Which rules of FP8 the model breaks on the device of this process, or what else it lacks; warnings are logged."""
    case = spec.trainer.fp8_case(spec.model, spec.dims)
    if case is None:
        return []
    case = replace(case, gpu=Gpu(capability=compute_capability(), cuda=cuda_version()))
    for warning in fp8_problems(case, Severity.WARNING):
        _log.warning("%s.fp8: %s", spec.role, warning)
    problems = fp8_problems(case)
    if not problems and (lacks := lacking(spec.model.dtype)):
        problems = [f"needs Transformer Engine's layers: {lacks}"]
    return [f"fp8: {problem}" for problem in problems]


def start_worker(spec: WorkerSpec, rank: int, host: str, port: int, timeout_s: float) -> Worker:
    """Make rank ``rank`` in this process; arguments and errors as :class:`~megatron_rl.mcore.worker.Worker`."""
    if spec.trainer.fp8 is not None:
        os.environ.update(spec.trainer.fp8.environment)
    transformer_engine_version()  # half installed, it would end the import of megatron-core with an error of no use
    prepare_megatron()
    from megatron_rl.mcore.worker import Worker

    return Worker(spec, rank=rank, host=host, port=port, timeout_s=timeout_s)
