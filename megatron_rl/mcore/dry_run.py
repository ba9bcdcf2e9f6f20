"""The real model of one rank of any world, without memory and without the other ranks.

Tensors are fake (shapes and types on the meta device), and so is the process group: every collective answers at once.
megatron-core builds its modules, gradient buffers and optimizer as on a cluster, and their bytes are read off.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from megatron.core.tensor_parallel import random as random_states
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_rl.batches import PackedTokens
from megatron_rl.config.precision import token_multiple
from megatron_rl.config.schema import TrainerConfig
from megatron_rl.device import dtype
from megatron_rl.layout import ParallelLayout
from megatron_rl.mcore.attention import packed_rows
from megatron_rl.mcore.groups import build_parallel_groups, stop_groups
from megatron_rl.mcore.model import build_chunks, read_tokens, read_values, run_model
from megatron_rl.mcore.optimizer import (
    Training,
    add_gradients,
    add_optimizer,
    gradient_buffers,
    optimizer_parts,
    prepare_training,
)
from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.weight_map import Head


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a rank holds, in bytes.

    Attributes:
        parameters: number of elements.
        weights: parameters; with a distributed optimizer the buffer that holds them.
        gradients: float32 buffers.
        optimizer: main weights and moments on the device.
        host_optimizer: the same in host memory.
        start: most bytes of weights and gradients at once while the buffers are made.
        layers: of this rank's stage.
        activations: largest number of bytes that a forward and backward pass over one micro-batch had live beyond the
            states above; None where it cannot be counted, see ``uncounted``.
        uncounted: why not; empty where it was.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    host_optimizer: int
    start: int
    layers: int
    activations: int | None
    uncounted: str


def dry_run(
    dims: ModelDims, trainer: TrainerConfig, head: Head, rank: int, dtype_name: str, row_tokens: int | None = None
) -> DryRun:
    """Build ``rank`` of the layout and read off what it holds. ``prepare_megatron`` must have run.

    Args:
        dims: of the model.
        trainer: layout, optimizer, memory.
        head: TOKEN for a policy, VALUE for a critic.
        rank: in ``range(layout.world_size)``.
        dtype_name: of the weights, as in the configuration.
        row_tokens: length of each row of the micro-batch that activations are counted with; None: they are not counted.

    Raises:
        ValueError: the model cannot be laid out so, there is no such rank, or weights are kept in FP8.
    """
    layout = trainer.layout
    if trainer.fp8 is not None and trainer.fp8.parameters:
        raise ValueError(
            "fp8.parameters must be false in a dry run: weights in FP8 are made by kernels of a GPU, and fake tensors "
            "have neither their bytes nor their scales; set fp8.parameters=false to see the same model in bfloat16"
        )
    if problems := [*dims.layout_problems(layout), *trainer.problems()]:
        raise ValueError("; ".join(problems))
    layout.coordinates(rank)
    with _alone(layout, rank), FakeTensorMode(allow_non_fake_inputs=True):
        chunks = build_chunks(dims, trainer, dtype(dtype_name), head)
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        count, size = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
        layers = sum(len(chunk.decoder.layers) for chunk in chunks)
        with _Live(p.untyped_storage() for p in parameters) as live:
            wrapped = add_gradients(chunks, trainer)
        training = add_optimizer(wrapped, trainer, total_updates=1)
        buffers = gradient_buffers(training)
        on_host = trainer.optimizer_on_host
        states = _optimizer_bytes(training)
        activations, reason = None, "not asked for"
        if row_tokens is not None:
            if trainer.overlap_communication:  # whose coalesced collectives fake tensors have not; it keeps no more
                apart = replace(trainer, overlap_communication=False)
                training = prepare_training(build_chunks(dims, apart, dtype(dtype_name), head), apart, total_updates=1)
            activations, reason = _fake_activations(training, trainer, dims, head, row_tokens)
        return DryRun(
            parameters=count,
            weights=sum(b.param_data.nbytes for b in buffers) if trainer.distributed_optimizer else size,
            gradients=sum(b.grad_data.nbytes for b in buffers),
            optimizer=0 if on_host else states,
            host_optimizer=states if on_host else 0,
            start=live.peak,
            layers=layers,
            activations=activations,
            uncounted=reason,
        )


@contextlib.contextmanager
def _alone(layout: ParallelLayout, rank: int) -> Iterator[None]:
    """A process group in which this is ``rank``, and nobody else is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    tracker = random_states.CudaRNGStatesTracker
    fork, gather = tracker.fork, dist.all_gather_object
    try:
        build_parallel_groups(layout)
        # fake tensors hold no random state that could be compared and put back
        tracker.fork = lambda self, name=None: contextlib.nullcontext()
        # the optimizer asks which parameter groups others have
        dist.all_gather_object = _echo  # type: ignore[assignment]
        yield
    finally:
        tracker.fork, dist.all_gather_object = fork, gather
        stop_groups()


def _echo(answers: list[Any], mine: Any, group: Any = None) -> None:
    """All others say what this rank says."""
    answers[:] = [mine] * len(answers)


def _optimizer_bytes(training: Training) -> int:
    """Of main weights that are not the model's own weights, and of moments."""
    own = {_storage(p) for chunk in training.chunks for p in chunk.parameters()}
    own |= {_storage(b.param_data) for b in gradient_buffers(training) if b.param_data is not None}
    found: dict[int, int] = {}
    for part in optimizer_parts(training.optimizer):
        if part.is_stub_optimizer:
            continue
        tensors = [p for group in part.optimizer.param_groups for p in group["params"]]
        tensors += [t for state in part.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        # views count by their own size: a shard is a view of nothing larger than itself unless it is the model's
        found |= {id(t): t.nbytes for t in tensors if t.dim() and _storage(t) not in own}
    return sum(found.values())


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that were given to it, or made while it was on, and are still held."""

    def __init__(self, storages: Iterable[Any] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for storage in storages:
            self._track(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and _storage(tensor) not in before:
                self._track(tensor.untyped_storage())
        return result

    def _track(self, storage: Any) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def _fake_activations(
    training: Training, trainer: TrainerConfig, dims: ModelDims, head: Head, row_tokens: int
) -> tuple[int | None, str]:
    layout = trainer.layout
    if dims.sparse_layers:
        return None, "how many tokens each expert gets depends on values, which fake tensors have not"
    if layout.pipeline > 1 or layout.context > 1:
        return None, "stages and context ranks tell each other lengths and positions, which fake tensors have not"
    return count_activations(training, trainer, head, row_tokens), ""


def count_activations(training: Training, trainer: TrainerConfig, head: Head, row_tokens: int) -> int:
    """The largest number of bytes that a forward and backward pass over one micro-batch has live beyond the states.

    Tensors may be fake or real. The model must be whole on each tensor rank.

    Args:
        training: the model.
        trainer: how many tokens a micro-batch has.
        head: on top of the model.
        row_tokens: length of each row.
    """
    rows = max(1, trainer.tokens_per_microbatch // row_tokens)
    padding = -rows * row_tokens % token_multiple(trainer.layout, trainer.fp8)  # a row of its own, as in training
    lengths = [row_tokens] * rows + [padding] * (padding > 0)
    count = sum(lengths)
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        # attention is planned from values: row bounds and positions must be real
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        positions = torch.cat([torch.arange(length) for length in lengths])
        tokens = torch.zeros(count, dtype=torch.int64)
        batch = PackedTokens(
            inputs=tokens,
            targets=tokens,
            positions=positions,
            cu_seqlens=bounds,
            max_length=max(lengths),
            loss_mask=torch.arange(count) < rows * row_tokens,
            loss_weight=torch.ones(count),
        )
        plan = packed_rows(batch)
    live = _Live()
    with live:
        output = run_model(training.chunks[0], batch, plan)
        if head is Head.VALUE:
            loss = read_values(output, batch).values.sum()
        else:
            loss = read_tokens(training.chunks[0], output, batch, 1.0).logprobs.sum()
        loss.backward()
    return live.peak
