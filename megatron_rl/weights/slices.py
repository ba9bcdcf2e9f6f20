"""Which part of a tensor an engine's worker keeps, learnt from what its loader reads; tensors that are that part alone.

A loader of vLLM is given whole tensors, out of which each tensor-parallel worker cuts its own part: of queries, keys
that several workers share, a gate, columns, rows of a vocabulary. Where it cuts is written nowhere but in its code. So
it is watched: a :class:`Window` looks like the whole tensor, notes what is cut out of it, and can do with less than the
whole. More than was read need not be sent the next time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from megatron_rl.weights.plan import Region

_aten: Any = torch.ops.aten
_ALIKE = (_aten.detach.default, _aten.alias.default, _aten._to_copy.default, _aten.clone.default)
"""What gives a tensor of the same elements in the same places, of another type or on another device perhaps."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a worker keeps of a tensor.

    Attributes:
        region: the smallest with all that its loader read; empty where it read nothing.
        by: the operation that read all of the tensor, where that was not a plain copy.
    """

    region: Region
    by: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Kept:
        """What :meth:`to_json` gave."""
        region = data["region"]
        return cls(region=Region(**{**region, "shape": tuple(region["shape"])}), by=data["by"])


class Reads:
    """What is read of some tensors, each of at least one dim."""

    def __init__(self) -> None:
        """Nothing so far."""
        self._cuts: dict[str, set[tuple[int, int, int]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._whole: dict[str, str | None] = {}

    def watch(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, as one that notes here what is read of it."""
        shape = tuple(tensor.shape)
        self._shapes[name] = shape
        return Window(_all_of(name, shape), tensor, self)

    def note(self, region: Region) -> None:
        """A region was read."""
        self._cuts.setdefault(region.name, set()).add((region.dim, region.start, region.stop))

    def note_whole(self, name: str, by: str | None) -> None:
        """All of it was read."""
        self._whole[name] = self._whole.get(name) or by

    def kept(self) -> dict[str, Kept]:
        """By name, of the tensors that were watched."""
        return {name: self._kept(name, shape) for name, shape in self._shapes.items()}

    def _kept(self, name: str, shape: tuple[int, ...]) -> Kept:
        whole, cuts = _all_of(name, shape), self._cuts.get(name, set())
        if name in self._whole:
            return Kept(region=whole, by=self._whole[name])
        if len({dim for dim, _, _ in cuts}) > 1:
            return Kept(region=whole, by="cuts along several dims")
        if not cuts:
            return Kept(region=_region(name, shape, 0, 0, 0))
        dim = next(iter(cuts))[0]
        return Kept(
            region=_region(name, shape, dim, min(start for _, start, _ in cuts), max(stop for _, _, stop in cuts))
        )


class Window(Tensor):
    """Stands for a whole tensor of which a region is there.

    It has the whole's shape and type. What is cut out of the region is a plain tensor, the same as if all were there;
    whoever reads anything outside gets an error that names the tensor.
    """

    _region: Region
    _content: Tensor
    _reads: Reads | None
    _led: bool
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, region: Region, content: Tensor, reads: Reads | None = None, led: bool = False) -> Window:
        """What is there, its elements in the region's shape, and who notes what is read; led by a dim of size 1."""
        make: Any = Tensor._make_wrapper_subclass
        shape = (1, *region.shape) if led else region.shape
        window: Window = make(cls, shape, dtype=content.dtype, device=content.device)
        window._region, window._content, window._reads, window._led = region, content, reads, led
        return window

    def __repr__(self) -> str:  # type: ignore[override]
        """Where it is; its elements may be elsewhere."""
        here = self._region
        return f"Window({here.name} {here.shape}: {here.start} to {here.stop} of dim {here.dim})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Cuts are answered, copies are windows; all else computes with the whole tensor.

        So is one in a list of one, a dim of size 1 that is put in front and taken away again: thus vLLM goes through
        experts that may come together or one by one.

        Raises:
            ValueError: what is read is not there.
        """
        kwargs = kwargs or {}
        here = args[0]
        if func in _ALIKE:
            return cls(here._region, func(here._content, *args[1:], **kwargs), here._reads, here._led)
        if func is _aten.unsqueeze.default and args[1] == 0 and not here._led:
            return cls(here._region, here._content, here._reads, led=True)
        if func is _aten.unbind.int and args[1:] in ((), (0,)) and here._led:
            return [cls(here._region, here._content, here._reads)]
        if func is _aten.slice.Tensor and not here._led:
            return here._cut(*args[1:], **kwargs)
        by = None if func is _aten.copy_.default else str(func)
        args, kwargs = tree_map_only(Window, lambda window: window._all(by), (args, kwargs))
        return func(*args, **kwargs)

    def _cut(self, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
        size, dim = self.shape[dim], dim % self.dim()
        first, behind, _ = slice(start, end).indices(size)
        if step != 1:
            return self._all("a cut with steps").__getitem__((slice(None),) * dim + (slice(start, end, step),))
        here = self._region
        if (first, behind) == (0, size):
            return Window(here, self._content, self._reads)
        cut = _region(here.name, here.shape, dim, first, max(first, behind))
        if not here.whole and not (dim == here.dim and here.start <= cut.start and cut.stop <= here.stop):
            raise ValueError(
                f"{here.name}: the engine asks for indices {cut.start} to {cut.stop} of dim {dim}, of the tensor "
                f"it was sent {here.start} to {here.stop} of dim {here.dim} alone, which it asked for before"
            )
        if self._reads is not None:
            self._reads.note(cut)
        offset = here.start if dim == here.dim else 0
        return self._content.narrow(dim, cut.start - offset, cut.stop - cut.start)

    def _all(self, by: str | None) -> Tensor:
        here = self._region
        if not here.whole:
            raise ValueError(
                f"{here.name}: the engine reads the whole tensor ({by or 'a copy'}), it was sent indices {here.start} "
                f"to {here.stop} of dim {here.dim} alone, which it asked for before"
            )
        if self._reads is not None:
            self._reads.note_whole(here.name, by)
        return self._content.unsqueeze(0) if self._led else self._content


@dataclass(frozen=True, kw_only=True)
class SlicePlan:
    """What a push sends to the workers of an engine.

    Attributes:
        slices: tensors of which each worker is sent a part of its own.
        whole: tensors that each is sent whole.
        read_otherwise: of these, whose loader does more than cut or copy, and what.
        worker_bytes: to each worker.
        model_bytes: of all tensors, whole.
    """

    slices: int
    whole: int
    read_otherwise: Mapping[str, str]
    worker_bytes: tuple[int, ...]
    model_bytes: int

    def __str__(self) -> str:
        """In a line."""
        first = {by: name for name, by in reversed([*self.read_otherwise.items()])}
        others = ", ".join(f"{[*self.read_otherwise.values()].count(by)} by {by}, as {first[by]}" for by in first)
        return (
            f"a push sends each of an engine's {len(self.worker_bytes)} workers its own slice of {self.slices} tensors "
            f"and {self.whole} whole: {max(self.worker_bytes)} of {self.model_bytes} bytes"
            + (f"; whole because vLLM does more than cut or copy, {others}" if others else "")
        )


class Slicing:
    """Which part of each tensor goes to which worker: all of it, until all workers have told what they keep of it.

    A worker's *lane* is its tensor-parallel rank: those of several engines keep the same.
    """

    def __init__(self, lanes: Sequence[Sequence[int]]) -> None:
        """Nobody has told anything.

        Args:
            lanes: by lane, the ranks of its workers in the channel.
        """
        self.lanes = lanes
        self._kept: dict[int, dict[str, Kept]] = {rank: {} for lane in lanes for rank in lane}
        self._sent: dict[str, tuple[tuple[int, ...], int]] = {}
        self._agreed: dict[tuple[str, tuple[int, ...]], list[Region] | None] = {}

    def learn(self, rank: int, kept: Mapping[str, Kept]) -> None:
        """What a worker keeps of some tensors."""
        self._kept[rank] |= kept
        self._agreed.clear()

    def regions(self, name: str, tensor: Tensor) -> list[Region] | None:
        """By lane, what to send of a tensor; None: all of it to all."""
        shape = tuple(tensor.shape)
        self._sent[name] = shape, tensor.nbytes
        return self._regions(name, shape)

    def _regions(self, name: str, shape: tuple[int, ...]) -> list[Region] | None:
        if (name, shape) not in self._agreed:
            self._agreed[name, shape] = self._agree(name, shape)
        return self._agreed[name, shape]

    def _agree(self, name: str, shape: tuple[int, ...]) -> list[Region] | None:
        by_lane = [{self._region(rank, name, shape) for rank in ranks} for ranks in self.lanes]
        agreed = [next(iter(regions)) for regions in by_lane if len(regions) == 1]
        regions = [region for region in agreed if region is not None]
        if len(regions) < len(self.lanes) or all(region.whole for region in regions):
            return None
        return regions

    def _region(self, rank: int, name: str, shape: tuple[int, ...]) -> Region | None:
        kept = self._kept[rank].get(name)
        return None if kept is None or kept.region.shape != shape else kept.region

    def plan(self) -> SlicePlan:
        """What the next push will send, if its tensors are those of the last one."""
        regions = {name: self._regions(name, shape) for name, (shape, _) in self._sent.items()}
        by_worker = [0] * len(self.lanes)
        for name, (shape, size) in self._sent.items():
            for lane, region in enumerate(regions[name] or [None] * len(self.lanes)):
                by_worker[lane] += size if region is None else size // max(1, math.prod(shape)) * region.elements
        return SlicePlan(
            slices=sum(found is not None for found in regions.values()),
            whole=sum(found is None for found in regions.values()),
            read_otherwise={
                name: by for kept in self._kept.values() for name, found in kept.items() if (by := found.by) is not None
            },
            worker_bytes=tuple(by_worker),
            model_bytes=sum(size for _, size in self._sent.values()),
        )


def _region(name: str, shape: tuple[int, ...], dim: int, start: int, stop: int) -> Region:
    return Region(rank=None, name=name, shape=shape, dim=dim, start=start, stop=stop)


def _all_of(name: str, shape: tuple[int, ...]) -> Region:
    return _region(name, shape, 0, 0, shape[0])
