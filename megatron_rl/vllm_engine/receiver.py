"""The engine's end of a push: our channel behind vLLM's weight-transfer interface.

Importing this module registers it with vLLM; naming :class:`WorkerExtension` in the engine's arguments makes every
worker process import it, before it loads its model. Written against the interface of vLLM 0.26 to 0.32.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_rl.device import keep_freed_memory
from megatron_rl.interfaces import PushReceipt
from megatron_rl.lifetime import die_with_parent
from megatron_rl.vllm_engine import unloaded  # noqa: F401 - every worker must know it before it loads its model
from megatron_rl.weights.transfer import Channel

BACKEND = "megatron_rl"


@dataclass
class JoinInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Where the sender listens.

    Attributes:
        host: of the sender.
        port: of the sender.
        rank: in the channel, of the engine's first worker; the others follow.
        world_size: of the channel: the sender and all workers.
        timeout_s: bound on joining.
    """

    host: str
    port: int
    rank: int
    world_size: int
    timeout_s: float


@dataclass
class PushInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Which weights to wait for."""

    version: int


class ChannelReceiver(WeightTransferEngine[JoinInfo, PushInfo]):  # type: ignore[misc]
    """Loads what arrives through a channel: tensors under Hugging Face names, which the model cuts and fuses. Of those
    that it cuts, a tensor-parallel worker gets no more than it has seen its model read in a push before.
    """

    init_info_cls = JoinInfo
    update_info_cls = PushInfo
    receipt: PushReceipt | None = None
    _expected: Set[str] = frozenset()
    _channel: Channel | None = None

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        """Join the channel.

        Raises:
            TransferError: the sender or another receiver is not there in time.
        """
        self.shutdown()
        if self.device.type == "cpu":
            keep_freed_memory()  # every push takes and frees the model's memory layer by layer
        self._channel = Channel.join(
            (init_info.host, init_info.port),
            rank=init_info.rank + self.parallel_config.rank,
            world_size=init_info.world_size,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        """Make the model ready to be loaded again, layer by layer.

        Raises:
            ValueError: the engine has joined no channel; the model is left as it was.
        """
        self.receipt = None
        self._joined()
        # linear weights are packed for the CPU's kernels, and their parameters are left empty: plain loading would fail
        if self.device.type == "cpu":
            self._forget_expert_kernels()
        names = {name for name, _ in self.model.named_parameters()}  # a tied head is none of them, yet
        with self._configured():
            initialize_layerwise_reload(self.model)
        self._expected = names & {name for name, _ in self.model.named_parameters()}  # scales are none of them, now

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one whole push; errors as :meth:`receive_weights`."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():  # the inherited method synchronizes always, which raises on a CPU
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: PushInfo) -> None:
        """Load one push. After an error the model is whole in form but not in content, until the next push.

        Raises:
            TransferError: the stream did not come to its proper end.
            Exception: what the model's loader raised.
        """
        reception, arrived = self._joined().receive(update_info.version), set[str]()
        with self._left_whole():
            try:
                with self._configured():
                    loaded = self.model.load_weights(_noted(reception, arrived))
            finally:
                reception.drain()
            self._check_complete(loaded, arrived)
            self._joined().keep(reception.reads)
        self.receipt = reception.receipt

    def _check_complete(self, loaded: set[str] | None, arrived: Set[str]) -> None:
        """Why: a layer that gets nothing, or a part of its tensors, keeps the old ones, which is no error of vLLM's;
        a small step is far below what scores can show.
        """
        if loaded is None:
            return
        stale = self._expected - loaded
        for name in self._expected:
            if parts := self._parts(name):
                stale |= parts - arrived
        if stale:
            raise ValueError(
                f"the push must bring every tensor of the engine's model, {len(stale)} of {len(self._expected)} stay "
                f"as they were, the first is {min(stale)}"
            )

    def _parts(self, name: str) -> set[str]:
        """What a fused tensor is made of, by Hugging Face names; nothing for another one. vLLM takes the fused one for
        loaded when one of them is.
        """
        fused: Mapping[str, Sequence[str]] = getattr(self.model, "packed_modules_mapping", {})
        path = name.split(".")
        return {
            ".".join([*path[:place], part, *path[place + 1 :]])
            for place, module in enumerate(path)
            for part in fused.get(module, ())
        }

    @contextmanager
    def _left_whole(self) -> Iterator[None]:
        """Why: layers that wait for the rest of their tensors would mix those of a failed push with the next one's."""
        try:
            yield
        except BaseException:
            with self._configured():
                finalize_layerwise_reload(self.model, self.model_config)
            raise

    def finish_weight_update(self) -> None:
        """Put the last layers in place."""
        with self._configured():
            finalize_layerwise_reload(self.model, self.model_config)
        self._reset_cache_scales()
        if self.device.type == "cpu":
            self._repack_tied_heads()

    def _configured(self) -> AbstractContextManager[None]:
        """Why: layers that quantise and experts ask for vLLM's configuration when they are loaded, which the worker of
        0.32 sets around a push and that of 0.26 does not.
        """
        context: AbstractContextManager[None] = set_current_vllm_config(self.vllm_config)
        return context

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Refuse: vLLM 0.26 makes no engine of a class without this, and never calls it.

        Raises:
            NotImplementedError: always; the trainer sends through its own end of the channel.
        """
        raise NotImplementedError("weights are sent by megatron_rl.weights.transfer.Channel.send")

    def _reset_cache_scales(self) -> None:
        """Why: keys and values are kept unscaled, and no push brings their scales; where 0.26 has them as parameters, a
        sleep that throws weights away takes them along.
        """
        for module in self.model.modules():
            for name in ("_q_scale", "_k_scale", "_v_scale"):
                if isinstance(scale := getattr(module, name, None), torch.Tensor):
                    scale.data.fill_(1.0)

    def _forget_expert_kernels(self) -> None:
        """Why: experts are packed for the CPU only where their kernel is made, and a reload keeps the old one:
        it would compute with weights that nobody packed.
        """
        for module in self.model.modules():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None

    def _repack_tied_heads(self) -> None:
        """Why: a head tied to the embedding has a packed copy of its own, which reloading leaves as it was."""
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            UnquantizedEmbeddingMethod,
            VocabParallelEmbedding,
        )

        found: list[Any] = [
            module
            for module in self.model.modules()
            if isinstance(module, VocabParallelEmbedding)
            and isinstance(getattr(module, "quant_method", None), UnquantizedEmbeddingMethod)
        ]
        embedded = {module.weight.data_ptr() for module in found if not isinstance(module, ParallelLMHead)}
        for module in found:
            if isinstance(module, ParallelLMHead) and module.weight.data_ptr() in embedded:
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def _joined(self) -> Channel:
        if self._channel is None:
            raise ValueError("the engine must join a channel before it can receive weights; call join first")
        return self._channel

    def shutdown(self) -> None:
        """Leave the channel."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def _noted(tensors: Iterable[tuple[str, Tensor]], names: set[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        names.add(name)
        yield name, tensor


def _is_about_weights(record: logging.LogRecord) -> bool:
    """Why: each push would be told to have failed for what no checkpoint holds, the table of rotary embeddings and a
    head that is tied to the embedding; a head that should have come is missed by name.
    """
    return not any(layer in record.getMessage() for layer in ("RotaryEmbedding", "ParallelLMHead"))


WeightTransferEngineFactory.register_engine(BACKEND, ChannelReceiver)
logging.getLogger(finalize_layerwise_reload.__module__).addFilter(_is_about_weights)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What came of a call to one worker: a value, or type and message of what it raised."""

    value: Any = None
    error: str | None = None


class WorkerExtension:
    """What the engine asks of a worker beyond vLLM's own calls; vLLM mixes it into its worker class."""

    def attempt(self, method: str | Callable[..., Any], *args: Any) -> Attempt:
        """Call a method of the worker, or a function of it.

        Why: where one worker raises, vLLM leaves the answers of the others unread, and takes them for answers to the
        next call.
        """
        try:
            if callable(method):
                return Attempt(value=method(self, *args))
            return Attempt(value=getattr(self, method)(*args))
        except Exception as error:
            traceback.print_exc()
            return Attempt(error=f"{type(error).__name__}: {error}")

    def start_push(self) -> None:
        """Begin a push, whatever became of the last one: vLLM lets none begin before the last has ended."""
        if self._weight_update_active:  # type: ignore[attr-defined]
            self.finish_weight_update()  # type: ignore[attr-defined]
        self.start_weight_update()  # type: ignore[attr-defined]

    def pid(self) -> int:
        """Of this worker's process."""
        return os.getpid()

    def die_with_engine(self, pid: int) -> None:
        """End when the engine's process does: vLLM itself only asks a worker to, and one that is stopped or busy does
        not hear it.
        """
        die_with_parent(pid)

    def weight_bytes(self) -> int:
        """Of the parameters, as vLLM knows them; those that a CPU's kernels have packed are not among them."""
        return sum(parameter.nbytes for parameter in self.model_runner.model.parameters())  # type: ignore[attr-defined]

    def zero_cache(self) -> None:
        """Forget all keys and values."""
        for cache in self.model_runner.kv_caches:  # type: ignore[attr-defined]
            cache.zero_()

    def unname_shared_memory(self) -> None:
        """Unlink what tensor-parallel workers on a CPU share, now that all have it open: a worker that is killed, or
        whose engine is, cannot.
        """
        for path in Path("/dev/shm").glob(f"{os.environ['VLLM_DIST_IDENT']}-*-cpushm_*"):
            path.unlink(missing_ok=True)

    def push_receipt(self) -> PushReceipt | None:
        """What the last push brought this worker; None where it failed."""
        return self._receiver.receipt

    def leave_channel(self) -> None:
        """Let the sender go; the worker may join another channel."""
        self._receiver.shutdown()

    @property
    def _receiver(self) -> ChannelReceiver:
        receiver: ChannelReceiver = self.weight_transfer_engine  # type: ignore[attr-defined]
        return receiver
