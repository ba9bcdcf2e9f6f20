"""Seconds of everything that a step does, from arithmetic, bytes of memory and bytes on links."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_rl.config.schema import EngineConfig, TrainerConfig
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims
from megatron_rl.planner.devices import (
    DECODE_STEP_S,
    HOST_SHARE,
    LAUNCH_S,
    LINK_SHARE,
    MATMUL_SHARE,
    MEMORY_SHARE,
    Device,
)
from megatron_rl.planner.lengths import Responses
from megatron_rl.planner.memory import (
    gathered_attention_width,
    kv_bytes_per_token,
    layers_activation_bytes,
    unlike_stages,
    worker_weight_bytes,
)
from megatron_rl.planner.states import DTYPE_BYTES, exchanged_parameters, optimized_elements, total_parameters
from megatron_rl.weights.rules import Head


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device, how many of them share a node, and bytes of the node's own memory where they are not the device's."""

    device: Device
    per_node: int
    host_memory: float | None = None

    @property
    def host_room(self) -> float:
        """Bytes of a node's own memory that may be used."""
        return HOST_SHARE * (self.device.host_memory if self.host_memory is None else self.host_memory)

    def link(self, ranks: int) -> float:
        """Bytes a second between ``ranks`` that are numbered next to each other."""
        return LINK_SHARE * (self.device.link if ranks <= self.per_node else self.device.network)

    def shuffle_time(self, sent: float, ranks: int) -> float:
        """Seconds of an exchange of all with all, in which a rank sends ``sent`` bytes, as much to each of ``ranks``
        that are numbered next to each other; it keeps its own, and links in a node and between nodes work side by side.
        """
        near = min(ranks, self.per_node)
        inside, outside = sent * (near - 1) / ranks, sent * (ranks - near) / ranks
        return max(inside / self.device.link, outside / self.device.network) / LINK_SHARE


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a model is to compute.

    Attributes:
        rows: how many.
        row_tokens: of a row, on the average over rows.
        token_row: of the row that a token is in, on the average over tokens: more, since long rows have more of them,
            and what attention's scores go by. None: all rows are alike.
    """

    rows: float
    row_tokens: float
    token_row: float | None = None

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
    dims: ModelDims,
    trainer: TrainerConfig,
    machine: Machine,
    work: Work,
    dtype: str,
    *,
    backward: bool,
    head: Head = Head.TOKEN,
) -> PassTime:
    """Passes over ``work``: forward, or forward and backward (twice the products; once more with full recompute).

    The stage that takes longest over a micro-batch sets the pace. Products: :meth:`ModelDims.layer_flops` of its own
    layers, and of the output layer at the end of a policy; linears in FP8 are as much faster as :attr:`Device.fp8`
    says. Element-wise work reads and writes about twice what a layer would keep for its backward pass, and
    :attr:`Device.unfused` times that. What is exchanged: :func:`_layer_exchange`, and between stages hidden states
    (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters", 2021, section 2.2), as often as
    a stage has pieces. With one piece a stage waits for them; several take turns, and one's are sent while another
    computes.

    A pipeline of p stages waits while it fills: ``p - 1`` times what a piece takes, its sending included. The
    interleaved schedule takes micro-batches by p, and where a group is not full waits for the missing ones as well.
    """
    layout, size = trainer.layout, DTYPE_BYTES[dtype]
    per_rank = max(work.tokens / layout.data, work.row_tokens) / layout.context
    micro = min(max(trainer.tokens_per_microbatch, work.row_tokens / layout.context), per_rank)
    batches = max(1.0, per_rank / micro)
    ways = 1 if not backward else 2
    met = work.row_tokens if work.token_row is None else work.token_row
    times = [
        _stage_time(dims, trainer, machine, stage, micro, met, dtype, backward=backward, head=head)
        for stage in unlike_stages(dims, layout)
    ]
    arithmetic, exchanged = max(times, key=sum)
    if layout.pipeline == 1:
        return PassTime(arithmetic=arithmetic * batches, tensor=exchanged * batches, bubble=0.0)
    hidden = size * micro * dims.hidden / (layout.tensor if layout.sequence_parallel else 1)
    hop = hidden / machine.link(layout.world_size) + LAUNCH_S
    pieces, stages = layout.virtual_pipeline, layout.pipeline
    sent, missing = ways * hop, 0.0
    if pieces > 1:
        sent = ways * pieces * LAUNCH_S + max(0.0, ways * pieces * (hop - LAUNCH_S) - arithmetic)
        missing = math.ceil(batches / stages) * stages - batches
    busy = arithmetic + exchanged
    bubble = busy * (missing + (stages - 1 - missing) / pieces) + (stages - 1) * ways * hop
    return PassTime(arithmetic=arithmetic * batches, tensor=(exchanged + sent) * batches, bubble=bubble)


def _stage_time(
    dims: ModelDims,
    trainer: TrainerConfig,
    machine: Machine,
    stage: int,
    micro: float,
    row: float,
    dtype: str,
    *,
    backward: bool,
    head: Head,
) -> tuple[float, float]:
    """Seconds of arithmetic and of exchanges of a stage with one micro-batch of ``micro`` tokens a rank, each in a
    row of ``row``.
    """
    layout, device = trainer.layout, machine.device
    held, length = layout.layers_of_stage(stage, dims.layers), round(row)
    kinds = {kind: [layer for layer in held if (layer in dims.sparse_layers) is kind] for kind in (False, True)}
    kinds = {kind: layers for kind, layers in kinds.items() if layers}
    flops = sum(len(layers) * dims.layer_flops(length, sparse=kind) for kind, layers in kinds.items())
    if (fp8 := trainer.fp8) is not None and (backward or trainer.rounds):
        saved, inner = 1 - 1 / device.fp8.get(fp8.recipe, 1.0), range(fp8.layers_kept, dims.layers - fp8.layers_kept)
        for kind, layers in kinds.items():
            flops -= saved * sum(layer in inner for layer in layers) * dims.linear_flops(length, sparse=kind)
    if stage == layout.pipeline - 1 and head is Head.TOKEN:
        flops += dims.output_flops(length)
    flops *= micro / row / layout.tensor
    kept = layers_activation_bytes(dims, replace(trainer, recompute="none"), dtype, held, ring=device.rings(dtype))
    moved = 2 * device.unfused * micro * kept
    passes = 1.0 if not backward else 4.0 if trainer.recompute == "full" else 3.0
    arithmetic = passes * (
        flops / (MATMUL_SHARE * device.product_flops(dtype)) + moved / (MEMORY_SHARE * device.bandwidth)
    )
    exchanged = sum(
        len(layers) * _layer_exchange(dims, layout, machine, micro, length, dtype, sparse=kind)
        for kind, layers in kinds.items()
    )
    return arithmetic, exchanged * (1 if not backward else 3 if trainer.recompute == "full" else 2)


def _layer_exchange(
    dims: ModelDims, layout: ParallelLayout, machine: Machine, micro: float, length: int, dtype: str, *, sparse: bool
) -> float:
    """Seconds of what ranks tell each other in one pass through a layer; that the backward pass says as much, and full
    recompute repeats the forward's, is the caller's.

    Tensor ranks exchange twice for attention and twice for the feed-forward block, experts apart: a gather and a
    scattered sum, or a sum that costs twice as much. That a backward pass gathers the inputs of two products once more
    under sequence parallelism costs nothing here: it is done beside another product (Korthikanti et al. 2022, section
    4.2.2). With fewer key/value heads than tensor ranks these gather queries, keys and values besides. Tokens go to
    their experts and back (Lepikhin et al., "GShard", 2020, section 3.2), and to all ranks that share an expert's
    matrices. Context ranks pass keys and values around, on a GPU beside the products of scores (Liu et al., "Ring
    Attention", 2023, section 3), elsewhere before them.
    """
    size, experts, found = DTYPE_BYTES[dtype], dims.experts, 0.0
    if layout.tensor > 1:
        shared = not sparse or (experts is not None and experts.shared_ffn_hidden > 0)
        bytes_each = size * micro * dims.hidden * (layout.tensor - 1) / layout.tensor
        found += (4 if shared else 2) * (bytes_each / machine.link(layout.tensor) + LAUNCH_S)
    if width := gathered_attention_width(dims, layout.tensor):
        bytes_each = size * micro * width * (layout.tensor - 1) / layout.tensor
        found += bytes_each / machine.link(layout.tensor) + LAUNCH_S
    if layout.context > 1:
        width = 2 * dims.kv_heads * dims.head_dim
        if (latent := dims.latent) is not None:
            width = dims.heads * (latent.plain_head_dim + latent.rotary_head_dim + latent.value_head_dim)
        bytes_each = size * micro * (layout.context - 1) * width / layout.tensor
        seconds = bytes_each / machine.link(layout.tensor * layout.context)
        if machine.device.is_gpu:
            scores = dims.score_flops(length) * micro / length / layout.tensor
            seconds = max(0.0, seconds - scores / (MATMUL_SHARE * machine.device.product_flops(dtype)))
        found += seconds + (layout.context - 1) * LAUNCH_S
    if sparse and experts is not None:
        routed = size * micro / layout.tensor * experts.per_token * dims.hidden
        if layout.expert > 1:
            near = max(1, machine.per_node // layout.expert_tensor)
            found += 2 * (replace(machine, per_node=near).shuffle_time(routed, layout.expert) + LAUNCH_S)
        if layout.expert_tensor > 1:
            found += 2 * (routed * (layout.expert_tensor - 1) / machine.link(layout.expert_tensor) + LAUNCH_S)
    return found


def update_time(
    dims: ModelDims, trainer: TrainerConfig, head: Head, machine: Machine, work: Work, dtype: str
) -> PassTime:
    """One optimizer step, at the stage whose exchange and Adam take longest.

    Replicas reduce float32 gradients and get weights back (Rajbhandari et al., "ZeRO", 2020, section 7.1), or reduce
    twice as much without a distributed optimizer; experts only among the ranks that hold the same ones. None of it is
    hidden behind arithmetic unless communication overlaps, which hides what arithmetic lasts. Adam reads gradient, main
    weight and moments and writes the last three and the weight. On the host it takes the gradient down and the weight
    up, and the ranks of a node share the bandwidth of its memory.
    """
    compute = pass_time(dims, trainer, machine, work, dtype, backward=True, head=head)
    hidden = compute.arithmetic / 2 if trainer.overlap_communication else 0.0
    stages = unlike_stages(dims, trainer.layout)
    replicas, optimizer = max(
        (_step_time(dims, trainer, head, machine, stage, dtype, hidden) for stage in stages), key=sum
    )
    return replace(compute, replicas=replicas, optimizer=optimizer)


def _step_time(
    dims: ModelDims, trainer: TrainerConfig, head: Head, machine: Machine, stage: int, dtype: str, hidden: float
) -> tuple[float, float]:
    """Seconds of a stage's exchange between replicas, less those ``hidden`` behind arithmetic, and of its Adam."""
    layout, device, size = trainer.layout, machine.device, DTYPE_BYTES[dtype]
    in_fp8 = trainer.fp8 is not None and trainer.fp8.parameters
    ways = 4 + ((1 if in_fp8 else size) if trainer.distributed_optimizer else 4)
    exchanged = ways * exchanged_parameters(dims, layout, head, layout.rank_of(pipeline=stage))
    between = exchanged / machine.link(layout.tensor * layout.context * layout.data)
    elements = optimized_elements(dims, trainer, head, stage)
    if trainer.optimizer_on_host and device.is_gpu:
        own = MEMORY_SHARE * device.host_bandwidth / min(machine.per_node, layout.world_size)
        adam = elements * ((4 + size) / (LINK_SHARE * device.host_link) + 28 / own)
    else:
        adam = elements * (28 + size) / (MEMORY_SHARE * device.bandwidth)
    return max(0.0, between - hidden), adam


@dataclass(frozen=True, kw_only=True)
class RolloutTime:
    """Seconds of a rollout.

    Attributes:
        prefill: reading prompts.
        full: decoding while there are samples to start.
        tail: decoding what runs then, ever fewer, until the longest of all is done.
    """

    prefill: float
    full: float
    tail: float

    @property
    def total(self) -> float:
        """Seconds."""
        return self.prefill + self.full + self.tail


_TAIL_POINTS = 64


def rollout_time(
    dims: ModelDims,
    engine: EngineConfig,
    machine: Machine,
    dtype: str,
    *,
    samples: int,
    prompt_tokens: float,
    responses: Responses,
    samples_per_prompt: int = 1,
) -> RolloutTime:
    """Generating ``samples`` on all engines; ``dtype``: of the model.

    A prompt's samples are on one engine, whose prefix cache reads it once and keeps its keys and values once; each
    sample's step reads them all the same.

    While there are samples to start, each engine runs as many as its cache and ``max_concurrent`` allow, and a new one
    takes the place of each that ends. Then fewer and fewer run, as :meth:`Responses.alive` says, until the last of all
    engines has none left.
    """
    mine = samples / engine.count
    kv = kv_bytes_per_token(dims, engine.tensor, engine.cache_dtype(dtype))
    mean, kept = prompt_tokens + responses.running, prompt_tokens / samples_per_prompt + responses.running
    together = max(1.0, min(mine, engine.max_concurrent, engine.kv_cache_mib * 2**20 / kv / kept))
    waiting = mine - together
    full = waiting * responses.mean / together
    full *= decode_step_time(dims, engine, machine, dtype, sequences=together, context=mean)
    age = responses.running if waiting else 0.0  # of those that run when no more can start
    width, tail = responses.longest / _TAIL_POINTS, 0.0
    for point in range(_TAIL_POINTS):
        tokens = (point + 0.5) * width
        step = decode_step_time(
            dims,
            engine,
            machine,
            dtype,
            sequences=max(1.0, together * responses.alive(tokens)),
            context=prompt_tokens + min(responses.longest, age + tokens),
        )
        tail += width * responses.any_alive(tokens, together * engine.count) * step
    length = max(1, round(prompt_tokens))
    last = _product_time(dims.output_flops(1), engine, machine, dtype)
    layers = _token_time(dims, engine, machine, length, dtype) - _product_time(
        dims.output_flops(length) / length, engine, machine, dtype
    )
    prefill = mine * (max(1.0, prompt_tokens) / samples_per_prompt * layers + last)
    return RolloutTime(prefill=prefill, full=full, tail=tail)


def decode_step_time(
    dims: ModelDims, engine: EngineConfig, machine: Machine, dtype: str, *, sequences: float, context: float
) -> float:
    """One step of an engine: the next token of each of ``sequences``, which have ``context`` tokens on the average.

    Pope et al. 2022, section 2: a step reads all weights once (of experts those that some token chose) and the keys and
    values of every sequence; it lasts as long as the larger of that and its products, and two all-reduces a layer. Of a
    quantised engine fewer bytes are read, and the products of its linears are faster. ``dtype``: of the model.
    """
    size = DTYPE_BYTES[engine.dtype(dtype)]
    kv = kv_bytes_per_token(dims, engine.tensor, engine.cache_dtype(dtype))
    weights = worker_weight_bytes(dims, engine, dtype) - size * _idle_experts(dims, sequences) / engine.tensor
    read = weights + sequences * context * kv
    products = sequences * _token_time(dims, engine, machine, 1, dtype)
    exchanged = 0.0
    if engine.tensor > 1:
        bytes_each = 2 * size * sequences * dims.hidden * (engine.tensor - 1) / engine.tensor
        exchanged = 2 * dims.layers * (bytes_each / machine.link(engine.tensor) + LAUNCH_S)
    return max(read / (MEMORY_SHARE * machine.device.bandwidth), products) + exchanged + DECODE_STEP_S


def _token_time(dims: ModelDims, engine: EngineConfig, machine: Machine, length: int, dtype: str) -> float:
    """Seconds of the products of one token, in rows of ``length``, on a worker of an engine."""
    sparse = len(dims.sparse_layers)
    linear = (dims.layers - sparse) * dims.linear_flops(length, sparse=False)
    linear += sparse * dims.linear_flops(length, sparse=True) if sparse else 0.0
    saved = linear * (1 - 1 / machine.device.engine_gain(engine.quantization))
    return _product_time((dims.row_flops(length) - saved) / length, engine, machine, dtype)


def _product_time(flops: float, engine: EngineConfig, machine: Machine, dtype: str) -> float:
    """Seconds of products that the workers of an engine share; ``dtype``: of the model."""
    return flops / engine.tensor / (MATMUL_SHARE * machine.device.product_flops(engine.dtype(dtype)))


def _idle_experts(dims: ModelDims, tokens: float) -> float:
    """Elements of experts that no token of a step of so many chose, if each chose at random."""
    experts = dims.experts
    if experts is None:
        return 0.0
    routed = 3 * dims.hidden * experts.ffn_hidden * experts.count * len(experts.layers)
    return routed * math.pow(1 - experts.per_token / experts.count, tokens)


def push_time(
    dims: ModelDims, trainer: TrainerConfig, engine: EngineConfig, machine: Machine, dtype: str, *, quantised: bool
) -> float:
    """Weights from the policy to all engines: shards to rank 0, and from there in one stream that all engines read;
    ``quantised``: linears as the engine keeps them, with their scales.
    """
    size = DTYPE_BYTES[dtype] * total_parameters(dims, Head.TOKEN)
    gathered = size / machine.link(trainer.layout.world_size) if trainer.layout.world_size > 1 else 0.0
    ranks = trainer.layout.world_size + engine.count * engine.tensor
    sent = worker_weight_bytes(dims, replace(engine, tensor=1), dtype) if quantised else size
    return gathered + sent / machine.link(ranks)
