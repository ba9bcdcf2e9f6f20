"""A run's checkpoints: complete or not there, checked before they are trusted, the last few kept, and of more of them
the weights, the best ones always.

``docs/checkpoints.md`` describes the folder and what is promised of it.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import TracebackType
from typing import Any, Protocol

from megatron_rl.durable import FileRecord, files_in, flush, read_record, replace_text, write_file
from megatron_rl.interfaces import Pending, results

_log = logging.getLogger(__name__)
_NUMBER = r"(\d{6}|[1-9]\d{6,})"
_COMMITTED, _PARTIAL = re.compile("step_" + _NUMBER), re.compile(r"\.partial_" + _NUMBER)
_LATEST, _NONE_YET = "latest", "none"
_STATE, _MANIFEST, _HF = "state.json", "manifest.json", "hf/"
_ROLES = ("policy", "critic")
"""Whose folders a checkpoint may hold, whichever of them the run has that goes on from it."""
_READERS = 4
_POLL_S = 0.2

_FIXED = {
    "seed": "the order of prompts and every sample are drawn from it",
    "model.dtype": "the optimizer's state depends on it",
    "prompts_per_step": "the learning-rate schedule and the position in the data count by it",
    "samples_per_step": "the learning-rate schedule and the position in the data count by it",
    "rollout.samples_per_prompt": "the learning-rate schedule counts by it",
    "ppo.minibatch_samples": "the learning-rate schedule counts optimizer steps",
    "ppo.epochs": "the learning-rate schedule counts optimizer steps",
    "ppo.critic_warmup_steps": "the learning-rate schedule counts optimizer steps",
}
"""Settings that a resumed run may not change, and why. An optimizer's are not among them: a checkpoint holds its
moments, and rate, decay and bounds are those of the run that loads.
"""
_LAYING_OUT = (
    *("layout", "tokens_per_microbatch", "recompute"),
    *("distributed_optimizer", "optimizer_on_host", "overlap_communication"),
)
_MACHINE = (
    *("run_dir", "output", "checkpoint", "cluster", "logging", "parity"),
    *("reward.workers", "reward.pools", "reward.start_timeout_s"),
    *("evaluation.every", "evaluation.at_start"),
    "sync.quantised_by",
    *(f"engine.{setting}" for setting in ("count", "tensor", "kv_cache_mib", "max_concurrent", "restarts")),
    *(f"{role}.{setting}" for role in ("policy", "critic", "trainer") for setting in _LAYING_OUT),
)
"""Settings that do not change what is computed, beyond rounding."""
_MEASURED_BY = ("evaluation.temperature", "reward.rule", "rollout.max_response_tokens", "rollout.stop")
"""Settings without which two accuracies on the same held-out prompts cannot be compared."""

_LATER_PARTS: Mapping[str, Any] = {"engines": []}
"""Parts that older checkpoints lack, in the state that a run begins with."""


class CheckpointProblem(RuntimeError):
    """A checkpoint cannot be used; the message says which, why, and how to go on."""


class Writing(Protocol):
    """Files that are being written."""

    def ready(self, within_s: float) -> bool:
        """Whether :meth:`result` would not wait any more, having waited ``within_s``."""

    def result(self) -> Mapping[str, FileRecord]:
        """What was written, by name.

        Raises:
            Exception: why it could not be.
        """


class Saveable(Protocol):
    """A model that can be written and read back, at any layout."""

    def blind_ranks(self, file: Path) -> Pending[list[str]]:
        """Which ranks do not find a file that is there, with their hosts."""

    def save(self, folder: Path) -> Pending[None]:
        """Copy model, optimizer and schedule, and start to write the copy; training may go on after that."""

    def written(self) -> Writing:
        """What :meth:`save` started."""

    def load(self, folder: Path) -> Pending[None]:
        """Take them up again."""

    def export_hf(self, folder: Path, like: Path) -> Pending[None]:
        """Write a Hugging Face folder."""


class Stateful(Protocol):
    """A part of the driver whose state belongs to a run."""

    def state(self) -> Any:
        """Plain data."""

    def restore(self, state: Any) -> None:
        """Take it up again."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What tells one run from another; plain data.

    Attributes:
        model: the sizes of the model.
        prompts: digest of the training prompts in their order.
        settings: the resolved configuration, by dotted key.
        heldout: digest of the held-out prompts that are evaluated; empty where there are none or none was saved.
    """

    model: Mapping[str, Any]
    prompts: str
    settings: Mapping[str, Any]
    heldout: str = ""

    def problems(self, saved: RunIdentity) -> Iterator[str]:
        """Why a run with this identity cannot go on from a checkpoint of ``saved``."""
        for name, (old, new) in _differences(saved.settings, self.settings):
            if name in _FIXED and name in self.settings:  # what is no setting any more cannot be set back
                yield f"{name}: was {old!r}, is {new!r}; {_FIXED[name]}"
        for name, (old, new) in _differences(saved.model, self.model):
            yield f"model.path: another model, {name} was {old!r}, is {new!r}"
        if self.prompts != saved.prompts:
            other = "data: other rows" if "data" in self.settings else "data.train: other prompts"
            yield f"{other} (or another template or limit); the position in the data is lost"

    def changes(self, saved: RunIdentity) -> Iterator[str]:
        """What was set otherwise in ``saved`` and changes what is computed, but may be changed."""
        for name, (old, new) in _differences(saved.settings, self.settings):
            if not any(_within(name, key) for key in (*_FIXED, *_MACHINE)):
                yield f"{name} was {old!r}, is {new!r}"
        if saved.heldout not in ("", self.heldout):
            yield "other held-out prompts (or another template or limit): accuracy before and after is not of the same"

    def measures_as(self, saved: RunIdentity) -> bool:
        """Whether held-out accuracies of both can be compared."""
        old, new = _as_saved(saved), _as_saved(self)
        return old.heldout == new.heldout and all(old.settings.get(k) == new.settings.get(k) for k in _MEASURED_BY)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            yield name, (old.get(name), new.get(name))


def _within(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.")


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A checkpoint that was committed.

    Attributes:
        folder: that holds it.
        step: steps done.
        parts: states of the driver's parts, by name.
        identity: of the run that saved it.
        accuracies: on the held-out prompts, by step, of this checkpoint and those before it, where there was one.
    """

    folder: Path
    step: int
    parts: Mapping[str, Any]
    identity: RunIdentity
    accuracies: Mapping[int, float]


def find_checkpoint(folder: Path) -> SavedRun | None:
    """The checkpoint that ``latest`` in ``folder`` names; of its files only the state is read yet.

    Returns:
        None where nothing was saved yet.

    Raises:
        CheckpointProblem: ``latest``, or what it names, is missing or damaged.
    """
    latest = folder / _LATEST
    if not latest.is_file():
        if names := ", ".join(path.name for path in _numbered(folder, _COMMITTED).values()):
            raise CheckpointProblem(
                f"{folder} must have a file {_LATEST!r} that names the checkpoint to go on from, found {names} and no "
                f"such file; write one of the names into it, or remove the folders to start anew"
            )
        return None
    name = latest.read_text().strip()
    if name == _NONE_YET:
        return None
    _refuse_damage(folder / name, [_STATE])
    state = json.loads((folder / name / _STATE).read_text())
    return SavedRun(
        folder=folder / name,
        step=state["step"],
        parts=state["parts"],
        identity=RunIdentity(**state["identity"]),
        accuracies={int(step): found for step, found in state.get("accuracies", {}).items()},  # older ones have none
    )


def sums_of(model: Path) -> dict[str, FileRecord]:
    """What the files of a model's folder in a checkpoint must be, by name; empty where the folder is in none.

    Raises:
        ValueError: the checkpoint's manifest cannot be read.
    """
    model = model.resolve()
    checkpoint, prefix = model.parent, f"{model.name}/"
    if not ((checkpoint / _STATE).is_file() and (checkpoint / _MANIFEST).is_file()):
        return {}
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        return {name.removeprefix(prefix): FileRecord(**manifest[name]) for name in manifest if name.startswith(prefix)}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint / _MANIFEST} cannot be read: {error!r}") from error


def kept_weights(model: Path) -> Path | None:
    """Where the weights are of a checkpoint whose folder ``model`` (``policy``, ``critic``) was removed, since older
    checkpoints keep their weights alone; None where that is not so.
    """
    checkpoint = model.resolve().parent
    return checkpoint / _HF if not model.exists() and _has_weights_alone(checkpoint) else None


def _has_weights_alone(checkpoint: Path) -> bool:
    """What its manifest says: the one thing that is changed in one move."""
    try:
        return _names_weights_alone(json.loads((checkpoint / _MANIFEST).read_text()))
    except (OSError, ValueError):
        return False


def _names_weights_alone(manifest: Any) -> bool:
    return isinstance(manifest, dict) and _STATE in manifest and all(map(_stays, manifest))


def _stays(file: str) -> bool:
    """Where of a checkpoint the weights alone are kept."""
    return file == _STATE or file.startswith(_HF)


def check_whole(saved: SavedRun) -> None:
    """Read every file of a checkpoint and compare it to its sum, several at a time.

    Raises:
        CheckpointProblem: a file is missing, truncated or changed; the message names all of them, and the newest
            earlier checkpoint that is whole.
    """
    _refuse_damage(saved.folder)


def check_same_run(saved: SavedRun, identity: RunIdentity, defaults: Mapping[str, Any]) -> list[str]:
    """Refuse to go on from the checkpoint of another run.

    Args:
        saved: the checkpoint.
        identity: of the run that is to go on.
        defaults: of its settings, by dotted key: what a checkpoint had that is older than the setting.

    Returns:
        what is set otherwise than it was, and may be.

    Raises:
        CheckpointProblem: the model, the data, or a setting that must stay has changed; lists all of it.
    """
    identity, before = _as_saved(identity), _as_saved(_completed(saved.identity, defaults))
    problems = list(identity.problems(before))
    if problems:
        raise CheckpointProblem(
            "\n  ".join(
                [
                    f"this run cannot go on from {saved.folder}; set back what changed, or name another run_dir:",
                    *problems,
                ]
            )
        )
    return list(identity.changes(before))


def _as_saved(identity: RunIdentity) -> RunIdentity:
    return RunIdentity(**json.loads(json.dumps(asdict(identity))))  # which has lists for tuples


def _completed(saved: RunIdentity, defaults: Mapping[str, Any]) -> RunIdentity:
    """With the settings that it is older than, in the sections that it had."""
    sections = {name.rpartition(".")[0] for name in saved.settings}
    later = {name: value for name, value in defaults.items() if name.rpartition(".")[0] in sections}
    return replace(saved, settings={**later, **saved.settings})


def _refuse_damage(checkpoint: Path, names: Sequence[str] | None = None) -> None:
    problems = _damage(checkpoint, names)
    if not problems:
        return
    own = _COMMITTED.fullmatch(checkpoint.name)
    found = _numbered(checkpoint.parent, _COMMITTED)
    weights_alone = _has_weights_alone(checkpoint)  # then those after it are whole, if any is
    others = [path for step, path in found.items() if own is None or weights_alone or step < int(own[1])]
    whole = next((path.name for path in reversed(others) if not _damage(path)), None)
    remedy = (
        f"{whole} is whole: to go on from it, write {whole} into {checkpoint.with_name(_LATEST)}"
        if whole
        else "no earlier checkpoint is whole: start anew in another run_dir, or restore the files"
    )
    if weights_alone:
        raise CheckpointProblem(f"{problems[0]}; {remedy}")
    raise CheckpointProblem("\n  ".join([f"the checkpoint {checkpoint} is damaged; {remedy}", *problems]))


def _damage(checkpoint: Path, names: Sequence[str] | None = None) -> list[str]:
    """What is wrong with these files of a checkpoint (all, unless named), one line each."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return [f"{checkpoint / _MANIFEST} cannot be read: {error}"]
    if _names_weights_alone(manifest):
        return [
            f"no run can go on from {checkpoint}, of which checkpoint.keep_weights has kept the weights alone ({_HF})"
        ]
    with ThreadPoolExecutor(_READERS) as pool:
        asked = manifest if names is None else names
        found = pool.map(lambda name: _difference(checkpoint / name, FileRecord(**manifest[name])), asked)
        return [problem for problem in found if problem]


def _difference(path: Path, expected: FileRecord) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != expected.size_bytes:
        return f"{path} must have {expected.size_bytes} bytes, has {size}"
    return None if read_record(path) == expected else f"{path} was changed: its xxh3 is not that of the manifest"


def _numbered(folder: Path, form: re.Pattern[str]) -> dict[int, Path]:
    """What in ``folder`` has a name of this form, by step and in that order; all else there is the user's."""
    found = ((form.fullmatch(path.name), path) for path in folder.glob("*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def _partial(folder: Path, step: int) -> Path:
    return folder / f".partial_{step:06d}"


def _committed(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


class RunCheckpoints:
    """Writes checkpoints of a run; leaving its ``with`` block waits for the one under way, unless interrupted."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_weights: int = 0,
        asynchronous: bool,
        models: Mapping[str, Saveable],
        parts: Mapping[str, Stateful],
        like: Path,
        identity: RunIdentity,
    ) -> None:
        """Take note; nothing is written yet.

        Args:
            folder: of all checkpoints.
            keep: how many; older ones are deleted,
            keep_weights: but for the Hugging Face folders of so many of them, the best by accuracy and the newest.
            asynchronous: training goes on while files are written.
            models: ``policy``, also written as a Hugging Face folder, and ``critic`` where there is one.
            parts: of the driver, by name.
            like: the Hugging Face folder that configuration and tokenizer come from.
            identity: of this run.
        """
        self._folder = folder
        self._keep = keep
        self._keep_weights = keep_weights
        self._asynchronous = asynchronous
        self._models = models
        self._parts = parts
        self._like = like
        self._identity = identity
        self._accuracies: dict[int, float] = {}
        self._under_way: Future[dict[str, float]] | None = None
        self._abandoned = threading.Event()
        self._told: set[int] = set()

    def __enter__(self) -> RunCheckpoints:
        """The checkpoints themselves."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the save under way: what a failing run had saved is not lost. An interrupt ends the wait."""
        if isinstance(error, KeyboardInterrupt):
            self._abandoned.set()
        elif error is not None and self._under_way is not None:
            _log.warning(
                "%s: %s\nwaiting until the checkpoint under way is on the disk; Ctrl-C leaves it",
                type(error).__name__,
                error,
            )
        try:
            self._finish_after(error)
        except KeyboardInterrupt as interrupt:
            self._abandoned.set()
            self._finish_after(interrupt)  # its thread asks workers that end next
            raise

    def start(self, saved: SavedRun | None) -> int:
        """Take up ``saved``, or start from nothing; what interrupted saves left is removed, as far as it can be.

        Returns:
            the step to go on from.

        Raises:
            CheckpointProblem: a rank has another folder of that name than this process.
            OSError: the folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._refuse_blind_ranks()
        if saved is None:
            replace_text(self._folder / _LATEST, _NONE_YET + "\n")
        self._remove_leftovers(0 if saved is None else saved.step)
        if saved is None:
            return 0
        results({role: model.load(saved.folder / role) for role, model in self._models.items()})
        if self._identity.measures_as(saved.identity):
            self._accuracies.update(saved.accuracies)
        states = {**_LATER_PARTS, **saved.parts}
        for name, part in self._parts.items():
            part.restore(states[name])
        return saved.step

    def _refuse_blind_ranks(self) -> None:
        """See that ranks write where this process looks: training would be lost at its first save."""
        with NamedTemporaryFile(dir=self._folder, prefix=".seen_by_all_ranks_") as file:  # no cache knows a new name
            blind = results({role: model.blind_ranks(Path(file.name)) for role, model in self._models.items()})
        if found := [rank for ranks in blind.values() for rank in ranks]:
            raise CheckpointProblem(
                f"{self._folder} must be one folder for the driver on {socket.gethostname()} and for all ranks, which "
                f"write there; a file that the driver has just put there is not seen by {', '.join(found)}: name a "
                "run_dir on a file system that all nodes share"
            )

    def save(self, step: int, accuracy: float | None = None, *, wait: bool) -> dict[str, float]:
        """Copy all state and write it under a temporary name; it gets its own, and ``latest`` names it, once the disk
        has every file. The ``accuracy``, if it was measured, decides how long its weights are kept.

        Returns:
            ``pause_s``, for which training stood still; and of the save that came to its end in this call, if any,
            ``write_s`` from its start to its end and ``size_mib``.

        Raises:
            Exception: what kept this save or the one before it from being written, with notes on what there is.
        """
        started = time.perf_counter()
        metrics = self._finish()
        partial = _partial(self._folder, step)
        with self._explained(step):
            for left in filter(Path.exists, (partial, _committed(self._folder, step))):
                shutil.rmtree(left)  # it could not be removed when it should have been
            partial.mkdir()
            results({role: model.save(partial / role) for role, model in self._models.items()})
            writing = {role: model.written() for role, model in self._models.items()}
            self._models["policy"].export_hf(partial / "hf", self._like).result()
            parts = {name: part.state() for name, part in self._parts.items()}
            if accuracy is not None:
                self._accuracies[step] = accuracy
            told = {"step": step, "parts": parts, "identity": asdict(self._identity), "accuracies": self._accuracies}
            state = json.dumps(told, indent=1)
        self._under_way = Future()
        arguments = (self._under_way, step, writing, state, started)
        threading.Thread(target=self._complete, args=arguments, name="checkpoint", daemon=True).start()
        if wait or not self._asynchronous:
            metrics |= self._finish()
        return metrics | {"pause_s": time.perf_counter() - started}

    def _finish(self) -> dict[str, float]:
        """Wait for the save under way, if any; its metrics."""
        if self._under_way is None:
            return {}
        futures.wait([self._under_way])  # an interrupt here leaves it to __exit__
        done, self._under_way = self._under_way, None
        return done.result()

    def _finish_after(self, error: BaseException | None) -> None:
        """Wait for the save under way, if any; where the run failed already, that it did too is told with ``error``."""
        try:
            self._finish()
        except Exception as lost:
            if error is None:
                raise
            error.add_note(f"a checkpoint was under way and could not be completed: {lost}")

    def _complete(
        self, done: Future[dict[str, float]], step: int, writing: Mapping[str, Writing], state: str, started: float
    ) -> None:
        """What runs beside training: wait for the ranks' files, commit, and remove what is not kept."""
        try:
            with self._explained(step):
                while not all(part.ready(_POLL_S) for part in writing.values()):
                    self._refuse_abandoned()
                files = {f"{role}/{name}": r for role, part in writing.items() for name, r in part.result().items()}
                size = self._commit(step, files, state)
            self._remove_leftovers(step)
            of_run = {number: path for number, path in _numbered(self._folder, _COMMITTED).items() if number <= step}
            older = sorted(of_run, reverse=True)[self._keep :]
            # of equals the first, which is the newest
            best = max(older, key=lambda number: self._accuracies.get(number, -math.inf), default=None)
            older.sort(key=lambda number: number != best)
            self._remove(of_run[number] for number in older[self._keep_weights :])
            self._remove_all_but_weights(of_run[number] for number in older[: self._keep_weights])
            done.set_result({"write_s": time.perf_counter() - started, "size_mib": size / 2**20})
        except BaseException as error:
            done.set_exception(error)

    def _commit(self, step: int, files: dict[str, FileRecord], state: str) -> int:
        """Make a checkpoint of a folder whose models are written; its size in bytes."""
        partial, final = _partial(self._folder, step), _committed(self._folder, step)
        for name, path in files_in(partial / "hf").items():  # flushed by its writer
            self._refuse_abandoned()
            files[f"hf/{name}"] = read_record(path)
        files[_STATE] = write_file(partial / _STATE, state.encode())
        manifest = {name: asdict(record) for name, record in sorted(files.items())}
        write_file(partial / _MANIFEST, json.dumps(manifest, indent=1).encode())
        flush(partial)
        partial.rename(final)
        flush(self._folder)
        replace_text(self._folder / _LATEST, final.name + "\n")
        return sum(record.size_bytes for record in files.values())

    def _refuse_abandoned(self) -> None:
        if self._abandoned.is_set():
            raise CheckpointProblem("the run was interrupted")

    def _remove_leftovers(self, step: int) -> None:
        """Remove what failed saves left, while none is under way, and checkpoints after ``step``, which ``latest`` has:
        they were never committed, or the user went back before them.
        """
        committed = _numbered(self._folder, _COMMITTED)
        newer = [path for number, path in committed.items() if number > step]
        self._remove([*_numbered(self._folder, _PARTIAL).values(), *newer])

    def _remove(self, folders: Iterable[Path]) -> None:
        """Remove folders that nobody needs. One that cannot be removed is told once, and tried again by later saves."""
        for folder in folders:
            with self._tried(folder) as partial:
                shutil.rmtree(folder.rename(partial))  # nobody sees half a checkpoint

    def _remove_all_but_weights(self, folders: Iterable[Path]) -> None:
        """Keep the Hugging Face folders, for evaluation. The manifest says so first: from then on it is no checkpoint,
        whatever a kill leaves of the rest, and the next save goes on with it.
        """
        for folder in folders:
            with self._tried(folder) as partial:
                manifest = json.loads((folder / _MANIFEST).read_text())
                if not _names_weights_alone(manifest):
                    kept = {name: manifest[name] for name in manifest if _stays(name)}
                    replace_text(folder / _MANIFEST, json.dumps(kept, indent=1))
                for model in filter(Path.exists, (folder / role for role in _ROLES)):
                    partial.mkdir(exist_ok=True)
                    shutil.rmtree(model.rename(partial / model.name))
                    partial.rmdir()

    @contextmanager
    def _tried(self, folder: Path) -> Iterator[Path]:
        """Where to move what goes of a checkpoint; that it cannot be removed is told once."""
        step = int(folder.name.rpartition("_")[2])
        try:
            yield _partial(self._folder, step)
        except (OSError, ValueError) as error:
            if step not in self._told:
                _log.warning("%s is not needed any more and cannot be removed: %s", folder, error)
            self._told.add(step)

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Give back the room of a save that fails, and say what there is now."""
        try:
            yield
        except Exception as error:
            free = shutil.disk_usage(self._folder).free / 2**20
            shutil.rmtree(_partial(self._folder, step), ignore_errors=True)
            newest = (self._folder / _LATEST).read_text().strip()
            error.add_note(
                f"while the checkpoint {_committed(self._folder, step).name} was saved; the newest whole one in "
                f"{self._folder}: {newest}; free on that disk at the time: {free:.0f} MiB"
            )
            raise
