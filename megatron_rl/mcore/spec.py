"""What a rank must know to start. Light to import: the driver makes it, the rank's own process loads Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rl.config.schema import ModelConfig, TrainerConfig
from megatron_rl.device import prepare_megatron
from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.weight_map import Head

if TYPE_CHECKING:
    from megatron_rl.mcore.worker import Worker


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
        total_updates: optimizer steps of the whole run, for the learning-rate schedule.
        seed: of the random states.
        keep_reference: keep a frozen copy of the initial weights beside the model.
    """

    role: str
    head: Head
    model: ModelConfig
    dims: ModelDims
    trainer: TrainerConfig
    temperature: float
    total_updates: int
    seed: int
    keep_reference: bool


def start_worker(spec: WorkerSpec, rank: int, host: str, port: int, timeout_s: float) -> Worker:
    """Make rank ``rank`` in this process; arguments and errors as :class:`~megatron_rl.mcore.worker.Worker`."""
    prepare_megatron()
    from megatron_rl.mcore.worker import Worker

    return Worker(spec, rank=rank, host=host, port=port, timeout_s=timeout_s)
