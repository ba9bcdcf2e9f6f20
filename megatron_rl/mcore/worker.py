"""One rank of a model as a process sees it: the verbs that the driver calls on all ranks of a model at once.

A verb that answers does so on its reporting ranks and gives None on the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rl.batches import ExperienceBatch, LossTerms, Minibatch, PackedTokens, TokenRows
from megatron_rl.config.precision import token_multiple
from megatron_rl.device import dtype, limit_threads, threads
from megatron_rl.durable import FileRecord, comes_into_sight
from megatron_rl.interfaces import (
    MemoryUse,
    PushReceipt,
    SupervisedTokenLoss,
    TokenLoss,
    TrainerPart,
    UpdateResult,
    ValueLoss,
)
from megatron_rl.linear_formats import LinearFormat
from megatron_rl.mcore.activations import layer_outputs, rotary_frequencies
from megatron_rl.mcore.capabilities import Capability, capabilities, uses_transformer_engine
from megatron_rl.mcore.checkpoint import holds_weights, load_checkpoint, load_weights, stage_checkpoint
from megatron_rl.mcore.export import Waits, full_tensors, load_hf, local_parameters
from megatron_rl.mcore.fp8 import linear_formats, scoring_precision
from megatron_rl.mcore.groups import start_groups, stop_groups
from megatron_rl.mcore.model import build_chunks, read_logprobs, read_tokens, read_values
from megatron_rl.mcore.offload import Offload
from megatron_rl.mcore.optimizer import Training, gather_parameters, prepare_training, release
from megatron_rl.mcore.quantised import forget_values
from megatron_rl.mcore.spec import WorkerSpec, fp8_faults
from megatron_rl.mcore.step import forward_rows, train_step
from megatron_rl.mcore.value_head import read_through
from megatron_rl.weights.coverage import critic_architecture
from megatron_rl.weights.formats import check_formats, expected_formats
from megatron_rl.weights.fp8_push import quantised
from megatron_rl.weights.messages import Listener, listen
from megatron_rl.weights.plan import HfFiles, TransferPlan, transfer_plan
from megatron_rl.weights.safetensors_io import save_hf_folder
from megatron_rl.weights.slices import SlicePlan
from megatron_rl.weights.transfer import Channel
from megatron_rl.weights.transports import Transport
from megatron_rl.weights.weight_map import Head, weight_map

_SEEN_WITHIN_S = 10.0


class Worker:
    """One rank: its stage of the model, its optimizer unless it only scores, the reference's where one is kept."""

    def __init__(self, spec: WorkerSpec, *, rank: int, host: str, port: int, timeout_s: float) -> None:
        """Join the other ranks and load the model.

        Args:
            spec: the same on all ranks.
            rank: of this process.
            host: of rank 0.
            port: a free one there.
            timeout_s: bound on joining and on every collective.

        Raises:
            ValueError: the model cannot be laid out or trained so here, a linear does not multiply in the format that
                it should, or the folder does not fit the model.
        """
        self._layout = spec.trainer.layout
        if problems := spec.dims.layout_problems(self._layout) + fp8_faults(spec):
            raise ValueError(f"{spec.role}: " + "; ".join(problems))
        limit_threads()
        self._spec = spec
        self._rank = rank
        self._weights = weight_map(spec.dims, spec.head)
        self._at = start_groups(self._layout, rank=rank, host=host, port=port, timeout_s=timeout_s, seed=spec.seed)
        self._models = self._load_chunks()
        updates = spec.total_updates
        self._training = None if updates is None else prepare_training(self._models, spec.trainer, updates)
        self._reference = self._load_chunks() if spec.keep_reference else None
        forget_values(self._reference or ())
        self._offload = None if self._training is None else Offload(self._training, self._reference)
        self._listener: Listener | None = None
        self._channel: Channel | None = None
        self._pushed_format: str | None = None
        self._receiver_s = timeout_s
        self._written: Future[dict[str, FileRecord]]

    def _load_chunks(self) -> list[Any]:
        spec = self._spec
        engine = uses_transformer_engine(spec.model.layers, spec.model.dtype)
        chunks = build_chunks(spec.dims, spec.trainer, dtype(spec.model.dtype), spec.head, transformer_engine=engine)
        expected = expected_formats(self._weights, spec.trainer.fp8, spec.model.dtype)
        check_formats(f"{spec.role} at rank {self._rank}", expected, linear_formats(chunks, self._weights))
        if holds_weights(spec.model.path):
            load_weights(spec.model.path, chunks)
        else:
            load_hf(chunks, spec.model.path, self._weights, spec.dims, self._layout, self._rank)
        return chunks

    @property
    def _chunks(self) -> Sequence[Any]:
        """What is run: the models, in training behind what gathers their parameters."""
        return self._models if self._training is None else self._training.chunks

    def _trained(self, *parts: TrainerPart) -> tuple[Training, Offload]:
        """What only a rank has that trains; ``parts`` of it must be on the device."""
        if self._training is None or self._offload is None:
            raise ValueError(
                f"{self._spec.role}: these ranks only score, they have no gradients and no optimizer; give "
                "total_updates to have them trained, saved, loaded or moved"
            )
        self._offload.require(*parts)
        return self._training, self._offload

    def _require(self, part: TrainerPart) -> None:
        if self._offload is not None:
            self._offload.require(part)

    def logprobs(
        self, batch: TokenRows, temperature: float | None = None, reference: bool = False, packed: bool = True
    ) -> tuple[Tensor, Tensor] | None:
        """Score response tokens.

        Args:
            batch: the same on all ranks; each data replica does its share.
            temperature: None: that of training.
            reference: by the frozen copy instead of the model.
            packed: else each row makes a micro-batch of its own.

        Returns:
            on one rank per data replica: the rows it did [b] and their log-probs [b, T] f32, 0 outside the response.

        Raises:
            ValueError: no reference is kept.
        """
        chunks = self._reference if reference else self._chunks
        if chunks is None:
            raise ValueError(f"{self._spec.role}: no reference is kept; set keep_reference")
        self._require(TrainerPart.STATE if reference else TrainerPart.WEIGHTS)
        read = partial(read_logprobs, temperature=self._spec.temperature if temperature is None else temperature)
        return self._forward(chunks, batch, read, packed)

    def values(
        self, batch: TokenRows, packed: bool = True, through: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """The value of the state before each response token; answers as :meth:`logprobs`.

        Args:
            batch: the same on all ranks.
            packed: see :meth:`logprobs`.
            through: [h] read the final hidden states through this instead of the value head.
        """
        self._require(TrainerPart.WEIGHTS)
        with nullcontext() if through is None else read_through(self._chunks, through):
            return self._forward(self._chunks, batch, lambda _, *output: read_values(*output).values, packed)

    def _forward(
        self, chunks: Sequence[Any], batch: TokenRows, read: Any, packed: bool = True
    ) -> tuple[Tensor, Tensor] | None:
        with scoring_precision(chunks, self._spec.trainer.fp8):
            return forward_rows(chunks, batch, read, **self._placement(packed))

    def _placement(self, packed: bool = True) -> dict[str, Any]:
        return {
            "layout": self._layout,
            "at": self._at,
            "budget": self._spec.trainer.tokens_per_microbatch if packed else 1,
            "multiple": token_multiple(self._layout, self._spec.trainer.fp8),
            "cost": self._spec.dims.row_flops,
        }

    def activations(self, batch: TokenRows, packed: bool) -> dict[str, tuple[Tensor, Tensor]] | None:
        """What leaves the modules of this rank's pieces of the model, see :func:`layer_outputs`."""
        self._require(TrainerPart.WEIGHTS)
        with scoring_precision(self._chunks, self._spec.trainer.fp8):
            return layer_outputs(self._chunks, batch, **self._placement(packed))

    def tensors(self, prefixes: Sequence[str]) -> dict[str, Tensor] | None:
        """Whole weights whose Hugging Face name starts with one of ``prefixes``, in the map's order; rank 0 answers."""
        asked = tuple(prefixes)
        moved = tuple(t for t in self._plan.tensors if any(name.startswith(asked) for name in t.entry.hf))
        found = {
            name: tensor.to("cpu", copy=True)
            for name, tensor in self._full_tensors(TransferPlan(moved))
            if name.startswith(asked)
        }
        if self._rank != 0:
            return None
        name = "model.rotary_emb.inv_freq"
        return ({name: rotary_frequencies(self._models)} if name.startswith(asked) else {}) | found

    def update(
        self,
        minibatch: Minibatch[ExperienceBatch] | Minibatch[TokenRows],
        loss: TokenLoss | SupervisedTokenLoss | ValueLoss,
    ) -> UpdateResult | None:
        """One optimizer step; replica 0 answers.

        Raises:
            ValueError: the minibatch has no response token, or these ranks only score.
        """
        training, _ = self._trained(*TrainerPart)
        call: Any = loss

        def loss_of(stage: Any, output: Tensor, batch: PackedTokens) -> LossTerms:
            if self._spec.head is Head.VALUE:
                terms: LossTerms = call(read_values(output, batch), batch)
            else:
                terms = call(read_tokens(stage, output, batch, self._spec.temperature), batch)
            return terms

        return train_step(training, minibatch, loss_of, **self._placement())

    def sees(self, file: Path) -> bool:
        """Whether a file that the driver has just made is there for this rank too."""
        return comes_into_sight(file, _SEEN_WITHIN_S)

    def save(self, folder: Path) -> None:
        """Copy model, optimizer and schedule to host memory and start to write them; returns before they are written.

        Raises:
            FileExistsError: the folder exists and is not empty.
            ValueError: these ranks only score.
        """
        training, _ = self._trained(*TrainerPart)
        gather_parameters(training)
        staged = stage_checkpoint(folder, training)
        written: Future[dict[str, FileRecord]] = Future()

        def write() -> None:
            try:
                written.set_result(staged.write())
            except Exception as error:
                written.set_exception(error)

        self._written = written
        # a daemon: a worker that is told to go does not wait for its disk
        threading.Thread(target=write, name="checkpoint writer", daemon=True).start()

    def written(self) -> dict[str, FileRecord]:
        """Wait for what :meth:`save` started. Touches no group and no tensor, so it may run beside any other verb.

        Returns:
            what this rank wrote, by name in the folder.

        Raises:
            OSError: the disk did not take it, for instance because it is full.
        """
        return self._written.result()

    def load(self, folder: Path) -> None:
        """Load what :meth:`save` saved, at this or another layout. The reference stays as it is.

        Raises:
            ValueError: these ranks only score.
        """
        training, _ = self._trained(*TrainerPart)
        load_checkpoint(folder, training)

    def export_hf(self, folder: Path, like: Path) -> None:
        """Write the weights as a Hugging Face folder; rank 0 writes.

        Args:
            folder: to write.
            like: where configuration and tokenizer come from.

        Raises:
            ValueError: transformers has no class for such a critic.
        """
        is_critic = self._spec.head is Head.VALUE
        architecture = critic_architecture(self._spec.dims.architecture) if is_critic else None
        tensors = self._full_tensors()
        if self._rank == 0:
            save_hf_folder(folder, tensors, like=like, architecture=architecture)
        else:
            _exhaust(tensors)

    def listen(self, host: str) -> tuple[str, int]:
        """Open the channel that weights are sent through; called on rank 0 alone, which answers host and port."""
        self._listener = listen(host)
        return self._listener.host, self._listener.port

    def open_channel(
        self,
        world_size: int,
        timeout_s: float,
        transport: Transport,
        bucket_bytes: int,
        lanes: int,
        pushed_format: str | None,
    ) -> None:
        """Meet the receivers; rank 0 does, the others note what holds for pushes.

        What the receivers of an earlier channel told of what they keep holds for those that come in their places: an
        engine that is started anew cuts tensors as it did before, and an error names the one of which it wants more.

        Args:
            world_size: of the channel: rank 0 and all workers of the engine.
            timeout_s: bound on joining, and on each later wait for one receiver.
            transport: how the bytes travel.
            bucket_bytes: how many travel together.
            lanes: workers of each engine.
            pushed_format: that linears are sent in, see :mod:`megatron_rl.weights.fp8_push`; None: as they are.

        Raises:
            TransferError: a receiver did not come in time.
        """
        former = self._channel if self._pushed_format == pushed_format else None
        known = None if former is None else former.slicing()
        self._pushed_format, self._receiver_s = pushed_format, timeout_s
        if self._listener is not None:
            self._channel = Channel.open(
                self._listener,
                world_size=world_size,
                timeout_s=timeout_s,
                transport=transport,
                bucket_bytes=bucket_bytes,
                lanes=lanes,
                known=known,
            )

    def moved_bytes(self) -> dict[tuple[int | None, int | None], int]:
        """What ranks give in each push and export, by giver and taker; None: the Hugging Face tensors take it."""
        return self._plan.bytes_by_pair()

    def slice_plan(self) -> SlicePlan:
        """What the next push sends to each worker of an engine; asked of rank 0.

        Raises:
            ValueError: there is no channel.
        """
        if self._channel is None:
            raise ValueError("a channel must be open before it has a plan; call open_channel first")
        return self._channel.slice_plan()

    def send(self, version: int, deadline_s: float) -> tuple[PushReceipt, ...] | None:
        """Send the weights to the receivers that joined; every rank takes part, rank 0 answers.

        Args:
            version: of the weights.
            deadline_s: bound on the push. Ranks wait for rank 0 nine tenths of it, and rank 0 for a shard nine tenths
                of what receivers wait for it, so that there is time to say who is late, and to tell the receivers.

        Raises:
            TransferError: a receiver is gone or does not take the data in time.
            ShardLate: a rank is gone, or does not give its shard of a tensor in time.
        """
        taken_by = time.monotonic() + 0.9 * deadline_s
        tensors = self._full_tensors(
            waits=Waits(what=f"version {version}", shard_s=0.9 * self._receiver_s, taken_by=taken_by)
        )
        try:
            if self._channel is None:
                return None
            form = self._pushed_format
            return self._channel.send(version, tensors if form is None else quantised(tensors, self._weights, form))
        finally:
            _exhaust(tensors)  # the other ranks give their shards in any case, and wait until they are taken

    @cached_property
    def _plan(self) -> TransferPlan:
        """Of every push and export."""
        element_bytes = dtype(self._spec.model.dtype).itemsize
        return transfer_plan(self._weights, self._layout, HfFiles(), element_bytes=element_bytes)

    def offload(self, parts: Sequence[TrainerPart]) -> MemoryUse:
        """Move parts of the model to host memory; verbs that need them are refused from then on."""
        _, offload = self._trained()
        for part in parts:
            offload.out(part)
        return offload.memory()

    def onload(self, parts: Sequence[TrainerPart]) -> MemoryUse:
        """Bring parts of the model back to the device."""
        _, offload = self._trained()
        for part in parts:
            offload.back(part)
        return offload.memory()

    def _full_tensors(self, plan: TransferPlan | None = None, waits: Waits | None = None) -> Any:
        self._require(TrainerPart.WEIGHTS)
        if self._training is not None:
            gather_parameters(self._training)
        return full_tensors(local_parameters(self._models), plan or self._plan, self._layout, self._rank, waits)

    def formats(self) -> list[LinearFormat]:
        """What each linear of this rank's layers multiplies in."""
        return linear_formats(self._models, self._weights)

    def capabilities(self) -> list[Capability]:
        """What the parts of training are done with here."""
        found = capabilities(self._spec.model.layers, self._spec.model.dtype)
        if self._training is not None and self._spec.trainer.optimizer_on_host:
            found.append(Capability("Adam's step", f"{threads()} thread(s) of the host", "optimizer_on_host"))
        return found

    def close(self) -> None:
        """Leave the groups and free the model."""
        if self._training is not None:
            release(self._training)
        self._training = self._reference = self._offload = self._channel = None
        self._models = []
        stop_groups()


def _exhaust(tensors: Any) -> None:
    for _ in tensors:
        pass
