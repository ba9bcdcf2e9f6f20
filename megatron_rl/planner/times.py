"""Seconds of everything that a step does, from arithmetic, bytes of memory and bytes on links."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_rl.config.schema import EngineConfig, TrainerConfig
from megatron_rl.model_dims import ModelDims
from megatron_rl.planner.devices import (
    DECODE_STEP_S,
    LAUNCH_S,
    LINK_SHARE,
    MATMUL_SHARE,
    MEMORY_SHARE,
    Device,
)
from megatron_rl.planner.memory import (
    activation_bytes_per_token,
    cache_dtype,
    engine_weight_bytes,
    kv_bytes_per_token,
    unlike_stages,
)
from megatron_rl.planner.states import DTYPE_BYTES, StateBytes, exchanged_parameters, state_bytes, total_parameters
from megatron_rl.weights.rules import Head


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device, and how many of them share a node."""

    device: Device
    per_node: int

    def link(self, ranks: int) -> float:
        """Bytes a second between ``ranks`` that are numbered next to each other."""
        return LINK_SHARE * (self.device.link if ranks <= self.per_node else self.device.network)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a model is to compute: ``rows`` of ``row_tokens`` each."""

    rows: float
    row_tokens: float

    @property
    def tokens(self) -> float:
        """All of them."""
        return self.rows * self.row_tokens


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """Seconds of passes over some rows on one rank, by cause.

    Attributes:
        arithmetic: products and element-wise work.
        tensor: exchanges between tensor, context and expert ranks.
        bubble: waiting of a pipeline's stages.
        replicas: gradients and weights between replicas.
        optimizer: Adam's step.
    """

    arithmetic: float
    tensor: float
    bubble: float
    replicas: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """Seconds."""
        return self.arithmetic + self.tensor + self.bubble + self.replicas + self.optimizer


def pass_time(
    dims: ModelDims, trainer: TrainerConfig, machine: Machine, work: Work, dtype: str, *, backward: bool
) -> PassTime:
    """Passes over ``work``: forward, or forward and backward (twice the products; once more with full recompute).

    Products: :meth:`ModelDims.row_flops`; the stage with the most layers sets the pace, and has as much of the head's
    products as of the layers. Element-wise work reads and writes about twice what a layer would keep for
    its backward pass. Each exchange has one mirror image in the backward pass, however many products that has; full
    recompute repeats the forward's. Tensor ranks exchange four times a layer each way: two gathers and two scattered
    sums, or two sums that cost twice as much. That a backward pass gathers the inputs of two products once more under
    sequence parallelism costs nothing here: it is done beside another product (Korthikanti et al. 2022, section 4.2.2).
    Experts exchange twice each way (Lepikhin et al., "GShard", 2020, section 3.2); context ranks gather keys and values
    once and sum their gradients once. A pipeline waits ``(p - 1) / (v m)`` of its time (Narayanan et al. 2021, section
    2.2).
    """
    layout, device, size = trainer.layout, machine.device, DTYPE_BYTES[dtype]
    per_rank = max(work.tokens / layout.data, work.row_tokens) / layout.context
    micro = min(trainer.tokens_per_microbatch, per_rank)
    batches = max(1.0, per_rank / micro)
    passes = 1.0 if not backward else 4.0 if trainer.recompute == "full" else 3.0
    with_experts = set() if dims.experts is None else set(dims.experts.layers)
    stages = [layout.layers_of_stage(stage, dims.layers) for stage in unlike_stages(layout)]
    held = max(stages, key=lambda layers: (len(layers), len(with_experts & set(layers))))
    layers = len(held)
    flops = dims.row_flops(round(work.row_tokens)) / work.row_tokens * micro / layout.tensor * layers / dims.layers
    moved = 2 * micro * layers * activation_bytes_per_token(dims, _plain(trainer), dtype)
    arithmetic = passes * (flops / (MATMUL_SHARE * device.flops) + moved / (MEMORY_SHARE * device.bandwidth))
    exchanged = 0.0
    if layout.tensor > 1:
        bytes_each = size * micro * dims.hidden * (layout.tensor - 1) / layout.tensor
        exchanged += 4 * layers * (bytes_each / machine.link(layout.tensor) + LAUNCH_S)
    if layout.context > 1:
        bytes_each = 2 * size * micro * (layout.context - 1) * dims.kv_heads * dims.head_dim / layout.tensor
        exchanged += layers * bytes_each / machine.link(layout.tensor * layout.context)
    if dims.experts is not None and layout.expert > 1:
        sparse = len(with_experts & set(held))
        routed = size * micro / layout.tensor * dims.experts.per_token * dims.hidden
        ranks = layout.expert * layout.expert_tensor
        exchanged += 2 * sparse * (routed * (layout.expert - 1) / layout.expert / machine.link(ranks) + LAUNCH_S)
    exchanged *= 1 if not backward else 3 if trainer.recompute == "full" else 2
    busy = arithmetic + exchanged
    bubble = busy * (layout.pipeline - 1) / layout.virtual_pipeline
    return PassTime(arithmetic=arithmetic * batches, tensor=exchanged * batches, bubble=bubble)


def update_time(
    dims: ModelDims, trainer: TrainerConfig, head: Head, machine: Machine, work: Work, dtype: str
) -> PassTime:
    """One optimizer step, at the stage whose exchange and Adam take longest.

    Replicas reduce float32 gradients and get weights back (Rajbhandari et al., "ZeRO", 2020, section 7.1), or reduce
    twice as much without a distributed optimizer; experts only among the ranks that hold the same ones. None of it is
    hidden behind arithmetic unless communication overlaps, which hides what arithmetic lasts. Adam reads gradient, main
    weight and moments and writes the last three and the weight. On the host it takes the gradient down and the weight
    up, and runs at a tenth of the device's bandwidth.
    """
    compute = pass_time(dims, trainer, machine, work, dtype, backward=True)
    hidden = compute.arithmetic / 2 if trainer.overlap_communication else 0.0
    replicas, optimizer = max(
        (_step_time(dims, trainer, head, machine, stage, dtype, hidden) for stage in unlike_stages(trainer.layout)),
        key=sum,
    )
    return replace(compute, replicas=replicas, optimizer=optimizer)


def _step_time(
    dims: ModelDims, trainer: TrainerConfig, head: Head, machine: Machine, stage: int, dtype: str, hidden: float
) -> tuple[float, float]:
    """Seconds of a stage's exchange between replicas, less those ``hidden`` behind arithmetic, and of its Adam."""
    layout, size = trainer.layout, DTYPE_BYTES[dtype]
    rank = layout.rank_of(pipeline=stage)
    ways = 4 + (size if trainer.distributed_optimizer else 4)
    exchanged = ways * exchanged_parameters(dims, layout, head, rank)
    between = exchanged / machine.link(layout.tensor * layout.context * layout.data)
    states = state_bytes(dims, trainer, head, rank, dtype)
    return max(0.0, between - hidden), _adam(trainer, states, machine.device, size)


def _adam(trainer: TrainerConfig, states: StateBytes, device: Device, size: int) -> float:
    kept = 12 if size == 2 or trainer.optimizer_on_host else 8
    elements = (states.optimizer + states.host_optimizer) / kept
    if trainer.optimizer_on_host:
        return elements * ((4 + size) / (LINK_SHARE * device.host_link) + 28 / (0.1 * device.bandwidth))
    return elements * (28 + size) / (MEMORY_SHARE * device.bandwidth)


def _plain(trainer: TrainerConfig) -> TrainerConfig:
    return replace(trainer, recompute="none")


@dataclass(frozen=True, kw_only=True)
class RolloutTime:
    """Seconds of a rollout."""

    prefill: float
    decode: float

    @property
    def total(self) -> float:
        """Seconds."""
        return self.prefill + self.decode


def rollout_time(
    dims: ModelDims,
    engine: EngineConfig,
    machine: Machine,
    dtype: str,
    *,
    samples: int,
    prompt_tokens: float,
    response_tokens: float,
    longest: int,
) -> RolloutTime:
    """Generating ``samples`` on all engines.

    Pope et al. 2022, section 2: a step reads all weights once (of experts those that some token chose) and the keys and
    values of every sequence; it lasts as long as the larger of that and its products, and two all-reduces a layer.
    While there are samples to start, each engine runs as many as its cache and ``max_concurrent`` allow; the longest
    sample goes on alone after that, from the mean length to the limit. Of a quantised engine fewer bytes are read; its
    products are taken as those of bfloat16. ``dtype``: of the model.
    """
    device, size = machine.device, DTYPE_BYTES[engine.dtype(dtype)]
    mine = samples / engine.count
    kv = kv_bytes_per_token(dims, engine.tensor, cache_dtype(engine, dtype))
    context = prompt_tokens + response_tokens / 2
    room = engine.kv_cache_mib * 2**20 / kv / (prompt_tokens + response_tokens)
    together = max(1.0, min(mine, engine.max_concurrent, room))
    weights = engine_weight_bytes(dims, engine, dtype) / engine.tensor

    def step(sequences: float) -> float:
        read = weights * _touched(dims, sequences) + sequences * context * kv
        flops = sequences * dims.row_flops(1) / engine.tensor
        busy = max(read / (MEMORY_SHARE * device.bandwidth), flops / (MATMUL_SHARE * device.flops))
        exchanged = 0.0
        if engine.tensor > 1:
            bytes_each = 2 * size * sequences * dims.hidden * (engine.tensor - 1) / engine.tensor
            exchanged = 2 * dims.layers * (bytes_each / machine.link(engine.tensor) + LAUNCH_S)
        return busy + exchanged + DECODE_STEP_S

    full = mine * response_tokens / together
    tail = max(0.0, longest - response_tokens)
    prefill = mine * dims.row_flops(max(1, round(prompt_tokens))) / engine.tensor / (MATMUL_SHARE * device.flops)
    return RolloutTime(prefill=prefill, decode=full * step(together) + tail * step(max(1.0, together / 16)))


def _touched(dims: ModelDims, tokens: float) -> float:
    """Share of all weights that a step of so many tokens reads: of experts those that at least one token chose, if
    each chose at random.
    """
    experts = dims.experts
    if experts is None:
        return 1.0
    routed = 3 * dims.hidden * experts.ffn_hidden * experts.count * len(experts.layers)
    share = routed / total_parameters(dims, Head.TOKEN)
    missed = math.pow(1 - experts.per_token / experts.count, tokens)
    return 1 - share * missed


def push_time(dims: ModelDims, trainer: TrainerConfig, engine: EngineConfig, machine: Machine, dtype: str) -> float:
    """Weights from the policy to all engines: shards to rank 0, and from there in one stream that all engines read."""
    size = DTYPE_BYTES[dtype] * total_parameters(dims, Head.TOKEN)
    gathered = size / machine.link(trainer.layout.world_size) if trainer.layout.world_size > 1 else 0.0
    ranks = trainer.layout.world_size + engine.count * engine.tensor
    return gathered + size / machine.link(ranks)
