"""Two PPO steps on Ray, megatron-core (policy TP2, critic PP2) and vLLM, and how a run ends when something is wrong."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.__main__ import main
from tests.end_to_end.conftest import PPO, OneStep

ROOT = Path(__file__).parents[2]
GRPO = PPO.with_name("grpo.toml")
Command = Callable[..., list[str]]


def records(run_dir: Path) -> list[dict[str, float]]:
    file = run_dir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # a run may be at the last one


def documented_metrics() -> list[str]:
    """Patterns of the names in the tables of docs/metrics.md; ``<...>`` stands for one part of a name."""
    rows = re.findall(r"^\| (`.*?) \| ", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    return [re.sub("<.*?>", "[^/]+", name) for row in rows for name in re.findall("`(.*?)`", row)]


def wait_for_step(
    run_dir: Path, process: subprocess.Popen[str], deadline_s: float = 180, metric: str = "rollout/score"
) -> None:
    end = time.monotonic() + deadline_s
    while not any(metric in record for record in records(run_dir)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no step was finished in time"
        time.sleep(0.2)


def process_of(run_dir: Path, worker: str) -> int:
    listed = json.loads((run_dir / "logs" / "processes.json").read_text())
    return next(int(entry["pid"]) for entry in listed if entry["worker"] == worker)


@pytest.mark.timeout(900)
def test_two_steps_whole(train_command: Command, tmp_path: Path) -> None:
    done = subprocess.run(
        train_command("steps=2", "ppo.critic_warmup_steps=0", "parity.enabled=true"),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    before = records(run)[0]
    gaps = {key: value for key, value in before.items() if key.startswith("parity/")}
    assert len(gaps) == 2 * 6
    assert max(gaps.values()) < 1e-3
    assert gaps["parity/critic_against_Hugging_Face_critic/max"] > 0, "the zero value head is not what was compared"
    assert "  engine against Hugging Face         mean" in done.stdout
    assert "policy: linear layers by megatron-core, no FP8 (Transformer Engine is not installed)" in done.stdout
    steps = [record for record in records(run) if "rollout/score" in record]
    assert [step["step"] for step in steps] == [0, 1]
    for step in steps:
        assert step["experience/engine_gap_max"] < 1e-3
        assert step["policy/grad_norm"] > 0
        assert step["critic/grad_norm"] > 0
        assert step["push/probe_max_abs"] < 1e-3
        assert step["rollout/samples"] == 64
    assert [step["rollout/policy_version"] for step in steps] == [0, 1]
    assert abs(steps[0]["experience/kl"]) < 1e-6 < abs(steps[1]["experience/kl"])
    undocumented = {key for record in records(run) for key in record} - {"step", "kind"}
    undocumented = {key for key in undocumented if not any(re.fullmatch(name, key) for name in documented_metrics())}
    assert undocumented == set()
    summary = json.loads((run / "summary.json").read_text())
    assert {"accuracy_before", "accuracy_after", "length_before", "length_after", "steps", "seconds"} <= summary.keys()
    assert summary["steps"] == 2
    for name in ("config.json", "curve.png", "samples.jsonl", "tensorboard", "checkpoints/step_000002/hf/config.json"):
        assert (run / name).exists(), name


@pytest.mark.timeout(900)
def test_a_run_without_a_critic_starts_none_and_resumes(train_command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for steps in (1, 2):
        command = [
            str(GRPO) if word == str(PPO) else word
            for word in train_command(
                f"steps={steps}",
                "policy.layout.tensor=1",
                "ppo.engine_correction=tis",
                "parity.enabled=true",
                "parity.on_resume=true",
                "data.max_prompt_tokens=22",
            )
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        # resumed, the policy is no longer the model that the run began with, but what its checkpoint holds
        assert "policy against Hugging Face" in done.stdout
        dropped = r"data\.train: \d+ prompts are longer than data\.max_prompt_tokens=22 and left out"
        assert re.search(dropped, done.stdout)
    processes = json.loads((run / "logs" / "processes.json").read_text())
    assert sorted(entry["worker"] for entry in processes) == ["engine", "policy"]
    assert sorted(path.name for path in (run / "checkpoints" / "step_000002").iterdir()) == [
        "hf",
        "manifest.json",
        "policy",
        "state.json",
    ]
    done_steps = [record for record in records(run) if "rollout/score" in record]
    assert [step["step"] for step in done_steps] == [0, 1]
    for step in done_steps:
        assert step["policy/grad_norm"] > 0
        assert step["policy/engine_weight"] == pytest.approx(1, abs=1e-4)
        assert not [key for key in step if "critic" in key or "value" in key]


@pytest.mark.parametrize(
    ("setting", "workers"),
    [
        ("engine.count=2", ["engine rank 0", "engine rank 1", "policy"]),
        pytest.param("engine.tensor=2", ["engine", "policy"], marks=pytest.mark.slow),
    ],
)
def test_one_push_serves_all_engines_and_their_workers(
    train_command: Command, tmp_path: Path, setting: str, workers: list[str]
) -> None:
    run = tmp_path / "run"
    command = [
        str(GRPO) if word == str(PPO) else word for word in train_command("steps=1", "policy.layout.tensor=1", setting)
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights go from the policy's rank 0 to 2 engine worker(s) by shared memory" in done.stdout
    processes = json.loads((run / "logs" / "processes.json").read_text())
    assert sorted(entry["worker"] for entry in processes) == workers
    (step,) = [record for record in records(run) if "rollout/score" in record]
    assert step["push/probe_max_abs"] < 1e-3
    assert step["experience/engine_gap_max"] < 1e-3
    sliced = "engine.tensor" in setting
    assert ("a push sends each of an engine's 2 workers its own slice of" in done.stdout) == sliced
    assert (step["push/bytes"] < 0.7 * step["push/tensor_bytes"]) == sliced


def test_nothing_is_written_outside_the_run(one_step: OneStep) -> None:
    assert list(one_step.home.rglob("*")) == []
    assert list(one_step.temporary.rglob("*")) == []
    assert one_step.new_in_tmp == set()


def test_an_exception_in_a_rank_ends_the_run_with_its_cause(train_command: Command, task: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(task / "model", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    done = subprocess.run(
        train_command(f"model.path={broken}"), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    told = done.stderr
    assert re.search(r"(policy rank \d|critic rank \d|engine) \(pid \d+ on .*\) failed in start", told), told
    assert "model.safetensors" in told


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("ppo.clip_lo=0.1", "did you mean ppo.clip_low?"),
        ("ppo.minibatch_samples=48", "nearest: 32"),
        ("data.train=missing.jsonl", "no such file: missing.jsonl"),
        ("policy.layout.tensor=64", "possible: [1, 2]"),
        ("policy.layout.data=32", "this machine has"),
        ("rollout.max_response_tokens=5000", "must fit the model's 512 positions"),
    ],
)
def test_bad_settings_are_told_before_anything_starts(
    train_command: Command, tmp_path: Path, setting: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, started = signal.getsignal(signal.SIGTERM), time.monotonic()
    _, _, _, *arguments = train_command(setting)
    try:
        status = main(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
    told = capsys.readouterr().err
    assert status != 0
    assert says in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - started < 20  # a run of these layouts takes as long to come up where two seconds do here


def test_the_command_itself_tells_bad_settings_before_anything_starts(train_command: Command, tmp_path: Path) -> None:
    command = train_command("ppo.clip_lo=0.1", "policy.layout.tensor=64")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "did you mean ppo.clip_low?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
