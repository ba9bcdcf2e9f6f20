"""The names of Ray's sockets against Ray's own check of them; no Ray is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray._common.utils import get_default_ray_temp_dir
from ray._private.utils import validate_socket_filepath

from megatron_rl.config.schema import ClusterConfig
from megatron_rl.ray_runtime.cluster import ClusterProblem, check_machine
from megatron_rl.ray_runtime.sockets import long_folder, temporary_folder

SESSION = "session_2026-01-31_23-59-59_999999_4194304/sockets"
"""As Ray's Node names it: date, time with microseconds, pid."""


def of_length(size: int) -> str:
    """A folder of so many bytes, some of them of letters of two."""
    return "/" + "é" * ((size - 1) // 2) + "a" * ((size - 1) % 2)


def test_the_longest_folder_is_the_one_that_ray_itself_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    refused = [size for size in range(2, 108) if long_folder(of_length(size)) is not None]
    assert refused == list(range(40, 108))
    for size in (39, 40):
        monkeypatch.setenv("TMPDIR", of_length(size))
        sockets = [str(Path(get_default_ray_temp_dir()) / SESSION / name) for name in ("plasma_store", "raylet")]
        if size == 40:
            with pytest.raises(OSError, match="AF_UNIX path length"):
                validate_socket_filepath(sockets[0])
        else:
            for socket in sockets:
                validate_socket_filepath(socket)


@pytest.mark.parametrize(
    ("given", "folder"),
    [({}, "/tmp"), ({"TMPDIR": "/scratch"}, "/scratch"), ({"TMPDIR": "/scratch", "RAY_TMPDIR": "/short"}, "/short")],
)
def test_the_folder_is_the_one_that_ray_chooses(
    given: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert temporary_folder() == folder
    assert get_default_ray_temp_dir() == f"{folder}/ray"


def test_a_run_that_would_start_ray_in_a_long_folder_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", of_length(49))
    with pytest.raises(ClusterProblem, match=r"at most 39 bytes, found /é+ of 49; export RAY_TMPDIR=/tmp"):
        check_machine(1, 0, ClusterConfig(cpus_per_worker=0.01))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check_machine(1, 0, ClusterConfig(cpus_per_worker=0.01))
