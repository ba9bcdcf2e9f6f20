"""What ranks run in the tests of what they hold, and where."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from megatron_rl.interfaces import TrainerPart
from tests.distributed.cases import POLICY, Reinforce, Setup, minibatch, named, start, token_rows


def trained_with_breaks(rank: int, port: int, model: Path, setup: Setup, breaks: bool) -> dict[str, Any]:
    """Two updates; between and after them everything goes to host memory and comes back, if there are ``breaks``."""
    worker = start(rank, port, model, setup)
    found: dict[str, Any] = {"resident": [worker._offload.memory().planned_bytes]}

    def pause() -> None:
        if breaks:
            away = [worker.offload([part]).planned_bytes for part in (TrainerPart.STATE, TrainerPart.WEIGHTS)]
            back = worker.onload([*TrainerPart]).planned_bytes
            found["resident"] += [*away, back]

    pause()
    found["updates"] = []
    for _ in range(2):
        found["updates"].append(worker.update(minibatch(), Reinforce()))
        pause()
    found["weights"] = named(worker._full_tensors())
    found["states"] = [
        value.clone()
        for part in getattr(worker._training.optimizer, "chained_optimizers", [worker._training.optimizer])
        for state in part.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    found["reference"] = worker.logprobs(token_rows(), None, True)
    worker.close()
    return found


def refusals(rank: int, port: int, model: Path) -> list[str]:
    """What verbs say when what they need is away."""
    worker = start(rank, port, model, Setup(keep_reference=True), POLICY)
    said = []

    def attempt(verb: Any, *args: Any) -> None:
        try:
            verb(*args)
        except RuntimeError as error:
            said.append(str(error))
        else:
            said.append("it went through")

    rows = token_rows()
    worker.offload([TrainerPart.STATE])
    attempt(worker.update, minibatch(), Reinforce())
    attempt(worker.logprobs, rows, None, True)
    attempt(worker.logprobs, rows)
    attempt(worker.offload, [TrainerPart.STATE])
    worker.offload([TrainerPart.WEIGHTS])
    attempt(worker.logprobs, rows)
    attempt(worker.send, 1, 60.0)
    worker.onload([*TrainerPart])
    attempt(worker.onload, [TrainerPart.WEIGHTS])
    attempt(worker.update, minibatch(), Reinforce())
    worker.close()
    return said


def held_and_said(rank: int, port: int, model: Path, setup: Setup, export: Path) -> dict[str, Any]:
    """The bytes of a fresh rank's parameters and of all tensors that came with it; its scores, activations and export;
    what it says to verbs that train, save, load and move.
    """
    before = storages()  # held, so that no new one gets the address of one that goes meanwhile
    worker = start(rank, port, model, setup)
    added = [storage.nbytes() for address, storage in storages().items() if address not in before]
    found: dict[str, Any] = {"all": sum(added)}
    del before
    found["parameters"] = sum(parameter.nbytes for chunk in worker._models for parameter in chunk.parameters())
    rows = token_rows()
    found["scores"] = worker.logprobs(rows), worker.logprobs(rows, packed=False)
    found["activations"] = worker.activations(rows, True)
    worker.export_hf(export, model)
    found["said"] = []
    for verb, *args in (
        (worker.update, minibatch(), Reinforce()),
        (worker.save, export / "never"),
        (worker.load, export),
        (worker.offload, [TrainerPart.WEIGHTS]),
        (worker.onload, [TrainerPart.WEIGHTS]),
    ):
        try:
            verb(*args) if setup.updates is None else None
        except ValueError as error:
            found["said"].append(str(error))
    worker.close()
    return found


def storages() -> dict[int, torch.UntypedStorage]:
    """Of the tensors that are alive in this process, by address."""
    gc.collect()
    found = (item.untyped_storage() for item in gc.get_objects() if isinstance(item, torch.Tensor))
    return {storage._cdata: storage for storage in found}
