"""Questions become prompts in an order that a resumed run continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from megatron_rl.config.schema import DataConfig
from megatron_rl.dataflow import Prompt
from megatron_rl.experience.collect import sample_seed
from megatron_rl.experience.prompts import PromptSet, PromptStream, load_prompts, load_tokenizer, unwritten_start


@pytest.fixture
def tokenizer() -> Tokenizer:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "Q": 1, "one": 2, "two": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return words


def write(file: Path, *rows: object) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def config(file: Path, **changes: object) -> DataConfig:
    return DataConfig(**{"train": file, "heldout": file, "template": "Q {question}", "max_prompt_tokens": 2, **changes})


@pytest.mark.parametrize(("pattern", "missing"), [("<s> $A", "<s>"), ("$A <s>", None), (None, None)])
def test_a_special_token_that_the_tokenizer_would_put_before_a_prompt_is_named_where_none_is_written(
    pattern: str | None, missing: str | None, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokenizer.add_special_tokens(["<s>"])
    file = write(tmp_path / "data.jsonl", {"question": "one", "answer": "1"})
    if pattern is not None:
        tokens = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=tokens)
    bare, written = (
        load_prompts(file, tokenizer, config(file, template=template, max_prompt_tokens=3)).prompts[0].token_ids
        for template in ("Q {question}", "<s>Q {question}")
    )
    assert (bare, written) == ((1, 2), (tokenizer.token_to_id("<s>"), 1, 2))
    assert unwritten_start(tokenizer, bare) == missing
    assert unwritten_start(tokenizer, written) is None


def test_what_a_tokenizers_file_says_of_cutting_and_filling_up_is_left_aside(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(pad_id=0)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path).encode_batch(["Q", "Q one two"], add_special_tokens=False)
    assert [each.ids for each in found] == [[1], [1, 2, 3]]


def test_questions_are_templated_and_long_ones_dropped_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write(
        tmp_path / "q.jsonl", {"question": "one", "answer": 1}, {"question": "one two", "answer": "2", "id": "x"}
    )
    loaded = load_prompts(file, tokenizer, config(file))
    assert loaded.prompts == (Prompt(id="0", token_ids=(1, 2), answer="1", source="q", text="Q one"),)
    assert loaded.dropped == 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{broken", r"q.jsonl:1: .*JSON"),
        ({"question": "one"}, r"q.jsonl:1: .*lacks \['answer'\]"),
        ({"question": "one", "answer": None}, r"q.jsonl:1: .*lacks \['answer'\]"),
        ({"question": [{"role": "user"}], "answer": "1"}, r"q.jsonl:1: every question must be text, got \[\{'role'"),
        (
            {"question": "one", "answer": " \n"},
            r"q.jsonl:1: an answer must not be empty, got ' \\n': write what a right",
        ),
        ("", r"q.jsonl: needs at least one line with the keys \['question', 'answer'\], has none"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Tokenizer, row: object, says: str) -> None:
    file = write(tmp_path / "q.jsonl", row)
    with pytest.raises(ValueError, match=says):
        load_prompts(file, tokenizer, config(file))


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "q.jsonl"
    file.write_bytes(b'\n{"question": "\xe9", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"q.jsonl:2: must be UTF-8: "):
        load_prompts(file, tokenizer, config(file))


def test_separators_within_text_and_a_byte_order_mark_break_no_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "q.jsonl"
    rows = [{"question": "one", "answer": text} for text in ("a\u2028b", "c\x85d")]
    text = "\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_bytes(text.encode("utf-8-sig"))
    assert [prompt.answer for prompt in load_prompts(file, tokenizer, config(file)).prompts] == ["a\u2028b", "c\x85d"]


def test_an_answer_that_is_not_text_reaches_the_rule_as_json(tmp_path: Path, tokenizer: Tokenizer) -> None:
    answers = [["a", 1], {"tests": ["é"]}, 5, 0.5, True]
    file = write(tmp_path / "q.jsonl", *({"question": "one", "answer": answer} for answer in answers))
    found = [prompt.answer for prompt in load_prompts(file, tokenizer, config(file)).prompts]
    assert found == ['["a", 1]', '{"tests": ["é"]}', "5", "0.5", "true"]


def test_an_id_that_occurs_twice_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write(tmp_path / "q.jsonl", *({"question": "one", "answer": "1", "id": name} for name in ("a", "b", "a")))
    with pytest.raises(ValueError, match=r"every id must be unlike the others.*got 'a' 2 times \(1 such ids\)"):
        load_prompts(file, tokenizer, config(file))


def test_rows_without_an_id_are_numbered(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"question": "one", "answer": "1"}
    file = write(tmp_path / "q.jsonl", row, {**row, "id": None}, {**row, "id": "x"})
    assert [prompt.id for prompt in load_prompts(file, tokenizer, config(file)).prompts] == ["0", "1", "x"]


def test_a_file_without_a_prompt_that_fits_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write(tmp_path / "q.jsonl", {"question": "one two", "answer": "3"})
    with pytest.raises(ValueError, match=r"no prompt has between 1 and data.max_prompt_tokens=2"):
        load_prompts(file, tokenizer, config(file))


@pytest.mark.parametrize("content", ["", "{}", "[1]"])
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("Q one").ids == [1, 2]
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json must be a tokenizer as Hugging Face's library saves it: "):
        load_tokenizer(tmp_path)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=str(i), token_ids=(1,), answer="", source="") for i in range(count)]


def test_every_epoch_visits_every_prompt_once_in_another_order() -> None:
    stream = PromptStream(prompts(10), seed=3)
    first, second = ([p.id for p in stream.take(10)] for _ in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_restored_stream_goes_on_where_the_other_stood() -> None:
    stream = PromptStream(prompts(7), seed=3)
    stream.take(5)
    other = PromptStream(prompts(7), seed=3)
    other.restore(stream.state())
    assert [p.id for p in other.take(9)] == [p.id for p in stream.take(9)]


def test_the_digest_follows_the_prompts_and_their_order() -> None:
    def digest(*found: Prompt) -> str:
        return PromptSet(prompts=found, dropped=0).digest()

    first, second = prompts(2)
    other = Prompt(id="0", token_ids=(1,), answer="5", source="")
    assert digest(first, second) == digest(*prompts(2))
    assert len({digest(first, second), digest(second, first), digest(first), digest(other, second)}) == 4


def test_sample_seeds_depend_on_each_part_and_fit_a_signed_integer() -> None:
    seeds = {sample_seed(0, 0, "a", 0), sample_seed(1, 0, "a", 0), sample_seed(0, 1, "a", 0), sample_seed(0, 0, "b", 0)}
    assert len(seeds | {sample_seed(0, 0, "a", 1)}) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, 0, "a", 0) == sample_seed(0, 0, "a", 0)
