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

from megatron_rl.ray_runtime.cluster import _is_open
from tests.end_to_end.conftest import ROOT
from tests.ray_nodes import free_ports, ray_node

LAUNCH = ROOT / "examples" / "launch"


def node(environment: dict[str, str], script: str, *arguments: str) -> AbstractContextManager[None]:
    """A node of a cluster while the block runs."""
    return ray_node([LAUNCH / script, *arguments], environment, Path(environment["LOGS"]) / f"{script}.log")


def test_a_run_is_submitted_to_two_nodes(train_command: Callable[..., list[str]], tmp_path: Path) -> None:
    (port, dashboard), token = free_ports(2), tmp_path / "secrets" / "token"
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
        settings += ["ppo.critic_warmup_steps=0", "reward.pools=2"]
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
        assert not _is_open(f"127.0.0.1:{port}"), "who has no token must not get in"
    assert "succeeded" in done.stdout + done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
    assert token.read_text() not in done.stdout + done.stderr
