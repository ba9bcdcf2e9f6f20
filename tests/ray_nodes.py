"""Nodes of Ray clusters, each ended by itself: ``ray stop`` would end every cluster of the machine."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_START_S = 60


def free_ports(count: int) -> list[int]:
    """Different ones, outside of what the kernel gives to whoever asks for any and of what Ray gives to its workers: so
    nobody takes one before it is used.
    """
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [port for port in range(1024, 1 << 16) if not (first <= port <= last or 10_000 <= port < 20_000)]
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            probe, port = held.enter_context(socket.socket()), secrets.choice(ports)
            with suppress(OSError):  # taken
                probe.bind(("", port))
                found.append(port)
    return found


@contextmanager
def ray_node(command: Sequence[str | Path], environment: Mapping[str, str], log: Path) -> Iterator[None]:
    """A node while the block runs; the command is ``ray start --block``, or becomes it."""
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        end = time.monotonic() + _START_S
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
