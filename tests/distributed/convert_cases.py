"""What ranks run to show that megatron-core takes converted checkpoints, and gives ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.distributed.cases import CRITIC, POLICY, Reinforce, Setup, SquaredError, minibatch, start


def metadata() -> dict[str, str]:
    """A new one each time: megatron-core writes its groups into it."""
    return {"distrib_optim_sharding_type": "fully_reshardable"}


def kept_names(
    rank: int, port: int, model: Path, role: str, moe_layer_freq: int | None = None
) -> tuple[set[Any], set[str]]:
    """What megatron-core's own sharded_state_dict says: key, offset and shape of each tensor; keys of other objects.

    ``moe_layer_freq`` is as another program may set it, where our models have a list.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    worker = start(rank, port, model, Setup(), role)
    module = worker._training.chunks[0].module
    if moe_layer_freq is not None:
        module.config.moe_layer_freq = moe_layer_freq
    state = module.sharded_state_dict(metadata=metadata())
    worker.close()
    first_shards = {key: value.key for key, value in state.items() if hasattr(value, "key")}
    apply_factories(state)
    tensors: set[Any] = set()
    objects = set()
    for key, value in state.items():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, ShardedTensor):
                lead = part.global_offset[: part.prepend_axis_num]
                tensors.add((first_shards[key], tuple(lead), tuple(part.global_shape)))
            elif isinstance(part, ShardedObject):
                objects.add(part.unique_key)
    return tensors, objects


def loaded(rank: int, port: int, folder: Path, setup: Setup, role: str, export: Path) -> None:
    """Start from a converted checkpoint, which megatron-core's own call puts into weights of NaN, and export that."""
    from megatron_rl.mcore import worker as module

    load_weights = module.load_weights

    def load(folder: Path, chunks: Sequence[Any]) -> None:
        with torch.no_grad():
            for tensor in (tensor for chunk in chunks for tensor in chunk.parameters()):
                tensor.fill_(torch.nan)
        load_weights(folder, chunks)
        for name, tensor in module.local_parameters(chunks).items():
            assert not tensor.isnan().any(), name  # padding of the vocabulary, too

    module.load_weights = load
    try:
        worker = start(rank, port, folder, setup, role)
    finally:
        module.load_weights = load_weights
    worker.export_hf(export, folder)
    worker.close()


def saved_and_exported(rank: int, port: int, model: Path, setup: Setup, role: str, folder: Path, export: Path) -> None:
    """Train a step, save a checkpoint as training does, and export the same weights."""
    worker = start(rank, port, model, setup, role)
    worker.update(minibatch(), Reinforce() if role == POLICY else SquaredError())
    worker.save(folder)
    worker.written()
    worker.export_hf(export, model)
    worker.close()


__all__ = ["CRITIC", "POLICY", "kept_names", "loaded", "saved_and_exported"]
