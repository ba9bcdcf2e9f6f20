"""Bytes of weights, gradients and optimizer states of one rank, to the byte as megatron-core lays them out.

Parameters are those of :func:`megatron_rl.weights.entries.weight_entries`; what is added here is where they lie. A test
holds the result against the real model of :mod:`megatron_rl.mcore.dry_run`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from megatron_rl.config.schema import TrainerConfig
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.entries import Stage, WeightEntry, weight_entries
from megatron_rl.weights.reshard import shard_shape
from megatron_rl.weights.rules import Head
from megatron_rl.weights.shapes import is_float32

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 1}

_REGISTERED = (
    "word_embeddings.weight",
    "input_layernorm.weight",
    "self_attention.linear_proj.weight",
    "self_attention.linear_proj.bias",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_q_proj.weight",
    "self_attention.linear_q_down_proj.weight",
    "self_attention.linear_q_up_proj.weight",
    "self_attention.linear_kv_down_proj.weight",
    "self_attention.linear_kv_up_proj.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "self_attention.kv_layernorm.weight",
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc1.bias",
    "mlp.linear_fc2.weight",
    "mlp.linear_fc2.bias",
    "mlp.experts.",
    "mlp.shared_experts.gate_weight",
    "mlp.shared_experts.linear_fc1.weight",
    "mlp.shared_experts.linear_fc2.weight",
    "final_layernorm.weight",
    "output_layer.weight",
    "output_layer.bias",
)
"""The order in which megatron-core's modules register their parameters, and so in which its buffers hold them."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter on one rank.

    Attributes:
        name: as megatron-core has it, with the global number of its layer.
        elements: of this rank's shard.
        shared_out: whether it belongs to an expert that others do not hold, and so to buffers of its own.
        tied: whether first and last stage each hold a copy, which gets a bucket of its own.
    """

    name: str
    elements: int
    shared_out: bool
    tied: bool


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """What training keeps on one rank between steps, in bytes.

    Attributes:
        parameters: number of elements, without padding.
        weights: parameters; with a distributed optimizer the buffer that holds them, padding included.
        gradients: float32 buffers, padding included.
        optimizer: main weights and both moments on the device.
        host_optimizer: the same in host memory.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    host_optimizer: int


def rank_parameters(
    dims: ModelDims, layout: ParallelLayout, head: Head, rank: int
) -> tuple[tuple[Parameter, ...], ...]:
    """The parameters of each piece of the model on ``rank``, in the order that megatron-core registers them."""
    at = layout.coordinates(rank)
    experts = layout.expert_coordinates(rank)
    return tuple(
        _piece_parameters(dims, layout, head, at.pipeline, piece, experts.expert)
        for piece in range(layout.virtual_pipeline)
    )


@cache  # a search asks for the same rank more than once
def state_bytes(dims: ModelDims, trainer: TrainerConfig, head: Head, rank: int, dtype: str) -> StateBytes:
    """What ``rank`` keeps of a model in training.

    Sources: megatron-core ``_ParamAndGradBuffer`` (order, alignment and buckets), ``DistributedOptimizer`` (each
    replica has an equal part of every bucket), ``Float16OptimizerWithFloat16Params`` (float32 main weights of bfloat16
    parameters); Adam keeps two float32 moments (Kingma and Ba 2015, algorithm 1).
    """
    layout, size = trainer.layout, DTYPE_BYTES[dtype]
    at = layout.coordinates(rank)
    kinds = _replicas(layout, rank)
    parameters = padded = owned = 0
    for piece, held in enumerate(rank_parameters(dims, layout, head, rank)):
        parameters += sum(p.elements for p in held)
        bucketed = trainer.overlap_communication and at.pipeline == 0 and piece == 0
        largest = max(40_000_000, 1_000_000 * kinds[False][0]) if bucketed else None
        for shared_out, (replicas, replica) in kinds.items():
            mine = [p for p in held if p.shared_out is shared_out]
            if not trainer.distributed_optimizer:
                padded += sum(p.elements for p in mine)
                owned += sum(p.elements for p in mine)
                continue
            buckets = _buckets(mine, replicas, largest)
            padded += buckets[-1].stop if buckets else 0
            owned += sum(bucket.owned(replicas, replica) for bucket in buckets)
    kept = 12 if dtype == "bfloat16" or trainer.optimizer_on_host else 8
    return StateBytes(
        parameters=parameters,
        weights=size * padded,
        gradients=4 * padded,
        optimizer=0 if trainer.optimizer_on_host else kept * owned,
        host_optimizer=kept * owned if trainer.optimizer_on_host else 0,
    )


def _replicas(layout: ParallelLayout, rank: int) -> dict[bool, tuple[int, int]]:
    """How many ranks hold the same parameters as ``rank``, and which of them it is; by ``shared_out``."""
    at = layout.coordinates(rank)
    stage_ranks, sharing = layout.tensor * layout.context * layout.data, layout.expert * layout.expert_tensor
    return {
        False: (layout.data * layout.context, at.data * layout.context + at.context),
        True: (stage_ranks // sharing, rank % stage_ranks // sharing),
    }


@cache
def exchanged_parameters(dims: ModelDims, layout: ParallelLayout, head: Head, rank: int) -> float:
    """Elements that ``rank`` sends once its gradients are summed over all that hold the same parameters, each of which
    keeps the sum of an equal part: ``(n - 1) / n`` of those with ``n`` copies. Experts have fewer copies than the rest.
    """
    kinds = _replicas(layout, rank)
    held = (p for piece in rank_parameters(dims, layout, head, rank) for p in piece)
    return sum(p.elements * (1 - 1 / kinds[p.shared_out][0]) for p in held)


@cache
def total_parameters(dims: ModelDims, head: Head) -> int:
    """Elements of the whole model."""
    return sum(p.elements for piece in rank_parameters(dims, ParallelLayout(), head, 0) for p in piece)


@cache
def _by_layer(dims: ModelDims, head: Head) -> dict[int | None, tuple[WeightEntry, ...]]:
    groups: dict[int | None, list[WeightEntry]] = {}
    trained = (entry for entry in weight_entries(dims, head) if not is_float32(entry))  # the others are buffers
    for entry in sorted(trained, key=_order):
        groups.setdefault(entry.layer, []).append(entry)
    return {layer: tuple(entries) for layer, entries in groups.items()}


def _order(entry: WeightEntry) -> tuple[int, int, int, int]:
    place = next((i for i, part in enumerate(_REGISTERED) if part in entry.megatron), None)
    if place is None:
        raise ValueError(f"{entry.megatron}: its place must be in megatron_rl/planner/states.py, found none")
    return (
        -1 if entry.layer is None else entry.layer,
        place,
        -1 if entry.expert is None else entry.expert,
        int("linear_fc2" in entry.megatron),
    )


@cache
def _piece_parameters(
    dims: ModelDims, layout: ParallelLayout, head: Head, stage: int, piece: int, expert_group: int
) -> tuple[Parameter, ...]:
    last = layout.pipeline - 1
    first_piece, last_piece = stage == 0 and piece == 0, stage == last and piece == layout.virtual_pipeline - 1
    tied = dims.tied_embeddings and head is Head.TOKEN and layout.pipeline > 1
    outside = _by_layer(dims, head)[None]
    found = []
    if first_piece:
        found += [_parameter(e, dims, layout, tied=tied) for e in outside if e.stage is Stage.FIRST]
    per_piece = dims.layers // layout.virtual_pipeline
    axes = (layout.tensor, layout.expert_tensor, layout.expert, expert_group)
    for layer in range(piece * per_piece, (piece + 1) * per_piece):
        if layout.stage_of_layer(layer, dims.layers) == stage:
            found += _layer_parameters(dims, head, layer, *axes)
    if last_piece:
        found += [_parameter(e, dims, layout) for e in outside if e.stage is Stage.LAST]
        if tied:
            found += [_parameter(e, dims, layout, tied=True) for e in outside if e.stage is Stage.FIRST]
    return tuple(found)


@cache  # other stages and replicas of a search hold the same layers
def _layer_parameters(
    dims: ModelDims, head: Head, layer: int, tensor: int, expert_tensor: int, expert: int, expert_group: int
) -> tuple[Parameter, ...]:
    layout = ParallelLayout(tensor=tensor, expert_tensor=expert_tensor, expert=expert)
    experts = 0 if dims.experts is None else dims.experts.count // expert
    mine = range(expert_group * experts, (expert_group + 1) * experts)
    held = (e for e in _by_layer(dims, head)[layer] if e.expert is None or e.expert in mine)
    return tuple(_parameter(e, dims, layout) for e in held)


def _parameter(entry: WeightEntry, dims: ModelDims, layout: ParallelLayout, *, tied: bool = False) -> Parameter:
    ranks = layout.tensor if entry.expert is None else layout.expert_tensor
    return Parameter(
        name=entry.megatron,
        elements=_elements(_alike(entry), dims, ranks),
        shared_out=entry.expert is not None and layout.expert > 1,
        tied=tied,
    )


@cache
def _alike(entry: WeightEntry) -> WeightEntry:
    """One entry for all that differ in their layer and expert alone, and so have one shape."""
    if entry.layer is None:
        return entry
    tail = entry.megatron.removeprefix(f"decoder.layers.{entry.layer}.").replace(f".{entry.expert}.", ".")
    return replace(entry, megatron=tail, hf=(), layer=0, expert=None if entry.expert is None else 0)


@cache
def _elements(entry: WeightEntry, dims: ModelDims, ranks: int) -> int:
    return math.prod(shard_shape(entry, dims, ranks))


@dataclass(frozen=True)
class _Bucket:
    """A run of a buffer with the parameters in it, as (start, stop)."""

    start: int
    stop: int
    parameters: tuple[tuple[int, int], ...]

    def owned(self, replicas: int, replica: int) -> int:
        """Elements of parameters in this replica's part of the bucket."""
        part = (self.stop - self.start) // replicas
        low, high = self.start + replica * part, self.start + (replica + 1) * part
        return sum(max(0, min(stop, high) - max(start, low)) for start, stop in self.parameters)


def _buckets(parameters: Sequence[Parameter], replicas: int, largest: int | None) -> list[_Bucket]:
    """Where a distributed optimizer's buffer holds its parameters: last first, each from a multiple of 64, in buckets
    that end at a multiple of replicas and of 128.
    """
    multiple = math.lcm(replicas, 128)
    found: list[_Bucket] = []
    inside: list[tuple[int, int]] = []
    start = stop = 0

    def close(end: int) -> int:
        nonlocal start
        end = -(-end // multiple) * multiple
        found.append(_Bucket(start, end, tuple(inside)))
        inside.clear()
        start = end
        return end

    for parameter in reversed(parameters):
        begin = -(-stop // 64) * 64
        if parameter.tied and inside:
            begin = close(begin)
        stop = begin + parameter.elements
        inside.append((begin, stop))
        if parameter.tied or (largest is not None and stop - start >= largest):
            stop = close(stop)
    if inside:
        close(stop)
    return found
