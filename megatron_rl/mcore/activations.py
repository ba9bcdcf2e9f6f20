"""What the layers of a model give, wherever they lie: for finding the first that differs from another model's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_rl.batches import PackedTokens, TokenRows
from megatron_rl.experience.packing import context_positions, pack_rows, plan_rows
from megatron_rl.layout import Coordinates, ParallelLayout
from megatron_rl.mcore.attention import PackedRotary
from megatron_rl.mcore.step import forward_rows


def layer_outputs(
    chunks: Sequence[Any],
    source: TokenRows,
    *,
    layout: ParallelLayout,
    at: Coordinates,
    budget: int,
    multiple: int,
    cost: Callable[[int], float],
) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Run the rows through the model and keep what leaves its embedding, each attention, each layer, the final norm.

    Called on every rank with the same rows; each answers for the modules and the positions that it holds, without
    asking the others. Arguments as :func:`~megatron_rl.mcore.step.forward_rows`.

    Returns:
        by the module's Hugging Face name: which tokens [m] int64, as row * T + column, and the hidden states after
        reading each [m, h] f32, on the CPU. None on a tensor rank that holds the same as the first.
    """
    with _watched(chunks) as seen:
        forward_rows(chunks, source, _no_numbers, layout=layout, at=at, budget=budget, multiple=multiple, cost=cost)
    if at.tensor and not layout.sequence_parallel:
        return None
    lengths = source.lengths.tolist()
    parts = plan_rows(lengths, [cost(length) for length in lengths], layout, budget, multiple).parts[at.data]
    which = torch.cat([_tokens(source, rows, layout, at, multiple) for rows in parts])
    kept = which >= 0
    return {place: (which[kept], torch.cat(outputs)[kept]) for place, outputs in seen.items()}


def _no_numbers(_: Any, output: Tensor, batch: PackedTokens) -> Tensor:
    return output.new_zeros(len(batch.targets))


def _tokens(source: TokenRows, rows: Sequence[int], layout: ParallelLayout, at: Coordinates, multiple: int) -> Tensor:
    """Which token, as row * T + column, is read at each position that this rank holds; -1: padding."""
    batch = pack_rows(source, rows, multiple, row_multiple=layout.row_multiple)
    sizes = batch.cu_seqlens.diff().long()
    row = torch.arange(len(sizes)).repeat_interleave(sizes)
    owner = torch.tensor([*rows, 0])  # the last one is the padding of the whole micro-batch
    read = torch.cat([source.lengths[owner[:-1]] - 1, torch.zeros(1, dtype=torch.int64)])
    which = torch.where(batch.positions < read[row], owner[row] * source.tokens.shape[1] + batch.positions, -1)
    here = which[context_positions(batch.cu_seqlens, layout.context, at.context)]
    return here.chunk(layout.tensor)[at.tensor] if layout.sequence_parallel else here


@contextmanager
def _watched(chunks: Sequence[Any]) -> Iterator[Mapping[str, list[Tensor]]]:
    """Keep what the modules give for each micro-batch, in order: [positions of this rank, h] each."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def keep(place: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[place].append(_hidden(output).detach()[:, 0].float().cpu())

        return hook

    handles = [
        module.register_forward_hook(keep(place)) for chunk in chunks for place, module in _places(chunk).items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _hidden(output: Tensor | tuple[Tensor, Tensor | None]) -> Tensor:
    """What a module gives: an attention leaves its output bias to the layer, a layer has no second output here."""
    if isinstance(output, Tensor):
        return output
    hidden, bias = output
    return hidden if bias is None else hidden + bias


def _places(chunk: Any) -> dict[str, Any]:
    """The modules to watch, by Hugging Face name."""
    model = get_attr_wrapped_model(chunk, "decoder", return_model_obj=True)
    found = {"model.embed_tokens": model.embedding} if model.pre_process else {}
    for layer in model.decoder.layers:
        name = f"model.layers.{layer.layer_number - 1}"
        found |= {f"{name}.self_attn": layer.self_attention, name: layer}
    if model.post_process:
        found["model.norm"] = model.decoder.final_layernorm
    return found


def rotary_frequencies(chunks: Sequence[Any]) -> Tensor:
    """The inverse frequencies [rotary width / 2] that this rank's layers turn queries and keys by."""
    rotary = next(module for chunk in chunks for module in chunk.modules() if isinstance(module, PackedRotary))
    return rotary.inverse_frequencies.cpu()
