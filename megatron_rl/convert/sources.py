"""Both sides of a conversion as tensors that are read when they are asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from megatron_rl.checkpoints import kept_weights, sums_of
from megatron_rl.convert.processes import Report, for_each_file
from megatron_rl.durable import FileRecord
from megatron_rl.mcore.bridge import BridgedFamily, bridged_family
from megatron_rl.mcore.sharded_names import ShardedName, kept_key, sharded_name, stacks_layers
from megatron_rl.model_dims import ModelDims, UnknownArchitecture, sizes_from_config
from megatron_rl.weights.coverage import FURTHER, check_copy, check_coverage, head_of
from megatron_rl.weights.families import HEADS
from megatron_rl.weights.fp8_blocks import FP8, SCALE_SUFFIX, dequantise, scale_shape
from megatron_rl.weights.manifest import MANIFEST, Damaged, Manifest, check_file, read_manifest
from megatron_rl.weights.reshard import hf_shapes
from megatron_rl.weights.rules import Head
from megatron_rl.weights.safetensors_io import HfFolder, TensorInfo, as_bytes, read_companions, write_companions
from megatron_rl.weights.shapes import full_shape, is_float32, is_vocabulary
from megatron_rl.weights.weight_map import WeightEntry, WeightMap, weight_map

if TYPE_CHECKING:
    from megatron_rl.mcore.torch_dist import TorchDistFolder

_TYPES = (torch.float32, torch.bfloat16)
_OPTIMIZER_KEY = re.compile(r"(chained_\d+\.)?optimizer\.")
"""Of a training checkpoint: moments and main weights, of one optimizer or several."""
_FURTHER_KEY = "mtp."
"""Of megatron-core's layers that predict further tokens."""
_BRIDGED = (
    "{} is known through megatron-bridge, for files alone; to be built here, for scores or for training, it needs "
    "tables of ours (CONTRIBUTING.md, a model family)"
)
_VALUE_HEAD = frozenset(rule.hf for rule in HEADS[Head.VALUE])


class SourceDamaged(ValueError):
    """What a source holds cannot be a model: reading it again changes nothing."""


class SourceUnreadable(OSError):
    """The system could not read a source, which may be whole."""


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Tells what goes wrong with a source from what goes wrong with a target.

    Raises:
        SourceDamaged: for a ValueError.
        SourceUnreadable: for an OSError; it names the file, or ``folder``.
    """
    try:
        yield
    except ValueError as error:
        raise SourceDamaged(str(error)) from error
    except OSError as error:
        raise SourceUnreadable(
            error.errno,
            f"{error.filename or folder} could not be read ({error.strerror}); files that are complete are kept: go "
            "on with --resume",
        ) from error


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy what a model folder has beside weights and ``config.json``; the names of it.

    Raises:
        SourceDamaged: ``tokenizer_config.json`` is no JSON.
        SourceUnreadable: the source cannot be read.
        OSError: the target cannot be written.
    """
    with reading(source):
        companions = read_companions(source)
    write_companions(companions, target)
    return [*companions]


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's ``config.json``.

    Raises:
        FileNotFoundError: there is no such folder, or it has none.
        ValueError: it is not JSON.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"a model is a folder, there is none at {folder}{_kept(folder)}")
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"a model folder needs a config.json, found none in {folder}")
    try:
        config: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{file} must be JSON: {error}") from error
    return config


def _kept(folder: Path) -> str:
    """Why a folder of a training checkpoint is not there, where it was removed."""
    kept = kept_weights(folder)
    return "" if kept is None else f"; of this checkpoint only the weights were kept, take {kept}"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What the files of a model folder must be.

    Attributes:
        folder: of the model.
        file: that says so.
        manifest: its content.
    """

    folder: Path
    file: Path
    manifest: Manifest

    def check(self, name: str, read: Callable[[int], None]) -> None:
        """Read a file and compare; ``read`` is told the bytes.

        Raises:
            Damaged: it has changed.
        """
        try:
            check_file(self.folder, name, self.manifest.files[name], read)
        except Damaged as damage:
            raise Damaged(f"{damage}; {self.advice}") from damage

    @property
    def advice(self) -> str:
        """What to do where something has changed."""
        if self.file.parent == self.folder:
            return f"restore it, or if it was changed on purpose remove {self.file}, which has its sum"
        return f"restore it, {self.file} has its sum"  # a checkpoint's: without it no run goes on from there


def recorded(folder: Path) -> Recorded | None:
    """By the folder's own manifest, or by that of the training checkpoint that it is in; None where there is none.

    Raises:
        ValueError: a manifest cannot be read.
    """
    if (folder / MANIFEST).is_file():
        return Recorded(folder=folder, file=folder / MANIFEST, manifest=read_manifest(folder))
    if sums := sums_of(folder):
        manifest = Manifest(plan="training", files=sums)
        return Recorded(folder=folder, file=folder.resolve().parent / MANIFEST, manifest=manifest)
    return None


def _read_family(folder: Path, config: Mapping[str, Any]) -> tuple[ModelDims, tuple[str, ...], BridgedFamily | None]:
    """Sizes of the model, why it is not computed here, and the family where megatron-bridge alone knows it."""
    try:
        return *sizes_from_config(config), None
    except UnknownArchitecture as unknown:
        try:
            bridged = bridged_family(folder, (config.get("architectures") or ["?"])[0])
        except UnknownArchitecture as further:
            raise UnknownArchitecture(f"{unknown}; {further}") from further
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return bridged.dims, (_BRIDGED.format(bridged.dims.architecture),), bridged


def _weight_map(dims: ModelDims, head: Head, bridged: BridgedFamily | None) -> WeightMap:
    return weight_map(dims, head, None if bridged is None else bridged.rules)


def keeps_type(entry: WeightEntry, found: torch.dtype) -> bool:
    """Whether a tensor keeps its type whatever is asked for: a value head, and a router's bias, whatever a family calls
    it, that are float32, as they are in the training of a model of any type. In another type they are as any tensor.
    """
    return found is torch.float32 and (is_float32(entry) or entry.hf in _VALUE_HEAD)


def summed_bytes(source: HfSource | MegatronSource) -> int:
    """Of the files that :func:`compare_sums` reads."""
    return sum(record.size_bytes for record in source.sums.values())


def compare_sums(
    source: HfSource | MegatronSource, *, processes: int, progress: Callable[[int], None]
) -> Callable[[int], None]:
    """Read the files that the source has sums of, before anything is written: what a target's own manifest vouches for
    must have been read from files that are whole, also where the work is interrupted and the source restored meanwhile.

    Returns:
        what to tell the bytes of the work that follows.

    Raises:
        SourceDamaged: a file has changed.
        ProcessDied, KeyboardInterrupt: as :func:`.for_each_file`.
    """
    names, sums = [*source.sums], source.recorded
    if not names or sums is None:
        return progress

    def check(number: int, report: Report) -> None:
        report.at(names[number])
        with reading(source.path):
            sums.check(names[number], report.moved)

    for_each_file(len(names), check, processes=processes, progress=progress)
    compared = summed_bytes(source)
    return lambda done_bytes: progress(compared + done_bytes)


class HfSource:
    """The tensors of a Hugging Face folder as Megatron trains them: one type, block-quantised ones dequantised.

    Attributes:
        config: of the folder, without what it says of quantisation.
        not_computed: why the model is neither trained nor scored here, one sentence each.
        bridged: the model's family where megatron-bridge alone knows it.
        weights: the tensors of the model.
        quantised: whether the folder's linear layers have 8 bits.
        left_out: tensors of the folder that the model is not made of, and what sort they are, see
            :func:`.check_coverage`.
        path: of the folder.
        recorded: what its files must be, where that is known.
        sums: of its files with tensors, by name, where it is in a training checkpoint. (The folder's own manifest has
            sums of tensors, which are compared as they are read.)
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Read the headers.

        Args:
            folder: of the model.
            dtype: of the tensors; None: what they are (bfloat16 where they are quantised).

        Raises:
            FileNotFoundError: there is no folder, configuration, weight file or tensor.
            ValueError: the configuration, a file, or a tensor's type or shape is wrong.
        """
        self.path, self._dtype = folder, dtype
        self.config = read_config(folder)
        self.dims, self.not_computed, self.bridged = _read_family(folder, self.config)
        self.weights: WeightMap = _weight_map(self.dims, head_of(self.config), self.bridged)
        self.quantised = _blocks(folder, self.config.pop("quantization_config", None))
        self._folder = HfFolder(folder)
        self._infos = self._folder.infos()
        self.recorded = recorded(folder)
        self._sums = self._read_sums()
        files = {} if self.recorded is None else self.recorded.manifest.files
        self.sums = {name: record for name, record in files.items() if name.endswith(".safetensors")}
        hint = None if self.bridged is None else self.bridged.hint
        self.left_out = check_coverage(folder, self._infos.keys() - self._scales(), self.weights, hint=hint)
        for entry in self.weights.entries:
            self.info(entry)

    def _scales(self) -> set[str]:
        """Those of the model's tensors, which must be of 8 bits: another tensor would be taken without its scale."""
        weights = {name + SCALE_SUFFIX: name for name in self.weights.hf_names}
        found = {scale: self._infos.get(weights[scale]) for scale in weights.keys() & self._infos.keys()}
        stray = sorted(scale for scale, weight in found.items() if weight is None or weight.dtype is not FP8)
        if stray:
            weight = found[stray[0]]
            raise ValueError(
                f"{self.path}: {stray[0]} must stand beside a {weights[stray[0]]} of type {FP8}, which is "
                f"{'not there' if weight is None else f'of {weight.dtype}'} ({len(stray)} scales are so); remove "
                "scales of weights that are no longer in 8 bits"
            )
        return {*found}

    def _read_sums(self) -> dict[str, str] | None:
        """xxh3-128 of each tensor, where the folder has a manifest with them."""
        if self.recorded is None or not (shards := self.recorded.manifest.shards):
            return None
        records = {name: record for shard in shards.values() for name, record in shard.tensors.items()}
        for name, info in self._infos.items():
            record = records.get(name)
            if record is None or (record.dtype, record.shape) != (str(info.dtype).removeprefix("torch."), info.shape):
                raise Damaged(f"{self.path}: {name} is not the tensor that was written; {self.recorded.advice}")
        return {name: record.xxh3 for name, record in records.items()}

    def identity(self) -> object:
        """What tells it from another model, without reading a tensor: its repr is the same for the same files."""
        return self.config, sorted(self._infos.items()), self._folder.stamps()

    @property
    def read_bytes(self) -> int:
        """Of the files' tensors that are read."""
        return sum(info.size_bytes for name, info in self._infos.items() if name not in self.left_out)

    def info(self, entry: WeightEntry) -> TensorInfo:
        """Type and shape that Megatron's tensor will have.

        Raises:
            ValueError: its Hugging Face tensors have several types, or one that is none of training's, or do not fit
                the configuration.
        """
        infos = [self._hf_info(entry, name) for name in entry.hf]
        dtypes = sorted({str(info.dtype) for info in infos})
        if len(dtypes) > 1:
            raise ValueError(f"{self.path}: {', '.join(entry.hf)} must have one type, got {dtypes}; give --dtype")
        if infos[0].dtype not in _TYPES:
            raise ValueError(f"{self.path}: {entry.hf[0]} must be float32 or bfloat16, is {dtypes[0]}; give --dtype")
        try:
            self.weights.check_hf_shapes(entry, [info.shape for info in infos])
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        return TensorInfo(infos[0].dtype, full_shape(entry, self.dims))

    def _hf_info(self, entry: WeightEntry, name: str) -> TensorInfo:
        """Once dequantised and converted."""
        info = self._infos[name]
        if info.dtype is FP8:
            scale = self._infos.get(name + SCALE_SUFFIX)
            if not self.quantised or scale is None or scale.shape != scale_shape(info.shape):
                raise ValueError(
                    f"{self.path}: {name} has 8 bits, so config.json must say weight_block_size [128, 128] in its "
                    f"quantization_config, and {name}{SCALE_SUFFIX} hold a scale per block; it is {scale}"
                )
            return TensorInfo(self._dtype or torch.bfloat16, info.shape)
        return TensorInfo(self._type(entry, name, info.dtype), info.shape)

    def tensor(self, entry: WeightEntry) -> Tensor:
        """Megatron's tensor; of one Hugging Face tensor that needs no conversion, a view of the file."""
        return self.weights.to_megatron(entry, self.hf_tensors(entry))

    def hf_tensors(self, entry: WeightEntry) -> list[Tensor]:
        """The Hugging Face tensors of ``entry``, dequantised and converted.

        Raises:
            ValueError: a file is damaged, a tensor has no floating-point type or not the sum that the folder's manifest
                has, or as :meth:`check_copy`.
        """
        if entry == self.weights.entries[0]:
            self.check_copy()
        return [self._hf_tensor(entry, name) for name in entry.hf]

    def check_copy(self) -> None:
        """Refuse a tied model's head that is no copy of its embedding, see :func:`.coverage.check_copy`."""
        check_copy(self.path, self.left_out, self.weights, self._folder.tensor)

    def _hf_tensor(self, entry: WeightEntry, name: str) -> Tensor:
        tensor = self._whole(name)
        if tensor.dtype is FP8:
            return dequantise(tensor, self._whole(name + SCALE_SUFFIX), self._dtype or torch.bfloat16)
        return tensor.to(self._type(entry, name, tensor.dtype))

    def _whole(self, name: str) -> Tensor:
        tensor = self._folder.tensor(name)
        if self._sums is not None and xxhash.xxh3_128_hexdigest(as_bytes(tensor)) != self._sums[name]:
            assert self.recorded is not None
            raise Damaged(f"{self.path}: the bytes of {name} are not those that were written; {self.recorded.advice}")
        return tensor

    def _type(self, entry: WeightEntry, name: str, found: torch.dtype) -> torch.dtype:
        if self._dtype is None or keeps_type(entry, found):
            return found
        if not found.is_floating_point:
            raise ValueError(f"{self.path}: {name} must be a floating-point tensor, is {found}")
        return self._dtype


def _blocks(folder: Path, quantization: Mapping[str, Any] | None) -> bool:
    if quantization is None:
        return False
    if quantization.get("quant_method") != "fp8" or quantization.get("weight_block_size") != [128, 128]:
        raise ValueError(
            f"{folder}: of quantised models, those with fp8 in blocks of 128 x 128 are known, config.json says "
            f"{dict(quantization)}"
        )
    return True


class MegatronSource:
    """The model of a ``torch_dist`` folder: one that was imported, or the policy or critic of a training checkpoint.

    Attributes:
        like: where its configuration and tokenizer are.
        config: of the model.
        not_computed: why the model is neither trained nor scored here, one sentence each.
        bridged: its family where megatron-bridge alone knows it.
        weights: the tensors of the model.
        left_out: tensors of the model's that are not converted, and what sort they are; an optimizer's are not among
            them.
        path: of the folder.
        recorded: what its files must be, where that is known.
        sums: of the files with its tensors, by name, where a manifest has them: the folder's own, or that of the
            training checkpoint it is in.
    """

    def __init__(self, folder: Path, like: Path | None = None, *, drop_padding_rows: bool = False) -> None:
        """Read what the folder holds.

        Args:
            folder: of the model.
            like: a Hugging Face folder of a model of the same sizes; None: the folder itself, or beside a training
                checkpoint's model the ``hf`` folder.
            drop_padding_rows: rows behind the vocabulary are left whatever is in them: other programs begin them at
                random and train them. Else they must be zero, so that a wrong vocabulary shows.

        Raises:
            FileNotFoundError: a folder, or a part of it, is not there.
            ValueError: metadata and configuration contradict each other, or a tensor is missing, unknown or of another
                shape.
        """
        # slow, and an import loads it beside its writing
        from megatron_rl.mcore.torch_dist import METADATA, TorchDistFolder

        if not folder.is_dir():
            raise FileNotFoundError(f"a Megatron checkpoint is a folder, there is none at {folder}{_kept(folder)}")
        self.path = folder
        self.recorded = recorded(folder)
        if self.recorded is not None and METADATA in self.recorded.manifest.files:
            self.recorded.check(METADATA, lambda _: None)
        self.folder: TorchDistFolder = TorchDistFolder(folder)
        self._keys = self.folder.keys
        self._stacked = stacks_layers(self._keys)
        self._drop_padding_rows = drop_padding_rows
        beside = folder.resolve().parent / "hf"
        own = folder if (folder / "config.json").is_file() or not beside.is_dir() else beside
        self.like = own if like is None else like
        self.config = read_config(self.like)
        self.config.pop("quantization_config", None)
        self.dims, self.not_computed, self.bridged = _read_family(self.like, self.config)
        # a training checkpoint has its configuration from the policy
        self.head = Head.VALUE if "output_layer.bias" in self.folder.keys else head_of(self.config)
        self.weights = _weight_map(self.dims, self.head, self.bridged)
        for entry in self.weights.entries:
            self._check(entry)
        self.left_out = self._check_keys()
        self.sums = self._read_sums()

    def _read_sums(self) -> dict[str, FileRecord]:
        if self.recorded is None:
            return {}
        records = self.recorded.manifest.files
        files = sorted(self.folder.files_of({self.name(entry).key for entry in self.weights.entries}))
        for name in files:
            if name not in records:
                raise Damaged(f"{self.path / name}: {self.recorded.file} must have its sum, and does not name it")
        return {name: records[name] for name in files}

    def name(self, entry: WeightEntry) -> ShardedName:
        """Where a tensor is kept."""
        name = sharded_name(entry, self.dims, stacked=self._stacked)
        return replace(name, key=kept_key(name.key, self._keys))

    def info(self, entry: WeightEntry) -> TensorInfo:
        """Type and shape of a tensor; without the rows that pad the vocabulary."""
        kept = self.folder.info(self.name(entry))
        return TensorInfo(kept.dtype, (self._rows(entry, kept), *kept.shape[1:]))

    def tensor(self, entry: WeightEntry) -> Tensor:
        """Megatron's tensor.

        Raises:
            ValueError: its file is damaged, or rows behind the vocabulary are not zero.
        """
        kept = self.folder.tensor(self.name(entry))
        rows = self.info(entry).shape[0]
        if not self._drop_padding_rows and kept[rows:].any():
            raise ValueError(
                f"{self.path}: the {len(kept) - rows} rows of {self.name(entry).key} behind the {rows} of the "
                f"vocabulary must be padding, which is zero, they are not; {self._belongs()}; if it does, another "
                "program has trained its padding: leave these rows behind with --drop-padding-rows"
            )
        return kept[:rows]

    def padding_rows(self) -> int:
        """How many rows the embedding has behind the vocabulary."""
        embedding = self.weights.entries[0]
        return self.folder.info(self.name(embedding)).shape[0] - self.info(embedding).shape[0]

    def hf_infos(self, entry: WeightEntry) -> list[tuple[str, TensorInfo]]:
        """Names, types and shapes of the Hugging Face tensors that :meth:`tensor` is made of."""
        shapes = hf_shapes(entry, self.dims)
        return [(name, TensorInfo(self.info(entry).dtype, shape)) for name, shape in zip(entry.hf, shapes, strict=True)]

    def hf_tensors(self, entry: WeightEntry) -> list[tuple[str, Tensor]]:
        """The Hugging Face tensors that :meth:`tensor` is made of."""
        return self.weights.to_hf(entry, self.tensor(entry))

    def _rows(self, entry: WeightEntry, kept: TensorInfo) -> int:
        return min(kept.shape[0], self.dims.vocabulary) if is_vocabulary(entry) else kept.shape[0]

    def _check(self, entry: WeightEntry) -> None:
        try:
            found = self.folder.info(self.name(entry)).shape
        except KeyError as error:
            raise ValueError(
                f"{error.args[0]}; it must hold every tensor of a {self.dims.architecture}, check that {self.like} "
                "describes the same model"
            ) from error
        wanted = full_shape(entry, self.dims)
        padded = is_vocabulary(entry) and found[0] >= wanted[0]
        if found[1:] != wanted[1:] or (found[0] != wanted[0] and not padded):
            more = ", or more rows" if is_vocabulary(entry) else ""
            raise ValueError(
                f"{self.path}: {self.name(entry).key} must have shape {list(wanted)}{more}, its metadata give "
                f"{list(found)}; {self._belongs()}"
            )

    def _belongs(self) -> str:
        return f"{self.like / 'config.json'} (--like names its folder) must belong to the checkpoint"

    def _check_keys(self) -> dict[str, str]:
        known = {self.name(entry).key for entry in self.weights.entries}
        beyond = sorted(key for key in self.folder.keys - known if not _OPTIMIZER_KEY.match(key))
        unknown = [key for key in beyond if not key.startswith(_FURTHER_KEY)]
        if unknown:
            raise ValueError(
                f"{self.path}: no {self.dims.architecture} has a tensor {unknown[0]} ({len(unknown)} are "
                f"unknown); check that {self.like} describes the same model"
            )
        return dict.fromkeys(beyond, FURTHER)
