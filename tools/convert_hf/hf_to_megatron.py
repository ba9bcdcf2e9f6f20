"""Write a Hugging Face model folder as a Megatron checkpoint (torch_dist), which loads at any layout.

A critic is a folder whose architecture ends in ForTokenClassification. An import that was interrupted goes on with
--resume, and gives the same files as one that was not.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage; to look for it in what they make takes 0.2 s

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_rl.convert.console import DTYPES, add_dtype, add_processes, print_written, progress_bar, run
from megatron_rl.convert.target import Target
from megatron_rl.convert.to_megatron import plan_import, run_import


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="hf_to_megatron.py", description=__doc__)
    parser.add_argument("source", type=Path, help="Hugging Face folder")
    parser.add_argument("target", type=Path, help="folder to write; it must not exist")
    add_dtype(parser, "of the weights; default: what they are, bfloat16 where they are quantised")
    add_processes(parser)
    parser.add_argument("--resume", action="store_true", help="go on with an import that was interrupted")
    parser.add_argument("--dry-run", action="store_true", help="print the plan's size and stop")
    asked = parser.parse_args(arguments)
    return run(lambda: _convert(asked))


def _convert(asked: argparse.Namespace) -> None:
    began = time.monotonic()
    target = Target(asked.target)
    if not asked.resume:
        target.refuse_existing()
    plan = plan_import(asked.source, dtype=DTYPES.get(asked.dtype), processes=asked.processes)
    summary = plan.summary()
    print(summary)
    if asked.dry_run:
        return
    with progress_bar("import", summary.moved_bytes) as progress:
        written = run_import(plan, target, resume=asked.resume, processes=asked.processes, progress=progress)
    print_written(asked.target, summary, began, written=written)


if __name__ == "__main__":
    gc.freeze()  # nor is it looked for there later on: 0.3 s at the end of the process
    gc.enable()
    sys.exit(main())
