r"""Make the training set of SimpleRL-Zero: MATH problems of levels 3 to 5 less those held out, in the seed's schema.

    python examples/data/prepare_math.py --source MATH/train MATH/test --held-out math500.jsonl --output math.jsonl

The seed's file has 8,523 rows, two of them without an answer. It was made of all of MATH but MATH500 (7,500 + 4,500
problems, 8,888 of levels 3 to 5) less further 500 problems of the test split that were never published as a list; 365
of those must have been of levels 3 to 5. Without that list 8,888 rows come out; ``--only FILE`` (a list of the chosen
questions, such as LIMR's ``math.8k.json``) gives the seed's own choice. Every row that is left out is counted, rows
with an empty answer are named, and what differs from 8,523 is explained.

Source and licence: MATH (Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset", 2021), MIT;
the hub has it as ``hub:EleutherAI/hendrycks_math#SUBJECT@train`` and ``@test``, in seven subjects.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a program: Python then looks beside this file, not in the checkout that it belongs to
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from eval.tasks import TEMPLATES
from examples.data.sources import Row, SourceError, digest, read
from megatron_rl.durable import replace_text
from megatron_rl.rewards.answers import last_boxed

SEED_ROWS, SEED_EMPTY, WITHOUT_VALIDATION = 8523, 2, 8888
LICENCE = "MATH (Hendrycks et al., 2021): MIT"
TEMPLATE = TEMPLATES["qwen25-math-cot"].strip()
"""The seed's training prompt: its evaluation template without the line break at the end."""
FIELDS = ("input", "answer", "gt_answer", "subject", "level", "question", "ground_truth_answer", "target")
_ANSWERS = ("answer", "gt_answer", "ground_truth_answer", "target")
_LEVEL = re.compile(r"(?:Level )?([1-5])")
_BARE_BOX = re.compile(r"\\boxed\s+([^\s$.{}]+)")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A MATH problem; subject, level and solution are None where the source does not say."""

    place: str
    question: str
    answer: str
    subject: str | None
    level: int | None
    solution: str | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What became of the rows.

    Attributes:
        kept: in the order of the sources.
        read: rows of all sources.
        other_level, unknown_level, not_listed, held_out: how many were left out, and why.
        empty: those without an answer, left out as well.
        repeated: rows whose question an earlier kept one asks (kept all the same, as in the seed's file).
        unmatched: held-out or listed questions that no source has.
    """

    kept: tuple[Problem, ...]
    read: int
    other_level: int
    unknown_level: int
    held_out: int
    not_listed: int
    empty: tuple[Problem, ...]
    repeated: int
    unmatched: int


def parse(row: Row) -> Problem:
    r"""Read a row: ``problem``, ``question`` or ``prompt``; ``answer``, or the last box of ``solution`` (``\boxed 7``
    without braces too); ``level`` as a number or ``Level N``; ``subject`` or ``type``.

    Raises:
        SourceError: there is no question, or neither answer nor solution, or the level is none.
    """
    fields = row.fields
    question = next((fields[name] for name in ("problem", "question", "prompt") if fields.get(name)), None)
    if not isinstance(question, str):
        raise SourceError(f"{row.place}: needs 'problem', 'question' or 'prompt', it has {sorted(fields)}")
    level = fields.get("level")
    matched = None if level in (None, "Level ?") else _LEVEL.fullmatch(str(level))
    if matched is None and level not in (None, "Level ?"):
        raise SourceError(f"{row.place}: 'level' must be 1 to 5 or 'Level 1' to 'Level 5', got {level!r}")
    subject = fields.get("subject") or fields.get("type")
    return Problem(
        place=row.place,
        question=question.strip(),
        answer=_answer(row),
        subject=None if subject is None else str(subject),
        level=None if matched is None else int(matched[1]),
        solution=fields.get("solution"),
    )


def _answer(row: Row) -> str:
    answer, solution = row.fields.get("answer"), row.fields.get("solution")
    if answer is not None:
        return str(answer).strip()
    if not isinstance(solution, str):
        raise SourceError(f"{row.place}: needs 'answer' or 'solution', it has {sorted(row.fields)}")
    boxed = last_boxed(solution, closed=True)
    if boxed is None:
        bare = _BARE_BOX.findall(solution)
        return bare[-1] if bare else ""
    return boxed


def same_question(text: str) -> str:
    """What two spellings of a question that differ in space alone have in common."""
    return " ".join(text.split())


def select(
    problems: Sequence[Problem],
    *,
    levels: frozenset[int] | None,
    held_out: frozenset[str] = frozenset(),
    only: frozenset[str] | None = None,
) -> Selection:
    """Choose rows.

    Args:
        problems: of all sources.
        levels: wanted ones; None takes every row, also those whose level is not known.
        held_out: questions (:func:`same_question`) to leave out.
        only: questions to choose from; None for all.
    """
    counts = {"other_level": 0, "unknown_level": 0, "held_out": 0, "not_listed": 0}
    kept: list[Problem] = []
    empty: list[Problem] = []
    for problem in problems:
        key = same_question(problem.question)
        if key in held_out:
            counts["held_out"] += 1
        elif levels is not None and problem.level is None:
            counts["unknown_level"] += 1
        elif levels is not None and problem.level not in levels:
            counts["other_level"] += 1
        elif only is not None and key not in only:
            counts["not_listed"] += 1
        elif not problem.answer:
            empty.append(problem)
        else:
            kept.append(problem)
    there = {same_question(problem.question) for problem in problems}
    return Selection(
        kept=tuple(kept),
        read=len(problems),
        empty=tuple(empty),
        repeated=len(kept) - len({same_question(problem.question) for problem in kept}),
        unmatched=len((held_out | (only or frozenset())) - there),
        **counts,
    )


def explain(selection: Selection) -> str:
    """Say where the rows went, and why the count is not the seed's where it is not."""
    found = len(selection.kept) + len(selection.empty)
    lines = [
        f"{selection.read} rows read",
        f"  {selection.held_out} held out",
        f"  {selection.other_level} of other levels",
        f"  {selection.unknown_level} whose level the source does not say",
        f"  {selection.not_listed} not on the list of --only",
        *[f"  1 without an answer: {problem.place}: {problem.question[:60]!r}" for problem in selection.empty],
        f"{len(selection.kept)} rows kept, {selection.repeated} of them ask an earlier row's question again",
    ]
    if selection.unmatched:
        lines.append(f"{selection.unmatched} questions of --held-out or --only are in no source")
    if found == SEED_ROWS:
        lines.append(f"with the {len(selection.empty)} without an answer these are the seed's {SEED_ROWS} rows")
    elif found == WITHOUT_VALIDATION:
        lines.append(
            f"{found} with and without an answer, the seed has {SEED_ROWS}: it held out 500 more problems of the test "
            f"split as validation, of which {found - SEED_ROWS} have these levels, and published no list of them; "
            "--only with a list of its questions leaves them out"
        )
    else:
        more = found - SEED_ROWS
        lines.append(
            f"{found} with and without an answer, {abs(more)} {'more' if more > 0 else 'fewer'} than the seed's "
            f"{SEED_ROWS}: {_cause(selection)}"
        )
    return "\n".join(lines) + "\n"


def _cause(selection: Selection) -> str:
    if selection.read < 12_000 and not selection.not_listed:
        return f"the sources have {selection.read} rows, all of MATH has 12,500; give both splits and all subjects"
    if not selection.held_out:
        return "nothing was held out; name MATH500 with --held-out"
    return "the sources, the levels or the lists are not those of the seed; the counts above say which"


def seed_row(problem: Problem) -> dict[str, Any]:
    """The row as the seed's file has it, fields in its order."""
    answer = problem.answer
    return {
        "input": TEMPLATE.replace("{question}", problem.question),
        "answer": answer,
        "gt_answer": answer,
        "subject": problem.subject,
        "level": problem.level,
        "question": problem.question,
        "ground_truth_answer": answer,
        "target": answer,
    }


def check_seed_row(row: Row) -> None:
    """See that a row is one of the seed's schema.

    Raises:
        SourceError: it is not; says where and what.
    """
    fields = row.fields
    if tuple(fields) != FIELDS:
        raise SourceError(
            f"{row.place}: the fields must be {', '.join(FIELDS)}, in this order, got {', '.join(fields)}"
        )
    if not isinstance(fields["question"], str) or not fields["question"].strip():
        raise SourceError(f"{row.place}: 'question' must be text, got {fields['question']!r}")
    if not isinstance(fields["answer"], str) or not fields["answer"].strip():
        raise SourceError(f"{row.place}: 'answer' must not be empty, got {fields['answer']!r}")
    if len({fields[name] for name in _ANSWERS}) != 1:
        raise SourceError(f"{row.place}: {', '.join(_ANSWERS)} must be the same, got {[fields[n] for n in _ANSWERS]}")
    if fields["level"] not in (None, 1, 2, 3, 4, 5):
        raise SourceError(
            f"{row.place}: 'level' must be 1 to 5, or null where it is not known, got {fields['level']!r}"
        )
    if fields["input"] != TEMPLATE.replace("{question}", fields["question"]):
        raise SourceError(f"{row.place}: 'input' must be the seed's template with the question in it")


def supervised_pairs(problems: Sequence[Problem]) -> list[dict[str, str]]:
    """A supervised stage's rows: the evaluation's prompt and MATH's own solution.

    Raises:
        SourceError: a problem comes without a solution; names its place.
    """
    without = [problem.place for problem in problems if not problem.solution]
    if without:
        raise SourceError(
            f"--pairs needs a 'solution' in every row that is kept, {len(without)} have none: {without[0]}"
        )
    template = TEMPLATES["qwen25-math-cot"]
    return [
        {"prompt": template.replace("{question}", problem.question), "response": str(problem.solution)}
        for problem in problems
    ]


def dump(rows: Sequence[dict[str, Any]], output: Path) -> str:
    """The file's text: one row a line, or with ``.json`` one indented list, as the seed's."""
    if output.suffix == ".json":
        return json.dumps(rows, indent=4, ensure_ascii=False) + "\n"
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _questions(specs: Sequence[str]) -> frozenset[str]:
    return frozenset(same_question(parse(row).question) for spec in specs for row in read(spec))


def _levels(text: str) -> frozenset[int] | None:
    if text == "any":
        return None
    found = re.fullmatch(r"([1-5])-([1-5])", text)
    if found is None or found[1] > found[2]:
        raise argparse.ArgumentTypeError(f"must be a range such as 3-5, or 'any', got {text!r}")
    return frozenset(range(int(found[1]), int(found[2]) + 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file and what it is made of; the exit status is 0, or 2 where a source is unusable."""
    parser = argparse.ArgumentParser(
        prog="prepare_math.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", nargs="+", metavar="PLACE", help="files, folders or hub:OWNER/NAME#CONFIG@SPLIT")
    parser.add_argument("--held-out", nargs="+", default=[], metavar="PLACE", help="problems to leave out: MATH500")
    parser.add_argument("--only", nargs="+", default=[], metavar="PLACE", help="keep only problems that stand here too")
    parser.add_argument("--levels", type=_levels, default="3-5", help="a range, or 'any' for sources without levels")
    parser.add_argument("--output", type=Path, help=".jsonl for training, or .json as the seed has it")
    parser.add_argument(
        "--pairs", type=Path, help="write the same problems with their solutions too, for megatron-rl sft"
    )
    parser.add_argument("--check", metavar="FILE", help="check the rows of a file of this schema, and nothing else")
    asked = parser.parse_args(arguments)
    try:
        if asked.check:
            rows = read(asked.check)
            for row in rows:
                check_seed_row(row)
            sys.stdout.write(f"{asked.check}: {len(rows)} rows, all of the seed's schema\n")
            return 0
        if not asked.source or asked.output is None:
            raise SourceError("--source and --output are needed (or --check)")
        selection = select(
            [parse(row) for spec in asked.source for row in read(spec)],
            levels=asked.levels,
            held_out=_questions(asked.held_out),
            only=_questions(asked.only) if asked.only else None,
        )
        if not selection.kept:
            raise SourceError(f"no row is left:\n{explain(selection)}")
        pairs = supervised_pairs(selection.kept) if asked.pairs else []
    except SourceError as error:
        sys.stderr.write(f"prepare_math: {error}\n")
        return 2
    rows_out = [seed_row(problem) for problem in selection.kept]
    explained = explain(selection)
    about = {
        "rows": len(rows_out),
        "licence": LICENCE,
        "sources": [{"source": spec, "sha256": digest(spec)} for spec in asked.source],
        "held_out": [{"source": spec, "sha256": digest(spec)} for spec in asked.held_out],
        "only": [{"source": spec, "sha256": digest(spec)} for spec in asked.only],
        "selection": explained.splitlines(),
    }
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    if asked.pairs:
        asked.pairs.parent.mkdir(parents=True, exist_ok=True)
        replace_text(asked.pairs, dump(pairs, asked.pairs))
    replace_text(asked.output, dump(rows_out, asked.output))
    replace_text(asked.output.with_name(asked.output.name + ".about.json"), json.dumps(about, indent=2) + "\n")
    sys.stdout.write(f"{explained}{asked.output}\n{LICENCE}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
