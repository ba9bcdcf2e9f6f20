"""The model that is evaluated: where its Hugging Face folder is, whether it is whole, and how long it may read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.tasks import BadInput
from megatron_rl.checkpoints import kept_weights
from megatron_rl.durable import locked, replace_text

CONVERTER = Path(__file__).resolve().parents[1] / "tools" / "convert_hf" / "megatron_to_hf.py"
_DTYPES = ("float32", "bfloat16")
_LOCK_WAIT_S = 10.0

Source = dict[str, Any]
"""A Megatron checkpoint as JSON: its ``path``, and of its ``files`` size and time of last change (ns)."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A Hugging Face folder that an engine can load.

    Attributes:
        folder: config.json, tokenizer.json and safetensors.
        dtype: ``float32`` or ``bfloat16``.
        max_positions: longest prompt and response together, in tokens.
        source: what the folder was converted from; None where it was not.
    """

    folder: Path
    dtype: str
    max_positions: int
    source: Source | None = None

    def identity(self) -> dict[str, list[int]]:
        """Size and time of last change (ns) of each file that decides what it answers."""
        return _stamps([*self.folder.glob("*.json"), *self.folder.glob("*.safetensors")])


def _stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}


def find_model(path: Path, dtype: str | None = None) -> Model:
    """The model in ``path``: a Hugging Face folder, or a checkpoint of a training run, which has one in ``hf/``.

    Args:
        path: the folder.
        dtype: to load the weights in; the type that config.json names unless given.

    Raises:
        BadInput: something that an engine needs is missing or unreadable.
    """
    if not path.is_dir():
        kept = kept_weights(path)
        hint = "" if kept is None else f"; of this checkpoint only the weights were kept, take {kept}"
        raise BadInput(f"--model {path}: no such folder{hint}")
    folder = path / "hf" if (path / "hf").is_dir() else path
    if not (folder / "config.json").is_file():
        raise BadInput(
            f"--model {path}: no config.json in {folder}; a Hugging Face folder, a Megatron checkpoint or a checkpoint "
            "of a run (checkpoints/step_N) is needed"
        )
    if not (folder / "tokenizer.json").is_file():
        raise BadInput(
            f"--model {path}: no tokenizer.json in {folder}; copy the tokenizer's files there from the model that "
            "training started from"
        )
    if not any(folder.glob("*.safetensors")):
        raise BadInput(f"--model {path}: no *.safetensors in {folder}; the weights must be there in that form")
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise BadInput(f"--model {path}: {folder / 'config.json'} is not JSON: {error}") from error
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int):
        raise BadInput(f"--model {path}: config.json must name max_position_embeddings, got {positions!r}")
    found = dtype or config.get("dtype") or config.get("torch_dtype")
    if found not in _DTYPES:
        raise BadInput(
            f"--model {path}: config.json names the type {found!r}; give --dtype, one of {', '.join(_DTYPES)}"
        )
    return Model(folder=folder.resolve(), dtype=str(found), max_positions=positions)


def converted(path: Path, target: Path, dtype: str | None = None) -> Model:
    """The model in ``path``, which may be a Megatron checkpoint without a Hugging Face folder.

    Args:
        path: of the model; a Megatron checkpoint holds ``*.distcp``, itself or in ``policy/``.
        target: made of a Megatron checkpoint by ``tools/convert_hf``, complete or not at all, with a note of it beside
            (``hf_source.json``); what is there is used again if it was made of this checkpoint.
        dtype: as in :func:`find_model`.

    Raises:
        BadInput: as :func:`find_model`, or the checkpoint cannot be converted (the message is the converter's), or
            ``target`` was made of another one.
        BlockingIOError: another process writes beside ``target``.
    """
    folder = next((folder for folder in (path, path / "policy") if any(folder.glob("*.distcp"))), None)
    if folder is None or (path / "hf").is_dir():
        return find_model(path, dtype)
    source: Source = {
        "path": str(folder.resolve()),
        "files": _stamps(file for file in folder.iterdir() if file.is_file()),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent / "lock", writing=target.parent, wait_s=_LOCK_WAIT_S):
        note = target.with_name("hf_source.json")
        if target.exists():
            _check_source(target, note, source)
        else:
            replace_text(note, json.dumps(source, indent=2) + "\n")  # first: a folder without one is never trusted
            _convert(path, folder, target)
    return replace(find_model(target, dtype), source=source)


def _check_source(target: Path, note: Path, source: Source) -> None:
    """Refuse a folder that was converted from anything but ``source`` as it is now."""
    if not note.is_file():
        found = f"there is no {note.name} beside it to say what it was converted from"
    else:
        there: Source = json.loads(note.read_text())
        if there == source:
            return
        found = f"it was converted from {there['path']} before its files changed"
        if there["path"] != source["path"]:
            found = f"it was converted from {there['path']}, not from {source['path']}"
    raise BadInput(
        f"--output {target.parent}: {target} cannot be used again: {found}; remove it or name another folder"
    )


def _convert(path: Path, folder: Path, target: Path) -> None:
    command = [sys.executable, str(CONVERTER), str(folder), str(target)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise BadInput(f"--model {path}: {CONVERTER.name} could not convert it:\n{done.stderr.strip()}")


def find_checkpoints(run: Path) -> dict[str, Path]:
    """The checkpoints of a training run that have a Hugging Face folder, oldest first, by name.

    Raises:
        BadInput: there are none.
    """
    found = sorted(path.parent for path in run.glob("checkpoints/step_*/hf") if path.is_dir())
    if not found:
        raise BadInput(f"--run {run}: no checkpoints/step_*/hf in it; name the run_dir of a training run")
    return {path.name: path for path in found}
