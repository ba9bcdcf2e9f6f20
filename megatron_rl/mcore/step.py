"""One optimizer step, or one forward pass, through megatron-core's schedules (with or without a pipeline)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rl.batches import ExperienceBatch, LossTerms, Minibatch, PackedTokens, TokenRows, rows_of
from megatron_rl.device import device
from megatron_rl.experience.packing import (
    Packed,
    context_positions,
    pack,
    pack_rows,
    plan_rows,
    take_positions,
    unpack,
)
from megatron_rl.interfaces import UpdateResult
from megatron_rl.layout import Coordinates, ParallelLayout
from megatron_rl.mcore.attention import PackedRows, packed_rows
from megatron_rl.mcore.model import run_model
from megatron_rl.mcore.optimizer import Training


def train_step(
    training: Training,
    minibatch: Minibatch[ExperienceBatch] | Minibatch[TokenRows],
    loss: Callable[[Any, Tensor, Any], LossTerms],
    *,
    layout: ParallelLayout,
    at: Coordinates,
    budget: int,
    multiple: int,
    cost: Callable[[int], float],
) -> UpdateResult | None:
    """One optimizer step on all rows of a minibatch; called on every rank of the layout with the same minibatch.

    Args:
        training: the model and its optimizer.
        minibatch: the rows of the step.
        loss: (last stage, its output, micro-batch) -> sums. Neither the split into micro-batches nor the layout changes
            the result: megatron-core divides the summed gradient once by the loss tokens of the whole step.
        layout: of the model.
        at: place of this rank.
        budget: tokens of a micro-batch on one rank.
        multiple: to which each micro-batch is padded, see :func:`~megatron_rl.config.precision.token_multiple`.
        cost: of a row of so many tokens; replicas get rows of like cost.

    Returns:
        the result on the first rank of the last stage of replica 0, None elsewhere; its metrics are those of the loss,
        and ``padding`` and ``imbalance`` of :class:`PackingPlan`.

    Raises:
        ValueError: the minibatch has no loss token at all.
        FloatingPointError: the gradient is not finite; the weights are as they were.
    """
    token_rows = rows_of(minibatch.source)
    loss_tokens = int(token_rows.response_mask[minibatch.rows].sum())
    if not loss_tokens:
        raise ValueError(f"an update needs at least one response token, got {len(minibatch.rows)} rows without any")
    lengths = token_rows.lengths[minibatch.rows].tolist()
    plan = plan_rows(lengths, [cost(length) for length in lengths], layout, budget, multiple)
    packed = [pack(minibatch, rows, multiple, row_multiple=layout.row_multiple) for rows in plan.parts[at.data]]
    batches = [_placed(batch, _shares(batch, layout), at) for batch in packed]

    def loss_sums(stage: Any, output: Tensor, batch: PackedTokens) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        terms = loss(stage, output, batch)
        return terms.total, batch.loss_mask.sum(dtype=torch.int), dict(terms.metrics)

    for chunk in training.chunks:
        chunk.zero_grad_buffer()
    training.optimizer.zero_grad()
    sums = _run_schedule(training.chunks, batches, loss_sums, forward_only=False)
    rate = get_canonical_lr_for_logging(training.optimizer.param_groups)
    _, grad_norm, _ = training.optimizer.step()
    training.scheduler.step(1)
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    names = sorted(sums[0])
    totals = torch.stack(
        [sum((each[name].detach().float() for each in sums), torch.zeros((), device=device())) for name in names]
    )
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if at.data or at.context or at.tensor:
        return None
    metrics = dict(zip(names, (totals / loss_tokens).tolist(), strict=True))
    metrics |= {"padding": plan.padding, "imbalance": plan.imbalance}
    return UpdateResult(metrics=metrics, grad_norm=float(grad_norm), learning_rate=float(rate))


@torch.no_grad()
def forward_rows(
    chunks: Sequence[Any],
    source: TokenRows,
    read: Callable[[Any, Tensor, PackedTokens], Tensor],
    *,
    layout: ParallelLayout,
    at: Coordinates,
    budget: int,
    multiple: int,
    cost: Callable[[int], float],
) -> tuple[Tensor, Tensor] | None:
    """One number per response token of this replica's share of the rows; called on every rank with the same rows.

    Args:
        chunks: this rank's pieces of the model.
        source: all rows.
        read: (last stage, its output, micro-batch) -> [N] f32.
        layout: of the model.
        at: place of this rank.
        budget: tokens of a micro-batch on one rank.
        multiple: to which each micro-batch is padded, see :func:`~megatron_rl.config.precision.token_multiple`.
        cost: of a row of so many tokens; replicas get rows of like cost.

    Returns:
        on the first rank of the last stage of each replica: which rows [b] int64, and their values [b, T] f32, aligned
        with tokens and 0 outside the response, both on the CPU. None elsewhere.
    """
    lengths = source.lengths.tolist()
    width = source.tokens.shape[1]
    parts = plan_rows(lengths, [cost(length) for length in lengths], layout, budget, multiple).parts[at.data]
    packed = [pack_rows(source, rows, multiple, row_multiple=layout.row_multiple) for rows in parts]
    shares = [_shares(batch, layout) for batch in packed]
    batches = [_placed(batch, share, at) for batch, share in zip(packed, shares, strict=True)]
    outputs = _run_schedule(chunks, batches, read, forward_only=True)
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    whole = [_whole(output, share, at) for output, share in zip(outputs, shares, strict=True)]
    if at.tensor or at.context:
        return None
    values = [
        unpack(value, source.lengths[torch.tensor(rows, dtype=torch.int64)], width, layout.row_multiple)
        for value, rows in zip(whole, parts, strict=True)
        if rows
    ]
    found = torch.cat(values) if values else torch.zeros(0, width)
    rows = torch.tensor([row for part in parts for row in part], dtype=torch.int64)
    return rows, found * source.response_mask[rows]


def _shares(batch: PackedTokens, layout: ParallelLayout) -> list[Tensor]:
    """Which positions of a micro-batch each context rank holds; none where there is only one."""
    ranks = range(layout.context) if layout.context > 1 else ()
    return [context_positions(batch.cu_seqlens, layout.context, rank) for rank in ranks]


def _whole(output: Tensor, shares: Sequence[Tensor], at: Coordinates) -> Tensor:
    """What all context ranks computed of a micro-batch, [N] on the CPU, in the order that it was packed in."""
    if not shares:
        return output.cpu()
    values = output.new_zeros(sum(len(share) for share in shares))
    values[shares[at.context].to(values.device)] = output
    return _over_context(values).cpu()


def _over_context(values: Tensor) -> Tensor:
    """Their sum over context ranks, in place and without a gradient."""
    dist.all_reduce(values, group=parallel_state.get_context_parallel_group())
    return values


def _placed(batch: Packed, shares: Sequence[Tensor], at: Coordinates) -> tuple[Packed, PackedRows]:
    """What this rank holds of a micro-batch, on its device."""
    if shares:
        batch = take_positions(batch, shares[at.context])
        batch = dataclasses.replace(batch, parts=len(shares), over_parts=_over_context)
    fields = {name: value.to(device()) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    placed = dataclasses.replace(batch, **fields)  # type: ignore[arg-type]
    return placed, packed_rows(placed, shares)


def _run_schedule(
    chunks: Sequence[Any],
    batches: Sequence[tuple[PackedTokens, PackedRows]],
    read: Callable[[Any, Tensor, Any], Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """What ``read`` gave for each micro-batch, on the last stage (of a triple, its metrics)."""

    def forward_step(data: Iterator[tuple[PackedTokens, PackedRows]], chunk: Any) -> tuple[Tensor, Any]:
        batch, rows = next(data)
        return run_model(chunk, batch, rows), lambda output, non_loss_data=False: read(chunk, output, batch)

    results: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=1,  # each tensor announces its own length, see variable_seq_lengths
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return results
