r"""From tokens to the typed tree of an answer, by recursive descent.

::

    list     = item ("," item)*
    item     = label? chain
    chain    = combined (relation combined)*
    combined = ratio (("\cup" | "\cap" | "\setminus") ratio)*
    ratio    = sum (":" sum)*
    sum      = product (("+" | "-" | "\pm") product)* unit?
    product  = power (("*" | "/")? power)*
    power    = primary ("^" exponent | "!" | "%" | degree)*

A number directly before a proper fraction is a mixed number. An exponent takes a number whole (``10^12``),
``\frac`` and ``\sqrt`` take a digit (``\frac12``), as LaTeX does. Functions without brackets take the product that
follows, up to the next explicit operator or function.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from megatron_rl.rewards import matrices
from megatron_rl.rewards.expressions import (
    Apply,
    Based,
    Bracketed,
    Collection,
    Combination,
    Matrix,
    Node,
    Number,
    Quantity,
    Ratio,
    Relation,
    Scalar,
    Symbol,
    Text,
    Undecided,
    exact,
)
from megatron_rl.rewards.notation import END, FUNCTIONS, Token, known_unit, scale_of, tokens, unit_name

_MAX_DEPTH = 80
_MAX_DIGITS = 4_000
_MAX_POWER_OF_TEN = 9_000
_RELATIONS = {
    **{"=": "=", "<": "<", ">": ">", "\\leq": "leq", "\\geq": "geq", "\\neq": "neq", "\\approx": "approx"},
    **{"\\in": "in", "\\notin": "notin", "\\equiv": "equiv", "\\subset": "subset", "\\subseteq": "subseteq"},
}
_ORDERINGS = ("<", ">", "\\leq", "\\geq")
_EVENTS = frozenset({*_RELATIONS, "\\cup", "\\cap", "|"})
_COMBINATIONS = {"\\cup": "cup", "\\cap": "cap", "\\setminus": "setminus"}
_CLOSING = {"(": (")", "]"), "[": ("]", ")"), "\\{": ("\\}",), "\\langle": ("\\rangle",)}
_ENDS_OF_LISTS = (")", "]", "\\}", "}", "\\rangle", "&", "\\\\", "\\end")
_VERBS = ("is", "are", "equals")
_FLOORS = {"\\lfloor": ("floor", "\\rfloor"), "\\lceil": ("ceil", "\\rceil")}
_FUNCTION_COMMANDS = frozenset(f"\\{name}" for name in FUNCTIONS if name != "sqrt")
_MATRICES = frozenset("matrix pmatrix bmatrix Bmatrix smallmatrix array".split())
_SEVERAL_ARGUMENTS = frozenset({"max", "min", "gcd", "lcm"})
_WITH_BASE = frozenset({"log", "ln"})


def parse(text: str, *, thousands: bool = False) -> Node:
    """Read one answer in plain text (see :func:`megatron_rl.rewards.notation.plain`).

    Args:
        text: the answer.
        thousands: read ``1,234`` as one number.

    Raises:
        Undecided: the text is no answer in this grammar, or it is too large.
    """
    parser = _Parser(tokens(text, thousands=thousands))
    try:
        answer = parser.answers()
    except RecursionError:
        raise Undecided("too deep") from None
    if parser.peek() is not END:
        raise Undecided(f"unexpected {parser.peek().value!r}")
    return answer


def signs(node: Node) -> tuple[Node, ...]:
    r"""The two answers that ``\pm`` stands for; the answer itself where it has none."""
    if not _has_sign(node):
        return (node,)
    return (_with_sign(node, plus=True), _with_sign(node, plus=False))


def _has_sign(node: Node) -> bool:
    if isinstance(node, Apply):
        return node.op in ("pm", "mp") or any(map(_has_sign, node.args))
    if isinstance(node, Relation):
        return any(map(_has_sign, node.terms))
    if isinstance(node, Bracketed):
        return any(map(_has_sign, node.items))
    return isinstance(node, Quantity) and _has_sign(node.value)


def _with_sign(node: Node, *, plus: bool) -> Node:
    if isinstance(node, Apply):
        args = tuple(_with_sign(arg, plus=plus) for arg in node.args)
        if node.op not in ("pm", "mp"):
            return Apply(node.op, args)
        last = args[-1] if plus == (node.op == "pm") else Apply("neg", (args[-1],))
        return last if len(args) == 1 else Apply("+", (args[0], last))
    if isinstance(node, Relation):
        return Relation(tuple(_with_sign(term, plus=plus) for term in node.terms), node.ops)
    if isinstance(node, Bracketed):
        return Bracketed(node.opening, node.closing, tuple(_with_sign(item, plus=plus) for item in node.items))
    return Quantity(_with_sign(node.value, plus=plus), node.unit) if isinstance(node, Quantity) else node


class _Parser:
    def __init__(self, stream: list[Token]) -> None:
        self.stream = stream
        self.at = 0
        self.depth = 0
        self.bars = 0  # how many |...| are open
        self.ratios = True
        self.alternatives = False  # whether the last list had an "or"

    # ------------------------------------------------------------------------------------------ the token stream

    def peek(self, ahead: int = 0) -> Token:
        at = self.at + ahead
        return self.stream[at] if at < len(self.stream) else END

    def next(self) -> Token:
        token = self.peek()
        self.at += 1
        return token

    def take(self, *values: str) -> str | None:
        """Consume the next token if it is one of these marks or commands."""
        token = self.peek()
        if token.kind in ("mark", "command") and token.value in values:
            self.at += 1
            return token.value
        return None

    def expect(self, *values: str) -> str:
        found = self.take(*values)
        if found is None:
            raise Undecided(f"{values[0]!r} must follow, found {self.peek().value!r}")
        return found

    def at_value(self, *values: str) -> bool:
        return self.peek().kind in ("mark", "command") and self.peek().value in values

    # ------------------------------------------------------------------------------------------ lists, relations

    def answers(self) -> Node:
        """One answer, or a bare list of them."""
        self.alternatives = False
        items = self.items()
        if not items:
            raise Undecided("nothing to read")
        if len(items) == 1:
            return items[0]
        return Collection(tuple(items), braces=False, alternatives=self.alternatives)

    def items(self, *, both_signs: bool = True) -> list[Node]:
        r"""Items between commas; repeated commas (``, \text{and}``) count once, ``\pm`` gives two items.

        Inside brackets it does not (``both_signs=False``): the answer around them has two values.
        """
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Undecided("too deep")
        found: list[Node] = []
        while self.take(","):
            pass
        french = self.at == 0 and self.at_value("]")
        while french or (not self.at_value(*_ENDS_OF_LISTS) and self.peek() is not END):
            french = False
            item = self.chain()
            found.extend(signs(item) if both_signs else (item,))
            if not self.at_value(",", "or"):
                break
            while joint := self.take(",", "or"):
                self.alternatives = self.alternatives or joint == "or"
        self.depth -= 1
        return found

    def chain(self) -> Node:
        approx = self.take("\\approx")
        terms = [self.label() or self.function_value() or self.combined()]
        ops: list[str] = []
        while self.peek().kind in ("mark", "command") and self.peek().value in _RELATIONS:
            ops.append(_RELATIONS[self.next().value])
            terms.append(self.function_value() or self.combined())
        if approx:
            return Relation((Text("it"), *terms), ("approx", *ops))
        return Relation(tuple(terms), tuple(ops)) if ops else terms[0]

    def label(self) -> Node | None:
        """``f(x)`` or ``P_2(a,b)`` before an equals sign."""
        start = self.at
        if self.peek().kind in ("name", "word", "text"):
            name = self.symbol().name
            if [token.value for token in self.stream[self.at : self.at + 5]] == ["^", "{", "-", "1", "}"]:
                name, self.at = f"{name}^-1", self.at + 5
            if event := self.event():
                return Symbol(f"{name}({event})")
            if self.take("("):
                arguments = []
                while self.peek().kind in ("name", "number"):
                    arguments.append(self.next().value)
                    if not self.take(","):
                        break
                if arguments and self.take(")") and self.at_value("=", "\\approx", "\\in"):
                    return Symbol(f"{name}({','.join(arguments)})")
        self.at = start
        return None

    def function_value(self) -> Node | None:
        """``f(x)`` as a side of an inequality: a number that is unknown, not a product."""
        values = [token.value for token in self.stream[self.at : self.at + 5]]
        if values[0:1] not in (["f"], ["g"], ["h"]) or values[1:2] != ["("] or values[3:4] != [")"]:
            return None
        around = (self.stream[self.at - 1] if self.at else END, self.peek(4))
        if self.peek(2).kind != "name" or not any(token.value in _ORDERINGS for token in around):
            return None
        if any(token is not END and token.value not in (*_ORDERINGS, ",", "or") for token in around):
            return None
        self.at += 4
        return Symbol("".join(values[:4]))

    def event(self) -> str | None:
        r"""The ``X>2`` or ``A \cap B`` of ``P(X>2)`` before an equals sign."""
        depth = 0
        for at in range(self.at, len(self.stream)):
            value = self.stream[at].value
            depth += (value == "(") - (value == ")")
            if depth == 0:
                inside = [token.value for token in self.stream[self.at + 1 : at]]
                if _EVENTS.isdisjoint(inside) or self.stream[at + 1 : at + 2] != [Token("mark", "=")]:
                    return None
                self.at = at + 1
                return "".join(inside)
        return None

    def combined(self) -> Node:
        left = self.ratio()
        while op := self.take(*_COMBINATIONS):
            right = self.ratio()
            name = _COMBINATIONS[op]
            if isinstance(left, Combination) and left.op == name and name != "setminus":
                left = Combination(name, (*left.parts, right))
            else:
                left = Combination(name, (left, right))
        return left

    def ratio(self) -> Node:
        parts = [self.sum()]
        while self.ratios and self.take(":"):
            parts.append(self.sum())
        last = parts[-1]
        if len(parts) > 1 and isinstance(last, Quantity):  # 4:30 p.m.
            return Quantity(Ratio((*parts[:-1], last.value)), last.unit)
        return Ratio(tuple(parts)) if len(parts) > 1 else last

    # ---------------------------------------------------------------------------------------------- expressions

    def sum(self) -> Node:
        sign = self.take("-", "+", "\\pm", "\\mp")
        based = self.based()
        if based is not None:
            return based if sign is None else Based(f"{sign}{based.digits}", based.base)
        node = self.product()
        if sign in ("-", "\\pm", "\\mp"):
            node = _negative(node) if sign == "-" else Apply(sign[1:], (_scalar(node),))
        while (op := self.take("+", "-", "\\pm", "\\mp")) is not None:
            right = self.product()
            if op in ("+", "-") and (isinstance(node, Matrix) or isinstance(right, Matrix)):
                node = matrices.plus(node, right if op == "+" else _negative(right))
                continue
            right = _scalar(right)
            if op in ("\\pm", "\\mp"):
                node = Apply(op[1:], (_scalar(node), right))
                continue
            term = right if op == "+" else Apply("neg", (right,))
            left = _scalar(node)
            terms = left.args if isinstance(left, Apply) and left.op == "+" else (left,)
            node = Apply("+", (*terms, term))
        return self.with_unit(node)

    def based(self) -> Based | None:
        """Digits with their base as a subscript: ``3A_{16}``."""
        ahead = 0
        while self.peek(ahead).kind in ("number", "name", "word", "text"):
            ahead += 1
        digits = "".join(token.value for token in self.stream[self.at : self.at + ahead])
        if self.peek(ahead) != Token("mark", "_") or not any(map(str.isdigit, digits)):
            return None
        braced = self.peek(ahead + 1) == Token("mark", "{")
        base = self.peek(ahead + 1 + braced).value
        if not (base.isdecimal() and 2 <= int(base[:3]) <= 36) or any(
            _digit(digit) >= int(base) for digit in digits.replace(".", "", 1)
        ):
            return None
        self.at += ahead + 2 + braced
        if braced:
            self.expect("}")
        return Based(digits, int(base))

    def product(self) -> Node:
        node = self.power()
        while True:
            if self.take("*", "\\cdot"):
                node = _times(node, self.signed_power())
            elif self.take("/", "\\div"):
                node = Apply("/", (_scalar(node), _scalar(self.signed_power())))
            elif isinstance(node, Number) and self.peek().kind == "number":
                node = Apply("+", (node, self.slashed_fraction(node)))
            elif isinstance(node, (*Scalar, Matrix)) and self.starts_factor():
                right = self.power()
                if _is_point(node) and isinstance(right, Bracketed):  # P(3,4)
                    return Relation((node, right), ("=",))
                mixed = _is_whole(node) and _is_proper(right)
                if not mixed and isinstance(node, Number) and _is_quotient(right):
                    raise Undecided("a number before an improper fraction")
                node = Apply("+", (node, right)) if mixed else _times(node, right)
            elif sign := self.take("%", "\\degree"):
                node = Apply("percent" if sign == "%" else "degree", (_scalar(node),))
            else:
                return node

    def signed_power(self) -> Node:
        if self.take("-"):
            return _negative(self.power())
        self.take("+")
        return self.power()

    def slashed_fraction(self, whole: Number) -> Node:
        """The ``1/2`` of ``3 1/2``; two numbers side by side mean nothing else."""
        top = _number(self.next().value)
        if self.take("/") is None or self.peek().kind != "number":
            raise Undecided("two numbers side by side")
        fraction = Apply("/", (top, _number(self.next().value)))
        if not (_is_whole(whole) and _is_proper(fraction)):
            raise Undecided("two numbers side by side")
        return fraction

    def starts_factor(self) -> bool:
        token = self.peek()
        if token.kind == "name":
            return True
        if token.kind == "word":
            return not self.at_unit() and _letters(token.value) is not None and scale_of(token.value) is None
        if token.kind == "mark":
            if token.value == "[":  # behind it something must stand: ]1,5[ ends with one
                return self.peek(1) is not END
            return token.value in ("(", "{") or (token.value == "|" and self.bars == 0)
        if token.kind == "number":  # (n-2) 2^n
            return self.at > 0 and self.stream[self.at - 1] == Token("mark", ")")
        return token.kind == "command" and (
            token.value in _FUNCTION_COMMANDS
            or token.value in _FLOORS
            or token.value
            in ("\\frac", "\\sqrt", "\\root of", "\\cube root of", "\\binom", "\\infty", "\\sum", "\\prod", "\\begin")
        )

    def at_unit(self) -> bool:
        """Whether the word is a unit; ``hr^2`` and the like are letters, only lengths have powers."""
        unit = known_unit(self.peek().value)
        return unit is not None and (unit.kind in ("length", "foot") or self.peek(1) != Token("mark", "^"))

    def power(self) -> Node:
        node = self.primary()
        while True:
            if self.take("^"):
                if self.take("*"):
                    raise Undecided("a star is no exponent")
                if isinstance(node, (Matrix, Bracketed)):
                    node = self.transposed(node)
                    continue
                node = Apply("^", (_scalar(node), _scalar(self.exponent())))
            elif self.take("!"):
                if self.at_value("!"):
                    raise Undecided("double factorial")
                node = Apply("!", (_scalar(node),))
            else:
                return node

    def transposed(self, node: Node) -> Node:
        if self.raw_group() not in ("T", "\\top"):
            raise Undecided("no power of a matrix or a tuple")
        return matrices.transpose(node)

    def exponent(self) -> Node:
        if self.take("-"):
            return Apply("neg", (_scalar(self.exponent()),))
        self.take("+")
        base = self.primary()
        return Apply("^", (_scalar(base), _scalar(self.exponent()))) if self.take("^") else base

    # ------------------------------------------------------------------------------------------------- primaries

    def primary(self) -> Node:
        token = self.peek()
        if token.kind == "number":
            self.at += 1
            return self.repeating(token.value) or _number(token.value)
        if token.kind == "name":
            return self.symbol()
        if token.kind in ("word", "text"):
            return self.words()
        if token.kind == "mark":
            return self.bracket(token.value)
        if token.kind == "command":
            self.at += 1
            return self.command(token.value)
        raise Undecided("the text ends too soon")

    def symbol(self) -> Symbol:
        name = self.next().value
        while self.at_value("_", "'"):
            name += "'" if self.next().value == "'" else f"_{self.raw_group()}"
        if [token.value for token in self.stream[self.at : self.at + 3]] == ["(", "0", ")"]:  # I(0), no product
            self.at += 3
            name += "(0)"
        return Symbol(name)

    def raw_group(self) -> str:
        """The text of a subscript, without spaces."""
        if not self.take("{"):
            return self.next().value
        parts: list[str] = []
        depth = 1
        while depth:
            token = self.next()
            if token is END:
                raise Undecided("a brace is not closed")
            depth += (token.value == "{") - (token.value == "}")
            parts.append(token.value)
        return "".join(parts[:-1])

    def repeating(self, written: str) -> Number | None:
        r"""``0.1\overline{6}``."""
        if "." not in written or not self.at_value("\\overline") or self.peek(1) != Token("mark", "{"):
            return None
        cycle = self.peek(2)
        if cycle.kind != "number" or not cycle.value.isdigit() or self.peek(3) != Token("mark", "}"):
            return None
        self.at += 4
        fixed = len(written.partition(".")[2])
        part = Fraction(int(cycle.value), 10**fixed * (10 ** len(cycle.value) - 1))
        return Number(_number(written).value + part)

    def words(self) -> Node:
        """Words up to the next mark; a lone short word may also be a product of letters."""
        if self.peek().kind == "word" and (letters := _letters(self.peek().value)) is not None:
            first = self.next()
            product = _times_all([Symbol(letter) for letter in letters])
            if self.at == 1 and self.peek() is END:
                return Text(first.value.casefold(), None if first.value.isupper() else product)
            if self.is_item(self.at - 1) and not first.value.isupper():
                return Text(first.value.casefold(), product)
            if self.peek().kind not in ("word", "text"):
                if self.at_value("_", "'", "^", "!"):  # what follows belongs to the last letter: ab^2
                    self.at -= 1
                    self.stream[self.at] = Token("name", letters[-1])
                    return _times_all([*(Symbol(letter) for letter in letters[:-1]), _scalar(self.power())])
                return product
            self.at -= 1
        found: list[str] = []
        while self.peek().kind in ("word", "text", "name") or (found and self.at_value("'")):
            found.append(self.next().value)
        if found[-1].split()[-1] not in _VERBS and self.at_date():
            found.append(self.next().value)
        if found[-1].split()[-1] in _VERBS and self.peek() is not END:  # the answer is 5
            return self.power()
        return Text(" ".join(" ".join(found).replace(" ' ", "'").casefold().strip(" .").split()))

    def is_item(self, at: int) -> bool:
        """Whether the token stands alone between the commas of a bare list."""
        around = (self.stream[at - 1] if at else END, self.peek())
        return all(token is END or token in (Token("mark", ","), Token("mark", "or")) for token in around)

    def at_date(self) -> bool:
        """``October 30``."""
        return self.peek().kind == "number" and self.peek(1) is END

    def bracket(self, opening: str) -> Node:
        self.at += 1
        if opening == "{":
            return self.braces()
        if opening == "|":
            self.bars += 1
            node = Apply("abs", (_scalar(self.answers()),))
            self.expect("|")
            self.bars -= 1
            return node
        if opening == "\\{":
            return self.set()
        if opening in ("(", "["):
            return self.round_or_square(opening, _CLOSING[opening])
        if opening == "]":  # ]1,5], as intervals are written in French
            interval = self.round_or_square("(", ("]", "["))
            return interval if isinstance(interval, Bracketed) else _reject("a bracket that closes nothing")
        raise Undecided(f"unexpected {opening!r}")

    def round_or_square(self, opening: str, closings: tuple[str, ...]) -> Node:
        bars, self.bars = self.bars, 0
        ratios, self.ratios = self.ratios, True
        found = self.items(both_signs=False)
        closing = self.expect(*closings)
        self.bars, self.ratios = bars, ratios
        if not found:
            raise Undecided("empty brackets")
        if len(found) > 1:
            return Bracketed(opening, ")" if closing == "[" else closing, tuple(found))
        if (opening, closing) not in (("(", ")"), ("[", "]")):
            raise Undecided("brackets that do not belong together")
        return found[0]

    def braces(self) -> Node:
        """A TeX group; with commas inside, a set whose backslashes were forgotten."""
        found = self.items(both_signs=False)
        self.expect("}")
        if not found:
            raise Undecided("an empty group")
        if len(found) == 1:
            return found[0]
        return Collection(tuple(one for item in found for one in signs(item)), braces=True)

    def set(self) -> Node:
        r"""``\{1,2\}``, or the condition of ``\{x : x>3\}``."""
        bars, self.bars = self.bars, 1
        ratios, self.ratios = self.ratios, False
        found = self.items()
        if self.take("|", ":"):
            found = self.items()
            self.expect("\\}")
            self.bars, self.ratios = bars, ratios
            return found[0] if len(found) == 1 else Collection(tuple(found), braces=False)
        self.expect("\\}")
        self.bars, self.ratios = bars, ratios
        return Collection(tuple(found), braces=True)

    def command(self, name: str) -> Node:
        if name == "\\frac":
            return Apply("/", (self.argument(), self.argument()))
        if name == "\\binom":
            return Apply("binom", (self.argument(), self.argument()))
        if name == "\\sqrt":
            return self.root()
        if name == "\\root of":
            return Apply("sqrt", (_scalar(self.power()),))
        if name == "\\cube root of":
            return Apply("root", (_scalar(self.power()), Number(Fraction(3))))
        if name in _FLOORS:
            op, closing = _FLOORS[name]
            node = Apply(op, (_scalar(self.answers()),))
            self.expect(closing)
            return node
        if name == "\\infty":
            return Symbol("infty")
        if name == "\\emptyset":
            return Collection((), braces=True)
        if name == "\\begin":
            return self.matrix()
        if name == "\\langle":
            return self.vector()
        if name == "\\overline":
            return Symbol(f"\\overline {self.raw_group()}")
        if name in ("\\sum", "\\prod"):
            return self.series(name[1:])
        if name in _FUNCTION_COMMANDS:
            return self.function(name[1:])
        raise Undecided(f"no meaning for {name}")

    def argument(self) -> Node:
        r"""What ``\frac`` takes: a group, one digit, one letter or one command."""
        token = self.peek()
        if token.kind == "number":
            if not token.value[0].isdigit():
                raise Undecided("no digit")
            if len(token.value) == 1:
                self.at += 1
            else:
                self.stream[self.at] = Token("number", token.value[1:])
            return Number(Fraction(int(token.value[0])))
        if token.kind == "word":
            self.stream[self.at : self.at + 1] = [Token("name", letter) for letter in token.value]
        return _scalar(self.primary())

    def root(self) -> Node:
        if not self.take("["):
            return Apply("sqrt", (self.argument(),))
        degree = _scalar(self.answers())
        self.expect("]")
        return Apply("root", (self.argument(), degree))

    def function(self, name: str) -> Node:
        base = exponent = None
        while self.at_value("_", "^"):
            if self.next().value == "_":
                base = _scalar(self.exponent())
            else:
                exponent = _scalar(self.exponent())
        if name in _SEVERAL_ARGUMENTS:
            return self.of_several(name)
        if base is not None and name not in _WITH_BASE:
            raise Undecided(f"{name} has no base")
        if exponent is not None and exponent == Apply("neg", (Number(Fraction(1)),)):
            if f"\\arc{name}" not in _FUNCTION_COMMANDS:
                raise Undecided("an inverse function without a name")
            name, exponent = f"arc{name}", None
        if name == "cis":
            node = _cis(self.operand())
        else:
            node = Apply(name, (self.operand(),) if base is None else (self.operand(), base))
        return node if exponent is None else Apply("^", (node, exponent))

    def operand(self) -> Node:
        """What a function takes: brackets alone, or the product that follows."""
        if self.at_value("(", "{", "["):
            inside = _scalar(self.primary())
            return Apply("degree", (inside,)) if self.take("\\degree") else inside
        negative = self.take("-")
        node = _scalar(self.power())
        while self.starts_factor() and self.peek().value not in _FUNCTION_COMMANDS:
            node = _times(node, self.power())
        if self.take("\\degree"):
            node = Apply("degree", (node,))
        return Apply("neg", (node,)) if negative else node

    def of_several(self, name: str) -> Node:
        node = self.primary()
        items = node.items if isinstance(node, (Bracketed, Collection)) else (node,)
        if not items:
            raise Undecided(f"{name} of nothing")
        return Apply(name, tuple(map(_scalar, items)))

    def series(self, op: str) -> Node:
        variable: Node | None = None
        first = last = None
        while self.at_value("_", "^"):
            if self.next().value == "^":
                last = _scalar(self.exponent())
                continue
            condition = self.primary()
            if isinstance(condition, Relation) and condition.ops == ("=",):
                variable, first = condition.terms[0], _scalar(condition.terms[1])
        if not isinstance(variable, Symbol) or first is None or last is None:
            raise Undecided("a sum needs its limits")
        return Apply(op, (variable, first, last, _scalar(self.product())))

    def vector(self) -> Node:
        found = self.items()
        self.expect("\\rangle")
        if len(found) < 2:
            raise Undecided("a vector needs components")
        return Bracketed("(", ")", tuple(found))

    def matrix(self) -> Node:
        name = self.raw_group()
        if name not in _MATRICES:
            raise Undecided(f"no meaning for {name}")
        if name == "array":
            self.raw_group()
        rows: list[tuple[Node, ...]] = []
        while not self.at_value("\\end"):
            row = [self.chain()]
            while self.take("&"):
                row.append(self.chain())
            rows.append(tuple(row))
            if not self.take("\\\\"):
                break
        self.expect("\\end")
        self.raw_group()
        if not rows or len({len(row) for row in rows}) != 1:
            raise Undecided("rows of different lengths")
        return Matrix(tuple(rows))

    def with_unit(self, node: Node) -> Node:
        """The value with the unit behind it, if there is one."""
        if isinstance(node, Apply) and node.op in ("percent", "degree"):
            node = Quantity(node.args[0], "%" if node.op == "percent" else "degree")
        if isinstance(node, Apply) and node.op == "neg":
            inner = node.args[0]
            if isinstance(inner, Apply) and inner.op in ("percent", "degree"):
                node = Quantity(Apply("neg", inner.args), "%" if inner.op == "percent" else "degree")
        if not isinstance(node, Scalar) or self.peek().kind not in ("word", "text"):
            return node
        while self.peek().kind in ("word", "text"):
            scale = scale_of(self.peek().value.split()[0])
            if scale is None:
                break
            words = self.next().value.split()[1:]
            node = _times(node, Number(Fraction(scale)))
            if words:
                self.at -= 1
                self.stream[self.at] = Token("text", " ".join(words))
        unit = self.unit()
        return Quantity(node, unit) if unit else node

    def unit(self) -> str:
        words: list[str] = []
        while True:
            token = self.peek()
            if token.kind in ("word", "text"):
                words.append(self.next().value)
            elif words and token == Token("mark", "^"):
                self.at += 1
                words.append(f"^{self.raw_group()}")
            elif words and token.value in ("/", "*", "\\cdot") and self.peek(1).kind in ("word", "text", "name"):
                words.extend((self.next().value, self.next().value))
            elif words and token.kind == "name":
                words.append(self.next().value)
            else:
                break
        return unit_name(" ".join(words)).replace(" ^", "^") if words else ""


def _reject(reason: str) -> Node:
    raise Undecided(reason)


def _number(written: str) -> Number:
    mantissa, _, exponent = written.lower().partition("e")
    if len(mantissa) > _MAX_DIGITS or (exponent and abs(int(exponent)) > _MAX_POWER_OF_TEN):
        raise Undecided("too many digits")
    mantissa = mantissa.rstrip(".") if len(mantissa) > 1 else mantissa
    whole, _, decimals = mantissa.partition(".")
    value = Fraction(int(whole + decimals or "0"), 10 ** len(decimals))
    return Number(value * Fraction(10) ** int(exponent) if exponent else value)


def _scalar(node: Node) -> Node:
    if isinstance(node, Text) and node.product is not None:
        return node.product
    if isinstance(node, Quantity) and node.unit in ("%", "degree"):
        return Apply("percent" if node.unit == "%" else "degree", (node.value,))
    if not isinstance(node, Scalar):
        raise Undecided("a number must stand here")
    return node


def _cis(angle: Node) -> Node:
    return Apply("+", (Apply("cos", (angle,)), Apply("*", (Symbol("i"), Apply("sin", (angle,))))))


def _negative(node: Node) -> Node:
    if isinstance(node, Matrix):
        return matrices.times(Number(Fraction(-1)), node)
    return Apply("neg", (_scalar(node),))


def _times(left: Node, right: Node) -> Node:
    if isinstance(left, Matrix) or isinstance(right, Matrix):
        return matrices.times(left, right)
    left, right = _scalar(left), _scalar(right)
    factors = left.args if isinstance(left, Apply) and left.op == "*" else (left,)
    return Apply("*", (*factors, right))


def _times_all(factors: Sequence[Node]) -> Node:
    return Apply("*", tuple(factors)) if len(factors) > 1 else factors[0]


def _digit(character: str) -> int:
    """The value of a digit or an upper-case letter as a digit; 36 for what is none."""
    return int(character, 36) if character.isascii() and (character.isdigit() or character.isupper()) else 36


def _is_whole(node: Node) -> bool:
    return isinstance(node, Number) and node.value.denominator == 1


def _is_point(node: Node) -> bool:
    return isinstance(node, Symbol) and len(node.name) == 1 and node.name.isupper()


def _is_quotient(node: Node) -> bool:
    return isinstance(node, Apply) and node.op == "/" and all(map(_is_whole, node.args))


def _is_proper(node: Node) -> bool:
    if not (isinstance(node, Apply) and _is_quotient(node)):
        return False
    top, bottom = map(exact, node.args)
    return top is not None and bottom is not None and 0 < top < bottom


def _letters(word: str) -> list[str] | None:
    """The letters of a word that can be a product: up to three, or all upper case (``ABCD``)."""
    return list(word) if len(word) <= 3 or (word.isupper() and len(word) <= 4) else None
