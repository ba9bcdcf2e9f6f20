"""What ranks tell the parity gate, with a fault or without, and the gate's other side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.batches import TokenRows, merge_activations, merge_rows
from tests.distributed.cases import POLICY, Setup, start
from tests.fakes import Ready


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A scorer whose answers are known."""

    name: str
    scores: Tensor
    places: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]

    def score(self, rows: TokenRows) -> Ready:
        return Ready(self.scores)

    def activations(self, rows: TokenRows) -> Ready:
        return Ready(self.places)

    def tensors(self, prefixes: Sequence[str]) -> Ready:
        return Ready({name: t for name, t in self.weights.items() if name.startswith(tuple(prefixes))})


Fault = Callable[[dict[str, Tensor], int], None]
"""Changes the parameters of a rank, by Megatron name; the number is the rank."""


def q_and_k_swapped(parameters: dict[str, Tensor], rank: int) -> None:
    """In each group of layer 2 (queries 0 and 1, key, value; 8 rows each) the key and query 0 have changed places."""
    for name in ("weight", "bias"):
        if (fused := parameters.get(f"decoder.layers.2.self_attention.linear_qkv.{name}")) is not None:
            group = fused.view(-1, 4, 8, *fused.shape[1:])
            group.copy_(group[:, [2, 1, 0, 3]].clone())


def bias_missing(parameters: dict[str, Tensor], rank: int) -> None:
    if (bias := parameters.get("decoder.layers.1.self_attention.linear_qkv.bias")) is not None:
        bias.zero_()


def padding_read_as_token(parameters: dict[str, Tensor], rank: int) -> None:
    """The second tensor rank's part of the vocabulary begins with a row of padding: all its tokens move by one."""
    if rank % 2 == 1 and (table := parameters.get("embedding.word_embeddings.weight")) is not None:
        table.copy_(torch.roll(table, 1, 0))
        table[0] = 0


def head_missing(parameters: dict[str, Tensor], rank: int) -> None:
    for name in ("output_layer.weight", "output_layer.bias"):
        if name in parameters:
            parameters[name].zero_()


def inspected(
    rank: int, port: int, model: Path, setup: Setup, role: str, rows: TokenRows, faults: Sequence[Fault | None]
) -> list[tuple[Any, Any, Any]]:
    """For each fault: scores, activations and tensors as this rank gives them."""
    from megatron_rl.mcore.export import load_hf, local_parameters

    worker = start(rank, port, model, setup, role)
    models = [chunk.module for chunk in worker._training.chunks]
    answers = []
    for fault in faults:
        load_hf(models, model, worker._weights, worker._spec.dims, worker._layout, rank)
        if fault is not None:
            with torch.no_grad():
                fault(local_parameters(models), rank)
        scored = worker.logprobs(rows, 1.0) if role == POLICY else worker.values(rows)
        answers.append((scored, worker.activations(rows, True), worker.tensors(("model.", "lm_head.", "score."))))
    worker.close()
    return answers


def read_through_and_back(
    rank: int, port: int, model: Path, setup: Setup, role: str, rows: TokenRows, through: Tensor
) -> tuple[Any, Any, Any]:
    """A critic's values through a vector, packed and unpacked; and by its own head afterwards."""
    worker = start(rank, port, model, setup, role)
    found = worker.values(rows, True, through), worker.values(rows, False, through), worker.values(rows)
    worker.close()
    return found


def recorded(name: str, answers: Sequence[Any], rows: TokenRows) -> Recorded:
    """What all ranks gave, put together as the driver does."""
    scores, places, weights = (
        [found for found in column if found is not None] for column in zip(*answers, strict=True)
    )
    [tensors] = weights
    return Recorded(name=name, scores=merge_rows(scores, rows), places=merge_activations(places, rows), weights=tensors)


def hugging_face(folder: Path, head: Any, rows: TokenRows) -> Recorded:
    from megatron_rl.hf_reference.model import HfReference
    from megatron_rl.weights.rules import Head

    model = HfReference(folder, head)
    return Recorded(
        name="Hugging Face",
        scores=model.logprobs(rows) if head is Head.TOKEN else model.values(rows, None),
        places=model.activations(rows),
        weights=model.tensors(("model.", "lm_head.", "score.")),
    )
