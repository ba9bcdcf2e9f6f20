"""Processes that take the part of ranks: started once per test session, used by many cases."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_rl.ray_runtime.supervisor import port_kept


class RankFailed(AssertionError):
    """A rank raised, died or did not finish; all ranks were ended."""


def _serve(connection: Connection) -> None:
    while True:
        function, args = pickle.loads(connection.recv_bytes())
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
        # a model's modules hold each other and, with them, process groups: each costs threads that poll
        gc.collect()


class Ranks:
    """Runs ``function(rank, port, *args)`` on several ranks at once.

    A fork server imports megatron-core once and each rank is forked off it before it has any thread.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.distributed.prepared"])
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """The answers of ranks 0 to ``world - 1``.

        Raises:
            RankFailed: with the traceback of the rank that failed first.
        """
        while len(self._ranks) < world:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))
        with port_kept() as kept:
            return self._answers(self._ranks[:world], kept.getsockname()[1], function, args, timeout_s)

    def _answers(
        self,
        used: list[tuple[Any, Connection]],
        port: int,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        timeout_s: float,
    ) -> list[Any]:
        world = len(used)
        for rank, (_, connection) in enumerate(used):
            connection.send_bytes(pickle.dumps((function, (rank, port, *args))))
        waiting = {connection: rank for rank, (_, connection) in enumerate(used)}
        answers: list[Any] = [None] * world
        deadline = time.monotonic() + timeout_s
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"ranks {sorted(waiting.values())} of {world} did not finish in {timeout_s} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    good, answers[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    self._fail(f"rank {rank} of {world} died")
                if not good:
                    self._fail(f"rank {rank} of {world} failed:\n{answers[rank]}")
        return answers

    def _fail(self, message: str) -> None:
        self.close()
        raise RankFailed(message)

    def close(self) -> None:
        """End all ranks; the next run starts new ones."""
        for process, connection in self._ranks:
            process.kill()
            process.join()
            connection.close()
        self._ranks.clear()
