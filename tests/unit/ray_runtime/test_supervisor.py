"""The supervisor by itself, without Ray."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.ray_runtime.supervisor import Supervisor


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    found = Supervisor("worker", str(tmp_path / "worker.log"), str(tmp_path / "scratch"), {})
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
