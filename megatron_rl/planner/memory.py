"""Bytes of everything that a rank or an engine holds, by what it is for; each with the formula that gave it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_rl.config.schema import EngineConfig, TrainerConfig
from megatron_rl.layout import ParallelLayout, padded_vocabulary
from megatron_rl.model_dims import ModelDims
from megatron_rl.planner.states import (
    DTYPE_BYTES,
    StateBytes,
    linear_parameters,
    optimizer_shares,
    stage_elements,
    state_bytes,
    total_parameters,
    uncut_parameters,
)
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


def layer_activation_bytes(
    dims: ModelDims, trainer: TrainerConfig, dtype: str, *, sparse: bool, ring: bool = False
) -> float:
    """What a layer keeps for its backward pass, in bytes per token of a rank; ``sparse``: one with experts; ``ring``:
    context ranks pass keys and values around and do not gather them.

    Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), equations 1, 2 and 4,
    with the tensors of this architecture in place of GPT's: what megatron-core's own modules keep, to the byte but for
    a few numbers per token; Transformer Engine's norms keep less. With h, a (query heads x width), k (key heads x
    width) and f: 3 a + 3 k for attention (with fewer key/value heads than tensor ranks, 2 a + k and all heads' queries,
    keys and values), 5 f for a dense feed-forward block, two norms and what enters them (3 h each; 5 h in bfloat16,
    whose norms compute in float32), four rows of angles and the softmax's float32 sums. Experts keep
    h + 6 f for each token that they get, as many as if all were chosen alike, and the router its scores. Sequence
    parallelism shares what has h, and the tokens of experts, over tensor ranks. ``selective`` leaves out the sums,
    since the rows of this attention hold no scores; ``full`` keeps a layer's input. A test holds all of it against
    passes of the real model, but for what context ranks gather.
    """
    layout, size = trainer.layout, DTYPE_BYTES[dtype]
    share = 1 / layout.tensor if layout.sequence_parallel else 1.0
    experts = dims.experts if sparse else None
    if trainer.recompute == "full":
        return size * dims.hidden * share
    kept = size * 2 * _norm_rows(size) * dims.hidden * share + 8 + _attention_bytes(dims, layout.tensor, size)
    kept += size * _context_width(dims, layout, ring)
    if trainer.recompute == "none":
        kept += 4 * dims.heads / layout.tensor
    if experts is None:
        return kept + size * 5 * dims.ffn_hidden / layout.tensor
    routed = experts.per_token * (dims.hidden * layout.expert_tensor + 6 * experts.ffn_hidden)
    kept += (size * routed + 14 * experts.count + 20 * experts.per_token) * share
    gated = dims.hidden * share if experts.shared_gate else 0.0
    return kept + size * (5 * experts.shared_ffn_hidden / layout.tensor + gated)


def _attention_bytes(dims: ModelDims, tensor: int, size: int) -> float:
    """What attention keeps: queries, keys, values, what it makes of them, angles, and norms of heads or latents."""
    latent, norm = dims.latent, _norm_rows(size)
    if latent is not None:
        width = latent.plain_head_dim + latent.rotary_head_dim
        heads = 2 * dims.heads * (width + latent.value_head_dim) / tensor
        ranks = latent.kv_rank + (latent.query_rank or 0)
        apart = latent.rotary_head_dim if size == 4 else 0  # in bfloat16 the norm's copy leaves the rest of it free
        return size * (heads + norm * ranks + 4 * latent.rotary_head_dim + apart) + 4 * (
            1 + (latent.query_rank is not None)
        )
    queries, keys = dims.heads * dims.head_dim / tensor, max(1.0, dims.kv_heads / tensor) * dims.head_dim
    gathered = gathered_attention_width(dims, tensor)
    kept = size * ((gathered or queries + 2 * keys) + 2 * queries + keys + 4 * dims.head_dim)
    if not dims.qk_norm:
        return kept
    normed = (1 if gathered else 2) * queries + keys if size == 4 else 4 * (queries + keys)
    return kept + size * normed + 4 * (dims.heads + dims.kv_heads) / tensor


def _context_width(dims: ModelDims, layout: ParallelLayout, ring: bool) -> float:
    """Elements that a context rank keeps besides, for each token of its own. 0 where rows are on one rank.

    Gathered (``mcore.attention``): keys and values of whole rows, with a head for each of the queries'. In Transformer
    Engine's ``ring``: those of one rank, as they came last.
    """
    if layout.context == 1:
        return 0.0
    latent = dims.latent
    each, heads = 2 * dims.head_dim, dims.kv_heads if ring else dims.heads
    if latent is not None:
        each, heads = latent.plain_head_dim + latent.rotary_head_dim + latent.value_head_dim, dims.heads
    return (1 if ring else layout.context) * max(1.0, heads / layout.tensor) * each


def gathered_attention_width(dims: ModelDims, tensor: int) -> int:
    """Elements of a token's queries, keys and values of all heads where tensor ranks outnumber key/value heads: there
    megatron-core gathers the whole on each rank and computes with slices of it, which keep it. 0 elsewhere.
    """
    if dims.latent is not None or dims.kv_heads >= tensor:
        return 0
    return (dims.heads + 2 * dims.kv_heads) * dims.head_dim


def remembered_bytes_per_token(dims: ModelDims, trainer: TrainerConfig, dtype: str) -> float:
    """What the dispatcher of tokens in a layer with experts still holds of the last micro-batch when nothing else of
    the layer is kept, by the same test: hidden states, and where experts are elsewhere those on their way there twice;
    probabilities, which experts were chosen, and the order of tokens.
    """
    experts, layout = dims.experts, trainer.layout
    if experts is None or trainer.recompute != "full":
        return 0.0
    rows = dims.hidden * (1 + (2 * experts.per_token if layout.expert > 1 else 0))
    share = 1 / layout.tensor if layout.sequence_parallel else 1.0
    return (DTYPE_BYTES[dtype] * rows + 5 * experts.count + 8 * experts.per_token) * share


def layers_activation_bytes(
    dims: ModelDims, trainer: TrainerConfig, dtype: str, layers: Iterable[int], *, ring: bool = False
) -> float:
    """The same of these layers together."""
    held = tuple(layers)
    sparse = len(dims.sparse_layers.intersection(held))
    kept = (len(held) - sparse) * layer_activation_bytes(dims, trainer, dtype, sparse=False, ring=ring)
    return kept + sparse * layer_activation_bytes(dims, trainer, dtype, sparse=True, ring=ring)


def _norm_rows(size: int) -> int:
    """Elements, for each that enters it, that a norm keeps: its input, that normalised, and what it gives; in bfloat16
    the first two are float32.
    """
    return 5 if size == 2 else 3


def passing_bytes_per_token(dims: ModelDims, trainer: TrainerConfig, dtype: str, *, ring: bool = False) -> float:
    """The most that a pass holds beyond what layers keep: the last norm and the head, or one layer's gradients on their
    way, and with ``full`` that layer computed again.

    Under sequence parallelism megatron-core gathers what enters products into one buffer that stays; beside it lies in
    its whole width what a product gives until its sum is scattered, or the gradient that a product gets, with that of
    its own weights.
    """
    layout, size = trainer.layout, DTYPE_BYTES[dtype]
    hidden = dims.hidden / (layout.tensor if layout.sequence_parallel else 1)
    whole = dims.hidden if layout.sequence_parallel else 0
    ffn = dims.ffn_hidden / layout.tensor
    gradients = {}
    if len(dims.sparse_layers) < dims.layers:
        weights = ffn * dims.hidden / trainer.tokens_per_microbatch
        gradients[False] = max(hidden + 2 * ffn, whole + 2 * hidden + ffn + weights)
    if dims.experts is not None and dims.sparse_layers:
        # of tokens on their way from the experts: what these gave, that put in order, and weighed; where tensor ranks
        # share experts, what these gave and that in order of all their tokens, and what is left of the sum over them,
        # which is taken in float32
        shared = layout.expert_tensor
        copies = (3 if size == 4 else 4) if shared == 1 else (2 * shared + 2 if size == 4 else 4 * shared + 3)
        gradients[True] = copies * dims.experts.per_token * hidden
        gradients[True] += hidden if dims.experts.shared_ffn_hidden else 0.0
    if trainer.recompute == "full":
        if size == 2 and False in gradients:  # a norm's gradient in float32, when that of the block behind it is done
            gradients[False] = max(gradients[False], 9 * hidden - 5 * ffn)
        again = replace(trainer, recompute="none")
        return max(
            layer_activation_bytes(dims, again, dtype, sparse=sparse, ring=ring)
            + size * (rows + whole - (2 * hidden if sparse else 0))
            for sparse, rows in gradients.items()
        )
    head = 12 if size == 2 else 6
    scattered = whole + 4 * hidden if layout.sequence_parallel else 0
    return size * (whole + max(head * hidden, scattered, *gradients.values()))


def trainer_cells(
    role: str,
    dims: ModelDims,
    trainer: TrainerConfig,
    head: Head,
    dtype: str,
    *,
    reference: bool,
    on_gpu: bool,
    ring: bool = False,
    longest_row: int = 0,
    rows: int | None = None,
) -> list[Cell]:
    """What the fullest rank of a model holds while it trains; device memory, but for ``host_optimizer``. Apart from
    that ``start``, which is the most that a rank holds before its first pass.

    Args:
        role: in front of the cells' names.
        dims: of the model.
        trainer: layout, optimizer, memory.
        head: on top of it.
        dtype: of its weights.
        reference: whether a frozen copy is kept.
        on_gpu: whether ``logprob_kernel="auto"`` means Triton.
        ring: whether context ranks pass keys and values around, as Transformer Engine's attention does.
        longest_row: tokens of a row that may come: where context ranks hold more of it than
            ``tokens_per_microbatch``, it makes a micro-batch of its own.
        rows: of an optimizer step, of all replicas together; None: as many as fill the pipeline.
    """
    layout = trainer.layout
    filled = replace(
        trainer, tokens_per_microbatch=max(trainer.tokens_per_microbatch, -(-longest_row // layout.context))
    )
    most = math.inf
    if rows is not None:
        together = filled.tokens_per_microbatch * layout.context // longest_row if longest_row else 1
        most = most_micro_batches(layout, rows, together)
    stages = unlike_stages(dims, layout)
    found = (_stage_cells(role, dims, filled, head, dtype, stage, most, reference, on_gpu, ring) for stage in stages)
    starts = (_start(role, dims, trainer, head, dtype, stage, reference) for stage in stages)
    return [*max(found, key=device_bytes), max(starts, key=lambda cell: cell.value)]


def unlike_stages(dims: ModelDims, layout: ParallelLayout) -> list[int]:
    """Stages one of which has the most of anything: the first, which holds most micro-batches; the last, which has the
    vocabulary; their neighbours; and of stages with so many layers of either kind, dense or of experts, the first.
    """
    last = layout.pipeline - 1
    kinds: dict[tuple[int, int], int] = {}
    sparse = dims.sparse_layers
    for stage in range(layout.pipeline):
        held = layout.layers_of_stage(stage, dims.layers)
        kinds.setdefault((len(held), len(sparse.intersection(held))), stage)
    return sorted({0, min(1, last), max(0, last - 1), last, *kinds.values()})


def device_bytes(cells: Iterable[Cell]) -> float:
    """Bytes on the device at work: host memory and the start left out."""
    return sum(
        cell.value
        for cell in cells
        if cell.unit == "B" and "host" not in cell.name and not cell.name.endswith(".start")
    )


def start_bytes(cells: Iterable[Cell]) -> float:
    """Bytes on the device before the first pass, if all start at once."""
    return sum(cell.value for cell in cells if cell.name.endswith(".start"))


def _stage_cells(
    role: str,
    dims: ModelDims,
    trainer: TrainerConfig,
    head: Head,
    dtype: str,
    stage: int,
    micro_batches: float,
    reference: bool,
    on_gpu: bool,
    ring: bool,
) -> list[Cell]:
    layout, size = trainer.layout, DTYPE_BYTES[dtype]
    states = _states(dims, trainer, head, dtype, stage)
    shares = [
        f"{elements:,} {what} / {replicas} replicas"
        for (elements, replicas), what in zip(
            optimizer_shares(dims, trainer, head, stage).values(), ("parameters", "of experts"), strict=True
        )
        if elements
    ]
    owned = f"({' + '.join(shares)}) of stage {stage} ({layout}) x"
    count = f"{states.parameters:,} parameters of stage {stage} ({layout})"
    tokens = trainer.tokens_per_microbatch
    held = layout.layers_of_stage(stage, dims.layers)
    flying = min(micro_batches, pieces_in_flight(layout.pipeline, layout.virtual_pipeline, stage))
    kept = layers_activation_bytes(dims, trainer, dtype, held, ring=ring)
    passing = passing_bytes_per_token(dims, trainer, dtype, ring=ring)
    sparse = len(dims.sparse_layers.intersection(held))
    kinds = [(len(held) - sparse, False, "layers"), (sparse, True, "layers with experts")]
    each = " + ".join(
        f"{count} {what} x {layer_activation_bytes(dims, trainer, dtype, sparse=kind, ring=ring):,.0f} B"
        for count, kind, what in kinds
        if count
    )
    remembered = sparse * remembered_bytes_per_token(dims, trainer, dtype)
    dispatched = f" + {remembered:,.0f} B of dispatchers" if remembered else ""
    formula = (
        f"{tokens:,} tokens x ({flying:g} micro-batches in flight x ({each}) + {passing:,.0f} B in passing"
        f"{dispatched}) (recompute={trainer.recompute})"
    )
    cells = [
        Cell(name=f"{role}.weights", value=states.weights, unit="B", formula=f"{count} x {size} B, padding included"),
        Cell(name=f"{role}.gradients", value=states.gradients, unit="B", formula=f"{count} x 4 B, padding included"),
        Cell(
            name=f"{role}.optimizer",
            value=states.optimizer,
            unit="B",
            formula="on the host" if trainer.optimizer_on_host else f"{owned} {12 if size == 2 else 8} B",
        ),
        Cell(
            name=f"{role}.host_optimizer",
            value=states.host_optimizer,
            unit="B",
            formula=f"{owned} 12 B" if trainer.optimizer_on_host else "on the device",
        ),
        Cell(
            name=f"{role}.activations", value=tokens * (flying * kept + passing + remembered), unit="B", formula=formula
        ),
    ]
    if stage == layout.pipeline - 1 and head is Head.TOKEN:
        cells.append(_logits(role, dims, trainer, size, on_gpu and trainer.logprob_kernel == "auto"))
    if trainer.fp8 is not None and not trainer.fp8.parameters:
        cells.append(_fp8_copies(f"{role}.fp8_weights", dims, trainer, stage, "rows", "columns"))
    if reference:
        value = states.parameters * size
        cells.append(Cell(name=f"{role}.reference", value=value, unit="B", formula=f"{count} x {size} B"))
        if trainer.fp8 is not None and trainer.fp8.logprobs and not trainer.fp8.parameters:
            cells.append(_fp8_copies(f"{role}.reference_fp8_weights", dims, trainer, stage, "rows"))
    return cells


def _states(dims: ModelDims, trainer: TrainerConfig, head: Head, dtype: str, stage: int) -> StateBytes:
    layout = trainer.layout
    merged = replace(layout, context=1, data=layout.context * layout.data)  # context ranks hold what replicas do
    return state_bytes(dims, replace(trainer, layout=merged), head, merged.rank_of(pipeline=stage), dtype)


def _start(
    role: str, dims: ModelDims, trainer: TrainerConfig, head: Head, dtype: str, stage: int, reference: bool
) -> Cell:
    """The most before the first pass: while weights move to the distributed optimizer's buffer, or when all is there,
    the reference last.
    """
    size, states = DTYPE_BYTES[dtype], _states(dims, trainer, head, dtype, stage)
    count = f"{states.parameters:,} parameters of stage {stage} ({trainer.layout})"
    buffers = states.weights + states.gradients
    built = buffers + states.optimizer + (size * states.parameters if reference else 0)
    formula = f"{count} x ({size} + 4) B, padding included, and "
    if built < states.start:
        formula += f"{states.start - buffers:,} B of weights that are not in their buffer yet"
    else:
        formula += f"{built - buffers:,} B of optimizer{' and reference' if reference else ''}"
    return Cell(name=f"{role}.start", value=max(built, states.start), unit="B", formula=formula)


def _fp8_copies(name: str, dims: ModelDims, trainer: TrainerConfig, stage: int, *kept: str) -> Cell:
    """What Transformer Engine keeps of the weights of linears from one micro-batch to the next: as rows, for the
    products of the forward pass, and as columns, for those of the backward pass.
    """
    assert trainer.fp8 is not None
    layout, ends = trainer.layout, trainer.fp8.layers_kept
    held = [n for n in layout.layers_of_stage(stage, dims.layers) if ends <= n < dims.layers - ends]
    sparse = len(dims.sparse_layers.intersection(held))
    count = (len(held) - sparse) * linear_parameters(dims, layout, sparse=False)
    count += sparse * linear_parameters(dims, layout, sparse=True)
    return Cell(
        name=name,
        value=len(kept) * count,
        unit="B",
        formula=f"{count:,} weights of linears in {len(held)} layers x {len(kept)} B: {' and '.join(kept)} in FP8, "
        "besides",
    )


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


def most_micro_batches(layout: ParallelLayout, rows: int, together: int) -> int:
    """Micro-batches that a replica makes of its share of ``rows`` where all are as long as may be and ``together`` of
    them fill one; the interleaved schedule takes them by as many as there are stages. Of shorter rows there may be more
    micro-batches, of no more tokens in all.
    """
    share = -(-rows // layout.data)
    count = -(-share // together)
    return count if layout.virtual_pipeline == 1 else -(-count // layout.pipeline) * layout.pipeline


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
    """Keys and values of one token on one worker of an engine."""
    return dims.cached_width(tensor) * DTYPE_BYTES[dtype]


def worker_weight_bytes(dims: ModelDims, engine: EngineConfig, model_dtype: str) -> float:
    """Weights of one worker of an engine: its part of what vLLM cuts over workers, and all of the rest
    (:func:`uncut_parameters`); where workers outnumber key/value heads, one of these each. Where the engine is
    quantised, a byte for each of the layers' linears and their float32 scales; two for what else there is.
    """
    size, whole = DTYPE_BYTES[engine.dtype(model_dtype)], uncut_parameters(dims)
    count = whole + (total_parameters(dims, Head.TOKEN) - whole) / engine.tensor
    if dims.latent is None and engine.tensor > dims.kv_heads:
        copied = 2 * dims.head_dim * (dims.hidden + dims.qkv_bias)
        count += dims.layers * copied * (1 - dims.kv_heads / engine.tensor)
    if not engine.quantised:
        return size * count
    shapes = _linear_shapes(dims, engine.tensor)
    linears = dims.layers * sum(rows * columns for rows, columns in shapes)
    scales = dims.layers * sum(_scales(engine.quantization, rows, columns) for rows, columns in shapes)
    return size * (count - linears) + linears + 4 * scales


def _linear_shapes(dims: ModelDims, workers: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of a dense layer's linears as a worker joins them: q with k and v, gate with up."""
    attention, keys = dims.heads * dims.head_dim // workers, max(1, dims.kv_heads // workers) * dims.head_dim
    return (
        (attention + 2 * keys, dims.hidden),
        (dims.hidden, attention),
        (2 * dims.ffn_hidden // workers, dims.hidden),
        (dims.hidden, dims.ffn_hidden // workers),
    )


def _scales(quantization: str, rows: int, columns: int) -> int:
    blocks = -(-rows // 128) * -(-columns // 128)
    return {"fp8_per_channel": rows, "fp8_per_tensor": 1, "fp8_per_block": blocks}[quantization]


def engine_cells(dims: ModelDims, engine: EngineConfig, dtype: str) -> list[Cell]:
    """What one worker of an engine holds; ``dtype``: of the model."""
    count, kept = total_parameters(dims, Head.TOKEN), engine.dtype(dtype)
    kind = f"quantization={engine.quantization}, the rest {kept}" if engine.quantised else kept
    each = kv_bytes_per_token(dims, engine.tensor, engine.cache_dtype(dtype))
    cache = engine.kv_cache_mib * 2**20
    widest = engine.max_concurrent * 4 * dims.vocabulary
    return [
        Cell(
            name="engine.weights",
            value=worker_weight_bytes(dims, engine, dtype),
            unit="B",
            formula=f"{count:,} parameters ({kind}) / {engine.tensor} workers, of which {uncut_parameters(dims):,} are "
            "whole on each",
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
    stages = range(trainer.layout.pipeline)
    return [sum(stage_elements(dims, trainer.layout, head, stage).values()) for stage in stages]
