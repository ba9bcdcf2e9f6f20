r"""Our answer comparison and Math-Verify side by side on labelled cases, and our gold oracle.

``python benchmarks/grading.py --cases FILE.jsonl [--json OUT]`` reads rows with ``id``, ``category``, ``gold``,
``response``, ``label`` (whether the response is right) and perhaps ``debatable``: such rows are left out. Both graders
get what our extraction finds (the last closed box) and run in killable worker processes with the same deadline; a
response without an answer, a time-out and an error count as "wrong". Latencies and rates are CPU seconds of the worker,
without any cache.

``python benchmarks/grading.py --golds FILE.jsonl ... [--pairs 1500]`` grades every reference answer against itself and
seeded pairs of answers that are written differently, and prints what fails: the pairs that grade as equal are to be
read by a person. Files are JSON lines, or one JSON list in a file that ends in ``.json``, in the style of the usual
evaluation sets.

``python benchmarks/grading.py --responses FILE.jsonl`` measures throughput on real (prediction, gold) pairs: rows with
``gt`` and a list ``pred``.

A file that cannot be read is one error with its place (FILE:LINE) and exit status 2.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING

from megatron_rl.dataflow import Finish, Outcome, Score
from megatron_rl.rewards import answers
from megatron_rl.rewards.service import RewardService

if TYPE_CHECKING:
    from examples.data.sources import Row

DEADLINE_S = 5.0
SEED = 0
GOLD_FIELDS = ("final_answer", "ground_truth_answer", "gt_answer", "gt", "gold", "answer")

Grader = Callable[[str, str], bool]


def our_equal(pred: str, gold: str) -> bool:
    """Our comparison, without its memory of earlier pairs."""
    answers._remembered.cache_clear()
    return answers.equal(pred, gold)


def math_verify_equal(pred: str, gold: str) -> bool:
    """Math-Verify with its defaults, each side in a box."""
    from math_verify import parse, verify

    return bool(verify(parse(rf"$\boxed{{{gold}}}$"), parse(rf"$\boxed{{{pred}}}$")))


def ours(text: str, answer: str, finish: Finish) -> Score:
    """A reward rule for the workers: 1 where our comparison accepts the answer."""
    return _timed(our_equal, text, answer)


def math_verify(text: str, answer: str, finish: Finish) -> Score:
    """The same with Math-Verify."""
    return _timed(math_verify_equal, text, answer)


def _timed(grader: Grader, text: str, answer: str) -> Score:
    begin = time.process_time()
    pred = answers.extract(text)
    accepted = pred is not None and grader(pred, answer)
    return Score(value=float(accepted), parts={"cpu_seconds": time.process_time() - begin})


@dataclass(frozen=True, kw_only=True)
class Case:
    """One labelled response."""

    id: str
    category: str
    gold: str
    response: str
    label: bool


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a grader said to a case, in ``seconds`` of CPU time."""

    case: Case
    accepted: bool
    seconds: float

    @property
    def right(self) -> bool:
        return self.accepted == self.case.label


class BadRow(ValueError):
    """A row lacks what is asked of it; the message names its place."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a file with their places.

    Raises:
        examples.data.sources.SourceError: it cannot be read, or a row is no JSON object.
    """
    # Here and not at the top: a worker loads this file by its path and may not find the checkout.
    from examples.data.sources import read

    return read(str(path))


def read_cases(path: Path) -> list[Case]:
    """The rows of a case file that are not debatable.

    Raises:
        BadRow: a field is missing or of another type, or the gold answer is empty.
    """
    rows = read_rows(path)
    cases = [_case(row) for row in rows if not row.fields.get("debatable")]
    if len(cases) < 2:
        raise BadRow(f"{path}: at least two rows that are not debatable must be there, got {len(cases)} of {len(rows)}")
    return cases


def _case(row: Row) -> Case:
    kinds: dict[str, type | tuple[type, ...]] = {
        **{"id": (str, int), "category": str, "gold": str, "response": str, "label": bool}
    }
    for name, kind in kinds.items():
        if not isinstance(found := row.fields.get(name), kind):
            wanted = "true or false" if kind is bool else "text"
            raise BadRow(f"{row.place}: needs {name!r}, {wanted}, got {found!r}; the row has {sorted(row.fields)}")
    if not row.fields["gold"].strip():
        raise BadRow(f"{row.place}: the gold answer is empty; mend the row or take it out")
    return Case(**{name: row.fields[name] for name in kinds})


def judge(rule: str, cases: Sequence[Case]) -> list[Verdict]:
    """Run one of the rules of this file over all cases."""
    with RewardService(f"{Path(__file__).resolve()}:{rule}", timeout_s=DEADLINE_S) as service:
        service.score([(r"\boxed{\sqrt 2}", r"\frac{2}{\sqrt 2}", Finish.STOP)])  # imports are not what is timed
        scores = service.score([(case.response, case.gold, Finish.STOP) for case in cases])
    return [
        Verdict(
            case=case,
            accepted=score.value == 1.0,
            seconds=DEADLINE_S if score.outcome is Outcome.TIMEOUT else score.parts.get("cpu_seconds", 0.0),
        )
        for case, score in zip(cases, scores, strict=True)
    ]


def summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Accuracy, both kinds of mistakes, latency and rate."""
    seconds = sorted(verdict.seconds for verdict in verdicts)
    cuts = quantiles(seconds, n=100, method="inclusive")
    return {
        "accuracy": sum(verdict.right for verdict in verdicts) / len(verdicts),
        "wrongly_accepted": sum(verdict.accepted and not verdict.case.label for verdict in verdicts),
        "wrongly_rejected": sum(not verdict.accepted and verdict.case.label for verdict in verdicts),
        "p50_seconds": cuts[49],
        "p99_seconds": cuts[98],
        "max_seconds": seconds[-1],
        "per_cpu_second": len(seconds) / sum(seconds),
    }


def compare(cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Print both graders side by side; return their summaries."""
    verdicts = {rule: judge(rule, cases) for rule in ("ours", "math_verify")}
    sizes = Counter(case.category for case in cases)
    print(f"{'category':20s} {'cases':>5s} {'ours':>7s} {'math_verify':>12s}")
    for category, size in sorted(sizes.items()):
        right = [sum(v.right for v in found if v.case.category == category) for found in verdicts.values()]
        print(f"{category:20s} {size:5d} {right[0] / size:7.1%} {right[1] / size:12.1%}")
    summaries = {rule: summary(found) for rule, found in verdicts.items()}
    print(f"\n{'':20s} {'':5s} {'ours':>12s} {'math_verify':>12s}")
    for key in summaries["ours"]:
        print(f"{key:26s} {summaries['ours'][key]:12.6g} {summaries['math_verify'][key]:12.6g}")
    for verdict in verdicts["ours"]:
        if not verdict.right:
            case = verdict.case
            mistake = "wrongly accepted" if verdict.accepted else "wrongly rejected"
            print(f"{mistake}: {case.id}: gold {case.gold!r}, answer {answers.extract(case.response)!r}")
    return summaries


def gold_of(row: Row) -> str:
    """The reference answer of a row: an answer field, what follows ``####``, or the box of its solution.

    Raises:
        BadRow: it has none of them.
    """
    fields = row.fields
    if "final_answer" not in fields and (box := answers.last_boxed(str(fields.get("solution", "")))) is not None:
        return box
    found = next((fields[field] for field in GOLD_FIELDS if fields.get(field) not in (None, [])), None)
    if found is None:
        raise BadRow(f"{row.place}: needs a gold answer in one of {', '.join(GOLD_FIELDS)}, it has {sorted(fields)}")
    text = str(found[0] if isinstance(found, list) else found)
    return text.rpartition("####")[2].strip().strip("$")


def check_golds(golds: Sequence[str], pairs: int) -> None:
    """Print golds that do not equal themselves, and pairs of different golds that grade as equal."""
    kept = [gold for gold in golds if gold]
    failed = [gold for gold in kept if not our_equal(gold, gold)]
    print(f"{len(kept) - len(failed)} of {len(kept)} non-empty golds equal themselves ({len(golds) - len(kept)} empty)")
    for gold in failed:
        print(f"  not equal to itself: {gold!r}")
    draw = random.Random(SEED)
    unequal = [pair for pair in (draw.sample(kept, 2) for _ in range(2 * pairs)) if pair[0] != pair[1]][:pairs]
    accepted = [pair for pair in unequal if our_equal(*pair)]
    print(f"{len(accepted)} of {len(unequal)} pairs that are written differently grade as equal")
    for left, right in accepted:
        print(f"  equal: {left!r} and {right!r}")


def rate(grader: Grader, pairs: Iterable[tuple[str, str]]) -> float:
    """Pairs per CPU second, after a first call that imports what the grader needs."""
    grader(r"\sqrt{2}", r"\frac{2}{\sqrt{2}}")
    pairs = list(pairs)
    begin = time.process_time()
    for pred, gold in pairs:
        grader(pred, gold)
    return len(pairs) / (time.process_time() - begin)


def _pairs(row: Row) -> list[tuple[str, str]]:
    gold, preds = row.fields.get("gt"), row.fields.get("pred")
    if not (isinstance(gold, str) and isinstance(preds, list) and all(isinstance(pred, str) for pred in preds)):
        raise BadRow(
            f"{row.place}: needs 'gt', a gold answer, and 'pred', a list of answers; it has {sorted(row.fields)}"
        )
    return [(pred, gold) for pred in preds]


def measure_rates(path: Path) -> None:
    """Print both rates on real predictions."""
    pairs = [pair for row in read_rows(path) for pair in _pairs(row)]
    mine, theirs = rate(our_equal, pairs), rate(math_verify_equal, pairs)
    print(f"{len(pairs)} pairs: ours {mine:,.0f}/CPU-s, math_verify {theirs:,.0f}/CPU-s, ratio {mine / theirs:.1f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the options ask for; the exit status is 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path)
    parser.add_argument("--json", type=Path, help="where the figures of --cases go")
    parser.add_argument("--golds", type=Path, nargs="+", default=[])
    parser.add_argument("--pairs", type=int, default=1500, help="seeded pairs of different golds")
    parser.add_argument("--responses", type=Path)
    options = parser.parse_args(arguments)
    if not (options.cases or options.golds or options.responses):
        parser.error("nothing to do: give --cases, --golds or --responses")
    from examples.data.sources import SourceError

    try:
        if options.cases:
            summaries = compare(read_cases(options.cases))
            if options.json:
                options.json.write_text(json.dumps(summaries, indent=2) + "\n")
        if options.golds:
            check_golds([gold_of(row) for path in options.golds for row in read_rows(path)], options.pairs)
        if options.responses:
            measure_rates(options.responses)
    except (SourceError, BadRow) as error:
        sys.stderr.write(f"grading: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, but the checkout that it belongs to
    sys.exit(main())
