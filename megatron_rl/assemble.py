"""The composition root: from a configuration to a run. The only file that sees Megatron, vLLM and Ray together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from megatron_rl import device
from megatron_rl.batches import TokenRows
from megatron_rl.checkpoints import RunCheckpoints, RunIdentity, check_same_run, check_whole, find_checkpoint
from megatron_rl.config.load import dotted, dump
from megatron_rl.config.schema import (
    ClusterConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    ParityConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
    TrainerConfig,
)
from megatron_rl.dataflow import Prompt
from megatron_rl.experience.algorithm import advantage_estimator, loss_mean, policy_loss
from megatron_rl.experience.collect import DynamicSampling, FreshRollouts
from megatron_rl.experience.prompts import PromptStream, load_prompts
from megatron_rl.experience.supervised import supervised_batches
from megatron_rl.hf_reference.process import HfProcess, HfScorer
from megatron_rl.interfaces import Gate, Pending, ScoresTokens, StopRequest, results
from megatron_rl.layout import ParallelLayout
from megatron_rl.maths.kl import KlControl
from megatron_rl.maths.losses import SupervisedLoss, ValueLoss
from megatron_rl.mcore.spec import WorkerSpec, start_worker
from megatron_rl.metrics import MetricLog
from megatron_rl.model_dims import ModelDims, read_model_dims
from megatron_rl.parity import Pair, Tolerance, check_parity, parity_rows
from megatron_rl.ppo import Run
from megatron_rl.ray_runtime.cluster import Cluster, Role, check_machine
from megatron_rl.ray_runtime.roles import (
    HELD_TYPES,
    CriticScorer,
    EngineScorer,
    PolicyScorer,
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
from megatron_rl.weights.safetensors_io import HfFolder
from megatron_rl.weights.sync import CheckedSync
from megatron_rl.weights.transfer import Transport
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
    check_machine(_processes(config), gpus, config.cluster)
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
    gated = config.parity.enabled and (saved is None or config.parity.on_resume)
    with ExitStack() as stack:
        rewards = stack.enter_context(_reward_service(config.reward))
        references = _References()
        if gated:  # before the workers, so that it loads while they start
            references = _start_references(
                stack, config, config.run_dir, resumed=None if saved is None else saved.folder / "hf"
            )
        cluster = stack.enter_context(Cluster(config.cluster, gpus=gpus, run_dir=config.run_dir))
        roles = _start_roles(cluster, config, dims)
        policy, critic, engine = roles.policy, roles.critic, roles.engine
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
        machine = _MachineMetrics(roles.groups, rewards, config.ppo.epochs)
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
        metrics.note(f"weights go from the policy's rank 0 to {receivers} engine worker(s) by {roles.transport.value}")
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
            reference=RemoteReference(roles.groups["policy"]) if config.ppo.kl_coef > 0 else None,
            critic=critic,
            advantage=advantage_estimator(config.ppo),
            policy_loss=policy_loss(config.ppo),
            value_loss=ValueLoss(clip=config.ppo.value_clip),
            loss_mean=loss_mean(config),
            kl_control=kl_control,
            weights=_sync(config, dims, roles, heldout.prompts),
            gate=_gate(config, dims, roles, references, heldout.prompts, metrics.note) if gated else None,
            checkpoints=checkpoints,
            stop=stop,
            heldout=heldout.prompts[: config.evaluation.prompts],
            forced_eos=dims.eos_ids[0] if config.rollout.force_eos else None,
            metrics=metrics,
        )


@dataclass(frozen=True, kw_only=True)
class _Roles:
    """The models of a run at work, with the channel between policy and engine open; weights travel by ``transport``."""

    groups: Mapping[str, WorkerGroup]
    policy: RemotePolicy
    critic: RemoteCritic | None
    engine: RemoteEngine
    transport: Transport


def _start_roles(cluster: Cluster, config: RunConfig, dims: ModelDims) -> _Roles:
    """Start policy, critic and engine side by side."""
    groups = cluster.start(
        [
            *(
                Role(name=role, workers=trainer.layout.world_size, held_types=HELD_TYPES)
                for role, trainer in config.trainers.items()
            ),
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
        cuda=device.has_cuda(),
        timeout_s=config.cluster.start_deadline_s,
    )
    return _Roles(groups=groups, policy=policy, critic=critic, engine=engine, transport=transport)


def _sync(config: RunConfig, dims: ModelDims, roles: _Roles, prompts: Sequence[Prompt]) -> CheckedSync:
    return CheckedSync(
        sender=roles.policy,
        receiver=roles.engine,
        probe=_probe(prompts, dims),
        probe_tolerance=config.sync.probe_tolerance,
        phase_deadline_s=config.sync.phase_deadline_s,
    )


@contextmanager
def open_parity(config: RunConfig, tell: Callable[[str], None]) -> Iterator[Gate]:
    """Start the models of a new run and push the policy's weights to the engine; the gate then holds them side by side.

    What it writes goes to a folder beside the run's, which stays untouched. Errors as :func:`open_run`.
    """
    run_dir = config.run_dir.with_name(f"{config.run_dir.name}-parity")
    gpus = device.gpu_count()
    check_machine(_processes(config), gpus, config.cluster)
    dims = read_model_dims(config.model.path)
    tokenizer = Tokenizer.from_file(str(config.model.path / "tokenizer.json"))
    heldout = load_prompts(config.data.heldout, tokenizer, config.data)
    with ExitStack() as stack:
        references = _start_references(stack, config, run_dir)
        roles = _start_roles(stack.enter_context(Cluster(config.cluster, gpus=gpus, run_dir=run_dir)), config, dims)
        _sync(config, dims, roles, heldout.prompts).push(0)
        yield _gate(config, dims, roles, references, heldout.prompts, tell)


@dataclass(frozen=True, kw_only=True)
class _References:
    """What the gate compares with.

    Attributes:
        policy: the language model; None where it is too large, or there is no gate.
        critic: the same model read as a critic; None also where none is trained, or a trained one is resumed.
        through: [h] what the critics' values are read through in place of their heads.
        skipped: what is not compared, and why.
    """

    policy: HfScorer | None = None
    critic: HfScorer | None = None
    through: Tensor | None = None
    skipped: str | None = None


def _start_references(stack: ExitStack, config: RunConfig, run_dir: Path, resumed: Path | None = None) -> _References:
    """Start what the gate compares with; it loads from now on.

    A critic starts from the policy's folder with a value head of zeros, under which any trunk gives the same values: it
    is read through a fixed vector then, as is the language model that it was made from. A checkpoint that is
    ``resumed`` holds the policy as a Hugging Face folder, and no critic.
    """
    folder = resumed or config.model.path
    through = None
    if config.critic is not None and resumed is None:
        hidden = read_model_dims(folder).hidden
        through = torch.nn.functional.normalize(torch.arange(1.0, hidden + 1).cos(), dim=0)
    parameters = sum(math.prod(info.shape) for info in HfFolder(folder).infos().values())
    if parameters > config.parity.reference_max_parameters:
        skipped = (
            f"parity: not compared with Hugging Face: the model has {parameters:.3g} parameters, more than "
            f"parity.reference_max_parameters={config.parity.reference_max_parameters:.3g}"
        )
        return _References(through=through, skipped=skipped)
    process = stack.enter_context(_reference(config.cluster, folder, Head.TOKEN, run_dir))
    critic = None if through is None else HfScorer(process=process, head=Head.VALUE, through=through)
    return _References(policy=HfScorer(process=process, head=Head.TOKEN), critic=critic, through=through)


def _reference(cluster: ClusterConfig, folder: Path, head: Head, run_dir: Path) -> HfProcess:
    return HfProcess(
        folder.resolve(),
        head,
        environment=device.worker_environment(),
        scratch=run_dir.resolve() / "scratch",
        log=run_dir.resolve() / "logs" / "hugging_face.log",
        deadline_s=cluster.call_deadline_s,
    )


def _gate(
    config: RunConfig,
    dims: ModelDims,
    roles: _Roles,
    references: _References,
    prompts: Sequence[Prompt],
    tell: Callable[[str], None],
) -> Gate:
    """The gate of a run: from the reference outwards to the engine."""
    policy, engine = _scorer(roles.policy, packed=True), EngineScorer(roles.engine)
    pairs = [Pair(_scorer(roles.policy, packed=False), policy), Pair(engine, policy)]
    if roles.critic is not None:
        critic, alone = (_scorer(roles.critic, packed, references.through) for packed in (True, False))
        pairs.insert(1, Pair(alone, critic))
        if references.critic is not None:
            pairs.insert(1, Pair(critic, references.critic))
    if references.policy is not None:
        pairs = [Pair(policy, references.policy), *pairs, Pair(engine, references.policy)]
    rows = parity_rows(
        (prompt.token_ids for prompt in prompts),
        vocabulary=dims.vocabulary,
        rows=config.parity.rows,
        longest=min(config.parity.row_tokens, config.data.max_prompt_tokens + config.rollout.max_response_tokens - 1),
        pad_id=dims.pad_id,
    )

    def check() -> Mapping[str, float]:
        if references.skipped is not None:
            tell(references.skipped)
        found = check_parity(pairs, rows, _tolerance(config.parity, config.model.dtype), tell)
        if references.policy is not None:
            references.policy.process.close()
        return found

    return check


def verify_folder(
    model: ModelConfig,
    *,
    dims: ModelDims,
    reference: Path,
    head: Head,
    layout: ParallelLayout,
    engine: EngineConfig | None,
    parity: ParityConfig,
    cluster: ClusterConfig,
    run_dir: Path,
    tell: Callable[[str], None],
) -> dict[str, float]:
    """Hold a model folder as Hugging Face runs it against Megatron ranks at ``layout``, packed and unpacked, and
    against an engine that loads the folder as well.

    The model's size is not bounded here, whatever ``parity`` says: who asks for this wants the reference.

    Args:
        model: the folder that the ranks load, of Hugging Face or of megatron-core (``torch_dist``), and the type of the
            weights in the ranks and in the engine.
        dims: sizes of the model that the ranks make, of that folder's configuration.
        reference: the Hugging Face folder that transformers and the engine load; it may be the same.
        head: TOKEN for a language model, VALUE for a critic.
        layout: of the Megatron ranks.
        engine: None: without one.
        parity: rows and tolerances.
        cluster: where the ranks and the engine run.
        run_dir: gets logs and what libraries cache.
        tell: gets the table of differences.

    Returns:
        the differences, see :func:`~megatron_rl.parity.check_parity`.

    Raises:
        ParityFailed: they differ; the message names the first tensor.
        ReferenceFailed: transformers cannot load the folder.
        ValueError: an engine is asked for with a critic, or the model cannot be laid out so.
    """
    if engine is not None and head is Head.VALUE:
        raise ValueError("an engine scores tokens, which a critic does not: leave the engine out")
    if problems := dims.layout_problems(layout):
        raise ValueError("; ".join(problems))
    gpus = device.gpu_count()
    check_machine(layout.world_size + (engine is not None), gpus, cluster)
    longest = min(parity.row_tokens, dims.max_positions - 1)
    rows = parity_rows([], vocabulary=dims.vocabulary, rows=parity.rows, longest=longest, pad_id=dims.pad_id)
    role = "policy" if head is Head.TOKEN else "critic"
    spec = WorkerSpec(
        role=role,
        head=head,
        model=dataclasses.replace(model, path=model.path.resolve()),
        dims=dims,
        trainer=TrainerConfig(layout=layout, optimizer=OptimizerConfig(lr=0.0)),
        temperature=1.0,
        total_updates=1,
        seed=0,
        keep_reference=False,
    )
    asked = [Role(name=role, workers=layout.world_size, held_types=HELD_TYPES)]
    asked += [] if engine is None else [Role(name="engine", workers=1)]
    with (
        _reference(cluster, reference, head, run_dir) as process,
        Cluster(cluster, gpus=gpus, run_dir=run_dir) as running,
    ):
        groups = running.start(asked, device.worker_environment())
        starting = {role: _start_ranks(groups[role], spec, cluster)}
        if engine is not None:
            engine_spec = EngineSpec(
                model=reference.resolve(),
                dtype=model.dtype,
                max_model_len=longest + 1,
                kv_cache_mib=engine.kv_cache_mib,
                max_concurrent=engine.max_concurrent,
                on_cpu=not device.has_cuda(),
                version=0,
            )
            starting["engine"] = groups["engine"].build(start_engine, [(engine_spec,)])
        results(starting)
        ranks = RemotePolicy(groups[role]) if head is Head.TOKEN else RemoteCritic(groups[role])
        packed, alone = (_scorer(ranks, packed) for packed in (True, False))
        hugging_face = HfScorer(process=process, head=head)
        pairs = [Pair(packed, hugging_face), Pair(alone, packed)]
        if engine is not None:
            pairs.append(Pair(EngineScorer(RemoteEngine(groups["engine"])), hugging_face))
        return check_parity(pairs, rows, _tolerance(parity, model.dtype), tell)


def _scorer(ranks: RemotePolicy | RemoteCritic, packed: bool, through: Tensor | None = None) -> ScoresTokens:
    if isinstance(ranks, RemotePolicy):
        return PolicyScorer(policy=ranks, packed=packed)
    return CriticScorer(critic=ranks, packed=packed, through=through)


def _tolerance(parity: ParityConfig, dtype: str) -> Tolerance:
    mean, largest = parity.tolerance(dtype)
    return Tolerance(mean=mean, largest=largest, eps=torch.finfo(device.dtype(dtype)).eps)


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
        _reward_service(config.reward) as rewards,
        Cluster(config.cluster, gpus=gpus, run_dir=config.run_dir) as cluster,
    ):
        group = cluster.start([_engine_role(config)], device.worker_environment())["engine"]
        group.build(start_engine, [(_engine_spec(config, model, version=0),)] * config.engine.count).result()
        yield RemoteEngine(group), rewards, heldout.prompts[: config.evaluation.prompts]


@contextmanager
def open_engines(spec: EngineSpec, count: int, cluster: ClusterConfig, run_dir: Path) -> Iterator[list[RemoteEngine]]:
    """``count`` engines alike, each in a process of its own; no trainer and no data. Errors as :func:`open_run`."""
    gpus = device.gpu_count()
    check_machine(count, gpus, cluster)
    with Cluster(cluster, gpus=gpus, run_dir=run_dir) as started:
        groups = started.start(
            [Role(name=f"engine-{number}", workers=1) for number in range(count)], device.worker_environment()
        )
        results({name: group.build(start_engine, [(spec,)]) for name, group in groups.items()})
        yield [RemoteEngine(group) for group in groups.values()]


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


def _reward_service(reward: RewardConfig) -> RewardService:
    return RewardService(
        reward.rule,
        workers=reward.workers,
        timeout_s=reward.timeout_s,
        wall_timeout_s=reward.wall_timeout_s,
        max_error_rate=reward.max_error_rate,
    )


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


def _processes(config: RunConfig) -> int:
    """Of all models of a run; each has a device of its own."""
    ranks = sum(trainer.layout.world_size for trainer in config.trainers.values())
    return ranks + config.engine.count * config.engine.tensor


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
    return _start_ranks(group, spec, config.cluster)


def _start_ranks(group: WorkerGroup, spec: WorkerSpec, cluster: ClusterConfig) -> Pending[None]:
    host = group.births(cluster.start_deadline_s)[0].address
    port = group.free_port(cluster.start_deadline_s)
    deadline = cluster.call_deadline_s
    ranks = range(spec.trainer.layout.world_size)
    return group.build(start_worker, [(spec, rank, host, port, deadline) for rank in ranks])
