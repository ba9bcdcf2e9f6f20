"""The supervised stage whole, with its loop and its checkpoints, on ranks that rank 0 leads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rl.batches import Minibatch, TokenRows
from megatron_rl.checkpoints import RunCheckpoints, RunIdentity, find_checkpoint
from megatron_rl.config.schema import CheckpointConfig, ModelConfig, OptimizerConfig, SFTConfig, TrainerConfig
from megatron_rl.experience.batching import whole
from megatron_rl.experience.supervised import SupervisedRows
from megatron_rl.maths.losses import SupervisedLoss
from megatron_rl.metrics import MetricLog
from megatron_rl.sft import SupervisedRun, supervise
from tests.distributed.cases import Setup, start

STEPS = 5
PAIRS = [
    (list(range(2, 4 + number)), [*range(20 + 7 * number, 25 + 9 * number), 1]) for number in range(7)
]  # the responses differ in length, and the rows of a step do not divide their number


@dataclass(frozen=True)
class Answered:
    """What all ranks said."""

    value: Any

    def ready(self, within_s: float) -> bool:
        return True

    def result(self) -> Any:
        return self.value


class Led:
    """A model whose ranks do what rank 0 is asked for."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def _call(self, verb: str, *args: Any) -> list[Any]:
        dist.broadcast_object_list([(verb, args)], src=0)
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, getattr(self.worker, verb)(*args))
        return answers

    def follow(self) -> None:
        asked: list[Any] = [None]
        while True:
            dist.broadcast_object_list(asked, src=0)
            if asked[0] is None:
                return
            verb, args = asked[0]
            dist.all_gather_object([None] * dist.get_world_size(), getattr(self.worker, verb)(*args))

    def end(self) -> None:
        dist.broadcast_object_list([None], src=0)

    def update(self, minibatch: Minibatch[TokenRows], loss: Any) -> Answered:
        return Answered(next(answer for answer in self._call("update", minibatch, loss) if answer is not None))

    def blind_ranks(self, file: Path) -> Answered:
        return Answered([] if all(self._call("sees", file)) else ["a rank"])

    def save(self, folder: Path) -> Answered:
        return Answered(self._call("save", folder)[0])

    def written(self) -> Answered:
        return Answered({name: record for part in self._call("written") for name, record in part.items()})

    def load(self, folder: Path) -> Answered:
        return Answered(self._call("load", folder)[0])

    def export_hf(self, folder: Path, like: Path) -> Answered:
        return Answered(self._call("export_hf", folder, like)[0])


class StopAfter:
    """Asks to stop in the step of this number."""

    def __init__(self, steps: int | None) -> None:
        self._left = steps

    @property
    def asked(self) -> bool:
        if self._left is not None:
            self._left -= 1
        return self._left is not None and self._left <= 0


def staged(rank: int, port: int, model: Path, folder: Path, setup: Setup, stop_after: int | None) -> Any:
    """Run the stage, from the checkpoint in ``folder`` where there is one; rank 0 says how many steps are done, and the
    metrics of each.
    """
    worker = start(rank, port, model, setup)
    try:
        led = Led(worker)
        if rank > 0:
            return led.follow()
        try:
            return _run(led, model, folder, stop_after)
        finally:
            led.end()
    finally:
        worker.close()


def _run(led: Led, model: Path, folder: Path, stop_after: int | None) -> tuple[int, list[dict[str, float]]]:
    config = SFTConfig(
        run_dir=folder,
        output=folder / "model",
        model=ModelConfig(path=model, dtype="float32"),
        data=folder / "unread.jsonl",
        steps=STEPS,
        samples_per_step=3,
        trainer=TrainerConfig(optimizer=OptimizerConfig(lr=1e-2)),
        checkpoint=CheckpointConfig(every=2, asynchronous=False),
    )
    rows = SupervisedRows(PAIRS)
    checkpoints = RunCheckpoints(
        folder / "checkpoints",
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
        models={"policy": led},
        parts={"rows": rows},
        like=model,
        identity=RunIdentity(model={}, prompts=rows.digest(), settings={}),
    )
    start_step = checkpoints.start(find_checkpoint(folder / "checkpoints"))
    with MetricLog(folder, total_steps=STEPS, start_step=start_step) as metrics, checkpoints:
        done = supervise(
            SupervisedRun(
                config=config,
                start_step=start_step,
                rows=rows,
                model=led,
                loss=SupervisedLoss(),
                checkpoints=checkpoints,
                stop=StopAfter(stop_after),
                export=lambda: led.export_hf(config.output, model),
                metrics=metrics,
            )
        )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted: Callable[[str], bool] = lambda key: key == "step" or key.startswith("model/")  # noqa: E731
    return done, [{key: value for key, value in record.items() if wanted(key)} for record in records]


def loss_of(rank: int, port: int, model: Path, setup: Setup, rows: TokenRows) -> Any:
    """The loss of one supervised update, as the stage takes it."""
    worker = start(rank, port, model, setup)
    result = worker.update(whole(rows), SupervisedLoss())
    worker.close()
    return result
