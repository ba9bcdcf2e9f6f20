"""The verdicts of SimpleRL-reason v0, oddities included."""

from __future__ import annotations

import pytest

from megatron_rl.dataflow import Finish
from megatron_rl.rewards.rules import RULES
from megatron_rl.rewards.seed_grader import extract_answer, seed_equal

SEED_EXACT = RULES["seed_exact"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"So $\boxed{118}$.", "118"),
        (r"\boxed{1} no wait \boxed{118}", "118"),
        ("I should have boxed 118", "118"),
        (r"\boxed{\frac{1}{2", r"\frac{1}{2"),
        (r"\boxed{\frac14}", r"\frac{1}{4}"),
        (r"\boxed{1/4}", r"\frac{1}{4}"),
        (r"\boxed{30\text{ minutes}}", "30"),
        (r"\boxed{45^\circ}", "45"),
        (r"\boxed{\$18}", "18"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{x=5}", "5"),
        (r"\boxed{\text{(B)}}", "(B)"),
        (r"\boxed{\text{east}}", ""),
        (r"\boxed{five}", "5"),
        (r"\boxed{3+2j}", "3+2i"),
        ("The final answer is $118$. I hope it is correct.", "118"),
        ("The answer is 118.", "118"),
        ("first 1,000 and then -2.5 apples", "-2.5"),
        ("nothing", ""),
    ],
)
def test_extraction_of_the_seed(text: str, expected: str) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("pred", "gold"),
    [
        ("50", "0.5"),
        ("0.5", "50"),
        ("10001", "10000"),
        ("[1,2)", "(1,2)"),
        ("(1,4.5)", r"(1,\frac{9}{2})"),
        ("3.14159", r"\pi"),
        ("(B)", "B"),
        ("-34x-45y+20z-100=0", "34x+45y-20z+100=0"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("12,34", "1234"),
    ],
)
def test_the_seed_accepts(pred: str, gold: str) -> None:
    assert seed_equal(pred, gold)


@pytest.mark.parametrize(
    ("pred", "gold"),
    [
        ("10002", "10000"),
        ("2,1", "1,2"),
        ("2", r"2\text{ inches}"),
        ("Monday", r"\text{monday}"),
        ("62", r"62^\circ"),
        ("347", r"\$347"),
        (r"(2,\frac{8\pi}{7})", r"\left( 2, \frac{8 \pi}{7} \right)"),
        ("", "118"),
        ("__import__('os')", "5"),
    ],
)
def test_the_seed_rejects(pred: str, gold: str) -> None:
    assert not seed_equal(pred, gold)


def test_the_missing_word_overrides_a_right_answer() -> None:
    assert SEED_EXACT("The answer is 118.", "118", Finish.STOP).value == -1.0
    assert SEED_EXACT(r"\boxed{117}", "118", Finish.STOP).value == -0.5
    assert SEED_EXACT(r"\boxed{50}", "0.5", Finish.STOP).value == 1.0
    assert RULES["seed"](r"\boxed{50}", "0.5", Finish.STOP).value == -0.5


def test_the_seed_rejects_a_formula_that_is_too_deep_to_evaluate() -> None:
    for length in range(50, 500, 50):
        assert not seed_equal("x" + "^x" * length, "y")
