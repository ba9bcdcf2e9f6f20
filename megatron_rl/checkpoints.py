"""A run's checkpoints: complete or not there, the last few kept, the newest found again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_rl.interfaces import Pending

_PREFIX = "step_"


class Saveable(Protocol):
    """A model that can be written and read back, at any layout."""

    def save(self, folder: Path) -> Pending[None]:
        """Write model, optimizer and schedule."""

    def load(self, folder: Path) -> Pending[None]:
        """Take them up again."""

    def export_hf(self, folder: Path, like: Path) -> Pending[None]:
        """Write a Hugging Face folder."""


class Stateful(Protocol):
    """A part of the driver whose state belongs to a run."""

    def state(self) -> Any:
        """Plain data."""

    def restore(self, state: Any) -> None:
        """Take it up again."""


@dataclass(frozen=True, kw_only=True)
class RunCheckpoints:
    """Checkpoints in ``folder``: one folder per step with each model, the driver's state, and the policy as a Hugging
    Face folder ``hf`` that an engine or ``transformers`` loads as it is.
    """

    folder: Path
    keep: int
    models: Mapping[str, Saveable]
    parts: Mapping[str, Stateful]
    like: Path
    wait: Callable[[Mapping[str, Pending[None]]], object]

    def save(self, step: int) -> None:
        """Write everything under a temporary name, then give it its own in one move, then drop the oldest."""
        final = self.folder / f"{_PREFIX}{step:06d}"
        if final.exists():
            return  # a resumed run that had saved this step
        partial = self.folder / f".partial_{step:06d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        self.wait({name: model.save(partial / name) for name, model in self.models.items()})
        self.wait({"policy": self.models["policy"].export_hf(partial / "hf", self.like)})
        state = {"step": step, "parts": {name: part.state() for name, part in self.parts.items()}}
        with (partial / "state.json").open("w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(final)
        for old in self.complete()[: -self.keep]:
            shutil.rmtree(old)

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(self.folder.glob(f"{_PREFIX}*"))

    def resume(self) -> int:
        """Take up the newest checkpoint; the step to go on from, 0 where there is none."""
        found = self.complete()
        if not found:
            return 0
        state = json.loads((found[-1] / "state.json").read_text())
        self.wait({name: model.load(found[-1] / name) for name, model in self.models.items()})
        for name, part in self.parts.items():
            part.restore(state["parts"][name])
        return int(state["step"])
