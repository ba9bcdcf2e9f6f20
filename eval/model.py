"""The model that is evaluated: where its Hugging Face folder is, whether it is whole, and how long it may read."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.tasks import BadInput

CONVERTER = Path(__file__).resolve().parents[1] / "tools" / "convert_hf" / "megatron_to_hf.py"
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A Hugging Face folder that an engine can load.

    Attributes:
        folder: config.json, tokenizer.json and safetensors.
        dtype: ``float32`` or ``bfloat16``.
        max_positions: longest prompt and response together, in tokens.
    """

    folder: Path
    dtype: str
    max_positions: int

    def identity(self) -> dict[str, list[int]]:
        """Size and time of last change (ns) of each file that decides what it answers."""
        files = [*self.folder.glob("*.json"), *self.folder.glob("*.safetensors")]
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
        raise BadInput(f"--model {path}: no such folder")
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


def as_hf(path: Path, target: Path) -> Path:
    """``path`` itself, or what a Megatron checkpoint without a Hugging Face folder becomes in ``target``.

    Args:
        path: of the model; a Megatron checkpoint holds ``*.distcp``, itself or in ``policy/``.
        target: made by ``tools/convert_hf``, complete or not at all; what is there is used again.

    Raises:
        BadInput: the checkpoint cannot be converted; the message is the converter's.
    """
    source = next((folder for folder in (path, path / "policy") if any(folder.glob("*.distcp"))), None)
    if source is None or (path / "hf").is_dir():
        return path
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(CONVERTER), str(source), str(target)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise BadInput(f"--model {path}: {CONVERTER.name} could not convert it:\n{done.stderr.strip()}")
    return target


def find_checkpoints(run: Path) -> dict[str, Path]:
    """The checkpoints of a training run that have a Hugging Face folder, oldest first, by name.

    Raises:
        BadInput: there are none.
    """
    found = sorted(path.parent for path in run.glob("checkpoints/step_*/hf") if path.is_dir())
    if not found:
        raise BadInput(f"--run {run}: no checkpoints/step_*/hf in it; name the run_dir of a training run")
    return {path.name: path for path in found}
