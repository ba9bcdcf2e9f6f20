"""Bytes of weights, gradients and optimizer states of one rank, to the byte as megatron-core lays them out.

Parameters are those of :func:`megatron_rl.weights.entries.weight_entries`; what is added here is where they lie. A test
holds the result against the real model of :mod:`megatron_rl.mcore.dry_run`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile

from megatron_rl.config.schema import TrainerConfig
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.entries import Stage, WeightEntry, weight_entries
from megatron_rl.weights.reshard import shard_shape
from megatron_rl.weights.rules import Head, Split
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
        elements: of this rank's shard.
        shared_out: whether it belongs to an expert that others do not hold, and so to buffers of its own.
        tied: whether first and last stage each hold a copy, which gets a bucket of its own.
    """

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
        start: most of weights and gradients at once while the buffers are made: where a distributed optimizer has one
            for the weights, those that it has not copied yet lie beside it.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    host_optimizer: int
    start: int


def rank_parameters(
    dims: ModelDims, layout: ParallelLayout, head: Head, rank: int
) -> tuple[tuple[Parameter, ...], ...]:
    """The parameters of each piece of the model on ``rank``, in the order that megatron-core registers them."""
    stage = layout.coordinates(rank).pipeline
    return tuple(_piece_parameters(dims, layout, head, stage, piece) for piece in range(layout.virtual_pipeline))


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
    pieces = rank_parameters(dims, layout, head, rank)
    parameters = sum(p.elements for held in pieces for p in held)
    padded = owned = start = 0
    outside = parameters  # of the buffer for weights
    for piece, held in enumerate(pieces):
        bucketed = trainer.overlap_communication and at.pipeline == 0 and piece == 0
        largest = max(40_000_000, 1_000_000 * kinds[False][0]) if bucketed else None
        for shared_out, (replicas, replica) in kinds.items():
            mine = [p for p in held if p.shared_out is shared_out]
            elements = sum(p.elements for p in mine)
            if not trainer.distributed_optimizer:
                padded += elements
                owned += elements
                start = (size + 4) * padded
                continue
            buckets = _buckets(mine, replicas, largest)
            padded += buckets[-1].stop if buckets else 0
            owned += sum(bucket.owned(replicas, replica) for bucket in buckets)
            start = max(start, size * outside + (size + 4) * padded)
            outside -= elements
    kept = 12 if dtype == "bfloat16" or trainer.optimizer_on_host else 8
    return StateBytes(
        parameters=parameters,
        weights=size * padded,
        gradients=4 * padded,
        optimizer=0 if trainer.optimizer_on_host else kept * owned,
        host_optimizer=kept * owned if trainer.optimizer_on_host else 0,
        start=start,
    )


def _replicas(layout: ParallelLayout, rank: int) -> dict[bool, tuple[int, int]]:
    """How many ranks hold the same parameters as ``rank``, and which of them it is; by ``shared_out``."""
    at = layout.coordinates(rank)
    stage_ranks, sharing = layout.tensor * layout.context * layout.data, layout.expert * layout.expert_tensor
    return {
        False: (layout.data * layout.context, at.data * layout.context + at.context),
        True: (stage_ranks // sharing, rank % stage_ranks // sharing),
    }


def exchanged_parameters(dims: ModelDims, layout: ParallelLayout, head: Head, rank: int) -> float:
    """Elements that ``rank`` sends once its gradients are summed over all that hold the same parameters, each of which
    keeps the sum of an equal part: ``(n - 1) / n`` of those with ``n`` copies. Experts have fewer copies than the rest.
    """
    kinds, held = _replicas(layout, rank), stage_elements(dims, layout, head, layout.coordinates(rank).pipeline)
    return sum(count * (1 - 1 / kinds[shared_out][0]) for shared_out, count in held.items())


def optimized_elements(dims: ModelDims, trainer: TrainerConfig, head: Head, stage: int) -> float:
    """Elements whose optimizer states a rank of ``stage`` has, if replicas could share them equally."""
    return sum(count / replicas for count, replicas in optimizer_shares(dims, trainer, head, stage).values())


def optimizer_shares(dims: ModelDims, trainer: TrainerConfig, head: Head, stage: int) -> Mapping[bool, tuple[int, int]]:
    """Elements of a rank of ``stage`` and how many replicas share their optimizer states, by ``shared_out``."""
    held = stage_elements(dims, trainer.layout, head, stage)
    kinds = _replicas(trainer.layout, trainer.layout.rank_of(pipeline=stage))
    return {kind: (n, kinds[kind][0] if trainer.distributed_optimizer else 1) for kind, n in held.items()}


def least_bytes(dims: ModelDims, trainer: TrainerConfig, head: Head, stage: int, dtype: str) -> float:
    """Weights, gradients and optimizer states on the device of a rank of ``stage``, padding left out and optimizer
    states shared equally.
    """
    kept = 0 if trainer.optimizer_on_host else 12 if dtype == "bfloat16" else 8
    weights = (DTYPE_BYTES[dtype] + 4) * sum(stage_elements(dims, trainer.layout, head, stage).values())
    return weights + kept * optimized_elements(dims, trainer, head, stage)


@cache
def stage_elements(dims: ModelDims, layout: ParallelLayout, head: Head, stage: int) -> Mapping[bool, int]:
    """Elements of the parameters on a rank of ``stage``, by ``shared_out``."""
    found = {False: 0, True: 0}
    held = layout.layers_of_stage(stage, dims.layers)
    sparse = len(dims.sparse_layers.intersection(held))
    axes = (layout.tensor, layout.expert_tensor, layout.expert)
    for count, kind in ((len(held) - sparse, False), (sparse, True)):
        for parameter in _layer_parameters(dims, head, kind, *axes) if count else ():
            found[parameter.shared_out] += count * parameter.elements
    last = stage == layout.pipeline - 1
    copies = {Stage.FIRST: (stage == 0) + (last and _is_tied(dims, layout, head)), Stage.LAST: int(last)}
    for entry in _entries(dims, head).outside:
        found[False] += copies[entry.stage] * _parameter(entry, dims, layout).elements
    return found


def _is_tied(dims: ModelDims, layout: ParallelLayout, head: Head) -> bool:
    """Whether first and last stage each hold a copy of the embedding."""
    return dims.tied_embeddings and head is Head.TOKEN and layout.pipeline > 1


@cache
def total_parameters(dims: ModelDims, head: Head) -> int:
    """Elements of the whole model."""
    return sum(stage_elements(dims, ParallelLayout(), head, 0).values())


@cache
def uncut_parameters(dims: ModelDims) -> int:
    """Elements of a policy that every tensor-parallel rank or worker has whole: norms, routers, the projections of
    latent attention to its latents, biases of sums.
    """
    entries, sparse = _entries(dims, Head.TOKEN), len(dims.sparse_layers)
    return sum(
        layers * _parameter(entry, dims, ParallelLayout()).elements
        for layers, kind in ((1, entries.outside), (dims.layers - sparse, entries.dense), (sparse, entries.sparse))
        for entry in kind
        if entry.split is Split.NONE
    )


@dataclass(frozen=True, kw_only=True)
class _Entries:
    """Tensors that are trained, in the order that megatron-core registers them; all layers of a kind are alike."""

    outside: tuple[WeightEntry, ...]
    dense: tuple[WeightEntry, ...]
    sparse: tuple[WeightEntry, ...]


@cache
def _entries(dims: ModelDims, head: Head) -> _Entries:
    experts = None if dims.experts is None else replace(dims.experts, layers=(1,))
    two = weight_entries(replace(dims, layers=2, experts=experts), head)
    trained = sorted((entry for entry in two if not is_float32(entry)), key=_order)  # the others are buffers
    outside, dense, sparse = (tuple(e for e in trained if e.layer == layer) for layer in (None, 0, 1))
    return _Entries(outside=outside, dense=dense, sparse=sparse)


def _order(entry: WeightEntry) -> tuple[int, int, int]:
    place = next((i for i, part in enumerate(_REGISTERED) if part in entry.megatron), None)
    if place is None:
        raise ValueError(f"{entry.megatron}: its place must be in megatron_rl/planner/states.py, found none")
    return place, -1 if entry.expert is None else entry.expert, int("linear_fc2" in entry.megatron)


def _piece_parameters(
    dims: ModelDims, layout: ParallelLayout, head: Head, stage: int, piece: int
) -> tuple[Parameter, ...]:
    last = layout.pipeline - 1
    first_piece, last_piece = stage == 0 and piece == 0, stage == last and piece == layout.virtual_pipeline - 1
    tied = _is_tied(dims, layout, head)
    outside = _entries(dims, head).outside
    found: list[Parameter] = []
    if first_piece:
        found += [_parameter(e, dims, layout, tied=tied) for e in outside if e.stage is Stage.FIRST]
    held = layout.layers_of_stage(stage, dims.layers)
    per_piece = len(held) // layout.virtual_pipeline
    sparse = dims.sparse_layers
    axes = (layout.tensor, layout.expert_tensor, layout.expert)
    for layer in held[piece * per_piece : (piece + 1) * per_piece]:
        found += _layer_parameters(dims, head, layer in sparse, *axes)
    if last_piece:
        found += [_parameter(e, dims, layout) for e in outside if e.stage is Stage.LAST]
        if tied:
            found += [_parameter(e, dims, layout, tied=True) for e in outside if e.stage is Stage.FIRST]
    return tuple(found)


@cache
def _layer_parameters(
    dims: ModelDims, head: Head, sparse: bool, tensor: int, expert_tensor: int, expert: int
) -> tuple[Parameter, ...]:
    """Of a rank whose experts are the first ones: those of the others have the same sizes."""
    layout = ParallelLayout(tensor=tensor, expert_tensor=expert_tensor, expert=expert)
    entries, share = _entries(dims, head), 0 if dims.experts is None else dims.experts.count // expert
    kind = entries.sparse if sparse else entries.dense
    return tuple(_parameter(e, dims, layout) for e in kind if e.expert is None or e.expert < share)


def linear_parameters(dims: ModelDims, layout: ParallelLayout, *, sparse: bool) -> int:
    """Weights of a layer's linears on one rank, the router apart: what FP8 quantises."""
    entries, share = _entries(dims, Head.VALUE), 0 if dims.experts is None else dims.experts.count // layout.expert
    return sum(
        _parameter(e, dims, layout).elements
        for e in (entries.sparse if sparse else entries.dense)
        if ".linear_" in e.megatron and e.megatron.endswith(".weight") and (e.expert is None or e.expert < share)
    )


def _parameter(entry: WeightEntry, dims: ModelDims, layout: ParallelLayout, *, tied: bool = False) -> Parameter:
    ranks = layout.tensor if entry.expert is None else layout.expert_tensor
    return Parameter(
        elements=math.prod(shard_shape(entry, dims, ranks)),
        shared_out=entry.expert is not None and layout.expert > 1,
        tied=tied,
    )


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
        mine = takewhile(lambda parameter: parameter[0] < high, self.parameters)
        return sum(max(0, min(stop, high) - max(start, low)) for start, stop in mine)


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
