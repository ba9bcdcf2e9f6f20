"""Which checks there are, what each needs, and what came of it. Pure: what is measured stands in ``measure.py``,
``trainings.py``, ``planned.py`` and ``steps.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from typing import Any, Literal

from megatron_rl.config.schema import ClusterConfig, EngineConfig, TrainerConfig

PARTS = {  # package to import -> how it is named
    "megatron": "megatron-core",
    "transformer_engine": "Transformer Engine",
    "triton": "Triton",
    "vllm": "vLLM",
}
_FOR_GPUS = {"triton", "transformer_engine"}
FEATURES: Mapping[str, tuple[type[Any], str]] = {
    "fp8": (TrainerConfig, "fp8"),
    "engine_fp8": (EngineConfig, "quantization"),
    "colocation": (ClusterConfig, "colocate"),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One process.

    Attributes:
        name: for ``--only``; its function has the same.
        about: for people.
        planned_s: it should take no longer; what is left of a command's time is divided as these are.
        parts: packages without which it is left out.
        features: settings that this version must have, else the check fails.
        colocated_features: the same where roles share one GPU.
        gpus: fewer leave it out.
        cpu: whether it runs, in a small form, without a GPU.
    """

    name: str
    about: str
    planned_s: float
    parts: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    colocated_features: tuple[str, ...] = ()
    gpus: int = 1
    cpu: bool = True


CHECKS = (
    Check(name="ceilings", about="products, copies: what the floors are made of", planned_s=25),
    Check(name="logprobs", about="log-probs and entropy from hidden states", planned_s=60, parts=("triton",)),
    Check(name="attention", about="packed causal attention", planned_s=25, parts=("megatron",)),
    Check(name="training", about="training step in bfloat16", planned_s=80, parts=("megatron",)),
    Check(
        name="training_fp8",
        about="training step in FP8 beside bfloat16",
        planned_s=105,
        parts=("megatron", "transformer_engine"),
        features=("fp8",),
    ),
    Check(
        name="plans",
        about="what the planner says of an update beside what it takes",
        planned_s=45,
        parts=("megatron", "triton"),
    ),
    Check(
        name="ppo",
        about="whole PPO steps: push, sleep and wake, gap between trainer and engine",
        planned_s=130,
        parts=("megatron", "vllm"),
        colocated_features=("colocation",),
    ),
    Check(
        name="ppo_fp8",
        about="the same with trainer and engine in FP8",
        planned_s=130,
        parts=("megatron", "transformer_engine", "vllm"),
        features=("fp8", "engine_fp8"),
        colocated_features=("colocation",),
        cpu=False,
    ),
    Check(
        name="layouts",
        about="policy and critic at TP2, PP2 and TP2xPP2 beside one rank",
        planned_s=120,
        parts=("megatron",),
        gpus=2,
    ),
    Check(
        name="layouts_fp8",
        about="the same in FP8, with and without FP8 parameters",
        planned_s=240,
        parts=("megatron", "transformer_engine"),
        features=("fp8",),
        gpus=2,
        cpu=False,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure; ``goal`` says what it should be, ``met`` whether it is."""

    what: str
    value: float
    unit: str
    goal: str = ""
    met: bool | None = None


Status = Literal["passed", "missed", "failed", "overrun", "skipped", "running"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one check; ``missed``: it ran, and a goal was not met. One that ``failed``, is ``running`` or was
    ended at its deadline (``overrun``) has the figures that it gave until then.
    """

    check: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    rows: tuple[Row, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measured(check: str, rows: Collection[Row], seconds: float) -> Result:
    """Of a check that came to its end."""
    if not rows:
        return Result(check=check, status="failed", reason="measured nothing", seconds=seconds)
    missed = [row.what for row in rows if row.met is False]
    reason = "" if not missed else "goal not met: " + ", ".join(missed)
    return Result(
        check=check, status="missed" if missed else "passed", reason=reason, seconds=seconds, rows=tuple(rows)
    )


def deadline_s(check: Check, later: Collection[Check], left_s: float) -> float:
    """Of ``left_s`` of a command, what ``check`` may take at most, so that its ``later`` ones get their part.

    What a check leaves of its time is the others'; one that is left alone gets all.
    """
    return left_s * check.planned_s / (check.planned_s + sum(other.planned_s for other in later))


def present_parts() -> set[str]:
    """Packages that are installed, whether they load or not."""
    return {name for name in PARTS if find_spec(name) is not None}


def present_features() -> set[str]:
    """Settings that this version has."""
    return {name for name, (section, key) in FEATURES.items() if key in {field.name for field in fields(section)}}


def refusal(
    check: Check, *, gpus: int, asked_gpus: int, parts: Collection[str], features: Collection[str]
) -> Result | None:
    """Why a check is not run; None: it is.

    Args:
        check: which.
        gpus: on this machine; 0 is the small form on a CPU.
        asked_gpus: of ``--gpus``.
        parts: installed packages.
        features: settings of this version.
    """
    if not gpus and not check.cpu:
        return Result(check=check.name, status="skipped", reason="needs a GPU")
    if asked_gpus < check.gpus:
        return Result(check=check.name, status="skipped", reason=f"needs --gpus {check.gpus} or more")
    missing = [PARTS[part] for part in check.parts if part not in parts and (gpus or part not in _FOR_GPUS)]
    if missing:
        return Result(check=check.name, status="skipped", reason="not installed: " + ", ".join(missing))
    wanted = check.features + (check.colocated_features if 0 < gpus < 3 else ())
    absent = [".".join((FEATURES[name][0].__name__, FEATURES[name][1])) for name in wanted if name not in features]
    if absent:
        return Result(check=check.name, status="failed", reason="not in this build: " + ", ".join(absent))
    return None
