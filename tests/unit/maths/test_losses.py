from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.batches import MicroBatch, TokenOutputs, ValueOutputs
from megatron_rl.maths.losses import (
    ClippedWeightLoss,
    CorrectedLoss,
    EngineCorrection,
    PolicyLoss,
    SequencePolicyLoss,
    SupervisedLoss,
    ValueLoss,
)

PER_TOKEN = (
    "inputs",
    "targets",
    "positions",
    "loss_mask",
    "loss_weight",
    "sampled_mask",
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "values",
    "advantages",
    "returns",
)


def micro_batch(mask=None, **fields):
    """A micro-batch of one row with the given per-token numbers; what is not given is 0, weights are 1."""
    size = len(next(iter(fields.values())))
    mask = torch.ones(size, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    dtype = torch.as_tensor(next(iter(fields.values()))).dtype

    def field(name, otherwise=0.0):
        return torch.as_tensor(fields[name]) if name in fields else torch.full((size,), otherwise, dtype=dtype)

    index = torch.arange(size)
    return MicroBatch(
        inputs=index,
        targets=index,
        positions=index,
        cu_seqlens=torch.tensor([0, size], dtype=torch.int32),
        max_length=size,
        loss_mask=mask,
        loss_weight=field("loss_weight", 1.0),
        sampled_mask=fields.get("sampled_mask", mask),
        rollout_logprobs=field("rollout_logprobs"),
        old_logprobs=field("old_logprobs"),
        ref_logprobs=field("ref_logprobs") if "ref_logprobs" in fields else None,
        values=field("values"),
        advantages=field("advantages"),
        returns=field("returns"),
    )


def part(batch, places):
    """Some tokens of a micro-batch."""
    chosen = {name: getattr(batch, name)[places] for name in PER_TOKEN if getattr(batch, name) is not None}
    return dataclasses.replace(batch, **chosen)


def logs(*ratios):
    return torch.tensor([math.log(ratio) for ratio in ratios], dtype=torch.float64)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def leaf(values):
    return values.detach().clone().requires_grad_()


# Six tokens: ratio and advantage -> min(ratio * A, clip(ratio, 0.8, 1.2) * A)
#   1.0  2 ->  2.0        1.5  2 ->  2.4 (clipped)    0.5  2 ->  1.0
#   1.0 -2 -> -2.0        1.5 -2 -> -3.0              0.5 -2 -> -1.6 (clipped)
RATIOS = (1.0, 1.5, 0.5, 1.0, 1.5, 0.5)
ADVANTAGES = numbers(2, 2, 2, -2, -2, -2)
OBJECTIVES = numbers(2.0, 2.4, 1.0, -2.0, -3.0, -1.6)


def policy_terms(loss, *, entropy=None, mask=None, **fields):
    logprobs = leaf(logs(*RATIOS))
    outputs = TokenOutputs(logprobs=logprobs, entropy=numbers(*[0.0] * 6) if entropy is None else entropy)
    terms = loss(outputs, micro_batch(mask, advantages=ADVANTAGES, **fields))
    return terms, logprobs


def test_the_clipped_surrogate_by_hand():
    terms, _ = policy_terms(PolicyLoss())
    assert terms.total.item() == pytest.approx(-OBJECTIVES.sum().item())
    assert terms.metrics["loss"].item() == pytest.approx(1.2)
    assert terms.metrics["clip_fraction"].item() == 2


def test_clipped_tokens_have_no_gradient():
    terms, logprobs = policy_terms(PolicyLoss())
    terms.total.backward()
    # d(-ratio * A) / d logprob = -ratio * A
    assert logprobs.grad.tolist() == pytest.approx([-2.0, 0.0, -1.0, 2.0, 3.0, 0.0])


def test_each_side_has_its_own_bound():
    terms, _ = policy_terms(PolicyLoss(clip_low=0.4, clip_high=0.6))
    # the ratio of 1.5 is now inside, 0.5 is bounded to 0.6: -2 * 0.6 = -1.2
    assert terms.total.item() == pytest.approx(-(2 + 3 + 1 - 2 - 3 - 1.2))
    assert terms.metrics["clip_fraction"].item() == 1


def test_the_dual_clip_bounds_tokens_with_a_negative_advantage():
    terms, logprobs = policy_terms(PolicyLoss(dual_clip=1.25))
    # max(-3.0, 1.25 * -2 = -2.5) = -2.5
    assert terms.total.item() == pytest.approx(-(2 + 2.4 + 1 - 2 - 2.5 - 1.6))
    assert terms.metrics["clip_fraction"].item() == 3
    terms.total.backward()
    assert logprobs.grad[4].item() == 0.0


def test_weights_scale_the_loss_and_what_is_told_of_it_and_no_other_metric():
    terms, _ = policy_terms(PolicyLoss(), loss_weight=numbers(1, 0, 0, 2, 0, 0))
    assert terms.total.item() == pytest.approx(-2.0 + 2 * 2.0)
    assert terms.metrics["loss"].item() == terms.total.item()
    assert terms.metrics["clip_fraction"].item() == 2


def test_the_critics_loss_is_told_as_it_is_minimised():
    values, weights = numbers(1, 3), numbers(0.5, 2)
    batch = micro_batch(returns=numbers(0, 0), values=values, loss_weight=weights)
    terms = ValueLoss()(ValueOutputs(values=leaf(values)), batch)
    assert terms.metrics["loss"].item() == terms.total.item() == pytest.approx(0.5 * 0.5 * 1 + 2 * 0.5 * 9)


def test_the_entropy_bonus_lowers_the_loss():
    terms, _ = policy_terms(PolicyLoss(entropy_coef=0.5), entropy=numbers(1, 1, 1, 1, 1, 3))
    assert terms.total.item() == pytest.approx(1.2 - 0.5 * 8)
    assert terms.metrics["entropy"].item() == 8


def test_the_kl_in_the_loss_is_taken_against_the_reference():
    reference = logs(*RATIOS) - numbers(1, 0, 0, 0, 0, -1)
    terms, _ = policy_terms(PolicyLoss(kl_coef=0.1, kl_kind="k2"), ref_logprobs=reference)
    assert terms.metrics["kl_ref"].item() == pytest.approx(1.0)
    assert terms.total.item() == pytest.approx(1.2 + 0.1)


def test_the_kl_of_the_update_is_measured_from_the_old_policy():
    terms, _ = policy_terms(PolicyLoss())
    expected = sum(ratio - 1 - math.log(ratio) for ratio in RATIOS)
    assert terms.metrics["kl_update"].item() == pytest.approx(expected)


# Two responses of 3 loss tokens with a prompt token each: log-ratios 0.3, 0, 0 (mean 0.1) and -0.6, 0, 0 (mean -0.2).
TWO_ROWS = {"mask": torch.tensor([False, True, True, True] * 2), "cu_seqlens": torch.tensor([0, 4, 8])}
NEW = numbers(9, 0.3, 0, 0, 9, -0.6, 0, 0)


def two_rows(loss, advantages, **fields):
    logprobs = leaf(NEW)
    batch = micro_batch(TWO_ROWS["mask"], advantages=advantages, **fields)
    batch = dataclasses.replace(batch, cu_seqlens=TWO_ROWS["cu_seqlens"])
    terms = loss(TokenOutputs(logprobs=logprobs, entropy=torch.zeros_like(NEW)), batch)
    terms.total.backward()
    return terms, logprobs.grad.tolist()


def test_a_sequence_has_one_ratio_and_its_gradient_reaches_every_token():
    terms, gradient = two_rows(SequencePolicyLoss(clip_low=0.5, clip_high=0.5), numbers(0, 1, 1, 1, 0, -2, -2, -2))
    up, down = math.exp(0.1), math.exp(-0.2)
    assert terms.total.item() == pytest.approx(3 * (-up + 2 * down))
    assert terms.metrics["clip_fraction"].item() == 0
    # d(-s A) / d logprob of each token, as if only that token's probability moved: -s A
    assert gradient == pytest.approx([0, -up, -up, -up, 0, 2 * down, 2 * down, 2 * down])


def test_a_sequences_ratio_is_bounded_as_a_whole():
    terms, gradient = two_rows(SequencePolicyLoss(clip_low=0.1, clip_high=0.05), numbers(0, 1, 1, 1, 0, 1, 1, -1))
    # exp(0.1) > 1.05 is bounded for A > 0; exp(-0.2) < 0.9 is bounded for A < 0 alone
    assert terms.metrics["clip_fraction"].item() == 4
    assert gradient == pytest.approx([0, 0, 0, 0, 0, -math.exp(-0.2), -math.exp(-0.2), 0])
    assert terms.total.item() == pytest.approx(-3 * 1.05 - 2 * math.exp(-0.2) + 0.9)


def test_a_bounded_weight_leaves_every_token_its_gradient():
    logprobs = leaf(logs(*RATIOS) - 1)
    batch = micro_batch(advantages=ADVANTAGES, old_logprobs=numbers(*[-1.0] * 6))
    terms = ClippedWeightLoss()(TokenOutputs(logprobs=logprobs, entropy=torch.zeros(6)), batch)
    terms.total.backward()
    weights = numbers(1, 1.2, 0.8, 1, 1.2, 0.8)
    assert logprobs.grad.tolist() == pytest.approx((-weights * ADVANTAGES).tolist())
    assert terms.total.item() == pytest.approx(float((-weights * ADVANTAGES * logprobs.detach()).sum()))
    assert terms.metrics["clip_fraction"].item() == 4


def engine_weights(correction, drawn=None, **fields):
    """Ratios 0.5, 1, 4 and 2, 2, 1 of trainer to engine in two responses with a prompt token each."""
    ratios = numbers(9, 0.5, 1, 4, 9, 2, 2, 1)
    batch = micro_batch(TWO_ROWS["mask"], old_logprobs=ratios.log(), **fields)
    drawn = TWO_ROWS["mask"] if drawn is None else torch.tensor(drawn)
    weight, cut = correction(dataclasses.replace(batch, cu_seqlens=TWO_ROWS["cu_seqlens"], sampled_mask=drawn))
    return [[round(w, 6) for w in half] for half in (weight[1:4].tolist(), weight[5:].tolist())], int(cut.sum())


def test_engine_weights_by_hand():
    tis = EngineCorrection(outside="truncate", level="token", high=2.0)
    mis = EngineCorrection(outside="mask", level="token", high=2.0)
    icepop = EngineCorrection(outside="mask", level="token", low=0.6, high=2.0)
    assert engine_weights(tis) == ([[0.5, 1, 2], [2, 2, 1]], 1)
    assert engine_weights(mis) == ([[0.5, 1, 0], [2, 2, 1]], 1)
    assert engine_weights(icepop) == ([[0, 1, 0], [2, 2, 1]], 2)
    # by response: 0.5 * 1 * 4 = 2 and 2 * 2 * 1 = 4
    assert engine_weights(dataclasses.replace(tis, level="sequence", high=3.0)) == ([[2, 2, 2], [3, 3, 3]], 3)
    assert engine_weights(dataclasses.replace(mis, level="sequence", high=3.0)) == ([[2, 2, 2], [0, 0, 0]], 3)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_token_that_the_engine_did_not_draw_is_never_corrected(level):
    drawn = [False, True, True, False, False, True, True, True]
    correction = EngineCorrection(outside="mask", level=level, high=1.9)
    first, second = {"token": ([0.5, 1, 1], [0, 0, 1]), "sequence": ([0.5, 0.5, 1], [0, 0, 0])}[level]
    assert engine_weights(correction, drawn=drawn)[0] == [first, second]


def test_a_corrected_loss_weighs_each_token_and_keeps_the_others_metrics():
    rollout = logs(1.0, 1.0, 1.0, 1.0, 1.0, 1.0) - numbers(math.log(0.5), 0, 0, 0, 0, math.log(4.0))
    correction = EngineCorrection(outside="truncate", level="token", high=2.0)
    plain, _ = policy_terms(PolicyLoss(), rollout_logprobs=rollout)
    terms, logprobs = policy_terms(CorrectedLoss(loss=PolicyLoss(), correction=correction), rollout_logprobs=rollout)
    # exp(old - rollout): 0.5 for the first token, 4 bounded to 2 for the last
    assert terms.total.item() == pytest.approx(-(0.5 * 2.0 + 2.4 + 1.0 - 2.0 - 3.0 + 2 * -1.6))
    assert terms.metrics["loss"].item() == terms.total.item(), "what is told is what is minimised"
    others = plain.metrics.keys() - {"loss"}
    assert {name: terms.metrics[name].item() for name in others} == pytest.approx(
        {name: plain.metrics[name].item() for name in others}
    )
    assert terms.metrics["engine_weight"].item() == pytest.approx(0.5 + 4 + 2)
    assert terms.metrics["engine_cut"].item() == 1
    terms.total.backward()
    assert logprobs.grad.tolist() == pytest.approx([-1.0, 0.0, -1.0, 2.0, 3.0, 0.0])


def test_a_kl_term_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="needs reference log-probs"):
        policy_terms(PolicyLoss(kl_coef=0.1))


def test_a_ratio_of_any_size_leaves_loss_and_gradient_finite():
    logprobs = leaf(numbers(500.0, -500.0, 500.0, -500.0))
    outputs = TokenOutputs(logprobs=logprobs, entropy=torch.zeros(4))
    terms = PolicyLoss()(outputs, micro_batch(advantages=numbers(1, 1, -1, -1)))
    terms.total.backward()
    assert torch.isfinite(terms.total)
    assert torch.isfinite(logprobs.grad).all()


def test_the_value_loss_by_hand():
    values = leaf(numbers(1.0, 1.5, 1.5, 0.0))
    batch = micro_batch(values=numbers(1.0, 1.0, 1.0, 1.0), returns=numbers(3.0, 2.0, 1.0, 0.5))
    terms = ValueLoss(clip=0.25)(ValueOutputs(values=values), batch)
    # 1.0 stays:              (1 - 3)^2 = 4
    # 1.5 -> 1.25: max(0.5^2, 0.75^2) = 0.5625 (clipped, no gradient)
    # 1.5 -> 1.25: max(0.5^2, 0.25^2) = 0.25
    # 0.0 -> 0.75: max(0.5^2, 0.25^2) = 0.25
    assert terms.total.item() == pytest.approx(0.5 * (4 + 0.5625 + 0.25 + 0.25))
    assert terms.metrics["clip_fraction"].item() == 1
    terms.total.backward()
    assert values.grad.tolist() == pytest.approx([-2.0, 0.0, 0.5, -0.5])


def test_the_value_loss_without_a_clip_is_half_the_squared_error():
    outputs = ValueOutputs(values=numbers(1.0, 2.0))
    terms = ValueLoss(clip=math.inf)(outputs, micro_batch(values=numbers(9, 9), returns=numbers(0.0, 5.0)))
    assert terms.total.item() == pytest.approx(0.5 * (1 + 9))
    assert terms.metrics["clip_fraction"].item() == 0


def test_the_supervised_loss_is_the_negative_log_likelihood():
    outputs = TokenOutputs(logprobs=numbers(-1.0, -2.0, -4.0), entropy=numbers(0, 0, 0))
    batch = micro_batch([True, False, True], loss_weight=numbers(1, 1, 0.5))
    terms = SupervisedLoss()(outputs, batch)
    assert terms.total.item() == 3.0
    assert {name: value.item() for name, value in terms.metrics.items()} == {"loss": 3.0}


GARBAGE = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_is_masked_out_may_be_anything(garbage):
    mask = torch.tensor([True, False, True])

    def spoilt(a, c):
        return numbers(a, garbage, c)

    logprobs, entropy, values = leaf(spoilt(-1.0, -2.0)), leaf(spoilt(0.5, 0.5)), leaf(spoilt(0.5, 1.0))
    batch = micro_batch(
        mask,
        advantages=spoilt(1.0, -1.0),
        old_logprobs=spoilt(-1.0, -2.0),
        ref_logprobs=spoilt(-1.5, -2.0),
        values=spoilt(0.5, 1.0),
        returns=spoilt(1.5, 0.0),
        rollout_logprobs=spoilt(-1.2, -1.9),
        loss_weight=spoilt(1.0, 1.0),
    )
    outputs = TokenOutputs(logprobs=logprobs, entropy=entropy)
    policy = PolicyLoss(dual_clip=3.0, entropy_coef=0.1, kl_coef=0.1, kl_kind="k3")(outputs, batch)
    correction = EngineCorrection(outside="truncate", level="sequence", high=2.0)
    others = [
        CorrectedLoss(loss=loss, correction=correction)(outputs, batch)
        for loss in (SequencePolicyLoss(), ClippedWeightLoss())
    ]
    value = ValueLoss()(ValueOutputs(values=values), batch)
    supervised = SupervisedLoss()(outputs, batch)
    sum(terms.total for terms in (policy, value, supervised, *others)).backward()
    for terms in (policy, value, supervised, *others):
        assert torch.isfinite(terms.total)
        assert all(torch.isfinite(metric) for metric in terms.metrics.values())
    for tensor in (logprobs, entropy, values):
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad[1].item() == 0.0
        assert tensor.grad[0].item() != 0.0


@pytest.mark.parametrize(
    "loss",
    [
        PolicyLoss(dual_clip=3.0),
        SequencePolicyLoss(),
        CorrectedLoss(loss=ClippedWeightLoss(), correction=EngineCorrection(outside="mask", level="token", high=2.0)),
        ValueLoss(clip=math.inf),
        SupervisedLoss(),
    ],
)
def test_a_loss_travels_as_a_value(loss):
    assert pickle.loads(pickle.dumps(loss)) == loss


def test_metrics_carry_no_gradient():
    terms, _ = policy_terms(PolicyLoss(entropy_coef=0.1), entropy=leaf(numbers(1, 1, 1, 1, 1, 1)))
    assert terms.total.requires_grad
    assert not any(metric.requires_grad for metric in terms.metrics.values())


@st.composite
def experience(draw):
    """Random tokens in float64, about a third of them masked out, and the outputs of both models."""
    size = draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    fields = {
        "old_logprobs": rng.normal(-1, 1, size),
        "ref_logprobs": rng.normal(-1, 1, size),
        "values": rng.normal(size=size),
        "advantages": rng.normal(size=size),
        "returns": rng.normal(size=size),
        "loss_weight": rng.uniform(0, 2, size),
    }
    mask = rng.uniform(size=size) < 0.7
    made = {name: torch.from_numpy(value) for name, value in fields.items()}
    logprobs = torch.from_numpy(fields["old_logprobs"] + rng.normal(0, 0.5, size))
    values = torch.from_numpy(fields["values"] + rng.normal(0, 0.5, size))
    outputs = TokenOutputs(logprobs=logprobs, entropy=torch.from_numpy(rng.uniform(0, 3, size)))
    return micro_batch(mask, **made), outputs, ValueOutputs(values=values)


def policy_oracle(loss, logprobs, entropy, batch):
    """Token by token, with branches in place of minimum and clip."""
    total = clipped = 0.0
    for i in np.flatnonzero(batch.loss_mask.numpy()):
        advantage, ratio = float(batch.advantages[i]), math.exp(float(logprobs[i]) - float(batch.old_logprobs[i]))
        bound = ratio
        if advantage > 0 and ratio > 1 + loss.clip_high:
            bound = 1 + loss.clip_high
        elif advantage < 0 and ratio < 1 - loss.clip_low:
            bound = 1 - loss.clip_low
        elif advantage < 0 and loss.dual_clip is not None and ratio > loss.dual_clip:
            bound = loss.dual_clip
        clipped += bound != ratio
        d = float(batch.ref_logprobs[i]) - float(logprobs[i])
        kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[loss.kl_kind]
        term = -bound * advantage - loss.entropy_coef * float(entropy[i]) + loss.kl_coef * kl
        total += float(batch.loss_weight[i]) * term
    return total, clipped


policy_losses = st.builds(
    PolicyLoss,
    clip_low=st.sampled_from([0.1, 0.2]),
    clip_high=st.sampled_from([0.2, 0.3]),
    dual_clip=st.sampled_from([None, 1.5, 3.0]),
    entropy_coef=st.sampled_from([0.0, 0.01]),
    kl_coef=st.sampled_from([0.001, 0.1]),
    kl_kind=st.sampled_from(["k1", "k2", "k3"]),
)


@given(experience(), policy_losses)
@settings(deadline=None)
def test_the_policy_loss_equals_its_definition(drawn, loss):
    batch, outputs, _ = drawn
    total, clipped = policy_oracle(loss, outputs.logprobs, outputs.entropy, batch)
    terms = loss(outputs, batch)
    assert terms.total.item() == pytest.approx(total, abs=1e-9)
    assert terms.metrics["clip_fraction"].item() == clipped


@given(experience(), st.sampled_from([math.inf, 0.1, 0.2]))
@settings(deadline=None)
def test_the_value_loss_equals_its_definition(drawn, clip):
    batch, _, outputs = drawn
    values, old, returns = outputs.values.numpy(), batch.values.numpy(), batch.returns.numpy()
    error = np.maximum((values - returns) ** 2, (old + np.clip(values - old, -clip, clip) - returns) ** 2)
    expected = float(np.sum(0.5 * error * batch.loss_weight.numpy() * batch.loss_mask.numpy()))
    assert ValueLoss(clip=clip)(outputs, batch).total.item() == pytest.approx(expected, abs=1e-9)


@given(experience(), st.integers(0, 2**31), st.integers(1, 5))
@settings(deadline=None)
def test_loss_and_gradient_are_the_same_for_any_micro_batch_split(drawn, seed, pieces):
    batch, tokens, values = drawn
    size = len(batch.inputs)
    split = np.array_split(np.random.default_rng(seed).permutation(size), pieces)
    policy, value = PolicyLoss(entropy_coef=0.01, kl_coef=0.1), ValueLoss()

    def run(parts):
        logprobs, critic = leaf(tokens.logprobs), leaf(values.values)
        sums: dict[str, float] = {}
        for places in parts:
            some = part(batch, places)
            outputs = TokenOutputs(logprobs=logprobs[places], entropy=tokens.entropy[places])
            for name, terms in (
                ("policy", policy(outputs, some)),
                ("value", value(ValueOutputs(values=critic[places]), some)),
            ):
                terms.total.backward()
                for key, number in {"total": terms.total, **terms.metrics}.items():
                    sums[f"{name}/{key}"] = sums.get(f"{name}/{key}", 0.0) + number.item()
        return sums, logprobs.grad, critic.grad

    whole, in_parts = run([np.arange(size)]), run([torch.from_numpy(places) for places in split if len(places)])
    assert in_parts[0] == pytest.approx(whole[0])
    torch.testing.assert_close(in_parts[1], whole[1])
    torch.testing.assert_close(in_parts[2], whole[2])


def test_a_value_loss_without_a_critic_is_refused():
    batch = dataclasses.replace(micro_batch(advantages=ADVANTAGES), values=None, returns=None)
    with pytest.raises(ValueError, match="needs the critic's values and targets"):
        ValueLoss()(ValueOutputs(values=ADVANTAGES), batch)
