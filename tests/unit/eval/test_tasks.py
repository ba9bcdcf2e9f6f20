from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from eval.tasks import TASKS, TEMPLATES, BadInput, load_task, load_tasks, load_template

SHARED = Path(os.environ.get("MEGATRON_RL_EVAL_DATA", Path(__file__).parents[4] / "shared" / "data" / "eval"))
ROWS = {
    "aime24": ({"id": 60, "problem": "P", "answer": "033"}, "P", "033"),
    "amc23": ({"id": 0, "problem": "P", "answer": 27.0, "question": "Q"}, "Q", "27.0"),
    "math500": (
        {"problem": "P", "solution": "so \\boxed{1} and \\boxed{\\frac{1}{2}}.", "answer": "other", "unique_id": "u"},
        "P",
        "\\frac{1}{2}",
    ),
    "minerva_math": ({"problem": "P", "solution": "\\boxed{1.6} \\mathrm{~cm}", "idx": 0}, "P", "1.6"),
    "olympiadbench": ({"id": 1606, "question": "Q", "final_answer": ["$2$"], "context": None}, "Q", "2"),
    "gsm8k": ({"question": "Q", "answer": "9 * 2 = 18\n#### 1,018", "idx": 0}, "Q", "1,018"),
    "gaokao2023en": ({"question": "Q", "answer": "$\\sqrt{3}$"}, "Q", "\\sqrt{3}"),
    "college_math": ({"question": "Q", "answer": "$x = 3$ ", "data_source": "college_math.x"}, "Q", "x = 3"),
}


def write(file: Path, *rows: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_every_task_has_its_fields_tried():
    assert ROWS.keys() == TASKS.keys()


@pytest.mark.parametrize("name", TASKS)
def test_the_fields_of_each_set_are_read(name, tmp_path):
    row, question, gold = ROWS[name]
    write(tmp_path / name / "test.jsonl", row)
    found = load_task(name, tmp_path)
    assert [(problem.question, problem.gold) for problem in found.problems] == [(question, gold)]
    assert found.title == TASKS[name].title
    assert f"has {TASKS[name].rows} rows" in found.note


def test_a_set_may_lie_beside_the_others(tmp_path):
    write(tmp_path / "aime24.jsonl", ROWS["aime24"][0])
    assert load_task("aime24", tmp_path).file == tmp_path / "aime24.jsonl"


def test_a_file_is_a_task_of_its_own(tmp_path):
    file = write(
        tmp_path / "mine.jsonl", {"id": "a", "question": "1+1?", "answer": 2}, "", {"problem": "Q", "answer": "0"}
    )
    found = load_task(str(file), None)
    assert found.name == "mine"
    assert found.note == ""
    assert [(problem.id, problem.question, problem.gold) for problem in found.problems] == [
        ("a", "1+1?", "2"),
        ("1", "Q", "0"),
    ]


def test_ids_that_repeat_are_replaced_by_numbers(tmp_path):
    file = write(tmp_path / "x.jsonl", *[{"id": 7, "question": "Q", "answer": str(n)} for n in range(2)])
    assert [problem.id for problem in load_task(str(file), None).problems] == ["0", "1"]


def test_a_yes_or_no_question_says_so(tmp_path):
    file = write(tmp_path / "x.jsonl", {"question": "Is it?", "answer": "Yes"}, {"question": "Is it?", "answer": "12"})
    assert [problem.question for problem in load_task(str(file), None).problems] == ["Is it? (Yes or No)", "Is it?"]


def test_a_line_separator_inside_a_string_is_not_a_line_break(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"question": "a\u2028b", "answer": "1"}\n')
    assert load_task(str(file), None).problems[0].question == "a\u2028b"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [(" 5 ", "5"), (5, "5"), (True, "true"), (0.5, "0.5"), ({"é": [True, None]}, '{"é": [true, null]}')],
)
def test_an_answer_that_is_no_text_is_json_as_in_training(answer, gold, tmp_path):
    file = write(tmp_path / "x.jsonl", {"question": "Q", "answer": answer})
    assert load_task(str(file), None).problems[0].gold == gold


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Q", "answer": ', r"x\.jsonl:2: every line must be a JSON object"),
        ("[1]", r"x\.jsonl:2: every line must be a JSON object, got list"),
        ('{"question": "Q"}', r"x\.jsonl:2: needs 'answer', it has \['question'\]"),
        ('{"question": "Q", "answer": null}', r"x\.jsonl:2: needs 'answer'"),
        ('{"question": "Q", "answer": " "}', r"x\.jsonl:2: the gold answer is empty"),
        ('{"answer": "3"}', r"x\.jsonl:2: needs 'question' or 'problem'"),
        ('{"question": "", "answer": "3"}', r"x\.jsonl:2: the question is empty"),
    ],
)
def test_a_bad_row_is_named_by_its_line(line, message, tmp_path):
    file = write(tmp_path / "x.jsonl", {"question": "Q", "answer": "1"}, line)
    with pytest.raises(BadInput, match=message):
        load_task(str(file), None)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("math500", {"problem": "P", "solution": "no box"}, r"test\.jsonl:1: .*last \\boxed\{\} of 'solution'"),
        ("gsm8k", {"question": "Q", "answer": "18"}, r"test\.jsonl:1: .*follows '####'"),
        ("olympiadbench", {"question": "Q", "final_answer": []}, r"test\.jsonl:1: needs 'final_answer'"),
    ],
)
def test_a_missing_gold_is_named_by_its_line(name, row, message, tmp_path):
    write(tmp_path / name / "test.jsonl", row)
    with pytest.raises(BadInput, match=message):
        load_task(name, tmp_path)


def test_an_unknown_task_is_answered_with_the_nearest_name(tmp_path):
    with pytest.raises(BadInput, match="unknown task 'math50'; did you mean math500"):
        load_task("math50", tmp_path)
    with pytest.raises(BadInput, match="--data must say where"):
        load_task("math500", None)
    with pytest.raises(BadInput, match=r"no such file: .*math500/test\.jsonl.*prepare_eval"):
        load_task("math500", tmp_path)
    with pytest.raises(BadInput, match=r"nothing\.jsonl: no such file"):
        load_task(str(tmp_path / "nothing.jsonl"), None)


def test_an_empty_file_and_a_name_for_two_are_refused(tmp_path):
    with pytest.raises(BadInput, match="there is no problem in it"):
        load_task(str(write(tmp_path / "x.jsonl")), None)
    twice = [str(write(tmp_path / folder / "x.jsonl", {"question": "Q", "answer": "1"})) for folder in "ab"]
    with pytest.raises(BadInput, match="x stands for more than one"):
        load_tasks(twice, None)


def test_the_seed_templates_word_for_word():
    assert TEMPLATES["qwen25-math-cot"] == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert TEMPLATES["qwen-boxed"] == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{question}\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert TEMPLATES["abel"] == "Question:\n{question}\nAnswer:\nLet's think step by step.\n"
    assert TEMPLATES["deepseek-r1"].endswith("<answer> answer here </answer>. User: {question}. Assistant:")
    assert all(template.count("{question}") == 1 for template in TEMPLATES.values())


def test_a_template_may_be_a_file_and_is_taken_as_it_stands(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("Q: {question}\n\n")
    assert load_template(str(file), tmp_path) == "Q: {question}\n\n"
    file.write_text("no place")
    with pytest.raises(BadInput, match=r"must contain \{question\}"):
        load_template(str(file), tmp_path)
    with pytest.raises(BadInput, match="unknown template 'qwen_boxed'; did you mean qwen-boxed"):
        load_template("qwen_boxed", tmp_path)


def test_chat_stands_for_the_tokenizers_template(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(BadInput, match="no chat template"):
        load_template("chat", tmp_path)
    turn = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    chat = turn + "{% if add_generation_prompt %}<bot>{% endif %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": chat}))
    assert load_template("chat", tmp_path) == (
        "<user>{question}\nPlease reason step by step, and put your final answer within \\boxed{}.</s><bot>"
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the evaluation sets in {SHARED} (MEGATRON_RL_EVAL_DATA)")
@pytest.mark.parametrize("name", ["aime24", "amc23", "math500", "minerva_math", "olympiadbench", "gsm8k"])
def test_the_published_files_are_read_whole(name):
    found = load_task(name, SHARED)
    assert len(found.problems) == TASKS[name].rows
    assert found.note == ""
