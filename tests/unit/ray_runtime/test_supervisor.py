"""The supervisor by itself, without Ray."""

from __future__ import annotations

import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest

from megatron_rl.ray_runtime.child import Call
from megatron_rl.ray_runtime.supervisor import Death, Supervisor

ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    found = Supervisor("worker", str(tmp_path / "worker.log"), str(tmp_path / "scratch"), ON_CPU)
    yield found
    found.stop()


def test_a_port_that_is_kept_is_for_the_worker_alone(supervisor: Supervisor) -> None:
    port = supervisor.keep_port()
    with socket.socket() as stranger, pytest.raises(OSError, match="Address already in use"):
        stranger.bind(("127.0.0.1", port))
    with socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(("127.0.0.1", port))
    with socket.create_server(("127.0.0.1", port), reuse_port=True) as worker, socket.socket() as client:
        worker.settimeout(5)
        client.connect(("127.0.0.1", port))
        accepted, _ = worker.accept()
        accepted.close()


def test_a_worker_that_cannot_be_started_is_told_with_the_cause(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    raised: list[BaseException] = []

    def make() -> None:
        try:
            Supervisor("worker", str(tmp_path / "logs" / "worker.log"), str(tmp_path / "scratch"), ON_CPU)
        except OSError as error:
            raised.append(error)

    making = threading.Thread(target=make, daemon=True)
    making.start()
    making.join(timeout=20)
    assert [str(error) for error in raised] == [f"[Errno 17] File exists: '{tmp_path / 'logs'}'"]


def death(exit_code: int, *, oom_kills: int = 0, log: str = "", gpu_full: str = "") -> str:
    known = {"exit_code": exit_code, "oom_kills": oom_kills, "log": log, "gpu_full": gpu_full}
    return str(Death(worker="critic", host="node7", pid=12, phase="update", **known))  # type: ignore[arg-type]


def test_a_death_says_whose_memory_was_full() -> None:
    assert death(-9, oom_kills=1) == (
        "critic (pid 12 on node7) was killed by signal 9 (SIGKILL); the kernel's out-of-memory killer struck 1 time(s) "
        "on that host meanwhile; its last phase: update"
    )
    assert death(1, oom_kills=2).startswith(
        "critic (pid 12 on node7) exited with code 1; the kernel's out-of-memory killer struck 2 time(s)"
    ), "a process of its own may have been the victim"
    log = "step\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.\n"
    assert death(1, log=log, gpu_full=log.splitlines()[1]) == (
        "critic (pid 12 on node7) exited with code 1; the GPU's memory was full: torch.OutOfMemoryError: CUDA out of "
        "memory. Tried to allocate 2 GiB.; its last phase: update\nlast lines of its log:\n" + log
    )
    assert "memory was full" not in death(1, log="step\n")


FULL = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."


def ended(supervisor: Supervisor, log: Path, printed: str) -> Death:
    with log.open("a") as file:
        file.write(printed)
    supervisor.stop()
    return supervisor.death()


def test_a_full_gpu_is_found_long_before_the_last_lines(supervisor: Supervisor, tmp_path: Path) -> None:
    after = [f"frame {number}\n" for number in range(5000)]
    found = ended(supervisor, tmp_path / "worker.log", f"step\n  {FULL}\n" + "".join(after))
    assert found.gpu_full == FULL
    assert f"; the GPU's memory was full: {FULL}; " in str(found)
    assert found.log == "".join(after[-12:])


def test_a_line_more_than_a_mib_before_the_end_is_not_searched_for(supervisor: Supervisor, tmp_path: Path) -> None:
    found = ended(supervisor, tmp_path / "worker.log", f"{FULL}\n" + "step 1234567\n" * (2**20 // 13 + 1))
    assert found.gpu_full == ""
    assert found.log == "step 1234567\n" * 12


def test_what_an_earlier_process_wrote_to_the_same_log_is_not_its_successors(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    log.write_text(f"{FULL}\n")
    found = ended(Supervisor("worker", str(log), str(tmp_path / "scratch"), ON_CPU), log, "step\n")
    assert (found.gpu_full, found.log) == ("", "step\n")


def test_a_death_is_told_though_the_log_is_gone(supervisor: Supervisor, tmp_path: Path) -> None:
    (tmp_path / "worker.log").unlink()
    os.kill(supervisor._process.pid, signal.SIGKILL)
    found = supervisor.death()
    assert found.exit_code == -signal.SIGKILL
    assert "killed by signal 9 (SIGKILL)" in str(found)
    assert "its log cannot be read: [Errno 2]" in str(found)


def test_a_worker_may_open_more_files_than_the_limit_that_its_supervisor_has(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        low = Supervisor("worker", str(tmp_path / "worker.log"), str(tmp_path / "scratch"), ON_CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    limits = Path(f"/proc/{low._process.pid}/limits")
    nothing = Call(phase="nothing", payload=cloudpickle.dumps((dict, (), {})))
    low.call(nothing, 0)  # it is up
    (allowed,) = [line.split()[3] for line in limits.read_text().splitlines() if line.startswith("Max open files")]
    low.stop()
    assert int(allowed) == min(hard, 65536) > 256


def test_calls_in_line_behind_one_that_the_worker_dies_in_are_told_at_once(supervisor: Supervisor) -> None:
    call = Call(phase="sleep", payload=cloudpickle.dumps((time.sleep, (600,), {})))
    with ThreadPoolExecutor() as threads:
        asked = [threads.submit(supervisor.call, call, number) for number in range(3)]
        os.kill(supervisor._process.pid, signal.SIGKILL)
        deaths = [each.result(timeout=30) for each in asked]
    assert all(isinstance(death, Death) and death.exit_code == -signal.SIGKILL for death in deaths)


THREADS_OF_A_WORKER = """
import os, sys, psutil
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as Ray does
from pathlib import Path
from megatron_rl.ray_runtime import cores
from megatron_rl.ray_runtime.supervisor import Supervisor
os.sched_getaffinity = lambda _: set(range(8))
cores._GROUPS = Path(sys.argv[3])
sharing = None if sys.argv[2] == "None" else int(sys.argv[2])
found = Supervisor("worker", sys.argv[1] + "/worker.log", sys.argv[1], {"CUDA_VISIBLE_DEVICES": ""}, sharing)
while not (environment := psutil.Process(found._process.pid).environ()):
    pass  # it has begun, and the kernel has yet to show its environment
print(environment["OMP_NUM_THREADS"])
found.stop()
"""


@pytest.mark.parametrize(
    ("sharing", "given", "quota", "threads"),
    [
        *[(1, None, "max", 8), (2, None, "max", 4), (10**6, None, "max", 1), (None, None, "max", 1)],
        *[(1, "1", "max", 1), (1, "7", "max", 7), (1, "7", "400000", 7)],
        *[(1, None, "400000", 4), (2, None, "600000", 3)],
    ],
)
def test_who_computes_on_the_host_shares_its_cores_unless_threads_are_set(
    sharing: int | None, given: str | None, quota: str, threads: int, tmp_path: Path
) -> None:
    """Eight, or what a container's quota leaves of them."""
    (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS_OF_A_WORKER, str(tmp_path), str(sharing), str(tmp_path)],
        env=environment | ({} if given is None else {"OMP_NUM_THREADS": given}),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"{threads}\n"


def cache_of(environment: dict[str, str], folder: Path) -> str | None:
    """Where a worker's Triton is told to keep what it compiles."""
    started = Supervisor("worker", str(folder / "worker.log"), str(folder / "scratch"), environment)
    started.stop()
    return started._environment.get("TRITON_CACHE_DIR")


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of a node on which nobody says where Triton keeps what it compiles."""
    folder = tmp_path / "of_the_node"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    return folder


def test_triton_compiles_into_a_folder_of_this_node_and_user_alone(node: Path, tmp_path: Path) -> None:
    assert cache_of(ON_CPU, tmp_path) is None
    assert list(node.iterdir()) == [], "where nothing is compiled nothing is left"
    own = node / f"megatron_rl_{os.getuid()}_{socket.gethostname()}"
    for _ in range(2):  # a rank, and its neighbour
        assert cache_of({}, tmp_path) == str(own / "triton")
        assert stat.S_IMODE(own.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["TRITON_CACHE_DIR", "TRITON_HOME"])
def test_where_triton_compiles_to_is_the_users_to_say(
    name: str, node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "/mine")
    assert cache_of({}, tmp_path) is None
    assert list(node.iterdir()) == []


@pytest.mark.parametrize("fault", ["writable", "link", "of another"])
def test_nothing_is_compiled_into_a_folder_that_others_may_write_to(
    fault: str, node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = os.getuid()
    if fault == "of another":
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
    own = node / f"megatron_rl_{os.getuid()}_{socket.gethostname()}"
    if fault == "link":
        (node / "elsewhere").mkdir(mode=0o700)
        own.symlink_to(node / "elsewhere")
    else:
        own.mkdir()
        own.chmod(0o777 if fault == "writable" else 0o700)
    with pytest.raises(PermissionError, match=r"must be a folder that its owner.* alone.*or export TRITON_CACHE_DIR"):
        cache_of({}, tmp_path)


def test_nothing_is_compiled_where_it_cannot_be_loaded(
    node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    with pytest.raises(PermissionError, match=r"mounted noexec: export TRITON_CACHE_DIR"):
        cache_of({}, tmp_path)
