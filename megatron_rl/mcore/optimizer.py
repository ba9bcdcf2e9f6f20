"""Gradient buffers, Adam and the learning-rate schedule of one model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rl.config.schema import OptimizerConfig, TrainerConfig


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model with what it takes to train it (megatron-core's objects).

    Attributes:
        model: the model behind megatron-core's DistributedDataParallel.
        optimizer: a MegatronOptimizer.
        scheduler: an OptimizerParamScheduler.
    """

    model: Any
    optimizer: Any
    scheduler: Any


def prepare_training(model: GPTModel, trainer: TrainerConfig, total_updates: int) -> Training:
    """Wrap a model that has its weights already: the optimizer copies them into its float32 main weights.

    Args:
        model: this rank's stage.
        trainer: how it is trained.
        total_updates: optimizer steps of the whole run, for the schedule.
    """
    chunk = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=trainer.distributed_optimizer
        ),
        model,
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    chosen = trainer.optimizer
    dtype = model.config.params_dtype
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
        ),
        [chunk],
        use_gloo_process_groups=False,
    )
    model.config.grad_scale_func = optimizer.scale_loss
    return Training(model=chunk, optimizer=optimizer, scheduler=_schedule(optimizer, chosen, total_updates))


def _schedule(optimizer: Any, chosen: OptimizerConfig, total_updates: int) -> OptimizerParamScheduler:
    """Linear warm-up over W updates, then a cosine that reaches its floor in the last update.

    Update k of the warm-up (from 1) uses ``lr * k / (W + 1)``: the first one moves already, update W + 1 has ``lr``.
    """
    warmup = math.ceil(chosen.warmup_fraction * total_updates)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=chosen.lr / (warmup + 1),
        max_lr=chosen.lr,
        min_lr=chosen.lr * chosen.min_lr_fraction,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(total_updates - 1, warmup + 1),
        lr_decay_style="cosine",
        start_wd=chosen.weight_decay,
        end_wd=chosen.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # a resumed run has the schedule of its settings at the checkpoint's step: it may have been made longer
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
