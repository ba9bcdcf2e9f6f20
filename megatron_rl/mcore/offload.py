"""Out of device memory and back: weights, gradients and optimizer states of one rank, without a tensor being replaced.

A tensor keeps its place in the program: the storage below it is emptied and filled again, so every view of it (shards
of the distributed optimizer, gradients inside their buffers) is as it was. On a CPU, where host and device are the same
memory, the same is done with ordinary copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rl.device import host_buffer, memory_used, release_cached
from megatron_rl.interfaces import MemoryUse, TrainerPart
from megatron_rl.mcore.fp8 import clear_cached_weights
from megatron_rl.mcore.host_optimizer import HostOptimizer
from megatron_rl.mcore.optimizer import Training, gather_parameters, gradient_buffers, optimizer_parts


class Offloaded(RuntimeError):
    """What a verb needs is in host memory, or is to be moved where it is already."""


class Offload:
    """Which parts of a rank's model are away, and their copies in (pinned) host memory.

    Gradients have no copy: they are the last step's, which nobody reads, and come back as zeros.
    """

    def __init__(self, training: Training, reference: Sequence[Any] | None) -> None:
        """Everything is on the device."""
        self._training = training
        self._reference = reference or ()
        self._away: dict[TrainerPart, list[tuple[Any, Tensor]]] = {}

    def require(self, *parts: TrainerPart) -> None:
        """Refuse to go on without ``parts``.

        Raises:
            Offloaded: one of them is away.
        """
        if missing := [part.value for part in parts if part in self._away]:
            raise Offloaded(
                f"{' and '.join(missing)} must be on the device, they are in host memory: onload them first"
            )

    def out(self, part: TrainerPart) -> None:
        """To host memory.

        Raises:
            Offloaded: it is there already.
        """
        self.require(part)
        if part is TrainerPart.STATE:
            self._training.optimizer.zero_grad()  # else views and copies of gradients live on
            for storage in _storages(self._gradients()):
                storage.resize_(0)
        elif not self._away:
            gather_parameters(self._training)  # nothing may be under way
        clear_cached_weights([*self._training.chunks, *self._reference])
        storages = self._of(part)
        sizes = [storage.nbytes() for storage in storages]
        copies = host_buffer(sum(sizes)).split(sizes)
        for storage, copy in zip(storages, copies, strict=True):
            copy.copy_(_bytes(storage))
            storage.resize_(0)
        self._away[part] = list(zip(storages, copies, strict=True))
        release_cached()

    def back(self, part: TrainerPart) -> None:
        """To the device, with the same bits.

        Raises:
            Offloaded: it is there already.
        """
        if part not in self._away:
            raise Offloaded(f"{part.value} must be in host memory to come back, they are on the device")
        for storage, copy in self._away.pop(part):
            storage.resize_(len(copy))
            _bytes(storage).copy_(copy)
        if part is TrainerPart.STATE:
            for buffer in gradient_buffers(self._training):
                buffer.grad_data.untyped_storage().resize_(buffer.grad_data.nbytes)
                buffer.grad_data.zero_()

    def memory(self) -> MemoryUse:
        """Of this rank."""
        tracked = [*_storages(self._gradients()), *self._of(TrainerPart.WEIGHTS), *self._of(TrainerPart.STATE)]
        return MemoryUse(planned_bytes=sum(storage.nbytes() for storage in tracked), measured_bytes=memory_used())

    def _of(self, part: TrainerPart) -> list[Any]:
        weights = _storages(self._weights())
        if part is TrainerPart.WEIGHTS:
            return weights
        known = {storage._cdata for storage in [*weights, *_storages(self._gradients())]}
        return [storage for storage in _storages(self._states()) if storage._cdata not in known]

    def _weights(self) -> Iterator[Tensor]:
        for chunk in self._training.chunks:
            yield from chunk.parameters()

    def _states(self) -> Iterator[Tensor]:
        for part in optimizer_parts(self._training.optimizer):
            if part.is_stub_optimizer or isinstance(part.optimizer, HostOptimizer):
                continue  # the latter has its tensors in host memory always
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if torch.is_tensor(value) and value.numel() > 1)
        for chunk in self._reference:
            yield from chunk.parameters()

    def _gradients(self) -> Iterator[Tensor]:
        return (buffer.grad_data for buffer in gradient_buffers(self._training))


def _storages(tensors: Iterable[Tensor]) -> list[Any]:
    """The storages below, each once."""
    return list({storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}.values())


def _bytes(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
