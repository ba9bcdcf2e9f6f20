"""The critic's output: one number per position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_rl.device import device


class ValueHead(torch.nn.Module):
    """Hidden states [s, b, h] -> values [s, b, 1]; stands where ``GPTModel.output_layer`` stood.

    It computes in float32 whatever the type of the model, is the same on every tensor rank, and starts at zero, so that
    an untrained critic predicts 0, or at noise of deviation ``std``, the same in every run. Its parameters are of the
    model's type (the optimizer's main weights of float32), since megatron-core cannot save an optimizer of parameters
    of two types.
    """

    def __init__(self, hidden: int, sequence_parallel: bool, dtype: torch.dtype, std: float = 0.0) -> None:
        super().__init__()
        weight = torch.zeros(1, hidden)
        if std:
            weight.normal_(std=std, generator=torch.Generator().manual_seed(0))
        self.weight = torch.nn.Parameter(weight.to(device=device(), dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=dtype, device=device()))
        self.sequence_parallel = sequence_parallel
        for parameter in self.parameters():
            # finalize_model_grads sums over tensor ranks what each computed from its part of the sequence
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, **ignored: Any) -> tuple[Tensor, None]:
        """Values and no bias, as an output layer answers."""
        values = F.linear(hidden.float(), self.weight.float(), self.bias.float())
        if self.sequence_parallel:
            # each tensor rank computes the same loss from the whole sequence, so the backward must not add them up
            values = gather_from_sequence_parallel_region(
                values, tensor_parallel_output_grad=False, group=parallel_state.get_tensor_model_parallel_group()
            )
        return values, None


@contextmanager
@torch.no_grad()
def read_through(chunks: Sequence[Any], vector: Tensor) -> Iterator[None]:
    """Let the critic's value head, where this rank has it, be ``vector`` [h] without a bias for a while."""
    heads = [module for chunk in chunks for module in chunk.modules() if isinstance(module, ValueHead)]
    own = [(head.weight.clone(), head.bias.clone()) for head in heads]
    for head in heads:
        head.weight.copy_(vector)
        head.bias.zero_()
    try:
        yield
    finally:
        for head, (weight, bias) in zip(heads, own, strict=True):
            head.weight.copy_(weight)
            head.bias.copy_(bias)
