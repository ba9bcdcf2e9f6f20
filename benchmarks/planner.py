"""Predicted memory and CPU-seconds of an update beside measurement, on the CPU's real ranks.

``python benchmarks/planner.py`` runs policy updates of small random models, each setting in processes of its own. The
first setting calibrates: what its ranks hold beyond the plan (interpreter, torch, megatron-core) is added to every
prediction of memory, and the ratio of its CPU-seconds to the plan's multiplies every prediction of time. The others are
then predicted and measured: the largest resident set of a rank, and CPU-seconds of all ranks, median of the rounds.

glibc is told to give freed blocks back at once, as a GPU's allocator reuses them: else the resident set says how its
heap is broken up, and not what is held.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_rl.config.schema import ModelConfig, OptimizerConfig, TrainerConfig
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import read_model_dims
from megatron_rl.planner.devices import DEVICES
from megatron_rl.planner.memory import device_bytes, trainer_cells
from megatron_rl.planner.times import Machine, Work, update_time
from megatron_rl.weights.rules import Head

MEMORY_BOUND, TIME_BOUND = 0.10, 0.25
CPU = Machine(device=DEVICES["cpu"], per_node=8)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model, a batch and a layout."""

    name: str
    hidden: int = 256
    layers: int = 4
    rows: int = 8
    row_tokens: int = 512
    microbatch: int = 4096
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    recompute: Any = "none"

    def trainer(self) -> TrainerConfig:
        layout = ParallelLayout(
            tensor=self.tensor, pipeline=self.pipeline, data=self.data, sequence_parallel=self.tensor > 1
        )
        return TrainerConfig(
            optimizer=OptimizerConfig(lr=1e-6),
            layout=layout,
            tokens_per_microbatch=self.microbatch,
            recompute=self.recompute,
        )


SETTINGS = (
    Setting(name="calibration"),
    Setting(name="hidden 384", hidden=384),
    Setting(name="8 layers", layers=8),
    Setting(name="16 rows", rows=16),
    Setting(name="short micro-batches", microbatch=1024),
    Setting(name="rows of 1,024", rows=4, row_tokens=1024),
    Setting(name="full recompute", recompute="full"),
    Setting(name="TP2 SP", tensor=2),
    Setting(name="PP2", pipeline=2, microbatch=1024),
    Setting(name="DP2", data=2),
)


def measure(setting: Setting, model: Path, rank: int, port: int, rounds: int) -> tuple[float, int]:
    """CPU-seconds of an update (median) and the largest resident set in bytes, of this process as one rank."""
    import torch

    from benchmarks.train_step import experience
    from megatron_rl.batches import Minibatch
    from megatron_rl.maths.losses import PolicyLoss
    from megatron_rl.mcore.spec import WorkerSpec, start_worker

    spec = WorkerSpec(
        role="policy",
        head=Head.TOKEN,
        model=ModelConfig(path=model, dtype="float32"),
        dims=read_model_dims(model),
        trainer=setting.trainer(),
        temperature=1.0,
        total_updates=1000,
        seed=0,
        keep_reference=False,
    )
    worker = start_worker(spec, rank, "127.0.0.1", port, 600.0)
    batch = experience(torch.full((setting.rows,), setting.row_tokens), padded=False)
    width = batch.rollouts.tokens.shape
    step = Minibatch(source=batch, rows=torch.arange(setting.rows), loss_weight=torch.ones(width))
    taken = []
    for _ in range(rounds + 1):
        started = time.process_time()
        worker.update(step, PolicyLoss())
        taken.append(time.process_time() - started)
    worker.close()
    return median(taken[1:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(setting: Setting, model: Path, rounds: int) -> tuple[float, int]:
    """CPU-seconds of all ranks, and the largest rank's bytes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--setting", json.dumps(asdict(setting)), "--model", str(model)]
    ranks = [
        subprocess.Popen(
            [*command, "--rank", str(rank), "--port", str(port), "--rounds", str(rounds)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        )
        for rank in range(setting.trainer().layout.world_size)
    ]
    answers = [json.loads(rank.communicate(timeout=600)[0].splitlines()[-1]) for rank in ranks]
    return sum(seconds for seconds, _ in answers), max(held for _, held in answers)


def predicted(setting: Setting, model: Path) -> tuple[float, float]:
    """The same from the plan, before it is calibrated."""
    dims, trainer = read_model_dims(model), setting.trainer()
    work = Work(rows=setting.rows, row_tokens=setting.row_tokens)
    found = update_time(dims, trainer, Head.TOKEN, CPU, work, "float32")
    busy = found.total - found.bubble
    there = setting.rows * setting.row_tokens // setting.data  # a replica's rows may be fewer than a micro-batch takes
    filled = replace(trainer, tokens_per_microbatch=min(setting.microbatch, there))
    held = device_bytes(trainer_cells("policy", dims, filled, Head.TOKEN, "float32", reference=False, on_gpu=False))
    return busy * trainer.layout.world_size, held


def main() -> None:
    """Print the table; the exit status says whether all errors are within their bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.setting:
        setting = Setting(**json.loads(asked.setting))
        print(json.dumps(measure(setting, asked.model, asked.rank, asked.port, asked.rounds)))
        return
    from examples.arithmetic_cpu.task import Sizes, write_model

    print(f"{'setting':22}{'MiB said':>10}{'measured':>10}{'error':>8}{'CPU-s said':>12}{'measured':>10}{'error':>8}")
    factor = base = 0.0
    within = True
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            heads = setting.hidden // 32
            sizes = Sizes(
                hidden=setting.hidden,
                layers=setting.layers,
                heads=heads,
                kv_heads=heads,
                ffn_hidden=3 * setting.hidden,
                max_positions=4096,
            )
            write_model(model, sizes, seed=0)
            seconds, held = measured(setting, model, asked.rounds)
            said_seconds, said_held = predicted(setting, model)
        if not factor:
            factor, base = seconds / said_seconds, held - said_held
        time_error, memory_error = said_seconds * factor / seconds - 1, (said_held + base) / held - 1
        within &= abs(time_error) <= TIME_BOUND and abs(memory_error) <= MEMORY_BOUND
        print(
            f"{setting.name:22}{(said_held + base) / 2**20:10.0f}{held / 2**20:10.0f}{memory_error:+8.0%}"
            f"{said_seconds * factor:12.2f}{seconds:10.2f}{time_error:+8.0%}",
            flush=True,
        )
    print(f"beyond the plan: {base / 2**20:.0f} MiB of each rank; times x {factor:.2f}")
    sys.exit(not within)


if __name__ == "__main__":
    main()
