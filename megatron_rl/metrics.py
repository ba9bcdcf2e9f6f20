"""Where a run's numbers go: ``metrics.jsonl``, the console, TensorBoard, and W&B if asked. Never loads torch.

One :class:`StepLog` per step collects metrics and times phases; leaving its block writes one record. A record is one
JSON object with ``step`` (0-based), ``kind`` (``step``, or ``evaluation`` for one outside the steps), ``time`` (seconds
since the epoch), ``nonfinite`` (how many values were NaN or infinite), and every metric under ``prefix/name``. Values
that are not finite are kept, as the tokens ``NaN`` and ``Infinity`` that Python's :mod:`json` reads back. A record that
an exception cut short has ``"aborted": true``, until a run goes on from a checkpoint after that step. In TensorBoard
and W&B the horizontal axis is the number of steps done.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from megatron_rl.durable import replace_bytes

_WANDB_FINISH_S = 60.0
_WANDB_PROCESS = "wandb-core"
Source = Callable[[Mapping[str, float]], Mapping[str, float]]
"""Asked at the end of every record: takes the record's metrics so far, gives more of them under their full names."""


class StepLog:
    """Collects the numbers of one step; made by :meth:`MetricLog.step`."""

    def __init__(self, run_dir: Path, entered: Callable[[str], None]) -> None:
        """Start collecting; ``entered`` is told the name of each phase."""
        self._run_dir = run_dir
        self._entered = entered
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self.last_phase: str | None = None
        """The phase entered last, if any: where a failure happened."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block as ``seconds/<name>``; a phase entered again adds to its time."""
        self.last_phase = name
        self._entered(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def update(self, prefix: str, metrics: Mapping[str, Any]) -> None:
        """Add numbers under ``prefix/name``; a name given again within the step is averaged, a mapping is flattened."""
        for name, value in metrics.items():
            key = f"{prefix}/{name}"
            if isinstance(value, Mapping):
                self.update(key, value)
            else:
                self._sums[key] = self._sums.get(key, 0.0) + float(value)
                self._counts[key] = self._counts.get(key, 0) + 1

    def rows(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Append ``rows`` to ``<name>.jsonl`` in the run's folder, at once: something to read, such as samples."""
        _append(self._run_dir / f"{name}.jsonl", rows)

    def metrics(self) -> dict[str, float]:
        """All numbers so far: means of what was given several times, and the seconds of each phase."""
        means = {key: total / self._counts[key] for key, total in self._sums.items()}
        return means | {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}


class MetricLog:
    """The metrics of one run, appended to what its folder holds already. Close it, or use it as a context manager."""

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        settings: Mapping[str, object] | None = None,
        console: Console | None = None,
        sources: Sequence[Source] = (),
        start_step: int = 0,
    ) -> None:
        """Open the log. What it holds of steps from ``start_step`` on is superseded, and dropped with a note.

        Args:
            run_dir: made where it is missing; gets ``metrics.jsonl``, and ``tensorboard/``, ``wandb/`` where asked for.
            total_steps: of the whole run, for progress and the time left.
            tensorboard: write event files.
            wandb_project: send to this W&B project; None sends nothing.
            settings: of the run, by dotted key, for W&B to show and to filter by.
            console: where progress goes; standard output unless given. Not a terminal: plain lines.
            sources: see :data:`Source`.
            start_step: the first step to come.

        Raises:
            RuntimeError: ``wandb_project`` is set and W&B is not installed. One that cannot be opened is told.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._total = total_steps
        self._spent: list[float] = []
        self._sources = tuple(sources)
        self._file = run_dir / "metrics.jsonl"
        files = {run_dir / name: _take_up(run_dir / name, start_step) for name in ("metrics.jsonl", "samples.jsonl")}
        self._console = _ConsoleTable(Console() if console is None else console, total_steps)
        self._sinks: list[_Sink] = []
        if tensorboard:
            self._sinks.append(_TensorBoard(run_dir / "tensorboard", start_step))
        if wandb_project is not None:
            _refuse_missing_wandb(wandb_project)
            try:
                self._sinks.append(_WandB(run_dir, wandb_project, start_step, settings or {}))
            except Exception as error:
                self.note(f"{_WandB.setting}: W&B could not be opened and gets nothing of this run: {_told(error)}")
        self._fed = list(self._sinks)
        for file, found in files.items():
            if found.unreadable:
                self.note(f"{file}: what cannot be read is left out, line {', '.join(map(str, found.unreadable))}")
        if dropped := files[self._file].dropped:
            self.note(f"metrics.jsonl: {dropped} records of step {start_step} and later are superseded and dropped")

    def __enter__(self) -> MetricLog:
        """The log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it; W&B then shows a run that an exception ends as failed."""
        self.close(failed=kind is not None)

    @contextmanager
    def step(self, step: int) -> Iterator[StepLog]:
        """Collect and write the record of step number ``step`` (0-based).

        Raises:
            BaseException: what the block raises, with a note on the step and the phase; what was collected until then
                is written as an aborted record.
        """
        with self._record("step", step, steps_done=step + 1) as log:
            yield log

    @contextmanager
    def evaluation(self, step: int) -> Iterator[StepLog]:
        """The same for an evaluation before step number ``step``."""
        with self._record("evaluation", step, steps_done=step) as log:
            yield log

    def note(self, text: str) -> None:
        """Tell the console something that is not a metric."""
        self._console.note(text)

    def close(self, *, failed: bool = False) -> None:
        """Flush and close everything, and tell what could not be; a second call does nothing."""
        self._console.close()
        while self._sinks:
            sink = self._sinks.pop()
            try:
                if lost := sink.close(failed=failed):
                    self.note(lost)
            except Exception as error:
                self.note(f"{sink.setting}: it did not end well: {_told(error)}")

    @contextmanager
    def _record(self, kind: str, step: int, *, steps_done: int) -> Iterator[StepLog]:
        log = StepLog(self._run_dir, self._console.phase)
        self._console.open(step)
        started = time.perf_counter()
        try:
            yield log
            metrics = log.metrics() | {"seconds/step": time.perf_counter() - started}
            if kind == "step":
                metrics["eta_s"] = self._seconds_left(metrics["seconds/step"], steps_done)
            for source in self._sources:
                metrics |= source(metrics)
        except BaseException as error:
            error.add_note(f"at step {step}, last phase {log.last_phase or '(none yet)'}")
            metrics = log.metrics() | {"seconds/step": time.perf_counter() - started}
            try:
                self._write(kind, step, metrics, aborted=True)
            except OSError as lost:
                error.add_note(f"{self._file}: its record could not be written: {lost}")
            raise
        try:
            self._write(kind, step, metrics, aborted=False)
        except OSError as error:
            error.add_note(f"at step {step}, all of which is done: {self._file} could not be written")
            raise
        for sink in tuple(self._fed):
            try:
                sink.write(metrics, steps_done)
            except Exception as error:  # metrics.jsonl has them, and nothing that only shows them ends a run
                self._fed.remove(sink)
                self.note(f"{sink.setting}: after {steps_done} steps it gets nothing any more: {_told(error)}")
        self._console.row(metrics, steps_done, is_step=kind == "step")

    def _seconds_left(self, step_seconds: float, steps_done: int) -> float:
        """What the rest of the run takes at the mean pace so far."""
        self._spent.append(step_seconds)
        return sum(self._spent) / len(self._spent) * max(0, self._total - steps_done)

    def _write(self, kind: str, step: int, metrics: Mapping[str, float], *, aborted: bool) -> None:
        nonfinite = sum(not math.isfinite(value) for value in metrics.values())
        record = {"step": step, "kind": kind, "time": round(time.time(), 3), "nonfinite": nonfinite, **metrics}
        _append(self._file, [record | {"aborted": True} if aborted else record])


def _append(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with file.open("a") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
        lines.flush()
        os.fsync(lines.fileno())


@dataclass(frozen=True)
class _TakenUp:
    """What became of a file's lines: how many were ``dropped``, and the numbers of those that are ``unreadable``."""

    dropped: int = 0
    unreadable: tuple[int, ...] = ()


def _take_up(file: Path, start_step: int) -> _TakenUp:
    """Keep the rows of steps before ``start_step``; not a line that a kill cut short, nor what a power cut spoilt.

    Such a step is done even where its record says that it was aborted: that came after its checkpoint was there.
    """
    if not file.is_file():
        return _TakenUp()
    before = file.read_bytes()
    kept, dropped, unreadable = [], 0, []
    for number, line in enumerate(before.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            dropped += 1
            continue
        try:
            row = json.loads(line)
            superseded = row["step"] >= start_step
        except (ValueError, KeyError, TypeError):
            unreadable.append(number)
            continue
        if superseded:
            dropped += 1
        elif row.pop("aborted", False):
            kept.append(json.dumps(row).encode() + b"\n")
        else:
            kept.append(line)
    if (after := b"".join(kept)) != before:
        replace_bytes(file, after)
    return _TakenUp(dropped, tuple(unreadable))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class _Sink(Protocol):
    """Another place that scalars go to, by ``setting``. One that raises is given up, and closed with the others."""

    setting: str

    def write(self, metrics: Mapping[str, float], steps_done: int) -> None: ...

    def close(self, *, failed: bool) -> str:
        """End it within a bound; what did not get there, if anything."""


class _TensorBoard:
    """Event files, by tensorboard's own writer: torch's would load torch."""

    setting = "logging.tensorboard"

    def __init__(self, folder: Path, start_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(folder))
        # TensorBoard then forgets what earlier files say of this number of steps done and more
        begun = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=start_step + 1, session_log=begun))

    def write(self, metrics: Mapping[str, float], steps_done: int) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=steps_done, summary=summary))
        self._writer.flush()

    def close(self, *, failed: bool) -> str:
        self._writer.close()
        return ""


class _WandB:
    """A W&B run, named after the run's folder.

    Its id is kept there, so that a run that goes on from a checkpoint is continued. Of steps that are done again W&B
    keeps what it got first.
    """

    setting = "logging.wandb_project"

    def __init__(self, run_dir: Path, project: str, start_step: int, settings: Mapping[str, object]) -> None:
        import wandb

        id_file = run_dir / "wandb_run_id"
        if start_step == 0 or not id_file.is_file():
            id_file.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            dir=str(run_dir),
            id=id_file.read_text(),
            resume="allow",
            config=dict(settings),
            allow_val_change=True,  # a run that goes on may have other settings
        )

    def write(self, metrics: Mapping[str, float], steps_done: int) -> None:
        self._run.log(dict(metrics), step=steps_done)

    def close(self, *, failed: bool) -> str:
        """Why in a thread: without a network W&B tries for as long as it takes, and no version has a limit for that."""
        raised: list[Exception] = []
        ended = threading.Event()

        def finish() -> None:
            try:
                self._run.finish(exit_code=int(failed))
            except Exception as error:  # the run is over: nothing of W&B's is its end
                raised.append(error)
            finally:
                ended.set()

        threading.Thread(target=finish, name="wandb", daemon=True).start()
        given_up = True  # so an interrupt leaves it
        try:
            given_up = not ended.wait(_WANDB_FINISH_S)
        finally:
            if given_up:
                _kill_wandb()
        if given_up:
            return (
                f"logging.wandb_project: W&B had not taken all metrics {_WANDB_FINISH_S:g} s after the run's end, and "
                "its process was killed, of which it may complain; metrics.jsonl has them, and 'wandb sync' may send "
                "what lies in the run's wandb/"
            )
        return f"logging.wandb_project: W&B did not end well: {raised[0]}" if raised else ""


def _refuse_missing_wandb(project: str) -> None:
    try:
        import wandb  # noqa: F401
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"logging.wandb_project is set to {project!r}, which needs the package wandb, and it is not installed: "
            "install wandb, or leave logging.wandb_project unset"
        ) from error


def _kill_wandb() -> None:
    """Kill W&B's process, for whose end W&B waits at the exit of this one, without a limit of its own."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name() == _WANDB_PROCESS:
                child.kill()


@dataclass(frozen=True)
class _Table:
    """A console table: (header, metric, format) per column; ``most_rows`` spreads fewer rows over a long stage."""

    columns: tuple[tuple[str, str, str], ...]
    most_rows: int | None = None

    def shows(self, steps_done: int, total_steps: int) -> bool:
        if self.most_rows is None or steps_done in {1, total_steps}:
            return True
        return steps_done % max(1, total_steps // self.most_rows) == 0


_PPO = _Table(
    (
        ("score", "rollout/score", "+.3f"),
        ("accuracy", "rollout/accuracy", ".3f"),
        ("format", "rollout/format_rate", ".3f"),
        ("length", "rollout/length_mean", ".1f"),
        ("KL", "experience/kl", ".4f"),
        ("entropy", "policy/entropy", ".3f"),
        ("clipped", "policy/clip_fraction", ".3f"),
        ("expl.var", "experience/explained_variance", "+.3f"),
        ("gap", "experience/engine_gap_mean", ".1e"),
        ("seconds", "seconds/step", ".1f"),
    )
)
_SUPERVISED = _Table(
    (
        ("loss", "model/loss", ".4f"),
        ("grad norm", "model/grad_norm", ".3f"),
        ("lr", "model/learning_rate", ".2e"),
        ("seconds", "seconds/step", ".2f"),
    ),
    most_rows=20,
)
_HELDOUT = (
    ("score", "heldout/score", "+.3f"),
    ("accuracy", "heldout/accuracy", ".3f"),
    ("format", "heldout/format_rate", ".3f"),
    ("length", "heldout/length_mean", ".1f"),
)
_ROWS_PER_HEADER = 30


class _ConsoleTable:
    """A table row per step, and on a terminal a progress bar below it."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._total = total_steps
        self._rows = 0
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description:12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA {task.fields[eta]}"),
                console=console,
                transient=True,
            )

    def open(self, step: int) -> None:
        if self._progress is not None and not self._progress.task_ids:
            self._progress.add_task("starting", total=self._total, completed=step, eta="-")
            self._progress.start()

    def phase(self, name: str) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], description=name)

    def note(self, text: str) -> None:
        self._line(text, style="yellow")

    def row(self, metrics: Mapping[str, float], steps_done: int, *, is_step: bool) -> None:
        if is_step:
            left = _duration(metrics["eta_s"])
            if self._progress is not None:
                self._progress.update(self._progress.task_ids[0], completed=steps_done, eta=left)
            table = _SUPERVISED if "model/loss" in metrics else _PPO
            if table.shows(steps_done, self._total):
                if self._rows % _ROWS_PER_HEADER == 0:
                    self._line(_cells("step", *(name for name, *_ in table.columns), "ETA"), style="bold")
                self._rows += 1
                cells = [_formatted(metrics, key, form) for _, key, form in table.columns]
                self._line(_cells(f"{steps_done}/{self._total}", *cells, left))
            if memory := _memory(metrics):
                self._line(f"memory in GiB, planned / measured: {memory}")
        if "heldout/score" in metrics:
            cells = [f"{name} {_formatted(metrics, key, form)}" for name, key, form in _HELDOUT]
            temperature = metrics.get("heldout/temperature", 0.0)
            drawn = f"sampled at {temperature:g}" if temperature else "greedy"
            text = f"held-out, {drawn}, after {steps_done} of {self._total} steps: {', '.join(cells)}"
            self._line(text, style="green")
        spoilt = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        if spoilt:
            self._line(f"not finite after {steps_done} steps: {', '.join(spoilt)}", style="red")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _line(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _cells(*texts: str) -> str:
    return " ".join(f"{text:>9}" for text in texts)


def _memory(metrics: Mapping[str, float]) -> str:
    """Of a device that roles share, phase by phase; empty where none is shared."""
    phases = [key.split("/")[1] for key in metrics if key.startswith("memory/") and key.endswith("/device/planned")]
    device = ((phase, f"memory/{phase}/device/") for phase in phases)
    return ", ".join(
        f"{phase} {metrics[prefix + 'planned']:.2f} / {metrics[prefix + 'measured']:.2f}" for phase, prefix in device
    )


def _formatted(metrics: Mapping[str, float], key: str, form: str) -> str:
    return format(metrics[key], form) if key in metrics else "-"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
