"""Answers of responses without a box."""

from __future__ import annotations

import time

import pytest

from megatron_rl.dataflow import Finish
from megatron_rl.rewards.final_answer import final_answer
from megatron_rl.rewards.rules import RULES


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is $x$.", "$x$"),
        ("So the answer is 5. I hope it is correct.", "5"),
        ("The answer is 3. Wait, the answer is 4.", "4"),
        ("**Answer:** B", "B"),
        ("the answer is no solution.", "no solution"),
        ("work\n#### 72", "72"),
        ("the answer is .5.", ".5"),
        ("the answer is 2x + 3", "2x + 3"),
        ("the answer is 3 1/2.", "3 1/2"),
        ("the answer is 2 pi", "2 pi"),
        ("the answer is (1, 2)", "(1, 2)"),
        (r"Answer \[ 9 \]", "9"),
        (r"Answer \( (9+1) \)", "(9+1)"),
        ("Answer $$\n9\n$$", "9"),
        (r"We find $y=1$, that is $x \lt 3$.", r"x \lt 3"),
        ("The roots are $3$ or $4$.", "3, 4"),
        ("First 2.\n\nThe total is $1,234.50", "1,234.50"),
        ("the error increases by 100%.", "100%"),
        ("so y = 5.", "5"),
        ("<think>the answer is 1</think>The answer is 7", "7"),
        (r"The answer is 1, I mean \boxed{8}.", "8"),
        ("the answer is 5<|im_end|>the answer is 6", "5"),
        ("The roots are 1,5 and 2,75.", "1,5 and 2,75"),
        ("<think> 2+2=4 </think> <answer> 4 </answer>", "4"),
        ("<think> 2+2=4 </think>\n<answer>\n4\n</answer>", "4"),
        ("<think>a</think> <answer> The answer is 4 </answer>", "4"),
        ("<think>a</think> <answer> $4$ </answer>", "$4$"),
        ("<think>a</think> <answer> Evelyn </answer>", "Evelyn"),
        ("<think>a</think> <answer> So it has $4$ sides and \n\n is done: $x=5$. </answer>", "x=5"),
        (r"<think>a</think> \boxed{3} <answer> We get \boxed{4} here </answer>", "4"),
        (r"<think>a</think> I <think> again: \boxed{4}", "4"),
        ("<answer>4</answer> no, <answer>5</answer>", "5"),
        ("<think><answer>4</answer></think> The answer is 5", "5"),
        ("<think>a</think> <answer>4</answer> The answer is 5", "4"),
        ("<think>a</think> <answer> 4 ", "4"),
        ("<think>a</think><answer>4", "4"),
        ("<think>a</think> <answer> $4$ ", "$4$"),
        ("<think>a</think> <answer> Evelyn\n", "Evelyn"),
        (r"<think>a</think> \boxed{3} <answer> We get \boxed{4} here", "4"),
        ("<think>a</think> <answer>4</answer> no, <answer> 5", "5"),
        ("I put it in <answer> tags. The answer is 5.", "5"),
        ("I put it in <answer></answer> tags. The answer is 5.", "5"),
        ("<answer>4</answer> in <answer> </answer> tags", "4"),
        ("The answer is 5. <answer>", "5"),
        ("The total is 12,345/1,000 or 1,2 1/2", "12,345/1,000 or 1,2 1/2"),
    ],
)
def test_the_end_of_a_response_says_the_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no number here",
        "We get 5.\n\nThus it is so.",
        "so it is 5 sqrt(2)",
        "so x = 2 + 3",
        "so 3x = 5y",
        "we have 3, 4 and then 72 eggs",
        "<think>the answer is 5",
        "<think><answer>5</answer>",
        "<think><answer>5</answer></think> I do not know",
        "<think>a</think> <answer> </answer>",
        "<think>a</think> The number is 5 <answer>I do not know",
    ],
)
def test_a_part_of_an_expression_is_no_answer(text: str) -> None:
    assert final_answer(text) is None


def test_the_rule_scores_answers_with_and_without_a_box_and_says_which() -> None:
    rule = RULES["final_answer"]
    texts = (r"It is \boxed{\frac12}.", "The answer is 0.5.", "The answer is 0.6.", "I do not know.")
    scores = [rule(text, r"\frac{1}{2}", Finish.STOP) for text in texts]
    assert [score.value for score in scores] == [1.0, 1.0, 0.0, 0.0]
    assert [score.parts["boxed"] for score in scores] == [1.0, 0.0, 0.0, 0.0]


def test_a_long_list_that_ends_no_sentence_is_read_once() -> None:
    start = time.process_time()
    listed = ", ".join(map(str, range(100, 160)))
    assert final_answer(f"The multiples are {listed} (all of them)") is None
    final_answer(f"The answer is {listed} (and so on")
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("opening", "item", "joint", "ending"),
    [
        ("The solutions are ", "1,2", " and ", " x"),
        ("The solutions are ", "1,2", " or ", " approx"),
        ("The pairs are ", "1,2", ", ", " as claimed"),
        ("The answer is ", "1,234/5,678", ", ", " as claimed"),
    ],
)
def test_numbers_with_commas_are_read_one_way_where_no_sentence_ends(
    opening: str, item: str, joint: str, ending: str
) -> None:
    start = time.process_time()
    final_answer(opening + joint.join([item] * 100) + ending)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "piece", ["$", "\\(", "answer is ", "1", "1,", "\n", "{", "answer  ", "1 and ", "a. A", "<answer>"]
)
def test_a_million_characters_take_less_than_two_seconds(piece: str) -> None:
    start = time.process_time()
    final_answer(piece * (1_000_000 // len(piece)))
    assert time.process_time() - start < 2
