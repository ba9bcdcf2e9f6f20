"""What ranks run to show that megatron-core takes converted checkpoints, and gives ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.distributed.cases import CRITIC, POLICY, Reinforce, Setup, SquaredError, minibatch, start


def metadata() -> dict[str, str]:
    """A new one each time: megatron-core writes its groups into it."""
    return {"distrib_optim_sharding_type": "fully_reshardable"}


def kept_names(rank: int, port: int, model: Path, role: str) -> tuple[set[Any], set[str]]:
    """What megatron-core's own sharded_state_dict says: key, offset and shape of each tensor; keys of other objects."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    worker = start(rank, port, model, Setup(), role)
    state = worker._training.chunks[0].module.sharded_state_dict(metadata=metadata())
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


def loaded(rank: int, port: int, folder: Path, model: Path, setup: Setup, role: str, export: Path) -> None:
    """Load a converted checkpoint with megatron-core's own call into weights of NaN, and export what that gave."""
    from megatron.core import dist_checkpointing

    worker = start(rank, port, model, setup, role)
    chunks = [chunk.module for chunk in worker._training.chunks]
    with torch.no_grad():
        for chunk in chunks:
            for tensor in (*chunk.parameters(), *chunk.buffers()):
                if tensor.is_floating_point() and not tensor.is_inference():
                    tensor.fill_(float("nan"))
    states = {f"model{index}": chunk.sharded_state_dict(metadata=metadata()) for index, chunk in enumerate(chunks)}
    found = dist_checkpointing.load(states, str(folder))
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(found[f"model{index}"])
    worker.export_hf(export, model)
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
