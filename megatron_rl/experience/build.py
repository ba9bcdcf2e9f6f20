"""From a scored batch to everything PPO trains on."""

from __future__ import annotations

from megatron_rl.batches import ExperienceBatch, RolloutBatch
from megatron_rl.config.schema import PPOConfig
from megatron_rl.interfaces import PolicyModel, ReferenceModel, ValueModel
from megatron_rl.maths.advantages import gae, token_rewards
from megatron_rl.maths.diagnostics import explained_variance, logprob_gap
from megatron_rl.maths.kl import KlControl, kl_estimate
from megatron_rl.maths.masking import masked_mean, whiten


def build_experience(
    batch: RolloutBatch,
    policy: PolicyModel,
    critic: ValueModel,
    reference: ReferenceModel | None,
    kl_control: KlControl,
    ppo: PPOConfig,
) -> ExperienceBatch:
    """Score the batch with policy, critic and reference (side by side), then rewards, advantages and returns.

    The policy's own log-probs before the update are the old log-probs, never the engine's.
    """
    pending_old, pending_values = policy.logprobs(batch), critic.values(batch)
    pending_ref = None if reference is None else reference.logprobs(batch)
    old, values = pending_old.result(), pending_values.result()
    ref = None if pending_ref is None else pending_ref.result()
    mask = batch.response_mask
    penalty = None if ref is None or ppo.kl_in == "loss" else kl_estimate(old, ref, ppo.kl_kind)
    rewards = token_rewards(batch.scores, mask, penalty, kl_control.coef)
    advantages, returns = gae(rewards, values, mask, gamma=ppo.gamma, lam=ppo.lam)
    if ref is not None:
        kl_per_response = ((old - ref) * mask).sum(1).mean()
        kl_control.update(float(kl_per_response), batch.rows)
    return ExperienceBatch(
        rollouts=batch,
        old_logprobs=old,
        ref_logprobs=ref,
        values=values,
        rewards=rewards,
        advantages=whiten(advantages, mask) if ppo.whiten_advantages else advantages,
        returns=returns,
    )


def experience_metrics(experience: ExperienceBatch, kl_control: KlControl) -> dict[str, float]:
    """What the models say of the rollout before any update on it; KL in nats per token and per response."""
    batch, mask = experience.rollouts, experience.rollouts.response_mask
    gap = logprob_gap(experience.old_logprobs, batch.rollout_logprobs, batch.sampled_mask)
    metrics = {
        "engine_gap_mean": gap.mean_abs,
        "engine_gap_max": gap.max_abs,
        "engine_gap_k3": gap.k3,
        "value_mean": float(masked_mean(experience.values, mask)),
        "return_mean": float(masked_mean(experience.returns, mask)),
        "explained_variance": float(explained_variance(experience.values, experience.returns, mask)),
    }
    if experience.ref_logprobs is not None:
        difference = (experience.old_logprobs - experience.ref_logprobs) * mask
        metrics["kl"] = float(masked_mean(difference, mask))
        metrics["kl_per_response"] = float(difference.sum(1).mean())
        metrics["kl_coef"] = kl_control.coef
    return metrics
