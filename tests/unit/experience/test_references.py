"""Reference answers that a rule cannot call right are found before a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from megatron_rl.config.schema import RewardConfig, RunConfig
from megatron_rl.dataflow import Finish, Outcome, Prompt, Score
from megatron_rl.experience.prompts import PromptSet
from megatron_rl.experience.references import check_answers, short_form
from megatron_rl.rewards.rules import RULES, load_rule
from tests.fakes import fake_config

GSM8K = [
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips in both.\n#### 72",
    "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute, so 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10",
]
SOLUTIONS = [
    "We add $2$ and $3$.\n\nThis is $\\boxed{5}$.",
    "Adding both we get $2x = 1$.\n\nSo $x$ is $\\boxed{\\frac{1}{2}}$, and we are done.",
]


@dataclass
class Here:
    """Runs the rule in this process."""

    rule: str
    asked: list[tuple[str, str]] = field(default_factory=list)

    def score(self, requests: Sequence[tuple[str, str, Finish]]) -> list[Score]:
        self.asked += [(text, answer) for text, answer, _ in requests]
        return [self._score(*request) for request in requests]

    def _score(self, text: str, answer: str, finish: Finish) -> Score:
        try:
            return load_rule(self.rule)(text, answer, finish)
        except RuntimeError:
            return Score(value=0.0, outcome=Outcome.ERROR)


def prompt_set(answers: Sequence[str]) -> PromptSet:
    prompts = (Prompt(id=str(at), token_ids=(1,), answer=answer, source="q") for at, answer in enumerate(answers))
    return PromptSet(prompts=tuple(prompts), dropped=0)


def run_of(rule: str, **reward: int) -> RunConfig:
    config = fake_config(Path("run"), reward=RewardConfig(rule=rule, **reward))
    return replace(config, data=replace(config.data, train=Path("a.jsonl"), heldout=Path("b.jsonl")))


def check(rule: str, train: Sequence[str], heldout: Sequence[str] = ("1",)) -> list[str]:
    return check_answers(run_of(rule), {"train": prompt_set(train), "heldout": prompt_set(heldout)}, Here(rule))


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        ("72", "72"),
        ("x = 3 or x = 5", "x = 3 or x = 5"),
        ("2x - y + 18 = 0", "2x - y + 18 = 0"),
        ("\\frac 92", "\\frac 92"),
        ("[1, 2)", "[1, 2)"),
        ("New York", "New York"),
        ("\\$115,000", "\\$115,000"),
        ('["36"]', "36"),
        (GSM8K[0], "72"),
        (SOLUTIONS[1], "\\frac{1}{2}"),
        ('{"tests": [[1, 2]]}', '{"tests": [[1, 2]]}'),
        ("1 + " * 400 + "1", "1 + " * 400 + "1"),
    ],
)
def test_a_response_gives_what_a_reference_answer_says(answer: str, given: str) -> None:
    assert short_form(answer) == given


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("answers", [GSM8K, SOLUTIONS, ['["36"]', '["2n"]']])
def test_answers_of_which_none_can_be_right_are_refused_by_every_rule(rule: str, answers: list[str]) -> None:
    with pytest.raises(
        ValueError, match=rf"^data\.train: a\.jsonl: an answer must .* {rule} calls all 2 that were tried"
    ):
        check(rule, answers)


@pytest.mark.parametrize("rule", ["seed", "boxed", "correctness", "final_answer"])
def test_a_short_line_that_the_grammar_does_not_read_may_be_given_word_for_word(rule: str) -> None:
    assert check(rule, ["March 5, 2019", "April 7, 2020"]) == []


def test_a_refusal_says_what_an_answer_must_be_and_how_gsm8k_has_it() -> None:
    with pytest.raises(ValueError, match=r"^data\.") as refused:
        check("seed", GSM8K, GSM8K[1:])
    train, heldout = str(refused.value).splitlines()
    assert train == (
        "data.train: a.jsonl: an answer must be what a right response gives and nothing more, such as 72 or "
        r"\frac{1}{2}; rule seed calls all 2 that were tried wrong, such as 'Natalia sold 48/2 = <<48/2=24>>24 clips "
        "... = <<48+24=72>>72 clips in both. #### 72' for a response that gives '72'. They end as GSM8K's do, in "
        "'#### 72': keep only what stands behind ####"
    )
    assert heldout.startswith("data.heldout: b.jsonl: an answer must be")
    with pytest.raises(ValueError, match="calls all 2 that were tried wrong") as refused:
        check("seed", SOLUTIONS)
    assert "GSM8K" not in str(refused.value)


def test_answers_of_every_kind_pass_without_a_word() -> None:
    good = [
        "72",
        "\\frac{1}{2}",
        "(1, 2]",
        "x=3",
        "B",
        "New York",
        "5 \\text{ cm}",
        "1,234",
        "[1, 2]",
        "true",
        "C6H12O6",
    ]
    assert check("correctness", good) == []


def test_some_wrong_answers_are_counted_and_the_first_few_told() -> None:
    bad = [f"It is {number}.\n#### {number}" for number in range(4)]
    (told,) = check("boxed", ["1", *bad, "2"])
    assert told == (
        "data.train: a.jsonl: of 6 different answers that were tried rule boxed calls 4 wrong in a response that gives "
        "them, so that their prompts may earn nothing: 'It is 0. #### 0' for a response that gives '0'; "
        "'It is 1. #### 1' for a response that gives '1'; 'It is 2. #### 2' for a response that gives '2'"
    )
    assert check("seed_exact", ["1", "New York"])[0].endswith("may earn nothing: 'New York'")


def test_as_many_different_answers_are_tried_from_all_over_the_file_and_the_same_ones_again() -> None:
    many = [str(number // 2) for number in range(10_000)]
    runs = []
    for _ in range(2):
        scorer = Here("correctness")
        assert check_answers(run_of("correctness"), {"train": prompt_set(many)}, scorer) == []
        runs.append([answer for _, answer in scorer.asked])
    assert runs[0] == runs[1] == [str(number) for number in range(0, 5000, 79)]
    assert len(runs[0]) <= 64


RULES_OF_A_USERS_OWN = r"""
import re

from megatron_rl.dataflow import Score
from megatron_rl.rewards.answers import equal, last_boxed


def verdict(correct):
    return Score(value=float(correct), parts={"correct": float(correct)})


def hashes(text, answer, finish):
    return verdict(equal(last_boxed(text) or "", answer.rpartition("####")[2]))


def tags(text, answer, finish):
    found = re.search("<answer>(.*?)</answer>", text)
    return verdict(found is not None and equal(found[1], answer))


def length(text, answer, finish):
    return -float(len(text))


def program(text, answer, finish):
    return verdict("def " in text)


def broken(text, answer, finish):
    raise RuntimeError
"""


@pytest.mark.parametrize(
    ("name", "answers", "told"),
    [
        ("hashes", GSM8K, None),
        ("tags", ["1", "2"], None),
        ("length", GSM8K, None),
        (
            "program",
            ["[1]", "[2]"],
            r"calls none of 2 answers right in \boxed{} or <answer> tags, such as '[1]': right",
        ),
        (
            "broken",
            ["1", "2"],
            "calls none of 2 answers right in \\boxed{} or <answer> tags, such as '1' (error): right",
        ),
        ("tags", ["1", GSM8K[0]], "of 2 different answers that were tried rule "),
    ],
)
def test_a_rule_of_the_users_own_is_never_refused(
    name: str, answers: list[str], told: str | None, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(RULES_OF_A_USERS_OWN)
    notes = check_answers(run_of(rule := f"{tmp_path}/mine.py:{name}"), {"train": prompt_set(answers)}, Here(rule))
    assert len(notes) == (told is not None)
    assert all((told or "") in note for note in notes)


def test_a_rule_of_the_users_own_is_asked_for_few_answers(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RULES_OF_A_USERS_OWN)
    scorer = Here(f"{tmp_path}/mine.py:program")
    check_answers(run_of(scorer.rule), {"train": prompt_set([str(number) for number in range(100)])}, scorer)
    assert [answer for _, answer in scorer.asked] == ["0", "25", "50", "75"] * 2


def test_a_rule_that_pools_are_to_run_is_tried_here_where_this_machine_has_it() -> None:
    with pytest.raises(ValueError, match="calls all 2 that were tried wrong"):
        check_answers(run_of("seed", pools=2), {"train": prompt_set(GSM8K)})
    assert check_answers(run_of("absent.py:rule", pools=2), {"train": prompt_set(GSM8K)}) == []
