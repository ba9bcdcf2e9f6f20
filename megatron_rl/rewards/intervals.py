"""Answers that are sets of real numbers: intervals, unions, finite sets, inequalities in one unknown.

They are all turned into disjoint intervals in ascending order, which are compared end by end.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction

from megatron_rl.rewards.expressions import (
    Apply,
    Bracketed,
    Collection,
    Combination,
    Node,
    Number,
    Relation,
    Scalar,
    Symbol,
    Undecided,
    compare,
    mentions,
    same_value,
    variables,
)

_MAX_PARTS = 60
_INFINITY = Symbol("infty")
_MINUS_INFINITY = Apply("neg", (_INFINITY,))
FLIPPED = {"<": ">", ">": "<", "leq": "geq", "geq": "leq", "=": "=", "neq": "neq"}


def difference(left: Node, right: Node) -> Node:
    """``left - right``."""
    return Apply("+", (left, Apply("neg", (right,))))


def ascending(relation: Relation) -> Relation:
    """The same chain read from the other side where it uses > and not <."""
    if relation.ops and all(op in (">", "geq") for op in relation.ops):
        return Relation(relation.terms[::-1], tuple(FLIPPED[op] for op in relation.ops[::-1]))
    return relation


def unknowns(node: Node) -> frozenset[str]:
    """The variables of relations and of sets of them."""
    if isinstance(node, Relation):
        return frozenset[str]().union(*map(variables, node.terms)) - {"infty", "reals"}
    if isinstance(node, Collection):
        return frozenset[str]().union(*map(unknowns, node.items))
    return frozenset[str]().union(*map(unknowns, node.parts)) if isinstance(node, Combination) else frozenset()


@dataclass(frozen=True)
class _Interval:
    low: Node
    low_closed: bool
    high: Node
    high_closed: bool


def same_reals(a: Node, b: Node) -> bool:
    """Whether two answers are the same set of real numbers."""
    names = unknowns(a) | unknowns(b)
    if len(names) > 1:
        return False
    left, right = _intervals(a), _intervals(b)
    if left is None or right is None:
        return False
    left, right = _merged(left), _merged(right)
    return len(left) == len(right) and all(
        (p.low_closed, p.high_closed) == (q.low_closed, q.high_closed)
        and compare(p.low, q.low) == 0
        and compare(p.high, q.high) == 0
        for p, q in zip(left, right, strict=True)
    )


def _intervals(node: Node) -> list[_Interval] | None:
    if node == Symbol("reals"):
        return [_Interval(_MINUS_INFINITY, False, _INFINITY, False)]
    if isinstance(node, Bracketed):
        if len(node.items) != 2 or compare(*node.items) >= 0:
            return None
        low, high = node.items
        return [_Interval(low, node.opening == "[", high, node.closing == "]")]
    if isinstance(node, Collection):
        return _collected(node)
    if isinstance(node, Combination):
        return _combined(node)
    return _solution(node) if isinstance(node, Relation) else None


def _collected(node: Collection) -> list[_Interval] | None:
    """A finite set; or conditions, of which one (``or``) or all must hold -- one too where all cannot."""
    parts: list[list[_Interval]] = []
    for item in node.items:
        part = [_Interval(item, True, item, True)] if isinstance(item, Scalar) else _intervals(item)
        if part is None or (node.braces and not isinstance(item, Scalar)):
            return None
        parts.append(part)
    if parts and not node.alternatives and all(isinstance(item, Relation) for item in node.items):
        common = functools.reduce(_common, parts)
        if common:
            return common
    return [interval for part in parts for interval in part]


def _combined(node: Combination) -> list[_Interval] | None:
    parts = [_intervals(part) for part in node.parts]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    if node.op == "cup":
        return [interval for part in known for interval in part]
    if node.op == "cap":
        return functools.reduce(_common, known)
    kept, *taken = known
    for point in (interval for part in taken for interval in part):
        if point.low != point.high:
            return None
        kept = [piece for interval in kept for piece in _without_point(interval, point.low)]
    return kept


def _common(left: list[_Interval], right: list[_Interval]) -> list[_Interval]:
    """What lies in both."""
    if len(left) * len(right) > _MAX_PARTS:
        raise Undecided("too many intervals")
    found = []
    for a in left:
        for b in right:
            low = a if compare(a.low, b.low) > 0 or (compare(a.low, b.low) == 0 and not a.low_closed) else b
            high = a if compare(a.high, b.high) < 0 or (compare(a.high, b.high) == 0 and not a.high_closed) else b
            size = compare(low.low, high.high)
            if size < 0 or (size == 0 and low.low_closed and high.high_closed):
                found.append(_Interval(low.low, low.low_closed, high.high, high.high_closed))
    return found


def _without_point(interval: _Interval, point: Node) -> list[_Interval]:
    if compare(point, interval.low) < 0 or compare(point, interval.high) > 0:
        return [interval]
    pieces = []
    if compare(point, interval.low) > 0:
        pieces.append(_Interval(interval.low, interval.low_closed, point, False))
    if compare(point, interval.high) < 0:
        pieces.append(_Interval(point, False, interval.high, interval.high_closed))
    return pieces


def _solution(relation: Relation) -> list[_Interval] | None:
    """The solution of ``x > a``, ``a < x <= b``, ``x != a``, ``x in S`` for an unknown that is linear."""
    relation = ascending(relation)
    if relation.ops == ("in",):
        return _intervals(relation.terms[1])
    unknown = next((term for term in relation.terms if variables(term) - {"infty"}), None)
    if unknown is None:
        return None
    at = relation.terms.index(unknown)
    if any(variables(term) - {"infty"} for term in relation.terms if term is not unknown):
        return None
    if isinstance(unknown, Apply) and unknown.op == "abs" and len(relation.ops) == 1:
        return _absolute(unknown.args[0], relation, at)
    if isinstance(unknown, Apply) and unknown.op == "abs" and len(relation.ops) == 2 and at == 1:
        outside = _absolute(unknown.args[0], Relation(relation.terms[:2], relation.ops[:1]), 1)
        inside = _absolute(unknown.args[0], Relation(relation.terms[1:], relation.ops[1:]), 0)
        return None if outside is None or inside is None else _common(outside, inside)
    solved = _linear(unknown)
    if solved is None:
        return None
    slope, offset = solved

    def bound(term: Node) -> Node:
        if slope == Number(Fraction(1)) and offset == Number(Fraction(0)):
            return term
        if mentions(term, "infty"):
            raise Undecided("an infinite bound of an expression")
        return Apply("/", (difference(term, offset), slope))

    if relation.ops == ("=",):
        point = bound(relation.terms[1 - at])
        return [_Interval(point, True, point, True)]
    if relation.ops == ("neq",):
        return _without_point(_Interval(_MINUS_INFINITY, False, _INFINITY, False), bound(relation.terms[1 - at]))
    if not {"<", "leq"}.issuperset(relation.ops) or len(relation.ops) > 2 or (len(relation.ops) == 2 and at != 1):
        return None
    below = (bound(relation.terms[at - 1]), relation.ops[at - 1] == "leq") if at > 0 else None
    above = (bound(relation.terms[at + 1]), relation.ops[at] == "leq") if at < len(relation.ops) else None
    if compare(slope, Number(Fraction(0))) < 0:
        below, above = above, below
    low, low_closed = below or (_MINUS_INFINITY, False)
    high, high_closed = above or (_INFINITY, False)
    return [_Interval(low, low_closed, high, high_closed)]


def _absolute(inside: Node, relation: Relation, at: int) -> list[_Interval] | None:
    """``|u| < c`` is ``-c < u < c``, ``c < |u|`` is ``u < -c or c < u``, for a positive c."""
    bound, op = relation.terms[1 - at], relation.ops[0]
    if op not in ("<", "leq", "=") or mentions(bound, "infty") or compare(bound, Number(Fraction(0))) <= 0:
        return None
    opposite = Apply("neg", (bound,))
    if at == 0 and op != "=":
        return _solution(Relation((opposite, inside, bound), (op, op)))
    parts = [_solution(Relation((inside, opposite), (op,))), _solution(Relation((bound, inside), (op,)))]
    known = [part for part in parts if part is not None]
    return [interval for part in known for interval in part] if len(known) == 2 else None


def _linear(node: Node) -> tuple[Node, Node] | None:
    """Slope and offset of an expression that is linear in its only variable; None for others."""
    names = variables(node)
    if len(names) != 1:
        return None
    one, zero = Number(Fraction(1)), Number(Fraction(0))
    if isinstance(node, Symbol):
        return one, zero
    (name,) = names
    offset = _at(node, name, zero)
    slope = difference(_at(node, name, one), offset)
    line = Apply("+", (Apply("*", (slope, Symbol(name))), offset))
    return (slope, offset) if same_value(node, line) else None


def _at(node: Node, name: str, value: Node) -> Node:
    if node == Symbol(name):
        return value
    return Apply(node.op, tuple(_at(arg, name, value) for arg in node.args)) if isinstance(node, Apply) else node


def _merged(intervals: list[_Interval]) -> list[_Interval]:
    """The same set as disjoint intervals in order."""

    def by_low(a: _Interval, b: _Interval) -> int:
        return compare(a.low, b.low) or b.low_closed - a.low_closed

    if len(intervals) > _MAX_PARTS:
        raise Undecided("too many intervals")
    merged: list[_Interval] = []
    for interval in sorted(intervals, key=functools.cmp_to_key(by_low)):
        last = merged[-1] if merged else None
        gap = compare(interval.low, last.high) if last else 1
        if last is None or gap > 0 or (gap == 0 and not (interval.low_closed or last.high_closed)):
            merged.append(interval)
            continue
        order = compare(interval.high, last.high)
        high = interval.high if order > 0 else last.high
        closed = {1: interval.high_closed, -1: last.high_closed, 0: interval.high_closed or last.high_closed}[order]
        merged[-1] = _Interval(last.low, last.low_closed, high, closed)
    return merged
