"""The Dockerfile is read as Docker reads it, as far as no Docker is needed for that."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker" / "Dockerfile"
KNOWN = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its text) of each; comments are left out, also between continued lines."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n", " ", kept)
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


FOUND = instructions(FILE.read_text())


def named(instruction: str) -> list[str]:
    return [rest for name, rest in FOUND if name == instruction]


def test_every_line_is_an_instruction_that_has_something_to_do() -> None:
    assert [name for name, rest in FOUND if name not in KNOWN or not rest] == []
    assert FOUND[0][0] == "FROM"


def test_the_reader_would_notice_a_broken_continuation() -> None:
    assert {name for name, _ in instructions("RUN a \\\n && b\n && c")} == {"RUN", ""}


def test_the_image_it_starts_from_is_pinned() -> None:
    (image,) = named("FROM")
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", image)


@pytest.mark.parametrize("script", named("RUN"))
def test_commands_are_shell(script: str) -> None:
    done = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_copied_exists_and_is_in_the_context() -> None:
    sources = [source for rest in named("COPY") for source in rest.split()[:-1]]
    assert [source for source in sources if not (ROOT / source).exists()] == []
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {Path(source).parts[0] for source in sources} == let_in


def test_what_starts_is_an_exec_form() -> None:
    assert json.loads(named("ENTRYPOINT")[0]) == ["megatron-rl"]
    assert json.loads(named("CMD")[0]) == ["--help"]


def test_every_argument_is_used() -> None:
    scripts = " ".join(named("RUN"))
    for argument in named("ARG"):
        assert f'"${argument.partition("=")[0]}"' in scripts


def test_transformer_engine_is_that_of_the_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"'{extras['te'][0]}'" in " ".join(named("RUN"))
