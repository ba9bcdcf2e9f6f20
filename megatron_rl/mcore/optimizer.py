"""Gradient buffers, Adam and the learning-rate schedule of one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rl.config.schema import OptimizerConfig, TrainerConfig
from megatron_rl.mcore.fp8 import ddp_fields, optimizer_fields
from megatron_rl.mcore.groups import needs_host_groups
from megatron_rl.mcore.host_optimizer import start_moments


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model with what it takes to train it (megatron-core's objects).

    Attributes:
        chunks: this rank's pieces of the model, each behind megatron-core's DistributedDataParallel; one, but for
            virtual pipelines.
        optimizer: a MegatronOptimizer.
        scheduler: an OptimizerParamScheduler.
    """

    chunks: Sequence[Any]
    optimizer: Any
    scheduler: Any


def prepare_training(models: Sequence[GPTModel], trainer: TrainerConfig, total_updates: int) -> Training:
    """Wrap models that have their weights already: the optimizer copies them into its float32 main weights.

    Args:
        models: this rank's pieces of the model, which share one configuration.
        trainer: how they are trained.
        total_updates: optimizer steps of the whole run, for a schedule that does not say itself how long it is.
    """
    return add_optimizer(add_gradients(models, trainer), trainer, total_updates)


def add_gradients(models: Sequence[GPTModel], trainer: TrainerConfig) -> list[DistributedDataParallel]:
    """The first half of :func:`prepare_training`: gradient buffers, and with a distributed optimizer a buffer that the
    weights move to, which takes their bytes twice until they are there.
    """
    config = models[0].config
    overlap = trainer.overlap_communication
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=trainer.distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and trainer.distributed_optimizer,
        **ddp_fields(trainer.fp8),
    )
    chunks = [
        # the first piece's gradients come last: only its buckets are worth overlapping with the backward pass
        DistributedDataParallel(config, ddp, model, disable_bucketing=index > 0)
        for index, model in enumerate(models)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if overlap:
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return chunks


def add_optimizer(chunks: list[DistributedDataParallel], trainer: TrainerConfig, total_updates: int) -> Training:
    """The second half of :func:`prepare_training`."""
    chosen, ddp, config = trainer.optimizer, chunks[0].ddp_config, chunks[0].config
    dtype = config.params_dtype
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=chosen.lr,
            min_lr=chosen.lr * chosen.min_lr_fraction,
            weight_decay=chosen.weight_decay,
            adam_beta1=chosen.beta1,
            adam_beta2=chosen.beta2,
            adam_eps=chosen.eps,
            clip_grad=chosen.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=trainer.distributed_optimizer,
            overlap_param_gather=ddp.overlap_param_gather,
            optimizer_cpu_offload=trainer.optimizer_on_host,
            optimizer_offload_fraction=float(trainer.optimizer_on_host),
            # main weights belong to the inner optimizer, which then reads gradients where they are
            use_precision_aware_optimizer=trainer.optimizer_on_host,
            **optimizer_fields(trainer.fp8),
        ),
        chunks,
        use_gloo_process_groups=needs_host_groups(),
    )
    # so that a model is saved and loaded alike before its first update: the policy, while the critic warms up
    for part in optimizer_parts(optimizer):
        if not part.is_stub_optimizer:
            start_moments(part.optimizer)
        if trainer.distributed_optimizer and not needs_host_groups():
            part.data_parallel_group_gloo = part.data_parallel_group
    optimizer.get_grad_norm = partial(_finite_norm, optimizer.get_grad_norm)
    config.grad_scale_func = optimizer.scale_loss
    return Training(chunks=chunks, optimizer=optimizer, scheduler=_schedule(optimizer, chosen, total_updates))


def _finite_norm(norm: Callable[[], float]) -> float:
    """What megatron-core's step asks for between gathering gradients and applying them: without a scaler of gradients
    it would apply whatever it is given.
    """
    found = norm()
    if not math.isfinite(found):
        raise FloatingPointError(
            f"an update needs finite gradients, found one of norm {found}; the weights are as they were. Look for "
            "the first number among the metrics that is not finite, mend its cause and resume from a checkpoint"
        )
    return found


def optimizer_parts(optimizer: Any) -> Sequence[Any]:
    """The optimizers that megatron-core chained: one, and where experts are shared out another one for those."""
    chained: Sequence[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return chained


def gradient_buffers(training: Training) -> list[Any]:
    """Of all pieces of the model, those of shared-out experts behind the others of their piece."""
    return [buffer for chunk in training.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def release(training: Training) -> None:
    """End a training for good: backward hooks hold what wraps the model, and are held through autograd by parameters'
    main weights and by tensors that layers keep. Python's collector does not see these circles: nothing in them, the
    process groups and their threads included, would ever be freed.
    """
    for chunk in training.chunks:
        for parameter in chunk.parameters():
            parameter.main_param = None
        vars(chunk).clear()


def gather_parameters(training: Training) -> None:
    """Bring every parameter up to date on every rank; called on all of them.

    With the gather of parameters overlapped, a step leaves the other replicas' shards of the distributed optimizer to
    the hooks of the next forward pass: whoever reads parameters outside one would read old ones. What backward passes
    read of FP8 parameters, their columns, is made of what was gathered. megatron-core 0.16 leaves that to hooks as
    well, which then find nothing left to wait for and would compute with old columns.
    """
    for chunk in training.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
            if gathered := [parameter for parameter in chunk.parameters() if is_float8tensor(parameter)]:
                post_all_gather_processing(gathered)


def _schedule(optimizer: Any, chosen: OptimizerConfig, total_updates: int) -> OptimizerParamScheduler:
    """Linear warm-up over W updates, then a cosine that reaches its floor in the last update.

    Update k of the warm-up (from 1) uses ``lr * k / (W + 1)``: the first one moves already, update W + 1 has ``lr``.
    With ``warmup_from_zero`` it is ``lr * (k - 1) / W``, and the floor would be reached by one update more.
    """
    total_updates = chosen.schedule_updates or total_updates
    warmup = math.ceil(chosen.warmup_fraction * total_updates)
    first, last = (0.0, total_updates) if chosen.warmup_from_zero else (chosen.lr / (warmup + 1), total_updates - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=first,
        max_lr=chosen.lr,
        min_lr=chosen.lr * chosen.min_lr_fraction,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(last, warmup + 1),
        lr_decay_style="cosine",
        start_wd=chosen.weight_decay,
        end_wd=chosen.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # a resumed run has the schedule of its settings at the checkpoint's step: it may have been made longer
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
