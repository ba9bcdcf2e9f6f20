"""Training dynamics of a run from its evaluated checkpoints: ``python eval/report.py RUN/eval``.

Reads what ``eval/run.py --run`` (or several ``--model``) left in folders named ``step_N`` and writes beside them
``dynamics.json``, ``dynamics.png`` and ``report.html``, one file to send around: the figure, the numbers,
and samples to read and filter.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import hashlib
import html
import io
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a program: Python then looks beside this file, not in the checkout that it belongs to
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.behaviour import Behaviour, behaviour
from eval.identity import IDENTITY_FILE, protocol_differences, read_identity
from eval.results import title
from eval.samples import GradedSample, read_samples
from eval.tasks import TASKS, BadInput
from megatron_rl.durable import replace_bytes, replace_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE = "#1f77b4", "#d9730d"
_COLUMNS = 3
_STEP = re.compile(r"step_(\d+)")
AVERAGE = "average"

Samples = Mapping[int, Mapping[str, Sequence[GradedSample]]]
"""By step, then by task."""
Dynamics = Mapping[str, Mapping[int, Behaviour]]
"""By task (and ``AVERAGE``), then by step."""


def load_evaluations(folder: Path) -> dict[int, dict[str, list[GradedSample]]]:
    """The samples of every evaluated checkpoint.

    Args:
        folder: holds ``step_N/samples_TASK.jsonl``; or is itself one evaluation, which then is step 0.

    Raises:
        BadInput: there are none, a line is not a sample, or checkpoints were evaluated by different protocols.
    """
    named = [(_STEP.fullmatch(path.name), path) for path in folder.glob("step_*")]
    places = {int(step[1]): path for step, path in named if step is not None}
    found = {step: _samples(path) for step, path in sorted((places or {0: folder}).items())}
    found = {step: tasks for step, tasks in found.items() if tasks}
    if not found:
        raise BadInput(f"{folder}: no step_*/samples_*.jsonl in it; make them with eval/run.py --run")
    if len(found) > 1:
        _check_same_protocol({step: places[step] for step in found}, list(dict.fromkeys(chain(*found.values()))))
    return found


def _check_same_protocol(places: Mapping[int, Path], tasks: Sequence[str]) -> None:
    """Refuse steps that differ in more than their models.

    Raises:
        BadInput: there are some, or one does not say how it was evaluated; names step and settings.
    """
    identities = {}
    for step, place in places.items():
        if (identity := read_identity(place)) is None:
            raise BadInput(
                f"{place}: every checkpoint must say how it was evaluated, there is no {IDENTITY_FILE}; evaluate it "
                "with eval/run.py"
            )
        identities[step] = identity
    first, *others = identities
    differing = [
        f"step {step} differs from step {first} in {', '.join(names)}"
        for step in others
        if (names := protocol_differences(identities[first], identities[step], tasks))
    ]
    if differing:
        raise BadInput(
            f"every checkpoint must be evaluated by the same protocol, {'; '.join(differing)}; evaluate these anew, "
            "with the same options and releases"
        )


def _samples(folder: Path) -> dict[str, list[GradedSample]]:
    files = sorted(folder.glob("samples_*.jsonl"))
    read = [(file.stem.removeprefix("samples_"), read_samples(file)) for file in files if file.stat().st_size]
    order = list(TASKS)
    return dict(sorted(read, key=lambda item: order.index(item[0]) if item[0] in TASKS else len(order)))


def dynamics(evaluations: Samples) -> dict[str, dict[int, Behaviour]]:
    """Each task's behaviour over steps, and the plain average over the tasks of each step under ``AVERAGE``.

    Raises:
        BadInput: steps were evaluated on different tasks or samples, so that their averages would not compare.
    """
    sets = {step: tuple(tasks) for step, tasks in evaluations.items()}
    if len(set(sets.values())) > 1:
        listed = "; ".join(f"step {step}: {', '.join(tasks)}" for step, tasks in sets.items())
        raise BadInput(f"every checkpoint must be evaluated on the same tasks, found {listed}")
    _check_complete(evaluations)
    found: dict[str, dict[int, Behaviour]] = {AVERAGE: {}}
    for step, tasks in evaluations.items():
        of_step = {task: behaviour(samples) for task, samples in tasks.items()}
        for task, value in of_step.items():
            found.setdefault(task, {})[step] = value
        found[AVERAGE][step] = _average(list(of_step.values()))
    return found


def _check_complete(evaluations: Samples) -> None:
    """Refuse steps without a sample that another step has, such as an evaluation that was killed.

    Raises:
        BadInput: there are some; names them.
    """
    keys = {
        (step, task): {sample.key for sample in samples}
        for step, tasks in evaluations.items()
        for task, samples in tasks.items()
    }
    every: dict[str, set[tuple[str, int]]] = {}
    for (_, task), of_step in keys.items():
        every.setdefault(task, set()).update(of_step)
    lacking = [
        f"step {step} has {len(of_step)} of {len(every[task])} samples of {task}"
        for (step, task), of_step in keys.items()
        if of_step != every[task]
    ]
    if lacking:
        raise BadInput(
            f"every checkpoint must have the same samples, {'; '.join(lacking)}; finish with eval/run.py what was cut "
            "short, with the same --samples and --limit for all"
        )


def _average(values: Sequence[Behaviour]) -> Behaviour:
    def mean(name: str) -> float | None:
        known = [value for item in values if (value := getattr(item, name)) is not None]
        return fmean(known) if known else None

    names = [item.name for item in dataclasses.fields(Behaviour) if item.name != "samples"]
    return Behaviour(samples=sum(value.samples for value in values), **{name: mean(name) for name in names})  # type: ignore[arg-type] # only lengths may be None, and mean() keeps what is known


def draw(found: Dynamics) -> bytes:
    """The figure as PNG: accuracy and length over steps, of the average and each task, then how the average behaves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state, and slow to load
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = len(found) + 3
    rows = math.ceil(panels / _COLUMNS)
    figure = Figure(figsize=(5 * _COLUMNS, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for place, (task, steps) in zip(axes, found.items(), strict=False):
        _pair(place, steps, _title(task), ("accuracy", "accuracy (%)", 100), ("length", "tokens", 1))
    average = found[AVERAGE]
    shares, lengths, words, *unused = axes[len(found) :]
    for name, label in (("clip", "clipped"), ("stop", "stopped"), ("box", "boxed"), ("repeat", "repeating")):
        _line(shares, average, f"{name}_ratio", label, 100)
    shares.set(title="Average: shares of responses", ylabel="%", ylim=(-3, 103))
    for name, label in (("length_stopped", "stopped"), ("length_right", "right"), ("length_wrong", "wrong")):
        _line(lengths, average, name, label, 1)
    lengths.set(title="Average: length of responses", ylabel="tokens")
    _line(words, average, "keywords", "", 1)
    words.set(title="Average: words of second thoughts", ylabel="per response")
    for place in (shares, lengths):
        place.legend(frameon=False)
    for place in unused:
        place.set_visible(False)
    for place in axes:
        place.set_xlabel("step")
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
        place.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()


def _pair(
    axes: Axes, steps: Mapping[int, Behaviour], title: str, left: tuple[str, str, int], right: tuple[str, str, int]
) -> None:
    twin = axes.twinx()
    for place, (name, label, factor), color in ((axes, left, _BLUE), (twin, right, _ORANGE)):
        place.plot(list(steps), [factor * getattr(item, name) for item in steps.values()], "o-", color=color, ms=4)
        place.set_ylabel(label, color=color)
    axes.set_title(title)


def _line(axes: Axes, steps: Mapping[int, Behaviour], name: str, label: str, factor: int) -> None:
    points = [(step, factor * value) for step, item in steps.items() if (value := getattr(item, name)) is not None]
    axes.plot([step for step, _ in points], [value for _, value in points], "o-", ms=4, label=label)


def _title(task: str) -> str:
    return "Average" if task == AVERAGE else title(task)


def page(title: str, found: Dynamics, figure: bytes, evaluations: Samples, problems: int) -> str:
    """The report as one HTML file that loads nothing and sends nothing.

    Text of models and data reaches the page as JSON in which no tag can begin or end, and the script makes text
    nodes of it; the page's policy allows this one script alone.

    Args:
        title: plain text.
        found: the numbers.
        figure: PNG.
        evaluations: samples to browse.
        problems: how many of each task and step are included, the first ones.
    """
    here = Path(__file__).parent
    script = (here / "browser.js").read_text()
    chosen = [
        {"checkpoint": f"step {step}", **json.loads(sample.as_json())}
        for step, tasks in evaluations.items()
        for samples in tasks.values()
        for sample in _first(samples, problems)
    ]
    every = sum(len(samples) for tasks in evaluations.values() for samples in tasks.values())
    note = (
        f"All {every} samples."
        if len(chosen) == every
        else f"{len(chosen)} of {every} samples: those of the first {problems} problems of each task and checkpoint "
        "(--problems)."
    )
    parts = {
        "TITLE": html.escape(title),
        "FIGURE": base64.b64encode(figure).decode(),
        "TABLE": _table(found),
        "NOTE": html.escape(note),
        "DATA": embedded(chosen),
        "SCRIPT": script,
        "SCRIPT_HASH": f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
    }
    # one pass: what is put in is not searched again
    return re.sub(r"@([A-Z_]+)@", lambda match: parts[match[1]], (here / "browser.html").read_text())


def embedded(value: object) -> str:
    """``value`` as JSON that may stand inside a script element: it holds no ``<``, ``>`` or ``&``."""
    text = json.dumps(value)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _first(samples: Sequence[GradedSample], problems: int) -> list[GradedSample]:
    kept = dict.fromkeys(list(dict.fromkeys(sample.id for sample in samples))[:problems])
    return sorted((sample for sample in samples if sample.id in kept), key=lambda s: (list(kept).index(s.id), s.sample))


def _table(found: Dynamics) -> str:
    steps = list(found[AVERAGE])
    head = "".join(f"<th>step {step}</th>" for step in steps)
    lines = []
    for task, values in found.items():
        cells = "".join(f"<td>{100 * values[step].accuracy:.1f} / {values[step].length:.0f}</td>" for step in steps)
        lines.append(f"<tr><td>{html.escape(_title(task))}</td>{cells}</tr>")
    return f"<table><tr><th>accuracy (%) / length (tokens)</th>{head}</tr>{''.join(lines)}</table>"


def as_json(found: Dynamics) -> dict[str, Any]:
    """The numbers as plain data: task, step, measure."""
    return {
        task: {str(step): dataclasses.asdict(value) for step, value in steps.items()} for task, steps in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; the exit status is 0, or 2 where there is nothing to report on."""
    parser = argparse.ArgumentParser(prog="eval/report.py", description="Training dynamics from evaluated checkpoints.")
    parser.add_argument("folder", type=Path, help="RUN/eval, or the output of one evaluation")
    parser.add_argument("--output", type=Path, help="where to write (default: the folder itself)")
    parser.add_argument("--problems", type=int, default=100, help="problems of each task and checkpoint in the page")
    parser.add_argument("--title", help="of the page (default: named after the run)")
    asked = parser.parse_args(arguments)
    try:
        evaluations = load_evaluations(asked.folder)
        found = dynamics(evaluations)
    except BadInput as error:
        sys.stderr.write(f"report: {error}\n")
        return 2
    output = asked.output or asked.folder
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(
        "MPLCONFIGDIR", str(output.resolve() / "scratch")
    )  # else matplotlib writes to the home folder
    figure = draw(found)
    place = asked.folder.resolve()
    title = asked.title or f"Evaluation of {place.parent.name if place.name == 'eval' else place.name}"
    replace_text(output / "dynamics.json", json.dumps(as_json(found), indent=2) + "\n")
    replace_bytes(output / "dynamics.png", figure)
    replace_text(output / "report.html", page(title, found, figure, evaluations, asked.problems))
    for name in ("dynamics.json", "dynamics.png", "report.html"):
        sys.stdout.write(f"{output / name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
