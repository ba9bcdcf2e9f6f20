"""Start here: PPO on one screen.

``prompts -> rollouts -> scores -> experience -> update -> weight push``. The loop knows verbs, not machines: which
process, rank or device answers is decided in :mod:`megatron_rl.assemble`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.batches import ExperienceBatch, Minibatch
from megatron_rl.config.schema import RunConfig, due
from megatron_rl.dataflow import Prompt, Sampling
from megatron_rl.experience.batching import collate, minibatches
from megatron_rl.experience.build import adapt_kl, build_experience, calibration_metrics, experience_metrics
from megatron_rl.experience.collect import check_errors, rollout_metrics, sample_rows, sample_seed, score_rollouts
from megatron_rl.interfaces import (
    AdvantageEstimator,
    Checkpoints,
    Collect,
    Gate,
    LossMean,
    Pending,
    Phases,
    PolicyModel,
    ReferenceModel,
    RewardScorer,
    RolloutEngine,
    StopRequest,
    TokenLoss,
    UpdateResult,
    ValueLoss,
    ValueModel,
    WeightSync,
    results,
)
from megatron_rl.maths.kl import KlControl
from megatron_rl.metrics import MetricLog, StepLog

_NO_STEP = -1


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything the loop uses; put together by ``assemble``, or from fakes by a test."""

    config: RunConfig
    start_step: int
    collect: Collect
    engine: RolloutEngine
    rewards: RewardScorer
    policy: PolicyModel
    reference: ReferenceModel | None
    critic: ValueModel | None
    advantage: AdvantageEstimator
    policy_loss: TokenLoss
    value_loss: ValueLoss
    loss_mean: LossMean
    kl_control: KlControl
    weights: WeightSync
    gate: Gate | None
    checkpoints: Checkpoints
    stop: StopRequest
    heldout: tuple[Prompt, ...]
    forced_eos: tuple[int, ...]
    phases: Phases
    metrics: MetricLog


def train(run: Run) -> int:
    """Run the loop from ``run.start_step`` to ``run.config.steps``, or until it is asked to stop; gives steps done."""
    cfg = run.config
    with run.phases.pushing():
        run.weights.push(version=run.start_step)
    with run.metrics.evaluation(run.start_step) as log:
        if run.gate is not None:
            with log.phase("parity"), run.phases.comparing():
                log.update("parity", run.gate())
        if cfg.evaluation.at_start:
            evaluate(run, log)
    for step in (steps := range(run.start_step, run.start_step if run.stop.asked else cfg.steps)):
        with run.metrics.step(step) as log:
            with log.phase("generate"), run.phases.generating():
                scored = run.collect(cfg.prompts_per_step, step)  # take, generate, score
            batch = collate(scored, run.forced_eos, version=step)
            log.update("rollout", rollout_metrics(scored, batch))
            log.rows("samples", sample_rows(scored, step, count=cfg.logging.samples))
            with log.phase("experience"), run.phases.training():
                experience = build_experience(
                    batch, run.policy, run.critic, run.reference, run.kl_control, run.advantage, cfg.ppo
                )
            log.update("experience", experience_metrics(experience, run.kl_control, cfg))
            log.update("critic_calibration", calibration_metrics(experience))
            if cfg.ppo.policy_learns(step):
                adapt_kl(run.kl_control, experience)
            with log.phase("update"), run.phases.training():
                for minibatch in minibatches(experience, cfg.ppo, run.loss_mean, seed=(cfg.seed, step)):
                    for model, done in results(updates(run, minibatch, step)).items():
                        log.update(model, done.as_metrics())
            with log.phase("push"), run.phases.pushing():
                log.update("push", run.weights.push(version=step + 1))
            accuracy = evaluate(run, log) if due(step, cfg.evaluation.every, cfg.steps) else None
            if (stopping := run.stop.asked) or due(step, cfg.checkpoint.every, cfg.steps):
                with log.phase("checkpoint"), run.phases.saving():
                    last = stopping or step + 1 == cfg.steps
                    log.update("checkpoint", run.checkpoints.save(step + 1, accuracy, wait=last))
        if stopping:
            return step + 1
    return max(run.start_step, steps.stop)


def updates(run: Run, minibatch: Minibatch[ExperienceBatch], step: int) -> dict[str, Pending[UpdateResult]]:
    """Start one optimizer step of each model that learns in this step: side by side on devices of their own."""
    started = {} if run.critic is None else {"critic": run.critic.update(minibatch, run.value_loss)}
    if run.config.ppo.policy_learns(step):
        started["policy"] = run.policy.update(minibatch, run.policy_loss)
    return started


def heldout_sampling(config: RunConfig) -> Sampling:
    """How held-out prompts are answered."""
    rollout, temperature = config.rollout, config.evaluation.temperature
    return Sampling(temperature=temperature, max_tokens=rollout.max_response_tokens, stop=rollout.stop)


def evaluate(run: Run, log: StepLog) -> float | None:
    """Log accuracy, mean length (tokens) and format rate on the held-out prompts, with the weights last pushed; the
    seeds are the same each time.

    Returns:
        the accuracy, where the rule tells it.
    """
    seed, numbers = run.config.seed, range(run.config.evaluation.samples)
    seeds = [[sample_seed(seed, _NO_STEP, prompt.id, number) for number in numbers] for prompt in run.heldout]
    sampling = heldout_sampling(run.config)
    with log.phase("evaluate"), run.phases.generating():
        scored = score_rollouts(run.engine.generate(run.heldout, sampling, seeds), run.rewards)
    found = rollout_metrics(scored)
    log.update("heldout", {**found, "temperature": sampling.temperature})
    check_errors(scored, run.config.reward.max_error_rate)
    return found.get("accuracy")
