"""A small run to be killed: two ranks in worker processes of the runtime, and checkpoints at every step; no Ray.

``python -m tests.distributed.saving FOLDER MODEL`` prints what each update gave, when each save begins, and
when its checkpoint is complete.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle

from megatron_rl.checkpoints import RunCheckpoints, RunIdentity, find_checkpoint
from megatron_rl.device import prepare_megatron
from megatron_rl.layout import ParallelLayout
from megatron_rl.ray_runtime.child import Call, Reply
from megatron_rl.ray_runtime.supervisor import port_kept
from tests.distributed.cases import Reinforce, Setup, minibatch, start

LAYOUT = ParallelLayout(tensor=2)


def build(rank: int, port: int, model: Path) -> Any:
    prepare_megatron()
    return start(rank, port, model, Setup(layout=LAYOUT))


@dataclass
class Answers:
    """What all ranks say to one call."""

    pipes: list[Connection]
    finish: Callable[[list[Any]], Any]

    def ready(self, within_s: float) -> bool:
        return all(pipe.poll(within_s) for pipe in self.pipes)

    def result(self) -> Any:
        replies: list[Reply] = [pickle.loads(pipe.recv_bytes()) for pipe in self.pipes]
        for reply in replies:
            assert not reply.error, reply.error
        return self.finish([pickle.loads(reply.value) for reply in replies])


class Model:
    """Two ranks."""

    def __init__(self, model: Path) -> None:
        self.pipes: list[Connection] = []
        self.beside: list[Connection] = []
        for _ in range(LAYOUT.world_size):
            (ours, theirs), (ours_beside, theirs_beside) = socket.socketpair(), socket.socketpair()
            numbers = [theirs.fileno(), theirs_beside.fileno()]
            program = "from megatron_rl.ray_runtime.child import main; main()"
            command = [sys.executable, "-c", program, *map(str, numbers), str(os.getpid())]
            subprocess.Popen(command, pass_fds=numbers)
            self.pipes.append(Connection(ours.detach()))
            self.beside.append(Connection(ours_beside.detach()))
        with port_kept() as kept:
            for rank, pipe in enumerate(self.pipes):
                payload = cloudpickle.dumps((build, (rank, kept.getsockname()[1], model), {}))
                pipe.send_bytes(pickle.dumps(Call(phase="start", payload=payload)))
            Answers(self.pipes, list).result()

    def call(self, pipes: list[Connection], finish: Callable[[list[Any]], Any], verb: str, *args: Any) -> Answers:
        for pipe in pipes:
            pipe.send_bytes(pickle.dumps(Call(phase=verb, payload=cloudpickle.dumps((verb, args, {})))))
        return Answers(pipes, finish)

    def update(self) -> float:
        answers: list[Any] = self.call(self.pipes, list, "update", minibatch(), Reinforce()).result()
        return next(float(answer.grad_norm) for answer in answers if answer is not None)

    def blind_ranks(self, file: Path) -> Answers:
        return self.call(self.pipes, lambda seen: [] if all(seen) else ["a rank"], "sees", file)

    def save(self, folder: Path) -> Answers:
        return self.call(self.pipes, list, "save", folder)

    def written(self) -> Answers:
        return self.call(self.beside, lambda parts: {k: v for part in parts for k, v in part.items()}, "written")

    def load(self, folder: Path) -> Answers:
        return self.call(self.pipes, list, "load", folder)

    def export_hf(self, folder: Path, like: Path) -> Answers:
        return self.call(self.pipes, list, "export_hf", folder, like)


def saved_step(folder: Path) -> int:
    """Of the last complete checkpoint; 0 where there is none."""
    latest = folder / "latest"
    name = latest.read_text() if latest.is_file() else "none"
    return int(name.removeprefix("step_")) if name.startswith("step_") else 0


def tell_saves(folder: Path, last: int) -> None:
    while True:
        if (step := saved_step(folder)) != last:
            print(f"saved {step}\n", end="", flush=True)
            last = step
        time.sleep(0.002)


def main(folder: Path, source: Path) -> None:
    saved = find_checkpoint(folder)
    model = Model(source)
    checkpoints = RunCheckpoints(
        folder,
        keep=2,
        asynchronous=True,
        models={"policy": model},
        parts={},
        like=source,
        identity=RunIdentity(model={}, prompts="", settings={}),
    )
    step = checkpoints.start(saved)
    print(f"start {step}\n", end="", flush=True)
    threading.Thread(target=tell_saves, args=(folder, saved_step(folder)), daemon=True).start()
    while True:
        print(f"update {step} {model.update().hex()}\n", end="", flush=True)
        step += 1
        print(f"save {step}\n", end="", flush=True)
        checkpoints.save(step, wait=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
