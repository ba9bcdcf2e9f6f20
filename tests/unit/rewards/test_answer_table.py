"""Labelled answers by category: ``= gold @@ answer`` must be accepted, ``! gold @@ answer`` must not.

``answers.txt`` holds answers, ``responses.txt`` whole responses. The labels were written before the grader saw them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_rl.rewards.answers import equal, extract


class Row(NamedTuple):
    gold: str
    answer: str
    accepted: bool


def read(name: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for line in Path(__file__).with_name(name).read_text(encoding="utf-8").split("\n"):
        if line.startswith("# "):
            rows = found[line[2:]] = []
        elif line:
            gold, joint, answer = line[2:].partition(" @@ ")
            assert line[:2] in ("= ", "! "), line
            assert joint, line
            rows.append(Row(gold, answer, line[0] == "="))
    return found


ANSWERS, RESPONSES = read("answers.txt"), read("responses.txt")


@pytest.mark.parametrize("category", ANSWERS)
def test_answers_are_judged_as_labelled(category: str) -> None:
    assert [row for row in ANSWERS[category] if equal(row.answer, row.gold) != row.accepted] == []


@pytest.mark.parametrize("category", RESPONSES)
def test_responses_are_judged_as_labelled(category: str) -> None:
    def accepted(row: Row) -> bool:
        answer = extract(row.answer)
        return answer is not None and equal(answer, row.gold)

    assert [row for row in RESPONSES[category] if accepted(row) != row.accepted] == []


def test_a_right_answer_with_another_digit_is_wrong_wherever_the_digit_is_part_of_a_number() -> None:
    number_categories = ("decimal", "fraction", "mixed_number", "percent", "radical", "complex", "factored", "matrix")
    wrong = [
        (row.gold, changed)
        for category in number_categories
        for row in ANSWERS[category]
        if row.accepted
        for digit in re.finditer(r"\d", row.answer)
        for changed in [f"{row.answer[: digit.start()]}{(int(digit[0]) + 1) % 10}{row.answer[digit.end() :]}"]
        if equal(changed, row.gold)
    ]
    assert wrong == []
