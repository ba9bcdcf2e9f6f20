"""What ranks run in the tests of log-probs and entropies, and plain torch to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rl.layout import ParallelLayout

VOCABULARY, HIDDEN = 24, 16


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head and what it is asked.

    ``logprobs`` and ``entropy`` are the weights of their random sums in the loss; an entropy of None is not asked for.
    """

    tensor: int = 1
    sequence_parallel: bool = False
    dtype: Any = torch.float32
    tokens: int = 18
    chunk: int | None = None
    temperature: float = 0.6
    logprobs: float = 1.0
    entropy: float | None = 1.0

    def __str__(self) -> str:
        """For the names of tests."""
        return " ".join(str(value) for value in vars(self).values())


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What came out, in float32; the gradients whole."""

    logprobs: Tensor
    entropy: Tensor | None
    grad_hidden: Tensor
    grad_weight: Tensor


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Of the whole head."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    sums: Tensor


def inputs(head: Head) -> Inputs:
    """The same on every rank; logits spread by about 5."""
    generator = torch.Generator().manual_seed(0)
    return Inputs(
        hidden=torch.randn(head.tokens, HIDDEN, generator=generator).to(head.dtype),
        weight=(1.2 * torch.randn(VOCABULARY, HIDDEN, generator=generator)).to(head.dtype),
        targets=torch.randint(0, VOCABULARY, (head.tokens,), generator=generator),
        sums=torch.randn(2, head.tokens, generator=generator),
    )


def _loss(head: Head, sums: Tensor, logprobs: Tensor, entropy: Tensor | None) -> Tensor:
    total = head.logprobs * (sums[0] * logprobs).sum()
    return total if entropy is None else total + head.entropy * (sums[1] * entropy).sum()


def dense(head: Head, compute: torch.dtype) -> Numbers:
    """By autograd over all logits, which are computed and kept in ``compute``; the rest is float32."""
    given = inputs(head)
    hidden, weight = (tensor.to(compute).requires_grad_() for tensor in (given.hidden, given.weight))
    log_p = (F.linear(hidden, weight).float() / head.temperature).log_softmax(-1)
    logprobs = log_p.gather(-1, given.targets[:, None])[:, 0]
    entropy = None if head.entropy is None else -(log_p.exp() * log_p).sum(-1)
    _loss(head, given.sums, logprobs, entropy).backward()
    return _numbers(logprobs, entropy, hidden.grad, weight.grad)


def _numbers(logprobs: Tensor, entropy: Tensor | None, grad_hidden: Any, grad_weight: Any) -> Numbers:
    return Numbers(
        logprobs=logprobs.detach(),
        entropy=None if entropy is None else entropy.detach(),
        grad_hidden=grad_hidden.float(),
        grad_weight=grad_weight.float(),
    )


@contextmanager
def _groups(rank: int, port: int, layout: ParallelLayout) -> Iterator[None]:
    from megatron_rl.mcore.groups import start_groups, stop_groups

    start_groups(layout, rank=rank, host="127.0.0.1", port=port, timeout_s=30.0, seed=0)
    yield
    stop_groups()


def chunked(rank: int, port: int, head: Head) -> Numbers:
    """By the model's own output layer and :func:`linear_logprobs`; each rank puts the gradients of all together."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_rl.mcore.logprobs import TorchKernels, linear_logprobs
    from megatron_rl.mcore.output_layer import TokenHead

    def whole(part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(head.tensor)]
        dist.all_gather(parts, part)
        return torch.cat(parts)

    with _groups(rank, port, ParallelLayout(tensor=head.tensor)):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=2,
            params_dtype=head.dtype,
            tensor_model_parallel_size=head.tensor,
            sequence_parallel=head.sequence_parallel,
        )
        projection = ColumnParallelLinear(HIDDEN, VOCABULARY, config=config, init_method=lambda w: w, bias=False)
        layer = TokenHead(projection, VOCABULARY, TorchKernels())
        given = inputs(head)
        with torch.no_grad():
            layer.weight.copy_(given.weight.chunk(head.tensor)[rank])
        hidden = given.hidden.chunk(head.tensor)[rank] if head.sequence_parallel else given.hidden
        hidden = hidden.clone().requires_grad_()
        logprobs, entropy = linear_logprobs(
            layer(hidden[:, None])[0][:, 0],
            layer.weight,
            given.targets,
            temperature=head.temperature,
            group=dist.group.WORLD,
            with_entropy=head.entropy is not None,
            chunk_tokens=head.chunk,
        )
        _loss(head, given.sums, logprobs, entropy).backward()
        assert hidden.grad is not None
        assert layer.weight.grad.dtype == head.dtype
        grad_hidden = whole(hidden.grad) if head.sequence_parallel else hidden.grad
        return _numbers(logprobs, entropy, grad_hidden, whole(layer.weight.grad))


class _Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen += [tuple(part.shape) for part in torch.utils._pytree.tree_leaves(result) if isinstance(part, Tensor)]
        return result


def shapes(rank: int, port: int, head: Head, chunk_bytes: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes of all tensors of a forward, and of its backward, where chunks hold at most ``chunk_bytes``."""
    import torch.distributed as dist

    from megatron_rl.mcore import logprobs as module

    before = module.CHUNK_BYTES
    with _groups(rank, port, ParallelLayout()):
        module.CHUNK_BYTES = chunk_bytes
        given = inputs(head)
        hidden, weight = given.hidden.requires_grad_(), given.weight.requires_grad_()
        with _Shapes() as forward:
            logprobs, entropy = module.linear_logprobs(
                hidden,
                weight,
                given.targets,
                temperature=head.temperature,
                group=dist.group.WORLD,
                with_entropy=head.entropy is not None,
            )
        loss = _loss(head, given.sums, logprobs, entropy)
        with _Shapes() as backward:
            loss.backward()
        module.CHUNK_BYTES = before
    return forward.seen, backward.seen


def of_these_logits(
    rank: int, port: int, world: int, logits: Tensor, vocabulary: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of target 0 and entropies of ``logits`` [tokens, V], handed over without any rounding, and the gradient
    of the sum of all of them [V / ranks, tokens].
    """
    import torch.distributed as dist

    from megatron_rl.mcore.logprobs import linear_logprobs

    with _groups(rank, port, ParallelLayout(tensor=world)):
        hidden, weight = torch.eye(len(logits)), logits.T.chunk(world)[rank].clone().requires_grad_()
        targets = torch.zeros(len(logits), dtype=torch.int64)
        logprobs, entropy = linear_logprobs(
            hidden,
            weight,
            targets,
            temperature=1.0,
            group=dist.group.WORLD,
            with_entropy=True,
            vocabulary=vocabulary,
        )
        assert entropy is not None
        (logprobs.sum() + entropy.sum()).backward()
        assert weight.grad is not None
        return logprobs.detach(), entropy.detach(), weight.grad
