"""Predicted memory and seconds of an update beside measurement, by the trainer's real ranks.

``python benchmarks/planner.py`` runs policy updates of small random models on a CPU, each setting in processes of its
own; with ``--device h100`` (or ``h200``, ``a100-80g``) of larger ones in bfloat16 on this machine's GPUs, layouts of
more ranks than there are GPUs left out. The first setting calibrates: what its ranks hold beyond the plan (on a CPU
interpreter, torch, megatron-core) is added to every prediction of memory, and the ratio of its seconds to the plan's
multiplies every prediction of time. The others are then predicted and measured, median of the rounds. On a CPU: the
largest resident set of a rank, and CPU-seconds of all ranks. On a GPU: the most that a rank had allocated
(``torch.cuda.max_memory_allocated``), and wall seconds of an update after which the GPU is waited for.

On a CPU glibc is told to give freed blocks back at once, as a GPU's allocator reuses them: else the resident set says
how its heap is broken up, and not what is held.
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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu_checks.trainings import Job, train
from megatron_rl.config.schema import ModelConfig, OptimizerConfig, TrainerConfig
from megatron_rl.device import gpu_count
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import read_model_dims
from megatron_rl.planner.devices import DEVICES
from megatron_rl.planner.memory import device_bytes, trainer_cells
from megatron_rl.planner.times import Machine, Work, update_time
from megatron_rl.weights.rules import Head

GPUS = ("h100", "h200", "a100-80g")
MEMORY_BOUND = 0.10


def time_bound(device: str) -> float:
    """On the relative error of seconds."""
    return 0.25 if device == "cpu" else 0.20


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
    head_dim: int = 32
    vocabulary: int = 384
    dtype: str = "float32"

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    def write_model(self, folder: Path) -> Path:
        """With random weights, unless a setting before has made the same."""
        from examples.arithmetic_cpu.task import Sizes, write_model

        model = folder / f"{self.hidden}-{self.layers}-{self.vocabulary}"
        if not model.exists():
            heads = self.hidden // self.head_dim
            sizes = Sizes(
                hidden=self.hidden,
                layers=self.layers,
                heads=heads,
                kv_heads=heads,
                head_dim=self.head_dim,
                ffn_hidden=3 * self.hidden,
                vocabulary=self.vocabulary,
                max_positions=4096,
                init_std=0.1 if self.dtype == "float32" else 0.02,
            )
            write_model(model, sizes, seed=0)
        return model

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
_ON_GPU = Setting(
    name="calibration",
    hidden=2048,
    rows=16,
    row_tokens=2048,
    microbatch=8192,
    head_dim=128,
    vocabulary=16384,
    dtype="bfloat16",
)
GPU_SETTINGS = (
    _ON_GPU,
    replace(_ON_GPU, name="hidden 3,072", hidden=3072),
    replace(_ON_GPU, name="8 layers", layers=8),
    replace(_ON_GPU, name="32 rows", rows=32),
    replace(_ON_GPU, name="short micro-batches", microbatch=4096),
    replace(_ON_GPU, name="rows of 4,096", rows=8, row_tokens=4096),
    replace(_ON_GPU, name="full recompute", recompute="full"),
    replace(_ON_GPU, name="TP2 SP", tensor=2),
    replace(_ON_GPU, name="PP2", pipeline=2, microbatch=4096),
    replace(_ON_GPU, name="DP2", data=2),
)
"""Some GB each: weights, gradients and Adam's states about as much as activations. Those of one rank come first."""


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """Seconds of an update, and bytes of the rank with the most."""

    seconds: float
    held: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was said, by the plan alone and calibrated, and what was measured."""

    setting: Setting
    plan: Amounts
    said: Amounts
    found: Amounts

    @property
    def time_error(self) -> float:
        """Relative to what was measured."""
        return self.said.seconds / self.found.seconds - 1

    @property
    def memory_error(self) -> float:
        """Relative to what was measured."""
        return self.said.held / self.found.held - 1

    def within(self, device: str) -> bool:
        return abs(self.time_error) <= time_bound(device) and abs(self.memory_error) <= MEMORY_BOUND


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


def measured_on_cpu(setting: Setting, model: Path, rounds: int) -> Amounts:
    """By ranks of its own: CPU-seconds of all, and the largest rank's bytes."""
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
        for rank in range(setting.ranks)
    ]
    answers = [json.loads(rank.communicate(timeout=600)[0].splitlines()[-1]) for rank in ranks]
    return Amounts(seconds=sum(seconds for seconds, _ in answers), held=max(held for _, held in answers))


def job(setting: Setting, model: Path, rounds: int) -> Job:
    """The same updates for ranks that go through several settings."""
    return Job(
        model=model,
        head=Head.TOKEN,
        trainer=setting.trainer(),
        dtype=setting.dtype,
        rows=setting.rows,
        length=setting.row_tokens,
        vocabulary=setting.vocabulary,
        updates=rounds + 2,
    )


def predicted(setting: Setting, model: Path, device: str) -> Amounts:
    """The same from the plan, before it is calibrated."""
    dims, trainer, machine = read_model_dims(model), setting.trainer(), Machine(device=DEVICES[device], per_node=8)
    work = Work(rows=setting.rows, row_tokens=setting.row_tokens)
    found = update_time(dims, trainer, Head.TOKEN, machine, work, setting.dtype)
    there = setting.rows * setting.row_tokens // setting.data  # a replica's rows may be fewer than a micro-batch takes
    filled = replace(trainer, tokens_per_microbatch=min(setting.microbatch, there))
    on_gpu = machine.device.is_gpu
    cells = trainer_cells("policy", dims, filled, Head.TOKEN, setting.dtype, reference=False, on_gpu=on_gpu)
    seconds = found.total if on_gpu else (found.total - found.bubble) * setting.ranks  # CPU-seconds of all ranks
    return Amounts(seconds=seconds, held=device_bytes(cells))


def compared(device: str, settings: Sequence[Setting], folder: Path, rounds: int) -> Iterator[Comparison]:
    """Each setting as it is measured; the first one calibrates the others.

    Args:
        device: of the planner's table; all but ``cpu`` is measured on this machine's GPUs.
        settings: those of as many ranks next to each other.
        folder: models are written to it.
        rounds: updates that are measured.
    """
    base = factor = None
    for setting, found in _measured(device, settings, folder, rounds):
        plan = predicted(setting, setting.write_model(folder), device)
        if base is None or factor is None:
            base, factor = found.held - plan.held, found.seconds / plan.seconds
        said = Amounts(seconds=plan.seconds * factor, held=plan.held + base)
        yield Comparison(setting=setting, plan=plan, said=said, found=found)


def _measured(device: str, settings: Sequence[Setting], folder: Path, rounds: int) -> Iterator[tuple[Setting, Amounts]]:
    """On a CPU each setting has processes of its own, as a resident set never shrinks."""
    if device == "cpu":
        for setting in settings:
            yield setting, measured_on_cpu(setting, setting.write_model(folder), rounds)
        return
    for _, group in groupby(settings, key=lambda setting: setting.ranks):
        same = list(group)
        jobs = [job(setting, setting.write_model(folder), rounds) for setting in same]
        for setting, found in zip(same, train(jobs), strict=True):
            yield setting, Amounts(seconds=median(found.seconds[2:]), held=found.peak_bytes)


def settings_for(device: str, gpus: int) -> tuple[Setting, ...]:
    """All that this many GPUs can run; a CPU runs any number of ranks."""
    return SETTINGS if device == "cpu" else tuple(setting for setting in GPU_SETTINGS if setting.ranks <= gpus)


def main() -> None:
    """Print the table; the exit status says whether all errors are within their bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", *GPUS), default="cpu", help="what is measured here")
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
    gpus = gpu_count()
    if asked.device != "cpu" and not gpus:
        parser.error(f"--device {asked.device} is measured on a GPU, and torch sees none here")
    unit = "CPU-s" if asked.device == "cpu" else "s"
    print(f"{'setting':22}{'MiB said':>10}{'measured':>10}{'error':>8}{unit + ' said':>12}{'measured':>10}{'error':>8}")
    within, beyond, factor = True, 0.0, 1.0
    with tempfile.TemporaryDirectory() as folder:
        for one in compared(asked.device, settings_for(asked.device, gpus), Path(folder), asked.rounds):
            within &= one.within(asked.device)
            beyond, factor = one.said.held - one.plan.held, one.said.seconds / one.plan.seconds
            print(
                f"{one.setting.name:22}{one.said.held / 2**20:10.0f}{one.found.held / 2**20:10.0f}"
                f"{one.memory_error:+8.0%}{one.said.seconds:12.3g}{one.found.seconds:10.3g}{one.time_error:+8.0%}",
                flush=True,
            )
    print(f"beyond the plan: {beyond / 2**20:.0f} MiB of each rank; times x {factor:.2f}")
    sys.exit(not within)


if __name__ == "__main__":
    main()
