"""Weights from a Hugging Face folder onto ranks and back, without an optimizer."""

from __future__ import annotations

import io
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
    piece, send = HfFolder.slice, dist.isend

    def counted_slice(*args: Any, **kwargs: Any) -> Tensor:
        part = piece(*args, **kwargs)
        read.append(part.numel())
        return part

    def counted_send(tensor: Tensor, dst: int) -> Any:
        assert dst == 0
        if tensor.is_floating_point():  # the others say which types come
            sent.append(tensor.nbytes)
        return send(tensor, dst=dst)

    HfFolder.slice, dist.isend = counted_slice, counted_send  # type: ignore[method-assign]
    try:
        load_hf(chunks, trip.folder, weights, dims, layout, rank)
        tensors = full_tensors(mine, transfer_plan(weights, layout, HfFiles()), layout, rank)
        if rank == 0:
            save_hf_folder(trip.back, tensors, like=trip.folder)
        else:
            assert list(tensors) == []
    finally:
        HfFolder.slice, dist.isend = piece, send  # type: ignore[method-assign]
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


class StopsAt(dict[str, Tensor]):
    """Shards of a rank that is stopped, or leaves its groups, when it is to give the one of this name."""

    def __init__(self, shards: dict[str, Tensor], name: str, stop: Callable[[], None]) -> None:
        super().__init__(shards)
        self._name, self._stop, self._asked = name, stop, 0

    def __getitem__(self, name: str) -> Tensor:
        """The shard."""
        self._asked += name == self._name
        if self._asked == 2:  # the first time, for its type
            self._asked += 1
            self._stop()
        return super().__getitem__(name)


def assembled_without(rank: int, port: int, folder: Path, ends: str, how: str) -> tuple[str, float, float]:
    """What a rank is told, after how many seconds, and when by the machine's clock.

    Rank 1 of 3 stages is stopped, or leaves, before the shard ``ends``; where that is ``rank 0``, rank 0 is stopped
    after its first tensor. Whoever is told first wakes it.
    """
    import torch.distributed as dist

    from megatron_rl.mcore.export import ShardLate, Waits, full_tensors
    from megatron_rl.mcore.groups import start_groups, stop_groups

    layout = ParallelLayout(pipeline=3, first_stage_layers=1, last_stage_layers=1)
    start_groups(layout, rank=rank, host="127.0.0.1", port=port, timeout_s=30.0, seed=0)
    pids: list[Any] = [None] * 3
    dist.all_gather_object(pids, os.getpid())
    weights = weight_map(read_model_dims(folder), Head.TOKEN)
    plan = transfer_plan(weights, layout, HfFiles())
    mine = {move.source.name: torch.zeros(move.source.shape) for move in plan.moves if move.source.rank == rank}
    stop = stop_groups if how == "leaves" else partial(os.kill, os.getpid(), signal.SIGSTOP)
    stopped = 0 if ends == "rank 0" else 1
    shards = StopsAt(mine, ends, stop) if rank == stopped else mine
    started = time.monotonic()
    waits = Waits(
        what="version 7", shard_s=20.0 if how == "leaves" else 2.0, taken_by=started + (20.0 if stopped else 2.0)
    )
    told = "nothing"
    try:
        for number, _ in enumerate(full_tensors(shards, plan, layout, rank, waits)):
            if stopped == 0 and number == 0:
                stop()
    except (ShardLate, ValueError) as error:  # who has left has no group any more
        told = f"{type(error).__name__}: {error}"
    ended = time.monotonic()
    if rank == (1 if stopped == 0 else 0):
        os.kill(pids[stopped], signal.SIGCONT)
    if dist.is_initialized():
        stop_groups()
    return told, ended - started, ended


def pushed_without(rank: int, port: int, model: Path) -> tuple[str, str, float]:
    """What the trainer's rank 0 and a receiver are told, and after how many seconds, where rank 1 is stopped."""
    import torch.distributed as dist

    from megatron_rl.weights.transfer import Channel
    from megatron_rl.weights.transports import Transport

    worker = start(rank, port, model, Setup(layout=ParallelLayout(pipeline=2), updates=None))
    pids: list[Any] = [None] * 2
    dist.all_gather_object(pids, os.getpid())
    heard: list[str] = []

    def receive(at: tuple[str, int]) -> None:
        channel = Channel.join(at, rank=1, world_size=2, timeout_s=10.0)
        try:
            list(channel.receive(5))
        except RuntimeError as error:
            heard.append(str(error))
        channel.close()

    receiver = threading.Thread(target=receive, args=(worker.listen("127.0.0.1"),)) if rank == 0 else None
    if receiver is not None:
        receiver.start()
    worker.open_channel(2, 2.0, Transport.GLOO, 1 << 20, 1, None)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    started = time.monotonic()
    told = "nothing"
    try:
        worker.send(5, 60.0)
    except RuntimeError as error:
        told = f"{type(error).__name__}: {error}"
    took = time.monotonic() - started
    if receiver is not None:
        os.kill(pids[1], signal.SIGCONT)
        receiver.join(10.0)
    worker.close()
    return told, "".join(heard), took


def slices_over_channels(rank: int, port: int, model: Path, formats: list[str | None]) -> list[int]:
    """Tensors in slices of a push over one channel after the other, each to two workers that keep half of the rows.

    Args:
        rank: the only one.
        port: free.
        model: folder.
        formats: that linears are sent in, by channel.
    """
    from megatron_rl.weights.transfer import Channel
    from megatron_rl.weights.transports import Transport

    def receive(at: tuple[str, int], lane: int, version: int) -> None:
        channel = Channel.join(at, rank=1 + lane, world_size=3, timeout_s=20.0)
        reception = channel.receive(version)
        for _, tensor in reception:
            half = tensor.size(0) // 2
            tensor.narrow(0, lane * half, half).clone()
        channel.keep(reception.reads)
        channel.close()

    worker = start(rank, port, model, Setup(updates=None))
    found = []
    with ThreadPoolExecutor(2) as pool:
        for version, form in enumerate(formats):
            at = worker.listen("127.0.0.1")
            receivers = [pool.submit(receive, at, lane, version) for lane in range(2)]
            worker.open_channel(3, 20.0, Transport.GLOO, 1 << 20, 2, form)
            (first, _) = worker.send(version, 60.0)
            for receiver in receivers:
                receiver.result(20.0)
            found.append(first.slices)
    worker.close()
    return found
