"""The composition root: from a configuration to a run. The only file that sees Megatron, vLLM and Ray together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from megatron_rl import device
from megatron_rl.batches import TokenRows
from megatron_rl.checkpoints import RunCheckpoints, RunIdentity, check_same_run, check_whole, find_checkpoint
from megatron_rl.config.load import dotted, dump
from megatron_rl.config.schema import RunConfig, SFTConfig
from megatron_rl.dataflow import Prompt
from megatron_rl.experience.algorithm import advantage_estimator, loss_mean, policy_loss
from megatron_rl.experience.collect import DynamicSampling, FreshRollouts
from megatron_rl.experience.prompts import PromptStream, load_prompts
from megatron_rl.experience.supervised import supervised_batches
from megatron_rl.interfaces import Pending, StopRequest, results
from megatron_rl.maths.kl import KlControl
from megatron_rl.maths.losses import SupervisedLoss, ValueLoss
from megatron_rl.mcore.spec import WorkerSpec, start_worker
from megatron_rl.metrics import MetricLog
from megatron_rl.model_dims import ModelDims, read_model_dims
from megatron_rl.ppo import Run
from megatron_rl.ray_runtime.cluster import Cluster, Role, check_machine
from megatron_rl.ray_runtime.roles import (
    HELD_TYPES,
    RemoteCritic,
    RemoteEngine,
    RemotePolicy,
    RemoteReference,
    connect,
)
from megatron_rl.ray_runtime.workers import WorkerGroup
from megatron_rl.rewards.overlong import OverlongPenalty
from megatron_rl.rewards.service import RewardService
from megatron_rl.sft import SupervisedRun
from megatron_rl.vllm_engine.engine import EngineSpec, start_engine
from megatron_rl.weights.sync import CheckedSync
from megatron_rl.weights.weight_map import Head

_PROBE_ROWS = 8


@contextmanager
def open_run(config: RunConfig, stop: StopRequest) -> Iterator[Run]:
    """Start everything that a run needs, at the step of its newest checkpoint; leaving the block ends all of it.

    Raises:
        CheckpointProblem: the run's checkpoint is damaged, or was saved by another run.
        ClusterProblem: the machine or the cluster is too small.
        ValueError: a data file is unusable.
        WorkerFailed, WorkerDied, DeadlineExceeded: a worker did not come up.
    """
    gpus = device.gpu_count()
    ranks = {role: trainer.layout.world_size for role, trainer in config.trainers.items()}
    check_machine(sum(ranks.values()) + config.engine.count * config.engine.tensor, gpus, config.cluster)
    dims = read_model_dims(config.model.path)
    tokenizer = Tokenizer.from_file(str(config.model.path / "tokenizer.json"))
    prompts = load_prompts(config.data.train, tokenizer, config.data)
    heldout = load_prompts(config.data.heldout, tokenizer, config.data)
    identity = RunIdentity(model=asdict(dims), prompts=prompts.digest(), settings=dotted(config))
    saved = find_checkpoint(config.run_dir / "checkpoints")
    changes = []
    if saved is not None:
        changes = check_same_run(saved, identity)
        check_whole(saved)
    prepare_folder(config)
    with ExitStack() as stack:
        rewards = stack.enter_context(
            RewardService(config.reward.rule, workers=config.reward.workers, timeout_s=config.reward.timeout_s)
        )
        cluster = stack.enter_context(Cluster(config.cluster, gpus=gpus, run_dir=config.run_dir))
        groups = cluster.start(
            [
                *(Role(name=role, workers=workers, held_types=HELD_TYPES) for role, workers in ranks.items()),
                _engine_role(config),
            ],
            device.worker_environment(),
        )
        critic_updates = config.steps * config.updates_per_step
        policy_updates = max(1, (config.steps - config.ppo.critic_warmup_steps) * config.updates_per_step)
        starting = {
            "policy": _start_trainer(groups["policy"], config, Head.TOKEN, dims, policy_updates),
            "engine": groups["engine"].build(
                start_engine, [(_engine_spec(config, config.model.path),)] * config.engine.count
            ),
        }
        if config.critic is not None:
            starting["critic"] = _start_trainer(groups["critic"], config, Head.VALUE, dims, critic_updates)
        results(starting)
        policy, engine = RemotePolicy(groups["policy"]), RemoteEngine(groups["engine"])
        critic = None if config.critic is None else RemoteCritic(groups["critic"])
        transport = connect(
            policy,
            engine,
            config.sync,
            tensor=config.engine.tensor,
            cuda=gpus > 0,
            timeout_s=config.cluster.start_deadline_s,
        )
        stream = PromptStream(prompts.prompts, config.seed)
        kl_control = KlControl(config.ppo.kl_coef, target=config.ppo.kl_target, horizon=config.ppo.kl_horizon)
        checkpoints = stack.enter_context(
            RunCheckpoints(
                config.run_dir.resolve() / "checkpoints",
                keep=config.checkpoint.keep,
                asynchronous=config.checkpoint.asynchronous,
                models={"policy": policy} if critic is None else {"policy": policy, "critic": critic},
                parts={"prompts": stream, "kl_control": kl_control},
                like=config.model.path.resolve(),
                identity=identity,
            )
        )
        start_step = checkpoints.start(saved)
        fresh = FreshRollouts(
            prompts=stream,
            engine=engine,
            rewards=rewards,
            config=config.rollout,
            seed=config.seed,
            overlong=_overlong(config),
        )
        rounds = config.rollout.sampling_rounds
        sampling = DynamicSampling(source=fresh, max_rounds=rounds) if rounds else None
        machine = _MachineMetrics(groups, rewards, config.ppo.epochs)
        metrics = stack.enter_context(
            MetricLog(
                config.run_dir,
                total_steps=config.steps,
                tensorboard=config.logging.tensorboard,
                wandb_project=config.logging.wandb_project,
                sources=[machine] if sampling is None else [sampling.take_metrics, machine],
                start_step=start_step,
            )
        )
        receivers = config.engine.count * config.engine.tensor
        metrics.note(f"weights go from the policy's rank 0 to {receivers} engine worker(s) by {transport.value}")
        if saved is not None:
            metrics.note(f"going on from {saved.folder}, after step {start_step} of {config.steps}")
        for change in changes:
            metrics.note(f"changed since that checkpoint was saved: {change}")
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
            engine=engine,
            rewards=rewards,
            policy=policy,
            reference=RemoteReference(groups["policy"]) if config.ppo.kl_coef > 0 else None,
            critic=critic,
            advantage=advantage_estimator(config.ppo),
            policy_loss=policy_loss(config.ppo),
            value_loss=ValueLoss(clip=config.ppo.value_clip),
            loss_mean=loss_mean(config),
            kl_control=kl_control,
            weights=CheckedSync(
                sender=policy,
                receiver=engine,
                probe=_probe(heldout.prompts, dims),
                probe_tolerance=config.sync.probe_tolerance,
                phase_deadline_s=config.sync.phase_deadline_s,
            ),
            checkpoints=checkpoints,
            stop=stop,
            heldout=heldout.prompts[: config.evaluation.prompts],
            forced_eos=dims.eos_ids[0] if config.rollout.force_eos else None,
            metrics=metrics,
        )


@contextmanager
def open_engine(config: RunConfig, model: Path) -> Iterator[tuple[RemoteEngine, RewardService, tuple[Prompt, ...]]]:
    """An engine on the weights in folder ``model``, a scorer and the held-out prompts; no trainer. Errors as
    :func:`open_run`.
    """
    gpus = device.gpu_count()
    check_machine(config.engine.count * config.engine.tensor, gpus, config.cluster)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    heldout = load_prompts(config.data.heldout, tokenizer, config.data)
    with (
        RewardService(config.reward.rule, workers=config.reward.workers, timeout_s=config.reward.timeout_s) as rewards,
        Cluster(config.cluster, gpus=gpus, run_dir=config.run_dir) as cluster,
    ):
        group = cluster.start([_engine_role(config)], device.worker_environment())["engine"]
        group.build(start_engine, [(_engine_spec(config, model, version=0),)] * config.engine.count).result()
        yield RemoteEngine(group), rewards, heldout.prompts[: config.evaluation.prompts]


@contextmanager
def open_supervised(config: SFTConfig) -> Iterator[SupervisedRun]:
    """Start what the supervised stage needs; errors as :func:`open_run`."""
    gpus, world = device.gpu_count(), config.trainer.layout.world_size
    check_machine(world, gpus, config.cluster)
    if config.output.exists():
        raise FileExistsError(f"output: {config.output} exists; remove it or name another folder")
    dims = read_model_dims(config.model.path)
    tokenizer = Tokenizer.from_file(str(config.model.path / "tokenizer.json"))
    batches = supervised_batches(
        config.data,
        tokenizer,
        dims.eos_ids[0],
        dims.max_positions,
        steps=config.steps,
        samples_per_step=config.samples_per_step,
    )
    prepare_folder(config)
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(config.cluster, gpus=gpus, run_dir=config.run_dir))
        roles = [Role(name="trainer", workers=world, held_types=HELD_TYPES)]
        group = cluster.start(roles, device.worker_environment())["trainer"]
        _start_trainer(group, config, Head.TOKEN, dims, config.steps).result()
        model = RemotePolicy(group)
        metrics = stack.enter_context(
            MetricLog(
                config.run_dir,
                total_steps=config.steps,
                tensorboard=config.logging.tensorboard,
                wandb_project=config.logging.wandb_project,
            )
        )
        yield SupervisedRun(
            batches=batches,
            model=model,
            loss=SupervisedLoss(),
            export=lambda: model.export_hf(config.output.resolve(), config.model.path.resolve()).result(),
            metrics=metrics,
        )


def prepare_folder(config: RunConfig | SFTConfig) -> None:
    """Make the run's folder and leave the resolved configuration in it."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.json").write_text(dump(config))


@dataclass(frozen=True)
class _MachineMetrics:
    """What the workers say of a step: busy seconds and tokens per second by role and verb, largest resident set."""

    groups: Mapping[str, WorkerGroup]
    rewards: RewardService
    epochs: int

    def __call__(self, step: Mapping[str, float]) -> dict[str, float]:
        found = {"busy_s/rewards/score": self.rewards.take_busy_seconds()}
        for role, group in self.groups.items():
            taken = group.take_statistics()
            found |= {f"busy_s/{role}/{verb}": seconds for verb, seconds in taken.busy_s.items()}
            found[f"peak_rss_gib/{role}"] = taken.peak_rss_bytes / 2**30
        kept = step.get("rollout/response_tokens", 0.0)
        drawn = step.get("sampling/response_tokens", kept) + step.get("heldout/response_tokens", 0.0)
        scored = step.get("rollout/total_tokens", 0.0)
        for role, verb, tokens in (
            ("engine", "generate", drawn),
            ("policy", "logprobs", scored),
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


def _probe(prompts: Sequence[Prompt], dims: ModelDims) -> TokenRows:
    """A few fixed rows that trainer and engine score after every push: held-out prompts of at least two tokens."""
    rows = [prompt.token_ids for prompt in prompts if len(prompt.token_ids) > 1][:_PROBE_ROWS]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), dims.pad_id)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    places = torch.arange(tokens.shape[1])
    return TokenRows(tokens=tokens, lengths=lengths, response_mask=(places > 0) & (places < lengths[:, None]))


def _engine_role(config: RunConfig) -> Role:
    return Role(name="engine", workers=config.engine.count, devices=config.engine.tensor)


def _engine_spec(config: RunConfig, model: Path, version: int | None = None) -> EngineSpec:
    """An engine for this run; with a ``version`` it may generate from the weights it loads."""
    return EngineSpec(
        model=model.resolve(),
        dtype=config.model.dtype,
        max_model_len=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        kv_cache_mib=config.engine.kv_cache_mib,
        max_concurrent=config.engine.max_concurrent,
        tensor=config.engine.tensor,
        on_cpu=not device.has_cuda(),
        version=version,
    )


def _start_trainer(
    group: WorkerGroup, config: RunConfig | SFTConfig, head: Head, dims: ModelDims, total_updates: int
) -> Pending[None]:
    """Build the ranks of one model."""
    if isinstance(config, SFTConfig):
        trainer, temperature, keep_reference = config.trainer, 1.0, False
    else:
        trainer = config.trainers[group.name]
        temperature, keep_reference = config.rollout.temperature, head is Head.TOKEN and config.ppo.kl_coef > 0
    spec = WorkerSpec(
        role=group.name,
        head=head,
        model=config.model,
        dims=dims,
        trainer=trainer,
        temperature=temperature,
        total_updates=total_updates,
        seed=config.seed,
        keep_reference=keep_reference,
    )
    host = group.births(config.cluster.start_deadline_s)[0].address
    port = group.free_port(config.cluster.start_deadline_s)
    deadline = config.cluster.call_deadline_s
    return group.build(start_worker, [(spec, rank, host, port, deadline) for rank in range(trainer.layout.world_size)])
