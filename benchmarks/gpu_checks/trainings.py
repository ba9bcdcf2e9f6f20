"""Whole updates of a few layers, by the trainer's own ranks: speed, FP8 beside bfloat16, layouts beside one rank.

To start a rank takes many times as long as an update of a few layers. So the same processes go through one job after
another, and each answer comes when it is there.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from benchmarks.gpu_checks.case import Case, at_least, at_most, between
from benchmarks.gpu_checks.costs import SHAPES, TINY_SHAPE, Shape, mfu
from benchmarks.gpu_checks.plan import Row
from examples.arithmetic_cpu.task import Sizes, write_model
from megatron_rl.batches import ExperienceBatch, Minibatch, RolloutBatch
from megatron_rl.config.schema import ModelConfig, TrainerConfig
from megatron_rl.device import has_cuda, release_cached
from megatron_rl.layout import ParallelLayout
from megatron_rl.maths.losses import SupervisedLoss, ValueLoss
from megatron_rl.mcore.spec import WorkerSpec, start_worker
from megatron_rl.model_dims import read_model_dims
from megatron_rl.ray_runtime.supervisor import port_kept
from megatron_rl.weights.weight_map import Head

LAYERS = 4
_ANSWER_S = 150.0
"""Bound on one job; that on the whole check is the command's."""
_LOOKED_AT = 2**14
"""Numbers of each gradient that are kept, at random places: so many tell a relative distance to a hundredth of it."""


def write_shape(folder: Path, shape: Shape, vocabulary: int) -> Path:
    """A model of a few layers of a shape, with random weights; checks that come later find it."""
    done = folder / "done"
    if done.exists():
        return folder
    sizes = Sizes(
        hidden=shape.hidden,
        layers=LAYERS,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        ffn_hidden=shape.ffn_hidden,
        vocabulary=vocabulary,
        max_positions=8192,
        init_std=0.32 * shape.hidden**-0.5,  # else what FP8 rounds would grow with the width, to 0.4 at 7B
    )
    write_model(folder, sizes, seed=0)
    done.touch()
    return folder


def random_experience(rows: int, length: int, vocabulary: int) -> ExperienceBatch:
    """Rows of one length; targets of the critic are random, tokens repeat so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[:, 0] = False
    zeros = torch.zeros(mask.shape)
    rollouts = RolloutBatch(
        tokens=torch.randint(2, vocabulary // 8, mask.shape, generator=generator),
        lengths=torch.full((rows,), length),
        response_mask=mask,
        rollout_logprobs=zeros,
        sampled_mask=mask,
        scores=torch.zeros(rows),
        truncated=torch.zeros(rows, dtype=torch.bool),
        group=torch.zeros(rows, dtype=torch.int64),
        policy_version=0,
    )
    wanted = torch.randn(mask.shape, generator=generator) * mask
    return ExperienceBatch(
        rollouts=rollouts,
        old_logprobs=zeros,
        ref_logprobs=None,
        values=zeros,
        rewards=zeros,
        advantages=wanted,
        returns=wanted,
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """Updates of one model on one or several ranks; picklable. ``compared``: on one rank, a policy's, which tells what
    its first update computed.
    """

    model: Path
    head: Head
    trainer: TrainerConfig
    dtype: str
    rows: int
    length: int
    vocabulary: int
    updates: int
    compared: bool = False


Numbers = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Of each update: its loss, gradient norm and seconds.

    ``peak_bytes``: the most that a rank had allocated on its GPU in any update but the first; 0 on a CPU.
    ``logprobs``: of all tokens before the first update, ``gradients``: some numbers of each tensor's in it; of a job
    that is ``compared``.
    """

    losses: list[float]
    norms: list[float]
    seconds: list[float]
    peak_bytes: int = 0
    logprobs: Numbers | None = None
    gradients: Mapping[str, Numbers] = field(default_factory=dict)


def run_rank(job: Job, rank: int, port: int) -> Trained:
    """Train in this process; a rank that does not report has no losses."""
    before = torch.cuda.memory_allocated() if has_cuda() else 0  # what an earlier job left
    dims = read_model_dims(job.model)
    spec = WorkerSpec(
        role="policy" if job.head is Head.TOKEN else "critic",
        head=job.head,
        model=ModelConfig(path=job.model, dtype=job.dtype),
        dims=dims,
        trainer=job.trainer,
        temperature=1.0,
        total_updates=1000,
        seed=0,
        keep_reference=False,
    )
    worker = start_worker(spec, rank, "127.0.0.1", port, 120.0)
    from megatron_rl.mcore.export import local_parameters  # megatron-core is not prepared before that

    experience = random_experience(job.rows, job.length, job.vocabulary)
    step = Minibatch(
        source=experience, rows=torch.arange(job.rows), loss_weight=torch.ones(experience.rollouts.tokens.shape)
    )
    loss: Any = SupervisedLoss() if job.head is Head.TOKEN else ValueLoss()
    losses, norms, taken = [], [], []
    logprobs: Numbers | None = None
    gradients: dict[str, Numbers] = {}
    if job.compared:
        scored = worker.logprobs(experience.rollouts)
        assert scored is not None  # the only rank reports
        rows, found_logprobs = scored
        logprobs = found_logprobs[rows.argsort()][experience.rollouts.response_mask].numpy()
    for number in range(job.updates):
        if number == 1 and has_cuda():  # the first one also chooses kernels
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        found = worker.update(step, loss)
        if has_cuda():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
        if found is not None:
            metrics = found.metrics
            losses.append(metrics["loss" if "loss" in metrics else "value_loss"])
            norms.append(found.grad_norm)
        if job.compared and number == 0:
            gradients = {name: _some(tensor.main_grad) for name, tensor in local_parameters(worker._models).items()}
    peak = torch.cuda.max_memory_allocated() - before if has_cuda() else 0
    worker.close()
    return Trained(losses=losses, norms=norms, seconds=taken, peak_bytes=peak, logprobs=logprobs, gradients=gradients)


def _some(tensor: Tensor) -> Numbers:
    """The same places of every tensor of a size."""
    flat = tensor.detach().flatten()
    if len(flat) > _LOOKED_AT:
        flat = flat[torch.randint(len(flat), (_LOOKED_AT,), generator=torch.Generator().manual_seed(0)).to(flat.device)]
    return flat.float().cpu().numpy()


def train(jobs: Sequence[Job]) -> Generator[Trained]:
    """One job after the other, all of as many ranks, each rank a process that lives as long as the iteration.

    Raises:
        RuntimeError: a rank raised, or did not answer.
        ValueError: the jobs have not the same number of ranks.
    """
    sizes = {job.trainer.layout.world_size for job in jobs}
    if len(sizes) > 1:
        raise ValueError(f"jobs that share processes must have the same number of ranks, got {sorted(sizes)}")
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    kept = [port_kept() for _ in jobs]
    ports = [int(port.getsockname()[1]) for port in kept]
    ranks = [
        context.Process(target=_answer, args=(answers, jobs, rank, ports), daemon=True)
        for size in sizes
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        for job in jobs:
            yield _reported(answers, job, len(ranks))
        for process in ranks:
            process.join(10)
    finally:
        for process in ranks:
            process.kill()
        for port in kept:
            port.close()


def _reported(answers: Any, job: Job, ranks: int) -> Trained:
    """What the reporting rank says, when all have done the job."""
    found: list[Trained] = []
    for number in range(ranks):
        try:
            answer = answers.get(timeout=_ANSWER_S)
        except Empty:
            raise RuntimeError(f"{ranks - number} of {ranks} ranks did not answer in {_ANSWER_S:g} s: {job}") from None
        if isinstance(answer, str):  # the others would wait for that rank
            raise RuntimeError(answer)
        found.append(answer)
    (reported,) = (trained for trained in found if trained.losses)
    return replace(reported, peak_bytes=max(trained.peak_bytes for trained in found))


def _answer(answers: Any, jobs: Sequence[Job], rank: int, ports: Sequence[int]) -> None:
    for job in jobs:  # read once, when the first job loads Transformer Engine
        os.environ.update(job.trainer.fp8.environment if job.trainer.fp8 else {})
    for job, port in zip(jobs, ports, strict=True):
        try:
            answers.put(run_rank(job, rank, port))
        except Exception as error:
            answers.put(f"rank {rank}: {type(error).__name__}: {error}")
            return
        gc.collect()
        release_cached()


def _job(case: Case, shape: Shape, **changes: Any) -> Job:
    """Of the policy; ``changes`` are of the job, and ``trainer`` of its trainer's settings."""
    vocabulary = 384 if case.small else 16384
    settings = {
        "optimizer": {"lr": 1e-4, "warmup_fraction": 0.0},
        "tokens_per_microbatch": 64 if case.small else 8192,
        "distributed_optimizer": True,
    }
    trainer = TypeAdapter(TrainerConfig).validate_python(settings | changes.pop("trainer", {}))
    sizes = {"rows": 4, "length": 32} if case.small else {"rows": 8, "length": 4096}
    return Job(
        **{
            "model": write_shape(case.scratch / shape.name, shape, vocabulary),
            "head": Head.TOKEN,
            "trainer": trainer,
            "dtype": "float32" if case.small else "bfloat16",
            "vocabulary": vocabulary,
            "updates": 4 if case.small else 10,
            **sizes,
            **changes,
        }
    )


def _speed(name: str, job: Job, found: Trained) -> tuple[list[Row], float]:
    """Figures, and the share of the GPU's peak."""
    flops = 3 * job.rows * read_model_dims(job.model).row_flops(job.length)
    taken = median(found.seconds[2:])
    share = mfu(flops, taken)
    rows = [
        Row(what=f"{name}: tokens/s", value=job.rows * job.length / taken, unit=""),
        Row(what=f"{name}: last loss", value=found.losses[-1], unit="nats"),
    ]
    return rows, share


def _mfu(name: str, share: float, **goal: Any) -> Row:
    return Row(what=f"{name}: MFU of 989 TFLOP/s", value=share, unit="", **goal)


def training(case: Case) -> Iterator[Row]:
    """Tokens/s and MFU of whole updates, optimizer included, of a few layers of each shape, the largest first."""
    shapes = (TINY_SHAPE,) if case.small else SHAPES[::-1]
    jobs = [_job(case, shape) for shape in shapes]
    for shape, job, found in zip(shapes, jobs, train(jobs), strict=True):
        rows, share = _speed(shape.name, job, found)
        yield from rows
        yield _mfu(shape.name, share, **(at_least(0.45, share) if shape.name == "7B" else {}))
        falls = found.losses[-1] < found.losses[0]
        yield Row(what=f"{shape.name}: loss fell", value=float(falls), unit="", goal="1", met=falls)


FP8_GOALS = {"tensorwise": 1.3, "blockwise": 1.2}
"""Times as fast as bfloat16, at 7B: casts take as long as products gain where layers are small."""


NEAR, FAR = 0.01, 0.3
"""How far what FP8 computes may be from bfloat16, relative: nearer than :data:`NEAR` nobody rounds to FP8."""


def training_fp8(case: Case) -> Iterator[Row]:
    """The same in FP8: how much faster than bfloat16, how far log-probs and gradients of the first update are apart,
    and how far losses are, over 20 steps at 7B, 10 below. The small form rounds to FP8 and multiplies in float32.
    """
    if case.small:
        settings = [{}, *({"fake_quantization": name} for name in ("fp8_per_tensor", "fp8_per_block"))]
    else:  # of so few layers, the first and the last in bfloat16 would be half
        settings = [{}, *({"fp8": {"recipe": recipe, "first_last_layers_bf16": 0}} for recipe in FP8_GOALS)]
    # larger steps would part the losses of any two that round differently; nor may clipping hide a gradient's size
    slow = {"optimizer": {"lr": 1e-6, "warmup_fraction": 0.0, "clip_grad": 1e9}}
    shapes = (TINY_SHAPE,) if case.small else SHAPES[::-1]
    largest = SHAPES[-1]
    jobs = {
        shape: [
            _job(case, shape, updates=20 if shape is largest else 10, trainer=trainer | slow, compared=True)
            for trainer in settings
        ]
        for shape in shapes
    }
    running = train([job for of_shape in jobs.values() for job in of_shape])
    for shape, (in_bfloat16, *in_fp8) in jobs.items():
        plain, name = next(running), f"{shape.name} bfloat16"
        rows, share = _speed(name, in_bfloat16, plain)
        yield from rows
        yield _mfu(name, share)
        for (recipe, goal), job in zip(FP8_GOALS.items(), in_fp8, strict=True):
            found, name = next(running), f"{shape.name} {recipe}"
            rows, share = _speed(name, job, found)
            yield from rows
            yield _mfu(name, share)
            times = median(plain.seconds[2:]) / median(found.seconds[2:])
            bound = at_least(goal, times) if shape is largest else {}
            yield Row(what=f"{name}: times as fast as bfloat16", value=times, unit="", **bound)
            gap = largest_gap(found.losses, plain.losses)
            yield Row(what=f"{name}: largest relative loss difference", value=gap, unit="", **at_most(0.01, gap))
            yield from _first_update(name, found, plain)
    running.close()  # ends the ranks


def _first_update(name: str, found: Trained, wanted: Trained) -> Iterator[Row]:
    """How far what the first update computed is from bfloat16's."""
    assert found.logprobs is not None
    assert wanted.logprobs is not None
    mean = wanted.logprobs.mean()
    apart = distance(found.logprobs - mean, wanted.logprobs - mean)
    yield Row(what=f"{name}: log-probs, distance by their spread", value=apart, unit="", **between(NEAR, FAR, apart))
    gaps = {tensor: distance(found.gradients[tensor], numbers) for tensor, numbers in wanted.gradients.items()}
    for which, tensor in (("nearest", min(gaps, key=gaps.__getitem__)), ("farthest", max(gaps, key=gaps.__getitem__))):
        gap = gaps[tensor]
        what = f"{name}: {which} gradient, relative distance ({tensor})"
        yield Row(what=what, value=gap, unit="", **between(NEAR, FAR, gap))


def distance(found: Numbers, wanted: Numbers) -> float:
    """L2 norm of the difference, relative to that of ``wanted``; infinite where that is 0 or a number is not finite."""
    with np.errstate(all="ignore"):
        gap = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    return gap if math.isfinite(gap) else math.inf


def largest_gap(found: list[float], wanted: list[float]) -> float:
    """Relative; infinite where a number is not finite."""
    gaps = [abs(mine - other) / abs(other) for mine, other in zip(found, wanted, strict=True)]
    return max(gaps) if all(map(math.isfinite, [*found, *wanted])) else math.inf


LAYOUTS = {"TP2": {"tensor": 2}, "PP2": {"pipeline": 2}, "TP2xPP2": {"tensor": 2, "pipeline": 2}, "TP4": {"tensor": 4}}


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind:
    """Settings of a trainer, and the layouts in which ranks are held against one rank; without a goal it is told only
    how far they are apart.
    """

    name: str
    trainer: Mapping[str, Any]
    shape: Shape = SHAPES[1]
    layouts: tuple[str, ...] = ("TP2", "PP2", "TP2xPP2")
    goal: bool = True


WIDE = Kind(
    name="blockwise fp8 parameters ",
    trainer={"fp8": {"recipe": "blockwise", "parameters": True, "allow_wide_blockwise_parameters": True}},
    shape=SHAPES[-1],  # 8,960 of 1.5B is not divided into blocks of 128 by four ranks
    layouts=("TP4",),
    goal=False,
)
"""Others have seen NaN with blockwise scales, FP8 parameters and more than two tensor ranks (NeMo-RL issue 1164)."""


def layouts(case: Case) -> Iterator[Row]:
    """Losses and gradient norms of policy and critic on several ranks beside those of one."""
    return _layouts(case, [Kind(name="", trainer={})])


def layouts_fp8(case: Case) -> Iterator[Row]:
    """The same in FP8, and :data:`WIDE`."""
    kinds = [
        Kind(
            name=f"{recipe}{' fp8 parameters' if parameters else ''} ",
            trainer={"fp8": {"recipe": recipe, "parameters": parameters}},
        )
        for recipe in FP8_GOALS
        for parameters in (False, True)
    ]
    return _layouts(case, [*kinds, WIDE])


def _layouts(case: Case, kinds: Sequence[Kind]) -> Iterator[Row]:
    """Processes are started once for each number of ranks, not for each layout."""
    bound = 1e-4 if case.small else 0.02
    sizes = {} if case.small else {"rows": 8, "length": 1024}
    worlds = {name: ParallelLayout(**axes).world_size for name, axes in LAYOUTS.items()}
    fits = {name for name, size in worlds.items() if size <= case.asked_gpus}

    def run(asked: Sequence[tuple[Kind, Head, Mapping[str, int]]]) -> Iterator[Trained]:
        return train(
            [
                _job(
                    case,
                    TINY_SHAPE if case.small else kind.shape,
                    head=head,
                    updates=4,
                    trainer={**kind.trainer, "layout": axes},
                    **sizes,
                )
                for kind, head, axes in asked
            ]
        )

    cases = [(kind, head) for kind in kinds for head in Head if fits.intersection(kind.layouts)]
    alone = dict(zip(cases, run([(kind, head, {}) for kind, head in cases]), strict=True))
    for name in worlds:
        if name not in fits and any(name in kind.layouts for kind in kinds):
            what = f"{name} is left out: it needs --gpus {worlds[name]} or more, got"
            yield Row(what=what, value=case.asked_gpus, unit="")
    for world in sorted({worlds[name] for name in fits}):
        of_world = [(name, *one) for name in worlds if worlds[name] == world for one in cases if name in one[0].layouts]
        running = run([(kind, head, LAYOUTS[name]) for name, kind, head in of_world])
        for (name, kind, head), found in zip(of_world, running, strict=True):
            for what in ("losses", "norms"):
                gap = largest_gap(getattr(found, what), getattr(alone[kind, head], what))
                label = (
                    f"{kind.name}{head.name.lower()} head, {name}: {what}, largest relative difference from one rank"
                )
                yield Row(what=label, value=gap, unit="", **(at_most(bound, gap) if kind.goal else {}))
