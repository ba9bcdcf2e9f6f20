"""What the launch scripts start, and when, by dry runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize("script", ["ray_head.sh", "ray_worker.sh", "submit.sh", "single_node.sh"])
def test_what_is_missing_is_named(script: str) -> None:
    done = dry(script)
    assert done.returncode == 2
    assert script in done.stderr


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


@pytest.mark.parametrize("program", [["megatron-rl"], ["python", "-m", "megatron_rl"]], ids=["command", "module"])
@pytest.mark.parametrize("command", ["train", "sft", "check-parity", "doctor", "scale run"])
def test_what_starts_ray_is_told_where_the_cluster_is(program: list[str], command: str) -> None:
    asked = [*program, *command.split(), "x.toml"]
    assert dry("submit.sh", "--", *asked).stdout.split()[-len(asked) - 1 :] == [*asked, "cluster.address=auto"]


@pytest.mark.parametrize(
    "asked", ["python eval/run.py", "megatron-rl scale plan x.toml", "megatron-rl plan train.toml"]
)
def test_what_starts_no_ray_is_left_as_it_is(asked: str) -> None:
    assert dry("submit.sh", "--", *asked.split()).stdout.endswith(f" {asked} \n")
