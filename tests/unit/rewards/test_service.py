"""The pool of killable workers: order, time-outs, errors, deaths, and that nothing stays behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.dataflow import Finish, Outcome, Score
from megatron_rl.rewards.answers import MAX_LENGTH, extract
from megatron_rl.rewards.rules import SeedRule
from megatron_rl.rewards.service import Request, RewardService

RULE = """
import os
import signal
import subprocess
import sys
import time

from megatron_rl.dataflow import Score

if os.environ.get("RULE_LOADS_ONLY_IN") not in (None, str(os.getpid())):
    if os.environ.get("RULE_SLEEPS"):
        time.sleep(60)
    raise ImportError("not here")

KEPT = []


def rule(text, answer, finish):
    match text[:8]:
        case "sleep   ":
            time.sleep(60)
        case "children":
            child = subprocess.Popen(["sleep", "60"])
            with open(answer, "w") as file:
                file.write(str(child.pid))
            time.sleep(60)
        case "raise   ":
            raise KeyError("a key that is missing")
        case "exit    ":
            sys.exit(3)
        case "die     ":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop    ":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "loop    ":
            while True:
                pass
        case "recurse ":
            def deeper(depth):
                return deeper(depth + 1)
            deeper(0)
        case "_exit   ":
            os._exit(0)
        case "grow    ":
            hoard = []
            while True:
                hoard.append(bytearray(64 << 20))
        case "nan     ":
            return float("nan")
        case "nan part":
            return Score(value=1.0, parts={"correct": float("nan")})
        case "keep    ":
            while True:
                KEPT.append(bytes(64 << 20))
        case "need    ":
            return len(bytes(512 << 20))
        case "pid     ":
            return os.getpid()
        case "torch   ":
            return float("torch" in sys.modules)
        case "print   ":
            print("to standard output")
            os.write(1, b"to its descriptor\\n")
            return float(sys.stdin.read() == "")
    return float(text)


rule.failure_value = -7.0
"""

TIMED_OUT = Score(value=-7.0, outcome=Outcome.TIMEOUT)
FAILED = Score(value=-7.0, outcome=Outcome.ERROR)


@pytest.fixture
def spec(tmp_path: Path) -> str:
    file = tmp_path / "rule.py"
    file.write_text(RULE)
    return f"{file}:rule"


def _requests(*texts: str) -> list[Request]:
    return [(text, "", Finish.STOP) for text in texts]


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _exists(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_scores_keep_the_order_of_the_requests() -> None:
    with RewardService("seed", workers=2) as service:
        requests = [(rf"\boxed{{{number}}}", str(number - number % 3), Finish.STOP) for number in range(200)]
        scores = service.score(requests)
        assert [score.value for score in scores] == [1.0 if number % 3 == 0 else -0.5 for number in range(200)]
        assert all(score.outcome is Outcome.SCORED for score in scores)
        assert scores[0].parts == {"correct": 1.0, "boxed": 1.0}
        service.score(requests[:1])
        assert 0.0 < service.take_busy_seconds() < 10.0
        assert service.score([]) == []
        assert service.take_busy_seconds() == 0.0
        # a formula, a lone surrogate, and more text than a pipe holds
        more = [(r"\boxed{\sqrt{8}}", r"2\sqrt{2}"), ("\ud800" + r"\boxed{1}", "1"), ("y" * 3_000_000, "1")]
        assert [score.value for score in service.score([(*pair, Finish.LENGTH) for pair in more])] == [1.0, 1.0, -1.0]


def test_a_rule_object_with_its_own_values_is_taken_as_it_is() -> None:
    with RewardService(SeedRule(right=5.0)) as service:
        assert [score.value for score in service.score([(r"\boxed{1}", "1", Finish.STOP)])] == [5.0]


def test_a_sample_that_overruns_times_out_alone(spec: str) -> None:
    with RewardService(spec, workers=2, wall_timeout_s=3.0) as service:
        service.score(_requests("0"))  # the start of the workers is not what is timed
        texts = _numbers(40)
        texts[5] = "sleep   "
        begin = time.monotonic()
        scores = service.score(_requests(*texts))
        assert 3.0 <= time.monotonic() - begin < 20.0
        assert scores[5] == TIMED_OUT
        del scores[5], texts[5]
        assert scores == [Score(value=float(text)) for text in texts]
        assert service.take_busy_seconds() >= 3.0


def test_the_clock_counts_cpu_seconds_and_not_the_wait(spec: str, caplog: pytest.LogCaptureFixture) -> None:
    with RewardService(spec, timeout_s=0.5, wall_timeout_s=3.0) as service:
        service.score(_requests("0"))
        begin = time.monotonic()
        assert service.score(_requests("loop    ", "1")) == [TIMED_OUT, Score(value=1.0)]
        assert time.monotonic() - begin >= 0.5
        worker = int(service.score(_requests("pid     "))[0].value)
        os.kill(worker, signal.SIGSTOP)  # a machine so loaded that the worker does not get to run for two limits
        threading.Timer(1.0, os.kill, (worker, signal.SIGCONT)).start()
        assert service.score(_requests("2")) == [Score(value=2.0)]
    assert [record.getMessage() for record in caplog.records] == ["1 of 2 samples timed out"]


def test_every_other_answer_of_a_hostile_batch_gets_its_verdict(spec: str) -> None:
    with RewardService(spec, workers=2, timeout_s=1.0, wall_timeout_s=3.0, memory_gib=2) as service:
        texts = _numbers(60)
        for at, text in ((3, "loop    "), (13, "stop    "), (20, "sleep   ")):
            texts[at] = text
        for at, text in ((5, "grow    "), (7, "recurse "), (11, "_exit   "), (17, "die     "), (19, "1" * 1_000_000)):
            texts[at] = text
        scores = service.score(_requests(*texts))
        assert [scores[at] for at in (3, 13, 20)] == [TIMED_OUT] * 3
        assert [scores[at] for at in (7, 11, 17, 19)] == [FAILED] * 4
        assert scores[5] in (FAILED, TIMED_OUT)  # whichever limit it meets first
        innocent = [at for at in range(60) if at not in (3, 5, 7, 11, 13, 17, 19, 20)]
        assert [scores[at] for at in innocent] == [Score(value=float(at)) for at in innocent]
        workers = {int(score.value) for score in service.score(_requests(*["pid     "] * 8))}
    assert not any(_exists(worker) for worker in workers)


BOMBS = (
    *("9^{9^{9^9}}", "10^{10^{10}}", "100000000!", r"\sqrt[9^{9^9}]{2}", r"\binom{10^9}{5\cdot10^8}", "9**9**9**9"),
    *("(1+x)^{(1+x)^{(1+x)^{9}}}", r"\sum_{n=1}^{10^{12}}\frac1n", "(" * 450 + "7" + ")" * 450, "7" * 990),
    *(r"\frac{1}{" * 90 + "7" + "}" * 90, "7" + "^7" * 400, "+".join(f"{p}^{{-3000}}" for p in range(101, 190, 2))),
)
TOO_LONG = ("(" * 5000, "7" * 1_000_000)


def test_bombs_for_the_grader_are_wrong_and_cost_no_worker() -> None:
    assert all(len(bomb) <= MAX_LENGTH and extract(rf"\boxed{{{bomb}}}") == bomb for bomb in BOMBS)
    with RewardService("boxed", timeout_s=5.0) as service:
        texts = [rf"\boxed{{{bomb}}}" for bomb in (*BOMBS, *TOO_LONG)]
        requests = [(text, gold, Finish.STOP) for text in texts for gold in ("5", r"\sqrt{2}", "x+1")]
        scores = service.score([*requests, (r"\boxed{5}", "5", Finish.STOP)])
        assert {score.outcome for score in scores} == {Outcome.SCORED}
        assert scores[-1] == Score(value=1.0, parts={"correct": 1.0, "boxed": 1.0})
        assert {score.parts["boxed"] for score in scores} == {1.0}
        assert {score.value for score in scores[:-1]} == {-0.5}


def test_one_worker_goes_on_after_a_timeout(spec: str) -> None:
    with RewardService(spec, wall_timeout_s=3.0) as service:
        scores = service.score(_requests("1", "sleep   ", "2", "stop    ", "3" + " " * 1_000_000, "4"))
        assert scores == [Score(value=1.0), TIMED_OUT, Score(value=2.0), TIMED_OUT, Score(value=3.0), Score(value=4.0)]


def test_a_rule_that_raises_gives_an_error_and_is_logged(spec: str, caplog: pytest.LogCaptureFixture) -> None:
    with RewardService(spec) as service, caplog.at_level(logging.WARNING):
        scores = service.score(
            _requests("1", "raise   ", "exit    ", "nan     ", "nan part", "no number", "2", "pid     ")
        )
        assert scores[:-1] == [Score(value=1.0), *[FAILED] * 5, Score(value=2.0)]
        assert scores[1].reason == "the rule raised KeyError: 'a key that is missing'"
        assert scores[0].reason == ""
        first_worker = scores[-1].value
        assert [score.value for score in service.score(_requests("pid     "))] == [first_worker]  # it survived all
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["5 of 8 samples could not be scored: the rule raised KeyError: 'a key that is missing'"]


def test_a_worker_that_is_full_costs_one_sample_and_no_death(spec: str, caplog: pytest.LogCaptureFixture) -> None:
    with RewardService(spec, workers=2, memory_gib=2, max_restarts=0) as service:
        texts = ["keep    ", *["need    "] * 40]
        for _ in range(2):
            assert service.score(_requests(*texts)) == [FAILED, *[Score(value=float(512 << 20))] * 40]
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 41 samples could not be scored: the rule filled its worker's memory: a worker's address space has 2 GiB "
        "by reward.memory_gib (of eval/run.py: --memory-gib)"
    ] * 2


def test_a_worker_that_dies_costs_one_sample(spec: str) -> None:
    with RewardService(spec, workers=2) as service:
        texts = _numbers(40)
        texts[7] = texts[30] = "die     "
        scores = service.score(_requests(*texts))
        assert scores == [FAILED if text == "die     " else Score(value=float(text)) for text in texts]


def test_a_worker_that_died_between_calls_costs_no_sample(spec: str) -> None:
    with RewardService(spec, max_restarts=0) as service:
        pid = int(service.score(_requests("pid     "))[0].value)
        os.kill(pid, signal.SIGKILL)
        assert _wait_until(lambda: not _exists(pid))
        assert service.score(_requests("1", "2")) == [Score(value=1.0), Score(value=2.0)]


def test_too_many_deaths_end_the_call_but_not_the_service(spec: str) -> None:
    with RewardService(spec, max_restarts=2) as service:
        with pytest.raises(
            RuntimeError, match=r"reward worker \d+ was ended by signal 9 .* at most 2 may: .* reward\.workers"
        ):
            service.score(_requests(*["die     "] * 5))
        assert service.score(_requests("1")) == [Score(value=1.0)]


def test_a_call_that_was_interrupted_leaves_no_answers_behind(spec: str) -> None:
    with RewardService(spec) as service:
        service.score(_requests("0"))

        def interrupt(number: int, frame: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            with pytest.raises(KeyboardInterrupt):
                service.score(_requests("1", "sleep   ", "2"))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert service.score(_requests("5", "6")) == [Score(value=5.0), Score(value=6.0)]


def test_a_rule_cannot_break_the_protocol_and_no_worker_loads_torch(spec: str) -> None:
    with RewardService(spec) as service:
        assert [score.value for score in service.score(_requests("print   ", "torch   ", "3"))] == [1.0, 0.0, 3.0]


def test_no_process_is_left_after_close(spec: str, tmp_path: Path) -> None:
    child_file = tmp_path / "child"
    service = RewardService(spec, workers=2, wall_timeout_s=3.0)
    scores = service.score([("children", str(child_file), Finish.STOP), *_requests(*["pid     "] * 8)])
    assert scores[0] == TIMED_OUT
    child = int(child_file.read_text())
    pids = {int(score.value) for score in scores[1:]}
    assert pids
    assert _wait_until(lambda: not _exists(child))  # what the rule started was killed with its worker
    service.close()
    service.close()
    assert not any(_exists(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="this reward service is closed"):
        service.score(_requests("1"))


def test_workers_die_with_their_parent(spec: str) -> None:
    program = (
        "import sys, time\n"
        "from megatron_rl.dataflow import Finish\n"
        "from megatron_rl.rewards.service import RewardService\n"
        "service = RewardService(sys.argv[1], wall_timeout_s=50)\n"
        "print(int(service.score([('pid     ', '', Finish.STOP)])[0].value), flush=True)\n"
        "service.score([('sleep   ', '', Finish.STOP)])\n"
    )
    root = Path(__file__).parents[3]
    parent = subprocess.Popen([sys.executable, "-c", program, spec], stdout=subprocess.PIPE, cwd=root)
    try:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert _exists(worker)
        parent.kill()
        assert _wait_until(lambda: not _exists(worker))
    finally:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()


def test_a_rule_that_only_the_worker_cannot_load_is_told(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RULE_LOADS_ONLY_IN", str(os.getpid()))
    with (
        RewardService(spec) as service,
        pytest.raises(RuntimeError, match=r"worker \d+ could not load its rule: ValueError: .*ImportError: not here"),
    ):
        service.score(_requests("1"))


def test_a_worker_that_is_not_ready_in_time_is_told(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RULE_LOADS_ONLY_IN", str(os.getpid()))
    monkeypatch.setenv("RULE_SLEEPS", "1")
    with (
        RewardService(spec, start_timeout_s=0.5) as service,
        pytest.raises(RuntimeError, match=r"worker \d+ must be ready within 0\.5 s.* reward\.start_timeout_s"),
    ):
        service.score(_requests("1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "at least 1 worker, got workers=0"),
        ({"timeout_s": 0.0}, r"above 0 seconds, got timeout_s=0\.0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardService("seed", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown reward rule 'sead'"):
        RewardService("sead")


def test_importing_the_package_loads_neither_torch_nor_sympy() -> None:
    program = (
        "import sys\n"
        "import megatron_rl.rewards.service, megatron_rl.rewards.worker, megatron_rl.rewards.rules\n"
        "print(sorted({'torch', 'sympy', 'math_verify'} & set(sys.modules)))\n"
        "from megatron_rl.rewards.answers import equal\n"
        "from megatron_rl.rewards.second_opinion import preload\n"
        "assert equal(r'\\sqrt{4}', '2')\n"
        "print(sorted({'torch', 'sympy', 'math_verify'} & set(sys.modules)))\n"
        "preload()\n"
        "print(sorted({'torch', 'sympy', 'math_verify'} & set(sys.modules)))\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "[]", "['math_verify', 'sympy']"]
