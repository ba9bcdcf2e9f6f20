"""Reinforcement learning once more, in NumPy and float64, response by response and token by token, with loops and
branches where the package has tensors and masks; and the package's own path through the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_rl.batches import ExperienceBatch, MicroBatch, RolloutBatch, TokenOutputs, ValueOutputs
from megatron_rl.config.schema import PPOConfig, RunConfig
from megatron_rl.dataflow import Finish, Prompt, Rollout, Sample, Score, ScoredRollout
from megatron_rl.experience.algorithm import advantage_estimator, loss_mean, policy_loss
from megatron_rl.experience.batching import collate, minibatches
from megatron_rl.experience.build import build_experience
from megatron_rl.experience.packing import micro_batches, pack, unpack
from megatron_rl.maths.kl import KlControl
from megatron_rl.maths.losses import ValueLoss
from tests.fakes import Ready

Array = Any
EOS = 9


@dataclass(frozen=True)
class Response:
    """What the models say of one response; arrays of its length, a forced end of sequence included."""

    group: int
    score: float
    drawn: Array  # the engine drew the token
    rollout: Array
    old: Array
    ref: Array
    new: Array
    entropy: Array
    values: Array
    new_values: Array

    def __len__(self) -> int:
        return len(self.old)


def random_rollouts(rng: np.random.Generator, groups: int, samples: int) -> list[ScoredRollout]:
    """Prompts of 1 to 4 tokens and responses of 1 to 9, about half of which end with EOS; scores are quarters. Those of
    3, 6 and 9 tokens are truncated, whatever they end with.
    """
    rollouts = []
    for group in range(groups):
        drawn = []
        for _ in range(samples):
            tokens = [*rng.integers(1, 9, rng.integers(0, 9)).tolist(), EOS if rng.uniform() < 0.5 else 5]
            logprobs = tuple(rng.normal(-1, 0.5, len(tokens)).tolist())
            finish = Finish.LENGTH if len(tokens) % 3 == 0 else Finish.STOP
            drawn.append(Sample(token_ids=tuple(tokens), logprobs=logprobs, text="", finish=finish))
        prompt = Prompt(id=str(group), token_ids=(1,) * int(rng.integers(1, 5)), answer="", source="")
        scores = tuple(Score(value=float(rng.integers(-4, 5)) / 4) for _ in drawn)
        rollouts.append(
            ScoredRollout(rollout=Rollout(prompt=prompt, samples=tuple(drawn), policy_version=0), scores=scores)
        )
    return rollouts


def responses(rng: np.random.Generator, rollouts: Sequence[ScoredRollout], forced_eos: bool) -> list[Response]:
    """The rollouts' samples with random outputs of every model, near the engine's log-probs."""
    width = max(len(r.rollout.prompt.token_ids) + len(s.token_ids) for r in rollouts for s in r.rollout.samples)
    found = []
    for group, item in enumerate(rollouts):
        for sample, score in zip(item.rollout.samples, item.scores, strict=True):
            rollout, drawn = list(sample.logprobs), [True] * len(sample.logprobs)
            if forced_eos and sample.token_ids[-1] != EOS:
                if len(item.rollout.prompt.token_ids) + len(rollout) == width:
                    rollout, drawn = rollout[:-1], drawn[:-1]
                rollout, drawn = [*rollout, 0.0], [*drawn, False]
            size = len(rollout)
            old = np.where(drawn, rollout, -1.5) + rng.normal(0, 0.4, size)
            values = rng.normal(0, 0.5, size)
            found.append(
                Response(
                    group=group,
                    score=score.value,
                    drawn=np.array(drawn),
                    rollout=np.array(rollout),
                    old=old,
                    ref=old + rng.normal(0, 0.3, size),
                    new=old + rng.normal(0, 0.3, size),
                    entropy=rng.uniform(0, 2, size),
                    values=values,
                    new_values=values + rng.normal(0, 0.3, size),
                )
            )
    return found


# The formulas.


def rewards(row: Response, ppo: PPOConfig) -> Array:
    earned = np.zeros(len(row))
    earned[-1] = row.score
    if ppo.kl_in == "reward" and ppo.kl_coef > 0:
        for t in range(len(row)):
            earned[t] -= ppo.kl_coef * kl(row.old[t] - row.ref[t], ppo.kl_kind)[0]
    return earned


def kl(d: float, kind: str) -> tuple[float, float]:
    """The estimate and its derivative by the policy's log-prob."""
    return {"k1": (d, 1.0), "k2": (d * d / 2, d), "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d))}[kind]


def gae(earned: Array, values: Array, gamma: float, lam: float) -> tuple[Array, Array]:
    after = np.append(values, 0.0)
    deltas = [earned[t] + gamma * after[t + 1] - after[t] for t in range(len(values))]
    advantages = np.array(
        [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(values))]
    )
    return advantages, advantages + values


def advantages(rows: Sequence[Response], ppo: PPOConfig) -> tuple[list[Array], list[Array] | None]:
    earned = [rewards(row, ppo) for row in rows]
    totals = [float(np.sum(each)) for each in earned]
    found: list[Array] = []
    returns: list[Array] | None = None
    if ppo.advantage == "gae":
        returns = []
        for row, each in zip(rows, earned, strict=True):
            lam = ppo.lam if ppo.lam_alpha is None else max(0.0, 1 - 1 / (ppo.lam_alpha * len(row)))
            found.append(gae(each, row.values, ppo.gamma, lam)[0])
            critic_lam = lam if ppo.critic_lam is None else ppo.critic_lam
            returns.append(gae(each, row.values, ppo.gamma, critic_lam)[1])
    elif ppo.advantage == "reinforce_pp":
        for each in earned:
            found.append(
                np.array([sum(ppo.gamma**k * reward for k, reward in enumerate(each[t:])) for t in range(len(each))])
            )
    else:
        for i, row in enumerate(rows):
            peers = [total for total, other in zip(totals, rows, strict=True) if other.group == row.group]
            others = [t for j, (t, o) in enumerate(zip(totals, rows, strict=True)) if o.group == row.group and j != i]
            if ppo.advantage == "rloo":
                one = totals[i] - np.mean(others)
            else:
                one = totals[i] - np.mean(peers)
                if ppo.advantage == "grpo":
                    one /= np.std(peers, ddof=1) + 1e-6
            found.append(np.full(len(row), one))
    if ppo.whitens:
        every = np.concatenate(found)
        found = [(each - every.mean()) / math.sqrt(max(every.var(), 1e-8)) for each in found]
    return found, returns


def weights(rows: Sequence[Response], mean: str, constant: int) -> list[Array]:
    tokens = sum(map(len, rows))
    each = {
        "token": lambda row: 1.0,
        "sequence": lambda row: tokens / (len(rows) * len(row)),
        "constant": lambda row: tokens / (len(rows) * constant),
    }[mean]
    return [np.full(len(row), each(row)) for row in rows]


def engine_weight(row: Response, ppo: PPOConfig) -> Array:
    weight = np.ones(len(row))
    if ppo.engine_correction is None:
        return weight
    whole = math.exp(sum(row.old[t] - row.rollout[t] for t in range(len(row)) if row.drawn[t]))
    for t in range(len(row)):
        if row.drawn[t]:
            ratio = math.exp(row.old[t] - row.rollout[t]) if ppo.engine_ratio_level == "token" else whole
            if ppo.engine_correction == "tis":
                weight[t] = min(ratio, ppo.engine_ratio_high)
            else:
                weight[t] = ratio if ppo.engine_ratio_low <= ratio <= ppo.engine_ratio_high else 0.0
    return weight


def policy_terms(row: Response, advantage: Array, ppo: PPOConfig) -> tuple[Array, Array]:
    """Term of each token, and its derivative by the token's log-prob."""
    terms, slopes = np.zeros(len(row)), np.zeros(len(row))
    for t in range(len(row)):
        a = float(advantage[t])
        ratio = math.exp(np.mean(row.new - row.old) if ppo.loss == "gspo" else row.new[t] - row.old[t])
        low, high = 1 - ppo.clip_low, 1 + ppo.clip_high
        if ppo.loss == "cispo":
            bounded = min(max(ratio, low), high)
            objective, slope = bounded * a * row.new[t], bounded * a
        else:
            bounded = min(ratio, high) if a > 0 else max(ratio, low)
            if a < 0 and ppo.dual_clip is not None:
                bounded = min(bounded, ppo.dual_clip)
            objective, slope = bounded * a, ratio * a if bounded == ratio else 0.0
        terms[t], slopes[t] = -objective - ppo.entropy_coef * row.entropy[t], -slope
        if ppo.kl_in == "loss" and ppo.kl_coef > 0:
            estimate, derivative = kl(row.new[t] - row.ref[t], ppo.kl_kind)
            terms[t] += ppo.kl_coef * estimate
            slopes[t] += ppo.kl_coef * derivative
    return terms, slopes


def value_terms(row: Response, returns: Array, clip: float) -> tuple[Array, Array]:
    """Term of each token, and its derivative by the token's value."""
    terms, slopes = np.zeros(len(row)), np.zeros(len(row))
    for t in range(len(row)):
        error = row.new_values[t] - returns[t]
        near = row.values[t] + min(max(row.new_values[t] - row.values[t], -clip), clip)
        worst = max(error**2, (near - returns[t]) ** 2)
        terms[t] = worst / 2
        slopes[t] = error if worst == error**2 else 0.0
    return terms, slopes


# The package's way through the same numbers.


class Model:
    """Scores the responses of a batch with given numbers, and learns nothing."""

    def __init__(self, rows: Sequence[Response], name: str) -> None:
        self._rows, self._name = rows, name

    def logprobs(self, batch: RolloutBatch) -> Ready:
        return Ready(laid_out(batch, [getattr(row, self._name) for row in self._rows]))

    values = logprobs


def laid_out(batch: RolloutBatch, arrays: Sequence[Array]) -> torch.Tensor:
    """[B, T] with one array per response in its place."""
    full = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    for row, array in enumerate(arrays):
        full[row, batch.response_mask[row]] = torch.as_tensor(array)
    return full


@dataclass(frozen=True)
class Case:
    """One rollout and the settings it is trained with."""

    config: RunConfig
    rollouts: Sequence[ScoredRollout]
    rows: Sequence[Response]
    forced_eos: bool
    micro_batch_tokens: int


def random_case(config: RunConfig, seed: int, *, forced_eos: bool = True) -> Case:
    rng = np.random.default_rng(seed)
    rollouts = random_rollouts(rng, config.prompts_per_step, config.rollout.samples_per_prompt)
    return Case(config, rollouts, responses(rng, rollouts, forced_eos), forced_eos, int(rng.integers(1, 60)))


def experience_of(case: Case) -> ExperienceBatch:
    ppo = case.config.ppo
    batch = collate(case.rollouts, (EOS,) if case.forced_eos else (), version=0)
    batch = dataclasses.replace(batch, scores=batch.scores.double())
    critic = Model(case.rows, "values") if ppo.has_critic else None
    reference = Model(case.rows, "ref") if ppo.kl_coef > 0 else None
    control = KlControl(ppo.kl_coef)
    policy: Any = Model(case.rows, "old")
    return build_experience(batch, policy, critic, reference, control, advantage_estimator(ppo), ppo)


def losses_of(case: Case, experience: ExperienceBatch) -> list[tuple[list[int], dict[str, Any]]]:
    """For each optimizer step: its rows, and by model the loss (divided once) and its gradient for each row."""
    ppo, batch = case.config.ppo, experience.rollouts
    policy, value = policy_loss(ppo), ValueLoss(clip=ppo.value_clip)
    shown = {  # the models' outputs take the same way into micro-batches as what they are compared with
        name: dataclasses.replace(experience, old_logprobs=laid_out(batch, [getattr(row, name) for row in case.rows]))
        for name in ("new", "entropy", "new_values")
    }
    steps = []
    for minibatch in minibatches(experience, ppo, loss_mean(case.config), seed=(3, 1)):
        lengths = batch.lengths[minibatch.rows].tolist()
        tokens = int(batch.response_mask[minibatch.rows].sum())
        found: dict[str, Any] = {"policy": [0.0, {}], "value": [0.0, {}]}
        for part in micro_batches(lengths, range(len(lengths)), case.micro_batch_tokens):
            packed = pack(minibatch, part, multiple=4)
            outputs = {
                name: pack(dataclasses.replace(minibatch, source=source), part, multiple=4).old_logprobs
                for name, source in shown.items()
            }
            leaf = outputs["new"].clone().requires_grad_()
            critic = outputs["new_values"].clone().requires_grad_()
            asked = [("policy", policy, TokenOutputs(logprobs=leaf, entropy=outputs["entropy"]), leaf)]
            if ppo.has_critic:
                asked.append(("value", value, ValueOutputs(values=critic), critic))
            for name, loss, output, parameter in asked:
                terms = loss(output, packed)
                terms.total.backward()
                found[name][0] += terms.total.item() / tokens
                rows = minibatch.rows[part]
                gradients = unpack(parameter.grad / tokens, batch.lengths[rows], batch.tokens.shape[1])
                for row, gradient in zip(rows.tolist(), gradients, strict=True):
                    found[name][1][row] = gradient[batch.response_mask[row]].numpy()
        steps.append((minibatch.rows.tolist(), found))
    return steps


def differences(case: Case) -> dict[str, float]:
    """The largest difference between the package and the formulas, by stage."""
    ppo, rows = case.config.ppo, case.rows
    experience = experience_of(case)
    mask = experience.rollouts.response_mask
    wanted, targets = advantages(rows, ppo)
    found = {
        "rewards": gap(experience.rewards, mask, [rewards(row, ppo) for row in rows]),
        "advantages": gap(experience.advantages, mask, wanted),
    }
    assert (experience.returns is None) == (targets is None)
    if targets is not None:
        found["returns"] = gap(experience.returns, mask, targets)
    samples = [sample for item in case.rollouts for sample in item.rollout.samples]
    cut = {row for row, sample in enumerate(samples) if ppo.mask_truncated and sample.finish is Finish.LENGTH}
    steps = losses_of(case, experience)
    trained = sorted(row for members, _ in steps for row in members)
    left = sorted(row for row in range(len(rows)) if row not in cut for _ in range(ppo.epochs))
    found["rows that are trained on"] = float(trained != left)
    for step, (members, losses) in enumerate(steps):
        chosen = [rows[row] for row in members]
        weight = weights(chosen, ppo.loss_mean, case.config.rollout.max_response_tokens)
        tokens = sum(map(len, chosen))
        expected = {
            "policy": [
                (policy_terms(rows[row], wanted[row], ppo), w * engine_weight(rows[row], ppo))
                for row, w in zip(members, weight, strict=True)
            ]
        }
        if targets is not None:
            expected["value"] = [
                (value_terms(rows[row], targets[row], ppo.value_clip), w)
                for row, w in zip(members, weight, strict=True)
            ]
        for name, terms in expected.items():
            total, gradients = losses[name]
            found[f"{name} loss {step}"] = abs(total - sum(float(t @ w) for (t, _), w in terms) / tokens)
            found[f"{name} gradient {step}"] = max(
                float(np.abs(gradients[row] - slope * w / tokens).max())
                for row, ((_, slope), w) in zip(members, terms, strict=True)
            )
    return found


def gap(found: torch.Tensor, mask: torch.Tensor, wanted: Sequence[Array]) -> float:
    """The largest difference inside the responses; whatever stands outside counts as well."""
    inside = max(float(np.abs(found[row, mask[row]].numpy() - want).max()) for row, want in enumerate(wanted))
    return max(inside, float((found * ~mask).abs().max()))


def part_of(batch: MicroBatch, row: int) -> MicroBatch:
    """One row of a micro-batch as a micro-batch of its own."""
    start, end = batch.cu_seqlens[row : row + 2].tolist()
    cut = {
        name: value[start:end]
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor) and name != "cu_seqlens"
    }
    return dataclasses.replace(
        batch, **cut, cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32), max_length=end - start
    )
