"""The process of the reference, and what stands for it in the driver, which never loads transformers."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from megatron_rl.batches import TokenRows
from megatron_rl.config.limit import Limit
from megatron_rl.interfaces import Pending
from megatron_rl.lifetime import die_with_parent
from megatron_rl.weights.rules import Head

if TYPE_CHECKING:
    from torch import Tensor

_PROGRAM = "from megatron_rl.hf_reference.process import serve; serve()"
_END_S = 10.0
"""Bound on the end of a process that has hung up or was killed."""


class ReferenceFailed(RuntimeError):
    """The reference could not be computed; the message says why."""


class HfProcess:
    """A Hugging Face model in a process of its own, which starts to load at once; calls are answered in their order.

    The thread that makes it must live as long as it.
    """

    def __init__(
        self,
        folder: Path,
        head: Head,
        *,
        environment: Mapping[str, str],
        scratch: Path,
        log: Path,
        start_limit: Limit,
        call_limit: Limit,
    ) -> None:
        """Start it and return at once.

        Args:
            folder: of the model.
            head: see :class:`~megatron_rl.hf_reference.model.HfReference`.
            environment: of the process, besides this one's.
            scratch: folder for what libraries cache.
            log: file for what the process prints.
            start_limit: on loading.
            call_limit: on each call, from the end of what it was asked before.
        """
        self._call_limit = call_limit
        self._asked = [("start", time.monotonic(), start_limit)]
        self._answers: list[Any] = []
        self._idle_since = 0.0
        self._ended: str | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        settings = {
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(scratch),
            "TRANSFORMERS_VERBOSITY": "error",
            "TQDM_DISABLE": "1",
        }
        ours, theirs = socket.socketpair()
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | dict(environment) | settings,
                start_new_session=True,  # a terminal's Ctrl-C reaches the driver alone
            )
        self._pipe: Connection[Any, Any] = Connection(ours.detach())
        self._calls: SimpleQueue[bytes | None] = SimpleQueue()
        self._arrived: SimpleQueue[tuple[float, bytes | None]] = SimpleQueue()
        # what does not fit into the socket blocks, and the process may be just as busy telling an answer
        self._threads = [
            Thread(target=_send_all, args=(self._calls, self._pipe), daemon=True),
            Thread(target=_receive_all, args=(self._pipe, self._arrived), daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self._calls.put(pickle.dumps((folder, head)))

    def call(self, verb: str, *args: Any) -> Pending[Any]:
        """Ask for a method of :class:`~megatron_rl.hf_reference.model.HfReference`."""
        self._calls.put(pickle.dumps((verb, args)))
        self._asked.append((verb, time.monotonic(), self._call_limit))
        return _Answer(self, len(self._asked) - 1)

    def answer(self, number: int) -> Any:
        """Wait for the answer to call ``number``; 0 is loading.

        Raises:
            ReferenceFailed: the process raised, ended, or did not answer in time.
        """
        while len(self._answers) <= number:
            verb, asked, limit = self._asked[len(self._answers)]
            until = max(asked, self._idle_since) + limit.seconds
            try:
                self._idle_since, answer = self._arrived.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                raise ReferenceFailed(f"the Hugging Face reference did not finish {verb} within {limit}") from None
            if answer is None:
                self._arrived.put((self._idle_since, None))  # for the next one that asks
                self._ended = self._ended or self._end()
                raise ReferenceFailed(self._ended)
            self._answers.append(pickle.loads(answer))
        good, found = self._answers[number]
        if not good:
            raise ReferenceFailed(f"the Hugging Face reference failed in {self._asked[number][0]}:\n{found}")
        return found

    def _end(self) -> str:
        try:
            how = _ending(self._process.wait(_END_S))
        except subprocess.TimeoutExpired:
            self._process.kill()
            how = f"hung up, did not end within {_END_S:g} s and was killed"
        return (
            f"the Hugging Face reference {how}; {self._log} may say why. It holds the model in float32: parity."
            "reference_max_parameters bounds it"
        )

    def close(self) -> None:
        """End the process; a second call does nothing."""
        self._process.kill()
        self._process.wait(_END_S)
        self._calls.put(None)
        for thread in self._threads:
            thread.join(_END_S)
        self._pipe.close()

    def __enter__(self) -> Self:
        """The process itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.close()


def _ending(status: int) -> str:
    return f"was killed by signal {-status} ({signal.Signals(-status).name})" if status < 0 else f"ended with {status}"


def _send_all(messages: SimpleQueue[bytes | None], pipe: Connection[Any, Any]) -> None:
    """Until a None, or nobody is at the other end, which the answers tell."""
    with suppress(OSError):
        while (message := messages.get()) is not None:
            pipe.send_bytes(message)


def _receive_all(pipe: Connection[Any, Any], messages: SimpleQueue[tuple[float, bytes | None]]) -> None:
    """With the time of each; until the other end is closed: a None."""
    with suppress(EOFError, OSError):
        while True:
            message = pipe.recv_bytes()
            messages.put((time.monotonic(), message))
    messages.put((time.monotonic(), None))


@dataclass(frozen=True)
class _Answer:
    process: HfProcess
    number: int

    def result(self) -> Any:
        return self.process.answer(self.number)


@dataclass(frozen=True, kw_only=True)
class HfScorer:
    """The reference as the gate sees it.

    Attributes:
        process: where it runs.
        head: whether it gives log-probs or values.
        through: [h] read values through this instead of the model's own head; None: the model's own.
    """

    process: HfProcess
    head: Head
    through: Tensor | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return "Hugging Face" if self.head is Head.TOKEN else "Hugging Face critic"

    def score(self, rows: TokenRows) -> Pending[Tensor]:
        """Log-probs or values, [B, T]."""
        if self.head is Head.TOKEN:
            return self.process.call("logprobs", rows)
        return self.process.call("values", rows, self.through)

    def activations(self, rows: TokenRows) -> Pending[Mapping[str, Tensor]]:
        """By place."""
        return self.process.call("activations", rows)

    def tensors(self, prefixes: Sequence[str]) -> Pending[Mapping[str, Tensor]]:
        """Of the folder."""
        return self.process.call("tensors", prefixes)


def serve() -> None:
    """Load the model that the driver names, say so, then answer its calls until it closes its end."""
    die_with_parent(parent=int(sys.argv[2]))
    pipe: Connection[Any, Any] = Connection(int(sys.argv[1]))
    failure, model = "", None
    try:
        folder, head = pickle.loads(pipe.recv_bytes())
        from megatron_rl.hf_reference.model import HfReference

        model = HfReference(folder, head)
    except Exception:
        failure = traceback.format_exc()  # told by the first call, which names what it was needed for
    pipe.send_bytes(pickle.dumps((True, None)))  # loading is over
    while True:
        try:
            verb, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        try:
            answer = (False, failure) if failure else (True, getattr(model, verb)(*args))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
