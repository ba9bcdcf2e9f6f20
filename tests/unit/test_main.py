"""What signals do to a run, and what it leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rl.__main__ import _say_room, _say_unsaved, _sft, _Termination, _train, main
from megatron_rl.config.load import ConfigError
from megatron_rl.config.schema import RewardConfig
from megatron_rl.model_dims import dims_from_config
from tests.fakes import fake_config, fake_supervised

ROOT = Path(__file__).parents[2]


def test_the_first_sigterm_asks_and_the_second_stops_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = _Termination()
    signal.signal(signal.SIGTERM, stop)
    try:
        assert not stop.asked
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked
        assert "finishing this step and saving it" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interrupt_of_a_run_that_was_failing_does_not_hide_the_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object, *, fresh: bool) -> None:
        try:
            error = RuntimeError("policy rank 3 was killed")
            error.add_note("at step 7, last phase update")
            raise error
        finally:
            try:
                raise KeyboardInterrupt
            finally:
                raise KeyboardInterrupt

    monkeypatch.setattr("megatron_rl.__main__._train", fail)
    monkeypatch.setattr("megatron_rl.__main__.load", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["train", "steps=1"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == (
        "megatron-rl: interrupted\nafter RuntimeError: policy rank 3 was killed\nat step 7, last phase update\n"
    )


def test_a_run_says_what_checkpoints_take_and_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = fake_config(tmp_path)
    config = replace(config, checkpoint=replace(config.checkpoint, keep=2, keep_weights=8))
    dims = dims_from_config(json.loads((ROOT / "examples/beyond_7b/models/qwen2.5_math_7b/config.json").read_text()))
    monkeypatch.setattr("megatron_rl.__main__._sizes", lambda config: dims)
    policy, critic = 7_615_616_512, 7_615_616_512 - 152_064 * 3584 + 3585
    weight, rest = (4, 8) if config.model.dtype == "float32" else (2, 12)
    whole = (policy + critic) * (weight + rest) + policy * weight
    takes = (3 * whole + 8 * policy * weight) / 2**30
    for free in (2**30, 2**50):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        _say_room(config)
    enough, few = capsys.readouterr()
    assert few == f"megatron-rl: checkpoints take up to {takes:.1f} GiB, run_dir has room for 1.0 GiB\n"
    assert enough == f"checkpoints take up to {takes:.1f} GiB, run_dir has room for 1048576.0 GiB\n"


def test_a_long_run_that_saves_nothing_before_its_end_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for config in (fake_config(tmp_path, steps=50), fake_supervised(tmp_path, steps=50)):
        _say_unsaved(config)
        assert capsys.readouterr().out.startswith("checkpoint.every is 0: nothing is saved before the last of 50 steps")
        _say_unsaved(replace(config, steps=49))
        _say_unsaved(replace(config, checkpoint=replace(config.checkpoint, every=10)))
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("early", "done"), [(True, 0), (False, 4), (False, 9)])
def test_a_run_leaves_its_summary_and_says_where_it_stopped_whatever_records_are_lost(
    early: bool, done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = fake_config(tmp_path, steps=9)

    @contextmanager
    def open_run(config: object, stop: _Termination) -> Iterator[object]:
        stop.asked = early
        yield SimpleNamespace(start_step=3)

    def train(run: object) -> int:
        records = [{"step": step, "kind": "step", "nonfinite": 0, "rollout/score": 0.5} for step in range(3)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return done

    monkeypatch.setattr("megatron_rl.__main__._say_room", lambda config: None)
    monkeypatch.setattr("megatron_rl.assemble.open_run", open_run)
    monkeypatch.setattr("megatron_rl.ppo.train", train)
    before = signal.getsignal(signal.SIGTERM)
    try:
        _train(config, fresh=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    starting, up, *lines = capsys.readouterr().out.splitlines()
    assert starting == (
        f"starting Ray and 3 workers (policy x 1, critic x 1, engine x 1); what they print goes to {tmp_path}/logs"
    )
    assert up.startswith("all of it is up after ")
    if early:
        assert lines == ["stopped as asked before step 4 of 9"]
        assert list(tmp_path.iterdir()) == []
    elif done == 9:
        assert lines[0].split() == ["steps", "9"]
        assert "stopped_after_step" not in json.loads((tmp_path / "summary.json").read_text())
    else:
        assert lines[0] == "stopped as asked after step 4 of 9; the same command goes on from there"
        assert lines[-1] == f"{tmp_path} has summary.json, curve.png, metrics.jsonl"
        assert json.loads((tmp_path / "summary.json").read_text())["stopped_after_step"] == 4
        assert (tmp_path / "curve.png").is_file()


@pytest.mark.parametrize(
    ("early", "done", "says"),
    [
        (True, None, "stopped as asked before step 4 of 9"),
        (False, 5, "stopped as asked after step 5 of 9; the same command goes on from there"),
        (False, 9, "the model is in {output}"),
    ],
)
def test_a_supervised_stage_leaves_its_summary_and_says_where_it_stopped(
    early: bool,
    done: int | None,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = fake_supervised(tmp_path, steps=9)

    @contextmanager
    def open_supervised(config: object, stop: _Termination) -> Iterator[object]:
        if early:
            signal.raise_signal(signal.SIGTERM)
        yield SimpleNamespace(start_step=3)

    monkeypatch.setattr("megatron_rl.__main__._say_room", lambda config: None)
    monkeypatch.setattr("megatron_rl.assemble.open_supervised", open_supervised)

    def supervise(run: object) -> int | None:
        records = [{"step": n, "kind": "step", "nonfinite": 0, "model/loss": 9.0 - n} for n in range(done or 0)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return done

    monkeypatch.setattr("megatron_rl.sft.supervise", supervise)
    before = signal.getsignal(signal.SIGTERM)
    try:
        _sft(config, fresh=True)
        if done is None:
            assert list(tmp_path.iterdir()) == []
        else:
            summary = json.loads((tmp_path / "summary.json").read_text())
            assert (summary["loss_first"], summary["loss_last"]) == (9.0, 10.0 - done)
            assert summary.get("stopped_after_step") == (done if done < 9 else None)
        (tmp_path / "left").touch()
        with pytest.raises(ConfigError, match="--fresh needs an empty folder"):
            _sft(config, fresh=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().out.splitlines()[1:] == [says.format(output=config.output)]


def test_settings_may_stand_behind_an_option() -> None:
    recipe = ["plan", "examples/beyond_7b/qwen2.5_14b.toml", "--device", "h200"]

    def told(*more: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "megatron_rl", *recipe, *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr

    status, text = told("engine.count=9", "engine.tensor=1")
    assert status == 0, text
    assert text != told()[1]
    assert told("steps=7", "nonsense", "--nonsense=1")[0] == 2
    assert "unrecognized arguments: nonsense --nonsense=1" in told("nonsense", "--nonsense=1")[1]


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("sed", "reward.rule: unknown reward rule 'sed': it must be one of seed, "),
        ("absent.py:f", "reward.rule: reward rule absent.py:f: there is no such file"),
        ("mine.py:g", "reward.rule: reward rule "),
    ],
)
def test_a_rule_that_cannot_be_loaded_is_told_before_anything_starts(
    rule: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def f(text, answer, finish):\n    return 0.0\n")
    config = fake_config(tmp_path / "run", reward=RewardConfig(rule=rule))
    with pytest.raises(ConfigError) as refused:
        _train(config, fresh=False)
    assert says in str(refused.value).replace(f"{tmp_path}/", "")
    assert capsys.readouterr().out == ""
    assert not config.run_dir.exists()
