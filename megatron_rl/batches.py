"""Tensors, ready to compute: what the stages of the loop hand on once samples have become arrays.

Every per-token tensor is aligned with ``tokens``: index ``t`` speaks of token ``t`` (the log-prob of emitting it, the
value of the state just before it, the reward received for it). ``B`` rows (samples), ``T`` padded length, ``N`` tokens
of a packed micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor


def _check(owner: object, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value: Tensor = getattr(owner, name)
    if tuple(value.shape) != shape or value.dtype != dtype:
        raise ValueError(
            f"{type(owner).__name__}.{name} must be {dtype} of shape {shape}, got {value.dtype} of {tuple(value.shape)}"
        )


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Right-padded rows of tokens.

    Attributes:
        tokens: [B, T] int64, prompt then response.
        lengths: [B] int64, tokens of each row without padding.
        response_mask: [B, T] bool, the tokens a loss or a reward speaks of; never derived from pad ids.
    """

    tokens: Tensor
    lengths: Tensor
    response_mask: Tensor

    def __post_init__(self) -> None:
        """Check shapes and types, and that no row's response leaves the row."""
        shape = tuple(self.tokens.shape)
        _check(self, "tokens", shape, torch.int64)
        _check(self, "lengths", shape[:1], torch.int64)
        _check(self, "response_mask", shape, torch.bool)
        outside = torch.arange(shape[1]) >= self.lengths[:, None]
        if bool((self.response_mask & outside).any()) or bool(self.response_mask[:, 0].any()):
            raise ValueError("response_mask must lie inside each row and leave out its first token")

    @property
    def rows(self) -> int:
        """B."""
        return self.tokens.shape[0]


@dataclass(frozen=True, kw_only=True)
class RolloutBatch(TokenRows):
    """Scored samples as arrays.

    Attributes:
        rollout_logprobs: [B, T] f32, by the engine that sampled; 0 outside ``sampled_mask``.
        sampled_mask: [B, T] bool, response tokens that the engine drew (a forced end of sequence is not).
        scores: [B] f32, what the reward rule gave.
        truncated: [B] bool, the response limit cut the sample (its finish, whatever its last token is).
        group: [B] int64, which prompt of the step the row answers.
        policy_version: version of the weights that sampled all rows.
    """

    rollout_logprobs: Tensor
    sampled_mask: Tensor
    scores: Tensor
    truncated: Tensor
    group: Tensor
    policy_version: int

    def __post_init__(self) -> None:
        """Check shapes and types."""
        super().__post_init__()
        shape = tuple(self.tokens.shape)
        _check(self, "rollout_logprobs", shape, torch.float32)
        _check(self, "sampled_mask", shape, torch.bool)
        _check(self, "scores", shape[:1], torch.float32)
        _check(self, "truncated", shape[:1], torch.bool)
        _check(self, "group", shape[:1], torch.int64)


@dataclass(frozen=True, kw_only=True)
class ExperienceBatch:
    """A rollout batch with everything the losses train on; each tensor [B, T] f32, 0 outside the response.

    Attributes:
        rollouts: the batch it was built from.
        old_logprobs: by the trainer before the update (not by the engine).
        ref_logprobs: by the frozen reference; None where none is kept (no KL term).
        values: by the critic before the update; None without a critic.
        rewards: per token, after the KL penalty.
        advantages: what the policy learns from.
        returns: what the critic learns; None without a critic.
    """

    rollouts: RolloutBatch
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    values: Tensor | None
    rewards: Tensor
    advantages: Tensor
    returns: Tensor | None

    def __post_init__(self) -> None:
        """Check shapes and types, and that a critic's values and targets come together."""
        shape = tuple(self.rollouts.tokens.shape)
        optional = [name for name in ("ref_logprobs", "values", "returns") if getattr(self, name) is not None]
        for name in ("old_logprobs", "rewards", "advantages", *optional):
            _check(self, name, shape, torch.float32)
        if (self.values is None) != (self.returns is None):
            raise ValueError(
                "a critic's values and its targets come together or not at all, got only the "
                f"{'targets' if self.values is None else 'values'}: the advantage estimator must fit the critic"
            )


Rows = TypeVar("Rows", ExperienceBatch, TokenRows)


@dataclass(frozen=True, kw_only=True)
class Minibatch(Generic[Rows]):
    """The rows of one optimizer step.

    Attributes:
        source: the batch the rows belong to.
        rows: [b] int64 indices into it.
        loss_weight: [b, T] f32. The loss is sum(loss_weight x term) / (loss tokens of all b rows): 1 everywhere is the
            mean over tokens; every other average is a weight.
    """

    source: Rows
    rows: Tensor
    loss_weight: Tensor

    def __post_init__(self) -> None:
        """Check shapes, types and that the rows exist."""
        token_rows = rows_of(self.source)
        _check(self, "rows", tuple(self.rows.shape), torch.int64)
        _check(self, "loss_weight", (len(self.rows), token_rows.tokens.shape[1]), torch.float32)
        if len(self.rows) == 0 or int(self.rows.max()) >= token_rows.rows:
            raise ValueError(f"a minibatch needs rows in [0, {token_rows.rows}), got {self.rows.tolist()[:8]}")


def rows_of(source: ExperienceBatch | TokenRows) -> TokenRows:
    """The token rows that a batch speaks of."""
    return source.rollouts if isinstance(source, ExperienceBatch) else source


def _as_it_is(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """Rows laid end to end without padding between them, and shifted once: position ``i`` reads ``inputs[i]`` and
    speaks of ``targets[i]``, the token that follows it in its row. A row of L tokens takes L - 1 positions.

    Attributes:
        inputs, targets, positions: [N] int64.
        cu_seqlens: [S + 1] int32, where each row starts; the last entry is N.
        max_length: positions of the longest row.
        loss_mask: [N] bool, the target is a response token.
        loss_weight: [N] f32, 0 outside ``loss_mask``.
        parts: ranks that share the rows; each holds as many positions of a row as the others, N / ``parts`` of all, and
            ``cu_seqlens`` bounds whole rows still.
        over_parts: adds up over those ranks, without a gradient, what each has computed of its part.
    """

    inputs: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_length: int
    loss_mask: Tensor
    loss_weight: Tensor
    parts: int = 1
    over_parts: Callable[[Tensor], Tensor] = _as_it_is


@dataclass(frozen=True, kw_only=True)
class MicroBatch(PackedTokens):
    """Packed tokens with the experience of each target; every tensor [N] f32, 0 outside ``loss_mask``.

    ``sampled_mask`` [N] bool: the engine drew the target (a forced end of sequence is a loss token that it did not).
    """

    sampled_mask: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    values: Tensor | None
    advantages: Tensor
    returns: Tensor | None


@dataclass(frozen=True, kw_only=True)
class TokenOutputs:
    """What the policy says of each target: log-prob and entropy (nats), [N] f32, already whole across tensor ranks."""

    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True, kw_only=True)
class ValueOutputs:
    """What the critic says of the state before each target, [N] f32."""

    values: Tensor


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """A loss before it is divided.

    Attributes:
        total: scalar, the SUM over loss tokens of ``loss_weight`` x term. Whoever runs the optimizer divides it once
            by the number of loss tokens of the whole step, so the result is the same for any split.
        metrics: detached sums over loss tokens, to be divided by the same number.
    """

    total: Tensor
    metrics: Mapping[str, Tensor]


def merge_rows(parts: Iterable[tuple[Tensor, Tensor]], like: TokenRows) -> Tensor:
    """Put what several workers computed of their rows together.

    Args:
        parts: (row indices [b], values [b, T]) of each worker.
        like: the batch the rows belong to.

    Returns:
        [B, T] f32.

    Raises:
        ValueError: a row is missing or was computed twice.
    """
    merged, seen = torch.zeros(like.tokens.shape), torch.zeros(like.rows, dtype=torch.int64)
    for rows, values in parts:
        merged[rows] = values
        seen[rows] += 1
    if bool((seen != 1).any()):
        raise ValueError(f"every row must be computed once, got counts {seen.unique().tolist()} for {like.rows} rows")
    return merged


def merge_activations(parts: Iterable[Mapping[str, tuple[Tensor, Tensor]]], like: TokenRows) -> dict[str, Tensor]:
    """Put the hidden states that several workers hold of some rows together.

    Args:
        parts: of each worker, by place: which tokens it read [m] int64, as row * T + column, and the hidden states
            after them [m, h].
        like: the rows.

    Returns:
        by place: [n, h], for all tokens but the last of each row, row after row.

    Raises:
        ValueError: at some place a token is missing or was computed twice.
    """
    by_place: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for part in parts:
        for place, found in part.items():
            by_place.setdefault(place, []).append(found)
    read = torch.arange(like.tokens.shape[1]) < like.lengths[:, None] - 1
    wanted = read.flatten().nonzero()[:, 0]
    merged = {}
    for place, pieces in by_place.items():
        tokens, states = (torch.cat(column) for column in zip(*pieces, strict=True))
        order = tokens.argsort()
        if not torch.equal(tokens[order], wanted):
            raise ValueError(
                f"{place}: every token must be computed once, got {len(tokens)} ({len(tokens.unique())} different) for "
                f"{len(wanted)}"
            )
        merged[place] = states[order]
    return merged
