"""From a scored batch to everything the losses train on."""

from __future__ import annotations

from megatron_rl.batches import ExperienceBatch, RolloutBatch
from megatron_rl.config.schema import PPOConfig, RunConfig
from megatron_rl.interfaces import AdvantageEstimator, PolicyModel, ReferenceModel, ValueModel
from megatron_rl.maths.advantages import token_rewards
from megatron_rl.maths.diagnostics import critic_calibration, explained_variance, logprob_gap
from megatron_rl.maths.kl import KlControl, kl_estimate
from megatron_rl.maths.masking import masked_mean


def build_experience(
    batch: RolloutBatch,
    policy: PolicyModel,
    critic: ValueModel | None,
    reference: ReferenceModel | None,
    kl_control: KlControl,
    advantage: AdvantageEstimator,
    ppo: PPOConfig,
) -> ExperienceBatch:
    """Score the batch with policy, critic and reference (side by side), then rewards, advantages and the critic's
    targets.

    The policy's own log-probs before the update are the old log-probs, never the engine's.
    """
    pending_old = policy.logprobs(batch)
    pending_values = None if critic is None else critic.values(batch)
    pending_ref = None if reference is None else reference.logprobs(batch)
    old = pending_old.result()
    values = None if pending_values is None else pending_values.result()
    ref = None if pending_ref is None else pending_ref.result()
    mask = batch.response_mask
    penalty = None if ref is None or ppo.kl_in == "loss" else kl_estimate(old, ref, ppo.kl_kind)
    rewards = token_rewards(batch.scores, mask, penalty, kl_control.coef)
    advantages, returns = advantage(rewards, values, mask, batch.group)
    return ExperienceBatch(
        rollouts=batch,
        old_logprobs=old,
        ref_logprobs=ref,
        values=values,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
    )


def adapt_kl(kl_control: KlControl, experience: ExperienceBatch) -> None:
    """Move the coefficient by the KL of this rollout (:meth:`KlControl.update`), for the next one."""
    rollouts, ref = experience.rollouts, experience.ref_logprobs
    if ref is not None:
        per_response = ((experience.old_logprobs - ref) * rollouts.response_mask).sum(1)
        kl_control.update(float(per_response.mean()), rollouts.rows)


def experience_metrics(experience: ExperienceBatch, kl_control: KlControl, config: RunConfig) -> dict[str, float]:
    """What the models say of the rollout before any update on it; KL in nats per token and per response. To be called
    before :func:`adapt_kl`: the coefficient is the one that the experience was made with. The gap between trainer and
    engine is left out where they take log-probs at different temperatures, which are apart for that alone. All speak of
    every sample, those that ``ppo.mask_truncated`` keeps out of the loss too.
    """
    batch, mask = experience.rollouts, experience.rollouts.response_mask
    metrics: dict[str, float] = {}
    if config.ppo.mask_truncated:
        metrics["masked_samples"] = float(batch.truncated.float().mean())
        metrics["masked_tokens"] = float(masked_mean(batch.truncated[:, None].expand(mask.shape).float(), mask))
    if config.trainer_temperature == config.rollout.temperature:
        gap = logprob_gap(experience.old_logprobs, batch.rollout_logprobs, batch.sampled_mask)
        metrics |= {"engine_gap_mean": gap.mean_abs, "engine_gap_max": gap.max_abs, "engine_gap_k3": gap.k3}
    if experience.values is not None and experience.returns is not None:
        metrics["value_mean"] = float(masked_mean(experience.values, mask))
        metrics["return_mean"] = float(masked_mean(experience.returns, mask))
        metrics["explained_variance"] = explained_variance(experience.values, experience.returns, mask)
    if experience.ref_logprobs is not None:
        difference = (experience.old_logprobs - experience.ref_logprobs) * mask
        metrics["kl"] = float(masked_mean(difference, mask))
        metrics["kl_per_response"] = float(difference.sum(1).mean())
        metrics["kl_coef"] = kl_control.coef
    return metrics


def calibration_metrics(experience: ExperienceBatch) -> dict[str, float]:
    """Mean value, mean return and tokens of each bucket of :func:`critic_calibration`; nothing without a critic. The
    means of a bucket without tokens are left out.
    """
    if experience.values is None or experience.returns is None:
        return {}
    buckets = critic_calibration(experience.values, experience.returns, experience.rollouts.response_mask)
    metrics = {f"{name}/tokens": float(bucket.tokens) for name, bucket in buckets.items()}
    for name, bucket in buckets.items():
        if bucket.tokens:
            metrics |= {f"{name}/value": bucket.value, f"{name}/return": bucket.return_}
    return metrics
