"""The doctor asks the nodes of a running cluster."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import megatron_rl

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
_START_S = 60


@dataclass(frozen=True, kw_only=True)
class Head:
    """A cluster of one node, which runs a copy of the package."""

    address: str
    environment: dict[str, str]
    package: Path


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    package = tmp_path / "elsewhere" / "megatron_rl"
    shutil.copytree(Path(megatron_rl.__file__).parent, package)
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_NUM_REDIS_GET_RETRIES"] = "2"  # a client without a token, which must fail, tries once a second
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ["--head", "--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}", "--num-cpus=1"]
    log = tmp_path / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [RAY, "start", *options, "--include-dashboard=false", "--block"],
            env=environment | {"PYTHONPATH": str(package.parent)},
            stdout=output,
            stderr=output,
        )
    try:
        end = time.monotonic() + _START_S
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield Head(address=address, environment=environment, package=package)
    finally:
        process.terminate()  # ends this cluster alone; ray stop would end every cluster of the machine
        process.wait(30)


def doctor(head: Head, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rl", "doctor", "--cluster", head.address],
        cwd=head.package.parents[1],
        env=head.environment | {"PYTHONPATH": str(ROOT)} | environment,
        timeout=200,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_node_with_the_same_code_passes_and_one_with_other_code_is_named(head: Head) -> None:
    status, told = doctor(head)
    assert status == 0, told
    assert "not checked: clocks" not in told
    (head.package / "ppo.py").write_text("# another commit\n")
    status, told = doctor(head)
    assert status == 1
    assert f"error    code on {socket.gethostname()}: megatron_rl must be that of {socket.gethostname()}" in told
    (head.package / "doctor" / "facts.py").unlink()  # a checkout from before there was a doctor
    status, told = doctor(head)
    assert status == 1
    assert f"error    node on {socket.gethostname()}: does not say what it has: " in told
    assert "megatron_rl.doctor.facts" in told
    status, told = doctor(head, RAY_AUTH_TOKEN_PATH=str(head.package / "none"))
    assert status == 1
    assert "a cluster asks for a token" in told
    assert "the cluster is not asked without a token" in told
