"""Log-probs and entropies from hidden states, some tokens at a time: the numbers and gradients of dense autograd."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rl.layout import ParallelLayout
from tests.distributed.cases import POLICY, TEMPERATURE, Reinforce, Setup, minibatch, one_step
from tests.distributed.logprob_cases import (
    HIDDEN,
    VOCABULARY,
    Head,
    Numbers,
    chunked,
    dense,
    of_these_logits,
    shapes,
)
from tests.distributed.ranks import Ranks

HEADS = [
    *(Head(chunk=chunk) for chunk in (1, 5, 18, 64, None)),
    *(Head(tensor=2, chunk=chunk) for chunk in (5, None)),
    *(Head(tensor=2, sequence_parallel=True, chunk=chunk) for chunk in (5, None)),
    *(Head(tensor=tensor, chunk=5, temperature=1.0) for tensor in (1, 2)),
    *(Head(tensor=tensor, chunk=5, entropy=None) for tensor in (1, 2)),
    *(Head(tensor=tensor, chunk=5, entropy=0.0) for tensor in (1, 2)),
    *(Head(tensor=tensor, chunk=5, logprobs=0.0) for tensor in (1, 2)),
    *(Head(tensor=tensor, tokens=tokens, chunk=5) for tensor in (1, 2) for tokens in (0, 1)),
    Head(tensor=2, sequence_parallel=True, tokens=2),
]
BFLOAT16 = [
    Head(dtype=torch.bfloat16, tensor=tensor, sequence_parallel=parallel, tokens=400, chunk=chunk)
    for tensor, parallel in ((1, False), (2, False), (2, True))
    for chunk in (7, None)
]
FIELDS = ("logprobs", "entropy", "grad_hidden", "grad_weight")


def differences(found: Numbers, wanted: Numbers) -> dict[str, float]:
    """Of each field: the norm of the difference by the norm of what is wanted."""
    pairs = {name: (getattr(found, name), getattr(wanted, name)) for name in FIELDS}
    return {
        name: float((mine - other).norm() / other.norm().clamp(min=1e-9))
        for name, (mine, other) in pairs.items()
        if other is not None
    }


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_numbers_and_gradients_are_those_of_dense_autograd(ranks: Ranks, head: Head) -> None:
    wanted = dense(head, torch.float32)
    for found in ranks.run(head.tensor, chunked, head):
        assert (found.entropy is None) == (head.entropy is None)
        for name in FIELDS:
            torch.testing.assert_close(
                getattr(found, name),
                getattr(wanted, name),
                atol=1e-5,
                rtol=1e-5,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize("head", BFLOAT16, ids=str)
def test_bfloat16_is_as_close_to_float32_as_dense_autograd_in_bfloat16(ranks: Ranks, head: Head) -> None:
    exact = dense(head, torch.float32)
    plain = differences(dense(head, torch.bfloat16), exact)
    for found in ranks.run(head.tensor, chunked, head):
        mine = differences(found, exact)
        assert mine.keys() == plain.keys() == set(FIELDS)
        for name in FIELDS:
            assert 0 < mine[name] < 1.25 * plain[name], (name, mine, plain)


@pytest.mark.parametrize("tensor", [1, 2])
def test_large_logits_cost_no_digits(ranks: Ranks, tensor: int) -> None:
    even = torch.full((VOCABULARY,), -3e4)
    pair = torch.full((VOCABULARY,), 1e4)
    pair[[0, -1]] = 2e4
    sure = torch.zeros(VOCABULARY)
    sure[0] = 1e4
    for logprobs, entropy, _ in ranks.run(tensor, of_these_logits, tensor, torch.stack([even, pair, sure])):
        assert entropy.tolist() == pytest.approx([math.log(VOCABULARY), math.log(2), 0], abs=1e-6)
        assert logprobs.tolist() == pytest.approx([-math.log(VOCABULARY), -math.log(2), 0], abs=1e-6)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_padding_has_no_probability_whatever_its_logits(ranks: Ranks, tensor: int) -> None:
    real = torch.tensor([[1.0, 0, -2, 3, 0.5], [-4, -5, -6, -4.1, -4.2], [7, 7, 7, 7, 7]], requires_grad=True)
    log = real.log_softmax(-1)
    wanted, depth = log[:, 0], -(log.exp() * log).sum(-1)
    (wanted.sum() + depth.sum()).backward()
    assert real.grad is not None
    padded = torch.cat([real.detach(), torch.full((3, 3), 50.0)], dim=1)  # of 4 ranks the last one has padding alone
    answers = ranks.run(tensor, of_these_logits, tensor, padded, 5)
    for logprobs, entropy, _ in answers:
        torch.testing.assert_close(logprobs, wanted, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(entropy, depth, atol=1e-6, rtol=1e-6)
    gradient = torch.cat([grad for _, _, grad in answers]).T
    torch.testing.assert_close(gradient[:, :5], real.grad, atol=1e-6, rtol=1e-6)
    assert gradient[:, 5:].abs().max() == 0


def test_no_tensor_is_as_large_as_the_logits(ranks: Ranks) -> None:
    tokens, chunk = 60, 7
    head = Head(tokens=tokens)
    [(forward, backward)] = ranks.run(1, shapes, head, 4 * chunk * VOCABULARY)
    for seen in (forward, backward):
        assert (chunk, VOCABULARY) in seen
        assert max(math.prod(shape) for shape in seen) <= tokens * HIDDEN < tokens * VOCABULARY
    assert (chunk, HIDDEN) in forward


def test_an_entropy_that_is_only_reported_costs_no_pass_over_the_vocabulary_in_the_backward(ranks: Ranks) -> None:
    def passes(entropy: float | None) -> int:
        [(_, backward)] = ranks.run(1, shapes, Head(entropy=entropy), 2**20)
        return sum(shape == (18, VOCABULARY) for shape in backward)

    assert passes(0.0) == passes(None) < passes(1.0)


@cache
def _dense_gradients(folder: Path) -> dict[str, Tensor]:
    """Of :class:`Reinforce` over :func:`minibatch`, by autograd through the Hugging Face model, row by row."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    batch = minibatch()
    experience, loss_tokens = batch.source, int(batch.source.rollouts.response_mask[batch.rows].sum())
    for row, loss_weight in zip(batch.rows.tolist(), batch.loss_weight, strict=True):
        length = int(experience.rollouts.lengths[row])
        tokens, mask = experience.rollouts.tokens[row, :length], experience.rollouts.response_mask[row, 1:length]
        log_p = (model(tokens[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
        logprobs, entropy = log_p.gather(-1, tokens[1:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        term = -(experience.advantages[row, 1:length] * logprobs + Reinforce().entropy_coef * entropy)
        ((loss_weight[1:length] * term)[mask].sum() / loss_tokens).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return found


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(tensor=2),
        ParallelLayout(tensor=2, sequence_parallel=True),
        ParallelLayout(pipeline=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied"])
def test_gradients_of_the_whole_model_are_those_of_hugging_face(
    ranks: Ranks, models: dict[str, Path], name: str, layout: ParallelLayout
) -> None:
    wanted = _dense_gradients(models[name])
    assert ("lm_head.weight" in wanted) == (name == "qwen2")
    setup = Setup(layout=layout, budget=90, lr=0.0, clip_grad=1e9)
    _, found, _ = ranks.run(layout.world_size, one_step, models[name], setup, POLICY)[0]
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        difference = float((found[key] - gradient).norm() / gradient.norm())
        assert difference < 1e-5, (key, difference)
