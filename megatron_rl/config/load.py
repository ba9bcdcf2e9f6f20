"""From TOML files and ``key.path=value`` overrides to a validated configuration. Only this file imports pydantic."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from megatron_rl.config.schema import RunConfig, SFTConfig

Config = TypeVar("Config", RunConfig, SFTConfig)
Root = type[RunConfig] | type[SFTConfig]
_COMMANDS: Mapping[Root, str] = {RunConfig: "a run (train)", SFTConfig: "a supervised stage (sft)"}
_UNSET = "none"
"""Given to a setting that may be unset, it unsets it."""


class ConfigError(ValueError):
    """The configuration is wrong; the message lists every problem by its dotted key."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{len(problems)} problem(s) in the configuration:\n" + "\n".join(f"  {p}" for p in problems))


def load(root: type[Config], files: Sequence[Path], overrides: Sequence[str] = ()) -> Config:
    """Merge ``files`` (TOML, or a run's ``config.json``) left to right, apply ``overrides`` (``ppo.clip_high=0.28``),
    and validate the whole once.

    Raises:
        ConfigError: with all problems together: unknown keys (and the nearest known one), wrong types, files that are
            missing, sizes that do not divide. What is missing or of a wrong type can be divided by nothing: files and
            sizes are looked at once there is none of it.
    """
    config, problems = _validated(root, files, overrides)
    if config is not None:
        problems += config.problems()
    if config is None or problems:
        raise ConfigError(problems)
    return config


def parse(root: type[Config], files: Sequence[Path], overrides: Sequence[str] = ()) -> Config:
    """The same with the types checked alone: sections may contradict each other, and files that they name may be
    missing, as where a run is planned on another machine.

    Raises:
        ConfigError: unknown keys, wrong types, configuration files that are missing.
    """
    config, problems = _validated(root, files, overrides)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def load_any(files: Sequence[Path], overrides: Sequence[str] = ()) -> RunConfig | SFTConfig:
    """:func:`load` of the kind of configuration that the settings are of."""
    root = _root_of(_merged(files, overrides), RunConfig)
    return load(RunConfig, files, overrides) if root is RunConfig else load(SFTConfig, files, overrides)


def parse_any(files: Sequence[Path], overrides: Sequence[str] = ()) -> RunConfig | SFTConfig:
    """:func:`parse` of the kind of configuration that the settings are of."""
    root = _root_of(_merged(files, overrides), RunConfig)
    return parse(RunConfig, files, overrides) if root is RunConfig else parse(SFTConfig, files, overrides)


def dump(config: RunConfig | SFTConfig) -> str:
    """The resolved configuration as JSON."""
    return json.dumps(TypeAdapter(type(config)).dump_python(config, mode="json"), indent=2) + "\n"


def dotted(config: RunConfig | SFTConfig) -> dict[str, Any]:
    """The resolved configuration as plain data, by dotted key."""
    return dict(_flat(TypeAdapter(type(config)).dump_python(config, mode="json")))


def defaults(config: RunConfig | SFTConfig) -> dict[str, Any]:
    """The defaults of the settings that a configuration has, whatever their values, by dotted key; those that must be
    given are left out.
    """
    return dict(_defaults(config))


def differences(config: RunConfig | SFTConfig, saved: str) -> list[str]:
    """Dotted keys of a configuration that was saved by :func:`dump`, an earlier one perhaps, that are others now."""
    now = dotted(config)
    return sorted(key for key, value in _flat(json.loads(saved)) if key not in now or now[key] != value)


def origins(files: Sequence[Path], overrides: Sequence[str] = ()) -> dict[str, str]:
    """Where each setting, and each empty table, that was given comes from, by dotted key: the last file that has it, or
    ``command line``. What is not there has its default.
    """
    return {key: origin for origin, table in _tables(files, overrides) for key, _ in _flat(table, empty=True)}


def annotated(config: RunConfig | SFTConfig, given: Mapping[str, str]) -> str:
    """The resolved configuration as TOML, a setting a line, each with where it comes from (of :func:`origins`)."""
    lines = {}
    for key, value in dotted(config).items():
        shown = key + " is not set" if value is None else f"{key} = {_toml(value)}"
        lines[shown if value is not None else "# " + shown] = given.get(key) or _default(key, given)
    width = min(60, max(map(len, lines)))
    return "".join(f"{line:<{width}}  # {origin}\n" for line, origin in lines.items())


def _default(key: str, given: Mapping[str, str]) -> str:
    """Of a section that is only there since somebody gave it, who did."""
    section = key.rpartition(".")[0]
    return f"default; [{section}] is of {given[section]}" if section in given else "default"


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _tables(files: Sequence[Path], overrides: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where settings come from, and the settings, from the weakest to the strongest."""
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            yield str(file), dict(json.loads(text)) if file.suffix == ".json" else tomllib.loads(text)
        except OSError as error:
            hint = "" if file.suffix else "; a setting has the form key.path=value"
            raise ConfigError([f"{file}: cannot be read: {error.strerror}{hint}"]) from error
        except (ValueError, TypeError) as error:  # of the parsers, text that is not UTF-8, JSON that is no object
            raise ConfigError([f"{file}: not valid {file.suffix[1:].upper() or 'TOML'}: {error}"]) from error
    for override in overrides:
        yield "command line", _parse_override(override)


def _root_of(merged: Mapping[str, Any], default: Root) -> Root:
    """Whose settings these are: of the kind that knows more of them."""

    def unknown(root: Root) -> int:
        return len(merged.keys() - {item.name for item in dataclasses.fields(root)})

    return min((default, *_COMMANDS), key=unknown)


def _validated(root: type[Config], files: Sequence[Path], overrides: Sequence[str]) -> tuple[Config | None, list[str]]:
    """The configuration without the keys that are unknown, if the rest is of the right types; and all of these
    problems.
    """
    merged = _merged(files, overrides)
    if (other := _root_of(merged, root)) is not root:
        raise ConfigError([f"these are the settings of {_COMMANDS[other]}: take that command, or another file"])
    _settle(merged, root)
    adapter = TypeAdapter(root)
    try:
        return adapter.validate_python(merged), []
    except ValidationError as error:
        problems = list(_described(error, root))
        for problem in error.errors(include_url=False):
            if problem["type"] == "unexpected_keyword_argument":
                *sections, name = problem["loc"]
                _section(merged, sections).pop(str(name), None)
    try:
        return adapter.validate_python(merged), problems
    except ValidationError:
        return None, problems


def _settle(merged: dict[str, Any], root: Root) -> None:
    """Take out what is unset, and make paths that begin with ``~`` whole."""
    for key, kind in _keys(root):
        *sections, name = key.split(".")
        section = _section(merged, sections)
        value = section.get(name)
        if value == _UNSET and _may_be_unset(kind):
            del section[name]
        elif kind is Path and isinstance(value, str):
            section[name] = os.path.expanduser(value)  # noqa: PTH111 - pathlib's raises where there is no such user


def _section(merged: dict[str, Any], sections: Sequence[Any]) -> dict[str, Any]:
    """A table of settings, empty where it is not there."""
    for section in sections:
        found = merged.get(section)
        merged = found if isinstance(found, dict) else {}
    return merged


def _may_be_unset(kind: type[Any]) -> bool:
    return type(None) in get_args(kind)


def _flat(section: Mapping[str, Any], prefix: str = "", *, empty: bool = False) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and (value or not empty):
            yield from _flat(value, f"{prefix}{key}.", empty=empty)
        else:
            yield prefix + key, value


def _defaults(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from _defaults(value, f"{prefix}{item.name}.")
        elif item.default is not dataclasses.MISSING:
            yield prefix + item.name, item.default


def _merged(files: Sequence[Path], overrides: Sequence[str]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for _, table in _tables(files, overrides):
        _merge(merged, table)
    return merged


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
        if "\\" in value:
            raise ConfigError(
                [f"{key}: a text with a backslash must be quoted, as '{key}=\"...\"', got {value}"]
            ) from None
    if key in _text_keys() and not isinstance(parsed, (str, list, dict)):
        parsed = value.strip()  # a name that TOML reads as a number or a date
    nested: dict[str, Any] = {}
    place = nested
    *sections, last = key.split(".")
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = parsed
    return nested


@cache
def _text_keys() -> frozenset[str]:
    """Settings of any command that are texts or paths."""
    return frozenset(key for root in _COMMANDS for key, kind in _keys(root) if kind in (Path, str, str | None))


def _described(error: ValidationError, root: type[Any]) -> Iterator[str]:
    known = dict(_keys(root))
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "unexpected_keyword_argument":
            yield f"{key}: unknown key{_known_instead(key, list(known))}"
        elif problem["type"] in {"missing", "missing_argument", "missing_keyword_only_argument"}:
            yield f"{key}: required, not set"
        else:
            must = problem["msg"]
            if problem["type"] == "dataclass_type":
                must = "must be a table of settings" + (f", or {_UNSET}" if _may_be_unset(known[key]) else "")
            elif problem["type"] == "path_type":
                must = "must be a path, in quotes"
            got = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
            yield f"{key}: {must}{got}"


def _known_instead(key: str, known: Sequence[str]) -> str:
    """What may have been meant: a near name in the section, that name in another one, a near key; else the section."""
    section, _, name = key.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    if nearest := difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        return f"; did you mean {section}{'.' if section else ''}{nearest[0]}?"
    if elsewhere := [other for other in known if other.rpartition(".")[2] == name]:
        return f"; did you mean {' or '.join(elsewhere)}?"
    if not section and (nearest := difflib.get_close_matches(key, known, n=1, cutoff=0.6)):
        return f"; did you mean {nearest[0]}?"
    return f"; {section} has {', '.join(siblings)}" if section else ""


def _keys(section: type[Any], prefix: str = "") -> Iterator[tuple[str, type[Any]]]:
    hints = get_type_hints(section)
    for item in dataclasses.fields(section):
        kind = hints[item.name]
        yield prefix + item.name, kind
        for option in (kind, *get_args(kind)):  # a section may be optional
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                yield from _keys(option, f"{prefix}{item.name}.")
