"""Log-probability and entropy of tokens straight from hidden states: the logits exist a few tokens at a time only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 256 * 2**20
"""Bound on a chunk's float32 logits. Every chunk reads and writes the whole gradient of the weight once more, so that
small chunks cost time (the products want a thousand tokens or so); a few buffers of this size are all that is held."""

NEVER = -1e30
"""The logit of padding: so small that its probability is zero, and finite, so that zero times it is zero."""


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    group: dist.ProcessGroup,
    with_entropy: bool,
    chunk_tokens: int | None = None,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target, and the entropy, of ``softmax(hidden @ weight.T / temperature)``.

    Neither the logits of all tokens nor those of the whole vocabulary are ever held: each rank goes over its part of
    the vocabulary some tokens at a time, keeps a few numbers per token, and one exchange of those gives every rank the
    whole result. The backward computes each chunk's logits again.

    The product is rounded to the type of ``weight``, as an output layer rounds its logits; all that follows is float32.
    The gradient of ``weight`` is summed over the chunks in float32. That of ``hidden`` is this rank's part, which
    :class:`~megatron_rl.mcore.output_layer.TokenHead` sums over ``group``, as any column-parallel layer does.

    Args:
        hidden: [N, h], the same on all ranks.
        weight: [V / ranks, h], this rank's part of the vocabulary, the same type as ``hidden``.
        targets: [N] int64, token ids of the whole vocabulary.
        temperature: above 0.
        group: the ranks that the vocabulary is split over.
        with_entropy: else the entropy is not computed. Its gradient is computed only where it is not zero, so an
            entropy that is reported and not optimized costs no more in the backward.
        chunk_tokens: tokens at a time; None: as many as :data:`CHUNK_BYTES` allows.
        vocabulary: rows of the weights of all ranks together that stand for tokens; those behind them are padding,
            which has no probability and gets no gradient. None: there is no padding.

    Returns:
        log-probs [N] f32 and entropy [N] f32 or None, both in nats.
    """
    chunk = chunk_tokens or max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    width = weight.shape[0]
    real = width if vocabulary is None else min(width, max(0, vocabulary - group.rank() * width))
    logprobs, entropy = _LinearLogprobs.apply(hidden, weight, targets, temperature, group, with_entropy, chunk, real)  # type: ignore[no-untyped-call]
    return logprobs, entropy if with_entropy else None


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, tokens, size))


def _scaled_logits(hidden: Tensor, weight: Tensor, temperature: float, real: int) -> Tensor:
    """[tokens, V / ranks] f32, to be overwritten; :data:`NEVER` where row ``real`` or a later one stands."""
    logits = (hidden @ weight.T).float()
    if temperature != 1.0:
        logits.div_(temperature)
    if real < len(weight):
        logits[:, real:] = NEVER
    return logits


def _gather(stats: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...]."""
    if group.size() == 1:
        return stats.unsqueeze(0)
    parts = [torch.empty_like(stats) for _ in range(group.size())]
    dist.all_gather(parts, stats, group=group)
    return torch.stack(parts)


class _LinearLogprobs(torch.autograd.Function):
    """With x = logits / temperature. Rank r has, of its part of the vocabulary, m_r = max x, s_r = sum exp(x - m_r) and
    d_r = sum exp(x - m_r) (m_r - x); one rank has x_t of the target. With m = max m_r and u_r = exp(m_r - m):
    s = sum_r u_r s_r, log p(t) = (x_t - m) - log s and the entropy is H = log s + sum_r u_r (d_r + (m - m_r) s_r) / s.
    Differences are taken from the maximum first and H adds no terms of opposite sign: large logits cost no digits.

    Derivatives: d log p(t) / d x_i = [i = t] - p_i and d H / d x_i = -p_i (log p_i + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        group: dist.ProcessGroup,
        with_entropy: bool,
        chunk: int,
        real: int,
    ) -> tuple[Tensor, Tensor]:
        tokens, width = len(hidden), len(weight)
        local = targets - group.rank() * width
        mine = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1).unsqueeze(-1)
        stats = torch.empty(4 if with_entropy else 3, tokens, dtype=torch.float32, device=hidden.device)
        for part in _chunks(tokens, chunk):
            logits = _scaled_logits(hidden[part], weight, temperature, real)
            picked = logits.gather(-1, local[part]).squeeze(-1) * mine[part]
            largest = logits.amax(-1)
            below = logits.sub_(largest.unsqueeze(-1))
            terms = below.exp() if with_entropy else below.exp_()
            found = [picked, largest, terms.sum(-1)]
            if with_entropy:
                found.append(-torch.linalg.vecdot(terms, below))
            stats[:, part] = torch.stack(found)
        picked, largest, total, *depth = _gather(stats, group).unbind(1)
        picked, peak = picked.sum(0), largest.amax(0)
        share = (largest - peak).exp()
        log_total = (share * total).sum(0).log()
        logprobs, lse, entropy = picked - peak - log_total, peak + log_total, log_total.new_empty(0)
        if with_entropy:
            inner = (share * (depth[0] + (peak - largest) * total)).sum(0)
            entropy = log_total + inner * (-log_total).exp()
        ctx.save_for_backward(hidden, weight, local, mine, lse, entropy)
        ctx.temperature, ctx.chunk, ctx.real = temperature, chunk, real
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None, None]:
        hidden, weight, local, mine, lse, entropy = ctx.saved_tensors
        if grad_entropy is not None and not grad_entropy.any():
            grad_entropy = None  # a loss whose entropy has the weight 0 sends zeros
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 8
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        down = (torch.zeros_like(lse) if grad_logprobs is None else grad_logprobs / ctx.temperature).unsqueeze(-1)
        for part in _chunks(len(hidden), ctx.chunk):
            log_p = _scaled_logits(hidden[part], weight, ctx.temperature, ctx.real).sub_(lse[part].unsqueeze(-1))
            if grad_entropy is None:
                grad = log_p.exp_().mul_(-down[part])
            else:
                grad = log_p.exp()
                log_p.add_(entropy[part].unsqueeze(-1)).mul_(grad_entropy[part].unsqueeze(-1) / ctx.temperature)
                grad.mul_(log_p.add_(down[part])).neg_()
            grad.scatter_add_(-1, local[part], down[part] * mine[part].unsqueeze(-1))
            grad = grad.to(weight.dtype)
            torch.mm(grad, weight, out=grad_hidden[part])
            if grad.dtype == torch.float32:
                grad_weight.addmm_(grad.T, hidden[part])
            else:
                grad_weight += grad.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None, None
