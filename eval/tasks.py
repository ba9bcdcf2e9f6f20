"""What is asked: problem sets with their field readers, and the templates that make prompts of questions."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.experience.prompts import answer_text
from megatron_rl.rewards.answers import last_boxed

Row = Mapping[str, Any]


class BadInput(ValueError):
    """What was asked for cannot be evaluated; found before anything starts."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question and its reference answer."""

    id: str
    question: str
    gold: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A problem set that is known by name.

    Attributes:
        title: as tables show it.
        rows: how many the published set has.
        gold: reads the reference answer of a row; raises ValueError where there is none.
    """

    title: str
    rows: int
    gold: Callable[[Row], str]


@dataclass(frozen=True, kw_only=True)
class ProblemSet:
    """The problems of one file.

    Attributes:
        name: of the task; a file's stem where the file was named.
        sha256: of the file.
        note: what a user should know about it; empty where all is as published.
    """

    name: str
    title: str
    file: Path
    sha256: str
    problems: tuple[Problem, ...]
    note: str = ""


def _field(row: Row, *names: str) -> str:
    """The first of these fields that the row has, as text without space around it."""
    for name in names:
        if row.get(name) is not None:
            return str(row[name]).strip()
    raise ValueError(f"needs {' or '.join(repr(name) for name in names)}, it has {sorted(row)}")


def answer_field(row: Row) -> str:
    """The field ``answer``; JSON where it is no text, as in training."""
    if row.get("answer") is None:
        raise ValueError(f"needs 'answer', it has {sorted(row)}")
    return answer_text(row["answer"]).strip()


def answer_without_dollars(row: Row) -> str:
    """The field ``answer`` without its dollar signs."""
    return _field(row, "answer").replace("$", "").strip()


def boxed_solution(row: Row) -> str:
    r"""What the last ``\boxed{}`` of the field ``solution`` holds."""
    found = last_boxed(_field(row, "solution"), closed=True)
    if found is None:
        raise ValueError(r"the gold answer is the last \boxed{} of 'solution', which has none")
    return found


def after_hashes(row: Row) -> str:
    """What follows ``####`` in the field ``answer``."""
    _, mark, found = _field(row, "answer").rpartition("####")
    if not mark:
        raise ValueError("the gold answer follows '####' in 'answer', which has none")
    return found.strip()


def first_final_answer(row: Row) -> str:
    """The first item of the field ``final_answer``, without dollar signs around it."""
    found = row.get("final_answer")
    if not isinstance(found, list) or not found:
        raise ValueError(f"needs 'final_answer', a list of at least one answer, got {found!r}")
    return str(found[0]).strip().strip("$").strip()


TASKS: dict[str, Task] = {
    "aime24": Task(title="AIME 2024", rows=30, gold=answer_field),
    "math500": Task(title="MATH 500", rows=500, gold=boxed_solution),
    "amc23": Task(title="AMC", rows=40, gold=answer_field),
    "minerva_math": Task(title="Minerva Math", rows=272, gold=boxed_solution),
    "olympiadbench": Task(title="OlympiadBench", rows=675, gold=first_final_answer),
    "gsm8k": Task(title="GSM8K", rows=1319, gold=after_hashes),
    "gaokao2023en": Task(title="GaoKao 2023 En", rows=385, gold=answer_without_dollars),
    "college_math": Task(title="College Math", rows=2818, gold=answer_without_dollars),
}
"""Fields and counts are those of the files in simpleRL-reason (``eval/data``)."""

_HINTS = {"true": "True or False", "false": "True or False", "yes": "Yes or No", "no": "Yes or No"}


def problem_of(row: Row, gold: Callable[[Row], str], default_id: str) -> Problem:
    """Read one row. As in the seed's evaluation, a question with a yes/no or true/false answer says so.

    Raises:
        ValueError: there is no question or no reference answer.
    """
    question, answer = _field(row, "question", "problem"), gold(row)
    if not question or not answer:
        raise ValueError(f"the {'gold answer' if question else 'question'} is empty; mend the row or take it out")
    hint = _HINTS.get(answer.lower())
    identity = next((str(row[name]) for name in ("id", "unique_id", "idx") if row.get(name) is not None), default_id)
    return Problem(id=identity, question=f"{question} ({hint})" if hint else question, gold=answer)


def parse_problems(text: str, file: Path, gold: Callable[[Row], str]) -> tuple[Problem, ...]:
    """The problems of a JSON-lines file; numbered by line where their own ids are not all different.

    Raises:
        BadInput: a line is not a problem; names the file and the line.
    """
    found: list[Problem] = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold U+2028 as it is
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{file}:{number}: every line must be a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise BadInput(f"{file}:{number}: every line must be a JSON object, got {type(row).__name__}")
        try:
            found.append(problem_of(row, gold, str(len(found))))
        except ValueError as error:
            raise BadInput(f"{file}:{number}: {error}") from error
    if not found:
        raise BadInput(f"{file}: there is no problem in it")
    if len({problem.id for problem in found}) == len(found):
        return tuple(found)
    return tuple(
        Problem(id=str(index), question=problem.question, gold=problem.gold) for index, problem in enumerate(found)
    )


def load_task(spec: str, data: Path | None) -> ProblemSet:
    """The problem set that ``spec`` names: a key of ``TASKS``, or the path of a JSON-lines file with ``question`` (or
    ``problem``) and ``answer``.

    Args:
        spec: what to load.
        data: where named sets lie, as ``NAME/test.jsonl`` or ``NAME.jsonl``.

    Raises:
        BadInput: the name is unknown, the file is missing, or a row is unusable.
    """
    if spec in TASKS:
        task = TASKS[spec]
        if data is None:
            raise BadInput(f"{spec}: --data must say where the problem sets lie, it is not set")
        places = (data / spec / "test.jsonl", data / f"{spec}.jsonl")
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise BadInput(
                f"{spec}: no such file: {places[0]} (nor {places[1].name}); examples/data/prepare_eval.py makes it"
            )
        name, title, gold, rows = spec, task.title, task.gold, task.rows
    elif spec.endswith((".jsonl", ".json")) or "/" in spec:
        file = Path(spec)
        if not file.is_file():
            raise BadInput(f"{spec}: no such file")
        name, title, gold, rows = file.stem, file.stem, answer_field, None
    else:
        nearest = difflib.get_close_matches(spec, TASKS, n=1, cutoff=0.3)
        raise BadInput(
            f"unknown task {spec!r}"
            + (f"; did you mean {nearest[0]}?" if nearest else "")
            + f" Known are {', '.join(TASKS)}, and the path of a .jsonl file"
        )
    content = file.read_bytes()
    try:
        problems = parse_problems(content.decode(), file, gold)
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: must be UTF-8 text: {error}") from error
    note = f"{name}: the published set has {rows} rows, {file} has {len(problems)}"
    return ProblemSet(
        name=name,
        title=title,
        file=file,
        sha256=hashlib.sha256(content).hexdigest(),
        problems=problems,
        note=note if rows is not None and len(problems) != rows else "",
    )


def load_tasks(specs: Sequence[str], data: Path | None) -> tuple[ProblemSet, ...]:
    """All of ``specs``.

    Raises:
        BadInput: as :func:`load_task`, or two sets have the same name.
    """
    found = tuple(load_task(spec, data) for spec in specs)
    names = [problems.name for problems in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise BadInput(f"every task needs a name of its own, {', '.join(sorted(twice))} stands for more than one")
    return found


# ----------------------------------------------------------------------------------------------------- templates

_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

TEMPLATES: dict[str, str] = {
    "qwen25-math-cot": (
        f"<|im_start|>system\n{_INSTRUCTION}<|im_end|>\n"
        "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen-boxed": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{{question}}\n{_INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "abel": "Question:\n{question}\nAnswer:\nLet's think step by step.\n",
    "deepseek-r1": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: {question}. Assistant:"
    ),
}
"""Prompts of the seed's evaluation, by its names. ``deepseek-r1`` is that of DeepSeek-R1-Zero (DeepSeek-AI
2025, table 1); it asks for no box: the rule ``final_answer`` reads its tags."""
CHAT = "chat"
"""Stands for the chat template of the model's tokenizer, with the instruction of the others in the user's turn."""


def load_template(spec: str, model: Path) -> str:
    """The template that ``spec`` names: a key of ``TEMPLATES``, ``chat``, or a file. ``{question}`` is replaced.

    Args:
        spec: what to load.
        model: whose chat template ``chat`` means.

    Raises:
        BadInput: the name is unknown, the file has no ``{question}``, or the tokenizer has no chat template.
    """
    if spec in TEMPLATES:
        return TEMPLATES[spec]
    if spec == CHAT:
        return _chat_template(model)
    if not Path(spec).is_file():
        nearest = difflib.get_close_matches(spec, [*TEMPLATES, CHAT], n=1, cutoff=0.4)
        raise BadInput(
            f"unknown template {spec!r}"
            + (f"; did you mean {nearest[0]}?" if nearest else "")
            + f" Known are {', '.join([*TEMPLATES, CHAT])}, and the path of a file"
        )
    text = Path(spec).read_text()
    if "{question}" not in text:
        raise BadInput(f"{spec}: a template must contain {{question}}, this one has {len(text)} characters without it")
    return text


def _chat_template(model: Path) -> str:
    from transformers import AutoTokenizer  # seconds to import

    tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    if not tokenizer.chat_template:
        raise BadInput(f"{model}: the tokenizer has no chat template; name another --template")
    turns = [{"role": "user", "content": f"{{question}}\n{_INSTRUCTION}"}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    if "{question}" not in text:
        raise BadInput(f"{model}: the chat template must keep the user's text, it made {text!r}")
    return text
