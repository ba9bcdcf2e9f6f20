"""Pairs become rows, in an order that a resumed stage continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from megatron_rl.experience.supervised import SupervisedRows, load_pairs

EOS = 9


def test_rows_are_prompt_and_response_of_which_the_response_is_learnt() -> None:
    rows = SupervisedRows([([1, 2], [3]), ([4], [5, 6, 7])]).take(2)
    assert rows.tokens.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert rows.lengths.tolist() == [3, 4]
    assert rows.response_mask.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]


def test_a_restored_position_goes_on_and_the_file_begins_again_at_its_end() -> None:
    pairs = [([number], [10 + number]) for number in range(3)]
    first, second = SupervisedRows(pairs), SupervisedRows(pairs)
    assert first.take(2).tokens[:, 0].tolist() == [0, 1]
    second.restore(json.loads(json.dumps(first.state())))
    assert first.take(2).tokens[:, 0].tolist() == second.take(2).tokens[:, 0].tolist() == [2, 0]
    assert second.take(4).tokens[:, 0].tolist() == [1, 2, 0, 1]


def test_the_digest_is_that_of_the_tokens_in_their_order() -> None:
    pairs = [([1], [2]), ([3], [4])]
    digest = SupervisedRows(pairs).digest()
    assert SupervisedRows([((1,), (2,)), ((3,), (4,))]).digest() == digest
    for other in (pairs[::-1], pairs[:1], [([1, 2], [2]), ([3], [4])]):
        assert SupervisedRows(other).digest() != digest


@pytest.fixture
def tokenizer() -> Tokenizer:
    words = Tokenizer(WordLevel({"a": 1, "b": 2, "?": 0}, unk_token="?"))
    words.pre_tokenizer = WhitespaceSplit()
    return words


def test_a_file_is_read_with_the_end_of_sequence_behind_each_response(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a a", "response": "b"}\n{"prompt": "b", "response": "a"}\n')
    assert load_pairs(file, tokenizer, EOS, 4).take(2).tokens.tolist() == [[1, 1, 2, EOS], [2, 1, EOS, 0]]


@pytest.mark.parametrize(
    ("third", "says"),
    [
        ({"prompt": "", "response": "a b b"}, r"pairs.jsonl:3: every prompt needs at least one token, got '' \(1 such"),
        (
            {"prompt": "a a", "response": "b a"},
            r"pairs.jsonl:3: prompt, response and .* must fit the model's 4 positions, got 5 tokens \(2 such rows\)",
        ),
        ({"prompt": "a", "response": ["b"]}, r"pairs.jsonl:3: every response must be text, got \['b'\]"),
    ],
)
def test_a_row_that_cannot_be_learnt_is_named_by_its_line(
    tmp_path: Path, tokenizer: Tokenizer, third: dict[str, object], says: str
) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "a", "response": "b"}, third, {"prompt": "a a a a", "response": "b"}]
    file.write_text("\n\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=says):
        load_pairs(file, tokenizer, EOS, 4)
