"""The Ray actor that starts one worker process, relays its calls, and knows how it ended.

Ray cannot say which signal killed an actor. A parent can: the kernel tells it. The supervisor loads no torch and
computes nothing, so it outlives what happens to its child.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_rl.lifetime import ended
from megatron_rl.ray_runtime.child import Call, Reply
from megatron_rl.ray_runtime.cores import usable_cores

LOG_LINES = 12
_GPU_IS_FULL = "CUDA out of memory"
_SEARCHED_BYTES = 1 << 20
_TRITON_PLACES = {"TRITON_CACHE_DIR", "TRITON_HOME"}
"""Each says where Triton keeps what it compiles."""
_CHILD = "from megatron_rl.ray_runtime.child import main; main()"


@dataclass(frozen=True, kw_only=True)
class Death:
    """How a worker process ended, as its parent saw it.

    Attributes:
        exit_code: as the kernel gave it; minus the signal's number where a signal ended it.
        phase: what it was asked to do last; ``idle after ...`` where it had answered.
        oom_kills: how often the kernel's out-of-memory killer struck on this host since the worker started.
        log: last lines of what it printed.
        gpu_full: the line in which it said that the GPU's memory was full; empty where it did not.
    """

    worker: str
    host: str
    pid: int
    exit_code: int
    phase: str
    oom_kills: int
    log: str
    gpu_full: str

    def __str__(self) -> str:
        """All that is known of it, and that the rest is not."""
        how = ended(self.exit_code)
        if self.oom_kills:  # also where it exited: a process of its own may have been the victim
            how += f"; the kernel's out-of-memory killer struck {self.oom_kills} time(s) on that host meanwhile"
        elif self.exit_code == -signal.SIGKILL:
            how += "; who sent it is not known, the kernel's out-of-memory killer did not strike on that host"
        if self.gpu_full:
            how += f"; the GPU's memory was full: {self.gpu_full}"
        text = f"{self.worker} (pid {self.pid} on {self.host}) {how}; its last phase: {self.phase}"
        return text + (f"\nlast lines of its log:\n{self.log}" if self.log else "")


@dataclass(frozen=True, kw_only=True)
class Birth:
    """Where a worker process runs."""

    host: str
    address: str
    pid: int


class Supervisor:
    """One worker process and the pipe to it; its methods run in threads of the actor."""

    def __init__(
        self, worker: str, log_file: str, scratch: str, environment: Mapping[str, str], sharing: int | None = None
    ) -> None:
        """Start the process.

        Args:
            worker: its name.
            log_file: gets what it prints.
            scratch: see :func:`_writing_to`.
            environment: of the process, besides this one's; with an empty CUDA_VISIBLE_DEVICES it sees no GPU.
            sharing: workers that compute on this node's cores, this one included; it gets an equal share of those that
                may be used (:func:`.usable_cores`) as threads, unless OMP_NUM_THREADS was set for this node. None: it
                does not compute there.

        Raises:
            OSError: it cannot be started, or its log or caches cannot be written, see :func:`_own_folder`.
        """
        self._worker = worker
        self._log = Path(log_file)
        self._environment = _writing_to(Path(scratch)) | dict(environment)
        if environment.get("CUDA_VISIBLE_DEVICES") != "" and _TRITON_PLACES.isdisjoint(os.environ):
            self._environment["TRITON_CACHE_DIR"] = str(_own_folder() / "triton")
        if sharing is not None and not _threads_are_set():
            self._environment["OMP_NUM_THREADS"] = str(max(1, usable_cores() // sharing))
        self._phase = "starting"
        self._turn = threading.Condition()
        self._one_beside = threading.Lock()
        self._next_number = 0
        self._gone = threading.Event()
        self._exit_code = 0
        self._unstarted: BaseException | None = None
        self._kept: list[socket.socket] = []
        self._oom_kills_before = _oom_kills()
        started = threading.Event()
        # The kernel's parent-death signal goes with the thread that started the child: this one stays as long as it.
        threading.Thread(target=self._guard, args=(started,), name="guard").start()
        started.wait()
        if self._unstarted is not None:
            raise self._unstarted

    def _guard(self, started: threading.Event) -> None:
        try:
            self._start()
        except BaseException as error:  # raised by the constructor, which waits for this thread
            self._unstarted = error
            return
        finally:
            started.set()
        self._exit_code = self._process.wait()
        self._gone.set()
        with self._turn:
            self._turn.notify_all()

    def _start(self) -> None:
        (ours, theirs), (ours_beside, theirs_beside) = socket.socketpair(), socket.socketpair()
        self._pipe: Connection[Any, Any] = Connection(ours.detach())
        self._pipe_beside: Connection[Any, Any] = Connection(ours_beside.detach())
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._log_start = log.tell()  # what lies before is of a run or a process that is over
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(theirs.fileno()), str(theirs_beside.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno(), theirs_beside.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self._environment,
                start_new_session=True,  # a terminal's Ctrl-C reaches the driver alone
            )
        theirs.close()
        theirs_beside.close()

    def birth(self) -> Birth:
        """Where the worker runs."""
        import ray

        return Birth(host=socket.gethostname(), address=ray.util.get_node_ip_address(), pid=self._process.pid)

    def death_so_far(self) -> Death | None:
        """How the worker ended; None while it lives."""
        return self.death() if self._gone.is_set() else None

    def keep_port(self) -> int:
        """A TCP port that is kept for the worker as long as this process lives, see :func:`port_kept`."""
        self._kept.append(port_kept())
        return int(self._kept[-1].getsockname()[1])

    def call(self, call: Call, number: int) -> Reply | Death:
        """Have the worker do it; a :class:`Death` where it did not live to answer.

        Calls run in the order of ``number`` (0, 1, ...): ranks that ran two calls in different orders would wait for
        each other's collectives for ever.
        """
        with self._turn:
            self._turn.wait_for(lambda: self._next_number == number or self._gone.is_set())
            its_turn = self._next_number == number
        if not its_turn:  # nor will it be: the one before it was never answered
            return self.death()
        self._phase = call.phase
        try:
            self._pipe.send_bytes(pickle.dumps(call))
            reply: Reply = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            return self.death()
        self._phase = f"idle after {call.phase}"
        with self._turn:
            self._next_number += 1
            self._turn.notify_all()
        return reply

    def call_beside(self, call: Call) -> Reply | Death:
        """Have the worker do it in a thread of its own, whatever else it does; such calls run one at a time."""
        with self._one_beside:
            try:
                self._pipe_beside.send_bytes(pickle.dumps(call))
                reply: Reply = pickle.loads(self._pipe_beside.recv_bytes())
            except (EOFError, OSError):
                return self.death()
        return reply

    def death(self) -> Death:
        """Wait for the worker's end and say how it came."""
        self._gone.wait()
        log = self._printed()
        return Death(
            worker=self._worker,
            host=socket.gethostname(),
            pid=self._process.pid,
            exit_code=self._exit_code,
            phase=self._phase,
            oom_kills=_oom_kills() - self._oom_kills_before,
            log="".join(log[-LOG_LINES:]),
            # long before the last lines where other threads, or a traceback of many frames, print after it
            gpu_full=next((line.strip() for line in reversed(log) if _GPU_IS_FULL in line), ""),
        )

    def _printed(self) -> list[str]:
        """The last MiB of what the worker printed, by line; nothing where its log cannot be read."""
        try:
            with self._log.open("rb") as log:
                log.seek(max(self._log_start, self._log.stat().st_size - _SEARCHED_BYTES))
                return log.read(_SEARCHED_BYTES).decode(errors="replace").splitlines(keepends=True)
        except OSError as error:  # the death is told all the same
            return [f"(its log cannot be read: {error})"]

    def stop(self) -> None:
        """Close the pipes, which ends the worker, and wait for it."""
        self._pipe.close()
        self._pipe_beside.close()
        if not self._gone.wait(timeout=5):
            self._process.kill()
            self._gone.wait()


def port_kept() -> socket.socket:
    """A socket bound to a free TCP port: while it is open, nobody on this host gets that port unless they ask for it
    with SO_REUSEPORT and are of the same user. It never listens, so whoever then does gets all connections.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    kept.bind(("", 0))
    return kept


def _writing_to(scratch: Path) -> dict[str, str]:
    """Where most libraries put caches and temporary files, where the user names no other place: in the run's folder."""
    scratch.mkdir(parents=True, exist_ok=True)
    names = ("TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    return {name: os.environ.get(name, str(scratch)) for name in names}


def _own_folder() -> Path:
    """Of this user on this node, made where it is not there yet; temporary folders may be shared too.

    Triton keeps there what it compiles. On a file system that nodes share, ranks that compile the same at the same time
    take files away from each other. It also loads what it finds, so that nobody else may write there.

    Raises:
        PermissionError: others may, or might have made it; or nothing can be loaded from there.
    """
    folder = Path(tempfile.gettempdir()) / f"megatron_rl_{os.getuid()}_{socket.gethostname()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(
            f"{folder} must be a folder that its owner, user {os.getuid()}, alone may write to, since compiled code is "
            f"loaded from there; found {stat.filemode(found.st_mode)} of user {found.st_uid}: remove it, or export "
            "TRITON_CACHE_DIR, a folder of yours on each node"
        )
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise PermissionError(
            f"{folder} must be where compiled code can be loaded from, its file system is mounted noexec: export "
            "TRITON_CACHE_DIR, a folder of yours on each node that is not"
        )
    return folder


def _threads_are_set() -> bool:
    """Whether OMP_NUM_THREADS came with this process: since then, Ray sets it to 1 where nobody has."""
    return any(each.startswith(b"OMP_NUM_THREADS=") for each in Path("/proc/self/environ").read_bytes().split(b"\0"))


def _oom_kills() -> int:
    for line in Path("/proc/vmstat").read_text().splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill":
            return int(count)
    return 0
