"""Whether two typed answers are the same, type by type.

Two answers of one type are compared part by part. Between types only the conversions of docs/rewards.md are made; all
other pairs of types are different.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

from megatron_rl.rewards.expressions import (
    CONSTANTS,
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
    close,
    compare,
    exact,
    mentions,
    proportional,
    same_value,
    variables,
)
from megatron_rl.rewards.intervals import FLIPPED, ascending, difference, same_reals, unknowns
from megatron_rl.rewards.notation import known_unit

_MAX_ITEMS = 60
_EQUALITIES = frozenset({"=", "approx", "equiv"})
_NOTHING = frozenset(
    {"no solution", "no solutions", "no real solution", "no real solutions", "none", "empty set", "the empty set"}
)
_SHORT_WORDS = frozenset("no not on was saw yes all any odd now own won ton day red net".split())
"""Words that are read as words alone, though their letters could be a product."""
_REALS = frozenset(
    {"all real numbers", "all reals", "any real number", "the real numbers", "the reals", "the set of real numbers"}
    | {"the set of all real numbers"}
)
_ANGLE_FUNCTIONS = frozenset({"sin", "cos", "tan", "cot", "sec", "csc"})


@dataclass(frozen=True, kw_only=True)
class Leniency:
    """What a data set forgives in numbers; nothing by default.

    Attributes:
        relative: the largest ``|prediction - gold| / |gold|`` of a number that still counts as right.
        factor_100: also accept 100 times the gold and a hundredth of it.
    """

    relative: float = 0.0
    factor_100: bool = False


EXACT = Leniency()
_ORDER: tuple[type[Node], ...] = (
    *(Relation, Text, Quantity, Based, Ratio, Matrix, Combination, Collection, Bracketed, Apply, Symbol, Number),
)


def same(pred: Node, gold: Node, leniency: Leniency = EXACT) -> bool:
    """Whether two answers are the same.

    Raises:
        Undecided: values are beyond the budget of an evaluation.
    """
    return _Comparison(leniency).same(pred, gold)


@dataclass(frozen=True)
class _Comparison:
    """Compares a prediction and a gold, in this order; in the other one where ``gold_first``."""

    leniency: Leniency
    gold_first: bool = False

    def same(self, a: Node, b: Node) -> bool:
        if a == b and not isinstance(a, Collection):
            return True
        if isinstance(a, Relation) and isinstance(b, Relation):
            return self.same_relations(a, b)
        if _ORDER.index(type(a)) > _ORDER.index(type(b)):  # a type that converts to many others goes first
            return replace(self, gold_first=not self.gold_first).of_types_in_order(b, a)
        return self.of_types_in_order(a, b)

    def of_types_in_order(self, a: Node, b: Node) -> bool:
        if isinstance(a, Relation):
            return self.relation_says(a, b)
        if isinstance(a, Text):
            return self.same_text(a, b)
        if isinstance(a, Quantity):
            return self.same_quantity(a, b)
        if isinstance(a, Based):
            return self.same_based(a, b)
        if isinstance(a, Ratio):
            return self.same_ratio(a, b)
        if isinstance(a, Matrix):
            return self.same_matrix(a, b)
        if isinstance(a, Combination):
            return self.same_sets(a, b)
        if isinstance(a, Collection):
            return self.same_collection(a, b)
        return self.same_bracketed(a, b) if isinstance(a, Bracketed) else self.same_scalars(a, b)

    def all_same(self, left: Sequence[Node], right: Sequence[Node]) -> bool:
        return len(left) == len(right) and all(self.same(a, b) for a, b in zip(left, right, strict=True))

    def match(self, left: Sequence[Node], right: Sequence[Node]) -> bool:
        """Pair the items one to one in any order, by augmenting paths.

        Equality is not transitive (``50%`` is 50 and 0.5), so the first partner that fits may be another item's only.
        """
        if len(left) != len(right) or len(left) > _MAX_ITEMS:
            return False
        partners: dict[int, int] = {}  # of the right items

        @cache
        def verdict(at: int, other: int) -> bool | Undecided:
            try:
                return self.same(left[at], right[other])
            except Undecided as error:
                return error

        def pair(at: int, tried: set[int], doubts: list[Undecided]) -> bool:
            for other in range(len(right)):
                fits = verdict(at, other)
                if isinstance(fits, Undecided):
                    doubts.append(fits)
                elif fits and other not in tried:
                    tried.add(other)
                    if other not in partners or pair(partners[other], tried, doubts):
                        partners[other] = at
                        return True
            return False

        for at in range(len(left)):
            doubts: list[Undecided] = []
            if not pair(at, set(), doubts):
                if doubts:
                    raise doubts[0]
                return False
        return True

    # -------------------------------------------------------------------------------------------------- scalars

    def same_scalars(self, a: Node, b: Node) -> bool:
        if any(mentions(node, name) for node in (a, b) for name in ("reals", "infty")):
            return False
        if same_value(a, b):
            return True
        factors = (Fraction(1), Fraction(100), Fraction(1, 100)) if self.leniency.factor_100 else (Fraction(1),)
        if self.leniency == EXACT:
            return False
        pred, gold = (b, a) if self.gold_first else (a, b)
        return any(close(pred, Apply("*", (Number(factor), gold)), self.leniency.relative) for factor in factors)

    def same_text(self, a: Text, b: Node) -> bool:
        if isinstance(b, Text):
            if a.words == b.words or {a.words, b.words} <= _NOTHING:
                return True
            if not _SHORT_WORDS.isdisjoint((a.words, b.words)):  # "on" is no product beside "no"
                return False
            return a.product is not None and b.product is not None and self.same(a.product, b.product)
        if a.words in _REALS:
            return self.same(Symbol("reals"), b)
        if isinstance(b, Collection) and not b.items:
            return a.words in _NOTHING
        return a.product is not None and isinstance(b, Scalar) and self.same(a.product, b)

    def same_quantity(self, a: Quantity, b: Node) -> bool:
        if isinstance(b, Quantity):
            if a.unit == b.unit:
                return self.same(a.value, b.value)
            if (a.unit, b.unit) == ("radian", "degree"):
                a, b = b, a
            if (a.unit, b.unit) == ("degree", "radian"):
                return isinstance(a.value, Scalar) and self.same(Apply("degree", (a.value,)), b.value)
            if not (isinstance(a.value, Scalar) and isinstance(b.value, Scalar)):
                return False
            first, second = known_unit(a.unit), known_unit(b.unit)
            if first is None or second is None or not first.kind or first.kind != second.kind:
                return False
            sizes = (Number(Fraction(first.size)), Number(Fraction(second.size)))
            return self.same(Apply("*", (a.value, sizes[0])), Apply("*", (b.value, sizes[1])))
        if not isinstance(b, (*Scalar, Ratio)):
            return False
        if self.same(a.value, b):
            return True
        if not isinstance(a.value, Scalar):
            return False
        if a.unit == "%":
            return self.same(Apply("percent", (a.value,)), b)
        return a.unit == "degree" and mentions(b, "pi") and self.same(Apply("degree", (a.value,)), b)

    def same_based(self, a: Based, b: Node) -> bool:
        if isinstance(b, Based):
            return a.base == b.base and a.digits.lstrip("0") == b.digits.lstrip("0")
        value = exact(b) if isinstance(b, Scalar) else None
        if value is None:
            return False
        try:
            number = int(a.digits, a.base)
        except ValueError:  # a digit that the base does not have
            return False
        return value == number or (a.digits.isdigit() and value == int(a.digits))

    def same_ratio(self, a: Ratio, b: Node) -> bool:
        if isinstance(b, Ratio):
            zero = Number(Fraction(0))
            if zero in a.parts or zero in b.parts:  # 5:00 is a time of the day
                return self.all_same(a.parts, b.parts)
            first, other = a.parts[0], b.parts[0]
            return len(a.parts) == len(b.parts) and all(
                self.same(Apply("*", (p, other)), Apply("*", (q, first)))
                for p, q in zip(a.parts[1:], b.parts[1:], strict=True)
            )
        return len(a.parts) == 2 and isinstance(b, Scalar) and self.same(Apply("/", a.parts), b)

    # ------------------------------------------------------------------------------- tuples, matrices, collections

    def same_bracketed(self, a: Bracketed, b: Node) -> bool:
        if isinstance(b, Bracketed):
            return (a.opening, a.closing) == (b.opening, b.closing) and self.all_same(a.items, b.items)
        return b == Symbol("reals") and same_reals(a, b)

    def same_matrix(self, a: Matrix, b: Node) -> bool:
        if isinstance(b, Matrix):
            return len(a.rows) == len(b.rows) and all(map(self.all_same, a.rows, b.rows))
        if isinstance(b, Bracketed) and all(_is_row(item) for item in (b, *b.items)):
            rows = [item.items for item in b.items if isinstance(item, Bracketed)]
            return len(a.rows) == len(rows) and all(map(self.all_same, a.rows, rows))
        column = [row[0] for row in a.rows]
        is_column = len(a.rows) > 1 and len(a.rows[0]) == 1
        return is_column and isinstance(b, Bracketed) and b.opening == "(" and self.all_same(column, b.items)

    def same_collection(self, a: Collection, b: Node) -> bool:
        if _are_conditions(a) and isinstance(b, (Bracketed, Symbol)):
            return same_reals(a, b)
        if isinstance(b, Collection):
            if _are_conditions(a) and _are_conditions(b):
                return (a == b and a.alternatives == b.alternatives) or same_reals(a, b)
            left, right = _records(a.items), _records(b.items)
            if left is not None and right is not None:
                return self.match(left, right)
            left, right = left or a.items, right or b.items
            if left == right:
                return True
            if a.braces and b.braces:
                left, right = _distinct(left), _distinct(right)
            if self.match(left, right):
                return True
            left, right = _values(left) or left, _values(right) or right
            return (left, right) != (a.items, b.items) and self.match(left, right)
        if isinstance(b, Bracketed):
            if a.braces:
                return len(a.items) == 1 and self.same(a.items[0], b)
            if (b.opening, b.closing) != ("(", ")"):
                return False
            return self.all_same(a.items, b.items) or self.all_same(_values_in_order(a.items), b.items)
        if a.braces:
            return len(a.items) == 1 and self.same(a.items[0], b)
        return a.alternatives and _all_agree(a.items) and all(self.same(item, b) for item in a.items)

    def same_sets(self, a: Combination, b: Node) -> bool:
        if isinstance(b, Combination) and a.op == b.op:
            ordered = a.op == "setminus"
            if self.all_same(a.parts, b.parts) if ordered else self.match(a.parts, b.parts):
                return True
        return same_reals(a, b)

    # ------------------------------------------------------------------------------------------------- relations

    def relation_says(self, relation: Relation, other: Node) -> bool:
        """Whether a relation names the other answer: ``x=5`` says 5, ``x>3`` says (3,oo)."""
        if relation.ops == ("in",) and _is_label(relation.terms[0]):
            return self.same(relation.terms[1], other)
        if _EQUALITIES.issuperset(relation.ops):
            return self.chain_says(relation, other)
        if isinstance(other, (Bracketed, Combination, Collection, Symbol)):
            return same_reals(relation, other)
        return False

    def chain_says(self, chain: Relation, other: Node) -> bool:
        r"""``x = a = b`` says a where all of its exact members are equal; ``a \approx b`` says a, or b rounded.

        Of several approximations each must be the one before it rounded, and only the last one speaks: two that round a
        in two ways would be two answers.
        """
        terms, ops = _without_label(chain, other)
        rounded = ops.index("approx") + 1 if "approx" in ops else len(terms)
        members, approximate = terms[:rounded], terms[rounded:]
        if not members:
            members, approximate = approximate, ()
        if not _all_agree(members):
            return False
        before = members[0]
        for number in approximate:
            if not (_rounds_to(members[0], number) and _rounds_to(before, number)):
                return False
            before = number
        return self.same(members[0], other) or self.same(before, other)

    def same_relations(self, a: Relation, b: Relation) -> bool:
        if _EQUALITIES.issuperset(a.ops) and _EQUALITIES.issuperset(b.ops):
            return self.same_equations(a, b)
        if a.ops == b.ops == ("in",):
            return self.all_same(a.terms, b.terms)
        a, b = ascending(a), ascending(b)
        if len(a.ops) == len(b.ops):
            if a.ops == b.ops and self.all_same_scalars(a.terms, b.terms):
                return True
            if len(a.ops) == 1 and _same_inequality(a, b):
                return True
        return (a.ops != ("neq",)) == (b.ops != ("neq",)) and same_reals(a, b)

    def all_same_scalars(self, left: Sequence[Node], right: Sequence[Node]) -> bool:
        scalars = all(isinstance(term, Scalar) for term in (*left, *right))
        return scalars and self.all_same(left, right)

    def same_equations(self, a: Relation, b: Relation) -> bool:
        left, right = _as_two(a), _as_two(b)
        if left is None or right is None:
            return False
        (label, value), (other_label, other) = left, right
        if self.same_labels(label, other_label) and self.same(value, other):
            return True
        if all(isinstance(term, Scalar) for term in (*left, *right)):
            if not (unknowns(a) and unknowns(b)):  # 2/3 = 0.67 has nothing to solve for
                return self.all_same(a.terms, b.terms)
            return proportional(difference(*left), difference(*right)) != 0
        return False

    def same_labels(self, a: Node, b: Node) -> bool:
        """The same name, or ``f(x)`` beside ``y``: then only the value matters."""
        if a == b:
            return True
        functions = ["(" in label.name for label in (a, b) if isinstance(label, Symbol)]
        return _is_label(a) and _is_label(b) and sorted(functions) == [False, True]


# ---------------------------------------------------------------------------------------------- within one answer


def _all_agree(nodes: Sequence[Node]) -> bool:
    """Whether all members of one answer equal the first one, exactly: leniency is for a gold alone."""
    return all(same(nodes[0], node) for node in nodes[1:])


def _distinct(items: Sequence[Node]) -> tuple[Node, ...]:
    """The elements of one set without those that equal an earlier one, exactly."""
    if len(items) > _MAX_ITEMS:
        raise Undecided("too many elements")
    kept: list[Node] = []
    for item in items:
        if not any(same(item, other) for other in kept):
            kept.append(item)
    return tuple(kept)


# ----------------------------------------------------------------------------------------------- labels and chains


def _is_label(node: Node) -> bool:
    """A name for the answer: ``x``, ``f(x)``, ``AB``, ``S_1:S_2``, ``(x,y)``, ``Area``."""
    if isinstance(node, Symbol):
        return node.name not in CONSTANTS and node.name not in ("infty", "reals")
    if isinstance(node, Text):
        return True
    if isinstance(node, Quantity):  # |AB| and the like never have units
        return False
    if isinstance(node, Apply) and node.op == "/":  # of two lengths
        return all(isinstance(arg, Apply) and arg.op == "*" and _is_label(arg) for arg in node.args)
    if isinstance(node, Apply) and node.op == "*":
        return all(isinstance(arg, Symbol) and arg.name[0].isupper() for arg in node.args)
    if isinstance(node, Apply) and (node.op == "abs" or node.op in _ANGLE_FUNCTIONS):
        return _is_label(node.args[0])
    if isinstance(node, Ratio):
        return all(map(_is_label, node.parts))
    return isinstance(node, Bracketed) and all(map(_is_label, node.items))


def _without_label(chain: Relation, other: Node) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    """The members of a chain of equations without the name before or behind it."""
    known = variables(other)

    def names(node: Node) -> bool:
        return _is_label(node) and known.isdisjoint(variables(node))

    if names(chain.terms[0]):
        return chain.terms[1:], chain.ops[1:]
    if names(chain.terms[-1]):
        return chain.terms[:-1], chain.ops[:-1]
    return chain.terms, chain.ops


def _is_row(node: Node) -> bool:
    return isinstance(node, Bracketed) and (node.opening, node.closing) == ("[", "]")


def _are_conditions(collection: Collection) -> bool:
    """Whether a bare list holds inequalities only: it is then a set of numbers."""
    return not collection.braces and all(
        isinstance(item, Relation) and _EQUALITIES.isdisjoint(item.ops) for item in collection.items
    )


def _rounds_to(value: Node, number: Node) -> bool:
    """Whether a decimal is the value rounded (or cut) to the digits that it shows."""
    decimal = exact(number)
    if decimal is None or not isinstance(value, Scalar):
        return False
    digits = next((digits for digits in range(20) if (decimal * 10**digits).denominator == 1), None)
    if digits is None:
        return False
    error = Apply("abs", (Apply("+", (value, Apply("neg", (number,)))),))
    unit = Fraction(1, 10**digits)
    if compare(error, Number(unit / 2)) <= 0:
        return True
    return compare(error, Number(unit)) < 0 and compare(Number(abs(decimal)), Apply("abs", (value,))) < 0


def _as_two(chain: Relation) -> tuple[Node, Node] | None:
    """A chain as one equation: its label and the value, where all members behind the label agree."""
    first, second, *rest = chain.terms
    if len(chain.terms) == 2:
        return (second, first) if _is_label(second) and not _is_label(first) else (first, second)
    return (first, second) if _all_agree((second, *rest)) else None


def _values(items: Sequence[Node]) -> tuple[Node, ...] | None:
    """The values of ``x=1, x=2`` or ``x=1, 2``; None where the labels differ or the first item has none."""
    values: list[Node] = []
    label: Node | None = None
    for item in items:
        if isinstance(item, Relation) and item.ops == ("=",) and _is_label(item.terms[0]):
            if label is not None and item.terms[0] != label:
                return None
            label = item.terms[0]
            values.append(item.terms[1])
        elif label is None or isinstance(item, Relation):
            return None
        else:
            values.append(item)
    return tuple(values)


def _values_in_order(items: Sequence[Node]) -> tuple[Node, ...]:
    """The values of ``a=1, b=2``, whose labels are different symbols in alphabetical order; else nothing."""
    labels: list[str] = []
    values: list[Node] = []
    for item in items:
        if not (isinstance(item, Relation) and item.ops == ("=",) and isinstance(item.terms[0], Symbol)):
            return ()
        labels.append(item.terms[0].name)
        values.append(item.terms[1])
    return tuple(values) if sorted(set(labels)) == labels else ()


def _records(items: Sequence[Node]) -> tuple[Node, ...] | None:
    """The tuples of ``p=5, q=2; p=7, q=2``: different labels in alphabetical order, all of them again and again."""
    labels = [item.terms[0] for item in items if isinstance(item, Relation) and item.ops == ("=",)]
    width = len(set(labels))
    if len(labels) < len(items) or width < 2 or labels != labels[:width] * (len(items) // width):
        return None
    rows = [_values_in_order(items[at : at + width]) for at in range(0, len(items), width)]
    return tuple(Bracketed("(", ")", row) for row in rows) if len(rows) > 1 and all(rows) else None


def _same_inequality(a: Relation, b: Relation) -> bool:
    """``left < right`` says the same as ``c left < c right`` for c > 0, and turned round for c < 0."""
    if not all(isinstance(term, Scalar) for term in (*a.terms, *b.terms)) or FLIPPED.keys().isdisjoint(a.ops):
        return False
    sign = proportional(difference(*a.terms), difference(*b.terms))
    return (sign > 0 and a.ops == b.ops) or (sign < 0 and b.ops == (FLIPPED[a.ops[0]],))
