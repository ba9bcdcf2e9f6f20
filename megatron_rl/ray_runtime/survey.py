"""Asking every node of a running cluster the same question."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatron_rl.config.schema import ClusterConfig
from megatron_rl.ray_runtime.cluster import Cluster

T = TypeVar("T")
_CLOCK_READINGS = 3


@dataclass(frozen=True, kw_only=True)
class Answer(Generic[T]):
    """What one node said.

    Attributes:
        host: its name.
        value: the answer.
        resources: that the node gives to the cluster, by kind, such as GPU.
        asked: when it was asked for its clock: our clock, seconds since 1970.
        clock: its own clock.
        answered: when that was known here: our clock.
    """

    host: str
    value: T
    resources: Mapping[str, float]
    asked: float
    clock: float
    answered: float


@dataclass(frozen=True, kw_only=True)
class NoAnswer:
    """A node that did not say anything in time, or could not; ``reason`` is Ray's."""

    host: str
    reason: str


def ask_nodes(
    config: ClusterConfig, question: Callable[[], T], *, deadline_s: float = 180.0
) -> list[Answer[T] | NoAnswer]:
    """The answers of all live nodes, in any order; asked all at the same time, and not counted as work.

    Args:
        config: which cluster; its address must be set.
        question: picklable; the node must have what it needs.
        deadline_s: for all of them together.

    Raises:
        ClusterProblem: the cluster cannot be joined.
    """
    with Cluster(config, gpus=0, run_dir=Path()):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        asked = [(node, _on(node, question)) for node in nodes]
        end = time.monotonic() + deadline_s
        return [_answer(node, reference, end) for node, reference in asked]


def _on(node: dict[str, Any], question: Callable[[], Any]) -> Any:
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(_ask).options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote(question)


def _ask(question: Callable[[], Any]) -> Any:
    return question()


def _answer(node: dict[str, Any], reference: Any, end: float) -> Answer[Any] | NoAnswer:
    host = str(node["NodeManagerHostname"])
    try:
        value = ray.get(reference, timeout=max(0.0, end - time.monotonic()))
        # the process that answered waits for more, so the next answers are quick: the quickest says most
        asked, clock, answered = min(_clock_readings(node, end), key=lambda reading: reading[2] - reading[0])
    except ray.exceptions.RayError as error:
        return NoAnswer(host=host, reason=str(error).strip().splitlines()[-1])
    resources: Mapping[str, float] = node["Resources"]
    return Answer(host=host, value=value, resources=resources, asked=asked, clock=clock, answered=answered)


def _clock_readings(node: dict[str, Any], end: float) -> Iterator[tuple[float, float, float]]:
    for _ in range(_CLOCK_READINGS):
        asked = time.time()
        clock = ray.get(_on(node, time.time), timeout=max(0.0, end - time.monotonic()))
        yield asked, clock, time.time()
