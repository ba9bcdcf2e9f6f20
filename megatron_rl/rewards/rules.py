"""Reward rules: what a response is worth, given the reference answer.

A rule is a picklable callable ``(text, answer, finish) -> Score``. ``text`` is the response alone, never the prompt,
so a prompt that says "put your answer in a box" cannot earn anything.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from megatron_rl.dataflow import Finish, Score
from megatron_rl.rewards.answers import STOPS, after_last_word_boxed, cut_at_stop, equal, extract
from megatron_rl.rewards.final_answer import final_answer
from megatron_rl.rewards.seed_grader import extract_answer, seed_equal
from megatron_rl.rewards.structure import EXACT, Leniency


class RewardRule(Protocol):
    """Scores one response."""

    @property
    def failure_value(self) -> float:
        """The score's value where the rule did not finish (``Outcome.TIMEOUT``, ``Outcome.ERROR``)."""

    def __call__(self, text: str, answer: str, finish: Finish) -> Score:
        """Score one response.

        Args:
            text: the response, without the prompt, special tokens and the stop string that ended it: with
                ``</answer>`` in ``rollout.stop`` there is ``<answer>`` alone.
            answer: the reference answer of the prompt.
            finish: why the response ended.
        """


@dataclass(frozen=True, kw_only=True)
class SeedRule:
    r"""The reward of SimpleRL-reason v0: right +1, wrong -0.5, and -1 without the bare word ``boxed``.

    The missing word overrides a right answer; ``I should have boxed 118`` needs no ``\boxed{}``. Source: the
    repository's ``preprocess_box_response_for_qwen_prompt``. It differs there in one thing: equality is ours, exact
    and alike for both sides, where the original accepts a factor of 100, a relative error of 1e-4 and any brackets.

    Attributes:
        seed_exact: compare as the original does (:mod:`megatron_rl.rewards.seed_grader`), for comparison with it.
    """

    right: float = 1.0
    wrong: float = -0.5
    no_box: float = -1.0
    stops: tuple[str, ...] = STOPS
    seed_exact: bool = False

    @property
    def failure_value(self) -> float:
        """As a wrong answer."""
        return self.wrong

    def __call__(self, text: str, answer: str, finish: Finish) -> Score:
        """Score one response; ``finish`` plays no part, a truncated response is scored as text."""
        prediction = self.prediction(text)
        boxed = prediction is not None
        correct = prediction is not None and (seed_equal if self.seed_exact else equal)(prediction, answer)
        value = self.right if correct else self.wrong if boxed else self.no_box
        return _score(value, correct=correct, boxed=boxed, answer=prediction)

    def prediction(self, text: str) -> str | None:
        """What is compared with the reference answer, possibly nothing; None without the word."""
        text = cut_at_stop(text, self.stops)
        if "boxed" not in text:
            return None
        return extract_answer(text) if self.seed_exact else after_last_word_boxed(text)


@dataclass(frozen=True, kw_only=True)
class BoxedRule:
    r"""The values of :class:`SeedRule`, but only for a real box: ``\boxed{...}`` that is closed and not empty.

    Attributes:
        leniency: what the data set forgives in numbers.
    """

    right: float = 1.0
    wrong: float = -0.5
    no_box: float = -1.0
    stops: tuple[str, ...] = STOPS
    leniency: Leniency = EXACT

    @property
    def failure_value(self) -> float:
        """As a wrong answer."""
        return self.wrong

    def __call__(self, text: str, answer: str, finish: Finish) -> Score:
        """Score one response; ``finish`` plays no part."""
        prediction = extract(text, self.stops)
        boxed = prediction is not None
        correct = prediction is not None and equal(prediction, answer, self.leniency)
        value = self.right if correct else self.wrong if boxed else self.no_box
        return _score(value, correct=correct, boxed=boxed, answer=prediction)


@dataclass(frozen=True, kw_only=True)
class FormatRule:
    r"""+1 for an answer in a closed ``\boxed{...}``, right or wrong, 0 without one."""

    boxed: float = 1.0
    no_box: float = 0.0
    stops: tuple[str, ...] = STOPS

    @property
    def failure_value(self) -> float:
        """As a response without a box."""
        return self.no_box

    def __call__(self, text: str, answer: str, finish: Finish) -> Score:
        """Score one response; ``answer`` is only for the part ``correct``, and ``finish`` plays no part."""
        prediction = extract(text, self.stops)
        boxed = prediction is not None
        correct = prediction is not None and equal(prediction, answer)
        return _score(self.boxed if boxed else self.no_box, correct=correct, boxed=boxed, answer=prediction)


@dataclass(frozen=True, kw_only=True)
class CorrectnessRule:
    r"""Right +1, anything else 0. The answer is what the last closed ``\boxed{...}`` holds.

    Attributes:
        leniency: what the data set forgives in numbers.
    """

    right: float = 1.0
    wrong: float = 0.0
    stops: tuple[str, ...] = STOPS
    leniency: Leniency = EXACT

    @property
    def failure_value(self) -> float:
        """As a wrong answer."""
        return self.wrong

    def __call__(self, text: str, answer: str, finish: Finish) -> Score:
        """Score one response; ``finish`` plays no part."""
        prediction = self.prediction(text)
        correct = prediction is not None and equal(prediction, answer, self.leniency)
        boxed = extract(text, self.stops) is not None
        return _score(self.right if correct else self.wrong, correct=correct, boxed=boxed, answer=prediction)

    def prediction(self, text: str) -> str | None:
        """What is compared with the reference answer; None where the response has no answer."""
        return extract(text, self.stops)


@dataclass(frozen=True, kw_only=True)
class FinalAnswerRule(CorrectnessRule):
    """As :class:`CorrectnessRule`, and where there is no box the answer is what the last words of the response say."""

    def prediction(self, text: str) -> str | None:
        """The last box, else :func:`~megatron_rl.rewards.final_answer.final_answer`."""
        return final_answer(text, self.stops)


@dataclass(frozen=True, kw_only=True)
class AnswerRule:
    """1 where the text, an answer and not a response, equals the reference answer, else 0: for votes of samples.

    Attributes:
        leniency: what the data set forgives in numbers.
    """

    leniency: Leniency = EXACT
    failure_value: float = 0.0

    def __call__(self, text: str, answer: str, finish: Finish) -> Score:
        """Compare two answers; ``finish`` plays no part."""
        return Score(value=float(equal(text, answer, self.leniency)))


def lenient(rule: RewardRule, leniency: Leniency) -> RewardRule:
    """The same rule with another leniency.

    Raises:
        ValueError: the rule compares in a way of its own.
    """
    if leniency == EXACT:
        return rule
    if isinstance(rule, (BoxedRule, CorrectnessRule)):
        return replace(rule, leniency=leniency)
    raise ValueError(
        f"leniency needs the rule correctness, final_answer or boxed, {type(rule).__name__} compares in its own way"
    )


def _score(value: float, *, correct: bool, boxed: bool, answer: str | None = None) -> Score:
    return Score(value=value, parts={"correct": float(correct), "boxed": float(boxed)}, answer=answer or None)


RULES: dict[str, RewardRule] = {
    "seed": SeedRule(),
    "seed_exact": SeedRule(seed_exact=True),
    "boxed": BoxedRule(),
    "format": FormatRule(),
    "final_answer": FinalAnswerRule(),
    "correctness": CorrectnessRule(),
}


@dataclass(frozen=True)
class FileRule:
    """A user's own rule: a callable in a Python file. Plain data, so that another process can load it again.

    The callable takes ``(text, answer, finish)`` and returns a number or a ``Score``. Its attribute ``failure_value``
    is used where it has one, else 0.
    """

    path: str
    name: str

    @property
    def failure_value(self) -> float:
        """The callable's own ``failure_value``, or 0."""
        return float(getattr(_load_callable(self.path, self.name), "failure_value", 0.0))

    def __call__(self, text: str, answer: str, finish: Finish) -> Score:
        """Score one response.

        Raises:
            TypeError: the callable returned neither a number nor a ``Score``.
        """
        result = _load_callable(self.path, self.name)(text, answer, finish)
        if isinstance(result, Score):
            return result
        if isinstance(result, (int, float)):
            return Score(value=float(result))
        raise TypeError(
            f"the reward rule {self.name} in {self.path} must return a number or a megatron_rl.dataflow.Score, "
            f"got {type(result).__name__}"
        )


def load_rule(spec: str) -> RewardRule:
    """Return the rule that a configuration names.

    Args:
        spec: a key of ``RULES``, or ``path/to/file.py:callable`` for a rule of your own.

    Raises:
        ValueError: the name is unknown, or the file does not hold such a callable.
    """
    if spec in RULES:
        return RULES[spec]
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py") or not name.isidentifier():
        known = ", ".join(RULES)
        raise ValueError(
            f"unknown reward rule {spec!r}: it must be one of {known}, or path/to/file.py:callable for your own"
        )
    rule = FileRule(str(Path(path).expanduser().resolve()), name)
    function = _load_callable(rule.path, name)
    try:
        inspect.signature(function).bind("text", "answer", Finish.STOP)
    except TypeError as error:
        raise ValueError(
            f"reward rule {name} in {rule.path} must take (text, answer, finish), "
            f"it takes {inspect.signature(function)}"
        ) from error
    return rule


@lru_cache(maxsize=64)
def _load_callable(path: str, name: str) -> Callable[[str, str, Finish], object]:
    """Run the file once per process and return its callable; a class is instantiated without arguments."""
    if not Path(path).is_file():
        raise ValueError(f"reward rule {path}:{name}: there is no such file")
    # Registered under its own name, because dataclasses and pickle look their module up.
    module_name = f"_reward_rule_{Path(path).stem}_{abs(hash(path)):x}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ValueError(f"reward rule {path}:{name}: the file raised {type(error).__name__}: {error}") from error
    found: object = getattr(module, name, None)
    if isinstance(found, type):
        try:
            found = found()
        except TypeError as error:
            raise ValueError(
                f"reward rule {path}:{name}: a class must be constructible without arguments: {error}"
            ) from error
    if not callable(found):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module_name]
        raise ValueError(
            f"reward rule {path}:{name}: the file must define a callable {name}, it defines {', '.join(own) or 'none'}"
        )
    return found
