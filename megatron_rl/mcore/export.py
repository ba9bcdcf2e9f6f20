"""Weights between this rank's megatron-core parameters and whole tensors under Hugging Face names."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rl.device import device
from megatron_rl.layout import ParallelLayout
from megatron_rl.mcore.quantised import by_transformer_engine, plain_values, store
from megatron_rl.mcore.sharded_names import PLAIN_NORMS
from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.buckets import DTYPES
from megatron_rl.weights.coverage import FURTHER, check_copy, check_coverage, head_of, told_left
from megatron_rl.weights.plan import HfFiles, Region, TensorMoves, TransferPlan, shards_on, transfer_plan
from megatron_rl.weights.safetensors_io import HfFolder
from megatron_rl.weights.weight_map import Head, WeightMap

_log = logging.getLogger(__name__)
_TYPES = [*DTYPES.values()]
_LOST_S = 2.0
"""How long a rank that lost rank 0 keeps quiet: rank 0 knows why, and should be the first to say it."""


class ShardLate(RuntimeError):
    """A shard did not get from the rank that holds it to rank 0."""


@dataclass(frozen=True, kw_only=True)
class Waits:
    """How long ranks wait for each other while tensors are put together.

    Attributes:
        what: the tensors are for, as errors name it.
        shard_s: bound on rank 0's wait for one shard; None: the time-out of the ranks' process group.
        taken_by: until when, on the monotonic clock, another rank waits for rank 0 to take a shard; None: as above.
    """

    what: str = "an export"
    shard_s: float | None = None
    taken_by: float | None = None


def local_parameters(chunks: Sequence[Any]) -> dict[str, Tensor]:
    """The parameters of this rank's pieces of the model, by global name: layers are numbered over the whole model, and
    norms are called the same whether they stand by themselves or in the linear after them.
    """
    found: dict[str, Tensor] = {}
    for chunk in chunks:
        biases = ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith("router.expert_bias"))
        for name, parameter in (*chunk.named_parameters(), *biases):
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[3:] = PLAIN_NORMS.get(".".join(parts[3:]), ".".join(parts[3:])).split(".")
                parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
            if "local_experts" in parts:
                place = parts.index("local_experts") + 1
                parts[place] = str(int(parts[place]) + _first_expert(chunk.config))
            found[".".join(parts)] = parameter
    return found


def _first_expert(config: Any) -> int:
    here = int(config.num_moe_experts) // int(parallel_state.get_expert_model_parallel_world_size())
    return here * int(parallel_state.get_expert_model_parallel_rank())


@torch.no_grad()
def load_hf(
    chunks: Sequence[Any], folder: Path, weights: WeightMap, dims: ModelDims, layout: ParallelLayout, rank: int
) -> None:
    """Fill a rank's pieces of the model from a Hugging Face folder, straight from the parts of its files that it needs.

    A value head stays as it was made where the folder is a policy's, from which a critic starts.

    Raises:
        ValueError: the weight map and the model disagree on this rank's parameters, the folder on their shapes, or it
            lacks a tensor, has one that the model's family does not know, or a head that a tied model cannot have.
    """
    source = HfFolder(folder)
    new_head = head_of(json.loads((folder / "config.json").read_text())) is Head.TOKEN
    left = check_coverage(folder, source.names, weights, new_head=new_head)
    if rank == 0:
        check_copy(folder, left, weights, source.tensor)
        if further := told_left({name: sort for name, sort in left.items() if sort == FURTHER}):
            _log.warning("%s: left out: %s", folder, further)
    parameters, shards = local_parameters(chunks), shards_on(weights, layout, rank)
    if parameters.keys() != shards.keys():
        lacking, unknown = sorted(parameters.keys() - shards.keys()), sorted(shards.keys() - parameters.keys())
        raise ValueError(
            f"{dims.architecture}: the weight map must name the parameters of rank {rank} of {layout}, it lacks "
            f"{lacking} and names {unknown} that are not there"
        )
    wanted = {shard.name for shard in shards.values()}
    mine = replace(weights, entries=tuple(entry for entry in weights.entries if entry.megatron in wanted))
    tensors = {tensor.entry.megatron: tensor for tensor in transfer_plan(mine, HfFiles(), layout).tensors}
    for name, parameter in parameters.items():
        tensor, holder = tensors[shards[name].name], shards[name].rank
        if new_head and not set(tensor.entry.hf) & source.names:
            continue
        quantised = by_transformer_engine(parameter)
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device()) if quantised else parameter
        for move in tensor.moves:
            if move.target.rank == holder:
                there = move.source
                _part(values, move.target).copy_(source.slice(there.name, there.index, shape=there.shape))
        for region in tensor.padding:
            if region.rank == holder:
                _part(values, region).zero_()
        if quantised:
            store(parameter, values)


def _part(tensor: Tensor, region: Region) -> Tensor:
    """A view of the region."""
    if tuple(tensor.shape) != region.shape:
        raise ValueError(f"{region.name} must have shape {region.shape}, megatron-core has {tuple(tensor.shape)}")
    return tensor.detach()[region.index]


@torch.no_grad()
def full_tensors(
    mine: Mapping[str, Tensor], plan: TransferPlan, layout: ParallelLayout, rank: int, waits: Waits | None = None
) -> Iterator[tuple[str, Tensor]]:
    """What ``plan`` moves, whole, tensor by tensor; every rank must exhaust the iterator, rank 0 alone gets anything.

    The first holder of each shard sends it to rank 0 once, straight; nobody else receives anything, and padding stays
    where it is.

    Args:
        mine: this rank's shards, as :func:`local_parameters` names them (the parameters, or something of their shapes);
            those in FP8 go as numbers of their nominal type.
        plan: from ``layout`` to the files.
        layout: of the model.
        rank: of this process.
        waits: for other ranks.

    Yields:
        Hugging Face name and full tensor, on rank 0.

    Raises:
        ShardLate: a rank does not give a shard, or rank 0 does not take one, in time; or the other one is gone.
    """
    link = _Link(rank, waits or Waits())
    types = _types(mine, plan, layout, link)
    for tensor in plan.tensors:
        name = tensor.entry.megatron
        parts: dict[int | None, Iterator[Tensor]] = {}
        arrivals: list[Callable[[], None]] = []
        for holder, theirs in _by_holder(tensor).items():
            if holder == rank:
                whole = plain_values(mine[name])  # of one tensor at a time: together they are a second model
                parts[holder] = iter([_part(whole, region) for region in theirs])
            elif rank == 0 and holder is not None:
                sizes = [region.elements for region in theirs]
                message = torch.empty(sum(sizes), dtype=types[holder][name], device=device())
                arrivals.append(link.take(message, holder, _told(tensor)))
                pieces = zip(message.split(sizes), theirs, strict=True)
                parts[holder] = iter([piece.view(region.region_shape) for piece, region in pieces])
        for arrived in arrivals:
            arrived()
        if rank == 0:
            placed = [(move.target, next(parts[move.source.rank])) for move in tensor.moves]
            for hf, group in groupby(placed, key=lambda piece: piece[0].name):
                yield hf, _assemble(list(group))
        elif rank in parts:
            flat = [part.reshape(-1) for part in parts[rank]]  # one message, one behind the other
            link.give(flat[0] if len(flat) == 1 else torch.cat(flat), _told(tensor))


def _by_holder(tensor: TensorMoves) -> dict[int | None, list[Region]]:
    """The regions that are moved, by the rank that gives them."""
    regions: dict[int | None, list[Region]] = {}
    for move in tensor.moves:
        regions.setdefault(move.source.rank, []).append(move.source)
    return regions


def _told(tensor: TensorMoves) -> str:
    return f"{tensor.entry.megatron} ({', '.join(tensor.entry.hf)})"


def _types(
    mine: Mapping[str, Tensor], plan: TransferPlan, layout: ParallelLayout, link: _Link
) -> dict[int, dict[str, torch.dtype]]:
    """Of what the other ranks will give, on rank 0: by rank and name."""
    given: dict[int, list[str]] = {holder: [] for holder in range(1, layout.world_size)}
    for tensor in plan.tensors:
        for holder in _by_holder(tensor):
            if holder:
                given[holder].append(tensor.entry.megatron)
    what = "the types of its tensors"
    if link.rank and (names := given[link.rank]):
        codes = [_TYPES.index(mine[name].dtype) for name in names]
        link.give(torch.tensor(codes, dtype=torch.uint8, device=device()), what)
    found: dict[int, dict[str, torch.dtype]] = {}
    for holder, names in given.items() if link.rank == 0 else ():
        if names:
            message = torch.empty(len(names), dtype=torch.uint8, device=device())
            link.take(message, holder, what)()
            found[holder] = {name: _TYPES[code] for name, code in zip(names, message.tolist(), strict=True)}
    return found


@dataclass(frozen=True)
class _Link:
    """Messages to rank 0, each within its deadline."""

    rank: int
    waits: Waits

    def take(self, into: Tensor, holder: int, what: str) -> Callable[[], None]:
        """Begin to fill ``into`` with what ``holder`` gives; what comes back waits for it."""
        late = f"{self.waits.what}: {what} from rank {holder} did not arrive"
        return _begun(lambda: dist.irecv(into, src=holder), self.waits.shard_s, late)

    def give(self, tensor: Tensor, what: str) -> None:
        """Give it to rank 0."""
        until, started = self.waits.taken_by, time.monotonic()
        left = None if until is None else max(0.001, until - started)
        try:
            late = f"{self.waits.what}: rank 0 did not take {what} of rank {self.rank}"
            _begun(lambda: dist.isend(tensor, dst=0), left, late)()
        except ShardLate:
            if left is None or time.monotonic() - started < left:  # not late, but gone
                time.sleep(_LOST_S)
            raise


def _begun(begin: Callable[[], Any], within_s: float | None, late: str) -> Callable[[], None]:
    """Begin a message; what comes back waits for its end."""
    with _named(within_s, late):
        work = begin()

    def wait() -> None:
        with _named(within_s, late):
            work.wait(timedelta(seconds=within_s or 0))  # zero stands for the group's own time-out

    return wait


@contextmanager
def _named(within_s: float | None, late: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        bound = "the ranks' time-out" if within_s is None else f"{within_s:.3g} s"
        raise ShardLate(
            f"{late} within {bound}: after {time.monotonic() - started:.1f} s, {str(error).splitlines()[0]}"
        ) from error


def _assemble(pieces: Sequence[tuple[Region, Tensor]]) -> Tensor:
    """The tensor that the pieces make up; no copy where there is one."""
    region, piece = pieces[0]
    if region.whole:
        return piece
    full = piece.new_empty(region.shape)
    for region, piece in pieces:
        full[region.index] = piece
    return full
