"""Bytes of everything that a rank or an engine holds, by what it is for; each with the formula that gave it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_rl.config.schema import EngineConfig, TrainerConfig
from megatron_rl.layout import ParallelLayout, padded_vocabulary
from megatron_rl.model_dims import ModelDims
from megatron_rl.planner.states import DTYPE_BYTES, rank_parameters, state_bytes, total_parameters
from megatron_rl.weights.rules import Head

TORCH_CHUNK_BYTES = 256 * 2**20
"""``mcore.logprobs.CHUNK_BYTES``, which cannot be imported without torch; a test compares them."""
TRITON_CHUNK_BYTES = 2**31
"""``mcore.logprobs_triton.CHUNK_BYTES``, likewise."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of a plan.

    Attributes:
        name: such as ``policy.gradients``.
        value: in ``unit``.
        unit: ``B`` or ``s``.
        formula: what was computed, with its numbers.
    """

    name: str
    value: float
    unit: str
    formula: str


def activation_bytes_per_token(dims: ModelDims, trainer: TrainerConfig, dtype: str) -> float:
    """What one layer keeps for its backward pass, in bytes per token of a rank; the mean over dense and sparse layers.

    Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), equations 1, 2 and 4,
    with the tensors of this architecture in place of GPT's. With h, a (query heads x width), k (key heads x width) and
    f, a dense layer keeps 3 a + 3 k + 5 f elements, two norms and what enters them (6 h; 10 h in bfloat16, whose norms
    compute in float32), four rows of angles and the softmax's float32 sums. Sequence parallelism shares the h over
    tensor ranks. ``selective`` leaves out the sums, since the rows of this attention hold no scores; ``full`` keeps the
    layer's input alone. For dense layers a test holds this against the real model; experts and latent attention are
    counted likewise and not tested.
    """
    layout, size = trainer.layout, DTYPE_BYTES[dtype]
    hidden = dims.hidden / (layout.tensor if layout.sequence_parallel else 1)
    if trainer.recompute == "full":
        return size * hidden
    latent = dims.latent
    if latent is None:
        heads = 3 * (dims.heads + dims.kv_heads) * dims.head_dim
        alone = 4 * dims.head_dim
    else:
        heads = dims.heads * (4 * (latent.plain_head_dim + latent.rotary_head_dim) + 3 * latent.value_head_dim)
        alone = 2 * ((latent.query_rank or 0) + latent.kv_rank + 3 * latent.rotary_head_dim)
    experts = dims.experts
    sparse = 0 if experts is None else len(experts.layers)
    ffn = 5 * dims.ffn_hidden / layout.tensor * (dims.layers - sparse)
    if experts is not None:
        routed = experts.per_token * (5 * experts.ffn_hidden / layout.expert_tensor + 3 * dims.hidden)
        share = 1 / layout.tensor if layout.sequence_parallel else 1.0
        ffn += sparse * (routed * share + 5 * experts.shared_ffn_hidden / layout.tensor)
    sums = 0.0 if trainer.recompute == "selective" else 4 * dims.heads / layout.tensor
    return size * (_norms(size) * hidden + heads / layout.tensor + alone + ffn / dims.layers) + sums + 8


def _norms(size: int) -> int:
    """Elements of width h that a layer's two norms keep, their inputs included."""
    return 10 if size == 2 else 6


def passing_bytes_per_token(dims: ModelDims, trainer: TrainerConfig, dtype: str) -> float:
    """The most that a pass holds beyond what layers keep: the last norm and the head, or one layer's gradients on their
    way, and with ``full`` that layer computed again and what its products gather from other tensor ranks.
    """
    layout, size = trainer.layout, DTYPE_BYTES[dtype]
    hidden = dims.hidden / (layout.tensor if layout.sequence_parallel else 1)
    gradients = hidden + 2 * dims.ffn_hidden / layout.tensor
    if trainer.recompute == "full":
        again = replace(trainer, recompute="none")
        gathered = dims.hidden if layout.sequence_parallel else 0
        return activation_bytes_per_token(dims, again, dtype) + size * (gradients + gathered)
    return size * max((_norms(size) + 2 if size == 2 else 6) * hidden, gradients)


def trainer_cells(
    role: str, dims: ModelDims, trainer: TrainerConfig, head: Head, dtype: str, *, reference: bool, on_gpu: bool
) -> list[Cell]:
    """What the fullest rank of a model holds while it trains; device memory, but for ``host_optimizer``.

    Args:
        role: in front of the cells' names.
        dims: of the model.
        trainer: layout, optimizer, memory.
        head: on top of it.
        dtype: of its weights.
        reference: whether a frozen copy is kept.
        on_gpu: whether ``logprob_kernel="auto"`` means Triton.
    """
    stages = unlike_stages(trainer.layout)
    return max((_stage_cells(role, dims, trainer, head, dtype, s, reference, on_gpu) for s in stages), key=device_bytes)


def unlike_stages(layout: ParallelLayout) -> list[int]:
    """Stages one of which has the most of anything: the first, which holds most micro-batches; the last, which has the
    vocabulary; and their neighbours, where the ends have fewer layers, or the first ones no experts.
    """
    last = layout.pipeline - 1
    return sorted({0, min(1, last), max(0, last - 1), last})


def device_bytes(cells: Iterable[Cell]) -> float:
    """Bytes on the device, host memory left out."""
    return sum(cell.value for cell in cells if cell.unit == "B" and "host" not in cell.name)


def _stage_cells(
    role: str,
    dims: ModelDims,
    trainer: TrainerConfig,
    head: Head,
    dtype: str,
    stage: int,
    reference: bool,
    on_gpu: bool,
) -> list[Cell]:
    layout, size = trainer.layout, DTYPE_BYTES[dtype]
    rank = layout.rank_of(pipeline=stage)
    states = state_bytes(dims, trainer, head, rank, dtype)
    sharded = f", shared by {layout.data * layout.context} replicas" if trainer.distributed_optimizer else ""
    count = f"{states.parameters:,} parameters of stage {stage} ({layout})"
    tokens = trainer.tokens_per_microbatch
    layers = len(layout.layers_of_stage(stage, dims.layers))
    flying = pieces_in_flight(layout.pipeline, layout.virtual_pipeline, stage)
    each = activation_bytes_per_token(dims, trainer, dtype)
    passing = passing_bytes_per_token(dims, trainer, dtype)
    formula = (
        f"{tokens} tokens x ({layers} layers x {flying:g} micro-batches in flight x {each:,.0f} B + {passing:,.0f} B "
        f"in passing) (recompute={trainer.recompute})"
    )
    cells = [
        Cell(name=f"{role}.weights", value=states.weights, unit="B", formula=f"{count} x {size} B, padding included"),
        Cell(name=f"{role}.gradients", value=states.gradients, unit="B", formula=f"{count} x 4 B, padding included"),
        Cell(
            name=f"{role}.optimizer",
            value=states.optimizer,
            unit="B",
            formula="on the host" if trainer.optimizer_on_host else f"{count} x {12 if size == 2 else 8} B{sharded}",
        ),
        Cell(name=f"{role}.host_optimizer", value=states.host_optimizer, unit="B", formula=f"{count} x 12 B{sharded}"),
        Cell(name=f"{role}.activations", value=tokens * (layers * flying * each + passing), unit="B", formula=formula),
    ]
    if stage == layout.pipeline - 1 and head is Head.TOKEN:
        cells.append(_logits(role, dims, trainer, size, on_gpu and trainer.logprob_kernel == "auto"))
    if reference:
        value = states.parameters * size
        cells.append(Cell(name=f"{role}.reference", value=value, unit="B", formula=f"{count} x {size} B"))
    return cells


def _logits(role: str, dims: ModelDims, trainer: TrainerConfig, size: int, triton: bool) -> Cell:
    """What the backward pass of log-probs holds: a chunk of logits that becomes its own gradient (Triton), or two in
    float32 and one in the type of the weights (torch); and the gradient of the output layer.
    """
    rows = padded_vocabulary(dims.vocabulary, trainer.layout.tensor) // trainer.layout.tensor
    limit, each = (TRITON_CHUNK_BYTES, size) if triton else (TORCH_CHUNK_BYTES, 4)
    tokens = max(1, min(limit // (each * rows), trainer.tokens_per_microbatch))
    held, kernel = (each, "Triton") if triton else (8 + size, "torch")
    return Cell(
        name=f"{role}.logits",
        value=tokens * rows * held + (4 + size) * rows * dims.hidden,
        unit="B",
        formula=f"chunks of {tokens:,} tokens x {rows:,} logits x {held} B ({kernel}), and the "
        f"gradient of {rows:,} x {dims.hidden:,} weights in float32 and once more in {size} B",
    )


def pieces_in_flight(pipeline: int, virtual: int, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, in units of all its layers.

    Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters" (2021), section 2.2: one forward,
    one backward holds ``pipeline - stage``; interleaved, megatron-core's warm-up is ``2 (pipeline - stage - 1) +
    (virtual - 1) pipeline`` pieces, and one more is computed.
    """
    if virtual == 1:
        return pipeline - stage
    return (2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1) / virtual


def kv_bytes_per_token(dims: ModelDims, tensor: int, dtype: str) -> float:
    """Keys and values of one token on one worker of an engine.

    Pope et al., "Efficiently Scaling Transformer Inference" (2022), section 3.3; a latent is kept once per layer and
    not shared over workers (DeepSeek-V2, 2024, section 2.1.4).
    """
    size = DTYPE_BYTES[dtype]
    if dims.latent is not None:
        return dims.layers * (dims.latent.kv_rank + dims.latent.rotary_head_dim) * size
    return 2 * dims.layers * max(1, dims.kv_heads // tensor) * dims.head_dim * size


def cache_dtype(engine: EngineConfig, model_dtype: str) -> str:
    """Type of an engine's keys and values, for a model of a type."""
    return engine.kv_cache_dtype if engine.kv_cache_dtype != "auto" else engine.dtype(model_dtype)


def engine_weight_bytes(dims: ModelDims, engine: EngineConfig, model_dtype: str) -> int:
    """Weights of all workers of an engine: where it is quantised, a byte for each of the layers' linears and their
    float32 scales; two for the rest.
    """
    size, count = DTYPE_BYTES[engine.dtype(model_dtype)], total_parameters(dims, Head.TOKEN)
    if not engine.quantised:
        return size * count
    linears = dims.layers * sum(rows * columns for rows, columns in _linear_shapes(dims))
    scales = dims.layers * sum(_scales(engine.quantization, rows, columns) for rows, columns in _linear_shapes(dims))
    return size * (count - linears) + linears + 4 * scales


def _linear_shapes(dims: ModelDims) -> tuple[tuple[int, int], ...]:
    """Rows and columns of a dense layer's linears as an engine joins them: q with k and v, gate with up."""
    attention = dims.heads * dims.head_dim
    return (
        (attention + 2 * dims.kv_heads * dims.head_dim, dims.hidden),
        (dims.hidden, attention),
        (2 * dims.ffn_hidden, dims.hidden),
        (dims.hidden, dims.ffn_hidden),
    )


def _scales(quantization: str, rows: int, columns: int) -> int:
    blocks = -(-rows // 128) * -(-columns // 128)
    return {"fp8_per_channel": rows, "fp8_per_tensor": 1, "fp8_per_block": blocks}[quantization]


def engine_cells(dims: ModelDims, engine: EngineConfig, dtype: str) -> list[Cell]:
    """What one worker of an engine holds; ``dtype``: of the model."""
    count, kept = total_parameters(dims, Head.TOKEN), engine.dtype(dtype)
    kind = f"quantization={engine.quantization}, the rest {kept}" if engine.quantised else kept
    each = kv_bytes_per_token(dims, engine.tensor, cache_dtype(engine, dtype))
    cache = engine.kv_cache_mib * 2**20
    widest = engine.max_concurrent * 4 * dims.vocabulary
    return [
        Cell(
            name="engine.weights",
            value=engine_weight_bytes(dims, engine, dtype) / engine.tensor,
            unit="B",
            formula=f"{count:,} parameters ({kind}) / {engine.tensor} workers",
        ),
        Cell(
            name="engine.kv_cache",
            value=cache,
            unit="B",
            formula=f"engine.kv_cache_mib={engine.kv_cache_mib}: {cache / each:,.0f} tokens of {each:,.0f} B",
        ),
        Cell(
            name="engine.logits",
            value=2 * widest,
            unit="B",
            formula=f"2 x {engine.max_concurrent} sequences x {dims.vocabulary:,} tokens x 4 B",
        ),
    ]


def stage_parameters(dims: ModelDims, trainer: TrainerConfig, head: Head) -> list[int]:
    """Elements on the first rank of each stage: the balance of the pipeline."""
    layout = trainer.layout
    return [
        sum(p.elements for piece in rank_parameters(dims, layout, head, layout.rank_of(pipeline=s)) for p in piece)
        for s in range(layout.pipeline)
    ]
