from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from eval.behaviour import behaviour, keyword_count, repeats_itself
from eval.report import AVERAGE, dynamics, embedded, load_evaluations, main
from eval.samples import SampleLog
from eval.tasks import BadInput
from megatron_rl.dataflow import Finish
from tests.unit.eval.builders import graded

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;\u2028@DATA@"


def write(folder: Path, step: int, task: str, *samples) -> None:
    place = folder / f"step_{step:06}"
    place.mkdir(parents=True, exist_ok=True)
    SampleLog(place / f"samples_{task}.jsonl").append(samples)
    settings = {"model": {"model.safetensors": [1, step]}, "source": None, "max_tokens": 3000, "rule": "correctness"}
    (place / "identity.json").write_text(json.dumps({"settings": settings, "tasks": {"math500": "aa", "zeta": "bb"}}))


@pytest.fixture
def run(tmp_path):
    """Two checkpoints on two tasks, and text that would like to be markup."""
    folder = tmp_path / "run" / "eval"
    write(folder, 4, "math500", graded("a", 0, "1", task="math500", tokens=100), graded("b", 0, None, task="math500"))
    write(folder, 4, "zeta", graded("a", 0, "2", task="zeta", tokens=30))
    cut = graded("b", 0, None, task="math500", finish=Finish.LENGTH, tokens=300, response=EVIL, question=EVIL)
    write(folder, 12, "math500", graded("a", 0, "1", task="math500", tokens=200), cut)
    write(folder, 12, "zeta", graded("a", 0, "1", task="zeta", tokens=50))
    return folder


def test_words_of_second_thoughts_are_whole_words_in_any_case():
    assert keyword_count("Wait, let me recheck. However... try again; WAIT") == 5
    assert keyword_count("the waiter rechecked") == 0


def test_a_loop_is_told_from_prose():
    words = [f"word{n}" for n in range(40)]
    assert not repeats_itself(" ".join(words))
    assert repeats_itself("so the answer is that the answer is 3 and " * 8)
    assert not repeats_itself("too short")
    # 10 runs, 7 across the seam, and the first 5 again: 22 runs, 5 of them repeated
    assert not repeats_itself(" ".join(words[:17] + words[:12]))


def test_behaviour_by_hand():
    found = behaviour(
        [
            graded("a", 0, "1", tokens=10, response="wait, wait \\boxed{1}"),
            graded("b", 0, "2", tokens=20),
            graded("c", 0, None, tokens=60, finish=Finish.LENGTH, response="on and on and on " * 20),
        ]
    )
    assert (found.accuracy, found.length, found.length_right, found.length_wrong) == (1 / 3, 30, 10, 40)
    assert (found.length_stopped, found.clip_ratio, found.stop_ratio) == (15, pytest.approx(1 / 3), 2 / 3)
    assert (found.box_ratio, found.repeat_ratio, found.keywords) == (2 / 3, 1 / 3, 2 / 3)
    assert behaviour([graded("a", 0, "1")]).length_wrong is None


def test_dynamics_are_by_task_and_step_with_a_plain_average(run):
    found = dynamics(load_evaluations(run))
    assert list(found) == [AVERAGE, "math500", "zeta"]
    assert {step: value.accuracy for step, value in found["math500"].items()} == {4: 0.5, 12: 0.5}
    assert {step: value.accuracy for step, value in found[AVERAGE].items()} == {4: 0.25, 12: 0.75}
    assert {step: value.length for step, value in found[AVERAGE].items()} == {4: 42.5, 12: 150}
    assert found[AVERAGE][12].length_wrong == 300  # of the one task that has wrong ones
    assert found[AVERAGE][12].clip_ratio == 0.25


def test_checkpoints_with_different_tasks_are_not_averaged(run):
    write(run, 20, "math500", graded("a", 0, "1", task="math500"))
    with pytest.raises(BadInput, match=r"on the same tasks, found step 4: math500, zeta; .* step 20: math500"):
        dynamics(load_evaluations(run))


def test_an_evaluation_that_lacks_samples_of_the_others_is_refused_by_its_step(run):
    write(run, 20, "math500", graded("a", 0, "1", task="math500"))
    write(run, 20, "zeta", graded("a", 0, "1", task="zeta"))
    with pytest.raises(BadInput, match=r"step 20 has 1 of 2 samples of math500.*eval/run\.py"):
        dynamics(load_evaluations(run))
    write(run, 20, "math500", graded("b", 0, "1", task="math500"))
    assert list(dynamics(load_evaluations(run))["math500"]) == [4, 12, 20]
    write(run, 4, "zeta", graded("a", 1, "1", task="zeta"))
    with pytest.raises(BadInput, match=r"step 12 has 1 of 2 samples of zeta; step 20 has 1 of 2 samples of zeta"):
        dynamics(load_evaluations(run))


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("settings", {"max_tokens": 16000}, "max_tokens"),
        ("settings", {"releases": {"vllm": "0.1"}}, "releases"),
        ("tasks", {"zeta": "cc"}, "data of zeta"),
    ],
)
def test_checkpoints_that_were_evaluated_by_different_protocols_are_refused(run, part, change, told, capsys):
    file = run / "step_000012" / "identity.json"
    identity = json.loads(file.read_text())
    file.write_text(json.dumps(identity | {part: identity[part] | change}))
    assert main([str(run)]) == 2
    assert f"by the same protocol, step 12 differs from step 4 in {told}; evaluate" in capsys.readouterr().err
    assert not (run / "dynamics.json").exists()


def test_a_checkpoint_that_does_not_say_how_it_was_evaluated_is_refused_among_others(run):
    (run / "step_000012" / "identity.json").unlink()
    with pytest.raises(BadInput, match=r"step_000012: every checkpoint must say how .* no identity\.json"):
        load_evaluations(run)
    shutil.rmtree(run / "step_000004")
    assert list(load_evaluations(run)) == [12]


def test_one_evaluation_is_a_report_too_and_nothing_is_an_error(run, tmp_path, capsys):
    assert main([str(run / "step_000004"), "--output", str(tmp_path / "one")]) == 0
    assert json.loads((tmp_path / "one" / "dynamics.json").read_text())[AVERAGE].keys() == {"0"}
    assert main([str(tmp_path / "one")]) == 2
    assert "no step_*/samples_*.jsonl" in capsys.readouterr().err


def test_the_report_is_written_beside_the_evaluations(run):
    assert main([str(run)]) == 0
    assert (run / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "dynamics.json").read_text())["zeta"]["12"]["length"] == 50
    page = (run / "report.html").read_text()
    assert "<title>Evaluation of run</title>" in page
    assert "All 6 samples." in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert main([str(run), "--problems", "1"]) == 0
    assert "4 of 6 samples" in (run / "report.html").read_text()


def test_a_report_is_replaced_in_one_move(run):
    assert main([str(run)]) == 0
    files = [run / name for name in ("dynamics.json", "dynamics.png", "report.html")]
    before = [file.stat().st_ino for file in files]
    assert main([str(run)]) == 0
    assert all(file.stat().st_ino != old for file, old in zip(files, before, strict=True))  # not written over


def test_model_text_cannot_leave_its_place(run):
    assert main([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2
    assert "onerror" in page
    assert "<img src=x" not in page
    data = page.partition('type="application/json">')[2].partition("</script>")[0]
    assert [row["response"] for row in json.loads(data) if row["finish"] == "length"] == [EVIL]
    assert json.loads(embedded({"a": "<&>"})) == {"a": "<&>"}


def browse(page: Path, view: str, profile: Path) -> str:
    """The document as a real browser leaves it."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom"]
    url = f"{page.as_uri()}#{view}"
    return subprocess.run([*command, url], capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium, or CHROMIUM=PATH")
@pytest.mark.parametrize(
    ("view", "listed"),
    [
        ("", ["right", "no box", "wrong", "right", "truncated", "right"]),
        ("verdict=wrong", ["no box", "wrong", "truncated"]),
        ("verdict=truncated", ["truncated"]),
        ("verdict=no+box", ["no box", "truncated"]),
        ("verdict=right&checkpoint=step+12", ["right", "right"]),
        ("task=zeta", ["wrong", "right"]),
        ("text=onerror", ["truncated"]),
        ("task=nonsense&nothing=1", ["right", "no box", "wrong", "right", "truncated", "right"]),
    ],
)
def test_samples_are_filtered_in_a_browser(run, tmp_path, view, listed):
    assert main([str(run)]) == 0
    dom = browse(run / "report.html", view, tmp_path / "profile")
    found = re.findall(r"<summary><b>([^<]*)</b>", dom)
    kinds = ("truncated", "no box", "wrong", "right")
    assert [next(kind for kind in kinds if kind in marks) for marks in found] == listed
    assert f'id="count">{len(listed)} of 6 samples' in dom
    assert "<title>Evaluation of run</title>" in dom
    if "truncated" in listed:
        assert f"<pre>{html.escape(EVIL, quote=False)}</pre>" in dom
