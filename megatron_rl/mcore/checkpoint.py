"""Saving and loading the training state; it loads at any layout, whatever layout saved it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)

from megatron_rl.mcore.optimizer import Training


class SaveInProcess(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """megatron-core's format and planner with torch's own writer, which writes from this process.

    megatron-core's writer starts a multiprocessing Manager by spawn, which imports the main program again and outlives
    a rank that is killed, and forks its writers off a process whose collectives have threads.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Write this rank's shards; rank 0 writes the metadata last."""
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(flat, is_loading=False),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir, thread_count=1),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_checkpoint(folder: Path, training: Training) -> None:
    """Save weights, optimizer and schedule; called on every rank, returns when all have written.

    Raises:
        FileExistsError: the folder exists and is not empty.
    """
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(f"a checkpoint needs an empty folder, found files in {folder}")
    dist.barrier()
    dist_checkpointing.save(_state(training, loading=False), str(folder), sharded_strategy=SaveInProcess())
    dist.barrier()


def load_checkpoint(folder: Path, training: Training) -> None:
    """Load what :func:`save_checkpoint` saved, at this or another layout; called on every rank.

    Raises:
        FileNotFoundError: the folder is not a complete checkpoint.
    """
    if not (folder / "metadata.json").is_file():
        raise FileNotFoundError(f"a checkpoint folder needs a metadata.json, found none in {folder}")
    state = dist_checkpointing.load(_state(training, loading=True), str(folder))
    for name, chunk in _named_chunks(training):
        chunk.module.load_state_dict(state[name])
    training.optimizer.load_state_dict(state["optimizer"])
    training.scheduler.load_state_dict(state["scheduler"])


def _state(training: Training, *, loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        # experts have an optimizer of their own where expert > 1: its name must not get into those of the moments
        "chained_optim_avoid_prefix": True,
        # moments are gathered over the collective backend itself; there is no second set of gloo groups
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    models = {name: chunk.module.sharded_state_dict(metadata=metadata) for name, chunk in _named_chunks(training)}
    return {
        **models,
        "optimizer": training.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata),
        "scheduler": training.scheduler.state_dict(),
    }


def _named_chunks(training: Training) -> Iterator[tuple[str, Any]]:
    """Under the names by which megatron-core's optimizer looks for them; tensors are saved under global names."""
    if len(training.chunks) == 1:
        yield "model", training.chunks[0]
    else:
        yield from ((f"model{index}", chunk) for index, chunk in enumerate(training.chunks))
