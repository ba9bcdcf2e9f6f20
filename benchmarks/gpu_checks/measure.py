"""What the checks measure, each in a process of its own, by the trainer's and the engine's own code.

Without a GPU the same code runs in a small form, so that whoever has one finds a program that works; its figures mean
nothing and have no goals.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from benchmarks.gpu_checks.costs import (
    SHAPES,
    TINY_SHAPE,
    VOCABULARY,
    Shape,
    attention_flops,
    floor_seconds,
    logprob_flops,
    mfu,
    product_flops,
)
from benchmarks.gpu_checks.plan import Row
from benchmarks.logprob import plain
from examples.arithmetic_cpu.task import Sizes, prepare, write_model
from megatron_rl.batches import ExperienceBatch, Minibatch, PackedTokens, RolloutBatch
from megatron_rl.config.schema import ModelConfig, TrainerConfig
from megatron_rl.device import device, has_cuda, prepare_megatron
from megatron_rl.layout import ParallelLayout
from megatron_rl.maths.losses import SupervisedLoss, ValueLoss
from megatron_rl.mcore.logprobs import Kernels, TorchKernels, choose_kernels, linear_logprobs
from megatron_rl.mcore.spec import WorkerSpec, start_worker
from megatron_rl.model_dims import read_model_dims
from megatron_rl.weights.weight_map import Head

LAYERS = 4
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Case:
    """``gpus`` on this machine (0: the small form on a CPU), ``asked_gpus`` to use, and a folder for files."""

    gpus: int
    asked_gpus: int
    scratch: Path

    @property
    def small(self) -> bool:
        return not self.gpus


def seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """The median of ``rounds`` runs after two that warm up."""
    taken = []
    for turn in range(rounds + 2):
        started = time.perf_counter()
        work()
        if has_cuda():
            torch.cuda.synchronize()
        if turn >= 2:
            taken.append(time.perf_counter() - started)
    return median(taken)


def product_tflops(size: int) -> float:
    """Of a bfloat16 product of this machine."""
    left, right = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    return product_flops(size, size, size) / seconds(lambda: left @ right) / 1e12


def ceilings(case: Case) -> list[Row]:
    """What this device does at best."""
    size = 256 if case.small else 8192
    rows = [Row(what=f"bfloat16 product of {size}", value=product_tflops(size), unit="TFLOP/s")]
    if has_cuda() and torch.cuda.get_device_capability() >= (8, 9):
        left = torch.randn(size, size, device=device()).to(torch.float8_e4m3fn)
        right = torch.randn(size, size, device=device()).to(torch.float8_e4m3fn).T
        one = torch.ones((), device=device())

        def multiply() -> Tensor:
            return torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        taken = seconds(multiply)
        rows.append(Row(what=f"FP8 product of {size}", value=product_flops(*[size] * 3) / taken / 1e12, unit="TFLOP/s"))
    source = torch.empty(2**20 if case.small else 2**31, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    taken = seconds(lambda: target.copy_(source))
    rows.append(Row(what="device copy, read and written", value=2 * len(source) / taken / 1e9, unit="GB/s"))
    if has_cuda():
        host = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
        for name, to, of in (("host to device", target[: len(host)], host), ("device to host", host, source)):
            taken = seconds(lambda to=to, of=of: to.copy_(of[: len(host)], non_blocking=True))
            rows.append(Row(what=f"{name}, pinned", value=len(host) / taken / 1e9, unit="GB/s"))
    return rows


def peak_gib(work: Callable[[], object]) -> float:
    """Of GPU memory, above what is held before; 0 on a CPU."""
    if not has_cuda():
        work()
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def logprobs(case: Case) -> list[Row]:
    """Time, memory and distance from float64 of each way from hidden states to log-probs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tflops = product_tflops(256 if case.small else 8192)
    return [row for shape in ((TINY_SHAPE,) if case.small else SHAPES) for row in _logprobs(case, shape, tflops)]


def _logprobs(case: Case, shape: Shape, tflops: float) -> list[Row]:
    tokens, vocabulary = (64, 300) if case.small else (16384, VOCABULARY)
    generator = torch.Generator(device()).manual_seed(0)

    def drawn(count: int, scale: float) -> Tensor:
        values = torch.randn(count, shape.hidden, generator=generator, device=device())
        return (scale * values).bfloat16().requires_grad_()

    hidden, weight = drawn(tokens, 1.0), drawn(vocabulary, 3 * shape.hidden**-0.5)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device())
    with torch.no_grad():
        exact = (hidden[:64].double() @ weight.double().T / 0.6).log_softmax(-1).gather(-1, targets[:64, None])[:, 0]

    def by(kernels: Kernels | None, entropy: bool) -> Tensor:
        if kernels is None:
            return plain(hidden, weight, targets, entropy)[0]
        settings = {"temperature": 0.6, "group": dist.group.WORLD, "with_entropy": entropy, "kernels": kernels}
        return linear_logprobs(hidden, weight, targets, **settings)[0]

    def both(kernels: Kernels | None) -> None:
        hidden.grad = weight.grad = None
        by(kernels, True).sum().backward()

    plain_gib = peak_gib(lambda: both(None))
    rows = [Row(what=f"{shape.name} plain: peak memory", value=plain_gib, unit="GiB")]
    chosen = choose_kernels("auto")
    for kernels in {kernels.name: kernels for kernels in (TorchKernels(), chosen)}.values():
        goal, name = kernels.name == chosen.name and not case.small, f"{shape.name} {kernels.name}"
        with torch.no_grad():
            gap = float((by(kernels, False)[:64].double() - exact).abs().mean())
            forward = seconds(partial(by, kernels, False), 3)
        taken = seconds(partial(both, kernels), 3)
        gib = peak_gib(partial(both, kernels))
        # logits of about 5 are rounded to 2 ** -6 and divided by 0.6
        rows.append(Row(what=f"{name}: mean distance from float64", value=gap, unit="nats", **_at_most(0.03, gap)))
        for what, measured, backward in (("forward", forward, False), ("forward and backward", taken, True)):
            times = measured / floor_seconds(logprob_flops(tokens, shape.hidden, vocabulary, backward=backward), tflops)
            bound = _at_most(1.5, times) if goal else {}
            rows.append(Row(what=f"{name}: {what}", value=1e3 * measured, unit="ms"))
            rows.append(Row(what=f"{name}: {what} / floor", value=times, unit="", **bound))
        share = _at_most(plain_gib / 4, gib) if goal else {}
        rows.append(Row(what=f"{name}: peak memory", value=gib, unit="GiB", **share))
    return rows


def _at_most(bound: float, value: float) -> dict[str, Any]:
    return {"goal": f"at most {bound:.3g}", "met": value <= bound}


def _at_least(bound: float, value: float) -> dict[str, Any]:
    return {"goal": f"at least {bound:.3g}", "met": value >= bound}


def attention(case: Case) -> list[Row]:
    """The trainer's attention over packed rows of unequal length, forward and backward, against float64 row by row."""
    prepare_megatron()
    from types import SimpleNamespace

    from megatron_rl.mcore.attention import PackedAttention, packed_rows

    rows, generator = [], torch.Generator(device()).manual_seed(0)
    for shape in (TINY_SHAPE,) if case.small else SHAPES:
        module = PackedAttention(SimpleNamespace(attention_dropout=0.0))
        for name, lengths in (("ragged", (130, 1, 257, 64)), ("rows of 4,096", (8, 8) if case.small else (4096,) * 4)):
            total = sum(lengths)
            bounds = torch.tensor([0, *lengths]).cumsum(0).int()
            zeros = torch.zeros(total, dtype=torch.int64, device=device())
            places = torch.cat([torch.arange(length) for length in lengths]).to(device())
            batch = PackedTokens(
                inputs=zeros,
                targets=zeros,
                positions=places,
                cu_seqlens=bounds.to(device()),
                max_length=max(lengths),
                loss_mask=zeros.bool(),
                loss_weight=zeros.float(),
            )
            plan = packed_rows(batch)

            def drawn(heads: int, total: int = total, width: int = shape.head_dim) -> Tensor:
                made = torch.randn(total, 1, heads, width, generator=generator, device=device())
                return made.bfloat16().requires_grad_()

            given = [drawn(shape.heads), drawn(shape.kv_heads), drawn(shape.kv_heads)]

            def forward(module: Any = module, given: Any = given, plan: Any = plan) -> Tensor:
                found: Tensor = module(*given, packed_seq_params=plan)
                return found

            out = forward()
            slope = torch.randn(out.shape, generator=generator, device=device()).bfloat16()
            mine = [out, *torch.autograd.grad(out, given, slope)]
            if name == "ragged":
                wide = [tensor.detach().double().requires_grad_() for tensor in given]
                exact = torch.cat([_row_attention(wide, a, b) for a, b in pairwise(bounds)])
                wanted = [exact, *torch.autograd.grad(exact, wide, slope.double().view_as(exact))]
                for part, found, want in zip(("output", "dq", "dk", "dv"), mine, wanted, strict=True):
                    gap = float((found.double().view_as(want) - want).norm() / want.norm())
                    what = f"{shape.name} {name}: {part}, relative error"
                    rows.append(Row(what=what, value=gap, unit="", **_at_most(0.01, gap)))
                continue
            rate = attention_flops(lengths, shape.heads, shape.head_dim) / seconds(forward) / 1e12
            rows.append(Row(what=f"{shape.name} {name}: forward", value=rate, unit="TFLOP/s"))
    return rows


def _row_attention(given: list[Tensor], start: Tensor, stop: Tensor) -> Tensor:
    query, key, value = (tensor[int(start) : int(stop), 0].transpose(0, 1) for tensor in given)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(0, 1).reshape(int(stop - start), 1, -1)


def write_shape(folder: Path, shape: Shape, vocabulary: int) -> Path:
    """A model of a few layers of a shape, with random weights."""
    sizes = Sizes(
        hidden=shape.hidden,
        layers=LAYERS,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        ffn_hidden=shape.ffn_hidden,
        vocabulary=vocabulary,
        max_positions=8192,
        init_std=0.02,
    )
    write_model(folder, sizes, seed=0)
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
        truncated=torch.zeros(rows, dtype=torch.bool),
        scores=torch.zeros(rows),
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
    """Updates of one model on one or several ranks; picklable."""

    model: Path
    head: Head
    trainer: TrainerConfig
    dtype: str
    rows: int
    length: int
    vocabulary: int
    updates: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Of each update: its loss, gradient norm and seconds."""

    losses: list[float]
    norms: list[float]
    seconds: list[float]


def run_rank(job: Job, rank: int, port: int) -> Trained | None:
    """Train in this process; None where the rank does not report."""
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
    experience = random_experience(job.rows, job.length, job.vocabulary)
    step = Minibatch(
        source=experience, rows=torch.arange(job.rows), loss_weight=torch.ones(experience.rollouts.tokens.shape)
    )
    loss: Any = SupervisedLoss() if job.head is Head.TOKEN else ValueLoss()
    losses, norms, taken = [], [], []
    for _ in range(job.updates):
        started = time.perf_counter()
        found = worker.update(step, loss)
        taken.append(time.perf_counter() - started)
        if found is not None:
            metrics = found.metrics
            losses.append(metrics["loss" if "loss" in metrics else "value_loss"])
            norms.append(found.grad_norm)
    worker.close()
    return Trained(losses=losses, norms=norms, seconds=taken) if losses else None


def train(job: Job) -> Trained:
    """On as many ranks as the layout has, each a process.

    Raises:
        RuntimeError: a rank did not answer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    ranks = [
        context.Process(target=_answer, args=(answers, job, rank, port))
        for rank in range(job.trainer.layout.world_size)
    ]
    for process in ranks:
        process.start()
    found = []
    try:
        for _ in ranks:
            found.append(answers.get(timeout=200))
            if isinstance(found[-1], str):  # the others would wait for that rank
                raise RuntimeError(found[-1])
    finally:
        for process in ranks:
            process.join(10 if len(found) == len(ranks) else 0)
            process.kill()
    (reported,) = [answer for answer in found if answer is not None]
    return reported


def _answer(answers: Any, job: Job, rank: int, port: int) -> None:
    try:
        answers.put(run_rank(job, rank, port))
    except Exception as error:
        answers.put(f"rank {rank}: {type(error).__name__}: {error}")


def _job(case: Case, shape: Shape, **changes: Any) -> Job:
    """Of the policy; ``changes`` are of the job, and ``trainer`` of its trainer's settings."""
    vocabulary = 384 if case.small else 16384
    folder = case.scratch / shape.name
    if not folder.exists():
        write_shape(folder, shape, vocabulary)
    settings = {
        "optimizer": {"lr": 1e-4, "warmup_fraction": 0.0},
        "tokens_per_microbatch": 64 if case.small else 8192,
        "distributed_optimizer": True,
    }
    trainer = TypeAdapter(TrainerConfig).validate_python(settings | changes.pop("trainer", {}))
    sizes = {"rows": 4, "length": 32} if case.small else {"rows": 8, "length": 4096}
    return Job(
        **{
            "model": folder,
            "head": Head.TOKEN,
            "trainer": trainer,
            "dtype": "float32" if case.small else "bfloat16",
            "vocabulary": vocabulary,
            "updates": 4 if case.small else 20,
            **sizes,
            **changes,
        }
    )


def _speed(name: str, job: Job, found: Trained) -> list[Row]:
    flops = 3 * job.rows * read_model_dims(job.model).row_flops(job.length)
    taken = median(found.seconds[2:])
    return [
        Row(what=f"{name}: tokens/s", value=job.rows * job.length / taken, unit=""),
        Row(what=f"{name}: MFU of 989 TFLOP/s", value=mfu(flops, taken), unit=""),
        Row(what=f"{name}: last loss", value=found.losses[-1], unit="nats"),
    ]


def training(case: Case) -> list[Row]:
    """Tokens/s and MFU of whole updates, optimizer included, of a few layers of each shape."""
    rows = []
    for shape in (TINY_SHAPE,) if case.small else SHAPES:
        job = _job(case, shape)
        found = train(job)
        speed = _speed(shape.name, job, found)
        if shape.name == "7B":
            share = speed[1].value
            speed[1] = Row(what=speed[1].what, value=share, unit="", **_at_least(0.45, share))
        falls = found.losses[-1] < found.losses[0]
        rows += [*speed, Row(what=f"{shape.name}: loss fell", value=float(falls), unit="", goal="1", met=falls)]
    return rows


FP8_GOALS = {"tensorwise": 1.3, "blockwise": 1.2}


def training_fp8(case: Case) -> list[Row]:
    """The same in FP8: how much faster than bfloat16, and how far the losses of 20 steps are apart; 7B layers."""
    shape = SHAPES[-1]
    job = _job(case, shape)
    plain_run = train(job)
    rows = _speed("bfloat16", job, plain_run)
    for recipe, goal in FP8_GOALS.items():
        # of so few layers, the first and the last in bfloat16 would be half
        job = _job(case, shape, trainer={"fp8": {"recipe": recipe, "first_last_layers_bf16": 0}})
        found = train(job)
        times = median(plain_run.seconds[2:]) / median(found.seconds[2:])
        gap = _largest_gap(found.losses, plain_run.losses)
        rows += [
            *_speed(recipe, job, found),
            Row(what=f"{recipe}: times as fast as bfloat16", value=times, unit="", **_at_least(goal, times)),
            Row(what=f"{recipe}: largest relative loss difference", value=gap, unit="", **_at_most(0.01, gap)),
        ]
    return rows


def _largest_gap(found: list[float], wanted: list[float]) -> float:
    """Relative; infinite where a number is not finite."""
    gaps = [abs(mine - other) / abs(other) for mine, other in zip(found, wanted, strict=True)]
    return max(gaps) if all(map(math.isfinite, found)) else math.inf


LAYOUTS = {"TP2": {"tensor": 2}, "PP2": {"pipeline": 2}, "TP2xPP2": {"tensor": 2, "pipeline": 2}}


def layouts(case: Case) -> list[Row]:
    """Losses and gradient norms of policy and critic on several ranks beside those of one."""
    return _layouts(case, {"": {}})


def layouts_fp8(case: Case) -> list[Row]:
    """The same in FP8. Others have seen NaN with blockwise scales, FP8 parameters and more than one tensor rank."""
    kinds = {
        f"{recipe}{' fp8 parameters' if parameters else ''} ": {"fp8": {"recipe": recipe, "parameters": parameters}}
        for recipe in FP8_GOALS
        for parameters in (False, True)
    }
    return _layouts(case, kinds)


def _layouts(case: Case, kinds: Mapping[str, dict[str, Any]]) -> list[Row]:
    rows, bound = [], 1e-4 if case.small else 0.02
    shape = TINY_SHAPE if case.small else SHAPES[1]
    for kind, settings in kinds.items():
        for head in Head:
            one = train(_job(case, shape, head=head, updates=4, trainer=settings))
            for name, axes in LAYOUTS.items():
                if ParallelLayout(**axes).world_size > case.asked_gpus:
                    continue
                found = train(_job(case, shape, head=head, updates=4, trainer=settings | {"layout": axes}))
                for what in ("losses", "norms"):
                    gap = _largest_gap(getattr(found, what), getattr(one, what))
                    label = f"{kind}{head.name.lower()} head, {name}: {what}, largest relative difference from one rank"
                    rows.append(Row(what=label, value=gap, unit="", **_at_most(bound, gap)))
    return rows


def ppo(case: Case) -> list[Row]:
    """Steps of ``megatron-rl train`` on a model with random weights."""
    return _ppo(case, [], gap_bound=0.02)


def ppo_fp8(case: Case) -> list[Row]:
    """The same in FP8 on both sides."""
    settings = [f"{role}.fp8={{recipe='blockwise'}}" for role in ("policy", "critic")]
    return _ppo(case, [*settings, "engine.quantization=fp8_per_block"], gap_bound=0.05)


def _ppo(case: Case, settings: list[str], *, gap_bound: float) -> list[Row]:
    """Seconds per phase, GB/s of a push, gap of the parity gate and of the steps, memory."""
    folder, run_dir = case.scratch / "task", case.scratch / "run"
    shape = TINY_SHAPE if case.small else SHAPES[0]
    sizes = Sizes(
        hidden=shape.hidden,
        layers=2 if case.small else 24,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        ffn_hidden=shape.ffn_hidden,
        vocabulary=384 if case.small else VOCABULARY,
        init_std=0.1 if case.small else 0.03,
    )
    prepare(folder, sizes, seed=0, steps=1, samples_per_step=8)
    prompts, tokens = (4, 8) if case.small else (32, 400)
    overrides = [
        f"run_dir={run_dir}",
        f"model.path={folder / 'model'}",
        f"model.dtype={'float32' if case.small else 'bfloat16'}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.heldout={folder / 'heldout.jsonl'}",
        "steps=3",
        f"prompts_per_step={prompts}",
        f"rollout.max_response_tokens={tokens}",
        f"ppo.minibatch_samples={2 * prompts}",
        "ppo.critic_warmup_steps=0",
        "policy.layout.tensor=1",
        "critic.layout.pipeline=1",
        "parity.enabled=true",
        f"evaluation.prompts={prompts}",
        "checkpoint.every=0",
        *([] if case.small or min(case.gpus, case.asked_gpus) >= 3 else ["cluster.colocate=true"]),
        *settings,
    ]
    if not case.small:
        overrides.append("engine.kv_cache_mib=4096")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rl", "train", "examples/arithmetic_cpu/ppo.toml", *overrides],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"megatron-rl train ended with {done.returncode}: {done.stderr[-2000:]}")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return ppo_rows(records, copy_gbps=None if case.small else _copy_gbps(case), gap_bound=gap_bound)


def _copy_gbps(case: Case) -> float:
    return next(row.value for row in ceilings(case) if row.what.startswith("device copy"))


def ppo_rows(records: list[dict[str, Any]], *, copy_gbps: float | None, gap_bound: float) -> list[Row]:
    """What the last step of a run says, and what the gate before the first one found.

    Args:
        records: of ``metrics.jsonl``.
        copy_gbps: 1e9 bytes per second that a copy reads and writes; half of its rate is the goal. None: no goal.
        gap_bound: on the mean gap between trainer and engine, nats.
    """
    last = [record for record in records if record["kind"] == "step"][-1]
    rows = [
        Row(what=key.replace("/", ": ", 1), value=value, unit="s")
        for key, value in sorted(last.items())
        if key.startswith("seconds/")
    ]
    rate = last["push/bytes"] / last["push/transfer_s"] / 1e9
    goal = {} if copy_gbps is None else _at_least(copy_gbps / 2 / 2, rate)
    rows.append(Row(what="push: transfer", value=rate, unit="GB/s", **goal))
    gap = last["push/probe_mean_abs"]
    rows.append(
        Row(what="gap of trainer and engine on the probe, mean", value=gap, unit="nats", **_at_most(gap_bound, gap))
    )
    for record in records:
        rows += [
            Row(what=key, value=value, unit="nats")
            for key, value in sorted(record.items())
            if key.startswith("parity/") and key.endswith("/mean")
        ]
    memory = {key: value for key, value in sorted(last.items()) if key.startswith("memory/")}
    return rows + [Row(what=key, value=value, unit="") for key, value in memory.items()]
