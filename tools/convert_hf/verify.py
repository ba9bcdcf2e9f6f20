"""Check a model folder, of Hugging Face or of Megatron; each level includes the ones before it.

files: manifest, index, names, shapes and types. values: every element against the folder that --against names.
logits: transformers and Megatron's ranks, at the given layout, score the same tokens. engine: vLLM does so, too.
The exit status is 1, and the first tensor that differs is named, if anything is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_rl.config.schema import ClusterConfig, EngineConfig, ModelConfig, ParityConfig
from megatron_rl.convert.console import DTYPES, add_drop_padding_rows, add_dtype, add_processes, progress_bar, run
from megatron_rl.convert.sources import HfSource, MegatronSource
from megatron_rl.convert.target import Target
from megatron_rl.convert.to_hf import plan_export, run_export
from megatron_rl.convert.verify import Different, check_folder, check_values, open_source
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.coverage import critic_architecture, head_of
from megatron_rl.weights.rules import Head

LEVELS = ("files", "values", "logits", "engine")
_ENGINE_CACHE_MIB = 256
"""A few short rows."""
_SHARD_BYTES = 4 * 10**9


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="verify.py", description=__doc__)
    parser.add_argument("folder", type=Path, help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument("--level", choices=LEVELS, default=LEVELS[0], help="default: files")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="of the same model, of either kind")
    add_dtype(parser, "compare after converting to this type; ranks and vLLM compute in it")
    add_drop_padding_rows(parser)
    add_processes(parser)
    layout = parser.add_argument_group("layout of the ranks, as in a trainer's [layout]; default: one rank")
    for field in dataclasses.fields(ParallelLayout):
        option = f"--{field.name.replace('_', '-')}"
        if field.default is False:
            layout.add_argument(option, action="store_true")
        else:
            layout.add_argument(option, type=int, default=field.default, metavar="N")
    asked = parser.parse_args(arguments)
    if asked.level == "values" and asked.against is None:
        parser.error("--level values needs --against FOLDER")
    return run(lambda: _verify(asked))


def _verify(asked: argparse.Namespace) -> None:
    # first of all: what cannot be scored is refused before terabytes are read
    scoring = _plan_scoring(asked) if LEVELS.index(asked.level) >= LEVELS.index("logits") else None
    for folder in filter(None, (asked.folder, asked.against)):
        _check_files(folder, asked)
    if asked.against is not None and asked.level != "files":
        _check_values(asked, asked.against)
    if scoring is not None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ranks and engine end with this process
        with _hugging_face(scoring, asked) as reference:
            _check_scores(scoring, reference)


def _check_files(folder: Path, asked: argparse.Namespace) -> None:
    with progress_bar("files", _size(folder)) as progress:
        checked = check_folder(folder, dtype=DTYPES.get(asked.dtype), processes=asked.processes, progress=progress)
    print(f"files: ok, {folder}" + ("" if checked.summed else " (it has no manifest: names, shapes and sizes alone)"))
    if checked.left_out:
        print(f"files: nothing here reads {checked.left_out}")


def _check_values(asked: argparse.Namespace, other: Path) -> None:
    with progress_bar("values", _size(asked.folder)) as progress:
        count = check_values(
            asked.folder,
            other,
            dtype=DTYPES.get(asked.dtype),
            processes=asked.processes,
            progress=progress,
            drop_padding_rows=asked.drop_padding_rows,
        )
    print(f"values: ok, {count} tensors are the same in {asked.folder} and {other}")


@dataclass(frozen=True, kw_only=True)
class _Scoring:
    """Who scores what at the levels ``logits`` and ``engine``.

    Attributes:
        mine: the folder that the ranks load.
        other: that transformers and vLLM load.
        exported: whether it is Megatron's, so that they load an export of it.
        dims: of ``mine``.
        head: of ``mine``.
        dtype: of ranks and vLLM.
        layout: of the ranks.
        with_engine: whether vLLM takes part.
    """

    mine: Path
    other: Path
    exported: bool
    dims: ModelDims
    head: Head
    dtype: Literal["bfloat16", "float32"]
    layout: ParallelLayout
    with_engine: bool


def _plan_scoring(asked: argparse.Namespace) -> _Scoring:
    """Of two folders the ranks load Megatron's (of two of one kind the first), transformers and vLLM the other one; a
    folder alone goes to all.
    """
    folders = (asked.folder, asked.against or asked.folder)
    opened = {folder: open_source(folder, DTYPES.get(asked.dtype)) for folder in folders}
    mine = min(opened, key=lambda folder: not isinstance(opened[folder], MegatronSource))
    other = next((folder for folder in opened if folder != mine), mine)
    source, reference = opened[mine], opened[other]
    head = source.head if isinstance(source, MegatronSource) else head_of(source.config)
    if source.not_computed:
        raise ValueError(f"{mine}: --level values is the last one for it: {'; '.join(source.not_computed)}")
    with_engine = asked.level == "engine"
    if with_engine and head is Head.VALUE:
        raise ValueError(f"{mine} is a critic, which scores no tokens: --level logits is the last one for it")
    if isinstance(reference, HfSource) and reference.quantised:
        raise ValueError(
            f"{other} has 8-bit weights, which transformers and vLLM run on GPUs alone: convert it to Megatron's "
            "format, and verify that at this level by itself"
        )
    if isinstance(reference, MegatronSource) and reference.head is Head.VALUE:
        critic_architecture(reference.dims.architecture)  # transformers loads an export of it
    layout = ParallelLayout(**{field.name: getattr(asked, field.name) for field in dataclasses.fields(ParallelLayout)})
    if problems := source.dims.layout_problems(layout):
        raise ValueError("; ".join(problems))
    dtype = _dtype(mine, source.info(source.weights.entries[0]).dtype, asked.dtype)
    return _Scoring(
        mine=mine,
        other=other,
        exported=isinstance(reference, MegatronSource),
        dims=source.dims,
        head=head,
        dtype=dtype,
        layout=layout,
        with_engine=with_engine,
    )


def _dtype(folder: Path, stored: torch.dtype, asked: str | None) -> Literal["bfloat16", "float32"]:
    """That of the weights, unless one is asked for."""
    for name in ("bfloat16", "float32"):
        if name == asked or (asked is None and stored is DTYPES[name]):
            return name
    raise ValueError(f"{folder}: ranks compute in float32 or bfloat16, its weights are {stored}; give --dtype")


def _check_scores(scoring: _Scoring, reference: Path) -> None:
    # only now: they load Ray
    from megatron_rl.assemble import verify_folder
    from megatron_rl.parity import ParityFailed

    ranks = scoring.layout.world_size
    with _workplace() as workplace:
        try:
            verify_folder(
                ModelConfig(path=scoring.mine, dtype=scoring.dtype),
                dims=scoring.dims,
                reference=reference,
                head=scoring.head,
                layout=scoring.layout,
                # eager, so that a difference can be located: this is about the files
                engine=EngineConfig(kv_cache_mib=_ENGINE_CACHE_MIB, eager=True) if scoring.with_engine else None,
                parity=ParityConfig(),
                cluster=_cluster(ranks + scoring.with_engine),
                run_dir=workplace,
                tell=print,
            )
        except ParityFailed as failed:
            print(failed.table)
            raise Different(failed.cause) from failed
    print(f"logits: ok, {ranks} rank(s) with {scoring.mine} say what transformers says with {scoring.other}")
    if scoring.with_engine:
        print(f"engine: ok, vLLM with {scoring.other} says the same")


def _cluster(workers: int) -> ClusterConfig:
    """Of this machine, however many ranks share it: they take their time, and need no more than that."""
    config = ClusterConfig()
    share = len(os.sched_getaffinity(0)) / workers
    return dataclasses.replace(config, cpus_per_worker=min(config.cpus_per_worker, share))


@contextmanager
def _workplace() -> Iterator[Path]:
    """For logs; they are kept where a rank, the engine or transformers failed."""
    folder = Path(tempfile.mkdtemp(prefix="verify-"))
    try:
        yield folder
    except (RuntimeError, TimeoutError):
        print(f"logs are in {folder}")
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder)


@contextmanager
def _hugging_face(scoring: _Scoring, asked: argparse.Namespace) -> Iterator[Path]:
    """The folder that transformers and vLLM load: an export is there for the time being."""
    if not scoring.exported:
        yield scoring.other
        return
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        plan = plan_export(scoring.other, shard_bytes=_SHARD_BYTES, drop_padding_rows=asked.drop_padding_rows)
        with progress_bar("export", plan.summary().moved_bytes) as progress:
            run_export(plan, Target(Path(scratch) / "hf"), resume=False, processes=asked.processes, progress=progress)
        yield Path(scratch) / "hf"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


if __name__ == "__main__":
    sys.exit(main())
