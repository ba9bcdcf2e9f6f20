"""Values of the built-in rules, and how a rule of one's own is loaded."""

from __future__ import annotations

import math
import pickle
import time
from pathlib import Path

import pytest

from megatron_rl.dataflow import Finish, Outcome, Score
from megatron_rl.rewards.answers import extract
from megatron_rl.rewards.rules import RULES, BoxedRule, CorrectnessRule, SeedRule, load_rule
from megatron_rl.rewards.structure import Leniency


@pytest.mark.parametrize(
    ("text", "answer", "value", "correct", "boxed"),
    [
        (r"So $\boxed{118}$.<|im_end|><|endoftext|>", "118", 1.0, 1, 1),
        (r"So $\boxed{117}$.", "118", -0.5, 0, 1),
        ("The answer is 118.", "118", -1.0, 0, 0),
        ("The final answer is $118$. I hope it is correct.", "118", -1.0, 0, 0),
        ("", "118", -1.0, 0, 0),
        (r"I give up.<|im_end|>\boxed{118}", "118", -1.0, 0, 0),
        (r"\boxed{118}</s>\boxed{1}", "118", 1.0, 1, 1),
        (r"\boxed{1} no wait \boxed{118}", "118", 1.0, 1, 1),
        (r"\boxed{118} no wait \boxed{1}", "118", -0.5, 0, 1),
        ("I should have boxed 118", "118", 1.0, 1, 1),
        ("I have not boxed anything", "118", -0.5, 0, 1),
        (r"\boxed{\frac{1}{2", r"\frac{1}{2}", 1.0, 1, 1),
        (r"\boxed{}", "118", -0.5, 0, 1),
        (r"\fbox{118}", "118", -1.0, 0, 0),
        (r"\boxed{0.25}", r"\frac{1}{4}", 1.0, 1, 1),
        (r"\boxed{1,234}", "1234", 1.0, 1, 1),
        (r"\boxed{30\text{ minutes}}", "30", 1.0, 1, 1),
        (r"\boxed{x=5}", "5", 1.0, 1, 1),
        # where ours is exact and the original is not, or the original cannot match its own reference
        (r"\boxed{50}", "0.5", -0.5, 0, 1),
        (r"\boxed{10001}", "10000", -0.5, 0, 1),
        (r"\boxed{[1,2)}", "(1,2)", -0.5, 0, 1),
        (r"\boxed{2\text{ inches}}", r"2\text{ inches}", 1.0, 1, 1),
    ],
)
def test_seed_rule(text: str, answer: str, value: float, correct: int, boxed: int) -> None:
    expected = Score(value=value, outcome=Outcome.SCORED, parts={"correct": correct, "boxed": boxed})
    assert RULES["seed"](text, answer, Finish.STOP) == expected
    assert RULES["seed"](text, answer, Finish.LENGTH) == expected


@pytest.mark.parametrize(
    ("text", "boxed_value", "correctness_value", "correct", "boxed"),
    [
        (r"\boxed{118}", 1.0, 1.0, 1, 1),
        (r"\fbox{118}", 1.0, 1.0, 1, 1),
        (r"\boxed{117}", -0.5, 0.0, 0, 1),
        ("boxed 118", -1.0, 0.0, 0, 0),
        (r"\boxed{118", -1.0, 0.0, 0, 0),
        (r"\boxed{}", -1.0, 0.0, 0, 0),
        ("118", -1.0, 0.0, 0, 0),
        (r"no<|endoftext|>\boxed{118}", -1.0, 0.0, 0, 0),
    ],
)
def test_rules_that_need_a_real_box(
    text: str, boxed_value: float, correctness_value: float, correct: int, boxed: int
) -> None:
    parts = {"correct": correct, "boxed": boxed}
    assert RULES["boxed"](text, "118", Finish.STOP) == Score(value=boxed_value, parts=parts)
    assert RULES["correctness"](text, "118", Finish.STOP) == Score(value=correctness_value, parts=parts)


def test_failure_values_and_names() -> None:
    assert {name: rule.failure_value for name, rule in RULES.items()} == {
        "seed": -0.5,
        "seed_exact": -0.5,
        "boxed": -0.5,
        "format": 0.0,
        "final_answer": 0.0,
        "correctness": 0.0,
    }
    assert all(load_rule(name) is rule for name, rule in RULES.items())
    assert BoxedRule(wrong=-0.1).failure_value == -0.1


def test_format_counts_the_box_and_not_the_answer() -> None:
    scores = [RULES["format"](text, "5", Finish.STOP) for text in (r"\boxed{5}", r"\boxed{6}", r"\boxed{}", "5")]
    assert [score.value for score in scores] == [1.0, 1.0, 0.0, 0.0]
    assert [score.parts["correct"] for score in scores] == [1.0, 0.0, 0.0, 0.0]


def test_a_rule_forgives_what_its_data_set_does() -> None:
    lenient = Leniency(relative=0.01)
    for rule in (BoxedRule(leniency=lenient), CorrectnessRule(leniency=lenient)):
        assert rule(r"\boxed{101}", "100", Finish.STOP).value == 1.0
        assert rule(r"\boxed{102}", "100", Finish.STOP).value < 1.0


def test_rules_survive_pickling() -> None:
    rule = SeedRule(right=2.0)
    assert pickle.loads(pickle.dumps(rule)) == rule


USER_FILE = """
from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.dataflow import Score


def shortness(text, answer, finish):
    return 1.0 / (1 + len(text))


def full(text: str, answer: str, finish) -> Score:
    return Score(value=2.0, parts={"correct": float(answer in text)})


def words(text, answer, finish):
    return "good"


def two_arguments(text, answer):
    return 0.0


@dataclass(frozen=True)
class Penalty:
    size: float = 3.0

    @property
    def failure_value(self):
        return -self.size

    def __call__(self, text, answer, finish):
        return -self.size if finish.value == "length" else 0


class Greedy:
    def __init__(self, size):
        self.size = size

    def __call__(self, text, answer, finish):
        return self.size
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    file = tmp_path / "my_rule.py"
    file.write_text(USER_FILE)
    return file


def test_a_rule_from_a_file_may_return_a_number_or_a_score(user_file: Path) -> None:
    shortness = load_rule(f"{user_file}:shortness")
    assert shortness("abc", "", Finish.STOP) == Score(value=0.25)
    assert shortness.failure_value == 0.0
    full = load_rule(f"{user_file}:full")
    assert full("it is 5", "5", Finish.STOP) == Score(value=2.0, parts={"correct": 1.0})


def test_a_class_in_a_file_is_a_rule_with_its_own_failure_value(user_file: Path) -> None:
    rule = load_rule(f"{user_file}:Penalty")
    assert rule.failure_value == -3.0
    assert rule("", "", Finish.LENGTH).value == -3.0
    assert math.copysign(1, rule("", "", Finish.STOP).value) == 1.0


def test_a_rule_from_a_file_pickles_as_its_path(
    user_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rule = load_rule("my_rule.py:shortness")
    assert str(user_file).encode() in pickle.dumps(rule)
    assert pickle.loads(pickle.dumps(rule))("abc", "", Finish.STOP).value == 0.25


def test_a_rule_that_returns_something_else_is_told(user_file: Path) -> None:
    with pytest.raises(TypeError, match=r"words in .*my_rule\.py must return a number or .*Score, got str"):
        load_rule(f"{user_file}:words")("", "", Finish.STOP)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "sead",
            r"'sead': .*seed, seed_exact, boxed, format, final_answer, correctness, or path/to/file\.py:callable",
        ),
        ("my_rule.py", r"unknown reward rule 'my_rule\.py'"),
        ("absent.py:f", r"absent\.py:f: there is no such file"),
        (
            "my_rule.py:missing",
            r"must define a callable missing, it defines shortness, full, words, two_arguments, Penalty, Greedy",
        ),
        ("my_rule.py:two_arguments", r"must take \(text, answer, finish\), it takes \(text, answer\)"),
        ("my_rule.py:Greedy", r"a class must be constructible without arguments: .*'size'"),
        ("broken.py:f", r"broken\.py:f: the file raised ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_loaded_is_explained(
    spec: str, message: str, user_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (user_file.parent / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(user_file.parent)
    with pytest.raises(ValueError, match=message):
        load_rule(spec)


LONG = 1_000_000
HOSTILE = {
    "digits": "1" * LONG,
    "zeros": "\\boxed{1." + "0" * LONG + "1}",
    "dots": "\\boxed{" + "." * LONG + "1}",
    "texts that are never closed": "\\boxed{5" + "\\text{" * (LONG // 6),
    "boxes that are never closed": "\\boxed{5" + "\\mbox{" * (LONG // 6),
    "boxes in boxes": "\\boxed{" * (LONG // 7),
    "spaces": "\\boxed{" + " " * LONG + "}",
    "units": "\\boxed{" + "5 cm " * (LONG // 5) + "}",
    "phrases": "the answer is " * (LONG // 14),
}


@pytest.mark.parametrize("name", ["seed", "seed_exact"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_an_answer_is_found_in_linear_time_in_whatever_a_model_writes(name: str, text: str) -> None:
    """An evaluation looks for it outside the workers that have a limit; a quadratic search would take hours."""
    rule = RULES[name]
    assert isinstance(rule, SeedRule)
    before = time.process_time()
    rule.prediction(text)
    assert time.process_time() - before < 10


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_so_it_is_by_every_other_rule(text: str) -> None:
    before = time.process_time()
    extract(text)
    assert time.process_time() - before < 10
