"""Pools of reward workers on the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.dataflow import Finish, Outcome, Score
from megatron_rl.interfaces import results
from megatron_rl.ray_runtime.workers import WorkerGroup


@dataclass(frozen=True)
class RemoteRewards:
    """Scores samples as one :class:`~megatron_rl.rewards.service.RewardService` does, with the pools of a group.

    Attributes:
        group: each of its workers is a reward service.
    """

    group: WorkerGroup

    def score(self, requests: Sequence[tuple[str, str, Finish]]) -> list[Score]:
        """One score per ``(response text, answer, finish)``, in order. Every pool gets an equal share, and neighbours,
        which are samples of one prompt and take alike, go to different ones.

        Raises:
            WorkerDied, WorkerFailed, DeadlineExceeded: a pool did not answer.
        """
        pools = len(self.group.names)
        pending = {
            pool: self.group.call("score", list(requests[pool::pools]), finish=lambda answers: answers[0], ranks=[pool])
            for pool in range(min(pools, len(requests)))
        }
        scores: list[Score] = [Score(value=0.0, outcome=Outcome.ERROR)] * len(requests)
        for pool, found in results(pending).items():
            scores[pool::pools] = found
        return scores

    def take_busy_seconds(self) -> float:
        """Wall seconds that the workers of all pools together spent on samples since this was last asked."""
        return self.group.call("take_busy_seconds", finish=sum).result()
