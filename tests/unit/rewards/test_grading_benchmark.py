"""benchmarks/grading.py: what it reads, and what it says of files that it cannot use."""

from __future__ import annotations

import json

import pytest

from benchmarks.grading import Case, gold_of, main, read_cases
from examples.data.sources import Row

GOOD = {"id": "a", "category": "integer", "gold": "5", "response": "\\boxed{5}", "label": True}


def test_debatable_rows_are_left_out(tmp_path):
    file = tmp_path / "cases.jsonl"
    rows = [GOOD, GOOD | {"id": "b", "debatable": True}, GOOD | {"id": "c", "debatable": False, "note": "\u2028"}]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_cases(file) == [Case(**GOOD), Case(**(GOOD | {"id": "c"}))]


@pytest.mark.parametrize(
    ("option", "line", "message"),
    [
        ("--cases", '{"id": "b", "gold"', ":2: every line must be a JSON object"),
        ("--cases", "[1]", ":2: a row must be a JSON object, got list"),
        ("--cases", json.dumps({**GOOD, "gold": None}), ":2: needs 'gold', text, got None"),
        ("--cases", json.dumps({**GOOD, "gold": " "}), ":2: the gold answer is empty"),
        ("--cases", json.dumps({**GOOD, "label": "yes"}), ":2: needs 'label', true or false, got 'yes'"),
        ("--cases", json.dumps({**GOOD, "debatable": True}), ": at least two rows that are not debatable"),
        ("--golds", '{"question": "Q"}', ":2: needs a gold answer in one of final_answer"),
        ("--golds", '{"final_answer": []}', ":2: needs a gold answer in one of final_answer"),
        ("--responses", '{"gt": "5"}', ":1: needs 'gt', a gold answer, and 'pred', a list of answers"),
    ],
)
def test_an_unusable_row_is_one_error_with_its_place(option, line, message, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    assert main([option, str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"grading: {file}{message}")
    assert error.count("\n") == 1


def test_the_gold_is_an_answer_field_what_follows_the_hashes_or_the_box_of_a_solution():
    golds = {
        "18": {"answer": "9 + 9 #### 18"},
        "2,3": {"final_answer": ["$2,3$"], "solution": "\\boxed{7}"},
        "7": {"solution": "so \\boxed{7}", "answer": "x"},
        "5": {"answer": 5},
    }
    assert [gold_of(Row(place="f:1", fields=fields)) for fields in golds.values()] == list(golds)
