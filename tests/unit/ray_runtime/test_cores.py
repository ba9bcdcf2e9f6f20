from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_rl.ray_runtime import cores
from megatron_rl.ray_runtime.cores import usable_cores

FREE, TWO_AND_A_HALF, FOUR, HALF = "max 100000\n", "250000 100000\n", "400000 100000\n", "50000 100000\n"


@pytest.mark.parametrize(
    ("own", "files", "usable"),
    [
        ("0::/\n", {}, 8),  # of the whole machine: it has no such file
        ("0::/\n", {"cpu.max": FREE}, 8),
        ("0::/\n", {"cpu.max": TWO_AND_A_HALF}, 2),
        ("0::/\n", {"cpu.max": HALF}, 1),
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),
        ("0::/pods/one\n", {"pods/one/cpu.max": FREE, "pods/cpu.max": FOUR, "cpu.max": FREE}, 4),
        ("0::/pods/one\n", {"pods/one/cpu.max": TWO_AND_A_HALF, "pods/cpu.max": FOUR, "other/cpu.max": HALF}, 2),
        ("0::/of/the/host\n", {"cpu.max": FOUR}, 4),
        (
            "4:memory:/one\n3:cpu,cpuacct:/one\n0::/\n",
            {
                **{"cpu/one/cpu.cfs_quota_us": "300000\n", "cpu/one/cpu.cfs_period_us": "100000\n"},
                **{"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            },
            3,
        ),
    ],
)
def test_the_least_quota_of_the_groups_around_a_process_bounds_its_cores(
    own: str, files: dict[str, str], usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = tmp_path / "groups"
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    (tmp_path / "cpu.max").write_text(HALF)  # above the top: nobody's
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(cores, "_GROUPS", groups)
    monkeypatch.setattr(cores, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cores() == usable
