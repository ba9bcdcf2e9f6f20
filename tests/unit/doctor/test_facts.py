"""What is found of this machine, with something put there to be found."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_rl.device import has_wide_vectors
from megatron_rl.doctor.facts import Listener, NodeFacts, _wide_vectors, look, look_at_port, room


def looked(*files: Path, run_dir: Path | None = None) -> NodeFacts:
    return look(run_dir, files)


def foreign_apex(folder: Path) -> None:
    """As in the registry: a web toolkit, whose import would fail."""
    (folder / "apex").mkdir()
    (folder / "apex" / "__init__.py").write_text("from pyramid_mailer.interfaces import IMailer\n")
    (folder / "apex-0.9.10.dev0.dist-info").mkdir()
    (folder / "apex-0.9.10.dev0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\nSummary: Pyramid toolkit\n"
    )


def test_the_registrys_apex_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_apex(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = looked()
    assert found.apex is not None
    assert (found.apex.place, found.apex.summary) == (str(tmp_path / "apex"), "Pyramid toolkit")
    assert not found.apex.has_optimizers
    assert found.packages["apex"] == "0.9.10.dev0"
    (tmp_path / "apex" / "optimizers").mkdir()
    found = looked()
    assert found.apex is not None
    assert found.apex.has_optimizers


def test_half_a_transformer_engine_is_tried_and_its_error_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert looked().engine_fault is None
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise OSError('libtransformer_engine.so')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert looked().engine_fault == "OSError: libtransformer_engine.so"
    (tmp_path / "transformer_engine" / "__init__.py").write_text("")
    (tmp_path / "transformer_engine" / "pytorch.py").write_text("")
    assert looked().engine_fault is None


def test_files_are_hashed_and_those_that_are_missing_told(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("steps = 1\n")
    found = looked(recipe, tmp_path / "other.toml")
    assert found.files == {str(recipe): hashlib.sha256(b"steps = 1\n").hexdigest(), str(tmp_path / "other.toml"): None}


def test_weights_are_known_by_their_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    assert look(None, [], [tmp_path / "a", tmp_path / "b"]).sizes == {str(tmp_path / "a"): 3, str(tmp_path / "b"): None}


def test_room_for_checkpoints_counts_those_that_are_there(tmp_path: Path) -> None:
    run = tmp_path / "not" / "yet"
    before = looked(run_dir=run).disk
    assert before == pytest.approx(shutil.disk_usage(tmp_path).free, abs=1 << 30)
    (run / "checkpoints" / "step_000001").mkdir(parents=True)
    with (run / "checkpoints" / "step_000001" / "hole").open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)  # takes no room, and says that it does
    after = looked(run_dir=run).disk
    assert after is not None
    assert after - (1 << 40) == pytest.approx(before, abs=1 << 30)


def test_room_is_told_while_another_process_removes_checkpoints(tmp_path: Path) -> None:
    asked = threading.Event()

    def come_and_go() -> None:
        while not asked.is_set():
            model = tmp_path / "checkpoints" / ".partial_000001" / "policy"
            model.mkdir(parents=True)
            for number in range(20):
                (model / str(number)).touch()
            shutil.rmtree(model.parent)

    saving = threading.Thread(target=come_and_go)
    saving.start()
    try:
        rooms = [room(tmp_path) for _ in range(1500)]
    finally:
        asked.set()
        saving.join()
    assert min(rooms) == pytest.approx(shutil.disk_usage(tmp_path).free, abs=1 << 30)


def test_the_token_is_looked_for_where_ray_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    token = looked().token
    assert (token.path, token.mode) == (str(tmp_path / ".ray" / "auth_token"), None)
    (tmp_path / "mine").write_text("secret")
    (tmp_path / "mine").chmod(0o640)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mine"))
    assert looked().token.mode == 0o640
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert looked().token.path is None


def test_the_interface_of_gloo_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert looked().gloo_addresses is None
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert "127.0.0.1" in (looked().gloo_addresses or ())
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    assert looked().gloo_addresses == ()


@contextmanager
def server(*, greeting: bytes) -> Iterator[int]:
    """Something that listens, and answers whoever speaks to it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(greeting)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        thread.join(10)


@pytest.mark.parametrize(
    ("greeting", "listener"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", Listener.OTHER), (bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)), Listener.GRPC)],
)
def test_who_listens_at_a_port_is_told_by_its_answer(greeting: bytes, listener: Listener) -> None:
    with server(greeting=greeting) as number:
        port = look_at_port("127.0.0.1", number, "--port")
    assert (port.listener, port.ours) == (listener, True)
    assert look_at_port("127.0.0.1", number, "--port").listener is Listener.NOBODY


@pytest.mark.parametrize(
    ("answer", "capabilities"),
    [("echo 9.0; echo 8.0", ((9, 0), (8, 0))), ("echo '[N/A]'; echo '[N/A]'", ()), ("exit 2", ())],
)
def test_the_driver_is_told_also_where_it_does_not_know_compute_capabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, capabilities: tuple[tuple[int, int], ...]
) -> None:
    """A stand-in for nvidia-smi of a node with two GPUs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\ncase $1 in\n"
        "--query-gpu=name) echo NVIDIA H100; echo NVIDIA A100, 80 GB;;\n"
        "--query-gpu=driver_version) echo 470.57; echo 470.57;;\n"
        f"--query-gpu=compute_cap) {answer};;\nesac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = looked()
    assert (found.gpus, found.driver) == (("NVIDIA H100", "NVIDIA A100, 80 GB"), "470.57")
    assert found.capabilities == capabilities


def test_wide_vectors_are_told_as_torch_tells_them() -> None:
    assert look(None, []).wide_vectors == has_wide_vectors()


@pytest.mark.parametrize(
    ("flags", "wide"),
    [
        ("fpu avx2", False),
        ("avx512f avx512vl", False),
        ("avx512f avx512vl avx512bw avx512dq", True),
        ("amx_tile", True),
    ],
)
def test_wide_vectors_are_read_from_the_flags_of_the_cpu(flags: str, wide: bool) -> None:
    assert _wide_vectors(f"processor: 0\nflags\t\t: {flags}\n") is wide
    assert not _wide_vectors("processor: 0\n")
