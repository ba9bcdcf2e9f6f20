from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from megatron_rl.ray_runtime.engines import Engines
from megatron_rl.ray_runtime.roles import RemoteEngine
from megatron_rl.ray_runtime.workers import WorkerGroup


class Group:
    """One engine, which lives."""

    names = ("engine",)

    def deaths(self) -> dict[int, str]:
        return {}


@dataclass
class Sync:
    versions: list[int] = field(default_factory=list)

    def push(self, version: int) -> Mapping[str, float]:
        self.versions.append(version)
        return {"bytes": 1.0}


def test_what_pushes_send_is_told_once_after_the_first() -> None:
    sync, told = Sync(), []
    group = cast("WorkerGroup", Group())
    more: dict[str, Any] = {"restarts": 0, "restart": lambda _: None, "tell": told.append}
    engines = Engines(
        RemoteEngine(group), sync, **more, describe=lambda: f"slices, known after version {sync.versions[-1]}"
    )
    assert told == []
    for version in (3, 4):
        assert engines.push(version) == {"bytes": 1.0}
    assert told == ["slices, known after version 3"]
