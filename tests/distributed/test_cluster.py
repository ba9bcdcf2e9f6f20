"""Starting Ray, and joining one."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.ray_runtime.sockets import long_folder
from tests.ray_nodes import free_ports, ray_node

RAY = Path(sys.executable).with_name("ray")
JOIN = """
import sys, time
from pathlib import Path
from megatron_rl.config.schema import ClusterConfig
from megatron_rl.ray_runtime.cluster import Cluster, ClusterProblem, Role

began = time.monotonic()
try:
    config = ClusterConfig(address=sys.argv[1], start_deadline_s=60, device=sys.argv[3] if sys.argv[3:] else None)
    with Cluster(config, gpus=0, run_dir=Path(sys.argv[2])) as cluster:
        print(f"seconds {time.monotonic() - began:.1f}")
        group = cluster.start([Role(name="only", workers=1)], {})["only"]
        group.build(dict, [()]).result()
        print("joined", group.call("__len__", finish=sum).result())
except ClusterProblem as problem:
    print(f"seconds {time.monotonic() - began:.1f}")
    print("refused:", problem)
"""


def test_ray_that_was_imported_too_early_to_ask_for_a_token_is_refused(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    program = (
        "import ray\nfrom pathlib import Path\nfrom megatron_rl.config.schema import ClusterConfig\n"
        "from megatron_rl.ray_runtime.cluster import Cluster\n"
        f"with Cluster(ClusterConfig(), gpus=0, run_dir=Path({str(tmp_path)!r})): pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, timeout=60, capture_output=True, text=True, check=False
    )
    assert "Ray must ask for a token" in done.stderr


STORE = """
import sys
from pathlib import Path
from megatron_rl.config.schema import ClusterConfig
from megatron_rl.ray_runtime.cluster import Cluster
import psutil, ray
with Cluster(ClusterConfig(), gpus=0, run_dir=Path(sys.argv[1])):
    store, memory = ray.cluster_resources()["object_store_memory"], psutil.virtual_memory().available
    print("store", 0 < store <= 4 << 30, store / memory < 0.5)
"""


def test_ray_starts_in_the_longest_folder_that_is_not_refused(tmp_path: Path) -> None:
    """With a pid of seven digits its sockets would have not one byte to spare."""
    below = Path(tempfile.mkdtemp(dir="/tmp"))
    folder = below / ("a" * (38 - len(str(below))))
    folder.mkdir()
    assert len(str(folder)) == 39
    assert long_folder(str(folder)) is None
    assert long_folder(f"{folder}a") is not None
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", STORE, str(tmp_path)],
            env=environment | {"TMPDIR": str(folder)},
            timeout=120,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        shutil.rmtree(below)
    assert done.stdout == "store True True\n", done.stderr


@pytest.fixture(params=["token", "disabled"])
def head(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, dict[str, str], str]]:
    """A Ray cluster started by hand, of one GPU as it says, that asks for a token or does not; its address and the
    environment of a client.
    """
    mode = str(request.param)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": mode, "RAY_USAGE_STATS_ENABLED": "0"}
    if mode == "token":
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    (port,) = free_ports(1)
    options = [
        "--head",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        "--num-cpus=2",
        "--num-gpus=1",
        "--include-dashboard=false",
    ]
    with ray_node([RAY, "start", *options, "--block"], environment, tmp_path / "head.log"):
        yield f"127.0.0.1:{port}", environment, mode


def test_a_cluster_is_joined_with_its_token_and_an_open_one_is_refused(
    head: tuple[str, dict[str, str], str], tmp_path: Path
) -> None:
    address, environment, mode = head

    def said(*device: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", JOIN, address, str(tmp_path), *device],
            env=environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": environment.get("RAY_AUTH_TOKEN", "0" * 64)},
            timeout=120,
            capture_output=True,
            text=True,
            check=False,
        )
        found = re.findall(r"seconds (\S+)", done.stdout)
        assert found, done.stderr
        if mode == "disabled":
            assert float(found[0]) < 15, "a client without a token must not be tried for the 20 s that Ray takes"
        return done.stdout + done.stderr

    if mode == "token":
        assert "joined 0" in said("cpu")
        # a driver without GPUs would lay everything out on CPUs, on nodes that have GPUs
        assert f"refused: the Ray cluster at {address} has 1 GPU(s), but the driver sees none" in said()
    else:
        assert f"refused: the Ray cluster at {address} asks for no token" in said()
