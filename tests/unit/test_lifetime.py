"""Processes that end with another one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

PARENT = """
import multiprocessing, os, sys, time
from megatron_rl.lifetime import die_with_child, die_with_parent
spawn = multiprocessing.get_context("spawn")

def work(parent, peer, own):
    die_with_parent(parent)
    try:
        peer.recv()
    except EOFError:
        while True:
            print("a peer is lost", file=sys.stderr, flush=True)

if __name__ == "__main__":
    pipes = [spawn.Pipe(duplex=False) for _ in range(2)]
    children = [
        spawn.Process(target=work, args=(os.getpid(), pipes[rank][0], pipes[1 - rank][1]), daemon=True)
        for rank in range(2)
    ]
    for child in children:
        child.start()
    for _, end in pipes:
        end.close()
    meant, memory = [], b"x" * (1 << 29)  # which takes its time to be given back at the end
    die_with_child([child.pid for child in children], "helper", unless=lambda: bool(meant))
    print(children[1].pid, flush=True)
    if sys.stdin.readline() == "meant\\n":
        meant.append(True)
        children[1].kill()
        children[0].kill()
        for child in children:
            child.join()
        time.sleep(0.5)
        sys.exit(7)
    time.sleep(60)
"""


def parent(tmp_path, meant):
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        child = int(process.stdout.readline())
        if not meant:
            os.kill(child, signal.SIGTERM)
        _, errors = process.communicate("meant\n" if meant else "\n", timeout=20)
    return process.returncode, errors, child


def test_a_process_ends_with_its_child_and_says_how(tmp_path):
    status, errors, child = parent(tmp_path, meant=False)
    *others, last = errors.splitlines()
    assert (status, last) == (1, f"helper rank 1 (pid {child}) was killed by signal 15 (SIGTERM)")
    assert all("a peer is lost".startswith(other) for other in others)


def test_an_end_that_was_meant_changes_nothing(tmp_path):
    status, errors, _ = parent(tmp_path, meant=True)
    assert status == 7
    assert "helper" not in errors


COMMAND = """
import os, signal, sys, time

def stop(*_):
    print("asked", flush=True)
    sys.exit(5)

signal.signal(signal.SIGTERM, stop)
try:
    print(os.getpid(), flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    print("ended", flush=True)
"""
RUNNER = f"""
import sys
from megatron_rl.lifetime import run_command
sys.exit(run_command([sys.executable, "-c", {COMMAND!r}]))
"""


@pytest.fixture
def running():
    """A process that runs a command, in a process group of their own, and the command's pid."""
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        yield process, int(process.stdout.readline())
        process.kill()


def test_a_command_is_asked_to_stop_with_whoever_runs_it(running):
    process, _ = running
    process.terminate()
    assert process.communicate(timeout=20)[0] == "asked\n"
    assert process.returncode == 5


def test_a_command_that_is_being_started_is_asked_to_stop_too():
    program = (
        "import os, signal, subprocess, sys\n"
        "from megatron_rl.lifetime import run_command\n"
        "start = subprocess.Popen\n"
        "def slow(*args, **options):\n"
        "    child = start(*args, **options)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return child\n"
        "subprocess.Popen = slow\n"
        "print(run_command(['sleep', '60']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (0, f"{-signal.SIGTERM}\n"), done.stderr


def test_an_interrupted_command_may_end(running):
    process, _ = running
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert output == "ended\n"
    assert errors.endswith("KeyboardInterrupt\n")


def test_a_command_is_killed_with_whoever_runs_it(running):
    process, pid = running
    process.kill()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
