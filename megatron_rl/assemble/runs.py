"""What a command runs: PPO, the supervised stage, engines alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_rl import device
from megatron_rl.assemble.audit import audit_engines, check_engine
from megatron_rl.assemble.gate import References, parity_gate, start_references
from megatron_rl.assemble.roles import (
    capability_line,
    checked_sync,
    engine_role,
    engine_spec,
    push_line,
    start_roles,
    start_trainer,
    take_turns,
)
from megatron_rl.checkpoints import RunCheckpoints, RunIdentity, SavedRun, check_same_run, check_whole, find_checkpoint
from megatron_rl.config.load import defaults, dotted, dump
from megatron_rl.config.schema import ClusterConfig, PPOConfig, RunConfig, SFTConfig
from megatron_rl.dataflow import Prompt
from megatron_rl.durable import locked, replace_text
from megatron_rl.experience.algorithm import advantage_estimator, loss_mean, policy_loss
from megatron_rl.experience.collect import DynamicSampling, FreshRollouts
from megatron_rl.experience.prompts import PromptStream, load_prompts, load_tokenizer, unwritten_start
from megatron_rl.experience.references import check_answers
from megatron_rl.experience.supervised import load_pairs
from megatron_rl.interfaces import StopRequest, results
from megatron_rl.maths.kl import KlControl
from megatron_rl.maths.losses import SupervisedLoss, ValueLoss
from megatron_rl.metrics import MetricLog, Source
from megatron_rl.model_dims import ModelDims, read_ending_tokens, read_model_dims
from megatron_rl.phases import TakingTurns
from megatron_rl.ppo import Run
from megatron_rl.ray_runtime.cluster import Cluster, Role, check_machine
from megatron_rl.ray_runtime.engines import Engines, Evaluated
from megatron_rl.ray_runtime.object_store import step_bytes
from megatron_rl.ray_runtime.rewards import RemoteRewards
from megatron_rl.ray_runtime.roles import HELD_TYPES, RemoteEngine, RemotePolicy, RemoteReference
from megatron_rl.ray_runtime.workers import WorkerGroup
from megatron_rl.rewards.overlong import OverlongPenalty
from megatron_rl.rewards.service import RewardService, reward_service
from megatron_rl.sft import SupervisedRun
from megatron_rl.vllm_engine.engine import EngineSpec, start_engine
from megatron_rl.weights.weight_map import Head

_LOCK_WAIT_S = 2.0
"""A run that was killed a moment ago may still be on its way out."""


@contextmanager
def open_run(config: RunConfig, stop: StopRequest) -> Iterator[Run]:
    """Start everything that a run needs, at the step of its newest checkpoint; leaving the block ends all of it.

    Raises:
        BlockingIOError: another process runs in the same folder.
        CheckpointProblem: the run's checkpoint is damaged, or was saved by another run.
        ClusterProblem: the machine or the cluster is too small.
        ValueError: a data file is unusable, or none of its answers can be right.
        WorkerFailed, WorkerDied, DeadlineExceeded: a worker did not come up.
    """
    gpus = device.gpu_count()
    check_machine(config.devices, gpus, config.cluster)
    check_engine(config.engine, gpus)
    dims, ending = read_model_dims(config.model.path), read_ending_tokens(config.model.path)
    tokenizer = load_tokenizer(config.model.path)
    with ExitStack() as stack:
        # before the prompts are read, so that its workers load while they are
        own_rewards = None if config.reward.pools else stack.enter_context(reward_service(config.reward)())
        prompts = load_prompts(config.data.train, tokenizer, config.data)
        heldout = load_prompts(config.data.heldout, tokenizer, config.data)
        wrong_answers = check_answers(config, {"train": prompts, "heldout": heldout}, own_rewards)
        evaluated = replace(heldout, prompts=heldout.prompts[: config.evaluation.prompts])
        identity = RunIdentity(
            model=asdict(dims), prompts=prompts.digest(), settings=dotted(config), heldout=evaluated.digest()
        )
        stack.enter_context(_held(config.run_dir))
        saved, changes = _saved(config, identity)
        _leave_settings(config)
        gated = config.parity.enabled and (saved is None or config.parity.on_resume)
        references = References()
        if gated:  # before the workers, so that it loads while they start
            references = start_references(
                stack, config, config.run_dir, resumed=None if saved is None else saved.folder / "hf"
            )
        log = stack.enter_context(ExitStack())  # closed when no worker is left: what it sends elsewhere may take long
        cluster = stack.enter_context(
            Cluster(config.cluster, gpus=gpus, run_dir=config.run_dir, objects=step_bytes(config))
        )
        roles = start_roles(cluster, config, dims)
        policy, critic, rewards = roles.policy, roles.critic, roles.rewards or own_rewards
        assert rewards is not None
        turns = take_turns(config, roles)
        engines = Engines(
            roles.engine,
            checked_sync(config, dims, roles, heldout.prompts, turns),
            restarts=config.engine.restarts,
            restart=roles.restart_engines,
            tell=lambda text: metrics.note(text),
            describe=(lambda: str(policy.slice_plan().result())) if config.engine.tensor > 1 else None,
        )
        stream = PromptStream(prompts.prompts, config.seed)
        kl_control = KlControl(config.ppo.kl_coef, target=config.ppo.kl_target, horizon=config.ppo.kl_horizon)
        checkpoints = stack.enter_context(
            RunCheckpoints(
                config.run_dir.resolve() / "checkpoints",
                keep=config.checkpoint.keep,
                keep_weights=config.checkpoint.keep_weights,
                asynchronous=config.checkpoint.asynchronous,
                models={"policy": policy} if critic is None else {"policy": policy, "critic": critic},
                parts={"prompts": stream, "kl_control": kl_control, "engines": engines},
                like=config.model.path.resolve(),
                identity=identity,
            )
        )
        start_step = checkpoints.start(saved)
        fresh = FreshRollouts(
            prompts=stream,
            engine=engines,
            rewards=rewards,
            config=config.rollout,
            seed=config.seed,
            max_error_rate=config.reward.max_error_rate,
            overlong=_overlong(config),
        )
        rounds = config.rollout.sampling_rounds
        sampling = DynamicSampling(source=fresh, max_rounds=rounds) if rounds else None
        sources: list[Source] = [turns.take_ledger] if isinstance(turns, TakingTurns) else []
        machine = _MachineMetrics(roles.groups, rewards, config.ppo.epochs)
        metrics = log.enter_context(
            MetricLog(
                config.run_dir,
                total_steps=config.steps,
                tensorboard=config.logging.tensorboard,
                wandb_project=config.logging.wandb_project,
                settings=identity.settings,
                sources=[*sources, machine] if sampling is None else [*sources, sampling.take_metrics, machine],
                start_step=start_step,
            )
        )
        metrics.note(push_line(config, policy.moved_bytes().result(), roles.transport))
        metrics.note(capability_line(roles.groups["policy"]))
        metrics.note(roles.linears)
        _note_start(metrics, unwritten_start(tokenizer, prompts.prompts[0].token_ids), "data.template")
        if (text := uncorrected_experts(dims, config.ppo)) is not None:
            metrics.note(text)
        _note_resumed(metrics, saved, changes, config.steps)
        for told in wrong_answers:
            metrics.note(told)
        for name, found in (("train", prompts), ("heldout", heldout)):
            if found.dropped:
                metrics.note(
                    f"data.{name}: {found.dropped} prompts are longer than data.max_prompt_tokens="
                    f"{config.data.max_prompt_tokens} and left out, {len(found.prompts)} are kept"
                )
        yield Run(
            config=config,
            start_step=start_step,
            collect=fresh if sampling is None else sampling,
            engine=Evaluated(engines),
            rewards=rewards,
            policy=policy,
            reference=RemoteReference(roles.groups["policy"]) if config.ppo.kl_coef > 0 else None,
            critic=critic,
            advantage=advantage_estimator(config.ppo),
            policy_loss=policy_loss(config.ppo),
            value_loss=ValueLoss(clip=config.ppo.value_clip),
            loss_mean=loss_mean(config),
            kl_control=kl_control,
            weights=engines,
            gate=parity_gate(config, dims, roles, references, heldout.prompts, metrics.note) if gated else None,
            checkpoints=checkpoints,
            stop=stop,
            heldout=evaluated.prompts,
            phases=turns,
            forced_eos=tuple(ending.with_stops(config.rollout.stop)) if config.rollout.force_eos else (),
            metrics=metrics,
        )


@contextmanager
def open_supervised(config: SFTConfig, stop: StopRequest) -> Iterator[SupervisedRun]:
    """Start what the supervised stage needs, at the step of its newest checkpoint; errors as :func:`open_run`.

    Raises:
        FileExistsError: the folder of the resulting model is there.
    """
    gpus, world = device.gpu_count(), config.trainer.layout.world_size
    check_machine(world, gpus, config.cluster)
    if config.output.exists():
        raise FileExistsError(f"output: {config.output} exists; remove it or name another folder")
    dims = read_model_dims(config.model.path)
    tokenizer = load_tokenizer(config.model.path)
    rows = load_pairs(config.data, tokenizer, dims.eos_ids[0], dims.max_positions)
    identity = RunIdentity(model=asdict(dims), prompts=rows.digest(), settings=dotted(config))
    with ExitStack() as stack:
        stack.enter_context(_held(config.run_dir))
        saved, changes = _saved(config, identity)
        _leave_settings(config)
        log = stack.enter_context(ExitStack())  # closed when no worker is left: what it sends elsewhere may take long
        cluster = stack.enter_context(Cluster(config.cluster, gpus=gpus, run_dir=config.run_dir))
        on_host = config.trainer.optimizer_on_host
        roles = [Role(name="trainer", workers=world, held_types=HELD_TYPES, on_host=on_host)]
        group = cluster.start(roles, device.worker_environment())["trainer"]
        start_trainer(group, config, Head.TOKEN, dims, config.steps).result()
        model = RemotePolicy(group)
        checkpoints = stack.enter_context(
            RunCheckpoints(
                config.run_dir.resolve() / "checkpoints",
                keep=config.checkpoint.keep,
                keep_weights=config.checkpoint.keep_weights,
                asynchronous=config.checkpoint.asynchronous,
                models={"policy": model},  # so that its folders are those of a run of PPO
                parts={"rows": rows},
                like=config.model.path.resolve(),
                identity=identity,
            )
        )
        start_step = checkpoints.start(saved)
        metrics = log.enter_context(
            MetricLog(
                config.run_dir,
                total_steps=config.steps,
                tensorboard=config.logging.tensorboard,
                wandb_project=config.logging.wandb_project,
                settings=identity.settings,
                start_step=start_step,
            )
        )
        metrics.note(capability_line(group))
        _note_start(metrics, unwritten_start(tokenizer, rows.first_prompt), "each prompt of data")
        _note_resumed(metrics, saved, changes, config.steps)
        yield SupervisedRun(
            config=config,
            start_step=start_step,
            rows=rows,
            model=model,
            loss=SupervisedLoss(),
            checkpoints=checkpoints,
            stop=stop,
            export=lambda: model.export_hf(config.output.resolve(), config.model.path.resolve()).result(),
            metrics=metrics,
        )


@contextmanager
def open_engine(config: RunConfig, model: Path) -> Iterator[tuple[RemoteEngine, RewardService, tuple[Prompt, ...]]]:
    """An engine on the weights in folder ``model``, a scorer and the held-out prompts; no trainer. Errors as
    :func:`open_run`.
    """
    gpus = device.gpu_count()
    check_machine(config.engine.count * config.engine.tensor, gpus, config.cluster)
    check_engine(config.engine, gpus)
    tokenizer = load_tokenizer(model)
    heldout = load_prompts(config.data.heldout, tokenizer, config.data)
    with (
        reward_service(config.reward)() as rewards,
        Cluster(config.cluster, gpus=gpus, run_dir=config.run_dir, objects=step_bytes(config)) as cluster,
    ):
        group = cluster.start([engine_role(config)], device.worker_environment())["engine"]
        group.build(start_engine, [(engine_spec(config, model, version=0),)] * config.engine.count).result()
        engine = RemoteEngine(group)
        audit_engines(engine, config, model)
        yield engine, rewards, heldout.prompts[: config.evaluation.prompts]


@contextmanager
def open_engines(spec: EngineSpec, count: int, cluster: ClusterConfig, run_dir: Path) -> Iterator[list[RemoteEngine]]:
    """``count`` engines alike, each in processes of its own; no trainer and no data. Errors as :func:`open_run`."""
    gpus = device.gpu_count()
    check_machine(count * spec.tensor, gpus, cluster)
    with Cluster(cluster, gpus=gpus, run_dir=run_dir) as started:
        groups = started.start(
            [Role(name=f"engine-{number}", workers=1, devices=spec.tensor) for number in range(count)],
            device.worker_environment(),
        )
        results({name: group.build(start_engine, [(spec,)]) for name, group in groups.items()})
        yield [RemoteEngine(group) for group in groups.values()]


@dataclass(frozen=True)
class _MachineMetrics:
    """What the workers say of a step: busy seconds and tokens per second by role and verb, largest resident set."""

    groups: Mapping[str, WorkerGroup]
    rewards: RewardService | RemoteRewards
    epochs: int

    def __call__(self, step: Mapping[str, float]) -> dict[str, float]:
        found: dict[str, float] = {}
        rewards = self.rewards.take_busy_seconds()
        for role, group in self.groups.items():
            taken = group.take_statistics()
            found |= {f"busy_s/{role}/{verb}": seconds for verb, seconds in taken.busy_s.items()}
            found[f"peak_rss_gib/{role}"] = taken.peak_rss_bytes / 2**30
        found = {key: value for key, value in found.items() if not key.startswith("busy_s/rewards/")}
        found["busy_s/rewards/score"] = rewards  # of all its workers, not of the calls that waited for them
        kept = step.get("rollout/response_tokens", 0.0)
        drawn = step.get("sampling/response_tokens", kept) + step.get("heldout/response_tokens", 0.0)
        scored = step.get("rollout/total_tokens", 0.0)
        for role, verb, tokens in (
            ("engine", "generate", drawn),
            ("policy", "logprobs", scored),
            ("policy", "reference_logprobs", scored),
            ("critic", "values", scored),
            ("policy", "update", scored * self.epochs),
            ("critic", "update", scored * self.epochs),
        ):
            seconds = found.get(f"busy_s/{role}/{verb}", 0.0)
            if seconds > 0 and tokens > 0:
                found[f"tokens_per_s/{role}/{verb}"] = tokens / seconds
        return found


def _overlong(config: RunConfig) -> OverlongPenalty | None:
    """The penalty of responses close to the limit, where one is asked for."""
    buffer = config.reward.overlong_buffer
    return OverlongPenalty(max_tokens=config.rollout.max_response_tokens, buffer=buffer) if buffer else None


def _held(run_dir: Path) -> AbstractContextManager[None]:
    """Make the run's folder, for this process alone to write to."""
    run_dir.mkdir(parents=True, exist_ok=True)
    return locked(run_dir / "lock", writing=run_dir, wait_s=_LOCK_WAIT_S)


def _saved(config: RunConfig | SFTConfig, identity: RunIdentity) -> tuple[SavedRun | None, list[str]]:
    """The run's newest checkpoint, checked, and what is set otherwise than when it was saved."""
    saved = find_checkpoint(config.run_dir.resolve() / "checkpoints")  # ranks read it, from a folder of their own
    if saved is None:
        return None, []
    changes = check_same_run(saved, identity, defaults(config))
    check_whole(saved)
    return saved, changes


def _note_resumed(metrics: MetricLog, saved: SavedRun | None, changes: Sequence[str], steps: int) -> None:
    if saved is not None:
        metrics.note(f"going on from {saved.folder}, after step {saved.step} of {steps}")
    for change in changes:
        metrics.note(f"changed since that checkpoint was saved: {change}")


def _note_start(metrics: MetricLog, token: str | None, where: str) -> None:
    if token is not None:
        metrics.note(
            f"prompts do not begin with {token}, which this tokenizer puts before a text, so that the model may have "
            f"been pretrained with it: if it was, write {token} at the beginning of {where}"
        )


def uncorrected_experts(dims: ModelDims, ppo: PPOConfig) -> str | None:
    """That a model with experts learns as if trainer and engine chose the same ones; None where it is not so."""
    if dims.experts is None or ppo.engine_correction is not None:
        return None
    return (
        f"{dims.architecture} has experts, of which trainer and engine choose some differently, and "
        "ppo.engine_correction is not set: such runs have collapsed; take 'icepop' with ppo.engine_ratio_low=0.5 and "
        "ppo.engine_ratio_high=5, or watch experience/engine_gap_mean (docs/models.md)"
    )


def _leave_settings(config: RunConfig | SFTConfig) -> None:
    replace_text(config.run_dir / "config.json", dump(config))
