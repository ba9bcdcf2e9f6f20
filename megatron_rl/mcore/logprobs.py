"""Log-probability and entropy of tokens from logits that are split over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def vocab_parallel_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, group: dist.ProcessGroup, *, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target, and the entropy, of ``softmax(logits / temperature)``.

    The logits are never gathered: each rank sums up its part of the vocabulary in three numbers per token, and one
    exchange of those gives every rank the whole result. Of its part, only the logits are kept for the backward.

    Args:
        logits: [N, V / ranks], any float type; this rank's part of the vocabulary.
        targets: [N] int64, token ids of the whole vocabulary.
        temperature: above 0.
        group: the ranks that the vocabulary is split over.
        with_entropy: else the entropy is not computed.

    Returns:
        log-probs [N] f32 and entropy [N] f32 or None, both in nats.
    """
    logprobs, entropy = _VocabParallel.apply(logits, targets, temperature, group, with_entropy)  # type: ignore[no-untyped-call]
    return logprobs, entropy if with_entropy else None


def _gather(stats: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...]."""
    if group.size() == 1:
        return stats.unsqueeze(0)
    parts = [torch.empty_like(stats) for _ in range(group.size())]
    dist.all_gather(parts, stats, group=group)
    return torch.stack(parts)


class _VocabParallel(torch.autograd.Function):
    """With x = logits / temperature, over all ranks r: lse = logsumexp_r(lse_r) and log p(t) = x_t - lse. Rank r's part
    of the vocabulary has the share w_r = exp(lse_r - lse) and by itself the entropy H_r, so H = sum_r w_r (H_r + lse -
    lse_r); H_r is summed from x - lse_r, since a mean of x itself would lose digits where logits are large.
    Derivatives: d log p(t) / d x_i = [i = t] - p_i and d H / d x_i = -p_i (x_i - lse + H).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, group: dist.ProcessGroup, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        scaled = logits.float() / temperature if temperature != 1.0 else logits.float()
        width = scaled.shape[-1]
        local = targets - group.rank() * width
        mine = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1)
        picked = scaled.gather(-1, local.unsqueeze(-1)).squeeze(-1) * mine
        part_lse = scaled.logsumexp(-1)
        stats = [part_lse, picked]
        if with_entropy:
            centred = scaled - part_lse.unsqueeze(-1)
            stats.append(-torch.linalg.vecdot(centred.exp(), centred))
        parts = _gather(torch.stack(stats), group)
        lse = parts[:, 0].logsumexp(0)
        logprobs = parts[:, 1].sum(0) - lse
        entropy = lse.new_empty(0)
        if with_entropy:
            entropy = ((parts[:, 0] - lse).exp() * (parts[:, 2] + lse - parts[:, 0])).sum(0)
        ctx.save_for_backward(logits, local, mine, lse, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        logits, local, mine, lse, entropy = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, None
        centred = logits.float() / ctx.temperature - lse.unsqueeze(-1)  # log p
        grad = centred.exp()
        down = lse.new_zeros(lse.shape) if grad_logprobs is None else grad_logprobs
        if grad_entropy is None:
            grad *= -down.unsqueeze(-1)
        else:
            grad *= -(centred.add_(entropy.unsqueeze(-1)).mul_(grad_entropy.unsqueeze(-1)).add_(down.unsqueeze(-1)))
        grad.scatter_add_(-1, local.unsqueeze(-1), (down * mine).unsqueeze(-1))
        return grad.div_(ctx.temperature).to(logits.dtype), None, None, None, None
