"""Results as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.gpu_checks.plan import CHECKS, Result, Row

HEAD = """# What was measured on GPUs

Written by `benchmarks/gpu.py`; [gpu.md](gpu.md) says how to run it.
"""


def document(results: Sequence[Result], *, date: str, device: str, versions: Mapping[str, str], command: str) -> str:
    """The whole page.

    Args:
        results: in the order they were run.
        date: of the run, ISO 8601.
        device: its name.
        versions: release by package.
        command: that was run.
    """
    named = ", ".join(f"{name} {release}" for name, release in versions.items())
    lines = [HEAD, f"{date}, {device}; {named}.", "", "```sh", command, "```", "", *_overview(results)]
    for result in results:
        if result.rows:
            lines += ["", f"## {result.check}", "", "| what | value | goal | met |", "| --- | --- | --- | --- |"]
            lines += [_line(row) for row in result.rows]
    return "\n".join(lines) + "\n"


def _overview(results: Sequence[Result]) -> list[str]:
    about = {check.name: check.about for check in CHECKS}
    lines = ["| check | of | result | s |", "| --- | --- | --- | --- |"]
    for result in results:
        verdict = result.status if not result.reason else f"{result.status}: {_cell(result.reason)}"
        lines.append(f"| {result.check} | {about[result.check]} | {verdict} | {result.seconds:.0f} |")
    return lines


def _line(row: Row) -> str:
    met = {None: "", True: "yes", False: "**no**"}[row.met]
    return f"| {_cell(row.what)} | {row.value:.4g} {row.unit} | {_cell(row.goal)} | {met} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
