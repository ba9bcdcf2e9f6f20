"""From rows to micro-batches and back: which rows go together, laying them end to end, and taking results apart.

Pure functions of their arguments, so that every rank computes the same plan without asking the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import torch
from torch import Tensor

from megatron_rl.batches import ExperienceBatch, MicroBatch, Minibatch, PackedTokens, TokenRows, rows_of
from megatron_rl.layout import ParallelLayout

Packed = TypeVar("Packed", bound=PackedTokens)


def micro_batches(lengths: Sequence[int], rows: Iterable[int], budget: int) -> list[list[int]]:
    """Cut ``rows`` into micro-batches of at most ``budget`` tokens; a longer row makes one of its own.

    Longest first: rows of like length go together, which keeps attention's padding small, and the largest micro-batch
    comes first, so that what does not fit in memory fails at once.

    Args:
        lengths: tokens of each row, indexed by row.
        rows: which rows.
        budget: tokens.
    """
    parts: list[list[int]] = []
    used = budget
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if not parts or used + lengths[row] > budget:
            parts.append([])
            used = 0
        parts[-1].append(row)
        used += lengths[row]
    return parts


def split_rows(costs: Sequence[float], rows: Iterable[int], parts: int) -> list[list[int]]:
    """Deal ``rows`` out to ``parts`` of nearly equal cost (dearest first, to the part with the least).

    Args:
        costs: of each row, indexed by row.
        rows: which rows.
        parts: how many parts; none is empty when there are as many rows.

    Returns:
        the rows of each part, ascending.
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    spent = [0.0] * parts
    for row in sorted(rows, key=lambda row: (-costs[row], row)):
        least = min(range(parts), key=lambda part: (spent[part], len(dealt[part]), part))
        dealt[least].append(row)
        spent[least] += costs[row]
    return [sorted(part) for part in dealt]


@dataclass(frozen=True, kw_only=True)
class PackingPlan:
    """Which rows each replica computes together; the same on every rank.

    Attributes:
        parts: [replica][micro-batch][row], at least one micro-batch each; one without rows keeps ranks in step that
            have none left.
        padding: share of all positions that are padding.
        imbalance: what the busiest replica computes beyond the mean, as a share of the mean.
    """

    parts: tuple[tuple[tuple[int, ...], ...], ...]
    padding: float
    imbalance: float


def plan_rows(
    lengths: Sequence[int], costs: Sequence[float], layout: ParallelLayout, budget: int, multiple: int
) -> PackingPlan:
    """Deal rows out to the replicas by cost, and cut each share into micro-batches.

    Args:
        lengths: tokens of each row.
        costs: of each row, such as FLOPs.
        layout: of the model.
        budget: tokens of a micro-batch on one rank; context ranks share one.
        multiple: to which each micro-batch is padded.
    """
    shares = split_rows(costs, range(len(lengths)), layout.data)
    parts = [micro_batches(lengths, share, budget * layout.context) or [[]] for share in shares]
    if layout.virtual_pipeline > 1:  # the interleaved schedule takes them in groups, one for each stage
        for part in parts:
            part += [[] for _ in range(-len(part) % layout.pipeline)]
    if layout.expert > 1:  # experts are shared with other replicas, which must take part in every exchange
        count = max(map(len, parts))
        for part in parts:
            part += [[] for _ in range(count - len(part))]
    spent = [sum(costs[row] for row in share) for share in shares]
    used = taken = 0
    for part in parts:
        for rows in part:
            steps = [max(0, lengths[row] - 1) for row in rows]
            used += sum(steps)
            taken += _padded_size(steps, layout.row_multiple, multiple)
    return PackingPlan(
        parts=tuple(tuple(tuple(rows) for rows in part) for part in parts),
        padding=1 - used / taken if taken else 0.0,
        imbalance=max(spent) * len(spent) / sum(spent) - 1 if sum(spent) > 0 else 0.0,
    )


def _padded_size(steps: Iterable[int], row_multiple: int, multiple: int) -> int:
    count = sum(-(-step // row_multiple) * row_multiple for step in steps)
    return count + (-count % multiple or (0 if count else multiple))


@dataclass(frozen=True)
class _Places:
    """Where the tokens of rows lie once they are packed.

    Attributes:
        read: [b, T] bool, tokens that are read: all but a row's last.
        predicted: [b, T] bool, tokens that are predicted: all but a row's first.
        slots: [n] int64, where each of them goes (each pair of a token read and the one predicted from it once).
        starts: [rows + 1] int64, where each row starts, padding included; the last entry is the number of positions.
    """

    read: Tensor
    predicted: Tensor
    slots: Tensor
    starts: Tensor

    def lay(self, values: Tensor) -> Tensor:
        """[N]: each of ``values`` [n] in its place, 0 elsewhere."""
        laid = values.new_zeros(int(self.starts[-1]))
        laid[self.slots] = values
        return laid


def _places(lengths: Tensor, width: int, row_multiple: int, multiple: int) -> _Places:
    column = torch.arange(width)
    read = column < lengths[:, None] - 1
    predicted = (column >= 1) & (column < lengths[:, None])
    steps = (lengths - 1).clamp(min=0)
    padded = (steps + row_multiple - 1) // row_multiple * row_multiple
    count = int(padded.sum())
    if extra := _padded_size(steps.tolist(), row_multiple, multiple) - count:
        padded = torch.cat([padded, torch.tensor([extra])])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), padded.cumsum(0)])
    slots = (starts[: len(lengths), None] + column)[read]
    return _Places(read, predicted, slots, starts)


def pack_rows(
    source: TokenRows,
    rows: Sequence[int],
    multiple: int = 1,
    loss_weight: Tensor | None = None,
    *,
    row_multiple: int = 1,
) -> PackedTokens:
    """Lay ``rows`` of ``source`` end to end, in the order given, and shift them once.

    Args:
        source: the batch.
        rows: indices into it.
        multiple: the number of positions is padded to a multiple of this by a last row outside the loss, as sequence
            parallelism and FP8 need it (never to none at all: no rows make ``multiple`` dummy positions).
        loss_weight: [len(rows), T] f32; None: 1.
        row_multiple: each row is padded at its end to a multiple of this, as context parallelism needs it; divides
            ``multiple``.
    """
    index = torch.tensor(rows, dtype=torch.int64)
    tokens, lengths = source.tokens[index], source.lengths[index]
    places = _places(lengths, tokens.shape[1], row_multiple, multiple)
    loss_mask = places.lay(source.response_mask[index][places.predicted])
    weight = loss_mask.float() if loss_weight is None else places.lay(loss_weight[places.predicted]) * loss_mask
    sizes = places.starts.diff()
    return PackedTokens(
        inputs=places.lay(tokens[places.read]),
        targets=places.lay(tokens[places.predicted]),
        positions=torch.arange(len(loss_mask)) - places.starts[:-1].repeat_interleave(sizes),
        cu_seqlens=places.starts.to(torch.int32),
        max_length=int(sizes.max()),
        loss_mask=loss_mask,
        loss_weight=weight,
    )


@overload
def pack(
    minibatch: Minibatch[ExperienceBatch], rows: Sequence[int], multiple: int = 1, *, row_multiple: int = 1
) -> MicroBatch: ...
@overload
def pack(
    minibatch: Minibatch[TokenRows], rows: Sequence[int], multiple: int = 1, *, row_multiple: int = 1
) -> PackedTokens: ...
def pack(
    minibatch: Minibatch[ExperienceBatch] | Minibatch[TokenRows],
    rows: Sequence[int],
    multiple: int = 1,
    *,
    row_multiple: int = 1,
) -> MicroBatch | PackedTokens:
    """Pack some rows of a minibatch with all that a loss needs.

    Args:
        minibatch: the rows of one optimizer step.
        rows: positions in ``minibatch.rows`` (not in its source).
        multiple: see :func:`pack_rows`.
        row_multiple: see :func:`pack_rows`.

    Returns:
        a MicroBatch where the source is an ExperienceBatch, PackedTokens where it is TokenRows.
    """
    source = minibatch.source
    chosen = torch.tensor(rows, dtype=torch.int64)
    picked = minibatch.rows[chosen]
    packed = pack_rows(
        rows_of(source), picked.tolist(), multiple, minibatch.loss_weight[chosen], row_multiple=row_multiple
    )
    if not isinstance(source, ExperienceBatch):
        return packed
    rollouts = source.rollouts
    places = _places(rollouts.lengths[picked], rollouts.tokens.shape[1], row_multiple, multiple)

    def of_targets(values: Tensor) -> Tensor:
        return places.lay(values[picked][places.predicted]) * packed.loss_mask

    def if_any(values: Tensor | None) -> Tensor | None:
        return None if values is None else of_targets(values)

    return MicroBatch(
        **vars(packed),
        sampled_mask=of_targets(rollouts.sampled_mask),
        rollout_logprobs=of_targets(rollouts.rollout_logprobs),
        old_logprobs=of_targets(source.old_logprobs),
        ref_logprobs=if_any(source.ref_logprobs),
        values=if_any(source.values),
        advantages=of_targets(source.advantages),
        returns=if_any(source.returns),
    )


def unpack(values: Tensor, lengths: Tensor, width: int, row_multiple: int = 1) -> Tensor:
    """Bring one number per packed position back to rows, aligned with tokens: position 0 of each row gets 0.

    Args:
        values: [N], in the order of :func:`pack_rows`; padding is dropped.
        lengths: [b] tokens of the packed rows, in the same order.
        width: T.
        row_multiple: that the rows were packed with.

    Returns:
        [b, T].
    """
    places = _places(lengths, width, row_multiple, 1)
    rows = values.new_zeros(places.predicted.shape)
    rows[places.predicted] = values[places.slots]
    return rows


def context_positions(cu_seqlens: Tensor, size: int, rank: int) -> Tensor:
    """Which packed positions one of ``size`` context ranks holds: [N / size] int64.

    Of every row, cut into 2 x size equal pieces, rank r holds pieces r and 2 x size - 1 - r: with a causal mask an
    early piece is cheap and a late one dear, so that each rank has the same to do.

    Args:
        cu_seqlens: [rows + 1], the row bounds; each row's length is a multiple of 2 x size.
        size: context ranks.
        rank: one of them.

    Raises:
        ValueError: a row's length is not such a multiple.
    """
    starts, sizes = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    if size > 1 and bool((sizes % (2 * size)).any()):
        raise ValueError(f"{size} context ranks need rows padded to a multiple of {2 * size}, got {sizes.tolist()}")
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    piece = sizes // (2 * size)
    row = torch.arange(len(sizes), device=sizes.device).repeat_interleave(2 * piece)
    local = torch.arange(len(row), device=sizes.device) - (starts // size)[row]
    first = local < piece[row]
    return starts[row] + local + torch.where(first, rank * piece[row], (2 * size - 2 - rank) * piece[row])


def take_positions(batch: Packed, index: Tensor) -> Packed:
    """The same micro-batch with only the positions ``index`` of its per-position tensors; the row bounds stay."""
    kept = {
        name: value[index] for name, value in vars(batch).items() if isinstance(value, Tensor) and name != "cu_seqlens"
    }
    return dataclasses.replace(batch, **kept)  # type: ignore[arg-type]
