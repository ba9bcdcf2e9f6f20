"""``megatron-rl train|sft|check-parity|plan|dry-run|scale|show-config|doctor FILE.toml... key=value...``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_rl.config.load import ConfigError, annotated, dump, load, load_any, origins, parse_any
from megatron_rl.config.schema import ClusterConfig, RunConfig, SFTConfig
from megatron_rl.lifetime import run_command
from megatron_rl.model_dims import ModelDims, read_model_dims, weight_problems
from megatron_rl.rewards.rules import load_rule

if TYPE_CHECKING:
    from megatron_rl.planner.study import Study, StudyRow

_USAGE_ERROR, _FAILURE, _INTERRUPTED = 2, 1, 130
_MANY_STEPS = 50
"""To lose; a shorter run is a trial."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 (done, or saved and stopped as SIGTERM asked), 1 (failed, or a
    plan or doctor found what is in the way), 2 (the configuration is wrong) or 130 (interrupted).
    """
    parser = argparse.ArgumentParser(prog="megatron-rl", description="Reinforcement learning for reasoning.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("train", "PPO from a base model"),
        ("sft", "supervised stage"),
        ("check-parity", "hold Hugging Face, the trainer and the engine side by side on the same tokens; no training"),
        ("plan", "memory and time of every role from sizes alone; exit status 1 where it cannot run or does not fit"),
        ("dry-run", "build the real model of one rank of any world, without memory"),
        ("scale", "a study: predict (plan) or also measure (run) one recipe under several settings"),
        ("show-config", "print the resolved configuration of train or sft, or everything that is wrong with it"),
        ("doctor", "look at this machine, or a cluster's nodes, before a run; exit status 1 where something is wrong"),
    ):
        command = commands.add_parser(name, help=text)
        if name == "scale":
            command.add_argument("action", choices=("plan", "run"))
        command.add_argument("settings", nargs="*" if name == "doctor" else "+", metavar="FILE.toml|key=value")
        if name in {"train", "sft"}:
            command.add_argument("--fresh", action="store_true", help="start anew; refuses a run_dir that is not empty")
        elif name == "plan":
            command.add_argument("--nodes", type=int, help="default: as many as the recipe takes")
            command.add_argument("--gpus-per-node", type=int, help="default: cluster.gpus_per_node of the recipe")
            command.add_argument(
                "--device", help="a100-80g, h100, h200, b200 or cpu (default: the recipe's cluster.device, else h100)"
            )
            command.add_argument("--host-gib", type=float, help="of a node's own memory; default: as its DGX has")
            command.add_argument("--prompt-tokens", type=float, help="mean; default: a quarter of the limit")
            command.add_argument("--response-tokens", type=float, help="mean; default: a third of the limit")
            command.add_argument(
                "--explain", metavar="CELL", help="print one number's formula, such as policy.gradients"
            )
        elif name == "show-config":
            command.add_argument(
                "--origins", action="store_true", help="as TOML, each setting with the file that it comes from"
            )
        elif name == "dry-run":
            command.add_argument("--rank", type=int, default=0)
            command.add_argument(
                "--role",
                choices=("policy", "critic", "trainer"),
                help="default: policy; of the supervised stage, trainer",
            )
            command.add_argument("--row-tokens", type=int, help="count activations too, with rows of so many tokens")
        elif name == "doctor":
            command.add_argument(
                "--cluster",
                metavar="HOST:PORT",
                help="of Ray, running or to be started here (default: cluster.address)",
            )
    asked, rest = parser.parse_known_args(arguments)
    if unknown := [item for item in rest if item.startswith("-") or "=" not in item]:
        hint = "; a setting is given as key=value, without dashes" if unknown[0].startswith("--") else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    asked.settings += rest  # settings behind an option, which argparse leaves over
    files = [Path(item) for item in asked.settings if "=" not in item]
    overrides = [item for item in asked.settings if "=" in item]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if asked.command == "train":
            _train(load(RunConfig, files, overrides), fresh=asked.fresh)
        elif asked.command == "sft":
            _sft(load(SFTConfig, files, overrides), fresh=asked.fresh)
        elif asked.command == "check-parity":
            _check_parity(load(RunConfig, files, overrides))
        elif asked.command == "plan":
            return _plan(parse_any(files, overrides), asked)
        elif asked.command == "scale":
            _scale(files, overrides, measure=asked.action == "run")
        elif asked.command == "dry-run":
            _dry_run(parse_any(files, overrides), asked)
        elif asked.command == "doctor":
            return _doctor(parse_any(files, overrides) if asked.settings else None, files, asked.cluster)
        else:
            config = load_any(files, overrides)
            if isinstance(config, RunConfig):
                _check_rule(config)
            _print(annotated(config, origins(files, overrides)) if asked.origins else dump(config))
    except ConfigError as error:
        return _fail(str(error), _USAGE_ERROR)
    except KeyboardInterrupt as interrupt:
        text = _told("interrupted", interrupt)
        failure = interrupt.__context__
        while isinstance(failure, KeyboardInterrupt):  # pressed again
            failure = failure.__context__
        if failure is not None:  # the run had failed, and was ending
            text += "\n" + _told(f"after {type(failure).__name__}: {failure}", failure)
        return _fail(text, _INTERRUPTED)
    except (RuntimeError, ValueError, OSError) as error:
        return _fail(_told(f"{type(error).__name__}: {error}", error), _FAILURE)
    return 0


def _train(config: RunConfig, *, fresh: bool) -> None:
    started = time.monotonic()
    _refuse_files(config.run_dir, fresh=fresh)
    _check_rule(config)
    stop = _Termination()
    signal.signal(signal.SIGTERM, stop)
    workers = {role: trainer.layout.world_size for role, trainer in config.trainers.items()}
    _say_starting(workers | {"engine": config.engine.count * config.engine.tensor}, config.run_dir)
    _say_room(config)
    _say_unsaved(config)
    from megatron_rl.assemble import open_run  # loads torch and Ray: only once the configuration is right
    from megatron_rl.ppo import train
    from megatron_rl.report import plot_curve, summary_table

    with open_run(config, stop) as run:
        _print(f"all of it is up after {time.monotonic() - started:.0f} s")
        if stop.asked:
            _print(f"stopped as asked before step {run.start_step + 1} of {config.steps}")
            return
        done = train(run)
    summary = _leave_summary(config, started, done)
    plot_curve(config.run_dir / "metrics.jsonl", config.run_dir / "curve.png")
    _print(summary_table(summary))
    written = ("summary.json", "curve.png", "metrics.jsonl", "samples.jsonl", "tensorboard", "checkpoints")
    _print(f"{config.run_dir} has {', '.join(name for name in written if (config.run_dir / name).exists())}")


def _leave_summary(config: RunConfig | SFTConfig, started: float, done: int) -> Mapping[str, Any]:
    """Write ``summary.json``, and say where the run stopped if that is after ``done`` steps, before its last one."""
    from megatron_rl.report import summarise

    summary = summarise(config.run_dir / "metrics.jsonl")
    summary |= {"steps": done, "seconds": round(time.monotonic() - started, 1)}  # a record may be lost, a step not
    if done < config.steps:
        summary["stopped_after_step"] = done
        _print(f"stopped as asked after step {done} of {config.steps}; the same command goes on from there")
    (config.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _refuse_files(run_dir: Path, *, fresh: bool) -> None:
    if fresh and run_dir.exists() and any(run_dir.iterdir()):
        raise ConfigError([f"run_dir: --fresh needs an empty folder, {run_dir} has files; name another one"])


def _check_rule(config: RunConfig) -> None:
    if config.reward.rule_may_be_elsewhere:
        return
    try:
        load_rule(config.reward.rule)
    except ValueError as error:
        raise ConfigError([f"reward.rule: {error}"]) from error


def _say_starting(workers: Mapping[str, int], run_dir: Path) -> None:
    listed = ", ".join(f"{name} x {count}" for name, count in workers.items())
    _print(f"starting Ray and {sum(workers.values())} workers ({listed}); what they print goes to {run_dir / 'logs'}")


def _say_room(config: RunConfig | SFTConfig) -> None:
    from megatron_rl.doctor.checks import disk_bytes, disk_line
    from megatron_rl.doctor.facts import room

    needed, there = disk_bytes(config, _sizes(config)), room(config.run_dir)
    say = _print if needed <= there else _warn
    say(disk_line(needed, there))


def _say_unsaved(config: RunConfig | SFTConfig) -> None:
    if config.checkpoint.every == 0 and config.steps >= _MANY_STEPS:
        _print(
            f"checkpoint.every is 0: nothing is saved before the last of {config.steps} steps, or a SIGTERM, and a run "
            "that fails before that is lost; checkpoint.every=N saves after every N steps"
        )


def _sft(config: SFTConfig, *, fresh: bool) -> None:
    started = time.monotonic()
    _refuse_files(config.run_dir, fresh=fresh)
    stop = _Termination()
    signal.signal(signal.SIGTERM, stop)
    _say_starting({"trainer": config.trainer.layout.world_size}, config.run_dir)
    _say_room(config)
    _say_unsaved(config)
    from megatron_rl.assemble import open_supervised
    from megatron_rl.sft import supervise

    with open_supervised(config, stop) as run:
        if stop.asked:
            _print(f"stopped as asked before step {run.start_step + 1} of {config.steps}")
            return
        done = supervise(run)
    _leave_summary(config, started, done)
    if done >= config.steps:
        _print(f"the model is in {config.output}")


def _check_parity(config: RunConfig) -> None:
    from megatron_rl.assemble import open_parity

    with open_parity(config, _print) as gate:
        gate()


def _plan(config: RunConfig | SFTConfig, asked: argparse.Namespace) -> int:
    from megatron_rl.planner.lengths import Lengths
    from megatron_rl.planner.report import report
    from megatron_rl.planner.search import limits

    prompt, response, dims = asked.prompt_tokens, asked.response_tokens, _sizes(config)
    longest = limits(config, dims)
    lengths = Lengths(
        prompt=longest.prompt / 4 if prompt is None else prompt,
        response=longest.response / 3 if response is None else response,
    )
    found = report(
        config,
        dims,
        device=asked.device,
        per_node=asked.gpus_per_node,
        nodes=asked.nodes,
        lengths=lengths,
        explain=asked.explain,
        host_gib=asked.host_gib,
    )
    _print(found.text)
    return 0 if found.can_run else _FAILURE


def _sizes(config: RunConfig | SFTConfig) -> ModelDims:
    """Of the model, whose folder needs no weights for this."""
    try:
        dims, problems = read_model_dims(config.model.path), weight_problems(config.model.path)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError([f"model.path: {error}"]) from error
    if problems:
        raise ConfigError([f"model.path: {problem}" for problem in problems])
    return dims


def _dry_run(config: RunConfig | SFTConfig, asked: argparse.Namespace) -> None:
    from megatron_rl.planner.memory import stage_parameters
    from megatron_rl.planner.search import head_of

    role = asked.role or next(iter(config.trainers))
    if role not in config.trainers:
        raise ConfigError([f"{role}: --role must be one of {', '.join(config.trainers)}"])
    if asked.row_tokens is not None and asked.row_tokens < 1:
        raise ConfigError([f"--row-tokens must be at least 1, got {asked.row_tokens}"])
    trainer, dims = config.trainers[role], _sizes(config)
    from megatron_rl.device import prepare_megatron

    prepare_megatron()
    warnings.filterwarnings("ignore", module=r"megatron\.")  # of kernels that a rank without memory never runs
    from megatron_rl.mcore.dry_run import dry_run

    head = head_of(role)
    found = dry_run(dims, trainer, head, asked.rank, config.model.dtype, asked.row_tokens)
    lines = [f"{role}, rank {asked.rank} of {trainer.layout.world_size} ({trainer.layout})"]
    lines += [f"  {name:16}{value:>22,}" for name, value in vars(found).items() if isinstance(value, int)]
    if found.uncounted:
        lines.append(f"  activations     not counted: {found.uncounted}")
    stages = stage_parameters(dims, trainer, head)
    lines.append("  parameters of each stage: " + ", ".join(f"{count:,}" for count in stages))
    _print("\n".join(lines))


def _doctor(config: RunConfig | SFTConfig | None, files: Sequence[Path], address: str | None) -> int:
    from megatron_rl.doctor.examine import examine

    if isinstance(config, RunConfig):
        _check_rule(config)
    cluster = ClusterConfig() if config is None else config.cluster
    report = examine(config, files, replace(cluster, address=address or cluster.address))
    _print(str(report))
    return report.status


def _scale(files: Sequence[Path], overrides: Sequence[str], *, measure: bool) -> None:
    from megatron_rl.planner.study import plot_study, read_study, study_rows, study_table

    if len(files) != 1:
        raise ConfigError([f"scale: takes one study, and settings for all its runs, got files: {[*map(str, files)]}"])
    study = read_study(files[0], overrides)
    rows = study_rows(study)  # all that is wrong with the settings of any run, before the first one starts
    failed: list[str] = []
    if measure:
        failed = _run_study(study, rows)
        rows = study_rows(study)
        study.folder.mkdir(parents=True, exist_ok=True)
        (study.folder / "study.md").write_text(study_table(rows))
        plot_study(rows, study.folder / "study.png")
    _print(study_table(rows))
    if failed:
        raise RuntimeError(f"runs of the study failed: {', '.join(failed)}; the same command tries them again")


def _run_study(study: Study, planned: Sequence[StudyRow]) -> list[str]:
    """Train what is not done yet, one run after the other, and name those that failed.

    Raises:
        ConfigError: a run cannot be started as it is; none was.
        RuntimeError: it was asked to stop.
    """
    from megatron_rl.planner.study import is_done

    asked = []
    for run, row in zip(study.runs, planned, strict=True):
        if is_done(study, run):
            continue  # the same command goes on where it stopped
        if row.problems:
            _warn(f"run {run.name} of the study is left out, it does not fit: {'; '.join(row.problems)}")
            continue
        try:
            _check_rule(load(RunConfig, study.recipe, study.settings(run)))
        except ConfigError as error:
            raise ConfigError([f"run {run.name}: {problem}" for problem in error.problems]) from error
        asked.append(run)
    failed = []
    for run in asked:
        command = [sys.executable, "-m", "megatron_rl", "train", *map(str, study.recipe), *study.settings(run)]
        status = run_command(command)
        if status and status != _INTERRUPTED:
            _warn(f"run {run.name} of the study failed with status {status}, others go on")
            failed.append(f"{run.name} (status {status})")
        elif not is_done(study, run):
            raise RuntimeError(f"run {run.name} of the study was asked to stop; the same command goes on from there")
    return failed


class _Termination:
    """What SIGTERM does to a run, and the loop asks: the first one lets it save and end, another ends it at once."""

    asked = False

    def __call__(self, signal_number: int, frame: Any) -> None:
        if self.asked:
            _interrupt(signal_number, frame)
        self.asked = True
        os.write(2, b"megatron-rl: asked to stop: finishing this step and saving it; again, or Ctrl-C, stops at once\n")


def _interrupt(_signal: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _told(text: str, error: BaseException) -> str:
    return "\n".join([text, *getattr(error, "__notes__", [])])


def _print(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()  # a pipe would show it at the end


def _fail(text: str, status: int) -> int:
    _warn(text)
    return status


def _warn(text: str) -> None:
    sys.stderr.write(f"megatron-rl: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
