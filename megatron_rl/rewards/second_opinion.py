r"""What ``math_verify`` says about two formulas that our own grammar or budgets leave undecided.

It parses LaTeX into sympy expressions. It gets to see short text only, made of a whitelist of characters and commands,
without what explodes when evaluated. None of its readings goes through Python's ``eval``.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache

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
_SUBSCRIPT = re.compile(r"[\d_}]\s*_")
"""Below a number it is a base, which ``math_verify`` overlooks."""
_SIDE_BY_SIDE = re.compile(r"(?<![\^\d.])[\d.]+\s+[\d.]")
"""Two numbers, of which ``math_verify`` makes their sum."""
_POWER_OF_TEN = re.compile(r"\d[eE][+-]?\d")
_LABEL = re.compile(r"([a-zA-Z])\s*=(?!.*=)\s*")
_SYMBOL = re.compile(r"[a-zA-Z]|\\[a-zA-Z]+")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[pbv]?matrix\}")
# What grows without bound when evaluated: towers, powers of powers, large factorials and binomials.
_EXPLOSIVE = re.compile(r"\^-?\w*\^|\^\d{4}|\)\^\{?\d*\}?\)\^|\d{3,}!|[)}!]!|\\binom(?!\{\w{1,2}\}\{\w{1,2}\})")
_EXPLOSIVE_EXPONENT = re.compile(r"[\^!]|\d{4}|\\binom")


def second_opinion(pred: str, gold: str) -> bool:
    """Whether ``math_verify`` calls two answers in plain text equal; False for what it must not see."""
    label, other = _LABEL.match(pred), _LABEL.match(gold)
    if label and other and label[1] != other[1]:
        return False
    pred, gold = pred[label.end() if label else 0 :], gold[other.end() if other else 0 :]
    if not (_is_safe_formula(pred) and _is_safe_formula(gold)):
        return False
    if _POWER_OF_TEN.search(pred) or _POWER_OF_TEN.search(gold):
        return False  # it reads the e of 1e11 as a number
    if ("=" in pred) != ("=" in gold):
        return False  # of a chain that does not hold (6/0 = 3) math_verify takes the last member
    if _SYMBOL.fullmatch(pred) and _SYMBOL.fullmatch(gold):
        return False  # two symbols that are spelt differently; math_verify ignores case
    left, right = _parse(pred), _parse(gold)
    if not left or not right:
        return False
    from math_verify import verify

    # The default of 6 rounds 0.0010005 to 0.001. No time-out of its own: its alarm counts wall time, cannot stop C
    # code, and the worker process around it has a deadline already.
    return bool(verify(list(right), list(left), float_rounding=12, timeout_seconds=None))


def preload() -> None:
    """Import sympy and the LaTeX grammar, which takes a second or two."""
    _parse(r"\sqrt{2}")


def _is_safe_formula(text: str) -> bool:
    if len(text) > _MAX_FORMULA or not _CHARACTERS.fullmatch(text) or _explodes(text):
        return False
    if _SUBSCRIPT.search(text) or _SIDE_BY_SIDE.search(text):
        return False
    rest = _ENVIRONMENT.sub(" ", text)
    return _depth(rest) <= _MAX_DEPTH and all(name in _COMMANDS for name in re.findall(r"\\([a-zA-Z]+)", rest))


def _explodes(text: str) -> bool:
    if _EXPLOSIVE.search(text):
        return True
    exponents = (text[at.end() :] for at in re.finditer(r"\^[({]", text))
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
