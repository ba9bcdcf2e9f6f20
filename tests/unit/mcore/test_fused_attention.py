"""What Transformer Engine's attention is handed; a class that only looks at it stands for megatron-core's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_rl.device import prepare_megatron

prepare_megatron()

from megatron_rl.batches import PackedTokens  # noqa: E402
from megatron_rl.mcore.attention import packed_rows  # noqa: E402
from megatron_rl.mcore.fused_attention import packed_attention  # noqa: E402


class Looks(torch.nn.Module):
    """Gives [N, heads * width], as Transformer Engine's attention does for packed rows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: None, *, packed_seq_params: Any) -> Tensor:
        assert query.dim() == key.dim() == value.dim() == 3
        self.seen.append(packed_seq_params)
        return query.reshape(len(query), -1)


def test_every_layer_gets_the_same_bounds_of_the_rows_that_are_not_empty() -> None:
    zeros = torch.zeros(7, dtype=torch.int64)
    batch = PackedTokens(
        inputs=zeros,
        targets=zeros,
        positions=zeros,
        cu_seqlens=torch.tensor([0, 3, 3, 7], dtype=torch.int32),
        max_length=4,
        loss_mask=zeros.bool(),
        loss_weight=zeros.float(),
    )
    rows, attention = packed_rows(batch), packed_attention(Looks)()
    query, key = torch.randn(7, 1, 4, 8), torch.randn(7, 1, 2, 8)
    for _ in range(2):
        assert torch.equal(attention(query, key, key, None, rows), query.reshape(7, 1, 32))
    first, second = attention.seen
    assert first is second
    bounds = first.cu_seqlens_q
    assert (bounds.tolist(), bounds.dtype) == ([0, 3, 7], torch.int32)
    # one tensor, not equal ones: Transformer Engine takes others for padding between rows, which few kernels know
    assert all(each is bounds for each in (first.cu_seqlens_kv, first.cu_seqlens_q_padded, first.cu_seqlens_kv_padded))
    assert (first.qkv_format, first.max_seqlen_q, first.max_seqlen_kv) == ("thd", 4, 4)
