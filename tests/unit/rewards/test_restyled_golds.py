"""Answers of many kinds, restyled (still right) and mutated (no longer right), by seeded choices."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

import pytest

from megatron_rl.rewards.answers import equal

GOLDS = r"""
17
-3
2048
1234567
0.75
-12.5
\frac{3}{7}
-\frac{11}{4}
\frac{5\sqrt{3}}{12}
2\frac{1}{3}
\sqrt{13}
3\sqrt{2}
\sqrt[3]{14}
2^{10}
7!
\frac{7\pi}{12}
12\pi
36\pi\sqrt{2}
e^{3}
\ln 5
\log_{2} 7
\frac{1+\sqrt{5}}{2}
2-\sqrt{3}
4+3i
-1-2i
45^\circ
35\%
\$18.50
24\text{ cm}
16\text{ square meters}
(3,-4)
(2,\frac{5}{3},8)
(1,6]
[-2,5)
(-\infty,4)
(-\infty,-1)\cup(3,\infty)
\{1,3,5\}
\{-2,7\}
1,4,9
-5,6
\pm 8
x=12
y=3x-7
x^2+5x+6
(x+2)(x-9)
3x^2y-4xy^2
\frac{x+1}{x-4}
f(x)=2x+5
x>3
-2\leq x<7
x^2+y^2=25
\begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix}5\\-6\end{pmatrix}
3:5
2:3:7
1011_2
3.2\times 10^{5}
|x-4|<3
|-9|
\frac{\sin 20^\circ}{4}
\text{Thursday}
(B)
""".split("\n")[1:-1]

Change = Callable[[str], str]

RESTYLINGS: dict[str, Change] = {
    "dollars": lambda gold: f"${gold}$" if "$" not in gold else gold,
    "brackets of LaTeX": lambda gold: rf"\({gold}\)",
    "displayed": lambda gold: rf"\[ {gold} \]",
    "final dot": lambda gold: f"{gold}.",
    "display style": lambda gold: rf"\displaystyle {gold}",
    "large fractions": lambda gold: gold.replace(r"\frac", r"\dfrac"),
    "small fractions": lambda gold: gold.replace(r"\frac", r"\tfrac"),
    "growing brackets": lambda gold: (
        gold.replace("(", r"\left(").replace(")", r"\right)") if gold.count("(") == gold.count(")") else gold
    ),
    "spaces": lambda gold: re.sub(r"([+=<-])", r" \1 ", gold) if "[" not in gold else gold,
    "thin spaces": lambda gold: re.sub(r",(?=[\d\\-])", r",\\, ", gold),
    "thousands": lambda gold: f"{int(gold):,}" if re.fullmatch(r"\d{4,}", gold) else gold,
    "braced thousands": lambda gold: f"{int(gold):,}".replace(",", "{,}") if re.fullmatch(r"\d{4,}", gold) else gold,
    "no leading zero": lambda gold: re.sub(r"^(-?)0\.", r"\1.", gold),
    "trailing zero": lambda gold: f"{gold}0" if re.fullmatch(r"-?\d+\.\d+", gold) else gold,
    "slashes": lambda gold: re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", gold),
    "unicode": lambda gold: (
        gold.replace(r"\pi", "π").replace(r"\infty", "∞").replace("-", "\N{MINUS SIGN}").replace(r"\leq", "≤")
    ),
    "bold": lambda gold: rf"\mathbf{{{gold}}}",
    "coloured": lambda gold: rf"\color{{blue}}{{{gold}}}",
    "other bracket of matrices": lambda gold: gold.replace("pmatrix", "bmatrix"),
    "elements turned round": lambda gold: re.sub(r"^\\\{(.*)\\\}$", lambda m: rf"\{{{_turned(m[1])}\}}", gold),
    "items turned round": lambda gold: _turned(gold) if re.fullmatch(r"-?\d+(,-?\d+)+", gold) else gold,
}


def _turned(items: str) -> str:
    return ", ".join(reversed(items.split(",")))


def mutations(gold: str, choose: random.Random) -> Iterator[str]:
    """The gold with one thing changed so that it is another answer."""
    for digit in re.finditer(r"\d", gold):
        other = choose.choice([other for other in "123456789" if other != digit[0]])
        yield gold[: digit.start()] + other + gold[digit.end() :]
    if re.fullmatch(r"[\d.]+|\\(?:frac|sqrt|ln).*", gold):
        yield f"-{gold}"
    yield re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\\frac{\3}{\2}", gold)
    yield re.sub(r"^\((-?\d+),(-?\d+)\)$", r"(\2,\1)", gold)
    yield gold.replace("(1,6]", "[1,6]").replace("[-2,5)", "(-2,5)")
    yield gold.replace(">", "<") if ">" in gold else gold.replace("<", r"\leq ")
    yield gold.replace(r"\sqrt", "")
    yield gold.replace(r"\pi", "")
    yield gold.replace("+", "-") if "i" in gold or "x" in gold else gold
    yield f"{gold},99" if re.fullmatch(r"[\d,-]+", gold) else gold


@pytest.mark.parametrize("style", RESTYLINGS)
def test_a_gold_in_another_style_is_right(style: str) -> None:
    restyled = [(gold, RESTYLINGS[style](gold)) for gold in GOLDS]
    changed = [(gold, answer) for gold, answer in restyled if answer != gold]
    assert changed
    assert [(gold, answer) for gold, answer in changed if not equal(answer, gold)] == []


def test_a_gold_in_two_other_styles_at_once_is_right() -> None:
    choose = random.Random(20)
    # Outermost last: a final dot or dollars around a bold formula.
    inner = ["large fractions", "thin spaces", "unicode", "other bracket of matrices", "no leading zero", "slashes"]
    outer = ["dollars", "displayed", "final dot", "bold", "display style"]
    pairs = [(choose.choice(inner), choose.choice(outer), gold) for gold in GOLDS for _ in range(3)]
    answers = [(gold, RESTYLINGS[second](RESTYLINGS[first](gold))) for first, second, gold in pairs]
    assert [(gold, answer) for gold, answer in answers if not equal(answer, gold)] == []


def test_a_mutated_gold_is_wrong_in_whatever_style() -> None:
    choose = random.Random(7)
    styles = [lambda gold: gold, *(RESTYLINGS[name] for name in ("dollars", "large fractions", "final dot", "unicode"))]
    mutants = [
        (gold, choose.choice(styles)(mutant)) for gold in GOLDS for mutant in mutations(gold, choose) if mutant != gold
    ]
    assert len(mutants) > 150
    assert [(gold, mutant) for gold, mutant in mutants if equal(mutant, gold)] == []
