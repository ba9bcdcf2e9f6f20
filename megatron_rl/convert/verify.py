"""Whether a converted folder is what it should be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.convert.processes import Report, for_each_file
from megatron_rl.convert.sources import HfSource, MegatronSource, keeps_type, recorded
from megatron_rl.mcore.torch_dist import METADATA
from megatron_rl.weights.coverage import told_left
from megatron_rl.weights.manifest import Damaged, Manifest, check_file, check_shard
from megatron_rl.weights.safetensors_io import HfFolder
from megatron_rl.weights.weight_map import WeightEntry, WeightMap

Source = HfSource | MegatronSource


class Different(ValueError):
    """Two folders hold different models; the message names the first tensor that differs."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What level ``files`` found in a folder that is whole.

    Attributes:
        summed: whether it has a manifest, or is in a training checkpoint, which has one.
        left_out: which of its tensors the model is not made of, for people.
    """

    summed: bool
    left_out: str


def open_source(folder: Path, dtype: torch.dtype | None = None, *, drop_padding_rows: bool = False) -> Source:
    """A model folder of either kind, with everything that can be checked without reading tensors.

    Options as :class:`.HfSource` has ``dtype`` and :class:`.MegatronSource` ``drop_padding_rows``.

    Raises:
        FileNotFoundError, ValueError: as :class:`.HfSource` and :class:`.MegatronSource`.
    """
    if (folder / METADATA).is_file():
        return MegatronSource(folder, drop_padding_rows=drop_padding_rows)
    return HfSource(folder, dtype)


def check_folder(
    folder: Path, *, dtype: torch.dtype | None = None, processes: int, progress: Callable[[int], None]
) -> Checked:
    """Level ``files``: index, names, shapes and types, and every byte against the manifest, where there is one (of a
    folder in a training checkpoint, that of the checkpoint).

    Args:
        folder: of the model.
        dtype: see :class:`.HfSource`; with it, tensors may have any floating-point type.
        processes: at most so many at a time.
        progress: told the bytes that are read.

    Raises:
        FileNotFoundError, ValueError: the folder is incomplete or contradicts itself.
        Damaged: it is not what the manifest says.
    """
    sums = recorded(folder)
    if sums is None:
        return Checked(summed=False, left_out=told_left(open_source(folder, dtype).left_out))
    manifest = sums.manifest
    checks = [
        *((name, partial(check_file, folder, name, record)) for name, record in manifest.files.items()),
        *((name, partial(check_shard, folder, name, record)) for name, record in manifest.shards.items()),
    ]

    def check(number: int, report: Report) -> str | None:
        name, compare = checks[number]
        report.at(name)
        try:
            compare(report.moved)
        except Damaged as damage:
            return str(damage)
        return None

    damages = [text for text in for_each_file(len(checks), check, processes=processes, progress=progress) if text]
    if damages:
        raise Damaged(damages[0])
    source = open_source(folder, dtype)
    _check_index(folder, manifest)
    return Checked(summed=True, left_out=told_left(source.left_out))


def check_values(
    folder: Path,
    other: Path,
    *,
    dtype: torch.dtype | None,
    processes: int,
    progress: Callable[[int], None],
    drop_padding_rows: bool = False,
) -> int:
    """Level ``values``: every element against another folder of the same model, of either kind, to the bit.

    Layers that predict further tokens may be in one folder alone: a conversion leaves them out.

    Args:
        folder: of the model.
        other: of the model.
        dtype: both sides are converted to it first, but for tensors that keep their type on both
            (:func:`.keeps_type`); None: nothing is converted, and a tensor of another type differs.
        processes: at most so many at a time.
        progress: told the bytes that are compared.
        drop_padding_rows: see :class:`.MegatronSource`.

    Returns:
        how many tensors are the same.

    Raises:
        FileNotFoundError, ValueError: as :func:`open_source`.
        Different: a tensor differs.
    """
    left, right = (open_source(side, dtype, drop_padding_rows=drop_padding_rows) for side in (folder, other))
    if (_without_further(left.weights), left.not_computed) != (_without_further(right.weights), right.not_computed):
        raise Different(
            f"{folder} and {other} must be of the same model, their configurations differ: "
            f"{_first_setting(left, right)}"
        )
    entries = left.weights.entries
    step = max(1, len(entries) // (8 * processes))
    parts = [entries[start : start + step] for start in range(0, len(entries), step)]

    def compare(number: int, report: Report) -> str | None:
        for entry in parts[number]:
            report.at(", ".join(entry.hf))
            for name, mine, theirs in _pairs(left, right, entry):
                difference = _difference(*_converted(entry, mine, theirs, dtype))
                if difference:
                    return f"{name}: {difference}"
                report.moved(mine.nbytes)
        return None

    found = [text for text in for_each_file(len(parts), compare, processes=processes, progress=progress) if text]
    if found:
        raise Different(f"{found[0]} ({folder} against {other})")
    return sum(len(entry.hf) for entry in entries)


def _without_further(weights: WeightMap) -> WeightMap:
    return replace(weights, dims=replace(weights.dims, further_layers=0))


def _pairs(left: Source, right: Source, entry: WeightEntry) -> list[tuple[str, Tensor, Tensor]]:
    return [
        (name, mine, theirs)
        for (name, mine), (_, theirs) in zip(_hf_tensors(left, entry), _hf_tensors(right, entry), strict=True)
    ]


def _hf_tensors(source: Source, entry: WeightEntry) -> list[tuple[str, Tensor]]:
    if isinstance(source, MegatronSource):
        return source.hf_tensors(entry)
    return list(zip(entry.hf, source.hf_tensors(entry), strict=True))


def _converted(entry: WeightEntry, mine: Tensor, theirs: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    if dtype is None or (keeps_type(entry, mine.dtype) and mine.dtype == theirs.dtype):
        return mine, theirs
    return mine.to(dtype), theirs.to(dtype)


def _difference(mine: Tensor, theirs: Tensor) -> str | None:
    if mine.shape != theirs.shape:
        return f"shape {list(mine.shape)} against {list(theirs.shape)}"
    if mine.dtype != theirs.dtype:
        return f"type {mine.dtype} against {theirs.dtype}; give --dtype to compare after conversion"
    integer = {4: torch.int32, 2: torch.int16}[mine.dtype.itemsize]
    differs = mine.contiguous().view(integer) != theirs.contiguous().view(integer)
    count = int(differs.sum())
    if not count:
        return None
    at = tuple(int(i) for i in torch.unravel_index(differs.flatten().to(torch.uint8).argmax(), differs.shape))
    return f"{count} of {mine.numel()} elements differ, the first at {list(at)}: {mine[at]:g} against {theirs[at]:g}"


def _check_index(folder: Path, manifest: Manifest) -> None:
    if not manifest.shards:
        return
    named = {name for shard in manifest.shards.values() for name in shard.tensors}
    beyond = sorted(named ^ HfFolder(folder).names)
    if beyond:
        raise Damaged(f"{beyond[0]}: index and manifest of {folder} do not both name it")


def _first_setting(left: Source, right: Source) -> str:
    """What differs first: a size or switch of the model, or a tensor (one has another head)."""
    mine, theirs = (asdict(_without_further(side.weights).dims) for side in (left, right))
    if different := [name for name in mine if mine[name] != theirs[name]]:
        return f"{different[0]} is {mine[different[0]]} against {theirs[different[0]]}"
    for problem in (*left.not_computed, *right.not_computed):
        if (problem in left.not_computed) != (problem in right.not_computed):
            return f"of one alone, {problem}"
    return f"{min(left.weights.hf_names ^ right.weights.hf_names)} is in one alone"
