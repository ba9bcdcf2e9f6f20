"""The check that every test here goes through finds what is left, and leaves alone what is not ours."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import nothing_left_behind
from tests.end_to_end.leftovers import our_processes, shared_memory

ORPHAN = """
import subprocess, sys
null = subprocess.DEVNULL
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=null, stderr=null, start_new_session=True)
print(child.pid)
"""
TITLED = "from setproctitle import setproctitle; import time; setproctitle('ray::Worker'); time.sleep(60)"
HOLDER = (
    "import sys, time; file = open(sys.argv[1], 'x+b'); file.truncate(4096); print('made', flush=True); time.sleep(60)"
)


@contextmanager
def shared_object(environment: dict[str, str]) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """Made by a process that lives."""
    path = Path(f"/dev/shm/megatron_rl_test_{os.getpid()}")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "made\n"
            yield path, process
        finally:
            process.kill()
            path.unlink(missing_ok=True)


def strange() -> dict[str, str]:
    """The environment of a process that this test run has nothing to do with."""
    return {name: value for name, value in os.environ.items() if name != "MEGATRON_RL_TEST_RUN"}


def test_a_process_is_found_when_its_parent_is_gone_and_its_title_is_another() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHAN, TITLED], capture_output=True, text=True, check=True)
    orphan = psutil.Process(int(done.stdout))
    try:
        while "ray::Worker" not in " ".join(orphan.cmdline()):
            time.sleep(0.01)
        assert orphan.ppid() != os.getpid()
        assert orphan.pid in our_processes()
    finally:
        orphan.kill()


def test_a_process_of_others_is_none_of_ours() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=strange()) as process:
        assert process.pid not in our_processes()
        process.kill()


def test_shared_memory_is_found_and_that_of_others_is_not() -> None:
    with shared_object(dict(os.environ)) as (path, process):
        assert path in shared_memory()
        process.kill()
        process.wait()
        assert path in shared_memory()
    with shared_object(strange()) as (path, _):
        assert path not in shared_memory()


def test_the_fixture_fails_a_test_that_leaves_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.end_to_end.conftest._GRACE_S", 0.3)
    check = nothing_left_behind.__wrapped__()  # type: ignore[attr-defined]
    next(check)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        with pytest.raises(AssertionError, match=f"left behind: .*'{process.pid}'"):
            next(check)
        process.kill()
