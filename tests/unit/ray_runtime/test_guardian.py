"""What is left of a cluster when its driver is gone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

DRIVER = """
import subprocess, sys, time
from megatron_rl.ray_runtime.guardian import Guardian
null = subprocess.DEVNULL
apart = {"start_new_session": True, "stdout": null, "stderr": null}
stranger = subprocess.Popen(["sleep", "60"], **apart)
guardian = Guardian()
ours = subprocess.Popen(["sleep", "60"], **apart)
print(guardian._process.pid, stranger.pid, ours.pid, flush=True)
if sys.argv[1] == "dismiss":
    guardian.dismiss()
    after = subprocess.Popen(["sleep", "60"], **apart)
    print(after.pid, flush=True)
time.sleep(60)
"""


def driver(ending: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, ending], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pids = process.stdout.readline().split()
    if ending == "dismiss":
        pids += process.stdout.readline().split()
    return process, [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_started_after_it_ends_with_the_driver_and_nothing_else(number: signal.Signals) -> None:
    process, (guardian, stranger, ours) = driver("killed")
    process.send_signal(number)
    _, told = process.communicate(timeout=20)
    try:
        assert re.fullmatch(
            rf"megatron-rl: the driver \(pid {process.pid} on .+\) is gone and has not ended its run: "
            r"it was killed, or Ray ended it; 1 processes that were left are killed\n",
            told,
        )
        assert psutil.wait_procs([guardian, ours], timeout=10)[1] == []
        assert stranger.is_running()
    finally:
        stranger.kill()


def test_a_guardian_that_is_dismissed_ends_and_kills_nobody() -> None:
    process, rest = driver("dismiss")
    process.kill()
    assert process.communicate()[1] == ""
    try:
        assert len(rest) == 3, "the guardian was gone when the driver said so"
        time.sleep(1.5)
        assert all(other.is_running() and other.status() != psutil.STATUS_ZOMBIE for other in rest)
        marks = [Path(f"/proc/{other.pid}/environ").read_bytes().count(b"MEGATRON_RL_CLUSTER") for other in rest]
        assert marks == [0, 1, 0]
    finally:
        for other in rest:
            os.kill(other.pid, signal.SIGKILL)
