"""Evaluate a model on problem sets: ``python eval/run.py --model FOLDER --data DIR [--tasks a,b] [--samples K]``.

eval/README.md has every option, the protocol and what is written. Verdicts come from the reward rules of training;
nothing executes code that a model wrote.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

if not __package__:  # run as a program: Python then looks beside this file, not in the checkout that it belongs to
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from eval.evaluation import Evaluation, rescored_description, results_document
from eval.grading import Grader, check_errors, check_rule, grade, same_answers, ungradable_golds
from eval.identity import protocol_differences, read_identity
from eval.model import converted, find_checkpoints, find_model
from eval.results import Results, table, task_results
from eval.samples import GradedSample, SampleLog, read_samples
from eval.settings import Settings, parse
from eval.tasks import BadInput, ProblemSet, load_tasks, load_template
from megatron_rl.durable import locked, replace_text
from megatron_rl.rewards.rules import AnswerRule, RewardRule, lenient, load_rule
from megatron_rl.rewards.service import RewardService
from megatron_rl.rewards.structure import EXACT, Leniency

_PARTS_OF_A_MODEL = {"hf", "policy", "critic"}
_USAGE_ERROR, _FAILURE, _INTERRUPTED = 2, 1, 130
_LOCK_WAIT_S = 2.0


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
    settings.check_lenient_tasks([item.name for item in problems])
    _rule(settings)
    if settings.run is not None:
        folder = settings.output or settings.run / "eval"
        checkpoints = find_checkpoints(settings.run)
        jobs = {name: (find_model(path, settings.dtype), folder / name) for name, path in checkpoints.items()}
    else:
        checkpoints = {}
        assert settings.model is not None
        name = _model_name(settings.model)
        output = settings.output or Path("runs/eval") / name
        jobs = {name: (converted(settings.model, output / "hf", settings.dtype), output)}
    template = load_template(settings.template, next(iter(jobs.values()))[0].folder)
    evaluations = {
        name: Evaluation(settings=settings, model=model, template=template, problems=problems, output=output)
        for name, (model, output) in jobs.items()
    }
    for evaluation in evaluations.values():
        evaluation.check()
    console = Console(stderr=True)
    for note in (item.note for item in problems if item.note):
        _note(console, note)
    found: dict[str, dict[str, Results]] = {}
    golds = {item.name: [problem.gold for problem in item.problems] for item in problems}
    with _graders(settings, list(golds)) as graders:
        _check_rule(graders, golds, console)
        for name, evaluation in evaluations.items():
            if not _is_gone(name, checkpoints, console):
                try:
                    found[name] = evaluation.run(graders, console, name)
                except Exception:  # whatever missed the checkpoint: a lock, the tokenizer, the engine
                    if not _is_gone(name, checkpoints, console):
                        raise
    if settings.run is not None:
        newest = list(evaluations.values())[-1]
        found = dict(sorted((_rows_of_before(newest, found, console) | found).items()))
        replace_text(newest.output.parent / "table.md", table(found))
    _print(table(found))


def _is_gone(name: str, checkpoints: Mapping[str, Path], console: Console) -> bool:
    """Whether the run has removed a checkpoint since it was found; that is told."""
    if name not in checkpoints or checkpoints[name].is_dir():
        return False
    _note(console, f"{name}: the run has removed this checkpoint since; what it has not answered yet is left out")
    return True


def _rows_of_before(newest: Evaluation, found: Mapping[str, Any], console: Console) -> dict[str, dict[str, Results]]:
    """The results of checkpoints that a run has removed since they were evaluated, by name.

    Args:
        newest: an evaluation of now; results that do not compare with its are told and left out.
        found: the rows there are.
        console: where that is told.
    """
    rows = {}
    for file in sorted(newest.output.parent.glob("step_*/results.json")):
        name, identity = file.parent.name, read_identity(file.parent)
        if name in found or identity is None:
            continue
        tasks = [item.name for item in newest.problems]
        now = {"settings": newest.identity(), "tasks": {item.name: item.sha256 for item in newest.problems}}
        document = json.loads(file.read_text())
        differing = protocol_differences(now, identity, tasks)
        differing += [
            f"samples of {item.name}"
            for item in newest.problems
            if document["n-samples"].get(item.name)
            != {"original": len(item.problems), "effective": len(item.problems), "samples": newest.settings.samples}
        ]
        if differing:
            _note(console, f"{name} was evaluated otherwise (other {', '.join(differing)}) and has no row in the table")
        else:
            results = {task: document["results"][task] for task in tasks}
            rows[name] = {
                task: {key: value for key, value in of.items() if key != "alias"} for task, of in results.items()
            }
    return rows


def _note(console: Console, text: str) -> None:
    console.print(f"note: {text}", highlight=False, soft_wrap=True)


def _model_name(path: Path) -> str:
    """A name that tells checkpoints of different runs apart: the last parts of the path that say something."""
    *parts, last = [part for part in path.resolve().parts if part != "checkpoints"]
    is_part = last in _PARTS_OF_A_MODEL
    while last in _PARTS_OF_A_MODEL and parts:
        *parts, last = parts
    return f"{parts[-1]}-{last}" if parts and (is_part or last.startswith("step_")) else last


def _limited(problems: Sequence[ProblemSet], limit: int | None) -> tuple[ProblemSet, ...]:
    return tuple(replace(item, problems=item.problems[:limit]) for item in problems)


def _rule(settings: Settings, leniency: Leniency = EXACT) -> RewardRule:
    try:
        return lenient(load_rule(settings.rule), leniency)
    except ValueError as error:
        raise BadInput(f"--rule: {error}") from error


@contextmanager
def _graders(settings: Settings, tasks: Sequence[str]) -> Iterator[dict[str, Grader]]:
    """How each task is judged: tasks of one leniency share their processes."""
    rules = {leniency: _rule(settings, leniency) for leniency in map(settings.leniency, tasks)}
    with ExitStack() as stack:
        graders = {
            leniency: Grader(
                name=settings.rule,
                rule=rule,
                scorer=stack.enter_context(_service(settings, rule)),
                comparer=stack.enter_context(_service(settings, AnswerRule(leniency=leniency))),
            )
            for leniency, rule in rules.items()
        }
        yield {task: graders[settings.leniency(task)] for task in tasks}


def _check_rule(graders: Mapping[str, Grader], golds: Mapping[str, Sequence[str]], console: Console) -> None:
    """Try the rule on reference answers of each task, before anything is drawn or graded."""
    for task, grader in graders.items():
        if told := check_rule(grader, golds[task]):
            _note(console, f"{task}: {told}")


def _service(settings: Settings, rule: RewardRule) -> RewardService:
    return RewardService(
        rule,
        workers=settings.reward_workers,
        timeout_s=settings.timeout_s,
        wall_timeout_s=settings.wall_timeout_s,
        start_timeout_s=settings.start_timeout_s,
        memory_gib=settings.memory_gib,
    )


def _rescore(settings: Settings, file: Path) -> None:
    """Grade the responses of a samples file again and write samples and results to another folder."""
    if not file.is_file():
        raise BadInput(f"--rescore {file}: no such file")
    before = read_samples(file)
    if not before:
        raise BadInput(f"--rescore {file}: there is no sample in it")
    output = settings.output or file.parent / "rescored" / file.stem
    output.mkdir(parents=True, exist_ok=True)
    with locked(output / "lock", writing=output, wait_s=_LOCK_WAIT_S):
        _grade_again(settings, file, before, output)


def _grade_again(settings: Settings, file: Path, before: Sequence[GradedSample], output: Path) -> None:
    target = output / file.name
    for path in (target, output / "results.json"):
        if path.exists():
            raise BadInput(f"--output {output}: {path} is there already; remove it or name another folder")
    started = time.monotonic()
    there: dict[str, list[GradedSample]] = {}
    for sample in before:
        there.setdefault(sample.task, []).append(sample)
    settings.check_lenient_tasks(list(there))
    by_task: dict[str, list[GradedSample]] = {}
    golds = {task: [sample.gold for sample in samples] for task, samples in there.items()}
    with _graders(settings, list(there)) as graders:
        _check_rule(graders, golds, Console(stderr=True))
        for task, grader in graders.items():
            by_task[task] = grade(there[task], grader)
            check_errors(task, by_task[task], len(by_task[task]), settings.max_error_rate)
        results = {
            task: task_results(samples, same_answers(samples, graders[task]), seed=settings.seed)
            for task, samples in by_task.items()
        }
    description = rescored_description(file, by_task, settings)
    document = results_document(results, by_task, description, time.monotonic() - started)
    graded = {(sample.task, *sample.key): sample for samples in by_task.values() for sample in samples}
    after = [graded[sample.task, *sample.key] for sample in before]
    SampleLog(target).append(after)
    replace_text(output / "results.json", json.dumps(document, indent=2) + "\n")
    replace_text(output / "table.md", table({file.stem: results}))
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
    names = [item.name for item in problems]
    settings.check_lenient_tasks(names)
    with _graders(settings, names) as graders:
        for item in problems:
            bad = ungradable_golds(item, graders[item.name])
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
