"""Policy, reference, critic and engine as the loop knows them, each in front of a group of workers.

The verbs are those of ``mcore.worker.Worker`` and ``vllm_engine.engine.Engine``, which live in the workers' processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.batches import ExperienceBatch, Minibatch, TokenRows, merge_activations, merge_rows
from megatron_rl.checkpoints import Writing
from megatron_rl.config.limit import Limit
from megatron_rl.config.schema import SyncConfig
from megatron_rl.dataflow import Prompt, Rollout, Sampling
from megatron_rl.experience.packing import split_rows
from megatron_rl.interfaces import (
    MemoryUse,
    Pending,
    PushPhase,
    PushReceipt,
    SupervisedTokenLoss,
    TokenLoss,
    TrainerPart,
    UpdateResult,
    ValueLoss,
    results,
)
from megatron_rl.linear_formats import LinearFormat
from megatron_rl.ray_runtime.workers import GroupCall, WorkerGroup
from megatron_rl.weights.slices import SlicePlan
from megatron_rl.weights.transports import Transport, choose_transport

HELD_TYPES = (TokenRows, ExperienceBatch)
"""What model workers keep once they have got it."""
_POLL_S = 0.1


def _only(answers: list[Any]) -> Any:
    """The one answer among those of all ranks."""
    given = [answer for answer in answers if answer is not None]
    if len(given) != 1:
        raise ValueError(f"exactly one rank must report, got {len(given)} of {len(answers)}")
    return given[0]


def _most(uses: list[MemoryUse]) -> MemoryUse:
    return MemoryUse(
        planned_bytes=max(use.planned_bytes for use in uses), measured_bytes=max(use.measured_bytes for use in uses)
    )


def _merged(by_rank: list[list[LinearFormat]]) -> list[LinearFormat]:
    found: dict[str, LinearFormat] = {}
    for rank, formats in enumerate(by_rank):
        for linear in formats:
            before = found.setdefault(linear.weight, linear)
            if before != linear:
                raise RuntimeError(
                    f"ranks must agree on {linear.weight}: rank {rank} has {linear}, one before it {before}"
                )
    return list(found.values())


def _of_phase(deadline_s: float) -> Limit:
    return Limit(deadline_s, "sync.phase_deadline_s")


def _given(answers: list[Any]) -> list[Any]:
    return [answer for answer in answers if answer is not None]


@dataclass(frozen=True)
class RemoteTrainer:
    """What policy and critic have in common."""

    group: WorkerGroup

    def _scored(self, verb: str, batch: TokenRows, *args: Any, label: str | None = None) -> Pending[Tensor]:
        def finish(answers: list[Any]) -> Tensor:
            return merge_rows([answer for answer in answers if answer is not None], batch)

        return self.group.call(verb, batch, *args, finish=finish, label=label)

    def _updated(self, minibatch: Minibatch[Any], loss: object) -> Pending[UpdateResult]:
        return self.group.call("update", minibatch, loss, finish=_only)

    def activations(self, rows: TokenRows, packed: bool) -> Pending[Mapping[str, Tensor]]:
        """See :meth:`~megatron_rl.interfaces.ScoresTokens.activations`; each rank gives what it holds."""
        return self.group.call("activations", rows, packed, finish=lambda parts: merge_activations(_given(parts), rows))

    def tensors(self, prefixes: Sequence[str]) -> Pending[Mapping[str, Tensor]]:
        """See :meth:`~megatron_rl.interfaces.ScoresTokens.tensors`."""
        return self.group.call("tensors", tuple(prefixes), finish=_only)

    def linear_formats(self) -> Pending[list[LinearFormat]]:
        """How the linears inside the layers multiply, each told by the ranks that hold a part of it.

        Raises:
            RuntimeError: two ranks multiply a linear differently.
        """
        return self.group.call("formats", finish=_merged)

    def blind_ranks(self, file: Path) -> Pending[list[str]]:
        """Which ranks do not find a file that the driver has just made, such as ``policy rank 1 on node-2``."""

        def finish(seen: list[bool]) -> list[str]:
            ranks = [rank for rank, sees in enumerate(seen) if not sees]
            births = self.group.births(ranks) if ranks else []
            return [f"{self.group.names[rank]} on {birth.host}" for rank, birth in zip(ranks, births, strict=True)]

        return self.group.call("sees", file, finish=finish)

    def save(self, folder: Path) -> Pending[None]:
        """Copy model, optimizer and schedule, and start to write the copy to ``folder``."""
        return self.group.call("save", folder, finish=lambda _: None)

    def written(self) -> Writing:
        """What :meth:`save` started."""
        return self.group.call_beside("written", finish=lambda parts: {k: v for part in parts for k, v in part.items()})

    def load(self, folder: Path) -> Pending[None]:
        """Take up what :meth:`save` wrote."""
        return self.group.call("load", folder, finish=lambda _: None)

    def offload(self, parts: Sequence[TrainerPart]) -> Pending[MemoryUse]:
        """Move parts to host memory; what the rank with the most then uses."""
        return self.group.call("offload", tuple(parts), finish=_most)

    def onload(self, parts: Sequence[TrainerPart]) -> Pending[MemoryUse]:
        """Bring parts back; what the rank with the most then uses."""
        return self.group.call("onload", tuple(parts), finish=_most)

    def export_hf(self, folder: Path, like: Path) -> Pending[None]:
        """Write the weights as a Hugging Face folder; configuration and tokenizer come from ``like``."""
        return self.group.call("export_hf", folder, like, finish=lambda _: None)


class RemotePolicy(RemoteTrainer):
    """The policy: scores tokens, learns, and sends its weights."""

    def logprobs(self, batch: TokenRows, temperature: float | None = None, packed: bool = True) -> Pending[Tensor]:
        """[B, T] f32; at the temperature of training unless another is given, which is to compare models and is counted
        as ``compared_logprobs``.
        """
        label = None if temperature is None else "compared_logprobs"
        return self._scored("logprobs", batch, temperature, False, packed, label=label)

    def update(self, minibatch: Minibatch[Any], loss: TokenLoss | SupervisedTokenLoss) -> Pending[UpdateResult]:
        """One optimizer step."""
        return self._updated(minibatch, loss)

    def send(self, version: int, deadline_s: float) -> Pending[tuple[PushReceipt, ...]]:
        """Send the weights to the engines that joined."""
        return self.group.call("send", version, deadline_s, finish=_only, limit=_of_phase(deadline_s))

    def moved_bytes(self) -> Pending[dict[tuple[int | None, int | None], int]]:
        """What ranks give in each push, see :meth:`.TransferPlan.bytes_by_pair`."""
        return self.group.call("moved_bytes", finish=_only, ranks=[0])

    def slice_plan(self) -> Pending[SlicePlan]:
        """What the next push sends to each worker of an engine."""
        return self.group.call("slice_plan", finish=_only, ranks=[0])


class RemoteReference(RemoteTrainer):
    """The frozen copy of the first policy that the policy's workers keep."""

    def logprobs(self, batch: TokenRows) -> Pending[Tensor]:
        """[B, T] f32 at the temperature of training; counted apart from what the same workers do for the policy."""
        return self._scored("logprobs", batch, None, True, label="reference_logprobs")


class RemoteCritic(RemoteTrainer):
    """The critic."""

    def values(self, batch: TokenRows, packed: bool = True, through: Tensor | None = None) -> Pending[Tensor]:
        """[B, T] f32; through [h] instead of the value head where it is given."""
        return self._scored("values", batch, packed, through)

    def update(self, minibatch: Minibatch[ExperienceBatch], loss: ValueLoss) -> Pending[UpdateResult]:
        """One optimizer step."""
        return self._updated(minibatch, loss)


@dataclass(frozen=True)
class RemoteEngine:
    """The rollout engine, or several that share the work."""

    group: WorkerGroup

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        """One sample per prompt and seed, in order; several engines get prompts of about the same expected tokens."""
        costs = [
            len(of_prompt) * (len(prompt.token_ids) + sampling.max_tokens)
            for prompt, of_prompt in zip(prompts, seeds, strict=True)
        ]
        dealt = split_rows(costs, range(len(prompts)), len(self.group.names))
        pending = {
            rank: self.draw(rank, [prompts[row] for row in rows], sampling, [seeds[row] for row in rows])
            for rank, rows in enumerate(dealt)
            if rows
        }
        rollouts = {
            row: rollout
            for rank, drawn in results(pending).items()
            for row, rollout in zip(dealt[rank], drawn, strict=True)
        }
        return [rollouts[row] for row in range(len(prompts))]

    def draw(
        self, rank: int, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> Pending[list[Rollout]]:
        """One sample per prompt and seed, by one of the engines."""
        return self.group.call("generate", prompts, sampling, seeds, finish=_only, ranks=[rank])

    def sleep(self, keep_weights: bool) -> Pending[MemoryUse]:
        """Free the device memory of every engine; what the one with the most then uses."""
        return self.group.call("sleep", keep_weights, finish=_most)

    def wake(self, weights: bool, cache: bool) -> Pending[MemoryUse]:
        """Get it back; what the engine with the most then uses."""
        return self.group.call("wake", weights, cache, finish=_most)

    def advance(self, phase: PushPhase, version: int, deadline_s: float) -> Pending[tuple[PushReceipt, ...] | None]:
        """Take every engine through the next phase of a push; all must have received the same."""

        def finish(receipts: list[tuple[PushReceipt, ...] | None]) -> tuple[PushReceipt, ...] | None:
            if any(receipt != receipts[0] for receipt in receipts):
                raise ValueError(f"version {version}: all engines must receive the same, got {receipts}")
            return receipts[0]

        return self.group.call("advance", phase, version, deadline_s, finish=finish, limit=_of_phase(deadline_s))

    def score(self, rows: Sequence[Sequence[int]]) -> Pending[list[list[list[float]]]]:
        """By each engine, for each row: log-prob of each token given those before it, at temperature 1."""
        return self.group.call("score", rows, finish=list)

    def logprobs(self, rows: TokenRows) -> Pending[Tensor]:
        """[B, T] f32 log-probs of the response tokens at temperature 1, 0 elsewhere; by the first of several engines.

        The probe of a push has compared the others with it.
        """

        def finish(answers: list[Any]) -> Tensor:
            found = torch.zeros(rows.tokens.shape)
            for row, scores in enumerate(_only(answers)):
                found[row, : len(scores)] = torch.tensor(scores)
            return found * rows.response_mask

        return self.group.call("score", _token_lists(rows), finish=finish, ranks=[0])

    def activations(self, rows: TokenRows) -> Pending[Mapping[str, Tensor]]:
        """See :meth:`~megatron_rl.interfaces.ScoresTokens.activations`; of the first engine."""
        return self.group.call("activations", _token_lists(rows), finish=_only, ranks=[0])

    def tensors(self, prefixes: Sequence[str]) -> Pending[Mapping[str, Tensor]]:
        """See :meth:`~megatron_rl.interfaces.ScoresTokens.tensors`; of the first engine."""
        return self.group.call("tensors", tuple(prefixes), finish=_only, ranks=[0])

    def linear_formats(self) -> Pending[list[list[LinearFormat]]]:
        """By each engine: how its linears multiply."""
        return self.group.call("linear_formats", finish=list)


@dataclass(frozen=True, kw_only=True)
class PolicyScorer:
    """The policy as the parity gate sees it; unpacked, each row is computed by itself."""

    policy: RemotePolicy
    packed: bool

    @property
    def name(self) -> str:
        """For messages."""
        return "policy" if self.packed else "policy unpacked"

    def score(self, rows: TokenRows) -> Pending[Tensor]:
        """Log-probs at temperature 1."""
        return self.policy.logprobs(rows, 1.0, self.packed)

    def activations(self, rows: TokenRows) -> Pending[Mapping[str, Tensor]]:
        """By place."""
        return self.policy.activations(rows, self.packed)

    def tensors(self, prefixes: Sequence[str]) -> Pending[Mapping[str, Tensor]]:
        """By name."""
        return self.policy.tensors(prefixes)


@dataclass(frozen=True, kw_only=True)
class CriticScorer:
    """The critic as the parity gate sees it, its values read ``through`` [h] where that is given."""

    critic: RemoteCritic
    packed: bool
    through: Tensor | None

    @property
    def name(self) -> str:
        """For messages."""
        return "critic" if self.packed else "critic unpacked"

    def score(self, rows: TokenRows) -> Pending[Tensor]:
        """Values."""
        return self.critic.values(rows, self.packed, self.through)

    def activations(self, rows: TokenRows) -> Pending[Mapping[str, Tensor]]:
        """By place."""
        return self.critic.activations(rows, self.packed)

    def tensors(self, prefixes: Sequence[str]) -> Pending[Mapping[str, Tensor]]:
        """By name."""
        return self.critic.tensors(prefixes)


@dataclass(frozen=True)
class EngineScorer:
    """The engine as the parity gate sees it."""

    engine: RemoteEngine
    name: str = "engine"

    def score(self, rows: TokenRows) -> Pending[Tensor]:
        """Log-probs at temperature 1."""
        return self.engine.logprobs(rows)

    def activations(self, rows: TokenRows) -> Pending[Mapping[str, Tensor]]:
        """By place."""
        return self.engine.activations(rows)

    def tensors(self, prefixes: Sequence[str]) -> Pending[Mapping[str, Tensor]]:
        """By name."""
        return self.engine.tensors(prefixes)


def _token_lists(rows: TokenRows) -> list[list[int]]:
    return [tokens[:length] for tokens, length in zip(rows.tokens.tolist(), rows.lengths.tolist(), strict=True)]


def connect(
    policy: RemotePolicy,
    engine: RemoteEngine,
    sync: SyncConfig,
    *,
    tensor: int,
    cuda: bool,
    shared: bool,
    pushed_format: str | None,
    timeout_s: float,
) -> Transport:
    """Open the channel that weights are pushed through, from the policy's rank 0 to all workers of all engines.

    Args:
        policy: sends.
        engine: receives.
        sync: buckets and their deadline.
        tensor: workers of each engine.
        cuda: whether weights live on GPUs.
        shared: whether an engine may have the GPU of the policy's rank 0.
        pushed_format: what the policy quantises linears to before it sends them; None: nothing.
        timeout_s: bound on an engine's joining.

    Returns:
        how weights will travel: the fastest way that the places of the roles allow.
    """
    sender, hosts = policy.group.births()[0], [birth.host for birth in engine.group.births()]
    transport = choose_transport(sender.host, hosts, cuda=cuda, shared=shared)
    address, port = policy.group.call("listen", sender.address, finish=_only, ranks=[0]).result()
    world = 1 + tensor * len(hosts)
    opening = policy.group.call(
        "open_channel",
        world,
        sync.bucket_deadline_s,
        transport,
        sync.bucket_mib << 20,
        tensor,
        pushed_format,
        finish=lambda _: None,
    )
    joining = [
        engine.group.call(
            "join", address, port, 1 + tensor * index, world, timeout_s, finish=lambda _: None, ranks=[index]
        )
        for index in range(len(hosts))
    ]
    _wait_for_all([opening, *joining])
    return transport


def _wait_for_all(calls: Sequence[GroupCall[None]]) -> None:
    """Why not one after the other: where one end fails, the other waits for it in vain, and would tell only that."""
    waiting = list(calls)
    while waiting:
        for call in [call for call in waiting if call.ready(_POLL_S)]:
            call.result()
            waiting.remove(call)
