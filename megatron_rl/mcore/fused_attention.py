"""Transformer Engine's fused attention on packed rows (``thd``), with context parallelism.

megatron-core hands packed rows to all parts of a layer at once, and cuts the rotary embedding row by row then. Here the
rows reach the attention alone: everything around it sees one plain sequence, as with the local modules.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_rl.mcore.attention import PackedRows


def packed_attention(core: type) -> type:
    """A class like ``core`` (megatron-core's TEDotProductAttention) that takes and gives what
    :class:`~megatron_rl.mcore.attention.PackedAttention` does.
    """

    class PackedFusedAttention(core):  # type: ignore[misc]
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None = None,
            packed_seq_params: PackedRows | None = None,
            **others: Any,
        ) -> Tensor:
            if packed_seq_params is None or attention_mask is not None:
                raise ValueError("attention needs packed rows and no mask: pass packed_seq_params=packed_rows(batch)")
            flat = (part.squeeze(1) if part.dim() == 4 else part for part in (query, key, value))
            attended: Tensor = super().forward(*flat, None, packed_seq_params=packed_seq_params.thd, **others)
            return attended.reshape(len(query), 1, -1)

    return PackedFusedAttention
