"""Verdicts: every answer is compared in the reward service's killable processes; none is ever executed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from eval.samples import GradedSample, Response
from eval.tasks import BadInput, ProblemSet
from megatron_rl.dataflow import Finish, Outcome, Score
from megatron_rl.doctor.facts import hash_of_code
from megatron_rl.interfaces import RewardScorer
from megatron_rl.rewards import answers
from megatron_rl.rewards.rules import CorrectnessRule, FileRule, RewardRule, SeedRule, load_rule

_GOLDS_TRIED = 8
Same = Callable[[str, str], bool]
"""Whether an answer equals another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grader:
    """How the answers to one task are judged.

    Attributes:
        name: of the rule, for messages.
        rule: decides what is right, with the task's leniency.
        scorer: runs the rule.
        comparer: compares two answers with the same leniency.
    """

    name: str
    rule: RewardRule
    scorer: RewardScorer
    comparer: RewardScorer


def _extracted(item: Response, score: Score, rule: RewardRule) -> str | None:
    """The answer that the rule compared; where it does not say, or did not finish, the last box.

    Nothing of a rule runs in this process: it has no deadline here.
    """
    says = score.outcome is Outcome.SCORED and isinstance(rule, (SeedRule, CorrectnessRule))
    return score.answer if says or score.answer is not None else answers.extract(item.response)


def check_rule(grader: Grader, golds: Sequence[str]) -> str:
    """See that the rule says what is right, on responses that box reference answers.

    Args:
        grader: of the task.
        golds: reference answers of the task; the first eight different ones are tried.

    Returns:
        What to tell of those that were not scored; empty where all were.

    Raises:
        BadInput: it raises or ends its process on all of them, or its scores have no part ``correct``.
    """
    requests = [(f"\\boxed{{{gold}}}", gold, Finish.STOP) for gold in list(dict.fromkeys(golds))[:_GOLDS_TRIED]]
    scores = grader.scorer.score(requests)
    _check_parts(grader.name, scores)
    if all(score.outcome is Outcome.ERROR for score in scores):
        response, gold, _ = requests[0]
        raise BadInput(
            f"rule {grader.name}: it must score responses, it raised or ended its process on each of {len(requests)} "
            f"that box a reference answer, such as {response!r} with the gold answer {gold!r}; the warning above says "
            "more"
        )
    failed = [
        f"{gold!r} ({score.outcome.value})"
        for (_, gold, _), score in zip(requests, scores, strict=True)
        if score.outcome is not Outcome.SCORED
    ]
    if not failed:
        return ""
    return (
        f"rule {grader.name} did not score {len(failed)} of {len(requests)} responses that box a reference answer: "
        f"{', '.join(failed)}"
    )


def _check_parts(name: str, scores: Iterable[Score]) -> None:
    for score in scores:
        if score.outcome is Outcome.SCORED and "correct" not in score.parts:
            raise BadInput(
                f"rule {name}: an evaluation needs to know what is right, so the rule must return a Score with a part "
                f"'correct'; it returned {score}"
            )


def rule_sha256(name: str) -> str | None:
    """Of the file of a user's own rule; None for a rule of this package, which :func:`rewards_sha256` names.

    Raises:
        ValueError: as :func:`megatron_rl.rewards.rules.load_rule`.
    """
    rule = load_rule(name)
    return hashlib.sha256(Path(rule.path).read_bytes()).hexdigest() if isinstance(rule, FileRule) else None


def rewards_sha256() -> str:
    """Of the code that compares answers: every rule of this package is made of it, and votes are counted with it."""
    return hash_of_code(Path(answers.__file__).parent)


def grade(responses: Sequence[Response], grader: Grader) -> list[GradedSample]:
    """Judge ``responses`` in order. A rule that did not finish makes a wrong answer whose outcome says so.

    Raises:
        ValueError: the rule called one neither right nor wrong; names both.
    """
    scores = grader.scorer.score([(item.response, item.gold, item.finish) for item in responses])
    return [_graded(item, score, grader) for item, score in zip(responses, scores, strict=True)]


def _graded(item: Response, score: Score, grader: Grader) -> GradedSample:
    verdict = score.parts.get("correct", 0.0)
    if verdict not in (0, 1):
        raise ValueError(
            f"rule {grader.name}: the part 'correct' must be 0 or 1, got {verdict} for sample {item.sample} of "
            f"{item.task} {item.id}; put partial credit into the score's value"
        )
    fields = {name.name: getattr(item, name.name) for name in dataclasses.fields(Response)}
    extracted = _extracted(item, score, grader.rule)
    return GradedSample(
        **fields,
        extracted=extracted,
        correct=verdict == 1,
        boxed=bool(score.parts.get("boxed", extracted is not None)),
        score=score.value,
        outcome=score.outcome,
    )


def check_errors(task: str, samples: Iterable[GradedSample], total: int, limit: float) -> None:
    """Stop where grading fails too often for the rest to mean anything.

    Args:
        task: for the message.
        samples: of the task, those that are graded.
        total: samples of the task in all.
        limit: the largest share of them that may fail.

    Raises:
        RuntimeError: the rule raised or ended its process on more.
    """
    errors = sum(sample.outcome is Outcome.ERROR for sample in samples)
    if errors > limit * total:
        raise RuntimeError(
            f"grading failed on {errors} of {total} samples of {task}, at most --max-error-rate={limit:g} of them "
            "may fail; the warnings above say how. Mend it and run this command again, which grades them again, or "
            "raise the limit"
        )


def same_answers(samples: Iterable[GradedSample], grader: Grader) -> Same:
    """Equality of the answers that samples of one problem gave, decided for every pair that a vote asks about.

    A vote compares an answer with the first of each group until it joins one. So each round makes the first answer
    that is in no group the head of one, and compares the problem's others with it; all problems share a round.

    Args:
        samples: of any problems of one task.
        grader: of the task. A pair that it did not finish counts as different.
    """
    by_problem: dict[str, dict[str, None]] = {}
    for sample in sorted(samples, key=lambda sample: sample.sample):
        if sample.extracted is not None:
            by_problem.setdefault(sample.id, {})[sample.extracted] = None
    ungrouped = [list(answers) for answers in by_problem.values()]
    equal: set[tuple[str, str]] = set()
    while ungrouped := [answers for answers in ungrouped if len(answers) > 1]:
        pairs = list(dict.fromkeys((later, head) for head, *others in ungrouped for later in others))
        scores = grader.comparer.score([(later, head, Finish.STOP) for later, head in pairs])
        equal |= {pair for pair, score in zip(pairs, scores, strict=True) if score.value == 1.0}
        ungrouped = [[later for later in others if (later, head) not in equal] for head, *others in ungrouped]
    return lambda later, first: (later, first) in equal


def ungradable_golds(problems: ProblemSet, grader: Grader) -> list[tuple[str, str, Outcome]]:
    """Reference answers that are not graded right when a response boxes them word for word: the gold oracle.

    Returns:
        ``(problem id, gold, outcome)`` of each.

    Raises:
        BadInput: the rule's scores have no part ``correct``.
    """
    golds = [(problem.id, problem.gold) for problem in problems.problems]
    scores = grader.scorer.score([(f"\\boxed{{{gold}}}", gold, Finish.STOP) for _, gold in golds])
    _check_parts(grader.name, scores)
    return [
        (name, gold, score.outcome)
        for (name, gold), score in zip(golds, scores, strict=True)
        if score.parts.get("correct") != 1
    ]
