r"""Reference answers before a run: a rule compares with nothing else, so answers that it calls wrong in a response that
gives them leave every reward the same, and training without a signal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

from megatron_rl.config.schema import RunConfig
from megatron_rl.dataflow import Finish, Outcome, Score
from megatron_rl.experience.prompts import PromptSet
from megatron_rl.interfaces import RewardScorer
from megatron_rl.rewards.answers import MAX_LENGTH
from megatron_rl.rewards.final_answer import final_answer, is_answer
from megatron_rl.rewards.rules import RULES
from megatron_rl.rewards.service import reward_service

_TRIED = 64
_TRIED_BY_OWN_RULE = 4
"""A rule of the user's own may take long: it may run code, or ask a model."""
_FORMS = ("\\boxed{{{}}}", "<answer>{}</answer>")
_AROUND = " []\"'"
_NAMED = 3
_SHOWN = 40
"""Characters of either end of an answer."""


def check_answers(config: RunConfig, sets: Mapping[str, PromptSet], rewards: RewardScorer | None = None) -> list[str]:
    r"""See that responses which give reference answers are right, on some answers from all over each file.

    A response gives :func:`short_form` of the answer in ``\boxed{}``, and, where that is wrong, between ``<answer>``
    tags; one short line that our grammar does not read it also gives word for word. At most 64 answers of a file are
    tried, the same ones each time; by a rule of the user's own 4. Such a rule may look for another form: it is never
    refused, and nothing is said where it does not report ``correct``.

    Args:
        config: of the run.
        sets: its prompts by name of the setting below ``data``.
        rewards: runs the rule; None: a worker that is started for this, if this machine must have the rule.

    Returns:
        What to tell of answers that are wrong, a line for each file with such.

    Raises:
        RuntimeError: no worker could start.
        ValueError: a rule of this package calls all that were tried of a file wrong.
    """
    if config.reward.rule_may_be_elsewhere:
        return []
    refused, told = list[str](), list[str]()
    few = replace(config.reward, workers=min(config.reward.workers, _TRIED_BY_OWN_RULE))
    with reward_service(few)() if rewards is None else nullcontext(rewards) as scorer:
        for name, prompts in sets.items():
            answers = [prompt.answer for prompt in prompts.prompts]
            try:
                told.append(_check(f"data.{name}: {getattr(config.data, name)}", answers, config.reward.rule, scorer))
            except ValueError as error:
                refused.append(str(error))
    if refused:
        raise ValueError("\n".join(refused))
    return [text for text in told if text]


def _check(where: str, answers: Sequence[str], rule: str, scorer: RewardScorer) -> str:
    """What to tell of some answers of a file; ``where`` names it. Errors as :func:`check_answers`."""
    distinct = list(dict.fromkeys(answers))
    tried = distinct[:: -(-len(distinct) // (_TRIED if rule in RULES else _TRIED_BY_OWN_RULE))]
    wrong = dict.fromkeys(tried, "")
    left = {answer: _responses(answer) for answer in tried}
    while asked := [answer for answer in wrong if left[answer]]:
        requests = [(left[answer].pop(0), answer, Finish.STOP) for answer in asked]
        for answer, score in zip(asked, scorer.score(requests), strict=True):
            if _is_wrong(score):
                wrong[answer] = _told(answer, score)
            else:
                del wrong[answer]
    if not wrong:
        return ""
    named = [*wrong.values()][:_NAMED]
    if len(wrong) < len(tried):
        return (
            f"{where}: of {len(tried)} different answers that were tried rule {rule} calls {len(wrong)} wrong in a "
            f"response that gives them, so that their prompts may earn nothing: {'; '.join(named)}"
        )
    if rule not in RULES:
        return (
            f"{where}: rule {rule} calls none of {len(tried)} answers right in \\boxed{{}} or <answer> tags, such as "
            f"{named[0]}: right only if it looks for another form"
        )
    hashes = (
        ". They end as GSM8K's do, in '#### 72': keep only what stands behind ####"
        if any("####" in each for each in wrong)
        else ""
    )
    raise ValueError(
        f"{where}: an answer must be what a right response gives and nothing more, such as 72 or \\frac{{1}}{{2}}; "
        f"rule {rule} calls all {len(tried)} that were tried wrong, such as {named[0]}{hashes}"
    )


def _responses(answer: str) -> list[str]:
    """What gives the answer, the likeliest first."""
    given = [short_form(answer)]
    short = len(answer) <= 2 * _SHOWN and len(answer.splitlines()) == 1
    solution = any(mark in answer for mark in ("####", "\\boxed", "answer is"))
    if given[0] != answer and short and not solution and _read(answer) is None:
        given.append(answer)
    return [form.format(text) for text in given for form in _FORMS]


def short_form(answer: str) -> str:
    r"""What a response would give for a reference answer: the answer itself, where our grammar reads it, or what stands
    in a list of one (``["36"]``). Else the answer is taken for a solution, of which the end counts (``#### 72``,
    ``\boxed{72}``, ``The answer is 72.``), if one is found there.
    """
    return _read(answer) or final_answer(answer) or answer


def _read(answer: str) -> str | None:
    """What our grammar reads of it: the whole, or the item of a list of one."""
    texts = (answer, answer.strip(_AROUND))
    return next((text for text in texts if len(text) <= MAX_LENGTH and is_answer(text)), None)


def _is_wrong(score: Score) -> bool:
    """False also where the rule says nothing of right and wrong."""
    return score.outcome is not Outcome.SCORED or score.parts.get("correct", 1.0) <= 0


def _told(answer: str, score: Score) -> str:
    given = short_form(answer)
    told = _shown(answer) if given == answer else f"{_shown(answer)} for a response that gives {_shown(given)}"
    return told if score.outcome is Outcome.SCORED else f"{told} ({score.outcome.value})"


def _shown(text: str) -> str:
    """On one line, without the middle of a long one."""
    line = " ".join(text.split())
    return f"'{line}'" if len(line) <= 2 * _SHOWN + 5 else f"'{line[:_SHOWN].rstrip()} ... {line[-_SHOWN:].lstrip()}'"
