r"""Find the answer in a response and decide whether it equals the reference answer.

``equal`` works in layers, cheap to dear: text as it stands, text in one spelling, then typed trees (``parsing``) that
are compared type by type (``structure``) with exact rational or 60-digit values (``expressions``), and ``math_verify``
only for what none of these can decide and a whitelist lets through. No layer evaluates text as Python, and all but the
last have budgets. The last one can be slow on hostile input: score model text through
:class:`megatron_rl.rewards.service.RewardService`, whose processes have a deadline.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from megatron_rl.rewards.expressions import Node, Undecided, exact
from megatron_rl.rewards.notation import closing_braces, has_thousands, plain
from megatron_rl.rewards.parsing import parse
from megatron_rl.rewards.second_opinion import second_opinion
from megatron_rl.rewards.structure import EXACT, Leniency, same

MAX_LENGTH = 1000
"""Characters. Longer answers are compared as they stand."""

# ---------------------------------------------------------------------------------------------------- extraction

STOPS = ("</s>", "<|im_end|>", "<|endoftext|>")
"""What ends a response, as in the reward of SimpleRL-reason v0."""


def extract(text: str, stops: Sequence[str] = STOPS) -> str | None:
    r"""Return the answer of a response: what its last closed, non-empty box holds; None without one.

    Boxes of one line with nothing but space between them, and boxes that a comma, ``and`` or ``or`` joins, are one
    list: ``\boxed{1} and \boxed{2}``.
    Only the text before the first stop string counts, and of a response that thinks in ``<think>...</think>`` only what
    follows the last closing tag.
    """
    text = cut_at_stop(text, stops)
    opening, _, answer = text.rpartition("</think>")
    if not opening and "<think>" in text:
        return None
    boxes = _boxes(answer)
    return last_joined(answer, boxes) if boxes else None


def last_joined(text: str, pieces: Sequence[tuple[int, int, str]]) -> str:
    """Return the last of some pieces of the text (start, end, content), together with those that are joined to it."""
    start, _, content = pieces[-1]
    contents = [content]
    for before, end, other in reversed(pieces[:-1]):
        if start - end > _MAX_JOINT or not _JOINT.fullmatch(_SPACING.sub("", text[end:start])):
            break
        contents.insert(0, other)
        start = before
    return ", ".join(contents) if len(set(contents)) > 1 else content


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the part of ``text`` before the earliest stop string, so nothing behind it can be scored."""
    ends = [at for at in map(text.find, stops) if at >= 0]
    return text[: min(ends)] if ends else text


_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def last_boxed(text: str, *, closed: bool = False) -> str | None:
    r"""Return what the last ``\boxed{...}`` or ``\fbox{...}`` holds, or None without one.

    Nested braces are matched and escaped ones (``\{``) are left alone. Of nested boxes the inner one counts.

    Args:
        text: the response.
        closed: ignore boxes that are empty or whose brace is never closed (a truncated response). By default such a
            box counts, and an unclosed one gives all that follows it.
    """
    closing = closing_braces(text)
    for box in reversed(list(_BOX.finditer(text))):
        end = closing.get(box.end() - 1)
        content = text[box.end() : end].strip()
        if not closed or (content and end is not None):
            return content
    return None


_MAX_JOINT = 60
"""Characters between two parts of one list."""
_SPACING = re.compile(r"[^\S\n]+|\$|\\q?quad|\\[()\[\],;:! ]|\\text(?=\s*\{)|[{}]")
_JOINT = re.compile(r"(?:\n*(?:[,;]\n*(?:and|or)?|and|or)\n*)?")
"""What may stand between them once spacing has gone: two boxes on lines of their own are two answers."""


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of every box that is closed and not empty; of nested ones the inner one."""
    closing = closing_braces(text)
    found: list[tuple[int, int, str]] = []
    for box in _BOX.finditer(text):
        end = closing.get(box.end() - 1)
        if end is not None and (content := text[box.end() : end].strip()):
            while found and found[-1][1] > end:  # the box around this one
                found.pop()
            found.append((box.start(), end + 1, content))
    return found


def after_last_word_boxed(text: str) -> str:
    r"""Return what follows the last bare word ``boxed``, the way the SimpleRL-reason v0 reward reads a prediction.

    A brace right behind the word is matched (an unclosed one gives all that follows); without one the prediction
    ends at the next ``$``. Source: ``extract_answer`` of the Qwen2.5-Math evaluation, branch ``"boxed" in pred_str``.
    """
    tail = text.rpartition("boxed")[2]
    if tail.startswith("{"):
        return tail[1 : closing_braces(tail).get(0)].strip()
    return tail.partition("$")[0].strip()


# ------------------------------------------------------------------------------------------------------ equality


def equal(pred: str, gold: str, leniency: Leniency = EXACT) -> bool:
    r"""Whether the predicted answer equals the reference answer, by the rules of docs/rewards.md.

    Args:
        pred: the prediction, LaTeX or plain text.
        gold: the reference answer, likewise.
        leniency: what the data set forgives in numbers.
    """
    pred, gold = pred.strip(), gold.strip()
    if not pred or not gold:
        return False
    if pred == gold:
        return True
    return max(len(pred), len(gold)) <= MAX_LENGTH and _remembered(pred, gold, leniency)


def compare(pred: str, gold: str, leniency: Leniency = EXACT) -> bool:
    """:func:`equal` for two texts that differ and are not long, without the memory of earlier pairs."""
    pred, gold = plain(pred), plain(gold)
    if pred == gold:
        return bool(pred)
    letter, chosen = _choice(gold), _choice(pred)
    if letter is not None or chosen is not None:  # one of the two may carry what it chooses
        letter, chosen = letter or _choice_with_content(gold), chosen or _choice_with_content(pred)
        if letter is not None and chosen is not None:
            return chosen == letter
    if _same_choices(pred, gold) or _same_choices(gold, pred):
        return True
    left, right = _readings(pred), _readings(gold)
    if _DECIMAL_COMMA.fullmatch(pred) and any(_is_decimal(reading) for reading in right):
        left.extend(_readings(pred.replace(",", ".")))
    if (counted := _CHOOSE.sub(r"\\binom{\1\3}{\2\4}", pred)) != pred:  # C(5,2) is a point too, so not in the gold
        left.extend(_readings(counted))
    decided = bool(left) and bool(right)
    for reading in left:
        for other in right:
            try:
                if same(reading, other, leniency):
                    return True
            except (Undecided, RecursionError):
                decided = False
    if decided:
        return False
    return _bare(pred) == _bare(gold) or second_opinion(pred, gold)


def _bare(text: str) -> str:
    """The text without text fonts and without its spaces, but for those between digits."""
    return _SPACE.sub("", " ".join(_TEXT.sub(r"\1", text).split()))


_remembered = lru_cache(maxsize=1 << 14)(compare)
_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}")
_SPACE = re.compile(r" (?!\d)|(?<!\d) ")
"""Spaces other than between digits."""


_DECIMAL_COMMA = re.compile(r"-?(?:\d+,(?:\d{1,2}|\d{4,})|0,\d{3})")
"""Not ``1,250``, which is a thousand."""


_CHOOSE = re.compile(
    r"(?<![a-zA-Z\\_])C\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)|(?:^|\{\s*\})\s*[_^]\s*\{?(\d+)\}?\s*C\s*_\s*\{?(\d+)\}?"
)


def _is_decimal(node: Node) -> bool:
    """Whether the answer is one rational number and no integer: then ``0,5`` is no list."""
    try:
        value = exact(node)
    except (Undecided, RecursionError):
        return False
    return value is not None and value.denominator != 1


def _readings(text: str) -> list[Node]:
    """The one or two ways to read a text: with a comma as a separator, and as a mark between thousands."""
    found = []
    for thousands in (False, True) if has_thousands(text) else (False,):
        try:
            found.append(parse(text, thousands=thousands))
        except Undecided:
            continue
    return found


_FONT = r"(?:\\(?:text|textbf|mathrm|textrm|mathbf)\s*\{)?\s*"
_CHOICE = re.compile(rf"(?:(?i:option|choice|answer)\s*:?\s*)?{_FONT}\(?\s*([A-Z])\s*\)?[.:]?\s*\}}?")
_CHOICES = re.compile(r"[A-H]{2,8}")
_ENUMERATED_CHOICES = re.compile(r"[A-H](?:\s*(?:,\s*and|,|and)\s*[A-H]){1,7}")
_CONTENT = r"(?:\s*\})?(?:\s+-(?=\S)|\s*(?=[^\s+*/^=<>,}-])).+"
_CHOICE_WITH_CONTENT = re.compile(rf"{_FONT}(?:\(([A-Z])\)|([A-Z])[).:])(?![^()]*\([A-Z]\)){_CONTENT}", re.DOTALL)


def _same_choices(word: str, enumerated: str) -> bool:
    """Whether ``ABD`` names the letters of ``A, B, D``."""
    if not (_CHOICES.fullmatch(word) and _ENUMERATED_CHOICES.fullmatch(enumerated)):
        return False
    return sorted(word) == sorted(re.findall("[A-H]", enumerated))


def _choice(text: str) -> str | None:
    """The letter of an answer to a multiple-choice question that is nothing but a letter."""
    found = _CHOICE.fullmatch(text)
    return found[1] if found else None


def _choice_with_content(text: str) -> str | None:
    r"""The letter of ``(B) 5`` or ``B. 5``; None where two letters are offered, or one alone."""
    found = _CHOICE_WITH_CONTENT.fullmatch(text)
    return None if found is None or _CHOICE.fullmatch(text) else found[1] or found[2]
