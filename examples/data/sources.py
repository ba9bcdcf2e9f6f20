"""Rows of problem files, each with the place it stands in: JSON lines, JSON, folders of JSON, parquet, the hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HUB = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(?:#(?P<config>[\w.-]+))?@(?P<split>\w+)")


class SourceError(ValueError):
    """A source is unusable; the message names the place and what must hold there."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One object and where it stands (``FILE:LINE`` of its beginning, or ``FILE row N``)."""

    place: str
    fields: dict[str, Any]


def read(spec: str) -> list[Row]:
    """The rows of a source.

    Args:
        spec: a file (.jsonl, .json with one object or a list of them, .parquet), a folder (every .json below it, as the
            MATH archive has them), or ``hub:OWNER/NAME[#CONFIG]@SPLIT``, which needs the package ``datasets``.

    Raises:
        SourceError: it cannot be read, or a row is not an object.
    """
    if spec.startswith("hub:"):
        return _hub(spec)
    path = Path(spec)
    if path.is_dir():
        files = sorted(path.rglob("*.json"))
        if not files:
            raise SourceError(f"{path}: there is no .json file in this folder")
        return [row for file in files for row in _json(file)]
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    if path.suffix not in readers:
        raise SourceError(f"{path}: must end in one of {', '.join(readers)}")
    try:
        return readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: must be UTF-8 text: {error}") from error


def digest(spec: str) -> str | None:
    """sha256 of a source that is one file, None for others."""
    path = Path(spec)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _row(value: object, place: str) -> Row:
    if not isinstance(value, dict):
        raise SourceError(f"{place}: a row must be a JSON object, got {type(value).__name__}")
    return Row(place=place, fields=value)


def _jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text().split("\n"), start=1):  # JSON strings may hold U+2028
        if line.strip():
            try:
                rows.append(_row(json.loads(line), f"{path}:{number}"))
            except json.JSONDecodeError as error:
                raise SourceError(f"{path}:{number}: every line must be a JSON object: {error}") from error
    return rows


def _json(path: Path) -> list[Row]:
    text = path.read_text()
    try:
        return [_row(value, f"{path}:{line}") for value, line in _items(text)]
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from error


def _items(text: str) -> Iterator[tuple[object, int]]:
    """The items of a JSON list with the lines they begin in; a document that is no list is one item."""
    space, decoder = re.compile(r"\s*"), json.JSONDecoder()

    def skip(at: int) -> int:
        found = space.match(text, at)
        return at if found is None else found.end()

    at = skip(0)
    if text[at : at + 1] != "[":
        yield json.loads(text), text.count("\n", 0, at) + 1
        return
    line, counted, at = 1, 0, skip(at + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        value, at = decoder.raw_decode(text, at)
        yield value, line
        at = skip(at)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("expected ',' or ']' after a row", text, at)
    if skip(at + 1) != len(text):
        raise json.JSONDecodeError("the list has ended, but there is more", text, skip(at + 1))


def _parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise SourceError(f"{path}: parquet files need the package pyarrow: install it, or give JSON lines") from error
    table = parquet.read_table(path)
    return [_row(value, f"{path} row {number}") for number, value in enumerate(table.to_pylist(), start=1)]


def _hub(spec: str) -> list[Row]:
    asked = _HUB.fullmatch(spec)
    if asked is None:
        raise SourceError(f"{spec}: a source on the hub is written hub:OWNER/NAME@SPLIT or hub:OWNER/NAME#CONFIG@SPLIT")
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise SourceError(f"{spec}: the hub needs the package datasets: install it, or give local files") from error
    loaded = load_dataset(asked["name"], asked["config"], split=asked["split"])
    return [_row(dict(value), f"{spec} row {number}") for number, value in enumerate(loaded, start=1)]
