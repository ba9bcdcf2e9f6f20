"""Weights between this rank's megatron-core parameters and whole tensors under Hugging Face names."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rl.device import device
from megatron_rl.layout import ParallelLayout
from megatron_rl.mcore.quantised import by_transformer_engine, store
from megatron_rl.mcore.sharded_names import PLAIN_NORMS
from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.coverage import check_coverage, further_layers, head_of
from megatron_rl.weights.plan import HfFiles, Region, TransferPlan, shards_on, transfer_plan
from megatron_rl.weights.safetensors_io import HfFolder
from megatron_rl.weights.weight_map import Head, WeightMap

_log = logging.getLogger(__name__)


def local_parameters(chunks: Sequence[Any]) -> dict[str, Tensor]:
    """The parameters of this rank's pieces of the model, by global name: layers are numbered over the whole model, and
    norms are called the same whether they stand by themselves or in the linear after them.
    """
    found: dict[str, Tensor] = {}
    for chunk in chunks:
        biases = ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith("router.expert_bias"))
        for name, parameter in (*chunk.named_parameters(), *biases):
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[3:] = PLAIN_NORMS.get(".".join(parts[3:]), ".".join(parts[3:])).split(".")
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
    """Fill a rank's pieces of the model from a Hugging Face folder, straight from the parts of its files that it needs.

    A value head keeps its zeros where the folder is a policy's, from which a critic starts.

    Raises:
        ValueError: the weight map and the model disagree on this rank's parameters, the folder on their shapes, or it
            lacks a tensor or has one that the model's family does not know.
    """
    source = HfFolder(folder)
    new_head = head_of(json.loads((folder / "config.json").read_text())) is Head.TOKEN
    left = check_coverage(folder, source.names, weights, new_head=new_head)
    if rank == 0 and (further := further_layers(left, weights)):
        _log.warning(
            "%s: left out %d tensors of layers that predict further tokens: %s ...", folder, len(further), further[0]
        )
    parameters, shards = local_parameters(chunks), shards_on(weights, layout, rank)
    if parameters.keys() != shards.keys():
        lacking, unknown = sorted(parameters.keys() - shards.keys()), sorted(shards.keys() - parameters.keys())
        raise ValueError(
            f"{dims.architecture}: the weight map must name the parameters of rank {rank} of {layout}, it lacks "
            f"{lacking} and names {unknown} that are not there"
        )
    wanted = {shard.name for shard in shards.values()}
    mine = replace(weights, entries=tuple(entry for entry in weights.entries if entry.megatron in wanted))
    tensors = {tensor.entry.megatron: tensor for tensor in transfer_plan(mine, HfFiles(), layout).tensors}
    for name, parameter in parameters.items():
        tensor, holder = tensors[shards[name].name], shards[name].rank
        if new_head and not set(tensor.entry.hf) & source.names:
            continue
        quantised = by_transformer_engine(parameter)
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device()) if quantised else parameter
        for move in tensor.moves:
            if move.target.rank == holder:
                there = move.source
                _part(values, move.target).copy_(source.slice(there.name, there.index, shape=there.shape))
        for region in tensor.padding:
            if region.rank == holder:
                _part(values, region).zero_()
        if quantised:
            store(parameter, values)


def _part(tensor: Tensor, region: Region) -> Tensor:
    """A view of the region."""
    if tuple(tensor.shape) != region.shape:
        raise ValueError(f"{region.name} must have shape {region.shape}, megatron-core has {tuple(tensor.shape)}")
    return tensor.detach()[region.index]


@torch.no_grad()
def full_tensors(
    mine: Mapping[str, Tensor], plan: TransferPlan, layout: ParallelLayout, rank: int
) -> Iterator[tuple[str, Tensor]]:
    """What ``plan`` moves, whole, tensor by tensor; every rank must exhaust the iterator, rank 0 alone gets anything.

    The first holder of each shard sends it to rank 0 once, straight; nobody else receives anything, and padding stays
    where it is.

    Args:
        mine: this rank's shards, as :func:`local_parameters` names them (the parameters, or something of their shapes).
        plan: from ``layout`` to the files.
        layout: of the model.
        rank: of this process.

    Yields:
        Hugging Face name and full tensor, on rank 0.
    """
    dtypes: list[Any] = [None] * layout.world_size
    dist.gather_object({name: tensor.dtype for name, tensor in mine.items()}, dtypes if rank == 0 else None)
    for tensor in plan.tensors:
        name = tensor.entry.megatron
        parts: dict[int | None, Iterator[Tensor]] = {}
        regions: dict[int | None, list[Region]] = {}
        for move in tensor.moves:
            regions.setdefault(move.source.rank, []).append(move.source)
        for holder, theirs in regions.items():
            if holder == rank:
                parts[holder] = iter([_part(mine[name], region) for region in theirs])
            elif rank == 0 and holder is not None:
                parts[holder] = iter(_receive(holder, theirs, dtypes[holder][name]))
        if rank == 0:
            pieces = [(move.target, next(parts[move.source.rank])) for move in tensor.moves]
            for hf, group in groupby(pieces, key=lambda piece: piece[0].name):
                yield hf, _assemble(list(group))
        elif rank in parts:
            _send(list(parts[rank]))


def _send(parts: Sequence[Tensor]) -> None:
    """To rank 0, in one message one behind the other."""
    flat = [part.reshape(-1) for part in parts]
    dist.send(flat[0] if len(flat) == 1 else torch.cat(flat), dst=0)


def _receive(holder: int, regions: Sequence[Region], dtype: torch.dtype) -> list[Tensor]:
    """What ``holder`` sends."""
    sizes = [region.elements for region in regions]
    message = torch.empty(sum(sizes), dtype=dtype, device=device())
    dist.recv(message, src=holder)
    return [part.view(region.region_shape) for part, region in zip(message.split(sizes), regions, strict=True)]


def _assemble(pieces: Sequence[tuple[Region, Tensor]]) -> Tensor:
    """The tensor that the pieces make up; no copy where there is one."""
    region, piece = pieces[0]
    if region.whole:
        return piece
    full = piece.new_empty(region.shape)
    for region, piece in pieces:
        full[region.index] = piece
    return full
