"""Which evaluation questions stand in the training set, word for word or nearly.

    python examples/data/overlap.py --train math_lv3to5.jsonl --eval data/eval/*/test.jsonl

Two questions are the same if they are after :func:`normalise`. An evaluation question overlaps if at least half
(``--threshold``) of its runs of 10 normalised words (``--words``; shorter questions: all their words) stand in one
training question.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # run as a program: Python then looks beside this file, not in the checkout that it belongs to
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.data.sources import Row, SourceError, read
from megatron_rl.durable import replace_text

_WORD = re.compile(r"[a-z]+|\d+|[-+*/=<>^]")
_SPACING = re.compile(r"\\(?:left|right|displaystyle|[,;:! ])|[$~]")


def normalise(text: str) -> tuple[str, ...]:
    r"""The words, numbers and operators of a question, in lower case: no punctuation, dollar signs, braces or LaTeX
    spacing, ``\dfrac`` as ``\frac``.
    """
    plain = _SPACING.sub(" ", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return tuple(_WORD.findall(plain.lower()))


def runs(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    """All runs of ``length`` words; a shorter text is one run."""
    return {tuple(words[at : at + length]) for at in range(max(1, len(words) - length + 1))} if words else set()


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """An evaluation question and the training question that has most of it.

    Attributes:
        evaluation, training: their places.
        exact: whether they are the same after normalisation.
        share: of the evaluation question's runs that stand in the training question, 0 to 1.
        question: the evaluation question.
    """

    evaluation: str
    training: str
    exact: bool
    share: float
    question: str


def find_overlaps(
    training: Mapping[str, str], evaluation: Mapping[str, str], *, words: int, threshold: float
) -> list[Overlap]:
    """The evaluation questions that overlap with a training question.

    Args:
        training: questions by place.
        evaluation: likewise.
        words: length of a run.
        threshold: least share of runs; a question that is the same always counts.
    """
    normal = {place: normalise(question) for place, question in training.items()}
    same: dict[tuple[str, ...], str] = {}
    holders: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for place, found in normal.items():
        same.setdefault(found, place)
        for run in runs(found, words):
            holders[run].append(place)
    overlaps = []
    for place, question in evaluation.items():
        asked = normalise(question)
        wanted = runs(asked, words)
        shared = Counter(holder for run in wanted for holder in holders.get(run, ()))
        if asked in same:
            overlaps.append(Overlap(evaluation=place, training=same[asked], exact=True, share=1.0, question=question))
        elif shared:
            holder, count = shared.most_common(1)[0]
            if count / len(wanted) >= threshold:
                overlaps.append(
                    Overlap(
                        evaluation=place, training=holder, exact=False, share=count / len(wanted), question=question
                    )
                )
    return overlaps


def _question(row: Row) -> str:
    found = next((row.fields[name] for name in ("question", "problem", "prompt") if row.fields.get(name)), None)
    if not isinstance(found, str):
        raise SourceError(f"{row.place}: needs 'question', 'problem' or 'prompt', it has {sorted(row.fields)}")
    return found


def _by_place(rows: Sequence[Row]) -> dict[str, str]:
    """Questions; the rows of a list that stands on one line have one place, and are numbered."""
    found: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        found[f"{row.place} row {number}" if row.place in found else row.place] = _question(row)
    return found


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the overlaps; the exit status is 0, or 2 where a source is unusable."""
    parser = argparse.ArgumentParser(
        prog="overlap.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", nargs="+", required=True, metavar="PLACE")
    parser.add_argument("--eval", nargs="+", required=True, metavar="PLACE")
    parser.add_argument("--words", type=int, default=10)
    parser.add_argument("--threshold", type=_share, default=0.5)
    parser.add_argument("--json", type=Path, help="write all overlaps here")
    asked = parser.parse_args(arguments)
    try:
        training = _by_place([row for spec in asked.train for row in read(spec)])
        evaluation = {spec: _by_place(read(spec)) for spec in asked.eval}
    except SourceError as error:
        sys.stderr.write(f"overlap: {error}\n")
        return 2
    everything = []
    for spec, questions in evaluation.items():
        found = find_overlaps(training, questions, words=asked.words, threshold=asked.threshold)
        everything += found
        exact = sum(item.exact for item in found)
        sys.stdout.write(f"{spec}: {len(questions)} questions, {exact} the same, {len(found) - exact} similar\n")
        for item in found:
            kind = "same" if item.exact else f"{item.share:.0%}"
            sys.stdout.write(f"  {kind}: {item.evaluation} = {item.training}: {' '.join(item.question.split())[:80]}\n")
    if asked.json is not None:
        replace_text(asked.json, json.dumps([asdict(item) for item in everything], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
