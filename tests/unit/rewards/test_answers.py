"""Extraction and equality of answers, on hand-written pairs."""

from __future__ import annotations

import ast
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.rewards import answers, second_opinion
from megatron_rl.rewards.answers import after_last_word_boxed, cut_at_stop, equal, extract, last_boxed
from megatron_rl.rewards.expressions import Apply, Number, Undecided, exact
from megatron_rl.rewards.notation import plain
from megatron_rl.rewards.parsing import parse
from megatron_rl.rewards.seed_grader import seed_equal
from megatron_rl.rewards.structure import EXACT, Leniency


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so $\boxed{118}$.", "118"),
        (r"\fbox{7}", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} is it", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"\boxed{}", ""),
        (r"\boxed{\frac{1}{2", r"\frac{1}{2"),
        (r"\boxed{1} then \boxed{2", "2"),
        ("boxed 118", None),
        ("the answer is 118", None),
        ("", None),
    ],
)
def test_last_boxed_gives_the_content_of_the_last_box(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [(r"\boxed{1} then \boxed{2", "1"), (r"\boxed{2", None), (r"\boxed{1} then \boxed{2}", "2")],
)
def test_last_boxed_ignores_a_truncated_box_on_request(text: str, expected: str | None) -> None:
    assert last_boxed(text, closed=True) == expected


def test_extraction_takes_linear_time_on_many_unclosed_boxes() -> None:
    begin = time.perf_counter()
    assert last_boxed(r"\boxed{" * 20_000, closed=True) is None
    assert time.perf_counter() - begin < 2.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I should have boxed 118", "118"),
        (r"\boxed{118}$ and so on", "118"),
        (r"\boxed 118$ and so on", "118"),
        (r"\boxed{\frac{1}{2", r"\frac{1}{2"),
        (r"\boxed{1} or rather boxed{2}", "2"),
    ],
)
def test_the_seed_reads_what_follows_the_last_word_boxed(text: str, expected: str) -> None:
    assert after_last_word_boxed(text) == expected


def test_text_is_cut_at_the_earliest_stop_string() -> None:
    stops = ("<|im_end|>", "</s>")
    assert cut_at_stop(r"no </s> \boxed{1}<|im_end|>", stops) == "no "
    assert cut_at_stop("no stop", stops) == "no stop"
    assert cut_at_stop("all of it</s>", ()) == "all of it</s>"


EQUAL = [
    # spelling
    ("118", "118"),
    (" $118$. ", "118"),
    (r"\(118\)", "118"),
    (r"\[118\]", "118"),
    (r"\dfrac{1}{4}", r"\frac{1}{4}"),
    (r"\frac14", r"\frac{1}{4}"),
    (r"\tfrac37", "3/7"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    (r"\frac{1}{2", r"\frac{1}{2}"),
    (r"\sqrt3", r"\sqrt{3}"),
    ("x^{2}+1", "x^2 + 1"),
    ("½", r"\frac{1}{2}"),
    ("x²", "x^2"),
    ("\u22125", "-5"),
    ("2√3", r"2\sqrt{3}"),
    ("\uff13", "3"),
    ("5\u200b", "5"),
    # exact numbers
    ("0.25", r"\frac{1}{4}"),
    ("-0.5", r"-\frac{1}{2}"),
    (r"\frac{-1}{2}", r"\frac{1}{-2}"),
    ("+5", "5"),
    ("5.00", "5"),
    ("033", "33"),
    (".5", "1/2"),
    ("2/4", "1/2"),
    (r"1\frac{1}{2}", "3/2"),
    ("1 1/2", "1.5"),
    (r"0.\overline{3}", "1/3"),
    (r"0.1\overline{6}", "1/6"),
    (r"1.5\times10^{6}", "1500000"),
    (r"1.5 \cdot 10^6", "1.5e6"),
    ("1,234", "1234"),
    ("1,234,567.5", "1234567.5"),
    (r"1{,}234", "1234"),
    (r"1\,234\,567", "1234567"),
    (r"1,\!234", "1234"),
    ("five", "5"),
    # units, labels, signs on one side
    (r"30\text{ minutes}", "30"),
    ("5 cm", "5"),
    (r"5~\mathrm{cm}", r"5\text{ centimeters}"),
    (r"36\text{ square inches}", r"36\text{ in}^2"),
    (r"45^\circ", "45"),
    ("45°", r"45^{\circ}"),
    (r"\$18", "18"),
    (r"50\%", "50"),
    ("0.25", r"25\%"),
    (r"25\%", "0.25"),
    ("1011_2", "1011_{2}"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("5=x", "x=5"),
    (r"x \in [1,2)", "[1,2)"),
    ("(x,y)=(1,2)", "(1,2)"),
    # words and choices
    (r"\text{east}", "East"),
    (r"\text{(B)}", "B"),
    (r"\textbf{(B) }5", "B"),
    (r"\mathrm{yes}", "Yes"),
    # lists, tuples, sets, intervals
    ("(4, -2, 3)", "(4,-2,3)"),
    ("(1,4.5)", r"(1,\frac{9}{2})"),
    ("1, 2", "(1,2)"),
    (r"\{3, 1, 2\}", r"\{1,2,3\}"),
    ("2,1", "1,2"),
    (r"\{5\}", "5"),
    (r"3 \text{ and } 5", "5,3"),
    (r"\pm 3", "3,-3"),
    (r"1\pm\sqrt{2}", r"1-\sqrt2, 1+\sqrt2"),
    ("(1,2),(3,4)", "(3,4),(1,2)"),
    (r"\bigl(1,5\bigr]", "(1,5]"),
    (r"(1,\infty)\cup(-\infty,0]", r"(-\infty,0] \cup (1,+\infty)"),
    (r"\mathbb{R}", r"(-\infty,\infty)"),
    (r"\varnothing", r"\emptyset"),
    ("1 501/502", r"\frac{1003}{502}"),
    (r"{-5^\circ}", r"-5^\circ"),
    (r"2,3\text{ and }5", "5,3,2"),
    ("x=1, x=2", "2,1"),
    ("a=1, b=2", "(1,2)"),
    (r"\{1\}\cup\{2,3\}", r"\{1,2,3\}"),
    # relations and sets of numbers
    (r"x\ge-2", r"[-2,\infty)"),
    (r"1<2x<6", r"(\frac12,3)"),
    ("-x>-1", "x<1"),
    (r"2\ge x>-1", r"-1<x\le2"),
    (r"x<0 \text{ or } x>1", r"(-\infty,0)\cup(1,\infty)"),
    (r"x\ne 0", r"(-\infty,0)\cup(0,\infty)"),
    (r"\mathbb{R}\setminus\{0\}", r"(-\infty,0)\cup(0,\infty)"),
    (r"\{x \mid 1\le x<2\}", "[1,2)"),
    (r"x>2 \text{ and } x\le 5", "(2,5]"),
    ("x>0, x<5", "0<x<5"),
    (r"(-\infty,5)\cap(0,\infty)", "(0,5)"),
    (r"x\ne 1, x\ne 2", r"(-\infty,1)\cup(1,2)\cup(2,\infty)"),
    (r"\{x : x>0, x<5\}", "(0,5)"),
    ("x>1, x<0", "x<0 or x>1"),
    ("x>2 and x<5", "2<x<5"),
    ("x<0, x>1", r"(-\infty,0)\cup(1,\infty)"),
    ("y=2x+1", "2x-y+1=0"),
    ("y=2x+1", "f(x)=2x+1"),
    ("2x^2+2y^2=8", "x^2+y^2=4"),
    ("x=5+5+1=11", "11"),
    (r"x=\frac13\approx 0.333", r"\frac13"),
    (r"\pi\approx 3.14", "3.14"),
    (r"S_1:S_2=7:32", "7:32"),
    ("AB=5", "5"),
    ("2 hours", r"120\text{ minutes}"),
    (r"1.5\text{ million}", r"1.5\times10^6"),
    ("0,5", r"\frac12"),
    (r"3\text{A}_{16}", "3A_{16}"),
    ("twenty-five", "25"),
    # formulas
    (r"\sin^2x", r"\frac{1-\cos 2x}{2}"),
    (r"\cos 36^\circ", r"\frac{\sqrt5+1}{4}"),
    (r"\sqrt[3]{2+\sqrt5}-\sqrt[3]{\sqrt5-2}", "1"),
    (r"4^{n/2}", "2^n"),
    (r"\sum_{k=1}^{10}k", "55"),
    (r"\binom{20}{10}", "184756"),
    ("((((((((5))))))))", "5"),
    ("10^12", "1000000000000"),
    ("((n-2) 2^n)+1", "1+2^n(n-2)"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    ("2^{10}", "1024"),
    ("x+2x+1", "3x+1"),
    ("(x+1)^2", "x^2+2x+1"),
    ("-34x-45y+20z-100=0", "34x+45y-20z+100=0"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"(\sqrt{4},1)", "(2,1)"),
    (r"\sqrt[3]{4}", r"4^{\frac13}"),
    # formulas of several pieces agree everywhere
    ("|3-x|", "|x-3|"),
    (r"\sqrt{x^2-6x+9}", "|x-3|"),
    (r"\max(x,y)", r"\frac{x+y+|x-y|}{2}"),
    (r"\sqrt{x^2+1}-x", r"\frac{1}{\sqrt{x^2+1}+x}"),
    (r"(-1)^{n+2}", "(-1)^n"),
    (r"(-1)^n", r"\cos(n\pi)"),
    (r"\sqrt{x}e^{x}", r"x^{1/2}e^x"),
    # spaces between values, approximations
    (r"1 \quad 2", "1,2"),
    (r"x=1 \quad x=-2", "1,-2"),
    (r"\frac12 \quad \frac34", r"\frac12,\frac34"),
    ("2^3 3^2", "72"),
    (r"x=\frac23\approx 0.667\approx 0.67", "0.67"),
    (r"x=\frac23\approx 0.667\approx 0.67", r"\frac23"),
    (r"x=\frac23\approx 0.667=0.667", "0.667"),
    (r"45.5\approx 46", "46"),
    ("ba", "ab"),
    # units of physics
    (r"5 \AA", "5"),
    (r"5 \mu\mathrm{m}", "5"),
    (r"5\,\text{μm}", "5"),
    (r"5\,\text{Å}", "5"),
    (r"5^{\prime\prime}", "5"),
    (r"5''", "5"),
    (r"5 \text{ arcsec}", "5"),
    (r"5\,\mathrm{arcmin}", "5"),
    (r"5\,\text{m}/\text{sec}", "5"),
    (r"5\,\text{L}/\text{min}", "5"),
    (r"5\,\text{cm}^2/\text{sec}", "5"),
    (r"5 \mathrm{~cm}^{2} / \mathrm{sec}", "5"),
    (r"5\,\mathrm{m/s^2}", "5"),
    (r"5\,\mathrm{W/m^2}", "5"),
    (r"5\,\mathrm{kJ\,mol^{-1}}", "5"),
    (r"5\,\mathrm{erg\,s^{-1}}", "5"),
    (r"5\,\mathrm{kg\cdot m^2/s}", "5"),
    (r"5\,\frac{\text{m}}{\text{s}}", "5"),
    (r"5\,\frac{\mathrm{kg}}{\mathrm{m}^3}", "5"),
    (r"5\,\mathrm{\Omega}", "5"),
    (r"5\,\text{M}", "5"),
    (r"5\,\text{T}", "5"),
    (r"5 Hz", "5"),
    (r"5\,\mathrm{m/s^2}", r"5\,\text{m}/\text{s}^2"),
    # powers that are too large at some of the points
    (r"(2+\sqrt{3})^{2^n}+(2-\sqrt{3})^{2^n}", r"(2-\sqrt{3})^{2^n}+(2+\sqrt{3})^{2^n}"),
    (r"\frac{x^{2^n}-1}{x-1}", r"\frac{1-x^{2^n}}{1-x}"),
    (r"\frac{a^{2^{n+1}}-b^{2^{n+1}}}{a-b}", r"\frac{b^{2^{n+1}}-a^{2^{n+1}}}{b-a}"),
    (r"\sqrt{2^{2^n}+1}", r"\sqrt{1+2^{2^n}}"),
    (r"\sqrt{4^{n!}-1}", r"\sqrt{2^{2\cdot n!}-1}"),
    (r"\frac{(1+\sqrt{2})^{n^3}-1}{2}", r"-\frac12+\frac12(1+\sqrt2)^{n^3}"),
    ("n^{n!}+1", "1+n^{n!}"),
    (r"a^{b^c}\cdot 2", "2a^{(b^c)}"),
    ("x^{x^x}", r"x^{(x^x)}\cdot1"),
    ("x^{y^z}+1", "1+x^{(y^z)}"),
    (r"\sqrt{x^{x^x}}", "x^{x^x/2}"),
    (r"\sqrt{(n!)!}", "((n!)!)^{1/2}"),
    ("x^{e^y}+x", "x(x^{e^y-1}+1)"),
]

NOT_EQUAL = [
    # beyond a kink, a step or a change of sign
    ("3-x", "|x-3|"),
    ("x+2", "|x+2|"),
    ("2024-x", "|x-2024|"),
    ("3-x", r"\sqrt{x^2-6x+9}"),
    ("2x+5", "|x+2|+|x+3|"),
    ("6-2a", r"2\sqrt{(a-3)^2}"),
    ("1", r"\frac{|x+4|}{x+4}"),
    ("3-x<2", "|x-3|<2"),
    ("x", r"\min(x,10)"),
    (r"(-1)^{n(n-1)(n-2)/6}", r"(-1)^{n(n-1)/2}"),
    ("x^{2/2}", r"\sqrt{x^2}"),
    # two numbers side by side are neither their sum nor one number
    ("4 5", "9"),
    ("20 24", "44"),
    ("12~13", "25"),
    ("4  5", "45"),
    (r"0 \quad 7", "7"),
    (r"4 \quad 5", "9"),
    (r"4 \quad 5", "45"),
    (r"1 \quad 2 \quad 3", "123"),
    (r"\frac12 \quad \frac34", r"\frac38"),
    # several approximations are one answer
    (r"x=45.5\approx 45\approx 46", "45"),
    (r"x=45.5\approx 45\approx 46", "46"),
    (r"\frac92\approx 4\approx 5", "4"),
    (r"\frac92\approx 4\approx 5", "5"),
    (r"x=\frac92\approx 4=5", "5"),
    (r"x=\frac23\approx 0.667\approx 0.67", "0.667"),
    # units differ, and what may be a variable is none
    (r"5\,\mathrm{m/s^2}", r"5\,\mathrm{m/s}"),
    (r"5\text{ arcsec}", r"5\text{ arcmin}"),
    (r"5\mathrm{e^2}", "5"),
    (r"5\mathrm{x^2}", "5"),
    (r"2\Omega", "2"),
    ("2nm", "2"),
    (r"\frac{5}{\text{s}}", "5"),
    ("x_1''", "x_1"),
    # words, not products
    ("on", "no"),
    ("ton", "not"),
    ("saw", "was"),
    ("117", "118"),
    ("", "118"),
    ("118", ""),
    # no factor of 100, no tolerance
    ("50", "0.5"),
    ("0.5", "50"),
    ("500", "5"),
    (r"500\%", "0.5"),
    (r"12.5\%", "1.25"),
    ("10001", "10000"),
    ("0.3333333333", "1/3"),
    ("3.14159", r"\pi"),
    (r"\sqrt{2}", "1.41421356"),
    ("0", "2.88e-19"),
    ("1267650600228229401496703205377", "1267650600228229401496703205376"),
    ("1/0", "0"),
    # signs, digits, powers
    ("-5", "5"),
    ("1 2", "12"),
    ("12", r"\frac12"),
    ("x^2", "2x"),
    ("x²", "x2"),
    ("10^5", "105"),
    ("12.345", "12345"),
    ("10,80", "10{,}080"),
    # brackets and order
    ("[1,2)", "(1,2)"),
    ("(1,2]", "(1,2)"),
    ("(5,1]", "(1,5]"),
    (r"\{1,2\}", "(1,2)"),
    ("[1,2]", r"\{1,2\}"),
    ("(2,1)", "(1,2)"),
    ("(1,2,3)", "(1,2)"),
    ("1", "1,2"),
    ("1,2", "1"),
    ("1,1", "1,2"),
    ("7 8", "78"),
    ("7 8", "56"),
    ("n=42=43", "42"),
    ("42 = 43", "42"),
    (r"x=5+5+1=7", "11"),
    (r"\approx 7.4", "7"),
    ("1.2", "1,2"),
    ("0,5", "5"),
    ("1,250", "1.25"),
    ("(1,234)", "1234"),
    (r"\sqrt{x^2}", "x"),
    ("|x|", "x"),
    ("f(x)=2x", "g(x)=2x"),
    ("AB", "BA"),
    ("x^2=25", "x=5"),
    ("x<5", "5"),
    ("at least 5", "5"),
    (r"5\text{ if }x>0", "5"),
    ("-x>-1", "x>1"),
    ("(1,3)", r"1\le x<3"),
    ("4:3", "3:4"),
    ("x>2 or x<5", "(2,5)"),
    ("x>2 or x<5", "x>2 and x<5"),
    (r"\{" + ",".join(map(str, range(80))) + r"\}", r"\{" + ",".join(map(str, [*range(79), 99])) + r"\}"),
    (r"x>2 \text{ and } x<5", r"\mathbb{R}"),
    ("2/3=0.67", "1/3=0.67"),
    (r"10^{1000000}", r"10^{999999}"),
    ("123456789012345678901234567891", "123456789012345678901234567890"),
    (r"\sum_{k=1}^{10}k", "54"),
    (r"3\frac{9}{8}", r"3\frac{3}{8}"),
    ("(1,4),(3,2)", "(1,2),(3,4)"),
    (r"(-\infty,0)\cap(1,\infty)", r"(-\infty,0)\cup(1,\infty)"),
    (r"(-\infty,0)", r"(-\infty,0)\cup(1,\infty)"),
    ("3", r"\pm 3"),
    # units, labels, words, choices
    (r"5\text{ hours}", r"5\text{ minutes}"),
    (r"36\text{ inches}", r"36\text{ square inches}"),
    (r"5\text{ s}", r"5\text{ m}"),
    (r"1.5\text{ million}", "1.5"),
    ("1011_3", "1011_2"),
    ("x=5", "y=5"),
    ("x=6", "5"),
    ("f(5)=2", "5"),
    ("west", r"\text{east}"),
    (r"\text{not even}", "even"),
    ("abcd", "dcba"),
    ("A", "B"),
    (r"\textbf{(A) }5 \textbf{ or (B) }6", "B"),
    ("A,B,C,D,E", "E"),
    ("x", "X"),
    # formulas
    ("x^2-y^2=4", "x^2+y^2=4"),
    ("x<3", "x>3"),
    (r"\sqrt{3}", r"\sqrt{2}"),
    ("3x+2", "3x+1"),
    (r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
]


@pytest.mark.parametrize(("pred", "gold"), EQUAL)
def test_equal_answers(pred: str, gold: str) -> None:
    assert equal(pred, gold)


@pytest.mark.parametrize(("pred", "gold"), NOT_EQUAL)
def test_different_answers(pred: str, gold: str) -> None:
    assert not equal(pred, gold)


@pytest.mark.parametrize(
    ("pred", "gold"),
    [
        (r"\sum_{k=0}^{450}\binom{450}{k}\sqrt{x}^k", r"(1+\sqrt{x})^{450}"),
        (r"\sum_{k=0}^{500}|x|^k", r"\sum_{k=0}^{500}|x|^{k}\cdot 1"),
    ],
)
def test_a_long_sum_with_roots_or_absolute_values_is_compared_at_as_many_points_as_its_budget_allows(
    pred: str, gold: str
) -> None:
    second_opinion.preload()  # the import is not what is timed
    begin = time.process_time()
    assert equal(pred, gold)
    assert time.process_time() - begin < 2.0


HOSTILE = [
    "__import__('os').system('touch X')",
    "open('X','w')",
    r"\pi + len([open('X','w')])",
    r"\text{__import__('os').system('touch X')}",
    "exec(chr(112)+chr(97))",
    "[open('X','w'),2]",
    "().__class__.__base__.__subclasses__()",
    "lambda: 5",
    "5 if True else 6",
    "9**9**9**9",
    "9^{9^{9^9}}",
    r"9^{\frac{9^9}{1}}",
    "((9^99)^99)^99",
    "100000000!",
    "9!!!!",
    r"\binom{10^9}{5\cdot10^8}",
    "1e999999999",
    r"10^{999999999}",
    "(" * 400 + "5" + ")" * 400,
    "{" * 400 + "5",
    r"\frac{1}{" * 300 + "2",
    r"\sqrt{" * 100 + "2",
    "1," * 400,
    "x" + "^x" * 450,
    "2" + "^2" * 450,
    "1" + "+x!" * 300,
    r"\sin" * 190 + " x",
    "|" * 500,
    "9" * 100_000,
    "\ud800",
    "\x00",
]


@pytest.mark.parametrize("gold", ["7", r"\sqrt{2}", r"\pi", r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"])
def test_hostile_text_is_wrong_runs_nothing_and_takes_no_time(
    gold: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    second_opinion.preload()  # the import is not what is timed
    for text in HOSTILE:
        begin = time.process_time()
        assert not equal(text, gold), text
        assert not equal(gold, text), text
        assert time.process_time() - begin < 1.0, text
    assert list(tmp_path.iterdir()) == []


def test_no_module_of_the_package_evaluates_text() -> None:
    files = sorted(Path(answers.__file__).parent.glob("*.py"))
    assert {"answers.py", "notation.py", "parsing.py", "rules.py", "worker.py"} <= {file.name for file in files}
    called = {
        node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute))
    }
    assert "fullmatch" in called  # the walk sees calls
    assert called.isdisjoint({"eval", "exec", "sympify", "parse_expr", "parse_latex", "lambdify"})


@settings(deadline=None)  # a loaded machine is no failure
@given(numerator=st.integers(-(10**30), 10**30), denominator=st.integers(1, 10**12))
def test_every_fraction_is_read_exactly(numerator: int, denominator: int) -> None:
    value = Fraction(numerator, denominator)
    assert exact(parse(f"{numerator}/{denominator}")) == value
    assert exact(parse(rf"\frac{{{numerator}}}{{{denominator}}}")) == value
    assert equal(f"{numerator + 1}/{denominator}", f"{numerator}/{denominator}") is False


def test_a_sum_whose_denominator_explodes_is_undecided_on_the_way() -> None:
    primes = [p for p in range(2, 3000) if all(p % q for q in range(2, int(p**0.5) + 1))]
    fractions = tuple(Apply("^", (Number(Fraction(p)), Number(Fraction(-3000)))) for p in primes[:100])
    begin = time.process_time()
    with pytest.raises(Undecided, match="too large"):
        exact(Apply("+", fractions))
    powers = tuple(Apply("^", (Number(Fraction(p)), Number(Fraction(3000)))) for p in primes[:100])
    with pytest.raises(Undecided, match="too large"):
        exact(Apply("lcm", powers))
    assert time.process_time() - begin < 0.1
    assert exact(Apply("lcm", tuple(Number(Fraction(number)) for number in (4, 6, -10)))) == 60


@given(st.text(alphabet="0123456789abx+-*/^_=<>(){}[],.!$% \\\n'\"|:;", max_size=40))
def test_any_text_is_read_or_undecided(text: str) -> None:
    try:
        tree = parse(plain(text))
    except Undecided:
        return
    assert tree == parse(plain(plain(text)))


_MARKS = r"""
    0 1 2 10 0,5 0.5 1,250 x y e i A ( ) [ ] { } , = < > : | + - * / ^ _ ! % _2 x>1 and or & \{ \} \\
    \pi \infty \emptyset \pm \cup \cap \setminus \in \leq \neq \approx \sum_{k=1}^{3} \overline{3} \mathbb{R}
    \begin{pmatrix} \end{pmatrix} \text{cm} \langle \rangle ^\circ \% \cdot \text{million}
"""
_FUNCTIONS = r"\frac \sqrt \binom \max \min \gcd \lcm \log \ln \sin \exp \arcsin abs \lfloor \sqrt["
_ARGUMENTS = r"(2) x _2(3) {1}{0} (0.5) (1,2) \{\} \emptyset 0] ^{-1}x"
_CALLS = st.tuples(st.sampled_from(_FUNCTIONS.split()), st.sampled_from(_ARGUMENTS.split())).map("".join)
_SUMS = st.lists(_CALLS | st.sampled_from(["2", "0,5", "x"]), min_size=1, max_size=2).map("+".join)
_FORMULAS = _SUMS | st.lists(st.sampled_from(_MARKS.split()) | _CALLS, max_size=9).map(" ".join)
_GOLDS = st.sampled_from(["7", "(1,2]", "x<3", r"\frac12", "1/0", "x=5", "5 cm"])


@settings(deadline=None, max_examples=300)  # the first one imports sympy
@given(_FORMULAS, _GOLDS | _FORMULAS, st.sampled_from([EXACT, Leniency(relative=0.01, factor_100=True)]))
def test_no_comparison_of_formulas_raises(text: str, gold: str, leniency: Leniency) -> None:
    assert equal(text, gold, leniency) in (True, False)
    assert equal(gold, text, leniency) in (True, False)
    assert seed_equal(text, gold) in (True, False)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        (r"\max\{\}", "7"),
        (r"\min\emptyset", "7"),
        (r"\gcd\emptyset", "0"),
        ("abs_2(3)", "7"),
        (r"\sqrt2+abs_2(3)", "7"),
        ("0,5", "1/0"),
    ],
)
def test_a_formula_without_a_value_is_wrong_on_either_side(text: str, gold: str) -> None:
    assert not equal(text, gold)
    assert not equal(gold, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1} and \boxed{2}.", "1, 2"),
        (r"$\boxed{1}$, $\boxed{2}$, and $\boxed{3}$", "1, 2, 3"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{5}, to repeat: \boxed{5}", "5"),
        (r"\boxed{5} and \boxed{5}", "5"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{5} \boxed{}", "5"),
        (r"\boxed{}", None),
        (r"\boxed{5", None),
        (r"<think>\boxed{6}</think> It is \boxed{7}", "7"),
        (r"<think>\boxed{6}</think> I give up", None),
        (r"<think>\boxed{6}", None),
        (r"\boxed{7}<|im_end|>\boxed{8}", "7"),
        ("the answer is 5", None),
    ],
)
def test_the_answer_of_a_response(text: str, expected: str | None) -> None:
    assert extract(text) == expected


def test_leniency_of_a_data_set_is_relative_to_the_gold_and_for_numbers_only() -> None:
    loose = Leniency(relative=0.01)
    assert equal("101", "100", loose)
    assert not equal("101.1", "100", loose)
    assert equal("-3.3e-10", "-3.31e-10", loose)
    assert equal("3.14", r"\pi", loose)
    assert not equal("3.14x", r"\pi x", loose)
    assert not equal("101", "100")


def test_a_factor_of_a_hundred_is_accepted_only_on_request() -> None:
    percentages = Leniency(factor_100=True)
    assert equal("50", "0.5", percentages)
    assert equal("0.5", "50", percentages)
    assert not equal("5", "0.5", percentages)
    assert not equal("50", "0.5")


@pytest.mark.parametrize(
    ("pred", "gold"),
    [
        ("1", r"\frac{99}{100}"),
        (r"x=1", r"\frac{99}{100}"),
        (r"\frac{99}{100}", "x=0.98"),
        ("1, 2", r"\{\frac{99}{100}, 2\}"),
        ("1, 2", r"2, \frac{99}{100}"),
    ],
)
def test_a_tolerance_is_relative_to_the_gold_whatever_the_types(pred: str, gold: str) -> None:
    assert not equal(pred, gold, Leniency(relative=0.01))
    assert equal(pred, gold, Leniency(relative=0.011))


@pytest.mark.parametrize(
    ("pred", "gold"),
    [
        (r"\{1\}", r"\{1,100\}"),
        (r"\{1,100\}", r"\{1\}"),
        (r"\{1\}", r"\{1,1.005\}"),
        (r"1 \text{ or } 1.005", "1"),
        ("x=1=1.005", "1"),
        ("x=1=1.005", "x=1"),
        ("1", "x=1=100"),
    ],
)
def test_what_a_data_set_forgives_holds_between_prediction_and_gold_alone(pred: str, gold: str) -> None:
    assert not equal(pred, gold, Leniency(relative=0.01, factor_100=True))


def test_items_in_any_order_are_paired_even_where_the_first_partner_is_taken() -> None:
    assert equal(r"50\%, 0.5", "0.5, 50")
    assert equal("0.5, 50", r"0.5, 50\%")
    assert equal(r"50\%, 50\%, 0.5", "0.5, 50, 0.5")
    assert not equal(r"50\%, 0.5", "50, 50")
    assert not equal(r"50\%, 0.5, 0.5", "0.5, 50, 50")


@pytest.mark.parametrize(("pred", "gold"), [(r"x=3\frac52", r"y=3\frac52"), (r"x = 3\frac52", r"z=3\frac52")])
def test_different_labels_are_different_where_only_the_second_opinion_reads_the_values(pred: str, gold: str) -> None:
    assert not equal(pred, gold)
    assert equal(pred, gold[2:])
    assert equal(pred, "x=" + gold[2:] + "+0")


def test_nested_braces_are_peeled_off_in_one_pass():
    depth = 500_000  # a pass for each level would be 10^11 steps
    assert plain("{" * depth + "1" + "}" * depth) == "1"
