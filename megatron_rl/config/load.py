"""From TOML files and ``key.path=value`` overrides to a validated configuration. Only this file imports pydantic."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from megatron_rl.config.schema import RunConfig, SFTConfig

Config = TypeVar("Config", RunConfig, SFTConfig)


class ConfigError(ValueError):
    """The configuration is wrong; the message lists every problem by its dotted key."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(f"{len(problems)} problem(s) in the configuration:\n" + "\n".join(f"  {p}" for p in problems))


def load(root: type[Config], files: Sequence[Path], overrides: Sequence[str] = ()) -> Config:
    """Merge ``files`` left to right, apply ``overrides`` (``ppo.clip_high=0.28``), and validate the whole once.

    Raises:
        ConfigError: with all problems together: unknown keys (and the nearest known one), wrong types, files that are
            missing, sizes that do not divide.
    """
    config = parse(root, files, overrides)
    problems = list(config.problems())
    if problems:
        raise ConfigError(problems)
    return config


def parse(root: type[Config], files: Sequence[Path], overrides: Sequence[str] = ()) -> Config:
    """The same with the types checked alone: sections may contradict each other, and files that they name may be
    missing, as where a run is planned on another machine.

    Raises:
        ConfigError: unknown keys, wrong types, configuration files that are missing.
    """
    merged: dict[str, Any] = {}
    for file in files:
        try:
            _merge(merged, tomllib.loads(file.read_text()))
        except OSError as error:
            raise ConfigError([f"{file}: cannot be read: {error.strerror}"]) from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError([f"{file}: not valid TOML: {error}"]) from error
    for override in overrides:
        _merge(merged, _parse_override(override))
    try:
        config = TypeAdapter(root).validate_python(merged)
    except ValidationError as error:
        raise ConfigError(list(_described(error, root))) from None
    return config


def dump(config: RunConfig | SFTConfig) -> str:
    """The resolved configuration as JSON."""
    return json.dumps(TypeAdapter(type(config)).dump_python(config, mode="json"), indent=2) + "\n"


def dotted(config: RunConfig | SFTConfig) -> dict[str, Any]:
    """The resolved configuration as plain data, by dotted key."""
    return dict(_flat(TypeAdapter(type(config)).dump_python(config, mode="json")))


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError([f"{text}: an override has the form key.path=value"])
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string
    nested: dict[str, Any] = {}
    place = nested
    *sections, last = key.split(".")
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = parsed
    return nested


def _described(error: ValidationError, root: type[Any]) -> Iterator[str]:
    known = dict(_keys(root))
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "unexpected_keyword_argument":
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            yield f"{key}: unknown key" + (f"; did you mean {nearest[0]}?" if nearest else "")
        elif problem["type"] in {"missing", "missing_argument", "missing_keyword_only_argument"}:
            yield f"{key}: required, not set"
        else:
            got = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
            yield f"{key}: {problem['msg']}{got}"


def _keys(section: type[Any], prefix: str = "") -> Iterator[tuple[str, type[Any]]]:
    hints = get_type_hints(section)
    for item in dataclasses.fields(section):
        kind = hints[item.name]
        yield prefix + item.name, kind
        for option in (kind, *get_args(kind)):  # a section may be optional
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                yield from _keys(option, f"{prefix}{item.name}.")
