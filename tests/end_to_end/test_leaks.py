"""However a run ends, all that it started is gone within 30 seconds, and what ended it is told."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.faulty import with_fault
from tests.end_to_end.leftovers import our_processes
from tests.end_to_end.test_train import process_of, wait_for_step

GRACE_S, START_S = 30, 300
KEPT = ("ray", "torchinductor_", "vllm_dist_")
"""Ray's logs, a cache, and an empty file of vLLM's, in a temporary folder that the user names; else in the run's."""
OF_A_RUN = ("gcs_server", "raylet", "ray::DashboardAgent", "ray_runtime.child", "rewards.worker", "guardian.py")
LAYOUT = ("critic.layout.pipeline=1", "ppo.critic_warmup_steps=0")
HOST = re.escape(socket.gethostname())
RULE = "def rule(text, answer, finish):\n    raise ValueError('a fault was planted here')\n"


@dataclass(frozen=True)
class Going:
    """A run that has finished a step; ``before`` it lived those of this test run that other tests still use."""

    process: subprocess.Popen[str]
    folder: Path
    before: set[int]

    def tree(self) -> set[psutil.Process]:
        """The driver and all that it started: its descendants, and those that only carry the mark of this test run."""
        found = set[psutil.Process]()
        with suppress(psutil.NoSuchProcess):
            driver = psutil.Process(self.process.pid)
            found |= {driver, *driver.children(recursive=True)}
        for pid in our_processes() - self.before:
            with suppress(psutil.NoSuchProcess):
                found.add(psutil.Process(pid))
        return found

    def named(self, part: str) -> list[int]:
        """The pids of those with that in their command line or title, in order."""
        return sorted(each.pid for each in self.tree() if part in command_line(each))


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # gone
        return ""


Strike = Callable[[Going], int]
"""Ends a run; the pid of whom it struck."""


def driver_gets(number: signal.Signals, *, group: bool = False, times: int = 1) -> Strike:
    """The run's command gets a signal, or all of its process group, as from a terminal."""

    def strike(run: Going) -> int:
        for _ in range(times):
            (os.killpg if group else os.kill)(run.process.pid, number)
            time.sleep(1)  # two that wait for one call of the main thread are told to it as one
        return run.process.pid

    return strike


def killed(find: Callable[[Going], int]) -> Strike:
    """One process of the run gets SIGKILL."""

    def strike(run: Going) -> int:
        pid = find(run)
        os.kill(pid, signal.SIGKILL)
        return pid

    return strike


def worker(name: str) -> Callable[[Going], int]:
    return lambda run: process_of(run.folder, name)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run ends.

    Attributes:
        status: of the command.
        says: a pattern of what it prints, in which ``PID`` stands for whom the strike hit.
        strike: done after the first step.
        fault: for ``faulty.py``.
        leaves_sockets: in the folder for temporary files; vLLM's, of an engine that ends with one of its workers.
    """

    status: int
    says: str
    strike: Strike | None = None
    fault: tuple[str, str, str] | None = None
    settings: tuple[str, ...] = ("steps=500",)
    leaves_sockets: bool = False


def may_stay(path: Path, ending: Ending) -> bool:
    return path.name.startswith(KEPT) or (ending.leaves_sockets and path.is_socket())


def died(name: str) -> str:
    return rf"{name} \(pid PID on {HOST}\) was killed by signal 9 \(SIGKILL\); .*its last phase: \w+"


def raised(name: str, verb: str) -> str:
    return rf"{name} \(pid \d+ on {HOST}\) failed in {verb}:\n(.|\n)*RuntimeError: a fault was planted here"


COMMON = {
    "a killed rank of the policy": Ending(status=1, says=died("policy rank 1"), strike=killed(worker("policy rank 1"))),
    "Ctrl-C": Ending(status=130, says="interrupted", strike=driver_gets(signal.SIGINT, group=True)),
}
RARE = {
    "success": Ending(status=0, says="", settings=("steps=1",)),
    "a killed engine": Ending(status=1, says=died("engine"), strike=killed(worker("engine"))),
    "an exception in the policy": Ending(
        status=1, says=raised("policy rank 1", "update"), fault=("policy rank 1", "update", "raise")
    ),
    "an exception in the critic": Ending(
        status=1, says=raised("critic", "values"), fault=("critic rank 0", "values", "raise")
    ),
    "an exception in the reference": Ending(
        status=1, says=raised("policy rank 0", "reference_logprobs"), fault=("reference rank 0", "logprobs", "raise")
    ),
    "an exception in the engine": Ending(
        status=1, says=raised("engine", "generate"), fault=("engine", "generate", "raise")
    ),
    "an exception in the reward workers": Ending(
        status=1,
        says=r"\d+ of \d+ samples could not be scored, .* the rule raised ValueError: a fault was planted here",
        settings=("steps=500", "reward.rule=FOLDER/rule.py:rule"),
    ),
    "a killed critic": Ending(status=1, says=died("critic"), strike=killed(worker("critic"))),
    "a killed driver": Ending(
        status=-signal.SIGKILL,
        says=rf"the driver \(pid PID on {HOST}\) is gone and has not ended its run: it was killed",
        strike=driver_gets(signal.SIGKILL),
    ),
    "a killed worker of a tensor-parallel engine": Ending(
        status=1,
        says=rf"engine \(pid \d+ on {HOST}\) exited with code 1; .*(.|\n)*"
        r"tensor-parallel worker rank 1 \(pid PID\) was killed by signal 9 \(SIGKILL\)",
        strike=killed(lambda run: run.named("VLLM::Worker")[1]),
        settings=("steps=500", "engine.tensor=2", "policy.layout.tensor=1"),
        leaves_sockets=True,
    ),
    "a killed raylet": Ending(
        status=1, says="Raylet is terminated", strike=killed(lambda run: run.named("raylet/raylet")[0])
    ),
    "SIGTERM": Ending(status=0, says="asked to stop: finishing this step", strike=driver_gets(signal.SIGTERM)),
    "SIGTERM twice": Ending(status=130, says="interrupted", strike=driver_gets(signal.SIGTERM, times=2)),
}


@pytest.mark.timeout(2 * START_S)
@pytest.mark.parametrize(
    "ending",
    [
        pytest.param(ending, id=name, marks=[] if name in COMMON else pytest.mark.slow)
        for name, ending in {**COMMON, **RARE}.items()
    ],
)
def test_nothing_is_left_and_the_cause_is_told(
    ending: Ending, train_command: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "rule.py").write_text(RULE)
    command = train_command(*LAYOUT, *(each.replace("FOLDER", str(tmp_path)) for each in ending.settings))
    if ending.fault is not None:
        command = with_fault(ending.fault, command)
    output, errors, before = tmp_path / "output", tmp_path / "errors", our_processes()
    temporary = Path(tempfile.mkdtemp())  # a short path: Ray's sockets lie below
    with output.open("w") as out, errors.open("w") as err:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=err,
            text=True,
            env=os.environ | {"TMPDIR": str(temporary)},
            start_new_session=True,
        )
    run, started, struck = Going(process, tmp_path / "run", before), set[psutil.Process](), 0
    try:
        if ending.strike is None:
            while process.poll() is None:
                started |= run.tree()
                time.sleep(0.5)
        else:
            wait_for_step(run.folder, process, START_S)
            started = run.tree()
            assert all(any(part in command_line(each) for each in started) for part in OF_A_RUN)
            struck = ending.strike(run)
        process.wait(90)
        ended = time.monotonic()
        left = psutil.wait_procs(started, timeout=GRACE_S)[1]
        seconds = time.monotonic() - ended
    finally:
        process.kill()
        kept = [path.name for path in temporary.iterdir() if not may_stay(path, ending)]
        shutil.rmtree(temporary)
    told = output.read_text() + errors.read_text()
    print(f"gone {seconds:.1f} s after the command ended with {process.returncode}; it said:\n{told[-2500:]}")
    assert process.returncode == ending.status
    assert re.search(ending.says.replace("PID", str(struck)), told)
    assert left == []
    assert kept == []
