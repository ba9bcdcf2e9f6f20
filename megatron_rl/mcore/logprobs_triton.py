"""Triton kernels for log-probs and entropies; :mod:`.logprobs` has the formulas, and the same in torch.

*Forward.* A program takes a block of tokens through a share of the vocabulary: it multiplies tile after tile and keeps
four running numbers per token, as flash attention keeps its maximum and sum (Dao et al. 2022, arXiv:2205.14135,
algorithm 1); no logit leaves the chip. Shares are merged as the parts of tensor ranks are.

*Backward.* The logits of some tokens come from cuBLAS, one kernel turns them in place into their gradient, and cuBLAS
multiplies that twice. A kernel that fused all three products would have to add up the gradient of hidden states or of
the weight in memory, tile by tile, and its products would not be faster; reading and writing 16-bit logits costs 10
bytes per logit beside 6 h FLOPs: on an H100 an eighth more at h = 3584, half more at h = 896.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK_BYTES = 2**31
"""Bound on a chunk's logits in the backward, in the type of the weight. Each chunk also reads and writes the whole
gradient of the weight, which at a thousand tokens costs a GPU as much as its products."""

_PROGRAMS = 1024
"""Programs of a forward wanted: several for each of a GPU's processors, so that none waits long for the last."""
_SMALLEST_BLOCK = 64
_NEVER = tl.constexpr(-1e30)
_STATISTICS = 4


def statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float, real: int, with_entropy: bool
) -> Tensor:
    """As :meth:`~megatron_rl.mcore.logprobs.TorchKernels.statistics`, with a leading axis of shares: [shares, 4, N]."""
    tokens, width = len(hidden), len(weight)
    blocks = triton.cdiv(tokens, _SMALLEST_BLOCK)
    shares = max(1, min(_PROGRAMS // max(1, blocks), triton.cdiv(width, 256)))
    out = torch.empty(shares, _STATISTICS, tokens, dtype=torch.float32, device=hidden.device)

    def grid(chosen: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(tokens, chosen["BLOCK_T"]), shares

    hidden, weight = hidden.contiguous(), weight.contiguous()
    if tokens:
        _statistics[grid](
            hidden, weight, targets, out, tokens, real, hidden.shape[1], temperature, shares, WITH_ENTROPY=with_entropy
        )
    return out


def gradients_in_place(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    down: Tensor,
    *,
    temperature: float,
    real: int,
    entropy: Tensor | None = None,
    up: Tensor | None = None,
) -> None:
    """Turn logits into their gradient.

    Args:
        logits: [n, V / ranks] contiguous, not yet divided by the temperature; overwritten in their own type.
        targets: [n] int64, rows of this part of the vocabulary, -1 where another rank has the target.
        lse: [n] f32 log of the sum of all ranks' exponentials.
        down: [n] f32 gradient of the log-prob by the temperature.
        temperature: above 0.
        real: columns from this one on are padding.
        entropy: [n] f32, needed where ``up`` is given.
        up: [n] f32 gradient of the entropy by the temperature; None: there is none.
    """
    tokens, width = logits.shape
    block = 4096
    _gradients[(tokens, triton.cdiv(width, block))](
        logits,
        targets,
        lse,
        down,
        lse if entropy is None else entropy,
        down if up is None else up,
        width,
        real,
        temperature,
        WITH_ENTROPY=up is not None,
        BLOCK_V=block,
        num_warps=8,
    )


def _config(block_t: int, block_v: int, block_h: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_T": block_t, "BLOCK_V": block_v, "BLOCK_H": block_h}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


CONFIGS: Mapping[int, Sequence[triton.Config]] = {
    2: (
        _config(128, 256, 64, 8, 3),
        _config(128, 128, 64, 8, 4),
        _config(64, 256, 64, 8, 3),
        _config(128, 128, 64, 8, 3),
        _config(128, 256, 32, 8, 3),
        _config(64, 128, 64, 4, 3),
    ),
    # on no tensor core: larger blocks would spill, and take a minute to compile
    4: (_config(128, 64, 32, 8, 3), _config(64, 128, 32, 8, 3), _config(64, 64, 32, 4, 3)),
}
"""Blocks of the forward by the bytes of a number, the largest first."""
_TRIED = 3
_BARRIER_BYTES = 1024


def shared_bytes(config: triton.Config, number_bytes: int) -> int:
    """Bound on what a program asks of a processor's shared memory: a tile of hidden states and one of the weight for
    each stage that is under way.
    """
    blocks: dict[str, int] = config.kwargs
    tiles = blocks["BLOCK_H"] * (blocks["BLOCK_T"] + blocks["BLOCK_V"])
    return int(config.num_stages) * number_bytes * tiles + _BARRIER_BYTES


def fitting(number_bytes: int, limit: int) -> list[triton.Config]:
    """The first few choices for numbers of so many bytes that need no more than ``limit`` bytes of shared memory.

    Raises:
        ValueError: none does.
    """
    fit = [config for config in CONFIGS[number_bytes] if shared_bytes(config, number_bytes) <= limit]
    if not fit:
        least = min(shared_bytes(config, number_bytes) for config in CONFIGS[number_bytes])
        raise ValueError(
            f"the kernel of the log-probs needs {least / 1024:.0f} KiB of shared memory per block for numbers of "
            f"{number_bytes} bytes, this GPU has {limit / 1024:.0f} KiB: set logprob_kernel='torch'"
        )
    return fit[:_TRIED]


def _prune(configs: Sequence[triton.Config], arguments: Mapping[str, Any], **ignored: Any) -> list[triton.Config]:
    weight = arguments["weight_ptr"]
    properties = triton.runtime.driver.active.utils.get_device_properties(weight.device.index)
    return fitting(weight.element_size(), properties["max_shared_mem"])


# Triton's interpreter has no clock to choose by; its blocks are small, so that small inputs fill several.
_OFFERED = [_config(32, 64, 32, 4, 1)] if triton.knobs.runtime.interpret else [*CONFIGS[2], *CONFIGS[4]]


# Tried once for each size of model and type of weight, not for each number of tokens, which no two micro-batches share.
@triton.autotune(  # type: ignore[untyped-decorator]
    configs=_OFFERED,
    key=["real", "hidden_size", "WITH_ENTROPY"],
    prune_configs_by={"early_config_prune": _prune},
)
@triton.jit  # type: ignore[untyped-decorator]
def _statistics(  # type: ignore[no-untyped-def]
    hidden_ptr,
    weight_ptr,
    target_ptr,
    out_ptr,
    tokens,
    real,
    hidden_size,
    temperature,
    shares,
    WITH_ENTROPY: tl.constexpr,  # noqa: N803
    BLOCK_T: tl.constexpr,  # noqa: N803
    BLOCK_V: tl.constexpr,  # noqa: N803
    BLOCK_H: tl.constexpr,  # noqa: N803
):
    share = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = row < tokens
    target = tl.load(target_ptr + row, mask=inside, other=-1)
    peak = tl.full((BLOCK_T,), _NEVER, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    depth = tl.zeros((BLOCK_T,), tl.float32)
    picked = tl.zeros((BLOCK_T,), tl.float32)
    tiles = tl.cdiv(real, BLOCK_V)
    each = tl.cdiv(tiles, shares)
    for tile in range(share * each, tl.minimum(share * each + each, tiles)):
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        wanted = column < real
        product = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for start in range(0, hidden_size, BLOCK_H):
            inner = start + tl.arange(0, BLOCK_H)
            there = inner < hidden_size
            left = tl.load(
                hidden_ptr + row.to(tl.int64)[:, None] * hidden_size + inner[None, :],
                mask=inside[:, None] & there[None, :],
                other=0.0,
            )
            right = tl.load(
                weight_ptr + column.to(tl.int64)[None, :] * hidden_size + inner[:, None],
                mask=wanted[None, :] & there[:, None],
                other=0.0,
            )
            product = tl.dot(left, right, product, input_precision="ieee")
        # an output layer rounds its logits
        logit = product.to(weight_ptr.dtype.element_ty).to(tl.float32) / temperature
        logit = tl.where(wanted[None, :], logit, _NEVER)
        picked += tl.sum(tl.where(column[None, :] == target[:, None], logit, 0.0), 1)
        higher = tl.maximum(peak, tl.max(logit, 1))
        below = logit - higher[:, None]
        terms = tl.exp(below)
        shrink = tl.exp(peak - higher)
        if WITH_ENTROPY:
            depth = shrink * (depth + (higher - peak) * total) - tl.sum(terms * below, 1)
        total = shrink * total + tl.sum(terms, 1)
        peak = higher
    out = out_ptr + share * 4 * tokens + row
    tl.store(out, picked, mask=inside)
    tl.store(out + tokens, peak, mask=inside)
    tl.store(out + 2 * tokens, total, mask=inside)
    tl.store(out + 3 * tokens, depth, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _gradients(  # type: ignore[no-untyped-def]
    logit_ptr,
    target_ptr,
    lse_ptr,
    down_ptr,
    entropy_ptr,
    up_ptr,
    width,
    real,
    temperature,
    WITH_ENTROPY: tl.constexpr,  # noqa: N803
    BLOCK_V: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    place = logit_ptr + row.to(tl.int64) * width + column
    # at padding the probability is zero, and so is the gradient
    logit = tl.load(place, mask=column < real, other=_NEVER).to(tl.float32) / temperature
    down = tl.load(down_ptr + row)
    log_p = logit - tl.load(lse_ptr + row)
    factor = down
    if WITH_ENTROPY:
        factor = down + tl.load(up_ptr + row) * (log_p + tl.load(entropy_ptr + row))
    gradient = -tl.exp(log_p) * factor + tl.where(column == tl.load(target_ptr + row), down, 0.0)
    tl.store(place, gradient.to(logit_ptr.dtype.element_ty), mask=column < width)
