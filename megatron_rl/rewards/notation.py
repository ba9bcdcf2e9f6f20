r"""One spelling for each answer: LaTeX, plain text and Unicode are rewritten to the same plain LaTeX.

Only text is rewritten here; nothing is evaluated. Both sides of a comparison go through the same functions, so a rule
that is too eager can make two different answers look alike, and every rule below is therefore narrow.
"""

from __future__ import annotations

import re
import unicodedata

_UNICODE = {
    "−": "-",
    "–": "-",
    "—": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": "/",
    "⁄": "/",
    "∕": "/",
    "π": r"\pi ",
    "θ": r"\theta ",
    "√": r"\sqrt ",
    "°": r"^\circ ",
    "∞": r"\infty ",
    "≤": r"\leq ",
    "≥": r"\geq ",
    "≠": r"\neq ",
    "±": r"\pm ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "€": "$",
    "£": "$",
}

# In this order. Each pattern is linear: no quantifier stands inside another one over the same characters.
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\{,\}", ","),
        (r"(?<=[\d,])\\[!,;: ]\s*(?=\d{3}(?!\d))", ""),  # marks between groups of three digits
        (r"\\\$|\$|\\\((?![a-zA-Z])|\\\)|(?<!\\)\\\[|(?<!\\)\\\]", " "),  # mathematics delimiters and currency
        (r"(?<!\\)\\[!,;: ]|~|\\q?quad(?![a-zA-Z])|\\(?:display|text)style(?![a-zA-Z])", " "),
        (r"\\(?:left|right)(?![a-zA-Z])\s*\.?|\\[bB]igg?[lmr]?(?![a-zA-Z])", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\leq?(?:slant)?(?![a-zA-Z])|<=", r"\\leq "),
        (r"\\geq?(?:slant)?(?![a-zA-Z])|>=", r"\\geq "),
        (r"\\ne(?![a-zA-Z])|!=", r"\\neq "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\colon(?![a-zA-Z])", ":"),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r"\\(?:bar|overline)(?![a-zA-Z])", r"\\overline"),
        (r"\\mathbb\s*R(?![a-zA-Z])", r"\\mathbb{R}"),
        (r"\*\*", "^"),
        (r"\\(?:text|math)(?:rm|bf|it|sf|tt|normal|up)(?![a-zA-Z])|\\[mh]box(?![a-zA-Z])", r"\\text"),
        (r"\\(?:vec|hat|boldsymbol|operatorname)\s*\{([^{}]*)\}", r"\1"),
        (r"\\text\s+([a-zA-Z])(?![a-zA-Z])", r"\\text{\1}"),
        (r"(?<=\d)\\text\s*\{([A-Zeijkxyz])\}", r"\1"),  # not m, s, g, ...: behind a number they are units
        (r"(?<![\d\s}])\\text\s*\{\s*([a-zA-Z])\s*\}", r" \1 "),
        (r"\\text\s*\{\s*\(([A-Z])\)\s*\}", r"(\1)"),
        (r"(?:\\text\s*\{[\s,]*|(?<=[\s\d}),]))(?:and|or)(?:\s*\}|(?=[\s\d\\(-]))", ","),
        (r"(?<![\\a-zA-Z])sqrt(?![a-zA-Z])", r"\\sqrt"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"(?<![\\a-zA-Z])(?:infinity|infty|inf|oo)(?![a-zA-Z])", r"\\infty "),
        (r"\\frac\s*(\d|[a-zA-Z])", r"\\frac{\1}"),
        (r"(\\frac\{[^{}]*\})\s*(\d|[a-zA-Z])", r"\1{\2}"),
        (r"\\sqrt\s*(\d|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"\^\s*\{?\s*\\(?:circ|degree)(?![a-zA-Z])\s*\}?|\\degree(?![a-zA-Z])", r"\\degree "),
        (r"\s+", " "),
        (r" (?![0-9a-zA-Z])|(?<![0-9a-zA-Z]) ", ""),
        (r"(\\[a-zA-Z]+) (?=\d)", r"\1"),
        (r",{2,}", ","),
        (r"([\^_])\{([0-9a-zA-Z])\}", r"\1\2"),
        (r"(^|[(\[,={])\+", r"\1"),
    )
)
_NUMBER_NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_NUMBER_NAMES.split())}
_REAL_LINE = r"(-\infty,\infty)"


def normalise(text: str) -> str:
    r"""Rewrite an answer to one spelling: one-line plain LaTeX without delimiters, sizing, styling or fonts.

    ``\text{...}`` is kept where it may be a unit or a word answer (see :func:`split_unit` and :func:`without_text`).

    Example:
        >>> normalise(r"$\left( \dfrac12,\; 3 \right)$.")
        '(\\frac{1}{2},3)'
    """
    if not text.isascii():
        text = _plain(text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip(" :;,").rstrip(" .;:,/")
    text = _without_outer_braces(_closed(text))
    if text == r"\mathbb{R}":
        return _REAL_LINE
    if text == r"\{\}":
        return r"\emptyset"
    return _NUMBER_WORDS.get(without_text(text).casefold(), text)


def _plain(text: str) -> str:
    """Replace non-ASCII characters by LaTeX or by their plain form; what has neither stays."""
    out: list[str] = []
    for character in text:
        if character.isascii():
            out.append(character)
        elif character in _UNICODE:
            out.append(_UNICODE[character])
        elif unicodedata.category(character) != "Cf":  # zero-width marks go
            kind, _, codes = unicodedata.decomposition(character).partition(" ")
            plain = "".join(chr(int(code, 16)) for code in codes.split()) if kind.startswith("<") else ""
            if kind == "<super>":
                out.append(f"^{{{plain}}}")
            elif kind == "<sub>":
                out.append(f"_{{{plain}}}")
            elif kind == "<fraction>":
                top, _, bottom = plain.partition("⁄")
                out.append(rf"\frac{{{top}}}{{{bottom}}}")
            else:
                out.append(unicodedata.normalize("NFKC", character))
    # Two raised characters in a row are one exponent.
    return re.sub(r"(?<=[\d-])\}[\^_]\{(?=[\d-])", "", "".join(out))


def _closed(text: str) -> str:
    """Close the groups that a truncated response left open."""
    depth = 0
    for token in re.findall(r"\\.|[{}]", text, re.DOTALL):
        if token == "{":
            depth += 1
        elif token == "}":
            depth = max(0, depth - 1)
    return text + "}" * depth


def _without_outer_braces(text: str) -> str:
    while text.startswith("{") and matching(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def matching(text: str, start: int) -> int | None:
    r"""Return the index of the last character of the bracket that closes the one at ``start``, or None.

    All of ``( [ {`` and ``\{`` count, and any closing one closes any opening one, so ``[1,2)`` is a pair.
    """
    depth = 0
    for token in _BRACKET.finditer(text, start):
        if token.group().lstrip("\\") in "([{":
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                return token.end() - 1
    return None


_BRACKET = re.compile(r"\\?[{}]|[()\[\]]")


def split_top(text: str, separator: str) -> list[str]:
    """Split at ``separator`` where it stands outside all brackets."""
    parts, depth, begin = [], 0, 0
    for token in re.finditer(rf"{re.escape(separator)}|{_BRACKET.pattern}", text):
        found = token.group()
        if found == separator:
            if depth == 0:
                parts.append(text[begin : token.start()])
                begin = token.end()
        else:
            depth += 1 if found.lstrip("\\") in "([{" else -1
    return [*parts, text[begin:]]


_UNIT_NAMES: dict[str, tuple[str, ...]] = {
    "%": ("%", r"\%", "percent", "percents"),
    "degree": (r"\degree", "degree", "degrees", "deg"),
    "radian": ("radian", "radians", "rad"),
    "dollar": ("dollar", "dollars", "usd"),
    "cent": ("cent", "cents"),
    "mm": ("mm", "millimeter", "millimeters"),
    "cm": ("cm", "centimeter", "centimeters"),
    "m": ("meter", "meters", "metre", "metres"),
    "km": ("km", "kilometer", "kilometers"),
    "inch": ("in", "inch", "inches"),
    "foot": ("ft", "foot", "feet"),
    "yard": ("yd", "yard", "yards"),
    "mile": ("mi", "mile", "miles"),
    "mph": ("mph", "miles per hour"),
    "second": ("sec", "second", "seconds"),
    "minute": ("min", "minute", "minutes"),
    "hour": ("hr", "hrs", "hour", "hours"),
    "day": ("day", "days"),
    "week": ("week", "weeks"),
    "month": ("month", "months"),
    "year": ("year", "years"),
    "gram": ("gram", "grams"),
    "kg": ("kg", "kilogram", "kilograms"),
    "pound": ("lb", "lbs", "pound", "pounds"),
    "liter": ("liter", "liters", "litre", "litres"),
    "unit": ("unit", "units"),
}
_KNOWN_UNITS = {spelling: unit for unit, spellings in _UNIT_NAMES.items() for spelling in spellings}
_AREA = {"square": "2", "sq": "2", "cubic": "3"}
_BARE_UNIT = re.compile(
    r"(?P<value>.*[\d)}\]i])\s*(?P<unit>"
    + "|".join(re.escape(name) for name in sorted(_KNOWN_UNITS, key=len, reverse=True))
    + r")(?:\^(?P<power>[23]))?"
)
_TEXT_UNIT = re.compile(r"(?P<value>.+?)\s*\\text\s*\{(?P<unit>[^{}]*)\}(?:\^(?P<power>[23]))?")
_BASE = re.compile(r"(?P<value>[0-9A-Z]+)_(?:\{(?P<long>\d{1,2})\}|(?P<short>\d))")
# Words after a number that change its value or its meaning, so they are no unit to be left out.
_NOT_UNIT_NAMES = (
    "hundred thousand million billion trillion dozen or and not less more than if mod modulo times plus minus to "
    "over by only except between"
)
_NOT_UNITS = frozenset(_NOT_UNIT_NAMES.split())


def split_unit(text: str) -> tuple[str, str]:
    r"""Split a normalised answer into its value and its unit in one spelling (``""`` without one).

    A unit is ``%``, degrees, a number base (``1011_2``), a name from a table, or any ``\text{...}`` behind a number.

    Example:
        >>> split_unit(r"36\text{ square inches}")
        ('36', 'inch^2')
    """
    if based := _BASE.fullmatch(text):
        return based["value"], f"base {based['long'] or based['short']}"
    found = _TEXT_UNIT.fullmatch(text) or _BARE_UNIT.fullmatch(text)
    if found is None:
        return text, ""
    words = found["unit"].strip(" .,").casefold().split()
    power = found["power"] or ""
    if words and words[0] in _AREA:
        power, words = _AREA[words[0]], words[1:]
    name = " ".join(words)
    known = _KNOWN_UNITS.get(name)
    behind_a_number = found["value"][-1] in "0123456789)}"
    if known is None and (not name or not behind_a_number or not _NOT_UNITS.isdisjoint(words)):
        return text, ""
    unit = known or (name.removesuffix("s") if len(name) > 3 else name)
    return found["value"], f"{unit}^{power}" if power else unit


def without_text(text: str) -> str:
    r"""Unwrap every ``\text{...}``."""
    return re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip(" .")
