"""Numbers of graded samples: per task, over tasks, as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from eval.grading import Same
from eval.metrics import Estimate, estimate, pass_at_k, powers_of_two, vote
from eval.samples import GradedSample
from eval.tasks import TASKS
from megatron_rl.dataflow import Finish, Outcome

SEED_TABLE = ("aime24", "math500", "amc23", "minerva_math", "olympiadbench")
"""The columns of the seed's table; its average is over these five."""

Results = dict[str, Any]
"""Metrics of one task under the names of lm-evaluation-harness: ``METRIC,none`` and ``METRIC_stderr,none``."""


def by_problem(samples: Iterable[GradedSample]) -> list[list[GradedSample]]:
    """Samples of the same problem together, in the order of their numbers."""
    found: dict[str, list[GradedSample]] = {}
    for sample in samples:
        found.setdefault(sample.id, []).append(sample)
    return [sorted(group, key=lambda sample: sample.sample) for group in found.values()]


def task_results(samples: Sequence[GradedSample], same: Same, *, seed: int) -> Results:
    """All metrics of one task.

    ``pass@1`` and ``avg@K`` are the same number: the mean over problems of the share of right samples. ``pass@k`` is
    the unbiased estimate for k = 1, 2, 4, ... K; ``maj@K`` is 1 for a problem whose elected sample is right (without
    any answer it is wrong). Each has ``_stderr`` (clustered by problem) and ``_ci95`` (bootstrap over problems). The
    rest are means over samples: ``boxed``, ``truncated`` and ``stopped`` shares, ``score``, ``length`` in tokens.

    Args:
        samples: of one task, equally many for each problem.
        same: equality of two answers to a problem.
        seed: of the bootstrap.

    Raises:
        ValueError: problems have different numbers of samples.
    """
    problems = by_problem(samples)
    counts = {len(group) for group in problems}
    if len(counts) != 1:
        raise ValueError(f"every problem needs as many samples as the others, got {sorted(counts)}")
    (count,) = counts
    right = [sum(sample.correct for sample in group) for group in problems]
    elected = [(group, vote([sample.extracted for sample in group], same)) for group in problems]
    values = {f"pass@{k}": [pass_at_k(count, c, k) for c in right] for k in powers_of_two(count)}
    values[f"avg@{count}"] = [c / count for c in right]
    values[f"maj@{count}"] = [float(winner is not None and group[winner].correct) for group, winner in elected]
    results: Results = {}
    for name, of_problems in values.items():
        results |= _entries(name, estimate(of_problems, seed=seed))
    tokens: list[float] = [sample.tokens for sample in samples]
    shares: dict[str, list[float]] = {
        "boxed": [sample.boxed for sample in samples],
        "truncated": [sample.finish is Finish.LENGTH for sample in samples],
        "stopped": [sample.finish is Finish.STOP for sample in samples],
        "score": [sample.score for sample in samples],
        "length": tokens,
    }
    results |= {f"{name},none": fmean(found) for name, found in shares.items()}
    results["length_max,none"] = max(tokens)
    for outcome in (Outcome.TIMEOUT, Outcome.ERROR):
        results[f"grader_{outcome.value}s,none"] = sum(sample.outcome is outcome for sample in samples)
    return results


def _entries(name: str, found: Estimate) -> Results:
    return {
        f"{name},none": found.mean,
        f"{name}_stderr,none": "N/A" if math.isnan(found.stderr) else found.stderr,
        f"{name}_ci95,none": [found.low, found.high],
    }


def averages(results: Mapping[str, Results]) -> dict[str, Results]:
    """Plain means over tasks of what they all have: ``average`` over all, ``seed_average`` over the seed's five where
    all five are there.
    """
    found = {}
    for name, tasks in (("average", list(results)), ("seed_average", list(SEED_TABLE))):
        if all(task in results for task in tasks):
            shared = [
                key
                for key in results[tasks[0]]
                if "_stderr" not in key and "_ci95" not in key and all(key in results[task] for task in tasks)
            ]
            found[name] = {key: fmean(results[task][key] for task in tasks) for key in shared}
    return found


def table(rows: Mapping[str, Mapping[str, Results]]) -> str:
    """Markdown: pass@1 in percent, the seed's columns and average first (where any of them is there), others after;
    below it, how many samples could not be graded.

    Args:
        rows: results by task, by the name of the model.
    """
    tasks = list(dict.fromkeys(task for results in rows.values() for task in results))
    columns: list[str | None] = [] if set(tasks).isdisjoint(SEED_TABLE) else [*SEED_TABLE, None]  # None: the average
    columns += [task for task in tasks if task not in SEED_TABLE]
    lines = [
        "| | " + " | ".join("Avg." if task is None else title(task) for task in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, results in rows.items():
        average = averages(results).get("seed_average")
        cells = [_percent(average if task is None else results.get(task)) for task in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, results in rows.items():
        for task, found in results.items():
            timeouts, errors = (found.get(f"grader_{kind}s,none", 0) for kind in ("timeout", "error"))
            if timeouts or errors:
                lines += [
                    "",
                    f"{name}, {title(task)}: {timeouts + errors} samples could not be graded and count as wrong "
                    f"(time-outs {timeouts}, errors {errors}).",
                ]
    return "\n".join(lines) + "\n"


def title(task: str) -> str:
    """A task as tables show it."""
    return TASKS[task].title if task in TASKS else task


def _percent(results: Results | None) -> str:
    return "-" if results is None else f"{100 * results['pass@1,none']:.1f}"
