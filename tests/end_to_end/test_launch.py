"""A cluster of two nodes, started and used by the scripts that users start theirs with."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT
from tests.ray_nodes import free_port, ray_node

LAUNCH = ROOT / "examples" / "launch"


def dry(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LAUNCH / script), *arguments],
        env=os.environ | {"DRY_RUN": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_addresses_ports_and_gpus_are_arguments() -> None:
    head = dry("ray_head.sh", "--ip", "10.0.0.1", "--port", "7000", "--gpus", "8")
    assert head.stdout.split() == [
        *["ray", "start", "--head", "--node-ip-address=10.0.0.1", "--port=7000", "--dashboard-host=127.0.0.1"],
        *["--dashboard-port=8265", "--disable-usage-stats", "--object-store-memory=4294967296", "--num-gpus=8"],
    ]
    worker = dry("ray_worker.sh", "--head", "10.0.0.1:7000", "--gpus", "8")
    assert worker.stdout.split() == [
        *["ray", "start", "--address=10.0.0.1:7000", "--disable-usage-stats", "--object-store-memory=4294967296"],
        "--num-gpus=8",
    ]
    submit = dry("submit.sh", "--", "megatron-rl", "train", "my recipe.toml")
    assert "megatron-rl train my\\ recipe.toml cluster.address=auto" in submit.stdout
    assert "doctor x.toml cluster.address=auto" in dry("submit.sh", "--", "megatron-rl", "doctor", "x.toml").stdout
    assert "cluster.address" not in dry("submit.sh", "--", "python", "eval/run.py").stdout


@pytest.mark.parametrize("script", ["ray_head.sh", "ray_worker.sh", "submit.sh", "single_node.sh"])
def test_what_is_missing_is_named(script: str) -> None:
    done = dry(script)
    assert done.returncode == 2
    assert script in done.stderr


@pytest.mark.parametrize(("command", "runs"), [({}, "train"), ({"COMMAND": "sft"}, "sft")])
def test_a_single_node_trains_unless_it_is_told_to_supervise(
    command: dict[str, str], runs: str, tmp_path: Path
) -> None:
    (tmp_path / "megatron-rl").write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    (tmp_path / "megatron-rl").chmod(0o755)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    assert dry("single_node.sh", "my recipe.toml", "steps=1", DRY_RUN="", **path, **command).stdout == (
        f"{runs}|my recipe.toml|steps=1|"
    )


def test_a_token_that_others_may_read_is_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    done = dry("ray_worker.sh", "--head", "127.0.0.1:1", DRY_RUN="", RAY_AUTH_TOKEN_PATH=str(token))
    assert done.returncode == 2
    assert "its mode is 644: chmod 600 it" in done.stderr
    done = dry("ray_worker.sh", "--head", "127.0.0.1:1", DRY_RUN="", RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"))
    assert done.returncode == 2
    assert "ray_head.sh makes it on the head" in done.stderr


def node(environment: dict[str, str], script: str, *arguments: str) -> AbstractContextManager[None]:
    """A node of a cluster while the block runs."""
    return ray_node([LAUNCH / script, *arguments], environment, Path(environment["LOGS"]) / f"{script}.log")


def test_a_run_is_submitted_to_two_nodes(train_command: Callable[..., list[str]], tmp_path: Path) -> None:
    port, dashboard, token = free_port(), free_port(), tmp_path / "secrets" / "token"
    folder = tempfile.mkdtemp()  # a short path: Ray's sockets lie below
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": folder,
        "BLOCK": "1",
        "RAY_OBJECT_STORE_BYTES": str(100 << 20),
        "LOGS": str(tmp_path),
    }
    environment.pop("RAY_AUTH_TOKEN", None)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        where = ("--ip", "127.0.0.1", "--port", str(port), "--dashboard-port", str(dashboard))
        stack.enter_context(node(environment, "ray_head.sh", *where, "--cpus", "1", "--gpus", "0"))
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        stack.enter_context(node(environment, "ray_worker.sh", "--head", f"127.0.0.1:{port}", "--cpus", "1"))
        # each node has room for two of the five processes alone
        settings = ["steps=1", "policy.layout.tensor=1", "critic.layout.pipeline=1", "cluster.cpus_per_worker=0.5"]
        settings += ["reward.pools=2"]
        done = subprocess.run(
            [
                str(LAUNCH / "submit.sh"),
                "--dashboard",
                f"http://127.0.0.1:{dashboard}",
                "--",
                *train_command(*settings),
            ],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        unknown = subprocess.run(
            [sys.executable, "-c", "import sys, ray; ray.init(address=sys.argv[1])", f"127.0.0.1:{port}"],
            env=environment | {"RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert unknown.returncode != 0, "who has no token must not get in"
    assert "succeeded" in done.stdout + done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
    assert token.read_text() not in done.stdout + done.stderr
