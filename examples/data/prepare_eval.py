"""Put evaluation sets where ``eval/run.py --data`` finds them, checked row by row.

    python examples/data/prepare_eval.py --output data/eval --from math500=MATH-500.jsonl aime24=hub

``NAME=PLACE`` takes a set from a file (.jsonl, .json, .parquet) whose fields are those of the file in simpleRL-reason
(``eval/data/NAME/test.jsonl``); ``NAME=hub`` from the set's usual place on the hub, where one has these fields. Rows
are written as they are, to ``OUTPUT/NAME/test.jsonl``; ``OUTPUT/SOURCES.json`` says where each came from and under
which licence, as far as its publisher says.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a program: Python then looks beside this file, not in the checkout that it belongs to
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from eval.tasks import TASKS, problem_of
from examples.data.sources import Row, SourceError, read
from megatron_rl.durable import replace_text


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a set comes from.

    Attributes:
        publication: who made it.
        licence: what its publisher says.
        hub: its place on the hub, None where no copy there has the fields of the seed's file.
    """

    publication: str
    licence: str
    hub: str | None = None


_COMPETITION = "problems (c) Mathematical Association of America; no licence is stated with the set"
ORIGINS: dict[str, Origin] = {
    "aime24": Origin(publication="AIME 2024", licence=_COMPETITION, hub="hub:HuggingFaceH4/aime_2024@train"),
    "amc23": Origin(publication="AMC 12, 2023", licence=_COMPETITION, hub="hub:math-ai/amc23@test"),
    "math500": Origin(
        publication="MATH (Hendrycks et al., 2021), subset of Lightman et al. (2023)",
        licence="MIT",
        hub="hub:HuggingFaceH4/MATH-500@test",
    ),
    "minerva_math": Origin(
        publication="Lewkowycz et al. (2022), from MIT OpenCourseWare", licence="MIT OpenCourseWare (CC BY-NC-SA 4.0)"
    ),
    "olympiadbench": Origin(
        publication="He et al. (2024), open-ended English mathematics without images",
        licence="see the publisher's page; not restated in the seed's copy",
        hub="hub:Hothan/OlympiadBench#OE_TO_maths_en_COMP@train",
    ),
    "gsm8k": Origin(publication="Cobbe et al. (2021)", licence="MIT", hub="hub:openai/gsm8k#main@test"),
    "gaokao2023en": Origin(publication="Liao et al., MARIO (2024)", licence="not restated in the seed's copy"),
    "college_math": Origin(publication="Tang et al., MathScale (2024)", licence="field 'license' of each row, if any"),
}


def checked(name: str, rows: Sequence[Row]) -> list[Row]:
    """The rows, once each has a question and a reference answer.

    Raises:
        SourceError: one has not; names its place.
    """
    for index, row in enumerate(rows):
        try:
            problem_of(row.fields, TASKS[name].gold, str(index))
        except ValueError as error:
            raise SourceError(f"{row.place}: {error}") from error
    if not rows:
        raise SourceError(f"{name}: the source has no rows")
    return list(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the sets; the exit status is 0, or 2 where a source is unusable (nothing is written then)."""
    parser = argparse.ArgumentParser(
        prog="prepare_eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for eval/run.py --data")
    parser.add_argument("--from", dest="sources", nargs="+", required=True, metavar="NAME=PLACE", help="or NAME=hub")
    asked = parser.parse_args(arguments)
    try:
        chosen = dict(map(_parse, asked.sources))
        found = {name: checked(name, read(place)) for name, place in chosen.items()}
    except SourceError as error:
        sys.stderr.write(f"prepare_eval: {error}\n")
        return 2
    listed = asked.output / "SOURCES.json"
    about: dict[str, Any] = json.loads(listed.read_text()) if listed.is_file() else {}
    for name, rows in found.items():
        text = "".join(json.dumps(row.fields, ensure_ascii=False, default=str) + "\n" for row in rows)
        file = asked.output / name / "test.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, text)
        about[name] = {
            **asdict(ORIGINS[name]),
            "source": chosen[name],
            "rows": len(rows),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        expected = TASKS[name].rows
        count = f"{len(rows)} rows" if len(rows) == expected else f"{len(rows)} rows, the seed's file has {expected}"
        sys.stdout.write(f"{file}: {count}; {ORIGINS[name].publication}; {ORIGINS[name].licence}\n")
    replace_text(listed, json.dumps(about, indent=2) + "\n")
    return 0


def _parse(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not equals or not place:
        raise SourceError(f"{text}: a source has the form NAME=PLACE")
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1)
        raise SourceError(
            f"unknown set {name!r}" + (f"; did you mean {nearest[0]}?" if nearest else f": {list(TASKS)}")
        )
    if place != "hub":
        return name, place
    hub = ORIGINS[name].hub
    if hub is None:
        raise SourceError(f"{name}: no copy on the hub has the fields of the seed's file; give a file, as {name}=FILE")
    return name, hub


if __name__ == "__main__":
    sys.exit(main())
