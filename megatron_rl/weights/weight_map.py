"""The tensors of a model and the change of form between Megatron's and Hugging Face's, in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.entries import Stage, WeightEntry, weight_entries
from megatron_rl.weights.rules import Head, Op, Split, WeightRule

__all__ = ["Head", "Op", "Split", "Stage", "WeightEntry", "WeightMap", "WeightRule", "weight_map"]


@dataclass(frozen=True)
class WeightMap:
    """The tensors of one model, each once, ordered from the embedding up.

    Attributes:
        dims: sizes of the model.
        entries: one per Megatron tensor.
    """

    dims: ModelDims
    entries: tuple[WeightEntry, ...]

    def to_megatron(self, entry: WeightEntry, hf_tensors: Sequence[Tensor]) -> Tensor:
        """Make the full Megatron tensor.

        Args:
            entry: one of this map's.
            hf_tensors: as ``entry.hf`` names them.

        Raises:
            ValueError: their number or shapes do not fit the model's sizes.
        """
        if len(hf_tensors) != len(entry.hf):
            raise ValueError(f"{entry.megatron} is made of {', '.join(entry.hf)}, got {len(hf_tensors)} tensors")
        if entry.op is Op.COPY:
            return hf_tensors[0]
        if entry.op is Op.GATE_UP:
            for name, tensor in zip(entry.hf, hf_tensors, strict=True):
                self._check_rows(name, tensor, entry.ffn_hidden(self.dims))
            return torch.cat(tuple(hf_tensors))
        groups, blocks = self.dims.kv_heads, []
        for name, tensor, rows in zip(entry.hf, hf_tensors, self.dims.group_rows, strict=True):
            self._check_rows(name, tensor, groups * rows)
            blocks.append(tensor.reshape(groups, rows, *tensor.shape[1:]))
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def to_hf(self, entry: WeightEntry, full: Tensor) -> list[tuple[str, Tensor]]:
        """Take the full Megatron tensor apart: the inverse of :meth:`to_megatron`, under Hugging Face names.

        Raises:
            ValueError: its shape does not fit the model's sizes.
        """
        if entry.op is Op.COPY:
            parts: Sequence[Tensor] = (full,)
        elif entry.op is Op.GATE_UP:
            width = entry.ffn_hidden(self.dims)
            self._check_rows(entry.megatron, full, 2 * width)
            parts = full.split(width)
        else:
            rows = self.dims.group_rows
            self._check_rows(entry.megatron, full, self.dims.kv_heads * sum(rows))
            grouped = full.reshape(self.dims.kv_heads, sum(rows), *full.shape[1:])
            parts = [part.flatten(0, 1) for part in grouped.split(rows, dim=1)]
        return list(zip(entry.hf, parts, strict=True))

    def _check_rows(self, name: str, tensor: Tensor, rows: int) -> None:
        if tensor.dim() == 0 or tensor.shape[0] != rows:
            raise ValueError(
                f"{name} must have {rows} rows in this {self.dims.architecture}, got shape {tuple(tensor.shape)}; "
                "check that config.json belongs to the weights"
            )


def weight_map(dims: ModelDims, head: Head, family: Sequence[WeightRule] | None = None) -> WeightMap:
    """The tensors of the model that ``dims`` describes; arguments and errors as :func:`.entries.weight_entries`."""
    return WeightMap(dims, weight_entries(dims, head, family))
