r"""Find the answer in a response and decide whether it equals the reference answer.

``equal`` works in layers, cheap to dear: text as it stands, text in one spelling, exact rational numbers, tuples, sets
and intervals element by element, and only then ``math_verify`` (LaTeX to sympy) on what passes a whitelist. No layer
evaluates text as Python. The last layer can be slow on hostile input: score model text through
:class:`megatron_rl.rewards.service.RewardService`, whose processes have a deadline.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from megatron_rl.rewards.notation import matching, normalise, split_top, split_unit, without_text

_MAX_LENGTH = 1000
"""Characters. Longer answers are compared as they stand."""
_MAX_ITEMS = 40
"""Elements of a list, set or union; longer ones are compared as text."""
_MAX_NESTING = 6
"""Levels of lists within lists."""

# ---------------------------------------------------------------------------------------------------- extraction


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
        closed: ignore boxes whose brace is never closed (a truncated response). By default such a box gives all
            that follows it.
    """
    closing = _closing_braces(text)
    for box in reversed(list(_BOX.finditer(text))):
        end = closing.get(box.end() - 1)
        if end is not None or not closed:
            return text[box.end() : end].strip()
    return None


def after_last_word_boxed(text: str) -> str:
    r"""Return what follows the last bare word ``boxed``, the way the SimpleRL-reason v0 reward reads a prediction.

    A brace right behind the word is matched (an unclosed one gives all that follows); without one the prediction
    ends at the next ``$``. Source: ``extract_answer`` of the Qwen2.5-Math evaluation, branch ``"boxed" in pred_str``.
    """
    tail = text.rpartition("boxed")[2]
    if tail.startswith("{"):
        return tail[1 : _closing_braces(tail).get(0)].strip()
    return tail.partition("$")[0].strip()


def _closing_braces(text: str) -> dict[int, int]:
    """Map the index of each unescaped ``{`` that is closed to the index of its ``}``, in one pass."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if token.group() == "{":
            opened.append(token.start())
        elif token.group() == "}" and opened:
            closing[opened.pop()] = token.start()
    return closing


# ------------------------------------------------------------------------------------------------------ equality


def equal(pred: str, gold: str) -> bool:
    r"""Whether the predicted answer equals the reference answer.

    Numbers are compared exactly, without a tolerance and without a factor of 100. Brackets count: ``[1,2)`` is not
    ``(1,2)``. Tuples are ordered; sets and bare lists (``1,2``) are not. A unit, a percent sign or a label (``x=``)
    may stand on one side only; two different units are unequal. An empty answer equals nothing.

    Args:
        pred: the prediction, LaTeX or plain text.
        gold: the reference answer, likewise.
    """
    pred, gold = pred.strip(), gold.strip()
    if not pred or not gold:
        return False
    if pred == gold:
        return True
    if max(len(pred), len(gold)) > _MAX_LENGTH:
        return False
    return _equal(normalise(pred), normalise(gold), _MAX_NESTING)


def _equal(pred: str, gold: str, nesting: int) -> bool:
    if pred == gold:
        return bool(pred)
    pred, gold = _without_lone_label(pred, gold)
    pred, pred_unit = split_unit(pred)
    gold, gold_unit = split_unit(gold)
    if pred_unit and gold_unit and pred_unit != gold_unit:
        return False
    if _equal_values(pred, gold, nesting):
        return True
    # A percent sign on one side only: 25% is 25 where a percentage is asked for, and 0.25 where a number is.
    left, right = rational(pred), rational(gold)
    if left is None or right is None or "%" not in (pred_unit, gold_unit) or pred_unit == gold_unit:
        return False
    return left == 100 * right if pred_unit == "%" else 100 * left == right


def _equal_values(pred: str, gold: str, nesting: int) -> bool:
    left, right = rational(pred), rational(gold)
    if left is not None and right is not None:
        return left == right
    union = _equal_unions(pred, gold, nesting)
    if union is not None:
        return union
    listed = _equal_sequences(pred, gold, nesting)
    if listed is not None:
        return listed
    pred, gold = _without_parentheses(pred), _without_parentheses(gold)
    if pred == gold:
        return bool(pred)
    if re.fullmatch(r"[A-Z]", gold) and (choice := _CHOICE.fullmatch(pred)):
        return choice[1] == gold
    if _is_word(pred) or _is_word(gold):
        return without_text(pred).casefold() == without_text(gold).casefold()
    return _second_opinion(pred, gold)


_LABEL = r"(?:\\?[a-zA-Z]+(?:_(?:\w|\{\w+\}))?|[a-zA-Z]\([a-zA-Z](?:,[a-zA-Z])*\)|\([a-zA-Z](?:,[a-zA-Z])+\))"
_LABELLED = re.compile(rf"{_LABEL}(?:=|\\in(?![a-zA-Z]) ?)(?P<value>[^=<>]+)")
_CHOICE = re.compile(r"(?:\\text\s*\{)?\(?([A-Z])[).](?![^()]*\([A-Z]\)).*", re.DOTALL)


def _without_lone_label(pred: str, gold: str) -> tuple[str, str]:
    r"""Drop ``x=``, ``f(x)=`` or ``x\in`` where only one side has it; two labels are left to be compared."""
    left, right = _LABELLED.fullmatch(_label_first(pred)), _LABELLED.fullmatch(_label_first(gold))
    if left and not right and not _has_relation(gold):
        return left["value"], gold
    if right and not left and not _has_relation(pred):
        return pred, right["value"]
    return pred, gold


def _label_first(text: str) -> str:
    """Write ``5=x`` as ``x=5``."""
    value, equals, label = text.partition("=")
    return f"{label}={value}" if equals and rational(value) is not None else text


def _has_relation(text: str) -> bool:
    return re.search(r"[=<>]|\\(?:leq|geq|neq|in)(?![a-zA-Z])", text) is not None


def _without_parentheses(text: str) -> str:
    while text.startswith("(") and text.endswith(")") and matching(text, 0) == len(text) - 1:
        text = text[1:-1]
    return text


def _is_word(text: str) -> bool:
    """Whether ``text`` has words and is therefore no formula: sympy would read the letters as a product."""
    bare = re.sub(r"\\(?:begin|end)\{[a-z]*\}|\\(?!text)[a-zA-Z]+", " ", text)
    return r"\text" in bare or re.search(r"[a-zA-Z]{4}|[a-zA-Z]{2,} [a-zA-Z]{2,}", bare) is not None


# ------------------------------------------------------------------------------------------------- exact numbers

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?: \d{3})+|\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(_DECIMAL)
_SCIENTIFIC = re.compile(rf"({_DECIMAL})(?:[eE]|(?:\\times|\\cdot|\*) ?10\^)\{{?([+-]?\d{{1,3}})\}}?")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{(\d+)\}")
_MIXED = re.compile(r"(\d+) ?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))")


def rational(text: str, nesting: int = 4) -> Fraction | None:
    r"""Read a normalised integer, decimal, repeating decimal, fraction, mixed number or ``a\times10^b`` exactly.

    Returns:
        The value, or None for anything else (also for a zero denominator and exponents beyond three digits).
    """
    if nesting == 0:
        return None
    text = _without_parentheses(text)
    if text[:1] in ("-", "+"):
        rest = text[1:]
        value = None if rest[:1] in ("-", "+") else rational(rest, nesting - 1)
        return -value if value is not None and text[0] == "-" else value
    if _PLAIN.fullmatch(text):
        return _decimal(text)
    if power := _SCIENTIFIC.fullmatch(text):
        return _decimal(power[1]) * Fraction(10) ** int(power[2])
    if repeating := _REPEATING.fullmatch(text):
        whole, fixed, cycle = repeating.groups()
        nines = 10 ** len(fixed) * (10 ** len(cycle) - 1)
        return int(whole or 0) + Fraction(int(fixed + cycle) - int(fixed or 0), nines)
    if mixed := _MIXED.fullmatch(text):
        part = _quotient(mixed[2] or mixed[4], mixed[3] or mixed[5], nesting)
        return None if part is None else int(mixed[1]) + part
    if text.startswith(r"\frac{"):
        middle = matching(text, 5)
        if middle is not None and text[middle + 1 : middle + 2] == "{" and matching(text, middle + 1) == len(text) - 1:
            return _quotient(text[6:middle], text[middle + 2 : -1], nesting)
    top, *bottom = split_top(text, "/")
    return _quotient(top, bottom[0], nesting) if len(bottom) == 1 else None


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", "").rstrip("."))


def _quotient(top: str, bottom: str, nesting: int) -> Fraction | None:
    numerator, denominator = rational(top, nesting - 1), rational(bottom, nesting - 1)
    return None if numerator is None or not denominator else numerator / denominator


# ------------------------------------------------------------------------------- tuples, sets, intervals, unions


def _equal_unions(pred: str, gold: str, nesting: int) -> bool | None:
    """Compare unions part by part in any order; None where neither side is one."""
    left, right = split_top(pred, r"\cup"), split_top(gold, r"\cup")
    if len(left) == len(right) == 1:
        return None
    if (len(left) == 1 and _has_relation(pred)) or (len(right) == 1 and _has_relation(gold)):
        return None
    return nesting > 0 and _match_in_any_order(left, right, nesting - 1)


def _equal_sequences(pred: str, gold: str, nesting: int) -> bool | None:
    """Compare tuples, sets, intervals and lists; None where neither side is one, or the other is a relation."""
    left, right = _sequence(pred), _sequence(gold)
    if left is None and right is None:
        return None
    if nesting == 0:
        return False
    if left is None or right is None:
        single, other = (right, pred) if left is None else (left, gold)
        if _has_relation(other):
            return None
        assert single is not None
        brackets, items = single
        return brackets == r"\{ \}" and len(items) == 1 and _equal(items[0], other, nesting - 1)
    (left_brackets, left_items), (right_brackets, right_items) = left, right
    kinds = {left_brackets, right_brackets}
    if kinds <= {"", r"\{ \}"}:
        return _match_in_any_order(left_items, right_items, nesting - 1)
    # A tuple may be written without its parentheses. Any other two brackets must be the same.
    if len(kinds) == 2 and kinds != {"", "( )"}:
        return False
    return len(left_items) == len(right_items) and all(
        _equal(a, b, nesting - 1) for a, b in zip(left_items, right_items, strict=True)
    )


def _sequence(text: str) -> tuple[str, list[str]] | None:
    r"""Split a bracketed or bare list into ``(brackets, items)``; None for what is no list of items."""
    opening = next((bracket for bracket in ("(", "[", r"\{") if text.startswith(bracket)), "")
    if opening and matching(text, 0) == len(text) - 1:
        closing = text[-2:] if text.endswith(r"\}") else text[-1]
        items = split_top(text[len(opening) : -len(closing)], ",")
        if len(items) > 1 or opening == r"\{":
            return f"{opening} {closing}", items
        return None
    if rational(text) is not None:  # 10,080 is one number
        return None
    items = [signed for item in split_top(text, ",") for signed in _both_signs(item)]
    return ("", items) if len(items) > 1 else None


def _both_signs(item: str) -> list[str]:
    r"""Write ``a\pm b`` as the two values it stands for."""
    parts = re.split(r"\\pm ?", item)
    if len(parts) != 2 or _has_relation(parts[1]):
        return [item]
    before, after = parts
    bare = before == "" or before.endswith("=")
    return [f"{before}{'' if bare else '+'}{after}", f"{before}-{after}"]


def _match_in_any_order(left: Sequence[str], right: Sequence[str], nesting: int) -> bool:
    """Pair the items one to one. Greedy is enough because equality of answers is transitive."""
    if len(left) != len(right) or len(left) > _MAX_ITEMS:
        return False
    remaining = list(right)
    for item in left:
        partner = next((other for other in remaining if _equal(item, other, nesting)), None)
        if partner is None:
            return False
        remaining.remove(partner)
    return True


# -------------------------------------------------------------------------------------- second opinion: math_verify

_MAX_FORMULA = 300
"""Characters that ``math_verify`` gets to see."""
_MAX_DEPTH = 12
"""Nested brackets: its parser takes seconds on deeper ones."""
_CHARACTERS = re.compile(r"[0-9a-zA-Z\\{}()\[\]^_+\-*/=<>|!.,& ]*")
_COMMAND_NAMES = """
    frac sqrt pi cdot times div pm mp infty leq geq neq in cup cap emptyset mathbb binom degree
    sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp lg max min gcd
    alpha beta gamma delta epsilon theta lambda mu nu phi varphi rho sigma tau omega
    begin end lfloor rfloor lceil rceil overline
"""
_COMMANDS = frozenset(_COMMAND_NAMES.split())
_SYMBOL = re.compile(r"[a-zA-Z]|\\[a-zA-Z]+")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[pbv]?matrix\}")
# What grows without bound when evaluated: towers, powers of powers, large factorials and binomials.
_EXPLOSIVE = re.compile(r"\^-?\w*\^|\^\d{4}|\)\^\{?\d*\}?\)\^|\d{3,}!|[)}!]!|\\binom(?!\{\w{1,2}\}\{\w{1,2}\})")
_EXPLOSIVE_EXPONENT = re.compile(r"[\^!]|\d{4}|\\binom")


def _second_opinion(pred: str, gold: str) -> bool:
    if not (_is_safe_formula(pred) and _is_safe_formula(gold)):
        return False
    if _SYMBOL.fullmatch(pred) and _SYMBOL.fullmatch(gold):
        return False  # two symbols that are spelt differently; math_verify ignores case
    left, right = _parse(pred), _parse(gold)
    if not left or not right:
        return False
    from math_verify import verify

    # The default of 6 rounds 0.0010005 to 0.001. No time-out of its own: its alarm counts wall time, cannot stop C
    # code, and the worker process around it has a deadline already.
    return bool(verify(list(right), list(left), float_rounding=12, timeout_seconds=None))


def _is_safe_formula(text: str) -> bool:
    if len(text) > _MAX_FORMULA or not _CHARACTERS.fullmatch(text) or "__" in text or _explodes(text):
        return False
    rest = _ENVIRONMENT.sub(" ", text)
    return _depth(rest) <= _MAX_DEPTH and all(name in _COMMANDS for name in re.findall(r"\\([a-zA-Z]+)", rest))


def _explodes(text: str) -> bool:
    if _EXPLOSIVE.search(text):
        return True
    exponents = (text[at.end() - 1 : matching(text, at.end() - 1)] for at in re.finditer(r"\^[({]", text))
    return any(_EXPLOSIVE_EXPONENT.search(exponent) for exponent in exponents)


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


@lru_cache(maxsize=256)
def _parse(text: str) -> tuple[object, ...]:
    """Parse one formula with ``math_verify``'s LaTeX grammar; empty where it cannot be read."""
    # Here and not at the top: importing sympy and the grammar takes about a second, and the trainer needs neither.
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about the time-out that is left to the worker
    # Only the LaTeX grammar: the library's other reading of an expression goes through sympy's parse_expr, an eval.
    found = parse(
        rf"$\boxed{{{text}}}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return tuple(found)
