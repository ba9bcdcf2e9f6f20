"""Log-probability and entropy of tokens straight from hidden states: the logits exist a few tokens at a time only.

Two implementations of :class:`Kernels` do what costs time: torch anywhere, Triton on GPUs. What they share, the
formulas and the exchange between tensor ranks, is here once.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl.device import has_cuda

CHUNK_BYTES = 256 * 2**20
"""Bound on a chunk's float32 logits in torch. Every chunk reads and writes the whole gradient of the weight once more,
so that small chunks cost time (the products want a thousand tokens or so); a few buffers of this size are all that is
held."""

NEVER = -1e30
"""The logit of padding: so small that its probability is zero, and finite, so that zero times it is zero."""


class Kernels(Protocol):
    """The passes over the vocabulary."""

    @property
    def name(self) -> str:
        """For reports."""

    def chunk_tokens(self, weight: Tensor) -> int:
        """Tokens at a time, so that their logits stay small; at least 1."""

    def statistics(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        temperature: float,
        real: int,
        with_entropy: bool,
        chunk: int,
    ) -> Tensor:
        """Of each token, over the logits x of this part of the vocabulary, divided by the temperature.

        Args:
            hidden: [N, h].
            weight: [V / ranks, h], of the same type.
            targets: [N] int64, rows of ``weight``; -1 where another rank has the target.
            temperature: above 0.
            real: rows of ``weight`` from this one on are padding.
            with_entropy: else the fourth number may be anything finite.
            chunk: tokens at a time, where logits are kept at all.

        Returns:
            [shares, 4, N] f32; for each share of this part of the vocabulary: x of the target, or 0; m = max x;
            sum exp(x - m); and sum exp(x - m) (m - x).
        """

    def logit_gradients(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        lse: Tensor,
        down: Tensor,
        *,
        temperature: float,
        real: int,
        entropy: Tensor | None,
        up: Tensor | None,
    ) -> Tensor:
        """Gradient of the undivided logits of a chunk, [n, V / ranks] in the type of ``weight``; 0 at padding.

        Args:
            hidden: [n, h].
            weight: as above.
            targets: [n], as above.
            lse: [n] f32, log of the sum of all ranks' exponentials.
            down: [n] f32, gradient of the log-probs by the temperature.
            temperature: above 0.
            real: as above.
            entropy: [n] f32; needed where ``up`` is given.
            up: [n] f32, gradient of the entropies by the temperature, if it is not zero.
        """


class TorchKernels:
    """Anywhere: logits of some tokens at a time in float32."""

    name = "torch"

    def chunk_tokens(self, weight: Tensor) -> int:
        """As many as :data:`CHUNK_BYTES` allows."""
        return max(1, CHUNK_BYTES // (4 * len(weight)))

    def statistics(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        temperature: float,
        real: int,
        with_entropy: bool,
        chunk: int,
    ) -> Tensor:
        """See :meth:`Kernels.statistics`; one share."""
        out = torch.zeros(1, 4, len(hidden), dtype=torch.float32, device=hidden.device)
        picked, largest, total, depth = out[0]
        for part in _chunks(len(hidden), chunk):
            logits = _scaled_logits(hidden[part], weight, temperature, real)
            picked[part] = _at_targets(logits, targets[part])
            largest[part] = logits.amax(-1)
            below = logits.sub_(largest[part].unsqueeze(-1))
            terms = below.exp() if with_entropy else below.exp_()
            total[part] = terms.sum(-1)
            if with_entropy:
                depth[part] = -torch.linalg.vecdot(terms, below)
        return out

    def logit_gradients(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        lse: Tensor,
        down: Tensor,
        *,
        temperature: float,
        real: int,
        entropy: Tensor | None,
        up: Tensor | None,
    ) -> Tensor:
        """See :meth:`Kernels.logit_gradients`."""
        down = down.unsqueeze(-1)
        log_p = _scaled_logits(hidden, weight, temperature, real).sub_(lse.unsqueeze(-1))
        if up is None or entropy is None:
            grad = log_p.exp_().mul_(-down)
        else:
            grad = log_p.exp()
            log_p.add_(entropy.unsqueeze(-1)).mul_(up.unsqueeze(-1))
            grad.mul_(log_p.add_(down)).neg_()
        grad.scatter_add_(-1, targets.clamp(min=0).unsqueeze(-1), down * (targets >= 0).unsqueeze(-1))
        return grad.to(weight.dtype)


class TritonKernels:
    """On a GPU, see :mod:`.logprobs_triton`."""

    name = "triton"

    def __init__(self) -> None:
        """Load Triton.

        Raises:
            ImportError: it is not installed.
        """
        from megatron_rl.mcore import logprobs_triton

        self._triton = logprobs_triton

    def chunk_tokens(self, weight: Tensor) -> int:
        """As many as this implementation's bound allows."""
        return max(1, self._triton.CHUNK_BYTES // (weight.element_size() * len(weight)))

    def statistics(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        temperature: float,
        real: int,
        with_entropy: bool,
        chunk: int,
    ) -> Tensor:
        """See :meth:`Kernels.statistics`; keeps no logits, whatever the chunk."""
        return self._triton.statistics(
            hidden, weight, targets, temperature=temperature, real=real, with_entropy=with_entropy
        )

    def logit_gradients(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        lse: Tensor,
        down: Tensor,
        *,
        temperature: float,
        real: int,
        entropy: Tensor | None,
        up: Tensor | None,
    ) -> Tensor:
        """See :meth:`Kernels.logit_gradients`."""
        logits = hidden @ weight.T
        self._triton.gradients_in_place(
            logits, targets, lse, down, temperature=temperature, real=real, entropy=entropy, up=up
        )
        return logits


def choose_kernels(asked: Literal["auto", "torch"]) -> Kernels:
    """What ``logprob_kernel`` of the settings means here: Triton's on a GPU that has it, unless torch is asked for."""
    return TritonKernels() if asked == "auto" and has_cuda() and find_spec("triton") else TorchKernels()


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    group: dist.ProcessGroup,
    with_entropy: bool,
    kernels: Kernels | None = None,
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
        kernels: what goes over the vocabulary; None: torch.
        chunk_tokens: tokens at a time; None: as the kernels choose.
        vocabulary: rows of the weights of all ranks together that stand for tokens; those behind them are padding,
            which has no probability and gets no gradient. None: there is no padding.

    Returns:
        log-probs [N] f32 and entropy [N] f32 or None, both in nats.
    """
    kernels = kernels or TorchKernels()
    chunk = chunk_tokens or kernels.chunk_tokens(weight)
    width = weight.shape[0]
    real = width if vocabulary is None else min(width, max(0, vocabulary - group.rank() * width))
    logprobs, entropy = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, temperature, group, with_entropy, kernels, chunk, real
    )
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


def _at_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """[n]; 0 where the target is -1."""
    return logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (targets >= 0)


def merge(parts: Tensor) -> Tensor:
    """The four numbers of :meth:`Kernels.statistics` over several parts of the vocabulary, [parts, 4, N], as those of
    all together, [4, N].
    """
    picked, largest, total, depth = parts.unbind(1)
    peak = largest.amax(0)
    share = (largest - peak).exp()
    inner = (share * (depth + (peak - largest) * total)).sum(0)
    return torch.stack([picked.sum(0), peak, (share * total).sum(0), inner])


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
        kernels: Kernels,
        chunk: int,
        real: int,
    ) -> tuple[Tensor, Tensor]:
        local = targets - group.rank() * len(weight)
        local = local.where((local >= 0) & (local < len(weight)), -1)
        mine = kernels.statistics(
            hidden, weight, local, temperature=temperature, real=real, with_entropy=with_entropy, chunk=chunk
        )
        picked, peak, total, depth = merge(_gather(merge(mine), group))
        log_total = total.log()
        logprobs, lse, entropy = picked - peak - log_total, peak + log_total, log_total.new_empty(0)
        if with_entropy:
            entropy = log_total + depth * (-log_total).exp()
        ctx.save_for_backward(hidden, weight, local, lse, entropy)
        ctx.temperature, ctx.kernels, ctx.chunk, ctx.real = temperature, kernels, chunk, real
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None, None, None]:
        hidden, weight, local, lse, entropy = ctx.saved_tensors
        if grad_entropy is not None and not grad_entropy.any():
            grad_entropy = None  # a loss whose entropy has the weight 0 sends zeros
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 9
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        down = torch.zeros_like(lse) if grad_logprobs is None else grad_logprobs / ctx.temperature
        up = None if grad_entropy is None else grad_entropy / ctx.temperature
        for part in _chunks(len(hidden), ctx.chunk):
            grad = ctx.kernels.logit_gradients(
                hidden[part],
                weight,
                local[part],
                lse[part],
                down[part],
                temperature=ctx.temperature,
                real=ctx.real,
                entropy=None if up is None else entropy[part],
                up=None if up is None else up[part],
            )
            torch.mm(grad, weight, out=grad_hidden[part])
            if grad.dtype == torch.float32:
                grad_weight.addmm_(grad.T, hidden[part])
            else:
                grad_weight += grad.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None, None, None
