"""Seconds of each phase of a PPO step, from the workers' own clocks, and what the loop adds to them.

``python benchmarks/loop.py [METRICS.jsonl]`` reads the metrics of a finished run (the quick start's by default).

The busiest chain of a step is generation, then log-probs or values (whichever model is longer), then updates:
what a step would take if nothing but these were done. Overhead is the step's wall time less that chain: rewards,
advantages, weight push, Ray, waiting. Steps that evaluate or save are left out, and so are the first two (warm-up).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

WARM_UP = 2
LIMIT = 0.20


def chain(step: dict[str, float]) -> float:
    """Seconds of the busiest chain."""

    def busy(role: str, verb: str) -> float:
        return step.get(f"busy_s/{role}/{verb}", 0.0)

    policy = busy("policy", "logprobs") + busy("policy", "reference_logprobs")
    scoring = max(policy, busy("critic", "values"))
    return busy("engine", "generate") + scoring + max(busy("policy", "update"), busy("critic", "update"))


def main() -> None:
    """Print the table and the overhead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, nargs="?", default=Path("runs/quickstart/metrics.jsonl"))
    records = [json.loads(line) for line in parser.parse_args().metrics.read_text().splitlines()]
    steps = [record for record in records if "seconds/step" in record]
    learning = [step for step in steps if "policy/grad_norm" in step] or steps
    kept = [s for s in learning if not {"seconds/evaluate", "seconds/checkpoint"} & s.keys()][WARM_UP:]
    if not kept:
        raise SystemExit("no step left after the warm-up: run more steps")
    wall = median(step["seconds/step"] for step in kept)
    print(f"{len(kept)} steps, median of each:")
    for key in sorted({key for step in kept for key in step if key.startswith(("busy_s/", "seconds/"))}):
        seconds = median(step.get(key, 0.0) for step in kept)
        print(f"  {key:32s} {seconds:8.3f} s  {seconds / wall:6.1%} of the step")
    overheads = [1 - chain(step) / step["seconds/step"] for step in kept]
    print(f"overhead beyond the busiest chain: median {median(overheads):.1%} of a step (at most {LIMIT:.0%})")


if __name__ == "__main__":
    main()
