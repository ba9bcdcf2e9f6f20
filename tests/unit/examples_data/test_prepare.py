from __future__ import annotations

import json

import pytest

from eval.tasks import TASKS, load_task
from examples.data import overlap, prepare_eval, prepare_math
from examples.data.prepare_math import Problem, Selection, explain, parse, select
from examples.data.sources import Row, SourceError


def math_row(question, level, solution="so \\boxed{7}.", **more):
    return {"problem": question, "level": f"Level {level}", "type": "Algebra", "solution": solution, **more}


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def small(tmp_path):
    """A MATH of eight problems, of which one is in MATH500."""
    rows = [
        math_row("easy", 2),
        math_row("three", 3, "\\boxed{1} or rather \\boxed{\\frac{1}{2}}"),
        math_row("held  out", 5),
        math_row("bare", 4, "so $\\boxed 9$."),
        math_row("no answer", 5, "It is clear."),
        math_row("three", 3),
        math_row("odd", "?"),
        math_row("units", 5, "\\boxed{62^\\circ}"),
    ]
    return write(tmp_path / "math.jsonl", rows), write(tmp_path / "math500.jsonl", [math_row("held out", 5)])


def test_levels_3_to_5_less_the_held_out_in_the_seeds_schema(small, tmp_path, capsys):
    source, held_out = small
    output = tmp_path / "out" / "train.jsonl"
    arguments = ["--source", source, "--held-out", held_out, "--output", str(output)]
    assert prepare_math.main(arguments) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["question"], row["answer"], row["level"]) for row in rows] == [
        ("three", "\\frac{1}{2}", 3),
        ("bare", "9", 4),
        ("three", "7", 3),
        ("units", "62^\\circ", 5),
    ]
    assert rows[0] == {
        "input": (
            "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
            "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant"
        ),
        "answer": "\\frac{1}{2}",
        "gt_answer": "\\frac{1}{2}",
        "subject": "Algebra",
        "level": 3,
        "question": "three",
        "ground_truth_answer": "\\frac{1}{2}",
        "target": "\\frac{1}{2}",
    }
    assert list(rows[0]) == list(prepare_math.FIELDS)
    out = capsys.readouterr().out
    assert "8 rows read\n  1 held out\n  1 of other levels\n  1 whose level the source does not say\n" in out
    assert "1 without an answer: " + source + ":5: 'no answer'" in out
    assert "4 rows kept, 1 of them ask an earlier row's question again" in out
    assert "8518 fewer than the seed's 8523: the sources have 8 rows, all of MATH has 12,500" in out
    about = json.loads((tmp_path / "out" / "train.jsonl.about.json").read_text())
    assert about["licence"].endswith("MIT")
    assert len(about["sources"][0]["sha256"]) == 64
    assert about["rows"] == 4
    assert prepare_math.main(["--check", str(output)]) == 0
    assert load_task(str(output), None).problems[3].gold == "62^\\circ"


def test_a_list_of_questions_chooses_among_the_rest(small, tmp_path):
    source, _ = small
    listed = write(tmp_path / "list.jsonl", [{"prompt": "units", "answer": "62"}, {"prompt": "bare", "answer": ""}])
    output = tmp_path / "train.json"
    assert prepare_math.main(["--source", source, "--only", listed, "--output", str(output)]) == 0
    assert [row["question"] for row in json.loads(output.read_text())] == ["bare", "units"]
    assert output.read_text().startswith('[\n    {\n        "input":')


def test_sources_without_levels_are_taken_whole_when_asked(tmp_path, capsys):
    source = write(tmp_path / "limr.jsonl", [{"prompt": "Q", "answer": "3", "source": "math"}])
    output = tmp_path / "train.jsonl"
    assert prepare_math.main(["--source", source, "--output", str(output)]) == 2
    assert "no row is left" in capsys.readouterr().err
    assert prepare_math.main(["--source", source, "--levels", "any", "--output", str(output)]) == 0
    row = json.loads(output.read_text())
    assert (row["level"], row["subject"], row["target"]) == (None, None, "3")


def test_solutions_become_pairs_for_the_supervised_stage(tmp_path, capsys):
    rows = [{"problem": "1+1?", "solution": r"It is $\boxed{2}$.", "level": "Level 3", "type": "Algebra"}]
    output, pairs = tmp_path / "train.jsonl", tmp_path / "pairs.jsonl"
    arguments = ["--output", str(output), "--pairs", str(pairs), "--source"]
    assert prepare_math.main([*arguments, write(tmp_path / "math.jsonl", rows)]) == 0
    [pair] = map(json.loads, pairs.read_text().splitlines())
    assert pair["response"] == r"It is $\boxed{2}$."
    assert pair["prompt"].endswith("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")

    without = write(tmp_path / "limr.jsonl", [{"problem": "Q", "answer": "3", "level": 3}])
    assert prepare_math.main([*arguments, without]) == 2
    assert "needs a 'solution' in every row that is kept, 1 have none" in capsys.readouterr().err


def problems(count, **changes):
    fields = {"place": "p", "answer": "1", "subject": None, "level": 3} | changes
    return [Problem(question=f"{changes}{number}", **fields) for number in range(count)]


def told(kept, **counts):
    fields = {"read": 12_500, "other_level": 0, "unknown_level": 0, "held_out": 500, "not_listed": 0, "unmatched": 0}
    fields |= {"empty": (), "repeated": 0, **counts}
    return explain(Selection(kept=tuple(kept), **fields)).splitlines()[-1]


def test_the_difference_to_the_seeds_count_is_explained():
    empty = tuple(problems(2, answer=""))
    assert told(problems(8521), empty=empty) == "with the 2 without an answer these are the seed's 8523 rows"
    assert "held out 500 more problems of the test split as validation, of which 365" in told(problems(8888))
    assert "name MATH500 with --held-out" in told(problems(9000), held_out=0)
    assert "the sources have 7500 rows, all of MATH has 12,500" in told(problems(5000), read=7500)
    assert "the counts above say which" in told(problems(8000))


def test_held_out_questions_that_no_source_has_are_counted():
    found = select(problems(2), levels=None, held_out=frozenset({"elsewhere"}))
    assert (found.held_out, found.unmatched, len(found.kept)) == (0, 1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": "1"}, "f:3: needs 'problem', 'question' or 'prompt'"),
        ({"problem": "Q"}, "f:3: needs 'answer' or 'solution'"),
        ({"problem": "Q", "answer": "1", "level": "hard"}, "f:3: 'level' must be 1 to 5"),
    ],
)
def test_a_row_that_is_no_problem_is_named(fields, message):
    with pytest.raises(SourceError, match=message):
        parse(Row(place="f:3", fields=fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "", "gt_answer": "", "ground_truth_answer": "", "target": ""}, ":1: 'answer' must not be empty"),
        ({"target": "8"}, ":1: answer, gt_answer, ground_truth_answer, target must be the same"),
        ({"level": 6}, ":1: 'level' must be 1 to 5"),
        ({"input": "Q"}, ":1: 'input' must be the seed's template"),
        ({"question": " "}, ":1: 'question' must be text"),
        ({"extra": 1}, ":1: the fields must be input, answer"),
    ],
)
def test_the_check_names_the_line_and_the_field(change, message, tmp_path, capsys):
    row = prepare_math.seed_row(Problem(place="p", question="Q", answer="7", subject=None, level=3))
    file = write(tmp_path / "x.jsonl", [row | change])
    assert prepare_math.main(["--check", file]) == 2
    assert message in capsys.readouterr().err


def test_evaluation_sets_are_checked_and_put_where_the_evaluation_looks(tmp_path, capsys):
    source = write(tmp_path / "source.jsonl", [{"question": "Q", "answer": "6 * 3 = 18\n#### 18", "idx": 0}])
    output = tmp_path / "data"
    assert prepare_eval.main(["--output", str(output), "--from", f"gsm8k={source}"]) == 0
    assert load_task("gsm8k", output).problems[0].gold == "18"
    assert "1 rows, the seed's file has 1319; Cobbe et al. (2021); MIT" in capsys.readouterr().out
    amc = write(tmp_path / "amc.jsonl", [{"question": "Q", "answer": 27.0}])
    assert prepare_eval.main(["--output", str(output), "--from", f"amc23={amc}"]) == 0
    about = json.loads((output / "SOURCES.json").read_text())
    assert about.keys() == {"gsm8k", "amc23"}
    assert about["gsm8k"]["sha256"] == load_task("gsm8k", output).sha256


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gsm8k={file}", "source.jsonl:2: the gold answer follows '####' in 'answer', which has none"),
        ("gsm9k={file}", "unknown set 'gsm9k'; did you mean gsm8k?"),
        ("gsm8k", "has the form NAME=PLACE"),
        ("minerva_math=hub", "no copy on the hub has the fields"),
        ("gsm8k=nowhere.jsonl", "nowhere.jsonl: no such file"),
    ],
)
def test_an_unusable_set_is_refused_and_nothing_is_written(source, message, tmp_path, capsys):
    rows = [{"question": "Q", "answer": "#### 18"}, {"question": "Q", "answer": "18"}]
    file = write(tmp_path / "source.jsonl", rows)
    assert prepare_eval.main(["--output", str(tmp_path / "data"), "--from", source.format(file=file)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_every_set_states_its_origin():
    assert prepare_eval.ORIGINS.keys() == TASKS.keys()


def test_questions_are_compared_without_their_dress():
    assert overlap.normalise("What is $\\dfrac{1}{2} + x^2$?") == overlap.normalise("what is  \\frac{1}{2}\\, +x^{2}")
    assert overlap.normalise("Is 1 + 1?") != overlap.normalise("Is 1 - 1?")
    assert overlap.runs(list("abcd"), 3) == {("a", "b", "c"), ("b", "c", "d")}
    assert overlap.runs(list("ab"), 3) == {("a", "b")}
    assert overlap.runs([], 3) == set()


def test_overlaps_by_hand():
    training = {"t1": "a b c d e f", "t2": "Find x."}
    evaluation = {"same": "find X!", "half": "a b c d z", "other": "p q r s", "part": "a b c z z z z"}
    found = overlap.find_overlaps(training, evaluation, words=3, threshold=0.5)
    assert [(item.evaluation, item.training, item.exact, item.share) for item in found] == [
        ("same", "t2", True, 1.0),
        ("half", "t1", False, pytest.approx(2 / 3)),  # abc, bcd of abc, bcd, cdz
    ]
    lower = overlap.find_overlaps(training, evaluation, words=3, threshold=0.25)
    assert [item.evaluation for item in lower] == [
        "same",
        "half",
        "part",
    ]  # abc; zzz stands twice and counts once: 1 of 4


def test_the_overlap_report_names_both_places(tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", [{"question": "How many sides has a square?", "answer": "4"}])
    evaluation = write(tmp_path / "eval.jsonl", [{"problem": "New?"}, {"problem": "how many sides has a square"}])
    output = tmp_path / "o.json"
    assert overlap.main(["--train", train, "--eval", evaluation, "--json", str(output)]) == 0
    out = capsys.readouterr().out
    assert f"{evaluation}: 2 questions, 1 the same, 0 similar" in out
    assert f"same: {evaluation}:2 = {train}:1" in out
    assert json.loads(output.read_text())[0]["exact"] is True
    assert overlap.main(["--train", train, "--eval", str(tmp_path / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_the_rows_of_a_list_on_one_line_are_all_looked_at(tmp_path, capsys):
    for name, questions in (("train", ["What is 1 + 1?", "What is 2 + 2?"]), ("eval", ["What is 1 + 1?", "Why?"])):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"question": each} for each in questions]))
    assert overlap.main(["--train", str(tmp_path / "train.json"), "--eval", str(tmp_path / "eval.json")]) == 0
    assert "2 questions, 1 the same, 0 similar" in capsys.readouterr().out
