"""Weights between this rank's megatron-core parameters and whole tensors under Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rl.device import device
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.plan import holders, part_of
from megatron_rl.weights.reshard import merge, split
from megatron_rl.weights.safetensors_io import HfFolder
from megatron_rl.weights.weight_map import WeightMap

_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_VALUE_HEAD = "score."


def local_parameters(chunks: Sequence[Any]) -> dict[str, Tensor]:
    """The parameters of this rank's pieces of the model, by global name: layers are numbered over the whole model."""
    found: dict[str, Tensor] = {}
    for chunk in chunks:
        biases = ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith("router.expert_bias"))
        for name, parameter in (*chunk.named_parameters(), *biases):
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
            if "local_experts" in parts:
                place = parts.index("local_experts") + 1
                parts[place] = str(int(parts[place]) + _first_expert(chunk.config))
            found[".".join(parts)] = parameter
    return found


def _first_expert(config: Any) -> int:
    here = int(config.num_moe_experts) // int(parallel_state.get_expert_model_parallel_world_size())
    return here * int(parallel_state.get_expert_model_parallel_rank())


@torch.no_grad()
def load_hf(
    chunks: Sequence[Any], folder: Path, weights: WeightMap, dims: ModelDims, layout: ParallelLayout, rank: int
) -> None:
    """Fill a rank's pieces of the model from a Hugging Face folder; it reads only the tensors that it holds parts of.

    A value head keeps its zeros where the folder has no ``score.*``: a critic starts from a policy's folder.

    Raises:
        ValueError: a parameter has no entry in the weight map, or its shape is not the folder's.
    """
    source = HfFolder(folder)
    entries = {entry.megatron: entry for entry in weights.entries}
    for name, parameter in local_parameters(chunks).items():
        # the last stage of a tied model holds a second copy of the embedding
        entry = entries.get(_EMBEDDING if name == _OUTPUT and name not in entries else name)
        if entry is None:
            raise ValueError(f"{dims.architecture}: the weight map must name every parameter, it lacks {name}")
        if all(hf.startswith(_VALUE_HEAD) for hf in entry.hf) and not set(entry.hf) & source.names:
            continue
        full = weights.to_megatron(entry, [source.tensor(hf) for hf in entry.hf])
        shard = split(full, entry, dims, *part_of(entry, layout, rank))
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{name} must have shape {tuple(parameter.shape)} on rank {rank} of {layout}, "
                f"{folder} gives {tuple(shard.shape)}; check that config.json belongs to its weights"
            )
        parameter.copy_(shard)


@torch.no_grad()
def full_tensors(
    mine: Mapping[str, Tensor], weights: WeightMap, dims: ModelDims, layout: ParallelLayout, rank: int
) -> Iterator[tuple[str, Tensor]]:
    """The whole model, tensor by tensor; every rank must exhaust the iterator, rank 0 alone gets anything.

    Each holder of a shard sends it to rank 0 once, straight; nobody else receives anything.

    Args:
        mine: this rank's shards, as :func:`local_parameters` names them (the parameters, or something of their shapes).
        weights: of the model.
        dims: of the model.
        layout: of the model.
        rank: of this process.

    Yields:
        Hugging Face name and full tensor, on rank 0.
    """
    shapes: list[Any] = [None] * layout.world_size
    dist.gather_object({name: (p.shape, p.dtype) for name, p in mine.items()}, shapes if rank == 0 else None)
    for entry in weights.entries:
        ranks = holders(entry, layout, dims)
        if rank != 0:
            if rank in ranks:
                dist.send(mine[entry.megatron].detach().contiguous(), dst=0)
            continue
        shards = []
        for holder in ranks:
            if holder == 0:
                shards.append(mine[entry.megatron].detach())
                continue
            shape, dtype = shapes[holder][entry.megatron]
            shards.append(torch.empty(shape, dtype=dtype, device=device()))
            dist.recv(shards[-1], src=holder)
        yield from weights.to_hf(entry, merge(shards, entry, dims))
