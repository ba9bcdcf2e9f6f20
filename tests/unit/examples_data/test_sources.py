from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from examples.data.sources import SourceError, read


def places(spec):
    return [(row.place.rpartition("/")[2], row.fields) for row in read(str(spec))]


def test_lines_lists_objects_and_folders_know_where_their_rows_stand(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"q": "x\u2028y"}\n\n{"q": 2}\n')
    assert places(lines) == [("a.jsonl:1", {"q": "x\u2028y"}), ("a.jsonl:3", {"q": 2})]
    listed = tmp_path / "b.json"
    listed.write_text(json.dumps([{"q": 1, "r": "[,]"}, {"q": 2}], indent=2))
    assert places(listed) == [("b.json:2", {"q": 1, "r": "[,]"}), ("b.json:6", {"q": 2})]
    folder = tmp_path / "MATH" / "algebra"
    folder.mkdir(parents=True)
    for number in (2, 1):
        (folder / f"{number}.json").write_text(f'\n{{"q": {number}}}')
    assert places(tmp_path / "MATH") == [("1.json:2", {"q": 1}), ("2.json:2", {"q": 2})]
    (tmp_path / "empty.json").write_text(" [ ]\n")
    assert places(tmp_path / "empty.json") == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"q": 1}\n{"q": \n', r"a\.jsonl:2: every line must be a JSON object"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: a row must be a JSON object, got list"),
        ("a.json", '[\n{"q": 1},\n3]', r"a\.json:3: a row must be a JSON object, got int"),
        ("a.json", '[\n{"q": 1}\n{"q": 2}]', r"a\.json:3: not valid JSON: expected ',' or '\]'"),
        ("a.json", '[\n{"q": 1},\n{"q" 2}]', r"a\.json:3: not valid JSON"),
        ("a.json", '[\n{"q": 1}', r"a\.json:2: not valid JSON"),
        ("a.json", '[{"q": 1}]\n x', r"a\.json:2: not valid JSON: the list has ended"),
        ("a.csv", "q\n1\n", r"a\.csv: must end in one of \.jsonl, \.json, \.parquet"),
    ],
)
def test_a_bad_row_is_named_by_its_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(SourceError, match=message):
        read(str(tmp_path / name))


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="no such file"):
        read(str(tmp_path / "none.jsonl"))
    with pytest.raises(SourceError, match=r"there is no \.json file"):
        read(str(tmp_path))
    with pytest.raises(SourceError, match="is written hub:OWNER/NAME@SPLIT"):
        read("hub:MATH-500")
    for package in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SourceError, match="needs the package datasets"):
        read("hub:HuggingFaceH4/MATH-500@test")
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(SourceError, match="need the package pyarrow"):
        read(str(tmp_path / "a.parquet"))


def test_the_hub_and_parquet_give_rows_with_numbers(tmp_path, monkeypatch):
    """With stand-ins for the two packages, which are no dependencies."""
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"q": 1}, {"q": 2}]

    table = SimpleNamespace(to_pylist=lambda: [{"q": 3}])
    parquet = SimpleNamespace(read_table=lambda path: table)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    assert places("hub:a/b#c@test") == [("b#c@test row 1", {"q": 1}), ("b#c@test row 2", {"q": 2})]
    assert asked == [("a/b", "c", "test")]
    (tmp_path / "a.parquet").write_bytes(b"")
    assert places(tmp_path / "a.parquet") == [("a.parquet row 1", {"q": 3})]
