"""A study: one recipe under several settings, each run predicted and measured."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megatron_rl.config.load import ConfigError, differences, parse
from megatron_rl.config.schema import RunConfig
from megatron_rl.model_dims import read_model_dims
from megatron_rl.planner.devices import DEVICES
from megatron_rl.planner.lengths import Lengths
from megatron_rl.planner.memory import device_bytes
from megatron_rl.planner.search import Plan, plan
from megatron_rl.planner.times import Machine
from megatron_rl.report import read_records, summarise

_KEYS = {"recipe", "folder", "device", "gpus_per_node", "runs"}
_NOT_MEASURED = ("cluster.address", "cluster.allow_open_cluster", "logging.")


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run: its name, which is also its folder's, and what it changes in the recipe (``key=value``)."""

    name: str
    settings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Study:
    """One recipe under several settings.

    Attributes:
        recipe: configuration files, a later one over an earlier one.
        folder: where each run gets a folder of its own, and the table and the picture go.
        runs: at least one; the first one calibrates the times and the memory of the others.
        device: that runs are predicted for, by its name in the table; None: as their settings say.
        per_node: GPUs of a node, likewise.
        shared: what all runs change in the recipe, before what each does.
    """

    recipe: tuple[Path, ...]
    folder: Path
    runs: tuple[StudyRun, ...]
    device: str | None = None
    per_node: int | None = None
    shared: tuple[str, ...] = ()

    def settings(self, run: StudyRun) -> list[str]:
        """What ``run`` changes, its folder included."""
        return [*self.shared, *run.settings, f"run_dir={self.folder / run.name}"]

    def machine(self, config: RunConfig) -> Machine:
        """What a run of these settings is predicted for."""
        per_node = config.cluster.gpus_per_node if self.per_node is None else self.per_node
        return Machine(device=DEVICES[self.device or config.cluster.planned_device], per_node=per_node)


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """What is known of one run; seconds are those of a step, GiB those of the largest worker of each role, together.

    Attributes:
        name: of the run.
        devices: that it takes.
        raw_seconds: predicted from the devices' figures.
        predicted_seconds: the same times what the first run took beyond its own prediction.
        predicted_gib: of the devices' memory; on a CPU, where host and device are one, with what the host keeps, and
            with what each role of the first run held beyond its own prediction, libraries above all.
        measured_gib: the resident sets on a CPU; on GPUs, whose memory these do not say, None.
        measured_seconds, accuracy: None where it has not run.
        problems: what does not fit the devices, by the prediction.
    """

    name: str
    devices: int
    raw_seconds: float
    predicted_seconds: float
    predicted_gib: float
    measured_seconds: float | None
    measured_gib: float | None
    accuracy: float | None
    problems: tuple[str, ...]


def read_study(file: Path, shared: Sequence[str] = ()) -> Study:
    """Read a study whose runs all get the settings ``shared`` too.

    Raises:
        ConfigError: keys are unknown, missing or of the wrong type, a name occurs twice or is no folder's, there is no
            such device.
        OSError: the file cannot be read.
    """
    try:
        table = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{file}: not valid TOML: {error}"]) from error
    problems = [f"{key}: unknown key; known: {', '.join(sorted(_KEYS))}" for key in sorted(table.keys() - _KEYS)]
    problems += [f"{key}: required, not set" for key in ("recipe", "folder", "runs") if not table.get(key)]
    if not isinstance(folder := table.get("folder", ""), str):
        problems.append(f"folder: must be a string, got {folder!r}")
    recipe = table.get("recipe", "")
    recipe = recipe if isinstance(recipe, list) else [recipe]
    if not all(isinstance(file, str) for file in recipe):
        problems.append(f"recipe: must be a file, or a list of files, got {table['recipe']!r}")
    device, per_node = table.get("device"), table.get("gpus_per_node")
    if device is not None and (not isinstance(device, str) or device not in DEVICES):
        problems.append(f"device: must be one of {', '.join(DEVICES)}, got {device}")
    if per_node is not None and (type(per_node) is not int or per_node < 1):
        problems.append(f"gpus_per_node: must be a whole number of at least 1, got {per_node!r}")
    runs = table.get("runs", [])
    problems += _run_problems(runs)
    if problems:
        raise ConfigError(problems)
    return Study(
        recipe=tuple(map(Path, recipe)),
        folder=Path(table["folder"]),
        runs=tuple(StudyRun(name=run["name"], settings=tuple(run.get("settings", ()))) for run in runs),
        device=device,
        per_node=per_node,
        shared=tuple(shared),
    )


def _run_problems(runs: object) -> Iterator[str]:
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        yield f"runs: must be tables ([[runs]]), got {runs!r}"
        return
    names = [run.get("name", "") for run in runs]
    for name in names:
        if not name or names.count(name) > 1:
            yield f"runs: needs a name of its own, got {name!r}"
        elif not isinstance(name, str) or name == ".." or Path(name).name != name:
            yield f"runs: a name must be that of a folder, without a path, got {name!r}"
    for run in runs:
        yield from (f"runs.{key}: unknown key" for key in sorted(run.keys() - {"name", "settings"}))
        settings = run.get("settings", [])
        if not isinstance(settings, list) or not all(isinstance(each, str) for each in settings):
            yield f"runs.settings: must be a list of strings (key=value), got {settings!r}"


def is_done(study: Study, run: StudyRun) -> bool:
    """Whether ``run`` was trained to its last step, not stopped before.

    Raises:
        ConfigError: it was, with other settings than it has now.
    """
    config = parse(RunConfig, study.recipe, study.settings(run))
    summary, saved = config.run_dir / "summary.json", config.run_dir / "config.json"
    if not summary.is_file():
        return False
    found = json.loads(summary.read_text())
    if "stopped_after_step" in found or found["steps"] < config.steps:
        return False
    if changed := [key for key in differences(config, saved.read_text()) if not key.startswith(_NOT_MEASURED)]:
        raise ConfigError(
            [
                f"runs: {run.name!r} must have the settings that it was measured with, found others for "
                f"{', '.join(changed)}: give it another name, or remove {config.run_dir}"
            ]
        )
    return True


def study_rows(study: Study) -> list[StudyRow]:
    """What is predicted of each run, and what was measured of those that are done.

    Raises:
        ConfigError: a run's settings are wrong, or its layouts cannot be, or it was measured with others.
    """
    found: list[StudyRow] = []
    factor: float | None = None
    beyond: float | None = None
    for run in study.runs:
        config = parse(RunConfig, study.recipe, study.settings(run))
        dims = read_model_dims(config.model.path)
        metrics = config.run_dir / "metrics.jsonl"
        measured = summarise(metrics) if is_done(study, run) else {}
        lengths = Lengths(
            prompt=config.data.max_prompt_tokens / 4,
            response=_response_length(metrics) if measured else config.rollout.max_response_tokens / 3,
        )
        machine = study.machine(config)
        planned = plan(config, dims, machine, lengths)
        if not planned.times:
            raise ConfigError([f"{run.name}: {problem}" for problem in planned.problems])
        seconds = measured.get("seconds_per_step_median")
        if factor is None:
            factor = 1.0 if seconds is None else seconds / planned.step_seconds
        memory: Mapping[str, float] = {} if machine.device.is_gpu else measured.get("peak_rss_gib", {})
        held, raw = sum(memory.values()), _predicted_bytes(machine, planned) / 2**30
        roles = len({cell.name.split(".")[0] for cell in planned.memory})
        if beyond is None:
            beyond = (held - raw) / roles if memory else 0.0
        found.append(
            StudyRow(
                name=run.name,
                devices=planned.devices,
                raw_seconds=planned.step_seconds,
                predicted_seconds=planned.step_seconds * factor,
                predicted_gib=raw + beyond * roles,
                measured_seconds=seconds,
                measured_gib=held if memory else None,
                accuracy=measured.get("accuracy_after"),
                problems=planned.problems,
            )
        )
    return found


def _predicted_bytes(machine: Machine, planned: Plan) -> float:
    """Where there is no GPU, host and device are the same memory."""
    on_host = 0.0 if machine.device.is_gpu else sum(cell.value for cell in planned.memory if "host" in cell.name)
    return device_bytes(planned.memory) + on_host


def _response_length(metrics: Path) -> float:
    """Of the step in the middle: seconds are those of the step in the middle too."""
    steps = [record for record in read_records(metrics) if record["kind"] == "step"]
    return float(median(step["rollout/length_mean"] for step in steps))


def study_table(rows: Sequence[StudyRow]) -> str:
    """The rows as Markdown. Efficiency is that of the first run's device-seconds."""
    lines = [
        "| run | devices | predicted s | measured s | error | efficiency | predicted GiB | measured GiB | accuracy | "
        "fits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, efficiency in zip(rows, _efficiencies(rows, [_seconds(row) for row in rows]), strict=True):
        error = (
            "" if row.measured_seconds is None else f"{100 * (row.predicted_seconds / row.measured_seconds - 1):+.0f} %"
        )
        lines.append(
            f"| {row.name} | {row.devices} | {row.predicted_seconds:.2f} | {_shown(row.measured_seconds)} | {error} | "
            f"{efficiency:.0f} % | {row.predicted_gib:.2f} | {_shown(row.measured_gib)} | "
            f"{_shown(row.accuracy)} | {'; '.join(row.problems) or 'yes'} |"
        )
    return "\n".join(lines) + "\n"


def _seconds(row: StudyRow) -> float:
    return row.predicted_seconds if row.measured_seconds is None else row.measured_seconds


def _efficiencies(rows: Sequence[StudyRow], seconds: Sequence[float]) -> list[float]:
    """Per cent of the first run's: its device-seconds over each one's."""
    spent = [row.devices * each for row, each in zip(rows, seconds, strict=True)]
    return [100 * spent[0] / each for each in spent]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def plot_study(rows: Sequence[StudyRow], png: Path) -> None:
    """Draw a step's seconds, memory and efficiency, predicted beside measured, and the accuracy at the end."""
    os.environ.setdefault("MPLCONFIGDIR", str(png.parent.resolve() / "scratch"))
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state, and slow to load
    from matplotlib.figure import Figure

    expected = [row.predicted_seconds for row in rows]
    panels: list[tuple[str, Sequence[float], Sequence[float | None]]] = [
        ("seconds of a step", expected, [row.measured_seconds for row in rows]),
        ("GiB, largest worker of each role", [row.predicted_gib for row in rows], [row.measured_gib for row in rows]),
        (
            "efficiency, % of the first run's",
            _efficiencies(rows, expected),
            _efficiencies(rows, [_seconds(row) for row in rows]),
        ),
        ("accuracy at the end", [], [row.accuracy for row in rows]),
    ]
    figure = Figure(figsize=(4 + 1.2 * len(rows), 7), layout="constrained")
    for axes, (title, predicted, measured) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        if predicted:
            axes.bar([at - 0.2 for at in range(len(rows))], predicted, 0.4, label="predicted")
        known = [(at, value) for at, value in enumerate(measured) if value is not None]
        if known:
            axes.bar([at + 0.2 for at, _ in known], [value for _, value in known], 0.4, label="measured", color="C1")
        axes.set_xticks(range(len(rows)), [row.name for row in rows], rotation=30, ha="right")
        axes.set_ylabel(title)
        if predicted and known:
            axes.legend()
    FigureCanvasAgg(figure)
    figure.savefig(png)
