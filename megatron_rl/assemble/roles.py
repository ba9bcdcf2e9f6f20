"""The models of a run at work: their processes, and the channel that weights go through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megatron_rl import device
from megatron_rl.assemble.audit import audit_engines, keep_formats
from megatron_rl.batches import TokenRows
from megatron_rl.config.schema import ClusterConfig, EngineConfig, RunConfig, SFTConfig
from megatron_rl.dataflow import Prompt
from megatron_rl.interfaces import Pending, PushPhase, PushReceipt, results
from megatron_rl.mcore.spec import WorkerSpec, start_worker
from megatron_rl.model_dims import ModelDims
from megatron_rl.phases import OwnDevices, TakingTurns
from megatron_rl.ray_runtime.cluster import Cluster, Role
from megatron_rl.ray_runtime.rewards import RemoteRewards
from megatron_rl.ray_runtime.roles import HELD_TYPES, RemoteCritic, RemoteEngine, RemotePolicy, RemoteTrainer, connect
from megatron_rl.ray_runtime.workers import WorkerGroup
from megatron_rl.rewards.service import reward_service
from megatron_rl.vllm_engine.engine import EngineSpec, start_engine
from megatron_rl.weights.sync import CheckedSync
from megatron_rl.weights.transports import Transport
from megatron_rl.weights.weight_map import Head

_PROBE_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The models of a run at work, with the channel between policy and engine open; weights travel by ``transport``.

    ``linears``: what those of trainers and engines were found to multiply in, in a line. ``restart_engines`` makes
    engines of the given ranks anew.
    """

    groups: Mapping[str, WorkerGroup]
    policy: RemotePolicy
    critic: RemoteCritic | None
    engine: RemoteEngine
    transport: Transport
    rewards: RemoteRewards | None
    linears: str
    restart_engines: Callable[[Sequence[int]], None]


def start_roles(cluster: Cluster, config: RunConfig, dims: ModelDims) -> Roles:
    """Start policy, critic and engine side by side, and audit the engine; where they share devices, first the engine,
    which then sleeps.

    Raises:
        AuditFailed: the engine's linears are not as the configuration asks.
        Exception: what starting them raised.
    """
    groups = cluster.start(
        [
            *(
                Role(
                    name=role,
                    workers=trainer.layout.world_size,
                    held_types=HELD_TYPES,
                    on_host=trainer.optimizer_on_host,
                )
                for role, trainer in config.trainers.items()
            ),
            engine_role(config),
            *([Role(name="rewards", workers=config.reward.pools, spread=True)] if config.reward.pools else []),
        ],
        device.worker_environment(),
    )
    critic_updates = config.steps * config.updates_per_step
    policy_updates = max(1, (config.steps - config.ppo.critic_warmup_steps) * config.updates_per_step)
    spec = engine_spec(config, config.model.path)
    engine = RemoteEngine(groups["engine"])
    starting: dict[str, Pending[None]] = {}
    engines_start = groups["engine"].build(start_engine, [(spec,)] * config.engine.count)
    if config.reward.pools:
        starting["rewards"] = groups["rewards"].build(reward_service(config.reward), [()] * config.reward.pools)
    audit = partial(audit_engines, engine, config, config.model.path)
    if config.cluster.colocate:
        engines_start.result()
        found = audit()  # which reads scales: they are gone while the engine sleeps
        engine.sleep(keep_weights=False).result()
    starting["policy"] = start_trainer(groups["policy"], config, Head.TOKEN, dims, policy_updates)
    if config.critic is not None:
        starting["critic"] = start_trainer(groups["critic"], config, Head.VALUE, dims, critic_updates)
    if not config.cluster.colocate:
        starting["engine"] = engines_start  # after the trainers, which say more of a folder that cannot be loaded
    results(starting)
    if not config.cluster.colocate:
        found = audit()
    policy = RemotePolicy(groups["policy"])
    critic = None if config.critic is None else RemoteCritic(groups["critic"])
    trainers = {role: RemoteTrainer(groups[role]) for role in config.trainers}
    open_channel = partial(
        connect,
        policy,
        engine,
        config.sync,
        tensor=config.engine.tensor,
        cuda=device.has_cuda(),
        shared=config.cluster.colocate,
        pushed_format=config.pushed_format,
        timeout_s=config.cluster.start_deadline_s,
    )

    def restart_engines(ranks: Sequence[int]) -> None:
        cluster.restart(groups["engine"], ranks, start_engine, [(spec,)] * len(ranks))
        audit()
        open_channel()  # it has as many ends as there were at its opening

    return Roles(
        groups=groups,
        rewards=RemoteRewards(groups["rewards"]) if config.reward.pools else None,
        policy=policy,
        critic=critic,
        engine=engine,
        transport=open_channel(),
        linears=keep_formats(trainers, found, config, cluster.log_dir),
        restart_engines=restart_engines,
    )


def push_line(config: RunConfig, moved: Mapping[tuple[int | None, int | None], int], transport: Transport) -> str:
    """How weights get to the engines, and how many bytes the plan moves, in one line.

    Args:
        config: of the run.
        moved: bytes by rank that gives and rank that takes, of :meth:`.RemotePolicy.moved_bytes`.
        transport: that carries them.
    """
    given = {source: size for (source, _), size in moved.items()}
    total, own = sum(given.values()), given.pop(0, 0)
    receivers = config.engine.count * config.engine.tensor
    quantised = "" if config.pushed_format is None else f", which it quantises to {config.pushed_format}"
    return (
        f"weights go from the policy's rank 0 to {receivers} engine worker(s) by {transport.value}: "
        f"{total / 1e6:.1f} MB of {config.model.dtype}{quantised}; "
        f"{len(given)} other rank(s) give it {(total - own) / 1e6:.1f} MB first"
    )


def capability_line(trainer: WorkerGroup) -> str:
    """What a model's rank 0 computes with, in one line."""
    asked = trainer.call("capabilities", finish=lambda answers: answers[0], ranks=[0])
    parts = "; ".join(f"{row.part} by {row.used} ({row.why})" for row in asked.result())
    return f"{trainer.name}: {parts}"


def start_trainer(
    group: WorkerGroup, config: RunConfig | SFTConfig, head: Head, dims: ModelDims, total_updates: int
) -> Pending[None]:
    """Build the ranks of one model."""
    if isinstance(config, SFTConfig):
        trainer, temperature, keep_reference, seed = config.trainer, 1.0, False, 0  # nothing draws from it
    else:
        trainer, seed = config.trainers[group.name], config.seed
        temperature, keep_reference = config.trainer_temperature, head is Head.TOKEN and config.ppo.kl_coef > 0
    spec = WorkerSpec(
        role=group.name,
        head=head,
        model=replace(config.model, path=config.model.path.resolve()),
        dims=dims,
        trainer=trainer,
        temperature=temperature,
        total_updates=total_updates,
        seed=seed,
        keep_reference=keep_reference,
    )
    return start_ranks(group, spec, config.cluster)


def start_ranks(group: WorkerGroup, spec: WorkerSpec, cluster: ClusterConfig) -> Pending[None]:
    """Build all ranks of ``spec``."""
    host, port = group.births()[0].address, group.keep_port()
    # of the ranks' collectives: those of loading and those of a call, which the driver's own deadlines end sooner
    longest = max(cluster.start_deadline_s, cluster.call_deadline_s)
    ranks = range(spec.trainer.layout.world_size)
    return group.build(start_worker, [(spec, rank, host, port, longest) for rank in ranks])


def take_turns(config: RunConfig, roles: Roles) -> OwnDevices | TakingTurns:
    """Who is on the devices when."""
    if not config.cluster.colocate:
        return OwnDevices()
    trainers = {"policy": roles.policy} if roles.critic is None else {"policy": roles.policy, "critic": roles.critic}
    return TakingTurns(trainers, roles.engine)


@dataclass(frozen=True)
class _VerifiedInTurn:
    """The engines, which get the policy's place on the device when they are to compute with what they received."""

    engine: RemoteEngine
    turns: TakingTurns

    def advance(self, phase: PushPhase, version: int, deadline_s: float) -> Pending[tuple[PushReceipt, ...] | None]:
        return self.engine.advance(phase, version, deadline_s)

    def score(self, rows: Sequence[Sequence[int]]) -> Pending[list[list[list[float]]]]:
        self.turns.verifying()  # what the policy was asked before is done before it goes
        return self.engine.score(rows)


def checked_sync(
    config: RunConfig, dims: ModelDims, roles: Roles, prompts: Sequence[Prompt], turns: OwnDevices | TakingTurns
) -> CheckedSync:
    """The push from policy to engine, probed with the first of ``prompts``."""
    return CheckedSync(
        sender=roles.policy,
        receiver=_VerifiedInTurn(roles.engine, turns) if isinstance(turns, TakingTurns) else roles.engine,
        probe=_probe(prompts, dims),
        probe_tolerance=config.sync.tolerance(config.model.dtype, rounded=config.engine.rounds or config.policy.rounds),
        phase_deadline_s=config.sync.phase_deadline_s,
    )


def _probe(prompts: Sequence[Prompt], dims: ModelDims) -> TokenRows:
    """A few fixed rows that trainer and engine score after every push: held-out prompts of at least two tokens."""
    rows = [prompt.token_ids for prompt in prompts if len(prompt.token_ids) > 1][:_PROBE_ROWS]
    if not rows:
        raise ValueError("data.heldout must hold a prompt of at least two tokens, to check pushes with; found none")
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), dims.pad_id)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    places = torch.arange(tokens.shape[1])
    return TokenRows(tokens=tokens, lengths=lengths, response_mask=(places > 0) & (places < lengths[:, None]))


def engine_role(config: RunConfig) -> Role:
    """How many engines a run has, and how large."""
    return Role(
        name="engine",
        workers=config.engine.count,
        devices=config.engine.tensor,
        restartable=config.engine.restarts > 0,
    )


def engine_spec(config: RunConfig, model: Path, version: int | None = None) -> EngineSpec:
    """An engine for this run; with a ``version`` it may generate from the weights it loads."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    return replace(
        spec_of(config.engine, model, config.model.dtype, longest, version),
        sleeps=config.cluster.colocate,
        pushed_quantised=version is None and config.pushed_format is not None,
    )


def spec_of(
    engine: EngineConfig, model: Path, model_dtype: str, longest: int, version: int | None = None
) -> EngineSpec:
    """An engine with these settings, by itself.

    Args:
        engine: the settings.
        model: a Hugging Face folder.
        model_dtype: type of the weights where they are not quantised.
        longest: tokens of a prompt and its response together.
        version: of the weights in ``model``; None where they are not to be sampled from before a push.
    """
    return EngineSpec(
        model=model.resolve(),
        dtype=engine.dtype(model_dtype),
        max_model_len=longest,
        kv_cache_mib=engine.kv_cache_mib,
        max_concurrent=engine.max_concurrent,
        tensor=engine.tensor,
        on_cpu=not device.has_cuda(),
        eager=engine.eager,
        version=version,
        quantization=engine.quantization if engine.quantised else None,
        kv_cache_dtype=engine.kv_cache_dtype,
    )
