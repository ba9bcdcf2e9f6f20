"""How the linears of a model multiply, said alike for trainer and engine, so that the two can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class LinearFormat:
    """One linear: the name of its weight, and what its multiplication reads.

    ``weight`` is the Hugging Face name. ``dtype`` is torch's name of the number format (``bfloat16``,
    ``float8_e4m3fn``). ``block`` is how many output rows x input columns of the weight share one scale (a size of 0
    stands for all of them), ``scale`` the dtype of these scales; both are ``None`` where there is no scale.
    """

    weight: str
    dtype: str
    block: tuple[int, int] | None = None
    scale: str | None = None


def first_difference(expected: Iterable[LinearFormat], found: Iterable[LinearFormat]) -> str | None:
    """The first linear, in the order of ``expected``, that is not as it must be: a sentence; None: all are.

    Args:
        expected: what the configuration asks for.
        found: what a live model multiplies with, in any order.
    """
    wanted, there = ({linear.weight: linear for linear in formats} for formats in (expected, found))
    for name in [*wanted, *(name for name in there if name not in wanted)]:
        if wanted.get(name) != there.get(name):
            return f"{name} must be {_told(wanted.get(name))}, found {_told(there.get(name))}"
    return None


def summary(formats: Iterable[LinearFormat]) -> str:
    """How many linears have which format, in a line."""
    counts = Counter(_told(linear) for linear in formats)
    return ", ".join(f"{count} linears in {told}" for told, count in counts.items())


def write_table(path: Path, by_role: Mapping[str, Iterable[LinearFormat]]) -> None:
    """A line per linear, with tabs: the name of its weight, and its format in each role; the first line names these."""
    columns = [{linear.weight: linear for linear in formats} for formats in by_role.values()]
    weights = dict.fromkeys(weight for column in columns for weight in column)
    rows = [("weight", *by_role), *((weight, *(_told(column.get(weight)) for column in columns)) for weight in weights)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows))


def _told(linear: LinearFormat | None) -> str:
    if linear is None:
        return "no linear"
    if linear.block is None:
        return linear.dtype
    rows, columns = (size or "all" for size in linear.block)
    return f"{linear.dtype} with a {linear.scale} scale per {rows} x {columns}"
