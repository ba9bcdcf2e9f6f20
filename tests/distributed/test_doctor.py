"""The doctor asks the nodes of a running cluster."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

import megatron_rl
from tests.ray_nodes import free_ports, ray_node

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """A cluster of two nodes: the first one runs this package, the second one, named ``other``, a copy of it."""

    address: str
    environment: dict[str, str]
    copy: Path


def named(host: str) -> list[str]:
    """What starts a program that takes its host's name for ``host``."""
    apart = ["unshare", "--uts"] if os.getuid() == 0 else ["unshare", "--user", "--map-root-user", "--uts"]
    command = [*apart, "sh", "-c", 'hostname "$0" && exec "$@"', host]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespace for host names may be made here, so two nodes cannot have two names")
    return command


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    other = named("other")
    package = tmp_path / "elsewhere" / "megatron_rl"
    shutil.copytree(Path(megatron_rl.__file__).parent, package)
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    # what a node is told of its interfaces is looked at, and other tests tell this process
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "GLOO_"))}
    environment = kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    start, (port,) = [RAY, "start", "--num-cpus=1", "--block"], free_ports(1)
    address = f"127.0.0.1:{port}"
    head = [*start, "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=false"]
    with ExitStack() as stack:
        for command, path in ((head, ROOT), ([*other, *start, f"--address={address}"], package.parent)):
            log = tmp_path / f"{path.name}.log"
            stack.enter_context(ray_node(command, environment | {"PYTHONPATH": str(path)}, log))
        yield Nodes(address=address, environment=environment, copy=package)


def doctor(nodes: Nodes, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rl", "doctor", "--cluster", nodes.address],
        cwd=nodes.copy.parents[1],
        env=nodes.environment | {"PYTHONPATH": str(ROOT)} | environment,
        timeout=200,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def findings(told: str) -> list[str]:
    """All but those on names of hosts, to which no address leads."""
    found = [line for line in told.splitlines() if line.startswith(("error ", "warning "))]
    names = [line for line in found if " host name on " in line]
    assert any("host name on other: the host's name must lead to an address" in line for line in names), told
    return [line for line in found if line not in names]


def test_what_differs_on_a_node_is_told_with_its_name(nodes: Nodes) -> None:
    _, told = doctor(nodes)
    assert findings(told) == []
    assert f"looked at {socket.gethostname()}, other" in told
    assert "not checked: clocks" not in told
    (nodes.copy / "ppo.py").write_text("# another commit\n")
    package = nodes.copy.with_name("xxhash-0.0.1.dist-info")
    package.mkdir()
    (package / "METADATA").write_text("Name: xxhash\nVersion: 0.0.1\n")
    status, told = doctor(nodes)
    assert status == 1
    code, packages = findings(told)
    assert code.startswith(f"error    code on other: megatron_rl must be that of {socket.gethostname()}")
    assert packages.startswith("warning  packages on other: must be those of ")
    assert "found xxhash 0.0.1 (not " in packages
    (nodes.copy / "doctor" / "facts.py").unlink()  # a checkout from before there was a doctor
    status, told = doctor(nodes)
    assert status == 1
    silent = next(line for line in told.splitlines() if line.startswith("error    node on other: "))
    assert "does not say what it has: " in silent
    assert "megatron_rl.doctor.facts" in silent
    status, told = doctor(nodes, RAY_AUTH_TOKEN_PATH=str(nodes.copy / "none"))
    assert status == 1
    assert "a cluster asks for a token" in told
    assert "the cluster is not asked without a token" in told
