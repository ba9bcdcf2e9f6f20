r"""The verdicts of SimpleRL-reason v0, for comparison with it: ``RULES["seed_exact"]``.

Written from the behaviour of its ``extract_answer``, ``strip_string`` and ``math_equal`` with the parsers of its
training job, oddities included: only the prediction is rewritten, numbers may differ by a factor of 100 and by 1e-4 of
the reference, brackets do not count. Only its last step, a symbolic comparison through sympy's ``parse_expr`` (an
``eval``), is ours: two scalars of our grammar, equal by value or to 1e-4.
"""

from __future__ import annotations

import math
import re

from megatron_rl.rewards.expressions import Apply, Node, Scalar, Undecided, close, same_value
from megatron_rl.rewards.notation import closing_brace, number_word, plain
from megatron_rl.rewards.parsing import parse

_RELATIVE = 1e-4
_MAX_LENGTH = 1000

# ---------------------------------------------------------------------------------------------------- extraction


def extract_answer(text: str) -> str:
    """The prediction of a response: of its phrases for an answer the first kind that occurs, else the last number."""
    if "final answer is $" in text and "$. I hope" in text:
        found = text.partition("final answer is $")[2].partition("$. I hope")[0]
    elif "boxed" in text:
        found = _after_boxed(text.rpartition("boxed")[2])
    elif "he answer is" in text:
        found = text.rpartition("he answer is")[2]
    elif "final answer is" in text:
        found = text.rpartition("final answer is")[2]
    else:
        numbers = re.findall(r"-?\d*\.?\d+", text.replace(",", ""))
        found = numbers[-1] if numbers else ""
    found = re.sub(r"\n\s*", "", found.strip()).removeprefix(":").rstrip(".").rstrip("/")
    return strip(found)


def _after_boxed(tail: str) -> str:
    """To the brace that closes the one right behind the word, to the end without one; to the next ``$`` otherwise."""
    if not tail.startswith("{"):
        return tail.partition("$")[0].strip()
    depth = 0
    for at, character in enumerate(tail):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return tail[1:at]
    return tail[1:]


_UNITS = (
    "east west degree mph kmph ft deg mile monkey prime ratio rd o gm lb tile per dm lt gain ab way t a h men "
    "soldier pie bc excess st inch inche noon percent by gal kmh c acre rise th sq mark l toy coin gallon profit "
    "yr women am pm feet foot hr cm mm km m s g d kg ml dollar rupee rs cent day week month year hour minute min "
    "second sec unit meter metre liter litre kilometer centimeter millimeter gram number point student people "
    "person yard pound integer square sqft apple book boy girl child children ways page player side edge vertex "
    "vertice team digit marble ball"
).split()
_UNIT = re.compile(rf"(^|\W)(?:{'|'.join(sorted({*_UNITS, *(f'{u}s' for u in _UNITS)}, key=len, reverse=True))})($|\W)")

_BEFORE_UNITS = (
    (r"\n", ""),
    (r"(?<!\.)\.+$", ""),
    (r"\\!", ""),
    (r"\\begin\{array\}\{[^{}]*\}", r"\\begin{pmatrix}"),
    (r"\\end\{array\}", r"\\end{pmatrix}"),
    (r"bmatrix", "pmatrix"),
    (r"[td]frac", "frac"),
    (r"\\neq", r"\\ne"),
    (r"\\leq", r"\\le"),
    (r"\\geq", r"\\ge"),
    (r"\\left|\\right", ""),
    (r"\\([{}])", r"\1"),
)
_AFTER_UNITS = (
    (r"\^\{\\circ\}|\^\\circ", ""),
    (r"\\\$|\$|\\\(|\\\)", ""),
)
_LAST = (
    (r"[xyz](?:=|\\in|\\to)", ""),
    (r"\\emptyset", "{}"),
    (r"\(-\\infty,\s*\\infty\)", r"\\mathbb{R}"),
    (r"\\?%", ""),
    (r" \.", " 0."),
    (r"\{\.", "{0."),
    (r"(?<!\\)infinity|(?<!\\)\binf\b", r"\\infty"),
    (r"and|\\mathbf", ""),
)


def strip(text: str) -> str:
    """One spelling of a prediction, as the seed's ``strip_string`` makes it, but in linear time."""
    text = _rewritten(text.strip(), _BEFORE_UNITS)
    if text.endswith("}"):
        text = text.partition(r"\text{")[0].strip() or text
    for _ in range(2):
        text = _UNIT.sub(r"\1\2", text) or text
    text = _rewritten(text, _AFTER_UNITS)
    number = number_word(text)
    text = _in_closed_braces(r"\\text\{([^}]*)\}", r"\1", text if number is None else str(number))
    text = _in_closed_braces(r"\\mbox\{[^}]*\}", "", _rewritten(text, _LAST)).strip()
    if "j" in text and "i" not in text:
        text = text.replace("j", "i")
    text = re.sub(r"(?<!\d)(\d+)\.0*([^\d])", r"\1\2", text)
    text = re.sub(r"(?<!\d)(\d+)\.0*$", r"\1", text)
    if text.startswith("."):
        text = f"0{text}"
    if text.count("=") == 1 and len(text.partition("=")[0].strip()) <= 2:
        text = text.partition("=")[2]
    text = re.sub(r"\\sqrt(\w+)", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\w)(\{)", r"\\frac{\1}\2", text)
    text = re.sub(r"(\\frac\{[^{}]*\})(\w)", r"\1{\2}", text)
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)


def _in_closed_braces(pattern: str, replacement: str, text: str) -> str:
    """Without what follows the last brace, where each command that is never closed would be searched to the end."""
    head, brace, tail = text.rpartition("}")
    return re.sub(pattern, replacement, head + brace) + tail


def _rewritten(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text.strip()


# ------------------------------------------------------------------------------------------------------ equality


def seed_equal(pred: str, gold: str) -> bool:
    """Whether the seed calls a stripped prediction equal to a reference as it stands."""
    if pred.strip().lower() == gold.strip().lower():
        return True
    if gold in ("A", "B", "C", "D", "E") and _choice(pred) == gold:
        return True
    number, reference = _number(pred), _number(gold)
    if number is not None and reference is not None:
        return any(
            math.isclose(number, value, rel_tol=_RELATIVE) for value in (reference / 100, reference, reference * 100)
        )
    if not pred or max(len(pred), len(gold)) > _MAX_LENGTH:
        return False
    if _without_brackets(pred) == _without_brackets(gold):
        return True
    for split in (_elements, _rows):
        left, right = split(pred), split(gold)
        if left and right and len(left) == len(right) and all(map(seed_equal, left, right)):
            return True
    return _equal_equations(pred, gold)


def _choice(pred: str) -> str:
    letters = re.findall(r"\b([A-E])\b", pred.strip("\n").rstrip(".").rstrip("/").strip().lstrip(":").upper())
    return letters[-1] if letters else pred


def _number(text: str) -> float | None:
    text = text.replace(",", "").strip()
    percent = text.endswith("%")
    digits = text[:-1].removesuffix("\\").strip() if percent else text
    if not re.fullmatch(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", digits):
        return None
    value = float(digits)
    return value / 100 if percent else value


def _without_brackets(text: str) -> str:
    return re.sub(r"[{}()\[\]]", "", text).strip("[]()").lower()


def _elements(text: str) -> list[str]:
    inside = re.fullmatch(r"[(\[](.+)[)\]]", text)
    return [part.strip() for part in inside[1].split(",")] if inside else []


def _rows(text: str) -> list[str]:
    inside = re.fullmatch(r"\\begin\{[pb]matrix\}(.*)\\end\{[pb]matrix\}", text, re.DOTALL)
    rows = inside[1].split("\\\\") if inside else []
    return [cell.strip() for row in rows if row.strip() for cell in row.split("&")]


def _equal_equations(pred: str, gold: str) -> bool:
    if pred.count("=") == gold.count("=") == 1:
        left, right = (_difference(text) for text in (pred, gold))
        return left is not None and right is not None and (_same(left, right) or _same(Apply("neg", (left,)), right))
    for equation, other in ((pred, gold), (gold, pred)):
        if equation.count("=") == 1 and "=" not in other:
            label, _, value = equation.partition("=")
            if len(label.strip()) <= 2 and seed_equal(value.strip(), other.strip()):
                return True
    return symbolically_equal(pred, gold)


def symbolically_equal(pred: str, gold: str) -> bool:
    """The last step: what the seed asks sympy, and we our own grammar."""
    left, right = _tree(pred), _tree(gold)
    if left is None or right is None:
        return False
    if isinstance(left, Scalar) and isinstance(right, Scalar):
        return _same(left, right)
    return left == right and r"\left" not in gold  # which its parsers cannot read around a list


def _difference(equation: str) -> Node | None:
    left, right = (_scalar(side) for side in equation.split("="))
    return None if left is None or right is None else Apply("+", (left, Apply("neg", (right,))))


def _scalar(text: str) -> Node | None:
    node = _tree(text)
    return node if isinstance(node, Scalar) else None


def _tree(text: str) -> Node | None:
    """The text in our grammar, without what sympy has no meaning for."""
    if r"\text" in text or r"\$" in text or closing_brace(f"{{{text}}}", 0) is None:
        return None
    try:
        return parse(plain(text))
    except Undecided:
        return None


def _same(left: Node, right: Node) -> bool:
    try:
        return same_value(left, right) or close(left, right, _RELATIVE)
    except (Undecided, RecursionError):
        return False
