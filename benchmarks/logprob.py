"""Log-probs and entropies straight from hidden states, in chunks, beside the plain way: all logits, then log-probs.

``python benchmarks/logprob.py [--tokens N] [--columns V] [--hidden H]``; the defaults are a micro-batch of 32k tokens
and one rank's share of a vocabulary of 152k at tensor parallel 8. Each path runs in processes of its own, in turn, and
the best of its rounds counts; where the machine does other work as well, compare the CPU seconds.

*Forward* is a log-prob pass: no gradient, no entropy. *Forward and backward* is an update's: log-probs with their
gradient, the entropy as a metric. Memory is the largest resident set of the latter above the one before it, when hidden
states and weight are there already.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251 - the log-probs exchange sums over a group, here of one rank
from torch import Tensor

from megatron_rl.mcore.logprobs import linear_logprobs

TEMPERATURE = 0.6
ROWS = {  # figure -> what it is, at most this many times the plain path's
    "peak_gib": ("peak memory, GiB", 1 / 4),
    "forward_s": ("forward, s", 1.0),
    "forward_cpu_s": ("forward, CPU s", 1.0),
    "both_s": ("forward and backward, s", 1.4),
    "both_cpu_s": ("forward and backward, CPU s", 1.4),
}

Scorer = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


class _FromLogits(torch.autograd.Function):
    """Log-prob and entropy of whole logits; keeps these alone for the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        scaled = logits / TEMPERATURE
        lse = scaled.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, targets, lse)
        picked, entropy = scaled.gather(-1, targets[:, None]) - lse, None
        if with_entropy:
            log_p = scaled.sub_(lse)
            entropy = -torch.linalg.vecdot(log_p.exp(), log_p)
            ctx.mark_non_differentiable(entropy)
        return picked.squeeze(-1), entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor, None, None]:
        logits, targets, lse = ctx.saved_tensors
        grad = (logits / TEMPERATURE).sub_(lse).exp_().mul_(-grad_logprobs[:, None])
        grad.scatter_add_(-1, targets[:, None], grad_logprobs[:, None])
        return grad.div_(TEMPERATURE), None, None


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """All logits at once, in float32."""
    return _FromLogits.apply((hidden @ weight.T).float(), targets, with_entropy)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """The trainer's way."""
    return linear_logprobs(
        hidden, weight, targets, temperature=TEMPERATURE, group=dist.group.WORLD, with_entropy=with_entropy
    )


PATHS: dict[str, Scorer] = {"plain": plain, "chunked": chunked}


def resident(what: str) -> float:
    """GiB of this process: ``VmRSS`` now, or ``VmHWM``, the most since it was last reset."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**20


def measure(path: Scorer, tokens: int, columns: int, hidden_size: int) -> dict[str, float]:
    """One round, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size).requires_grad_()
    weight = (torch.randn(columns, hidden_size) * 3 * hidden_size**-0.5).requires_grad_()
    targets, grad_logprobs = torch.randint(0, columns, (tokens,)), torch.randn(tokens)

    def timed(work: Callable[[], None]) -> tuple[float, float]:
        start = time.perf_counter(), time.process_time()
        work()
        return time.perf_counter() - start[0], time.process_time() - start[1]

    @torch.no_grad()
    def forward() -> None:
        path(hidden, weight, targets, False)

    def both() -> None:
        path(hidden, weight, targets, True)[0].backward(grad_logprobs)

    path(hidden[:64], weight, targets[:64], False)  # threads and kernels are there from now on
    forward_s, forward_cpu_s = timed(forward)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    both_s, both_cpu_s = timed(both)
    return {
        "peak_gib": resident("VmHWM") - before,
        "forward_s": forward_s,
        "forward_cpu_s": forward_cpu_s,
        "both_s": both_s,
        "both_cpu_s": both_cpu_s,
    }


def main() -> None:
    """Run both paths in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--columns", type=int, default=19008)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--path", choices=sorted(PATHS), help="one round of this path here, as JSON")
    given = parser.parse_args()
    if given.path:
        print(json.dumps(measure(PATHS[given.path], given.tokens, given.columns, given.hidden)))
        return
    sizes = [f"--tokens={given.tokens}", f"--columns={given.columns}", f"--hidden={given.hidden}"]
    best: dict[str, dict[str, float]] = {name: {} for name in PATHS}
    for _ in range(given.rounds):
        for name, figures in best.items():
            command = [sys.executable, __file__, "--path", name, *sizes]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            figures.update({key: min(value, figures.get(key, value)) for key, value in found.items()})
    print(
        f"{given.tokens} tokens x {given.columns} columns, hidden {given.hidden}, float32, "
        f"{torch.get_num_threads()} threads, best of {given.rounds}"
    )
    print(f"{'':28s} {'plain':>8s} {'chunked':>8s} {'ratio':>7s} {'at most':>8s}")
    for key, (label, limit) in ROWS.items():
        one, other = best["plain"][key], best["chunked"][key]
        print(f"{label:28s} {one:8.2f} {other:8.2f} {other / one:7.2f} {limit:8.2f}")


if __name__ == "__main__":
    main()
