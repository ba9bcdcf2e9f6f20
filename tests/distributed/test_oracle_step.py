"""One whole step of PPO on Megatron ranks, against NumPy and float64: experience, losses, gradients, clipping, Adam."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rl.batches import ExperienceBatch, Minibatch, RolloutBatch, merge_rows
from megatron_rl.config.schema import PPOConfig
from megatron_rl.experience.algorithm import advantage_estimator, policy_loss
from megatron_rl.experience.build import build_experience
from megatron_rl.layout import ParallelLayout
from megatron_rl.maths.kl import KlControl
from megatron_rl.maths.losses import ValueLoss
from tests import oracle
from tests.distributed.cases import CRITIC, POLICY, TEMPERATURE, Setup, scored_and_trained, token_rows
from tests.distributed.ranks import Ranks
from tests.fakes import Ready

PPO = PPOConfig(lam=0.9, gamma=0.98, kl_coef=0.05, clip_low=0.1, clip_high=0.2, value_clip=0.1)
LAYOUTS = {
    POLICY: ParallelLayout(tensor=2, pipeline=2, sequence_parallel=True),
    CRITIC: ParallelLayout(pipeline=2, virtual_pipeline=2),
}
TOLERANCE = 1e-5


class Given:
    """A model whose answers are known."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def logprobs(self, batch: object) -> Ready:
        return Ready(self._values)

    values = logprobs


def rollouts() -> RolloutBatch:
    rows = token_rows()
    generator = torch.Generator().manual_seed(5)
    return RolloutBatch(
        **vars(rows),
        rollout_logprobs=torch.zeros(rows.tokens.shape),
        sampled_mask=rows.response_mask,
        scores=torch.randint(-4, 5, (rows.rows,), generator=generator) / 4,
        truncated=torch.zeros(rows.rows, dtype=torch.bool),
        group=torch.arange(rows.rows) // 4,
        policy_version=0,
    )


def noise(batch: RolloutBatch, seed: int, size: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(batch.tokens.shape, generator=generator) * batch.response_mask


def in_float64(folder: Path, role: str) -> Any:
    """The Hugging Face model, and what it says of the rows: [B, T] aligned with tokens, differentiable."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    kind = AutoModelForCausalLM if role == POLICY else AutoModelForTokenClassification
    model = kind.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    batch, found = rollouts(), []
    for tokens, length in zip(batch.tokens, batch.lengths.tolist(), strict=True):
        output = model(tokens[None, :length]).logits[0, :-1]
        if role == POLICY:
            output = (output / TEMPERATURE).log_softmax(-1).gather(-1, tokens[1:length, None])
        padded = torch.nn.functional.pad(output[:, 0], (1, batch.tokens.shape[1] - length))
        found.append(padded)
    return model, torch.stack(found) * batch.response_mask


def adam(model: Any, setup: Setup) -> dict[str, Tensor]:
    """The parameters after one step of AdamW on their gradients, whose global norm is bounded to ``clip_grad``."""
    named = {name: p for name, p in model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in named.values()))
    scale = min(1.0, setup.clip_grad / (norm + 1e-6))
    after = {}
    for name, p in named.items():
        gradient = scale * p.grad
        decay = 0.01 if p.dim() > 1 else 0.0  # megatron-core decays matrices alone
        # the first step's moments, corrected for their bias, are the gradient and its square
        after[name] = (p - setup.lr * (gradient / (gradient.abs() + 1e-3) + decay * p)).detach()
    return after


@pytest.fixture
def critic(models: dict[str, Path], tmp_path: Path) -> Path:
    """A critic that already says something."""
    from transformers import AutoModelForTokenClassification

    torch.manual_seed(1)
    model = AutoModelForTokenClassification.from_pretrained(models["qwen2"], num_labels=1)
    with torch.no_grad():
        model.score.weight.normal_(0, 0.2)
        model.score.bias.fill_(0.1)
    model.save_pretrained(tmp_path / "critic")
    return tmp_path / "critic"


def test_a_step_of_ppo_is_that_of_numpy(ranks: Ranks, models: dict[str, Path], critic: Path) -> None:
    batch = rollouts()
    mask = batch.response_mask
    shift = {"old": noise(batch, 1, 0.15), "ref": noise(batch, 2, 0.2), "values": noise(batch, 3, 0.15)}
    folders = {POLICY: models["qwen2"], CRITIC: critic}

    exact = {role: in_float64(folder, role) for role, folder in folders.items()}
    says = {role: numbers.detach() for role, (_, numbers) in exact.items()}
    of_row = [
        oracle.Response(
            group=int(batch.group[row]),
            score=float(batch.scores[row]),
            drawn=np.ones(int(mask[row].sum()), dtype=bool),
            rollout=np.zeros(int(mask[row].sum())),
            entropy=np.zeros(int(mask[row].sum())),
            new=says[POLICY][row, mask[row]].numpy(),
            old=(says[POLICY] + shift["old"])[row, mask[row]].numpy(),
            ref=(says[POLICY] + shift["ref"])[row, mask[row]].numpy(),
            new_values=says[CRITIC][row, mask[row]].numpy(),
            values=(says[CRITIC] + shift["values"])[row, mask[row]].numpy(),
        )
        for row in range(batch.rows)
    ]
    advantages, returns = oracle.advantages(of_row, PPO)
    assert returns is not None
    terms = {
        POLICY: [oracle.policy_terms(row, a, PPO) for row, a in zip(of_row, advantages, strict=True)],
        CRITIC: [oracle.value_terms(row, r, PPO.value_clip) for row, r in zip(of_row, returns, strict=True)],
    }
    tokens = int(mask.sum())
    clipped = np.mean(np.concatenate([slopes for _, slopes in terms[POLICY]]) == 0)
    assert 0.1 < clipped < 0.9, "bounds must decide some tokens and not others"

    for role, (model, numbers) in exact.items():
        slopes = oracle.laid_out(batch, [slope for _, slope in terms[role]])
        (slopes * numbers).sum().div(tokens).backward()
        setup = Setup(layout=LAYOUTS[role], budget=60, lr=1e-2)

        def experience(found: Tensor, role: str = role) -> ExperienceBatch:
            """By the package, from what Megatron's ranks say of their own role."""
            policy, values = (found, says[CRITIC].float()) if role == POLICY else (says[POLICY].float(), found)
            return build_experience(
                batch,
                Given(policy + shift["old"]),
                Given(values + shift["values"]),
                Given(policy + shift["ref"]),
                KlControl(PPO.kl_coef),
                advantage_estimator(PPO),
                PPO,
            )

        loss = policy_loss(PPO) if role == POLICY else ValueLoss(clip=PPO.value_clip)
        found = ranks.run(setup.layout.world_size, scored_and_trained, folders[role], setup, role, batch, None, None)
        trained_on = experience(merge_rows([answer[0] for answer in found if answer[0] is not None], batch))
        minibatch = Minibatch(
            source=trained_on, rows=torch.arange(batch.rows), loss_weight=torch.ones(batch.tokens.shape)
        )
        answers = ranks.run(
            setup.layout.world_size, scored_and_trained, folders[role], setup, role, batch, minibatch, loss
        )
        result = answers[setup.layout.rank_of(pipeline=setup.layout.pipeline - 1)][1]
        expected = sum(float(term.sum()) for term, _ in terms[role]) / tokens
        assert result.metrics["loss"] == pytest.approx(expected, rel=TOLERANCE)
        wanted, after = adam(model, setup), answers[0][2]
        assert after.keys() == wanted.keys()
        worst = {name: float((after[name] - p).norm() / p.norm()) for name, p in wanted.items()}
        assert max(worst.values()) < TOLERANCE, worst
