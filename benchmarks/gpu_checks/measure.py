"""What the checks of single parts measure, by the trainer's own code.

Without a GPU the same code runs in a small form, so that whoever has one finds a program that works; its figures mean
nothing and have no goals. Each check gives its figures as it gets them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_checks.case import Case, at_most
from benchmarks.gpu_checks.costs import (
    SHAPES,
    TINY_SHAPE,
    VOCABULARY,
    Shape,
    attention_flops,
    floor_seconds,
    logprob_flops,
    product_flops,
)
from benchmarks.gpu_checks.plan import Row
from benchmarks.logprob import plain
from megatron_rl.batches import PackedTokens
from megatron_rl.device import device, has_cuda, prepare_megatron
from megatron_rl.layout import ParallelLayout
from megatron_rl.mcore.logprobs import Kernels, TorchKernels, choose_kernels, linear_logprobs
from megatron_rl.ray_runtime.supervisor import port_kept

_TEMPERATURE = 0.6
_PARTS = ("log-probs", "entropies", "gradient of hidden states", "gradient of weight")


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


def ceilings(case: Case) -> Iterator[Row]:
    """What this device does at best."""
    size = 256 if case.small else 8192
    yield Row(what=f"bfloat16 product of {size}", value=product_tflops(size), unit="TFLOP/s")
    if has_cuda() and torch.cuda.get_device_capability() >= (8, 9):
        left = torch.randn(size, size, device=device()).to(torch.float8_e4m3fn)
        right = torch.randn(size, size, device=device()).to(torch.float8_e4m3fn).T
        one = torch.ones((), device=device())

        def multiply() -> Tensor:
            return torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        taken = seconds(multiply)
        yield Row(what=f"FP8 product of {size}", value=product_flops(*[size] * 3) / taken / 1e12, unit="TFLOP/s")
    yield Row(what="device copy, read and written", value=copy_gbps(2**20 if case.small else 2**31), unit="GB/s")
    if has_cuda():
        host, there = torch.empty(2**30, dtype=torch.uint8, pin_memory=True), torch.empty(2**30, dtype=torch.uint8)
        there = there.to(device())
        for name, to, of in (("host to device", there, host), ("device to host", host, there)):
            taken = seconds(partial(to.copy_, of, non_blocking=True))
            yield Row(what=f"{name}, pinned", value=len(host) / taken / 1e9, unit="GB/s")


def copy_gbps(size: int) -> float:
    """1e9 bytes per second that a copy of ``size`` bytes on the device reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return 2 * size / seconds(partial(target.copy_, source)) / 1e9


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


def logprobs(case: Case) -> Iterator[Row]:
    """Time and memory of each way from hidden states to log-probs; how far log-probs, entropies and the gradients of
    both are from autograd's, and the first log-probs from float64's.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tflops = product_tflops(256 if case.small else 8192)
    for shape in (TINY_SHAPE,) if case.small else SHAPES:
        yield from _logprobs(case, shape, tflops)


def _logprobs(case: Case, shape: Shape, tflops: float) -> Iterator[Row]:
    tokens, vocabulary = (64, 300) if case.small else (16384, VOCABULARY)
    generator = torch.Generator(device()).manual_seed(0)

    def drawn(count: int, scale: float) -> Tensor:
        values = torch.randn(count, shape.hidden, generator=generator, device=device())
        return (scale * values).bfloat16().requires_grad_()

    hidden, weight = drawn(tokens, 1.0), drawn(vocabulary, 3 * shape.hidden**-0.5)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device())
    with torch.no_grad():
        log_p = (hidden[:64].double() @ weight.double().T / _TEMPERATURE).log_softmax(-1)
        exact = log_p.gather(-1, targets[:64, None])[:, 0]

    def pair(kernels: Kernels, entropy: bool) -> tuple[Tensor, Tensor | None]:
        settings = {"temperature": _TEMPERATURE, "group": dist.group.WORLD, "with_entropy": entropy, "kernels": kernels}
        return linear_logprobs(hidden, weight, targets, **settings)

    def by(kernels: Kernels | None, entropy: bool) -> Tensor:
        return plain(hidden, weight, targets, entropy)[0] if kernels is None else pair(kernels, entropy)[0]

    def both(kernels: Kernels | None) -> None:
        hidden.grad = weight.grad = None
        by(kernels, True).sum().backward()

    slopes = torch.randn(2, tokens, generator=generator, device=device())
    wanted = _by_autograd(hidden, weight, targets, slopes)
    plain_gib = peak_gib(lambda: both(None))
    yield Row(what=f"{shape.name} plain: peak memory", value=plain_gib, unit="GiB")
    chosen = choose_kernels("auto")
    for kernels in {kernels.name: kernels for kernels in (TorchKernels(), chosen)}.values():
        goal, name = kernels.name == chosen.name and not case.small, f"{shape.name} {kernels.name}"
        with torch.no_grad():
            gap = float((by(kernels, False)[:64].double() - exact).abs().mean())
            forward = seconds(partial(by, kernels, False), 3)
        taken = seconds(partial(both, kernels), 3)
        gib = peak_gib(partial(both, kernels))
        # logits of about 5 are rounded to 2 ** -6 and divided by 0.6
        yield Row(what=f"{name}: mean distance from float64", value=gap, unit="nats", **at_most(0.03, gap))
        given = pair(kernels, True)
        mine = [*given, *torch.autograd.grad(given, (hidden, weight), tuple(slopes))]
        for part, found, want in zip(_PARTS, mine, wanted, strict=True):
            gap = float((found.detach().float() - want).norm() / want.norm())
            # a product that lies between two 16-bit numbers is rounded to one here and to the other there
            what = f"{name}: {part}, relative distance from autograd"
            yield Row(what=what, value=gap, unit="", **at_most(5e-3, gap))
        for what, measured, backward in (("forward", forward, False), ("forward and backward", taken, True)):
            times = measured / floor_seconds(logprob_flops(tokens, shape.hidden, vocabulary, backward=backward), tflops)
            bound = at_most(1.5, times) if goal else {}
            yield Row(what=f"{name}: {what}", value=1e3 * measured, unit="ms")
            yield Row(what=f"{name}: {what} / floor", value=times, unit="", **bound)
        share = at_most(plain_gib / 4, gib) if goal else {}
        yield Row(what=f"{name}: peak memory", value=gib, unit="GiB", **share)


def _by_autograd(hidden: Tensor, weight: Tensor, targets: Tensor, slopes: Tensor) -> list[Tensor]:
    """Log-probs, entropies and the two gradients of their sum times ``slopes`` [2, N], all float32: from whole logits,
    by torch's own derivatives, some tokens at a time.
    """
    logprobs, entropies, of_hidden = [], [], []
    of_weight = torch.zeros_like(weight, dtype=torch.float32)
    for rows, of_rows, slope in zip(hidden.split(2048), targets.split(2048), slopes.split(2048, 1), strict=True):
        log_p = ((rows @ weight.T).float() / _TEMPERATURE).log_softmax(-1)
        outputs = (log_p.gather(-1, of_rows[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1))
        by_rows, by_weight = torch.autograd.grad(outputs, (rows, weight), tuple(slope))
        logprobs.append(outputs[0].detach())
        entropies.append(outputs[1].detach())
        of_hidden.append(by_rows.float())
        of_weight += by_weight
    return [torch.cat(logprobs), torch.cat(entropies), torch.cat(of_hidden), of_weight]


def attention(case: Case) -> Iterator[Row]:
    """The trainer's attention over packed rows of unequal length, forward and backward, against float64 row by row:
    torch's, and Transformer Engine's where training would take it.
    """
    prepare_megatron()
    from types import SimpleNamespace

    from megatron_rl.mcore.attention import PackedAttention
    from megatron_rl.mcore.capabilities import fuses_packed_rows, lacking
    from megatron_rl.mcore.groups import start_groups

    shapes = (TINY_SHAPE,) if case.small else SHAPES
    for shape in shapes:
        yield from _attention(case, shape, PackedAttention(SimpleNamespace(attention_dropout=0.0)), shape.name)
    if lacking("bfloat16") is None and fuses_packed_rows():
        with port_kept() as port:
            start_groups(ParallelLayout(), rank=0, host="127.0.0.1", port=port.getsockname()[1], timeout_s=60.0, seed=0)
        for shape in shapes:
            yield from _attention(case, shape, _fused(shape), f"{shape.name} fused")


def _fused(shape: Shape) -> Any:
    """Transformer Engine's, as a layer of the trainer has it."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_rl.mcore.fused_attention import packed_attention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        attention_dropout=0.0,
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    kind = {"attn_mask_type": AttnMaskType.causal}
    module = packed_attention(TEDotProductAttention)(config=config, layer_number=1, attention_type="self", **kind)
    return partial(module, attention_mask=None, **kind)


def _attention(case: Case, shape: Shape, module: Any, label: str) -> Iterator[Row]:
    from megatron_rl.mcore.attention import packed_rows

    generator = torch.Generator(device()).manual_seed(0)
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

        def drawn(heads: int, total: int = total) -> Tensor:
            made = torch.randn(total, 1, heads, shape.head_dim, generator=generator, device=device())
            return made.bfloat16().requires_grad_()

        given = [drawn(shape.heads), drawn(shape.kv_heads), drawn(shape.kv_heads)]
        forward: Callable[[], Tensor] = partial(module, *given, packed_seq_params=plan)
        out = forward()
        slope = torch.randn(out.shape, generator=generator, device=device()).bfloat16()
        mine = [out, *torch.autograd.grad(out, given, slope)]
        if name == "ragged":
            wide = [tensor.detach().double().requires_grad_() for tensor in given]
            exact = torch.cat([_row_attention(wide, a, b) for a, b in pairwise(bounds)])
            wanted = [exact, *torch.autograd.grad(exact, wide, slope.double().view_as(exact))]
            for part, found, want in zip(("output", "dq", "dk", "dv"), mine, wanted, strict=True):
                gap = float((found.double().view_as(want) - want).norm() / want.norm())
                yield Row(what=f"{label} {name}: {part}, relative error", value=gap, unit="", **at_most(0.01, gap))
            continue
        rate = attention_flops(lengths, shape.heads, shape.head_dim) / seconds(forward) / 1e12
        yield Row(what=f"{label} {name}: forward", value=rate, unit="TFLOP/s")


def _row_attention(given: list[Tensor], start: Tensor, stop: Tensor) -> Tensor:
    query, key, value = (tensor[int(start) : int(stop), 0].transpose(0, 1) for tensor in given)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(0, 1).reshape(int(stop - start), 1, -1)
