"""From a Hugging Face folder to a ``torch_dist`` checkpoint that megatron-core loads at any layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from megatron_rl.convert.processes import Report, for_each_file
from megatron_rl.convert.resume import Conversion, complete_file, convert
from megatron_rl.convert.sources import HfSource, compare_sums, copy_tokenizer, reading, summed_bytes
from megatron_rl.convert.summary import Summary
from megatron_rl.convert.target import Target
from megatron_rl.durable import files_in, read_record
from megatron_rl.mcore.sharded_names import extra_states, sharded_name
from megatron_rl.mcore.torch_dist_writer import Piece, TorchDistWriter, WrittenFile, written_file
from megatron_rl.weights.coverage import told_left
from megatron_rl.weights.manifest import MANIFEST, Manifest
from megatron_rl.weights.safetensors_io import has_vocabulary, model_config
from megatron_rl.weights.weight_map import WeightEntry

_FILE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """What is written where.

    Attributes:
        folder: of the model.
        source: its tensors.
        files: those of each file, in the order of the model.
        digest: the same for the same plan of the same model.
    """

    folder: Path
    source: HfSource
    files: tuple[tuple[WeightEntry, ...], ...]
    digest: str

    def summary(self) -> Summary:
        """Its size."""
        sizes = [self.source.info(entry).size_bytes for file in self.files for entry in file]
        return Summary(
            tensors=len(sizes),
            files=len(self.files),
            read_bytes=self.source.read_bytes,
            summed_bytes=summed_bytes(self.source),
            written_bytes=sum(sizes),
            largest_bytes=2 * max(sizes),  # what is read is mapped; its parts are converted, then put together
            has_vocabulary=has_vocabulary(self.folder),
            left_out=told_left(self.source.left_out),
        )


def plan_import(folder: Path, *, dtype: torch.dtype | None, processes: int) -> ImportPlan:
    """Plan without reading a tensor; arguments and errors as :class:`.HfSource`.

    Files are of about one size, at most about a GiB, and as many as keep all processes busy.
    """
    source = HfSource(folder, dtype)
    entries = source.weights.entries
    sizes = [source.info(entry).size_bytes for entry in entries]
    total = sum(sizes)
    count = min(processes * -(-total // (processes * _FILE_BYTES)), len(entries))
    files: list[list[WeightEntry]] = [[] for _ in range(count)]
    begin = 0
    for entry, size in zip(entries, sizes, strict=True):
        files[min(count - 1, (2 * begin + size) * count // (2 * total))].append(entry)
        begin += size
    frozen = tuple(tuple(file) for file in files if file)
    digest = xxhash.xxh3_128_hexdigest(repr((source.identity(), dtype, frozen)).encode())
    return ImportPlan(folder=folder, source=source, files=frozen, digest=digest)


def run_import(
    plan: ImportPlan, target: Target, *, resume: bool, processes: int, progress: Callable[[int], None]
) -> bool:
    """Write the checkpoint, with configuration and tokenizer, so that the way back needs nothing else.

    Args:
        plan: of the import.
        target: to write.
        resume: go on with an import that was interrupted, keeping the files that are complete and undamaged.
        processes: at most so many at a time.
        progress: told the bytes done: written and read back.

    Returns:
        False: it was complete already.

    Raises:
        FileExistsError, OSError, SourceDamaged, ValueError: as :func:`.convert`.
    """
    conversion = Conversion(name="import", made_of="model, --dtype or --processes", digest=plan.digest)
    return convert(conversion, target, lambda: _write(plan, target, processes, progress), resume=resume)


def _write(plan: ImportPlan, target: Target, processes: int, progress: Callable[[int], None]) -> None:
    model, source, dims = target.model, plan.source, plan.source.dims
    pieces = [[Piece(sharded_name(entry, dims), source.info(entry)) for entry in file] for file in plan.files]
    writer = TorchDistWriter(model, pieces, list(extra_states(source.weights)))

    def write(number: int, report: Report) -> WrittenFile:
        def tensor(place: int) -> Tensor:
            entry = plan.files[number][place]
            report.at(entry.megatron)
            with reading(plan.folder):
                return source.tensor(entry)

        name = writer.path(number).name
        report.at(name)
        return complete_file(
            target,
            name,
            read=written_file,
            check=lambda written: writer.check_file(number, written, report.moved),
            write=lambda: writer.write_file(number, tensor, report.moved),
        )

    progress = compare_sums(source, processes=processes, progress=progress)
    written = for_each_file(len(plan.files), write, processes=processes, progress=progress, meanwhile=_load_metadata)
    writer.finish(written, plan.digest)
    widest = max((source.info(entry) for entry in source.weights.entries), key=lambda info: info.size_bytes)
    copied = copy_tokenizer(plan.folder, model)
    config = model_config(source.config, None, widest.dtype, beside=copied)
    (model / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    files = {writer.path(number).name: file.record for number, file in enumerate(written)}
    others = {name: path for name, path in files_in(model).items() if name not in files and name != MANIFEST}
    files |= {name: read_record(path) for name, path in others.items()}
    (model / MANIFEST).write_text(Manifest(plan=plan.digest, files=files).dump())


def _load_metadata() -> None:
    """What describes the files takes half a second to load, while the files are written."""
    import megatron_rl.mcore.torch_dist  # noqa: F401
