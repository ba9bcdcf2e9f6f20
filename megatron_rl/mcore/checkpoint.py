"""Saving and loading the training state; it loads at any layout, whatever layout saved it.

A save has two halves. :func:`stage_checkpoint` does all that needs the other ranks, and copies this rank's state to
host memory; training may go on once it returns. :meth:`StagedCheckpoint.write` then needs nobody and touches no tensor:
it may run in a thread beside training, whose collectives it cannot disturb.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing, fp8_utils, parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystemBase

from megatron_rl.durable import FileRecord, flush, read_record, write_file
from megatron_rl.mcore.optimizer import Training, gradient_buffers, optimizer_parts
from megatron_rl.mcore.quantised import by_transformer_engine, plain_values, store
from megatron_rl.mcore.sharded_names import kept_key

_OPTIMIZER, _FORMAT = "optimizer_tensors", "metadata.json"
_EXTRA = "_extra_state"
"""What modules keep beside their tensors: scales of ``delayed``, nothing otherwise. Which modules do differs between
Transformer Engine's and megatron-core's, so it is written for others and not read."""


class _HostMemory(FileSystemBase):
    """A file system for torch's writer, which thereby serialises into buffers of this process."""

    def __init__(self) -> None:
        self.files: dict[Path, io.BytesIO] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        stream = self.files[Path(path)] = _Kept()
        yield stream

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> Path:
        return Path(path) / suffix

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self.files[Path(new_path)] = self.files.pop(Path(path))

    def init_path(self, path: str | os.PathLike[str]) -> Path:
        return Path(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """There are no folders in it."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return Path(path) in self.files

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        del self.files[Path(path)]


class _Kept(io.BytesIO):
    """A buffer that outlives its ``close``, which torch's writer calls."""

    def close(self) -> None: ...


class SaveToMemory(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """megatron-core's format and planner with torch's own writer, in this process and into its memory.

    megatron-core's writer starts a multiprocessing Manager by spawn, which imports the main program again and outlives
    a rank that is killed, and forks its writers off a process whose collectives have threads.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.memory = _HostMemory()

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Serialise this rank's shards; on rank 0 the metadata of all of them, too. FP8 parameters go as plain numbers:
        pickled as they are, only Transformer Engine could read them.
        """
        for part in nested_values(sharded_state_dict):  # each to the host at once: together they are a second model
            if isinstance(part, ShardedTensor) and fp8_utils.is_float8tensor(part.data):
                part.data = fp8_utils.dequantize_fp8_tensor(part.data).cpu()
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        # copied ahead, what comes from a GPU would be pinned, each tensor rounded up to a power of two, and stay so
        writer = torch_checkpoint.FileSystemWriter(
            checkpoint_dir, thread_count=1, sync_files=False, per_thread_copy_ahead=0
        )
        writer.fs = self.memory  # type: ignore[assignment]
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(flat, is_loading=False),
            storage_writer=writer,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


@dataclass(frozen=True, kw_only=True)
class StagedCheckpoint:
    """This rank's part of a checkpoint, in host memory.

    Attributes:
        folder: of the model in the checkpoint; it exists.
        files: content by name.
        leads: this rank answers for what megatron-core wrote there by itself (the schedule, the format's version).
    """

    folder: Path
    files: Mapping[str, memoryview]
    leads: bool

    def write(self) -> dict[str, FileRecord]:
        """Put it on the disk, flushed; what was written, by name.

        Raises:
            OSError: the disk does not take it, for instance because it is full.
        """
        written = {name: write_file(self.folder / name, content) for name, content in self.files.items()}
        if self.leads:
            # newer releases keep what is not a tensor among the tensors, and write no common.pt
            for path in filter(Path.is_file, (self.folder / "common.pt", self.folder / "metadata.json")):
                flush(path)
                written[path.name] = read_record(path)
        flush(self.folder)
        return written


def stage_checkpoint(folder: Path, training: Training) -> StagedCheckpoint:
    """Copy weights, optimizer and schedule to host memory; called on every rank. Costs one copy of the rank's state.

    Random states are left out: nothing in training draws from them (there is no dropout; the engine's seeds and the
    order of rows follow from the run's seed and the step).

    Raises:
        FileExistsError: the folder exists and is not empty.
        ValueError: main weights are described that are not those of the weights.
    """
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(f"a checkpoint needs an empty folder, found files in {folder}")
    dist.barrier()
    strategy = SaveToMemory()
    models = _models(_modules(training))
    # tensors alone, under global names: the settings beside them are nested by how many optimizers there are, and name
    # the optimizer's class; those of the run that loads take their place
    optimizer = _optimizer(training, models, loading=False)
    if wrong := _wrong_main_weights(training, optimizer, by_transformer_engine):
        raise ValueError(
            f"the main weights to be saved must round to the weights, those of {len(wrong)} parameter(s) do not, "
            f"{wrong[0]} first: megatron-core cut them from the wrong place, and moments with them. Nothing was saved; "
            "turn distributed_optimizer off, or take a release of megatron-core that is supported"
        )
    tensors, _ = extract_matching_values(optimizer, _is_saved)
    state = {**models, _OPTIMIZER: tensors, "scheduler": training.scheduler.state_dict()}
    dist_checkpointing.save(state, str(folder), sharded_strategy=strategy)
    files = {path.name: buffer.getbuffer() for path, buffer in strategy.memory.files.items()}
    return StagedCheckpoint(folder=folder, files=files, leads=dist.get_rank() == 0)


def load_checkpoint(folder: Path, training: Training) -> None:
    """Load what :func:`stage_checkpoint` staged, at this or another layout; called on every rank.

    Raises:
        FileNotFoundError: the folder is not a complete checkpoint.
        ValueError: its main weights are not those of its weights.
    """
    modules = _modules(training)
    models = _models(modules)
    wanted = _optimizer(training, models, loading=True)
    _, settings = extract_matching_values(wanted, _is_loaded)
    state = _load_models(folder, modules, models)
    # by itself: the main weights of a float32 model are its weights, which nobody may ask for twice
    optimizer = merge(dist_checkpointing.load({_OPTIMIZER: wanted}, str(folder))[_OPTIMIZER], settings)
    # the run that saved may have kept matrices in FP8, and their weights are what that left of them
    if wrong := _wrong_main_weights(training, optimizer, lambda parameter: parameter.dim() > 1):
        raise ValueError(
            f"{folder}: main weights must round to the weights, those of {len(wrong)} parameter(s) do not, {wrong[0]} "
            "first. It was saved before that was checked, by a distributed optimizer with padding between its buckets. "
            "Its weights are right, the optimizer's states are not: start a new run with model.path at the hf folder "
            "beside it; a critic begins anew there (ppo.critic_warmup_steps)"
        )
    for _, part in _by_part(training, optimizer):
        for group in part.get("optimizer", part)["param_groups"]:
            group["step"] = state["scheduler"]["num_steps"]  # both count updates
    training.optimizer.load_state_dict(optimizer)
    training.scheduler.load_state_dict(state["scheduler"])


def holds_weights(folder: Path) -> bool:
    """Whether a folder is one that :func:`load_weights` reads."""
    return (folder / _FORMAT).is_file()


def load_weights(folder: Path, models: Sequence[Any]) -> None:
    """Load a model without an optimizer, at any layout: what the conversion from Hugging Face wrote, a part of a
    training checkpoint, or what another program saved, whose norms may have other names; called on every rank. Rows of
    the vocabulary that the folder has not become zero.

    Args:
        folder: in megatron-core's ``torch_dist`` format.
        models: this rank's pieces of the model, unwrapped.

    Raises:
        FileNotFoundError: the folder is not a complete checkpoint.
        CheckpointingException: it lacks a tensor, or has it in another shape.
    """
    state = _load_models(folder, models, _models(models))
    for name, model in _named(models):
        for key, parameter in model.named_parameters():
            if by_transformer_engine(parameter):
                store(parameter, state[name][key])


def _load_models(folder: Path, models: Sequence[Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Fill the models; all that was read."""
    if not holds_weights(folder):
        raise FileNotFoundError(f"a checkpoint folder needs a {_FORMAT}, found none in {folder}")
    tensors = {name: {key: part for key, part in each.items() if _EXTRA not in key} for name, each in wanted.items()}
    keys = dist_checkpointing.load_tensors_metadata(str(folder)).keys()
    for tensor in nested_values(tensors):
        tensor.key = kept_key(tensor.key, keys)
    state: dict[str, Any] = dist_checkpointing.load(tensors, str(folder))
    for name, model in _named(models):
        lacking = model.load_state_dict(state[name], strict=False)
        if found := [key for key in (*lacking.missing_keys, *lacking.unexpected_keys) if _EXTRA not in key]:
            raise ValueError(f"{folder}: the checkpoint and the model must name the same tensors, differ in {found}")
    return state


def _is_saved(value: Any) -> bool:
    """Whether a value belongs to the optimizer's tensors; a float32 model's main weights go as its weights."""
    return isinstance(value, ShardedBase) and value.key.startswith("optimizer.")


def _is_loaded(value: Any) -> bool:
    """Whether loading puts a value in its place: from the checkpoint, or as this process has it."""
    return isinstance(value, ShardedBase | LocalNonpersistentObject)


def _models(models: Sequence[Any]) -> dict[str, Any]:
    return {name: model.sharded_state_dict(metadata=_metadata()) for name, model in _named(models)}


def _modules(training: Training) -> list[Any]:
    return [chunk.module for chunk in training.chunks]


def _optimizer(training: Training, models: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    """megatron-core's description of moments and main weights, the latter by one name whatever the optimizer."""
    with _ranges_without_padding(training):
        found: dict[str, Any] = training.optimizer.sharded_state_dict(models, is_loading=loading, metadata=_metadata())
    main = "" if training.chunks[0].module.config.params_dtype == torch.float32 else "optimizer.state.fp32_param."
    for value in nested_values(found):
        if isinstance(value, ShardedBase) and value.key.startswith("optimizer.state.param."):
            value.key = main + value.key.removeprefix("optimizer.state.param.")
    return found


@contextmanager
def _ranges_without_padding(training: Training) -> Iterator[None]:
    """Let gradient buffers say where parameters lie in the states that megatron-core gathers, which are without the
    padding that buckets end in.

    Its releases up to 0.19.2 cut them by ranges that count that padding: whatever lies behind a padded bucket would be
    saved from the wrong place. Later ones take it off first, by the number of the bucket; here all are in the first,
    before which there is none.
    """
    buffers = gradient_buffers(training)
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer, ranges in zip(buffers, padded, strict=True):
        before, packed = [], 0  # padding before each bucket; numbers up to it
        for (start, _), bucket in zip(buffer.bucket_indices, buffer.buckets, strict=True):
            before.append(start - packed)
            packed += bucket.numel_unpadded
        buffer.param_index_map = {
            parameter: (start - before[index], end - before[index], 0)
            for parameter, (start, end, index) in ranges.items()
        }
    try:
        yield
    finally:
        for buffer, ranges in zip(buffers, padded, strict=True):
            buffer.param_index_map = ranges


def _wrong_main_weights(
    training: Training, optimizer: Mapping[Any, Any], in_fp8: Callable[[torch.Tensor], bool]
) -> list[str]:
    """Parameters whose main weights, as described or loaded, are not those that the weights were rounded from, to FP8
    where they may be ``in_fp8``. Moments are cut by the same ranges.
    """
    names = {parameter: name for model in _modules(training) for name, parameter in model.named_parameters()}
    return [
        names[parameter]
        for parameter, main in _mains(training, optimizer)
        if not _rounds_to(main.data, parameter, in_fp8=in_fp8(parameter))
    ]


def _mains(training: Training, optimizer: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Parameters with their main weights, where an optimizer has any and this rank has them whole."""
    for part, state in _by_part(training, optimizer):
        if states := state.get("param_state"):
            parameters = (parameter for buffer in part.buffers for parameter in buffer.param_index_map)
            yield from ((parameter, states[index]["param"]) for index, parameter in enumerate(parameters))
        for group, mains in enumerate(state.get("fp32_from_fp16_params", ())):
            yield from zip(part.float16_groups[group], mains, strict=True)


def _rounds_to(main: torch.Tensor, parameter: Any, *, in_fp8: bool) -> bool:
    weights = plain_values(parameter).detach().to(main.device)
    if in_fp8:  # which keeps three bits after the first: each number to a sixteenth
        return bool((main - weights).norm() <= main.norm() / 8)
    return torch.equal(main.to(weights.dtype), weights)


def _by_part(training: Training, optimizer: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """megatron-core's optimizers, each with what a description or state of all has of it."""
    parts = optimizer_parts(training.optimizer)
    return zip(parts, [optimizer] if len(parts) == 1 else optimizer.values(), strict=True)


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        # experts have an optimizer of their own where expert > 1: its name must not get into those of the moments
        "chained_optim_avoid_prefix": True,
        # moments and main weights of all replicas go to the first one, on the host: else to every one, on its GPU,
        # where there is no room for 8 to 12 B per parameter beside the model
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _named(models: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Under the names by which megatron-core's optimizer looks for them; tensors are saved under global names."""
    if len(models) == 1:
        yield "model", models[0]
    else:
        yield from ((f"model{index}", model) for index, model in enumerate(models))
