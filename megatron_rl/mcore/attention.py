"""Attention over packed rows on torch's SDPA, and rotary positions to go with it.

Rows lie end to end in one sequence of a batch of one. megatron-core's own way for that (``thd``) cuts the rotary
embedding row by row in every layer, and SDPA row by row would cost a kernel per row; with many short rows both take
longer than the arithmetic. Here the rows are grouped once per micro-batch: rows of like length are computed as one
padded batch, and the rotary angles are looked up by position, as for any unpacked sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_rl.batches import PackedTokens

MAX_PADDING = 1.5
"""A group may hold up to this many times its tokens, padding counted."""


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """Neighbouring rows that attention computes as one padded batch.

    Attributes:
        start, stop: the positions they take.
        rows: how many.
        length: of the longest.
        slots: [stop - start] int64, where each position goes in the padded [rows * length]; None without padding.
        source: [rows * length] int64, the position (from ``start``) in each slot, 0 where it is padding; None without.
    """

    start: int
    stop: int
    rows: int
    length: int
    slots: Tensor | None
    source: Tensor | None


@dataclass(frozen=True, kw_only=True)
class ContextPlan:
    """How a context rank sees the keys and values of all ranks.

    Attributes:
        order: [N of all ranks] int64, which of the gathered positions comes where, rows in order.
        groups: the same groups of rows as the queries', over all positions.
        mask: for each group [rows, 1, query length, key length] bool, which keys a query sees.
    """

    order: Tensor
    groups: list[RowGroup]
    mask: list[Tensor]


@dataclass
class PackedRows(PackedSeqParams):  # type: ignore[misc]
    """What the layers must know of a packed micro-batch; megatron-core hands it through unchanged.

    ``qkv_format`` stays unset, so that megatron-core treats the rows as one plain sequence. How the rows are grouped is
    planned when it is first asked for: Transformer Engine's attention never asks.

    Attributes:
        positions: [N] int64, of each token of this rank in its row.
        starts: of the rows and, last, where they end; empty rows are left out.
        shares: where several context ranks share each row, which positions each of them holds.
    """

    positions: Tensor | None = None
    starts: list[int] = field(default_factory=list)
    shares: Sequence[Tensor] = ()

    @cached_property
    def _cuts(self) -> list[tuple[int, int]]:
        return _group_bounds(self.starts)

    @cached_property
    def groups(self) -> list[RowGroup]:
        """Rows computed together, in order."""
        assert self.positions is not None
        size, device = max(1, len(self.shares)), self.positions.device
        return [_group([start // size for start in self.starts[a : b + 1]], device) for a, b in self._cuts]

    @cached_property
    def thd(self) -> PackedSeqParams:
        """The rows as Transformer Engine takes them: bounds of whole rows, of which context ranks hold pieces r and
        2 x size - 1 - r, as :func:`~megatron_rl.experience.packing.context_positions` deals them. Empty rows are left
        out. The same bounds say where rows lie: what pads a row counts as its last tokens, which no other token sees.

        Made once for all layers: to bring the bounds to a GPU waits for all that it has to do.
        """
        assert self.positions is not None
        bounds = torch.tensor(self.starts, dtype=torch.int32, device=self.positions.device)
        longest = int(self.max_seqlen_q)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            # the same tensor, from which Transformer Engine sees that nothing lies between rows
            cu_seqlens_q_padded=bounds,
            cu_seqlens_kv_padded=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    @cached_property
    def context(self) -> ContextPlan | None:
        """Where context ranks share the rows."""
        if not self.shares:
            return None
        assert self.positions is not None
        device = self.positions.device
        whole = [_group(self.starts[a : b + 1], device) for a, b in self._cuts]
        return ContextPlan(
            order=torch.cat([*self.shares]).argsort().to(device),
            groups=whole,
            mask=[_visible(self.positions, mine, full) for mine, full in zip(self.groups, whole, strict=True)],
        )


def packed_rows(batch: PackedTokens, shares: Sequence[Tensor] = ()) -> PackedRows:
    """Plan the attention of a micro-batch.

    Args:
        batch: what this rank holds of it; ``cu_seqlens`` bounds whole rows.
        shares: where several context ranks share each row, which positions each of them holds.
    """
    bounds = batch.cu_seqlens.tolist()
    starts = [start for start, stop in pairwise(bounds) if stop > start] + [bounds[-1]]
    return PackedRows(
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_length,
        max_seqlen_kv=batch.max_length,
        positions=batch.positions,
        starts=starts,
        shares=shares,
    )


def _group_bounds(starts: list[int]) -> list[tuple[int, int]]:
    """Rows (first, stop) that go together: neighbours whose padded batch is not much larger than they are."""
    cuts: list[tuple[int, int]] = []
    first, longest = 0, 0
    for row in range(len(starts) - 1):
        length = starts[row + 1] - starts[row]
        padded = max(longest, length) * (row + 1 - first)
        if padded > MAX_PADDING * (starts[row + 1] - starts[first]):
            cuts.append((first, row))
            first, longest = row, 0
        longest = max(longest, length)
    if longest:
        cuts.append((first, len(starts) - 1))
    return cuts


def _visible(positions: Tensor, queries: RowGroup, keys: RowGroup) -> Tensor:
    """[rows, 1, query length, key length]: the key is not later in its row than the query."""
    mine = _rows(positions[queries.start : queries.stop], queries)
    return (mine[:, :, None] >= torch.arange(keys.length, device=positions.device))[:, None]


def _rows(values: Tensor, group: RowGroup) -> Tensor:
    """[positions of the group, ...] -> [rows, length, ...]."""
    if group.source is not None:
        values = _Pad.apply(values, group.source, group.slots)  # type: ignore[no-untyped-call]
    return values.view(group.rows, group.length, *values.shape[1:])


def _group(starts: list[int], device: torch.device) -> RowGroup:
    longest = max(stop - start for start, stop in pairwise(starts))
    rows, tokens = len(starts) - 1, starts[-1] - starts[0]
    slots = source = None
    if rows * longest > tokens:
        begin = torch.tensor(starts, device=device) - starts[0]
        column = torch.arange(longest, device=device)
        slots = (column < begin.diff()[:, None]).flatten().nonzero().squeeze(1)
        source = torch.zeros(rows * longest, dtype=torch.int64, device=device)
        source[slots] = torch.arange(tokens, device=device)
    return RowGroup(start=starts[0], stop=starts[-1], rows=rows, length=longest, slots=slots, source=source)


class _Pad(torch.autograd.Function):
    """Gather whose backward is a gather too: the gradient of padding is zero, so nothing needs to be added up."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, source: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return values.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


class PackedAttention(torch.nn.Module):
    """Causal self-attention inside each row of a packed micro-batch; stands in for ``DotProductAttention``."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **ignored: Any) -> None:
        super().__init__()
        if config.attention_dropout:
            raise ValueError(f"attention_dropout must be 0, got {config.attention_dropout}")
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedRows | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [N, 1, heads, head width], or [N, heads, head width] from latent attention.
            key: [N, 1, key/value heads, head width].
            value: like ``key``.
            attention_mask: none; the mask is causal inside each row.
            packed_seq_params: where the rows lie.

        Returns:
            [N, 1, heads * head width].
        """
        if packed_seq_params is None or attention_mask is not None:
            raise ValueError("attention needs packed rows and no mask: pass packed_seq_params=packed_rows(batch)")
        if query.dim() == 3:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        context = packed_seq_params.context
        if context is not None:
            key, value = self._gathered(key, value, context.order)
            if (times := query.shape[2] // key.shape[2]) > 1:
                # torch's fused kernels take a mask or grouped heads, not both: all scores would be held
                key, value = (part.repeat_interleave(times, dim=2) for part in (key, value))
        outputs = []
        for index, group in enumerate(packed_seq_params.groups):
            whole = group if context is None else context.groups[index]
            attended = F.scaled_dot_product_attention(
                _rows(query[group.start : group.stop, 0], group).transpose(1, 2),
                _rows(key[whole.start : whole.stop, 0], whole).transpose(1, 2),
                _rows(value[whole.start : whole.stop, 0], whole).transpose(1, 2),
                attn_mask=None if context is None else context.mask[index],
                is_causal=context is None,
                scale=self.scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
            flat = attended.transpose(1, 2).reshape(group.rows * group.length, -1)
            outputs.append(flat if group.slots is None else flat.index_select(0, group.slots))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(1)

    @staticmethod
    def _gathered(key: Tensor, value: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all context ranks, rows in order; the backward adds up what each rank made of them."""
        both = torch.cat([key, value], dim=-1)
        group = parallel_state.get_context_parallel_group()
        whole: Tensor = gather_from_sequence_parallel_region(both, group=group).index_select(0, order)
        return whole[..., : key.shape[-1]], whole[..., key.shape[-1] :]


class PackedRotary(torch.nn.Module):
    """Rotary angles of packed rows; stands in for GPTModel's ``rotary_pos_emb`` and answers its two calls."""

    def __init__(self, inverse_frequencies: Tensor, shape: tuple[int, ...] = (1, 1)) -> None:
        """Keep the frequencies.

        Args:
            inverse_frequencies: [head width / 2].
            shape: of the axes between positions and width: batch and heads, or heads alone.
        """
        super().__init__()
        self.inverse_frequencies = inverse_frequencies
        self.shape = shape

    def get_rotary_seq_len(self, *unused: Any) -> Tensor:
        """The positions, in place of a length: whatever this returns is handed to :meth:`forward`."""
        rows: PackedRows = unused[-1]
        assert rows.positions is not None
        return rows.positions

    def forward(self, positions: Tensor, **ignored: Any) -> Tensor:
        """Angles [N, *shape, head width] of ``positions`` [N]."""
        angles = torch.outer(positions.float(), self.inverse_frequencies.to(positions.device))
        return torch.cat([angles, angles], dim=-1).view(len(positions), *self.shape, -1)


class LatentRotary(PackedRotary):
    """The same for latent attention, which asks for a factor on cosine and sine besides."""

    def __init__(self, inverse_frequencies: Tensor, magnitude: float) -> None:
        """Keep frequencies [rotary head width / 2] and the factor."""
        super().__init__(inverse_frequencies, shape=(1,))
        self.magnitude = magnitude

    def forward(self, positions: Tensor, **ignored: Any) -> tuple[Tensor, float]:  # type: ignore[override]
        """Angles [N, 1, rotary head width] of ``positions`` [N], and the factor."""
        return super().forward(positions), self.magnitude
