"""The parity gate: what it compares with, and the pairs of a run or of a model folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl import device
from megatron_rl.assemble.audit import check_engine
from megatron_rl.assemble.roles import Roles, checked_sync, spec_of, start_ranks, start_roles, take_turns
from megatron_rl.config.schema import (
    ClusterConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    ParityConfig,
    RunConfig,
    TrainerConfig,
)
from megatron_rl.dataflow import Prompt
from megatron_rl.experience.prompts import load_prompts, load_tokenizer
from megatron_rl.hf_reference.process import HfProcess, HfScorer
from megatron_rl.interfaces import Gate, ScoresTokens, results
from megatron_rl.layout import ParallelLayout
from megatron_rl.mcore.spec import WorkerSpec
from megatron_rl.model_dims import ModelDims, read_model_dims
from megatron_rl.parity import Pair, Tolerance, check_parity, parity_rows
from megatron_rl.ray_runtime.cluster import Cluster, Role, check_machine
from megatron_rl.ray_runtime.roles import (
    HELD_TYPES,
    CriticScorer,
    EngineScorer,
    PolicyScorer,
    RemoteCritic,
    RemoteEngine,
    RemotePolicy,
)
from megatron_rl.vllm_engine.engine import start_engine
from megatron_rl.weights.safetensors_io import HfFolder
from megatron_rl.weights.weight_map import Head


@contextmanager
def open_parity(config: RunConfig, tell: Callable[[str], None]) -> Iterator[Gate]:
    """Start the models of a new run and push the policy's weights to the engine; the gate then holds them side by side.

    What it writes goes to a folder beside the run's, which stays untouched. Errors as :func:`open_run`.
    """
    run_dir = config.run_dir.with_name(f"{config.run_dir.name}-parity")
    gpus = device.gpu_count()
    check_machine(config.devices, gpus, config.cluster)
    check_engine(config.engine, gpus)
    dims = read_model_dims(config.model.path)
    tokenizer = load_tokenizer(config.model.path)
    heldout = load_prompts(config.data.heldout, tokenizer, config.data)
    with ExitStack() as stack:
        references = start_references(stack, config, run_dir)
        roles = start_roles(stack.enter_context(Cluster(config.cluster, gpus=gpus, run_dir=run_dir)), config, dims)
        turns = take_turns(config, roles)
        with turns.pushing():
            checked_sync(config, dims, roles, heldout.prompts, turns).push(0)
        with turns.comparing():
            yield parity_gate(config, dims, roles, references, heldout.prompts, tell)


@dataclass(frozen=True, kw_only=True)
class References:
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


def start_references(stack: ExitStack, config: RunConfig, run_dir: Path, resumed: Path | None = None) -> References:
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
        return References(through=through, skipped=skipped)
    process = stack.enter_context(_reference(config.cluster, folder, Head.TOKEN, run_dir))
    critic = None if through is None else HfScorer(process=process, head=Head.VALUE, through=through)
    return References(policy=HfScorer(process=process, head=Head.TOKEN), critic=critic, through=through)


def _reference(cluster: ClusterConfig, folder: Path, head: Head, run_dir: Path) -> HfProcess:
    return HfProcess(
        folder.resolve(),
        head,
        environment=device.worker_environment(),
        scratch=run_dir.resolve() / "scratch",
        log=run_dir.resolve() / "logs" / "hugging_face.log",
        start_limit=cluster.start_limit,
        call_limit=cluster.call_limit,
    )


def parity_gate(
    config: RunConfig,
    dims: ModelDims,
    roles: Roles,
    references: References,
    prompts: Sequence[Prompt],
    tell: Callable[[str], None],
) -> Gate:
    """The gate of a run: from the reference outwards to the engine."""
    policy, engine = _scorer(roles.policy, packed=True), EngineScorer(roles.engine)

    def bounds(*sides: TrainerConfig | EngineConfig) -> Tolerance | None:
        return fp8_tolerance(config.parity) if any(side.rounds for side in sides) else None

    of_policy, of_engine = bounds(config.policy), bounds(config.engine, config.policy)
    pairs = [Pair(_scorer(roles.policy, packed=False), policy, of_policy), Pair(engine, policy, of_engine)]
    if roles.critic is not None and config.critic is not None:
        of_critic = bounds(config.critic)
        critic, alone = (_scorer(roles.critic, packed, references.through) for packed in (True, False))
        pairs.insert(1, Pair(alone, critic, of_critic))
        if references.critic is not None:
            pairs.insert(1, Pair(critic, references.critic, of_critic))
    if references.policy is not None:
        pairs = [Pair(policy, references.policy, of_policy), *pairs]
        pairs.append(Pair(engine, references.policy, bounds(config.engine)))
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
        total_updates=None,
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
        starting = {role: start_ranks(groups[role], spec, cluster)}
        if engine is not None:
            engine_spec = spec_of(engine, reference, model.dtype, longest + 1, version=0)
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


def fp8_tolerance(parity: ParityConfig) -> Tolerance:
    """Of FP8: weights are half a step of e4m3 away at most, and bfloat16 rounds them again."""
    eps = torch.finfo(torch.float8_e4m3fn).eps
    return Tolerance(mean=parity.fp8_mean_tolerance, largest=parity.fp8_max_tolerance, eps=eps, weights=0.55 * eps)
