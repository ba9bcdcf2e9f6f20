"""What the launch scripts start, and when: dry runs, and runs against stand-ins for Slurm and Ray."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from ray.dashboard.subprocesses.utils import get_socket_path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
SEED = ROOT / "examples" / "qwen2.5_math_7b"


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


def test_a_folder_for_rays_sockets_is_as_long_as_ray_lets_it_be_or_the_head_names_another() -> None:
    longest = 107 - len(get_socket_path("/ray/session_2026-01-31_23-59-59_999999_4194304/sockets", "TaskEventsHead"))
    fits, long = "/" + "a" * (longest - 1), "/" + "é" * (longest // 2)
    assert dry("ray_head.sh", "--ip", "10.0.0.1", TMPDIR=long, RAY_TMPDIR=fits).returncode == 0
    for given in ({"TMPDIR": long}, {"TMPDIR": fits, "RAY_TMPDIR": long}):
        kept = {name: value for name, value in os.environ.items() if name not in ("TMPDIR", "RAY_TMPDIR")}
        done = subprocess.run(
            [LAUNCH / "ray_head.sh", "--ip", "10.0.0.1"],
            env=kept | {"DRY_RUN": "1"} | given,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert f"must have at most {longest} bytes, found {long}: export RAY_TMPDIR=/tmp" in done.stderr


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


def test_of_a_token_that_is_a_link_the_file_counts(tmp_path: Path) -> None:
    token, link = tmp_path / "token", tmp_path / "link"
    token.write_text("secret")
    link.symlink_to(token)
    for mode, status in ((0o600, 0), (0o644, 2)):
        token.chmod(mode)
        environment = os.environ | {"RAY_AUTH_TOKEN_PATH": str(link)}
        needed = ["bash", "-c", f"source {LAUNCH / 'token.sh'} && need_token"]
        assert subprocess.run(needed, env=environment, timeout=60, check=False).returncode == status


@pytest.mark.parametrize("program", [["megatron-rl"], ["python", "-m", "megatron_rl"]], ids=["command", "module"])
@pytest.mark.parametrize("command", ["train", "sft", "check-parity", "doctor", "scale run"])
def test_what_starts_ray_is_told_where_the_cluster_is(program: list[str], command: str) -> None:
    asked = [*program, *command.split(), "x.toml"]
    assert dry("submit.sh", "--", *asked).stdout.split()[-len(asked) - 1 :] == [*asked, "cluster.address=auto"]


def test_a_command_within_another_must_be_told_by_the_user() -> None:
    within = dry("submit.sh", "--", "bash", "-c", "megatron-rl train x.toml && echo done")
    assert within.returncode == 2
    assert "give it the setting cluster.address=auto" in within.stderr
    told = dry("submit.sh", "--", "bash", "-c", "megatron-rl train x.toml cluster.address=auto && echo done")
    assert told.returncode == 0
    assert told.stdout.count("cluster.address=auto") == 1
    before = dry("submit.sh", "--", "/opt/bin/python3.12", "-u", "-m", "megatron_rl", "train", "x.toml")
    assert before.stdout.endswith("train x.toml cluster.address=auto \n")


@pytest.mark.parametrize(
    "asked", ["python eval/run.py", "megatron-rl scale plan x.toml", "megatron-rl plan train.toml"]
)
def test_what_starts_no_ray_is_left_as_it_is(asked: str) -> None:
    assert dry("submit.sh", "--", *asked.split()).stdout.endswith(f" {asked} \n")


class Asked:
    """Listens on a port, notes what each client sends, and refuses it as a proxy would."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            with connection:
                self.heard.append(connection.recv(65536).decode())
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def test_the_token_goes_to_the_dashboard_alone(tmp_path: Path) -> None:
    dashboard, proxy, another = Asked(), Asked(), Asked()
    token = tmp_path / "token"
    token.write_text("ab" * 32)
    token.chmod(0o600)
    shell = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    shell |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "http_proxy": proxy.address,
        "HTTP_PROXY": proxy.address,
        "all_proxy": proxy.address,
        "RAY_ADDRESS": another.address,
        "RAY_API_SERVER_ADDRESS": another.address,
    }
    shell.pop("RAY_AUTH_TOKEN", None)
    done = subprocess.run(
        [str(LAUNCH / "submit.sh"), "--dashboard", dashboard.address, "--", "true"],
        env=shell,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0, "the stand-in refuses everybody"
    assert [f"bearer {'ab' * 32}" in said.lower() for said in dashboard.heard] == [True], done.stderr
    assert (proxy.heard, another.heard) == ([], [])


def test_settings_of_wandb_go_with_a_job_and_its_secret_does_not() -> None:
    submit = dry("submit.sh", "--", "true", WANDB_ENTITY="my team", WANDB_MODE="offline", WANDB_API_KEY="secret")
    words = shlex.split(submit.stdout)
    assert {"WANDB_ENTITY=my team", "WANDB_MODE=offline"} < set(words[words.index("env") : words.index("bash")])
    assert "secret" not in submit.stdout
    assert "WANDB_" not in dry("submit.sh", "--", "true").stdout


def program(folder: Path, name: str, text: str) -> None:
    """A stand-in for a command, first on the PATH where ``folder`` is."""
    file = folder / name
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on the PATH; ``megatron-rl`` there prints what it was asked, word by word."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder, "megatron-rl", '#!/bin/bash\nprintf "%s\\n" "$@"\n')
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in ("COMMAND", "GPU", "SEED_EXACT", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN", "HEAD_INTERFACE"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.mark.parametrize("exact", ["", "1"])
@pytest.mark.parametrize("gpu", ["", "a100", "h100"])
@pytest.mark.parametrize("place", ["1_node", "4_nodes"])
def test_the_seeds_scripts_choose_the_files_of_the_place(stubs: Path, place: str, gpu: str, exact: str) -> None:
    chosen = {"GPU": gpu} if gpu else {}
    done = dry(str(SEED / f"simplerl_zero_{place}.sh"), "steps=2", **chosen, SEED_EXACT=exact)
    assert done.returncode == 0, done.stderr
    names = ["simplerl_zero", f"{place}_{gpu or 'a100'}", *(["seed_exact"] if exact else [])]
    files = [SEED / f"{name}.toml" for name in names]
    assert all(file.is_file() for file in files)
    asked = [*map(str, files), "steps=2"]
    if place == "1_node":
        assert done.stdout.split() == ["show-config", *asked]
    else:
        assert done.stdout.split()[-len(asked) - 3 :] == ["megatron-rl", "train", *asked, "cluster.address=auto"]
        assert str(ROOT) in done.stdout.split(), "the job runs in the checkout"


RAY = f"""#!{sys.executable}
import os, signal, socket, sys
with open(os.environ["CALLS"] + "/ray", "w") as file:
    print(*sys.argv[1:], os.getpid(), file=file)
if "FAIL" in os.environ:
    sys.exit(1)
port = int(next(word for word in sys.argv if word.startswith("--port=")).partition("=")[2])
where = next(word for word in sys.argv if word.startswith("--node-ip-address=")).partition("=")[2]
listening = socket.create_server((where, port))
signal.pause()
"""
SRUN = """#!/bin/bash
case "$*" in
  *hostname*) echo "127.0.0.1 10.0.0.9" ;;
  *"ip -4 -o address show dev ib0") echo "3: ib0    inet 127.0.0.2/16 brd 127.0.255.255 scope global ib0" ;;
  *"ip -4 -o address show dev none") ;;
  *) echo "$@" $$ >"$CALLS/srun" && exec sleep 60 ;;
esac
"""
RUN = """#!/bin/bash
for _ in {1..200}; do [ -s "$CALLS/srun" ] && break || sleep 0.1; done
printf '%s\\n' "$@"
exit "$STATUS"
"""
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames n[1-4]" ] && printf 'n%s\\n' 1 2 3 4
"""


def free_job() -> int:
    """A job's number whose port, 6400 and more, nobody uses here."""
    for number in range(1000):
        with socket.socket() as taken:
            if taken.connect_ex(("127.0.0.1", 6400 + number)):
                return 5000 + number
    raise AssertionError("every port from 6400 to 7399 is in use")


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def slurm(folder: Path, job: int, **environment: str) -> subprocess.CompletedProcess[str]:
    for name, text in (("ray", RAY), ("srun", SRUN), ("scontrol", SCONTROL), ("megatron-rl", RUN)):
        program(folder, name, text)
    given = {
        "HOME": str(folder.parent),
        "CALLS": str(folder.parent),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "n[1-4]",
        "SLURM_JOB_ID": str(job),
        "SLURM_GPUS_ON_NODE": "8",
    }
    return subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), "my recipe.toml", "steps=2"],
        env=os.environ | given | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "runs", "status"), [({}, "train", "0"), ({}, "train", "3"), ({"COMMAND": "sft"}, "sft", "0")]
)
def test_slurm_starts_a_head_and_workers_and_ends_as_the_run_does(
    stubs: Path, command: dict[str, str], runs: str, status: str
) -> None:
    job = free_job()
    address = f"127.0.0.1:{6400 + job % 1000}"
    done = slurm(stubs, job, STATUS=status, **command)
    assert done.returncode == int(status), done.stderr
    assert done.stdout.splitlines()[-4:] == [runs, "my recipe.toml", "steps=2", f"cluster.address={address}"]
    *head, head_pid = (stubs.parent / "ray").read_text().split()
    assert head[:2] == ["start", "--head"]
    assert {"--node-ip-address=127.0.0.1", f"--port={address.split(':')[1]}", "--num-gpus=8", "--block"} < set(head)
    *workers, workers_pid = (stubs.parent / "srun").read_text().split()
    assert workers == [
        *["--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--exclude=n1"],
        *[str(LAUNCH / "ray_worker.sh"), "--head", address, "--gpus", "8"],
    ]
    end = time.monotonic() + 10
    while running := [pid for pid in (head_pid, workers_pid) if alive(int(pid))]:
        assert time.monotonic() < end, f"head {head_pid}, workers {workers_pid}, and still there: {running}"
        time.sleep(0.05)
    assert not [*(stubs.parent / ".ray").iterdir()], "the token ends with the job"


def test_slurm_takes_the_interface_and_the_token_that_it_is_given_and_keeps_the_token(
    stubs: Path, tmp_path: Path
) -> None:
    token = tmp_path / "mine"
    token.write_text("secret")
    token.chmod(0o600)
    job = free_job()
    done = slurm(stubs, job, STATUS="0", HEAD_INTERFACE="ib0", RAY_AUTH_TOKEN_PATH=str(token))
    assert done.returncode == 0, done.stderr
    address = f"127.0.0.2:{6400 + job % 1000}"
    assert done.stdout.splitlines()[-1] == f"cluster.address={address}"
    assert "--node-ip-address=127.0.0.2" in (stubs.parent / "ray").read_text().split()
    assert token.read_text() == "secret"
    assert not (stubs.parent / ".ray").exists()
    done = slurm(stubs, job, HEAD_INTERFACE="none")
    assert (done.returncode, done.stderr) == (
        1,
        "slurm.sbatch: n1 must have an IPv4 address on HEAD_INTERFACE=none, found none\n",
    )


def test_slurm_says_so_where_ray_does_not_start(stubs: Path) -> None:
    done = slurm(stubs, free_job(), FAIL="1")
    assert done.returncode == 1
    assert "slurm.sbatch: Ray did not start on n1: nothing listens on 127.0.0.1:" in done.stderr
    assert not (stubs.parent / "srun").exists(), "no worker is started"
    assert "train" not in done.stdout


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
