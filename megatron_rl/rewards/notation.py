r"""From the text of an answer to tokens: LaTeX, plain text and Unicode come out alike.

Nothing is evaluated here. Both sides of a comparison go through the same functions, so every rule is narrow: one that
is too eager would make two different answers look alike.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from megatron_rl.rewards.expressions import Undecided

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
    "√": " sqrt ",
    "∛": " cbrt ",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "∞": r"\infty ",
    "≤": r"\leq ",
    "⩽": r"\leq ",
    "≥": r"\geq ",
    "⩾": r"\geq ",
    "≠": r"\neq ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "∑": r"\sum ",
    "′": "'",
    "…": r"\ldots ",
    "∠": r"\angle ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "Å": r"\AA ",
    "\N{ANGSTROM SIGN}": r"\AA ",
    "\N{MICRO SIGN}": r"\mu ",
    "、": ",",
    "。": ".",
}
_GREEK = frozenset(
    (
        "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho sigma tau "
        "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar nabla"
    ).split()
)
_GREEK_LETTERS = dict(zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ", (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
).split(), strict=True))  # fmt: skip

# In this order. Each pattern is linear: no quantifier stands inside another one over the same characters.
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)(?:\{,\}|,\\!)\s*(?=\d{3}(?!\d))", ""),  # a comma that cannot be a separator of a list
        (r"(?<=\d)\{[,.]\}(?=\d)", "."),  # nor can this one: the decimal comma
        (r"\{,\}", ","),
        (r"(?<=\d)(?<!\d\d\d\d)\\[,;: ]\s*(?=\d{3}(?!\d))", ""),  # thin spaces between groups of three digits
        (r"\\\$|\$|(?<!\\)\\\(|(?<!\\)\\\)|(?<!\\)\\\[|(?<!\\)\\\]", " "),  # mathematics delimiters and currency
        (r"(?<=[\d})])\s*\\q?quad\s*(?=-?\d|\\[dt]?frac(?![a-zA-Z])|\\sqrt(?![a-zA-Z])|[a-z]\s*=)", ", "),  # a list
        (
            r"(?<!\\)\\[!,;:> ]|~|\\q?quad"
            r"|\\(?:displaystyle|textstyle|limits|nolimits|hfill|(?:math)?strut)(?![a-zA-Z])",
            " ",
        ),
        (r"\\(?:left|right)(?![a-zA-Z])\s*\.?|\\[bB]igg?[lmr]?(?![a-zA-Z])", " "),
        (r"\\[hv]?phantom\s*(?:\{[^{}]*\}|[^\s{])|\\(?:h|v)space\*?\s*\{[^{}]*\}", " "),
        (r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![a-zA-Z]))", r" \\degree "),
        (r"\^\s*(?:\{\s*\\prime\s*\\prime\s*\}|\\prime\s*\\prime(?![a-zA-Z]))", "''"),
        (r"\^\s*(?:\{\s*\\prime\s*\}|\\prime(?![a-zA-Z]))", "'"),
        (r"(?<![\w}^.])(\d{1,20}(?:\.\d{1,20})?)\s*''", r"\1\\text{ arcsec}"),
        (r"\\mu\s*\\(?:text|mathrm)\s*\{\s*(m|s|g|A|V|F|C)\s*\}", r"\\text{micro\1}"),
        (r"\\(text|mathrm)\s*\{\s*\\mu\s*(m|s|g|A|V|F|C)\s*\}", r"\\text{micro\2}"),
        (r"\\(?:text|mathrm)\s*\{\s*([kM]?)\\Omega\s*\}", r"\\text{\1ohm}"),
        (r"\*\*", "^"),
        (r"\\(?:textcolor|colorbox|color)\s*\{[a-zA-Z]*\}", ""),
        (r"\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge)(?![a-zA-Z])", " "),
        (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\\(?:bf|rm|it|sf|tt|blacksquare)(?![a-zA-Z])", " "),
        (r"(?<=\d)\s*(?:\^\s*(?:\{\s*o\s*\}|o(?![a-zA-Z]))|\\textdegree(?![a-zA-Z]))", r" \\degree "),
        (r"\\degree\s*(?:\\(?:text|mathrm)\s*\{\s*([CF])\s*\}|([CF])(?![a-zA-Z]))", r"\\text{ degrees \1\2}"),
        (r"(?<![a-zA-Z])m\s*\\angle(?![a-zA-Z])", r"\\angle "),
        (r"-\s*(?=\\\{)", r"\\setminus "),
        (r"(?i)^\s*(?:\\text\s*\{\s*answer\s*:\s*\}|answer\s*:)", ""),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)|(?<=\d)\s[xX]\s(?=\d)", r" \\times "),
        (r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", r"\\overline{\1\2\3}"),
        (r"(?<=\.)(\d*)\\dot\s*\{?(\d)\}?", r"\1\\overline{\2}"),
        (r"(?<=\d)\s*m/s(?![a-zA-Z])", r"\\text{m/s}"),
        (r"<=|=<", r"\\leq "),
        (r">=|=>", r"\\geq "),
        (r"!=|/=", r"\\neq "),
        (r"\.\.\.|\\[cl]?dots[bc]?(?![a-zA-Z])", r"\\ldots "),
        # Repeating decimals: 0.1(6), and digits before an ellipsis that end with one three times or several twice.
        (r"(?<![\d.])(\d{0,20}\.\d{0,20})\((\d{1,20})\)(?![\d.(^!a-zA-Z\\])", r"\1\\overline{\2}"),
        (
            r"(?<![\d.])(\d{0,20}\.\d{0,20}?)(?:(\d)\2{2,20}|(\d{2,6}?)\3{1,10})\s*\\ldots(?![a-zA-Z])",
            r"\1\\overline{\2\3}",
        ),
        (r"(?<![a-zA-Z])per\s+cent(?![a-zA-Z])", "percent"),
        (r"(?<=\d)\s*(?:\\text\s*\{\s*to\s*\}|to)\s*(?=\d)", ":"),
        (r"\\\\\[[^\[\]]*\]", r"\\\\"),  # the row spacing of a matrix
        (r"\\[hc]line(?![a-zA-Z])", " "),
        (r"\\pmod\s*(\d+)", r"\\pmod{\1}"),
        (r"\\cr(?![a-zA-Z])", r"\\\\"),
        (r"\\imath(?![a-zA-Z])", " i "),
        (r"\\text\s*\{\s*\.\s*\}", " "),
        (r"^\s*[\"`'“]([a-zA-Z][a-zA-Z ]*)[\"'”]\s*$", r"\1"),
        (r"\((\d[\dA-F]*)\)\s*_", r"\1_"),  # bases
        (r"_\s*\{\s*\((\d+)\)\s*\}", r"_{\1}"),
        (r"(?<=\d)\s*(?:\\text\s*\{\s*\(?\s*base\s*(\d+)\)?\s*\}|\(?\s*base\s*(\d+)\)?)", r"_{\1\2}"),
        (r"(?<=\d)\s*\\text\s*\{\s*base\s*\}\s*(\d+)", r"_{\1}"),
        (r"\\!", ""),
        (r"(?<![a-zA-Z])([apAP])\.\s?[mM]\.?(?![a-zA-Z])", r"\1m"),
    )
)


_WHOLE_GROUP = re.compile(r"(?:\\(?:boxed|fbox)\s*)?\{")
_CURRENCIES = {"\\$": "dollars", "$": "dollars", "€": "euros", "£": "pounds"}
_AMOUNT = r"\d{1,40}(?:,\d{3}){0,20}(?:\.\d{1,40})?"
_PRICE = re.compile(
    rf"(?:\$\s*)?(?P<sign>-?)(?P<currency>\\\$|€|£)\s*(?P<amount>{_AMOUNT})(?:\s*\$)?"
    rf"|(?P<bare_sign>-?)\$\s*(?P<bare_amount>{_AMOUNT})"
)
"""A number behind its currency; elsewhere the sign cannot be told from a delimiter of mathematics."""


def plain(text: str) -> str:
    """The text in ASCII and without what only concerns its looks: delimiters, sizes, spacing, a final dot."""
    if price := _PRICE.fullmatch(text):
        sign, amount = price["sign"] or price["bare_sign"] or "", price["amount"] or price["bare_amount"]
        text = f"{sign}{amount}\\text{{ {_CURRENCIES[price['currency'] or '$']}}}"
    if not text.isascii():
        text = _ascii(text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text += "}" * _open_braces(text)  # of a truncated response
    closing = closing_braces(text)  # once: peeling off nested groups must not cost their depth times the length
    start, end = 0, len(text)
    while start < end:
        last = text[end - 1]
        if text[start].isspace():
            start += 1
        elif last.isspace() or last in ".;:,\\":  # with the backslash of a line break or of a space
            end -= 1
        elif (opened := _WHOLE_GROUP.match(text, start, end)) and closing.get(opened.end() - 1) == end - 1:
            start, end = opened.end(), end - 1
        else:
            break
    return text[start:end]


def _open_braces(text: str) -> int:
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth = max(0, depth + (token[0] == "{") - (token[0] == "}"))
    return depth


def _ascii(text: str) -> str:
    """Replace non-ASCII characters by LaTeX or by their plain form; what has neither stays."""
    out: list[str] = []
    raised = ""  # what opens the group that the last character is in
    for character in text:
        kind, plain_form = _decomposed(character)
        if kind in _RAISED:
            opening = _RAISED[kind]
            if raised == opening:  # two raised characters in a row are one exponent
                out[-1] = f"{out[-1][:-1]}{plain_form}}}"
            else:
                out.append(f"{opening}{plain_form}}}")
            raised = opening
            continue
        raised = ""
        out.append(plain_form)
    return "".join(out)


_RAISED = {"<super>": "^{", "<sub>": "_{"}


def _decomposed(character: str) -> tuple[str, str]:
    """The kind of a character in Unicode's tables and what stands for it in ASCII."""
    if character.isascii():
        return "", character
    if character in _UNICODE:
        return "", _UNICODE[character]
    if character in _GREEK_LETTERS:
        return "", rf"\{_GREEK_LETTERS[character]} "
    if unicodedata.category(character) in ("Cf", "Sc"):  # zero-width marks and currencies go
        return "", ""
    kind, _, codes = unicodedata.decomposition(character).partition(" ")
    parts = "".join(chr(int(code, 16)) for code in codes.split()) if kind.startswith("<") else ""
    parts = parts.replace("−", "-")
    if kind == "<fraction>":
        top, _, bottom = parts.partition("⁄")
        return kind, rf"\frac{{{top}}}{{{bottom}}}"
    return kind, parts if kind in _RAISED else unicodedata.normalize("NFKC", character)


# ------------------------------------------------------------------------------------------------------- tokens

Kind = Literal["number", "name", "word", "text", "command", "mark", "end"]


class Token(NamedTuple):
    r"""One token.

    ``number``: a decimal as written; ``name``: a letter or Greek name; ``word``: a run of letters; ``text``: what a
    ``\text{...}`` holds; ``command``: a LaTeX command with its backslash, also for plain ``sin``; ``mark``: the rest.
    """

    kind: Kind
    value: str


END = Token("end", "")
_SLASH = Token("mark", "/")

FUNCTIONS = frozenset(
    "sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot arcsec arccsc "
    "log ln lg exp cis max min gcd lcm abs sqrt".split()
)
_PLAIN_FUNCTIONS = {
    **{name: name for name in FUNCTIONS},
    "sqrt": "root of",  # unlike LaTeX's, it takes a whole number: sqrt21
    "cbrt": "cube root of",
    **{"asin": "arcsin", "acos": "arccos", "atan": "arctan", "infty": "infty", "inf": "infty", "oo": "infty"},
    **{"infinity": "infty", "Infinity": "infty"},
}
_ALIASES = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("le", "leqslant", "leqq"), "leq"),
    **dict.fromkeys(("ge", "geqslant", "geqq"), "geq"),
    **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **dict.fromkeys(("varnothing", "empty", "O"), "emptyset"),
    **dict.fromkeys(("times", "ast", "cdotp"), "cdot"),
    **dict.fromkeys(("setminus", "backslash", "smallsetminus"), "setminus"),
    **dict.fromkeys(("lvert", "rvert", "vert", "mid"), "|"),
    **dict.fromkeys(("lbrack",), "["),
    **dict.fromkeys(("rbrack",), "]"),
    **{"ne": "neq", "lt": "<", "gt": ">", "colon": ":", "lbrace": "{", "rbrace": "}", "lor": "or", "vee": "or"},
    **{"land": ",", "wedge": ",", "lg": "log", "bar": "overline", "thickapprox": "approx", "simeq": "approx"},
    **{
        "varphi": "phi",
        "varepsilon": "epsilon",
        "vartheta": "theta",
        "arctg": "arctan",
        "tg": "tan",
        "ctg": "cot",
        "infin": "infty",
        "rightarrow": "to",
    },
}
_AS_MARKS = frozenset("< > : | , or [ ]".split())
_JOINTS = {"and": ",", "or": "or"}
_WRAPPERS = frozenset(
    "text textrm textbf textit textsf texttt textnormal textup mathrm mathbf mathit mathsf mathtt mathnormal mbox hbox "
    "operatorname boldsymbol bm boxed fbox underline".split()
)
_ACCENTS = frozenset("vec hat tilde dot ddot widehat widetilde overrightarrow".split())
_FIELDS = {"R": "reals", "Z": "integers", "Q": "rationals", "N": "naturals", "C": "complexes"}
_SKIPPED = frozenset("angle triangle displaystyle left right measuredangle".split())

_LEXEME = re.compile(
    r"\s*(?:"
    r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4}(?![\d.a-zA-Z]))?)"
    r"|(?P<word>[a-zA-Z]+)"
    r"|\\(?P<command>[a-zA-Z]+)"
    r"|\\(?P<escaped>[{}\\|%&#_])"
    r"|(?P<mark>[()\[\]{}|^_+\-*/=<>!,;:&%'])"
    r")"
)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?![\d,]*\d)(?:\.\d+)?")
_GROUPS = re.compile(r"\d{1,3}(?: \d{3})+(?![\d ]*\d)(?!\s*/)(?:\.\d+)?")
_ONES_BEHIND = re.compile(r"[- ](?:one|two|three|four|five|six|seven|eight|nine)(?![a-z])", re.IGNORECASE)
_PADDED = re.compile(r"0\d")
_GROUP = re.compile(r"\s*\{")
_JOINT_IN_TEXT = re.compile(r",|\sand(?:\s|$)")
_JOINT_BEHIND_VALUE = re.compile(r",|\sand$")
_POWERED = r"[a-zA-Z]{1,12}(?:\^\{?-?\d\}?)?"
_UNIT_OF_SEVERAL = re.compile(rf"{_POWERED}(?:(?:\s*(?:/|\\cdot)\s*|\s+){_POWERED}){{0,5}}")
_PART_OF_UNIT = re.compile(r"([a-zA-Z]+)(?:\^\{?(-?\d)\}?)?|(/|\\cdot)")
_UNIT_FONT = re.compile(r"\\(?:text|mathrm)\s*(?:\{((?:[^{}]|\{[^{}]*\})*)\}|([a-zA-Z])(?![a-zA-Z]))")
_LETTER_AFTER_FONT = re.compile(r"\s*([a-zA-Z])(?![a-zA-Z])")
_MAX_TOKENS = 1500

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_NUMBER_WORDS = {word: number for number, word in enumerate(f"{_ONES} eighteen nineteen".split())}
_TENS = {word: 10 * (at + 2) for at, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split())}


def number_word(text: str) -> int | None:
    """The number below 100 that words say: ``five``, ``twenty-one``; None for other words."""
    words = text.casefold().replace("-", " ").split()
    if len(words) == 1:
        return _NUMBER_WORDS.get(words[0], _TENS.get(words[0]))
    if len(words) == 2 and words[0] in _TENS and 1 <= _NUMBER_WORDS.get(words[1], 0) <= 9:
        return _TENS[words[0]] + _NUMBER_WORDS[words[1]]
    return None


def has_thousands(text: str) -> bool:
    """Whether a comma may be read as a mark between groups of digits or as a separator."""
    return _THOUSANDS.search(text) is not None


def tokens(text: str, *, thousands: bool) -> list[Token]:
    """Split plain text (see :func:`plain`) into tokens.

    Args:
        text: the text.
        thousands: read ``1,234`` outside of brackets as one number and not as a list of two.

    Raises:
        Undecided: a character has no meaning here, or there are too many tokens.
    """
    return list(_Lexer(text, thousands).run())


class _Lexer:
    def __init__(self, text: str, thousands: bool) -> None:
        self.text = text
        self.thousands = thousands
        self.at = 0
        self.depth = 0
        self.last = END
        self.spaced = False
        self.read: list[Token] = []

    def run(self) -> Iterator[Token]:
        count = 0
        while self.text[self.at :].strip():
            for token in self._next():
                count += 1
                if count > _MAX_TOKENS:
                    raise Undecided("too many tokens")
                self.last = token
                self.read.append(token)
                if token.kind == "mark":
                    self.depth += (token.value in ("(", "[", "\\{")) - (token.value in (")", "]", "\\}"))
                yield token

    def _next(self) -> Iterator[Token]:
        found = _LEXEME.match(self.text, self.at)
        if found is None:
            raise Undecided(f"no meaning for {self.text[self.at : self.at + 10]!r}")
        kind = found.lastgroup
        assert kind is not None
        value = found[kind]
        start, self.at = found.start(kind), found.end()
        self.spaced = found[0][0].isspace()
        if kind == "number":
            if self.last == Token("mark", ",") and _PADDED.match(value) and self.text[start - 1] == ",":
                raise Undecided("digits behind a comma that are no number: 14,0000")
            yield Token("number", self._long_number(start) or value)
        elif kind == "word":
            yield from self._word(value)
        elif kind == "command":
            yield from self._command(value)
        elif kind == "escaped":
            yield Token("mark", "%" if value == "%" else f"\\{value}")
        else:
            yield Token("mark", "," if value == ";" else value)

    def _long_number(self, start: int) -> str | None:
        for pattern, wanted in ((_THOUSANDS, self.thousands and self.depth <= 0), (_GROUPS, True)):
            if wanted and (long := pattern.match(self.text, start)):
                self.at = long.end()
                return long[0].replace(",", "").replace(" ", "")
        return None

    def _word(self, word: str) -> Iterator[Token]:
        if word.casefold() in _TENS and (rest := _ONES_BEHIND.match(self.text, self.at)):
            word, self.at = word + rest[0], rest.end()
        number = number_word(word)
        if word.casefold() in _JOINTS:
            yield Token("mark", _JOINTS[word.casefold()])
        elif number is not None:
            yield Token("number", str(number))
        elif word in _PLAIN_FUNCTIONS and not (word in _UNITS and self._behind_value() and not self._opens()):
            yield Token("command", f"\\{_PLAIN_FUNCTIONS[word]}")
        elif word in _GREEK or len(word) == 1:
            yield Token("name", word)
        else:
            yield Token("word", word)

    def _opens(self) -> bool:
        return self.text[self.at : self.at + 1] in ("(", "{", "^", "_", "[")

    def _behind_value(self) -> bool:
        return self.last.kind in ("number", "text") or self.last.value in (")", "}", "|") or self._within_unit()

    def _behind_number(self) -> bool:
        r"""Behind ``5``, ``10^{-4}`` or ``\frac{1}{2}``."""
        number = self.read[-2:-1] if self.last == Token("mark", "}") else self.read[-1:]
        return bool(number) and number[0].kind == "number"

    def _within_unit(self) -> bool:
        r"""Behind the slash of ``\text{m}/`` or ``\text{cm}^{2}/``."""
        before = self.read[:-1]
        if self.last != Token("mark", "/"):
            return False
        while before and (before[-1].kind == "number" or before[-1].value in ("{", "}", "-")):
            before.pop()
        if before[-1:] == [Token("mark", "^")]:
            before.pop()
        elif len(before) < len(self.read) - 1:
            return False
        return bool(before) and before[-1].kind == "text"

    def _command(self, name: str) -> Iterator[Token]:
        if name in _WRAPPERS:
            content = self._argument()
            if content is not None:
                yield from self._wrapped(content)
        elif name in ("mathbb", "mathcal", "mathscr", "mathfrak"):
            content = (self._argument() or "").strip()
            field = _FIELDS.get(content) if name == "mathbb" else None
            yield Token("name", field or rf"\{name} {content}")
        elif name in _ACCENTS:
            yield Token(
                "name", rf"\{name} {(self._argument() or '').strip()}" if name != "vec" else self._argument() or ""
            )
        elif name in ("R", "Z", "Q", "N", "C"):
            yield Token("name", _FIELDS[name])
        elif name in _GREEK:
            yield Token("name", _ALIASES.get(name, name))
        elif _ALIASES.get(name, name) == "frac" and (unit_tokens := self._quotient_of_units()):
            yield from unit_tokens
        elif name == "AA":
            yield Token("text", "angstrom")
        elif name not in _SKIPPED:
            name = _ALIASES.get(name, name)
            kind: Kind = "mark" if name in _AS_MARKS or name in ("{", "}", "\\") else "command"
            yield Token(kind, name if name in _AS_MARKS else f"\\{name}")

    def _unit(self, words: str) -> list[Token] | None:
        r"""``cm^2`` or ``kJ\,mol^{-1}`` behind a value, in a text font; None where a part is no unit."""
        return None if words.isalpha() or not self._behind_value() else _product_of_units(words)

    def _quotient_of_units(self) -> list[Token] | None:
        r"""What follows ``\frac`` behind a value where it is ``{\mathrm{m}}{\mathrm{s}^2}``; None for anything else."""
        if not self._behind_value():
            return None
        start = self.at
        tokens_of: list[list[Token]] = []
        for half in (self._argument(), self._argument()):
            outside = _UNIT_FONT.sub("", half or "").replace("\\cdot", "")
            found = _product_of_units(_UNIT_FONT.sub(r"\1\2", half or "").strip())
            if found is None or _SLASH in found or any(map(str.isalpha, outside)):
                self.at = start
                return None
            tokens_of.append(found)
        top, bottom = tokens_of
        return top + [each for token in bottom for each in ((_SLASH, token) if token.kind == "text" else (token,))]

    def _argument(self) -> str | None:
        """The raw group behind a command, or the single letter; None where neither follows."""
        if _GROUP.match(self.text, self.at):
            end = closing_brace(self.text, self.text.index("{", self.at))
            if end is None:
                raise Undecided("a brace is not closed")
            content = self.text[self.text.index("{", self.at) + 1 : end]
            self.at = end + 1
            return content
        if letter := _LETTER_AFTER_FONT.match(self.text, self.at):
            self.at = letter.end()
            return letter[1]
        return None

    def _wrapped(self, content: str) -> Iterator[Token]:
        words = content.strip().strip(",").strip()
        choice = re.fullmatch(r"\(\s*([a-zA-Z])\s*\)", words)
        if content.strip() in (",", ";") or words.casefold() in _JOINTS:
            yield Token("mark", _JOINTS.get(words.casefold(), ","))
        elif choice:
            yield from (Token("mark", "("), Token("name", choice[1]), Token("mark", ")"))
        elif not words:
            return
        elif unit_tokens := self._unit(words):
            yield from unit_tokens
        elif len(parts := (_JOINT_BEHIND_VALUE if self._behind_value() else _JOINT_IN_TEXT).split(words)) > 1:
            for at, part in enumerate(parts):
                yield from (Token("mark", ","),) if at else ()
                yield from self._wrapped(part)
        elif len(words) == 1 and words.isalpha():
            behind = self._behind_number() if words in _UNITS_SET_OFF else self._behind_value()
            set_off = words in _SINGLE_LETTER_UNITS or (words in _UNITS_SET_OFF and (self.spaced or content[0] == " "))
            yield Token("text" if behind and set_off else "name", words)
        elif words in FUNCTIONS and not (words in _UNITS and self._behind_value()):
            yield Token("command", f"\\{words}")
        elif (number := number_word(words)) is not None:
            yield Token("number", str(number))
        elif " " in words and (number := number_word(words.split()[0])) is not None:
            yield Token("number", str(number))
            yield from self._wrapped(words.partition(" ")[2])
        elif re.fullmatch(r"[a-zA-Z][a-zA-Z .,'/-]*|[a-zA-Z]{3}[a-zA-Z0-9 .,:'/-]*", words) is None:
            # Mathematics in a text font.
            yield from _Lexer(words, self.thousands).run()
        else:
            yield Token("text", words)


def _product_of_units(words: str) -> list[Token] | None:
    """The tokens of units with powers, with a slash where one divides; None where a part is no unit."""
    if not _UNIT_OF_SEVERAL.fullmatch(words):
        return None
    found: list[Token] = []
    for part in _PART_OF_UNIT.finditer(words):
        name, power, joint = part.groups()
        if joint:
            found.extend([_SLASH] if joint == "/" else [])
        elif known_unit(name) or name in _FURTHER_UNITS:
            found.append(Token("text", name))
            if power:
                signed = [Token("mark", "-")] if power.startswith("-") else []
                digits = Token("number", power.lstrip("-"))
                found.extend([Token("mark", "^"), Token("mark", "{"), *signed, digits, Token("mark", "}")])
        else:
            return None
    return found


def closing_braces(text: str) -> dict[int, int]:
    """Map the index of each unescaped ``{`` that is closed to the index of its ``}``, in one pass."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if token.group() == "{":
            opened.append(token.start())
        elif token.group() == "}" and opened:
            closing[opened.pop()] = token.start()
    return closing


def closing_brace(text: str, start: int) -> int | None:
    """The index of the brace that closes the one at ``start``; escaped braces do not count."""
    depth = 0
    for token in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return start + token.start()
    return None


# -------------------------------------------------------------------------------------------------------- units

# One spelling, what it measures, and its size, where units of the same kind can be converted.
_UNIT_TABLE = """
% | % percent percents pct percentage | | 1
degree | degree degrees deg | angle | 1
radian | radian radians rad | | 1
dollar | dollar dollars usd | money | 100
cent | cent cents | money | 1
euro | euro euros eur | | 1
mm | mm millimeter millimeters millimetre millimetres | length | 1
cm | cm centimeter centimeters centimetre centimetres | length | 10
m | m meter meters metre metres | length | 1000
km | km kilometer kilometers kilometre kilometres | length | 1000000
inch | in inch inches | foot | 1
foot | ft foot feet | foot | 12
yard | yd yard yards | foot | 36
mile | mi mile miles | foot | 63360
mile/hour | mph | | 1
second | s sec second seconds | time | 1
minute | min minute minutes | time | 60
hour | h hr hrs hour hours | time | 3600
day | day days | time | 86400
week | week weeks | time | 604800
month | month months | | 1
year | year years yr yrs | | 1
gram | g gram grams | mass | 1
kg | kg kilogram kilograms | mass | 1000
pound | lb lbs pound pounds | | 1
arcsec | arcsec arcsecond arcseconds | | 1
arcmin | arcmin arcminute arcminutes | | 1
Hz | Hz hertz | | 1
ohm | ohm ohms | | 1
angstrom | angstrom angstroms | | 1
liter | L l liter liters litre litres | volume | 1000
ml | mL ml milliliter milliliters | volume | 1
unit | unit units | | 1
am | am AM | | 1
pm | pm PM | | 1
"""


class Unit(NamedTuple):
    """A unit in one spelling, what it measures (empty: nothing to convert), and how many of the smallest it is."""

    name: str
    kind: str
    size: int


def _unit_table() -> dict[str, Unit]:
    table: dict[str, Unit] = {}
    for line in _UNIT_TABLE.strip().splitlines():
        name, spellings, kind, size = (part.strip() for part in line.split("|"))
        table.update({spelling: Unit(name, kind, int(size)) for spelling in spellings.split()})
    return table


_UNITS = _unit_table()
_SINGLE_LETTER_UNITS = frozenset("m s g h l L J N W V A K F C".split())
_UNITS_SET_OFF = frozenset("M T H G".split())
r"""Only behind a number and a space: ``3\mathrm{H}`` is no quantity, ``(a+b)\,\mathrm{T}`` neither."""
_FURTHER_UNITS = _SINGLE_LETTER_UNITS.union(
    _UNITS_SET_OFF,
    "mol mmol kmol Pa kPa MPa atm bar erg dyn eV keV MeV GeV kJ MJ kW MW cal kcal nm pc kpc Mpc AU rad sr".split(),
)
"""Parts of units such as kJ/mol, besides those of the table; alone, in a text font, any word is a unit."""
_AREA = {"square": "^2", "sq": "^2", "cubic": "^3"}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Words behind a number that change its meaning, so they are no unit that may be left out.
_NOT_UNITS = frozenset(
    "not less more than if mod modulo times plus minus to by only except between for when where is are true false "
    "from through none nor either neither squared cubed factorial half halves third thirds fourths fifths sixths "
    "sevenths eighths ninths tenths hundredths thousandths".split()
)


def known_unit(word: str) -> Unit | None:
    """The unit that a word names; of a single letter, as ``M`` is no ``m``, only as it stands."""
    return _UNITS.get(word) or (_UNITS.get(word.casefold()) if len(word) > 1 else None)


def scale_of(word: str) -> int | None:
    """What ``million`` and the like multiply by."""
    return _SCALES.get(word.casefold())


def unit_name(words: str) -> str:
    """The words behind a number as a unit in one spelling: ``m s^-2`` for ``m/s^2`` and ``meters per second squared``.

    Raises:
        Undecided: they say more than a unit does.
    """
    spelled = re.sub(r"\s*(?:/|(?<![a-zA-Z])per(?![a-zA-Z]))\s*", " / ", re.sub(r"[.,]", " ", words))
    parts = _RAISED_BELOW.sub(lambda found: f"{found[1]} {_RAISING[found[2]]}", spelled).split()
    if parts != ["times"] and not _NOT_UNITS.isdisjoint(part.casefold() for part in parts):
        raise Undecided("words that are no unit")
    if (factors := _factors(parts)) is not None:
        powers: dict[str, int] = {}
        for name, power in factors:
            powers[name] = powers.get(name, 0) + power
        return " ".join(f"{name}^{powers[name]}" if powers[name] != 1 else name for name in sorted(powers))
    raised = _AREA.get(parts[0].casefold(), "") if len(parts) > 1 else ""
    names = [unit.name if (unit := known_unit(part)) else part.casefold() for part in parts[bool(raised) :]]
    return " ".join(names).replace(" / ", "/") + raised


_RAISING = {"squared": "^2", "cubed": "^3"}
_RAISED_BELOW = re.compile(r"(?<= / )([a-zA-Z]+) (squared|cubed)(?![a-zA-Z])")
_WHOLE_POWER = re.compile(r"\^-?\d")


def _factors(parts: Sequence[str]) -> list[tuple[str, int]] | None:
    """Units with their powers, of which a slash turns the next one's; None where a part is no unit."""
    found: list[tuple[str, int]] = []
    power, sign = 1, 1
    for part in parts:
        if part == "/":
            sign = -1
        elif part.casefold() in _AREA:
            power = int(_AREA[part.casefold()][1:])
        elif _WHOLE_POWER.fullmatch(part) and found:
            name, before = found[-1]
            found[-1] = (name, before * int(part[1:]))
        elif part not in ("*", "\\cdot"):
            unit = known_unit(part)
            if unit is not None:
                over, _, under = unit.name.partition("/")
                found.extend([(over, power * sign), *([(under, -power * sign)] if under else [])])
            elif part in _FURTHER_UNITS:
                found.append((part, power * sign))
            else:
                return None
            power = sign = 1
    return found if found and power == sign == 1 else None
