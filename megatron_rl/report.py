"""What a run's ``metrics.jsonl`` says once it is over: numbers, a table, a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

_BLUE, _ORANGE, _GREEN = "#1f77b4", "#d9730d", "#2e8b57"


def read_records(metrics_jsonl: Path) -> list[dict[str, Any]]:
    """The complete records of a run in the order of their steps; of a step that was run again, the last one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not JSON, or no record is complete.
    """
    kept: dict[tuple[int, str], dict[str, Any]] = {}
    for number, line in enumerate(metrics_jsonl.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{metrics_jsonl}:{number}: every line must be a JSON object: {error}") from error
        if not record.get("aborted"):
            kept[record["step"], record["kind"]] = record
    if not kept:
        raise ValueError(f"{metrics_jsonl}: a report needs at least one complete record, found none")
    return [kept[key] for key in sorted(kept)]  # "evaluation" before "step" of the same number


def summarise(metrics_jsonl: Path) -> dict[str, Any]:
    """The few numbers that say how a run went; what was never measured is left out.

    Returns:
        ``steps``; held-out score, accuracy, format rate and length (tokens) ``before`` the first step,
        where that was asked for, and ``after``; the same
        of the first and last rollout under ``rollout_``; ``kl_last`` (nats per token); ``explained_variance_last`` and,
        of the first rollout that the policy learns from, ``explained_variance_first_update``;
        ``engine_gap_mean_worst`` (nats); ``seconds_per_step_median``; how many ``timeouts``, ``errors`` and
        ``nonfinite`` there were; ``peak_rss_gib`` by role.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_records`.
    """
    records = read_records(metrics_jsonl)
    steps = [record for record in records if record["kind"] == "step"]
    summary: dict[str, Any] = {"steps": len(steps)}
    before = [record for record in records if record["kind"] == "evaluation" and record["step"] == 0]
    at_start = any(name.startswith("heldout/") for record in before for name in record)
    for prefix, label, first, last in (("heldout", "", "before", "after"), ("rollout", "rollout_", "first", "last")):
        named = (
            ("score", "score"),
            ("accuracy", "accuracy"),
            ("format_rate", "format_rate"),
            ("length", "length_mean"),
        )
        for name, metric in named:
            if not (found := _values(records, f"{prefix}/{metric}")):
                continue
            if prefix == "rollout" or at_start:
                summary[f"{label}{name}_{first}"] = found[0]
            summary[f"{label}{name}_{last}"] = found[-1]
    for name in ("kl", "explained_variance"):
        if found := _values(steps, f"experience/{name}"):
            summary[f"{name}_last"] = found[-1]
    learning = [step for step in steps if "policy/grad_norm" in step]
    if found := _values(learning, "experience/explained_variance"):
        summary["explained_variance_first_update"] = found[0]
    if found := _values(steps, "model/loss"):
        summary["loss_first"], summary["loss_last"] = found[0], found[-1]
    if found := _values(steps, "experience/engine_gap_mean"):
        summary["engine_gap_mean_worst"] = max(found)
    if found := _values(steps, "seconds/step"):
        summary["seconds_per_step_median"] = median(found)
    for name in ("timeouts", "errors"):  # of all that was drawn, where dynamic sampling dropped some of it
        drawn = [record.get(f"sampling/{name}", record.get(f"rollout/{name}")) for record in records]
        if found := [value for value in drawn if value is not None] + _values(records, f"heldout/{name}"):
            summary[name] = int(sum(found))
    summary["nonfinite"] = int(sum(_values(records, "nonfinite")))
    prefix = "peak_rss_gib/"
    roles = sorted({key.removeprefix(prefix) for record in records for key in record if key.startswith(prefix)})
    if roles:
        summary["peak_rss_gib"] = {role: max(_values(records, prefix + role)) for role in roles}
    return summary


def summary_table(summary: Mapping[str, Any]) -> str:
    """One line per number of ``summary``, nested mappings flattened with ``/``, values in one column."""
    lines = dict(_flat(summary))
    width = max(map(len, lines), default=0)
    return "".join(f"{name:<{width}}  {_shown(value)}\n" for name, value in lines.items())


def plot_curve(metrics_jsonl: Path, png: Path) -> None:
    """Draw a run over its steps: accuracy, response length, and KL with the critic's explained variance.

    matplotlib keeps its list of fonts in the folder ``scratch`` beside ``metrics_jsonl``, unless MPLCONFIGDIR names
    another.

    A rollout of step s is drawn by weights that have seen s steps, so it stands at s; an evaluation after that step
    stands at s + 1.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_records`.
    """
    os.environ.setdefault("MPLCONFIGDIR", str(metrics_jsonl.parent.resolve() / "scratch"))
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state, and slow to load
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = read_records(metrics_jsonl)
    figure = Figure(figsize=(8, 9), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, length, health = figure.subplots(3, 1, sharex=True)

    for axes, metric in ((accuracy, "accuracy"), (length, "length_mean")):
        axes.plot(*_series(records, f"rollout/{metric}"), color=_BLUE, label="rollouts (sampled)")
        axes.plot(*_series(records, f"heldout/{metric}"), "o--", color=_ORANGE, label="held-out")
        axes.legend(loc="best", frameon=False)
    accuracy.set(title="Accuracy", ylabel="share of responses that are right", ylim=(-0.02, 1.02))
    length.set(title="Mean response length", ylabel="tokens")
    length.set_ylim(bottom=0)

    health.plot(*_series(records, "experience/kl"), color=_BLUE)
    health.set_ylabel("KL to the reference (nats per token)", color=_BLUE)
    critic = health.twinx()
    critic.plot(*_series(records, "experience/explained_variance"), color=_GREEN)
    critic.set_ylabel("explained variance", color=_GREEN)
    critic.set_ylim(top=1.02)
    health.set(title="Distance from the reference, and how much of the returns the critic explains")
    health.set_xlabel("steps done by the weights")
    health.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (accuracy, length, health):
        axes.grid(alpha=0.3)
        axes.spines["top"].set_visible(False)
    figure.savefig(png, dpi=120)


def _values(records: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [record[key] for record in records if key in record]


def _series(records: Iterable[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps done and values; an evaluation at the end of a step speaks of the weights after it."""
    points = []
    for record in records:
        if key in record:
            after = record["kind"] == "step" and key.startswith("heldout/")
            points.append((record["step"] + after, record[key]))
    return [x for x, _ in points], [y for _, y in points]


def _flat(summary: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in summary.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _shown(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if math.isfinite(value) else str(value)
