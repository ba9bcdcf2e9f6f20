from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import types

import pytest
from rich.console import Console

from megatron_rl import metrics
from megatron_rl.metrics import MetricLog
from megatron_rl.report import summarise


def open_log(run_dir, *, terminal=False, **settings):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=200)
    return MetricLog(run_dir, **{"total_steps": 2, "console": console} | settings), screen


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_one_record_per_step_with_means_of_repeated_names(tmp_path):
    log, _ = open_log(tmp_path / "run")
    with log, log.step(0) as step:
        step.update("update", {"policy": {"grad_norm": 1.0, "loss": 2}, "critic": {"grad_norm": 5.0}})
        step.update("update", {"policy": {"grad_norm": 3.0}})
    (record,) = records(tmp_path / "run")
    assert record["update/policy/grad_norm"] == 2.0
    assert record["update/policy/loss"] == 2.0
    assert record["update/critic/grad_norm"] == 5.0
    assert (record["step"], record["kind"], record["nonfinite"]) == (0, "step", 0)
    assert record["time"] == pytest.approx(time.time(), abs=60)
    assert "aborted" not in record


def test_phases_are_timed_and_add_up(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    log, _ = open_log(tmp_path)
    with log.step(0) as step:
        for _ in range(2):
            with step.phase("generate"):
                now += 2.0
        with step.phase("push"):
            pass
        now += 1.0
    (record,) = records(tmp_path)
    assert (record["seconds/generate"], record["seconds/push"], record["seconds/step"]) == (4.0, 0.0, 5.0)


def test_the_time_left_is_the_mean_pace_times_the_steps_left(tmp_path):
    log, _ = open_log(tmp_path, total_steps=5)
    with log.evaluation(0):
        pass
    for number in range(2):
        with log.step(number):
            time.sleep(0.02)
    evaluation, first, second = records(tmp_path)
    assert "eta_s" not in evaluation
    assert first["eta_s"] == pytest.approx(4 * first["seconds/step"])
    assert second["eta_s"] == pytest.approx(3 * (first["seconds/step"] + second["seconds/step"]) / 2)


def test_a_note_goes_to_the_console_alone(tmp_path):
    log, screen = open_log(tmp_path)
    log.note("12 prompts are left out")
    assert screen.getvalue() == "12 prompts are left out\n"
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_record_is_on_disk_when_its_step_ends(tmp_path):
    log, _ = open_log(tmp_path)
    for number in range(2):
        with log.step(number):
            pass
        assert len(records(tmp_path)) == number + 1


def test_values_that_are_not_finite_are_kept_and_counted(tmp_path):
    log, screen = open_log(tmp_path)
    with log.step(0) as step:
        step.update("policy", {"loss": math.nan, "entropy": 1.0, "ratio": math.inf})
        step.update("policy", {"loss": 1.0})
    (record,) = records(tmp_path)
    assert math.isnan(record["policy/loss"])
    assert record["policy/ratio"] == math.inf
    assert record["nonfinite"] == 2
    assert "not finite after 1 steps: policy/loss, policy/ratio" in screen.getvalue()


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_failure_says_where_it_happened_and_leaves_a_partial_record(tmp_path, kind):
    log, _ = open_log(tmp_path)

    def failing_step():
        with log.step(7) as step:
            step.update("rollout", {"score": 0.5})
            with step.phase("generate"):
                pass
            with step.phase("update"):
                raise kind("boom")

    with pytest.raises(kind) as failure:
        failing_step()
    assert failure.value.__notes__ == ["at step 7, last phase update"]
    (record,) = records(tmp_path)
    assert record["aborted"] is True
    assert record["rollout/score"] == 0.5
    assert record["seconds/update"] >= 0


def test_a_failing_source_is_a_failure_of_the_step(tmp_path):
    def source(metrics):
        raise RuntimeError("worker gone")

    log, _ = open_log(tmp_path, sources=[source])
    with pytest.raises(RuntimeError, match="worker gone") as failure, log.step(0):
        pass
    assert failure.value.__notes__ == ["at step 0, last phase (none yet)"]
    assert records(tmp_path)[0]["aborted"] is True


def test_sources_see_the_step_and_add_to_it(tmp_path):
    log, _ = open_log(tmp_path, sources=[lambda metrics: {"tokens_per_s": metrics["rollout/tokens"] / 2}])
    with log.step(0) as step:
        step.update("rollout", {"tokens": 10})
    assert records(tmp_path)[0]["tokens_per_s"] == 5.0


def test_a_resumed_run_appends_and_drops_what_it_does_again(tmp_path):
    first, _ = open_log(tmp_path)
    with first.evaluation(0):
        pass
    for number in range(3):
        with first.step(number) as step:
            step.rows("samples", [{"step": number, "run": 1}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ki')
    second, screen = open_log(tmp_path, start_step=2)
    with second.step(2) as step:
        step.rows("samples", [{"step": 2, "run": 2}])
    assert [(row["kind"], row["step"]) for row in records(tmp_path)] == [
        ("evaluation", 0),
        ("step", 0),
        ("step", 1),
        ("step", 2),
    ]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert samples == [{"step": 0, "run": 1}, {"step": 1, "run": 1}, {"step": 2, "run": 2}]
    assert "2 records of step 2 and later are superseded and dropped" in screen.getvalue()


def test_a_step_that_was_saved_before_its_record_was_cut_short_is_done_once_the_run_goes_on(tmp_path):
    first, _ = open_log(tmp_path, total_steps=3)

    def interrupted(number):
        with first.step(number) as step:
            step.update("rollout", {"accuracy": 0.5, "spread": math.nan})
            raise KeyboardInterrupt  # Ctrl-C once its checkpoint is there

    with pytest.raises(KeyboardInterrupt):
        interrupted(0)
    assert records(tmp_path)[0]["aborted"] is True
    open_log(tmp_path, start_step=1)
    (record,) = records(tmp_path)
    assert "aborted" not in record
    assert record["rollout/accuracy"] == 0.5
    assert math.isnan(record["rollout/spread"])
    assert summarise(tmp_path / "metrics.jsonl")["steps"] == 1


@pytest.mark.parametrize(
    "spoilt",
    [b"\0" * 30 + b"\n", b'{"step"\n', b"[1]\n", b"{}\n", b"\xff\xfe\n"],
    ids=["nul", "cut", "list", "no step", "no text"],
)
def test_lines_that_a_power_cut_spoilt_are_left_out_and_told(tmp_path, spoilt):
    log, _ = open_log(tmp_path)
    for number in range(2):
        with log.step(number) as step:
            step.rows("samples", [{"step": number}])
    for name in ("metrics.jsonl", "samples.jsonl"):
        first, second = (tmp_path / name).read_bytes().splitlines(keepends=True)
        (tmp_path / name).write_bytes(first + spoilt + second + spoilt + b"\0\0")
    _, screen = open_log(tmp_path, start_step=2)
    assert [record["step"] for record in records(tmp_path)] == [0, 1]
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert f"{tmp_path / name}: what cannot be read is left out, line 2, 4\n" in screen.getvalue()


def test_what_is_appended_is_on_the_disk_before_a_checkpoint_can_rely_on_it(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(os.fstat(file).st_size))
    log, _ = open_log(tmp_path)
    with log.step(0) as step:
        step.rows("samples", [{"step": 0}])
        assert synced == [len('{"step": 0}\n')]
    assert synced[1] == (tmp_path / "metrics.jsonl").stat().st_size


def test_a_full_disk_hides_no_failure_and_is_told_where_it_is_the_failure(tmp_path):
    log, _ = open_log(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RuntimeError, match="policy rank 3 was killed") as failure, log.step(3):
        raise RuntimeError("policy rank 3 was killed")
    where, lost = failure.value.__notes__
    assert where == "at step 3, last phase (none yet)"
    assert lost == f"{tmp_path}/metrics.jsonl: its record could not be written: [Errno 28] No space left on device"
    with pytest.raises(OSError, match="No space left") as full, log.step(4):
        pass
    assert full.value.__notes__ == [f"at step 4, all of which is done: {tmp_path}/metrics.jsonl could not be written"]


def test_rows_are_written_at_once(tmp_path):
    log, _ = open_log(tmp_path)
    with log.step(0) as step:
        step.rows("samples", [{"response": "1+1=2"}, {"response": "\u00bd"}])
        written = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["response"] for line in written] == ["1+1=2", "\u00bd"]


def run_two_steps(log):
    with log:
        with log.evaluation(0) as step:
            step.update("heldout", {"score": -0.5, "format_rate": 0.5, "length_mean": 20.0})
        for number in range(2):
            with log.step(number) as step:
                step.update("rollout", {"score": 0.25, "accuracy": 0.5, "format_rate": 0.75, "length_mean": 31.5})
                step.update("experience", {"kl": 0.0123, "explained_variance": 0.4, "engine_gap_mean": 3e-6})
                if number:
                    step.update("policy", {"entropy": 1.5, "clip_fraction": 0.02})
                    step.update("heldout", {"score": 0.75, "accuracy": 0.875, "length_mean": 40.0, "temperature": 0.6})


def test_the_console_shows_a_row_per_step_and_each_evaluation(tmp_path):
    log, screen = open_log(tmp_path)
    run_two_steps(log)
    lines = screen.getvalue().splitlines()
    assert lines[0].startswith(
        "held-out, greedy, after 0 of 2 steps: score -0.500, accuracy -, format 0.500, length 20.0"
    )
    assert lines[1].split() == ("step score accuracy format length KL entropy clipped expl.var gap seconds ETA".split())
    assert lines[2].split()[:10] == "1/2 +0.250 0.500 0.750 31.5 0.0123 - - +0.400 3.0e-06".split()
    assert lines[3].split()[:10] == "2/2 +0.250 0.500 0.750 31.5 0.0123 1.500 0.020 +0.400 3.0e-06".split()
    assert lines[4].startswith("held-out, sampled at 0.6, after 2 of 2 steps: score +0.750, accuracy 0.875, format -")
    assert len(lines) == 5
    assert "\x1b" not in screen.getvalue()


def test_the_console_shows_what_a_shared_device_holds_in_each_step(tmp_path):
    def ledger(_):
        return {
            "memory/train/policy/planned": 14.0,
            "memory/train/device/planned": 35.0,
            "memory/train/device/measured": 36.25,
            "memory/push/device/planned": 4.0,
            "memory/push/device/measured": 5.5,
        }

    screen = io.StringIO()
    with MetricLog(tmp_path, total_steps=2, console=Console(file=screen, width=60), sources=[ledger]) as log:
        with log.evaluation(0) as step:
            step.update("heldout", {"score": 0.0})
        for number in range(2):
            with log.step(number) as step:
                step.update("rollout", {"score": 0.25})
    told = [line for line in screen.getvalue().splitlines() if "memory" in line]
    assert told == ["memory in GiB, planned / measured: train 35.00 / 36.25, push 4.00 / 5.50"] * 2


def test_a_terminal_gets_a_progress_bar(tmp_path):
    log, screen = open_log(tmp_path, terminal=True)
    with log, log.step(0) as step, step.phase("generate"):
        time.sleep(0.15)
    assert "generate" in screen.getvalue()
    assert "1/2" in screen.getvalue()


def test_a_long_supervised_stage_shows_few_rows_and_records_all(tmp_path):
    log, screen = open_log(tmp_path, total_steps=400)
    for number in range(400):
        with log.step(number) as step:
            step.update("model", {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3})
    lines = screen.getvalue().splitlines()
    assert len(lines) == 22  # a header, the first step, and every twentieth
    assert lines[-1].split()[:4] == ["400/400", "2.0000", "1.000", "1.00e-03"]
    assert len(records(tmp_path)) == 400


def test_tensorboard_counts_the_steps_done(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log, _ = open_log(tmp_path, tensorboard=True)
    run_two_steps(log)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    def points(name):
        return [(event.step, event.value) for event in events.Scalars(name)]

    assert points("heldout/score") == [(0, -0.5), (2, 0.75)]
    assert points("rollout/score") == [(1, 0.25), (2, 0.25)]


def test_logging_never_loads_torch(tmp_path):
    program = f"""
import pathlib, sys
from megatron_rl import metrics
from megatron_rl.metrics import MetricLog
import megatron_rl.report
with MetricLog(pathlib.Path({str(tmp_path)!r}), total_steps=1, tensorboard=True) as log, log.step(0) as step:
    step.update("policy", {{"loss": 1.0}})
sys.exit(any(name in sys.modules for name in ("torch", "matplotlib", "wandb")))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_wandb_gets_the_same_scalars(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda metrics, step: calls.append((step, metrics["rollout/score"])),
        finish=lambda exit_code: calls.append("finish"),
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: calls.append(settings) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log, _ = open_log(tmp_path / "first", wandb_project="reasoning", settings={"ppo.lam": 0.9})
    with log, log.step(4) as step:
        step.update("rollout", {"score": 0.5})
    settings, *rest = calls
    first_id = settings.pop("id")
    assert settings == {
        "project": "reasoning",
        "name": "first",
        "dir": str(tmp_path / "first"),
        "resume": "allow",
        "config": {"ppo.lam": 0.9},
        "allow_val_change": True,
    }
    assert rest == [(5, 0.5), "finish"]

    calls.clear()
    for start_step in (5, 0, 6):  # goes on, starts anew, goes on from that
        open_log(tmp_path / "first", wandb_project="reasoning", start_step=start_step)[0].close()
    same, anew, after = (call["id"] for call in calls if call != "finish")
    assert same == first_id
    assert anew != first_id
    assert after == anew


def fake_wandb(monkeypatch, finish):
    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: types.SimpleNamespace(finish=finish)
    monkeypatch.setitem(sys.modules, "wandb", fake)


def test_wandb_shows_a_run_that_fails_as_failed(tmp_path, monkeypatch):
    codes = []
    fake_wandb(monkeypatch, lambda exit_code: codes.append(exit_code))
    with open_log(tmp_path, wandb_project="reasoning")[0]:
        pass
    with pytest.raises(ValueError, match="cause"), open_log(tmp_path, wandb_project="reasoning")[0]:
        raise ValueError("cause")
    assert codes == [0, 1]


def test_wandb_that_cannot_end_is_given_up_and_hides_nothing(tmp_path, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(metrics, "_WANDB_FINISH_S", 0.2)
    fake_wandb(monkeypatch, lambda exit_code: never.wait(30))
    log, screen = open_log(tmp_path, wandb_project="reasoning")
    started = time.monotonic()
    with pytest.raises(ValueError, match="cause"), log:
        raise ValueError("cause")
    never.set()
    assert time.monotonic() - started < 10
    assert "logging.wandb_project: W&B had not taken all metrics 0.2 s after the run's end" in screen.getvalue()

    def refuse(exit_code):
        raise RuntimeError("no such project")

    fake_wandb(monkeypatch, refuse)
    log, screen = open_log(tmp_path, wandb_project="reasoning")
    log.close()
    assert "logging.wandb_project: W&B did not end well: no such project" in screen.getvalue()


def test_wandb_that_cannot_be_opened_is_told_and_ends_no_run(tmp_path, monkeypatch):
    def refuse(**settings):
        raise ConnectionError("no answer from W&B")

    fake_wandb(monkeypatch, None)
    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    log, screen = open_log(tmp_path, wandb_project="reasoning")
    with log, log.step(0) as step:
        step.update("rollout", {"score": 0.5})
    told = "logging.wandb_project: W&B could not be opened and gets nothing of this run: ConnectionError: no answer"
    assert screen.getvalue().count(told) == 1
    assert records(tmp_path)[0]["rollout/score"] == 0.5


def test_what_only_shows_metrics_ends_no_run_and_the_others_get_theirs(tmp_path, monkeypatch):
    """W&B's process is gone, and TensorBoard's writer cannot be closed."""
    got, finished = [], []

    def lose(metrics, step):
        got.append(step)
        raise BrokenPipeError(32, "Broken pipe")

    def cannot_close():
        raise OSError(5, "Input/output error")

    run = types.SimpleNamespace(log=lose, finish=lambda exit_code: finished.append(exit_code))
    fake_wandb(monkeypatch, None)
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **settings: run)
    log, screen = open_log(tmp_path, tensorboard=True, wandb_project="reasoning")
    written = []
    log._sinks.reverse()
    log._fed.reverse()
    tensorboard = log._sinks[1]
    monkeypatch.setattr(tensorboard, "write", lambda metrics, steps_done: written.append(steps_done))
    monkeypatch.setattr(tensorboard._writer, "close", cannot_close)
    with log:
        for number in range(2):
            with log.step(number):
                pass
    assert got == [1]
    assert written == [1, 2]
    assert finished == [0]
    assert [record["step"] for record in records(tmp_path)] == [0, 1]
    lines = screen.getvalue()
    told = "logging.wandb_project: after 1 steps it gets nothing any more: BrokenPipeError: [Errno 32] Broken pipe"
    assert lines.count(told) == 1
    assert "logging.tensorboard: it did not end well: OSError: [Errno 5] Input/output error" in lines


@pytest.mark.parametrize("interrupted", [False, True])
def test_wandb_that_is_given_up_does_not_hold_up_the_exit(tmp_path, interrupted):
    """As W&B does: a process of its own, for whose end a hook waits when Python exits."""
    shutil.copy(shutil.which("sleep"), tmp_path / "wandb-core")
    (tmp_path / "wandb.py").write_text(
        "import atexit, subprocess, types\n"
        "def init(**settings):\n"
        "    core = subprocess.Popen(['./wandb-core', '60'])\n"
        "    atexit.register(core.wait)\n"
        "    return types.SimpleNamespace(finish=lambda exit_code: core.wait())\n"
    )
    program = (
        "import os, signal, subprocess, threading\nfrom pathlib import Path\nfrom megatron_rl import metrics\n"
        "other = subprocess.Popen(['sleep', '60'])\n"
        "log = metrics.MetricLog(Path('run'), total_steps=1, wandb_project='x')\n"
    )
    if interrupted:
        program += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        program += "threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()\n"
    else:
        program += "metrics._WANDB_FINISH_S = 0.5\n"
    program += (
        "try:\n    log.close()\nexcept KeyboardInterrupt:\n    print('interrupted')\n"
        "print('others', other.poll())\nother.kill()\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("others None\n")
    assert ("interrupted" in run.stdout) is interrupted


def test_asking_for_wandb_without_having_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match=r"logging.wandb_project is set to 'x'.*install wandb, or leave"):
        open_log(tmp_path, wandb_project="x")
