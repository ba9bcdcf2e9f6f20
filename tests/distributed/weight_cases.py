"""Weights from a Hugging Face folder onto ranks and back, without an optimizer."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.config.schema import OptimizerConfig, TrainerConfig
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import read_model_dims
from megatron_rl.weights.plan import HfFiles, transfer_plan
from megatron_rl.weights.safetensors_io import HfFolder, save_hf_folder
from megatron_rl.weights.weight_map import Head, weight_map
from tests.distributed.cases import Reinforce, Setup, minibatch, start


@dataclass(frozen=True, kw_only=True)
class Trip:
    """A model that goes onto the ranks and back."""

    folder: Path
    back: Path
    head: Head
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One rank on a trip: elements read from the files, elements of its parameters, bytes sent."""

    read: int
    held: int
    sent: int


def round_trips(rank: int, port: int, layout: ParallelLayout, trips: list[Trip]) -> list[Traffic]:
    """Load each model and export it again."""
    from megatron_rl.mcore.groups import start_groups, stop_groups

    start_groups(layout, rank=rank, host="127.0.0.1", port=port, timeout_s=30.0, seed=0)
    try:
        return [_round_trip(rank, layout, trip) for trip in trips]
    finally:
        stop_groups()


def _round_trip(rank: int, layout: ParallelLayout, trip: Trip) -> Traffic:
    import torch.distributed as dist

    from megatron_rl.mcore.export import full_tensors, load_hf, local_parameters
    from megatron_rl.mcore.model import build_chunks

    dims = read_model_dims(trip.folder)
    weights = weight_map(dims, trip.head)
    chunks = build_chunks(dims, TrainerConfig(optimizer=OptimizerConfig(lr=1.0), layout=layout), trip.dtype, trip.head)
    mine = local_parameters(chunks)
    with torch.no_grad():
        for parameter in mine.values():
            parameter.fill_(torch.nan)
    read: list[int] = []
    sent: list[int] = []
    piece, send = HfFolder.slice, dist.send

    def counted_slice(*args: Any, **kwargs: Any) -> Tensor:
        part = piece(*args, **kwargs)
        read.append(part.numel())
        return part

    def counted_send(tensor: Tensor, dst: int) -> None:
        assert dst == 0
        sent.append(tensor.nbytes)
        send(tensor, dst=dst)

    HfFolder.slice, dist.send = counted_slice, counted_send  # type: ignore[method-assign]
    try:
        load_hf(chunks, trip.folder, weights, dims, layout, rank)
        tensors = full_tensors(mine, transfer_plan(weights, layout, HfFiles()), layout, rank)
        if rank == 0:
            save_hf_folder(trip.back, tensors, like=trip.folder)
        else:
            assert list(tensors) == []
    finally:
        HfFolder.slice, dist.send = piece, send  # type: ignore[method-assign]
    for name, parameter in mine.items():
        assert not parameter.isnan().any(), f"a part of {name} was not loaded"
    return Traffic(read=sum(read), held=sum(parameter.numel() for parameter in mine.values()), sent=sum(sent))


def vocabularies_after_update(rank: int, port: int, model: Path, setup: Setup) -> list[Tensor]:
    """This rank's parts of the embedding and (where it has its own weights) of the output layer, after an update."""
    from megatron_rl.mcore.export import local_parameters

    worker = start(rank, port, model, setup)
    worker.update(minibatch(), Reinforce())
    mine = local_parameters([chunk.module for chunk in worker._training.chunks])
    found = [mine[name].detach().clone() for name in mine if "word_embeddings" in name or "output_layer" in name]
    worker.close()
    return found


def load_another(rank: int, port: int, folder: Path, sizes: Path, head: Head = Head.TOKEN) -> str:
    """What is said of a folder: the error, or what was logged; ``sizes`` has the configuration that is believed."""
    from megatron_rl.mcore.export import load_hf
    from megatron_rl.mcore.groups import start_groups, stop_groups
    from megatron_rl.mcore.model import build_chunks

    layout = ParallelLayout()
    logger, handler = logging.getLogger("megatron_rl.mcore.export"), logging.StreamHandler(io.StringIO())
    start_groups(layout, rank=rank, host="127.0.0.1", port=port, timeout_s=30.0, seed=0)
    try:
        dims = read_model_dims(sizes)
        trainer = TrainerConfig(optimizer=OptimizerConfig(lr=1.0))
        chunks = build_chunks(dims, trainer, torch.float32, head)
        logger.addHandler(handler)
        load_hf(chunks, folder, weight_map(dims, head), dims, layout, rank)
    except ValueError as error:
        return str(error)
    finally:
        logger.removeHandler(handler)
        stop_groups()
    return handler.stream.getvalue()
