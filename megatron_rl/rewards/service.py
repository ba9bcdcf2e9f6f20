"""Score responses in worker processes that can be killed.

Each sample has its own limit of CPU seconds, so that a verdict does not depend on the load of the machine, and a longer
one of wall seconds, since a stopped or sleeping worker burns no CPU. A sample that overruns costs its worker's life and
nothing else: it gets ``Outcome.TIMEOUT``, its worker is replaced, and the samples that waited behind it are scored by
whoever is free.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import pickle
import selectors
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from megatron_rl.config.schema import RewardConfig
from megatron_rl.dataflow import Finish, Outcome, Score
from megatron_rl.rewards import wire
from megatron_rl.rewards.rules import RewardRule, load_rule

_LOG = logging.getLogger(__name__)
_LARGEST_BATCH = 16
_READ_BYTES = 1 << 16
_CLOCK_TICK_SECONDS = 0.02
"""The system counts CPU seconds in steps of 0.01."""
_LAST_SECONDS = 2.0
"""What a process may take to end after its output has ended."""

Request = tuple[str, str, Finish]
"""``(response text, reference answer, why the response ended)``."""


class RewardService:
    """A pool of worker processes that run one reward rule.

    The workers start when the service is made and load the rule while the caller goes on; the first ``score`` waits
    for them. Close the service, or use it as a context manager. The kernel kills the workers when the thread that
    made them ends, so make and use the service on a thread that lives as long as the service.

    Args:
        rule_spec: a name in ``RULES``, or ``path/to/file.py:callable``, or a picklable rule object.
        workers: number of processes.
        timeout_s: CPU seconds of the worker that one sample may take; they count from when the worker is ready for it.
        wall_timeout_s: wall seconds that one sample may take, for rules that wait and workers that are stopped.
        start_timeout_s: wall seconds that a worker may take until it is ready.
        max_restarts: how many workers may die by themselves in one call before it gives up. Workers that the service
            kills for a time-out and those that a rule fills do not count.
        memory_gib: limit of each worker's address space, in GiB; 0 for no limit. A worker that has reached it is
            replaced.

    Raises:
        ValueError: a number is out of range, or the rule cannot be loaded.
    """

    def __init__(
        self,
        rule_spec: str | RewardRule,
        *,
        workers: int = 1,
        timeout_s: float = 5.0,
        wall_timeout_s: float = 60.0,
        start_timeout_s: float = 60.0,
        max_restarts: int = 16,
        memory_gib: float = 4.0,
    ) -> None:
        if workers < 1:
            raise ValueError(f"a reward service needs at least 1 worker, got workers={workers}")
        if min(timeout_s, wall_timeout_s, start_timeout_s) <= 0:
            raise ValueError(
                f"time limits must be above 0 seconds, got timeout_s={timeout_s}, wall_timeout_s={wall_timeout_s}, "
                f"start_timeout_s={start_timeout_s}"
            )
        if memory_gib < 0:
            raise ValueError(f"memory_gib must be above 0, or 0 for no limit, got {memory_gib}")
        rule = load_rule(rule_spec) if isinstance(rule_spec, str) else rule_spec
        self._failure_value = rule.failure_value
        self._start_message = wire.encode({"rule": base64.b64encode(pickle.dumps(rule)).decode("ascii")})
        self._timeout_s = timeout_s
        self._wall_timeout_s = wall_timeout_s
        self._start_timeout_s = start_timeout_s
        self._max_restarts = max_restarts
        self._memory_gib = memory_gib
        self._busy_seconds = 0.0
        self._one_call = threading.Lock()
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._start_worker()
        except BaseException:
            self.close()
            raise

    def take_busy_seconds(self) -> float:
        """Wall seconds that the workers together spent on samples since this was last asked."""
        taken, self._busy_seconds = self._busy_seconds, 0.0
        return taken

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Score every request.

        Args:
            requests: ``(text, answer, finish)`` each; ``text`` is the response without the prompt.

        Returns:
            One score per request, in order. A sample whose rule overran a limit has ``Outcome.TIMEOUT``; one
            whose rule raised, filled its memory or killed its process has ``Outcome.ERROR``; both have the rule's
            ``failure_value``.

        Raises:
            RuntimeError: the service is closed, a worker could not start, or too many workers died by themselves.
        """
        with self._one_call:
            if self._closed:
                raise RuntimeError("this reward service is closed: make a new one to score more samples")
            try:
                return _Call(self, requests).run()
            except BaseException:
                # Whatever is under way would answer into the next call.
                self._replace_busy_workers()
                raise

    def close(self) -> None:
        """Kill the workers and wait for their end. Safe to call again."""
        self._closed = True
        for worker in self._workers:
            self._stop_worker(worker)
        self._workers.clear()
        self._selector.close()

    def __enter__(self) -> RewardService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start_worker(self) -> None:
        worker = _Worker(self._start_message, self._memory_gib)
        self._workers.append(worker)
        self._selector.register(worker.output, selectors.EVENT_READ, worker)
        self._selector.register(worker.input, selectors.EVENT_WRITE, worker)

    def _stop_worker(self, worker: _Worker) -> None:
        for end in (worker.output, worker.input):
            if end in self._selector.get_map():
                self._selector.unregister(end)
        worker.kill()

    def _replace(self, worker: _Worker) -> None:
        self._stop_worker(worker)
        self._workers.remove(worker)
        self._start_worker()

    def _replace_busy_workers(self) -> None:
        for worker in [worker for worker in self._workers if worker.pending or worker.ended]:
            self._replace(worker)


def reward_service(reward: RewardConfig) -> Callable[[], RewardService]:
    """A pool of reward workers, to be started where this is called."""
    return partial(
        RewardService,
        reward.rule,
        workers=reward.workers,
        timeout_s=reward.timeout_s,
        wall_timeout_s=reward.wall_timeout_s,
        start_timeout_s=reward.start_timeout_s,
        memory_gib=reward.memory_gib,
    )


class _Worker:
    """One process, its pipes (never blocking), and the samples it has been given."""

    def __init__(self, start_message: bytes, memory_gib: float) -> None:
        command = [sys.executable, "-m", "megatron_rl.rewards.worker", "--parent", str(os.getpid())]
        if memory_gib:
            command += ["--memory-bytes", str(int(memory_gib * 2**30))]
        # Its own session: a kill reaches what the rule started too, and Ctrl-C in the terminal does not reach it.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(), start_new_session=True
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input = self.process.stdin.fileno()
        self.output = self.process.stdout.fileno()
        os.set_blocking(self.input, False)
        os.set_blocking(self.output, False)
        self.started = time.monotonic()
        self.ready = False
        self.ended = False
        self.pending: deque[int] = deque()
        # When the first of the pending samples began, by time.monotonic and in CPU seconds of the process.
        self.clock = 0.0
        self.cpu_clock = 0.0
        self.next_look = float("inf")  # the earliest time at which it may have used up its CPU seconds
        self.unsent = bytearray(start_message)
        self.received = bytearray()

    @property
    def pid(self) -> int:
        return self.process.pid

    def cpu_seconds(self) -> float:
        """CPU seconds that the process has used; 0 for one that has just ended."""
        try:
            times = psutil.Process(self.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system)

    def write(self) -> None:
        """Send what the pipe takes."""
        try:
            sent = os.write(self.input, self.unsent)
        except BlockingIOError:
            return
        except BrokenPipeError:  # the end of its output tells the same, with what it said before
            self.unsent.clear()
            return
        del self.unsent[:sent]

    def read(self) -> None:
        """Receive what the pipe has; its end means that the process ended."""
        try:
            data = os.read(self.output, _READ_BYTES)
        except BlockingIOError:
            return
        self.received += data
        self.ended = not data

    def exit_code(self) -> int:
        """Wait for a process whose output has ended; return its exit code as ``Popen`` does."""
        until = time.monotonic() + _LAST_SECONDS
        # Looked at, not reaped: its number must stay taken until its process group has been killed.
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None and time.monotonic() < until:
            time.sleep(0.002)
        self._kill_group()
        return self.process.wait()

    def kill(self) -> None:
        """Kill the process and all it started, wait for it, close the pipes."""
        self._kill_group()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def _kill_group(self) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


class _Call:
    """The state of one ``score`` call."""

    def __init__(self, service: RewardService, requests: Sequence[Request]) -> None:
        self.service = service
        self.requests = requests
        self.scores: list[Score | None] = [None] * len(requests)
        self.left = len(requests)
        self.queue = deque(range(len(requests)))
        self.deaths = 0
        self.errors: list[str] = []
        self.timeouts = 0
        self.began = time.monotonic()

    def run(self) -> list[Score]:
        service = self.service
        for worker in list(service._workers):  # one that died since the last call has no sample to blame
            worker.read()
            if worker.ended:
                service._replace(worker)
        while self.left:
            for worker in service._workers:
                if worker.ready and not worker.pending and self.queue:
                    self._give(worker)
                self._watch_input(worker)
            for key, _ in service._selector.select(self._seconds_to_next_deadline()):
                worker = key.data
                if key.fd == worker.input:
                    worker.write()
                else:
                    worker.read()
            # Answers first: a sample whose answer has arrived is never late, however slow this process was to look.
            for worker in list(service._workers):
                self._handle_answers(worker)
                if worker.ended:
                    self._handle_death(worker)
                elif time.monotonic() >= self._deadline(worker) and self._overran(worker):
                    self._handle_overrun(worker)
        self._report()
        return [score for score in self.scores if score is not None]

    def _report(self) -> None:
        """Log what could not be scored."""
        samples = len(self.scores)
        if self.timeouts:
            _LOG.warning("%d of %d samples timed out", self.timeouts, samples)
        if self.errors:
            _LOG.warning("%d of %d samples could not be scored: %s", len(self.errors), samples, self.errors[0])

    def _give(self, worker: _Worker) -> None:
        """Send a batch: large at first, single samples at the end, so that no worker waits for another."""
        size = min(_LARGEST_BATCH, max(1, len(self.queue) // (2 * len(self.service._workers))))
        worker.pending.extend(self.queue.popleft() for _ in range(min(size, len(self.queue))))
        samples: list[tuple[int, str, str, str]] = []
        for index in worker.pending:
            text, answer, finish = self.requests[index]
            samples.append((index, text, answer, finish.value))
        worker.unsent += wire.encode({"samples": samples})
        self._start_clock(worker)

    def _start_clock(self, worker: _Worker) -> None:
        """The next sample begins; the worker's CPU clock stands where its last message said."""
        worker.clock = time.monotonic()
        worker.next_look = worker.clock + self.service._timeout_s

    def _overran(self, worker: _Worker) -> bool:
        """Whether a worker whose time to be looked at has come is over a limit."""
        now = time.monotonic()
        if not worker.ready or now >= worker.clock + self.service._wall_timeout_s:
            return True
        left = self.service._timeout_s - (worker.cpu_seconds() - worker.cpu_clock)
        worker.next_look = now + max(left, _CLOCK_TICK_SECONDS)
        return left <= 0

    def _watch_input(self, worker: _Worker) -> None:
        """Wait for room in the worker's pipe only while there is something to send."""
        selector = self.service._selector
        watched = worker.input in selector.get_map()
        if worker.unsent and not watched:
            selector.register(worker.input, selectors.EVENT_WRITE, worker)
        elif watched and not worker.unsent:
            selector.unregister(worker.input)

    def _deadline(self, worker: _Worker) -> float:
        if not worker.ready:
            return max(worker.started, self.began) + self.service._start_timeout_s
        return min(worker.next_look, worker.clock + self.service._wall_timeout_s) if worker.pending else float("inf")

    def _seconds_to_next_deadline(self) -> float:
        # At least one worker is starting or has samples while samples are left, so the minimum is finite.
        nearest = min(self._deadline(worker) for worker in self.service._workers)
        return max(0.0, nearest - time.monotonic())

    def _handle_answers(self, worker: _Worker) -> None:
        for message in wire.take(worker.received):
            worker.cpu_clock = message.get("cpu_seconds", worker.cpu_clock)
            if "ready" in message:
                worker.ready = True
            elif "failed" in message:
                raise RuntimeError(
                    f"reward worker {worker.pid} could not load its rule: {message['failed']}. It runs in a process of "
                    f"its own, so the rule and all it imports must load there too; {self._memory_limit()}"
                )
            else:
                self._handle_answer(worker, message)

    def _handle_answer(self, worker: _Worker, message: dict[str, Any]) -> None:
        index = worker.pending.popleft()
        if index != message["index"]:
            raise RuntimeError(f"reward worker {worker.pid} must answer sample {index} next, got {message['index']}")
        self._start_clock(worker)
        self.service._busy_seconds += message["seconds"]
        if "error" in message:
            self._fail(index, f"the rule raised {message['error']}")
        else:
            outcome = Outcome(message["outcome"])
            score = Score(value=message["value"], outcome=outcome, parts=message["parts"], answer=message["answer"])
            self._settle(index, score)

    def _handle_overrun(self, worker: _Worker) -> None:
        if not worker.ready:
            raise RuntimeError(
                f"reward worker {worker.pid} must be ready within {self.service._start_timeout_s:g} s and is not: its "
                "output is on standard error; on a very slow or loaded machine raise reward.start_timeout_s (of "
                "eval/run.py: --start-timeout-s)"
            )
        self.service._busy_seconds += time.monotonic() - worker.clock
        self.timeouts += 1
        self._settle(worker.pending.popleft(), Score(value=self.service._failure_value, outcome=Outcome.TIMEOUT))
        self._replace(worker)

    def _handle_death(self, worker: _Worker) -> None:
        """The worker's output ended: its first pending sample is the one that ended it."""
        code = worker.exit_code()
        how = _how_it_ended(code)
        reason = f"reward worker {worker.pid} {how}"
        if code == wire.MEMORY_FULL and worker.pending:
            reason = f"the rule filled its worker's memory: {self._memory_limit()}"
        else:
            self.deaths += 1
        if worker.pending:
            self.service._busy_seconds += time.monotonic() - worker.clock
            self._fail(worker.pending.popleft(), reason)
        if self.deaths > self.service._max_restarts:
            raise RuntimeError(
                f"reward worker {worker.pid} {how}, and {self.deaths} workers ended by themselves in one call, at most "
                f"{self.service._max_restarts} may: look for crashes in the reward rule and for the machine's memory, "
                f"of which fewer reward.workers (of eval/run.py: --reward-workers) take less; {self._memory_limit()}"
            )
        self._replace(worker)

    def _memory_limit(self) -> str:
        """What limits a worker's address space, for messages."""
        gib = self.service._memory_gib
        limit = f"{gib:g} GiB" if gib else "no limit"
        return f"a worker's address space has {limit} by reward.memory_gib (of eval/run.py: --memory-gib)"

    def _replace(self, worker: _Worker) -> None:
        self.queue.extendleft(reversed(worker.pending))
        worker.pending.clear()
        self.service._replace(worker)

    def _fail(self, index: int, reason: str) -> None:
        self.errors.append(reason)
        self._settle(index, Score(value=self.service._failure_value, outcome=Outcome.ERROR, reason=reason))

    def _settle(self, index: int, score: Score) -> None:
        self.scores[index] = score
        self.left -= 1


def _how_it_ended(code: int) -> str:
    return f"exited with code {code}" if code >= 0 else f"was ended by signal {-code} ({signal.strsignal(-code)})"


def _environment() -> dict[str, str]:
    """This process's environment, with the package importable where it is run from a checkout."""
    root = str(Path(__file__).resolve().parents[2])
    if root in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return dict(os.environ)
    paths = [path for path in (os.environ.get("PYTHONPATH"), root) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
