"""The model that is evaluated: where its Hugging Face folder is, whether it is whole, and how long it may read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.tasks import BadInput

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
        megatron = any(folder.rglob("*.distcp"))
        raise BadInput(
            f"--model {path}: no config.json in {folder}; "
            + (
                "it is a Megatron checkpoint without its hf/ folder: make one with tools/convert_hf first"
                if megatron
                else "a Hugging Face folder or a checkpoint of a run (checkpoints/step_N) is needed"
            )
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


def find_checkpoints(run: Path) -> dict[str, Path]:
    """The checkpoints of a training run that have a Hugging Face folder, oldest first, by name.

    Raises:
        BadInput: there are none.
    """
    found = sorted(path.parent for path in run.glob("checkpoints/step_*/hf") if path.is_dir())
    if not found:
        raise BadInput(f"--run {run}: no checkpoints/step_*/hf in it; name the run_dir of a training run")
    return {path.name: path for path in found}
