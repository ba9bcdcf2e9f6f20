"""From a ``torch_dist`` checkpoint to a Hugging Face folder, which an interruption does not spoil."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from megatron_rl.convert.processes import Report, for_each_file
from megatron_rl.convert.resume import Conversion, complete_file, convert
from megatron_rl.convert.sources import MegatronSource, compare_sums, copy_tokenizer, keeps_type, reading, summed_bytes
from megatron_rl.convert.summary import Summary
from megatron_rl.convert.target import Target
from megatron_rl.durable import files_in, read_record
from megatron_rl.mcore.torch_dist import METADATA
from megatron_rl.weights.coverage import critic_architecture, told_left
from megatron_rl.weights.fp8_blocks import BLOCK, FP8, SCALE_SUFFIX, block_config, quantise, scale_shape
from megatron_rl.weights.manifest import (
    MANIFEST,
    Manifest,
    ShardRecord,
    check_shard,
    read_back,
    shard_record,
)
from megatron_rl.weights.rules import Head
from megatron_rl.weights.safetensors_io import (
    TensorInfo,
    file_names,
    has_vocabulary,
    header_of,
    model_config,
    write_index,
    write_tensors,
)
from megatron_rl.weights.weight_map import WeightEntry

_LINEAR = ("_proj.weight", "_proj_with_mqa.weight")


@dataclass(frozen=True, kw_only=True)
class Form:
    """How tensors are written.

    Attributes:
        dtype: None: as they are.
        in_blocks: Hugging Face tensors in 8 bits, with a scale per block of 128 x 128; others are as ``dtype`` says.
    """

    dtype: torch.dtype | None = None
    in_blocks: frozenset[str] = frozenset()

    def infos(self, entry: WeightEntry, name: str, info: TensorInfo) -> dict[str, TensorInfo]:
        """What one Hugging Face tensor of ``entry`` is written as."""
        if name in self.in_blocks:
            scale = TensorInfo(torch.float32, scale_shape(info.shape))
            return {name: TensorInfo(FP8, info.shape), name + SCALE_SUFFIX: scale}
        return {name: TensorInfo(self._type(entry, info.dtype), info.shape)}

    def tensors(self, entry: WeightEntry, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """The same of the tensor itself."""
        if name in self.in_blocks:
            small, scale = quantise(tensor)
            return [(name, small), (name + SCALE_SUFFIX, scale)]
        return [(name, tensor.to(self._type(entry, tensor.dtype)))]

    def _type(self, entry: WeightEntry, found: torch.dtype) -> torch.dtype:
        return found if self.dtype is None or keeps_type(entry, found) else self.dtype


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What is written where.

    Attributes:
        source: Megatron's side.
        form: of what is written.
        files: the tensors of each file, in the order of the model.
        digest: the same for the same plan of the same checkpoint.
    """

    source: MegatronSource
    form: Form
    files: tuple[tuple[WeightEntry, ...], ...]
    digest: str

    def infos(self, number: int) -> dict[str, TensorInfo]:
        """Of the Hugging Face tensors of a file."""
        return _infos(self.source, self.form, self.files[number])

    def summary(self) -> Summary:
        """Its size."""
        sizes = [self.source.info(entry).size_bytes for file in self.files for entry in file]
        written = [info.size_bytes for number in range(len(self.files)) for info in self.infos(number).values()]
        return Summary(
            tensors=len(sizes),
            files=len(self.files),
            read_bytes=sum(sizes),
            summed_bytes=summed_bytes(self.source),
            written_bytes=sum(written),
            largest_bytes=max(self._held_bytes(entry) for file in self.files for entry in file),
            has_vocabulary=has_vocabulary(self.source.like),
            left_out=told_left(self.source.left_out),
            padding_rows=self.source.padding_rows(),
        )

    def _held_bytes(self, entry: WeightEntry) -> int:
        read = self.source.info(entry).size_bytes
        written = sum(info.size_bytes for info in _infos(self.source, self.form, (entry,)).values())
        return read + max(read, written)


def plan_export(
    folder: Path,
    *,
    like: Path | None = None,
    dtype: torch.dtype | None = None,
    fp8_blocks: bool = False,
    shard_bytes: int,
    drop_padding_rows: bool = False,
) -> ExportPlan:
    """Plan without reading a tensor.

    Args:
        folder: a ``torch_dist`` checkpoint.
        like: where configuration and tokenizer come from, see :class:`.MegatronSource`.
        dtype: of the tensors; None: as they are.
        fp8_blocks: linear layers in 8 bits with a scale per block of 128 x 128. Those with inputs that are no multiple
            of 128 stay in ``dtype``, and so do those that engines hold as one matrix (queries, keys and values; gate
            and up) where blocks would reach from one into the next.
        shard_bytes: a file is closed before it grows beyond this; only larger tensors that are made together make a
            larger file.
        drop_padding_rows: rows behind the vocabulary need not be zero, see :class:`.MegatronSource`.

    Raises:
        FileNotFoundError, ValueError: as :class:`.MegatronSource`; or transformers has no such critic, or engines could
            not run the model in blocks, or none of its layers.
    """
    source = MegatronSource(folder, like, drop_padding_rows=drop_padding_rows)
    if source.head is Head.VALUE:
        critic_architecture(source.dims.architecture)
    form = Form(dtype=dtype, in_blocks=_in_blocks(source) if fp8_blocks else frozenset())
    files: list[list[WeightEntry]] = [[]]
    size = 0
    for entry in source.weights.entries:
        more = sum(info.size_bytes for info in _infos(source, form, (entry,)).values())
        if files[-1] and size + more > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += more
    frozen = tuple(tuple(file) for file in files)
    digest = xxhash.xxh3_128((folder / METADATA).read_bytes())
    digest.update(repr((source.config, dtype, sorted(form.in_blocks), frozen)).encode())
    return ExportPlan(source=source, form=form, files=frozen, digest=digest.hexdigest())


def run_export(
    plan: ExportPlan, target: Target, *, resume: bool, processes: int, progress: Callable[[int], None]
) -> bool:
    """Write the folder: each file under a temporary name, flushed, read back from the disk, then given its name.

    First the files of the source are compared with their sums, where it has them.

    Args:
        plan: of the export.
        target: to write.
        resume: go on with an export that was interrupted, keeping the files that are complete and undamaged.
        processes: at most so many at a time.
        progress: told the bytes done: compared, written and read back.

    Returns:
        False: it was complete already.

    Raises:
        FileExistsError: the target, or (without ``resume``) a part of it, is there.
        OSError: it cannot be written, for instance because the disk is full, or the source cannot be read. Complete
            files stay in the hidden folder, to go on with; the target itself is not there.
        SourceDamaged: a file of the source is damaged; nothing is left.
        ValueError: what was interrupted was another plan.
    """
    conversion = Conversion(
        name="export", made_of="checkpoint, --like, --dtype, --fp8-blocks or --shard-size", digest=plan.digest
    )
    return convert(conversion, target, lambda: _write(plan, target, processes, progress), resume=resume)


def _write(plan: ExportPlan, target: Target, processes: int, progress: Callable[[int], None]) -> None:
    progress = compare_sums(plan.source, processes=processes, progress=progress)
    job = partial(_write_file, plan, target, file_names(len(plan.files)))
    shards = for_each_file(len(plan.files), job, processes=processes, progress=progress)
    model = target.model
    tensors = {name: record for shard in shards for name, record in shard.tensors.items()}
    if len(shards) > 1:
        total = sum(record.end - record.begin for record in tensors.values())
        write_index(model, {name: record.file for name, record in tensors.items()}, total)
    copied = copy_tokenizer(plan.source.like, model)
    (model / "config.json").write_text(json.dumps(_config(plan, copied), indent=2) + "\n")
    names = dict(zip(file_names(len(shards)), shards, strict=True))
    others = {name: path for name, path in files_in(model).items() if name not in names and name != MANIFEST}
    manifest = Manifest(plan=plan.digest, shards=names, files={name: read_record(others[name]) for name in others})
    (model / MANIFEST).write_text(manifest.dump())


def _write_file(plan: ExportPlan, target: Target, names: list[str], number: int, report: Report) -> ShardRecord:
    name, infos = names[number], plan.infos(number)
    report.at(name)

    def check(shard: ShardRecord) -> None:
        check_shard(target.model, name, shard, lambda _: None)
        report.moved(2 * sum(info.size_bytes for info in infos.values()))

    def write() -> ShardRecord:
        partial_file = target.model / f".{name}.partial"
        partial_file.unlink(missing_ok=True)
        try:
            given = {}
            for written in write_tensors(partial_file, infos, _tensors(plan, number, report)):
                given[written.name] = written.xxh3
                report.moved(written.size_bytes)
            shard = read_back(partial_file, name, report.moved)
            _check_written(target.path / name, infos, given, shard)
        except BaseException:
            partial_file.unlink(missing_ok=True)
            raise
        partial_file.rename(target.model / name)
        return shard

    return complete_file(target, name, read=shard_record, check=check, write=write)


def _tensors(plan: ExportPlan, number: int, report: Report) -> Iterator[tuple[str, Tensor]]:
    for entry in plan.files[number]:
        report.at(", ".join(entry.hf))
        with reading(plan.source.path):
            parts = plan.source.hf_tensors(entry)
        while parts:
            yield from plan.form.tensors(entry, *parts.pop(0))


def _check_written(path: Path, infos: dict[str, TensorInfo], given: dict[str, str], shard: ShardRecord) -> None:
    found = {name: record.xxh3 for name, record in shard.tensors.items()}
    wrong = [name for name, xxh3 in given.items() if found.get(name) != xxh3]
    if shard.header_xxh3 != xxhash.xxh3_128_hexdigest(header_of(infos)[0]):
        wrong.insert(0, "the header")
    if wrong:
        raise OSError(errno.EIO, f"{wrong[0]}: what the disk gives back is not what was written")


def _infos(source: MegatronSource, form: Form, entries: tuple[WeightEntry, ...]) -> dict[str, TensorInfo]:
    return {
        written: written_info
        for entry in entries
        for name, info in source.hf_infos(entry)
        for written, written_info in form.infos(entry, name, info).items()
    }


def _in_blocks(source: MegatronSource) -> frozenset[str]:
    """The Hugging Face tensors that are written in blocks.

    Source: what vLLM can hold in blocks, ``validate_fp8_block_shape`` and ``validate_fp8_block_shape_moe``, and what it
    can multiply with, ``per_token_group_quant_fp8``, in
    ``vllm/model_executor/layers/quantization/utils/fp8_utils.py``.
    """
    dims = source.dims
    if source.bridged is not None:
        raise ValueError(
            f"--fp8-blocks needs a family that has a table here: {dims.architecture} is known through megatron-bridge, "
            "which does not say which of its layers loaders take in 8 bits"
        )
    widths = {} if dims.latent is None else {"q_lora_rank": dims.latent.query_rank or 0}
    if dims.experts is not None:
        widths |= {"moe_intermediate_size": dims.experts.ffn_hidden, "hidden_size": dims.hidden}
    for name, width in widths.items():
        if width % BLOCK:
            raise ValueError(
                f"--fp8-blocks needs a {name} that is a multiple of {BLOCK}, {dims.architecture} has {width}: vLLM "
                "runs such a model in no layout; leave the option out"
            )
    written = {name for entry in source.weights.entries if _fits_blocks(source.hf_infos(entry)) for name in entry.hf}
    if not written:
        raise ValueError(
            f"--fp8-blocks needs linear layers with inputs that are multiples of {BLOCK}, this {dims.architecture} has "
            "none: nothing would be in 8 bits; leave the option out"
        )
    return frozenset(written)


def _fits_blocks(infos: list[tuple[str, TensorInfo]]) -> bool:
    """Whether tensors that engines hold as one matrix are of a linear layer that they can hold and run in blocks."""
    if not all(_is_linear(name) for name, _ in infos):
        return False
    *before, _ = (info.shape[0] for _, info in infos)  # of one matrix each but the last must end with a block
    _, inputs = infos[0][1].shape  # of which engines quantise as many as a block has at a time
    return inputs % BLOCK == 0 and not any(rows % BLOCK for rows in before)


def _is_linear(name: str) -> bool:
    return name.startswith("model.layers.") and name.endswith(_LINEAR)


def _whole_modules(plan: ExportPlan) -> list[str]:
    """The modules with a matrix that is not in blocks, but for the embedding, which engines never hold so."""
    _, *entries = plan.source.weights.entries
    infos = (named for entry in entries for named in plan.source.hf_infos(entry))
    matrices = (name for name, info in infos if len(info.shape) > 1 and name not in plan.form.in_blocks)
    # a tied model has its head without a tensor
    return sorted({"lm_head", *(name.removesuffix(".weight") for name in matrices)})


def _config(plan: ExportPlan, beside: list[str]) -> dict[str, object]:
    source = plan.source
    name = source.dims.architecture
    architecture = critic_architecture(name) if source.head is Head.VALUE else name
    entry = source.weights.entries[0]
    config = model_config(source.config, architecture, plan.form.dtype or source.info(entry).dtype, beside=beside)
    return config | ({"quantization_config": block_config(_whole_modules(plan))} if plan.form.in_blocks else {})
