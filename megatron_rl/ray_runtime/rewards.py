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
        group: each of its workers is a reward service that never stops for its error rate.
        max_error_rate: the largest share of a call's samples whose rule may fail; time-outs do not count.
    """

    group: WorkerGroup
    max_error_rate: float

    def score(self, requests: Sequence[tuple[str, str, Finish]]) -> list[Score]:
        """One score per ``(response text, answer, finish)``, in order. Every pool gets an equal share, and neighbours,
        which are samples of one prompt and take alike, go to different ones.

        Raises:
            RuntimeError: the rule failed on too large a share of the samples.
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
        errors = sum(score.outcome is Outcome.ERROR for score in scores)
        if errors > self.max_error_rate * len(scores):
            raise RuntimeError(
                f"{errors} of {len(scores)} samples could not be scored, at most max_error_rate="
                f"{self.max_error_rate:g} of them may fail; the logs of {', '.join(self.group.names)} have the first "
                "ones. Correct the reward rule, or raise the limit"
            )
        return scores

    def take_busy_seconds(self) -> float:
        """Wall seconds that the workers of all pools together spent on samples since this was last asked."""
        return self.group.call("take_busy_seconds", finish=sum).result()
