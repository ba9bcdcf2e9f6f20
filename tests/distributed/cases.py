"""What ranks run in the distributed tests, and the data and losses they run it on."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_rl.batches import (
    ExperienceBatch,
    LossTerms,
    MicroBatch,
    Minibatch,
    PackedTokens,
    RolloutBatch,
    TokenOutputs,
    TokenRows,
    ValueOutputs,
)
from megatron_rl.config.precision import FP8Config
from megatron_rl.config.schema import ModelConfig, OptimizerConfig, TrainerConfig
from megatron_rl.interfaces import TokenLoss, UpdateResult
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import read_model_dims

TEMPERATURE = 0.8
VOCABULARY = 96
POLICY, CRITIC = "policy", "critic"


def token_rows(rows: int = 12, seed: int = 3) -> TokenRows:
    """Rows of 5 to 40 tokens; the first 2 to 4 are the prompt."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 41, (rows,), generator=generator)
    width = int(lengths.max())
    column = torch.arange(width)
    tokens = torch.randint(2, VOCABULARY, (rows, width), generator=generator) * (column < lengths[:, None])
    prompt = torch.randint(2, 5, (rows,), generator=generator)
    mask = (column >= prompt[:, None]) & (column < lengths[:, None])
    return TokenRows(tokens=tokens, lengths=lengths, response_mask=mask)


def minibatch() -> Minibatch[ExperienceBatch]:
    """Ten of the twelve rows, with random experience and weights."""
    rows = token_rows()
    generator = torch.Generator().manual_seed(7)

    def number() -> Tensor:
        return torch.randn(rows.tokens.shape, generator=generator) * rows.response_mask

    rollouts = RolloutBatch(
        **vars(rows),
        rollout_logprobs=number(),
        sampled_mask=rows.response_mask,
        scores=torch.zeros(rows.rows),
        truncated=torch.zeros(rows.rows, dtype=torch.bool),
        group=torch.zeros(rows.rows, dtype=torch.int64),
        policy_version=0,
    )
    experience = ExperienceBatch(
        rollouts=rollouts,
        old_logprobs=number(),
        ref_logprobs=number(),
        values=number(),
        rewards=number(),
        advantages=number(),
        returns=number(),
    )
    weight = 0.5 + torch.rand(10, rows.tokens.shape[1], generator=generator)
    return Minibatch(source=experience, rows=torch.tensor([11, 0, 3, 7, 1, 9, 4, 6, 2, 10]), loss_weight=weight)


def near_policy() -> Minibatch[ExperienceBatch]:
    """The same rows and weights, with log-probs such that ratios per response lie within and without their bounds."""
    batch = minibatch()
    source, mask = batch.source, batch.source.rollouts.response_mask
    old = (0.2 * source.old_logprobs - math.log(VOCABULARY)) * mask
    rollouts = replace(source.rollouts, rollout_logprobs=(old + 0.2 * source.rollouts.rollout_logprobs) * mask)
    return replace(batch, source=replace(source, old_logprobs=old, rollouts=rollouts))


def padded(batch: Minibatch[ExperienceBatch]) -> Minibatch[ExperienceBatch]:
    """The same rows, each as long as the longest: what comes after a row's end is read, and counts for nothing."""
    rollouts = batch.source.rollouts
    whole = torch.full_like(rollouts.lengths, rollouts.tokens.shape[1])
    return replace(batch, source=replace(batch.source, rollouts=replace(rollouts, lengths=whole)))


@dataclass(frozen=True)
class Reinforce:
    """- advantage x log-prob, minus an entropy bonus."""

    entropy_coef: float = 0.1

    def __call__(self, outputs: TokenOutputs, batch: MicroBatch) -> LossTerms:
        term = -(batch.advantages * outputs.logprobs + self.entropy_coef * outputs.entropy)
        total = (batch.loss_weight * term).sum()
        return LossTerms(
            total=total,
            metrics={"loss": total.detach(), "entropy": (outputs.entropy.detach() * batch.loss_mask).sum()},
        )


@dataclass(frozen=True)
class Likelihood:
    """Next-token loss, without experience."""

    def __call__(self, outputs: TokenOutputs, batch: PackedTokens) -> LossTerms:
        total = -(batch.loss_weight * outputs.logprobs).sum()
        return LossTerms(total=total, metrics={"loss": total.detach()})


@dataclass(frozen=True)
class SquaredError:
    """(value - return)^2."""

    def __call__(self, outputs: ValueOutputs, batch: MicroBatch) -> LossTerms:
        total = (batch.loss_weight * (outputs.values - batch.returns) ** 2).sum()
        return LossTerms(total=total, metrics={"loss": total.detach()})


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a case lays out and trains a model."""

    layout: ParallelLayout = ParallelLayout()  # noqa: RUF009 - frozen
    distributed_optimizer: bool = False
    overlap_communication: bool = False
    bucket_size: int | None = None
    on_host: bool = False
    recompute: Any = "none"
    padded: bool = False
    clip_grad: float = 1.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    # first steps of Adam divide the gradient by its own size: a large eps keeps rounding of zero gradients small
    eps: float = 1e-3
    budget: int = 4096
    dtype: Any = "float32"
    lr: float = 1e-2
    keep_reference: bool = False
    fake_quantization: Any = "none"
    updates: int | None = 10
    temperature: float = TEMPERATURE
    value_head_std: float = 0.0

    def __str__(self) -> str:
        """For the names of tests."""
        switches = " dist-opt" * self.distributed_optimizer + " overlap" * self.overlap_communication
        switches += "" if self.bucket_size is None else f" buckets-{self.bucket_size}"
        switches += " host" * self.on_host
        switches += " padded" * self.padded
        recompute = "" if self.recompute == "none" else f" recompute-{self.recompute}"
        fake = "" if self.fake_quantization == "none" else f" {self.fake_quantization}"
        fake += " scores-only" * (self.updates is None)
        return f"{self.layout}{switches}{recompute}{fake} {self.budget} {self.dtype}"


def start(rank: int, port: int, model: Path, setup: Setup, role: str = POLICY, fp8: FP8Config | None = None) -> Any:
    """A worker. Megatron-core is imported here and not above, so that the test process itself never loads it."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from megatron_rl.mcore.worker import Worker, WorkerSpec
    from megatron_rl.weights.weight_map import Head

    optimizer = OptimizerConfig(
        lr=setup.lr,
        beta1=setup.betas[0],
        beta2=setup.betas[1],
        eps=setup.eps,
        weight_decay=setup.weight_decay,
        clip_grad=setup.clip_grad,
        warmup_fraction=0.0,
        min_lr_fraction=1.0,
    )
    spec = WorkerSpec(
        role=role,
        head=Head.TOKEN if role == POLICY else Head.VALUE,
        model=ModelConfig(path=model, dtype=setup.dtype),
        dims=read_model_dims(model),
        trainer=TrainerConfig(
            optimizer=optimizer,
            layout=setup.layout,
            tokens_per_microbatch=setup.budget,
            distributed_optimizer=setup.distributed_optimizer,
            overlap_communication=setup.overlap_communication,
            optimizer_on_host=setup.on_host,
            recompute=setup.recompute,
            fp8=fp8,
            fake_quantization=setup.fake_quantization,
            value_head_std=setup.value_head_std,
        ),
        temperature=setup.temperature,
        total_updates=setup.updates,
        seed=0,
        keep_reference=setup.keep_reference,
    )
    # megatron-core's own buckets are larger than all of a tiny model
    ddp = partial(DistributedDataParallelConfig, bucket_size=setup.bucket_size)
    with patch("megatron_rl.mcore.optimizer.DistributedDataParallelConfig", ddp):
        return Worker(spec, rank=rank, host="127.0.0.1", port=port, timeout_s=30.0)


def scores(rank: int, port: int, model: Path, setup: Setup) -> Any:
    """Log-probs of a fresh policy, and its entropies."""
    from megatron_rl.mcore.model import read_tokens

    worker = start(rank, port, model, setup)

    def entropy(stage: Any, output: Tensor, batch: PackedTokens) -> Tensor:
        return read_tokens(stage, output, batch, TEMPERATURE).entropy

    rows = token_rows()
    answer = worker.logprobs(rows), worker._forward(worker._training.chunks, rows, entropy)
    worker.close()
    return answer


def trained(
    rank: int, port: int, model: Path, setup: Setup, role: str, export: Path
) -> tuple[list[UpdateResult | None], Any, Any]:
    """Two updates, the model's numbers after them and (where one is kept) the reference's, and an export."""
    worker = start(rank, port, model, setup, role)
    loss = Reinforce() if role == POLICY else SquaredError()
    results = [worker.update(minibatch(), loss) for _ in range(2)]
    rows = token_rows()
    after = worker.logprobs(rows) if role == POLICY else worker.values(rows)
    reference = worker.logprobs(rows, None, True) if setup.keep_reference else None
    worker.export_hf(export, model)
    worker.close()
    return results, after, reference


def one_step(
    rank: int, port: int, model: Path, setup: Setup, role: str, loss: TokenLoss | None = None
) -> tuple[UpdateResult | None, dict[str, Tensor], dict[str, Tensor]]:
    """One update (by ``loss`` on :func:`near_policy` where one is given): its result, and on rank 0 all gradients and
    all parameters after it, by Hugging Face name.
    """
    worker = start(rank, port, model, setup, role)
    batch = minibatch() if loss is None else near_policy()
    batch = padded(batch) if setup.padded else batch
    result = worker.update(batch, loss or (Reinforce() if role == POLICY else SquaredError()))
    gradients = named(gradient_tensors(worker))
    after = named(worker._full_tensors())
    worker.close()
    return result, gradients, after


def scored_and_trained(
    rank: int, port: int, model: Path, setup: Setup, role: str, rows: TokenRows, batch: Any, loss: Any
) -> tuple[Any, UpdateResult | None, dict[str, Tensor]]:
    """What a fresh model says of ``rows``; and with a minibatch one update, and on rank 0 all parameters after it."""
    worker = start(rank, port, model, setup, role)
    scored = worker.logprobs(rows) if role == POLICY else worker.values(rows)
    result, after = None, {}
    if batch is not None:
        result = worker.update(batch, loss)
        after = named(worker._full_tensors())
    worker.close()
    return scored, result, after


def named(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies of them, in float32."""
    return {name: tensor.detach().float().clone() for name, tensor in tensors}


def gradient_tensors(worker: Any) -> Iterator[tuple[str, Tensor]]:
    """The gradients of the last update, whole, on rank 0."""
    import torch.distributed as dist

    from megatron_rl.mcore.export import full_tensors, local_parameters

    chunks = worker._training.chunks
    if worker._spec.trainer.distributed_optimizer:  # each replica has reduced a part of them
        for buffer in (b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)
    found = local_parameters([chunk.module for chunk in chunks])
    mine = {name: getattr(p, "main_grad", torch.zeros_like(p)) for name, p in found.items()}  # buffers have none
    return full_tensors(mine, worker._plan, worker._layout, worker._rank)


def loss_metrics(result: UpdateResult) -> dict[str, float]:
    """The metrics that do not depend on how rows are packed and dealt out."""
    return {name: value for name, value in result.metrics.items() if name not in ("padding", "imbalance")}


def supervised(rank: int, port: int, model: Path, setup: Setup, updates: int = 1) -> list[UpdateResult | None]:
    """Updates on tokens alone."""
    worker = start(rank, port, model, setup)
    rows = token_rows()
    weight = torch.ones(rows.tokens.shape)
    batch = Minibatch(source=rows, rows=torch.arange(rows.rows), loss_weight=weight)
    results = [worker.update(batch, Likelihood()) for _ in range(updates)]
    worker.close()
    return results


def without_loss_tokens(rank: int, port: int, model: Path) -> str:
    """What an update says when no token counts."""
    worker = start(rank, port, model, Setup())
    rows = token_rows(2)
    silent = TokenRows(
        tokens=rows.tokens, lengths=rows.lengths, response_mask=torch.zeros(rows.tokens.shape, dtype=torch.bool)
    )
    try:
        worker.update(
            Minibatch(source=silent, rows=torch.arange(2), loss_weight=torch.ones(rows.tokens.shape)), Likelihood()
        )
    except ValueError as error:
        return str(error)
    finally:
        worker.close()
    return "it went through"


def not_finite(rank: int, port: int, model: Path, setup: Setup, role: str) -> tuple[str, bool]:
    """What an update says whose gradient is not finite, and whether the weights are as they were."""
    worker = start(rank, port, model, setup, role)
    before = named(worker._full_tensors())
    numbers = minibatch()
    source = numbers.source
    mask = source.rollouts.response_mask
    spoilt = {
        "advantages": source.advantages.masked_fill(mask, math.nan),
        "returns": source.returns.masked_fill(mask, math.inf),
    }
    said = "it went through"
    try:
        worker.update(
            replace(numbers, source=replace(source, **spoilt)), Reinforce() if role == POLICY else SquaredError()
        )
    except FloatingPointError as error:
        said = str(error)
    after = named(worker._full_tensors())
    worker.close()
    return said, all(torch.equal(after[name], tensor) for name, tensor in before.items())


def few_rows(rank: int, port: int, model: Path, setup: Setup) -> list[Any]:
    """Values of a single row, before any update, after one, and after one of a single row."""
    worker = start(rank, port, model, setup, CRITIC)
    answers = [worker.values(token_rows(1))]
    batch = minibatch()
    for rows in (10, 1):
        worker.update(replace(batch, rows=batch.rows[:rows], loss_weight=batch.loss_weight[:rows]), SquaredError())
        answers.append(worker.values(token_rows(1)))
    worker.close()
    return answers


def threads_left(rank: int, port: int, model: Path, setup: Setup) -> int:
    """Threads that an update of a whole model leaves behind when it is closed."""
    threads = Path("/proc/self/task")
    before = len(list(threads.iterdir()))
    worker = start(rank, port, model, setup)
    worker.update(minibatch(), Reinforce())
    worker.close()
    del worker
    gc.collect()
    return len(list(threads.iterdir())) - before


def saved(
    rank: int, port: int, model: Path, setup: Setup, role: str, folder: Path, export: Path, before: int = 1
) -> list[Any]:
    """Update ``before`` times, save without starting a process, update twice more, export."""
    from multiprocessing.process import BaseProcess

    def refuse(process: BaseProcess) -> None:
        raise AssertionError(f"saving must not start a process, got {process}")

    worker = start(rank, port, model, setup, role)
    loss = Reinforce() if role == POLICY else SquaredError()
    for _ in range(before):
        worker.update(minibatch(), loss)
    begin = BaseProcess.start
    BaseProcess.start = refuse  # type: ignore[method-assign]
    try:
        worker.save(folder)
        worker.written()
    finally:
        BaseProcess.start = begin  # type: ignore[method-assign]
    results = [worker.update(minibatch(), loss) for _ in range(2)]
    worker.export_hf(export, model)
    worker.close()
    return results


def resumed(rank: int, port: int, model: Path, setup: Setup, role: str, folder: Path, export: Path) -> list[Any]:
    """Load, update twice, export."""
    worker = start(rank, port, model, setup, role)
    worker.load(folder)
    loss = Reinforce() if role == POLICY else SquaredError()
    results = [worker.update(minibatch(), loss) for _ in range(2)]
    worker.export_hf(export, model)
    worker.close()
    return results


def three_updates(rank: int, port: int, model: Path, setup: Setup, begin: Path | None, end: Path) -> None:
    """From a checkpoint, or from the start, to another checkpoint."""
    worker = start(rank, port, model, setup)
    if begin is not None:
        worker.load(begin)
    for _ in range(3):
        worker.update(minibatch(), Reinforce())
    worker.save(end)
    worker.written()
    worker.close()


def kept_on_host(rank: int, port: int, model: Path, setup: Setup, folder: Path) -> tuple[int, int]:
    """After loading: bytes of memory that the optimizer's states keep, and bytes that their numbers need. Nothing that
    Python's collector alone would find holds main weights, and a save asks for no memory of a GPU.
    """
    gc.disable()
    worker = start(rank, port, model, setup)
    found = (each for each in gc.get_objects() if type(each).__name__ == "HostOptimizer")
    (_,) = [adam for adam in found if hasattr(adam, "param_to_inner_param")]
    gc.enable()
    worker.load(folder)
    states = [value for state in worker._training.optimizer.state.items() for value in state[1].values()]
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in states}
    needed = sum(value.nbytes for value in states)
    with patch.object(torch.Tensor, "cuda", side_effect=AssertionError("a save gathers on the host")):
        worker.save(folder.with_name(f"of_{setup.layout.data}"))
    worker.close()
    return sum(storages.values()), needed


def resaved(rank: int, port: int, model: Path, setup: Setup, folder: Path, again: Path) -> bool:
    """Load, save again; whether updates draw no random numbers, since none are saved."""
    worker = start(rank, port, model, setup)
    worker.load(folder)
    worker.save(again)
    worker.written()
    before = torch.get_rng_state()
    worker.update(minibatch(), Reinforce())
    unmoved = torch.equal(before, torch.get_rng_state())
    worker.close()
    return unmoved


def spoilt(rank: int, port: int, model: Path, before: Setup, after: Setup, folder: Path) -> list[str]:
    """What a save says of states that were cut from another parameter's place, and a load of what it wrote unchecked;
    empty where it went through.
    """
    checkpoint = "megatron_rl.mcore.checkpoint"

    @contextmanager
    def exchanged(training: Any) -> Iterator[None]:
        (buffer,) = training.chunks[0].buffers
        kept = buffer.param_index_map
        first, second, *_ = [parameter for parameter in kept if parameter.shape == (32,)]
        buffer.param_index_map = {**kept, first: kept[second], second: kept[first]}
        yield
        buffer.param_index_map = kept

    worker = start(rank, port, model, before)
    worker.update(minibatch(), Reinforce())
    with patch(f"{checkpoint}._ranges_without_padding", exchanged):
        said = [refusal(lambda: worker.save(folder))]
        with patch(f"{checkpoint}._wrong_main_weights", return_value=[]):
            worker.save(folder)
            worker.written()
    worker.close()
    worker = start(rank, port, model, after)
    said.append(refusal(lambda: worker.load(folder)))
    worker.close()
    return said


def refusal(verb: Callable[[], None]) -> str:
    try:
        verb()
    except ValueError as error:
        return str(error)
    return ""


def unwritable(rank: int, port: int, model: Path, folder: Path) -> str:
    """Save to a disk that is too small; what the writer says, and whether training goes on."""
    worker = start(rank, port, model, Setup())
    worker.save(folder)
    worker.update(minibatch(), Reinforce())
    try:
        worker.written()
    except OSError as error:
        return str(error)
    finally:
        worker.close()
    return "it was written"


def learning_rates(rank: int, port: int, model: Path, optimizer: OptimizerConfig, updates: int) -> list[float]:
    """The rate of each update of a short run."""
    from megatron_rl.mcore.optimizer import prepare_training

    worker = start(rank, port, model, Setup())
    training = prepare_training(worker._load_chunks(), TrainerConfig(optimizer=optimizer), updates)
    rates = []
    for _ in range(updates):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.scheduler.step(1)
    worker.close()
    return rates


def attention_groups(rank: int, port: int, lengths: list[int]) -> tuple[int, float]:
    """Into how many groups rows fall, and the largest difference from attention row by row (output and gradients)."""
    import torch.nn.functional as F

    from megatron_rl.experience.packing import pack_rows
    from megatron_rl.mcore.attention import PackedAttention, packed_rows

    width = max(lengths) + 1
    rows = TokenRows(
        tokens=torch.zeros(len(lengths), width, dtype=torch.int64),
        lengths=torch.tensor(lengths) + 1,
        response_mask=torch.zeros(len(lengths), width, dtype=torch.bool),
    )
    plan = packed_rows(pack_rows(rows, range(len(lengths))))
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(sum(lengths), 1, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    weight = torch.randn(sum(lengths), 1, 32, generator=generator)

    class Config:
        attention_dropout = 0.0

    packed = PackedAttention(Config())(*parts, packed_seq_params=plan)
    gradients = torch.autograd.grad((packed * weight).sum(), parts)
    split = [part.split(lengths) for part in parts]
    singles = []
    for query, key, value in zip(*split, strict=True):
        q, k, v = (part[:, 0].transpose(0, 1)[None] for part in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        singles.append(out[0].transpose(0, 1).reshape(len(query), 1, 32))
    single = torch.cat(singles)
    wanted = torch.autograd.grad((single * weight).sum(), parts)
    pairs = zip((packed, *gradients), (single, *wanted), strict=True)
    return len(plan.groups), max(float((a - b).abs().max()) for a, b in pairs)


def fail_on(rank: int, port: int, bad: int) -> None:
    """One rank fails, the others wait for it."""
    import time

    if rank == bad:
        raise ValueError("on purpose")
    time.sleep(60)


def gather(parts: list[Any]) -> Tensor:
    """Put the answers of the reporting ranks together: [B, T]."""
    given = [part for part in parts if part is not None]
    rows = torch.cat([part[0] for part in given])
    values = torch.cat([part[1] for part in given])
    whole = torch.full((len(rows), values.shape[1]), float("nan"))
    whole[rows] = values
    return whole


Case = Callable[..., Any]
