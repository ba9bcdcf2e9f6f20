"""Typed trees of answers, and the value of a scalar tree: exact where it is rational, else to 60 digits.

Nothing grows without bound: integers have at most ``_MAX_BITS`` bits, an evaluation visits at most ``_MAX_STEPS``
nodes, and what goes beyond raises :class:`Undecided`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from math import comb, factorial, gcd, lcm

import mpmath

_MAX_BITS = 40_000
_MAX_STEPS = 4_000
_MAX_FURTHER_STEPS = 20_000
"""Of all evaluations together beyond the points that every pair of formulas must agree at."""
_MAX_TERMS = 1_000
_DIGITS = 60
_MAX_DIGITS = 400
_TRUSTED = 18
"""Digits at the end that rounding may have spoilt: numbers are equal to ``digits - 18`` digits."""
_MAX_EXPONENT = mpmath.mpf(2) ** 40


class Undecided(Exception):
    """The text cannot be read, or its value is beyond the budget."""


# -------------------------------------------------------------------------------------------------------- nodes


@dataclass(frozen=True, slots=True)
class Number:
    """An exact rational number."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable, with its subscript and accents, or a constant (``pi``, ``e``, ``i``, ``infty``, ``reals``)."""

    name: str


@dataclass(frozen=True, slots=True)
class Apply:
    """An operation or function on scalars, for example ``Apply("+", (a, b))`` or ``Apply("sin", (x,))``."""

    op: str
    args: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Bracketed:
    """A tuple, interval or vector: two brackets with at least two items between them."""

    opening: str
    closing: str
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Collection:
    """A set (``braces``) or a bare list of answers, joined by ``or`` (``alternatives``) or by commas."""

    items: tuple[Node, ...]
    braces: bool
    alternatives: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Combination:
    r"""Sets joined by ``\cup``, ``\cap`` or ``\setminus``."""

    op: str
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of equal length."""

    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """``terms[0] ops[0] terms[1] ops[1] ...``, with operators such as ``=``, ``<``, ``leq``, ``in``."""

    terms: tuple[Node, ...]
    ops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    """``a:b:c``."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value with its unit in one spelling."""

    value: Node
    unit: str


@dataclass(frozen=True, slots=True)
class Based:
    """Digits in a base that was written as a subscript."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Text:
    """Words, casefolded; ``product`` is the other reading of a short word such as ``xy``."""

    words: str
    product: Node | None = field(default=None, compare=False)


Node = (
    Number | Symbol | Apply | Bracketed | Collection | Combination | Matrix | Relation | Ratio | Quantity | Based | Text
)
Scalar = (Number, Symbol, Apply)
CONSTANTS = frozenset({"pi", "e", "i"})
NOT_VALUES = frozenset({"infty", "reals", "integers", "rationals", "naturals", "complexes"})
BINDERS = frozenset({"sum", "prod"})
"""Operations on (variable, from, to, body)."""


def variables(node: Node) -> frozenset[str]:
    """The free variables of a scalar."""
    if isinstance(node, Symbol):
        return frozenset() if node.name in CONSTANTS else frozenset({node.name})
    if not isinstance(node, Apply):
        return frozenset()
    free = frozenset[str]().union(*map(variables, node.args))
    if node.op in BINDERS and isinstance(node.args[0], Symbol):
        free -= {node.args[0].name}
    return free


def mentions(node: Node, name: str) -> bool:
    """Whether the scalar contains this symbol."""
    return node == Symbol(name) or (isinstance(node, Apply) and any(mentions(arg, name) for arg in node.args))


# ------------------------------------------------------------------------------------------------- exact values


def exact(node: Node) -> Fraction | None:
    """The value of a scalar made of rational numbers and rational operations; None for all others.

    Raises:
        Undecided: it divides by zero or its integers grow too large.
    """
    if isinstance(node, Number):
        return node.value
    if not isinstance(node, Apply) or node.op not in _RATIONAL:
        return None
    values: list[Fraction] = []
    for arg in node.args:
        value = exact(arg)
        if value is None:
            return None
        values.append(value)
    return _bounded(_RATIONAL[node.op](*values))


def _bounded(value: Fraction | None) -> Fraction | None:
    if value is not None and max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise Undecided("an integer is too large")
    return value


def _sum(*terms: Fraction) -> Fraction:
    total = Fraction(0)
    for term in terms:
        total += term
        _bounded(total)
    return total


def _product(*factors: Fraction) -> Fraction | None:
    product = Fraction(1)
    for factor in factors:
        product *= factor
        _bounded(product)
    return product


def _quotient(top: Fraction, bottom: Fraction) -> Fraction:
    if bottom == 0:
        raise Undecided("division by zero")
    return top / bottom


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return None
    if base == 0 and exponent <= 0:
        raise Undecided("zero to a power that is not positive")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    # A larger one is left to floating point, which compares it to 60 digits.
    return None if size * abs(exponent) > _MAX_BITS else base ** int(exponent)


def _factorial(of: Fraction) -> Fraction | None:
    return Fraction(factorial(int(of))) if of.denominator == 1 and 0 <= of <= 2000 else None


def _binomial(top: Fraction, bottom: Fraction) -> Fraction | None:
    if top.denominator != 1 or bottom.denominator != 1 or not 0 <= top <= 5000 or bottom < 0:
        return None
    return Fraction(comb(int(top), int(bottom)))


def _of_integers(function: Callable[[int, int], int], values: Sequence[Fraction]) -> Fraction | None:
    if any(value.denominator != 1 for value in values):
        return None
    result = abs(values[0])
    for value in values[1:]:
        result = Fraction(function(int(result), int(value)))
        _bounded(result)
    return result


_RATIONAL: Mapping[str, Callable[..., Fraction | None]] = {
    "+": _sum,
    "*": _product,
    "/": _quotient,
    "neg": lambda x: -x,
    "^": _power,
    "!": _factorial,
    "binom": _binomial,
    "abs": abs,
    "percent": lambda x: x / 100,
    "floor": lambda x: Fraction(x.__floor__()),
    "ceil": lambda x: Fraction(x.__ceil__()),
    "max": lambda *values: max(values),
    "min": lambda *values: min(values),
    "gcd": lambda *values: _of_integers(gcd, values),
    "lcm": lambda *values: _of_integers(lcm, values),
}


# ---------------------------------------------------------------------------------------------- floating values


@dataclass
class _Evaluation:
    """Evaluates one scalar at one point; ``scale`` is the largest summand met, for the rounding error of sums."""

    point: dict[str, mpmath.mpc]
    real: bool = False
    steps: int = 0
    scale: mpmath.mpf = field(default_factory=lambda: mpmath.mpf(0))

    def of(self, node: Node) -> mpmath.mpc:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            raise Undecided("too many operations")
        if isinstance(node, Number):
            return mpmath.mpf(node.value.numerator) / node.value.denominator
        if isinstance(node, Symbol):
            return self._symbol(node.name)
        if not isinstance(node, Apply):
            raise Undecided("no scalar")
        if node.op in BINDERS:
            return self._series(node)
        args = [self.of(arg) for arg in node.args]
        if node.op == "+" or node.op in _CANCELLING:
            self.scale = max(self.scale, *map(abs, args))
        if node.op == "^":
            _check_power(*args)
        function = _FUNCTIONS.get(node.op)
        if function is None:
            raise Undecided(f"no value for {node.op}")
        value = function(*args)
        if self.real and node.op in _PARTIAL and mpmath.im(value) != 0:
            raise ValueError("outside the domain of a function of real variables")
        if not mpmath.isfinite(value):
            raise Undecided("not finite")
        return value

    def _symbol(self, name: str) -> mpmath.mpc:
        if name == "pi":
            return +mpmath.pi
        if name == "e":
            return +mpmath.e
        if name in self.point:
            return self.point[name]
        if name == "i":
            return mpmath.mpc(0, 1)
        raise Undecided(f"no value for {name}")

    def _series(self, node: Apply) -> mpmath.mpc:
        variable, first, last, body = node.args
        low, high = self.of(first), self.of(last)
        if not (mpmath.isint(low) and mpmath.isint(high)):
            raise ValueError("a sum has a value only between integers")  # outside the domain, as log(0) is
        if high - low > _MAX_TERMS:
            raise Undecided("a sum of too many terms")
        assert isinstance(variable, Symbol)
        outer = self.point.get(variable.name)
        value = mpmath.mpf(0 if node.op == "sum" else 1)
        for index in range(int(low), int(high) + 1):
            self.point[variable.name] = mpmath.mpf(index)
            term = self.of(body)
            self.scale = max(self.scale, abs(term))
            value = value + term if node.op == "sum" else value * term
        self.point.pop(variable.name, None)
        if outer is not None:
            self.point[variable.name] = outer
        return value


def _check_power(base: mpmath.mpc, exponent: mpmath.mpc) -> None:
    """Refuse towers: the exponent of the result must fit a machine word."""
    size = abs(exponent)
    if size > 64 and size * abs(mpmath.log(abs(base) + 2)) > _MAX_EXPONENT:
        raise Undecided("a power is too large")


def _small(function: Callable[..., mpmath.mpc], limit: float) -> Callable[..., mpmath.mpc]:
    def bounded(*args: mpmath.mpc) -> mpmath.mpc:
        if any(abs(arg) > limit for arg in args):
            raise Undecided("an argument is too large")
        return function(*args)

    return bounded


def _real_root(radicand: mpmath.mpc, degree: mpmath.mpc) -> mpmath.mpc:
    """The real root of a negative number where its degree is odd, else the principal one."""
    if mpmath.im(radicand) == 0 and mpmath.re(radicand) < 0 and degree == int(mpmath.re(degree)) and degree % 2 == 1:
        return -mpmath.power(-radicand, 1 / degree)
    return mpmath.power(radicand, 1 / degree)


def _real(function: Callable[..., mpmath.mpc]) -> Callable[..., mpmath.mpc]:
    def of_reals(*args: mpmath.mpc) -> mpmath.mpc:
        if any(mpmath.im(arg) != 0 for arg in args):
            raise Undecided("not defined for complex numbers")
        return function(*map(mpmath.re, args))

    return of_reals


_ANGLE = 1e6
_CANCELLING = frozenset({"sin", "cos", "tan", "cot", "ln", "log", "arccos", "arcsec", "floor", "ceil"})
_PARTIAL = frozenset({"sqrt", "root", "^", "ln", "log", "arcsin", "arccos"})
"""Real functions that some real numbers have no value of."""
_FUNCTIONS: Mapping[str, Callable[..., mpmath.mpc]] = {
    "+": lambda *terms: mpmath.fsum(terms),
    "*": lambda *factors: mpmath.fprod(factors),
    "/": lambda a, b: a / b,
    "neg": lambda x: -x,
    "^": mpmath.power,
    "!": _small(mpmath.factorial, 1e8),
    "binom": _small(mpmath.binomial, 1e8),
    "abs": abs,
    "percent": lambda x: x / 100,
    "degree": lambda x: x * mpmath.pi / 180,
    "floor": _real(mpmath.floor),
    "ceil": _real(mpmath.ceil),
    "sqrt": mpmath.sqrt,
    "root": _small(_real_root, 1e9),
    "max": _real(max),
    "min": _real(min),
    "exp": _small(mpmath.exp, 1e9),
    "ln": mpmath.log,
    "log": lambda x, base=10: mpmath.log(x) / mpmath.log(base),
    **{name: _small(getattr(mpmath, name), _ANGLE) for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{name: _small(getattr(mpmath, name), _ANGLE) for name in ("sinh", "cosh", "tanh", "coth")},
    "arcsin": mpmath.asin,
    "arccos": mpmath.acos,
    "arctan": mpmath.atan,
    "arccot": mpmath.acot,
    "arcsec": mpmath.asec,
    "arccsc": mpmath.acsc,
}

# Fixed points, so that a verdict never changes. A variable gets the value at the place of its name in the alphabet of
# the two answers, turned by one for each further point.
_REALS = ("0.7316", "-1.3789", "2.4173", "-0.5471", "1.8837", "3.1127", "-2.2391", "0.2903", "1.1719", "-3.0517")
_POSITIVE = ("0.7316", "1.3789", "2.4173", "0.5471", "1.8837", "3.1127", "2.2391", "0.2903", "1.1719", "4.0517")
_INTEGERS = tuple(map(str, (7, 5, 12, 9, 4, 11, 8, 6, 13, 10)))
_POINTS_NEEDED = 3
_STRETCHES = (41, 1681)
_IN_PIECES = frozenset({"floor", "ceil", "abs", "max", "min", "sqrt", "root"})
"""Functions that one formula does not describe everywhere: beyond a step or a kink they may differ from what they
equal before it. They are compared at all points, and at those stretched to further places."""


def _in_pieces(node: Node) -> bool:
    """Whether two formulas that agree at some points may still differ at others; not where nothing varies."""
    if not (isinstance(node, Apply) and variables(node)):
        return False
    if node.op in _IN_PIECES or (node.op == "^" and not _smooth_power(*node.args)):
        return True
    return any(map(_in_pieces, node.args))


def _smooth_power(base: Node, exponent: Node) -> bool:
    """A whole power, or one of a positive number: no root, and no sign that the exponent decides."""
    try:
        number, power = exact(base), exact(exponent)
    except Undecided:  # it has no value anywhere
        return True
    return base == Symbol("e") or (number is not None and number > 0) or (power is not None and power.denominator == 1)


def _points(names: list[str], stretch: int = 1) -> Iterator[dict[str, mpmath.mpc]]:
    if not names:
        yield {}
        return
    for values in (_REALS, _POSITIVE, _INTEGERS):
        for turn in range(len(values)):
            yield {name: stretch * mpmath.mpf(values[(at * 3 + turn) % len(values)]) for at, name in enumerate(names)}


def samples(*nodes: Node) -> Iterator[tuple[list[mpmath.mpc], mpmath.mpf]]:
    """Values of the scalars at common points where each is defined, with the size of their rounding errors.

    Without ``i`` in the text the answers are functions of real variables: a point where one of them is not real lies
    outside their domain and is left out.
    """
    names = sorted(frozenset[str]().union(*map(variables, nodes)))
    if len(names) > len(_REALS) or not NOT_VALUES.isdisjoint(names):
        raise Undecided("too many variables, or one without a value")
    complex_values = any(mentions(node, "i") for node in nodes)
    in_pieces = any(map(_in_pieces, nodes))
    digits = _DIGITS
    found = steps = 0
    near = [(point, False) for point in _points(names)]
    far = ((point, True) for stretch in _STRETCHES for point in _points(names, stretch))
    for point, is_far in chain(near, far if in_pieces else ()):
        # What such a point cannot decide leaves what the first ones said.
        is_further = is_far or found >= _POINTS_NEEDED
        if is_further and steps > _MAX_FURTHER_STEPS:
            break
        while True:
            with mpmath.workdps(digits):
                evaluations = [_Evaluation(dict(point), bool(names) and not complex_values) for _ in nodes]
                try:
                    values = [e.of(node) for e, node in zip(evaluations, nodes, strict=True)]
                except (ArithmeticError, ValueError, TypeError, mpmath.libmp.libhyper.NoConvergence):
                    break
                except Undecided:
                    if is_further:
                        break
                    raise
                finally:
                    steps += is_further * sum(evaluation.steps for evaluation in evaluations)
                scale = max([*(abs(value) for value in values), *(e.scale for e in evaluations)])
                needed = _DIGITS + (int(mpmath.log10(scale)) if scale > 1e12 else 0)
                if needed > digits and any(e.scale > 1e12 for e in evaluations):
                    if needed <= _MAX_DIGITS:
                        digits = needed  # a large summand may hide a small one
                        continue
                    if is_further:
                        break
                    raise Undecided("sums of very different sizes")
                error = scale * mpmath.mpf(10) ** (_TRUSTED - digits)
                if not complex_values and any(abs(mpmath.im(value)) > error for value in values):
                    break
                found += 1
                yield values, error
                break
        if found >= _POINTS_NEEDED and not in_pieces:
            return
    if found == 0 or (names and found < _POINTS_NEEDED):
        raise Undecided("defined at too few points")


def same_value(left: Node, right: Node) -> bool:
    """Whether two scalars have the same value for all values of their variables.

    Raises:
        Undecided: the values are beyond the budget or not defined.
    """
    if left == right:
        return True
    a, b = exact(left), exact(right)
    if a is not None and b is not None:
        return a == b
    return all(abs(x - y) <= error for (x, y), error in samples(left, right))


def close(left: Node, right: Node, tolerance: float) -> bool:
    """Whether two numbers differ by at most ``tolerance`` times the second one."""
    if variables(left) or variables(right):
        return False
    return all(abs(x - y) <= tolerance * abs(y) for (x, y), _ in samples(left, right))


def proportional(left: Node, right: Node) -> int:
    """The sign of the constant c with ``left = c right`` for all values of the variables; 0 where there is none.

    A complex c counts as positive. Raises ``Undecided`` as :func:`same_value` does.
    """
    first: tuple[mpmath.mpc, mpmath.mpc] | None = None
    for (x, y), error in samples(left, right):
        small_x, small_y = abs(x) <= error, abs(y) <= error
        if small_x or small_y:
            if small_x != small_y:
                return 0
            continue
        if first is None:
            first = (x, y)
        elif abs(x * first[1] - y * first[0]) > error * (abs(first[0]) + abs(first[1])):
            return 0
    if first is None:
        raise Undecided("zero at every point")
    return -1 if mpmath.re(first[0] / first[1]) < 0 else 1


def compare(left: Node, right: Node) -> int:
    """-1, 0 or 1 as the first number lies below, at or above the second one; infinities are numbers here."""
    ends: dict[Node, int] = {Symbol("infty"): 1, Apply("neg", (Symbol("infty"),)): -1}
    if left in ends or right in ends:
        a, b = ends.get(left, 0), ends.get(right, 0)
        return (a > b) - (a < b)
    if variables(left) or variables(right):
        raise Undecided("only numbers have an order")
    (x, y), error = next(samples(left, right))
    return 0 if abs(x - y) <= error else 1 if mpmath.re(x) > mpmath.re(y) else -1
