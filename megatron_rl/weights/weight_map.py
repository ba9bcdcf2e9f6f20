"""The tensors of a model and the change of form between Megatron's and Hugging Face's, in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.entries import Stage, WeightEntry, weight_entries
from megatron_rl.weights.reshard import cut_dim, hf_pieces, hf_shapes
from megatron_rl.weights.rules import Head, Op, Split, WeightRule
from megatron_rl.weights.shapes import full_shape

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

    @cached_property
    def hf_names(self) -> frozenset[str]:
        """Of all Hugging Face tensors."""
        return frozenset(name for entry in self.entries for name in entry.hf)

    def check_hf_shapes(self, entry: WeightEntry, shapes: Sequence[Sequence[int]]) -> None:
        """Refuse Hugging Face tensors that are not this model's.

        Args:
            entry: one of this map's.
            shapes: of the tensors that ``entry.hf`` names, in their order.

        Raises:
            ValueError: their number or one of the shapes does not fit the model's sizes.
        """
        if len(shapes) != len(entry.hf):
            raise ValueError(f"{entry.megatron} is made of {', '.join(entry.hf)}, got {len(shapes)} tensors")
        for name, found, wanted in zip(entry.hf, shapes, hf_shapes(entry, self.dims), strict=True):
            self._check_shape(name, found, wanted)

    def to_megatron(self, entry: WeightEntry, hf_tensors: Sequence[Tensor]) -> Tensor:
        """Make the full Megatron tensor; of one Hugging Face tensor it is that tensor.

        Args:
            entry: one of this map's.
            hf_tensors: of one type, as ``entry.hf`` names them.

        Raises:
            ValueError: as :meth:`check_hf_shapes`.
        """
        self.check_hf_shapes(entry, [tensor.shape for tensor in hf_tensors])
        if entry.op is Op.COPY:
            return hf_tensors[0]
        full, dim = hf_tensors[0].new_empty(full_shape(entry, self.dims)), cut_dim(entry)
        for tensor, pieces in zip(hf_tensors, hf_pieces(entry, self.dims), strict=True):
            for piece in pieces:
                full.narrow(dim, piece.whole, piece.length).copy_(tensor.narrow(dim, piece.part, piece.length))
        return full

    def to_hf(self, entry: WeightEntry, full: Tensor) -> list[tuple[str, Tensor]]:
        """Take the full Megatron tensor apart, the inverse of :meth:`to_megatron`, by Hugging Face names.

        What lies in one piece is a view of it.

        Raises:
            ValueError: its shape does not fit the model's sizes.
        """
        self._check_shape(entry.megatron, full.shape, full_shape(entry, self.dims))
        dim, made = cut_dim(entry), []
        for pieces in hf_pieces(entry, self.dims):
            parts = [full.narrow(dim, piece.whole, piece.length) for piece in pieces]
            made.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim))
        return list(zip(entry.hf, made, strict=True))

    def _check_shape(self, name: str, found: Sequence[int], wanted: tuple[int, ...]) -> None:
        if tuple(found) != wanted:
            raise ValueError(
                f"{name} must have shape {list(wanted)} in this {self.dims.architecture}, got {list(found)}; check "
                "that config.json belongs to the weights"
            )


def weight_map(dims: ModelDims, head: Head, family: Sequence[WeightRule] | None = None) -> WeightMap:
    """The tensors of the model that ``dims`` describes; arguments and errors as :func:`.entries.weight_entries`."""
    return WeightMap(dims, weight_entries(dims, head, family))
