r"""The answer of a response that was not asked for a box, such as ``The answer is $5$``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_rl.rewards.answers import STOPS, cut_at_stop, extract, last_joined
from megatron_rl.rewards.expressions import Undecided
from megatron_rl.rewards.notation import plain
from megatron_rl.rewards.parsing import parse

_MAX_TAIL = 2000
"""Characters at the end of a response that are searched; so the cost does not grow with the response."""
_MARKER = re.compile(r"(?i:\banswers?[\s*]*(?:is\b|are\b|:)[\s*:]*)|####")
_TAGGED = re.compile(r"<answer>((?:(?!</?answer>).)*+)(?:</answer>|\Z)", re.DOTALL)
"""The last one may lack its closing tag: an engine cuts off what it stops at."""
_PARAGRAPH = re.compile(r"\n\s*\n")
_DECIMAL = r"(?:\d+(?:\.\d+)?|\.\d+)"
_NUMBER = "[-\N{MINUS SIGN}+]" rf"?(?:\d+\s+\d+/\d+|{_DECIMAL}(?:\s*/\s*{_DECIMAL})?)(?:\s*\\?%)?"
_NUMBERS = rf"{_NUMBER}(?:(?:,\s*|,?\s+(?:and|or)\s+){_NUMBER})*"
"""A comma only joins: were it a part of numbers too, the readings of a list would double with every item."""
_FORMULA = (
    r"\$\$(?P<display>[^$]+)\$\$|(?<!\\)\$(?P<inline>[^$\n]+)(?<!\\)\$"
    r"|\\\((?P<round>[^\n]+?)\\\)|\\\[(?P<square>.+?)\\\]"
)
_CANDIDATE = re.compile(
    rf"{_FORMULA}|(?:^|(?<=[a-zA-Z]{{2}}\s)|(?<=[=:]\s)|(?<=\s\$)|(?<=[=:]))"
    rf"(?P<number>{_NUMBERS})(?=[*€]*(?:[.;?][*\s]|[.;?]?\s*$))",
    re.DOTALL,
)
"""A formula, or numbers between a word, ``=`` or ``:`` and the end of a sentence, so of no longer expression."""
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z])|\n")


def final_answer(text: str, stops: Sequence[str] = STOPS) -> str | None:
    r"""Return what the last box holds, and without one the last formula or number of the end of the response.

    Where there are ``<answer>...</answer>`` outside of the thoughts, only what the last ones that are not empty hold is
    read: a box, what follows ``answer is``, all of it if our grammar reads it, or what is found as below. Without its
    closing tag the last ``<answer>`` holds all that follows it.
    Behind the last ``answer is``, ``answer:`` or ``####`` the rest of the sentence is the answer if our grammar reads
    it, else what follows. Elsewhere it is the last formula (between ``$``, ``$$``, ``\(...\)`` or ``\[...\]``) of the
    last paragraph, or the last number behind a word, ``=`` or ``:`` that ends a sentence; ``and``, ``or`` and commas
    join several to a list. Only the last 2,000 characters are read.

    Args:
        text: the response.
        stops: what ends it, see :func:`~megatron_rl.rewards.answers.cut_at_stop`.
    """
    text = cut_at_stop(text, stops)
    opening, _, answer = text.rpartition("</think>")
    if not opening and "<think>" in text:
        return None
    tagged = [content for content in _TAGGED.findall(answer) if content.strip()]
    if tagged:
        text = answer = tagged[-1]
    boxed = extract(text, ())
    if boxed is not None:
        return boxed
    tail = answer[-_MAX_TAIL:]
    markers = list(_MARKER.finditer(tail))
    if not markers:
        if tagged and tail == answer and is_answer(answer):
            return answer.strip()
        return _last_candidate(_PARAGRAPH.split(tail.strip())[-1])
    said = tail[markers[-1].end() :].strip()
    sentence = _first_sentence(said).strip(" *").rstrip(" *.")
    return sentence if is_answer(sentence) else _last_candidate(sentence)


def _first_sentence(text: str) -> str:
    """The text up to the first end of a sentence outside of a formula."""
    formulas = [formula.span() for formula in _CANDIDATE.finditer(text)]
    for end in _SENTENCE_END.finditer(text):
        if not any(start < end.start() < stop for start, stop in formulas):
            return text[: end.start()]
    return text


def is_answer(text: str) -> bool:
    """Whether our grammar reads the text."""
    try:
        parse(plain(text))
    except Undecided:
        return False
    return True


def _last_candidate(text: str) -> str | None:
    """The last formula or number, with those before it that are joined to it."""
    found = [
        (candidate.start(), candidate.end(), candidate[candidate.lastgroup].strip())
        for candidate in _CANDIDATE.finditer(text)
        if candidate.lastgroup is not None
    ]
    return last_joined(text, found) if found else None
