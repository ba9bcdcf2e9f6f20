"""Tokens per second of log-probs, values and updates: rows packed end to end beside rows padded to the longest.

``python benchmarks/train_step.py`` makes a small random model and rows whose lengths have a long tail (mean about 900
tokens, at most 3,000, like responses of the seed recipe), and runs the real ranks on one rank of megatron-core. Both
ways compute the same numbers; only real tokens are counted. The last lines say how evenly rows are dealt out to
data-parallel replicas by FLOPs.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.arithmetic_cpu.task import Sizes, write_model
from megatron_rl.batches import ExperienceBatch, Minibatch, RolloutBatch
from megatron_rl.config.schema import ModelConfig, OptimizerConfig, TrainerConfig
from megatron_rl.experience.packing import plan_rows
from megatron_rl.layout import ParallelLayout
from megatron_rl.maths.losses import PolicyLoss, ValueLoss
from megatron_rl.mcore.spec import WorkerSpec, start_worker
from megatron_rl.model_dims import read_model_dims
from megatron_rl.weights.weight_map import Head

LONGEST, MEDIAN, SPREAD = 3000, 700.0, 0.75
PROMPT = 100
REPLICAS = 8


def long_tailed(rows: int, seed: int) -> torch.Tensor:
    """[rows] lengths in tokens: log-normal, cut at 3,000."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (MEDIAN * (SPREAD * torch.randn(rows, generator=generator)).exp()).long()
    return (drawn + PROMPT).clamp(max=LONGEST)


def experience(lengths: torch.Tensor, *, padded: bool) -> ExperienceBatch:
    """Random rows of these lengths; ``padded`` makes every row as long as the longest, with the same response."""
    generator = torch.Generator().manual_seed(0)
    width = int(lengths.max())
    column = torch.arange(width)
    mask = (column >= PROMPT) & (column < lengths[:, None])
    zeros = torch.zeros(mask.shape)
    rollouts = RolloutBatch(
        tokens=torch.randint(2, 300, mask.shape, generator=generator),
        lengths=torch.full_like(lengths, width) if padded else lengths,
        response_mask=mask,
        rollout_logprobs=zeros,
        sampled_mask=mask,
        scores=torch.zeros(len(lengths)),
        truncated=torch.zeros(len(lengths), dtype=torch.bool),
        group=torch.zeros(len(lengths), dtype=torch.int64),
        policy_version=0,
    )
    advantages = torch.randn(mask.shape, generator=generator) * mask
    return ExperienceBatch(
        rollouts=rollouts,
        old_logprobs=zeros - 5.0 * mask,
        ref_logprobs=None,
        values=zeros,
        rewards=zeros,
        advantages=advantages,
        returns=advantages,
    )


def seconds(work: Callable[[], object], rounds: int) -> float:
    """The median of ``rounds`` runs after one to warm up."""
    work()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return median(taken)


def measure(model: Path, head: Head, batches: dict[str, ExperienceBatch], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each verb, by the way that rows are laid out."""
    spec = WorkerSpec(
        role="policy" if head is Head.TOKEN else "critic",
        head=head,
        model=ModelConfig(path=model, dtype="float32"),
        dims=read_model_dims(model),
        trainer=TrainerConfig(optimizer=OptimizerConfig(lr=1e-6), tokens_per_microbatch=8192),
        temperature=1.0,
        total_updates=1000,
        seed=0,
        keep_reference=False,
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    worker = start_worker(spec, 0, "127.0.0.1", port, 600.0)
    found: dict[str, dict[str, float]] = {}
    for name, batch in batches.items():
        rows = batch.rollouts
        step = Minibatch(source=batch, rows=torch.arange(rows.rows), loss_weight=torch.ones(rows.tokens.shape))
        score, loss = (worker.logprobs, PolicyLoss()) if head is Head.TOKEN else (worker.values, ValueLoss())
        verbs = {
            "log-probs" if head is Head.TOKEN else "values": lambda score=score, rows=rows: score(rows),
            f"{spec.role} update": lambda step=step, loss=loss: worker.update(step, loss),
        }
        for verb, work in verbs.items():
            found.setdefault(verb, {})[name] = seconds(work, rounds)
    worker.close()
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=128)
    asked = parser.parse_args()
    lengths = long_tailed(asked.rows, seed=5)
    real = int(lengths.sum())
    print(f"{asked.rows} rows, mean {real / asked.rows:.0f} tokens, longest {int(lengths.max())}")
    batches = {"packed": experience(lengths, padded=False), "padded": experience(lengths, padded=True)}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        heads = asked.hidden // 32
        sizes = Sizes(
            hidden=asked.hidden, layers=2, heads=heads, kv_heads=heads, ffn_hidden=3 * asked.hidden, max_positions=4096
        )
        write_model(model, sizes, seed=0)
        print(f"{'':16}{'packed tokens/s':>18}{'padded tokens/s':>18}{'ratio':>8}")
        for head in (Head.TOKEN, Head.VALUE):
            for verb, taken in measure(model, head, batches, asked.rounds).items():
                rates = {name: real / taken[name] for name in ("packed", "padded")}
                ratio = rates["packed"] / rates["padded"]
                print(f"{verb:16}{rates['packed']:18.0f}{rates['padded']:18.0f}{ratio:8.2f}")
        dims = read_model_dims(model)
    many = long_tailed(1024, seed=2).tolist()
    for name, costs in (("FLOPs", [dims.row_flops(n) for n in many]), ("tokens", [float(n) for n in many])):
        plan = plan_rows(many, costs, ParallelLayout(data=REPLICAS), 8192, multiple=1)
        work = [sum(dims.row_flops(many[row]) for part in share for row in part) for share in plan.parts]
        spread = max(work) / min(work) - 1
        print(f"{len(many)} rows dealt out to {REPLICAS} replicas by {name}: FLOPs spread {spread:.2%}")


if __name__ == "__main__":
    main()
