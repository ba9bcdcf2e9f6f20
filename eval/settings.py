"""The options of an evaluation: where their defaults come from, and what they may be."""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from eval.tasks import TASKS, BadInput
from megatron_rl.config.schema import LOWEST_TEMPERATURE, ClusterConfig, EngineConfig, RewardConfig
from megatron_rl.dataflow import Sampling
from megatron_rl.rewards.structure import Leniency

_PROTOCOL_NAMES = ("tasks", "template", "samples", "temperature", "top_p", "max_tokens", "stop", "seed", "rule")
PROTOCOL = Path(__file__).with_name("seed_protocol.toml")


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
    relative_tolerance: Mapping[str, float]
    factor_100: tuple[str, ...]
    output: Path | None
    dtype: str | None
    engines: int
    tensor: int
    quantization: Literal["none", "fp8_per_channel", "fp8_per_tensor", "fp8_per_block"]
    kv_cache_mib: int
    kv_cache_dtype: Literal["auto", "fp8"]
    max_concurrent: int
    call_deadline_s: float
    reward_workers: int
    timeout_s: float
    wall_timeout_s: float
    start_timeout_s: float
    memory_gib: float
    max_error_rate: float

    def leniency(self, task: str) -> Leniency:
        """What is forgiven in the numbers of a task."""
        return Leniency(relative=self.relative_tolerance.get(task, 0.0), factor_100=task in self.factor_100)

    def check_lenient_tasks(self, tasks: Collection[str]) -> None:
        """See that leniency is for tasks that are there.

        Raises:
            BadInput: it is for another one.
        """
        for option, names in (("relative-tolerance", self.relative_tolerance), ("factor-100", self.factor_100)):
            if unknown := [name for name in names if name not in tasks]:
                raise BadInput(
                    f"--{option} must name tasks of this evaluation ({', '.join(tasks)}), got {unknown[0]!r}"
                )

    @property
    def engine(self) -> EngineConfig:
        """What engines are asked for."""
        return EngineConfig(
            count=self.engines,
            tensor=self.tensor,
            quantization=self.quantization,
            kv_cache_mib=self.kv_cache_mib,
            kv_cache_dtype=self.kv_cache_dtype,
            max_concurrent=self.max_concurrent,
        )

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
    keys = _protocol_keys(protocol, parser)
    lists = _protocol_lists(protocol, keys, parser)
    parser.set_defaults(**lists)  # as they are: text would be split again
    words = [f"--{key}={value}" for key, value in keys.items() if key.replace("-", "_") not in lists]
    given = vars(parser.parse_args([*words, *arguments]))
    del given["protocol"]
    if missing := [name for name in _PROTOCOL_NAMES if given[name] is None]:
        options = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise BadInput(
            f"every option of the protocol needs a value, {protocol} and the command line give none for {options}"
        )
    settings = Settings(**given)
    sources = [settings.model, settings.run, settings.rescore, settings.gold_oracle or None]
    if sum(source is not None for source in sources) != 1:
        raise BadInput("exactly one of --model, --run, --rescore and --gold-oracle must say what is evaluated")
    if 0 < settings.temperature < LOWEST_TEMPERATURE:
        raise BadInput(
            f"--temperature must be 0 (greedy) or at least {LOWEST_TEMPERATURE}, the engine's lowest, got "
            f"{settings.temperature}"
        )
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
    what.add_argument(
        "--model", type=Path, help="Hugging Face folder, Megatron checkpoint, or a run's checkpoints/step_N"
    )
    what.add_argument("--run", type=Path, help="run_dir of a training run: every checkpoint, those done are skipped")
    what.add_argument("--rescore", type=Path, metavar="SAMPLES.jsonl", help="grade these responses again, no engine")
    what.add_argument("--gold-oracle", action="store_true", help="grade each reference answer against itself")
    asked = parser.add_argument_group("protocol (defaults: --protocol)")
    asked.add_argument("--protocol", type=Path, default=PROTOCOL, metavar="FILE.toml", help="defaults of this group")
    asked.add_argument("--tasks", type=_words, help=f"of {', '.join(TASKS)}, or .jsonl files; separated by commas")
    asked.add_argument("--template", help="a name, 'chat', or a file with {question}")
    asked.add_argument("--samples", type=_positive, help="per problem")
    asked.add_argument("--temperature", type=_not_negative, help="0 is greedy, else at least 0.01")
    asked.add_argument("--top-p", type=_probability)
    asked.add_argument("--max-tokens", type=_positive, help="of a response")
    asked.add_argument(
        "--stop",
        type=_words,
        help="strings that end a response, separated by commas; one with a comma needs a list in a protocol",
    )
    asked.add_argument("--seed", type=_seed, help="of sampling and bootstrap")
    asked.add_argument("--rule", help="reward rule that decides what is right")
    asked.add_argument(
        "--relative-tolerance",
        type=_tolerances,
        default={},
        metavar="TASK=TOLERANCE,...",
        help="accept numbers within TOLERANCE x |gold| of the gold answer",
    )
    asked.add_argument(
        "--factor-100", type=_words, default=(), metavar="TASK,...", help="accept 100 x gold and gold / 100"
    )
    machine = parser.add_argument_group("where and how")
    machine.add_argument("--data", type=Path, help="folder of the named problem sets, NAME/test.jsonl")
    machine.add_argument("--limit", type=_positive, help="first problems of each task only")
    machine.add_argument("--output", type=Path, help="folder (default: runs/eval/MODEL, RUN/eval, or beside SAMPLES)")
    machine.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: the model's)")
    machine.add_argument("--engines", type=_positive, default=1, help="how many run side by side")
    engine, reward = EngineConfig(), RewardConfig()
    machine.add_argument("--tensor", type=_positive, default=engine.tensor, help="GPUs of each engine")
    for name in ("quantization", "kv_cache_dtype"):
        machine.add_argument(
            "--" + name.replace("_", "-"),
            choices=get_args(get_type_hints(EngineConfig)[name]),
            default=getattr(engine, name),
            help=f"as engine.{name} of a run",
        )
    machine.add_argument("--kv-cache-mib", type=_positive, default=engine.kv_cache_mib, help="on each GPU")
    machine.add_argument("--max-concurrent", type=_positive, default=engine.max_concurrent, help="of each engine")
    machine.add_argument(
        "--call-deadline-s",
        type=_positive_float,
        default=ClusterConfig().call_deadline_s,
        help="for an engine to draw one part of the samples, after which they are on the disk",
    )
    machine.add_argument("--reward-workers", type=_positive, default=reward.workers, help="processes that grade")
    machine.add_argument(
        "--timeout-s", type=_positive_float, default=reward.timeout_s, help="CPU seconds to grade a response"
    )
    machine.add_argument(
        "--wall-timeout-s",
        type=_positive_float,
        default=reward.wall_timeout_s,
        help="the same by the clock, for a rule that waits",
    )
    machine.add_argument(
        "--start-timeout-s",
        type=_positive_float,
        default=reward.start_timeout_s,
        help="for a process that grades to start and to load the rule",
    )
    machine.add_argument(
        "--memory-gib",
        type=_memory,
        default=reward.memory_gib,
        help="limit of the address space of a process that grades; 0: none",
    )
    machine.add_argument(
        "--max-error-rate",
        type=_share,
        default=reward.max_error_rate,
        help="of a task's samples, whose grading may fail; time-outs do not count",
    )
    return parser


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _tolerances(text: str) -> dict[str, float]:
    pairs = [word.rpartition("=") for word in _words(text)]
    if not all(task for task, _, _ in pairs):
        raise argparse.ArgumentTypeError(f"must be TASK=TOLERANCE,... such as minerva_math=0.01, got {text!r}")
    return {task: float(_bounded(float, tolerance, 0, 1, open_low=True)) for task, _, tolerance in pairs}


def _bounded(kind: type[int] | type[float], text: str, low: float, high: float, *, open_low: bool) -> Any:
    value = kind(text)
    if not (low < value <= high if open_low else low <= value <= high):
        raise argparse.ArgumentTypeError(f"must be {'above' if open_low else 'at least'} {low:g}, at most {high:g}")
    return value


def _positive(text: str) -> int:
    return int(_bounded(int, text, 0, 1 << 31, open_low=True))


def _seed(text: str) -> int:
    return int(_bounded(int, text, 0, (1 << 63) - 1, open_low=False))


def _positive_float(text: str) -> float:
    return float(_bounded(float, text, 0, 1e9, open_low=True))


def _not_negative(text: str) -> float:
    return float(_bounded(float, text, 0, 100, open_low=False))


def _memory(text: str) -> float:
    return float(_bounded(float, text, 0, 1e6, open_low=False))


def _share(text: str) -> float:
    return float(_bounded(float, text, 0, 1, open_low=False))


def _probability(text: str) -> float:
    return float(_bounded(float, text, 0, 1, open_low=True))


def _protocol_keys(file: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What a protocol says, by option."""
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
    return keys


def _protocol_lists(file: Path, keys: Mapping[str, Any], parser: argparse.ArgumentParser) -> dict[str, tuple[str, ...]]:
    """The lists of a protocol, by attribute."""
    allowed = {action.dest for action in parser._actions if action.type is _words}
    lists = {}
    for key, value in keys.items():
        if not isinstance(value, list):
            continue
        if key.replace("-", "_") not in allowed:
            raise BadInput(f"--protocol {file}: {key} must be one value, got the list {value}")
        if not all(isinstance(word, str) and word for word in value):
            raise BadInput(f"--protocol {file}: {key} must be a list of strings that are not empty, got {value}")
        lists[key.replace("-", "_")] = tuple(value)
    return lists
