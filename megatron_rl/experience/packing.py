"""From rows to micro-batches and back: which rows go together, laying them end to end, and taking results apart.

Pure functions of their arguments, so that every rank computes the same plan without asking the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import torch
from torch import Tensor

from megatron_rl.batches import ExperienceBatch, MicroBatch, Minibatch, PackedTokens, TokenRows, rows_of


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


def split_rows(lengths: Sequence[int], rows: Iterable[int], parts: int) -> list[list[int]]:
    """Deal ``rows`` out to ``parts`` with nearly equal token counts (longest first, to the part with the least).

    Args:
        lengths: tokens of each row, indexed by row.
        rows: which rows.
        parts: how many parts; none is empty when there are as many rows.

    Returns:
        the rows of each part, ascending.
    """
    dealt: list[list[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        least = min(range(parts), key=lambda part: (tokens[part], len(dealt[part]), part))
        dealt[least].append(row)
        tokens[least] += lengths[row]
    return [sorted(part) for part in dealt]


def pack_rows(
    source: TokenRows, rows: Sequence[int], multiple: int = 1, loss_weight: Tensor | None = None
) -> PackedTokens:
    """Lay ``rows`` of ``source`` end to end, in the order given, and shift them once.

    Args:
        source: the batch.
        rows: indices into it.
        multiple: the number of positions is padded to a multiple of this by a last row outside the loss, as sequence
            parallelism needs it (never to none at all: no rows make ``multiple`` dummy positions).
        loss_weight: [len(rows), T] f32; None: 1.
    """
    index = torch.tensor(rows, dtype=torch.int64)
    tokens, lengths = source.tokens[index], source.lengths[index]
    is_input, is_target = _shift_masks(lengths, tokens.shape[1])
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)[is_input]
    steps = (lengths - 1).clamp(min=0)
    count = int(steps.sum())
    padding = -count % multiple or (0 if count else multiple)
    if padding:
        steps = torch.cat([steps, torch.tensor([padding])])
        positions = torch.cat([positions, torch.arange(padding)])
    loss_mask = _pad(source.response_mask[index][is_target], padding)
    weight = loss_mask.float() if loss_weight is None else _pad(loss_weight[is_target], padding) * loss_mask
    return PackedTokens(
        inputs=_pad(tokens[is_input], padding),
        targets=_pad(tokens[is_target], padding),
        positions=positions,
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), steps.cumsum(0)]).to(torch.int32),
        max_length=int(steps.max()),
        loss_mask=loss_mask,
        loss_weight=weight,
    )


@overload
def pack(minibatch: Minibatch[ExperienceBatch], rows: Sequence[int], multiple: int = 1) -> MicroBatch: ...
@overload
def pack(minibatch: Minibatch[TokenRows], rows: Sequence[int], multiple: int = 1) -> PackedTokens: ...
def pack(
    minibatch: Minibatch[ExperienceBatch] | Minibatch[TokenRows], rows: Sequence[int], multiple: int = 1
) -> MicroBatch | PackedTokens:
    """Pack some rows of a minibatch with all that a loss needs.

    Args:
        minibatch: the rows of one optimizer step.
        rows: positions in ``minibatch.rows`` (not in its source).
        multiple: see :func:`pack_rows`.

    Returns:
        a MicroBatch where the source is an ExperienceBatch, PackedTokens where it is TokenRows.
    """
    source = minibatch.source
    picked = minibatch.rows[torch.tensor(rows, dtype=torch.int64)]
    packed = pack_rows(
        rows_of(source), picked.tolist(), multiple, minibatch.loss_weight[torch.tensor(rows, dtype=torch.int64)]
    )
    if not isinstance(source, ExperienceBatch):
        return packed
    rollouts = source.rollouts
    _, is_target = _shift_masks(rollouts.lengths[picked], rollouts.tokens.shape[1])
    padding = len(packed.inputs) - int(is_target.sum())

    def of_targets(values: Tensor) -> Tensor:
        return _pad(values[picked][is_target], padding) * packed.loss_mask

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


def unpack(values: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Bring one number per packed position back to rows, aligned with tokens: position 0 of each row gets 0.

    Args:
        values: [N], in the order of :func:`pack_rows`; padding at the end is dropped.
        lengths: [b] tokens of the packed rows, in the same order.
        width: T.

    Returns:
        [b, T].
    """
    _, is_target = _shift_masks(lengths, width)
    rows = values.new_zeros(is_target.shape)
    rows[is_target] = values[: int((lengths - 1).clamp(min=0).sum())]
    return rows


def _shift_masks(lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """[b, T] bool: the tokens that are read (all but a row's last) and those that are predicted (all but its first)."""
    column = torch.arange(width)
    return column < lengths[:, None] - 1, (column >= 1) & (column < lengths[:, None])


def _pad(values: Tensor, padding: int) -> Tensor:
    return torch.cat([values, values.new_zeros(padding)]) if padding else values
